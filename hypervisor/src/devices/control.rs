//! Who is asked to come out of guest code, and why the machine stops.
//!
//! [`Control`] has one entry per vCPU: a word of pending events that is polled with one atomic load, the engine's
//! [`Kick`], and the place where the vCPU's thread sleeps while it is halted. It also keeps the reason why the machine
//! stops; the first reason given is the one that counts.
//!
//! A sleeper sets `asleep` and then looks at the events; a waker sets an event and then looks at `asleep`. Both
//! use sequentially consistent accesses, so at least one of them sees the other and no wake-up is lost.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};

use super::lock;

/// The engine's way of getting a vCPU out of translated or guest code, promptly, so that it polls the bus again.
///
/// Called from any thread, also from the vCPU's own, with locks of interrupt controllers held: an implementation must
/// neither block nor call the bus.
pub trait Kick: Send + Sync {
    /// Makes the vCPU leave guest code, or not enter it, until it has polled the bus once more.
    fn kick(&self);
    /// Whether the vCPU may be in guest code without having polled the bus since the last kick. `false` may be said only of a vCPU
    /// that will poll before it enters.
    fn inside(&self) -> bool {
        true
    }
}

/// Why the machine stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (ACPI reset register, port 0x92, keyboard controller).
    Reset,
    /// The guest wrote to the debug-exit port; the process is to exit with this status.
    DebugExit(u8),
    /// A vCPU shut down by a triple fault.
    TripleFault(u32),
    /// The guest reported a panic.
    GuestPanic,
    /// The user or the host asked for it (escape key, signal).
    Host,
}

/// Event bits of a vCPU.
pub(crate) mod event {
    /// The local APIC has a deliverable interrupt.
    pub(crate) const APIC: u32 = 1;
    pub(crate) const NMI: u32 = 2;
    pub(crate) const INIT: u32 = 4;
    pub(crate) const SIPI: u32 = 8;
    /// A halted vCPU is to go on.
    pub(crate) const WAKE: u32 = 16;
}

#[derive(Default)]
struct Vcpu {
    events: AtomicU32,
    asleep: AtomicBool,
    gate: Mutex<()>,
    wake: Condvar,
    kick: RwLock<Option<Arc<dyn Kick>>>,
}

/// See the module text.
pub struct Control {
    vcpus: Box<[Vcpu]>,
    stopping: AtomicBool,
    pauses: AtomicU32,
    cause: OnceLock<StopCause>,
}

impl Control {
    /// For `vcpus` vCPUs, running.
    pub fn new(vcpus: u32) -> Self {
        Self {
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            stopping: AtomicBool::new(false),
            pauses: AtomicU32::new(0),
            cause: OnceLock::new(),
        }
    }

    /// Stops the machine: the first cause is kept, all vCPUs are kicked and woken.
    pub fn stop(&self, cause: StopCause) {
        let _ = self.cause.set(cause);
        self.stopping.store(true, SeqCst);
        for vcpu in 0..self.vcpus.len() as u32 {
            self.wake(vcpu);
        }
    }

    /// Whether the machine is stopping.
    pub fn stopping(&self) -> bool {
        self.stopping.load(SeqCst)
    }

    /// Gets all vCPUs out of guest code and out of their sleep until [`Control::resume`]; pauses nest.
    pub fn pause(&self) {
        self.pauses.fetch_add(1, SeqCst);
        for vcpu in 0..self.vcpus.len() as u32 {
            self.wake(vcpu);
        }
    }

    /// Takes one [`Control::pause`] back.
    pub fn resume(&self) {
        let before = self.pauses.fetch_sub(1, SeqCst);
        debug_assert!(before != 0, "resumed more often than paused");
    }

    /// Whether the machine is paused.
    pub fn paused(&self) -> bool {
        self.pauses.load(SeqCst) != 0
    }

    /// Whether vCPUs are to leave their run loops: the machine is stopping or paused.
    pub fn leaving(&self) -> bool {
        self.stopping() || self.paused()
    }

    /// Why the machine stops; `None` while it runs.
    pub fn cause(&self) -> Option<StopCause> {
        self.cause.get().copied()
    }

    /// Registers the engine's kick for a vCPU, in the place of an earlier one. It is kicked once at once, because events may be pending.
    pub fn set_kick(&self, vcpu: u32, kick: Arc<dyn Kick>) {
        if let Some(v) = self.vcpus.get(vcpu as usize) {
            *v.kick.write().unwrap_or_else(PoisonError::into_inner) = Some(kick);
            self.wake(vcpu);
        }
    }

