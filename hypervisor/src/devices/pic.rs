//! The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet), with the ELCR of EISA and PCI chipsets.
//!
//! The slave hangs on the master's input 2. Edges are latched in the request register until acknowledged. In 8086 mode, the only
//! mode a PC uses, an acknowledge gives `base + input`.
//!
//! This is plain state: [`Pic::output`] says whether INTR is asserted, and the owner tells the vCPUs.

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    /// Interrupt request register.
    irr: u8,
    /// In-service register.
    isr: u8,
    /// Interrupt mask register.
    imr: u8,
    /// Levels of the inputs.
    lines: u8,
    /// Level-triggered inputs (ELCR), and those that can be.
    elcr: u8,
    elcr_mask: u8,
    /// Vector of input 0.
    base: u8,
    /// The input with the lowest priority; the next one has the highest.
    lowest: u8,
    /// Initialization: which ICW comes next (0: none).
    next_icw: u8,
    needs_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    nested: bool,
    special_mask: bool,
    read_isr: bool,
    poll: bool,
    master: bool,
}

/// The master's input that the slave drives.
const CASCADE: u8 = 2;

impl Chip {
    fn new(master: bool) -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0,
            lines: 0,
            elcr: 0,
            elcr_mask: if master { 0xf8 } else { 0xde },
            base: 0,
            lowest: 7,
            next_icw: 0,
            needs_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            nested: false,
            special_mask: false,
            read_isr: false,
            poll: false,
            master,
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rises = level && self.lines & bit == 0;
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if rises {
            self.irr |= bit;
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
    }

    /// Place of the highest-priority input in `set`, counted from the highest priority (8: none).
    fn rank(&self, set: u8) -> u8 {
        set.rotate_right(u32::from(self.lowest + 1) & 7).trailing_zeros() as u8
    }

    fn input_at(&self, rank: u8) -> u8 {
        (rank + self.lowest + 1) & 7
    }

    /// The input that INTR is asserted for.
    fn pending(&self) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.nested && self.master {
            serving &= !(1 << CASCADE);
        }
        (rank < self.rank(serving)).then(|| self.input_at(rank))
    }

    fn ack(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn write_command(&mut self, v: u8) {
        if v & 0x10 != 0 {
            // ICW1: edge sense is reset, so levels that are still high have to fall first.
            self.irr = self.lines & self.elcr;
            (self.isr, self.imr, self.lowest) = (0, 0, 7);
            (self.auto_eoi, self.rotate_on_auto_eoi, self.nested) = (false, false, false);
            (self.special_mask, self.read_isr, self.poll) = (false, false, false);
            self.needs_icw4 = v & 1 != 0;
            self.single = v & 2 != 0;
            self.next_icw = 2;
        } else if v & 0x08 != 0 {
            if v & 4 != 0 {
                self.poll = true;
            }
            if v & 2 != 0 {
                self.read_isr = v & 1 != 0;
            }
            if v & 0x40 != 0 {
                self.special_mask = v & 0x20 != 0;
            }
        } else {
            self.end_of_interrupt(v >> 5, v & 7);
        }
    }

    /// OCW2: `command` is R, SL, EOI.
    fn end_of_interrupt(&mut self, command: u8, input: u8) {
        match command {
            0 | 4 => self.rotate_on_auto_eoi = command == 4,
            1 | 5 => {
                // In special mask mode a non-specific EOI passes over masked levels.
                let serving = if self.special_mask { self.isr & !self.imr } else { self.isr };
                let rank = self.rank(serving);
                if rank < 8 {
                    let done = self.input_at(rank);
                    self.isr &= !(1 << done);
                    if command == 5 {
                        self.lowest = done;
                    }
                }
            }
            3 | 7 => {
                self.isr &= !(1 << input);
                if command == 7 {
                    self.lowest = input;
                }
            }
            6 => self.lowest = input,
            _ => {}
        }
    }

    fn write_data(&mut self, v: u8) {
        match self.next_icw {
            2 => {
                self.base = v & 0xf8;
                self.next_icw = match (self.single, self.needs_icw4) {
                    (false, _) => 3,
                    (true, true) => 4,
                    (true, false) => 0,
                };
            }
            3 => self.next_icw = if self.needs_icw4 { 4 } else { 0 },
            4 => {
                self.nested = v & 0x10 != 0;
                self.auto_eoi = v & 2 != 0;
                self.next_icw = 0;
            }
            _ => self.imr = v,
        }
    }
}

