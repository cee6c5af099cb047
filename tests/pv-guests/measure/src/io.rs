//! Ports, device registers, virtio requests.

use crate::device::{self, Way};
use crate::harness::{Outcome, Run, repeated};
use crate::machine::Form;
use core::ptr::{read_volatile, write_volatile};
use guest_rt::apic::register;
use guest_rt::cpu;
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::{DeviceType, Transport};

/// Port of the ACPI PM timer, on Paravane's and on QEMU's PC.
const PM_TIMER: u16 = 0x608;

pub(crate) fn read_pm_timer(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        // SAFETY: a counter.
        core::hint::black_box(unsafe { cpu::in32(PM_TIMER) });
    })
}

/// Writes the port that is used for delays and diagnostics.
pub(crate) fn port_out(run: &Run<'_>) -> Outcome {
    // SAFETY: nobody listens.
    repeated(run.count, || unsafe { cpu::out8(0x80, 0) })
}

/// Registers of the I/O APIC: which of its registers the window shows, and the window.
const IO_APIC: u64 = 0xfec0_0000;
const IO_APIC_WINDOW: u64 = IO_APIC + 0x10;

/// Reads the I/O APIC's ID through its window.
pub(crate) fn read_register(run: &Run<'_>) -> Outcome {
    // SAFETY: a device's registers, mapped one to one; nobody else uses them.
    unsafe { write_volatile(IO_APIC as *mut u32, 0) };
    repeated(run.count, || {
        // SAFETY: as above.
        core::hint::black_box(unsafe { read_volatile(IO_APIC_WINDOW as *const u32) });
    })
}

/// Writes which register the I/O APIC's window shows.
pub(crate) fn write_register(run: &Run<'_>) -> Outcome {
    // SAFETY: as above.
    repeated(run.count, || unsafe { write_volatile(IO_APIC as *mut u32, 0) })
}

pub(crate) fn read_lapic_timer(run: &Run<'_>) -> Outcome {
    let apic = crate::cases::apic();
    apic.write(register::TIMER_DIVIDE, 3);
    // Masked, as after reset.
    apic.write(register::LVT_TIMER, 1 << 16);
    apic.write(register::TIMER_INITIAL, u32::MAX);
    let outcome = repeated(run.count, || {
        core::hint::black_box(apic.read(register::TIMER_CURRENT));
    });
    apic.write(register::TIMER_INITIAL, 0);
    outcome
}

/// Why there is no result.
const NO_DEVICE: &str = "there is no such device on this transport";

/// The way to a device that the form takes.
fn way(run: &Run<'_>) -> Way {
    if run.machine.form == Form::Abi { Way::Abi } else { Way::Pci }
}

pub(crate) fn notify(run: &Run<'_>) -> Outcome {
    let mut transport = device::with_empty_queue(&run.machine, way(run)).ok_or(NO_DEVICE)?;
    repeated(run.count, || transport.notify(0))
}

/// Reads one sector and waits for it, again and again the same.
fn read_sectors(run: &Run<'_>, way: Way) -> Outcome {
    let transport = device::find(&run.machine, DeviceType::Block, way).ok_or(NO_DEVICE)?;
    let mut disk = VirtIOBlk::<device::Memory, _>::new(transport).map_err(|_| "the device does not work")?;
    disk.disable_interrupts();
    let mut sector = [0; SECTOR_SIZE];
    let mut failed = 0;
    let outcome = repeated(run.count, || failed += u64::from(disk.read_blocks(0, &mut sector).is_err()));
    assert!(failed == 0, "the disk can be read");
    outcome
}

pub(crate) fn read_block(run: &Run<'_>) -> Outcome {
    read_sectors(run, way(run))
}

pub(crate) fn read_block_mmio(run: &Run<'_>) -> Outcome {
    read_sectors(run, Way::Mmio)
}

/// Sends one frame that nobody answers, an ARP reply, and waits until the device has taken it.
fn send_frames(run: &Run<'_>, way: Way) -> Outcome {
    let transport = device::find(&run.machine, DeviceType::Network, way).ok_or(NO_DEVICE)?;
    let mut card = VirtIONetRaw::<device::Memory, _, 16>::new(transport).map_err(|_| "the device does not work")?;
    card.disable_interrupts();
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&card.mac_address());
    // Hardware Ethernet, protocol IPv4, operation 2: reply. It says that nobody, 0.0.0.0, is at no address.
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    let mut failed = 0;
    let outcome = repeated(run.count, || failed += u64::from(card.send(&frame).is_err()));
    assert!(failed == 0, "the card sends");
    outcome
}

pub(crate) fn send_frame(run: &Run<'_>) -> Outcome {
    send_frames(run, way(run))
}

pub(crate) fn send_frame_mmio(run: &Run<'_>) -> Outcome {
    send_frames(run, Way::Mmio)
}

pub(crate) fn console_lines(run: &Run<'_>) -> Outcome {
    const LINE: &[u8; 64] = b"line of 64 characters, as a kernel's log has them: 123456789012\n";
    repeated(run.count, || run.machine.shim.write(LINE))
}
