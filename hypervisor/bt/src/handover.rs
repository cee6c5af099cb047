//! A vCPU's state out of this engine and into it.
//!
//! Whenever the run loop has come back, the vCPU is between two instructions and [`paravane_cpu::CpuState`] is exact, so saving is copying. Loading
//! replaces it and drops whatever was derived from the old one: soft TLBs, jump caches, windows, the calls that
//! translated code is in, and what the short ways of IRETQ rely on. Blocks go too: whoever ran the vCPU meanwhile may have
//! written to code without telling.

use crate::engine::Engine;
use paravane_cpu::msr::shift_deadline;
use paravane_cpu::snapshot::{Injection, StateError, VcpuSnapshot};
use paravane_cpu::{Env, interrupt};

impl Engine {
    /// The vCPU's state. Not while it runs.
    pub(crate) fn save(&self) -> VcpuSnapshot {
        let st = self.cpu();
        let mut s = VcpuSnapshot::capture(st, self.host_tsc());
        s.events.injection = self.injection;
        s.lapic = self.bus.lapic_save(self.id).map(|mut l| {
            l.tsc_deadline = shift_deadline(l.tsc_deadline, st.tsc_offset);
            l
        });
        s
    }

    /// Replaces the vCPU's state; see [`crate::BtVcpu::load`].
    pub(crate) fn load(&mut self, s: &VcpuSnapshot) -> Result<(), StateError> {
        if s.id != self.id {
            return Err(StateError::Invalid(format!("it is of vCPU {} and was given to vCPU {}", s.id, self.id)));
        }
        let state = s.restore(&self.cpuid)?;
        if let Some(lapic) = &s.lapic {
            let mut lapic = lapic.clone();
            lapic.tsc_deadline = shift_deadline(lapic.tsc_deadline, s.tsc.offset.wrapping_neg());
            if !self.bus.lapic_load(self.id, &lapic) {
                return Err(StateError::Unsupported("it comes with a local APIC, and this machine has none"));
            }
        }
        *self.cpu() = state;
        self.injection = s.events.injection;
        self.stop = None;
        self.shared().irq_window = 0;
        self.forget_all_calls();
        self.state_replaced();
        self.cache_full = true; // it is emptied before the next block is looked for
        Ok(())
    }

    /// Delivers what another engine had begun to deliver.
    pub(crate) fn deliver_injection(&mut self, injection: Injection) {
        let st = self.cpu();
        let delivered = match injection {
            Injection::Exception { vector, error_code } => {
                self.stats.exceptions += 1;
                interrupt::deliver_found(st, self, vector, error_code.unwrap_or(0))
            }
            Injection::Interrupt { vector } => {
                self.stats.interrupts += 1;
                interrupt::deliver_external(st, self, vector)
            }
            Injection::Nmi {} => interrupt::deliver_nmi(st, self),
        };
        if let Err(stop) = delivered {
            self.stop = Some(stop);
        }
    }
}
