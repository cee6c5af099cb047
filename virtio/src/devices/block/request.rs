//! One block request (virtio 1.2, section 5.2.6): a header, data, a status byte.

use std::io;

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::image::SECTOR;
use super::{Disk, MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use crate::{Chain, Short};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Request types.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Whether a request is finished.
pub(super) enum Work {
    /// It is, and its status is written.
    Done,
    /// It is not: [`Request::carry_out`] is to be called on a thread that may wait.
    Waits,
}

/// A request with its status byte found and its header read.
pub(super) struct Request {
    chain: Chain,
    status: GuestAddress,
    mem: paravane_ram::GuestRam,
    kind: u32,
    sector: u64,
    written: u32,
}

impl Request {
    /// Reads a request's header.
    ///
    /// # Errors
    /// [`Short`]: there is no place for a status, or no whole header. Nothing can be answered then.
    pub(super) fn parse(mut chain: Chain) -> Result<Self, Short> {
        let kind = chain.read_obj::<u32>()?;
        let _reserved = chain.read_obj::<u32>()?;
        let sector = chain.read_obj::<u64>()?;
        let status = chain.take_last_byte().ok_or(Short)?;
        let mem = chain.mem().clone();
        Ok(Self { chain, status, mem, kind: u32::from_le(kind), sector: u64::from_le(sector), written: 0 })
    }

    pub(super) fn head(&self) -> u16 {
        self.chain.head()
    }

    /// Bytes written into guest memory, the status included.
    pub(super) fn written(&self) -> u32 {
        self.written
    }

    /// Does what can be done without waiting.
    pub(super) fn begin(&mut self, disk: &Disk) -> Work {
        let status = match self.kind {
            kind::IN => match self.range(disk, self.chain.writable_len()) {
                Err(status) => status,
                Ok(at) => {
                    let into: Vec<_> = self.chain.writable().collect();
                    match disk.image.read_now(at, &into) {
                        Some(Ok(())) => OK,
                        _ => return Work::Waits,
                    }
                }
            },
            kind::OUT => self.write(disk),
            kind::GET_ID => {
                let n = self.chain.write(&disk.serial);
                self.written = n as u32;
                return self.answer(OK);
            }
            kind::FLUSH | kind::DISCARD | kind::WRITE_ZEROES => return Work::Waits,
            _ => UNSUPP,
        };
        self.answer_data(status)
    }

    /// Does the rest.
    pub(super) fn carry_out(&mut self, disk: &Disk) {
        let status = match self.kind {
            kind::IN => self.read(disk),
            kind::FLUSH => status_of(disk.image.flush()),
            kind::DISCARD | kind::WRITE_ZEROES => self.segments(disk),
            _ => UNSUPP,
        };
        self.answer_data(status);
    }

    fn answer_data(&mut self, status: u8) -> Work {
        if self.kind == kind::IN && status == OK {
            self.written = self.chain.writable_len();
        }
        self.answer(status)
    }

    fn answer(&mut self, status: u8) -> Work {
        if self.mem.write_obj(status, self.status).is_ok() {
            self.written = self.written.saturating_add(1);
        }
        Work::Done
    }

    /// Where `len` bytes from the request's sector on are, if they are on the disk.
    fn range(&self, disk: &Disk, len: u32) -> Result<u64, u8> {
        extent(disk, self.sector, u64::from(len))
    }

    fn read(&self, disk: &Disk) -> u8 {
        let into: Vec<VolatileSlice<'_, _>> = self.chain.writable().collect();
        match self.range(disk, self.chain.writable_len()) {
            Ok(at) => status_of(disk.image.read(at, &into)),
            Err(status) => status,
        }
    }

    fn write(&self, disk: &Disk) -> u8 {
        if disk.readonly {
            return IOERR;
        }
        let from: Vec<VolatileSlice<'_, _>> = self.chain.readable().collect();
        match self.range(disk, self.chain.readable_len()) {
            Ok(at) => status_of(disk.image.write(at, &from)),
            Err(status) => status,
        }
    }

    /// Discards or zeroes segments: sector, number of sectors, flags.
    fn segments(&mut self, disk: &Disk) -> u8 {
        if disk.readonly {
            return IOERR;
        }
        let bytes = self.chain.readable_len();
        if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > MAX_SEGMENTS {
            return IOERR;
        }
        for _ in 0..bytes / 16 {
            let mut raw = [0; 16];
            self.chain.read(&mut raw);
            let [a, b, c, d, e, f, g, h, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let discard = self.kind == kind::DISCARD;
            // Bit 0 is "unmap", which a discard does anyway; all others are reserved (section 5.2.6.2).
            if flags & !1 != 0 || discard && flags != 0 {
                return UNSUPP;
            }
            if sectors > MAX_SEGMENT_SECTORS {
                return IOERR;
            }
            let len = u64::from(sectors) * SECTOR;
            let done = match extent(disk, sector, len) {
                Err(status) => return status,
                Ok(at) if discard => disk.image.discard(at, len),
                Ok(at) => disk.image.write_zeroes(at, len, flags & 1 != 0),
            };
            if done.is_err() {
                return IOERR;
            }
        }
        OK
    }
}

/// Byte offset of a whole number of sectors that are on the disk.
fn extent(disk: &Disk, sector: u64, len: u64) -> Result<u64, u8> {
    let at = sector.checked_mul(SECTOR).ok_or(IOERR)?;
    let end = at.checked_add(len).ok_or(IOERR)?;
    if !len.is_multiple_of(SECTOR) || end > disk.image.size() { Err(IOERR) } else { Ok(at) }
}

fn status_of(r: io::Result<()>) -> u8 {
    if r.is_ok() { OK } else { IOERR }
}
