//! The macro suite: a stock Linux kernel and programs under it.
//!
//! Per round and side: a boot that only comes up and goes down; a run of the benchmark's programs (loops, system calls, storms of
//! processes and page faults, Debian's programs); and a run with a disk and a network card. The host runs the same
//! static programs directly, pinned to one CPU as in the guests, which have one vCPU. Times come from the clock of the
//! system that does the work; that of a guest is checked against the host's, for a guest whose clock runs slow would look fast.
//!
//! With the programs, QEMU's emulator takes longer than everything else together, so it takes part in every third round only.
//! Stock means `--pv off`, paravirtual `--pv auto`: what a stock kernel understands are KVM's interfaces, not Paravane's
//! own.

pub mod console;
mod guest;
mod rows;
mod server;

use crate::child;
use crate::model::{Cell, Measured, Plan, Row, Side};
use crate::progress::Progress;
use crate::{Failure, Result};
use console::{Group, Measurement};
use guest::{Disk, Images, Work};
use rows::{ROWS, Source};
use server::Server;
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

/// Rounds that steady the medians.
const ROUNDS: u32 = 3;

/// Of so many rounds, QEMU's emulator takes part in the first with the programs.
const TCG_EVERY: u32 = 3;

/// After so long the host's programs have failed.
const HOST_LIMIT: Duration = Duration::from_secs(300);

/// Values by row id and side.
type Samples = BTreeMap<(&'static str, Side), Vec<f64>>;

/// What is measured in one go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Start and end of a kernel.
    Boot,
    /// Programs that compute or ask the system.
    Programs,
    /// Disk and network.
    Traffic,
}

/// Measures what the plan asks for and returns its rows, by group.
///
/// # Errors
/// A guest image is missing, or a program cannot be started.
pub fn run(plan: &Plan, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let wanted: Vec<_> = ROWS.iter().filter(|row| plan.wants(row.id) && (!plan.quick || row.quick)).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let suite =
        Suite { plan, images: Images::find(&plan.guests)?, server: Server::start()?, disk: Disk::create()?, wanted };
    let mut samples = Samples::new();
    // Why a side has no figures: the first thing that went wrong.
    let mut troubles: BTreeMap<(Side, u8), String> = BTreeMap::new();
    let jobs = suite.jobs();
    progress.begin("macro", jobs.len() as u64);
    for (round, side, step) in jobs {
        progress.step(&format!("round {round}, {}, {}", side.title(), step.name()));
        if let Err(failure) = suite.measure(side, step, &mut samples) {
            progress.note(&format!("paravane: {side}, {}: {failure}", step.name()));
            troubles.entry((side, step as u8)).or_insert_with(|| failure.to_string());
        }
    }
    progress.end();
    Ok(suite.rows(samples, &troubles))
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Programs => "programs",
            Self::Traffic => "disk and network",
        }
    }

    /// The step in which a row is measured.
    fn of(row: &rows::Definition) -> Self {
        match row.source {
            Source::BootToInit | Source::BootToOff => Self::Boot,
            Source::Program(Group::Traffic, _) => Self::Traffic,
            Source::Program(..) => Self::Programs,
        }
    }
}

struct Suite<'a> {
    plan: &'a Plan,
    images: Images,
    server: Server,
    disk: Disk,
    wanted: Vec<&'static rows::Definition>,
}

