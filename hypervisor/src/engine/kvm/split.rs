//! Local APICs in the kernel ("split" interrupt chip): what crosses between them and the machine.
//!
//! With KVM_CAP_SPLIT_IRQCHIP the kernel keeps one local APIC per vCPU, with its timers, halts, INIT and start-up messages; I/O APIC and 8259A
//! stay the machine's. Four things cross:
//!
//! - an interrupt message of a device, an I/O APIC pin or another vCPU's hypercall goes in by KVM_SIGNAL_MSI ([`KvmVm::send`]);
//! - the I/O APIC's redirections are told as GSI routes, so that KVM knows whose end the I/O APIC waits for, and makes an exit then;
//! - the 8259A's interrupts go in by KVM_INTERRUPT, as with everything in user space;
//! - a vCPU's state includes the local APIC ([`read`], [`write()`]), in the form that all engines share.
//!
//! irqfd is not used: from a device thread of this process an eventfd is one system call, and so is KVM_SIGNAL_MSI.
#![allow(unsafe_code)] // KVM_SET_GSI_ROUTING takes a structure of variable length, made here.

use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;
use paravane_cpu::msr::nr;
use paravane_cpu::snapshot::{LAPIC_PAGE_BYTES, LapicState};
use paravane_cpu::state::AWAITS_STARTUP;

use super::{KvmError, KvmVm};
use crate::devices::ioapic::{Message, PINS};
use crate::devices::local_apics::LocalApics;
use crate::pv::kvm::nr as pv;

/// Where interrupt messages are stored to (SDM vol. 3, section 11.11.1).
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// A message as the store that stands for it: address and data.
fn store(m: &Message) -> (u32, u32) {
    let address = MSI_ADDRESS | (m.destination & 0xff) << 12 | u32::from(m.logical) << 2;
    let trigger = u32::from(m.level) << 15 | u32::from(m.level) << 14;
    (address, u32::from(m.vector) | u32::from(m.delivery & 7) << 8 | trigger)
}

impl LocalApics for KvmVm {
    fn send(&self, m: &Message) {
        let (address_lo, data) = store(m);
        // What nobody accepts is lost, as on the bus.
        let _ = self.fd.signal_msi(kvm::kvm_msi { address_lo, data, ..Default::default() });
    }

    fn set_routes(&self, pins: &[Option<Message>; PINS]) {
        let entries: Vec<_> = (0_u32..)
            .zip(pins)
            .filter_map(|(gsi, m)| {
                let (address_lo, data) = store(m.as_ref()?);
                let mut e = kvm::kvm_irq_routing_entry { gsi, type_: kvm::KVM_IRQ_ROUTING_MSI, ..Default::default() };
                e.u.msi = kvm::kvm_irq_routing_msi { address_lo, data, ..Default::default() };
                Some(e)
            })
            .collect();
        // Twenty-four routes always fit, and KVM takes any MSI.
        if let Ok(table) = kvm::KvmIrqRouting::from_entries(&entries) {
            let _ = self.fd.set_gsi_routing(&table);
        }
    }
}

/// Reads a vCPU's local APIC, but for what waits in it.
///
/// # Errors
/// [`KvmError::Transfer`] when KVM refuses.
pub(super) fn read(vcpu: &VcpuFd, id: u32) -> Result<LapicState, KvmError> {
    let failed = |_| KvmError::Transfer("local APIC");
    let base = vcpu.get_sregs().map_err(failed)?.apic_base;
    let regs = vcpu.get_lapic().map_err(failed)?.regs.map(|b| b.cast_unsigned());
    let _: &[u8; LAPIC_PAGE_BYTES] = &regs;
    let deadline = read_msr(vcpu, nr::TSC_DEADLINE).ok_or(KvmError::Msr(nr::TSC_DEADLINE))?;
    Ok(LapicState::from_page(&regs, id, base, deadline))
}

/// Gives a vCPU's local APIC these registers. IA32_APIC_BASE must have been set with the system registers. Messages that wait are sent again.
///
/// # Errors
/// [`KvmError::Transfer`] when KVM refuses.
pub(super) fn write(vm: &KvmVm, vcpu: &VcpuFd, s: &LapicState) -> Result<(), KvmError> {
    let failed = |_| KvmError::Transfer("local APIC");
    let regs = s.to_page().map(|b| b.cast_signed());
    vcpu.set_lapic(&kvm::kvm_lapic_state { regs }).map_err(failed)?;
    let deadline = kvm::kvm_msr_entry { index: nr::TSC_DEADLINE, data: s.tsc_deadline, ..Default::default() };
    let list = kvm::Msrs::from_entries(&[deadline]).map_err(|_| KvmError::Transfer("MSR list"))?;
    if s.lvt[1] >> 17 & 3 == 2 && !vcpu.set_msrs(&list).is_ok_and(|n| n == 1) {
        return Err(KvmError::Msr(nr::TSC_DEADLINE));
    }
    let message = |delivery, vector| Message { destination: s.id, logical: false, delivery, vector, level: false };
    if s.init {
        vm.send(&message(5, 0));
    }
    if let Some(vector) = s.sipi {
        vm.send(&message(6, vector));
    }
    Ok(())
}

/// What a vCPU does, as [`paravane_cpu::CpuState::halted`] has it.
///
/// # Errors
/// [`KvmError::Transfer`] when KVM refuses.
pub(super) fn activity(vcpu: &VcpuFd) -> Result<u8, KvmError> {
    let state = vcpu.get_mp_state().map_err(|_| KvmError::Transfer("activity"))?.mp_state;
    Ok(match state {
        kvm::KVM_MP_STATE_HALTED => 1,
        kvm::KVM_MP_STATE_UNINITIALIZED | kvm::KVM_MP_STATE_INIT_RECEIVED => AWAITS_STARTUP,
        _ => 0,
    })
}

/// The other way round.
///
/// # Errors
/// [`KvmError::Transfer`] when KVM refuses.
pub(super) fn set_activity(vcpu: &VcpuFd, halted: u8) -> Result<(), KvmError> {
    let mp_state = match halted {
        0 => kvm::KVM_MP_STATE_RUNNABLE,
        AWAITS_STARTUP => kvm::KVM_MP_STATE_INIT_RECEIVED,
        _ => kvm::KVM_MP_STATE_HALTED,
    };
    vcpu.set_mp_state(kvm::kvm_mp_state { mp_state }).map_err(|_| KvmError::Transfer("activity"))
}

/// Whether the guest uses what KVM's own paravirtual interface keeps in the kernel: no other engine could go on with it.
pub(super) fn uses_kvm_interface(vcpu: &VcpuFd) -> bool {
    [pv::SYSTEM_TIME, pv::STEAL_TIME, pv::PV_EOI, pv::ASYNC_PF]
        .iter()
        .any(|&index| read_msr(vcpu, index).is_some_and(|v| v & 1 != 0))
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut list = kvm::Msrs::from_entries(&[kvm::kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let n = vcpu.get_msrs(&mut list).ok()?;
    list.as_slice().first().filter(|_| n == 1).map(|e| e.data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_the_store_that_a_device_would_make() {
        let m = Message { destination: 3, logical: false, delivery: 0, vector: 0x41, level: false };
        assert_eq!(store(&m), (0xfee0_3000, 0x41));
        let m = Message { destination: 0xff, logical: true, delivery: 1, vector: 0x52, level: true };
        assert_eq!(store(&m), (0xfeef_f004, 0xc152));
    }
}
