//! `cargo xtask bench boot` and `cargo xtask boots`: whole boots, timed and repeated.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Result, build_paravane, initramfs, known_kernel, options, task_guests};

/// One finished boot.
struct Boot {
    /// From the start of the process to its end.
    time: Duration,
    /// Largest resident set seen, in KiB.
    peak_kib: u64,
}

/// Longest that a boot may take before it counts as failed.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs one boot to its end and checks that every marker appeared and the status is 0.
fn boot(command: &mut Command) -> Result<Boot> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| format!("cannot start {}: {e}", command.get_program().to_string_lossy()))?;
    let output = child.stdout.take().ok_or("the guest has no output")?;
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(output).split(b'\n').map_while(std::result::Result::ok);
        lines.map(|l| String::from_utf8_lossy(&l).into_owned()).collect::<Vec<_>>()
    });
    let mut peak_kib = 0;
    let status = loop {
        peak_kib = peak_kib.max(resident_peak(child.id()));
        if let Some(status) = child.try_wait().map_err(|e| format!("cannot wait for the guest: {e}"))? {
            break Some(status);
        }
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let time = start.elapsed();
    let lines = reader.join().map_err(|_| "the reader of the guest's output failed".to_string())?;
    let tail = lines[lines.len().saturating_sub(15)..].join("\n");
    match status {
        None => return Err(format!("the guest ran longer than {} s; its last lines:\n{tail}", LIMIT.as_secs())),
        Some(s) if !s.success() => return Err(format!("the guest ended with {s}; its last lines:\n{tail}")),
        Some(_) => {}
    }
    for marker in initramfs::MARKERS {
        if !lines.iter().any(|l| l.trim_end().ends_with(&format!("PARAVANE-OK {marker}"))) {
            return Err(format!("the guest did not finish its step {marker}; its last lines:\n{tail}"));
        }
    }
    Ok(Boot { time, peak_kib })
}

/// The high-water mark of a process's resident set, in KiB; 0 once it has ended.
fn resident_peak(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn paravane(binary: &Path, guests: &Path, kernel: &str) -> Command {
    let mut command = Command::new(binary);
    command.args(["run", "--engine", "bt", "--memory", "512M", "--serial", "stdio", "--cmdline", "console=ttyS0"]);
    command.arg("--kernel").arg(guests.join(kernel).join("vmlinuz"));
    command.arg("--initrd").arg(guests.join("initramfs-script.cpio"));
    command
}

fn qemu(guests: &Path, kernel: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", "512", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.args(["-append", "console=ttyS0"]);
    command.arg("-kernel").arg(guests.join(kernel).join("vmlinuz"));
    command.arg("-initrd").arg(guests.join("initramfs-script.cpio"));
    command
}

fn median<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut sorted: Vec<T> = values.collect();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

fn count(name: &str, value: &str) -> Result<usize> {
    value.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{name} needs a number above 0, not {value}"))
}

/// Boots the same guest alternately under both programs and prints the medians.
pub(crate) fn bench(args: &[&str]) -> Result<()> {
    let (mut runs, mut kernel) = (5, "6.1");
    for (name, value) in options(args, &["--runs", "--kernel"])? {
        match name {
            "--runs" => runs = count(name, value)?,
            _ => kernel = value,
        }
    }
    known_kernel(kernel)?;
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Err("qemu-system-x86_64 is missing: install the Debian package qemu-system-x86".into());
    }
    let guests = task_guests::ensure()?;
    let binary = build_paravane()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        ours.push(boot(&mut paravane(&binary, &guests, kernel))?);
        theirs.push(boot(&mut qemu(&guests, kernel))?);
        let seconds = |v: &[Boot]| v.last().map_or(0.0, |b| b.time.as_secs_f64());
        println!("run {run}: paravane {:.2} s, qemu {:.2} s", seconds(&ours), seconds(&theirs));
    }
    let time = |v: &[Boot]| median(v.iter().map(|b| b.time)).unwrap_or_default().as_secs_f64();
    let peak = |v: &[Boot]| median(v.iter().map(|b| b.peak_kib)).unwrap_or_default() / 1024;
    println!("median of {runs}, kernel {kernel}: paravane {:.2} s, {} MiB peak", time(&ours), peak(&ours));
    println!("median of {runs}, kernel {kernel}: qemu tcg {:.2} s, {} MiB peak", time(&theirs), peak(&theirs));
    println!("ratio of times: {:.2}", time(&ours) / time(&theirs));
    Ok(())
}

/// Boots again and again and fails if one boot fails.
pub(crate) fn soak(args: &[&str]) -> Result<()> {
    let (mut boots, mut kernel) = (50, "6.1");
    for (name, value) in options(args, &["--count", "--kernel"])? {
        match name {
            "--count" => boots = count(name, value)?,
            _ => kernel = value,
        }
    }
    known_kernel(kernel)?;
    let guests = task_guests::ensure()?;
    let binary = build_paravane()?;
    let mut failures = 0;
    for number in 1..=boots {
        match boot(&mut paravane(&binary, &guests, kernel)) {
            Ok(done) => println!("boot {number} of {boots}: {:.2} s", done.time.as_secs_f64()),
            Err(why) => {
                failures += 1;
                println!("boot {number} of {boots} failed: {why}");
            }
        }
    }
    println!("{boots} boots of kernel {kernel}, {failures} failed");
    if failures > 0 { Err(format!("{failures} of {boots} boots failed")) } else { Ok(()) }
}
