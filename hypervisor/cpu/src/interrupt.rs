//! Exception and interrupt delivery (SDM vol. 3, chapter 6): from a vector to the first instruction of its handler.
//!
//! Each delivery either happens whole or leaves the registers as they were and raises an exception of its own;
//! [`deliver`] then combines the two as section 6.15 says (deliver the second, or a double fault, or shut down: a triple fault).
//!
//! Hardware task switching is not offered: a task gate in the IDT raises #GP with the gate's error code, just as a 64-bit
//! processor does in long mode.

use crate::descriptor::{self, Descriptor, code_of, is_null, sys};
use crate::ea;
use crate::mem::{self, Privilege};
use crate::mmu::is_canonical;
use crate::stack::Stack;
use crate::state::{Reg, Seg, Segment, rflags};
use crate::{CpuState, Env, Exception, StopReason};

/// Which instruction makes a software interrupt; they differ in checks and in what they push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftKind {
    /// INT n (CD ib): the gate's DPL is checked; IOPL-sensitive in virtual-8086 mode.
    IntN,
    /// INT3 (CC) and INTO (CE): the gate's DPL is checked.
    Trap,
    /// INT1 (F1): delivered as a hardware exception would be, without a DPL check.
    Int1,
}

/// One thing to deliver.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    error_code: Option<u32>,
    /// The RIP to push.
    rip: u64,
    /// Set RF in the pushed flags (fault-class exceptions).
    set_rf: bool,
    /// INT n, INT3, INTO: check the gate's DPL, and errors on the way have EXT clear.
    soft: bool,
}

impl Event {
    /// EXT bit of error codes raised while this is being delivered (SDM vol. 3, section 6.13).
    fn ext(&self) -> u16 {
        u16::from(!self.soft)
    }

    /// The error code that names this event's gate.
    fn gate_code(&self) -> u16 {
        u16::from(self.vector) * 8 + 2 + self.ext()
    }
}

/// Exception classes of SDM vol. 3, table 6-4.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class_of(exc: Exception) -> Class {
    match exc {
        Exception::DivideError
        | Exception::InvalidTss(_)
        | Exception::SegmentNotPresent(_)
        | Exception::StackFault(_)
        | Exception::GeneralProtection(_) => Class::Contributory,
        Exception::PageFault { .. } => Class::PageFault,
        Exception::DoubleFault => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// Delivers an exception raised by the instruction at `st.rip` (for the traps #BP and #OF: by the one-byte instruction before it;
/// for a #DB trap, `st.rip` is the next instruction).
///
/// Sets CR2 or DR6, wakes the vCPU and ends the interrupt shadow. Fails only with a triple fault.
pub fn deliver<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, exc: Exception) -> Result<(), StopReason> {
    let fault_rip = match exc {
        Exception::Breakpoint | Exception::Overflow => st.rip.wrapping_sub(1),
        _ => st.rip,
    };
    let soft = matches!(exc, Exception::Breakpoint | Exception::Overflow);
    note(st, exc);
    let event = Event {
        vector: exc.vector(),
        error_code: exc.error_code(),
        rip: st.rip,
        // A #DB never has RF pushed: traps do not, and instruction breakpoints leave it to the handler.
        set_rf: !soft && !matches!(exc, Exception::Debug(_)),
        soft,
    };
    match enter(st, env, &event) {
        Ok(()) => Ok(()),
        Err(second) => {
            st.rip = fault_rip;
            escalate(st, env, class_of(exc), second)
        }
    }
}

/// Whether the exception with this vector pushes an error code (SDM vol. 3, table 6-1).
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// Delivers an exception that was found before, by this engine or another: CR2 and DR6 are up to date. An exception that is
/// none of the architecture's is taken for #UD.
pub fn deliver_found<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    vector: u8,
    error_code: u32,
) -> Result<(), StopReason> {
    let code = error_code as u16;
    let exc = match vector {
        0 => Exception::DivideError,
        1 => Exception::Debug(st.dr[6]),
        5 => Exception::BoundRange,
        7 => Exception::DeviceNotAvailable,
        8 => Exception::DoubleFault,
        10 => Exception::InvalidTss(code),
        11 => Exception::SegmentNotPresent(code),
        12 => Exception::StackFault(code),
        13 => Exception::GeneralProtection(code),
        14 => Exception::PageFault { addr: st.cr2, code: error_code },
        16 => Exception::FpuError,
        17 => Exception::AlignmentCheck,
        19 => Exception::SimdError,
        _ => Exception::InvalidOpcode,
    };
    deliver(st, env, exc)
}

