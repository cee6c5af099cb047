//! Time for devices: one clock, and one thread that calls devices back at the times they asked for.
//!
//! [`Clock`] is CLOCK_MONOTONIC in nanoseconds since the machine was built, with the host's TSC beside it. [`Timers`] owns
//! the thread; devices hold a [`Timer`] each, which is armed for a deadline, re-armed or cancelled at any time. There is at most one
//! entry per timer in the queue, so arming a timer a million times leaves no trace.
//!
//! A callback runs on the timer thread with no timer lock held. It can come late, and it can come after the timer was
//! cancelled or moved (it was already on its way), so a device checks its own idea of the deadline before it acts.
//!
//! Lock order: a device may hold its own lock while it arms a timer; nothing here calls out with a lock held.
#![allow(unsafe_code)] // prctl(PR_SET_TIMERSLACK), which nothing wraps

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::tsc;

/// The machine's clock. Cheap to clone and to read.
#[derive(Clone, Debug)]
pub struct Clock {
    origin: Instant,
    tsc_khz: u32,
    /// A clock that tests move by hand; it starts at 0 and its TSC follows it.
    manual: Option<Arc<AtomicU64>>,
}

impl Clock {
    /// A clock that starts now.
    pub fn new() -> Self {
        Self { origin: Instant::now(), tsc_khz: tsc::tsc_khz(), manual: None }
    }

    /// A clock that stands still until [`Clock::advance`] moves it, for tests of devices. Its TSC runs at 2 GHz.
    pub fn manual() -> Self {
        Self { origin: Instant::now(), tsc_khz: 2_000_000, manual: Some(Arc::default()) }
    }

    /// Moves a manual clock on by `ns` nanoseconds; does nothing to a real one.
    pub fn advance(&self, ns: u64) {
        if let Some(t) = &self.manual {
            t.fetch_add(ns, Ordering::SeqCst);
        }
    }

    /// Nanoseconds since the clock was made.
    pub fn ns(&self) -> u64 {
        match &self.manual {
            Some(t) => t.load(Ordering::SeqCst),
            None => self.origin.elapsed().as_nanos() as u64,
        }
    }

    /// The TSC, in ticks.
    pub fn tsc(&self) -> u64 {
        match &self.manual {
            Some(t) => (u128::from(t.load(Ordering::SeqCst)) * u128::from(self.tsc_khz) / 1_000_000) as u64,
            None => tsc::rdtsc(),
        }
    }

    /// The TSC and the clock, read at the same moment.
    pub fn pair(&self) -> (u64, u64) {
        if self.manual.is_some() {
            return (self.tsc(), self.ns());
        }
        let (tsc, at) = tsc::sample();
        (tsc, at.saturating_duration_since(self.origin).as_nanos() as u64)
    }

    /// The time, on this clock in ns, at which the TSC reaches `tsc`; never before it does, and now if it has already.
    pub fn ns_of_tsc(&self, tsc: u64) -> u64 {
        let ahead = tsc.saturating_sub(self.tsc());
        let ns = (u128::from(ahead) * 1_000_000).div_ceil(u128::from(self.tsc_khz.max(1)));
        self.ns().saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

type Callback = Arc<dyn Fn() + Send + Sync>;

struct Slot {
    deadline: Option<u64>,
    call: Callback,
}

#[derive(Default)]
struct Queue {
    slots: Vec<Slot>,
    /// Armed timers by deadline: (ns, slot).
    armed: BTreeSet<(u64, usize)>,
    /// The deadline that the thread sleeps for; an earlier one must wake it.
    sleeping_for: Option<u64>,
    stop: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    clock: Clock,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first timer that is due, and disarms it.
    fn take_due(&self, queue: &mut Queue) -> Option<Callback> {
        let &(deadline, slot) = queue.armed.first()?;
        if deadline > self.clock.ns() {
            return None;
        }
        queue.armed.pop_first();
        queue.slots[slot].deadline = None;
        Some(queue.slots[slot].call.clone())
    }

    fn run(&self) {
        let mut queue = self.queue();
        while !queue.stop {
            if let Some(call) = self.take_due(&mut queue) {
                drop(queue);
                call();
                queue = self.queue();
                continue;
            }
            let next = queue.armed.first().map(|&(deadline, _)| deadline);
            queue.sleeping_for = Some(next.unwrap_or(u64::MAX));
            queue = match next {
                None => self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let span = Duration::from_nanos(deadline.saturating_sub(self.clock.ns()));
                    self.wake.wait_timeout(queue, span).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            queue.sleeping_for = None;
        }
    }
}

/// The timer thread. Dropping it stops and joins the thread; timers that are left do nothing from then on.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Timers {
    /// Starts the timer thread.
    ///
    /// # Errors
    /// When the host refuses another thread.
    pub fn start(clock: Clock) -> io::Result<Self> {
        let mut timers = Self::manual(clock);
        let shared = timers.shared.clone();
        timers.thread = Some(std::thread::Builder::new().name("timer".into()).spawn(move || {
            // The default slack of 50 us would be added to every guest timer.
            // SAFETY: PR_SET_TIMERSLACK takes a number and touches no memory of ours.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
            shared.run();
        })?);
        Ok(timers)
    }

    /// Timers without a thread, for tests: they fire in [`Timers::run_due`].
    pub fn manual(clock: Clock) -> Self {
        Self { shared: Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new(), clock }), thread: None }
    }

