//! The cases: what the guest calls them, what a row says of them, how often each is done, and what comes closest on the host.

use super::native::{self, Native};
use crate::model::Group;

/// A device that a case talks to, or a second CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing that not every machine has.
    Nothing,
    /// An entropy source.
    Rng,
    /// A disk.
    Disk,
    /// A network card.
    Card,
    /// A second vCPU.
    SecondCpu,
}

/// A case.
pub struct Case {
    /// The guest's name for it, and the row's.
    pub id: &'static str,
    /// The row's group.
    pub group: Group,
    /// What it is.
    pub title: &'static str,
    /// Operations of a run where the guest's kernel runs at its full speed.
    pub count: u32,
    /// The same where KVM emulates ring 0, some hundred ns per instruction.
    pub slow_count: u32,
    /// The same under QEMU's emulator.
    pub tcg_count: u32,
    /// Whether the paravirtual ABI has a form of its own for it.
    pub abi: bool,
    /// Whether the counters depend on the operations alone. Where a timer or another thread takes part they do not.
    pub exact: bool,
    /// What the machine must have.
    pub needs: Needs,
    /// The host's form.
    pub native: Native,
}

impl Case {
    const fn count(mut self, count: u32, slow: u32) -> Self {
        self.count = count;
        self.slow_count = slow;
        self.tcg_count = count;
        self
    }

    const fn tcg(mut self, count: u32) -> Self {
        self.tcg_count = count;
        self
    }

    const fn abi(mut self) -> Self {
        self.abi = true;
        self
    }

    const fn inexact(mut self) -> Self {
        self.exact = false;
        self
    }

    const fn needs(mut self, needs: Needs) -> Self {
        self.needs = needs;
        self
    }

    const fn native(mut self, native: fn(&native::Place) -> native::Outcome) -> Self {
        self.native = Native::Run(native);
        self
    }

    /// Whether its device is reached by registers in memory whatever the form is.
    pub fn by_mmio(&self) -> bool {
        self.id.ends_with("-mmio")
    }
}

/// A case with the usual numbers, and without a host's form for `reason`.
const fn case(group: Group, id: &'static str, title: &'static str, reason: &'static str) -> Case {
    Case {
        id,
        group,
        title,
        count: 100_000,
        slow_count: 200,
        tcg_count: 100_000,
        abi: false,
        exact: true,
        needs: Needs::Nothing,
        native: Native::Missing(reason),
    }
}

/// Reasons why the host has no form of a case.
const PRIVILEGED: &str = "a process may not execute this instruction";
const NO_HYPERVISOR: &str = "a process has no hypervisor to call";
const NO_DEVICE: &str = "a process may not access devices";
const NO_CONTROLLER: &str = "a process has no interrupt controller";
const THERE: &str = "";

use Group::{Classic, Cpu, Interrupt, Io, Memory};

