//! The vCPU's environment for what is carried out in Rust beside KVM: MSRs that KVM hands to us, and instruction bytes for a report.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use paravane_cpu::cpuid::CpuidPolicy;
use paravane_cpu::{Bus, BusOutcome, CpuState, Env, HypercallOutcome, TlbFlush};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;
use crate::tsc;

/// See the module text.
pub(super) struct KvmEnv {
    pub(super) id: u32,
    pub(super) ram: GuestRam,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) cpuid: CpuidPolicy,
    /// A bus write said that the machine is stopping.
    pub(super) stopping: bool,
}

impl Env for KvmEnv {
    fn read_phys(&mut self, gpa: u64, data: &mut [u8]) {
        if self.ram.read_slice(data, GuestAddress(gpa)).is_err() {
            self.bus.mmio_read(self.id, gpa, data);
        }
    }

    fn write_phys(&mut self, gpa: u64, data: &[u8]) {
        if self.ram.write_slice(data, GuestAddress(gpa)).is_err() {
            let outcome = self.bus.mmio_write(self.id, gpa, data);
            self.note_outcome(outcome);
        }
    }

    fn read_pte(&mut self, gpa: u64, bytes: u8) -> Option<u64> {
        match bytes {
            4 => self.ram.load::<u32>(GuestAddress(gpa), SeqCst).ok().map(u64::from),
            _ => self.ram.load::<u64>(GuestAddress(gpa), SeqCst).ok(),
        }
    }

    /// Walks here are for looking, while the vCPU stands still: entries stay as they are.
    fn update_pte(&mut self, _gpa: u64, _bytes: u8, _old: u64, _new: u64) -> bool {
        true
    }

    fn write_pte(&mut self, gpa: u64, value: u64) -> bool {
        self.ram.store(value, GuestAddress(gpa), SeqCst).is_ok()
    }

    fn bus(&self) -> &dyn Bus {
        &*self.bus
    }

    /// KVM sees to its own translations.
    fn flush_tlb(&mut self, _what: TlbFlush) {}

    fn host_tsc(&self) -> u64 {
        tsc::rdtsc()
    }

    fn note_outcome(&mut self, outcome: BusOutcome) {
        self.stopping |= outcome == BusOutcome::Stopping;
    }

    fn cpuid(&self) -> &CpuidPolicy {
        &self.cpuid
    }

    fn hypercall(&mut self, st: &mut CpuState) -> Option<HypercallOutcome> {
        let bus = self.bus.clone();
        bus.hypercall(st, self)
    }

    fn hypervisor_msr_write(&mut self, vcpu: u32, msr: u32, value: u64) -> Option<BusOutcome> {
        let bus = self.bus.clone();
        bus.hypervisor_msr_write(vcpu, msr, value, self)
    }
}
