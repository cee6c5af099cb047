//! The micro suite: single operations in a bare-metal guest, on each side.
//!
//! Within a round the sides take turns, case by case; QEMU, whose start takes longest, does all cases at the end of the round.
//! A round's value is the time that a quarter of a run's pieces stay below; a figure is the median of the rounds.
//!
//! Counters per operation come from two runs that differ in the number of operations and in nothing else: what they
//! differ in, divided by the operations that the second had more.

pub mod cases;
pub mod check;

pub mod guest;
pub mod native;

use crate::Result;
use crate::model::{Cell, Measured, Plan, Row, Side, Unit};
use crate::progress::Progress;
use cases::{CASES, Case};
use guest::{Engine, Form, Guest, Shown};
use native::{Native, Place};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Rounds where the command line gives no number.
const ROUNDS: u32 = 5;
/// The same with `--quick`.
const QUICK_ROUNDS: u32 = 2;

/// Where `cargo xtask guests bench` puts the guest, below the folder of the guests.
pub const GUEST: &str = "bench/micro-guest";

/// A case whose run takes longer than this takes part in every second round only.
const LONG: Duration = Duration::from_millis(1500);

/// Measures what the plan asks for and returns its rows, by group.
///
/// # Errors
/// The guest is missing, or a program cannot be started.
pub fn run(plan: &Plan, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let cases: Vec<_> = CASES.iter().filter(|case| plan.wants(case.id)).collect();
    if cases.is_empty() {
        return Ok(Vec::new());
    }
    let guest = Guest::new(&plan.guests.join(GUEST), &plan.paravane)?;
    let mut suite = Suite { plan, guest, gathered: BTreeMap::new(), tsc_khz: 0.0 };
    let rounds = plan.rounds.unwrap_or(if plan.quick { QUICK_ROUNDS } else { ROUNDS });
    progress.begin("single operations", u64::from(rounds + 1) * cases.len() as u64);
    for round in 0..rounds {
        for case in &cases {
            progress.step(case.id);
            for side in plan.runnable() {
                suite.measure(case, side, round)?;
            }
        }
        if plan.runnable().any(|side| side == Side::TcgStock) {
            suite.measure_under_qemu(&cases)?;
        }
    }
    for case in &cases {
        progress.step(case.id);
        for side in plan.runnable() {
            suite.count(case, side)?;
        }
    }
    progress.end();
    Ok(cases.iter().map(|case| suite.row(case)).collect())
}

/// What one case showed on one side so far.
#[derive(Default)]
struct Gathered {
    /// ns per operation, round by round.
    samples: Vec<f64>,
    /// TSC cycles per operation.
    cycles: Vec<f64>,
    /// How long the longest run took.
    longest: Duration,
    /// Operations and counters of a run.
    counted: Option<(f64, BTreeMap<String, f64>)>,
    /// Counters per operation.
    counters: Option<BTreeMap<String, f64>>,
    /// Why there is no result. The case is not tried again on this side.
    failure: Option<String>,
}

struct Suite<'a> {
    plan: &'a Plan,
    guest: Guest,
    gathered: BTreeMap<(&'static str, Side), Gathered>,
    /// What Paravane's guests say of the TSC, which all guests share: better known than by a guest that had to measure it.
    tsc_khz: f64,
}

/// The engine of a side, and whether the guest uses the ABI there. `None`: it is not Paravane's.
fn machine(side: Side) -> Option<(Engine, Form)> {
    Some(match side {
        Side::BtStock => (Engine::Bt, Form::Stock),
        Side::BtPv => (Engine::Bt, Form::Abi),
        Side::KvmStock => (Engine::Kvm, Form::Stock),
        Side::KvmPv => (Engine::Kvm, Form::Abi),
        Side::Host | Side::TcgStock => return None,
    })
}

/// The stock side of a paravirtual one.
fn stock_of(side: Side) -> Option<Side> {
    match side {
        Side::BtPv => Some(Side::BtStock),
        Side::KvmPv => Some(Side::KvmStock),
        _ => None,
    }
}