    /// Gets the vCPU out of guest code or out of its sleep.
    pub(crate) fn wake(&self, vcpu: u32) {
        let Some(v) = self.vcpus.get(vcpu as usize) else { return };
        if v.asleep.load(SeqCst) {
            drop(lock(&v.gate)); // the sleeper is either before its check or in its wait
            v.wake.notify_all();
        }
        if let Some(kick) = &*v.kick.read().unwrap_or_else(PoisonError::into_inner) {
            kick.kick();
        }
    }

    /// Gets the vCPU out of guest code, but not out of its sleep.
    pub(crate) fn kick(&self, vcpu: u32) {
        let Some(v) = self.vcpus.get(vcpu as usize) else { return };
        if let Some(kick) = &*v.kick.read().unwrap_or_else(PoisonError::into_inner) {
            kick.kick();
        }
    }

    /// Whether the vCPU may be in guest code; see [`Kick::inside`].
    pub(crate) fn inside(&self, vcpu: u32) -> bool {
        let Some(v) = self.vcpus.get(vcpu as usize) else { return false };
        v.kick.read().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|k| k.inside())
    }

    /// Pending events of a vCPU, bits of [`event`].
    pub(crate) fn events(&self, vcpu: u32) -> u32 {
        self.vcpus.get(vcpu as usize).map_or(0, |v| v.events.load(SeqCst))
    }

    /// Sets an event without waking anybody; gives whether it is new.
    pub(crate) fn set(&self, vcpu: u32, bit: u32) -> bool {
        self.vcpus.get(vcpu as usize).is_some_and(|v| v.events.fetch_or(bit, SeqCst) & bit == 0)
    }

    /// Sets an event and wakes the vCPU if it is new.
    pub(crate) fn raise(&self, vcpu: u32, bit: u32) {
        if self.set(vcpu, bit) {
            self.wake(vcpu);
        }
    }

    /// Clears an event; gives whether it was set.
    pub(crate) fn clear(&self, vcpu: u32, bit: u32) -> bool {
        self.vcpus
            .get(vcpu as usize)
            .is_some_and(|v| v.events.load(SeqCst) & bit != 0 && v.events.fetch_and(!bit, SeqCst) & bit != 0)
    }

    /// Puts the calling thread, the vCPU's own, to sleep until `ready` holds or the machine stops or is paused.
    pub(crate) fn sleep_until(&self, vcpu: u32, ready: impl Fn() -> bool) {
        let Some(v) = self.vcpus.get(vcpu as usize) else { return };
        if ready() || self.leaving() {
            return;
        }
        let mut gate = lock(&v.gate);
        v.asleep.store(true, SeqCst);
        while !ready() && !self.leaving() {
            gate = v.wake.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        v.asleep.store(false, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    struct Count(AtomicU32);
    impl Kick for Count {
        fn kick(&self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn the_first_cause_counts_and_everyone_is_kicked() {
        let c = Control::new(2);
        let kicks = [Arc::new(Count(AtomicU32::new(0))), Arc::new(Count(AtomicU32::new(0)))];
        c.set_kick(0, kicks[0].clone());
        c.set_kick(1, kicks[1].clone());
        c.set_kick(7, kicks[1].clone());
        assert!(!c.stopping());
        c.stop(StopCause::PowerOff);
        c.stop(StopCause::Reset);
        assert!(c.stopping());
        assert_eq!(c.cause(), Some(StopCause::PowerOff));
        assert!(kicks.iter().all(|k| k.0.load(SeqCst) >= 2));
    }

    #[test]
    fn no_wake_up_is_lost() {
        let c = Arc::new(Control::new(1));
        let sleeper = {
            let c = c.clone();
            std::thread::spawn(move || {
                for _ in 0..2000 {
                    c.sleep_until(0, || c.events(0) & event::NMI != 0);
                    c.clear(0, event::NMI);
                }
            })
        };
        let mut rounds = 0_u64;
        while !sleeper.is_finished() {
            c.raise(0, event::NMI);
            rounds += 1;
            assert!(rounds < 1 << 34, "the sleeper sleeps on");
            if rounds.is_multiple_of(64) {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        sleeper.join().unwrap();
    }
}
