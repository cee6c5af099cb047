//! VIO: devices on the ABI's transport. What needs a device takes device 0, which the runner makes a source of random numbers.

use crate::abi::{Abi, NOT_RAM, Outcome, Why, check, fill, get, get8, holds, page, put, put8, ram_end};
use crate::at;
use crate::irq;
use crate::{Kind, Test};
use guest_rt::cpu;
use pv_abi::call::{ALL_ONES, Call, Error};
use pv_abi::feature::Feature;
use pv_abi::virtio::doorbell;

pub(crate) const TESTS: &[Test] = &[
    ("VIO-1", "registers", Kind::Ready(vio_1)),
    ("VIO-2", "devices that do not exist", Kind::Ready(vio_2)),
    ("VIO-3", "accesses that are none", Kind::Ready(vio_3)),
    ("VIO-4", "NOTIFY of a queue", Kind::Ready(vio_4)),
    ("VIO-5", "NOTIFY by doorbell bits", Kind::Ready(vio_5)),
    ("VIO-6", "doorbells that are none", Kind::Ready(vio_6)),
    ("VIO-7", "event vectors that are none", Kind::Ready(vio_7)),
    ("VIO-8", "an event sets its bit and interrupts", Kind::Ready(vio_8)),
    ("VIO-9", "the next event does so again", Kind::Ready(vio_9)),
    ("VIO-11", "an agreement resets devices", Kind::Ready(vio_11)),
    ("VIO-12", "queues that point anywhere", Kind::Ready(vio_12)),
];

// Registers (virtio 1.2, section 4.2.2).
const DEVICE_ID: u64 = 0x8;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;

/// The random-number device's identifier.
const ENTROPY: u64 = 4;
const VECTOR: u64 = 0x68;

fn read(abi: Abi, offset: u64) -> u64 {
    abi.call(Call::VirtioRead, &[0, offset, 4]).rdx
}

fn write(abi: Abi, offset: u64, value: u64) -> Outcome {
    abi.call(Call::VirtioWrite, &[0, offset, 4, value]).gives("VIRTIO_WRITE", 0)
}

fn vio_1(abi: Abi) -> Outcome {
    abi.need(Feature::Virtio)?;
    check("MagicValue", read(abi, 0), 0x7472_6976)?;
    check("Version", read(abi, 4), 2)?;
    holds("DeviceID", read(abi, DEVICE_ID) != 0)?;
    check("a register that does not exist", read(abi, 0x1c), 0)?;
    check("a register to write", read(abi, DRIVER_FEATURES), 0)?;
    write(abi, 0, 5)?;
    check("a register to read", read(abi, 0), 0x7472_6976)?;
    for size in [1, 2, 4, 8] {
        let answer = abi.call(Call::VirtioRead, &[0, 0x100, size]);
        check("configuration space", answer.rax, 0)?;
        holds("no more than its bytes", size == 8 || answer.rdx >> (8 * size) == 0)?;
    }
    Ok(())
}

fn vio_2(abi: Abi) -> Outcome {
    abi.need(Feature::Virtio)?;
    let devices = abi.limits()[3];
    for bad in [devices, 64, 65, 1 << 16, 1 << 32, u64::MAX] {
        abi.call(Call::VirtioRead, &[bad, 0, 4]).fails("VIRTIO_READ", Error::NoSuchTarget)?;
        abi.call(Call::VirtioWrite, &[bad, 0x70, 4, 0]).fails("VIRTIO_WRITE", Error::NoSuchTarget)?;
        abi.call(Call::VirtioRead, &[bad, 1, 3]).fails("the device goes first", Error::NoSuchTarget)?;
    }
    Ok(())
}

fn vio_3(abi: Abi) -> Outcome {
    abi.need(Feature::Virtio)?;
    for (offset, size) in [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 8),
        (2, 4),
        (1, 4),
        (0xfe, 4),
        (0x101, 2),
        (0x104, 8),
        (0x100, 3),
        (0x100, 16),
        (0x1000, 4),
        (0x1000, 1),
        (u64::MAX, 1),
        (u64::MAX - 3, 4),
        (1 << 32, 4),
        (0x100, u64::MAX),
    ] {
        abi.call(Call::VirtioRead, &[0, offset, size]).fails("VIRTIO_READ", Error::InvalidArgument)?;
        abi.call(Call::VirtioWrite, &[0, offset, size, 0]).fails("VIRTIO_WRITE", Error::InvalidArgument)?;
    }
    for (offset, size, value) in [(STATUS, 4, 1 << 32), (0x100, 1, 256), (0x100, 2, 1 << 16), (0x100, 4, u64::MAX)] {
        abi.call(Call::VirtioWrite, &[0, offset, size, value]).fails("bits beyond the size", Error::InvalidArgument)?;
    }
    abi.call(Call::VirtioRead, &[0, 0xfff, 1]).gives("the last byte", 0)
}

