//! Interrupts, timers, halts.

use crate::cases::apic;
use crate::harness::{Outcome, Run, repeated, self_timed};
use crate::machine::{VECTOR, arrived};
use guest_rt::cpu;
use guest_shim::Vcpus;

/// With interrupts enabled by RFLAGS.
fn enabled<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: handlers are in place; CPL 0.
    unsafe { cpu::sti() };
    let result = work();
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    result
}

pub(crate) fn mask_pairs(run: &Run<'_>) -> Outcome {
    enabled(|| repeated(run.count, || drop(run.machine.vcpu.mask())))
}

/// An interrupt comes in while they are masked, each time.
pub(crate) fn mask_with_interrupt(run: &Run<'_>) -> Outcome {
    let apic = apic();
    let before = arrived();
    let outcome = enabled(|| {
        repeated(run.count, || {
            let before = arrived();
            let guard = run.machine.vcpu.mask();
            apic.send_self(VECTOR);
            drop(guard);
            while arrived() == before {
                core::hint::spin_loop();
            }
        })
    });
    assert!(arrived() > before);
    outcome
}

/// Interrupts that this CPU sends to itself by `send`, one by one.
fn interrupts(run: &Run<'_>, send: impl Fn()) -> Outcome {
    let before = arrived();
    let outcome = enabled(|| {
        repeated(run.count, || {
            let before = arrived();
            send();
            while arrived() == before {
                core::hint::spin_loop();
            }
        })
    });
    assert!(arrived() > before);
    outcome
}

/// Sent natively in both forms.
pub(crate) fn eoi(run: &Run<'_>) -> Outcome {
    let apic = apic();
    interrupts(run, || apic.send_self(VECTOR))
}

/// Ended natively in both forms.
pub(crate) fn ipi(run: &Run<'_>) -> Outcome {
    interrupts(run, || {
        run.machine.vcpu.send_ipi(Vcpus::one(0), VECTOR);
    })
}

pub(crate) fn timer_arm(run: &Run<'_>) -> Outcome {
    let vcpu = run.machine.vcpu;
    let later = vcpu.ns() + 100_000_000_000;
    let mut n = 0;
    let outcome = repeated(run.count, || {
        n += 1;
        vcpu.set_timer(Some(later + n * 1000), VECTOR);
    });
    vcpu.set_timer(None, VECTOR);
    outcome
}

/// An interrupt is on its way already when the CPU halts: what the way in and out costs, without sleep.
pub(crate) fn halt(run: &Run<'_>) -> Outcome {
    let apic = apic();
    let before = arrived();
    let outcome = repeated(run.count, || {
        // SAFETY: CPL 0; handlers are in place.
        unsafe {
            cpu::cli();
            apic.send_self(VECTOR);
            run.machine.vcpu.halt();
        }
    });
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    assert!(arrived() > before);
    outcome
}

/// How far ahead a deadline is, ns: more than arming takes anywhere.
const AHEAD: u64 = 500_000;

/// Arms the timer, has `wait` wait for it with interrupts masked before and after, and adds up how late it came.
fn lateness(run: &Run<'_>, mut wait: impl FnMut(u64)) -> Outcome {
    let vcpu = run.machine.vcpu;
    let khz = u64::from(run.machine.shim.tsc_khz().0);
    self_timed(run.count, |count| {
        let mut late = 0;
        for _ in 0..count {
            let before = arrived();
            let deadline = vcpu.ns() + AHEAD;
            vcpu.set_timer(Some(deadline), VECTOR);
            wait(before);
            late += vcpu.ns().saturating_sub(deadline);
        }
        late * khz / 1_000_000
    })
}

/// From the deadline until the code that waited in a loop sees that the handler has run.
pub(crate) fn timer_latency(run: &Run<'_>) -> Outcome {
    lateness(run, |before| {
        enabled(|| {
            while arrived() == before {
                core::hint::spin_loop();
            }
        })
    })
}

/// From the deadline until the code that halted goes on.
pub(crate) fn halt_latency(run: &Run<'_>) -> Outcome {
    lateness(run, |before| {
        while arrived() == before {
            // SAFETY: CPL 0; handlers are in place.
            unsafe {
                run.machine.vcpu.halt();
                cpu::cli();
            }
        }
    })
}

/// Writes to the local APIC's end-of-interrupt register while nothing is in service.
pub(crate) fn end_nothing(run: &Run<'_>) -> Outcome {
    let apic = apic();
    repeated(run.count, || apic.eoi())
}
