//! `cargo xtask measure`: what the paravirtual ABI gains, case by case.
//!
//! The measuring guest (`tests/pv-guests/measure`) does the same work in two forms, as an ordinary kernel and through the ABI. Each case and form
//! is a run of its own, so that the hypervisor's counters belong to it; what an empty run counts is taken off. Times are those of the quickest run
//! and piece of a run, in ns per operation; counts are per operation and exact.

use crate::host::{self, Doing, Failure, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Options of the measurement.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Runs of each case; the quickest counts
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Paravane's engine: bt or kvm
    #[arg(long, default_value = "bt")]
    engine: String,
    /// Operations of each case; each case knows a number that suits binary translation
    #[arg(long)]
    count: Option<u64>,
    /// Only the cases whose name contains this
    filter: Option<String>,
    /// Leave QEMU out
    #[arg(long)]
    no_qemu: bool,
}

/// A run that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(300);

/// Cases, as the guest names them, and what each does.
const CASES: &[(&str, &str)] = &[
    ("page-update", "page-table update with invalidation"),
    ("page-update-touch", "the same, and a load from the page"),
    ("mask", "mask and unmask interrupts"),
    ("mask-pending", "the same while an interrupt comes"),
    ("read-pm-timer", "read the ACPI PM timer"),
    ("read-lapic-timer", "read the local APIC's counter"),
    ("read-tsc", "read the TSC"),
    ("read-clock", "nanoseconds"),
    ("eoi", "interrupt to oneself, EOI by form"),
    ("ipi", "interrupt to oneself, sent by form"),
    ("timer-arm", "arm the one-shot timer"),
    ("halt", "halt with an interrupt on its way"),
    ("virtio-notify", "notify a virtio device"),
    ("console-line", "write a line of 64 characters"),
    ("free-page", "hint at a free page"),
    ("call", "empty call; stock: empty port write"),
];

/// Counters that stand for an exit from guest code into the hypervisor, and their short names.
const EXITS: &[(&str, &str)] = &[
    ("instructions emulated", "emulated"),
    ("MMIO reads", "mmio-r"),
    ("MMIO writes", "mmio-w"),
    ("TLB misses", "tlb-miss"),
    ("poll exits", "poll"),
    ("exits to user space", "user-exit"),
];
/// Parts of the above that are named besides.
const PARTS: &[(&str, &str)] = &[("hypercalls", "call"), ("port reads", "in"), ("port writes", "out")];

/// What one run showed.
#[derive(Default, Clone)]
struct Run {
    /// ns per operation; `None`: absent.
    ns: Option<f64>,
    operations: f64,
    counters: BTreeMap<String, f64>,
}

/// What runs the guest.
enum Machine {
    Paravane { program: PathBuf, engine: String },
    Qemu,
}

impl Machine {
    fn command(&self, guest: &Path, form: &str, cmdline: &str) -> Command {
        match self {
            Self::Paravane { program, engine } => {
                let mut c = Command::new(program);
                c.args(["run", "--engine", engine, "--memory", "64M", "--serial", "stdio", "--debug-exit", "--stats"]);
                // The device to notify: on PCI for an ordinary kernel, on the ABI's transport for the other.
                c.arg(if form == "abi" { "--rng=transport=pv" } else { "--rng=transport=pci" });
                c.args(["--pv", "all", "--cmdline", cmdline]).arg("--kernel").arg(guest);
                c
            }
            Self::Qemu => {
                let mut c = Command::new("qemu-system-x86_64");
                c.args(["-accel", "tcg", "-cpu", "max", "-m", "64", "-display", "none", "-no-reboot"]);
                c.args(["-serial", "stdio", "-device", "virtio-rng-pci"]);
                c.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-append", cmdline, "-kernel"]).arg(guest);
                c
            }
        }
    }

