//! The virtio transport of the ABI.
//!
//! A device shows the registers of virtio-mmio version 2 (virtio 1.2, section 4.2.2), reached with [`crate::call::Call::VirtioRead`] and
//! [`crate::call::Call::VirtioWrite`] instead of trapped loads and stores; configuration space starts at [`CONFIG`]. Two things differ:
//! new buffers are announced with [`crate::call::Call::Notify`], and a device's events are bits in
//! [`crate::shared::SharedPage::events`], raised with one vector for all devices. The register InterruptStatus tells used buffers from a changed configuration.

/// Most devices: one for each event bit.
pub const MAX_DEVICES: u32 = 64;

/// Offset of the device's configuration space.
pub const CONFIG: u64 = 0x100;
/// First offset behind the configuration space.
pub const REGISTERS_END: u64 = 0x1000;

/// Argument of [`crate::call::Call::Notify`] for one queue of one device.
pub const fn doorbell(device: u32, queue: u16) -> u64 {
    (device as u64) << 16 | queue as u64
}

/// Device and queue of a doorbell; `None` when other bits are set.
pub const fn from_doorbell(bits: u64) -> Option<(u32, u16)> {
    if bits >> 48 != 0 { None } else { Some(((bits >> 16) as u32, bits as u16)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doorbells() {
        assert_eq!(from_doorbell(doorbell(63, 65535)), Some((63, 65535)));
        assert_eq!(from_doorbell(1 << 48), None);
    }
}
