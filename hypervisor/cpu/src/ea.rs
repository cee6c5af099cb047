//! Effective addresses and segmentation (SDM vol. 1, section 3.7.5; vol. 3, sections 3.4 and 5.3): from a memory operand to
//! the linear address it names, with the checks that the mode asks for.
//!
//! In 64-bit mode a segment adds at most its base (FS, GS) and the address must be canonical. In every other mode the segment must
//! be usable, of a type that allows the access, and large enough. Violations are #SS through SS and #GP through any other segment.

use iced_x86::{Instruction, OpKind, Register};

use crate::mmu::is_canonical;
use crate::operand::{reg, seg_of};
use crate::state::{Reg, Seg, Segment};
use crate::{CpuState, Exception};

/// Type bits of a code or data segment in [`Segment::attr`] (SDM vol. 3, table 3-1).
#[allow(missing_docs)]
pub(crate) mod ty {
    pub(crate) const ACCESSED: u16 = 1;
    /// Data: writable. Code: readable.
    pub(crate) const RW: u16 = 1 << 1;
    /// Data: expand-down. Code: conforming.
    pub(crate) const EC: u16 = 1 << 2;
    pub(crate) const CODE: u16 = 1 << 3;
}

/// The fault of a bad reference through `seg`: #SS(0) for SS, #GP(0) for the others.
pub(crate) fn segment_fault(seg: Seg) -> Exception {
    if seg == Seg::Ss { Exception::StackFault(0) } else { Exception::GeneralProtection(0) }
}

/// Address size of memory operand `op_index` in bits (16, 32 or 64).
pub fn address_bits(i: &Instruction, op_index: u32) -> u32 {
    match i.op_kind(op_index) {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 16,
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 32,
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 64,
        _ => {
            let named = [i.memory_base(), i.memory_index()];
            for r in named {
                // A vector index (gathers) says nothing about the address size; its base does.
                if r != Register::None && !r.is_vector_register() {
                    return r.size() as u32 * 8;
                }
            }
            match i.memory_displ_size() {
                2 => 16,
                4 => 32,
                _ => 64,
            }
        }
    }
}

/// The offset that memory operand `op_index` names within its segment, truncated to the address size. No checks.
pub fn effective(st: &CpuState, i: &Instruction, op_index: u32) -> u64 {
    let bits = address_bits(i, op_index);
    let offset = match i.op_kind(op_index) {
        OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => st.gpr[Reg::Rsi as usize],
        OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => st.gpr[Reg::Rdi as usize],
        OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => st.gpr[Reg::Rdi as usize],
        _ => {
            // With a RIP base the displacement is the absolute target already.
            let mut sum = i.memory_displacement64();
            let base = i.memory_base();
            if base != Register::None && !base.is_ip() {
                sum = sum.wrapping_add(reg(st, base));
            }
            let index = i.memory_index();
            if index != Register::None && !index.is_vector_register() {
                sum = sum.wrapping_add(reg(st, index).wrapping_mul(u64::from(i.memory_index_scale())));
            }
            sum
        }
    };
    truncate(offset, bits)
}

/// `value` modulo `2^bits`.
pub(crate) fn truncate(value: u64, bits: u32) -> u64 {
    match bits {
        16 => value & 0xffff,
        32 => value & 0xffff_ffff,
        _ => value,
    }
}

/// The segment that memory operand `op_index` goes through.
pub fn operand_segment(st: &CpuState, i: &Instruction, op_index: u32) -> Seg {
    if matches!(i.op_kind(op_index), OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI) {
        return Seg::Es;
    }
    if st.code64() && !matches!(i.memory_segment(), Register::FS | Register::GS) {
        // 64-bit mode ignores the other overrides; the base register alone tells #SS from #GP.
        let stack = i.op_kind(op_index) == OpKind::Memory
            && matches!(i.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        return if stack { Seg::Ss } else { Seg::Ds };
    }
    seg_of(i.memory_segment()).unwrap_or(Seg::Ds)
}

/// The linear address of memory operand `op_index`, checked for an access of `size` bytes.
///
/// Fails with #GP(0), or #SS(0) through SS: not canonical in 64-bit mode; null, wrong type or beyond the limit elsewhere.
pub fn linear(st: &CpuState, i: &Instruction, op_index: u32, size: usize, write: bool) -> Result<u64, Exception> {
    let offset = effective(st, i, op_index);
    segmented(st, operand_segment(st, i, op_index), offset, size, write)
}

/// The linear address of `size` bytes at `offset` in `seg`, with the checks of [`linear`].
pub fn segmented(st: &CpuState, seg: Seg, offset: u64, size: usize, write: bool) -> Result<u64, Exception> {
    let s = &st.seg[seg as usize];
    if st.code64() {
        let base = if matches!(seg, Seg::Fs | Seg::Gs) { s.base } else { 0 };
        let la = base.wrapping_add(offset);
        let last = la.wrapping_add((size as u64).saturating_sub(1));
        if !is_canonical(la) || !is_canonical(last) {
            return Err(segment_fault(seg));
        }
        return Ok(la);
    }
    if st.protected() && !st.v8086() && !type_allows(s, write) {
        return Err(segment_fault(seg));
    }
    if !within_limit(s, offset, size) {
        return Err(segment_fault(seg));
    }
    Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
}

/// Whether a segment is usable and its type allows a data read or write.
fn type_allows(s: &Segment, write: bool) -> bool {
    if !s.usable() {
        return false;
    }
    if s.attr & ty::CODE != 0 { !write && s.attr & ty::RW != 0 } else { !write || s.attr & ty::RW != 0 }
}

/// Whether `size` bytes at `offset` lie within the segment (SDM vol. 3, section 5.3).
///
/// With a limit of 4 GiB - 1 an access may wrap around, as section 5.3 allows.
pub(crate) fn within_limit(s: &Segment, offset: u64, size: usize) -> bool {
    let last = offset + (size as u64).saturating_sub(1);
    let limit = u64::from(s.limit);
    if s.attr & (ty::CODE | ty::EC) == ty::EC {
        let top = if s.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        return offset > limit && last <= top;
    }
    last <= limit || s.limit == u32::MAX
}
