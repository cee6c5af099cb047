//! The backend that is a TAP device of the host.
//!
//! The kernel speaks the same header as virtio, so checksums and segmentation stay open all the way through. Opening a TAP
//! device needs CAP_NET_ADMIN, unless the device was made for this user beforehand.

#![allow(unsafe_code)] // ioctl(2)

use super::run::readable;
use super::{Backend, BackendError, HEADER, Header, LONGEST, feature};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// A TAP device.
pub struct Tap {
    file: File,
    packet: Vec<u8>,
    /// Bytes of a frame in `packet`, header included.
    len: usize,
    up: bool,
}

impl Tap {
    /// Opens the device of a name.
    ///
    /// # Errors
    /// There is no such device and none can be made, or it belongs to somebody else.
    pub fn open(name: &str) -> Result<Self, BackendError> {
        let failed = |error| BackendError::Tap(name.to_owned(), error);
        let mut request = request(name).map_err(failed)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(failed)?;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        check(done).map_err(failed)?;
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) };
        check(done).map_err(failed)?;
        Ok(Self { file, packet: vec![0; HEADER + LONGEST], len: 0, up: true })
    }

    fn set_offload(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What TUNSETIFF wants: a TAP device with virtio's header and without the tun header.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an `ifreq` of zeros is a valid value of its plain fields.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a device's name has 1 to 15 bytes"));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    Ok(request)
}

/// TUNSETOFFLOAD's flags for what a driver takes.
fn offload_flags(features: u64) -> libc::c_uint {
    let has = |mask| features & mask != 0;
    let mut flags = 0;
    if has(feature::GUEST_CSUM) {
        flags |= libc::TUN_F_CSUM;
        for (mask, flag) in [(feature::GUEST_TSO4, libc::TUN_F_TSO4), (feature::GUEST_TSO6, libc::TUN_F_TSO6)] {
            flags |= if has(mask) { flag } else { 0 };
        }
    }
    flags
}

impl Backend for Tap {
    fn features(&self) -> u64 {
        feature::CSUM
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::GUEST_CSUM
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
    }

    fn begin(&mut self, features: u64) {
        // If the kernel refuses, it completes everything itself, which is always right.
        let _ = self.set_offload(offload_flags(features));
    }

    fn end(&mut self) {
        self.len = 0;
    }

    fn wait_for(&self) -> Option<(RawFd, i16)> {
        // While a frame waits for the guest, more of them are no reason to wake.
        (self.up && self.len == 0).then(|| readable(self.file.as_fd()))
    }

    fn send(&mut self, packet: &[u8]) {
        // A full or vanished device loses the frame, as a wire does; the kernel checks the header.
        let _ = self.file.write(packet);
    }

    fn turn(&mut self) -> Option<Duration> {
        None
    }

    fn frame(&mut self) -> Option<(Header, &[u8])> {
        if self.len == 0 && self.up {
            match self.file.read(&mut self.packet) {
                Ok(len) if len > HEADER => self.len = len,
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => self.up = false,
            }
        }
        let packet = self.packet.get(..self.len)?;
        let (header, frame) = packet.split_first_chunk()?;
        Some((Header::read(header), frame))
    }

    fn consume(&mut self) {
        self.len = 0;
    }

    fn link_up(&self) -> bool {
        self.up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        for wrong in ["", "sixteen-bytes-xx", "a\0b"] {
            assert!(matches!(Tap::open(wrong), Err(BackendError::Tap(..))), "{wrong:?}");
        }
        let request = request("tap0").unwrap();
        assert_eq!(request.ifr_name[..5].iter().map(|c| *c as u8).collect::<Vec<_>>(), b"tap0\0");
    }

    #[test]
    fn segmentation_needs_checksums() {
        assert_eq!(offload_flags(feature::GUEST_TSO4), 0);
        let flags = offload_flags(feature::GUEST_TSO4 | feature::GUEST_CSUM);
        assert_eq!(flags, libc::TUN_F_CSUM | libc::TUN_F_TSO4);
    }
}
