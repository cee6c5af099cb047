//! `cargo xtask fuzz hypercalls`: random calls of the paravirtual ABI, from a bare-metal guest under binary translation.

use crate::host::Result;
use paravane_tests::conform;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long to go on
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// First seed; the time if it is not given
    #[arg(long)]
    seed: Option<u64>,
}

/// Steps with one seed, after which a new machine begins with the next.
const STEPS: u64 = 300_000;

/// Makes calls until the time is over or something goes wrong.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let first = args.seed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs()));
    let start = Instant::now();
    let mut seeds = 0;
    while seeds == 0 || start.elapsed() < Duration::from_secs(args.seconds) {
        let seed = first.wrapping_add(seeds);
        if let Err(wrong) = conform::fuzz(seed, STEPS) {
            println!("{wrong}");
            println!("again: cargo xtask fuzz hypercalls --seconds 0 --seed {seed}");
            return Ok(ExitCode::FAILURE);
        }
        seeds += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} steps from {seeds} seeds, the first {first}, in {seconds:.0} s: no harm", seeds * STEPS);
    Ok(ExitCode::SUCCESS)
}
