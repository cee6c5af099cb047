//! Counters of vCPUs that run, for whoever asks from another thread.
//!
//! A vCPU's counters are its own thread's, which writes them without regard to others. So [`Census::ask`] pauses the machine for a moment: each
//! vCPU's thread comes out between two instructions, says what it has counted, and goes on.

use crate::chipset::Chipset;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Counters by name.
pub type Counters = Vec<(String, u64)>;

/// Adds another vCPU's counters.
pub(crate) fn add(sum: &mut Counters, more: Counters) {
    for (name, value) in more {
        match sum.iter_mut().find(|c| c.0 == name) {
            // A bound is not additive.
            Some(c) if name.contains("below") => c.1 = c.1.max(value),
            Some(c) => c.1 += value,
            None => sum.push((name, value)),
        }
    }
}

/// How often a waiting [`Census::ask`] looks whether the machine has stopped.
const LOOK: Duration = Duration::from_millis(10);

/// The counters of one machine.
pub struct Census {
    /// How many times somebody has asked.
    asked: AtomicU64,
    /// For each vCPU which question it answered last, and how.
    told: Mutex<Vec<(u64, Counters)>>,
    news: Condvar,
}

impl Census {
    /// For a machine with so many vCPUs.
    pub fn new(vcpus: usize) -> Self {
        Self { asked: AtomicU64::new(0), told: Mutex::new(vec![(0, Counters::new()); vcpus]), news: Condvar::new() }
    }

    /// The counters of all vCPUs, taken together; `None` when the machine stops. The machine stands still while they are gathered.
    pub fn ask(&self, chipset: &Chipset) -> Option<Counters> {
        let question = self.asked.fetch_add(1, SeqCst) + 1;
        chipset.pause();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        while told.iter().any(|t| t.0 < question) && chipset.stop_cause().is_none() {
            told = self.news.wait_timeout(told, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        chipset.resume();
        let complete = told.iter().all(|t| t.0 >= question);
        complete.then(|| {
            let mut sum = Counters::new();
            told.iter().for_each(|t| add(&mut sum, t.1.clone()));
            sum
        })
    }

    /// On a paused vCPU's thread: answers, if somebody has asked.
    pub(crate) fn tell(&self, vcpu: u32, counters: impl FnOnce() -> Counters) {
        let question = self.asked.load(SeqCst);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mine) = told.get_mut(vcpu as usize)
            && mine.0 < question
        {
            *mine = (question, counters());
            self.news.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::ChipsetConfig;
    use crate::devices::control::StopCause;
    use std::sync::Arc;

    fn machine() -> (Arc<Chipset>, Census) {
        let cfg = ChipsetConfig { cpus: 2, debug_exit: false, serial: Box::new(std::io::sink()), pv: None };
        (Chipset::new(cfg).unwrap(), Census::new(2))
    }

    #[test]
    fn all_vcpus_are_asked_each_time() {
        let (chipset, census) = machine();
        std::thread::scope(|s| {
            for id in 0..2 {
                let (chipset, census) = (&chipset, &census);
                s.spawn(move || {
                    let mut n = 0;
                    while chipset.stop_cause().is_none() {
                        n += u64::from(chipset.paused());
                        if chipset.paused() {
                            census.tell(id, || vec![("halts".into(), 1), ("x, 99 of 100 below (ns)".into(), n)]);
                        }
                        std::thread::yield_now();
                    }
                });
            }
            let first = census.ask(&chipset).unwrap();
            let second = census.ask(&chipset).unwrap();
            assert_eq!(first[0], ("halts".into(), 2), "counts are summed");
            assert!(
                first[1].1 >= 1 && second[1].1 > first[1].1,
                "each question is answered anew: {first:?} {second:?}"
            );
            assert!(!chipset.paused(), "the machine goes on");
            chipset.stop(StopCause::Host);
        });
    }

    #[test]
    fn a_machine_that_stops_answers_nobody() {
        let (chipset, census) = machine();
        census.tell(7, || panic!("there is no such vCPU"));
        census.tell(0, || panic!("nobody has asked"));
        chipset.stop(StopCause::PowerOff);
        assert_eq!(census.ask(&chipset), None);
        assert!(!chipset.paused());
    }
}
