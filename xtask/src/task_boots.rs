//! `cargo xtask boots`: the same boot many times in a row, which finds what happens once in fifty.
//!
//! The kernel places itself at a random address each time (KASLR is on), so no two boots translate the same code.

use crate::host::{self, Doing, Failure, Result};
use crate::{boot, task_guests};
use std::fs;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

/// Options of the soak.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many boots
    #[arg(long, default_value_t = 50)]
    count: u32,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// The engine: auto, kvm or bt
    #[arg(long, default_value = "bt")]
    engine: String,
    /// Seconds after which a boot counts as hung
    #[arg(long, default_value_t = 120)]
    limit: u64,
}

/// Boots, counts, and keeps the console of every failure.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::build_paravane()?;
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    let mut failures = 0;
    let mut times = Vec::new();
    for number in 1..=args.count {
        let mut command = boot::paravane(&program, &args.engine, &kernel, &guests.script_image(), boot::CMDLINE);
        let outcome = boot::Guest::start(&mut command, Stdio::null())?.finish(Duration::from_secs(args.limit))?;
        let problem = match outcome.status {
            None => Some(format!("killed after {} s", args.limit)),
            Some(status) if !status.success() => Some(status.to_string()),
            Some(_) if !outcome.console.contains("T done") => Some("powered off before its work was done".to_owned()),
            Some(_) => None,
        };
        times.push(outcome.time);
        let Some(problem) = problem else {
            println!("boot {number}: {:.2} s", outcome.time.as_secs_f64());
            continue;
        };
        failures += 1;
        let log = host::guests_dir().join(format!("failed-boot-{number}.log"));
        fs::write(&log, &outcome.console).doing("cannot keep a failed boot's console")?;
        println!("boot {number}: FAILED, {problem}; console in target/guests/failed-boot-{number}.log");
    }
    times.sort();
    if let (Some(first), Some(last)) = (times.first(), times.last()) {
        println!("shortest {:.2} s, longest {:.2} s", first.as_secs_f64(), last.as_secs_f64());
    }
    println!("{} of {} boots of {} succeeded", args.count - failures, args.count, args.kernel);
    if failures == 0 { Ok(ExitCode::SUCCESS) } else { Err(Failure::new(format!("{failures} boots failed"))) }
}