    fn run(&self, guest: &Path, case: &str, form: &str, count: Option<u64>) -> Result<Run> {
        let mut cmdline = format!("case={case} form={form}");
        if let Some(count) = count {
            cmdline += &format!(" count={count}");
        }
        let output = finished(&mut self.command(guest, form, &cmdline))?;
        let run = parsed(&output);
        if run.ns.is_none() && case != "empty" && !output.contains(" absent") {
            let tail: Vec<&str> = output.lines().rev().take(5).collect();
            return Err(Failure::new(format!(
                "the guest did not finish case {case}, form {form}: {}",
                tail.join(" | ")
            )));
        }
        Ok(run)
    }

    /// The quickest of several runs.
    fn best(&self, guest: &Path, case: &str, form: &str, args: &Args) -> Result<Run> {
        let mut best: Option<Run> = None;
        for _ in 0..args.runs.max(1) {
            let run = self.run(guest, case, form, args.count)?;
            let quicker = match (best.as_ref().and_then(|b| b.ns), run.ns) {
                (Some(old), Some(new)) => new < old,
                _ => best.is_none(),
            };
            if quicker {
                best = Some(run);
            }
        }
        Ok(best.unwrap_or_default())
    }
}

/// Runs a command to its end and gives all that it wrote; kills it at the limit.
fn finished(command: &mut Command) -> Result<String> {
    let (reader, writer) = std::io::pipe().doing("cannot make a pipe")?;
    let second = writer.try_clone().doing("cannot make a pipe")?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = command.spawn().doing("cannot start the hypervisor")?;
    // The command holds the pipe's writing ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let output = std::thread::spawn(move || std::io::read_to_string(reader));
    let start = Instant::now();
    while child.try_wait().doing("cannot wait for the hypervisor")?.is_none() {
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure::new(format!("the guest ran longer than {} s", LIMIT.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    output.join().map_err(|_| Failure::new("the reader of the output panicked"))?.doing("cannot read the output")
}

/// Reads the guest's result and the hypervisor's counters out of what they wrote.
fn parsed(output: &str) -> Run {
    let mut run = Run::default();
    let mut cycles = None;
    for line in output.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["measure", _, _, per_operation, count] => {
                cycles = per_operation.parse::<f64>().ok();
                run.operations = count.parse().unwrap_or(0.0);
            }
            ["tsc_khz", khz] => {
                let khz: f64 = khz.parse().unwrap_or(1.0);
                run.ns = cycles.map(|c| c * 1e6 / khz);
            }
            [.., last] if words.len() > 1 && !line.starts_with("measure") => {
                if let Ok(value) = last.parse() {
                    run.counters.insert(words[..words.len() - 1].join(" "), value);
                }
            }
            _ => {}
        }
    }
    run
}

/// Counts per operation, without those of an empty run: all exits, and their parts in words.
fn exits(run: &Run, empty: &Run) -> (f64, String) {
    if run.ns.is_none() {
        return (0.0, "-".to_owned());
    }
    let per_operation = |name: &str| {
        let of = |r: &Run| r.counters.get(name).copied().unwrap_or(0.0);
        // A case prints its result, which is not worth a digit.
        let count = ((of(run) - of(empty)) / run.operations.max(1.0) * 100.0).round() / 100.0;
        if count <= 0.01 && name != "hypercalls" && name != "instructions emulated" { 0.0 } else { count }
    };
    let mut words = Vec::new();
    for (name, short) in EXITS.iter().chain(PARTS) {
        let count = per_operation(name);
        if count > 0.0 {
            words.push(format!("{short} {count}"));
        }
    }
    if words.is_empty() {
        words.push("none".to_owned());
    }
    (EXITS.iter().map(|(name, _)| per_operation(name).max(0.0)).sum(), words.join(", "))
}

/// A time, or that there is none.
fn shown(ns: Option<f64>) -> String {
    ns.map_or_else(|| "-".to_owned(), |ns| format!("{ns:.0}"))
}

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::build_paravane()?;
    let guest = build_guest("measure-guest")?;
    let ours = Machine::Paravane { program, engine: args.engine.clone() };
    let with_qemu = !args.no_qemu && host::has_tool("qemu-system-x86_64");
    if !args.no_qemu && !with_qemu {
        eprintln!(
            "QEMU is left out: qemu-system-x86_64 is not installed; get it with `apt-get install qemu-system-x86`"
        );
    }
    let empty = ["stock", "abi"].map(|form| ours.run(&guest, "empty", form, None));
    let [empty_stock, empty_abi] = empty;
    let (empty_stock, empty_abi) = (empty_stock?, empty_abi?);
    println!(
        "{:18} {:>9} {:>9} {:>7} {:>7} {:>7} {:>9}  exits of the stock form; of the ABI form",
        "case", "stock ns", "ABI ns", "ratio", "exits", "exits", "TCG ns"
    );
    for &(case, text) in CASES {
        if args.filter.as_ref().is_some_and(|f| !case.contains(f.as_str())) {
            continue;
        }
        let stock = ours.best(&guest, case, "stock", args)?;
        let abi = ours.best(&guest, case, "abi", args)?;
        let tcg = if with_qemu { Machine::Qemu.best(&guest, case, "stock", args)?.ns } else { None };
        let (stock_exits, stock_words) = exits(&stock, &empty_stock);
        let (abi_exits, abi_words) = exits(&abi, &empty_abi);
        let has = |r: &Run, n: f64| r.ns.map_or_else(|| "-".to_owned(), |_| format!("{n:.2}"));
        let ratio = match (stock.ns, abi.ns) {
            (Some(s), Some(a)) => format!("{:.2}", s / a),
            _ => "-".to_owned(),
        };
        println!(
            "{case:18} {:>9} {:>9} {ratio:>7} {:>7} {:>7} {:>9}  {stock_words}; {abi_words}  ({text})",
            shown(stock.ns),
            shown(abi.ns),
            has(&stock, stock_exits),
            has(&abi, abi_exits),
            shown(tcg)
        );
    }
    println!("ratio: stock time by ABI time, above 1 the ABI gains; \"-\": the machine has no such thing in that form");
    Ok(ExitCode::SUCCESS)
}

