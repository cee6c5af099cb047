//! The page walk (SDM vol. 3, chapter 4): a linear address and an access in, a guest-physical address and the rights of
//! its page out, or the page fault that the guest is to see.
//!
//! [`walk`] knows every paging mode that the guest is offered: none, 32-bit two-level with 4 MiB pages and PSE-36, PAE
//! and four-level long-mode paging. It caches nothing; the engine's soft TLB keeps what it returns and drops it when
//! [`crate::TlbFlush`] says so.
//!
//! Two liberties that the architecture allows are taken. In PAE mode the four page-directory-pointer entries are read at
//! each walk instead of being kept in hidden registers (MOV to CR3 still checks them, see `system`). Accessed bits are set
//! once the access is known to be allowed, top level first; hardware may set those of the upper levels earlier.
//! A table outside RAM reads as all ones, as on a PC where nothing answers.

use crate::state::{cr0, cr4, efer, rflags};
use crate::{CpuState, Env, Exception, PageFaultCode};

/// Width of a guest-physical address in bits (MAXPHYADDR; CPUID leaf 0x8000_0008 must say the same).
pub const PHYS_BITS: u32 = 46;

/// How often a walk starts over because an entry changed under it. Other vCPUs cannot keep that up; tables in memory that
/// refuses writes (ROM) can, and then the access goes on with the bits left unset.
const MAX_ATTEMPTS: u32 = 1000;

/// Bits of a page fault's error code (SDM vol. 3, section 4.7).
#[allow(missing_docs)]
pub mod pf {
    pub const P: u32 = 1;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
}

/// Bits of a paging-structure entry (SDM vol. 3, section 4.5).
#[allow(missing_docs)]
pub mod pte {
    pub const P: u64 = 1;
    pub const RW: u64 = 1 << 1;
    pub const US: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// Address bits of an 8-byte entry.
    pub(super) const ADDR: u64 = ((1 << super::PHYS_BITS) - 1) & !0xfff;
    /// Bits 51..MAXPHYADDR, reserved in every 8-byte entry.
    pub(super) const RSVD_ADDR: u64 = ((1 << 52) - 1) & !((1 << super::PHYS_BITS) - 1);
    /// Bits 62..52, ignored in long mode and reserved in PAE mode.
    pub(super) const RSVD_PAE_HIGH: u64 = 0x7ff << 52;
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write (also the read half of a read-modify-write).
    Write,
    /// An instruction fetch.
    Execute,
}

/// An access to be checked (SDM vol. 3, section 4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Read, write or fetch.
    pub kind: AccessKind,
    /// A user-mode access: made at CPL 3 and not implicit.
    pub user: bool,
    /// An implicit supervisor access (descriptor tables, TSS, exception frames): EFLAGS.AC does not lift SMAP.
    pub implicit: bool,
}

impl Access {
    /// An explicit access at the current privilege level.
    pub fn current(st: &CpuState, kind: AccessKind) -> Self {
        Self { kind, user: st.cpl == 3, implicit: false }
    }

    /// An implicit supervisor access.
    pub fn supervisor(kind: AccessKind) -> Self {
        Self { kind, user: false, implicit: true }
    }
}

/// A page that an access may use, with its rights for accesses of the same kind of privilege (user or supervisor).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the very byte that was asked for.
    pub gpa: u64,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub page_shift: u8,
    /// The page is a user page (U/S set at every level).
    pub user: bool,
    /// Data reads are allowed in the requested view (SMAP and EFLAGS.AC, as they are now, included).
    pub readable: bool,
    /// Data writes are allowed in the requested view (CR0.WP, SMAP and EFLAGS.AC, as they are now, included).
    pub writable: bool,
    /// Fetches are allowed in the requested view (NX and SMEP included).
    pub executable: bool,
    /// The page is global (and CR4.PGE is set).
    pub global: bool,
    /// The dirty bit is set, so a write needs no further walk.
    pub dirty: bool,
}

/// Whether a 48-bit linear address is canonical (SDM vol. 1, section 3.3.7.1).
pub fn is_canonical(la: u64) -> bool {
    ((la << 16) as i64 >> 16) as u64 == la
}

/// The rights gathered on the way down: rights shrink, NX grows.
#[derive(Clone, Copy)]
struct Rights {
    rw: bool,
    user: bool,
    nx: bool,
}

impl Rights {
    const ALL: Self = Self { rw: true, user: true, nx: false };

    fn narrow(&mut self, entry: u64) {
        self.rw &= entry & pte::RW != 0;
        self.user &= entry & pte::US != 0;
    }
}

/// The entries that a walk used, top first, so that accessed and dirty bits can be set once the access is allowed.
struct Trail {
    entries: [(u64, u64); 4],
    len: usize,
    bytes: u8,
}

impl Trail {
    fn new(bytes: u8) -> Self {
        Self { entries: [(0, 0); 4], len: 0, bytes }
    }

