//! Control transfers that change the code segment or the privilege level: far JMP, CALL and RET, IRET, SYSCALL and SYSENTER with
//! their returns, and software interrupts (SDM vol. 2 under each instruction; vol. 3, sections 5.8 and 6.12).
//!
//! Every one checks all it needs before it changes a register. Hardware task switches (a far transfer to a TSS or a task
//! gate, IRET with NT set) are not offered: they raise #GP, as they do in long mode.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::cpuid::Vendor;
use crate::descriptor::{self, Descriptor, code_of, is_null, sys};
use crate::ea::{self, ty};
use crate::interrupt::{self, SoftKind};
use crate::mmu::is_canonical;
use crate::operand::{mask, read_linear};
use crate::stack::Stack;
use crate::state::{Reg, Seg, Segment, cr0, efer, rflags};
use crate::{CpuState, Env, Exception, Step};

type Outcome = Result<Step, Exception>;

const GP0: Exception = Exception::GeneralProtection(0);

/// Carries out `i` if it is one of this module's; `next` is the address of the instruction after it.
pub(crate) fn emulate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, next: u64) -> Option<Outcome> {
    Some(match i.code() {
        Code::Iretw => iret(st, env, 2),
        Code::Iretd => iret(st, env, 4),
        Code::Iretq => iret(st, env, 8),
        Code::Retfw | Code::Retfw_imm16 => retf(st, env, i, 2),
        Code::Retfd | Code::Retfd_imm16 => retf(st, env, i, 4),
        Code::Retfq | Code::Retfq_imm16 => retf(st, env, i, 8),
        Code::Jmp_ptr1616 | Code::Jmp_m1616 => far_branch(st, env, i, 2, None),
        Code::Jmp_ptr1632 | Code::Jmp_m1632 => far_branch(st, env, i, 4, None),
        Code::Jmp_m1664 => far_branch(st, env, i, 8, None),
        Code::Call_ptr1616 | Code::Call_m1616 => far_branch(st, env, i, 2, Some(next)),
        Code::Call_ptr1632 | Code::Call_m1632 => far_branch(st, env, i, 4, Some(next)),
        Code::Call_m1664 => far_branch(st, env, i, 8, Some(next)),
        Code::Syscall => syscall(st, env, next),
        Code::Sysretd => sysret(st, false),
        Code::Sysretq => sysret(st, true),
        Code::Sysenter => sysenter(st, env),
        Code::Sysexitd => sysexit(st, false),
        Code::Sysexitq => sysexit(st, true),
        _ => return software(st, env, i, next),
    })
}

/// INT n, INT3, INTO and INT1.
fn software<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, next: u64) -> Option<Outcome> {
    let (vector, kind) = match i.mnemonic() {
        Mnemonic::Int => (i.immediate8(), SoftKind::IntN),
        Mnemonic::Int3 => (3, SoftKind::Trap),
        Mnemonic::Into if st.rflags & rflags::OF == 0 => {
            st.rip = next;
            return Some(Ok(Step::Next));
        }
        Mnemonic::Into => (4, SoftKind::Trap),
        Mnemonic::Int1 => (1, SoftKind::Int1),
        _ => return None,
    };
    Some(interrupt::enter_software(st, env, vector, next, kind).map(|()| Step::Resync))
}

/// Whether segments are loaded as in real mode.
fn real_like(st: &CpuState) -> bool {
    !st.protected() || st.v8086()
}

/// Whether code in `cs` would run in 64-bit mode.
fn is_64(st: &CpuState, cs: &Segment) -> bool {
    st.long_mode() && cs.attr & Segment::L != 0
}

/// #GP(0) unless execution in `cs` can go on at `offset`.
pub(crate) fn check_target(st: &CpuState, cs: &Segment, offset: u64) -> Result<(), Exception> {
    let ok = if is_64(st, cs) { is_canonical(offset) } else { offset <= u64::from(cs.limit) };
    if ok { Ok(()) } else { Err(GP0) }
}

