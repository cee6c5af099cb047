//! `cargo xtask bench boot`: kernel start to power-off, Paravane beside QEMU's emulator in alternating runs.
//!
//! Alternating, because a shared machine's speed drifts: both see the same drift, and the ratio of the medians holds.
//! The same kernel, initramfs and memory size on both sides. Afterwards one guest waits at its shell prompt: what
//! CPU time it uses and how much memory the hypervisor holds beyond the guest's RAM.

use crate::host::{self, Result, mib};
use crate::{boot, task_guests};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// Options of the benchmark.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many runs of each
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// Paravane's engine: auto, kvm or bt
    #[arg(long, default_value = "bt")]
    engine: String,
}

/// A run that takes longer counts as failed.
const LIMIT: Duration = Duration::from_secs(180);

/// What the guest's shell prints when it waits; a part of init's greeting.
const PROMPT: &str = "busybox shell.";

/// The runs of one hypervisor.
struct Side {
    name: &'static str,
    times: Vec<f64>,
    peak_rss: u64,
    failures: u32,
}

impl Side {
    fn new(name: &'static str) -> Self {
        Self { name, times: Vec::new(), peak_rss: 0, failures: 0 }
    }

    fn run(&mut self, command: &mut Command) -> Result<()> {
        let outcome = boot::Guest::start(command, Stdio::null())?.finish(LIMIT)?;
        let good = outcome.status.is_some_and(|status| status.success()) && outcome.console.contains("T done");
        let seconds = outcome.time.as_secs_f64();
        println!(
            "{:10} {seconds:7.2} s  peak {}{}",
            self.name,
            mib(outcome.peak_rss),
            if good { "" } else { "  FAILED" }
        );
        if good {
            self.times.push(seconds);
            self.peak_rss = self.peak_rss.max(outcome.peak_rss);
        } else {
            self.failures += 1;
        }
        Ok(())
    }

    fn median(&mut self) -> Option<f64> {
        self.times.sort_by(f64::total_cmp);
        let middle = self.times.len() / 2;
        let upper = *self.times.get(middle)?;
        Some(if self.times.len() % 2 == 1 { upper } else { f64::midpoint(self.times[middle - 1], upper) })
    }
}

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::build_paravane()?;
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    let initrd = guests.script_image();
    let with_qemu = host::has_tool("qemu-system-x86_64");
    // The work without its two seconds of sleep, which would cost both the same.
    let cmdline = format!("{} paravane.bench", boot::CMDLINE);
    let (mut ours, mut theirs) = (Side::new("paravane"), Side::new("qemu-tcg"));
    for _ in 0..args.runs {
        ours.run(&mut boot::paravane(&program, &args.engine, &kernel, &initrd, &cmdline))?;
        if with_qemu {
            theirs.run(&mut boot::qemu(&kernel, &initrd, &cmdline))?;
        }
    }
    println!();
    for side in [&mut ours, &mut theirs] {
        if let Some(median) = side.median() {
            println!(
                "{:10} median {median:.2} s of {} runs, {} failed, peak {}",
                side.name,
                side.times.len(),
                side.failures,
                mib(side.peak_rss)
            );
        }
    }
    match (ours.median(), theirs.median()) {
        (Some(a), Some(b)) => println!("ratio {:.2} (paravane / qemu-tcg; Linux {})", a / b, args.kernel),
        _ if !with_qemu => {
            println!(
                "no comparison: qemu-system-x86_64 is not installed; get it with `apt-get install qemu-system-x86`"
            );
        }
        _ => println!("no comparison: one side has no run that succeeded"),
    }
    if ours.failures == 0 {
        idle(&program, &args.engine, &kernel, &guests.shell_image())?;
    }
    Ok(if ours.failures + theirs.failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Boots to the shell and measures the wait for a command that never comes.
fn idle(program: &Path, engine: &str, kernel: &Path, initrd: &Path) -> Result<()> {
    let mut command = boot::paravane(program, engine, kernel, initrd, boot::CMDLINE);
    // The pipe stays open and empty until the guest is dropped, which kills it.
    let mut guest = boot::Guest::start(&mut command, Stdio::piped())?;
    guest.wait_for(PROMPT, LIMIT)?;
    std::thread::sleep(Duration::from_secs(3));
    let seconds = 10.0;
    let before = guest.cpu_seconds();
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let share = 100.0 * (guest.cpu_seconds() - before) / seconds;
    let (ram, other) = guest.resident();
    println!("idle guest: {share:.1} % of one core; resident: guest RAM {}, everything else {}", mib(ram), mib(other));
    Ok(())
}