impl Suite<'_> {
    /// The side whose figures are this one's too, because the ABI has no form of the case.
    fn same(&self, case: &Case, side: Side) -> Option<Side> {
        stock_of(side).filter(|stock| !case.abi && self.plan.sides.contains(stock))
    }

    fn runs(&self, case: &Case, engine: Engine, form: Form) -> (Form, u64) {
        let form = if case.abi { form } else { Form::Stock };
        let slow = engine == Engine::Kvm && self.plan.kvm_emulates;
        (form, u64::from(if slow { case.slow_count } else { case.count }))
    }

    /// One round of one case on one side that is not QEMU's.
    fn measure(&mut self, case: &'static Case, side: Side, round: u32) -> Result<()> {
        if side == Side::TcgStock || self.same(case, side).is_some() {
            return Ok(());
        }
        let so_far = self.gathered.entry((case.id, side)).or_default();
        if so_far.failure.is_some() || so_far.longest > LONG && round % 2 == 1 {
            return Ok(());
        }
        let Some((engine, form)) = machine(side) else {
            match case.native {
                Native::Missing(reason) => so_far.failure = Some(reason.to_owned()),
                Native::Run(run) => match run(&Place { file: self.guest.disk() }) {
                    Ok(pieces) => so_far.samples.push(lower_quartile(pieces)),
                    Err(e) => so_far.failure = Some(format!("the host refuses: {e}")),
                },
            }
            return Ok(());
        };
        let (form, count) = self.runs(case, engine, form);
        let start = Instant::now();
        let shown = self.guest.run(engine, form, Some(case), Some(count))?;
        self.tsc_khz = if shown.tsc_khz > 0.0 { shown.tsc_khz } else { self.tsc_khz };
        let so_far = self.gathered.entry((case.id, side)).or_default();
        so_far.longest = so_far.longest.max(start.elapsed());
        so_far.take(case, &shown, shown.tsc_khz);
        Ok(())
    }

    /// A round of all cases under QEMU.
    fn measure_under_qemu(&mut self, cases: &[&'static Case]) -> Result<()> {
        let side = Side::TcgStock;
        let failed = |case: &&&Case| self.gathered.get(&(case.id, side)).is_none_or(|g| g.failure.is_none());
        let list: Vec<_> = cases
            .iter()
            .filter(|case| !case.by_mmio())
            .filter(failed)
            .map(|case| (*case, u64::from(case.tcg_count)))
            .collect();
        if list.is_empty() {
            return Ok(());
        }
        let shown = self.guest.run_under_qemu(&list)?;
        let khz = if self.tsc_khz > 0.0 { self.tsc_khz } else { shown.tsc_khz };
        for (case, _) in list {
            self.gathered.entry((case.id, side)).or_default().take(case, &shown, khz);
        }
        Ok(())
    }

    /// The second run of a case, for its counters.
    fn count(&mut self, case: &'static Case, side: Side) -> Result<()> {
        let Some((engine, form)) = machine(side) else { return Ok(()) };
        let (form, count) = self.runs(case, engine, form);
        let Some(so_far) = self.gathered.get_mut(&(case.id, side)) else { return Ok(()) };
        let Some((operations, first)) = so_far.counted.take().filter(|_| so_far.failure.is_none()) else {
            return Ok(());
        };
        let shown = self.guest.run(engine, form, Some(case), Some(2 * count))?;
        if let Some(Ok(timed)) = shown.cases.get(case.id) {
            so_far.counters = Some(per_operation((operations, &first), (timed.operations, &shown.counters)));
        }
        Ok(())
    }

    fn row(&mut self, case: &'static Case) -> Row {
        let mut row = self.plan.row(case.group, case.id, case.title, Unit::Nanoseconds);
        for side in self.plan.runnable() {
            let cell = match self.same(case, side) {
                Some(side) => Cell::SameAs { side },
                None => self.cell(case, side),
            };
            row.cells.insert(side, cell);
        }
        row
    }

    fn cell(&mut self, case: &'static Case, side: Side) -> Cell {
        if side == Side::TcgStock && case.by_mmio() {
            return Cell::Missing { reason: "QEMU's PC has no memory-mapped virtio devices".to_owned() };
        }
        let gathered = self.gathered.remove(&(case.id, side)).unwrap_or_default();
        let Some(mut measured) = gathered.failure.is_none().then(|| Measured::new(gathered.samples)).flatten() else {
            let reason = gathered.failure.unwrap_or_else(|| "no run gave a time".to_owned());
            return Cell::Missing { reason };
        };
        measured.cycles = crate::model::median(&gathered.cycles);
        if let Some(counters) = gathered.counters {
            measured.exits = Some(exits(&counters));
            measured.counters = counters;
            measured.exact = case.exact;
        }
        Cell::Measured(measured)
    }
}

