//! A report for tests, with every kind of cell, and text that must be escaped.

use crate::model::{Cell, Group, Host, Kvm, Measured, Plan, Report, Row, SCHEMA, Side, Suite, Unit};
use std::collections::BTreeMap;

/// Five rounds around a value.
fn measured(value: f64) -> Measured {
    Measured::new([1.0, 0.97, 1.04, 1.01, 0.99].map(|factor| factor * value).to_vec()).expect("numbers above zero")
}

fn counted(value: f64, exits: f64, exact: bool) -> Cell {
    let counters = BTreeMap::from([("instructions emulated".to_owned(), exits), ("port writes".to_owned(), 0.0)]);
    Cell::Measured(Measured { exits: Some(exits), counters, exact, ..measured(value) })
}

fn missing(reason: &str) -> Cell {
    Cell::Missing { reason: reason.to_owned() }
}

/// A row with cells for all sides: host, BT stock and pv, KVM stock and pv, TCG.
fn row(group: Group, id: &str, title: &str, unit: Unit, cells: [Cell; 6]) -> Row {
    Row { group, id: id.into(), title: title.into(), unit, cells: Side::ALL.into_iter().zip(cells).collect() }
}

/// The report.
pub(crate) fn report() -> Report {
    let plain = |value| Cell::Measured(measured(value));
    let same = |side| Cell::SameAs { side };
    let ns = Unit::Nanoseconds;
    let no_linux = "this KVM emulates ring 0 and cannot run a stock kernel";
    let rows = vec![
        row(
            Group::Classic,
            "syscall",
            "SYSCALL and SYSRET (host: getppid)",
            ns,
            [
                plain(81.3),
                counted(24.2, 0.0, true),
                same(Side::BtStock),
                counted(51_600.0, 2.0, true),
                same(Side::KvmStock),
                plain(211.0),
            ],
        ),
        row(
            Group::Classic,
            "in",
            "IN from a port <that> a device \"answers\" & more",
            ns,
            [
                missing("a process may not execute IN"),
                counted(702.0, 1.0, true),
                counted(55.0, 0.0, true),
                counted(26_100.0, 1.0, true),
                counted(25_900.0, 1.02, false),
                plain(811.0),
            ],
        ),
        row(
            Group::Classic,
            "call-ret",
            "CALL and RET",
            ns,
            [
                plain(0.87),
                counted(2.9, 0.0, true),
                same(Side::BtStock),
                counted(1030.0, 0.0, true),
                same(Side::KvmStock),
                plain(9.1),
            ],
        ),
        row(
            Group::Memory,
            "pte-batch-4096",
            "Change 4096 page-table entries, then flush them all at once (host: mprotect of as many pages)",
            ns,
            [
                plain(1_900_000.0),
                counted(310_000.0, 4096.0, true),
                counted(2400.0, 1.0, true),
                missing(
                    "a run longer than 60 s was ended; this KVM emulates each of the guest's instructions in ring 0",
                ),
                plain(88_000.0),
                plain(901_000.0),
            ],
        ),
        row(
            Group::MacroBoot,
            "boot-init",
            "Kernel's start to its first process",
            Unit::Seconds,
            [
                missing("a host does not boot for this"),
                plain(0.61),
                plain(0.52),
                missing(no_linux),
                missing(no_linux),
                plain(1.9),
            ],
        ),
        row(
            Group::MacroPrograms,
            "program-cc1",
            "cc1, GCC's compiler",
            Unit::Seconds,
            [plain(0.41), plain(1.6), plain(1.61), missing(no_linux), missing(no_linux), plain(6.9)],
        ),
        row(
            Group::MacroIo,
            "disk-read",
            "Sequential read, 1 MiB blocks",
            Unit::MegabytesPerSecond,
            [plain(4100.0), plain(1350.0), same(Side::BtStock), missing(no_linux), missing(no_linux), plain(720.0)],
        ),
    ];
    Report {
        schema: SCHEMA,
        host: Host {
            date: "2026-01-31T12:00:00Z".into(),
            paravane: "0.1.0".into(),
            commit: Some("0123456789abcdef0123456789abcdef01234567".into()),
            cpu: "A CPU <of some make> & model".into(),
            cpus_online: Some("0-1".into()),
            virtualized: true,
            memory: Some(8 << 30),
            kernel: Some("6.18.5".into()),
            load: Some("0.10 0.20 0.30 1/200 4711".into()),
            kvm: Kvm {
                usable: true,
                emulating: true,
                text: "opens, emulating".into(),
                ring0_ns: Some(510.0),
                exit_ns: Some(25_000.0),
                host_ns: Some(0.31),
            },
            qemu: Some("7.2.22 (Debian 1:7.2)".into()),
        },
        plan: Plan {
            suites: vec![Suite::Micro, Suite::Macro],
            sides: Side::ALL.to_vec(),
            absent: BTreeMap::new(),
            quick: false,
            rounds: None,
            only: Vec::new(),
            kvm_emulates: true,
            guests: Default::default(),
            paravane: Default::default(),
        },
        seconds: 812.4,
        rows,
    }
}
