//! Power-off, reset and panic reports.

#![allow(unsafe_code)] // Device ports.

use crate::cpu;
use crate::shim::Shim;
use pv_abi::call::Shutdown;
use pv_abi::feature::Feature;

/// Port of the pvpanic device (QEMU's specification), its bit for "panicked", and what reading it gives where there is none.
const PVPANIC: u16 = 0x505;
const PANICKED: u8 = 1;
const NOTHING: u8 = 0xff;

impl Shim {
    /// Powers the machine off: SHUTDOWN, or S5 through PM1a_CNT. Halts where there is neither.
    pub fn power_off(&self) -> ! {
        if let Some(calls) = self.calls_for(Feature::Power) {
            let _ = calls.shutdown(Shutdown::PowerOff);
        }
        if let Some((port, sleep_type)) = self.platform.power_off {
            // SAFETY: ends the machine. Bits 10-12: SLP_TYP, 13: SLP_EN (ACPI 6.4, section 4.8.3.2.1).
            unsafe { cpu::out16(port, u16::from(sleep_type & 7) << 10 | 1 << 13) };
        }
        stop()
    }

    /// Starts the machine anew: SHUTDOWN, or the keyboard controller's pulse on the reset line.
    pub fn reset(&self) -> ! {
        if let Some(calls) = self.calls_for(Feature::Power) {
            let _ = calls.shutdown(Shutdown::Reset);
        }
        // SAFETY: ends the machine.
        unsafe {
            for _ in 0..100_000 {
                if cpu::in8(0x64) & 2 == 0 {
                    break;
                }
            }
            cpu::out8(0x64, 0xfe);
        }
        stop()
    }

    /// Reports that the kernel has panicked and stops: PANIC, or the text on the console and pvpanic's port. A text longer than the hypervisor takes is cut.
    pub fn report_panic(&self, text: &[u8]) -> ! {
        if let Some(calls) = self.calls_for(Feature::Power) {
            let (gpa, bytes) = self.piece(text.as_ptr() as u64, text.len());
            let _ = calls.panic(gpa, if text.is_empty() { 0 } else { bytes });
        }
        self.write(text);
        self.write(b"\n");
        // SAFETY: the port touches no memory. Reading gives the events that the device takes.
        unsafe {
            let takes = cpu::in8(PVPANIC);
            if takes != NOTHING && takes & PANICKED != 0 {
                cpu::out8(PVPANIC, PANICKED);
            }
        }
        stop()
    }
}

/// Nothing is left to do.
fn stop() -> ! {
    loop {
        // SAFETY: CPL 0; no interrupt ends it, and an NMI or SMI comes back here.
        unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
