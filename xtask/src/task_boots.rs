//! `cargo xtask boots`: the same boot many times in a row, which finds what happens once in fifty.
//!
//! The kernel places itself at a random address each time (KASLR is on), so no two boots translate the same code. A boot succeeds
//! when the guest did all its work and powered off, found all its CPUs online, and its log has no trouble to report
//! ([`crate::console_scan`]).

use crate::console_scan::{all_online, trouble};
use crate::host::{self, Doing, Failure, Result};
use crate::{boot, initramfs, task_guests};
use std::fs;
use std::path::PathBuf;
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
    /// How many vCPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Seconds after which a boot counts as hung
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Boot with this paravane program instead of building one
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
}

/// The guest's work.
const SCRIPT: &str = "echo \"cpus-online $(cat /sys/devices/system/cpu/online)\"\nsh /scripts/exercise";

/// Boots, counts, and keeps the console of every failure.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::paravane(args.paravane.as_deref())?;
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    let shell = fs::read(guests.shell_image()).doing("cannot read the guests' image")?;
    let image = host::Scratch::new("boots.cpio", &initramfs::with_script(&shell, SCRIPT))?;
    let online = format!("cpus-online {}", all_online(args.cpus));
    let mut failures = 0;
    let mut times = Vec::new();
    for number in 1..=args.count {
        let mut command = boot::paravane(&program, &args.engine, &kernel, image.path(), boot::CMDLINE);
        command.args(["--cpus", &args.cpus.to_string()]);
        let outcome = boot::Guest::start(&mut command, Stdio::null())?.finish(Duration::from_secs(args.limit))?;
        let problem = match outcome.status {
            None => Some(format!("killed after {} s", args.limit)),
            Some(status) if !status.success() => Some(status.to_string()),
            Some(_) if !outcome.console.contains("T done") => Some("powered off before its work was done".to_owned()),
            Some(_) if !outcome.console.lines().any(|line| line.trim() == online) => {
                Some("not all CPUs are online".to_owned())
            }
            Some(_) => trouble(&outcome.console).first().map(|line| format!("the log says \"{line}\"")),
        };
        times.push(outcome.time);
        let Some(problem) = problem else {
            println!("boot {number}: {:.2} s", outcome.time.as_secs_f64());
            continue;
        };
        failures += 1;
        let name = format!("failed-boot-{}-{}-{number}.log", args.kernel, args.cpus);
        fs::write(host::guests_dir().join(&name), &outcome.console).doing("cannot keep a failed boot's console")?;
        println!("boot {number}: FAILED, {problem}; console in target/guests/{name}");
    }
    times.sort();
    if let (Some(first), Some(last)) = (times.first(), times.last()) {
        println!("shortest {:.2} s, longest {:.2} s", first.as_secs_f64(), last.as_secs_f64());
    }
    println!("{} of {} boots of {} with {} vCPUs succeeded", args.count - failures, args.count, args.kernel, args.cpus);
    if failures == 0 { Ok(ExitCode::SUCCESS) } else { Err(Failure::new(format!("{failures} boots failed"))) }
}