/// Far JMP, and far CALL when `link` gives the return address.
fn far_branch<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    size: usize,
    link: Option<u64>,
) -> Outcome {
    let (selector, offset) = match i.op0_kind() {
        OpKind::FarBranch16 => (i.far_branch_selector(), u64::from(i.far_branch16())),
        OpKind::FarBranch32 => (i.far_branch_selector(), u64::from(i.far_branch32())),
        _ => {
            let la = ea::linear(st, i, 0, size + 2, false)?;
            let mut b = [0; 10];
            crate::mem::read(st, env, la, &mut b[..size + 2], crate::mem::Privilege::Current)?;
            let mut offset = [0; 8];
            offset[..size].copy_from_slice(&b[..size]);
            (u16::from_le_bytes([b[size], b[size + 1]]), u64::from_le_bytes(offset))
        }
    };
    if real_like(st) {
        if offset > u64::from(st.segment(Seg::Cs).limit) {
            return Err(GP0);
        }
        push_link(st, env, size, link)?;
        descriptor::load_real(st, Seg::Cs, selector);
        st.rip = offset;
        return Ok(Step::Resync);
    }
    if is_null(selector) {
        return Err(GP0);
    }
    let d = descriptor::fetch(st, env, selector)?;
    if d.is_segment() {
        let cs = direct_target(st, env, d)?;
        check_target(st, &cs, offset)?;
        push_link(st, env, size, link)?;
        st.seg[Seg::Cs as usize] = cs;
        st.rip = offset;
        return Ok(Step::Resync);
    }
    match d.kind() {
        sys::CALL => call_gate(st, env, d, link),
        sys::CALL16 if !st.long_mode() => call_gate(st, env, d, link),
        // TSS and task gates too: task switches are not offered.
        _ => Err(Exception::GeneralProtection(code_of(selector))),
    }
}

/// Pushes CS and the return address for a call within the privilege level.
fn push_link<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, size: usize, link: Option<u64>) -> Result<(), Exception> {
    let Some(next) = link else { return Ok(()) };
    let mut stack = Stack::current(st);
    stack.push(st, env, u64::from(st.segment(Seg::Cs).selector), size)?;
    stack.push(st, env, next, size)?;
    stack.commit(st);
    Ok(())
}

/// Checks a code segment reached directly (SDM vol. 3, section 5.8.1) and gives the new CS.
fn direct_target<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, d: Descriptor) -> Result<Segment, Exception> {
    let selector = d.selector;
    let gp = Exception::GeneralProtection(code_of(selector));
    let rpl = (selector & 3) as u8;
    let allowed = if d.is_conforming() { d.dpl() <= st.cpl } else { rpl <= st.cpl && d.dpl() == st.cpl };
    if !d.is_code() || both_sizes(st, &d) || !allowed {
        return Err(gp);
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code_of(selector)));
    }
    let mut d = d;
    descriptor::mark_accessed(st, env, &mut d)?;
    Ok(d.segment((selector & !3) | u16::from(st.cpl)))
}

/// A code segment with both L and D set, which long mode refuses.
fn both_sizes(st: &CpuState, d: &Descriptor) -> bool {
    let both = Segment::L | Segment::DB;
    st.long_mode() && d.attr() & both == both
}

