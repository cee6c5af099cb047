//! The local APIC, as x2APIC where there is one and as xAPIC elsewhere (SDM vol. 3, chapter 11).

use crate::cpu;
use core::ptr::{read_volatile, write_volatile};

const APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
/// Where the xAPIC's registers are.
pub const MMIO: u64 = 0xfee0_0000;

/// Registers, by their offset in the xAPIC's page; the x2APIC's MSR is 0x800 plus the offset divided by 16.
pub mod register {
    #![allow(missing_docs, reason = "names of the SDM")]
    pub const ID: u32 = 0x20;
    pub const TPR: u32 = 0x80;
    pub const EOI: u32 = 0xb0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const IRR: u32 = 0x200;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const TIMER_INITIAL: u32 = 0x380;
    pub const TIMER_CURRENT: u32 = 0x390;
    pub const TIMER_DIVIDE: u32 = 0x3e0;
}

/// An enabled local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apic {
    /// Registers are MSRs.
    X2,
    /// Registers are memory.
    Mmio,
}

/// Masks all inputs of the 8259A pair.
pub fn mask_pics() {
    // SAFETY: the interrupt controllers touch no memory.
    unsafe {
        cpu::out8(0x21, 0xff);
        cpu::out8(0xa1, 0xff);
    }
}

impl Apic {
    /// Enables the local APIC, in x2APIC mode if CPUID offers it. Spurious interrupts come at vector 0xff.
    pub fn enable() -> Self {
        Self::enable_as(cpu::cpuid(1, 0)[2] >> 21 & 1 != 0)
    }

    /// Enables the local APIC in the given mode. x2APIC mode cannot be left again but by disabling the APIC, which this does if need be.
    pub fn enable_as(x2apic: bool) -> Self {
        // SAFETY: CPL 0, and every x86-64 CPU has the MSR; the APIC's page is mapped without caching by boot.s.
        unsafe {
            let base = cpu::read_msr(APIC_BASE) & !(ENABLE | X2APIC);
            if !x2apic && cpu::read_msr(APIC_BASE) & X2APIC != 0 {
                cpu::write_msr(APIC_BASE, base);
            }
            cpu::write_msr(APIC_BASE, base | ENABLE);
            if x2apic {
                cpu::write_msr(APIC_BASE, base | ENABLE | X2APIC);
            }
        }
        let apic = if x2apic { Self::X2 } else { Self::Mmio };
        apic.write(register::TPR, 0);
        apic.write(register::SVR, 0x1ff);
        apic
    }

    /// Reads a register.
    #[inline]
    pub fn read(self, register: u32) -> u32 {
        // SAFETY: APIC registers touch no memory; `enable` made this form valid.
        unsafe {
            match self {
                Self::X2 => cpu::read_msr(0x800 + (register >> 4)) as u32,
                Self::Mmio => read_volatile((MMIO + u64::from(register)) as *const u32),
            }
        }
    }

    /// Writes a register.
    #[inline]
    pub fn write(self, register: u32, value: u32) {
        // SAFETY: what the APIC does is deliver interrupts, which all have handlers.
        unsafe {
            match self {
                Self::X2 => cpu::write_msr(0x800 + (register >> 4), u64::from(value)),
                Self::Mmio => write_volatile((MMIO + u64::from(register)) as *mut u32, value),
            }
        }
    }

    /// Sends an interrupt to this CPU itself.
    #[inline]
    pub fn send_self(self, vector: u8) {
        self.write(register::ICR, 1 << 18 | u32::from(vector));
    }

    /// Ends the interrupt in service.
    #[inline]
    pub fn eoi(self) {
        self.write(register::EOI, 0);
    }
}