/// Where the parts of queue 0 are: descriptors, driver area, device area, buffer.
const PARTS: [usize; 4] = [20, 21, 22, 23];

/// Brings the device up with queue 0 of 8 entries at these addresses.
fn driver(abi: Abi, areas: [u64; 3]) -> Outcome {
    abi.need(Feature::Virtio)?;
    if read(abi, DEVICE_ID) != ENTROPY {
        return Err(Why::Absent("a source of random numbers as device 0"));
    }
    write(abi, STATUS, 0)?;
    write(abi, STATUS, 1)?;
    write(abi, STATUS, 3)?;
    // VIRTIO_F_VERSION_1 and nothing else.
    write(abi, DRIVER_FEATURES_SEL, 0)?;
    write(abi, DRIVER_FEATURES, 0)?;
    write(abi, DRIVER_FEATURES_SEL, 1)?;
    write(abi, DRIVER_FEATURES, 1)?;
    write(abi, STATUS, 11)?;
    check("FEATURES_OK", read(abi, STATUS) & 8, 8)?;
    write(abi, QUEUE_SEL, 0)?;
    write(abi, QUEUE_NUM, 8)?;
    for (register, at) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(areas) {
        write(abi, register, at & 0xffff_ffff)?;
        write(abi, register + 4, at >> 32)?;
    }
    write(abi, QUEUE_READY, 1)?;
    write(abi, STATUS, 15)
}

/// The same with its queue in scratch pages, all empty.
fn ready(abi: Abi) -> Outcome {
    for n in PARTS {
        fill(page(n), 0);
    }
    driver(abi, [page(PARTS[0]), page(PARTS[1]), page(PARTS[2])])
}

/// Offers one descriptor: address, length, flags and next. `n` is how many were offered before.
fn offer(n: u16, address: u64, len: u32, flags: u16, next: u16) {
    let slot = page(PARTS[0]);
    put(slot, address);
    put(slot + 8, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48);
    let ring = page(PARTS[1]);
    // Entry n of the ring is descriptor 0 already; the index says that one more is there.
    put8(ring + 2, (n + 1) as u8);
}

fn used() -> u8 {
    get8(page(PARTS[2]) + 2)
}

/// Waits until the device has used `n` buffers.
fn wait_used(n: u8) -> bool {
    let start = cpu::tsc();
    while used() != n && cpu::tsc().wrapping_sub(start) < irq::LONG {
        core::hint::spin_loop();
    }
    used() == n
}

const WRITABLE: u16 = 2;

fn vio_4(abi: Abi) -> Outcome {
    ready(abi)?;
    offer(0, page(PARTS[3]), 32, WRITABLE, 0);
    abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
    holds("the device used the buffer", wait_used(1))?;
    holds("random bytes are there", (0..4).any(|n| get(page(PARTS[3]) + 8 * n) != 0))?;
    abi.call(Call::Notify, &[doorbell(0, 77)]).gives("a queue that does not exist", 1)
}

fn vio_5(abi: Abi) -> Outcome {
    ready(abi)?;
    offer(0, page(PARTS[3]), 32, WRITABLE, 0);
    put(page(0) + at!(doorbells), 1 | 1 << 63);
    let there = if abi.limits()[3] == 64 { 2 } else { 1 };
    abi.call(Call::Notify, &[ALL_ONES]).gives("NOTIFY", there)?;
    check("the bits were taken", get(page(0) + at!(doorbells)), 0)?;
    holds("the device used the buffer", wait_used(1))?;
    abi.call(Call::Notify, &[ALL_ONES]).gives("no bits", 0)?;
    abi.call(Call::SharePage, &[0]).gives("SHARE_PAGE", 0)?;
    abi.call(Call::Notify, &[ALL_ONES]).fails("no page", Error::NoSharedPage)
}

