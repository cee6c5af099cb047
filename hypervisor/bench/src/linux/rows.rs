//! What the macro suite measures.

use super::console::Group as Programs;
use crate::model::{Group, Unit};

/// Where a row's figure comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// From the hypervisor's start until the guest's first process runs its script.
    BootToInit,
    /// From the hypervisor's start to its end, with nothing done in between.
    BootToOff,
    /// A row of the benchmark's programs.
    Program(Programs, &'static str),
}

/// A row's definition.
pub(super) struct Definition {
    /// Its name in reports.
    pub(super) id: &'static str,
    /// Its title.
    pub(super) title: &'static str,
    /// The group.
    pub(super) group: Group,
    /// Its unit.
    pub(super) unit: Unit,
    /// Where the figure comes from.
    pub(super) source: Source,
    /// Whether it belongs to the smaller set of `--quick`.
    pub(super) quick: bool,
}

impl Definition {
    /// A figure in the row's unit, from what a program prints: nanoseconds per operation, per run or per 10^6 bytes.
    pub(super) fn value(&self, nanoseconds: f64) -> f64 {
        match self.unit {
            Unit::Nanoseconds => nanoseconds,
            Unit::Seconds => nanoseconds / 1e9,
            Unit::MegabytesPerSecond => 1e9 / nanoseconds,
        }
    }
}

/// Groups of programs whose full amount of work is more than the suite has time for; they do an eighth.
pub(super) fn reduced(group: Programs) -> bool {
    matches!(group, Programs::Kernels | Programs::Os | Programs::Programs)
}

const fn boot(id: &'static str, title: &'static str, source: Source) -> Definition {
    Definition { id, title, group: Group::MacroBoot, unit: Unit::Seconds, source, quick: true }
}

const fn os(id: &'static str, title: &'static str, name: &'static str, quick: bool) -> Definition {
    let source = Source::Program(Programs::Os, name);
    Definition { id, title, group: Group::MacroSystem, unit: Unit::Nanoseconds, source, quick }
}

const fn storm(id: &'static str, title: &'static str, name: &'static str) -> Definition {
    let source = Source::Program(Programs::Storms, name);
    Definition { id, title, group: Group::MacroSystem, unit: Unit::Nanoseconds, source, quick: true }
}

const fn small(id: &'static str, title: &'static str, name: &'static str, quick: bool) -> Definition {
    let source = Source::Program(Programs::Kernels, name);
    Definition { id, title, group: Group::MacroLoops, unit: Unit::Nanoseconds, source, quick }
}

const fn program(id: &'static str, title: &'static str, name: &'static str, quick: bool) -> Definition {
    let source = Source::Program(Programs::Programs, name);
    Definition { id, title, group: Group::MacroPrograms, unit: Unit::Seconds, source, quick }
}

const fn traffic(id: &'static str, title: &'static str, unit: Unit) -> Definition {
    Definition { id, title, group: Group::MacroIo, unit, source: Source::Program(Programs::Traffic, id), quick: true }
}

const MB: Unit = Unit::MegabytesPerSecond;
const NS: Unit = Unit::Nanoseconds;

/// All rows in order.
pub(super) const ROWS: &[Definition] = &[
    boot("boot-init", "Debian 6.1: start to first process", Source::BootToInit),
    boot("boot-off", "Debian 6.1: start to power-off", Source::BootToOff),
    os("linux-getppid", "System call: getppid", "getppid", true),
    os("linux-read", "Read a byte from /dev/zero", "read-1", false),
    os("linux-write", "Write a byte to /dev/null", "write-1", false),
    os("linux-pipe", "A byte to another process and back", "pipe-ping-pong", true),
    os("linux-threads", "Switch to another thread and back", "thread-switch", false),
    os("linux-fork-exit", "fork, exit, wait", "fork-exit", false),
    os("linux-fork-exec", "fork, exec, exit, wait", "fork-exec", true),
    storm("linux-forkwait", "fork, exit, wait: 10,000 in a row", "forkwait"),
    os("linux-page-fault", "First write to a page", "page-fault", false),
    storm("linux-fault-storm", "First write to a page: 65,536 in a row", "fault-storm"),
    os("linux-mmap", "mmap and munmap of 16 pages", "mmap-munmap", false),
    os("linux-mprotect", "mprotect there and back, write", "mprotect", true),
    os("linux-signal", "Signal to oneself, handled", "signal", true),
    os("linux-file", "Create and remove a file (tmpfs)", "file-create-unlink", false),
    small("loop-quicksort", "Quicksort", "quicksort", true),
    small("loop-chase-dram", "Pointer chase through DRAM", "chase-dram", false),
    small("loop-int-matmul", "Integer matrix product", "int-matmul", false),
    small("loop-hash-table", "Hash table", "hash-table", false),
    small("loop-sin-sqrt", "sin and sqrt", "sin-sqrt", false),
    small("loop-simd-saxpy", "SIMD a*x + y", "simd-saxpy", false),
    small("loop-memcpy-4k", "memcpy of 4 KiB", "memcpy-4k", false),
    small("loop-indirect-call", "Indirect calls", "indirect-call", true),
    small("loop-recursion", "Recursion: calls and returns", "recursion", true),
    small("loop-atomic-add", "Atomic additions", "atomic-add", false),
    program("program-perl", "perl: count words", "perl", true),
    program("program-python", "python: mixed work", "python", false),
    program("program-xz", "xz: compress", "xz", false),
    program("program-gzip", "gzip: compress", "gzip", false),
    program("program-zstd", "zstd: compress", "zstd", false),
    program("program-sha256", "openssl: SHA-256", "openssl-sha256", false),
    program("program-aes", "openssl: AES-256", "openssl-aes", false),
    program("program-sqlite", "sqlite: orders in memory", "sqlite", true),
    program("program-cc1", "cc1: compile with -O2", "cc1", true),
    program("program-sh", "busybox sh: a loop", "busybox-sh", false),
    traffic("disk-write", "Disk: write, 1 MiB blocks, flush (host: page cache)", MB),
    traffic("disk-read", "Disk: read, 1 MiB blocks (host: page cache)", MB),
    traffic("disk-read-4k", "Disk: read 4 KiB anywhere (host: page cache)", NS),
    traffic("net-send", "TCP to the host (host: loopback)", MB),
    traffic("net-receive", "TCP from the host (host: loopback)", MB),
    traffic("net-turn", "TCP: a byte there and back (host: loopback)", NS),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn ids_are_unique_and_titles_fit_a_phone() {
        let ids: BTreeSet<_> = ROWS.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), ROWS.len());
        assert!(ROWS.iter().all(|row| row.title.chars().count() <= 52));
        let groups: BTreeSet<_> = ROWS.iter().filter(|row| row.quick).map(|row| row.group).collect();
        assert_eq!(groups.len(), 5, "the smaller set has something of everything");
    }

    #[test]
    fn figures_are_converted_to_the_rows_unit() {
        let value = |id: &str, ns| ROWS.iter().find(|row| row.id == id).expect(id).value(ns);
        assert_eq!(value("linux-getppid", 80.0), 80.0);
        assert_eq!(value("program-cc1", 1.5e9), 1.5);
        assert_eq!(value("disk-read", 500_000.0), 2000.0);
    }
}
