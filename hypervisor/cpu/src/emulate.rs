//! One instruction, carried out in Rust: the entry that the translator calls for whatever it does not translate.
//!
//! [`step`] tries the groups in turn: near control transfers and stack instructions (here), far ones (`far`), privileged
//! ones (`system`, `control`), and the rare user-level ones (`rare`). What nobody knows is an invalid opcode.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use crate::operand::{self, mask, reg, seg_of, set_reg};
use crate::stack::Stack;
use crate::state::{Reg, Seg, rflags};
use crate::{CpuState, Env, Exception, Step, far, rare, system};

type Outcome = Result<Step, Exception>;

/// Carries out `i`, which was decoded at `st.rip` in the vCPU's mode.
///
/// On success RIP has moved on; [`Step::Resync`] says that it jumped or that something changed which translated code depends
/// on. On failure the state is as before the instruction and the exception is for [`crate::interrupt::deliver`], save for the partial
/// progress that the architecture grants repeated strings. Single-step traps (TF) are the caller's matter.
pub fn step<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let next = next_rip(st, i);
    if let Some(done) = far::emulate(st, env, i, next) {
        return done;
    }
    if let Some(done) = near(st, env, i, next) {
        return done;
    }
    if let Some(done) = stack(st, env, i).or_else(|| system::emulate(st, env, i)) {
        if done.is_ok() {
            st.rip = next;
        }
        return done;
    }
    rare::emulate(st, env, i).unwrap_or(Err(Exception::InvalidOpcode))
}

/// Address of the instruction after `i`, as the current mode counts.
fn next_rip(st: &CpuState, i: &Instruction) -> u64 {
    let next = st.rip.wrapping_add(i.len() as u64);
    if st.code64() { next } else { next & 0xffff_ffff }
}

/// Near JMP, CALL, RET, Jcc, LOOPcc and JrCXZ; these set RIP.
fn near<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, next: u64) -> Option<Outcome> {
    use Mnemonic as M;
    let taken = match i.mnemonic() {
        M::Jmp => return Some(jump(st, env, i)),
        M::Call => return Some(call(st, env, i, next)),
        M::Ret => return Some(ret(st, env, i)),
        M::Loop | M::Loope | M::Loopne => {
            let counter = counter(i.code());
            let count = operand::mask(reg(st, counter).wrapping_sub(1), counter.size());
            let zf = st.rflags & rflags::ZF != 0;
            let taken = count != 0
                && match i.mnemonic() {
                    M::Loope => zf,
                    M::Loopne => !zf,
                    _ => true,
                };
            // RCX may change only once the branch cannot fault.
            let checked = far::check_target(st, st.segment(Seg::Cs), branch_target(i));
            if let (true, Err(e)) = (taken, checked) {
                return Some(Err(e));
            }
            set_reg(st, counter, count);
            taken
        }
        M::Jcxz => reg(st, Register::CX) == 0,
        M::Jecxz => reg(st, Register::ECX) == 0,
        M::Jrcxz => reg(st, Register::RCX) == 0,
        _ if i.is_jcc_short_or_near() => condition(st.rflags, i.condition_code()),
        _ => return None,
    };
    let target = if taken { branch_target(i) } else { next };
    Some(go(st, target))
}

/// Sets RIP, if execution can go on there.
fn go(st: &mut CpuState, target: u64) -> Outcome {
    far::check_target(st, st.segment(Seg::Cs), target)?;
    st.rip = target;
    Ok(Step::Resync)
}

/// Target of a direct near branch, truncated to its operand size.
fn branch_target(i: &Instruction) -> u64 {
    match i.op0_kind() {
        OpKind::NearBranch16 => u64::from(i.near_branch16()),
        OpKind::NearBranch32 => u64::from(i.near_branch32()),
        _ => i.near_branch64(),
    }
}

/// Target of JMP or CALL and its operand size in bytes.
fn target<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Result<(u64, usize), Exception> {
    let size = match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => match i.code() {
            Code::Jmp_rm16 | Code::Call_rm16 => 2,
            Code::Jmp_rm32 | Code::Call_rm32 => 4,
            _ => 8,
        },
    };
    let target = match i.op0_kind() {
        OpKind::Register | OpKind::Memory => operand::read(st, env, i, 0, size)?,
        _ => branch_target(i),
    };
    Ok((target, size))
}

fn jump<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let (target, _) = target(st, env, i)?;
    go(st, target)
}

fn call<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, next: u64) -> Outcome {
    let (target, size) = target(st, env, i)?;
    far::check_target(st, st.segment(Seg::Cs), target)?;
    let mut stack = Stack::current(st);
    stack.push(st, env, next, size)?;
    stack.commit(st);
    go(st, target)
}

