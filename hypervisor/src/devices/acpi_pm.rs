//! ACPI fixed hardware: the PM timer and the PM1a event and control registers (ACPI 6.4, section 4.8).

use std::time::Instant;

/// I/O port of PM1a_EVT: status, then enable.
pub const PM1A_EVT: u16 = 0x600;
/// I/O port of PM1a_CNT.
pub const PM1A_CNT: u16 = 0x604;
/// I/O port of the PM timer.
pub const PM_TMR: u16 = 0x608;
/// SLP_TYP that means S5 in our DSDT.
pub const SLP_TYP_S5: u8 = 5;
/// PM timer frequency.
const HZ: u128 = 3_579_545;

/// State of the block.
#[derive(Debug)]
pub struct AcpiPm {
    start: Instant,
    status: u16,
    enable: u16,
    control: u16,
}

impl Default for AcpiPm {
    fn default() -> Self {
        // SCI_EN: the machine is in ACPI mode from the start.
        Self { start: Instant::now(), status: 0, enable: 0, control: 1 }
    }
}

impl AcpiPm {
    /// The 24-bit PM timer.
    fn timer(&self) -> u32 {
        (self.start.elapsed().as_nanos() * HZ / 1_000_000_000) as u32 & 0xff_ffff
    }

    /// Reads one byte of the block, whose ports are 0x600 to 0x60b.
    pub fn read(&self, port: u16) -> u8 {
        let byte = |v: u32, at: u16| (v >> (8 * at)) as u8;
        match port {
            0x600..0x602 => byte(u32::from(self.status), port - 0x600),
            0x602..0x604 => byte(u32::from(self.enable), port - 0x602),
            0x604..0x606 => byte(u32::from(self.control), port - 0x604),
            _ => 0,
        }
    }

    /// Reads the PM timer as a whole, so that its bytes belong together.
    pub fn read_timer(&self) -> u32 {
        self.timer()
    }

    /// Writes one byte; true when the guest asked for S5.
    pub fn write(&mut self, port: u16, v: u8) -> bool {
        let put = |r: &mut u16, at: u16| *r = *r & !(0xff << (8 * at)) | u16::from(v) << (8 * at);
        match port {
            0x600..0x602 => self.status &= !(u16::from(v) << (8 * (port - 0x600))),
            0x602..0x604 => put(&mut self.enable, port - 0x602),
            0x604 => put(&mut self.control, 0),
            0x605 => {
                put(&mut self.control, 1);
                // SLP_EN is bit 13, SLP_TYP bits 10 to 12.
                let asleep = v & 0x20 != 0;
                self.control &= !0x2000;
                self.control |= 1;
                return asleep && v >> 2 & 7 == SLP_TYP_S5;
            }
            _ => {}
        }
        self.control |= 1;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_powers_off() {
        let mut p = AcpiPm::default();
        assert!(!p.write(0x605, 0x20));
        assert!(!p.write(0x605, SLP_TYP_S5 << 2));
        assert!(p.write(0x605, 0x20 | SLP_TYP_S5 << 2));
    }

    #[test]
    fn timer_runs_at_its_frequency() {
        let p = AcpiPm::default();
        let (a, t) = (p.read_timer(), Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ticks = u64::from(p.read_timer().wrapping_sub(a) & 0xff_ffff);
        let want = t.elapsed().as_micros() as u64 * 3_579_545 / 1_000_000;
        assert!(ticks.abs_diff(want) < want / 20 + 100, "{ticks} ticks, expected about {want}");
    }
}
