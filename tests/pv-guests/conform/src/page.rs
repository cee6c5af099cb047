//! PAGE: the shared page.

use crate::abi::{Abi, NOT_RAM, Outcome, check, fill, get, get8, holds, page, put, put8, ram_end, sum};
use crate::at;
use crate::discovery::page_is_live;
use crate::irq;
use crate::{Kind, Test};
use guest_rt::{cpu, paging};
use pv_abi::call::{Call, Error};
use pv_abi::feature::{Feature, Features};

pub(crate) const TESTS: &[Test] = &[
    ("PAGE-1", "what is no page of RAM", Kind::Ready(page_1)),
    ("PAGE-2", "the page is filled", Kind::Ready(page_2)),
    ("PAGE-3", "an old page is left alone", Kind::Ready(page_3)),
    ("PAGE-4", "fields of other features are left alone", Kind::Ready(page_4)),
    ("PAGE-6", "unmapping the page under the hypervisor's feet", Kind::Ready(page_6)),
];

fn page_1(abi: Abi) -> Outcome {
    for bad in [1, 8, 2048, 4095] {
        abi.call(Call::SharePage, &[page(1) + bad]).fails("misaligned", Error::BadAddress)?;
    }
    for bad in NOT_RAM.into_iter().chain([ram_end(), u64::MAX - 4095, u64::MAX]) {
        abi.call(Call::SharePage, &[bad]).fails("no RAM", Error::BadAddress)?;
    }
    if abi.offered.has(Feature::VirtualIf) {
        holds("the page from before is still shared", page_is_live(abi)?)?;
    }
    Ok(())
}

fn page_2(abi: Abi) -> Outcome {
    fill(page(1), 0xee);
    abi.call(Call::SharePage, &[page(1)]).gives("SHARE_PAGE", 0)?;
    check("version", get(page(1)) & 0xffff_ffff, 0x1_0000)?;
    check("eoi", get(page(1)) >> 32, 0)?;
    check("irq_enabled, irq_pending, reserved", get(page(1) + 8), 1)?;
    check("events", get(page(1) + at!(events)), 0)?;
    check("doorbells", get(page(1) + at!(doorbells)), 0)?;
    check("a clock", u64::from(get(page(1) + at!(clock) + 8) != 0), abi.offered.has(Feature::Clock).into())?;
    check("stolen time", get(page(1) + at!(stolen) + 8), 0)?;
    let tail = at!(reserved1);
    holds("reserved bytes", (tail..4096).all(|n| get8(page(1) + n) == 0))?;
    abi.begin_with(Features::NONE)?;
    holds("no clock where it was not agreed on", (at!(clock)..4096).all(|n| get8(page(0) + n) == 0))
}

/// Makes everything happen that writes to the page.
fn provoke(abi: Abi) {
    irq::apic().send_self(0x60);
    irq::open();
    let _ = abi.call(Call::Unmask, &[]);
    let start = cpu::tsc();
    while cpu::tsc().wrapping_sub(start) < irq::SHORT {
        irq::open();
    }
    // SAFETY: moves the TSC and moves it back.
    unsafe {
        cpu::write_msr(0x3b, cpu::read_msr(0x3b).wrapping_add(1 << 20));
        cpu::write_msr(0x3b, cpu::read_msr(0x3b).wrapping_sub(1 << 20));
    }
}

fn page_3(abi: Abi) -> Outcome {
    for to in [page(1), 0] {
        abi.begin()?;
        abi.call(Call::SharePage, &[to]).gives("SHARE_PAGE", 0)?;
        fill(page(0), 0);
        let before = sum(page(0));
        irq::forget();
        provoke(abi);
        check("an interrupt came in spite of the old page's irq_enabled", irq::count(), 1)?;
        check("the old page", sum(page(0)), before)?;
    }
    Ok(())
}

fn page_4(abi: Abi) -> Outcome {
    abi.begin_with(Features::NONE)?;
    fill(page(0), 0xa5);
    let before = sum(page(0));
    provoke(abi);
    check("the page", sum(page(0)), before)
}

fn page_6(abi: Abi) -> Outcome {
    // The last 2 MiB of RAM, which the boot page tables map as one page.
    let top = ram_end() & !0x1f_ffff;
    let victim = if top == ram_end() { top - 0x20_0000 } else { top };
    holds("RAM is big enough", victim > page(crate::abi::PAGES - 1) + 0x20_0000)?;
    let root = get(paging::boot_root()) & !0xfff;
    let directory = get(root + 8 * (victim >> 30)) & 0xf_ffff_f000;
    let entry = directory + 8 * (victim >> 21 & 511);
    let mapped = get(entry);
    abi.call(Call::SharePage, &[victim]).gives("SHARE_PAGE", 0)?;
    put(entry, 0);
    // SAFETY: nothing of this guest is there; and back to the mapping from before.
    unsafe { cpu::invlpg(victim) };
    provoke(abi);
    let armed = abi.offered.has(Feature::Timer).then(|| abi.call(Call::SetTimer, &[1, 0x61]).rax);
    irq::open();
    let bad = abi.call(Call::SharePage, &[victim + 8]);
    put(entry, mapped);
    // SAFETY: as above.
    unsafe { cpu::invlpg(victim) };
    bad.fails("SHARE_PAGE", Error::BadAddress)?;
    check("SET_TIMER", armed.unwrap_or(0), 0)?;
    check("it was filled and is still there", get(victim) & 0xffff_ffff, 0x1_0000)?;
    // A page of junk: whatever the fields say, the machine goes on.
    fill(victim, 0xff);
    provoke(abi);
    // A page that is a page table and code at the same time.
    abi.call(Call::SharePage, &[page(9)]).gives("SHARE_PAGE", 0)?;
    put8(page(9) + 64, 0xc3);
    // SAFETY: a near return.
    unsafe { core::arch::asm!("call {}", in(reg) page(9) + 64) };
    provoke(abi);
    Ok(())
}
