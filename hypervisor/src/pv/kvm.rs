//! The KVM interface: the leaves and MSRs that unmodified Linux understands (Linux, Documentation/virt/kvm/x86/{cpuid,msr}.rst).
//!
//! Only what is carried out is offered: the clock, PV EOI, stolen time, the hint that port 0x80 needs no delay, and, in a machine with more
//! vCPUs than the host has CPUs, the kick of a halted vCPU, by which Linux's spinlocks sleep. Calls for IPIs and remote TLB flushes are not:
//! an x2APIC sends an IPI to sixteen vCPUs with one write, which costs what a call would.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use paravane_cpu::{BusOutcome, CpuState, HypercallOutcome, Reg};
use pv_abi::shared::Clock as SharedClock;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{Immutable, IntoBytes};

use super::{Entry, Offer, Pv, PvConfig, calls, lock, stolen};
use crate::chipset::Chipset;

const SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";

// Bits of the feature leaf's EAX.
const NOP_IO_DELAY: u32 = 1 << 1;
const CLOCKSOURCE2: u32 = 1 << 3;
const STEAL_TIME: u32 = 1 << 5;
const PV_EOI: u32 = 1 << 6;
const PV_UNHALT: u32 = 1 << 7;
const CLOCKSOURCE_STABLE: u32 = 1 << 24;

/// The MSRs.
pub mod nr {
    /// Wall clock: where to write it.
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    /// Clock: where to keep it, and bit 0 to enable.
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    /// Asynchronous page faults: where to tell of them, and bit 0 to enable. Only KVM itself has them.
    pub const ASYNC_PF: u32 = 0x4b56_4d02;
    /// Stolen time: where to keep it, and bit 0 to enable.
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
    /// PV EOI: where the bit is, and bit 0 to enable.
    pub const PV_EOI: u32 = 0x4b56_4d04;
}

/// What the guest wrote to the MSRs.
#[derive(Default)]
pub(super) struct Msrs {
    wall_clock: AtomicU64,
    system_time: AtomicU64,
    steal_time: AtomicU64,
    pv_eoi: AtomicU64,
}

/// `struct pvclock_vcpu_time_info`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SystemTime {
    version: u32,
    pad0: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad: [u8; 2],
}

/// All vCPUs' clocks agree: `PVCLOCK_TSC_STABLE_BIT`.
const TSC_STABLE: u8 = 1;

/// `struct pvclock_wall_clock`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct WallClock {
    version: u32,
    sec: u32,
    nsec: u32,
}

/// `struct kvm_steal_time` is 64 bytes; the version stands behind the time.
const STEAL_BYTES: u64 = 64;

/// Hypercall (Linux, Documentation/virt/kvm/x86/hypercalls.rst): ends the halt of the vCPU whose APIC ID is the second argument, or the next
/// one that it begins.
const KICK_CPU: u64 = 5;
/// What a hypercall gives that may not be made in user mode.
const EPERM: u64 = -1i64 as u64;

/// What is offered to a machine with so many vCPUs.
pub(super) fn features(cfg: &PvConfig, cpus: u32) -> u32 {
    let steal = if stolen::available() { STEAL_TIME } else { 0 };
    // A lock that can sleep costs more to release, so it must have somebody to make room for.
    let host_cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let crowded = cpus as usize > host_cpus || cfg.offer == Offer::All;
    // By another entry the call would not come here.
    let unhalt = if cpus > 1 && crowded && cfg.entry == Entry::Vmcall { PV_UNHALT } else { 0 };
    NOP_IO_DELAY | CLOCKSOURCE2 | PV_EOI | CLOCKSOURCE_STABLE | steal | unhalt
}

/// The two leaves, at `base`.
pub(super) fn leaves(base: u32, features: u32) -> [(u32, [u32; 4]); 2] {
    let word = |n: usize| u32::from_le_bytes([SIGNATURE[n], SIGNATURE[n + 1], SIGNATURE[n + 2], SIGNATURE[n + 3]]);
    [(base, [base + 1, word(0), word(4), word(8)]), (base + 1, [features, 0, 0, 0])]
}

impl Pv {
    /// A hypercall of KVM's; `None` if it is none that is on offer.
    pub(super) fn kvm_hypercall(&self, chipset: &Chipset, st: &mut CpuState) -> Option<HypercallOutcome> {
        let number = st.gpr[Reg::Rax as usize];
        // Numbers and arguments have 32 bits outside 64-bit mode.
        let mask = if st.code64() { u64::MAX } else { u64::from(u32::MAX) };
        if self.kvm_features & PV_UNHALT == 0 || number & mask != KICK_CPU {
            return None;
        }
        let to = st.gpr[Reg::Rcx as usize] & mask;
        st.gpr[Reg::Rax as usize] = if st.cpl == 0 {
            // KVM too is silent about an APIC ID that nobody has.
            let _ = calls::kick(self, chipset, to);
            0
        } else {
            EPERM & mask
        };
        Some(HypercallOutcome::Done)
    }

