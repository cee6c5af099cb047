//! MEM, TLB and FREE: arrays of updates and of free pages, remote invalidation.

use crate::abi::{Abi, NOT_RAM, Outcome, check, fill, get, get8, holds, page, put, put8, ram_end, store, sum};
use crate::calls::window;
use crate::{Kind, Test};
use core::arch::asm;
use guest_rt::paging::{self, PRESENT_WRITABLE};
use guest_rt::{cpu, info};
use pv_abi::call::{ALL_ONES, Call, Error};
use pv_abi::feature::Feature;
use pv_abi::memory::Update;

pub(crate) const TESTS: &[Test] = &[
    ("MEM-1", "arrays that are too long, misaligned or not RAM", Kind::Ready(mem_1)),
    ("MEM-2", "empty arrays", Kind::Ready(mem_2)),
    ("MEM-3", "elements are applied in order", Kind::Ready(mem_3)),
    ("MEM-4", "a wrong element stops the call", Kind::Ready(mem_4)),
    ("MEM-5", "a call that stops early gets on", Kind::Ready(mem_5)),
    ("MEM-6", "the array stays as it is", Kind::Ready(mem_6)),
    ("MEM-7", "operations that nobody knows", Kind::Ready(mem_7)),
    ("MEM-8", "entries that are not RAM", Kind::Ready(mem_8)),
    ("MEM-9", "an entry that is code", Kind::Ready(mem_9)),
    ("MEM-10", "an array that changes itself", Kind::Ready(mem_10)),
    ("MEM-11", "pages are invalidated", Kind::Ready(mem_11)),
    ("MEM-12", "spaces are invalidated", Kind::Ready(mem_12)),
    ("MEM-13", "another root", Kind::Ready(mem_13)),
    ("MEM-14", "huge numbers of pages", Kind::Ready(mem_14)),
    ("TLB-1", "translations are gone", Kind::Ready(tlb_1)),
    ("TLB-2", "ranges that are none", Kind::Ready(tlb_2)),
    ("TLB-3", "vCPUs that do not exist", Kind::Ready(tlb_3)),
    ("FREE-1", "ranges that are none", Kind::Ready(free_1)),
    ("FREE-2", "freed pages are memory again", Kind::Ready(free_2)),
    ("FREE-3", "other pages are left alone", Kind::Ready(free_3)),
];

/// Has an array in scratch page 10 worked off to its end or first error; how often the call was made comes second.
fn update(abi: Abi, updates: &[Update]) -> (crate::abi::Answer, u64) {
    store(page(10), updates);
    let (mut done, mut calls) = (0, 0);
    loop {
        let count = updates.len() as u64 - done;
        let mut answer = abi.call(Call::UpdatePages, &[page(10) + 16 * done, count]);
        calls += 1;
        done += answer.rdx;
        if answer.rax != 0 || done >= updates.len() as u64 || answer.rdx == 0 {
            answer.rdx = done;
            return (answer, calls);
        }
    }
}

fn mem_1(abi: Abi) -> Outcome {
    let [limit, ..] = abi.limits();
    for (call, feature) in [(Call::UpdatePages, Feature::PageTables), (Call::FreePages, Feature::FreePages)] {
        if !abi.offered.has(feature) {
            continue;
        }
        for count in [limit + 1, 1 << 32, 1 << 60, u64::MAX] {
            abi.call(call, &[page(10), count]).fails("too long", Error::TooMany)?;
            abi.call(call, &[3, count]).fails("the length goes first", Error::TooMany)?;
        }
        for bad in [1, 8, 15] {
            abi.call(call, &[page(10) + bad, 1]).fails("misaligned", Error::BadAddress)?;
        }
        for bad in NOT_RAM.into_iter().chain([ram_end(), ram_end() - 16, 0_u64.wrapping_sub(16)]) {
            abi.call(call, &[bad, 2]).fails("not RAM in the whole length", Error::BadAddress)?;
        }
    }
    abi.need(Feature::PageTables)
}

fn mem_2(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    abi.call(Call::UpdatePages, &[page(10), 0]).gives("no elements", 0)?;
    abi.call(Call::UpdatePages, &[0, 0]).gives("no elements at 0", 0)?;
    abi.call(Call::UpdatePages, &[page(10) + 8, 0]).fails("misaligned", Error::BadAddress)
}