/// Delivers a maskable interrupt that the interrupt controller has handed over. `st.rip` is the next instruction.
pub fn deliver_external<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, vector: u8) -> Result<(), StopReason> {
    let event = Event { vector, error_code: None, rip: st.rip, set_rf: false, soft: false };
    enter(st, env, &event).or_else(|second| escalate(st, env, Class::Benign, second))
}

/// Delivers an NMI and blocks further ones until IRET.
pub fn deliver_nmi<E: Env + ?Sized>(st: &mut CpuState, env: &mut E) -> Result<(), StopReason> {
    st.nmi_blocked = 1;
    deliver_external(st, env, 2)
}

/// Carries out a software interrupt whose instruction is at `st.rip` and ends at `next_rip`; an exception on the way is delivered too,
/// with `st.rip` as the faulting instruction.
pub fn software_int<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    vector: u8,
    next_rip: u64,
    kind: SoftKind,
) -> Result<(), StopReason> {
    enter_software(st, env, vector, next_rip, kind).or_else(|second| escalate(st, env, Class::Benign, second))
}

/// [`software_int`] for callers that deliver exceptions themselves; on failure the state is unchanged.
pub(crate) fn enter_software<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    vector: u8,
    next_rip: u64,
    kind: SoftKind,
) -> Result<(), Exception> {
    if kind == SoftKind::IntN && st.v8086() && st.rflags & rflags::IOPL != rflags::IOPL {
        return Err(Exception::GeneralProtection(0));
    }
    let event = Event { vector, error_code: None, rip: next_rip, set_rf: false, soft: kind != SoftKind::Int1 };
    enter(st, env, &event)
}

/// Deals with exception `second`, raised while something of class `first` was being delivered.
fn escalate<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    first: Class,
    second: Exception,
) -> Result<(), StopReason> {
    let mut first = first;
    let mut second = second;
    loop {
        note(st, second);
        let class = class_of(second);
        let next = match (first, class) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => {
                return Err(StopReason::TripleFault);
            }
            (Class::Contributory, Class::Contributory) | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                Exception::DoubleFault
            }
            _ => second,
        };
        let event =
            Event { vector: next.vector(), error_code: next.error_code(), rip: st.rip, set_rf: true, soft: false };
        match enter(st, env, &event) {
            Ok(()) => return Ok(()),
            Err(again) => {
                first = class_of(next);
                second = again;
            }
        }
    }
}

/// Side effects of an exception that come before its delivery: CR2, DR6 and DR7.GD.
fn note(st: &mut CpuState, exc: Exception) {
    match exc {
        Exception::PageFault { addr, .. } => st.cr2 = addr,
        Exception::Debug(bits) => {
            // B0-B3 tell of this exception alone; BD, BS and BT gather until the handler clears them.
            st.dr[6] = (st.dr[6] & !0xf) | (bits & 0xe00f);
            st.dr[7] &= !(1 << 13);
        }
        _ => {}
    }
}

/// One attempt at delivery, in the current mode.
fn enter<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, event: &Event) -> Result<(), Exception> {
    if !st.protected() {
        enter_real(st, env, event)?;
    } else if st.long_mode() {
        enter_long(st, env, event)?;
    } else {
        enter_protected(st, env, event)?;
    }
    st.halted = 0;
    st.irq_shadow = 0;
    Ok(())
}

/// Real-address mode: the vector table of far pointers (SDM vol. 3, section 21.1.4). Error codes are not pushed.
fn enter_real<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, event: &Event) -> Result<(), Exception> {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(st.idtr.limit) {
        return Err(Exception::GeneralProtection(event.gate_code()));
    }
    let la = st.idtr.base.wrapping_add(offset);
    let entry = mem::read_u32(st, env, la, Privilege::Supervisor)?;
    let mut stack = Stack::frame(st, 0);
    stack.push(st, env, st.rflags, 2)?;
    stack.push(st, env, u64::from(st.segment(Seg::Cs).selector), 2)?;
    stack.push(st, env, event.rip, 2)?;
    stack.commit(st);
    descriptor::load_real(st, Seg::Cs, (entry >> 16) as u16);
    st.rip = u64::from(entry & 0xffff);
    st.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    Ok(())
}