    fn push(&mut self, gpa: u64, value: u64) {
        self.entries[self.len] = (gpa, value);
        self.len += 1;
    }

    /// The last entry as it was read.
    fn leaf(&self) -> u64 {
        self.entries[self.len.saturating_sub(1)].1
    }

    /// Sets A in every entry and, for writes, D in the last. `None` when an entry changed meanwhile; else the leaf as it is now.
    fn mark<E: Env + ?Sized>(&self, env: &mut E, write: bool) -> Option<u64> {
        let mut leaf = 0;
        for (n, &(gpa, value)) in self.entries[..self.len].iter().enumerate() {
            let last = n + 1 == self.len;
            let marked = value | pte::A | if last && write { pte::D } else { 0 };
            if marked != value && !env.update_pte(gpa, self.bytes, value, marked) {
                return None;
            }
            leaf = marked;
        }
        Some(leaf)
    }
}

/// What one attempt at a walk found: the leaf.
struct Leaf {
    base: u64,
    page_shift: u8,
    rights: Rights,
}

/// Why a walk ended without a leaf.
enum Miss {
    NotPresent,
    Reserved,
}

/// Translates `la` for `access`.
///
/// The caller has seen to it that `la` is canonical ([`is_canonical`]) in long mode and below 4 GiB outside it. Sets accessed bits,
/// and the dirty bit for a write. Fails with the page fault of SDM vol. 3, section 4.7, error code included.
pub fn walk<E: Env + ?Sized>(st: &CpuState, env: &mut E, la: u64, access: Access) -> Result<Translation, Exception> {
    if st.cr0 & cr0::PG == 0 {
        return Ok(Translation {
            gpa: la & 0xffff_ffff,
            page_shift: 12,
            user: true,
            readable: true,
            writable: true,
            executable: true,
            global: false,
            dirty: true,
        });
    }
    let bytes = if st.long_mode() || st.cr4 & cr4::PAE != 0 { 8 } else { 4 };
    let mut attempts = 0;
    loop {
        let mut trail = Trail::new(bytes);
        let found = if st.long_mode() {
            walk_long(st, env, la, &mut trail)
        } else if bytes == 8 {
            walk_pae(st, env, la & 0xffff_ffff, &mut trail)
        } else {
            walk_32(st, env, la & 0xffff_ffff, &mut trail)
        };
        let leaf = match found {
            Ok(leaf) => leaf,
            Err(Miss::NotPresent) => return Err(fault(st, la, access, 0)),
            Err(Miss::Reserved) => return Err(fault(st, la, access, pf::P | pf::RSVD)),
        };
        let (readable, writable, executable) = allowed(st, leaf.rights, access);
        let ok = match access.kind {
            AccessKind::Read => readable,
            AccessKind::Write => writable,
            AccessKind::Execute => executable,
        };
        if !ok {
            return Err(fault(st, la, access, pf::P));
        }
        let entry = match trail.mark(env, access.kind == AccessKind::Write) {
            Some(entry) => entry,
            None if attempts < MAX_ATTEMPTS => {
                attempts += 1;
                continue;
            }
            None => trail.leaf(),
        };
        return Ok(Translation {
            gpa: leaf.base | (la & ((1 << leaf.page_shift) - 1)),
            page_shift: leaf.page_shift,
            user: leaf.rights.user,
            readable,
            writable,
            executable,
            global: entry & pte::G != 0 && st.cr4 & cr4::PGE != 0,
            dirty: entry & pte::D != 0,
        });
    }
}

/// Rights of a page for the requested view: read, write, execute (SDM vol. 3, section 4.6.1).
fn allowed(st: &CpuState, r: Rights, access: Access) -> (bool, bool, bool) {
    if access.user {
        return (r.user, r.user && r.rw, r.user && !r.nx);
    }
    let smap = r.user && st.cr4 & cr4::SMAP != 0 && (access.implicit || st.rflags & rflags::AC == 0);
    let smep = r.user && st.cr4 & cr4::SMEP != 0;
    let writable = r.rw || st.cr0 & cr0::WP == 0;
    (!smap, !smap && writable, !smep && !r.nx)
}

/// The page fault for `access` with the given P and RSVD bits.
fn fault(st: &CpuState, la: u64, access: Access, base: PageFaultCode) -> Exception {
    let mut code = base;
    match access.kind {
        AccessKind::Read => {}
        AccessKind::Write => code |= pf::W,
        AccessKind::Execute => {
            let nx = st.cr4 & cr4::PAE != 0 && st.efer & efer::NXE != 0;
            if nx || st.cr4 & cr4::SMEP != 0 {
                code |= pf::I;
            }
        }
    }
    if access.user {
        code |= pf::U;
    }
    Exception::PageFault { addr: la, code }
}

