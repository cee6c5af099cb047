//! Whether windows pay for the process that has them.
//!
//! Code runs about twice as fast through windows, so they may cost half of the time in which they serve, and a working set may take its
//! time to come in. A process that is found in the kernel, or not at all, has nothing from them and still pays for each
//! page that it touches: one that forks all the time has its pages mapped and unmapped for nothing.

use std::time::Duration;

/// The debt at which windows are taken away.
const CREDIT: Duration = Duration::from_millis(24);
/// The longest time that one sample stands for; if it was longer, the vCPU was idle.
const LONGEST: Duration = Duration::from_millis(10);

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
