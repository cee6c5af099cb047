//! The host side of the paravirtual interfaces: what a guest that knows it is a guest can ask for.
//!
//! There are two. The open ABI of `pv-abi` (specified in `specs/`) is negotiated and called; the KVM leaves ([`kvm`]) are the few MSRs that
//! unmodified Linux knows, so that stock kernels profit too. Both end in the same machinery: the clock, lazy EOI and stolen time.
//!
//! [`Pv`] belongs to the chipset. Engines reach it through [`paravane_cpu::Bus`]: hypercalls, MSRs, and the CPUID leaves that they are given when they
//! are made. It is the same for every engine; what differs is the entry sequence and what is on offer ([`Offer`]).
//!
//! | module | what |
//! |---|---|
//! | [`calls`] | a hypercall: checks that all have in common, then one function each |
//! | [`page`] | the shared page and what the hypervisor writes there |
//! | [`pages`] | arrays of page-table updates and free pages |
//! | [`kvm`] | CPUID leaves and MSRs of KVM |
//! | [`devices`] | virtio devices on the ABI's own transport |
//! | [`stolen`] | how long a vCPU's thread waited for a CPU |
//!
//! Everything that comes from the guest is checked where it enters: addresses against RAM in their whole length, counts against
//! the limits in CPUID, vectors, indices and reserved bits against their ranges. Nothing here keeps a pointer into guest RAM.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use pv_abi::feature::{Feature, Features};
use pv_abi::{Version, cpuid, memory};

use crate::devices::lock;
use crate::memory::GuestRam;
use crate::timer::{Clock, Timer};

pub mod calls;
pub mod devices;
pub mod kvm;
pub mod page;
pub mod pages;
pub mod remote;
pub mod stolen;

/// How much of the paravirtual interfaces a guest is offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offer {
    /// Nothing; the guest finds a signature and frequencies only.
    Off,
    /// What pays on the engine that runs it.
    #[default]
    Auto,
    /// All that is implemented, for tests and measurements.
    All,
}

/// How a guest enters the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// VMCALL, which the translator turns into a callout.
    Vmcall,
    /// OUT to [`HYPERCALL_PORT`], for engines whose VMCALL does not come to user space.
    Port,
}

/// Port of [`Entry::Port`]; its lower neighbours belong to devices of the PC that this machine does not have.
pub const HYPERCALL_PORT: u16 = 0xe7;

impl Entry {
    /// The entry sequence.
    pub const fn code(self) -> &'static [u8] {
        match self {
            Self::Vmcall => &[0x0f, 0x01, 0xc1, 0xc3],
            Self::Port => &[0xe7, HYPERCALL_PORT as u8, 0xc3],
        }
    }
}

/// Most elements of an array in one call.
pub const MAX_ELEMENTS: u32 = 4096;
/// Most bytes of a text in one call.
pub const MAX_TEXT: u32 = 4096;
const _: () = assert!(MAX_ELEMENTS >= memory::LEAST_LIMIT);

/// Who answers the KVM leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmLeaves {
    /// This module.
    Here,
    /// KVM itself, with the features of this word; see [`kvm`].
    Kernel(u32),
}

/// What a machine is made with.
pub struct PvConfig {
    /// How much is offered.
    pub offer: Offer,
    /// How a guest enters.
    pub entry: Entry,
    /// Features that do not pay on the engine.
    pub unfit: Features,
    /// Features that the engine cannot carry out.
    pub impossible: Features,
    /// Who answers the KVM leaves.
    pub kvm: KvmLeaves,
    /// Guest RAM.
    pub ram: GuestRam,
    /// How many virtio devices `Pv::add_device` will bring.
    pub devices: u32,
}

/// What belongs to one vCPU.
#[derive(Default)]
struct PvVcpu {
    /// Guest-physical address of the shared page; 0: none.
    page: AtomicU64,
    /// Guest-physical address of the word with the EOI bit; 0: none.
    eoi_word: AtomicU64,
    /// Guest TSC minus host TSC.
    tsc_offset: AtomicU64,
    /// A kick that came before the halt it is to end.
    kicked: AtomicBool,
    timer: OnceLock<Timer>,
    timer_vector: AtomicU8,
    stolen: Mutex<stolen::StolenTime>,
    kvm: kvm::Msrs,
    requests: remote::Requests,
}