/// Reads one 8-byte entry and checks P and the bits reserved at every level.
fn entry64<E: Env + ?Sized>(st: &CpuState, env: &mut E, gpa: u64, reserved: u64) -> Result<u64, Miss> {
    let entry = env.read_pte(gpa, 8).unwrap_or(u64::MAX);
    if entry & pte::P == 0 {
        return Err(Miss::NotPresent);
    }
    let nx = if st.efer & efer::NXE == 0 { pte::NX } else { 0 };
    if entry & (reserved | pte::RSVD_ADDR | nx) != 0 {
        return Err(Miss::Reserved);
    }
    Ok(entry)
}

/// Bits reserved in a large-page entry: the address bits below the page size, without the PAT bit (12).
fn large_reserved(shift: u8) -> u64 {
    ((1 << shift) - 1) & !0x1fff
}

/// Four-level paging (SDM vol. 3, section 4.5).
fn walk_long<E: Env + ?Sized>(st: &CpuState, env: &mut E, la: u64, trail: &mut Trail) -> Result<Leaf, Miss> {
    descend64(st, env, la, trail, st.cr3 & pte::ADDR, 39, 0)
}

/// The levels below `table`, whose entries each map `1 << shift` bytes, of 8-byte entries.
fn descend64<E: Env + ?Sized>(
    st: &CpuState,
    env: &mut E,
    la: u64,
    trail: &mut Trail,
    table: u64,
    top_shift: u8,
    reserved: u64,
) -> Result<Leaf, Miss> {
    let mut rights = Rights::ALL;
    let mut table = table;
    let mut shift = top_shift;
    loop {
        let gpa = table + ((la >> shift) & 0x1ff) * 8;
        let entry = entry64(st, env, gpa, reserved)?;
        // With NXE clear a set bit 63 has already faulted as reserved.
        rights.narrow(entry);
        rights.nx |= entry & pte::NX != 0;
        trail.push(gpa, entry);
        let large = shift > 12 && entry & pte::PS != 0;
        if large && (shift == 39 || entry & large_reserved(shift) != 0) {
            return Err(Miss::Reserved);
        }
        if large || shift == 12 {
            let base = entry & pte::ADDR & !((1_u64 << shift) - 1);
            return Ok(Leaf { base, page_shift: shift, rights });
        }
        table = entry & pte::ADDR;
        shift -= 9;
    }
}

/// PAE paging (SDM vol. 3, section 4.4).
fn walk_pae<E: Env + ?Sized>(st: &CpuState, env: &mut E, la: u64, trail: &mut Trail) -> Result<Leaf, Miss> {
    let gpa = (st.cr3 & 0xffff_ffe0) + (la >> 30) * 8;
    let entry = env.read_pte(gpa, 8).unwrap_or(u64::MAX);
    if !pdpte_valid(entry) {
        return Err(Miss::Reserved);
    }
    if entry & pte::P == 0 {
        return Err(Miss::NotPresent);
    }
    // The pointer entry has neither rights nor an accessed bit.
    descend64(st, env, la, trail, entry & pte::ADDR, 21, pte::RSVD_PAE_HIGH)
}

/// Whether a PAE page-directory-pointer entry has no reserved bit set (SDM vol. 3, table 4-8); absent ones are always valid.
pub(crate) fn pdpte_valid(entry: u64) -> bool {
    let reserved = 0x1e6 | pte::RSVD_ADDR | pte::RSVD_PAE_HIGH | pte::NX;
    entry & pte::P == 0 || entry & reserved == 0
}

/// 32-bit paging (SDM vol. 3, section 4.3).
fn walk_32<E: Env + ?Sized>(st: &CpuState, env: &mut E, la: u64, trail: &mut Trail) -> Result<Leaf, Miss> {
    let absent = u64::from(u32::MAX);
    let mut rights = Rights::ALL;
    let gpa = (st.cr3 & 0xffff_f000) + (la >> 22) * 4;
    let pde = env.read_pte(gpa, 4).unwrap_or(absent);
    if pde & pte::P == 0 {
        return Err(Miss::NotPresent);
    }
    rights.narrow(pde);
    trail.push(gpa, pde);
    if pde & pte::PS != 0 && st.cr4 & cr4::PSE != 0 {
        // PSE-36: bits 20..13 of the entry are bits 39..32 of the address.
        if pde & (1 << 21) != 0 {
            return Err(Miss::Reserved);
        }
        let base = (pde & 0xffc0_0000) | ((pde >> 13) & 0xff) << 32;
        return Ok(Leaf { base, page_shift: 22, rights });
    }
    let gpa = (pde & 0xffff_f000) + ((la >> 12) & 0x3ff) * 4;
    let entry = env.read_pte(gpa, 4).unwrap_or(absent);
    if entry & pte::P == 0 {
        return Err(Miss::NotPresent);
    }
    rights.narrow(entry);
    trail.push(gpa, entry);
    Ok(Leaf { base: entry & 0xffff_f000, page_shift: 12, rights })
}

#[cfg(test)]
mod tests;
