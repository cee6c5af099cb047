//! VIF, EOI and IPI: interrupts that the shared page masks, that need no end, and that are sent.

use crate::abi::{Abi, Outcome, check, get8, holds, page, put8};
use crate::at;
use crate::irq;
use crate::{Kind, Test};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use guest_rt::apic::register::{LVT_TIMER, TIMER_DIVIDE, TIMER_INITIAL};
use guest_rt::{cpu, fault};
use pv_abi::call::{Call, Error};
use pv_abi::feature::Feature;

pub(crate) const TESTS: &[Test] = &[
    ("VIF-1", "the byte masks interrupts and nothing else", Kind::Ready(vif_1)),
    ("VIF-2", "an interrupt held back is noted", Kind::Ready(vif_2)),
    ("VIF-3", "a delivery takes the note away", Kind::Ready(vif_3)),
    ("VIF-4", "UNMASK delivers at once", Kind::Ready(vif_4)),
    ("VIF-5", "nothing is lost", Kind::Ready(vif_5)),
    ("VIF-6", "HLT while the byte masks", Kind::Ready(vif_6)),
    ("VIF-7", "without page or feature the byte does not matter", Kind::Ready(vif_7)),
    ("EOI-1", "the bit is set only where nobody else waits", Kind::Ready(eoi_1)),
    ("EOI-2", "clearing the bit ends the interrupt", Kind::Ready(eoi_2)),
    ("EOI-3", "the offer is taken back", Kind::Ready(eoi_3)),
    ("EOI-4", "the EOI register works beside it", Kind::Ready(eoi_4)),
    ("EOI-5", "other bits are 0", Kind::Ready(eoi_5)),
    ("IPI-1", "an interrupt to oneself", Kind::Ready(ipi_1)),
    ("IPI-2", "vectors that are none", Kind::Ready(ipi_2)),
    ("IPI-3", "vCPUs that do not exist", Kind::Ready(ipi_3)),
    ("IPI-4", "it comes before the next instruction", Kind::Ready(ipi_4)),
];

fn enabled(value: u8) {
    put8(page(0) + at!(irq_enabled), value);
}

fn pending() -> u64 {
    get8(page(0) + at!(irq_pending)).into()
}

fn unmask(abi: Abi) -> Outcome {
    enabled(1);
    abi.call(Call::Unmask, &[]).gives("UNMASK", 0)
}

fn vif_1(abi: Abi) -> Outcome {
    abi.need(Feature::VirtualIf)?;
    enabled(0);
    irq::apic().send_self(0x60);
    irq::open();
    check("masked", irq::count(), 0)?;
    // SAFETY: an undefined instruction, and an interrupt instruction whose vector has a handler that sends an EOI too many, to no effect.
    let (trap, faulted) = unsafe { fault!("ud2") };
    holds("exceptions come", faulted && trap.frame.vector == 6)?;
    irq::hook(Some(|_| ()));
    // SAFETY: as above.
    unsafe { asm!("int 0x44") };
    irq::hook(None);
    check("INT n comes", irq::order(0), 0x44)?;
    check("and nothing else", irq::count(), 1)?;
    unmask(abi)?;
    check("RFLAGS.IF masks too", irq::count(), 1)?;
    irq::open();
    check("both are set", irq::order(1), 0x60)?;
    for value in [2, 0x80, 0xff] {
        irq::forget();
        enabled(value);
        irq::apic().send_self(0x60);
        irq::open();
        check("any value but 0 lets interrupts through", irq::count(), 1)?;
    }
    Ok(())
}

fn vif_2(abi: Abi) -> Outcome {
    abi.need(Feature::VirtualIf)?;
    check("nothing waits", pending(), 0)?;
    enabled(0);
    irq::apic().send_self(0x60);
    irq::open();
    check("something waits", pending(), 1)
}

fn vif_3(abi: Abi) -> Outcome {
    vif_2(abi)?;
    irq::hook(Some(|_| {
        SEEN.store(
            u64::from(get8(page(0) + at!(irq_enabled))) << 8 | u64::from(get8(page(0) + at!(irq_pending))),
            Relaxed,
        );
        irq::apic().eoi();
    }));
    enabled(1);
    // SAFETY: all vectors have handlers.
    unsafe { cpu::sti() };
    let answer = abi.call(Call::Unmask, &[]);
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    answer.gives("UNMASK", 0)?;
    check("enabled and pending in the handler", SEEN.load(Relaxed), 0x100)?;
    check("pending behind it", pending(), 0)
}

static SEEN: AtomicU64 = AtomicU64::new(0);