impl Gathered {
    /// Takes a run's result of the case.
    fn take(&mut self, case: &Case, shown: &Shown, tsc_khz: f64) {
        match shown.cases.get(case.id) {
            Some(Ok(timed)) if tsc_khz > 0.0 => {
                let cycles = timed.typical();
                self.cycles.push(cycles);
                // Less than the TSC can tell is shown as the least that it can.
                self.samples.push(cycles.max(0.01) * 1e6 / tsc_khz);
                self.counted = Some((timed.operations, shown.counters.clone()));
            }
            Some(Ok(_)) => self.failure = Some("the guest does not know the frequency of its TSC".to_owned()),
            Some(Err(reason)) => self.failure = Some(reason.clone()),
            None => {
                let reason = shown.failure.clone();
                self.failure = Some(reason.unwrap_or_else(|| "the guest ended without a result".to_owned()));
            }
        }
    }
}

/// What a quarter of the values stay below.
fn lower_quartile(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 4).copied().unwrap_or(f64::NAN)
}

/// Counters that say how long something took, or that depend on what the host does besides.
fn is_noise(name: &str) -> bool {
    name.ends_with("(ms)") || name.ends_with("(ns)") || name.ends_with("(us)")
}

/// Less than this per operation is rounding.
const LEAST: f64 = 0.0005;

/// Counters per operation from two runs, each its operations and counters. Those that are zero are left out.
pub fn per_operation(
    (few, of_few): (f64, &BTreeMap<String, f64>),
    (many, of_many): (f64, &BTreeMap<String, f64>),
) -> BTreeMap<String, f64> {
    let names = of_many.keys().chain(of_few.keys()).filter(|name| !is_noise(name));
    let of = |counters: &BTreeMap<String, f64>, name: &str| counters.get(name).copied().unwrap_or(0.0);
    let each = names.map(|name| {
        let each = (of(of_many, name) - of(of_few, name)) / (many - few).max(1.0);
        (name.clone(), (each * 1e4).round() / 1e4)
    });
    each.filter(|(_, each)| each.abs() >= LEAST).collect()
}

/// Counters that each stand for an exit from guest code into the hypervisor. Others say what the exit was for.
pub const EXITS: &[&str] = &[
    "instructions emulated",
    "MMIO reads",
    "MMIO writes",
    "TLB misses",
    "poll exits",
    "exits to user space",
    "KVM exits",
];

/// Exits among counters.
pub fn exits(counters: &BTreeMap<String, f64>) -> f64 {
    // KVM counts all of its exits as one; the others are parts of them.
    if let Some(all) = counters.get("KVM exits") {
        return all.max(0.0);
    }
    EXITS.iter().filter_map(|name| counters.get(*name)).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(list: &[(&str, f64)]) -> BTreeMap<String, f64> {
        list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    #[test]
    fn counters_per_operation_are_what_two_runs_differ_in() {
        let few = counters(&[("instructions emulated", 150.0), ("wall time (ms)", 9.0), ("TLB misses", 30.0)]);
        let many = counters(&[("instructions emulated", 350.0), ("wall time (ms)", 29.0), ("TLB misses", 30.0)]);
        let each = per_operation((100.0, &few), (200.0, &many));
        assert_eq!(each, counters(&[("instructions emulated", 2.0)]));
        assert_eq!(exits(&each), 2.0);
        assert_eq!(exits(&counters(&[("KVM exits", 3.0), ("MMIO reads", 1.0)])), 3.0);
    }

    #[test]
    fn a_round_is_its_quick_half() {
        assert_eq!(lower_quartile(vec![9.0, 1.0, 2.0, 3.0]), 2.0);
        assert!(lower_quartile(Vec::new()).is_nan());
    }
}
