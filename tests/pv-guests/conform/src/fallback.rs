//! FALL: the native way of each feature, which is there with and without the ABI.

use crate::abi::{Outcome, check, fill, get, get8, holds, page, put};
use crate::calls::window;
use crate::irq;
use crate::{Kind, Test};
use core::arch::asm;
use guest_rt::apic::register::{LVT_TIMER, TIMER_DIVIDE, TIMER_INITIAL};
use guest_rt::paging::PRESENT_WRITABLE;
use guest_rt::{cpu, info};

pub(crate) const TESTS: &[Test] = &[
    ("FALL-1", "PAGE_TABLES: store, INVLPG, MOV to CR3", Kind::Native(fall_1)),
    ("FALL-2", "VIRTUAL_IF: CLI and STI", Kind::Native(fall_2)),
    ("FALL-3", "CLOCK: the TSC", Kind::Native(fall_3)),
    ("FALL-4", "TIMER: the local APIC's", Kind::Native(fall_4)),
    ("FALL-5", "IPI: the interrupt command register", Kind::Native(fall_5)),
    ("FALL-6", "TLB_FLUSH: MOV to CR3", Kind::Native(fall_6)),
    ("FALL-7", "LAZY_EOI: the EOI register", Kind::Native(fall_7)),
    ("FALL-8", "SCHEDULE: HLT", Kind::Native(fall_8)),
    ("FALL-10", "CONSOLE: the serial port", Kind::Native(fall_10)),
    ("FALL-11", "FREE_PAGES: memory stays", Kind::Native(fall_11)),
    ("FALL-12", "POWER: ACPI", Kind::Native(fall_12)),
    ("FALL-13", "VIRTIO: PCI", Kind::Native(fall_13)),
];

fn fall_1() -> Outcome {
    let w = window();
    put(page(12), 0x11);
    put(page(13), 0x22);
    for n in 0..50 {
        w.map(20, page(12 + n % 2) | PRESENT_WRITABLE);
        check("behind INVLPG", get(w.address(20)), if n % 2 == 0 { 0x11 } else { 0x22 })?;
    }
    Ok(())
}

fn fall_2() -> Outcome {
    irq::apic().send_self(0x60);
    let start = cpu::tsc();
    while cpu::tsc().wrapping_sub(start) < irq::SHORT / 20 {
        core::hint::spin_loop();
    }
    check("masked", irq::count(), 0)?;
    irq::open();
    check("unmasked", irq::count(), 1)
}

fn fall_3() -> Outcome {
    let (start, mut last) = (cpu::tsc_ordered(), 0);
    for _ in 0..10_000 {
        let now = cpu::tsc_ordered();
        holds("not backwards", now >= last)?;
        last = now;
    }
    holds("it counts", last > start)
}

fn timer(vector: u32, ticks: u32) {
    let apic = irq::apic();
    apic.write(TIMER_DIVIDE, 0b1011);
    apic.write(LVT_TIMER, vector);
    apic.write(TIMER_INITIAL, ticks);
}

fn fall_4() -> Outcome {
    timer(0x64, 100_000);
    let came = irq::wait(irq::LONG * 4);
    holds("it fires", came)?;
    check("its vector", irq::order(0), 0x64)?;
    irq::forget();
    holds("once", !irq::wait(irq::SHORT / 10))
}

fn fall_5() -> Outcome {
    for v in [32_u8, 0x60, 254] {
        irq::forget();
        irq::apic().send_self(v);
        holds("it comes", irq::wait(irq::LONG))?;
        check("its vector", irq::order(0), v.into())?;
    }
    Ok(())
}

fn fall_6() -> Outcome {
    let w = window();
    put(page(12), 0x11);
    put(page(13), 0x22);
    w.map(21, page(12) | PRESENT_WRITABLE);
    check("before", get(w.address(21)), 0x11)?;
    w.set(21, page(13) | PRESENT_WRITABLE);
    // SAFETY: the same root.
    unsafe { cpu::write_cr3(cpu::read_cr3()) };
    check("behind", get(w.address(21)), 0x22)
}

fn fall_7() -> Outcome {
    for _ in 1..20 {
        irq::forget();
        irq::apic().send_self(0x60);
        holds("it comes", irq::wait(irq::LONG))?;
        holds("it is over", !irq::in_service())?;
    }
    Ok(())
}

fn fall_8() -> Outcome {
    timer(0x64, 1_000_000);
    // SAFETY: the timer ends the halt; all vectors have handlers.
    unsafe { asm!("sti", "hlt", "cli") };
    check("its vector", irq::order(0), 0x64)
}

fn fall_10() -> Outcome {
    // SAFETY: the UART touches no memory.
    let ready = || unsafe { cpu::in8(0x3fd) } & 0x20 != 0;
    let start = cpu::tsc();
    while !ready() && cpu::tsc().wrapping_sub(start) < irq::LONG {}
    holds("the transmitter is ready", ready())
}

fn fall_11() -> Outcome {
    let (start, bytes) = info::free_ram();
    for n in 0..64.min(bytes / 4096) {
        fill(start + 4096 * n, n as u8);
    }
    for n in 0..64.min(bytes / 4096) {
        holds("it is there", get8(start + 4096 * n + 77) == n as u8)?;
    }
    Ok(())
}

fn fall_12() -> Outcome {
    let at = info::rsdp();
    holds("the root pointer's place", at != 0)?;
    check("its signature", get(at), u64::from_le_bytes(*b"RSD PTR "))
}

fn fall_13() -> Outcome {
    // SAFETY: configuration reads of function 00:00.0.
    let id = unsafe {
        cpu::out32(0xcf8, 0x8000_0000);
        cpu::in32(0xcfc)
    };
    holds("the host bridge", id != 0 && id != 0xffff_ffff)
}