/// The interfaces of one machine.
pub struct Pv {
    offered: Features,
    /// Features of the KVM leaves that are carried out here.
    kvm_features: u32,
    /// Features that the KVM leaves announce.
    kvm_leaves: u32,
    entry: Entry,
    ram: GuestRam,
    clock: Clock,
    /// One reading of the host's TSC and the clock, which all vCPUs' clocks start from, so that they agree.
    origin: (u64, u64),
    /// Nanoseconds from 1970 to the clock's zero.
    wall_ns: u64,
    version: AtomicU32,
    in_force: AtomicU64,
    event_vector: AtomicU8,
    vcpus: Box<[PvVcpu]>,
    devices: devices::Devices,
}

impl Pv {
    /// The interfaces before a guest has negotiated anything.
    pub fn new(cfg: PvConfig, cpus: u32, clock: Clock) -> Self {
        let mut implemented = Features(Features::all().0 & !cfg.impossible.0);
        if !stolen::available() {
            implemented = implemented.without(Feature::StolenTime);
        }
        if cfg.devices == 0 {
            implemented = implemented.without(Feature::Virtio);
        }
        let offered = match cfg.offer {
            Offer::Off => Features::NONE,
            Offer::Auto => Features(implemented.0 & !cfg.unfit.0),
            Offer::All => implemented,
        };
        let kvm_leaves = match (cfg.offer, cfg.kvm) {
            (Offer::Off, _) => 0,
            (_, KvmLeaves::Here) => kvm::features(&cfg, cpus),
            (_, KvmLeaves::Kernel(features)) => features,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        Self {
            offered,
            kvm_features: if cfg.kvm == KvmLeaves::Here { kvm_leaves } else { 0 },
            kvm_leaves,
            entry: cfg.entry,
            ram: cfg.ram,
            wall_ns: now.saturating_sub(clock.ns()),
            origin: clock.pair(),
            clock,
            version: AtomicU32::new(0),
            in_force: AtomicU64::new(0),
            event_vector: AtomicU8::new(0),
            vcpus: (0..cpus).map(|_| PvVcpu::default()).collect(),
            devices: devices::Devices::expect(cfg.devices),
        }
    }

    /// What CPUID answers vCPU `vcpu` from 0x4000_0000 on: leaf, and EAX to EDX.
    pub fn leaves(&self, vcpu: u32, tsc_khz: u32, apic_hz: u32) -> Vec<(u32, [u32; 4])> {
        let base = cpuid::FIRST;
        let [b, c, d] = cpuid::signature_words();
        let mut leaves =
            vec![(base, [base + cpuid::TIMING, b, c, d]), (base + cpuid::TIMING, [tsc_khz, apic_hz / 1000, 0, 0])];
        if self.offered != Features::NONE {
            let (low, high) = (self.offered.0 as u32, (self.offered.0 >> 32) as u32);
            leaves.push((base + cpuid::FEATURES, [Version::CURRENT.to_bits(), low, high, vcpu]));
            leaves.push((base + cpuid::ENTRY, cpuid::entry_leaf(self.entry.code())));
            leaves.push((
                base + cpuid::LIMITS,
                [MAX_ELEMENTS, self.vcpus.len() as u32, MAX_TEXT, self.devices.expected()],
            ));
        }
        if self.kvm_leaves != 0 {
            leaves.extend(kvm::leaves(base + cpuid::STEP, self.kvm_leaves));
        }
        leaves
    }

    /// Whether a feature was acknowledged.
    fn has(&self, f: Feature) -> bool {
        Features(self.in_force.load(SeqCst)).has(f)
    }

    fn vcpu(&self, n: u32) -> Option<&PvVcpu> {
        self.vcpus.get(n as usize)
    }

    /// Hands over the timer that [`calls`] arms for a vCPU.
    pub(crate) fn set_timer(&self, vcpu: u32, timer: Timer) {
        if let Some(v) = self.vcpu(vcpu) {
            let _ = v.timer.set(timer);
        }
    }

    /// Vector that the vCPU's timer raises.
    pub(crate) fn timer_vector(&self, vcpu: u32) -> Option<u8> {
        self.vcpu(vcpu).map(|v| v.timer_vector.load(SeqCst)).filter(|&v| v != 0)
    }

    /// The vCPU's TSC differs from the host's by `offset` from now on.
    pub(crate) fn tsc_moved(&self, vcpu: u32, offset: u64) {
        if let Some(v) = self.vcpu(vcpu) {
            v.tsc_offset.store(offset, SeqCst);
            self.write_clocks(vcpu);
        }
    }

    /// Whether a halted vCPU is to go on although no interrupt may be delivered: it was kicked, or the virtual IF holds one back.
    pub(crate) fn wakes(&self, vcpu: u32) -> bool {
        self.vcpu(vcpu).is_some_and(|v| v.kicked.swap(false, SeqCst)) || self.holds_back(vcpu)
    }
}

#[cfg(test)]
mod tests;
