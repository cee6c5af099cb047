//! The MC146818 real-time clock with 128 bytes of CMOS RAM (Motorola MC146818 data sheet).
//!
//! The clock is the host's plus an offset that the guest may set.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const UIP: u8 = 0x80;

/// The clock's state.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    ram: [u8; 128],
    /// Guest time minus host time, in seconds.
    offset: i64,
    /// Where SET stopped the clock. Kept by field: a guest sets one after the other, and on the way the date may be none, such
    /// as the 31st of a month that has 30 days.
    frozen: Option<Civil>,
    flags: u8,
    next_periodic: Option<Instant>,
    next_second: Option<Instant>,
}

impl Default for Rtc {
    fn default() -> Self {
        let mut ram = [0; 128];
        ram[0xa] = 0x26;
        ram[0xb] = 2; // 24-hour, BCD.
        Self { index: 0, ram, offset: 0, frozen: None, flags: 0, next_periodic: None, next_second: None }
    }
}

/// Days since 1970-01-01 of a date, and back, in the proleptic Gregorian calendar.
fn days_from_civil(y: i64, m: i64, d: i64) -> i64 {
    let y = if m <= 2 { y - 1 } else { y };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * ((m + 9) % 12) + 2) / 5 + d - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let m = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(m <= 2), m, doy - (153 * mp + 2) / 5 + 1)
}

/// A date and time by its fields.
#[derive(Clone, Copy, Debug)]
struct Civil {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Civil {
    /// From seconds since 1970.
    fn from_secs(t: i64) -> Self {
        let (days, secs) = (t.div_euclid(86_400), t.rem_euclid(86_400));
        let (year, month, day) = civil_from_days(days);
        Self { year, month, day, hour: secs / 3600, minute: secs / 60 % 60, second: secs % 60 }
    }

    fn days(&self) -> i64 {
        days_from_civil(self.year, self.month, self.day)
    }

    fn secs(&self) -> i64 {
        self.days() * 86_400 + self.hour * 3600 + self.minute * 60 + self.second
    }
}

impl Rtc {
    fn host() -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    fn time(&self) -> Civil {
        self.frozen.unwrap_or_else(|| Civil::from_secs(Self::host().as_secs() as i64 + self.offset))
    }

    fn encode(&self, v: i64) -> u8 {
        let v = v.rem_euclid(100) as u8;
        if self.ram[0xb] & 4 != 0 { v } else { ((v / 10) << 4) | (v % 10) }
    }

    fn decode(&self, v: u8) -> i64 {
        i64::from(if self.ram[0xb] & 4 != 0 { v } else { (v >> 4) * 10 + (v & 15) })
    }

    fn encode_hour(&self, h: i64) -> u8 {
        if self.ram[0xb] & 2 != 0 {
            return self.encode(h);
        }
        let twelve = if h % 12 == 0 { 12 } else { h % 12 };
        self.encode(twelve) | if h >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, v: u8) -> i64 {
        if self.ram[0xb] & 2 != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    /// Reads 0x70 or 0x71.
    pub fn read(&mut self, port: u16) -> u8 {
        if port & 1 == 0 {
            return 0xff;
        }
        let t = self.time();
        match self.index {
            0 => self.encode(t.second),
            2 => self.encode(t.minute),
            4 => self.encode_hour(t.hour),
            6 => self.encode((t.days() + 4).rem_euclid(7) + 1),
            7 => self.encode(t.day),
            8 => self.encode(t.month),
            9 => self.encode(t.year),
            0x32 => self.encode(t.year.div_euclid(100)),
            0xa => {
                // The last 244 us of a second are announced as an update in progress.
                let updating = self.frozen.is_none() && Self::host().subsec_micros() >= 1_000_000 - 244;
                self.ram[0xa] & !UIP | if updating { UIP } else { 0 }
            }
            0xc => std::mem::take(&mut self.flags),
            0xd => 0x80,
            n => self.ram[usize::from(n)],
        }
    }

    /// Writes 0x70 or 0x71. True when deadlines may have changed.
    pub fn write(&mut self, port: u16, v: u8, now: Instant) -> bool {
        if port & 1 == 0 {
            self.index = v & 0x7f;
            return false;
        }
        let n = self.index;
        match n {
            0 | 2 | 4 | 7 | 8 | 9 | 0x32 => {
                self.set_field(n, v);
                false
            }
            6 | 0xc | 0xd => false,
            0xa | 0xb => {
                if n == 0xb {
                    let set = v & 0x80 != 0;
                    match (set, self.frozen) {
                        (true, None) => self.frozen = Some(self.time()),
                        (false, Some(t)) => {
                            self.offset = t.secs() - Self::host().as_secs() as i64;
                            self.frozen = None;
                        }
                        _ => {}
                    }
                }
                self.ram[usize::from(n)] = if n == 0xa { v & !UIP } else { v };
                self.arm(now);
                true
            }
            _ => {
                self.ram[usize::from(n)] = v;
                false
            }
        }
    }

    fn set_field(&mut self, n: u8, v: u8) {
        let mut t = self.time();
        match n {
            0 => t.second = self.decode(v).min(59),
            2 => t.minute = self.decode(v).min(59),
            4 => t.hour = self.decode_hour(v).min(23),
            7 => t.day = self.decode(v).clamp(1, 31),
            8 => t.month = self.decode(v).clamp(1, 12),
            9 => t.year = t.year.div_euclid(100) * 100 + self.decode(v),
            _ => t.year = self.decode(v) * 100 + t.year.rem_euclid(100),
        }
        match &mut self.frozen {
            Some(f) => *f = t,
            None => self.offset = t.secs() - Self::host().as_secs() as i64,
        }
    }

    fn arm(&mut self, now: Instant) {
        let b = self.ram[0xb];
        self.next_periodic = self.period().filter(|_| b & 0x40 != 0).map(|p| now + p);
        let to_second = Duration::from_nanos(u64::from(1_000_000_000 - Self::host().subsec_nanos()));
        self.next_second = (b & 0x30 != 0 && b & 0x80 == 0).then(|| now + to_second);
    }

    fn period(&self) -> Option<Duration> {
        let rate = match self.ram[0xa] & 15 {
            0 => return None,
            // The two fastest settings of a 32 kHz time base repeat slower ones.
            r @ 1..=2 => r + 7,
            r => r,
        };
        Some(Duration::from_nanos(1_000_000_000 * (1 << (rate - 1)) / 32_768))
    }

    /// When the clock next has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        [self.next_periodic, self.next_second].into_iter().flatten().min()
    }