/// Both controllers.
#[derive(Clone, Debug)]
pub struct Pic {
    chips: [Chip; 2],
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// After power-up: everything unmasked at vector 0, as uninitialized chips are. (Guests are started with both masked, see
    /// [`Pic::mask_all`].)
    pub fn new() -> Self {
        Self { chips: [Chip::new(true), Chip::new(false)] }
    }

    /// Masks all inputs, as boot firmware leaves them for a kernel.
    pub fn mask_all(&mut self) {
        for chip in &mut self.chips {
            chip.imr = 0xff;
        }
    }

    /// Drives input `irq` (0..=15; 2 is the cascade and cannot be driven).
    pub fn set_line(&mut self, irq: u8, level: bool) {
        if irq < 16 && irq != CASCADE {
            self.chips[usize::from(irq >> 3)].set_line(irq & 7, level);
            self.cascade();
        }
    }

    /// Whether INTR is asserted.
    pub fn output(&self) -> bool {
        self.chips[0].pending().is_some()
    }

    /// Carries the slave's output to the master's input.
    fn cascade(&mut self) {
        let level = self.chips[1].pending().is_some();
        let master = &mut self.chips[0];
        master.set_line(CASCADE, level);
        if !level {
            master.irr &= !(1 << CASCADE);
        }
    }

    /// The acknowledge cycle: gives the vector; `None` when INTR is not asserted.
    pub fn ack(&mut self) -> Option<u8> {
        let input = self.chips[0].pending()?;
        self.chips[0].ack(input);
        let vector = if input == CASCADE {
            let vector = self.chips[1].pending().map(|i| {
                self.chips[1].ack(i);
                self.chips[1].base + i
            });
            // The request went away between the two pulses: the slave answers with its input 7 (spurious).
            vector.unwrap_or(self.chips[1].base + 7)
        } else {
            self.chips[0].base + input
        };
        // The slave's output drops with the acknowledge and rises again for the next request: a new edge.
        self.chips[0].lines &= !(1 << CASCADE);
        self.cascade();
        Some(vector)
    }

