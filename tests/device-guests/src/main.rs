//! Drives every virtio device of the machine, on PCI and behind memory-mapped registers, with the `virtio-drivers` crate: somebody else's
//! idea of what the specification says.
//!
//! Each device is used, reset by a new driver, and used again. On PCI its BAR is moved first. What the host has to
//! prepare: disks whose first block holds its own number of bytes 0x5a, and a console. Prints TAP.
#![no_std]
#![no_main]

mod memory;

use core::ptr::NonNull;

use guest_rt::{console, cpu, println};
use memory::Memory;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::transport::{DeviceType, Transport};

guest_rt::entry!(main);

/// First window of memory-mapped devices, bytes of each, and how many are looked at.
const MMIO: (usize, usize, usize) = (0xf000_0000, 0x1000, 8);
/// Where BARs are moved to.
const NEW_BARS: u64 = 0xd800_0000;

/// Test results.
struct Tap {
    number: u32,
    failed: u32,
}

impl Tap {
    fn check(&mut self, holds: bool, device: DeviceType, transport: &str, what: &str) {
        self.number += 1;
        self.failed += u32::from(!holds);
        let not = if holds { "" } else { "not " };
        println!("{not}ok {} - {device:?} on {transport}: {what}", self.number);
    }
}

fn main() -> ! {
    let mut tap = Tap { number: 0, failed: 0 };
    let mut root = PciRoot::new(Ports);
    for slot in 1..32 {
        let function = DeviceFunction { bus: 0, device: slot, function: 0 };
        let Some((_, info)) = root.enumerate_bus(0).find(|(f, _)| *f == function) else { continue };
        let Some(kind) = virtio_device_type(&info) else { continue };
        root.set_bar_64(function, 0, NEW_BARS + u64::from(slot) * 0x10_0000);
        root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
        for _ in 0..2 {
            match PciTransport::new::<Memory, _>(&mut root, function) {
                Ok(transport) => exercise(&mut tap, transport, kind, "PCI"),
                Err(_) => tap.check(false, kind, "PCI", "its capabilities are as they have to be"),
            }
        }
    }
    for n in 0..MMIO.2 {
        for _ in 0..2 {
            let header = NonNull::new((MMIO.0 + n * MMIO.1) as *mut VirtIOHeader).expect("not at 0");
            // SAFETY: the window is mapped one to one; what is no device has another magic number, which the driver looks at.
            let Ok(transport) = (unsafe { MmioTransport::new(header, MMIO.1) }) else { break };
            let kind = transport.device_type();
            exercise(&mut tap, transport, kind, "MMIO");
        }
    }
    println!("1..{}", tap.number);
    console::exit(u32::from(tap.failed != 0 || tap.number == 0))
}

fn exercise<T: Transport>(tap: &mut Tap, transport: T, kind: DeviceType, name: &str) {
    match kind {
        DeviceType::Block => block(tap, transport, name),
        DeviceType::Console => console_port(tap, transport, name),
        DeviceType::EntropySource => entropy(tap, transport, name),
        _ => println!("# {kind:?} on {name} is left alone"),
    }
}

fn entropy<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::EntropySource;
    let Ok(mut driver) = VirtIORng::<Memory, _>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    let mut bytes = [[0u8; 64]; 2];
    for (n, bytes) in bytes.iter_mut().enumerate() {
        let got = driver.request_entropy(bytes);
        tap.check(got == Ok(64), kind, name, if n == 0 { "bytes come" } else { "more bytes come" });
    }
    tap.check(bytes[0] != bytes[1] && bytes[0] != [0; 64], kind, name, "they are random");
}

fn console_port<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::Console;
    let Ok(mut driver) = VirtIOConsole::<Memory, _>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    let size = driver.size();
    tap.check(matches!(size, Ok(Some(s)) if s.columns == 80 && s.rows == 25), kind, name, "it has a size");
    tap.check(driver.send_bytes(b"from the guest\n").is_ok(), kind, name, "it takes text");
    tap.check(driver.recv(true) == Ok(None), kind, name, "there is no input");
}

fn block<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::Block;
    let Ok(mut driver) = VirtIOBlk::<Memory, _>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    let mut check = |holds: bool, what: &str| tap.check(holds, kind, name, what);
    let mut id = [0; 20];
    check(driver.device_id(&mut id) == Ok(8) && &id[..8] == b"serial-7", "it has a serial number");
    let blocks = driver.capacity() as usize;
    let mut data = [0; 512];
    check(driver.read_blocks(0, &mut data).is_ok() && data == [0x5a; 512], "its first block is the host's");
    check(driver.read_blocks(blocks, &mut data).is_err(), "there is nothing behind its end");
    check(driver.read_blocks(blocks - 1, &mut data).is_ok(), "it goes on after an error");
    if driver.readonly() {
        check(driver.write_blocks(1, &[1; 512]).is_err(), "it cannot be written");
        return;
    }
    let mut fine = true;
    for round in 0..64usize {
        let first = 8 + round * 16 % (blocks - 32);
        let mut bytes = [0u8; 4096];
        for (n, b) in bytes.iter_mut().enumerate() {
            *b = (n * 7 + round) as u8;
        }
        fine &= driver.write_blocks(first, &bytes).is_ok();
        let mut back = [0u8; 4096];
        fine &= driver.read_blocks(first, &mut back).is_ok() && back == bytes;
    }
    check(fine, "what is written is read back");
    check(driver.write_blocks(3, &[0xc3; 512]).is_ok() && driver.flush().is_ok(), "it can be flushed");
}

/// PCI configuration mechanism #1.
struct Ports;

impl Ports {
    fn select(function: DeviceFunction, offset: u8) {
        let place =
            u32::from(function.bus) << 16 | u32::from(function.device) << 11 | u32::from(function.function) << 8;
        // SAFETY: the configuration ports touch no memory.
        unsafe { cpu::out32(0xcf8, 1 << 31 | place | u32::from(offset & 0xfc)) };
    }
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        Self::select(function, offset);
        // SAFETY: as above.
        unsafe { cpu::in32(0xcfc) }
    }
    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        Self::select(function, offset);
        // SAFETY: as above; whoever writes answers for the register.
        unsafe { cpu::out32(0xcfc, data) };
    }
    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}
