//! Fields of Linux's `boot_params` that the loader fills (Linux, Documentation/arch/x86/zero-page.rst and boot.rst), by
//! offset.

use super::{LoadError, place, put};
use crate::memory::{self, GuestRam};

/// Offset of `setup_header` in a bzImage and in `boot_params`.
pub(super) const HEADER: usize = 0x1f1;
const ACPI_RSDP: usize = 0x70;
const E820_COUNT: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;

/// End of conventional memory: the last kilobyte below 640 KiB is the EBDA.
const LOW_END: u64 = 0x9_fc00;
const ACPI_START: u64 = 0xe_0000;
const HIGH: u64 = 0x10_0000;

/// The memory map that firmware would report: (start, length, type).
pub(super) fn e820(mem: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut out = vec![(0, LOW_END, 1), (LOW_END, 0xa_0000 - LOW_END, 2), (ACPI_START, HIGH - ACPI_START, 2)];
    for (start, len) in memory::ranges(mem) {
        let end = start + len;
        let start = start.max(HIGH);
        if end > start {
            out.push((start, end - start, 1));
        }
    }
    out
}

/// A zero page under construction.
pub(super) struct ZeroPage(Vec<u8>);

impl ZeroPage {
    /// Copies the kernel's own setup header.
    pub(super) fn new(header: &[u8]) -> Self {
        let mut page = vec![0; 4096];
        let n = header.len().min(0x290 - HEADER);
        page[HEADER..HEADER + n].copy_from_slice(&header[..n]);
        // An undefined loader, and no heap.
        page[TYPE_OF_LOADER] = 0xff;
        page[LOADFLAGS] &= !0x80;
        Self(page)
    }

    fn put32(&mut self, at: usize, v: u32) {
        self.0[at..at + 4].copy_from_slice(&v.to_le_bytes());
    }

    pub(super) fn ramdisk(&mut self, at: u64, len: u64) {
        self.put32(RAMDISK_IMAGE, at as u32);
        self.put32(RAMDISK_SIZE, len as u32);
    }

    pub(super) fn cmdline(&mut self, at: u64) {
        self.put32(CMD_LINE_PTR, at as u32);
    }

    /// Adds the memory map and the RSDP, and writes the page.
    pub(super) fn finish(mut self, mem: &GuestRam, rsdp: u64) -> Result<u64, LoadError> {
        self.0[ACPI_RSDP..ACPI_RSDP + 8].copy_from_slice(&rsdp.to_le_bytes());
        let map = e820(mem);
        self.0[E820_COUNT] = map.len() as u8;
        for (n, (start, len, kind)) in map.into_iter().enumerate() {
            let at = E820_TABLE + n * 20;
            self.0[at..at + 8].copy_from_slice(&start.to_le_bytes());
            self.0[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
            self.0[at + 16..at + 20].copy_from_slice(&kind.to_le_bytes());
        }
        put(mem, place::INFO, &self.0, "boot parameters")?;
        Ok(place::INFO)
    }
}
