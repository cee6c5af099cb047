//! Linear-address memory access for emulated instructions: translate, check, read or write, split at page boundaries.
//!
//! An access that crosses a page is translated whole before its first byte moves, so a fault on the second page leaves
//! memory and devices untouched. Outside 64-bit code linear addresses wrap at 4 GiB; in long mode an address that is not
//! canonical is a general-protection fault (callers that owe the guest a stack fault instead check beforehand).

use crate::mmu::{Access, AccessKind, is_canonical};
use crate::{CpuState, Env, Exception};

/// Page size in bytes, the unit in which accesses are split.
const PAGE: u64 = 4096;

/// The most pages that one piece of an access touches; longer accesses are made piece by piece.
const PIECE_PAGES: usize = 4;

/// On whose behalf an access is made (SDM vol. 3, section 4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// With the current privilege level; supervisor accesses to user pages obey SMAP and EFLAGS.AC.
    Current,
    /// An implicit supervisor access (descriptor tables, TSS, exception frames): supervisor whatever the CPL, and AC does not lift SMAP.
    Supervisor,
}

impl Privilege {
    fn access(self, st: &CpuState, kind: AccessKind) -> Access {
        match self {
            Self::Current => Access::current(st, kind),
            Self::Supervisor => Access::supervisor(kind),
        }
    }
}

/// Reads `data.len()` bytes at linear address `la`; nothing is consumed when it faults.
pub fn read<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    la: u64,
    data: &mut [u8],
    p: Privilege,
) -> Result<(), Exception> {
    let access = p.access(st, AccessKind::Read);
    read_as(st, env, la, data, access)
}

/// Writes `data` at linear address `la`; both pages of a crossing write are checked before the first byte is stored.
pub fn write<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    la: u64,
    data: &[u8],
    p: Privilege,
) -> Result<(), Exception> {
    let access = p.access(st, AccessKind::Write);
    write_as(st, env, la, data, access)
}

/// [`read()`] with the access spelled out (stack accesses of a far transfer are made at the new privilege level).
pub(crate) fn read_as<E: Env + ?Sized>(
    st: &CpuState,
    env: &mut E,
    la: u64,
    data: &mut [u8],
    access: Access,
) -> Result<(), Exception> {
    let mut done = 0;
    while done < data.len() {
        let piece = Piece::translate(st, env, la.wrapping_add(done as u64), data.len() - done, access)?;
        let part = &mut data[done..done + piece.len];
        piece.each(|gpa, range| env.read_phys(gpa, &mut part[range]));
        done += piece.len;
    }
    Ok(())
}

/// [`write()`] with the access spelled out.
pub(crate) fn write_as<E: Env + ?Sized>(
    st: &CpuState,
    env: &mut E,
    la: u64,
    data: &[u8],
    access: Access,
) -> Result<(), Exception> {
    let mut done = 0;
    while done < data.len() {
        let piece = Piece::translate(st, env, la.wrapping_add(done as u64), data.len() - done, access)?;
        let part = &data[done..done + piece.len];
        piece.each(|gpa, range| env.write_phys(gpa, &part[range]));
        done += piece.len;
    }
    Ok(())
}

/// Checks that `len` bytes at `la` could be written now, without writing them; sets accessed and dirty bits.
/// Read-modify-write instructions and those that store after a side effect call it first.
pub fn probe_write<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    la: u64,
    len: usize,
    p: Privilege,
) -> Result<(), Exception> {
    let access = p.access(st, AccessKind::Write);
    let mut done = 0;
    while done < len {
        done += Piece::translate(st, env, la.wrapping_add(done as u64), len - done, access)?.len;
    }
    Ok(())
}

/// Reads instruction bytes at linear address `la` (CS base included) into `buf`, with fetch rights.
///
/// Gives the number of bytes read, at least one: it stops short at the first page that faults, and fails only if that is the
/// first. The CS limit is the caller's matter.
pub fn fetch<E: Env + ?Sized>(st: &CpuState, env: &mut E, la: u64, buf: &mut [u8]) -> Result<usize, Exception> {
    let access = Access::current(st, AccessKind::Execute);
    let mut done = 0;
    while done < buf.len() {
        let at = wrap(st, la.wrapping_add(done as u64), access);
        let room = ((PAGE - at % PAGE) as usize).min(buf.len() - done);
        match translate(st, env, at, access) {
            Ok(gpa) => env.read_phys(gpa, &mut buf[done..done + room]),
            Err(e) if done == 0 => return Err(e),
            Err(_) => break,
        }
        done += room;
    }
    Ok(done)
}

macro_rules! sized {
    ($read:ident, $write:ident, $t:ty, $bits:literal) => {
        #[doc = concat!("Reads ", $bits, " bits at linear address `la`, little-endian.")]
        pub fn $read<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, la: u64, p: Privilege) -> Result<$t, Exception> {
            let mut b = [0; size_of::<$t>()];
            read(st, env, la, &mut b, p)?;
            Ok(<$t>::from_le_bytes(b))
        }

        #[doc = concat!("Writes ", $bits, " bits at linear address `la`, little-endian.")]
        pub fn $write<E: Env + ?Sized>(
            st: &mut CpuState,
            env: &mut E,
            la: u64,
            value: $t,
            p: Privilege,
        ) -> Result<(), Exception> {
            write(st, env, la, &value.to_le_bytes(), p)
        }
    };
}

sized!(read_u8, write_u8, u8, "8");
sized!(read_u16, write_u16, u16, "16");
sized!(read_u32, write_u32, u32, "32");
sized!(read_u64, write_u64, u64, "64");

/// A linear address as the current mode sees it: explicit accesses of code that is not 64-bit, and all outside long
/// mode, wrap at 4 GiB.
fn wrap(st: &CpuState, la: u64, access: Access) -> u64 {
    if st.code64() || (st.long_mode() && access.implicit) { la } else { la & 0xffff_ffff }
}

/// One page's guest-physical address.
fn translate<E: Env + ?Sized>(st: &CpuState, env: &mut E, la: u64, access: Access) -> Result<u64, Exception> {
    if st.long_mode() && !is_canonical(la) {
        return Err(Exception::GeneralProtection(0));
    }
    env.translate(st, la, access)
}

/// A translated run of at most [`PIECE_PAGES`] pages.
struct Piece {
    gpa: [u64; PIECE_PAGES],
    /// Bytes in the first page.
    first: usize,
    len: usize,
}

impl Piece {
    fn translate<E: Env + ?Sized>(
        st: &CpuState,
        env: &mut E,
        la: u64,
        len: usize,
        access: Access,
    ) -> Result<Self, Exception> {
        let la = wrap(st, la, access);
        let room = (PAGE - la % PAGE) as usize;
        let len = len.min(room + (PIECE_PAGES - 1) * PAGE as usize);
        let first = room.min(len);
        let mut gpa = [translate(st, env, la, access)?; PIECE_PAGES];
        let mut at = first;
        let mut n = 1;
        while at < len {
            gpa[n] = translate(st, env, wrap(st, la.wrapping_add(at as u64), access), access)?;
            at += PAGE as usize;
            n += 1;
        }
        Ok(Self { gpa, first, len })
    }

    /// Calls `f` with the address and byte range of each page's part.
    fn each(&self, mut f: impl FnMut(u64, std::ops::Range<usize>)) {
        let mut at = 0;
        let mut end = self.first;
        for gpa in self.gpa {
            if at >= self.len {
                break;
            }
            f(gpa, at..end);
            at = end;
            end = (end + PAGE as usize).min(self.len);
        }
    }
}

#[cfg(test)]
mod tests;
