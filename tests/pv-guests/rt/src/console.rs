//! Text on COM1, and the ways out.

use crate::cpu;
use core::fmt;

const COM1: u16 = 0x3f8;

/// COM1, polled.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the UART's registers touch no memory.
            unsafe {
                while cpu::in8(COM1 + 5) & 0x20 == 0 {}
                cpu::out8(COM1, byte);
            }
        }
        Ok(())
    }
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($args:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::console::Serial, format_args!("{}\n", format_args!($($args)*)));
    }};
}

/// Prints on COM1.
#[macro_export]
macro_rules! print {
    ($($args:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::console::Serial, format_args!($($args)*));
    }};
}

/// Ends the machine through the debug-exit port 0xf4; the host process exits with `2 * status + 1`. Halts where there is no such port.
pub fn exit(status: u32) -> ! {
    loop {
        // SAFETY: the port ends the machine; without it, this CPU stops with interrupts off.
        unsafe {
            cpu::out32(0xf4, status);
            core::arch::asm!("cli", "hlt", options(nomem, nostack));
        }
    }
}

/// A number in decimal with leading zeros, at least so many digits. Written without `core`'s own digits, which take vector registers,
/// for which a KVM that emulates ring 0 has no emulation.
pub struct Digits(pub u64, pub usize);

impl fmt::Display for Digits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [b'0'; 20];
        let (mut rest, mut at) = (self.0, text.len());
        while rest != 0 {
            at -= 1;
            text[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        let start = at.min(text.len() - self.1.clamp(1, text.len()));
        f.write_str(core::str::from_utf8(&text[start..]).map_err(|_| fmt::Error)?)
    }
}
