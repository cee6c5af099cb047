//! The stack as an instruction or an exception sees it: a private copy of the stack pointer that becomes the vCPU's only
//! when everything has succeeded, so that a fault half-way leaves the registers as they were.

use crate::ea;
use crate::mem;
use crate::mmu::{Access, AccessKind, is_canonical};
use crate::state::{Reg, Seg, Segment};
use crate::{CpuState, Env, Exception};

/// Width of the stack pointer (SDM vol. 1, section 6.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    W16,
    W32,
    W64,
}

/// A stack being pushed to or popped from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    sp: u64,
    width: Width,
    ss: Segment,
    /// Whether the segment's type and limit count (not in 64-bit mode).
    checked: bool,
    /// The access is a user one.
    user: bool,
    /// The access is made by the processor for itself (exception frames, inner stacks).
    implicit: bool,
    /// Error code of the stack fault that a bad address raises.
    code: u16,
}

impl Stack {
    /// The current stack, used by the running program.
    pub(crate) fn current(st: &CpuState) -> Self {
        let ss = st.seg[Seg::Ss as usize];
        let width = if st.code64() { Width::W64 } else { width_of(&ss) };
        Self {
            sp: st.gpr[Reg::Rsp as usize],
            width,
            ss,
            checked: !st.code64(),
            user: st.cpl == 3,
            implicit: false,
            code: 0,
        }
    }

    /// The current stack, for an exception frame; `code` is the error code of a stack fault.
    pub(crate) fn frame(st: &CpuState, code: u16) -> Self {
        Self { implicit: st.cpl != 3, code, ..Self::current(st) }
    }

    /// The stack `ss:sp` of privilege level `cpl` outside long mode.
    pub(crate) fn inner(ss: Segment, sp: u64, cpl: u8, code: u16) -> Self {
        Self { sp, width: width_of(&ss), ss, checked: true, user: cpl == 3, implicit: cpl != 3, code }
    }

    /// The stack at `rsp` of privilege level `cpl` for a frame of 64-bit mode.
    pub(crate) fn long(rsp: u64, cpl: u8, code: u16) -> Self {
        let ss = Segment::default();
        Self { sp: rsp, width: Width::W64, ss, checked: false, user: cpl == 3, implicit: cpl != 3, code }
    }

    /// The stack pointer.
    pub(crate) fn sp(&self) -> u64 {
        truncate(self.sp, self.width)
    }

    /// Sets the stack pointer (its bits within the width).
    pub(crate) fn set_sp(&mut self, sp: u64) {
        let keep = match self.width {
            Width::W16 => !0xffff,
            Width::W32 | Width::W64 => 0,
        };
        self.sp = (self.sp & keep) | truncate(sp, self.width);
    }

    /// Moves the stack pointer up by `bytes` (RET imm16).
    pub(crate) fn release(&mut self, bytes: u64) {
        self.set_sp(self.sp().wrapping_add(bytes));
    }

    /// Pushes the low `size` bytes of `value`.
    pub(crate) fn push<E: Env + ?Sized>(
        &mut self,
        st: &CpuState,
        env: &mut E,
        value: u64,
        size: usize,
    ) -> Result<(), Exception> {
        self.push_part(st, env, value, size, size)
    }

    /// Moves down by `size` but stores only `store` bytes (PUSH of a segment register).
    pub(crate) fn push_part<E: Env + ?Sized>(
        &mut self,
        st: &CpuState,
        env: &mut E,
        value: u64,
        size: usize,
        store: usize,
    ) -> Result<(), Exception> {
        let sp = truncate(self.sp().wrapping_sub(size as u64), self.width);
        let la = self.linear(sp, store, true)?;
        mem::write_as(st, env, la, &value.to_le_bytes()[..store.min(8)], self.access(AccessKind::Write))?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pushes a frame of eight-byte values, first one first, in one access: all of it is checked before any of it is stored.
    pub(crate) fn push_all<E: Env + ?Sized>(
        &mut self,
        st: &CpuState,
        env: &mut E,
        frame: &[u64; 5],
        last: Option<u64>,
    ) -> Result<(), Exception> {
        let mut bytes = [0; 48];
        let count = frame.len() + usize::from(last.is_some());
        for (n, value) in frame.iter().copied().chain(last).enumerate() {
            let at = (count - 1 - n) * 8;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let sp = self.sp().wrapping_sub(count as u64 * 8);
        let la = self.linear(sp, count * 8, true)?;
        mem::write_as(st, env, la, &bytes[..count * 8], self.access(AccessKind::Write))?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pops `size` bytes, zero-extended.
    pub(crate) fn pop<E: Env + ?Sized>(&mut self, st: &CpuState, env: &mut E, size: usize) -> Result<u64, Exception> {
        let value = self.peek(st, env, 0, size)?;
        self.release(size as u64);
        Ok(value)
    }

    /// Reads `size` bytes `offset` bytes above the stack pointer.
    pub(crate) fn peek<E: Env + ?Sized>(
        &self,
        st: &CpuState,
        env: &mut E,
        offset: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let la = self.linear(truncate(self.sp().wrapping_add(offset), self.width), size, false)?;
        let mut b = [0; 8];
        mem::read_as(st, env, la, &mut b[..size.min(8)], self.access(AccessKind::Read))?;
        Ok(u64::from_le_bytes(b))
    }

    /// Makes this the vCPU's stack pointer. SS is the caller's matter.
    pub(crate) fn commit(&self, st: &mut CpuState) {
        let rsp = &mut st.gpr[Reg::Rsp as usize];
        *rsp = match self.width {
            Width::W16 => (*rsp & !0xffff) | (self.sp & 0xffff),
            Width::W32 => self.sp & 0xffff_ffff,
            Width::W64 => self.sp,
        };
    }

    fn access(&self, kind: AccessKind) -> Access {
        Access { kind, user: self.user, implicit: self.implicit }
    }

    fn linear(&self, offset: u64, size: usize, write: bool) -> Result<u64, Exception> {
        if !self.checked {
            let last = offset.wrapping_add(size as u64 - 1);
            let ok = is_canonical(offset) && is_canonical(last);
            return if ok { Ok(offset) } else { Err(Exception::StackFault(self.code)) };
        }
        let writable = !write || self.ss.attr & ea::ty::RW != 0;
        if !self.ss.usable() || !writable || !ea::within_limit(&self.ss, offset, size) {
            return Err(Exception::StackFault(self.code));
        }
        Ok(self.ss.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

fn width_of(ss: &Segment) -> Width {
    if ss.attr & Segment::DB != 0 { Width::W32 } else { Width::W16 }
}

fn truncate(value: u64, width: Width) -> u64 {
    match width {
        Width::W16 => value & 0xffff,
        Width::W32 => value & 0xffff_ffff,
        Width::W64 => value,
    }
}
