//! Virtio devices. There are none yet; this crate holds the device numbers that guests and hypervisor agree on.
#![forbid(unsafe_code)]

/// Device IDs (virtio 1.3, section 5).
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
    /// Socket device.
    Vsock = 19,
    /// File system.
    Fs = 26,
}

impl DeviceId {
    /// PCI device ID of the modern device (virtio 1.3, section 4.1.2).
    pub fn pci(self) -> u16 {
        0x1040 + self as u16
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceId;

    #[test]
    fn pci_ids() {
        assert_eq!((DeviceId::Net.pci(), DeviceId::Fs.pci()), (0x1041, 0x105a));
    }
}
