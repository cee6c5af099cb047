//! Drives every virtio device of the machine, on PCI, behind memory-mapped registers and on the paravirtual ABI's transport, with the
//! `virtio-drivers` crate: somebody else's idea of what the specification says.
//!
//! Each device is used, reset by a new driver, and used again. On PCI its BAR is moved first. What the host has to
//! prepare: disks whose first block holds its own number of bytes 0x5a, a console, user networking, and somebody who sends back what comes to
//! port 1234 of the host's sockets. Prints TAP.
//!
//! With `load=block` or `load=net`, `depth=N` and `count=N` it sends that many requests to the first such device instead, so that the
//! hypervisor's counters can be read per request ([`load`]).
#![no_std]
#![no_main]

extern crate alloc;

mod exercise;
mod load;
mod memory;

use core::ptr::NonNull;

use guest_rt::{Page, console, cpu, println};
use guest_shim::virtio::AbiTransport;
use guest_shim::{CodeSlot, Platform, Shim};
use memory::Memory;
use pv_abi::feature::{Feature, Features};
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

/// Something to do with each device.
enum Work {
    Exercise(Tap),
    Load(load::Load),
}

impl Work {
    fn with<T: Transport>(&mut self, transport: T, kind: DeviceType, name: &str) {
        match self {
            Self::Exercise(tap) => exercise::exercise(tap, transport, kind, name),
            Self::Load(load) => load.put_on(transport, kind, name),
        }
    }

    /// How often each device is brought up.
    fn rounds(&self) -> u32 {
        if matches!(self, Self::Exercise(_)) { 2 } else { 1 }
    }
}

static mut CODE: Page = Page::ZERO;

/// The ABI, if there is one with virtio devices.
fn abi() -> Option<Shim> {
    // The frequency is used for no more than giving up; a guess saves measuring it.
    let platform = Platform { tsc_khz: Some(2_000_000), ..Platform::PC };
    // SAFETY: CPL 0, one CPU, once; the page is used for this only.
    let shim = unsafe { Shim::init(platform, CodeSlot::at((&raw mut CODE).cast()), Features::of(&[Feature::Virtio])) };
    (shim.limits().virtio_devices > 0).then_some(shim)
}

fn main() -> ! {
    let mut work = match load::Load::asked_for() {
        Some(load) => Work::Load(load),
        None => Work::Exercise(Tap { number: 0, failed: 0 }),
    };
    let mut root = PciRoot::new(Ports);
    for slot in 1..32 {
        let function = DeviceFunction { bus: 0, device: slot, function: 0 };
        let Some((_, info)) = root.enumerate_bus(0).find(|(f, _)| *f == function) else { continue };
        let Some(kind) = virtio_device_type(&info) else { continue };
        root.set_bar_64(function, 0, NEW_BARS + u64::from(slot) * 0x10_0000);
        root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
        for _ in 0..work.rounds() {
            match PciTransport::new::<Memory, _>(&mut root, function) {
                Ok(transport) => work.with(transport, kind, "PCI"),
                Err(_) => {
                    if let Work::Exercise(tap) = &mut work {
                        tap.check(false, kind, "PCI", "its capabilities are as they have to be");
                    }
                }
            }
        }
    }
    for n in 0..MMIO.2 {
        for _ in 0..work.rounds() {
            let header = NonNull::new((MMIO.0 + n * MMIO.1) as *mut VirtIOHeader).expect("not at 0");
            // SAFETY: the window is mapped one to one; what is no device has another magic number, which the driver looks at.
            let Ok(transport) = (unsafe { MmioTransport::new(header, MMIO.1) }) else { break };
            let kind = transport.device_type();
            work.with(transport, kind, "MMIO");
        }
    }
    let shim = abi();
    for (n, shim) in (0..).zip(core::iter::repeat_n(shim.as_ref(), 64)) {
        let Some(shim) = shim.filter(|shim| n < shim.limits().virtio_devices) else { break };
        for _ in 0..work.rounds() {
            let Some(transport) = AbiTransport::new(shim, n) else { break };
            let kind = transport.device_type();
            work.with(transport, kind, "the ABI");
        }
    }
    match work {
        Work::Exercise(tap) => {
            println!("1..{}", tap.number);
            console::exit(u32::from(tap.failed != 0 || tap.number == 0))
        }
        Work::Load(load) => console::exit(u32::from(!load.is_done())),
    }
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
