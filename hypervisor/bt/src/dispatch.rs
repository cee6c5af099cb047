//! The run loop: see to events, find a block, enter translated code, see why it came back.
#![allow(unsafe_code)] // Enters translated code and sets the GS base.

use crate::engine::Engine;
use crate::fault;
use crate::profile::{self, Cause};
use crate::state::BtState;
use crate::thunks;
use crate::vcpu::BtError;
use paravane_cpu::state::{AWAITS_STARTUP, rflags};
use paravane_cpu::{Exception, Startup, StopReason, VcpuExit, interrupt};
use std::time::Instant;

/// Exit codes of translated code.
pub(crate) const EXIT_RESYNC: u64 = 0;
/// A host signal in translated code; the state says which.
pub(crate) const EXIT_FAULT: u64 = 1;
/// A poll found a request.
pub(crate) const EXIT_POLL: u64 = 2;

impl Engine {
    pub(crate) fn dispatch(&mut self) -> Result<VcpuExit, BtError> {
        let _gs = GsBase::new(self.state)?;
        let _sampled = profile::Running::new(&mut self.profile)?;
        loop {
            self.doing(Cause::Dispatch, self.cpu().rip);
            if self.profile.filling() {
                self.attribute_samples();
            }
            if let Some(StopReason::TripleFault) = self.stop.take() {
                return Ok(VcpuExit::TripleFault);
            }
            if self.memory.requested() {
                self.memory.acknowledge();
            }
            self.end_alone();
            self.invalidate_for_others();
            self.let_another_be_alone();
            if self.machine_stopping || self.bus.stopping() {
                self.machine_stopping = false;
                return Ok(VcpuExit::Stopped);
            }
            self.deliver_events();
            self.profile.begin(Cause::Dispatch);
            if self.stop.is_some() {
                continue;
            }
            let st = self.cpu();
            if st.halted == AWAITS_STARTUP {
                return Ok(VcpuExit::AwaitsStartup);
            }
            if st.halted != 0 && self.bus.wakes(self.id) {
                st.halted = 0;
            }
            if st.halted != 0 {
                self.stats.halts += 1;
                let masked = st.rflags & rflags::IF == 0 && self.bus.interrupt_pending(self.id);
                return Ok(if masked { VcpuExit::HaltMasked } else { VcpuExit::Halt });
            }
            if self.cache_full {
                self.empty_cache();
            }
            let Some(target) = self.next_block() else { continue };
            if !self.memory.enter() {
                continue;
            }
            self.stats.exits += 1;
            // SAFETY: the GS base was set above, and `target` is a live block's entry.
            let code = unsafe { thunks::enter(target) };
            self.memory.leave();
            match code {
                EXIT_FAULT => self.host_fault(),
                EXIT_POLL => self.note_poll(),
                _ => {}
            }
        }
    }

    /// Drops what others have changed or asked to be dropped.
    fn invalidate_for_others(&mut self) {
        let polled = self.polled.take();
        let flush = self.bus.asked_to_flush(self.id);
        if !flush && !self.mail_waits() {
            return;
        }
        let began = polled.unwrap_or_else(Instant::now);
        self.see_to_mail();
        if flush {
            let bus = self.bus.clone();
            bus.flush_as_asked(self.id, self);
        }
        self.stops.note(began.elapsed());
    }

    /// Delivers what is pending and permitted.
    fn deliver_events(&mut self) {
        self.profile.begin(Cause::Interrupt);
        if self.deliver_one() {
            // What else waits has had its kick: whatever sets IF must come back for it.
            self.shared().irq_window = u32::from(self.bus.interrupt_pending(self.id));
        }
    }

    /// Delivers the first of what is pending and permitted; gives whether there was anything.
    fn deliver_one(&mut self) -> bool {
        let st = self.cpu();
        if let Some(message) = self.bus.take_startup(self.id) {
            self.start_up(message);
            return true;
        }
        if st.halted == AWAITS_STARTUP {
            return false;
        }
        if let Some(injection) = self.injection.take() {
            self.deliver_injection(injection);
            return true;
        }
        if st.nmi_blocked == 0 && st.irq_shadow == 0 && self.bus.take_nmi(self.id) {
            st.halted = 0;
            if let Err(stop) = interrupt::deliver_nmi(st, self) {
                self.stop = Some(stop);
            }
            return true;
        }
        let pending = self.bus.interrupt_pending(self.id);
        self.shared().irq_window = 0;
        if !pending {
            return false;
        }
        if st.rflags & rflags::IF == 0 || st.irq_shadow != 0 {
            self.shared().irq_window = 1;
            return false;
        }
        let acknowledged = self.bus.interrupt_ack(self.id);
        if let Some(vector) = acknowledged {
            let halted = std::mem::take(&mut st.halted) != 0;
            self.stats.interrupts += 1;
            self.sample_window();
            if !halted {
                self.sample_kernel();
            }
            if let Err(stop) = interrupt::deliver_external(st, self, vector) {
                self.stop = Some(stop);
            }
        }
        acknowledged.is_some()
    }

