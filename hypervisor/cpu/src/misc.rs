//! Small instructions that are not worth emitting: decimal adjustment, PUSHA/POPA, BOUND, ENTER, LEAVE, XLAT, SALC, ARPL and
//! the wide compare-exchanges.
//!
//! The wide compare-exchanges come here only when the translated form cannot be used (device memory, page-crossing operands): they
//! are then not atomic against other vCPUs, as a split access to device memory never is.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::mem::{self, Privilege};
use crate::operand::{self, mask};
use crate::rare::{set_flags, zsp};
use crate::stack::Stack;
use crate::state::rflags;
use crate::{CpuState, Env, Exception, Reg, Step, ea};

type Done = Result<(), Exception>;

/// Carries out `i` if it is one of these.
pub(crate) fn emulate<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
) -> Option<Result<Step, Exception>> {
    use Mnemonic as M;
    let done = match i.mnemonic() {
        M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad | M::Salc if st.code64() => Err(Exception::InvalidOpcode),
        M::Daa => decimal_add(st),
        M::Das => decimal_subtract(st),
        M::Aaa => ascii_adjust(st, true),
        M::Aas => ascii_adjust(st, false),
        M::Aam => ascii_multiply(st, i.immediate8()),
        M::Aad => ascii_divide(st, i.immediate8()),
        M::Salc => {
            let al = if st.rflags & rflags::CF != 0 { 0xff } else { 0 };
            operand::set_reg(st, Register::AL, al);
            Ok(())
        }
        M::Pusha => push_all(st, env, 2),
        M::Pushad => push_all(st, env, 4),
        M::Popa => pop_all(st, env, 2),
        M::Popad => pop_all(st, env, 4),
        M::Bound => bound(st, env, i),
        M::Enter => enter(st, env, i),
        M::Leave => leave(st, env, i),
        M::Xlatb => xlat(st, env, i),
        M::Arpl => arpl(st, env, i),
        M::Cmpxchg8b => compare_exchange(st, env, i, 4),
        M::Cmpxchg16b => compare_exchange(st, env, i, 8),
        _ => return None,
    };
    Some(done.map(|()| Step::Next))
}

fn al(st: &CpuState) -> u8 {
    st.gpr[Reg::Rax as usize] as u8
}

fn flag(st: &CpuState, f: u64) -> bool {
    st.rflags & f != 0
}

fn put(cond: bool, f: u64) -> u64 {
    if cond { f } else { 0 }
}

/// The result flags of the decimal and ASCII group; OF is undefined and left clear.
fn adjusted(st: &mut CpuState, al: u8, carry: bool, aux: bool) {
    operand::set_reg(st, Register::AL, al.into());
    let f = zsp(al.into(), 1) | put(carry, rflags::CF) | put(aux, rflags::AF);
    set_flags(st, rflags::STATUS, f);
}

/// DAA (SDM vol. 2).
fn decimal_add(st: &mut CpuState) -> Done {
    let (old, carry) = (al(st), flag(st, rflags::CF));
    let aux = old & 0xf > 9 || flag(st, rflags::AF);
    let high = old > 0x99 || carry;
    let new = old.wrapping_add(if aux { 6 } else { 0 }).wrapping_add(if high { 0x60 } else { 0 });
    adjusted(st, new, high, aux);
    Ok(())
}

