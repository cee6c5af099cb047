//! `cargo xtask fuzz state`: damaged vCPU states, loaded and let go, for minutes or hours.
//!
//! The same test runs for two seconds with the others; here it runs long, from another seed each time. A failure prints the seed,
//! the round and the state.

use crate::host::{Doing, Failure, Result};
use std::process::{Command, ExitCode};
use std::time::{SystemTime, UNIX_EPOCH};

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where the random sequence starts; the time if it is not given
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs the test.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs()));
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--release", "--package", "paravane", "--test", "handover", "hostile", "--", "--nocapture"])
        .env("PARAVANE_FUZZ_SECONDS", args.seconds.to_string())
        .env("PARAVANE_FUZZ_SEED", seed.to_string())
        .status()
        .doing("cargo cannot be started")?;
    if status.success() {
        Ok(ExitCode::SUCCESS)
    } else {
        Err(Failure::new(format!("a damaged state did harm; --seed {seed} repeats it")))
    }
}