/// All cases, in the order of the report. Cases with a second CPU come last, because it goes on running.
pub const CASES: &[Case] = &[
    case(Classic, "syscall", "SYSCALL and SYSRET (host: getppid)", THERE).native(native::syscall),
    case(Classic, "in", "IN from the interrupt controller", PRIVILEGED),
    case(Classic, "cr8-write", "write CR8", PRIVILEGED),
    case(Classic, "call-return", "CALL and RET in ring 0 (host: ring 3)", THERE)
        .count(1_000_000, 200)
        .native(native::call_return),
    case(Classic, "page-fault", "page fault in ring 3 (host: SIGSEGV)", THERE).native(native::page_fault),
    case(Classic, "divide-by-zero", "#DE in ring 3 (host: SIGFPE)", THERE)
        .count(20_000, 200)
        .native(native::divide_by_zero),
    case(Classic, "pte-modify", "PTE store, INVLPG (host: mprotect)", THERE).abi().native(native::protect),
    case(Cpu, "user-call-return", "CALL and RET in ring 3", THERE)
        .count(1_000_000, 100_000)
        .native(native::call_return),
    case(Cpu, "cpuid", "CPUID", THERE).native(native::cpuid),
    case(Cpu, "rdtsc", "RDTSC", THERE).native(native::rdtsc),
    case(Cpu, "read-tsc", "LFENCE, RDTSC", THERE).native(native::rdtsc_ordered),
    case(Cpu, "read-clock", "ns since the start (host: clock_gettime)", THERE).abi().native(native::clock),
    case(Cpu, "msr-read", "RDMSR", PRIVILEGED),
    case(Cpu, "msr-write", "WRMSR", PRIVILEGED),
    case(Cpu, "call", "empty hypercall; stock: empty OUT", NO_HYPERVISOR).abi(),
    case(Memory, "invalidate-page", "INVLPG", PRIVILEGED),
    case(Memory, "cr3-write", "load CR3", PRIVILEGED).tcg(20_000),
    case(Memory, "page-update", "4096 PTE stores, INVLPG (host: mprotect), per page", THERE)
        .count(10 * 4096, 4096)
        .abi()
        .native(native::protect_many),
    case(Memory, "update-1", "remap, use 1 page (host: mprotect)", THERE)
        .count(20_000, 200)
        .abi()
        .native(native::remap::<1>),
    case(Memory, "update-16", "the same, 16 at once, per page", THERE)
        .count(32_000, 320)
        .abi()
        .native(native::remap::<16>),
    case(Memory, "update-256", "the same, 256 at once, per page", THERE)
        .count(20 * 4096, 1024)
        .abi()
        .native(native::remap::<256>),
    case(Memory, "update-4096", "the same, 4096 at once, per page", THERE)
        .count(10 * 4096, 4096)
        .abi()
        .native(native::remap::<4096>),
    case(Memory, "map-unmap", "map, use, unmap 4096 (host: mmap), per page", THERE)
        .count(10 * 4096, 4096)
        .abi()
        .native(native::map_and_unmap),
    case(Memory, "switch-space", "switch CR3, use 16 pages (host: 2 processes)", THERE)
        .count(10_000, 200)
        .abi()
        .native(native::switch),
    case(Memory, "free-page", "hint at a free page (host: madvise)", THERE)
        .count(2048, 256)
        .abi()
        .native(native::free_pages),
    case(Interrupt, "mask", "mask, unmask (host: sigprocmask)", THERE).count(1_000_000, 200).abi().native(native::mask),
    case(Interrupt, "mask-pending", "the same while one comes (host: a signal)", THERE)
        .abi()
        .native(native::mask_with_signal)
        .count(20_000, 100),
    case(Interrupt, "eoi-register", "write the EOI register", NO_CONTROLLER),
    case(Interrupt, "eoi", "self-IPI, EOI by form (host: signal to itself)", THERE)
        .count(20_000, 100)
        .abi()
        .native(native::signal),
    case(Interrupt, "ipi", "self-IPI, sent by form (host: the same)", THERE)
        .count(20_000, 100)
        .abi()
        .native(native::signal),
    case(Interrupt, "timer-arm", "arm the one-shot timer (host: timerfd)", THERE).abi().native(native::timer_arm),
    case(Interrupt, "timer-latency", "timer late, waiting in a loop", "a process has no timer interrupt of its own")
        .count(200, 100)
        .tcg(40)
        .abi()
        .inexact(),
    case(Interrupt, "halt", "HLT with an interrupt on its way", "a process has no interrupts").count(20_000, 100).abi(),
    case(Interrupt, "halt-latency", "timer late, halted (host: clock_nanosleep)", THERE)
        .count(200, 100)
        .tcg(40)
        .abi()
        .inexact()
        .native(native::sleep_latency),
    case(Io, "port-write", "OUT to a port that nobody answers", PRIVILEGED),
    case(Io, "read-pm-timer", "IN from the ACPI PM timer", PRIVILEGED),
    case(Io, "mmio-read", "load from the I/O APIC", NO_DEVICE),
    case(Io, "mmio-write", "store to the I/O APIC", NO_DEVICE),
    case(Io, "read-lapic-timer", "read the local APIC's timer", NO_CONTROLLER),
    case(Io, "virtio-notify", "notify virtio; stock: PCI", NO_DEVICE).abi().needs(Needs::Rng),
    case(Io, "block-read", "read a sector; stock: PCI (host: pread)", THERE)
        .count(2000, 100)
        .tcg(200)
        .abi()
        .inexact()
        .needs(Needs::Disk)
        .native(native::read_file),
    case(Io, "block-read-mmio", "read a sector, virtio-mmio", NO_DEVICE).count(2000, 100).inexact().needs(Needs::Disk),
    case(Io, "net-send", "send a frame; stock: PCI (host: UDP)", THERE)
        .count(2000, 100)
        .tcg(200)
        .abi()
        .inexact()
        .needs(Needs::Card)
        .native(native::send_datagram),
    case(Io, "net-send-mmio", "send a frame, virtio-mmio", NO_DEVICE).count(2000, 100).inexact().needs(Needs::Card),
    case(Io, "console-line", "64 characters; stock: serial (host: pipe)", THERE)
        .count(1000, 20)
        .abi()
        .native(native::write_line),
    case(Interrupt, "ipi-other", "IPI to a busy vCPU until it has run", "a process has no other CPU of its own")
        .count(2000, 40)
        .tcg(20)
        .abi()
        .inexact()
        .needs(Needs::SecondCpu),
    case(Interrupt, "ipi-halted", "IPI to a halted vCPU (host: futex)", THERE)
        .count(2000, 40)
        .tcg(200)
        .abi()
        .inexact()
        .needs(Needs::SecondCpu)
        .native(native::wake_thread),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_case_is_one_of_the_guest_and_fits_in_a_report() {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/pv-guests/measure/src/cases.rs");
        let guest = std::fs::read_to_string(source).expect("the guest's source");
        let mut ids = BTreeSet::new();
        for case in CASES {
            assert!(ids.insert(case.id), "{} twice", case.id);
            let known = guest.lines().find(|line| line.contains(&format!("case(\"{}\", &[", case.id)));
            let line = known.unwrap_or_else(|| panic!("{} is not in the guest", case.id));
            assert_eq!(!line.contains("&[]"), case.abi, "{}: {line}", case.id);
            assert!(case.title.len() <= 50, "{}: the title is long", case.id);
            assert!(!matches!(case.native, Native::Missing("")), "{} says nothing about the host", case.id);
            assert!(case.count % 20 == 0 && case.slow_count % 20 == 0 || case.count >= 2048, "{}", case.id);
        }
        let classics = CASES.iter().filter(|case| case.group == Group::Classic).count();
        assert_eq!(classics, 7);
    }
}
