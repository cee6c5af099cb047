//! Code memory: the one door to executable pages.
//!
//! The translation cache is one memfd mapped twice, writable at one address and executable at another; no page is ever
//! both. Space is handed out in one direction and taken back all at once when it runs out, which is rare and cheap compared with
//! keeping free lists: hot code is translated again within milliseconds.
#![allow(unsafe_code)] // Mapping and writing code memory.

use crate::BtError;

/// The translation cache's memory.
pub(crate) struct CodeMemory {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    used: usize,
}

// SAFETY: the mappings are owned by this value and are not tied to a thread.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `len` bytes; pages are committed when first used.
    pub(crate) fn new(len: usize) -> Result<Self, BtError> {
        let fail = |what: &str| BtError::Host(format!("{what}: {}", std::io::Error::last_os_error()));
        // SAFETY: the name is a valid C string; the descriptor is checked and closed below.
        let fd = unsafe { libc::memfd_create(c"paravane-tc".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(fail("the translation cache cannot be created"));
        }
        let map = |prot| {
            // SAFETY: a fresh mapping of our own descriptor at an address the kernel chooses.
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, 0) }
        };
        // SAFETY: `fd` is ours.
        let sized = unsafe { libc::ftruncate(fd, len as libc::off_t) } == 0;
        let rw = map(libc::PROT_READ | libc::PROT_WRITE);
        let rx = map(libc::PROT_READ | libc::PROT_EXEC);
        // SAFETY: `fd` is ours and no longer needed; the mappings keep the memory.
        unsafe { libc::close(fd) };
        if !sized || rw == libc::MAP_FAILED || rx == libc::MAP_FAILED {
            return Err(fail("the translation cache cannot be mapped (does this host forbid executable mappings?)"));
        }
        Ok(Self { rw: rw.cast(), rx: rx.cast(), len, used: 0 })
    }

    /// Address of an offset, as executed.
    pub(crate) fn address(&self, offset: u32) -> u64 {
        self.rx as u64 + u64::from(offset)
    }

    /// Offset of an executed address, if it lies in the cache.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u32> {
        let d = address.wrapping_sub(self.rx as u64);
        (d < self.len as u64).then_some(d as u32)
    }

    /// Executable range, for signal handlers.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.rx as u64..self.rx as u64 + self.len as u64
    }

    /// Places code, 16-byte aligned; `None` when the cache is full.
    pub(crate) fn place(&mut self, code: &[u8]) -> Option<u32> {
        let at = self.used;
        let end = at.checked_add(code.len())?;
        if end > self.len {
            return None;
        }
        // SAFETY: at..end lies within the writable view, which nothing else refers to.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(at), code.len()) };
        self.used = (end + 15) & !15;
        Some(at as u32)
    }

    /// Points the 32-bit displacement at `at` to `target`.
    pub(crate) fn patch(&mut self, at: u32, target: u32) {
        assert!(at as usize + 4 <= self.len, "a patch lies within the translation cache");
        let d = (i64::from(target) - i64::from(at) - 4) as i32;
        // SAFETY: in bounds as just checked; only this vCPU's thread runs or writes this code.
        unsafe { self.rw.add(at as usize).cast::<i32>().write_unaligned(d) };
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Forgets all code and gives its pages back to the host.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
        // SAFETY: the whole of our own shared mapping; its content is no longer needed.
        unsafe { libc::madvise(self.rw.cast(), self.len, libc::MADV_REMOVE) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and no code of this cache can be running any more.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}