/// Builds a guest of `tests/pv-guests`, which is a workspace with flags of its own.
pub(crate) fn build_guest(binary: &str) -> Result<PathBuf> {
    let target = host::repo().join("target/test-guests");
    let mut cargo = host::cargo();
    cargo.current_dir(host::repo().join("tests/pv-guests"));
    cargo.args(["build", "--release", "--quiet", "--bin", binary]).arg("--target-dir").arg(&target);
    // The flags of a surrounding build would replace the guest's own.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && text != "CARGO_HOME" || text.ends_with("RUSTFLAGS") {
            cargo.env_remove(&name);
        }
    }
    host::run(&mut cargo)?;
    Ok(target.join("x86_64-unknown-linux-gnu/release").join(binary))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "boot works (X2 APIC)\nmeasure eoi stock 2000.0 100\ntsc_khz 2000000\n\
        engine: binary translation (asked for)\nwall time (ms)    7\ninstructions emulated    350\nhypercalls 1\n";

    #[test]
    fn results_and_counters_are_read() {
        let run = parsed(OUTPUT);
        assert_eq!((run.ns, run.operations), (Some(1000.0), 100.0));
        assert_eq!(run.counters["instructions emulated"], 350.0);
        let empty = parsed("instructions emulated    50\nhypercalls 1\n");
        assert_eq!(exits(&run, &empty), (3.0, "emulated 3".to_owned()));
        assert_eq!(parsed("measure eoi abi absent\ntsc_khz 2000000\n").ns, None);
    }

    #[test]
    fn the_guest_knows_the_cases() {
        let source = host::repo().join("tests/pv-guests/measure/src/cases.rs");
        let text = std::fs::read_to_string(source).unwrap();
        for (case, _) in CASES {
            assert!(text.contains(&format!("case(\"{case}\"")), "{case} is not in the guest");
        }
        assert_eq!(text.matches("case(\"").count(), CASES.len(), "a case of the guest is not measured");
    }
}
