//! SCH, CON and PWR: waiting, the console, power.

use crate::abi::{Abi, NOT_RAM, Outcome, check, fill, get8, holds, page, put8, ram_end};
use crate::at;
use crate::irq;
use crate::{Kind, Test};
use guest_rt::{cpu, print, println};
use pv_abi::call::{ALL_ONES, Call, Error};
use pv_abi::feature::Feature;

pub(crate) const TESTS: &[Test] = &[
    ("SCH-1", "HALT enables interrupts and waits", Kind::Ready(sch_1)),
    ("SCH-2", "HALT returns behind the handlers", Kind::Ready(sch_2)),
    ("SCH-3", "a kick ends the next halt, once", Kind::Ready(sch_3)),
    ("SCH-4", "vCPUs that do not exist", Kind::Ready(sch_4)),
    ("SCH-5", "YIELD", Kind::Ready(sch_5)),
    ("CON-1", "text in order with the serial port's", Kind::Ready(con_1)),
    ("CON-2", "nothing was typed", Kind::Ready(con_2)),
    ("CON-3", "texts that are too long or no RAM", Kind::Ready(con_3)),
    ("PWR-2", "shutdowns that nobody knows", Kind::Ready(pwr_2)),
    ("PWR-4", "panics whose text is no RAM", Kind::Ready(pwr_4)),
];

/// HALT with interrupts disabled; whether they are enabled behind it.
fn halt(abi: Abi) -> (crate::abi::Answer, bool) {
    let answer = abi.call(Call::Halt, &[]);
    let flags: u64;
    // SAFETY: reads the flags and disables interrupts.
    unsafe { core::arch::asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    (answer, flags >> 9 & 1 != 0)
}

fn sch_1(abi: Abi) -> Outcome {
    abi.need(Feature::Schedule)?;
    if abi.offered.has(Feature::VirtualIf) {
        put8(page(0) + at!(irq_enabled), 0);
    }
    // Pending before: nothing is lost.
    irq::apic().send_self(0x60);
    let (answer, enabled) = halt(abi);
    answer.gives("HALT", 0)?;
    holds("IF", enabled)?;
    check("irq_enabled", get8(page(0) + at!(irq_enabled)).into(), 1)?;
    check("the interrupt", irq::order(0), 0x60)
}

fn sch_2(abi: Abi) -> Outcome {
    abi.need(Feature::Schedule)?;
    abi.need(Feature::Timer)?;
    abi.need(Feature::Clock)?;
    let deadline = abi.now() + 3_000_000;
    abi.call(Call::SetTimer, &[deadline, 0x61]).gives("SET_TIMER", 0)?;
    let (answer, _) = halt(abi);
    answer.gives("HALT", 0)?;
    check("the handler ran", irq::order(0), 0x61)?;
    holds("it waited", abi.now() >= deadline)
}

fn sch_3(abi: Abi) -> Outcome {
    abi.need(Feature::Schedule)?;
    abi.need(Feature::Timer)?;
    abi.need(Feature::Clock)?;
    // Three kicks are one.
    for _ in 0..3 {
        abi.call(Call::Kick, &[0]).gives("KICK", 0)?;
    }
    let (answer, _) = halt(abi);
    answer.gives("HALT", 0)?;
    check("no interrupt", irq::count(), 0)?;
    let deadline = abi.now() + 3_000_000;
    abi.call(Call::SetTimer, &[deadline, 0x61]).gives("SET_TIMER", 0)?;
    halt(abi).0.gives("HALT", 0)?;
    holds("the second halt waits", abi.now() >= deadline)?;
    irq::forget();
    abi.call(Call::Kick, &[0]).gives("KICK", 0)?;
    // SAFETY: the kick ends the halt; all vectors have handlers.
    unsafe { core::arch::asm!("sti", "hlt", "cli") };
    check("HLT ends too", irq::count(), 0)
}

fn sch_4(abi: Abi) -> Outcome {
    abi.need(Feature::Schedule)?;
    let vcpus = abi.limits()[1];
    for bad in [vcpus, 64, 1 << 32, 1 << 63, u64::MAX - 1] {
        abi.call(Call::Kick, &[bad]).fails("KICK", Error::NoSuchTarget)?;
        abi.call(Call::Yield, &[bad]).fails("YIELD", Error::NoSuchTarget)?;
    }
    abi.call(Call::Kick, &[ALL_ONES]).fails("nobody can kick all", Error::NoSuchTarget)
}

fn sch_5(abi: Abi) -> Outcome {
    abi.need(Feature::Schedule)?;
    abi.call(Call::Yield, &[0]).gives("YIELD", 0)?;
    abi.call(Call::Yield, &[ALL_ONES]).gives("YIELD", 0)
}

fn put_text(at: u64, text: &[u8]) {
    for (n, b) in (at..).zip(text) {
        put8(n, *b);
    }
}

fn con_1(abi: Abi) -> Outcome {
    abi.need(Feature::Console)?;
    // Across a page boundary, from an odd address.
    let at = page(2) - 3;
    put_text(at, b"two, ");
    print!("# order: one, ");
    let mut done = 0;
    while done < 5 {
        let answer = abi.call(Call::ConsoleWrite, &[at + done, 5 - done]);
        check("CONSOLE_WRITE", answer.rax, 0)?;
        holds("it gets on", (1..=5 - done).contains(&answer.rdx))?;
        done += answer.rdx;
    }
    println!("three");
    Ok(())
}

fn con_2(abi: Abi) -> Outcome {
    abi.need(Feature::Console)?;
    fill(page(1), 0x11);
    let start = cpu::tsc();
    let answer = abi.call(Call::ConsoleRead, &[page(1) + 1, 100]);
    check("CONSOLE_READ", answer.rax, 0)?;
    holds("no more than asked", answer.rdx <= 100)?;
    holds("it does not wait", cpu::tsc().wrapping_sub(start) < irq::LONG)?;
    holds("memory behind", (1 + answer.rdx..4096).all(|n| get8(page(1) + n) == 0x11))
}

/// What [`con_3`] and [`pwr_4`] have in common.
fn texts(abi: Abi, call: Call) -> Outcome {
    let limit = abi.limits()[2];
    for bytes in [limit + 1, 1 << 32, u64::MAX] {
        abi.call(call, &[page(1), bytes]).fails("too long", Error::TooMany)?;
        abi.call(call, &[u64::MAX, bytes]).fails("the length goes first", Error::TooMany)?;
    }
    for at in NOT_RAM.into_iter().chain([ram_end(), ram_end() - 1, u64::MAX]) {
        abi.call(call, &[at, 2]).fails("no RAM", Error::BadAddress)?;
    }
    Ok(())
}

fn con_3(abi: Abi) -> Outcome {
    abi.need(Feature::Console)?;
    for call in [Call::ConsoleWrite, Call::ConsoleRead] {
        texts(abi, call)?;
        abi.call(call, &[page(1), 0]).gives("nothing", 0)?;
    }
    Ok(())
}

fn pwr_2(abi: Abi) -> Outcome {
    abi.need(Feature::Power)?;
    for bad in [2, 3, 1 << 32, 1 << 63, u64::MAX] {
        abi.call(Call::Shutdown, &[bad]).fails("SHUTDOWN", Error::InvalidArgument)?;
    }
    Ok(())
}

fn pwr_4(abi: Abi) -> Outcome {
    abi.need(Feature::Power)?;
    texts(abi, Call::Panic)
}
