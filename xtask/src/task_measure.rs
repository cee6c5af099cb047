//! `cargo xtask measure`: what the paravirtual ABI gains, case by case.
//!
//! The measuring guest (`tests/pv-guests/measure`) does the same work in two forms, as an ordinary kernel and through the ABI, one case and form
//! in a run of its own, as `paravane bench micro` has it. Times are those of the quickest run and piece of a run, in ns per operation; counts are
//! per operation.

use crate::host::{self, Failure, Result};
use paravane_bench::micro::cases::{CASES, Case};
use paravane_bench::micro::guest::{Engine, Form, Guest, Shown};
use paravane_bench::micro::{self, per_operation};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

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

/// Short names of counters.
const SHORT: &[(&str, &str)] = &[
    ("instructions emulated", "emulated"),
    ("MMIO reads", "mmio-r"),
    ("MMIO writes", "mmio-w"),
    ("TLB misses", "tlb-miss"),
    ("poll exits", "poll"),
    ("exits to user space", "user-exit"),
    ("KVM exits", "exit"),
    ("hypercalls", "call"),
    ("port reads", "in"),
    ("port writes", "out"),
];

/// What the runs of one form came to.
struct Best {
    ns: f64,
    exits: f64,
    /// The counters in words.
    words: String,
}

/// Says it in words: counters per operation.
fn words(counters: &BTreeMap<String, f64>) -> String {
    let each = SHORT.iter().filter_map(|(name, short)| Some(format!("{short} {:.2}", counters.get(*name)?)));
    let all: Vec<_> = each.collect();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

/// A case's result in a run; `None` if the machine cannot do it.
fn result_of<'a>(case: &Case, shown: &'a Shown) -> Result<Option<&'a micro::guest::Timed>> {
    match (shown.cases.get(case.id), &shown.failure) {
        (Some(Ok(timed)), _) => Ok(Some(timed)),
        (Some(Err(_)), _) => Ok(None),
        (None, why) => Err(Failure::new(format!(
            "the guest did not finish case {}: {}",
            case.id,
            why.as_deref().unwrap_or("it gave no reason")
        ))),
    }
}

/// The quickest of several runs, and the counters of two.
fn best(guest: &Guest, engine: Engine, form: Form, case: &Case, args: &Args) -> Result<Option<Best>> {
    if form == Form::Abi && !case.abi {
        return Ok(None);
    }
    let count = args.count.unwrap_or(case.count.into());
    let run = |count| guest.run(engine, form, Some(case), Some(count)).map_err(|e| Failure::new(e.to_string()));
    let mut ns = f64::INFINITY;
    let mut counted = None;
    for _ in 0..args.runs.max(1) {
        let shown = run(count)?;
        let Some(timed) = result_of(case, &shown)? else { return Ok(None) };
        ns = ns.min(timed.best * 1e6 / shown.tsc_khz);
        counted = Some((timed.operations, shown.counters));
    }
    let shown = run(2 * count)?;
    let (Some(timed), Some((operations, first))) = (result_of(case, &shown)?, counted) else { return Ok(None) };
    let counters = per_operation((operations, &first), (timed.operations, &shown.counters));
    Ok(Some(Best { ns, exits: micro::exits(&counters), words: words(&counters) }))
}

/// The quickest of several runs under QEMU, ns.
fn best_under_qemu(guest: &Guest, case: &Case, args: &Args) -> Result<Option<f64>> {
    let mut ns = f64::INFINITY;
    for _ in 0..args.runs.max(1) {
        let count = args.count.unwrap_or(case.tcg_count.into());
        let shown = guest.run_under_qemu(&[(case, count)]).map_err(|e| Failure::new(e.to_string()))?;
        let Some(timed) = result_of(case, &shown)? else { return Ok(None) };
        ns = ns.min(timed.best * 1e6 / shown.tsc_khz);
    }
    Ok(Some(ns))
}

/// A number, or that there is none.
fn shown(number: Option<f64>, digits: usize) -> String {
    number.map_or_else(|| "-".to_owned(), |number| format!("{number:.digits$}"))
}

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let engine = match args.engine.as_str() {
        "bt" => Engine::Bt,
        "kvm" => Engine::Kvm,
        other => return Err(Failure::new(format!("there is no engine \"{other}\"; choose bt or kvm"))),
    };
    let program = host::build_paravane()?;
    let guest = Guest::new(&build_guest("measure-guest")?, &program).map_err(|e| Failure::new(e.to_string()))?;
    let with_qemu = !args.no_qemu && host::has_tool("qemu-system-x86_64");
    if !args.no_qemu && !with_qemu {
        eprintln!(
            "QEMU is left out: qemu-system-x86_64 is not installed; get it with `apt-get install qemu-system-x86`"
        );
    }
    println!(
        "{:18} {:>9} {:>9} {:>7} {:>7} {:>7} {:>9}  exits of the stock form; of the ABI form",
        "case", "stock ns", "ABI ns", "ratio", "exits", "exits", "TCG ns"
    );
    for case in CASES {
        if args.filter.as_ref().is_some_and(|f| !case.id.contains(f.as_str())) {
            continue;
        }
        let stock = best(&guest, engine, Form::Stock, case, args)?;
        let abi = best(&guest, engine, Form::Abi, case, args)?;
        let tcg = if with_qemu && !case.by_mmio() { best_under_qemu(&guest, case, args)? } else { None };
        let ratio = stock.as_ref().zip(abi.as_ref()).map(|(stock, abi)| stock.ns / abi.ns);
        let [of_stock, of_abi] = [&stock, &abi].map(|b| b.as_ref().map_or("-", |b| b.words.as_str()));
        println!(
            "{:18} {:>9} {:>9} {:>7} {:>7} {:>7} {:>9}  {of_stock}; {of_abi}  ({})",
            case.id,
            shown(stock.as_ref().map(|b| b.ns), 0),
            shown(abi.as_ref().map(|b| b.ns), 0),
            shown(ratio, 2),
            shown(stock.as_ref().map(|b| b.exits), 2),
            shown(abi.as_ref().map(|b| b.exits), 2),
            shown(tcg, 0),
            case.title
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

    #[test]
    fn counters_are_said_in_words() {
        let counters = [("instructions emulated".to_owned(), 3.0), ("hypercalls".to_owned(), 0.0625)].into();
        assert_eq!(words(&counters), "emulated 3.00, call 0.06");
        assert_eq!(words(&BTreeMap::new()), "none");
    }
}