/// A far transfer through a call gate (SDM vol. 3, section 5.8.3).
fn call_gate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, gate: Descriptor, link: Option<u64>) -> Outcome {
    let gate_code = code_of(gate.selector);
    let rpl = (gate.selector & 3) as u8;
    if gate.dpl() < st.cpl || rpl > gate.dpl() {
        return Err(Exception::GeneralProtection(gate_code));
    }
    if !gate.present() {
        return Err(Exception::SegmentNotPresent(gate_code));
    }
    let gate = descriptor::extend(st, env, gate)?.ok_or(Exception::GeneralProtection(gate_code))?;
    let long = st.long_mode();
    let (size, offset) = match (long, gate.kind()) {
        (true, _) => (8, (gate.raw & 0xffff) | ((gate.raw >> 32) & 0xffff_0000) | gate.upper << 32),
        (false, sys::CALL) => (4, (gate.raw & 0xffff) | ((gate.raw >> 32) & 0xffff_0000)),
        (false, _) => (2, gate.raw & 0xffff),
    };
    let selector = (gate.raw >> 16) as u16;
    if is_null(selector) {
        return Err(GP0);
    }
    let gp = Exception::GeneralProtection(code_of(selector));
    let mut d = descriptor::fetch(st, env, selector)?;
    if !d.is_code() || d.dpl() > st.cpl {
        return Err(gp);
    }
    if long && d.attr() & (Segment::L | Segment::DB) != Segment::L {
        return Err(gp);
    }
    if link.is_none() && !d.is_conforming() && d.dpl() != st.cpl {
        return Err(gp);
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code_of(selector)));
    }
    descriptor::mark_accessed(st, env, &mut d)?;
    let cpl = if d.is_conforming() { st.cpl } else { d.dpl() };
    let cs = d.segment((selector & !3) | u16::from(cpl));
    check_target(st, &cs, offset)?;
    match link {
        Some(next) if cpl < st.cpl => {
            let count = (gate.raw >> 32) as u8 & 0x1f;
            let (stack, ss) = inner_call(st, env, cpl, size, count, next)?;
            st.seg[Seg::Ss as usize] = ss;
            stack.commit(st);
        }
        _ => push_link(st, env, size, link)?,
    }
    st.seg[Seg::Cs as usize] = cs;
    st.cpl = cpl;
    st.rip = offset;
    Ok(Step::Resync)
}

/// Builds the frame of a call to an inner privilege level on its own stack.
fn inner_call<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    cpl: u8,
    size: usize,
    count: u8,
    next: u64,
) -> Result<(Stack, Segment), Exception> {
    let old = Stack::current(st);
    let (mut stack, ss) = if st.long_mode() {
        let rsp = interrupt::tss_rsp(st, env, 4 + 8 * u64::from(cpl), 0)?;
        (Stack::long(rsp, cpl, 0), descriptor::null(u16::from(cpl)))
    } else {
        let (selector, sp) = interrupt::inner_stack(st, env, cpl, 0)?;
        let ss = descriptor::stack_for(st, env, selector, cpl, 0, Exception::InvalidTss)?;
        (Stack::inner(ss, sp, cpl, code_of(selector)), ss)
    };
    stack.push(st, env, u64::from(st.segment(Seg::Ss).selector), size)?;
    stack.push(st, env, st.gpr[Reg::Rsp as usize], size)?;
    if !st.long_mode() {
        for n in (0..u64::from(count)).rev() {
            let parameter = old.peek(st, env, n * size as u64, size)?;
            stack.push(st, env, parameter, size)?;
        }
    }
    stack.push(st, env, u64::from(st.segment(Seg::Cs).selector), size)?;
    stack.push(st, env, next, size)?;
    Ok((stack, ss))
}

/// Checks a code selector that a return names and gives the new CS.
fn return_segment<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Err(GP0);
    }
    let gp = Exception::GeneralProtection(code_of(selector));
    let mut d = descriptor::fetch(st, env, selector)?;
    let rpl = (selector & 3) as u8;
    let dpl_ok = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !d.is_code() || rpl < st.cpl || !dpl_ok || both_sizes(st, &d) {
        return Err(gp);
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code_of(selector)));
    }
    descriptor::mark_accessed(st, env, &mut d)?;
    Ok(d.segment(selector))
}

