//! The conformance guest on every machine present, and the coverage of the specification's clauses.

use paravane_tests::conform::{self, Machine};

/// Binary translation and QEMU; KVM has its own test, since it is slow where ring 0 is emulated.
#[test]
fn every_clause_holds_or_says_why_it_is_not_tried() {
    let machines = [Machine::BtAll, Machine::BtAuto, Machine::Qemu];
    let runs: Vec<_> = machines.into_iter().map(|m| (m, conform::run(m).map(|(verdicts, _)| verdicts))).collect();
    let report = conform::report(&runs);
    println!("{}", report.table);
    assert!(report.wrong.is_empty(), "{}\n{}", report.table, report.wrong.join("\n"));
}

/// A short run on every test; `cargo xtask fuzz hypercalls` takes its time.
#[test]
fn random_calls_do_no_harm() {
    for seed in 1..=2 {
        conform::fuzz(seed, 50_000).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}