fn mem_3(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let list: [Update; 200] = core::array::from_fn(|n| Update::set_entry(page(1) + n as u64 % 7 * 8, n as u64));
    update(abi, &list).0.gives("all of them", 200)?;
    for n in 0..7 {
        let last = (0..200).rev().find(|i| i % 7 == n).unwrap_or(0);
        check("the last one counts", get(page(1) + 8 * n), last)?;
    }
    Ok(())
}

fn mem_4(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    for bad in [0, 1, 5, 126, 127, 128, 199] {
        fill(page(1), 0);
        let mut list: [Update; 200] =
            core::array::from_fn(|n| Update::set_entry(page(1) + n as u64 * 8, 0x1000 + n as u64));
        list[bad] = Update { target: 7, value: 0 };
        update(abi, &list).0.stops("the wrong one", Error::InvalidArgument, bad as u64)?;
        for n in 0..200 {
            let want = if n < bad as u64 { 0x1000 + n } else { 0 };
            check("elements before it, and those behind", get(page(1) + 8 * n), want)?;
        }
    }
    Ok(())
}

fn mem_5(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let list: [Update; 255] = core::array::from_fn(|n| Update::set_entry(page(1) + n as u64 * 8, n as u64));
    // With an interrupt that waits, a call may stop early; it must get on all the same.
    crate::irq::apic().send_self(0x60);
    let (answer, calls) = update(abi, &list);
    answer.gives("all in the end", 255)?;
    holds("each call got on", calls <= 255)?;
    check("the last one", get(page(1) + 8 * 254), 254)
}

fn mem_6(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let list = [Update::set_entry(page(1), 1), Update::invalidate(0, 3), Update::invalidate_all(), Update::default()];
    store(page(10), &list);
    let before = sum(page(10));
    update(abi, &list).0.stops("the last one", Error::InvalidArgument, 3)?;
    check("the array", sum(page(10)), before)
}

fn mem_7(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    for target in [0, 6, 7, page(1), page(1) + 6, page(1) + 7, !7] {
        update(abi, &[Update { target, value: 0 }]).0.fails("operation", Error::InvalidArgument)?;
    }
    Ok(())
}

fn mem_8(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    for bad in NOT_RAM.into_iter().chain([ram_end(), 0xfee0_00b0, 0xfee0_0300, !7]) {
        let list = [Update::set_entry(page(1), 5), Update::set_entry(bad, 0x4_0060)];
        update(abi, &list).0.stops("no RAM", Error::BadAddress, 1)?;
    }
    // Any value is stored as it is, and nothing beside it.
    for value in [0, u64::MAX, 0x8000_0000_0000_0001] {
        fill(page(1), 0x33);
        update(abi, &[Update::set_entry(page(1) + 16, value)]).0.gives("a value", 1)?;
        check("it", get(page(1) + 16), value)?;
        check("before it", get(page(1) + 8), 0x3333_3333_3333_3333)?;
        check("behind it", get(page(1) + 24), 0x3333_3333_3333_3333)?;
    }
    update(abi, &[Update::set_entry(ram_end() - 8, 1)]).0.gives("the last entry of RAM", 1)
}

fn mem_9(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let code = page(11);
    let run = || {
        let value: u64;
        // SAFETY: the page holds `mov eax, N; ret`.
        unsafe { asm!("call {}", in(reg) code, out("rax") value) };
        value
    };
    for n in 1..50_u64 {
        // b8 NN NN NN NN c3
        update(abi, &[Update::set_entry(code, 0xb8 | n << 8 | 0xc3 << 40)]).0.gives("SET_ENTRY", 1)?;
        check("the code", run(), n)?;
    }
    Ok(())
}

fn mem_10(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let array = page(10);
    // The first turns the second into another entry, and the last overwrites itself.
    let second = Update::set_entry(page(1) + 8, 2);
    let list = [
        Update::set_entry(array + 16, second.target),
        Update::set_entry(page(1), 1),
        Update::set_entry(array + 32, u64::MAX),
    ];
    put(page(1), 0);
    put(page(1) + 8, 0);
    update(abi, &list).0.gives("all of them", 3)?;
    let stored = (get(page(1)), get(page(1) + 8));
    holds("the second, before or after", stored == (1, 0) || stored == (0, 1))?;
    check("its own place", get(array + 32), u64::MAX)?;
    // An element that becomes a bad one is either applied as it was or refused.
    let list = [Update::set_entry(array + 16, 0xfee0_0000 | 1), Update::set_entry(page(1), 9)];
    let (answer, _) = update(abi, &list);
    holds(
        "as it was, or refused",
        answer.rax == 0 && answer.rdx == 2 || answer.rax == Error::BadAddress.to_rax() && answer.rdx == 1,
    )
}