    /// The clock that deadlines refer to.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// A new timer, not armed, that calls `call` on the timer thread. `call` should hold its device weakly.
    pub fn add(&self, call: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut queue = self.shared.queue();
        queue.slots.push(Slot { deadline: None, call: Arc::new(call) });
        Timer { shared: self.shared.clone(), slot: queue.slots.len() - 1 }
    }

    /// Calls all timers that are due, on the calling thread; gives how many there were. A timer that re-arms itself in the past is
    /// called again, as the thread would.
    pub fn run_due(&self) -> usize {
        let mut count = 0;
        loop {
            let Some(call) = self.shared.take_due(&mut self.shared.queue()) else { return count };
            call();
            count += 1;
        }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.queue().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a callback that panicked has already been reported by the panic hook
        }
    }
}

/// One device's timer.
pub struct Timer {
    shared: Arc<Shared>,
    slot: usize,
}

impl Timer {
    /// Arms the timer for `deadline` (ns on the machine's clock), or cancels it; replaces what was set before.
    pub fn set(&self, deadline: Option<u64>) {
        let mut queue = self.shared.queue();
        let old = std::mem::replace(&mut queue.slots[self.slot].deadline, deadline);
        if old == deadline {
            return;
        }
        if let Some(old) = old {
            queue.armed.remove(&(old, self.slot));
        }
        if let Some(new) = deadline {
            queue.armed.insert((new, self.slot));
            if queue.sleeping_for.is_some_and(|until| new < until) {
                queue.sleeping_for = Some(new);
                drop(queue);
                self.shared.wake.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    #[test]
    fn timers_fire_in_order_and_only_once() {
        let clock = Clock::manual();
        let timers = Timers::manual(clock.clone());
        let log = Arc::new(Mutex::new(Vec::new()));
        let make = |n: u32| {
            let log = log.clone();
            timers.add(move || log.lock().unwrap().push(n))
        };
        let (a, b, c) = (make(1), make(2), make(3));
        a.set(Some(300));
        b.set(Some(100));
        c.set(Some(200));
        c.set(None);
        clock.advance(99);
        assert_eq!(timers.run_due(), 0);
        clock.advance(1000);
        assert_eq!(timers.run_due(), 2);
        assert_eq!(*log.lock().unwrap(), [2, 1]);
        assert_eq!(timers.run_due(), 0);
    }

    #[test]
    fn rearming_leaves_one_entry() {
        let timers = Timers::manual(Clock::manual());
        let t = timers.add(|| {});
        for i in 0..100_000 {
            t.set(Some(1_000_000 + i));
        }
        assert_eq!(timers.shared.queue().armed.len(), 1);
        t.set(None);
        assert!(timers.shared.queue().armed.is_empty());
    }

    #[test]
    fn the_thread_wakes_for_an_earlier_deadline_and_is_never_early() {
        let timers = Timers::start(Clock::new()).unwrap();
        let (tx, rx) = mpsc::channel();
        let clock = timers.clock().clone();
        let t = timers.add(move || tx.send(clock.ns()).unwrap());
        t.set(Some(timers.clock().ns() + 3_600_000_000_000));
        std::thread::sleep(Duration::from_millis(5));
        let due = timers.clock().ns() + 2_000_000;
        t.set(Some(due));
        let at = rx.recv_timeout(Duration::from_secs(10)).expect("the earlier deadline was slept through");
        assert!(at >= due, "{at} < {due}");
    }

    #[test]
    fn dropping_stops_the_thread() {
        let timers = Timers::start(Clock::new()).unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let seen = calls.clone();
        let t = timers.add(move || {
            seen.fetch_add(1, Ordering::SeqCst);
        });
        t.set(Some(timers.clock().ns() + 50_000_000_000));
        drop(timers);
        t.set(Some(0));
        assert_eq!(calls.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_tsc_deadline_is_converted_without_being_early() {
        let clock = Clock::manual(); // two ticks per ns
        clock.advance(500);
        assert_eq!(clock.ns_of_tsc(1000), 500);
        assert_eq!(clock.ns_of_tsc(0), 500);
        assert_eq!(clock.ns_of_tsc(1001), 501);
        assert_eq!(clock.ns_of_tsc(3000), 1500);
        assert!(clock.ns_of_tsc(u64::MAX) > 1 << 60);
    }
}
