//! `cargo xtask bench smp`: what a second vCPU gains.
//!
//! The same work is done by a guest with one vCPU and by one with two, and by the host with one CPU's worth of work and with two:
//! that many copies of a program at a time, or a compressor with that many threads. The ratio is that of the throughput, best of
//! several rounds on each side. The host's own ratio is what the hardware has to give: two hardware threads of one core share it.

use crate::compute_root;
use crate::cpio::Archive;
use crate::host::{self, Doing, Failure, Result};
use crate::{boot, initramfs, task_guests};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// Options of the benchmark.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many rounds
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// How many vCPUs the larger guest has
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// The engine: auto, kvm or bt
    #[arg(long, default_value = "bt")]
    engine: String,
    /// When guest processes get windows: auto or off
    #[arg(long, default_value = "auto")]
    windows: String,
    /// Seconds after which a guest counts as hung
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Measure this paravane program instead of building one
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
}

/// Guest RAM.
const MEMORY: &str = "1G";

const WORK: &str = include_str!("../guest/bench_smp.sh");

/// Of jobs whose names begin so there is a copy per CPU, so that the work grows with them; of the others there is one.
const COPIED: [&str; 3] = ["compute-", "memory-", "compress-gzip"];

/// Jobs by name with their shortest time in seconds.
type Times = BTreeMap<String, f64>;

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.cpus < 2 {
        return Err(Failure::new("--cpus says how many vCPUs are compared with one; use 2 or more"));
    }
    let program = host::paravane(args.paravane.as_deref())?;
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    compute_root::fetch()?;
    let shell = fs::read(guests.shell_image()).doing("cannot read the guests' image")?;
    let mut archive = Archive::default();
    compute_root::pack(&mut archive, &compute_root::root(), "compute")?;
    let script =
        format!("dmesg -n 1\nmount -t tmpfs tmpfs /tmp\nexport ROOT=/compute WORK=/tmp COPIES=$(nproc)\n{WORK}");
    let image =
        host::Scratch::new("smp.cpio", &[shell, archive.finish(), initramfs::with_script(&[], &script)].concat())?;

    let guest = |cpus: u32, times: &mut Times| {
        let mut command = boot::paravane_with(MEMORY, &program, &args.engine, &kernel, image.path(), boot::CMDLINE);
        command.args(["--cpus", &cpus.to_string(), "--windows", &args.windows]);
        let outcome = boot::Guest::start(&mut command, Stdio::null())?.finish(Duration::from_secs(args.limit))?;
        if !outcome.status.is_some_and(|status| status.success()) {
            let name = "failed-bench-smp.log";
            fs::write(host::guests_dir().join(name), &outcome.console).doing("cannot keep the guest's console")?;
            let sentence = format!("a guest with {cpus} vCPUs failed; its console is in target/guests/{name}");
            return Err(Failure::new(sentence));
        }
        note(&outcome.console, times)
    };
    let folder = std::env::temp_dir().join(format!("paravane-bench-smp-{}", std::process::id()));
    let on_host = |copies: u32, times: &mut Times| {
        fs::create_dir_all(&folder).doing("cannot create a folder for temporary files")?;
        let mut command = Command::new("sh");
        command.args(["-c", WORK]).env("ROOT", compute_root::root()).env("WORK", &folder);
        let text = host::output(command.env("COPIES", copies.to_string()));
        let _ = fs::remove_dir_all(&folder);
        note(&text?, times)
    };

    // Alternating, so that the drift of a shared machine meets all.
    let mut sides: [Times; 4] = Default::default();
    for round in 1..=args.runs {
        eprintln!("round {round} of {}", args.runs);
        on_host(1, &mut sides[0])?;
        on_host(args.cpus, &mut sides[1])?;
        guest(1, &mut sides[2])?;
        guest(args.cpus, &mut sides[3])?;
    }
    let copies = format!("{} vCPUs", args.cpus);
    println!("{:<16} {:>12} {:>12} {:>8} {:>12}", "", "1 vCPU", copies, "gain", "host's gain");
    let mut logs: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (name, one) in &sides[2] {
        let gain = |one: &Times, all: &Times| {
            let work = if copied(name) { f64::from(args.cpus) } else { 1.0 };
            Some(work * one.get(name)? / all.get(name)?)
        };
        let (Some(&all), Some(ours), Some(hosts)) =
            (sides[3].get(name), gain(&sides[2], &sides[3]), gain(&sides[0], &sides[1]))
        else {
            return Err(Failure::new(format!("{name} was not measured everywhere")));
        };
        println!("{name:<16} {one:>10.2} s {all:>10.2} s {ours:>8.2} {hosts:>12.2}");
        logs.entry(name.split('-').next().unwrap_or(name)).or_default().push(ours.ln());
    }
    for (group, logs) in logs {
        println!(
            "{group}: {:.2} times one vCPU (geometric mean)",
            (logs.iter().sum::<f64>() / logs.len() as f64).exp()
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn copied(name: &str) -> bool {
    COPIED.iter().any(|start| name.starts_with(start))
}

/// Takes the times from a console, the shortest of each job.
fn note(console: &str, times: &mut Times) -> Result<()> {
    let mut done = false;
    for line in console.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("smp-failed ") {
            return Err(Failure::new(format!("{name} failed")));
        }
        done |= line == "smp-done";
        let Some(rest) = line.strip_prefix("smp-time ") else { continue };
        let mut words = rest.split_whitespace();
        let name = words.next().unwrap_or_default().to_owned();
        let mut number = || words.next().and_then(|word| word.parse::<f64>().ok());
        if let (Some(before), Some(after)) = (number(), number()) {
            let best = times.entry(name).or_insert(f64::INFINITY);
            *best = best.min(after - before);
        }
    }
    if done { Ok(()) } else { Err(Failure::new("the work did not end")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_time_of_each_job_counts() {
        let mut times = Times::new();
        note("smp-time compress-xz 1.50 4.00\r\nsmp-time compute-loop 4.00 5.00\r\nsmp-done\r\n", &mut times)
            .expect("good");
        note("smp-time compress-xz 10.00 12.00\nsmp-done\n", &mut times).expect("good");
        assert_eq!((times["compress-xz"], times["compute-loop"]), (2.0, 1.0));
        assert!(note("smp-time compress-xz 10.00 12.00\n", &mut times).is_err());
        assert!(note("smp-failed compress-xz\nsmp-done", &mut times).is_err());
        assert!(copied("compute-loop") && copied("compress-gzip") && !copied("compress-xz"));
    }
}