impl Suite<'_> {
    /// All that is to be done: sides alternate within each round.
    fn jobs(&self) -> Vec<(u32, Side, Step)> {
        let rounds = self.plan.rounds.unwrap_or(if self.plan.quick { 1 } else { ROUNDS });
        let mut jobs = Vec::new();
        for round in 1..=rounds {
            for step in [Step::Boot, Step::Programs, Step::Traffic] {
                for side in self.plan.runnable() {
                    let slow = side == Side::TcgStock && step == Step::Programs && round % TCG_EVERY != 1;
                    if !slow
                        && self.refusal(side, step).is_none()
                        && self.wanted.iter().any(|row| Step::of(row) == step)
                    {
                        jobs.push((round, side, step));
                    }
                }
            }
        }
        jobs
    }

    /// Why a side does not do a step at all.
    fn refusal(&self, side: Side, step: Step) -> Option<&'static str> {
        match side {
            Side::Host if step == Step::Boot => Some("the host itself is not started anew"),
            Side::KvmStock | Side::KvmPv if self.plan.kvm_emulates => {
                Some("this host's KVM emulates ring 0 and cannot run a stock kernel")
            }
            _ => None,
        }
    }

    fn measure(&self, side: Side, step: Step, samples: &mut Samples) -> Result<()> {
        if step == Step::Boot {
            let boot = guest::boot(&self.images, self.plan, side)?;
            for row in self.of(step) {
                let time = if matches!(row.source, Source::BootToInit) { boot.init } else { boot.off };
                samples.entry((row.id, side)).or_default().push(time.as_secs_f64());
            }
            return Ok(());
        }
        let measured = if side == Side::Host { self.on_host(step)? } else { self.in_guest(side, step)? };
        for row in self.of(step) {
            let Source::Program(group, name) = row.source else { continue };
            if let Some((_, found)) = measured.iter().find(|(of, found)| *of == group && found.name == name) {
                samples.entry((row.id, side)).or_default().push(row.value(found.nanoseconds));
            }
        }
        Ok(())
    }

    /// Rows of a step.
    fn of(&self, step: Step) -> impl Iterator<Item = &&'static rows::Definition> {
        self.wanted.iter().filter(move |row| Step::of(row) == step)
    }

    /// Groups of programs that a step needs.
    fn groups(&self, step: Step) -> Vec<Group> {
        let wanted =
            |group: &Group| self.of(step).any(|row| matches!(row.source, Source::Program(of, _) if of == *group));
        Group::ALL.into_iter().filter(wanted).collect()
    }

    /// Names of the programs' rows, for their option `--only`. It takes parts of names, so a few more may run.
    fn names(&self, step: Step) -> String {
        let names = self.of(step).filter_map(|row| match row.source {
            Source::Program(_, name) => Some(name),
            _ => None,
        });
        names.collect::<Vec<_>>().join(",")
    }

    fn on_host(&self, step: Step) -> Result<Vec<(Group, Measurement)>> {
        let mut rows = Vec::new();
        for group in self.groups(step) {
            let mut command = Command::new(&self.images.programs);
            command.args([group.name(), "--only", &self.names(step)]);
            if rows::reduced(group) || self.plan.quick {
                command.arg("--quick");
            }
            match group {
                Group::Programs => {
                    command.arg("--root").arg(&self.images.root);
                }
                Group::Traffic => {
                    command.arg("--disk").arg(self.disk.path()).arg("--server").arg(self.server.on_host());
                }
                _ => {}
            }
            let finished = child::run(&mut command, HOST_LIMIT)?;
            if !finished.success() {
                return Err(Failure::host(format!("the programs failed on the host: {}", finished.tail())));
            }
            rows.extend(finished.output.lines().filter_map(Measurement::parse).map(|row| (group, row)));
        }
        Ok(rows)
    }

    fn in_guest(&self, side: Side, step: Step) -> Result<Vec<(Group, Measurement)>> {
        let mut rows = Vec::new();
        // Groups with reduced work need a run of their own, for the option is the same for all groups of a run.
        let (reduced, full): (Vec<Group>, Vec<Group>) =
            self.groups(step).into_iter().partition(|group| rows::reduced(*group) || self.plan.quick);
        for (groups, quick) in [(reduced, true), (full, false)] {
            if !groups.is_empty() {
                let names = self.names(step);
                let traffic = (step == Step::Traffic).then_some((&self.server, &self.disk));
                let work = Work { groups: &groups, names: &names, quick, traffic };
                rows.extend(guest::work(&self.images, self.plan, side, &work)?);
            }
        }
        Ok(rows)
    }

    /// The rows with what was measured, or why it was not.
    fn rows(&self, mut samples: Samples, troubles: &BTreeMap<(Side, u8), String>) -> Vec<Row> {
        let mut rows = Vec::new();
        for definition in &self.wanted {
            let mut row = self.plan.row(definition.group, definition.id, definition.title, definition.unit);
            let step = Step::of(definition);
            for side in self.plan.runnable() {
                let values = samples.remove(&(definition.id, side)).unwrap_or_default();
                let cell = Measured::new(values).map(Cell::Measured).unwrap_or_else(|| {
                    let refused = self.refusal(side, step).map(str::to_owned);
                    let reason = refused.or_else(|| troubles.get(&(side, step as u8)).cloned());
                    let unknown =
                        || "the programs printed no such row; build them anew with \"cargo xtask guests bench\"".into();
                    Cell::Missing { reason: reason.unwrap_or_else(unknown) }
                });
                row.cells.insert(side, cell);
            }
            rows.push(row);
        }
        rows
    }
}