/// SS and stack pointer of the level that a return goes to.
fn return_stack<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    selector: u16,
    sp: u64,
    cs: &Segment,
) -> Result<(Segment, Stack), Exception> {
    let cpl = (cs.selector & 3) as u8;
    let to64 = is_64(st, cs);
    let ss = if is_null(selector) && to64 && cpl != 3 {
        descriptor::null(selector)
    } else {
        descriptor::stack_for(st, env, selector, cpl, 0, Exception::GeneralProtection)?
    };
    // A 16-bit stack takes only SP and leaves the rest of the register alone.
    let old = st.gpr[Reg::Rsp as usize];
    let mut stack = if to64 { Stack::long(old, cpl, 0) } else { Stack::inner(ss, old, cpl, 0) };
    stack.set_sp(sp);
    Ok((ss, stack))
}

/// Drops data segments that an outer level may not keep (SDM vol. 3, section 5.8.6).
fn leave_inner(st: &mut CpuState, cpl: u8) {
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        let s = &mut st.seg[seg as usize];
        let conforming = s.attr & (ty::CODE | ty::EC) == ty::CODE | ty::EC;
        if s.usable() && !conforming && s.dpl() < cpl {
            // The base stays: in 64-bit mode FS and GS keep theirs.
            s.selector = 0;
            s.attr = 0;
        }
    }
}

/// RETF, with an optional byte count to release.
fn retf<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, size: usize) -> Outcome {
    let release = if i.op_count() > 0 { u64::from(i.immediate16()) } else { 0 };
    let mut stack = Stack::current(st);
    let offset = stack.pop(st, env, size)?;
    let selector = stack.pop(st, env, size)? as u16;
    if real_like(st) {
        if offset > u64::from(st.segment(Seg::Cs).limit) {
            return Err(GP0);
        }
        stack.release(release);
        stack.commit(st);
        descriptor::load_real(st, Seg::Cs, selector);
        st.rip = offset;
        return Ok(Step::Resync);
    }
    let cs = return_segment(st, env, selector)?;
    check_target(st, &cs, offset)?;
    stack.release(release);
    let cpl = (selector & 3) as u8;
    if cpl > st.cpl {
        let sp = stack.pop(st, env, size)?;
        let ss_selector = stack.pop(st, env, size)? as u16;
        let (ss, mut outer) = return_stack(st, env, ss_selector, sp, &cs)?;
        outer.release(release);
        outer.commit(st);
        st.seg[Seg::Ss as usize] = ss;
        leave_inner(st, cpl);
    } else {
        stack.commit(st);
    }
    st.seg[Seg::Cs as usize] = cs;
    st.cpl = cpl;
    st.rip = offset;
    Ok(Step::Resync)
}

/// The flags that POPF and IRET may change at the current privilege, for an operand of `size` bytes.
pub(crate) fn writable_flags(st: &CpuState, size: usize) -> u64 {
    let mut bits = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        bits |= rflags::AC | rflags::ID;
    }
    if st.cpl == 0 {
        bits |= rflags::IOPL;
    }
    let iopl = ((st.rflags & rflags::IOPL) >> 12) as u8;
    if !st.protected() || st.cpl <= iopl {
        bits |= rflags::IF;
    }
    bits
}