fn vif_4(abi: Abi) -> Outcome {
    abi.need(Feature::VirtualIf)?;
    for _ in 0..100 {
        irq::forget();
        enabled(0);
        irq::apic().send_self(0x60);
        // SAFETY: all vectors have handlers.
        unsafe { cpu::sti() };
        core::hint::spin_loop();
        let before = irq::count();
        enabled(1);
        abi.call(Call::Unmask, &[]).gives("UNMASK", 0)?;
        let behind = irq::count();
        // SAFETY: CPL 0.
        unsafe { cpu::cli() };
        check("before", before, 0)?;
        check("behind", behind, 1)?;
    }
    abi.call(Call::Unmask, &[]).gives("with nothing to do", 0)?;
    abi.call(Call::SharePage, &[0]).gives("SHARE_PAGE", 0)?;
    abi.call(Call::Unmask, &[]).gives("without a page", 0)
}

fn vif_5(abi: Abi) -> Outcome {
    abi.need(Feature::VirtualIf)?;
    // The guest's protocol, with a timer that hits anywhere.
    let apic = irq::apic();
    let before = irq::seen(0x65);
    apic.write(TIMER_DIVIDE, 0b1011);
    apic.write(LVT_TIMER, 0x65);
    let mut fired = 0;
    let mut outcome = Ok(());
    // SAFETY: all vectors have handlers.
    unsafe { cpu::sti() };
    for n in 0..200_u32 {
        enabled(0);
        irq::forget();
        apic.write(TIMER_INITIAL, 1000 + n * 300);
        let start = cpu::tsc();
        while cpu::tsc().wrapping_sub(start) < 30_000 {
            core::hint::spin_loop();
        }
        let early = irq::count();
        enabled(1);
        if pending() != 0 {
            outcome = abi.call(Call::Unmask, &[]).gives("UNMASK", 0);
        }
        let start = cpu::tsc();
        while irq::count() == 0 && cpu::tsc().wrapping_sub(start) < irq::LONG {
            core::hint::spin_loop();
        }
        fired += 1;
        if early != 0 || irq::count() != 1 || outcome.is_err() {
            break;
        }
    }
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    apic.write(LVT_TIMER, 1 << 16);
    outcome?;
    check("each came once", (irq::seen(0x65) - before).into(), fired)?;
    check("all of them", fired, 200)
}

fn vif_6(abi: Abi) -> Outcome {
    abi.need(Feature::VirtualIf)?;
    enabled(0);
    irq::apic().send_self(0x60);
    // SAFETY: the hypervisor ends the halt, which is the clause.
    unsafe { asm!("sti", "hlt", "cli") };
    check("nothing was delivered", irq::count(), 0)?;
    check("something waits", pending(), 1)?;
    unmask(abi)?;
    irq::open();
    check("it comes", irq::order(0), 0x60)
}

fn vif_7(abi: Abi) -> Outcome {
    abi.need(Feature::VirtualIf)?;
    abi.begin_with(abi.offered.without(Feature::VirtualIf))?;
    enabled(0);
    irq::apic().send_self(0x60);
    irq::open();
    check("without the feature", irq::count(), 1)?;
    check("nothing is noted", pending(), 0)?;
    abi.begin()?;
    enabled(0);
    abi.call(Call::SharePage, &[0]).gives("SHARE_PAGE", 0)?;
    irq::apic().send_self(0x61);
    irq::open();
    check("without the page", irq::count(), 2)
}

/// BTR of bit 0 of eoi: whether it was set.
fn take_eoi() -> bool {
    let was: u8;
    // SAFETY: the word is in the shared page, a scratch page.
    unsafe { asm!("btr dword ptr [{}], 0", "setc {}", in(reg) page(0) + at!(eoi), out(reg_byte) was) };
    was != 0
}

fn eoi_bits() -> u64 {
    crate::abi::get(page(0)) >> 32
}

/// Whether the interrupt in the handler came with the bit, for each by its order.
static OFFERED: AtomicU64 = AtomicU64::new(0);

fn eoi_1(abi: Abi) -> Outcome {
    abi.need(Feature::LazyEoi)?;
    OFFERED.store(0, Relaxed);
    irq::hook(Some(|_| {
        OFFERED.store(OFFERED.load(Relaxed) << 1 | eoi_bits() & 1, Relaxed);
        if !take_eoi() {
            irq::apic().eoi();
        }
    }));
    irq::apic().send_self(0x60);
    irq::apic().send_self(0x70);
    irq::open();
    irq::open();
    check("both came", irq::count(), 2)?;
    check("the higher one first", irq::order(0), 0x70)?;
    check("the first came without the bit", OFFERED.load(Relaxed) >> 1, 0)?;
    holds("nothing is in service", !irq::in_service())
}