const GLOBAL: u64 = 1 << 8;

/// A page in the window shows page A, which the TLB knows, and its entry then points to page B.
fn stale(n: usize, global: u64) -> u64 {
    let w = window();
    put(page(12), 0xaaaa);
    put(page(13), 0xbbbb);
    w.map(n, page(12) | PRESENT_WRITABLE | global);
    let _ = get(w.address(n));
    w.address(n)
}

fn global_pages(on: bool) {
    // SAFETY: PGE may change at any time; nothing else does.
    unsafe {
        let cr4: u64;
        asm!("mov {}, cr4", out(reg) cr4);
        let cr4 = if on { cr4 | 1 << 7 } else { cr4 & !(1 << 7) };
        asm!("mov cr4, {}", in(reg) cr4);
    }
}

fn mem_11(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let w = window();
    for global in [0, GLOBAL] {
        global_pages(global != 0);
        let at = stale(5, global);
        let next = stale(6, global);
        let to = page(13) | PRESENT_WRITABLE | global;
        let list =
            [Update::set_entry(w.entry_gpa(5), to), Update::set_entry(w.entry_gpa(6), to), Update::invalidate(at, 1)];
        let (answer, _) = update(abi, &list);
        let got = (get(at), get(next));
        global_pages(false);
        answer.gives("INVALIDATE_PAGE", 3)?;
        check("the page", got.0, 0xbbbb)?;
        check("the one behind it", got.1, 0xbbbb)?;
    }
    for bad in [0x1008, 0x1800, 0xff8] {
        update(abi, &[Update { target: bad | 2, value: 0 }]).0.fails("no page", Error::InvalidArgument)?;
    }
    update(abi, &[Update { target: 0x1000 | 2, value: u64::MAX }]).0.fails("all ones", Error::InvalidArgument)?;
    update(abi, &[Update { target: 0x1234_5678_9abc_d000 | 2, value: 1 }]).0.gives("a non-canonical address", 1)
}

fn mem_12(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let w = window();
    for (global, last) in
        [(0, Update::invalidate_space()), (0, Update::invalidate_all()), (GLOBAL, Update::invalidate_all())]
    {
        global_pages(global != 0);
        let at = stale(7, global);
        let (answer, _) = update(abi, &[Update::set_entry(w.entry_gpa(7), page(13) | PRESENT_WRITABLE | global), last]);
        let got = get(at);
        global_pages(false);
        answer.gives("the operation", 2)?;
        check("the page", got, 0xbbbb)?;
    }
    for operation in [3, 4] {
        for (target, value) in [(8, 0), (0, 1), (1 << 63, 0), (0, 1 << 63)] {
            let bad = Update { target: target | operation, value };
            update(abi, &[bad]).0.fails("not 0", Error::InvalidArgument)?;
        }
    }
    Ok(())
}

fn mem_13(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let at = stale(8, 0);
    let root = page(8);
    for n in 0..512 {
        put(root + 8 * n, get(paging::boot_root() + 8 * n));
    }
    let w = window();
    // SAFETY: reads a register.
    let old = unsafe { cpu::read_cr3() };
    let (answer, _) =
        update(abi, &[Update::set_entry(w.entry_gpa(8), page(13) | PRESENT_WRITABLE), Update::set_root(root)]);
    // SAFETY: reads a register.
    let new = unsafe { cpu::read_cr3() };
    let got = get(at);
    let bad = [root | 1 << 63, root | 1 << 62, root | 1 << 52].map(|v| update(abi, &[Update::set_root(v)]).0);
    let target = update(abi, &[Update { target: 8 | 5, value: root }]).0;
    // SAFETY: the root from before.
    unsafe { cpu::write_cr3(old) };
    answer.gives("SET_ROOT", 2)?;
    check("CR3", new, root)?;
    check("old translations are gone", got, 0xbbbb)?;
    for b in bad {
        b.fails("what MOV to CR3 refuses", Error::InvalidArgument)?;
    }
    target.fails("target", Error::InvalidArgument)
}

fn mem_14(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    let w = window();
    let at = stale(9, 0);
    let start = cpu::tsc();
    for value in [1000, 1 << 20, 1 << 40, u64::MAX - 1] {
        w.set(9, page(12) | PRESENT_WRITABLE);
        update(
            abi,
            &[Update::set_entry(w.entry_gpa(9), page(13) | PRESENT_WRITABLE), Update { target: at | 2, value }],
        )
        .0
        .gives("INVALIDATE_PAGE", 2)?;
        check("the page", get(at), 0xbbbb)?;
    }
    holds("it takes no time that counts", cpu::tsc().wrapping_sub(start) < irq_second())
}