    /// RDMSR. `None`: there is no such MSR here.
    pub(crate) fn kvm_msr_read(&self, vcpu: u32, msr: u32) -> Option<u64> {
        let m = &self.vcpu(vcpu)?.kvm;
        let (feature, value) = match msr {
            nr::WALL_CLOCK => (CLOCKSOURCE2, &m.wall_clock),
            nr::SYSTEM_TIME => (CLOCKSOURCE2, &m.system_time),
            nr::STEAL_TIME => (STEAL_TIME, &m.steal_time),
            nr::PV_EOI => (PV_EOI, &m.pv_eoi),
            _ => return None,
        };
        (self.kvm_features & feature != 0).then(|| value.load(SeqCst))
    }

    /// WRMSR. `None`: there is no such MSR here, or the value is not allowed.
    pub(crate) fn kvm_msr_write(&self, vcpu: u32, msr: u32, value: u64) -> Option<BusOutcome> {
        let v = self.vcpu(vcpu)?;
        let offered = |bit: u32| (self.kvm_features & bit != 0).then_some(());
        match msr {
            nr::WALL_CLOCK => {
                offered(CLOCKSOURCE2)?;
                v.kvm.wall_clock.store(value, SeqCst);
                let (sec, nsec) = ((self.wall_ns / 1_000_000_000) as u32, (self.wall_ns % 1_000_000_000) as u32);
                if value & 3 == 0 && self.is_ram(value, 12) {
                    self.write_sequenced(value, WallClock { version: 0, sec, nsec }.as_bytes());
                }
            }
            nr::SYSTEM_TIME => {
                offered(CLOCKSOURCE2)?;
                if value & 1 != 0 && (value & 2 != 0 || !self.is_ram(value & !3, 32)) {
                    return None;
                }
                v.kvm.system_time.store(value, SeqCst);
                self.write_clocks(vcpu);
            }
            nr::STEAL_TIME => {
                offered(STEAL_TIME)?;
                if value & 0x3e != 0 || (value & 1 != 0 && !self.is_ram(value & !0x3f, STEAL_BYTES)) {
                    return None;
                }
                v.kvm.steal_time.store(value, SeqCst);
                if value & 1 != 0 {
                    lock(&v.stolen).start(self.clock.ns());
                }
            }
            nr::PV_EOI => {
                offered(PV_EOI)?;
                if value & 2 != 0 || (value & 1 != 0 && !self.is_ram(value & !3, 4)) {
                    return None;
                }
                v.kvm.pv_eoi.store(value, SeqCst);
                v.eoi_word.store(if value & 1 != 0 { value & !3 } else { 0 }, SeqCst);
            }
            _ => return None,
        }
        Some(BusOutcome::Done)
    }

    /// Writes the clock where the guest wants it, if it does.
    pub(super) fn write_kvm_clock(&self, vcpu: u32, now: &SharedClock) {
        let Some(v) = self.vcpu(vcpu) else { return };
        let at = v.kvm.system_time.load(SeqCst);
        if at & 1 == 0 {
            return;
        }
        let time = SystemTime {
            version: 0,
            pad0: 0,
            tsc_timestamp: now.tsc_base,
            system_time: now.ns_base,
            tsc_to_system_mul: now.mult,
            tsc_shift: now.shift,
            flags: TSC_STABLE,
            pad: [0; 2],
        };
        self.write_sequenced(at & !1, time.as_bytes());
    }

    /// Writes the stolen time where the guest wants it, if it does.
    pub(super) fn write_kvm_stolen(&self, vcpu: u32, ns: u64) {
        let Some(v) = self.vcpu(vcpu) else { return };
        let at = v.kvm.steal_time.load(SeqCst);
        if at & 1 == 0 {
            return;
        }
        let at = at & !0x3f;
        let version = GuestAddress(at + 8);
        // The address was found to be RAM when the guest gave it.
        let Ok(old) = self.ram.load::<u32>(version, SeqCst) else { return };
        let odd = old.wrapping_add(1) | 1;
        let _ = self.ram.store(odd, version, SeqCst);
        let _ = self.ram.store(ns, GuestAddress(at), SeqCst);
        let _ = self.ram.store(odd.wrapping_add(1), version, SeqCst);
    }
}
