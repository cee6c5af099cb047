//! The I/O APIC (Intel 82093AA data sheet): 24 pins, each with a redirection entry.

/// Number of pins.
pub const PINS: usize = 24;
/// Physical address of the register window.
pub const BASE: u64 = 0xfec0_0000;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const STATUS: u64 = 1 << 12;

/// An interrupt message, as it travels from an I/O APIC or an MSI to the local APICs (SDM vol. 3, section 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Destination field.
    pub destination: u32,
    /// Logical destination mode.
    pub logical: bool,
    /// Delivery mode, 0 to 7 (SDM vol. 3, figure 11-12).
    pub delivery: u8,
    /// Vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
}

/// The I/O APIC's state.
#[derive(Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    lines: u32,
}

/// What a redirection entry sends.
fn message(e: u64) -> Message {
    Message {
        destination: (e >> 56) as u32,
        logical: e & (1 << 11) != 0,
        delivery: (e >> 8 & 7) as u8,
        vector: e as u8,
        level: e & LEVEL != 0,
    }
}

impl Default for IoApic {
    fn default() -> Self {
        Self { id: 0, select: 0, entries: [MASKED; PINS], lines: 0 }
    }
}

impl IoApic {
    /// Drives a pin; the message to send, if that makes one.
    pub fn set_pin(&mut self, pin: usize, level: bool) -> Option<Message> {
        if pin >= PINS {
            return None;
        }
        let was = self.lines >> pin & 1 != 0;
        self.lines = self.lines & !(1 << pin) | u32::from(level) << pin;
        if !level || (self.entries[pin] & LEVEL == 0 && was) {
            return None;
        }
        self.service(pin)
    }

    /// Sends what a pin has to send.
    fn service(&mut self, pin: usize) -> Option<Message> {
        let e = &mut self.entries[pin];
        if *e & MASKED != 0 {
            return None;
        }
        if *e & LEVEL != 0 {
            if *e & REMOTE_IRR != 0 {
                return None;
            }
            *e |= REMOTE_IRR;
        }
        Some(message(*e))
    }

    /// What each pin would send; `None` while it is masked.
    pub fn routes(&self) -> [Option<Message>; PINS] {
        self.entries.map(|e| (e & MASKED == 0).then(|| message(e)))
    }

    /// A local APIC ended a level-triggered interrupt: pins that still ask are served again.
    pub fn end_of_interrupt(&mut self, vector: u8) -> Vec<Message> {
        let mut out = Vec::new();
        for pin in 0..PINS {
            let e = &mut self.entries[pin];
            if *e & LEVEL != 0 && *e & REMOTE_IRR != 0 && *e as u8 == vector {
                *e &= !REMOTE_IRR;
                if self.lines >> pin & 1 != 0 {
                    out.extend(self.service(pin));
                }
            }
        }
        out
    }

    /// Reads a register of the window at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & 0xff {
            0 => u32::from(self.select),
            0x10 => match self.select {
                0 | 2 => self.id << 24,
                1 => 0x20 | (PINS as u32 - 1) << 16,
                n @ 0x10..0x40 => {
                    let e = self.entries[usize::from(n - 0x10) / 2];
                    (if n & 1 == 0 { e } else { e >> 32 }) as u32
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Writes a register; the messages to send, if that makes any.
    pub fn write(&mut self, offset: u64, v: u32) -> Vec<Message> {
        match offset & 0xff {
            0 => self.select = v as u8,
            // Version 0x20 has an EOI register.
            0x40 => return self.end_of_interrupt(v as u8),
            0x10 => match self.select {
                0 => self.id = v >> 24 & 0xf,
                n @ 0x10..0x40 => {
                    let pin = usize::from(n - 0x10) / 2;
                    let e = &mut self.entries[pin];
                    let keep = REMOTE_IRR | STATUS;
                    *e = if n & 1 == 0 {
                        *e & (0xffff_ffff_0000_0000 | keep) | u64::from(v) & 0x1_ffff & !keep
                    } else {
                        *e & 0xffff_ffff | u64::from(v) << 32
                    };
                    if *e & LEVEL == 0 {
                        *e &= !REMOTE_IRR;
                    } else if self.lines >> pin & 1 != 0 {
                        return self.service(pin).into_iter().collect();
                    }
                }
                _ => {}
            },
            _ => {}
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(a: &mut IoApic, pin: u8, low: u32, high: u32) -> Vec<Message> {
        a.write(0, u32::from(0x11 + pin * 2));
        a.write(0x10, high);
        a.write(0, u32::from(0x10 + pin * 2));
        a.write(0x10, low)
    }

    #[test]
    fn edges_make_one_message_each() {
        let mut a = IoApic::default();
        assert_eq!(a.set_pin(4, true), None, "masked after reset");
        a.set_pin(4, false);
        set(&mut a, 4, 0x44, 3 << 24);
        let m = a.set_pin(4, true).unwrap();
        assert_eq!((m.vector, m.destination, m.level), (0x44, 3, false));
        assert_eq!(a.set_pin(4, true), None);
        a.set_pin(4, false);
        assert!(a.set_pin(4, true).is_some());
    }

    #[test]
    fn level_waits_for_eoi_and_asks_again() {
        let mut a = IoApic::default();
        set(&mut a, 9, 0x8059, 0);
        assert!(a.set_pin(9, true).unwrap().level);
        assert_eq!(a.set_pin(9, true), None);
        assert_eq!(a.end_of_interrupt(0x59).len(), 1, "the line is still up");
        a.set_pin(9, false);
        assert_eq!(a.end_of_interrupt(0x59).len(), 0);
        assert!(a.set_pin(9, true).is_some());
    }

    #[test]
    fn unmasking_a_raised_level_pin_sends() {
        let mut a = IoApic::default();
        a.set_pin(10, true);
        assert_eq!(set(&mut a, 10, 0x805a, 0).len(), 1);
    }

    #[test]
    fn version_register() {
        let mut a = IoApic::default();
        a.write(0, 1);
        assert_eq!(a.read(0x10), 0x0017_0020);
    }
}
