//! What a run of the benchmark leaves behind: a [`Report`] of [`Row`]s, each with a [`Cell`] per [`Side`].
//!
//! A row is one piece of work, a side one way of running it. Every row has a cell for every side that the plan names:
//! a measurement, the reason why there is none, or a pointer to the side that runs the very same code. So whoever draws a
//! table never has to guess what an empty place means.
//!
//! The structures are the JSON form, schema [`SCHEMA`]. Times are in the row's unit; counters are per operation.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Version of the JSON form. Fields may be added; it is raised when one gets another meaning.
pub const SCHEMA: u32 = 1;

/// One run of the benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The machine and the programs.
    pub host: Host,
    /// What was asked for.
    pub plan: Plan,
    /// Seconds that it took.
    pub seconds: f64,
    /// The results, in the order in which they are shown: by group.
    pub rows: Vec<Row>,
}

/// The machine and the programs that were measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// When the run began, UTC, `2026-01-31T12:00:00Z`.
    pub date: String,
    /// Paravane's version.
    pub paravane: String,
    /// The commit that it was built from, where that is known.
    pub commit: Option<String>,
    /// The CPU's name.
    pub cpu: String,
    /// CPUs online, such as `0-3`.
    pub cpus_online: Option<String>,
    /// Whether the host is itself a guest.
    pub virtualized: bool,
    /// Memory, bytes.
    pub memory: Option<u64>,
    /// Release of the host's kernel.
    pub kernel: Option<String>,
    /// /proc/loadavg before the run.
    pub load: Option<String>,
    /// What /dev/kvm is.
    pub kvm: Kvm,
    /// QEMU's version, `None` where it is not installed.
    pub qemu: Option<String>,
}

/// What /dev/kvm is, as `paravane doctor` finds it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kvm {
    /// Whether guests can be started with it.
    pub usable: bool,
    /// Whether it has no hardware behind it and emulates the guest's ring 0.
    pub emulating: bool,
    /// The same for people, in one clause.
    pub text: String,
    /// One instruction of the guest's ring 0, ns, where it was measured.
    pub ring0_ns: Option<f64>,
    /// One exit to user space and back, ns.
    pub exit_ns: Option<f64>,
    /// One instruction of the host, ns.
    pub host_ns: Option<f64>,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Suite {
    /// Single operations, in a bare-metal guest.
    Micro,
    /// A stock Linux kernel and programs under it.
    Macro,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The parts.
    pub suites: Vec<Suite>,
    /// The sides that were asked for, in the order of [`Side::ALL`].
    pub sides: Vec<Side>,
    /// Sides among them that cannot run here, and why. Their cells are [`Cell::Missing`] with this reason.
    pub absent: BTreeMap<Side, String>,
    /// Less work and fewer rounds.
    pub quick: bool,
    /// Rounds, where the command line gave a number; otherwise each suite takes its own.
    pub rounds: Option<u32>,
    /// Only rows whose id contains one of these; all if empty.
    pub only: Vec<String>,
    /// Whether this host's KVM emulates ring 0, so that counts must be small and stock kernels cannot be run.
    pub kvm_emulates: bool,
    /// The folder of the guests, `target/guests` in a checkout.
    #[serde(skip)]
    pub guests: PathBuf,
    /// The program that is measured: this one.
    #[serde(skip)]
    pub paravane: PathBuf,
}

impl Plan {
    /// Sides that can run here, in order.
    pub fn runnable(&self) -> impl Iterator<Item = Side> {
        self.sides.iter().copied().filter(|side| !self.absent.contains_key(side))
    }

    /// Whether a row is asked for.
    pub fn wants(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| id.contains(part.as_str()))
    }

    /// A row with the absent sides filled in and no measurement yet.
    pub fn row(&self, group: Group, id: &str, title: &str, unit: Unit) -> Row {
        let absent = self
            .sides
            .iter()
            .filter_map(|side| self.absent.get(side).map(|reason| (*side, Cell::Missing { reason: reason.clone() })));
        Row { group, id: id.to_owned(), title: title.to_owned(), unit, cells: absent.collect() }
    }
}

/// A way of running the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// A process of this machine, or what a process can do that comes closest.
    Host,
    /// Binary translation, the guest knows nothing of Paravane.
    BtStock,
    /// Binary translation, the guest uses the paravirtual interfaces.
    BtPv,
    /// KVM, the guest knows nothing of Paravane.
    KvmStock,
    /// KVM, the guest uses the paravirtual interfaces.
    KvmPv,
    /// QEMU's emulator (TCG).
    TcgStock,
}