fn ret<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let size = match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let mut stack = Stack::current(st);
    let target = stack.pop(st, env, size)?;
    if i.op_count() > 0 {
        stack.release(u64::from(i.immediate16()));
    }
    let step = go(st, target)?;
    stack.commit(st);
    Ok(step)
}

/// The counter register of a LOOP form.
fn counter(code: Code) -> Register {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => Register::CX,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => Register::ECX,
        _ => Register::RCX,
    }
}

/// Whether a condition holds for the given flags (SDM vol. 1, appendix B).
pub fn condition(flags: u64, code: ConditionCode) -> bool {
    let is = |bit: u64| flags & bit != 0;
    let less = is(rflags::SF) != is(rflags::OF);
    match code {
        ConditionCode::None => true,
        ConditionCode::o => is(rflags::OF),
        ConditionCode::no => !is(rflags::OF),
        ConditionCode::b => is(rflags::CF),
        ConditionCode::ae => !is(rflags::CF),
        ConditionCode::e => is(rflags::ZF),
        ConditionCode::ne => !is(rflags::ZF),
        ConditionCode::be => is(rflags::CF) || is(rflags::ZF),
        ConditionCode::a => !is(rflags::CF) && !is(rflags::ZF),
        ConditionCode::s => is(rflags::SF),
        ConditionCode::ns => !is(rflags::SF),
        ConditionCode::p => is(rflags::PF),
        ConditionCode::np => !is(rflags::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || is(rflags::ZF),
        ConditionCode::g => !less && !is(rflags::ZF),
    }
}

/// PUSH, POP, PUSHF and POPF in all their forms.
fn stack<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Option<Outcome> {
    let size = i.stack_pointer_increment().unsigned_abs() as usize;
    Some(match i.mnemonic() {
        Mnemonic::Push => push(st, env, i, size),
        Mnemonic::Pop => pop(st, env, i, size),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => pushf(st, env, size),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => popf(st, env, size),
        _ => return None,
    })
}

fn push<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, size: usize) -> Outcome {
    let selector = i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register();
    // A 32-bit push of a selector stores 16 bits and leaves the upper half of the slot alone.
    let store = if selector && size == 4 { 2 } else { size };
    let value = operand::read(st, env, i, 0, size)?;
    let mut stack = Stack::current(st);
    stack.push_part(st, env, value, size, store)?;
    stack.commit(st);
    Ok(Step::Next)
}

fn pop<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, size: usize) -> Outcome {
    let mut stack = Stack::current(st);
    let value = stack.pop(st, env, size)?;
    if i.op0_kind() == OpKind::Register {
        if let Some(seg) = seg_of(i.op0_register()) {
            let step = pop_segment(st, env, &stack, seg, value as u16)?;
            return Ok(step);
        }
        stack.commit(st);
        set_reg(st, i.op0_register(), value);
        return Ok(Step::Next);
    }
    // An address through RSP is computed after the increment.
    let rsp = st.gpr[Reg::Rsp as usize];
    stack.commit(st);
    if let Err(e) = operand::write(st, env, i, 0, size, value) {
        st.gpr[Reg::Rsp as usize] = rsp;
        return Err(e);
    }
    Ok(Step::Next)
}

/// POP of a segment register. The stack pointer moves with the old SS's width.
fn pop_segment<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, stack: &Stack, seg: Seg, selector: u16) -> Outcome {
    let step = system::load_popped(st, env, seg, selector)?;
    stack.commit(st);
    Ok(step)
}

fn v8086_iopl(st: &CpuState) -> Result<(), Exception> {
    if st.v8086() && st.rflags & rflags::IOPL != rflags::IOPL {
        return Err(Exception::GeneralProtection(0));
    }
    Ok(())
}

fn pushf<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, size: usize) -> Outcome {
    v8086_iopl(st)?;
    let mut stack = Stack::current(st);
    stack.push(st, env, st.rflags & !(rflags::VM | rflags::RF), size)?;
    stack.commit(st);
    Ok(Step::Next)
}

fn popf<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, size: usize) -> Outcome {
    v8086_iopl(st)?;
    let mut stack = Stack::current(st);
    let value = mask(stack.pop(st, env, size)?, size);
    stack.commit(st);
    let change = far::writable_flags(st, size);
    let new = (st.rflags & !change & !rflags::RF) | (value & change) | rflags::FIXED;
    let watched = !(rflags::NATIVE | rflags::NT | rflags::ID);
    let step = if (new ^ st.rflags) & watched != 0 { Step::Resync } else { Step::Next };
    st.rflags = new;
    Ok(step)
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
