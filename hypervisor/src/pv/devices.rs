//! Virtio devices on the ABI's own transport.
//!
//! The registers are those of virtio-mmio, so the transport of that name serves here too; only the ways there and back differ. A register
//! access is a hypercall, a notification is a hypercall for one queue or for all devices whose doorbell bits are set, and an event is a bit in vCPU 0's
//! shared page, with an interrupt when no bit was set before.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use pv_abi::call::{ALL_ONES, Error};
use pv_abi::feature::Feature;
use pv_abi::shared::SharedPage;
use pv_abi::virtio::{CONFIG, MAX_DEVICES, REGISTERS_END, from_doorbell};
use virtio::transport::mmio::MmioTransport;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

use super::Pv;

/// The devices' places, which are filled before the guest starts.
#[derive(Default)]
pub(super) struct Devices(Box<[OnceLock<MmioTransport>]>);

impl Devices {
    /// Places for `count` devices, at most as many as there are event bits.
    pub(super) fn expect(count: u32) -> Self {
        Self((0..count.min(MAX_DEVICES)).map(|_| OnceLock::new()).collect())
    }

    pub(super) fn expected(&self) -> u32 {
        self.0.len() as u32
    }

    fn get(&self, n: u64) -> Result<&MmioTransport, Error> {
        let place = usize::try_from(n).ok().and_then(|n| self.0.get(n)).ok_or(Error::NoSuchTarget)?;
        place.get().ok_or(Error::NoSuchTarget)
    }
}

/// Checks an access to registers: naturally aligned within the window, and of 4 bytes outside the configuration space.
fn access(offset: u64, size: u64) -> Result<usize, Error> {
    let sizes: &[u64] = if offset < CONFIG { &[4] } else { &[1, 2, 4, 8] };
    if !sizes.contains(&size) || !offset.is_multiple_of(size) || offset >= REGISTERS_END {
        return Err(Error::InvalidArgument);
    }
    Ok(size as usize)
}

impl Pv {
    /// Gives the next device its place; `make` is told its number.
    ///
    /// # Errors
    /// When there are more than were announced, or `make` fails.
    pub(crate) fn add_device(&self, make: impl FnOnce(u32) -> io::Result<MmioTransport>) -> io::Result<()> {
        let free = self.devices.0.iter().position(|place| place.get().is_none());
        let n = free.ok_or_else(|| io::Error::other("a machine has room for 64 devices on the ABI transport"))?;
        let _ = self.devices.0[n].set(make(n as u32)?);
        Ok(())
    }

    pub(super) fn device_read(&self, device: u64, offset: u64, size: u64) -> Result<u64, Error> {
        let t = self.devices.get(device)?;
        let mut data = [0; 8];
        t.read(offset, &mut data[..access(offset, size)?]);
        Ok(u64::from_le_bytes(data))
    }

    pub(super) fn device_write(&self, device: u64, offset: u64, size: u64, value: u64) -> Result<u64, Error> {
        let t = self.devices.get(device)?;
        let len = access(offset, size)?;
        let data = value.to_le_bytes();
        if data[len..].iter().any(|&b| b != 0) {
            return Err(Error::InvalidArgument);
        }
        t.write(offset, &data[..len]);
        Ok(0)
    }

    /// NOTIFY; gives how many devices were told.
    pub(super) fn notify(&self, vcpu: u32, doorbell: u64) -> Result<u64, Error> {
        if doorbell != ALL_ONES {
            let (device, queue) = from_doorbell(doorbell).ok_or(Error::InvalidArgument)?;
            self.devices.get(device.into())?.notifier().notify(queue);
            return Ok(1);
        }
        let page = self.page(vcpu).ok_or(Error::NoSharedPage)?;
        let bells = self.word64(page + std::mem::offset_of!(SharedPage, doorbells) as u64, |w| w.swap(0, SeqCst));
        let bells = bells.unwrap_or(0);
        // Bits of devices that do not exist ring nobody.
        let told = (0..u64::BITS.into()).filter(|n| bells >> n & 1 != 0).filter_map(|n| self.devices.get(n).ok());
        Ok(told.map(|t| t.notifier().notify_all()).count() as u64)
    }

    /// Puts all devices back to where they were before a driver came.
    pub(super) fn reset_devices(&self) {
        for t in self.devices.0.iter().filter_map(OnceLock::get) {
            t.write(0x70, &[0; 4]);
        }
    }

    /// Ends the devices' threads, whatever their drivers think.
    pub(crate) fn shut_down_devices(&self) {
        for t in self.devices.0.iter().filter_map(OnceLock::get) {
            t.shut_down();
        }
    }

    /// Sets a device's event bit on vCPU 0, from any thread; gives the vector to raise when no bit was set before.
    pub(crate) fn raise_event(&self, device: u32) -> Option<u8> {
        let page = self.page(0).filter(|_| self.has(Feature::Virtio))?;
        let at = page + std::mem::offset_of!(SharedPage, events) as u64;
        let before = self.word64(at, |w| w.fetch_or(1 << (device & 63), SeqCst))?;
        Some(self.event_vector.load(SeqCst)).filter(|&v| v != 0 && before == 0)
    }

    fn word64<T>(&self, gpa: u64, then: impl FnOnce(&AtomicU64) -> T) -> Option<T> {
        let slice = self.ram.get_slice(GuestAddress(gpa), 8).ok()?;
        slice.get_atomic_ref::<AtomicU64>(0).ok().map(then)
    }
}