/// An interrupt or trap gate.
struct Gate {
    selector: u16,
    offset: u64,
    /// Clears IF on entry.
    interrupt: bool,
    /// Bytes per push in legacy mode: 2 or 4.
    size: usize,
    ist: u8,
}

/// Reads and checks the event's gate (SDM vol. 3, sections 6.11 and 6.14.1).
fn gate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, event: &Event) -> Result<Gate, Exception> {
    let long = st.long_mode();
    let bytes = if long { 16 } else { 8 };
    let offset = u64::from(event.vector) * bytes;
    let gp = Exception::GeneralProtection(event.gate_code());
    if offset + bytes - 1 > u64::from(st.idtr.limit) {
        return Err(gp);
    }
    let at = st.idtr.base.wrapping_add(offset);
    let raw = mem::read_u64(st, env, at, Privilege::Supervisor)?;
    let upper = if long { mem::read_u64(st, env, at.wrapping_add(8), Privilege::Supervisor)? } else { 0 };
    let d = Descriptor { selector: 0, raw, upper, at };
    let (interrupt, size) = match d.kind() {
        _ if d.is_segment() => return Err(gp),
        sys::INT => (true, 4),
        sys::TRAP => (false, 4),
        sys::INT16 if !long => (true, 2),
        sys::TRAP16 if !long => (false, 2),
        // Task gates included.
        _ => return Err(gp),
    };
    if event.soft && d.dpl() < st.cpl {
        return Err(gp);
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(event.gate_code()));
    }
    let mut target = (raw & 0xffff) | ((raw >> 32) & 0xffff_0000);
    if size == 2 {
        target &= 0xffff;
    }
    Ok(Gate {
        selector: (raw >> 16) as u16,
        offset: target | (upper & 0xffff_ffff) << 32,
        interrupt,
        size,
        ist: if long { (raw >> 32) as u8 & 7 } else { 0 },
    })
}

/// Reads the gate's code segment and gives it with the privilege level that the handler runs at.
fn handler_segment<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    gate: &Gate,
    ext: u16,
) -> Result<(Descriptor, u8), Exception> {
    if is_null(gate.selector) {
        return Err(Exception::GeneralProtection(ext));
    }
    let code = code_of(gate.selector) | ext;
    let gp = Exception::GeneralProtection(code);
    let Some(mut d) = descriptor::read(st, env, gate.selector)? else { return Err(gp) };
    if !d.is_code() || d.dpl() > st.cpl {
        return Err(gp);
    }
    if st.long_mode() && d.attr() & (Segment::L | Segment::DB) != Segment::L {
        return Err(gp);
    }
    if !d.present() {
        return Err(Exception::SegmentNotPresent(code));
    }
    let cpl = if d.is_conforming() { st.cpl } else { d.dpl() };
    if st.v8086() && cpl != 0 {
        return Err(gp);
    }
    descriptor::mark_accessed(st, env, &mut d)?;
    Ok((d, cpl))
}

/// The flags that a handler starts with.
fn handler_flags(flags: u64, interrupt: bool) -> u64 {
    let clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM | if interrupt { rflags::IF } else { 0 };
    flags & !clear
}

/// The flags that are pushed.
fn pushed_flags(st: &CpuState, event: &Event) -> u64 {
    if event.set_rf { st.rflags | rflags::RF } else { st.rflags }
}

/// Protected mode without long mode, virtual-8086 mode included (SDM vol. 3, sections 6.12 and 21.3).
fn enter_protected<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, event: &Event) -> Result<(), Exception> {
    let ext = event.ext();
    let gate = gate(st, env, event)?;
    let (cs, cpl) = handler_segment(st, env, &gate, ext)?;
    let v8086 = st.v8086();
    let size = gate.size;
    let target = cs.segment((gate.selector & !3) | u16::from(cpl));
    let mut new_ss = None;
    let mut stack = if cpl < st.cpl {
        let (selector, sp) = inner_stack(st, env, cpl, ext)?;
        let ss = descriptor::stack_for(st, env, selector, cpl, ext, Exception::InvalidTss)?;
        let mut stack = Stack::inner(ss, sp, cpl, code_of(selector) | ext);
        if v8086 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                stack.push(st, env, u64::from(st.segment(seg).selector), size)?;
            }
        }
        stack.push(st, env, u64::from(st.segment(Seg::Ss).selector), size)?;
        stack.push(st, env, st.gpr[Reg::Rsp as usize], size)?;
        new_ss = Some(ss);
        stack
    } else {
        Stack::frame(st, ext)
    };
    stack.push(st, env, pushed_flags(st, event), size)?;
    stack.push(st, env, u64::from(st.segment(Seg::Cs).selector), size)?;
    stack.push(st, env, event.rip, size)?;
    if let Some(code) = event.error_code {
        stack.push(st, env, u64::from(code), size)?;
    }
    if !ea::within_limit(&target, gate.offset, 1) {
        return Err(Exception::GeneralProtection(ext));
    }
    if let Some(ss) = new_ss {
        st.seg[Seg::Ss as usize] = ss;
    }
    stack.commit(st);
    if v8086 {
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            st.seg[seg as usize] = Segment::default();
        }
    }
    st.seg[Seg::Cs as usize] = target;
    st.cpl = cpl;
    st.rip = gate.offset;
    st.rflags = handler_flags(st.rflags, gate.interrupt);
    Ok(())
}

