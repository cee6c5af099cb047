//! Segment descriptors: reading them from the GDT and LDT, checking them, and loading the data-segment registers, LDTR and TR
//! (SDM vol. 3, sections 3.4 and 3.5; vol. 2, MOV, LLDT, LTR).
//!
//! Code segments are loaded by control transfers only; their checks are with those, in `far` and `interrupt`.

use crate::ea::ty;
use crate::mem::{self, Privilege};
use crate::mmu::is_canonical;
use crate::state::{Seg, Segment};
use crate::{CpuState, Env, Exception};

/// A descriptor as it lies in its table (SDM vol. 3, section 3.4.5), and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The selector that named it.
    pub selector: u16,
    /// The low eight bytes.
    pub raw: u64,
    /// The upper eight bytes of a 16-byte system descriptor of long mode, else zero.
    pub upper: u64,
    /// Linear address of the descriptor.
    pub at: u64,
}

/// System descriptor types (SDM vol. 3, table 3-2); in long mode 9, 11, 12, 14 and 15 are the 64-bit forms.
#[allow(missing_docs)]
pub(crate) mod sys {
    pub(crate) const TSS16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INT16: u8 = 6;
    pub(crate) const TRAP16: u8 = 7;
    pub(crate) const TSS: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL: u8 = 12;
    pub(crate) const INT: u8 = 14;
    pub(crate) const TRAP: u8 = 15;
}

impl Descriptor {
    /// Access byte and flags in the form of [`Segment::attr`].
    pub fn attr(&self) -> u16 {
        ((self.raw >> 40) & 0xf0ff) as u16
    }

    /// Type field, 0..=15.
    pub fn kind(&self) -> u8 {
        (self.attr() & 0xf) as u8
    }

    /// Code or data, not system.
    pub fn is_segment(&self) -> bool {
        self.attr() & Segment::S != 0
    }

    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.is_segment() && self.attr() & ty::CODE != 0
    }

    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.attr() & ty::EC != 0
    }

    /// A data segment that can be written.
    pub fn is_writable_data(&self) -> bool {
        self.is_segment() && self.attr() & (ty::CODE | ty::RW) == ty::RW
    }

    /// A data segment, or code that can be read.
    pub fn is_readable(&self) -> bool {
        self.is_segment() && (self.attr() & ty::CODE == 0 || self.attr() & ty::RW != 0)
    }

    /// Present.
    pub fn present(&self) -> bool {
        self.attr() & Segment::P != 0
    }

    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attr() >> 5) & 3) as u8
    }

    /// Base address, with the upper half of a 16-byte descriptor.
    pub fn base(&self) -> u64 {
        ((self.raw >> 16) & 0xff_ffff) | ((self.raw >> 56) & 0xff) << 24 | self.upper << 32
    }

    /// Limit in bytes, granularity applied.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | ((self.raw >> 48) as u32 & 0xf) << 16;
        if self.attr() & Segment::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The hidden part of a segment register loaded from this descriptor, with the given visible selector.
    pub fn segment(&self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector }
    }
}

/// Whether a selector is null (index 0 of the GDT).
pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The error code that names a selector.
pub fn code_of(selector: u16) -> u16 {
    selector & !3
}

/// Where `selector`'s descriptor lies: linear address, if all `bytes` are within the table's limit.
fn locate(st: &CpuState, selector: u16, bytes: u64) -> Option<u64> {
    let offset = u64::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        if !st.ldtr.usable() || is_null(st.ldtr.selector) {
            return None;
        }
        (st.ldtr.base, u64::from(st.ldtr.limit))
    } else {
        (st.gdtr.base, u64::from(st.gdtr.limit))
    };
    (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
}

/// Reads `selector`'s eight-byte descriptor; `None` when it is outside its table. May page-fault.
pub fn read<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<Option<Descriptor>, Exception> {
    let Some(at) = locate(st, selector, 8) else { return Ok(None) };
    let raw = mem::read_u64(st, env, at, Privilege::Supervisor)?;
    Ok(Some(Descriptor { selector, raw, upper: 0, at }))
}

/// Completes a system descriptor with its upper half in long mode; `None` when that is outside the table or its type field
/// (bits 12..8 of the last word) is not zero.
pub(crate) fn extend<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    d: Descriptor,
) -> Result<Option<Descriptor>, Exception> {
    if !st.long_mode() {
        return Ok(Some(d));
    }
    if locate(st, d.selector, 16).is_none() {
        return Ok(None);
    }
    let upper = mem::read_u64(st, env, d.at.wrapping_add(8), Privilege::Supervisor)?;
    if (upper >> 40) & 0x1f != 0 {
        return Ok(None);
    }
    Ok(Some(Descriptor { upper: upper & 0xffff_ffff, ..d }))
}

/// Reads `selector`'s descriptor for an explicit load: #GP(selector) when it is outside its table.
pub(crate) fn fetch<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<Descriptor, Exception> {
    read(st, env, selector)?.ok_or(Exception::GeneralProtection(code_of(selector)))
}

/// Sets the accessed bit of a code or data descriptor in memory, unless it is set, and in the copy.
pub(crate) fn mark_accessed<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    d: &mut Descriptor,
) -> Result<(), Exception> {
    if d.attr() & ty::ACCESSED == 0 {
        set_type(st, env, d, d.kind() | ty::ACCESSED as u8)?;
    }
    Ok(())
}

