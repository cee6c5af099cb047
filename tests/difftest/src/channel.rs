//! Memory that a tester and its native process share: a batch of inputs and outcomes, and the code window.
#![allow(unsafe_code)] // Anonymous shared memory has no safe interface.

use crate::layout::{self, IMAGE_BYTES, IMAGES};
use crate::state::{Input, Outcome};
use std::io;

/// Sequences per batch.
pub const BATCH: usize = 64;

/// The shared block. Only one of the two processes touches it at a time: they take turns through a socket.
#[repr(C)]
pub struct Channel {
    /// Sequences in this batch.
    pub count: usize,
    /// Where each begins.
    pub inputs: [Input; BATCH],
    /// What each came to.
    pub outcomes: [Outcome; BATCH],
    /// Initial memory images.
    pub images: [[u8; IMAGE_BYTES]; IMAGES],
    /// Content of the read-only page.
    pub read_only: [u8; layout::PAGE as usize],
}

/// A shared mapping, unmapped when dropped.
#[derive(Debug)]
pub struct SharedMap {
    at: *mut u8,
    len: usize,
}

impl SharedMap {
    /// `len` bytes of zeroed memory, shared with children made by fork. `fd` is a file to map instead.
    pub fn new(len: usize, fd: Option<i32>) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | if fd.is_some() { 0 } else { libc::MAP_ANONYMOUS };
        // SAFETY: a fresh mapping at an address the kernel chooses disturbs nothing.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd.unwrap_or(-1), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at: at.cast(), len })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.at
    }

    /// Copies `data` to offset `at`.
    ///
    /// # Panics
    ///
    /// When it does not fit.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.len, "write within the shared mapping");
        // SAFETY: the range was just checked and `&mut self` owns the mapping on this side.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.at.add(at), data.len()) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and nobody keeps pointers into it beyond this value.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// The channel itself.
#[derive(Debug)]
pub struct ChannelMap(SharedMap);

impl ChannelMap {
    /// A channel with the initial memory images filled in.
    pub fn new() -> io::Result<Self> {
        let mut c = Self(SharedMap::new(size_of::<Channel>(), None)?);
        let ch = c.get();
        for (n, image) in ch.images.iter_mut().enumerate() {
            image.copy_from_slice(&layout::image(n));
        }
        ch.read_only.copy_from_slice(&layout::read_only_page());
        Ok(c)
    }

    /// The block; the native process must be waiting.
    pub fn get(&mut self) -> &mut Channel {
        // SAFETY: the mapping has the size and (page) alignment of `Channel`. All-zero bytes are a valid `Channel` (`End::None` is 0)
        // and the other side writes only valid values. The turn-taking makes this side the only user.
        unsafe { &mut *self.0.as_ptr().cast::<Channel>() }
    }

    /// The block's address, for the native process.
    pub fn as_ptr(&self) -> *mut Channel {
        self.0.as_ptr().cast()
    }
}
