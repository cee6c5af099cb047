//! A descriptor chain: the buffers of one request, checked as a whole before any of them is used.
//!
//! [`Chain::walk`] reads every descriptor once and accepts the chain only if all indices are in range, it ends, no readable buffer follows a
//! writable one, and each buffer lies in RAM. From then on the guest may do to the table what it likes: the chain has
//! its own copy. The contents of the buffers stay the guest's; a device copies what it has to check.

use paravane_ram::{GuestRam, WatchSlice};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::QueueError;

/// Most descriptors of an indirect table; what drivers use ends far below.
const MAX_INDIRECT: u32 = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer: guest-physical address and length, all of it in one region of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    at: u64,
    len: u32,
}

/// A chain's readable buffers hold fewer bytes than are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request is shorter than its kind says")]
pub struct Short;

/// The buffers of one request, with a position among the readable and one among the writable ones.
pub struct Chain {
    head: u16,
    mem: GuestRam,
    /// Readable ones first. Consumed ones have moved their start and shrunk.
    parts: Vec<Part>,
    /// Number of readable ones.
    readable: usize,
    next_read: usize,
    next_write: usize,
    written: u32,
}

/// Reads one descriptor.
fn descriptor(mem: &GuestRam, table: u64, index: u16) -> Result<Descriptor, QueueError> {
    let at = table.checked_add(u64::from(index) * 16).ok_or(QueueError::Buffer)?;
    mem.read_obj(GuestAddress(at)).map_err(|_| QueueError::Buffer)
}

impl Chain {
    /// Reads and checks the chain that starts at descriptor `head` of a table with `size` entries.
    pub(crate) fn walk(mem: &GuestRam, table: u64, size: u16, head: u16, indirect: bool) -> Result<Self, QueueError> {
        let mut chain = Self {
            head,
            mem: mem.clone(),
            parts: Vec::with_capacity(4),
            readable: 0,
            next_read: 0,
            next_write: 0,
            written: 0,
        };
        let (mut table, mut size, mut index) = (table, u32::from(size), head);
        let (mut nested, mut left, mut total) = (false, size, 0u64);
        loop {
            if u32::from(index) >= size {
                return Err(QueueError::DescriptorIndex);
            }
            left = left.checked_sub(1).ok_or(QueueError::TooLong)?;
            let d = descriptor(mem, table, index)?;
            if d.flags() & INDIRECT != 0 {
                let entries = d.len() / 16;
                if nested || !indirect || d.flags() & NEXT != 0 || d.len() % 16 != 0 || entries == 0 {
                    return Err(QueueError::Indirect);
                }
                if entries > MAX_INDIRECT {
                    return Err(QueueError::TooLong);
                }
                (table, size, index, left) = (d.addr().0, entries, 0, entries);
                nested = true;
                continue;
            }
            chain.add(d, &mut total)?;
            if d.flags() & NEXT == 0 {
                chain.next_write = chain.readable;
                return Ok(chain);
            }
            index = d.next();
        }
    }

    fn add(&mut self, d: Descriptor, total: &mut u64) -> Result<(), QueueError> {
        let part = Part { at: d.addr().0, len: d.len() };
        if d.flags() & WRITE == 0 {
            if self.readable != self.parts.len() {
                return Err(QueueError::Order);
            }
            self.readable += 1;
        }
        *total += u64::from(part.len);
        if *total > u64::from(u32::MAX) {
            return Err(QueueError::TooLarge);
        }
        if part.len > 0 {
            self.mem.get_slice(GuestAddress(part.at), part.len as usize).map_err(|_| QueueError::Buffer)?;
        }
        self.parts.push(part);
        Ok(())
    }

    /// The descriptor that names the chain in the rings.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Guest memory.
    pub fn mem(&self) -> &GuestRam {
        &self.mem
    }

    /// Bytes that can still be read.
    pub fn readable_len(&self) -> u32 {
        self.parts[self.next_read..self.readable].iter().map(|p| p.len).sum()
    }

    /// Bytes that can still be written.
    pub fn writable_len(&self) -> u32 {
        self.parts[self.next_write..].iter().map(|p| p.len).sum()
    }

    /// Bytes written so far, which is what [`crate::Queue::complete`] wants to know.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// The memory that can still be read.
    pub fn readable(&self) -> impl Iterator<Item = VolatileSlice<'_, WatchSlice<'_>>> {
        self.slices(&self.parts[self.next_read..self.readable])
    }

    /// The memory that can still be written. Writing through raw pointers obliges to `mark_dirty`, see [`paravane_ram`].
    pub fn writable(&self) -> impl Iterator<Item = VolatileSlice<'_, WatchSlice<'_>>> {
        self.slices(&self.parts[self.next_write..])
    }

    fn slices<'a>(&'a self, parts: &'a [Part]) -> impl Iterator<Item = VolatileSlice<'a, WatchSlice<'a>>> {
        // All of it was in RAM when the chain was taken, and RAM does not go away.
        parts.iter().filter(|p| p.len > 0).filter_map(|p| self.mem.get_slice(GuestAddress(p.at), p.len as usize).ok())
    }

    /// Reads from the current position; gives the number of bytes, fewer than asked for only at the end.
    pub fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() && self.next_read < self.readable {
            let p = &mut self.parts[self.next_read];
            let n = (p.len as usize).min(buf.len() - done);
            if self.mem.read_slice(&mut buf[done..done + n], GuestAddress(p.at)).is_err() {
                return done;
            }
            p.advance(n);
            self.next_read += usize::from(p.len == 0);
            done += n;
        }
        done
    }

    /// Reads exactly one value.
    ///
    /// # Errors
    /// When the readable part ends first.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, Short> {
        let mut value = T::default();
        let bytes = value.as_mut_slice();
        if self.read(bytes) == bytes.len() { Ok(value) } else { Err(Short) }
    }

    /// Passes over readable bytes; gives how many.
    pub fn skip_read(&mut self, mut n: usize) -> usize {
        let asked = n;
        while n > 0 && self.next_read < self.readable {
            let p = &mut self.parts[self.next_read];
            let step = (p.len as usize).min(n);
            p.advance(step);
            self.next_read += usize::from(p.len == 0);
            n -= step;
        }
        asked - n
    }

    /// Writes at the current position; gives the number of bytes, fewer than asked for only at the end.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && self.next_write < self.parts.len() {
            let p = &mut self.parts[self.next_write];
            let n = (p.len as usize).min(bytes.len() - done);
            if self.mem.write_slice(&bytes[done..done + n], GuestAddress(p.at)).is_err() {
                return done;
            }
            p.advance(n);
            self.next_write += usize::from(p.len == 0);
            self.written += n as u32;
            done += n;
        }
        done
    }

    /// Counts bytes that were written through [`Self::writable`], and moves behind them.
    pub fn note_written(&mut self, n: usize) {
        let mut left = n;
        while left > 0 && self.next_write < self.parts.len() {
            let p = &mut self.parts[self.next_write];
            let step = (p.len as usize).min(left);
            p.advance(step);
            self.next_write += usize::from(p.len == 0);
            self.written += step as u32;
            left -= step;
        }
    }

    /// Cuts the last writable byte off the chain and gives its address: block devices have their status there.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let p = self.parts[self.next_write..].iter_mut().rev().find(|p| p.len > 0)?;
        p.len -= 1;
        Some(GuestAddress(p.at + u64::from(p.len)))
    }
}

impl Part {
    fn advance(&mut self, n: usize) {
        self.at += n as u64;
        self.len -= n as u32;
    }
}
