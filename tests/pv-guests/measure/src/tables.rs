//! Page tables, TLB and address spaces.

use crate::harness::{Outcome, PIECES, Run, Timed, repeated, self_timed};
use guest_rt::paging::{PAGES, PRESENT_WRITABLE, Window, boot_root};
use guest_rt::{Page, cpu, info};
use guest_shim::{Batch, Slot};
use pv_abi::memory::FreeRange;

static mut PAIR: [Page; 2] = [const { Page::ZERO }; 2];

/// Addresses of two pages to map.
fn pair() -> [u64; 2] {
    [0, 1].map(|n| &raw const PAIR as u64 + 4096 * n)
}

/// A page of updates fits in every hypervisor's limit and lies in one piece.
#[repr(align(4096))]
struct Buffer([Slot; 256]);
static mut BUFFER: Buffer = Buffer([Slot::EMPTY; 256]);

/// An empty batch.
fn batch(run: &Run<'_>) -> Batch<'static> {
    let buffer = &raw mut BUFFER;
    // SAFETY: cases do not nest, and no case makes a second batch while it has one.
    Batch::new(run.machine.shim, unsafe { &mut (*buffer).0 })
}

/// Reads a byte of page `n` of the window.
fn touch(window: &Window, n: usize) {
    // SAFETY: the caller has mapped it.
    unsafe { core::ptr::read_volatile(window.address(n) as *const u64) };
}

/// Rounds of [`PAGES`] updates, each with its invalidation, that map two pages in turn. Nobody uses the pages.
pub(crate) fn updates(run: &Run<'_>) -> Outcome {
    let pages = pair();
    let rounds = run.count.div_ceil(PAGES as u64);
    let mut timed = Timed::default();
    for round in 0..rounds as usize {
        timed.add(PAGES as u64, || {
            let mut batch = batch(run);
            for n in 0..PAGES {
                // SAFETY: the window's entries are nobody else's.
                unsafe {
                    batch.set_entry(run.window.entry_gpa(n), pages[(round + n) % 2] | PRESENT_WRITABLE);
                    batch.invalidate(run.window.address(n), 0);
                }
            }
            batch.flush();
            assert!(batch.refused() == 0);
        });
    }
    Ok(timed)
}

/// Updates of `N` entries one after the other, each entry with its invalidation, that are certain to have been made after the `N`th; then
/// a load from each page, as whoever changes a page's mapping uses the page. `N` entries are mapped again and again.
pub(crate) fn updates_of<const N: usize>(run: &Run<'_>) -> Outcome {
    let pages = pair();
    for n in 0..N {
        run.window.map(n, pages[0] | PRESENT_WRITABLE);
    }
    let each_piece = (run.count / PIECES / N as u64).max(1);
    let mut timed = Timed::default();
    let mut round = 0;
    let mut updates = |rounds: u64| {
        for _ in 0..rounds {
            round += 1;
            let mut batch = batch(run);
            for n in 0..N {
                // SAFETY: the window's entries are nobody else's.
                unsafe {
                    batch.set_entry(run.window.entry_gpa(n), pages[round % 2] | PRESENT_WRITABLE);
                    batch.invalidate(run.window.address(n), 0);
                }
            }
            batch.flush();
            drop(batch);
            for n in 0..N {
                touch(run.window, n);
            }
        }
    };
    updates(1);
    for _ in 0..PIECES.min(run.count.div_ceil(N as u64)) {
        timed.add(each_piece * N as u64, || updates(each_piece));
    }
    Ok(timed)
}

/// As a kernel does it for one page: a store and INVLPG, or a batch of one. The page is not used in between.
pub(crate) fn modify_entry(run: &Run<'_>) -> Outcome {
    let pages = pair();
    let mut round = 0;
    repeated(run.count, || {
        round += 1;
        let mut batch = batch(run);
        // SAFETY: the window's entries are nobody else's.
        unsafe {
            batch.set_entry(run.window.entry_gpa(0), pages[round % 2] | PRESENT_WRITABLE);
            batch.invalidate(run.window.address(0), 0);
        }
    })
}

/// Maps 4096 pages, reads each, and unmaps them with one invalidation of the address space; operations are pages.
pub(crate) fn map_and_unmap(run: &Run<'_>) -> Outcome {
    let pages = pair();
    let mut timed = Timed::default();
    let all = || {
        let mut batch = batch(run);
        for n in 0..PAGES {
            // SAFETY: the window's entries are nobody else's. They were not present, so that there is nothing to invalidate.
            unsafe { batch.set_entry(run.window.entry_gpa(n), pages[n % 2] | PRESENT_WRITABLE) };
        }
        batch.flush();
        for n in 0..PAGES {
            touch(run.window, n);
        }
        for n in 0..PAGES {
            // SAFETY: as above.
            unsafe { batch.set_entry(run.window.entry_gpa(n), 0) };
        }
        // SAFETY: it drops cached translations.
        unsafe { batch.invalidate_space() };
        batch.flush();
    };
    for n in 0..PAGES {
        run.window.map(n, 0);
    }
    all();
    for _ in 0..(run.count / PAGES as u64).clamp(1, PIECES) {
        timed.add(PAGES as u64, all);
    }
    Ok(timed)
}

pub(crate) fn invalidate_page(run: &Run<'_>) -> Outcome {
    run.window.map(0, pair()[0] | PRESENT_WRITABLE);
    touch(run.window, 0);
    // SAFETY: CPL 0.
    repeated(run.count, || unsafe { cpu::invlpg(run.window.address(0)) })
}

/// Loads CR3 with what it holds.
pub(crate) fn load_root(run: &Run<'_>) -> Outcome {
    // SAFETY: CPL 0; the address space stays.
    repeated(run.count, || unsafe { cpu::write_cr3(boot_root()) })
}

/// Pages that a process touches between two switches.
const WORKING_SET: usize = 16;

/// Switches between two address spaces and reads 16 pages in each.
pub(crate) fn switch_spaces(run: &Run<'_>) -> Outcome {
    static mut SECOND: Page = Page::ZERO;
    let second = &raw mut SECOND;
    for n in 0..WORKING_SET {
        run.window.map(n, pair()[0] | PRESENT_WRITABLE);
    }
    // SAFETY: both are page tables of the same form, and nobody else uses the second.
    unsafe { core::ptr::copy_nonoverlapping(boot_root() as *const u8, second.cast(), 4096) };
    let roots = [boot_root(), second as u64];
    let mut now = 0;
    let mut switch = || {
        now ^= 1;
        // SAFETY: both address spaces map all of this program.
        unsafe { batch(run).set_root(roots[now]) };
        for n in 0..WORKING_SET {
            touch(run.window, n);
        }
    };
    let outcome = self_timed(run.count, |count| {
        let start = cpu::tsc_ordered();
        for _ in 0..count {
            switch();
        }
        cpu::tsc_ordered() - start
    });
    // SAFETY: as above.
    unsafe { cpu::write_cr3(boot_root()) };
    outcome
}

/// Pages of one range.
const RANGE: u64 = 16;

pub(crate) fn free_pages(run: &Run<'_>) -> Outcome {
    let (start, bytes) = info::free_ram();
    let pages = run.count.min(bytes >> 12) / RANGE * RANGE;
    // SAFETY: free RAM, mapped one to one: the pages have contents to lose.
    unsafe { core::ptr::write_bytes(start as *mut u8, 1, (pages << 12) as usize) };
    let mut ranges = [FreeRange { gpa: 0, pages: RANGE }; 32];
    let mut timed = Timed::default();
    while timed.done < pages {
        let count = ((pages - timed.done) / RANGE).min(ranges.len() as u64) as usize;
        for (n, r) in ranges[..count].iter_mut().enumerate() {
            r.gpa = start + ((timed.done + n as u64 * RANGE) << 12);
        }
        timed.add(count as u64 * RANGE, || {
            // SAFETY: nobody needs those pages.
            unsafe { run.machine.shim.free_pages(&ranges[..count]) };
        });
    }
    Ok(timed)
}