    /// IN from 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0xa0 => self.read_command(usize::from(port >> 7)),
            0x21 | 0xa1 if self.chips[usize::from(port >> 7)].poll => self.read_command(usize::from(port >> 7)),
            0x21 | 0xa1 => self.chips[usize::from(port >> 7)].imr,
            0x4d0 | 0x4d1 => self.chips[usize::from(port & 1)].elcr,
            _ => 0xff,
        };
        self.cascade();
        value
    }

    fn read_command(&mut self, chip: usize) -> u8 {
        let chip = &mut self.chips[chip];
        if chip.poll {
            chip.poll = false;
            let Some(input) = chip.pending() else { return 0 };
            chip.ack(input);
            if !chip.master {
                self.chips[0].lines &= !(1 << CASCADE);
            }
            return 0x80 | input;
        }
        if chip.read_isr { chip.isr } else { chip.irr }
    }

    /// OUT to the same ports.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0xa0 => self.chips[usize::from(port >> 7)].write_command(value),
            0x21 | 0xa1 => self.chips[usize::from(port >> 7)].write_data(value),
            0x4d0 | 0x4d1 => {
                let chip = &mut self.chips[usize::from(port & 1)];
                chip.elcr = value & chip.elcr_mask;
                // An input that became level-triggered requests as long as it is high.
                chip.irr = chip.irr & !chip.elcr | chip.lines & chip.elcr;
            }
            _ => {}
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Pic {
        let mut p = Pic::new();
        for (port, base, icw3) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            p.write(port, 0x11);
            p.write(port + 1, base);
            p.write(port + 1, icw3);
            p.write(port + 1, 1);
        }
        p
    }

    fn pulse(p: &mut Pic, irq: u8) {
        p.set_line(irq, true);
        p.set_line(irq, false);
    }

    #[test]
    fn lower_numbers_come_first_and_block_higher_ones() {
        let mut p = ready();
        pulse(&mut p, 4);
        pulse(&mut p, 1);
        assert_eq!(p.ack(), Some(0x31));
        assert!(!p.output(), "4 waits for the EOI of 1");
        pulse(&mut p, 0);
        assert_eq!(p.ack(), Some(0x30));
        p.write(0x20, 0x20);
        assert!(!p.output());
        p.write(0x20, 0x20);
        assert_eq!(p.ack(), Some(0x34));
        assert_eq!(p.ack(), None);
    }

    #[test]
    fn the_slave_goes_through_input_two() {
        let mut p = ready();
        pulse(&mut p, 12);
        pulse(&mut p, 8);
        assert_eq!(p.ack(), Some(0x38));
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 4, "the master serves its cascade input");
        p.write(0xa0, 0x20);
        assert!(!p.output(), "the master is still busy with the slave");
        p.write(0x20, 0x20);
        assert_eq!(p.ack(), Some(0x3c));
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        assert!(!p.output());
    }

    #[test]
    fn masks_hold_requests_back_without_losing_them() {
        let mut p = ready();
        p.write(0x21, 0x10);
        pulse(&mut p, 4);
        assert!(!p.output());
        assert_eq!(p.read(0x20), 0x10);
        p.write(0x21, 0);
        assert_eq!(p.ack(), Some(0x34));
    }

    #[test]
    fn rotation_makes_the_served_input_the_lowest() {
        let mut p = ready();
        pulse(&mut p, 3);
        assert_eq!(p.ack(), Some(0x33));
        p.write(0x20, 0xa0); // rotate on non-specific EOI
        pulse(&mut p, 3);
        pulse(&mut p, 4);
        pulse(&mut p, 0);
        let mut order = Vec::new();
        while let Some(v) = p.ack() {
            order.push(v);
            p.write(0x20, 0x20);
        }
        assert_eq!(order, [0x34, 0x30, 0x33]);
        p.write(0x20, 0xc7); // set priority: 7 lowest again
        pulse(&mut p, 3);
        pulse(&mut p, 0);
        assert_eq!(p.ack(), Some(0x30));
        p.write(0x20, 0x60); // specific EOI of 0
        assert_eq!(p.ack(), Some(0x33));
        p.write(0x20, 0xe3); // rotate on specific EOI
        pulse(&mut p, 5);
        pulse(&mut p, 3);
        assert_eq!(p.ack(), Some(0x35));
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut p = ready();
        for v in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x20, 0x80)] {
            p.write(v.0, v.1);
        }
        pulse(&mut p, 1);
        assert_eq!(p.ack(), Some(0x31));
        pulse(&mut p, 1);
        pulse(&mut p, 5);
        assert_eq!(p.ack(), Some(0x35), "rotation in automatic EOI mode");
        assert_eq!(p.ack(), Some(0x31));
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_through() {
        let mut p = ready();
        pulse(&mut p, 1);
        assert_eq!(p.ack(), Some(0x31));
        pulse(&mut p, 6);
        assert!(!p.output());
        p.write(0x21, 0x02);
        p.write(0x20, 0x68);
        assert_eq!(p.ack(), Some(0x36));
        p.write(0x20, 0x20); // ends 6, not the masked 1
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 0x02);
    }

    #[test]
    fn special_fully_nested_mode_takes_a_better_slave_request() {
        let mut p = ready();
        for v in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11)] {
            p.write(v.0, v.1);
        }
        pulse(&mut p, 12);
        assert_eq!(p.ack(), Some(0x3c));
        pulse(&mut p, 14);
        assert!(!p.output(), "14 is below 12 in the slave itself");
        pulse(&mut p, 8);
        assert_eq!(p.ack(), Some(0x38));
    }

    #[test]
    fn poll_acknowledges() {
        let mut p = ready();
        p.write(0x20, 0x0c);
        assert_eq!(p.read(0x20), 0);
        pulse(&mut p, 5);
        p.write(0x20, 0x0c);
        assert_eq!(p.read(0x20), 0x85);
        assert!(!p.output());
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 0x20);
    }

    #[test]
    fn level_inputs_request_until_they_fall() {
        let mut p = ready();
        p.write(0x4d1, 0xff);
        assert_eq!(p.read(0x4d1), 0xde, "8 and 13 are edge-triggered for ever");
        p.set_line(9, true);
        assert_eq!(p.ack(), Some(0x39));
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        assert_eq!(p.ack(), Some(0x39), "still asserted");
        p.set_line(9, false);
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        assert_eq!(p.ack(), None);
    }

    #[test]
    fn an_edge_needs_a_rise() {
        let mut p = ready();
        p.set_line(5, true);
        assert_eq!(p.ack(), Some(0x35));
        p.write(0x20, 0x20);
        p.set_line(5, true);
        assert_eq!(p.ack(), None);
        p.set_line(5, false);
        p.set_line(5, true);
        assert_eq!(p.ack(), Some(0x35));
    }
}
