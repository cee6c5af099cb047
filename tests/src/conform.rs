//! Conformance to `specs/`: the clauses, the guest's verdicts on them, and what is left without a test.
//!
//! Every clause that the specification numbers has a test of the same name in the conformance guest (`pv-guests/conform`), is judged here by how a
//! machine ends (PWR-1, PWR-3) or that random calls do not end it (SAFE-4), or is listed in `specs/untested.md` with a reason. A run prints a table and fails if a clause fails, or has none of the three.

use crate::{guest, process};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What runs the guest, and what it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Binary translation with everything that is implemented.
    BtAll,
    /// Binary translation with what pays.
    BtAuto,
    /// KVM with everything that is implemented.
    KvmAll,
    /// QEMU's TCG: no ABI, so all that runs is the native ways.
    Qemu,
}

impl Machine {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::BtAll, Self::BtAuto, Self::KvmAll, Self::Qemu];

    /// Head of its column.
    pub fn name(self) -> &'static str {
        match self {
            Self::BtAll => "bt all",
            Self::BtAuto => "bt auto",
            Self::KvmAll => "kvm all",
            Self::Qemu => "qemu tcg",
        }
    }

    /// What it is in `known-failures.toml`.
    pub fn engine(self) -> guest::Engine {
        match self {
            Self::BtAll | Self::BtAuto => guest::Engine::Bt,
            Self::KvmAll => guest::Engine::Kvm,
            Self::Qemu => guest::Engine::QemuTcg,
        }
    }

    /// Options of Paravane beyond those of all guests. The source of random numbers is device 0 of the ABI's transport.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::BtAll | Self::KvmAll => &["--pv", "all", "--rng", "transport=pv"],
            Self::BtAuto => &["--pv", "auto", "--rng", "transport=pv"],
            Self::Qemu => &[],
        }
    }

    /// The command that runs the guest.
    pub fn command(self, cmdline: &str) -> Command {
        guest::command(self.engine(), &guest::pv_elf("conform-guest"), cmdline, self.options())
    }
}

/// What a clause came to on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it must be.
    Passed,
    /// Not tried, and why.
    Skipped(String),
    /// What was wrong.
    Failed(String),
}

/// A run on one machine: verdicts by clause.
pub type Verdicts = BTreeMap<String, Verdict>;

/// A run takes seconds; emulated ring 0 is a hundred times slower.
const LIMIT: Duration = Duration::from_secs(120);

/// The clauses of the specification in order of pages and places: identifier and page.
///
/// # Panics
/// `specs/` cannot be read, or an identifier is given twice.
pub fn clauses() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    for page in pages() {
        let text = std::fs::read_to_string(&page).expect("specs/ can be read");
        let name = page.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for id in text.lines().filter_map(|l| identifier(l.strip_prefix("**")?.split_once("** ")?.0)) {
            assert!(all.iter().all(|(other, _)| *other != id), "the clause {id} stands in specs/ twice");
            all.push((id, name.clone()));
        }
    }
    all
}

fn pages() -> Vec<PathBuf> {
    let specs = specs();
    let mut pages: Vec<PathBuf> =
        std::fs::read_dir(specs).expect("specs/ can be read").flatten().map(|e| e.path()).collect();
    pages.retain(|p| p.extension().is_some_and(|e| e == "md"));
    pages.sort();
    pages
}

fn specs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../specs")
}

/// A clause's identifier, as `DISC-1`.
fn identifier(text: &str) -> Option<String> {
    let (area, number) = text.split_once('-')?;
    let good = !area.is_empty() && area.chars().all(|c| c.is_ascii_uppercase()) && number.parse::<u32>().is_ok();
    good.then(|| text.to_owned())
}

/// Clauses without a test, with their reasons.
///
/// # Panics
/// The list cannot be read, or a line gives no reason.
pub fn untested() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(specs().join("untested.md")).expect("specs/untested.md can be read");
    text.lines()
        .filter_map(|l| l.strip_prefix("- **")?.split_once("** "))
        .map(|(id, reason)| {
            assert!(!reason.trim().is_empty(), "{id} has no reason in specs/untested.md");
            (id.to_owned(), reason.trim().to_owned())
        })
        .collect()
}

