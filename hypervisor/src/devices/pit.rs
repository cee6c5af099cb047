//! The 8254 programmable interval timer (Intel 8254 data sheet) and the port 0x61 bits that belong to it.
//!
//! Counters are computed from the clock when somebody looks; only counter 0 needs a deadline, for IRQ 0.

use std::time::{Duration, Instant};

/// Input clock.
const HZ: u128 = 1_193_182;

fn ticks(d: Duration) -> u64 {
    (d.as_nanos() * HZ / 1_000_000_000) as u64
}

fn duration(ticks: u64) -> Duration {
    Duration::from_nanos((u128::from(ticks) * 1_000_000_000).div_ceil(HZ) as u64)
}

#[derive(Clone, Copy, Debug)]
struct Counter {
    mode: u8,
    /// Access: 1 = low byte, 2 = high byte, 3 = low then high.
    access: u8,
    bcd: bool,
    /// Reload value; 0 stands for 65536 (10000 in BCD).
    reload: u16,
    start: Instant,
    /// A count was written since the mode was set.
    loaded: bool,
    gate: bool,
    write_low: Option<u8>,
    read_high: bool,
    latch: Option<u16>,
    /// A latched count of which the low byte was read already.
    latch_half: bool,
    status: Option<u8>,
}

impl Counter {
    fn new(now: Instant) -> Self {
        Self {
            mode: 0,
            access: 3,
            bcd: false,
            reload: 0,
            start: now,
            loaded: false,
            gate: true,
            write_low: None,
            read_high: false,
            latch: None,
            latch_half: false,
            status: None,
        }
    }

    fn period(&self) -> u64 {
        let n = if self.bcd { from_bcd(self.reload) } else { u64::from(self.reload) };
        match (n, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (n, _) => n,
        }
    }

    fn elapsed(&self, now: Instant) -> u64 {
        ticks(now.saturating_duration_since(self.start))
    }

    fn count(&self, now: Instant) -> u16 {
        let (p, t) = (self.period(), self.elapsed(now));
        let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
        let c = match self.mode {
            2 => p - t % p,
            // Mode 3 counts down by two, twice per period.
            3 => (p - (t * 2) % p) & !1,
            _ => (wrap + p % wrap - t % wrap) % wrap,
        };
        if self.bcd { to_bcd(c % wrap) } else { c as u16 }
    }

    fn output(&self, now: Instant) -> bool {
        if !self.loaded {
            return self.mode != 0;
        }
        let (p, t) = (self.period(), self.elapsed(now));
        match self.mode {
            0 | 1 => t >= p,
            2 => t % p != p - 1,
            3 => t % p < p.div_ceil(2),
            _ => t != p,
        }
    }

    /// When the output next rises, for counter 0.
    fn next_rise(&self, now: Instant) -> Option<Instant> {
        if !self.loaded || !self.gate {
            return None;
        }
        let (p, t) = (self.period(), self.elapsed(now));
        match self.mode {
            0 | 4 => (t < p).then(|| self.start + duration(p)),
            2 | 3 => Some(self.start + duration((t / p + 1) * p)),
            _ => None,
        }
    }

    fn write(&mut self, v: u8, now: Instant) -> bool {
        let value = match self.access {
            1 => u16::from(v),
            2 => u16::from(v) << 8,
            _ => match self.write_low.take() {
                None => {
                    self.write_low = Some(v);
                    return false;
                }
                Some(low) => u16::from(v) << 8 | u16::from(low),
            },
        };
        self.reload = value;
        self.start = now;
        self.loaded = true;
        true
    }

    fn read(&mut self, now: Instant) -> u8 {
        if let Some(s) = self.status.take() {
            return s;
        }
        let (value, latched) = match self.latch {
            Some(l) => (l, true),
            None => (self.count(now), false),
        };
        match self.access {
            1 => {
                self.latch = None;
                value as u8
            }
            2 => {
                self.latch = None;
                (value >> 8) as u8
            }
            _ => {
                let high = if latched { self.latch_half } else { self.read_high };
                if latched {
                    self.latch_half = !high;
                    if high {
                        self.latch = None;
                    }
                } else {
                    self.read_high = !high;
                }
                if high { (value >> 8) as u8 } else { value as u8 }
            }
        }
    }
}

fn from_bcd(v: u16) -> u64 {
    (0..4).rev().fold(0, |n, d| n * 10 + u64::from(v >> (4 * d) & 15))
}

fn to_bcd(mut v: u64) -> u16 {
    let mut out = 0;
    for d in 0..4 {
        out |= (v % 10) << (4 * d);
        v /= 10;
    }
    out as u16
}