    /// INIT or a start-up message has come.
    fn start_up(&mut self, message: Startup) {
        let st = self.cpu();
        match message {
            Startup::Init => {
                st.init();
                self.injection = None;
                self.shared().irq_window = 0;
                self.forget_all_calls();
                self.state_replaced();
            }
            Startup::Sipi(vector) if st.halted == AWAITS_STARTUP => st.start_up(vector),
            // It runs already.
            Startup::Sipi(_) => {}
        }
    }

    /// Whether translated code must not be entered before events are looked at.
    pub(crate) fn events_wait(&self) -> bool {
        self.stop.is_some()
            || self.machine_stopping
            || self.memory.requested()
            || self.cache_full
            || (self.shared().irq_window != 0 && self.cpu().rflags & rflags::IF != 0)
    }

    /// Delivers an exception at `rip`.
    pub(crate) fn raise(&mut self, exc: Exception, rip: u64) {
        self.stats.exceptions += 1;
        let before = self.profile.begin(Cause::Exception);
        if matches!(exc, Exception::PageFault { .. }) {
            self.stats.page_faults += 1;
        }
        if let Exception::PageFault { addr, .. } = exc
            && self.cpu().cpl == 3
        {
            self.expect_in_window(addr);
        }
        let st = self.cpu();
        st.rip = rip;
        if let Err(stop) = interrupt::deliver(st, self, exc) {
            self.stop = Some(stop);
        }
        self.profile.back(before);
    }

    /// A poll brought the vCPU out.
    fn note_poll(&mut self) {
        self.stats.polls += 1;
        self.polled = Some(Instant::now());
        self.memory.acknowledge();
    }

    /// A signal handler left translated code; the state says what happened.
    fn host_fault(&mut self) {
        let sh = self.shared();
        let exc = match sh.fault_vector {
            fault::POLL => return self.note_poll(),
            0 => Exception::DivideError,
            4 => Exception::Overflow,
            5 => Exception::BoundRange,
            6 => Exception::InvalidOpcode,
            16 => Exception::FpuError,
            17 => Exception::AlignmentCheck,
            19 => Exception::SimdError,
            _ => Exception::GeneralProtection(0),
        };
        self.stats.host_faults += 1;
        let rip = self.cpu().rip;
        self.raise(exc, rip);
    }
}

/// Points GS at the shared state, for this thread, until dropped; and tells the state where FS is.
struct GsBase;

impl GsBase {
    fn new(state: *mut BtState) -> Result<Self, BtError> {
        if !crate::window::fsgsbase() {
            return set_gs_base(state as u64).map(|()| Self);
        }
        // SAFETY: the GS base of this thread is not used by Rust or the C library, and the host lets us set it.
        unsafe {
            let fs: u64;
            std::arch::asm!("rdfsbase {}", out(reg) fs, options(nomem, nostack, preserves_flags));
            (*state).host_fs = fs;
            std::arch::asm!("wrgsbase {}", in(reg) state as u64, options(nomem, nostack, preserves_flags));
        }
        Ok(Self)
    }
}

impl Drop for GsBase {
    fn drop(&mut self) {
        if crate::window::fsgsbase() {
            // SAFETY: as above. The signal handler takes zero to mean that no vCPU runs here.
            unsafe { std::arch::asm!("wrgsbase {}", in(reg) 0u64, options(nomem, nostack, preserves_flags)) };
        }
    }
}

fn set_gs_base(base: u64) -> Result<(), BtError> {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    // SAFETY: the GS base of this thread is not used by Rust or the C library.
    let r = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    if r != 0 {
        return Err(BtError::Host("the GS base cannot be set; is arch_prctl filtered?".into()));
    }
    Ok(())
}