/// Rewrites the type field of a descriptor in memory and in the copy (accessed bit, busy TSS).
pub(crate) fn set_type<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    d: &mut Descriptor,
    kind: u8,
) -> Result<(), Exception> {
    d.raw = (d.raw & !(0xf << 40)) | u64::from(kind & 0xf) << 40;
    mem::write_u8(st, env, d.at.wrapping_add(5), (d.raw >> 40) as u8, Privilege::Supervisor)
}

/// Loads ES, SS, DS, FS or GS with `selector`, as MOV and POP do in the current mode (SDM vol. 2, MOV).
///
/// CS is refused with #UD. Leaves the register untouched on failure.
pub fn load_segment<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, seg: Seg, selector: u16) -> Result<(), Exception> {
    if seg == Seg::Cs {
        return Err(Exception::InvalidOpcode);
    }
    if !st.protected() || st.v8086() {
        load_real(st, seg, selector);
        return Ok(());
    }
    let loaded =
        if seg == Seg::Ss { stack_segment(st, env, selector, st.cpl)? } else { data_segment(st, env, selector)? };
    st.seg[seg as usize] = loaded;
    Ok(())
}

/// Loads a segment register in real or virtual-8086 mode. Real mode keeps the limit ("unreal" mode depends on it).
pub(crate) fn load_real(st: &mut CpuState, seg: Seg, selector: u16) {
    let v8086 = st.v8086();
    let s = &mut st.seg[seg as usize];
    s.selector = selector;
    s.base = u64::from(selector) << 4;
    if v8086 {
        s.limit = 0xffff;
        s.attr = 0xf3;
    } else {
        s.attr = (s.attr & 0xf000 & !Segment::L) | 0x93;
    }
}

/// A null segment as loading a null selector leaves it.
pub(crate) fn null(selector: u16) -> Segment {
    Segment { selector, ..Segment::default() }
}

/// Checks and reads a selector for SS at privilege level `cpl`.
fn stack_segment<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    selector: u16,
    cpl: u8,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        // 64-bit mode lets inner rings run without a stack segment.
        let ok = st.code64() && cpl != 3 && (selector & 3) as u8 == cpl;
        return if ok { Ok(null(selector)) } else { Err(Exception::GeneralProtection(0)) };
    }
    let gp = Exception::GeneralProtection(code_of(selector));
    let mut d = fetch(st, env, selector)?;
    if (selector & 3) as u8 != cpl || !d.is_writable_data() || d.dpl() != cpl {
        return Err(gp);
    }
    if !d.present() {
        return Err(Exception::StackFault(code_of(selector)));
    }
    mark_accessed(st, env, &mut d)?;
    Ok(d.segment(selector))
}

/// Checks and reads a selector for DS, ES, FS or GS.
fn data_segment<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(null(selector));
    }
    let mut d = fetch(st, env, selector)?;
    let outer = st.cpl.max((selector & 3) as u8);
    if !d.is_readable() || (!d.is_conforming() && d.dpl() < outer) {
        return Err(Exception::GeneralProtection(code_of(selector)));
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code_of(selector)));
    }
    mark_accessed(st, env, &mut d)?;
    Ok(d.segment(selector))
}

/// Checks an SS selector popped or read for a return to, or a call into, privilege level `cpl`; every violation is
/// reported through `bad` and absence as #SS, both with the selector.
pub(crate) fn stack_for<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    selector: u16,
    cpl: u8,
    ext: u16,
    bad: fn(u16) -> Exception,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Err(bad(ext));
    }
    let fault = bad(code_of(selector) | ext);
    let Some(mut d) = read(st, env, selector)? else { return Err(fault) };
    if (selector & 3) as u8 != cpl || !d.is_writable_data() || d.dpl() != cpl {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::StackFault(code_of(selector) | ext));
    }
    mark_accessed(st, env, &mut d)?;
    Ok(d.segment(selector))
}

/// LLDT (SDM vol. 2). Privilege and mode are checked by the caller.
pub(crate) fn load_ldtr<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        st.ldtr = null(selector);
        return Ok(());
    }
    let d = system_descriptor(st, env, selector)?;
    if d.kind() != sys::LDT {
        return Err(Exception::GeneralProtection(code_of(selector)));
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code_of(selector)));
    }
    st.ldtr = checked_base(&complete(st, env, d)?)?.segment(selector);
    Ok(())
}

/// LTR (SDM vol. 2): loads an available TSS and marks it busy. Privilege and mode are checked by the caller.
pub(crate) fn load_tr<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        return Err(Exception::GeneralProtection(0));
    }
    let d = system_descriptor(st, env, selector)?;
    let available = d.kind() == sys::TSS || (d.kind() == sys::TSS16 && !st.long_mode());
    if !available {
        return Err(Exception::GeneralProtection(code_of(selector)));
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code_of(selector)));
    }
    let mut d = checked_base(&complete(st, env, d)?)?;
    let busy = d.kind() | 2;
    set_type(st, env, &mut d, busy)?;
    st.tr = d.segment(selector);
    Ok(())
}

/// A system descriptor in the GDT, low half.
fn system_descriptor<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<Descriptor, Exception> {
    let gp = Exception::GeneralProtection(code_of(selector));
    if selector & 4 != 0 {
        return Err(gp);
    }
    let d = fetch(st, env, selector)?;
    if d.is_segment() { Err(gp) } else { Ok(d) }
}

fn complete<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, d: Descriptor) -> Result<Descriptor, Exception> {
    extend(st, env, d)?.ok_or(Exception::GeneralProtection(code_of(d.selector)))
}

fn checked_base(d: &Descriptor) -> Result<Descriptor, Exception> {
    if is_canonical(d.base()) { Ok(*d) } else { Err(Exception::GeneralProtection(code_of(d.selector))) }
}
