//! Counters of the micro cases, to be compared with a file that is kept with the source.
//!
//! Times depend on the machine and on what else it does; how often a guest's instruction leaves translated code does not. So a
//! change that makes an operation leave more often shows on any machine, loaded or not. Cases whose counters a timer or another
//! thread has a part in are left out ([`Case::exact`]).
//!
//! How much was translated for a case depends on the compiler that built the guest, so it is compared for the same one only.

use super::cases::{CASES, Case};
use super::guest::{Engine, Form, Guest};
use super::per_operation;
use crate::{Result, exact};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is known of a case in a form.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Counted {
    /// Counters.
    Counters(BTreeMap<String, f64>),
    /// Why the machine cannot do the case.
    Missing(String),
    /// Nothing is known.
    #[default]
    Nothing,
}

/// What was counted on a machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// The compiler that built the guest.
    pub compiler: String,
    /// By machine, such as "bt" or "kvm-emulating", and by case and form, such as "syscall stock".
    pub machines: BTreeMap<String, BTreeMap<String, Counted>>,
}

/// Counters of a whole run that are kept beside those per operation.
const TRANSLATED: &str = "instructions translated";

/// Counters within this of each other are equal: they are rounded.
const ROUNDING: f64 = 0.002;

/// How far what an interruption changes ([`exact::interruptible`]) may be off.
const COARSE_ROUNDING: f64 = 0.1;

/// The same for what was translated, as a part of it.
const TRANSLATED_ROUNDING: f64 = 0.03;

/// Operations of the cases that are left out on KVM: where it emulates ring 0, whole tables of pages take seconds.
const LONG: u32 = 4096;

/// Counts all exact cases in both forms.
///
/// # Errors
/// The program cannot be started.
pub fn count(guest: &Guest, engine: Engine) -> Result<BTreeMap<String, Counted>> {
    let mut counts = BTreeMap::new();
    let empty = guest.run(engine, Form::Stock, None, None)?;
    let translated_by_all = empty.counters.get(TRANSLATED).copied().unwrap_or(0.0);
    let short = |case: &&Case| engine == Engine::Bt || case.slow_count != LONG;
    for case in CASES.iter().filter(|case| case.exact).filter(short) {
        for form in [Form::Stock, Form::Abi] {
            if form == Form::Stock || case.abi {
                let counted = count_one(guest, engine, form, case, translated_by_all)?;
                counts.insert(format!("{} {}", case.id, form.name()), counted);
            }
        }
    }
    Ok(counts)
}

fn count_one(guest: &Guest, engine: Engine, form: Form, case: &Case, translated_by_all: f64) -> Result<Counted> {
    // Few operations: counts per operation do not depend on how many there are.
    let count = u64::from(case.slow_count.min(20 * 256));
    let few = guest.run(engine, form, Some(case), Some(count))?;
    let (few_done, many, many_done);
    match few.cases.get(case.id) {
        Some(Ok(timed)) => {
            few_done = timed.operations;
            many = guest.run(engine, form, Some(case), Some(2 * count))?;
            many_done = many.cases.get(case.id).and_then(|c| c.as_ref().ok()).map_or(0.0, |timed| timed.operations);
        }
        Some(Err(reason)) => return Ok(Counted::Missing(reason.clone())),
        None => return Ok(Counted::Missing(few.failure.unwrap_or_else(|| "no result".to_owned()))),
    }
    let mut counters = per_operation((few_done, &few.counters), (many_done, &many.counters));
    counters.retain(|name, each| exact::counted(name) && !(exact::interruptible(name) && each.abs() < COARSE_ROUNDING));
    if let Some(translated) = few.counters.get(TRANSLATED) {
        counters.insert(TRANSLATED.to_owned(), translated - translated_by_all);
    }
    Ok(Counted::Counters(counters))
}

