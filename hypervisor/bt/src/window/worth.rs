//! Whether windows pay for the process that has them.
//!
//! Code runs about twice as fast through windows, so they may cost half of the time in which they serve, and a working set may take its
//! time to come in. A process that is found in the kernel, or not at all, has nothing from them and still pays for each
//! page that it touches: one that forks all the time has its pages mapped and unmapped for nothing.
//!
//! What they cost is counted, not measured: a host that is busy elsewhere would make every call of mmap look dear, and take windows away from whom they
//! serve. A page that a process has for the first time is no waste. It will be used again more often than not, and would have
//! cost something without windows too.

use std::time::Duration;

/// The debt at which windows are taken away.
const CREDIT: Duration = Duration::from_millis(24);
/// The longest time that one sample stands for; if it was longer, the vCPU was idle.
const LONGEST: Duration = Duration::from_millis(10);

/// A signal, and the interrupts that changed mappings send to other CPUs, for a page that was mapped before.
const SIGNAL: u64 = 5000;
/// A call of mmap.
const CALL: u64 = 3000;
/// Which part of that counts for pages that come for the first time.
const FIRST: u64 = 4;
/// A page that is compared with the page tables, and one that is unmapped with all others.
const COMPARISON: u64 = 20;
const CLEARANCE: u64 = 100;

/// What windows cost, in ns, by what is done for them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost(u64);

impl Cost {
    /// A page was missing, which the process has had before, or not.
    pub(super) fn missed(&mut self, again: bool) {
        self.0 += if again { SIGNAL } else { SIGNAL / FIRST };
    }

    /// Pages were mapped by one call, the first of which the process has had before, or not.
    pub(super) fn mapped(&mut self, again: bool) {
        self.0 += if again { CALL } else { CALL / FIRST };
    }

    /// Mappings were taken away or protected by one call.
    pub(super) fn changed(&mut self) {
        self.0 += CALL;
    }

    /// So many pages were compared with something.
    pub(super) fn compared(&mut self, pages: usize) {
        self.0 += pages as u64 * COMPARISON;
    }

    /// So many pages were unmapped at once.
    pub(super) fn cleared(&mut self, pages: usize) {
        self.0 += pages as u64 * CLEARANCE;
    }

    pub(super) fn time(self) -> Duration {
        Duration::from_nanos(self.0)
    }
}

/// What became of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    TakeAway,
}

/// What the windows owe: twice what they have cost, less the time in which they served.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Worth {
    debt: Duration,
}

impl Worth {
    /// They are to be taken away at the next sample, whatever it is.
    pub(super) const NONE: Self = Self { debt: Duration::from_secs(1 << 32) };

    /// A timer interrupt: what mapping has cost since the last one, how long ago that was, and whether it found the process in user code.
    pub(super) fn sample(&mut self, cost: Duration, elapsed: Duration, found_it: bool) -> Verdict {
        let served = if found_it { elapsed.min(LONGEST) } else { Duration::ZERO };
        self.debt = (self.debt + cost * 2).saturating_sub(served);
        if self.debt > CREDIT { Verdict::TakeAway } else { Verdict::Keep }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(4);

    /// The first of many equal samples that takes the windows away.
    fn ends(w: &mut Worth, cost: Duration, found_it: impl Fn(u32) -> bool) -> Option<u32> {
        (0..1000).find(|&n| w.sample(cost, TICK, found_it(n)) == Verdict::TakeAway)
    }

    #[test]
    fn who_computes_may_map_for_up_to_half_of_the_time() {
        assert_eq!(ends(&mut Worth::default(), TICK * 49 / 100, |_| true), None);
        // A working set that comes in at once, and then all is well.
        let mut w = Worth::default();
        assert!((0..5).all(|_| w.sample(TICK, TICK, true) == Verdict::Keep));
        assert_eq!(ends(&mut w, TICK / 10, |_| true), None);
        assert!(ends(&mut Worth::default(), TICK, |_| true).is_some_and(|n| n < 10));
    }

    /// What so many pages a tick cost.
    fn pages(count: u32, again: bool) -> Duration {
        let mut c = Cost::default();
        for _ in 0..count {
            c.missed(again);
            c.mapped(again);
        }
        c.time()
    }

    #[test]
    fn who_grows_keeps_them_and_who_comes_and_goes_does_not() {
        // 400 new pages in 4 ms are as many as a kernel can give.
        assert_eq!(ends(&mut Worth::default(), pages(400, false), |n| n % 2 == 0), None);
        assert!(ends(&mut Worth::default(), pages(400, true), |n| n % 2 == 0).is_some_and(|n| n < 12));
    }

    #[test]
    fn who_is_elsewhere_pays_for_nothing() {
        assert!(ends(&mut Worth::default(), TICK / 8, |_| false).is_some());
        assert!(ends(&mut Worth::default(), TICK / 8, |n| n % 8 == 0).is_some(), "it forks most of the time");
        assert_eq!(ends(&mut Worth::default(), TICK / 8, |n| n % 2 == 0), None, "it reads and writes half of the time");
        assert_eq!(ends(&mut Worth::default(), Duration::ZERO, |_| false), None, "it sleeps");
    }

    #[test]
    fn idle_time_is_no_service() {
        let mut w = Worth::default();
        for _ in 0..5 {
            w.sample(Duration::from_millis(2), TICK, false);
        }
        w.sample(Duration::ZERO, Duration::from_secs(9), true);
        assert_eq!(w.debt, Duration::from_millis(10));
        assert_eq!(Worth::NONE.clone().sample(Duration::ZERO, Duration::from_secs(9), true), Verdict::TakeAway);
    }
}
