//! Every feature at work, whichever way it takes.

use crate::device;
use crate::machine::{FLUSH, Machine, VECTOR, arrived};
use core::ptr::{read_volatile, write_volatile};
use guest_rt::paging::{PRESENT_WRITABLE, Window};
use guest_rt::{Page, cpu, info, println};
use guest_shim::smp::Flush;
use guest_shim::{Batch, Slot, Vcpus};
use pv_abi::memory::FreeRange;

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

static mut A: Page = Page::ZERO;
static mut B: Page = Page::ZERO;

/// Runs all checks. Interrupts are masked by RFLAGS before and after.
///
/// # Panics
/// Something does not work.
pub(crate) fn run(machine: &Machine, window: &Window) {
    page_tables(machine, window);
    clock(machine);
    // SAFETY: handlers are in place.
    unsafe { cpu::sti() };
    masking(machine);
    timer(machine);
    other_cpus(machine, window);
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    text(machine);
    free_pages(machine);
    match device::random_bytes(machine) {
        Some(bytes) => println!("virtio device works: {bytes} random bytes"),
        None => println!("virtio device absent"),
    }
}

fn page_tables(machine: &Machine, window: &Window) {
    let (a, b) = (&raw mut A as u64, &raw mut B as u64);
    let at = window.address(9);
    // SAFETY: the pages are this function's, the window's entries nobody else's.
    unsafe {
        write_volatile(a as *mut u64, 0xa);
        write_volatile(b as *mut u64, 0xb);
        window.map(9, a | PRESENT_WRITABLE);
        assert_eq!(read_volatile(at as *const u64), 0xa);
        // A buffer of three overflows at the fourth update.
        let mut buffer = [Slot::EMPTY; 3];
        {
            let mut batch = Batch::new(machine.shim, &mut buffer);
            for n in 10..12 {
                batch.set_entry(window.entry_gpa(n), a | PRESENT_WRITABLE);
                batch.invalidate(window.address(n), 0);
            }
            batch.set_entry(window.entry_gpa(9), b | PRESENT_WRITABLE);
            batch.invalidate(at, 2);
            assert_eq!(batch.refused(), 0);
        }
        for (n, value) in [(9, 0xb), (10, 0xa), (11, 0xa)] {
            assert_eq!(read_volatile(window.address(n) as *const u64), value, "page {n}");
        }
        let mut batch = Batch::new(machine.shim, &mut buffer);
        batch.set_entry(window.entry_gpa(9), a | PRESENT_WRITABLE);
        batch.set_root(guest_rt::paging::boot_root());
        batch.flush();
        assert_eq!(read_volatile(at as *const u64), 0xa, "after a new root");
        batch.set_entry(window.entry_gpa(9), b | PRESENT_WRITABLE);
        batch.invalidate_all();
        batch.flush();
        assert_eq!(read_volatile(at as *const u64), 0xb, "after everything was invalidated");
        assert_eq!(batch.refused(), 0);
    }
}

fn clock(machine: &Machine) {
    let (start, tsc) = (machine.vcpu.ns(), cpu::tsc());
    let khz = u64::from(machine.shim.tsc_khz().0);
    let mut last = start;
    while cpu::tsc() - tsc < khz * 20 {
        let now = machine.vcpu.ns();
        assert!(now >= last, "the clock goes back");
        last = now;
    }
    let passed = machine.vcpu.ns() - start;
    assert!((19_000_000..10 * SECOND).contains(&passed), "20 ms took {passed} ns");
    let wall = machine.vcpu.wall_ns() / SECOND;
    // From 2024 to 2100.
    assert!((1_704_067_200..4_102_444_800).contains(&wall), "it is not {wall} s after 1970");
    println!("wall clock {wall} s, stolen {} ns", machine.vcpu.stolen_ns());
}

/// Waits for the count of interrupts to become `count`.
fn wait_for(machine: &Machine, count: u64, what: &str) {
    let limit = machine.vcpu.ns() + 5 * SECOND;
    while arrived() < count {
        assert!(machine.vcpu.ns() < limit, "{what} does not come");
        core::hint::spin_loop();
    }
    assert_eq!(arrived(), count, "{what} comes too often");
}