fn eoi_2(abi: Abi) -> Outcome {
    abi.need(Feature::LazyEoi)?;
    OFFERED.store(0, Relaxed);
    irq::hook(Some(|_| {
        if take_eoi() {
            OFFERED.fetch_add(1, Relaxed);
        } else {
            irq::apic().eoi();
        }
    }));
    for n in 0..50 {
        irq::apic().send_self(0x60 + (n & 7));
        irq::open();
        check("the next one comes", irq::count(), u64::from(n) + 1)?;
    }
    holds("nothing is in service", !irq::in_service())?;
    holds("the bit was offered for lone interrupts", OFFERED.load(Relaxed) > 0)
}

fn eoi_3(abi: Abi) -> Outcome {
    abi.need(Feature::LazyEoi)?;
    SEEN.store(0, Relaxed);
    irq::hook(Some(|v| {
        if v == 0x60 {
            irq::apic().send_self(0x50);
            SEEN.store(0x100 | eoi_bits() & 1, Relaxed);
        }
        if !take_eoi() {
            irq::apic().eoi();
        }
    }));
    irq::apic().send_self(0x60);
    irq::open();
    irq::open();
    check("the bit behind another request", SEEN.load(Relaxed), 0x100)?;
    check("the first", irq::order(0), 0x60)?;
    check("the second", irq::order(1), 0x50)?;
    holds("nothing is in service", !irq::in_service())
}

fn eoi_4(abi: Abi) -> Outcome {
    abi.need(Feature::LazyEoi)?;
    irq::hook(None);
    for n in 1..20 {
        irq::apic().send_self(0x60);
        irq::open();
        check("the next one comes", irq::count(), n)?;
        check("the bit", eoi_bits() & 1, 0)?;
    }
    holds("nothing is in service", !irq::in_service())
}

fn eoi_5(abi: Abi) -> Outcome {
    abi.need(Feature::LazyEoi)?;
    SEEN.store(0, Relaxed);
    irq::hook(Some(|_| {
        SEEN.fetch_or(eoi_bits(), Relaxed);
        if !take_eoi() {
            irq::apic().eoi();
        }
    }));
    for _ in 0..5 {
        irq::apic().send_self(0x60);
        irq::open();
    }
    check("bits 1-31", SEEN.load(Relaxed) & !1, 0)
}

fn ipi_1(abi: Abi) -> Outcome {
    abi.need(Feature::Ipi)?;
    for v in [32, 0x60, 254] {
        irq::forget();
        abi.call(Call::SendIpi, &[1, 0, v]).gives("SEND_IPI", 1)?;
        check("not while interrupts are disabled", irq::count(), 0)?;
        irq::open();
        check("it comes", irq::order(0), v)?;
        check("once", irq::count(), 1)?;
    }
    Ok(())
}

fn ipi_2(abi: Abi) -> Outcome {
    abi.need(Feature::Ipi)?;
    for bad in [0, 14, 31, 256, 0x1_0060, u64::MAX] {
        abi.call(Call::SendIpi, &[1, 0, bad]).fails("vector", Error::InvalidArgument)?;
        abi.call(Call::SendIpi, &[u64::MAX, 0, bad]).fails("the vector goes first", Error::InvalidArgument)?;
    }
    irq::open();
    check("nothing came", irq::count(), 0)
}

fn ipi_3(abi: Abi) -> Outcome {
    abi.need(Feature::Ipi)?;
    let vcpus = abi.limits()[1];
    for (mask, first) in
        [(1, vcpus), (1 | 1 << 63, 0), (1, u64::MAX), (3, u64::MAX), (u64::MAX, u64::MAX - 5), (1, 1 << 32)]
    {
        abi.call(Call::SendIpi, &[mask, first, 0x60]).fails("vCPU", Error::NoSuchTarget)?;
    }
    abi.call(Call::SendIpi, &[0, 0, 0x60]).gives("nobody", 0)?;
    irq::open();
    check("nothing came", irq::count(), 0)
}

fn ipi_4(abi: Abi) -> Outcome {
    abi.need(Feature::Ipi)?;
    for n in 1..100 {
        // SAFETY: all vectors have handlers.
        unsafe { cpu::sti() };
        let answer = abi.call(Call::SendIpi, &[1, 0, 0x60]);
        let behind = irq::count();
        // SAFETY: CPL 0.
        unsafe { cpu::cli() };
        answer.gives("SEND_IPI", 1)?;
        check("behind the call", behind, n)?;
    }
    Ok(())
}
