//! Virtio devices for the drivers of the crate `virtio-drivers`.
//!
//! [`AbiTransport`] reaches a device's registers with VIRTIO_READ and VIRTIO_WRITE and tells it of new buffers with NOTIFY, so that nothing is trapped
//! (`specs/virtio.md`; registers as in virtio 1.2, section 4.2.2). [`Either`] is that or a native transport, so that one driver type serves both.

#![allow(unsafe_code)] // Registers tell the device where in memory its queues are.

use crate::hypercall::Hypercalls;
use crate::shim::Shim;
use pv_abi::feature::Feature;
use pv_abi::virtio::{CONFIG, REGISTERS_END};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Registers (virtio 1.2, table 4.1).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC: u64 = 0x080;
    pub(super) const QUEUE_DRIVER: u64 = 0x090;
    pub(super) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Readings of a register that is to change, before a device is given up.
const PATIENCE: u32 = 10_000;

/// A device on the ABI's transport.
#[derive(Debug)]
pub struct AbiTransport {
    calls: Hypercalls,
    device: u32,
    kind: DeviceType,
}

impl AbiTransport {
    /// Device `device`, from 0 to [`crate::Limits::virtio_devices`] - 1. `None` if the feature is not in force or there is no such device or none of a known type.
    pub fn new(shim: &Shim, device: u32) -> Option<Self> {
        let calls = shim.calls_for(Feature::Virtio)?;
        let read = |offset| calls.virtio_read(device, offset, 4).ok().map(|v| v as u32);
        if read(register::MAGIC)? != MAGIC || read(register::VERSION)? != VERSION {
            return None;
        }
        let kind = DeviceType::try_from(read(register::DEVICE_ID)?).ok()?;
        Some(Self { calls, device, kind })
    }

    /// The device's index, its bit in [`pv_abi::shared::SharedPage::events`].
    pub fn index(&self) -> u32 {
        self.device
    }

    /// Reads a register. The device was there when this was made and stays; should the hypervisor refuse all the same, 0 is what a device in reset shows.
    fn read(&self, offset: u64) -> u32 {
        self.calls.virtio_read(self.device, offset, 4).unwrap_or(0) as u32
    }

    fn write(&mut self, offset: u64, value: u32) {
        // SAFETY: as with every transport, the driver answers for queue addresses. A refusal shows in the device's status.
        let _ = unsafe { self.calls.virtio_write(self.device, offset, 4, u64::from(value)) };
    }

    fn write_address(&mut self, offset: u64, address: PhysAddr) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }
}

/// Offset of a piece of the configuration space; it must lie within the registers.
fn config_offset(offset: usize, size: usize) -> Result<u64> {
    let at = CONFIG.checked_add(offset as u64).ok_or(Error::ConfigSpaceTooSmall)?;
    let end = at.checked_add(size as u64).ok_or(Error::ConfigSpaceTooSmall)?;
    if end > REGISTERS_END { Err(Error::ConfigSpaceTooSmall) } else { Ok(at) }
}

/// Splits a piece of the configuration space into accesses: offset and size, the largest that alignment allows (virtio 1.2, section 4.2.2.2).
fn accesses(start: u64, bytes: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let left = bytes - done;
        if left == 0 {
            return None;
        }
        let at = start + done as u64;
        let size = [4, 2, 1].into_iter().find(|&s| s <= left && at.is_multiple_of(s as u64)).unwrap_or(1);
        done += size;
        Some((at, size))
    })
}