impl Side {
    /// All, in the order of columns and runs.
    pub const ALL: [Self; 6] = [Self::Host, Self::BtStock, Self::BtPv, Self::KvmStock, Self::KvmPv, Self::TcgStock];

    /// The name in JSON and in column heads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::BtStock => "bt-stock",
            Self::BtPv => "bt-pv",
            Self::KvmStock => "kvm-stock",
            Self::KvmPv => "kvm-pv",
            Self::TcgStock => "tcg-stock",
        }
    }

    /// The name for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Host => "host (native)",
            Self::BtStock => "BT, stock",
            Self::BtPv => "BT, paravirtual",
            Self::KvmStock => "KVM, stock",
            Self::KvmPv => "KVM, paravirtual",
            Self::TcgStock => "QEMU TCG",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What rows have in common. The order is that of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// The seven nanobenchmarks of Adams and Agesen (ASPLOS 2006).
    Classic,
    /// Instructions that trap or do not, calls into the hypervisor.
    Cpu,
    /// Page tables and address spaces.
    Memory,
    /// Interrupts, timers, halts.
    Interrupt,
    /// Ports, device registers, virtio.
    Io,
    /// A stock Linux kernel starting and ending.
    MacroBoot,
    /// Linux at work for processes: system calls, fork, faults, signals.
    MacroSystem,
    /// Small loops in user code.
    MacroLoops,
    /// Real programs.
    MacroPrograms,
    /// Disk and network.
    MacroIo,
}

impl Group {
    /// All, in order.
    pub const ALL: [Self; 10] = [
        Self::Classic,
        Self::Cpu,
        Self::Memory,
        Self::Interrupt,
        Self::Io,
        Self::MacroBoot,
        Self::MacroSystem,
        Self::MacroLoops,
        Self::MacroPrograms,
        Self::MacroIo,
    ];

    /// The name in JSON and in addresses within the page.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Interrupt => "interrupt",
            Self::Io => "io",
            Self::MacroBoot => "macro-boot",
            Self::MacroSystem => "macro-system",
            Self::MacroLoops => "macro-loops",
            Self::MacroPrograms => "macro-programs",
            Self::MacroIo => "macro-io",
        }
    }

    /// The heading for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Classic => "The seven classics",
            Self::Cpu => "Instructions and calls",
            Self::Memory => "Page tables and address spaces",
            Self::Interrupt => "Interrupts, timers, halts",
            Self::Io => "Ports, device registers, virtio",
            Self::MacroBoot => "Stock Linux: start and end",
            Self::MacroSystem => "Stock Linux: system calls and processes",
            Self::MacroLoops => "Stock Linux: small loops in user code",
            Self::MacroPrograms => "Stock Linux: real programs",
            Self::MacroIo => "Stock Linux: disk and network",
        }
    }

    /// What the group shows, in a sentence.
    pub fn about(self) -> &'static str {
        match self {
            Self::Classic => {
                "The operations with which Adams and Agesen compared software and hardware virtualization in 2006, \
                 each alone in a loop of a bare-metal guest."
            }
            Self::Cpu => "Single instructions that may trap, and calls from the guest to the hypervisor.",
            Self::Memory => "What a kernel does to page tables, TLB and address spaces.",
            Self::Interrupt => "What a kernel does to its interrupt controller and timer, and how long waking takes.",
            Self::Io => "Single accesses to devices, and whole virtio requests.",
            Self::MacroBoot => "A Debian kernel from its first instruction to its first process, and to power-off.",
            Self::MacroSystem => "Fixed operating-system work of one process pinned to one CPU, per operation.",
            Self::MacroLoops => "Computation without system calls, per repetition.",
            Self::MacroPrograms => "Programs from Debian packages with fixed input, per run.",
            Self::MacroIo => {
                "Data through a virtio disk and a network card. Costs are the inverse of throughput, so that right is dearer here, too."
            }
        }
    }
}

/// What a row's figures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Nanoseconds per operation; less is better.
    #[serde(rename = "ns/op")]
    Nanoseconds,
    /// Seconds per run; less is better.
    #[serde(rename = "s")]
    Seconds,
    /// Megabytes (10^6) per second; more is better.
    #[serde(rename = "MB/s")]
    MegabytesPerSecond,
}

impl Unit {
    /// Whether less is better.
    pub fn lower_is_better(self) -> bool {
        self != Self::MegabytesPerSecond
    }
}

