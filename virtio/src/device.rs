//! What a device is to a transport, and what a transport is to a device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::SeqCst};

use paravane_ram::GuestRam;

use crate::{Queue, QueueError};

/// Device IDs (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceId {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// 9P transport.
    NineP = 9,
    /// Socket device.
    Vsock = 19,
    /// File system.
    Fs = 26,
}

impl DeviceId {
    /// PCI device ID of the modern device (virtio 1.2, section 4.1.2).
    pub fn pci(self) -> u16 {
        0x1040 + self as u16
    }

    /// PCI class code: base class, subclass, programming interface. Drivers go by the device ID; this is for people.
    pub fn pci_class(self) -> [u8; 3] {
        match self {
            Self::Net => [0x02, 0x00, 0x00],
            Self::Block => [0x01, 0x80, 0x00],
            Self::Console => [0x07, 0x80, 0x00],
            Self::Fs | Self::NineP => [0x01, 0x80, 0x00],
            _ => [0xff, 0x00, 0x00],
        }
    }
}

/// Feature bits that belong to no device type (virtio 1.2, section 6), as masks.
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every transport offers for every device.
    pub const COMMON: u64 = INDIRECT | EVENT_IDX | VERSION_1;
}

/// A virtio device without its transport.
///
/// All methods are called under the transport's lock, mostly on a vCPU's thread, and must not wait for the guest. The device does its
/// work on [`crate::Worker`] threads, which it starts in [`Self::activate`] and ends in [`Self::reset`] (and when it is dropped).
pub trait Device: Send {
    /// What it is.
    fn id(&self) -> DeviceId;

    /// Feature bits of its own type that it offers; [`feature::COMMON`] is added by the transport.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two up to 32768.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads its configuration space; what lies outside reads as zero. See [`read_config`].
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration space; what lies outside or is read-only is dropped.
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready (DRIVER_OK): serve the queues from now on.
    ///
    /// # Errors
    /// When it cannot: the transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, with: Activation) -> Result<(), ActivateError>;

    /// Ends all work. When it returns, no thread touches guest memory or raises an interrupt any more, and the device can be activated
    /// again. Also called when it is not active.
    fn reset(&mut self);
}

/// What a device gets when the driver is ready.
pub struct Activation {
    /// Negotiated features.
    pub features: u64,
    /// Guest memory.
    pub mem: GuestRam,
    /// The queues that the driver has enabled, in ascending order of [`Queue::index`].
    pub queues: Vec<Queue>,
    /// The way to the driver.
    pub signal: Signal,
}

impl Activation {
    /// Whether all bits of a feature mask were negotiated.
    pub fn has(&self, mask: u64) -> bool {
        self.features & mask == mask
    }

    /// Takes a queue out.
    ///
    /// # Errors
    /// When the driver has not enabled it.
    pub fn take(&mut self, index: u16) -> Result<Queue, ActivateError> {
        let at = self.queues.iter().position(|q| q.index() == index).ok_or(ActivateError::QueueMissing(index))?;
        Ok(self.queues.remove(at))
    }
}

/// Why a device cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver says it is ready and has not enabled a queue that the device needs.
    #[error("the guest's driver left out queue {0}")]
    QueueMissing(u16),
    /// A ring is not where one can be.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// No thread or descriptor.
    #[error("the host refuses a resource to a device ({0}); close other programs or raise its limits")]
    Host(#[from] io::Error),
}

/// A transport's interrupts. Called from any thread, also from vCPUs; must not block.
pub trait Interrupt: Send + Sync {
    /// Buffers of a queue were used (virtio 1.2, section 2.7.7).
    fn queue(&self, index: u16);
    /// The configuration or the device status changed.
    fn config(&self);
}

/// Device status bits (virtio 1.2, section 2.1).
pub mod status {
    /// ACKNOWLEDGE.
    pub const ACKNOWLEDGE: u8 = 1;
    /// DRIVER.
    pub const DRIVER: u8 = 2;
    /// DRIVER_OK.
    pub const DRIVER_OK: u8 = 4;
    /// FEATURES_OK.
    pub const FEATURES_OK: u8 = 8;
    /// DEVICE_NEEDS_RESET.
    pub const NEEDS_RESET: u8 = 0x40;
    /// FAILED.
    pub const FAILED: u8 = 0x80;
}

pub(crate) struct Shared {
    pub(crate) status: AtomicU8,
    pub(crate) generation: AtomicU32,
    interrupt: Arc<dyn Interrupt>,
}

/// A device's way to its driver: interrupts, configuration changes, and the call for help. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Signal(pub(crate) Arc<Shared>);

impl Signal {
    /// A way to whoever `interrupt` reaches, for a device that is not active yet.
    pub fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self(Arc::new(Shared { status: AtomicU8::new(0), generation: AtomicU32::new(0), interrupt }))
    }

    /// Interrupts for a queue, without asking whether the driver wants it; [`Queue::signal`] asks.
    pub fn queue(&self, index: u16) {
        self.0.interrupt.queue(index);
    }

    /// The configuration space reads differently now.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, SeqCst);
        if self.0.status.load(SeqCst) & status::DRIVER_OK != 0 {
            self.0.interrupt.config();
        }
    }

    /// The device cannot go on before the driver has reset it: DEVICE_NEEDS_RESET, and a configuration change interrupt when the driver is
    /// ready (virtio 1.2, section 2.1.2).
    pub fn needs_reset(&self) {
        let before = self.0.status.fetch_or(status::NEEDS_RESET, SeqCst);
        if before & status::DRIVER_OK != 0 && before & status::NEEDS_RESET == 0 {
            self.0.interrupt.config();
        }
    }

    /// Whether the device waits for a reset.
    pub fn waits_for_reset(&self) -> bool {
        self.0.status.load(SeqCst) & status::NEEDS_RESET != 0
    }
}

/// Reads `data.len()` bytes at `offset` of a configuration space of `bytes`; what lies outside is zero.
pub fn read_config(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)) else { return };
    let n = rest.len().min(data.len());
    data[..n].copy_from_slice(&rest[..n]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_ids() {
        assert_eq!((DeviceId::Net.pci(), DeviceId::Fs.pci()), (0x1041, 0x105a));
    }

    #[test]
    fn configuration_reads_are_bounded() {
        let mut data = [9; 4];
        read_config(&[1, 2, 3], 1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        read_config(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