    /// Does it; true when IRQ 8 is to be pulsed.
    pub fn expire(&mut self, now: Instant) -> bool {
        let b = self.ram[0xb];
        if self.next_periodic.is_some_and(|t| t <= now) {
            self.flags |= 0x40;
            self.next_periodic = self.period().map(|p| now + p);
        }
        if self.next_second.is_some_and(|t| t <= now) {
            self.flags |= 0x10;
            if self.alarm_matches() {
                self.flags |= 0x20;
            }
            self.next_second = Some(now + Duration::from_secs(1));
        }
        let due = self.flags & b & 0x70 != 0;
        if due {
            self.flags |= 0x80;
        }
        due
    }

    fn alarm_matches(&self) -> bool {
        let secs = self.time().secs().rem_euclid(86_400);
        let any = |v: u8| v & 0xc0 == 0xc0;
        let (s, m, h) = (self.ram[1], self.ram[3], self.ram[5]);
        (any(s) || self.decode(s) == secs % 60)
            && (any(m) || self.decode(m) == secs / 60 % 60)
            && (any(h) || self.decode_hour(h) == secs / 3600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(r: &mut Rtc, n: u8) -> u8 {
        r.write(0x70, n, Instant::now());
        r.read(0x71)
    }
    fn put(r: &mut Rtc, n: u8, v: u8) {
        r.write(0x70, n, Instant::now());
        r.write(0x71, v, Instant::now());
    }

    #[test]
    fn calendar_round_trip() {
        for days in (-20_000..60_000).step_by(17) {
            let (y, m, d) = civil_from_days(days);
            assert_eq!(days_from_civil(y, m, d), days);
        }
        assert_eq!(civil_from_days(19_782), (2024, 2, 29));
    }

    #[test]
    fn setting_and_reading_in_both_formats() {
        let mut r = Rtc::default();
        put(&mut r, 0xb, 0x82);
        for (n, v) in [(0, 0x58), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x19)] {
            put(&mut r, n, v);
        }
        assert_eq!((get(&mut r, 4), get(&mut r, 9), get(&mut r, 0x32)), (0x23, 0x99, 0x19));
        put(&mut r, 0xb, 0x84); // Binary, 12-hour.
        assert_eq!((get(&mut r, 0), get(&mut r, 4)), (58, 0x80 | 11));
        assert_eq!(get(&mut r, 6), 6, "31 December 1999 was a Friday");
    }

    #[test]
    fn periodic_interrupt_and_its_flags() {
        let mut r = Rtc::default();
        put(&mut r, 0xb, 0x42);
        let due = r.deadline().unwrap();
        assert!(r.expire(due));
        assert_eq!(get(&mut r, 0xc) & 0xc0, 0xc0);
        assert_eq!(get(&mut r, 0xc), 0, "reading clears");
    }

    #[test]
    fn ram_keeps_what_is_written() {
        let mut r = Rtc::default();
        put(&mut r, 0x5f, 0xa5);
        assert_eq!(get(&mut r, 0x5f), 0xa5);
    }
}