/// Runs the guest on a machine. An error says why it cannot run there.
///
/// # Errors
/// The machine is missing here: the reason, for the user to read.
///
/// # Panics
/// The guest hangs.
pub fn run(machine: Machine) -> Result<(Verdicts, String), String> {
    if let Some(missing) = machine.engine().missing() {
        return Err(missing);
    }
    let known = guest::known_conformance_failures(machine.engine());
    let fatal: Vec<&str> = known.iter().filter(|k| k.fatal).map(|k| k.test.as_str()).collect();
    let (status, output) = process::run(&mut machine.command(&format!("skip={}", fatal.join(","))), LIMIT);
    let mut verdicts = judge(&output);
    if status.code() != Some(1) && verdicts.values().all(|v| !matches!(v, Verdict::Failed(_))) {
        verdicts.insert("(end)".into(), Verdict::Failed(format!("the guest ended with {status}")));
    }
    if let Some(Verdict::Passed) = verdicts.get("CON-1")
        && !output.contains("# order: one, two, three\n")
    {
        verdicts.insert("CON-1".into(), Verdict::Failed("text is out of order".into()));
    }
    if machine == Machine::Qemu {
        let offered = output.lines().find(|l| l.starts_with("# feature") && !l.ends_with("absent"));
        if let Some(line) = offered {
            verdicts.insert("(absence)".into(), Verdict::Failed(line.to_owned()));
        }
    } else {
        ends(machine, &output, &mut verdicts);
        let fuzzed = match fuzz_on(machine, 1, if machine == Machine::KvmAll { 1000 } else { 20_000 }) {
            Ok(()) => Verdict::Passed,
            Err(wrong) => Verdict::Failed(wrong),
        };
        verdicts.insert("SAFE-4".into(), fuzzed);
    }
    Ok((verdicts, output))
}

/// PWR-1 and PWR-3: the machine ends as it must.
fn ends(machine: Machine, output: &str, verdicts: &mut Verdicts) {
    let offered = output.lines().any(|l| l == "# feature POWER offered");
    let mut power = Verdict::Passed;
    for (how, status, text) in [("poweroff", 0, ""), ("reset", 12, "reset"), ("panic", 10, "conform: the last words")] {
        let verdict = if offered {
            let (got, said) = process::run(&mut machine.command(&format!("end={how}")), LIMIT);
            if got.code() == Some(status) && said.contains(text) {
                Verdict::Passed
            } else {
                Verdict::Failed(format!("{how} ended with {got}"))
            }
        } else {
            Verdict::Skipped("POWER".into())
        };
        match how {
            "panic" => drop(verdicts.insert("PWR-3".into(), verdict)),
            _ if power == Verdict::Passed => power = verdict,
            _ => {}
        }
    }
    verdicts.insert("PWR-1".into(), power);
}

/// Verdicts in a TAP listing. A listing without its plan is a failure too: the guest did not get to its end.
fn judge(tap: &str) -> Verdicts {
    let mut verdicts = Verdicts::new();
    let mut count = 0;
    for line in tap.lines() {
        let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => continue,
        };
        let Some((_, rest)) = rest.split_once(" - ") else { continue };
        let (name, details) = rest.split_once(" # ").unwrap_or((rest, ""));
        let id = name.split(' ').next().unwrap_or_default().to_owned();
        count += 1;
        let verdict = match details.strip_prefix("SKIP ") {
            Some(missing) => Verdict::Skipped(missing.to_owned()),
            None if passed => Verdict::Passed,
            None => Verdict::Failed(details.to_owned()),
        };
        verdicts.insert(id, verdict);
    }
    let plan = tap.lines().find_map(|l| l.strip_prefix("1..")?.trim().parse::<usize>().ok());
    if plan != Some(count) || count == 0 {
        let last = tap.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("nothing");
        verdicts.insert(
            "(plan)".into(),
            Verdict::Failed(format!("the guest did not get to its end; it said last: {last}")),
        );
    }
    verdicts
}

/// A report: the table, and what is wrong.
pub struct Report {
    /// A line for each clause, with the verdict on each machine, and the sums.
    pub table: String,
    /// Failures, and clauses without test and reason. Empty: all is well.
    pub wrong: Vec<String>,
}