/// Ticks of about a second: far from what 2^40 invalidations would take.
fn irq_second() -> u64 {
    2 * crate::irq::LONG
}

fn tlb_1(abi: Abi) -> Outcome {
    abi.need(Feature::TlbFlush)?;
    let w = window();
    for (address, pages) in [(0, 1), (0, 100), (0, 1 << 40), (ALL_ONES, 0)] {
        let at = stale(10, 0);
        w.set(10, page(13) | PRESENT_WRITABLE);
        let address = if address == ALL_ONES { address } else { at };
        abi.call(Call::FlushTlb, &[1, 0, address, pages]).gives("FLUSH_TLB", 1)?;
        check("the page", get(at), 0xbbbb)?;
    }
    Ok(())
}

fn tlb_2(abi: Abi) -> Outcome {
    abi.need(Feature::TlbFlush)?;
    for (address, pages) in [(ALL_ONES, 1), (ALL_ONES, u64::MAX), (0x1001, 1), (0x1800, 1), (0x1000, 0)] {
        abi.call(Call::FlushTlb, &[1, 0, address, pages]).fails("range", Error::InvalidArgument)?;
    }
    abi.call(Call::FlushTlb, &[u64::MAX, 0, 1, 1]).fails("the range goes first", Error::InvalidArgument)
}

fn tlb_3(abi: Abi) -> Outcome {
    abi.need(Feature::TlbFlush)?;
    let vcpus = abi.limits()[1];
    for (mask, first) in
        [(1, vcpus), (1 << 63, 0), (1, u64::MAX), (2, u64::MAX), (u64::MAX, u64::MAX - 5), (1, 1 << 32)]
    {
        abi.call(Call::FlushTlb, &[mask, first, ALL_ONES, 0]).fails("vCPU", Error::NoSuchTarget)?;
    }
    abi.call(Call::FlushTlb, &[0, 0, ALL_ONES, 0]).gives("nobody", 0)
}

/// Has ranges given up: pairs of address and pages.
fn free(abi: Abi, ranges: &[(u64, u64)]) -> crate::abi::Answer {
    for (n, (gpa, pages)) in (0..).zip(ranges) {
        put(page(10) + 16 * n, *gpa);
        put(page(10) + 16 * n + 8, *pages);
    }
    abi.call(Call::FreePages, &[page(10), ranges.len() as u64])
}

fn free_1(abi: Abi) -> Outcome {
    abi.need(Feature::FreePages)?;
    let good = (page(14), 1);
    for bad in [(page(14) + 8, 1), (page(14), 0), (page(14), (1 << 18) + 1), (page(14), u64::MAX), (page(14), 1 << 52)]
    {
        free(abi, &[good, bad]).stops("range", Error::InvalidArgument, 1)?;
    }
    for at in NOT_RAM.into_iter().chain([ram_end(), ram_end() - 4096]) {
        free(abi, &[good, (at, 2)]).stops("no RAM", Error::BadAddress, 1)?;
    }
    Ok(())
}

fn free_2(abi: Abi) -> Outcome {
    abi.need(Feature::FreePages)?;
    let (start, bytes) = info::free_ram();
    // A range with many pages, at both ends aligned to nothing but pages.
    let at = start + 4096 * 3;
    let pages = 1000.min(bytes / 4096 - 8);
    for n in 0..pages {
        fill(at + 4096 * n, 0x5a);
    }
    free(abi, &[(at, pages)]).gives("FREE_PAGES", 1)?;
    for n in 0..pages {
        put8(at + 4096 * n + 100, 0x77);
        check("what was written", get8(at + 4096 * n + 100).into(), 0x77)?;
        for offset in [0, 99, 101, 4095] {
            let byte = get8(at + 4096 * n + offset);
            holds("what was not written", byte == 0 || byte == 0x5a)?;
        }
    }
    Ok(())
}

fn free_3(abi: Abi) -> Outcome {
    abi.need(Feature::FreePages)?;
    for n in 14..20 {
        fill(page(n), n as u8);
    }
    free(abi, &[(page(15), 1), (page(17), 2)]).gives("FREE_PAGES", 2)?;
    for n in [14, 16, 19] {
        holds("a page beside", (0..4096).all(|at| get8(page(n) + at) == n as u8))?;
    }
    Ok(())
}
