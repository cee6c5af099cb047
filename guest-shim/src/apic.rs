//! The local APIC natively (SDM vol. 3, chapter 11).

#![allow(unsafe_code)] // MSRs and device registers.

use crate::cpu;

/// How this CPU's local APIC is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apic {
    /// By MSRs: x2APIC mode.
    X2,
    /// By memory at this linear address: xAPIC mode.
    Memory(u64),
}

/// Register offsets in the xAPIC's page; the x2APIC's MSR is 0x800 plus the offset divided by 16.
mod register {
    pub(super) const EOI: u32 = 0xb0;
    pub(super) const ICR: u32 = 0x300;
    pub(super) const ICR_HIGH: u32 = 0x310;
    pub(super) const LVT_TIMER: u32 = 0x320;
    pub(super) const TIMER_INITIAL: u32 = 0x380;
    pub(super) const TIMER_CURRENT: u32 = 0x390;
    pub(super) const TIMER_DIVIDE: u32 = 0x3e0;
}

/// Timer modes of the LVT entry, and its mask.
const ONE_SHOT: u32 = 0;
const TSC_DEADLINE: u32 = 2 << 17;
const MASKED: u32 = 1 << 16;
/// ICR: delivery pending (xAPIC mode).
const PENDING: u32 = 1 << 12;

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE_MSR: u32 = 0x6e0;

impl Apic {
    /// The mode that this CPU's local APIC is in.
    ///
    /// # Safety
    /// CPL 0; in xAPIC mode its page is mapped at `memory`.
    pub(crate) unsafe fn current(memory: u64) -> Self {
        // SAFETY: every x86-64 CPU has the MSR.
        if unsafe { cpu::read_msr(APIC_BASE) } >> 10 & 1 != 0 { Self::X2 } else { Self::Memory(memory) }
    }

    #[inline]
    fn read(self, register: u32) -> u32 {
        // SAFETY: `current` found the mode, and reading these registers touches no memory.
        unsafe {
            match self {
                Self::X2 => cpu::read_msr(0x800 + (register >> 4)) as u32,
                Self::Memory(at) => ((at + u64::from(register)) as *const u32).read_volatile(),
            }
        }
    }

    #[inline]
    fn write(self, register: u32, value: u32) {
        // SAFETY: `current` found the mode; interrupts that follow are the caller's wish.
        unsafe {
            match self {
                Self::X2 => cpu::write_msr(0x800 + (register >> 4), u64::from(value)),
                Self::Memory(at) => ((at + u64::from(register)) as *mut u32).write_volatile(value),
            }
        }
    }

    /// Ends the interrupt in service.
    #[inline]
    pub(crate) fn eoi(self) {
        self.write(register::EOI, 0);
    }

    /// Raises a vector on the CPU with this APIC ID.
    pub(crate) fn send(self, apic_id: u32, vector: u8) {
        match self {
            // SAFETY: the register exists in x2APIC mode; an interrupt is the caller's wish.
            Self::X2 => unsafe { cpu::write_msr(0x830, u64::from(apic_id) << 32 | u64::from(vector)) },
            Self::Memory(_) => {
                while self.read(register::ICR) & PENDING != 0 {
                    core::hint::spin_loop();
                }
                self.write(register::ICR_HIGH, apic_id << 24);
                self.write(register::ICR, u32::from(vector));
            }
        }
    }

    /// Sets the timer up for TSC deadlines.
    pub(crate) fn use_tsc_deadline(self, vector: u8) {
        self.write(register::LVT_TIMER, TSC_DEADLINE | u32::from(vector));
        // SAFETY: SSE2. Orders the write of the entry before that of the deadline (SDM vol. 3, section 11.5.4.1).
        unsafe { core::arch::x86_64::_mm_mfence() };
    }

    /// Raises the timer's interrupt when the TSC reaches `deadline`; 0 disarms.
    #[inline]
    pub(crate) fn arm_tsc_deadline(self, deadline: u64) {
        // SAFETY: the CPU has the MSR, for `timer::has_tsc_deadline` said so.
        unsafe { cpu::write_msr(TSC_DEADLINE_MSR, deadline) };
    }

    /// Sets the timer up for one-shot counting with the clock divided by 16.
    pub(crate) fn use_one_shot(self, vector: u8) {
        self.write(register::LVT_TIMER, ONE_SHOT | u32::from(vector));
        self.write(register::TIMER_DIVIDE, 3);
    }

    /// Starts counting down; 0 stops.
    #[inline]
    pub(crate) fn count_down(self, from: u32) {
        self.write(register::TIMER_INITIAL, from);
    }

    /// Frequency of the timer's clock in kHz, measured for about 2 ms against a TSC of `tsc_khz`. The timer is left masked and stopped.
    pub(crate) fn measure_khz(self, tsc_khz: u32) -> u32 {
        self.write(register::LVT_TIMER, MASKED);
        self.write(register::TIMER_DIVIDE, 3);
        self.write(register::TIMER_INITIAL, u32::MAX);
        let start = cpu::tsc_ordered();
        while cpu::tsc_ordered().wrapping_sub(start) < u64::from(tsc_khz) * 2 {
            core::hint::spin_loop();
        }
        let counted = u32::MAX - self.read(register::TIMER_CURRENT);
        let ticks = cpu::tsc_ordered().wrapping_sub(start).max(1);
        self.write(register::TIMER_INITIAL, 0);
        let khz = u128::from(counted) * 16 * u128::from(tsc_khz) / u128::from(ticks);
        u32::try_from(khz).unwrap_or(u32::MAX).max(1)
    }
}