/// Puts runs together. A machine that was not there has its reason instead of verdicts.
pub fn report(runs: &[(Machine, Result<Verdicts, String>)]) -> Report {
    let (clauses, untested) = (clauses(), untested());
    let mut wrong = Vec::new();
    let mut table = format!("{:<9} {:<14}", "clause", "page");
    for (machine, run) in runs {
        let _ = write!(table, " {:<9}", machine.name());
        if let Ok(verdicts) = run {
            let known = guest::known_conformance_failures(machine.engine());
            for (id, verdict) in verdicts {
                let listed = known.iter().any(|k| k.test == *id);
                match verdict {
                    Verdict::Failed(what) if !listed => wrong.push(format!("{id} fails on {}: {what}", machine.name())),
                    Verdict::Passed if listed => {
                        wrong.push(format!("{id} passes on {} now: take it off known-failures.toml", machine.name()));
                    }
                    _ => {}
                }
                if identifier(id).is_some() && clauses.iter().all(|(c, _)| c != id) {
                    wrong.push(format!("{id} has a test but is no clause of specs/"));
                }
            }
        }
    }
    table.push('\n');
    let mut tested = 0;
    for (id, page) in &clauses {
        let seen: Vec<Option<&Verdict>> = runs.iter().map(|(_, r)| r.as_ref().ok().and_then(|v| v.get(id))).collect();
        let has_test = seen.iter().any(Option::is_some);
        let _ = write!(table, "{id:<9} {:<14}", page.trim_end_matches(".md"));
        for verdict in seen {
            let text = match verdict {
                Some(Verdict::Passed) => "ok",
                Some(Verdict::Skipped(_)) => "skip",
                Some(Verdict::Failed(_)) => "FAILED",
                None => "-",
            };
            let _ = write!(table, " {text:<9}");
        }
        match untested.get(id) {
            Some(_) if has_test => wrong.push(format!("{id} has a test: take it off specs/untested.md")),
            Some(reason) => drop(write!(table, " no test: {reason}")),
            None if has_test => tested += 1,
            None => wrong.push(format!("{id} has neither a test nor a reason in specs/untested.md")),
        }
        let _ = writeln!(table);
    }
    for id in untested.keys().filter(|id| clauses.iter().all(|(c, _)| c != *id)) {
        wrong.push(format!("specs/untested.md names {id}, which is no clause"));
    }
    let _ =
        writeln!(table, "{} clauses: {tested} with a test, {} with a reason for none", clauses.len(), untested.len());
    for (machine, run) in runs {
        let _ = match run {
            Err(missing) => writeln!(table, "SKIPPED: {}: {missing}", machine.name()),
            Ok(v) => {
                let count = |f: fn(&Verdict) -> bool| v.values().filter(|v| f(v)).count();
                writeln!(
                    table,
                    "{}: {} passed, {} failed, {} skipped",
                    machine.name(),
                    count(|v| *v == Verdict::Passed),
                    count(|v| matches!(v, Verdict::Failed(_))),
                    count(|v| matches!(v, Verdict::Skipped(_)))
                )
            }
        };
    }
    Report { table, wrong }
}

/// Has the guest make so many random calls from a seed.
///
/// # Errors
/// The hypervisor panicked or hung, or the machine ended before the guest did: what is known about it.
///
/// # Panics
/// The program cannot be started.
pub fn fuzz(seed: u64, calls: u64) -> Result<(), String> {
    fuzz_on(Machine::BtAll, seed, calls)
}

fn fuzz_on(machine: Machine, seed: u64, calls: u64) -> Result<(), String> {
    let mut command = machine.command(&format!("fuzz={seed} calls={calls}"));
    let (status, output) = process::run_within(&mut command, LIMIT);
    if status.is_some_and(|s| s.code() == Some(1)) {
        return Ok(());
    }
    // The console shows what the calls wrote, too: what counts stands at its end.
    let from = output.char_indices().rev().nth(800).map_or(0, |(at, _)| at);
    let end = status.map_or("the machine hung".to_owned(), |s| format!("the machine ended with {s}"));
    Err(format!("seed {seed}: {end}; its last words:\n{}", &output[from..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_judged() {
        let v = judge("ok 1 - A-1 x\nnot ok 2 - B-2 y # got 1\nok 3 - C-3 z # SKIP no device\n1..3\n");
        assert_eq!(v["A-1"], Verdict::Passed);
        assert_eq!(v["B-2"], Verdict::Failed("got 1".into()));
        assert_eq!(v["C-3"], Verdict::Skipped("no device".into()));
        assert_eq!(v.len(), 3);
        assert!(judge("ok 1 - A-1 x\n1..2\n").contains_key("(plan)"));
        assert!(judge("").contains_key("(plan)"));
    }

    #[test]
    fn clauses_are_found_and_told_apart_from_bold_text() {
        assert_eq!(identifier("DISC-12").as_deref(), Some("DISC-12"));
        for bad in ["disc-1", "DISC", "DISC-x", "-1"] {
            assert_eq!(identifier(bad), None);
        }
        let all = clauses();
        assert!(all.len() > 100 && all.contains(&("MEM-4".into(), "memory.md".into())));
    }

    #[test]
    fn a_clause_without_test_or_reason_is_wrong() {
        let all = clauses();
        let verdicts: Verdicts = all.iter().skip(1).map(|(id, _)| (id.clone(), Verdict::Passed)).collect();
        let untested = untested();
        let expected =
            usize::from(!untested.contains_key(&all[0].0)) + untested.keys().filter(|id| **id != all[0].0).count();
        let report = report(&[(Machine::BtAll, Ok(verdicts))]);
        assert_eq!(report.wrong.len(), expected, "{:?}", report.wrong);
    }
}
