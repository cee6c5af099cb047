//! The one-shot timer.
//!
//! Deadlines are in the nanoseconds of [`Vcpu::ns`]. With the ABI it is one call. Natively the local APIC's timer is used, with a TSC deadline
//! where the CPU has that, else as a counter, whose range ends after some seconds: then its interrupt comes early, so a handler compares the
//! clock with its deadline and arms the timer again, as one does anyway.

use crate::cpu;
use crate::vcpu::Vcpu;
use core::sync::atomic::Ordering::Relaxed;
use pv_abi::feature::Feature;

/// Whether the local APIC's timer takes TSC deadlines (CPUID.1:ECX bit 24).
pub fn has_tsc_deadline() -> bool {
    cpu::cpuid(1, 0)[2] >> 24 & 1 != 0
}

impl Vcpu<'_> {
    /// Raises `vector` (32 to 255) on this CPU once, at `deadline` or as soon as possible thereafter; `None` disarms. A new deadline takes the place of
    /// the one before.
    pub fn set_timer(&self, deadline: Option<u64>, vector: u8) {
        // A deadline of 0 would disarm.
        let ns = deadline.map_or(0, |d| d.max(1));
        if let Some(calls) = self.shim.calls_for(Feature::Timer)
            && calls.set_timer(ns, vector).is_ok()
        {
            return;
        }
        if has_tsc_deadline() {
            self.set_tsc_deadline(deadline, vector);
        } else {
            self.set_count(deadline, vector);
        }
    }

    fn set_tsc_deadline(&self, deadline: Option<u64>, vector: u8) {
        if self.timer_vector.swap(vector, Relaxed) != vector {
            self.apic.use_tsc_deadline(vector);
        }
        let tsc = deadline.map_or(0, |d| {
            let ahead = ticks(d.saturating_sub(self.ns()), self.shim.tsc_khz, 1);
            cpu::tsc().saturating_add(ahead).max(1)
        });
        self.apic.arm_tsc_deadline(tsc);
    }

    fn set_count(&self, deadline: Option<u64>, vector: u8) {
        let mut khz = self.shim.apic_khz.load(Relaxed);
        if khz == 0 {
            khz = self.apic.measure_khz(self.shim.tsc_khz);
            self.shim.apic_khz.store(khz, Relaxed);
            self.timer_vector.store(0, Relaxed);
        }
        if self.timer_vector.swap(vector, Relaxed) != vector {
            self.apic.use_one_shot(vector);
        }
        let count = deadline.map_or(0, |d| ticks(d.saturating_sub(self.ns()), khz, 16).clamp(1, u64::from(u32::MAX)));
        self.apic.count_down(count as u32);
    }
}

/// Ticks of a clock of `khz`, divided by `divide`, in `ns`; rounded up, so that a timer is not early.
fn ticks(ns: u64, khz: u32, divide: u32) -> u64 {
    let exact = u128::from(ns) * u128::from(khz);
    u64::try_from(exact.div_ceil(1_000_000 * u128::from(divide))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::ticks;

    #[test]
    fn ticks_are_rounded_up_and_do_not_overflow() {
        assert_eq!(ticks(1_000_000, 2_500_000, 1), 2_500_000);
        assert_eq!(ticks(1, 1_000_000, 16), 1);
        assert_eq!(ticks(0, 1_000_000, 16), 0);
        assert_eq!(ticks(u64::MAX, u32::MAX, 1), u64::MAX);
    }
}
