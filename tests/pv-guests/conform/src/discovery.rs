//! DISC and NEG: what CPUID says, and the agreement.

use crate::abi::{Abi, Outcome, Why, check, holds, leaf, page, put8};
use crate::at;
use crate::irq;
use crate::{Kind, Test};
use guest_rt::cpu;
use pv_abi::Version;
use pv_abi::call::{Call, Error};
use pv_abi::cpuid::{self, END, FIRST, STEP};
use pv_abi::feature::{Feature, Features};

pub(crate) const TESTS: &[Test] = &[
    // First of all: it needs a machine in which nothing was negotiated.
    ("NEG-6", "calls before the first agreement", Kind::Fresh(neg_6)),
    ("DISC-1", "the signature", Kind::Fresh(disc_1)),
    ("DISC-2", "the highest leaf", Kind::Fresh(disc_2)),
    ("DISC-3", "the version", Kind::Fresh(disc_3)),
    ("DISC-4", "feature bits that nobody knows", Kind::Fresh(disc_4)),
    ("DISC-5", "the vCPU's index, and constant leaves", Kind::Ready(disc_5)),
    ("DISC-6", "the entry sequence's length", Kind::Fresh(disc_6)),
    ("DISC-7", "the least limits", Kind::Fresh(disc_7)),
    ("DISC-8", "frequencies", Kind::Fresh(disc_8)),
    ("DISC-9", "other leaves and subleaves", Kind::Fresh(disc_9)),
    ("NEG-1", "an agreement gives what was asked for", Kind::Ready(neg_1)),
    ("NEG-2", "versions that nobody speaks", Kind::Ready(neg_2)),
    ("NEG-3", "features that are not on offer", Kind::Ready(neg_3)),
    ("NEG-4", "a failed agreement changes nothing", Kind::Ready(neg_4)),
    ("NEG-5", "a new agreement ends all that was before", Kind::Ready(neg_5)),
    ("NEG-7", "features that were not agreed on", Kind::Ready(neg_7)),
];

fn disc_1(abi: Abi) -> Outcome {
    check("hypervisor bit", u64::from(leaf(1)[2] >> 31), 1)?;
    holds("the base is at a multiple of 0x100", abi.base.is_multiple_of(STEP) && (FIRST..END).contains(&abi.base))?;
    let [_, b, c, d] = leaf(abi.base);
    holds("the signature", [b, c, d] == cpuid::signature_words())
}

fn disc_2(abi: Abi) -> Outcome {
    holds("the highest leaf is the interface's own", (abi.base + 3..abi.base + STEP).contains(&leaf(abi.base)[0]))
}

fn disc_3(abi: Abi) -> Outcome {
    let version = Version::from_bits(leaf(abi.base + cpuid::FEATURES)[0]);
    check("major version", version.major.into(), Version::CURRENT.major.into())?;
    holds("version", version >= Version::CURRENT)
}

fn disc_4(abi: Abi) -> Outcome {
    if Version::from_bits(leaf(abi.base + cpuid::FEATURES)[0]) != Version::CURRENT {
        return Err(Why::Absent("a version whose features this guest knows"));
    }
    check("unknown bits", abi.offered.0 & !Features::all().0, 0)
}

fn disc_5(abi: Abi) -> Outcome {
    let before = [1, 2, 3].map(|n| leaf(abi.base + n));
    check("index of the boot vCPU", before[0][3].into(), 0)?;
    abi.negotiate(Features::NONE).gives("NEGOTIATE", 0)?;
    holds("an agreement changes no leaf", before == [1, 2, 3].map(|n| leaf(abi.base + n)))
}

fn disc_6(abi: Abi) -> Outcome {
    let regs = leaf(abi.base + cpuid::ENTRY);
    let (code, len) = cpuid::entry_code(regs).ok_or(Why::Wrong { what: "length", got: regs[0].into(), want: 12 })?;
    holds("bytes behind it are 0", code[len..].iter().all(|&b| b == 0))?;
    holds("it returns", code[..len].contains(&0xc3) || code[..len].contains(&0xc2))
}

fn disc_7(abi: Abi) -> Outcome {
    let [elements, vcpus, text, devices] = abi.limits();
    holds("elements", elements >= 512)?;
    holds("vCPUs", vcpus >= 1)?;
    holds("text", text >= 256)?;
    holds("devices", devices <= 64 && (devices == 0 || abi.offered.has(Feature::Virtio)))
}

fn disc_8(abi: Abi) -> Outcome {
    if leaf(abi.base)[0] < abi.base + cpuid::TIMING {
        return Err(Why::Absent("the leaf"));
    }
    let [_, _, c, d] = leaf(abi.base + cpuid::TIMING);
    check("ECX", c.into(), 0)?;
    check("EDX", d.into(), 0)
}

fn disc_9(abi: Abi) -> Outcome {
    for n in (abi.base + 4..abi.base + cpuid::TIMING).chain(abi.base + cpuid::TIMING + 1..=leaf(abi.base)[0]) {
        holds("a leaf that nobody defines is 0", leaf(n) == [0; 4])?;
    }
    for n in [0, 1, 2, 3] {
        holds("subleaves do not matter", cpu::cpuid(abi.base + n, 7) == leaf(abi.base + n))?;
    }
    Ok(())
}

fn neg_1(abi: Abi) -> Outcome {
    abi.negotiate(Features::NONE).gives("nothing", 0)?;
    abi.negotiate(abi.offered).gives("everything", abi.offered.0)?;
    for f in Feature::ALL.into_iter().filter(|f| abi.offered.has(*f)) {
        abi.negotiate(Features::of(&[f])).gives("one", f.bit())?;
    }
    Ok(())
}

