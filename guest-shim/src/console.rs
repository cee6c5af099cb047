//! Text to and from the machine's console, and pages that are not needed.

#![allow(unsafe_code)] // Device ports, and memory that is given away.

use crate::cpu;
use crate::shim::Shim;
use pv_abi::feature::Feature;
use pv_abi::memory::FreeRange;

/// 16550 registers: data, line status.
const DATA: u16 = 0;
const STATUS: u16 = 5;
const RECEIVED: u8 = 1;
const ROOM: u8 = 1 << 5;

impl Shim {
    /// Writes text to the console: all of it.
    pub fn write(&self, text: &[u8]) {
        let mut rest = text;
        if let Some(calls) = self.calls_for(Feature::Console) {
            while !rest.is_empty() {
                let (gpa, bytes) = self.piece(rest.as_ptr() as u64, rest.len());
                match calls.console_write(gpa, bytes) {
                    Ok(written @ 1..) => rest = &rest[rest.len().min(written as usize)..],
                    // The rest goes to the UART.
                    _ => break,
                }
            }
        }
        let port = self.platform.serial;
        for &byte in rest {
            // SAFETY: the UART touches no memory.
            unsafe {
                while cpu::in8(port + STATUS) & ROOM == 0 {
                    core::hint::spin_loop();
                }
                cpu::out8(port + DATA, byte);
            }
        }
    }

    /// Reads what was typed, as much as is there and has room. Gives the number of bytes.
    pub fn read(&self, into: &mut [u8]) -> usize {
        if into.is_empty() {
            return 0;
        }
        if let Some(calls) = self.calls_for(Feature::Console) {
            let (gpa, bytes) = self.piece(into.as_mut_ptr() as u64, into.len());
            // SAFETY: the memory is ours to be written.
            if let Ok(read) = unsafe { calls.console_read(gpa, bytes) } {
                return into.len().min(read as usize);
            }
        }
        let port = self.platform.serial;
        let mut read = 0;
        // SAFETY: the UART touches no memory.
        unsafe {
            // All ones: there is no UART.
            while read < into.len() && matches!(cpu::in8(port + STATUS), s if s & RECEIVED != 0 && s != 0xff) {
                into[read] = cpu::in8(port + DATA);
                read += 1;
            }
        }
        read
    }

    /// Guest-physical address and bytes of the first piece of a buffer that lies within a page and within the hypervisor's limit.
    pub(crate) fn piece(&self, address: u64, bytes: usize) -> (u64, u64) {
        let in_page = 4096 - (address & 0xfff);
        let limit = u64::from(self.limits.text.max(1));
        ((self.platform.to_gpa)(address), (bytes as u64).min(in_page).min(limit))
    }

    /// Tells the hypervisor that nobody needs the contents of these pages: they may read as anything until they are written. Gives how many ranges it
    /// made use of.
    ///
    /// # Safety
    /// Nobody needs them.
    pub unsafe fn free_pages(&self, ranges: &[FreeRange]) -> usize {
        /// As many as lie in one page wherever they are; arrays begin at multiples of 16.
        #[repr(align(512))]
        struct Piece([FreeRange; 32]);
        let Some(calls) = self.calls_for(Feature::FreePages) else { return 0 };
        let mut piece = Piece([FreeRange::default(); 32]);
        let (mut used, mut next) = (0, 0);
        while next < ranges.len() {
            let count = (ranges.len() - next).min(piece.0.len()).min(self.limits.elements as usize);
            piece.0[..count].copy_from_slice(&ranges[next..next + count]);
            let gpa = (self.platform.to_gpa)(&raw const piece as u64);
            // SAFETY: handed on to the caller.
            let (done, skip) = match unsafe { calls.free_pages(gpa, count as u64) } {
                Ok(0) => break,
                Ok(done) => (done, 0),
                // A hint that is refused is skipped.
                Err(partial) => (partial.done, 1),
            };
            let done = count.min(usize::try_from(done).unwrap_or(count));
            used += done;
            next += done + skip;
        }
        used
    }
}

impl core::fmt::Write for &Shim {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.write(text.as_bytes());
        Ok(())
    }
}