/// DAS (SDM vol. 2). The borrow of the low adjustment alone also sets CF.
fn decimal_subtract(st: &mut CpuState) -> Done {
    let (old, carry) = (al(st), flag(st, rflags::CF));
    let aux = old & 0xf > 9 || flag(st, rflags::AF);
    let high = old > 0x99 || carry;
    let new = old.wrapping_sub(if aux { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    adjusted(st, new, high || (aux && old < 6), aux);
    Ok(())
}

/// AAA and AAS (SDM vol. 2): AX is adjusted as a whole, so a carry out of AL reaches AH.
fn ascii_adjust(st: &mut CpuState, add: bool) -> Done {
    let adjust = al(st) & 0xf > 9 || flag(st, rflags::AF);
    let mut ax = st.gpr[Reg::Rax as usize] as u16;
    if adjust {
        ax = if add { ax.wrapping_add(0x106) } else { ax.wrapping_sub(0x106) };
    }
    operand::set_reg(st, Register::AX, (ax & 0xff0f).into());
    let f = zsp((ax & 0xf).into(), 1) | put(adjust, rflags::CF | rflags::AF);
    set_flags(st, rflags::STATUS, f);
    Ok(())
}

fn ascii_multiply(st: &mut CpuState, base: u8) -> Done {
    if base == 0 {
        return Err(Exception::DivideError);
    }
    let old = al(st);
    operand::set_reg(st, Register::AH, (old / base).into());
    adjusted(st, old % base, false, false);
    Ok(())
}

fn ascii_divide(st: &mut CpuState, base: u8) -> Done {
    let ax = st.gpr[Reg::Rax as usize] as u16;
    let new = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(base));
    operand::set_reg(st, Register::AH, 0);
    adjusted(st, new, false, false);
    Ok(())
}

fn push_all<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, size: usize) -> Done {
    let mut stack = Stack::current(st);
    // The lowest slot first as a check, so that a fault stores nothing.
    let mut probe = stack;
    probe.set_sp(stack.sp().wrapping_sub(8 * size as u64));
    probe.peek(st, env, 0, size)?;
    for n in 0..8 {
        stack.push(st, env, mask(st.gpr[n], size), size)?;
    }
    stack.commit(st);
    Ok(())
}

fn pop_all<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, size: usize) -> Done {
    let mut stack = Stack::current(st);
    let mut values = [0; 8];
    for n in (0..8).rev() {
        values[n] = stack.pop(st, env, size)?;
    }
    stack.commit(st);
    for n in (0..8).filter(|&n| n != Reg::Rsp as usize) {
        let keep = if size == 2 { st.gpr[n] & !0xffff } else { 0 };
        st.gpr[n] = keep | values[n];
    }
    Ok(())
}

fn bound<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Done {
    let size = i.op0_register().size();
    let sign = |v: u64| if size == 2 { i64::from(v as i16) } else { i64::from(v as i32) };
    let la = ea::linear(st, i, 1, 2 * size, false)?;
    let lower = sign(operand::read_linear(st, env, la, size)?);
    let upper = sign(operand::read_linear(st, env, la.wrapping_add(size as u64), size)?);
    let index = sign(operand::reg(st, i.op0_register()));
    if index < lower || index > upper { Err(Exception::BoundRange) } else { Ok(()) }
}

/// Operand size in bytes of ENTER and LEAVE, from the instruction's form.
fn frame_size(i: &Instruction) -> usize {
    use iced_x86::Code as C;
    match i.code() {
        C::Enterw_imm16_imm8 | C::Leavew => 2,
        C::Enterd_imm16_imm8 | C::Leaved => 4,
        _ => 8,
    }
}

fn set_frame_pointer(st: &mut CpuState, value: u64, size: usize) {
    let rbp = &mut st.gpr[Reg::Rbp as usize];
    *rbp = if size == 2 { (*rbp & !0xffff) | (value & 0xffff) } else { mask(value, size) };
}