fn neg_2(abi: Abi) -> Outcome {
    let offered = u64::from(leaf(abi.base + cpuid::FEATURES)[0]);
    for bad in [0, offered + 1, offered + (1 << 16), 1, 0xffff_ffff, offered | 1 << 32, offered | 1 << 63, u64::MAX] {
        abi.call(Call::Negotiate, &[bad, 0]).fails("version", Error::BadVersion)?;
        abi.call(Call::Negotiate, &[bad, u64::MAX]).fails("the version goes first", Error::BadVersion)?;
    }
    Ok(())
}

fn neg_3(abi: Abi) -> Outcome {
    for bit in (0..64).filter(|bit| abi.offered.0 >> bit & 1 == 0) {
        abi.negotiate(Features(1 << bit)).fails("feature", Error::BadFeatures)?;
        abi.negotiate(Features(abi.offered.0 | 1 << bit)).fails("one too many", Error::BadFeatures)?;
    }
    Ok(())
}

/// Whether the hypervisor looks at scratch page 0: it holds an interrupt back when the page says so.
pub(crate) fn page_is_live(abi: Abi) -> Result<bool, Why> {
    abi.need(Feature::VirtualIf)?;
    irq::forget();
    put8(page(0) + at!(irq_enabled), 0);
    irq::apic().send_self(0x60);
    irq::open();
    let live = irq::count() == 0;
    put8(page(0) + at!(irq_enabled), 1);
    if live {
        abi.call(Call::Unmask, &[]).gives("UNMASK", 0)?;
        irq::open();
        check("the interrupt came later", irq::order(0), 0x60)?;
    }
    Ok(live)
}

fn neg_4(abi: Abi) -> Outcome {
    abi.call(Call::Negotiate, &[0, 0]).fails("version", Error::BadVersion)?;
    abi.negotiate(Features(1 << 63)).fails("feature", Error::BadFeatures)?;
    holds("the page is still shared", page_is_live(abi)?)
}

fn neg_5(abi: Abi) -> Outcome {
    holds("the page is shared", page_is_live(abi)?)?;
    let armed = abi.offered.has(Feature::Timer) && abi.offered.has(Feature::Clock);
    // On a slow machine the timer may have come before it can be disarmed: then once more, with more time.
    let mut scale = 1;
    loop {
        let deadline = if armed { abi.now() + 5_000_000 * scale } else { 0 };
        if armed {
            abi.call(Call::SetTimer, &[deadline, 0x61]).gives("SET_TIMER", 0)?;
        }
        put8(page(0) + at!(irq_enabled), 0);
        irq::apic().send_self(0x62);
        irq::open();
        irq::forget();
        let in_time = !armed || abi.now() + 2_500_000 * scale < deadline;
        abi.negotiate(abi.offered).gives("NEGOTIATE", abi.offered.0)?;
        irq::open();
        if in_time {
            break;
        }
        holds("the machine sets a timer and sends an interrupt within a quarter of a second", scale < 100)?;
        scale *= 4;
        irq::forget();
        abi.begin()?;
        holds("the page is shared again", page_is_live(abi)?)?;
    }
    check("what was held back comes through", irq::order(0), 0x62)?;
    irq::forget();
    holds("the timer is disarmed", !irq::wait(irq::SHORT * scale) || !armed)?;
    put8(page(0) + at!(irq_enabled), 0);
    irq::apic().send_self(0x63);
    irq::open();
    check("the page is no longer shared", irq::order(0), 0x63)?;
    if armed && abi.offered.has(Feature::Schedule) {
        abi.call(Call::Kick, &[0]).gives("KICK", 0)?;
        abi.begin()?;
        let deadline = abi.now() + 3_000_000;
        abi.call(Call::SetTimer, &[deadline, 0x61]).gives("SET_TIMER", 0)?;
        abi.call(Call::Halt, &[]).gives("HALT", 0)?;
        // SAFETY: HALT enables interrupts.
        unsafe { cpu::cli() };
        holds("the kick is forgotten", abi.now() >= deadline)?;
    }
    Ok(())
}

/// Arguments with which a call would be fine, or fail for another reason.
pub(crate) fn plausible(call: Call) -> [u64; 4] {
    match call {
        Call::SharePage => [page(0), 0, 0, 0],
        Call::UpdatePages | Call::FreePages | Call::ConsoleWrite | Call::ConsoleRead => [page(1), 0, 0, 0],
        Call::SetTimer => [0, 0x60, 0, 0],
        Call::SendIpi => [0, 0, 0x60, 0],
        Call::FlushTlb => [0, 0, u64::MAX, 0],
        Call::VirtioRead | Call::VirtioWrite => [0, 0, 4, 0],
        // It must fail before it ends the machine.
        Call::Panic => [u64::MAX, 1, 0, 0],
        Call::Shutdown => [7, 0, 0, 0],
        _ => [0; 4],
    }
}

fn neg_6(abi: Abi) -> Outcome {
    for call in Call::ALL.into_iter().filter(|c| *c != Call::Negotiate) {
        let wanted = match call.feature() {
            Some(f) if !abi.offered.has(f) => Error::NotSupported,
            _ => Error::NotNegotiated,
        };
        abi.raw(call.number(), plausible(call)).fails(call.name(), wanted)?;
    }
    Ok(())
}

fn neg_7(abi: Abi) -> Outcome {
    abi.negotiate(Features::NONE).gives("NEGOTIATE", 0)?;
    for call in Call::ALL {
        if let Some(f) = call.feature() {
            let wanted = if abi.offered.has(f) { Error::NotNegotiated } else { Error::NotSupported };
            abi.raw(call.number(), plausible(call)).fails(call.name(), wanted)?;
        }
    }
    abi.call(Call::SharePage, &[page(0)]).gives("SHARE_PAGE needs no feature", 0)
}
