//! CLK, TMR and STL: the clock, the timer, stolen time.

use crate::abi::{Abi, Outcome, Why, check, get, holds, leaf, page};
use crate::at;
use crate::irq;
use crate::{Kind, Test};
use guest_rt::cpu;
use pv_abi::call::{Call, Error};
use pv_abi::cpuid;
use pv_abi::feature::Feature;
use pv_abi::shared::Clock;

pub(crate) const TESTS: &[Test] = &[
    ("CLK-1", "the clock goes on and not back", Kind::Ready(clk_1)),
    ("CLK-2", "the sequence number", Kind::Ready(clk_2)),
    ("CLK-4", "the rate", Kind::Ready(clk_4)),
    ("CLK-5", "another TSC", Kind::Ready(clk_5)),
    ("CLK-6", "the wall clock agrees with the CMOS clock", Kind::Ready(clk_6)),
    ("TMR-1", "one interrupt, not before the deadline", Kind::Ready(tmr_1)),
    ("TMR-2", "a deadline in the past", Kind::Ready(tmr_2)),
    ("TMR-3", "a new deadline, and none", Kind::Ready(tmr_3)),
    ("TMR-4", "vectors that are none", Kind::Ready(tmr_4)),
    ("TMR-5", "it is a timer of its own and ends a halt", Kind::Ready(tmr_5)),
    ("TMR-6", "a deadline that never comes", Kind::Ready(tmr_6)),
    ("STL-1", "stolen time begins at 0 and does not decrease", Kind::Ready(stl_1)),
    ("STL-2", "the sequence number", Kind::Ready(stl_2)),
];

fn clk_1(abi: Abi) -> Outcome {
    abi.need(Feature::Clock)?;
    let (start, tsc) = (abi.now(), cpu::tsc());
    let mut last = start;
    while cpu::tsc().wrapping_sub(tsc) < irq::SHORT {
        let now = abi.now();
        holds("it does not decrease", now >= last)?;
        last = now;
    }
    holds("it goes on", last > start)?;
    holds("it began with the machine: less than an hour ago", last < 3_600_000_000_000)
}

fn clk_2(abi: Abi) -> Outcome {
    abi.need(Feature::Clock)?;
    let before = abi.clock().sequence;
    check("even", u64::from(before & 1), 0)?;
    // SAFETY: moves the TSC and moves it back.
    unsafe {
        let adjust = cpu::read_msr(0x3b);
        cpu::write_msr(0x3b, adjust.wrapping_add(1 << 30));
        let between = abi.clock().sequence;
        cpu::write_msr(0x3b, adjust);
        check("even", u64::from(between & 1), 0)?;
        holds("another one after a change", between != before)
    }
}

fn clk_4(abi: Abi) -> Outcome {
    abi.need(Feature::Clock)?;
    let clock = abi.clock();
    check("top bit of mult", u64::from(clock.mult >> 31), 1)?;
    holds("shift", (-31..=31).contains(&clock.shift))?;
    if leaf(abi.base)[0] < abi.base + cpuid::TIMING || leaf(abi.base + cpuid::TIMING)[0] == 0 {
        return Err(Why::Absent("a TSC frequency in CPUID"));
    }
    let khz = u64::from(leaf(abi.base + cpuid::TIMING)[0]);
    let line = Clock { tsc_base: 0, ns_base: 0, ..clock };
    let ns = line.ns(khz * 1000);
    holds("a second of ticks is a second of ns", ns.abs_diff(1_000_000_000) <= 2000)
}

fn clk_5(abi: Abi) -> Outcome {
    abi.need(Feature::Clock)?;
    // SAFETY: moves the TSC and moves it back; nothing else of this guest depends on it.
    unsafe {
        let adjust = cpu::read_msr(0x3b);
        for step in [1 << 40, 1 << 20, 0_u64.wrapping_sub(1 << 30)] {
            let before = abi.now();
            cpu::write_msr(0x3b, adjust.wrapping_add(step));
            let between = abi.now();
            cpu::write_msr(0x3b, adjust);
            let after = abi.now();
            holds("no step there", between >= before && between - before < 50_000_000)?;
            holds("and none back", after >= between && after - between < 50_000_000)?;
        }
        let before = abi.now();
        let tsc = cpu::tsc();
        cpu::write_msr(0x10, tsc + (1 << 35));
        let after = abi.now();
        cpu::write_msr(0x3b, adjust);
        holds("MSR 0x10 is no step either", after >= before && after - before < 50_000_000)
    }
}

/// A register of the CMOS clock in binary.
fn cmos(n: u8) -> u64 {
    // SAFETY: the CMOS clock touches no memory.
    unsafe {
        cpu::out8(0x70, n);
        let v = u64::from(cpu::in8(0x71));
        cpu::out8(0x70, 0xb);
        if cpu::in8(0x71) & 4 != 0 { v } else { (v >> 4) * 10 + (v & 15) }
    }
}