/// One piece of work on every side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What it belongs to.
    pub group: Group,
    /// A name that stays the same from version to version, unique in a report.
    pub id: String,
    /// What it is, for people; where the host's form differs, this says what the host does.
    pub title: String,
    /// What the figures are.
    pub unit: Unit,
    /// The results.
    pub cells: BTreeMap<Side, Cell>,
}

impl Row {
    /// A side's measurement. A side that is the same as another has that one's.
    pub fn measured(&self, side: Side) -> Option<&Measured> {
        match self.cells.get(&side)? {
            Cell::Measured(measured) => Some(measured),
            Cell::SameAs { side } => match self.cells.get(side)? {
                Cell::Measured(measured) => Some(measured),
                _ => None,
            },
            Cell::Missing { .. } => None,
        }
    }
}

/// A side's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Cell {
    /// It was measured.
    Measured(Measured),
    /// It was not, for this reason (a clause without a full stop).
    Missing {
        /// The reason.
        reason: String,
    },
    /// This side runs the very same code as another, so it was not measured again; the paravirtual interface has no form
    /// of its own for it.
    SameAs {
        /// The other side, which is measured or missing.
        side: Side,
    },
}

/// A measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The middle of `samples`, in the row's unit.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// One value per round, in the order in which they were taken; each is itself the best or the median of what a round tried.
    pub samples: Vec<f64>,
    /// TSC cycles per operation (median), where the guest counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycles: Option<f64>,
    /// Exits from guest code into the hypervisor per operation, where they are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<f64>,
    /// Counters per operation by the hypervisor's names; what an empty run counts has been taken off.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub counters: BTreeMap<String, f64>,
    /// Whether `exits` and `counters` come out the same in every run. They do not where a timer or another thread takes part.
    #[serde(default)]
    pub exact: bool,
}

impl Measured {
    /// From the values of the rounds; `None` if there are none or one is no number above zero.
    pub fn new(samples: Vec<f64>) -> Option<Self> {
        let good = samples.iter().all(|value| value.is_finite() && *value > 0.0);
        let median = median(&samples).filter(|_| good)?;
        let min = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let max = samples.iter().copied().fold(0.0, f64::max);
        Some(Self { median, min, max, samples, cycles: None, exits: None, counters: BTreeMap::new(), exact: false })
    }
}

/// The middle value, or the mean of the two in the middle; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[middle - 1], upper) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            suites: vec![Suite::Micro],
            sides: vec![Side::Host, Side::BtStock, Side::KvmStock],
            absent: [(Side::KvmStock, "no /dev/kvm".to_owned())].into(),
            quick: false,
            rounds: None,
            only: vec!["sys".into()],
            kvm_emulates: false,
            guests: PathBuf::new(),
            paravane: PathBuf::new(),
        }
    }

    #[test]
    fn a_plan_knows_its_sides_and_rows() {
        let plan = plan();
        assert_eq!(plan.runnable().collect::<Vec<_>>(), [Side::Host, Side::BtStock]);
        assert!(plan.wants("syscall") && !plan.wants("in"));
        let row = plan.row(Group::Classic, "syscall", "SYSCALL and SYSRET", Unit::Nanoseconds);
        assert_eq!(row.cells, [(Side::KvmStock, Cell::Missing { reason: "no /dev/kvm".into() })].into());
    }

    #[test]
    fn measurements_have_a_middle_and_ends() {
        let measured = Measured::new(vec![4.0, 1.0, 2.0, 9.0]).expect("numbers");
        assert_eq!((measured.median, measured.min, measured.max), (3.0, 1.0, 9.0));
        assert!(Measured::new(vec![]).is_none());
        assert!(Measured::new(vec![1.0, f64::NAN]).is_none());
        assert!(Measured::new(vec![1.0, 0.0]).is_none());
    }

    #[test]
    fn the_json_form_keeps_everything() {
        let mut row = plan().row(Group::MacroIo, "disk-read", "read", Unit::MegabytesPerSecond);
        row.cells.insert(Side::BtStock, Cell::Measured(Measured::new(vec![1.5]).expect("a number")));
        row.cells.insert(Side::BtPv, Cell::SameAs { side: Side::BtStock });
        let text = serde_json::to_string(&row).expect("JSON");
        assert!(text.contains(r#""bt-pv":{"kind":"same-as","side":"bt-stock"}"#), "{text}");
        assert!(text.contains(r#""unit":"MB/s""#) && text.contains(r#""group":"macro-io""#), "{text}");
        assert_eq!(serde_json::from_str::<Row>(&text).expect("the same"), row);
        assert_eq!(row.measured(Side::BtPv).map(|m| m.median), Some(1.5));
        assert_eq!(row.measured(Side::KvmStock), None);
    }
}