/// What differs between what is expected and what was found, a line each. Machines that were not there are not compared.
pub fn differences(expected: &Counts, found: &Counts) -> Vec<String> {
    let mut lines = Vec::new();
    let same_compiler = expected.compiler == found.compiler;
    for (machine, found) in &found.machines {
        let Some(expected) = expected.machines.get(machine) else {
            lines.push(format!("{machine}: nothing is known of this machine"));
            continue;
        };
        let cases: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
        for case in cases {
            match (expected.get(case), found.get(case)) {
                (Some(Counted::Counters(expected)), Some(Counted::Counters(found))) => {
                    compare(&format!("{machine} {case}"), expected, found, same_compiler, &mut lines);
                }
                (expected, found) if expected == found => {}
                (expected, found) => lines.push(format!("{machine} {case}: {}, was {}", said(found), said(expected))),
            }
        }
    }
    lines
}

fn said(counted: Option<&Counted>) -> String {
    match counted {
        Some(Counted::Counters(_)) => "counted".to_owned(),
        Some(Counted::Missing(reason)) => format!("missing ({reason})"),
        Some(Counted::Nothing) | None => "not there".to_owned(),
    }
}

fn compare(
    place: &str,
    expected: &BTreeMap<String, f64>,
    found: &BTreeMap<String, f64>,
    same_compiler: bool,
    lines: &mut Vec<String>,
) {
    let names: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    for name in names {
        if name == TRANSLATED && !same_compiler {
            continue;
        }
        let [was, is] = [expected, found].map(|counters| counters.get(name).copied().unwrap_or(0.0));
        let within = match name.as_str() {
            TRANSLATED => was.abs() * TRANSLATED_ROUNDING,
            name if exact::interruptible(name) => COARSE_ROUNDING,
            _ => ROUNDING,
        };
        if (was - is).abs() > within {
            lines.push(format!("{place}: {name} {is}, was {was}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(compiler: &str, list: &[(&str, f64)]) -> Counts {
        let counters = list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let cases = [("in stock".to_owned(), Counted::Counters(counters))].into();
        Counts { compiler: compiler.to_owned(), machines: [("bt".to_owned(), cases)].into() }
    }

    #[test]
    fn more_exits_show_and_rounding_does_not() {
        let expected = counts("1.95", &[("instructions emulated", 1.0), (TRANSLATED, 900.0)]);
        assert_eq!(differences(&expected, &expected), Vec::<String>::new());
        let rounded = counts("1.95", &[("instructions emulated", 1.001), (TRANSLATED, 900.0)]);
        assert!(differences(&expected, &rounded).is_empty());
        let more = counts("1.95", &[("instructions emulated", 2.0), ("TLB misses", 0.5), (TRANSLATED, 900.0)]);
        let lines = differences(&expected, &more);
        assert_eq!(lines, ["bt in stock: TLB misses 0.5, was 0", "bt in stock: instructions emulated 2, was 1"]);
        let one_more =
            counts("1.95", &[("instructions emulated", 1.0), ("chain callouts", 0.005), (TRANSLATED, 909.0)]);
        assert!(differences(&expected, &one_more).is_empty(), "a loop was entered once more");
    }

    #[test]
    fn what_was_translated_is_compared_for_one_compiler_only() {
        let expected = counts("1.95", &[(TRANSLATED, 900.0)]);
        assert!(differences(&expected, &counts("1.96", &[(TRANSLATED, 800.0)])).is_empty());
        assert_eq!(differences(&expected, &counts("1.95", &[(TRANSLATED, 800.0)])).len(), 1);
    }

    #[test]
    fn cases_that_come_and_go_show_and_machines_that_are_away_do_not() {
        let expected = counts("1.95", &[]);
        let mut found = expected.clone();
        let missing = Counted::Missing("it broke".into());
        found.machines.get_mut("bt").expect("there").insert("in stock".into(), missing);
        assert_eq!(differences(&expected, &found), ["bt in stock: missing (it broke), was counted"]);
        found.machines.clear();
        assert!(differences(&expected, &found).is_empty());
        let text = serde_json::to_string(&expected).expect("JSON");
        assert_eq!(serde_json::from_str::<Counts>(&text).expect("the same"), expected);
    }
}
