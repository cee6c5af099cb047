//! Operands of emulated instructions: general-purpose and segment registers by the decoder's names, and operands that are a
//! register or memory.

use iced_x86::{Instruction, OpKind, Register};

use crate::ea;
use crate::mem::{self, Privilege};
use crate::state::Seg;
use crate::{CpuState, Env, Exception};

/// The value of a general-purpose register of any width, zero-extended; the selector of a segment register.
/// Registers of other kinds read as zero.
pub fn reg(st: &CpuState, r: Register) -> u64 {
    if let Some(seg) = seg_of(r) {
        return u64::from(st.seg[seg as usize].selector);
    }
    if !r.is_gpr() {
        return 0;
    }
    let full = st.gpr[r.full_register().number()];
    match r.size() {
        1 if is_high(r) => (full >> 8) & 0xff,
        1 => full & 0xff,
        2 => full & 0xffff,
        4 => full & 0xffff_ffff,
        _ => full,
    }
}

/// Sets a general-purpose register: 32-bit writes clear the upper half, narrower ones keep the rest.
pub fn set_reg(st: &mut CpuState, r: Register, value: u64) {
    if !r.is_gpr() {
        return;
    }
    let full = &mut st.gpr[r.full_register().number()];
    *full = match r.size() {
        1 if is_high(r) => (*full & !0xff00) | (value & 0xff) << 8,
        1 => (*full & !0xff) | (value & 0xff),
        2 => (*full & !0xffff) | (value & 0xffff),
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

fn is_high(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The segment register that a decoder name stands for.
pub fn seg_of(r: Register) -> Option<Seg> {
    Some(match r {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::DS => Seg::Ds,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => return None,
    })
}

/// Reads operand `op` (a register, immediate or memory) as `size` bytes, zero-extended. Registers give their low bytes.
pub fn read<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    op: u32,
    size: usize,
) -> Result<u64, Exception> {
    let value = match i.op_kind(op) {
        OpKind::Register => reg(st, i.op_register(op)),
        OpKind::Memory => {
            let la = ea::linear(st, i, op, size, false)?;
            read_linear(st, env, la, size)?
        }
        _ => i.try_immediate(op).unwrap_or(0),
    };
    Ok(mask(value, size))
}

/// Writes operand `op`: a register by its own width, memory by `size` bytes.
pub fn write<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    op: u32,
    size: usize,
    value: u64,
) -> Result<(), Exception> {
    if i.op_kind(op) == OpKind::Register {
        set_reg(st, i.op_register(op), value);
        return Ok(());
    }
    let la = ea::linear(st, i, op, size, true)?;
    mem::write(st, env, la, &value.to_le_bytes()[..size.min(8)], Privilege::Current)
}

/// Reads `size` (at most 8) bytes at a linear address with the current privilege.
pub(crate) fn read_linear<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    la: u64,
    size: usize,
) -> Result<u64, Exception> {
    let mut b = [0; 8];
    mem::read(st, env, la, &mut b[..size.min(8)], Privilege::Current)?;
    Ok(u64::from_le_bytes(b))
}

/// The low `size` bytes of `value`.
pub(crate) fn mask(value: u64, size: usize) -> u64 {
    if size >= 8 { value } else { value & ((1 << (size * 8)) - 1) }
}