/// IRET (SDM vol. 2, IRET/IRETD/IRETQ).
fn iret<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, size: usize) -> Outcome {
    if st.v8086() && st.rflags & rflags::IOPL != rflags::IOPL {
        return Err(GP0);
    }
    if !real_like(st) && st.rflags & rflags::NT != 0 {
        return Err(GP0);
    }
    let mut stack = Stack::current(st);
    let offset = stack.pop(st, env, size)?;
    let selector = stack.pop(st, env, size)? as u16;
    let image = stack.pop(st, env, size)?;
    let mut change = writable_flags(st, size);
    if size > 2 {
        change |= rflags::RF;
        if st.cpl == 0 && st.protected() {
            change |= rflags::VIF | rflags::VIP;
        }
    }
    let flags = (st.rflags & !change) | (image & change) | rflags::FIXED;
    if real_like(st) {
        if offset > u64::from(st.segment(Seg::Cs).limit) {
            return Err(GP0);
        }
        // Virtual-8086 mode got here with IOPL 3, which it cannot change; CPL 3 has kept it out of `change`.
        stack.commit(st);
        descriptor::load_real(st, Seg::Cs, selector);
        return finish_iret(st, offset, flags);
    }
    if image & rflags::VM != 0 && size == 4 && st.cpl == 0 && !st.long_mode() {
        return iret_to_v8086(st, env, stack, offset, selector, image);
    }
    let cs = return_segment(st, env, selector)?;
    check_target(st, &cs, offset)?;
    let cpl = (selector & 3) as u8;
    if cpl > st.cpl || st.code64() {
        let sp = stack.pop(st, env, size)?;
        let ss_selector = stack.pop(st, env, size)? as u16;
        let (ss, outer) = return_stack(st, env, ss_selector, sp, &cs)?;
        outer.commit(st);
        st.seg[Seg::Ss as usize] = ss;
        if cpl > st.cpl {
            leave_inner(st, cpl);
        }
    } else {
        stack.commit(st);
    }
    st.seg[Seg::Cs as usize] = cs;
    st.cpl = cpl;
    finish_iret(st, offset, flags)
}

fn finish_iret(st: &mut CpuState, rip: u64, flags: u64) -> Outcome {
    st.rip = rip;
    st.rflags = flags;
    st.nmi_blocked = 0;
    Ok(Step::Resync)
}

/// IRETD from ring 0 to virtual-8086 mode: the frame goes on with ESP, SS, ES, DS, FS and GS.
fn iret_to_v8086<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    stack: Stack,
    offset: u64,
    selector: u16,
    image: u64,
) -> Outcome {
    let mut stack = stack;
    let sp = stack.pop(st, env, 4)?;
    let mut selectors = [0; 5];
    for s in &mut selectors {
        *s = stack.pop(st, env, 4)? as u16;
    }
    if offset > 0xffff {
        return Err(GP0);
    }
    let keep = rflags::STATUS
        | rflags::NATIVE
        | rflags::TF
        | rflags::IF
        | rflags::IOPL
        | rflags::NT
        | rflags::RF
        | rflags::VM
        | rflags::AC
        | rflags::VIF
        | rflags::VIP
        | rflags::ID;
    st.rflags = (image & keep) | rflags::FIXED;
    st.cpl = 3;
    st.gpr[Reg::Rsp as usize] = sp;
    descriptor::load_real(st, Seg::Cs, selector);
    for (seg, selector) in [Seg::Ss, Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs].into_iter().zip(selectors) {
        descriptor::load_real(st, seg, selector);
    }
    st.rip = offset;
    st.nmi_blocked = 0;
    Ok(Step::Resync)
}

/// SYSCALL. Intel processors know it in 64-bit mode only; AMD's also take it from compatibility mode (to CSTAR) and from legacy
/// mode (to the low half of STAR), AMD APM vol. 2, section 6.1.1.
fn syscall<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, next: u64) -> Outcome {
    let intel = env.cpuid().vendor() != Vendor::Amd;
    if st.efer & efer::SCE == 0 || !st.protected() || (intel && !st.code64()) {
        return Err(Exception::InvalidOpcode);
    }
    let selector = (st.star >> 32) as u16 & !3;
    st.gpr[Reg::Rcx as usize] = next;
    if st.long_mode() {
        let target = if st.code64() { st.lstar } else { st.cstar };
        st.gpr[Reg::R11 as usize] = st.rflags & !rflags::RF;
        st.rflags = (st.rflags & !(st.sfmask | rflags::RF)) | rflags::FIXED;
        st.rip = target;
        st.seg[Seg::Cs as usize] = Segment::flat_code(selector, 0, true);
    } else {
        st.rip = st.star & 0xffff_ffff;
        st.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        st.seg[Seg::Cs as usize] = Segment::flat_code(selector, 0, false);
    }
    st.seg[Seg::Ss as usize] = Segment::flat_data(selector.wrapping_add(8), 0);
    st.cpl = 0;
    Ok(Step::Resync)
}

