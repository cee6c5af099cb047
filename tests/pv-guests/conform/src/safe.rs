//! SAFE and ORD: what holds for all calls together.

use crate::abi::{Abi, NOT_RAM, Outcome, check, get, holds, page, put, ram_end, store};
use crate::irq;
use crate::{Kind, Test};
use guest_rt::cpu;
use pv_abi::call::{Call, Error};
use pv_abi::feature::Feature;
use pv_abi::memory::Update;

pub(crate) const TESTS: &[Test] = &[
    ("SAFE-1", "every call refuses what is not RAM", Kind::Ready(safe_1)),
    ("SAFE-3", "calls end soon whatever is asked", Kind::Ready(safe_3)),
    ("ORD-1", "stores before a call, and behind it", Kind::Ready(ord_1)),
];

/// Calls that take an address and a length in elements of so many bytes.
const RANGES: [(Call, u64); 5] =
    [(Call::UpdatePages, 16), (Call::FreePages, 16), (Call::ConsoleWrite, 1), (Call::ConsoleRead, 1), (Call::Panic, 1)];

fn safe_1(abi: Abi) -> Outcome {
    for (call, size) in RANGES.into_iter().filter(|(c, _)| c.feature().is_some_and(|f| abi.offered.has(f))) {
        for at in NOT_RAM {
            abi.call(call, &[at, 1]).fails("no RAM", Error::BadAddress)?;
        }
        for (at, count) in [
            (ram_end(), 1),
            (ram_end() - 16, 16 / size + 1),
            (0xfedf_fff0, 256),
            (0_u64.wrapping_sub(16), 16 / size),
            (0_u64.wrapping_sub(16), 16 / size + 1),
            (1 << 63, 1),
        ] {
            abi.call(call, &[at, count]).fails("not in its whole length", Error::BadAddress)?;
        }
    }
    abi.call(Call::SharePage, &[ram_end()]).fails("SHARE_PAGE", Error::BadAddress)
}

fn safe_3(abi: Abi) -> Outcome {
    let [limit, _, text, _] = abi.limits();
    let start = cpu::tsc();
    if abi.offered.has(Feature::PageTables) {
        // All that an array can hold, each element asking for as much as it can. The array is free RAM.
        let (array, bytes) = guest_rt::info::free_ram();
        let count = limit.min(bytes / 16);
        for n in 0..count {
            store(array + 16 * n, &[Update { target: 2, value: u64::MAX - 1 }]);
        }
        let mut done = 0;
        while done < count {
            let answer = abi.call(Call::UpdatePages, &[array + 16 * done, count - done]);
            check("UPDATE_PAGES", answer.rax, 0)?;
            holds("it gets on", answer.rdx > 0)?;
            done += answer.rdx;
        }
    }
    if abi.offered.has(Feature::TlbFlush) {
        abi.call(Call::FlushTlb, &[1, 0, 0, u64::MAX]).gives("FLUSH_TLB", 1)?;
    }
    if abi.offered.has(Feature::Console) {
        let answer = abi.call(Call::ConsoleRead, &[page(1), text.min(4096)]);
        check("CONSOLE_READ", answer.rax, 0)?;
    }
    holds("a second or two", cpu::tsc().wrapping_sub(start) < 20 * irq::LONG)
}

fn ord_1(abi: Abi) -> Outcome {
    abi.need(Feature::PageTables)?;
    for n in 0..1000 {
        put(page(2), Update::set_entry(page(1), 0).target);
        put(page(2) + 8, n);
        abi.call(Call::UpdatePages, &[page(2), 1]).gives("UPDATE_PAGES", 1)?;
        check("behind the call", get(page(1)), n)?;
    }
    Ok(())
}