/// SS and ESP of an inner privilege level, from the 16- or 32-bit TSS (SDM vol. 3, sections 7.2.1 and 7.6).
pub(crate) fn inner_stack<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    cpl: u8,
    ext: u16,
) -> Result<(u16, u64), Exception> {
    let ts = Exception::InvalidTss(code_of(st.tr.selector) | ext);
    let wide = st.tr.attr & 8 != 0;
    let (at, bytes) = if wide { (4 + 8 * u64::from(cpl), 8) } else { (2 + 4 * u64::from(cpl), 4) };
    if !st.tr.usable() || at + bytes - 1 > u64::from(st.tr.limit) {
        return Err(ts);
    }
    let la = st.tr.base.wrapping_add(at);
    if wide {
        let both = mem::read_u64(st, env, la, Privilege::Supervisor)?;
        Ok(((both >> 32) as u16, both & 0xffff_ffff))
    } else {
        let both = mem::read_u32(st, env, la, Privilege::Supervisor)?;
        Ok(((both >> 16) as u16, u64::from(both & 0xffff)))
    }
}

/// A stack pointer from the 64-bit TSS: RSP0-RSP2 at `4 + 8 * n`, IST1-IST7 at `0x24 + 8 * (n - 1)` (SDM vol. 3, section 7.7).
pub(crate) fn tss_rsp<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    offset: u64,
    ext: u16,
) -> Result<u64, Exception> {
    if !st.tr.usable() || offset + 7 > u64::from(st.tr.limit) {
        return Err(Exception::InvalidTss(code_of(st.tr.selector) | ext));
    }
    let rsp = mem::read_u64(st, env, st.tr.base.wrapping_add(offset), Privilege::Supervisor)?;
    if is_canonical(rsp) { Ok(rsp) } else { Err(Exception::StackFault(ext)) }
}

/// Long mode: 16-byte gates, interrupt stack table, always SS:RSP in the frame (SDM vol. 3, section 6.14).
fn enter_long<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, event: &Event) -> Result<(), Exception> {
    let ext = event.ext();
    let gate = gate(st, env, event)?;
    let (cs, cpl) = handler_segment(st, env, &gate, ext)?;
    let inner = cpl < st.cpl;
    let rsp = if gate.ist != 0 {
        tss_rsp(st, env, 0x24 + 8 * u64::from(gate.ist - 1), ext)?
    } else if inner {
        tss_rsp(st, env, 4 + 8 * u64::from(cpl), ext)?
    } else {
        st.gpr[Reg::Rsp as usize]
    };
    let mut stack = Stack::long(rsp & !0xf, cpl, ext);
    let frame = [
        u64::from(st.segment(Seg::Ss).selector),
        st.gpr[Reg::Rsp as usize],
        pushed_flags(st, event),
        u64::from(st.segment(Seg::Cs).selector),
        event.rip,
    ];
    stack.push_all(st, env, &frame, event.error_code.map(u64::from))?;
    if !is_canonical(gate.offset) {
        return Err(Exception::GeneralProtection(ext));
    }
    st.gpr[Reg::Rsp as usize] = stack.sp();
    if inner {
        st.seg[Seg::Ss as usize] = descriptor::null(u16::from(cpl));
    }
    st.seg[Seg::Cs as usize] = cs.segment((gate.selector & !3) | u16::from(cpl));
    st.cpl = cpl;
    st.rip = gate.offset;
    st.rflags = handler_flags(st.rflags, gate.interrupt);
    Ok(())
}

#[cfg(test)]
mod tests;