fn vio_6(abi: Abi) -> Outcome {
    abi.need(Feature::Virtio)?;
    for bad in [1 << 48, 1 << 63, u64::MAX - 1, u64::MAX << 16] {
        abi.call(Call::Notify, &[bad]).fails("bits", Error::InvalidArgument)?;
    }
    for bad in [abi.limits()[3], 64, 0xffff_ffff] {
        abi.call(Call::Notify, &[bad << 16]).fails("device", Error::NoSuchTarget)?;
    }
    Ok(())
}

fn vio_7(abi: Abi) -> Outcome {
    abi.need(Feature::Virtio)?;
    for bad in [1, 31, 256, 1 << 32, u64::MAX] {
        abi.call(Call::EventVector, &[bad]).fails("vector", Error::InvalidArgument)?;
    }
    for good in [0, 32, 255] {
        abi.call(Call::EventVector, &[good]).gives("vector", 0)?;
    }
    Ok(())
}

fn vio_8(abi: Abi) -> Outcome {
    ready(abi)?;
    abi.call(Call::EventVector, &[VECTOR]).gives("EVENT_VECTOR", 0)?;
    offer(0, page(PARTS[3]), 32, WRITABLE, 0);
    abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
    holds("an interrupt", irq::wait(irq::LONG))?;
    check("its vector", irq::order(0), VECTOR)?;
    check("the used ring was written before", used().into(), 1)?;
    check("the bit", get(page(0) + at!(events)), 1)
}

fn vio_9(abi: Abi) -> Outcome {
    vio_8(abi)?;
    for n in 1..20_u8 {
        irq::forget();
        // SAFETY: an exchange of the word in the shared page.
        let bits = unsafe {
            let mut bits = 0_u64;
            core::arch::asm!("xchg [{}], {}", in(reg) page(0) + at!(events), inout(reg) bits);
            bits
        };
        check("the bit", bits, 1)?;
        offer(n.into(), page(PARTS[3]), 32, WRITABLE, 0);
        abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
        holds("an interrupt", irq::wait(irq::LONG))?;
        check("one buffer more", used().into(), (n + 1).into())?;
    }
    Ok(())
}

fn vio_11(abi: Abi) -> Outcome {
    ready(abi)?;
    check("before", read(abi, STATUS), 15)?;
    abi.begin()?;
    check("behind", read(abi, STATUS), 0)?;
    write(abi, QUEUE_SEL, 0)?;
    check("the queue", read(abi, QUEUE_READY), 0)
}

fn vio_12(abi: Abi) -> Outcome {
    // Rings that are no RAM, cross its end, are misaligned, or are the shared page itself.
    let bad = NOT_RAM.into_iter().chain([ram_end() - 64, page(0), page(PARTS[0]) + 1, u64::MAX - 15]);
    for at in bad {
        for n in 0..3 {
            let mut areas = [page(PARTS[0]), page(PARTS[1]), page(PARTS[2])];
            areas[n] = at;
            driver(abi, areas)?;
            abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
        }
    }
    // Buffers that are no RAM, the rings themselves, and chains that loop or leave the table.
    let buffers = NOT_RAM.into_iter().chain([ram_end() - 8, page(PARTS[0]), page(PARTS[1]), page(PARTS[2]), page(0)]);
    for at in buffers {
        ready(abi)?;
        offer(0, at, 4096, WRITABLE, 0);
        abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
    }
    for (len, flags, next) in [
        (64, WRITABLE | 1, 0),
        (64, WRITABLE | 1, 9),
        (64, 1, 0xffff),
        (u32::MAX, WRITABLE, 0),
        (0, WRITABLE, 0),
        (64, 4, 0),
    ] {
        ready(abi)?;
        offer(0, page(PARTS[3]), len, flags, next);
        abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
        // An index far ahead of the last one, too.
        offer(200, page(PARTS[3]), len, flags, next);
        abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
    }
    // The device works again once it is reset.
    let start = cpu::tsc();
    while cpu::tsc().wrapping_sub(start) < irq::SHORT {
        irq::open();
    }
    ready(abi)?;
    offer(0, page(PARTS[3]), 32, WRITABLE, 0);
    abi.call(Call::Notify, &[doorbell(0, 0)]).gives("NOTIFY", 1)?;
    holds("the device used the buffer", wait_used(1))
}