fn masking(machine: &Machine) {
    let vcpu = machine.vcpu;
    let before = arrived();
    assert!(vcpu.interrupts_enabled());
    {
        let outer = vcpu.mask();
        let inner = vcpu.mask();
        assert!(!vcpu.interrupts_enabled());
        vcpu.send_ipi(Vcpus::one(0), VECTOR);
        let until = vcpu.ns() + 1_000_000;
        while vcpu.ns() < until {
            core::hint::spin_loop();
        }
        drop(inner);
        assert_eq!(arrived(), before, "interrupts are masked");
        drop(outer);
    }
    wait_for(machine, before + 1, "the masked interrupt");
    assert!(vcpu.interrupts_enabled());
    // Many in a row: each must be ended for the next to come.
    for n in 0..100 {
        vcpu.send_ipi(Vcpus::one(0), VECTOR);
        wait_for(machine, before + 2 + n, "an interrupt in a row");
    }
}

fn timer(machine: &Machine) {
    let vcpu = machine.vcpu;
    let before = arrived();
    let start = vcpu.ns();
    vcpu.set_timer(Some(start + 2_000_000), VECTOR);
    // Sleeping, the way a kernel's idle loop does.
    while arrived() == before {
        let masked = vcpu.mask();
        if arrived() == before {
            // SAFETY: handlers are in place; the guard's end finds interrupts enabled, which it would enable anyway.
            unsafe { vcpu.halt() };
        }
        drop(masked);
    }
    let took = vcpu.ns() - start;
    assert!((2_000_000..2 * SECOND).contains(&took), "the timer of 2 ms took {took} ns");
    wait_for(machine, before + 1, "the timer");
    // A timer that is disarmed in time does not fire. On a busy host this CPU may be away until it has: then once more.
    loop {
        let (before, deadline) = (arrived(), vcpu.ns() + 20_000_000);
        vcpu.set_timer(Some(deadline), VECTOR);
        vcpu.set_timer(None, VECTOR);
        if vcpu.ns() >= deadline {
            continue;
        }
        while vcpu.ns() < deadline + 10_000_000 {
            core::hint::spin_loop();
        }
        assert_eq!(arrived(), before, "the timer was disarmed");
        return;
    }
}

fn other_cpus(machine: &Machine, window: &Window) {
    let vcpu = machine.vcpu;
    // SAFETY: the window's entries are nobody else's.
    unsafe {
        window.map(9, &raw mut A as u64 | PRESENT_WRITABLE);
        assert_eq!(read_volatile(window.address(9) as *const u64), 0xa);
        window.set(9, &raw mut B as u64 | PRESENT_WRITABLE);
        vcpu.flush_tlb(Vcpus::one(0), Flush::Pages { address: window.address(9), pages: 1 }, FLUSH);
        assert_eq!(read_volatile(window.address(9) as *const u64), 0xb, "after a flush of the page");
        window.set(9, &raw mut A as u64 | PRESENT_WRITABLE);
        vcpu.flush_tlb(Vcpus::one(0), Flush::Space, FLUSH);
        assert_eq!(read_volatile(window.address(9) as *const u64), 0xa, "after a flush of the address space");
    }
    vcpu.yield_to(None);
    // A kick ends a halt of this CPU that follows it; natively it is an interrupt.
    let masked = vcpu.mask();
    vcpu.kick(0, VECTOR);
    // SAFETY: handlers are in place.
    unsafe { vcpu.halt() };
    drop(masked);
}

fn text(machine: &Machine) {
    machine.shim.write(b"text through the shim\n");
    // Nothing was typed.
    assert_eq!(machine.shim.read(&mut [0; 16]), 0);
}

fn free_pages(machine: &Machine) {
    let (start, bytes) = info::free_ram();
    assert!(bytes >= 1 << 20);
    let at = start as *mut u64;
    // SAFETY: nobody uses that memory, and it is mapped one to one.
    unsafe {
        write_volatile(at, 1);
        let ranges = [FreeRange { gpa: start, pages: 16 }, FreeRange { gpa: start + (64 << 12), pages: 1 }];
        let used = machine.shim.free_pages(&ranges);
        write_volatile(at, 2);
        assert_eq!(read_volatile(at), 2, "a page that was given up can be used again");
        println!("free-page hints used: {used}");
    }
}