fn enter<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Done {
    let size = frame_size(i);
    let (locals, level) = (u64::from(i.immediate16()), i.immediate8_2nd() & 31);
    let mut stack = Stack::current(st);
    stack.push(st, env, mask(st.gpr[Reg::Rbp as usize], size), size)?;
    let frame = stack.sp();
    if level > 0 {
        let mut display = Stack::current(st);
        display.set_sp(st.gpr[Reg::Rbp as usize]);
        for n in 1..u64::from(level) {
            let outer = display.peek(st, env, (n * size as u64).wrapping_neg(), size)?;
            stack.push(st, env, outer, size)?;
        }
        stack.push(st, env, mask(frame, size), size)?;
    }
    stack.set_sp(stack.sp().wrapping_sub(locals));
    // The new top of the stack must be writable (SDM vol. 2, ENTER): found out by rewriting what is there.
    let top = stack.peek(st, env, 0, size).map_err(|exc| match exc {
        // To the guest it is a write from the start.
        Exception::PageFault { addr, code } => Exception::PageFault { addr, code: code | 2 },
        other => other,
    })?;
    let mut check = stack;
    check.release(size as u64);
    check.push(st, env, top, size)?;
    stack.commit(st);
    set_frame_pointer(st, frame, size);
    Ok(())
}

fn leave<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Done {
    let size = frame_size(i);
    let mut stack = Stack::current(st);
    stack.set_sp(st.gpr[Reg::Rbp as usize]);
    let rbp = stack.pop(st, env, size)?;
    stack.commit(st);
    set_frame_pointer(st, rbp, size);
    Ok(())
}

fn xlat<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Done {
    let base = match i.op_kind(0) {
        OpKind::Memory => i.memory_base(),
        _ => return Err(Exception::InvalidOpcode),
    };
    let offset = operand::reg(st, base).wrapping_add(al(st).into());
    let offset = mask(offset, base.size());
    let la = ea::segmented(st, ea::operand_segment(st, i, 0), offset, 1, false)?;
    let value = operand::read_linear(st, env, la, 1)?;
    operand::set_reg(st, Register::AL, value);
    Ok(())
}

fn arpl<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Done {
    if !st.protected() || st.v8086() {
        return Err(Exception::InvalidOpcode);
    }
    let old = operand::read(st, env, i, 0, 2)?;
    let wanted = operand::reg(st, i.op1_register()) & 3;
    let raise = old & 3 < wanted;
    let new = if raise { (old & !3) | wanted } else { old };
    // Memory is a read-modify-write either way, so write rights are checked even when nothing changes.
    if i.op0_kind() == OpKind::Register {
        let reg = i.op0_register();
        let keep = operand::reg(st, reg) & !0xffff;
        operand::set_reg(st, reg, keep | new);
    } else {
        operand::write(st, env, i, 0, 2, new)?;
    }
    set_flags(st, rflags::ZF, put(raise, rflags::ZF));
    Ok(())
}

/// CMPXCHG8B (`half` 4) and CMPXCHG16B (`half` 8).
fn compare_exchange<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, half: usize) -> Done {
    let la = ea::linear(st, i, 0, 2 * half, true)?;
    if half == 8 && la % 16 != 0 {
        return Err(Exception::GeneralProtection(0));
    }
    let mut b = [0; 16];
    let b = &mut b[..2 * half];
    mem::probe_write(st, env, la, b.len(), Privilege::Current)?;
    mem::read(st, env, la, b, Privilege::Current)?;
    let get = |b: &[u8]| b.iter().rev().fold(0_u64, |v, &x| v << 8 | u64::from(x));
    let (low, high) = (get(&b[..half]), get(&b[half..]));
    let reg = |st: &CpuState, r: Reg| mask(st.gpr[r as usize], half);
    let equal = low == reg(st, Reg::Rax) && high == reg(st, Reg::Rdx);
    if equal {
        let (new_low, new_high) = (reg(st, Reg::Rbx), reg(st, Reg::Rcx));
        b[..half].copy_from_slice(&new_low.to_le_bytes()[..half]);
        b[half..].copy_from_slice(&new_high.to_le_bytes()[..half]);
    }
    mem::write(st, env, la, b, Privilege::Current)?; // hardware writes the old value back too
    if !equal {
        st.gpr[Reg::Rax as usize] = low;
        st.gpr[Reg::Rdx as usize] = high;
    }
    set_flags(st, rflags::ZF, put(equal, rflags::ZF));
    Ok(())
}

#[cfg(test)]
mod tests;