/// SYSRET; `wide` with REX.W (return to 64-bit code).
fn sysret(st: &mut CpuState, wide: bool) -> Outcome {
    if st.efer & efer::SCE == 0 || !st.protected() {
        return Err(Exception::InvalidOpcode);
    }
    if st.cpl != 0 {
        return Err(GP0);
    }
    let rcx = st.gpr[Reg::Rcx as usize];
    let base = (st.star >> 48) as u16;
    let cs = if wide {
        if !is_canonical(rcx) {
            return Err(GP0);
        }
        Segment::flat_code(base.wrapping_add(16) | 3, 3, true)
    } else {
        Segment::flat_code(base | 3, 3, false)
    };
    st.rip = if wide { rcx } else { rcx & 0xffff_ffff };
    if st.long_mode() {
        st.rflags = (st.gpr[Reg::R11 as usize] & 0x3c_7fd7) | rflags::FIXED;
    } else {
        st.rflags |= rflags::IF;
    }
    st.seg[Seg::Cs as usize] = cs;
    st.seg[Seg::Ss as usize] = Segment::flat_data(base.wrapping_add(8) | 3, 3);
    st.cpl = 3;
    Ok(Step::Resync)
}

/// SYSENTER. AMD processors refuse it in long mode.
fn sysenter<E: Env + ?Sized>(st: &mut CpuState, env: &mut E) -> Outcome {
    let long = st.long_mode();
    if long && env.cpuid().vendor() == Vendor::Amd {
        return Err(Exception::InvalidOpcode);
    }
    let selector = st.sysenter_cs as u16 & !3;
    if st.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(GP0);
    }
    let size = if long { 8 } else { 4 };
    st.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    st.gpr[Reg::Rsp as usize] = mask(st.sysenter_esp, size);
    st.rip = mask(st.sysenter_eip, size);
    st.seg[Seg::Cs as usize] = Segment::flat_code(selector, 0, long);
    st.seg[Seg::Ss as usize] = Segment::flat_data(selector.wrapping_add(8), 0);
    st.cpl = 0;
    Ok(Step::Resync)
}

/// SYSEXIT; `wide` with REX.W.
fn sysexit(st: &mut CpuState, wide: bool) -> Outcome {
    let base = st.sysenter_cs as u16 & !3;
    if st.cr0 & cr0::PE == 0 || base == 0 || st.cpl != 0 {
        return Err(GP0);
    }
    let size = if wide { 8 } else { 4 };
    let rip = mask(st.gpr[Reg::Rdx as usize], size);
    let rsp = mask(st.gpr[Reg::Rcx as usize], size);
    if wide && !(is_canonical(rip) && is_canonical(rsp)) {
        return Err(GP0);
    }
    let selector = base.wrapping_add(if wide { 32 } else { 16 });
    st.gpr[Reg::Rsp as usize] = rsp;
    st.rip = rip;
    st.seg[Seg::Cs as usize] = Segment::flat_code(selector | 3, 3, wide);
    st.seg[Seg::Ss as usize] = Segment::flat_data(selector.wrapping_add(8) | 3, 3);
    st.cpl = 3;
    Ok(Step::Resync)
}

/// Reads a far pointer's offset for LDS and friends: `(selector, offset)`.
pub(crate) fn far_pointer<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    op: u32,
    size: usize,
) -> Result<(u16, u64), Exception> {
    let la = ea::linear(st, i, op, size + 2, false)?;
    let offset = read_linear(st, env, la, size)?;
    let selector = read_linear(st, env, la.wrapping_add(size as u64), 2)?;
    Ok((selector as u16, offset))
}

#[cfg(test)]
mod tests;