fn clk_6(abi: Abi) -> Outcome {
    abi.need(Feature::Clock)?;
    let utc = (abi.clock().wall_ns + abi.now()) / 1_000_000_000;
    let (seconds, minutes) = (cmos(0), cmos(2));
    let rtc = minutes * 60 + seconds;
    let off = (utc % 3600 + 3600 - rtc) % 3600;
    holds("it is after 2020", utc > 1_577_836_800)?;
    // The CMOS clock shows whole seconds and may be read while it changes.
    holds("minutes and seconds agree", off <= 2 || off >= 3598)
}

fn arm(abi: Abi, deadline: u64, vector: u64) -> Outcome {
    abi.call(Call::SetTimer, &[deadline, vector]).gives("SET_TIMER", 0)
}

fn need(abi: Abi) -> Outcome {
    abi.need(Feature::Timer)?;
    abi.need(Feature::Clock)
}

fn tmr_1(abi: Abi) -> Outcome {
    need(abi)?;
    for ns in [100_000, 2_000_000, 20_000_000] {
        irq::forget();
        let deadline = abi.now() + ns;
        arm(abi, deadline, 0x61)?;
        holds("it fires", irq::wait(irq::LONG))?;
        let now = abi.now();
        holds("not before the deadline", now >= deadline)?;
        check("its vector", irq::order(0), 0x61)?;
        irq::forget();
        holds("once", !irq::wait(irq::SHORT / 4))?;
    }
    Ok(())
}

fn tmr_2(abi: Abi) -> Outcome {
    need(abi)?;
    for deadline in [1, abi.now() - 1] {
        irq::forget();
        arm(abi, deadline, 0x61)?;
        holds("it fires", irq::wait(irq::LONG))?;
    }
    Ok(())
}

fn tmr_3(abi: Abi) -> Outcome {
    need(abi)?;
    arm(abi, abi.now() + 5_000_000, 0x61)?;
    arm(abi, abi.now() + 10_000_000, 0x62)?;
    holds("the new one fires", irq::wait(irq::LONG))?;
    check("and not the old one", irq::order(0), 0x62)?;
    irq::forget();
    arm(abi, abi.now() + 5_000_000, 0x61)?;
    arm(abi, 0, 0x61)?;
    holds("none", !irq::wait(irq::SHORT))?;
    arm(abi, 1, 0x61)?;
    let start = cpu::tsc();
    while cpu::tsc().wrapping_sub(start) < irq::SHORT {
        core::hint::spin_loop();
    }
    arm(abi, 0, 0x62)?;
    irq::open();
    check("what was requested stays", irq::count(), 1)
}

fn tmr_4(abi: Abi) -> Outcome {
    need(abi)?;
    arm(abi, abi.now() + 3_000_000, 0x61)?;
    for bad in [0, 31, 256, 1 << 32 | 0x60, u64::MAX] {
        abi.call(Call::SetTimer, &[0, bad]).fails("vector", Error::InvalidArgument)?;
        abi.call(Call::SetTimer, &[1, bad]).fails("vector", Error::InvalidArgument)?;
    }
    holds("the timer from before fires", irq::wait(irq::LONG))?;
    check("its vector", irq::order(0), 0x61)
}

fn tmr_5(abi: Abi) -> Outcome {
    use guest_rt::apic::register::{LVT_TIMER, TIMER_DIVIDE, TIMER_INITIAL};
    need(abi)?;
    let apic = irq::apic();
    apic.write(TIMER_DIVIDE, 0b1011);
    apic.write(LVT_TIMER, 1 << 16 | 0x66);
    apic.write(TIMER_INITIAL, u32::MAX);
    arm(abi, abi.now() + 3_000_000, 0x61)?;
    // SAFETY: the timer ends the halt; all vectors have handlers.
    unsafe { core::arch::asm!("sti", "hlt", "cli") };
    apic.write(TIMER_INITIAL, 0);
    check("its vector", irq::order(0), 0x61)
}

fn tmr_6(abi: Abi) -> Outcome {
    need(abi)?;
    for deadline in [u64::MAX, u64::MAX - 1, 1 << 63, 1 << 62] {
        arm(abi, deadline, 0x61)?;
        holds("it does not fire", !irq::wait(irq::SHORT / 20))?;
    }
    Ok(())
}

fn stl_1(abi: Abi) -> Outcome {
    abi.need(Feature::StolenTime)?;
    check("it begins at 0", get(page(0) + at!(stolen) + 8), 0)?;
    let (start, mut last) = (cpu::tsc(), 0);
    while cpu::tsc().wrapping_sub(start) < irq::SHORT * 5 {
        irq::open();
        let ns = get(page(0) + at!(stolen) + 8);
        holds("it does not decrease", ns >= last)?;
        last = ns;
    }
    holds("it is less than the time that has passed, by far", last < 60_000_000_000)
}

fn stl_2(abi: Abi) -> Outcome {
    abi.need(Feature::StolenTime)?;
    for _ in 0..100 {
        irq::open();
        check("even", get(page(0) + at!(stolen)) & 1, 0)?;
    }
    Ok(())
}