/// The three counters.
#[derive(Debug)]
pub struct Pit {
    counters: [Counter; 3],
    speaker: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Pit {
    /// A PIT after reset.
    pub fn new(now: Instant) -> Self {
        let mut counters = [Counter::new(now); 3];
        counters[2].gate = false;
        Self { counters, speaker: false }
    }

    /// Reads 0x40 to 0x42, or 0x61.
    pub fn read(&mut self, port: u16, now: Instant) -> u8 {
        match port {
            0x40..0x43 => self.counters[usize::from(port - 0x40)].read(now),
            0x61 => {
                let c = &self.counters[2];
                // Bit 4 toggles with memory refresh, every 15 us.
                let refresh = ((now.saturating_duration_since(self.counters[1].start).as_micros() / 15) & 1) as u8;
                u8::from(c.gate) | u8::from(self.speaker) << 1 | refresh << 4 | u8::from(c.output(now)) << 5
            }
            _ => 0xff,
        }
    }

    /// Writes 0x40 to 0x43, or 0x61. True when counter 0's deadline may have changed.
    pub fn write(&mut self, port: u16, v: u8, now: Instant) -> bool {
        match port {
            0x40..0x43 => {
                let n = usize::from(port - 0x40);
                self.counters[n].write(v, now) && n == 0
            }
            0x43 => self.command(v, now),
            0x61 => {
                let (gate, c) = (v & 1 != 0, &mut self.counters[2]);
                if gate && !c.gate {
                    c.start = now;
                }
                c.gate = gate;
                self.speaker = v & 2 != 0;
                false
            }
            _ => false,
        }
    }

    fn command(&mut self, v: u8, now: Instant) -> bool {
        if v >> 6 == 3 {
            // Read-back.
            for (n, c) in self.counters.iter_mut().enumerate() {
                if v >> (n + 1) & 1 == 0 {
                    continue;
                }
                if v & 0x20 == 0 && c.latch.is_none() {
                    (c.latch, c.latch_half) = (Some(c.count(now)), false);
                }
                if v & 0x10 == 0 && c.status.is_none() {
                    let null = u8::from(!c.loaded) << 6;
                    c.status =
                        Some(u8::from(c.output(now)) << 7 | null | c.access << 4 | c.mode << 1 | u8::from(c.bcd));
                }
            }
            return false;
        }
        let n = usize::from(v >> 6);
        let c = &mut self.counters[n];
        let access = v >> 4 & 3;
        if access == 0 {
            if c.latch.is_none() {
                (c.latch, c.latch_half) = (Some(c.count(now)), false);
            }
            return false;
        }
        let mode = match v >> 1 & 7 {
            6 => 2,
            7 => 3,
            m => m,
        };
        *c = Counter { mode, access, bcd: v & 1 != 0, gate: c.gate, ..Counter::new(now) };
        n == 0
    }

    /// When IRQ 0 is next due.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.counters[0].next_rise(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, t: u64) -> Instant {
        start + duration(t)
    }

    #[test]
    fn rate_generator_reloads() {
        let t0 = Instant::now();
        let mut p = Pit::new(t0);
        p.write(0x43, 0x34, t0);
        assert!(!p.write(0x40, 0xe8, t0));
        assert!(p.write(0x40, 0x03, t0));
        assert_eq!(p.deadline(at(t0, 10)), Some(at(t0, 1000)));
        assert_eq!(p.deadline(at(t0, 1500)), Some(at(t0, 2000)));
        p.write(0x43, 0, t0);
        let now = at(t0, 400);
        p.write(0x43, 0, now);
        let (lo, hi) = (p.read(0x40, now), p.read(0x40, now));
        // The first latch command, at tick 0, holds until it is read.
        assert_eq!(u16::from(hi) << 8 | u16::from(lo), 1000);
        let (lo, hi) = (p.read(0x40, now), p.read(0x40, now));
        assert!((598..=601).contains(&(u16::from(hi) << 8 | u16::from(lo))));
    }

    #[test]
    fn one_shot_fires_once() {
        let t0 = Instant::now();
        let mut p = Pit::new(t0);
        p.write(0x43, 0x30, t0);
        p.write(0x40, 100, t0);
        p.write(0x40, 0, t0);
        assert_eq!(p.deadline(t0), Some(at(t0, 100)));
        assert_eq!(p.deadline(at(t0, 101)), None);
    }

    #[test]
    fn counter_two_calibration() {
        // What Linux does to calibrate: gate on, mode 0, poll the output in port 0x61.
        let t0 = Instant::now();
        let mut p = Pit::new(t0);
        p.write(0x61, 1, t0);
        p.write(0x43, 0xb0, t0);
        p.write(0x42, 0xff, t0);
        p.write(0x42, 0x0f, t0);
        assert_eq!(p.read(0x61, at(t0, 0xf00)) & 0x20, 0);
        assert_eq!(p.read(0x61, at(t0, 0x1001)) & 0x20, 0x20);
    }

    #[test]
    fn status_and_bcd() {
        let t0 = Instant::now();
        let mut p = Pit::new(t0);
        p.write(0x43, 0x37, t0);
        p.write(0x40, 0x00, t0);
        p.write(0x40, 0x10, t0);
        p.write(0x43, 0xe2, t0);
        assert_eq!(p.read(0x40, t0) & 0x3f, 0x37);
        assert_eq!(p.deadline(t0), Some(at(t0, 1000)));
    }
}