impl Transport for AbiTransport {
    fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 0);
        let low = self.read(register::DEVICE_FEATURES);
        self.write(register::DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(register::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.write(register::DRIVER_FEATURES_SEL, 0);
        self.write(register::DRIVER_FEATURES, driver_features as u32);
        self.write(register::DRIVER_FEATURES_SEL, 1);
        self.write(register::DRIVER_FEATURES, (driver_features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(register::QUEUE_SEL, queue.into());
        self.read(register::QUEUE_NUM_MAX)
    }

    fn notify(&mut self, queue: u16) {
        // A refusal means that the queue is not set up, and there is nothing to tell of.
        let _ = self.calls.notify(self.device, queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read(register::STATUS))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(register::STATUS, status.bits());
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {
        // Only legacy devices want to know.
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(register::QUEUE_SEL, queue.into());
        self.write(register::QUEUE_NUM, size);
        self.write_address(register::QUEUE_DESC, descriptors);
        self.write_address(register::QUEUE_DRIVER, driver_area);
        self.write_address(register::QUEUE_DEVICE, device_area);
        self.write(register::QUEUE_READY, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(register::QUEUE_SEL, queue.into());
        self.write(register::QUEUE_READY, 0);
        // The device has let go of the queue when it reads back 0 (virtio 1.2, section 4.2.2.2). One that cannot stop a single queue
        // is reset, for the driver takes the queue's memory back.
        let mut reads = 0;
        while self.read(register::QUEUE_READY) != 0 {
            reads += 1;
            if reads == PATIENCE {
                return self.set_status(DeviceStatus::empty());
            }
            core::hint::spin_loop();
        }
        self.write(register::QUEUE_NUM, 0);
        for offset in [register::QUEUE_DESC, register::QUEUE_DRIVER, register::QUEUE_DEVICE] {
            self.write_address(offset, 0);
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(register::QUEUE_SEL, queue.into());
        self.read(register::QUEUE_READY) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(register::INTERRUPT_STATUS);
        if status != 0 {
            self.write(register::INTERRUPT_ACK, status);
        }
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(register::CONFIG_GENERATION)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let start = config_offset(offset, size_of::<T>())?;
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        for (at, size) in accesses(start, bytes.len()) {
            let word = self.calls.virtio_read(self.device, at, size as u64).map_err(|_| Error::ConfigSpaceTooSmall)?;
            let from = (at - start) as usize;
            bytes[from..from + size].copy_from_slice(&word.to_le_bytes()[..size]);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        let start = config_offset(offset, size_of::<T>())?;
        let bytes = value.as_bytes();
        for (at, size) in accesses(start, bytes.len()) {
            let from = (at - start) as usize;
            let mut word = [0; 8];
            word[..size].copy_from_slice(&bytes[from..from + size]);
            // SAFETY: configuration space tells the device of no memory.
            unsafe { self.calls.virtio_write(self.device, at, size as u64, u64::from_le_bytes(word)) }
                .map_err(|_| Error::ConfigSpaceTooSmall)?;
        }
        Ok(())
    }
}

impl Drop for AbiTransport {
    fn drop(&mut self) {
        // Resets the device, which lets go of memory that the driver gave it.
        self.set_status(DeviceStatus::empty());
    }
}

/// A device on the ABI's transport, or natively on another one.
#[derive(Debug)]
pub enum Either<N> {
    /// The ABI's.
    Abi(AbiTransport),
    /// Another, such as virtio-drivers' `PciTransport` or `MmioTransport`.
    Native(N),
}

impl<N: Transport> Either<N> {
    /// Device `device` on the ABI's transport if it is there, else what `native` finds.
    pub fn find(shim: &Shim, device: u32, native: impl FnOnce() -> Option<N>) -> Option<Self> {
        AbiTransport::new(shim, device).map(Self::Abi).or_else(|| native().map(Self::Native))
    }
}

/// Calls a method of whichever transport it is.
macro_rules! either {
    ($self:ident, $t:ident => $call:expr) => {
        match $self {
            Self::Abi($t) => $call,
            Self::Native($t) => $call,
        }
    };
}

impl<N: Transport> Transport for Either<N> {
    fn device_type(&self) -> DeviceType {
        either!(self, t => t.device_type())
    }
    fn read_device_features(&mut self) -> u64 {
        either!(self, t => t.read_device_features())
    }
    fn write_driver_features(&mut self, driver_features: u64) {
        either!(self, t => t.write_driver_features(driver_features))
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        either!(self, t => t.max_queue_size(queue))
    }
    fn notify(&mut self, queue: u16) {
        either!(self, t => t.notify(queue))
    }
    fn get_status(&self) -> DeviceStatus {
        either!(self, t => t.get_status())
    }
    fn set_status(&mut self, status: DeviceStatus) {
        either!(self, t => t.set_status(status))
    }
    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        either!(self, t => t.set_guest_page_size(guest_page_size))
    }
    fn requires_legacy_layout(&self) -> bool {
        either!(self, t => t.requires_legacy_layout())
    }
    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        either!(self, t => t.queue_set(queue, size, descriptors, driver_area, device_area))
    }
    fn queue_unset(&mut self, queue: u16) {
        either!(self, t => t.queue_unset(queue))
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        either!(self, t => t.queue_used(queue))
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        either!(self, t => t.ack_interrupt())
    }
    fn finish_init(&mut self) {
        either!(self, t => t.finish_init())
    }
    fn read_config_generation(&self) -> u32 {
        either!(self, t => t.read_config_generation())
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        either!(self, t => t.read_config_space(offset))
    }
    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        either!(self, t => t.write_config_space(offset, value))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn configuration_space_is_accessed_in_aligned_pieces() {
        let list = |start, bytes| accesses(start, bytes).collect::<Vec<_>>();
        assert_eq!(list(0x100, 8), [(0x100, 4), (0x104, 4)]);
        assert_eq!(list(0x101, 6), [(0x101, 1), (0x102, 2), (0x104, 2), (0x106, 1)]);
        assert_eq!(list(0x106, 6), [(0x106, 2), (0x108, 4)]);
        assert_eq!(list(0x100, 0), []);
        assert_eq!(config_offset(0, 8).unwrap(), CONFIG);
        assert!(config_offset(0xf00, 0).is_ok() && config_offset(0xef8, 9).is_err());
        assert!(config_offset(usize::MAX, 8).is_err());
    }
}
