//! Virtio devices, by the ABI, by PCI or by registers in memory; an entropy source is the simplest of all.

use crate::machine::Machine;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use guest_rt::{Page, cpu};
use guest_shim::virtio::Either;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::virtio_device_type;
use virtio_drivers::transport::{DeviceType, SomeTransport, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

const POOL: usize = 64;
static mut PAGES: [Page; POOL] = [const { Page::ZERO }; POOL];
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// Memory for devices: pages one after the other out of a static array, all of them identity-mapped.
pub(crate) struct Memory;

// SAFETY: pages are given out once and are zero, for nobody wrote to them before; addresses are the same for guest and device.
unsafe impl Hal for Memory {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let first = NEXT.fetch_add(pages, Relaxed);
        assert!(first + pages <= POOL, "there is memory for a few queues only");
        // SAFETY: in bounds, which was just checked.
        let at = unsafe { (&raw mut PAGES).cast::<Page>().add(first) };
        (at as u64, NonNull::new(at.cast()).expect("not at 0"))
    }
    unsafe fn dma_dealloc(_paddr: PhysAddr, _vaddr: NonNull<u8>, _pages: usize) -> i32 {
        0
    }
    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        assert!(paddr + size as u64 <= 1 << 32, "4 GiB are mapped");
        NonNull::new(paddr as *mut u8).expect("not at 0")
    }
    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as u64
    }
    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// PCI configuration mechanism #1.
struct Ports;

impl Ports {
    fn select(function: DeviceFunction, offset: u8) {
        let address = 1 << 31
            | u32::from(function.bus) << 16
            | u32::from(function.device) << 11
            | u32::from(function.function) << 8
            | u32::from(offset & 0xfc);
        // SAFETY: the configuration ports touch no memory.
        unsafe { cpu::out32(0xcf8, address) };
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

/// How a device is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By calls.
    Abi,
    /// As a PCI function.
    Pci,
    /// By registers in memory.
    Mmio,
}

/// A device by the ABI, or natively by PCI or registers in memory.
pub(crate) type Device = Either<SomeTransport<'static>>;

/// The first device of its kind on PCI bus 0.
fn on_pci(kind: DeviceType) -> Option<Device> {
    let mut root = PciRoot::new(Ports);
    let (function, _) = root.enumerate_bus(0).find(|(_, info)| virtio_device_type(info) == Some(kind))?;
    root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    PciTransport::new::<Memory, _>(&mut root, function).ok().map(|t| Either::Native(t.into()))
}

/// Where Paravane puts registers of virtio devices, a page each.
const WINDOWS: u64 = 0xf000_0000;
/// Devices that are looked at.
const SLOTS: u64 = 4;

/// The first device of its kind whose registers are in memory.
fn in_memory(kind: DeviceType) -> Option<Device> {
    (0..SLOTS).find_map(|n| {
        let header = NonNull::new((WINDOWS + 4096 * n) as *mut VirtIOHeader)?;
        // SAFETY: the addresses are a device's registers or nothing, mapped one to one, and reading nothing gives ones.
        let transport = unsafe { MmioTransport::new(header, 4096) }.ok()?;
        (transport.device_type() == kind).then(|| Either::Native(transport.into()))
    })
}

/// The first device of its kind that is reached so.
pub(crate) fn find(machine: &Machine, kind: DeviceType, way: Way) -> Option<Device> {
    match way {
        Way::Abi => (0..machine.shim.limits().virtio_devices.max(1))
            .filter_map(|n| Either::find(machine.shim, n, || None))
            .find(|t| t.device_type() == kind),
        Way::Pci => on_pci(kind),
        Way::Mmio => in_memory(kind),
    }
}

/// Has the device deliver random bytes; how many came. `None`: there is no device.
pub(crate) fn random_bytes(machine: &Machine) -> Option<usize> {
    let kind = DeviceType::EntropySource;
    let device = find(machine, kind, Way::Abi).or_else(|| find(machine, kind, Way::Pci))?;
    let mut driver = VirtIORng::<Memory, _>::new(device).expect("the device works");
    let mut bytes = [0; 64];
    let got = driver.request_entropy(&mut bytes).expect("the device delivers");
    assert!(got > 0 && bytes[..got].iter().any(|&b| b != 0), "{got} bytes, all zero");
    Some(got)
}

/// An entropy source with a queue set up and empty. `None`: there is none that is reached so.
pub(crate) fn with_empty_queue(machine: &Machine, way: Way) -> Option<Device> {
    let mut transport = find(machine, DeviceType::EntropySource, way)?;
    let version_1 = virtio_drivers::device::common::Feature::VERSION_1;
    transport.begin_init(version_1);
    let [(table, _), (driver, _), (device, _)] = [(); 3].map(|()| Memory::dma_alloc(1, BufferDirection::Both));
    transport.queue_set(0, 8, table, driver, device);
    transport.finish_init();
    Some(transport)
}
