//! Control flow and the stack: jumps, calls, returns, push, pop, and every way out of a block.
//!
//! A direct exit within a page (or between global pages, or in a process that has windows) is a patchable jump that is linked to its target on first use. All
//! other exits go through the jump cache, a hash from RIP to the doors of blocks ([`super::door`]) that is emptied whenever a mapping of code
//! changes. Backward and indirect exits poll: they go through a pointer that leads nowhere when somebody wants the vCPU's attention, and fault.

use super::memory::{Access, Dest, Ea, MemOp, Value};
use super::{RawExit, Translator, door};
use crate::asm::{Asm, Base, H, Label, M, Reloc, cc};
use crate::block::{Action, FaultKind, Mode, NO_CALLOUT};
use crate::regs::{Home, Width, gpr_of, home, host_name};
use crate::state::{Thunk, jump_index, off};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use paravane_cpu::mmu;

impl Translator<'_> {
    pub(crate) fn branch_target(&self, i: &Instruction) -> u64 {
        self.wrap(i.near_branch_target())
    }

    /// Polls on the way to a known RIP: reads by way of the pointer that leads nowhere when the vCPU must come out. Clobbers RCX, and leaves R11
    /// as it was.
    fn poll_before(&mut self, target: u64) {
        if self.flags_free_at == Some(target) {
            // Looking for the request itself takes one load less.
            let asked = self.asm.label();
            self.asm.cmp32_mem_imm_flags(M::gs(off::REQUEST), 0);
            self.asm.jcc(cc::NE, asked);
            self.polled.push((asked, target));
            return;
        }
        let near = i32::try_from(target.wrapping_sub(self.start_rip) as i64).is_ok();
        if near {
            self.asm.load(H::RCX, M::gs(off::POLL_AT));
            let at = self.asm.pos();
            self.asm.load32(H::RCX, M::base(H::RCX, 0));
            self.fault_site(at, FaultKind::Poll { rip: target });
        } else {
            // Too far for a packed fault site: RCX says where to go.
            self.asm.store(M::gs(off::TMP), H::R11);
            self.asm.mov_rip(H::RCX, target);
            self.asm.load(H::R11, M::gs(off::POLL_AT));
            let at = self.asm.pos();
            self.asm.load32(H::R11, M::base(H::R11, 0));
            self.fault_site(at, FaultKind::PollIndirect);
            self.asm.load(H::R11, M::gs(off::TMP));
        }
    }

    /// Behind the block: polls that found a request.
    pub(super) fn emit_polled(&mut self) {
        for (label, target) in std::mem::take(&mut self.polled) {
            self.asm.bind(label);
            self.leave_polled(target);
        }
    }

    /// Comes out because a poll on the way to a RIP found a request.
    pub(super) fn leave_polled(&mut self, target: u64) {
        self.asm.mov_rip(H::RCX, target);
        self.asm.store(M::gs(off::RIP), H::RCX);
        self.asm.mov_imm(H::R11, crate::dispatch::EXIT_POLL);
        self.asm.jmp_mem(M::gs(Thunk::Exit.offset()));
    }

    /// Whether an exit to `target` may be a patchable jump.
    fn linkable(&self, target: u64) -> bool {
        !self.mode.alone()
            && (target >> 12 == self.start_rip >> 12
                || (self.mode.has(Mode::GLOBAL) && self.mode.has(Mode::FLAT))
                || self.mode.has(Mode::WINDOW))
    }

    /// Leaves for a known RIP, unconditionally.
    pub(crate) fn exit_to(&mut self, target: u64, mode: Mode, backward: bool) {
        if self.mode.has(Mode::STEP) {
            self.asm.mov_rip(H::RCX, target);
            self.step_to_rcx();
            return;
        }
        if backward {
            self.poll_before(target);
        }
        if self.linkable(target) {
            let stub = self.asm.label();
            let patch = self.asm.jump_patchable(None, stub);
            self.add_exit(target, mode, patch, stub);
            return;
        }
        self.asm.mov_rip(H::RCX, target);
        let canonical = mmu::is_canonical(target) || !self.mode.is64();
        if mode != self.mode || self.mode.alone() || !self.mode.has(Mode::FLAT) || !canonical {
            self.asm.store(M::gs(off::RIP), H::RCX);
            let lookup = self.lookup_stub(NO_CALLOUT, Thunk::Lookup);
            self.asm.jmp(lookup);
            return;
        }
        lookup_constant(self.asm, target, self.mode.view());
    }

    /// A place behind the block that goes to the lookup in Rust; `callout` names the branch instruction, if it has to be
    /// undone when its target is not canonical.
    pub(super) fn lookup_stub(&mut self, callout: u32, thunk: Thunk) -> Label {
        let l = self.asm.label();
        self.lookups.push((l, callout, thunk));
        l
    }

    pub(super) fn add_exit(&mut self, target_rip: u64, target_mode: Mode, patch: u32, stub: Label) {
        self.stubs.push((self.exits.len() as u32, stub));
        self.exits.push(RawExit { target_rip, target_mode, patch, stub: 0 });
    }

    /// Leaves for the RIP in RCX, which the branch instruction `i` has put there.
    pub(crate) fn exit_rcx(&mut self, i: &Instruction) {
        let n = self.note_callout(i, Action::Branch);
        if self.mode.alone() || !self.mode.has(Mode::FLAT) {
            self.asm.store(M::gs(off::RIP), H::RCX);
            let lookup = self.lookup_stub(n, Thunk::Lookup);
            self.asm.jmp(lookup);
            return;
        }
        self.poll_branch(n);
        self.jump_through_cache(self.mode.view());
    }

    /// Polls on the way to the RIP in RCX, and leaves word of which branch goes there. Clobbers R11.
    fn poll_branch(&mut self, callout: u32) {
        self.asm.load(H::R11, M::gs(off::POLL_AT));
        let at = self.asm.pos();
        self.asm.store_imm32(M::base(H::R11, 0), callout as i32);
        self.asm.numbered(Reloc::Callout);
        self.fault_site(at, FaultKind::PollIndirect);
    }

    /// Leaves for the RIP in RCX when a single step is complete there.
    fn step_to_rcx(&mut self) {
        self.asm.store(M::gs(off::RIP), H::RCX);
        // StepDone takes the RIP it finds in the state.
        self.callout(&Instruction::default(), Action::StepDone);
        self.asm.ud2();
    }

    /// Goes to the RIP in RCX through a view's jump cache. If it may not be canonical, a poll must have left word.
    pub(crate) fn jump_through_cache(&mut self, view: usize) {
        let door = self.door_of_rcx(view);
        self.asm.jmp_mem(door);
    }

    /// Where the address of the door is that belongs to the RIP in RCX, if any does. Clobbers R11.
    fn door_of_rcx(&mut self, view: usize) -> M {
        self.asm.pext(H::R11, H::RCX, M::gs(off::JC_MASK));
        M::gs_index(H::R11, 3, off::jc_doors(view))
    }

    /// Leaves for `next` by way of Rust when an interrupt waits for IF.
    pub(crate) fn irq_window_exit(&mut self, next: u64) {
        let a = &mut self.asm;
        let clear = a.label();
        a.load32(H::RCX, M::gs(off::IRQ_WINDOW));
        a.jrcxz(clear);
        a.mov_rip(H::RCX, next);
        a.store(M::gs(off::RIP), H::RCX);
        a.mov_imm(H::R11, crate::dispatch::EXIT_RESYNC);
        a.jmp_mem(M::gs(Thunk::Exit.offset()));
        a.bind(clear);
    }

    pub(crate) fn jcc(&mut self, i: &Instruction) {
        // iced numbers conditions from 1 in the order of the opcodes.
        let cond = i.condition_code() as u8 - 1;
        let (target, next) = (self.branch_target(i), self.cur_next);
        let backward = target <= i.ip();
        let direct = |t: &Self, to: u64| t.linkable(to) && !t.mode.has(Mode::STEP);
        if !backward && direct(self, target) {
            let stub = self.asm.label();
            let patch = self.asm.jump_patchable(Some(cond), stub);
            self.add_exit(target, self.mode, patch, stub);
            self.exit_to(next, self.mode, false);
        } else if direct(self, next) {
            let stub = self.asm.label();
            let patch = self.asm.jump_patchable(Some(cond ^ 1), stub);
            self.add_exit(next, self.mode, patch, stub);
            match self.plan.take() {
                Some(plan) => self.emit_rounds(&plan, cond, next),
                None => self.exit_to(target, self.mode, backward),
            }
        } else {
            let taken = self.asm.label();
            self.asm.jcc(cond, taken);
            self.exit_to(next, self.mode, false);
            self.asm.bind(taken);
            self.exit_to(target, self.mode, backward);
        }
    }

    /// A conditional jump forward in the middle of a block.
    pub(crate) fn side_exit(&mut self, i: &Instruction) {
        let cond = i.condition_code() as u8 - 1;
        let target = self.branch_target(i);
        let stub = self.asm.label();
        if self.linkable(target) {
            let patch = self.asm.jump_patchable(Some(cond), stub);
            self.add_exit(target, self.mode, patch, stub);
        } else {
            self.asm.jcc(cond, stub);
            self.far_sides.push((stub, target));
        }
    }

    /// Behind the block: side exits by way of the jump cache.
    pub(crate) fn emit_far_sides(&mut self) {
        for (label, target) in std::mem::take(&mut self.far_sides) {
            self.asm.bind(label);
            self.exit_to(target, self.mode, false);
        }
    }

    pub(crate) fn loop_or_jrcxz(&mut self, i: &Instruction) {
        let (target, next) = (self.branch_target(i), self.cur_next);
        let bits = match i.mnemonic() {
            Mnemonic::Jrcxz => 64,
            Mnemonic::Jecxz => 32,
            Mnemonic::Jcxz => 16,
            _ => match i.code().op_code().address_size() {
                0 => self.mode.bits(),
                n => n,
            },
        };
        let is_loop = i.mnemonic() == Mnemonic::Loop;
        let a = &mut self.asm;
        if is_loop {
            match bits {
                64 => a.lea(H::GUEST_RCX, M::base(H::GUEST_RCX, -1)),
                32 => a.lea32(H::GUEST_RCX, M::base(H::GUEST_RCX, -1)),
                _ => {
                    // Only CX counts; the rest of the register stays.
                    a.lea32(H::RCX, M::base(H::GUEST_RCX, -1));
                    a.store(M::gs(off::TMP), H::GUEST_RCX);
                    a.store16(M::gs(off::TMP), H::RCX);
                    a.load(H::GUEST_RCX, M::gs(off::TMP));
                }
            }
        }
        match bits {
            64 => a.mov(H::RCX, H::GUEST_RCX),
            32 => a.mov32(H::RCX, H::GUEST_RCX),
            _ => a.movzx16(H::RCX, H::GUEST_RCX),
        }
        let zero = a.label();
        let other = a.label();
        a.jrcxz(zero);
        a.jmp(other);
        a.bind(zero);
        // JRCXZ has a short reach: both continuations are jumped to.
        let at_zero = a.label();
        a.jmp(at_zero);
        a.bind(other);
        let (if_zero, if_not) = if is_loop { (next, target) } else { (target, next) };
        self.exit_to(if_not, self.mode, if_not <= i.ip());
        self.asm.bind(at_zero);
        self.exit_to(if_zero, self.mode, if_zero <= i.ip());
    }

    /// Width of a stack slot for an instruction, in bytes.
    fn slot(&self, i: &Instruction) -> u8 {
        match i.stack_pointer_increment().unsigned_abs() {
            2 => 2,
            4 => 4,
            8 => 8,
            _ => (self.mode.bits() / 8) as u8,
        }
    }

    /// Moves the guest's stack pointer.
    fn adjust_rsp(&mut self, by: i32) {
        if self.mode.is64() {
            self.asm.lea(H::GUEST_RSP, M::base(H::GUEST_RSP, by));
        } else {
            self.asm.lea32(H::GUEST_RSP, M::base(H::GUEST_RSP, by));
        }
    }

    fn push_value(&mut self, v: Value, size: u8, flags_live: bool) {
        let acc = Access {
            ea: Ea::stack(-i64::from(size), self.mode),
            size: u16::from(size),
            read: false,
            write: true,
            masked: false,
            align: 0,
            flags_live,
        };
        self.emit_access(acc, MemOp::Store(v, size));
    }

    fn load_from(&mut self, ea: Ea, size: u8, dest: Dest, flags_live: bool) {
        let acc = Access { ea, size: u16::from(size), read: true, write: false, masked: false, align: 0, flags_live };
        self.emit_access(acc, MemOp::Load(dest, size));
    }

    fn value_of(&self, n: usize) -> Value {
        match home(n) {
            Home::Host(h) => Value::Reg(h),
            Home::Spilled(n) => Value::Gs(off::gpr(n)),
        }
    }

    pub(crate) fn push(&mut self, i: &Instruction, flags_live: bool) {
        let size = self.slot(i);
        let v = match i.op0_kind() {
            OpKind::Register => match gpr_of(i.op0_register()) {
                Some((n, _)) => self.value_of(n),
                None => return self.callout(i, Action::Emulate),
            },
            OpKind::Memory => {
                self.load_from(Ea::of(i, self.mode), size, Dest::Gs(off::TMP + 16), flags_live);
                Value::Gs(off::TMP + 16)
            }
            _ => Value::Imm(i.immediate(0)),
        };
        let v = match v {
            Value::Imm(x) if size == 4 => Value::Imm(x & 0xffff_ffff),
            Value::Imm(x) if size == 2 => Value::Imm(x & 0xffff),
            v => v,
        };
        // The stored register must be one whose low part a plain MOV can name at any width: all but the first
        // eight's byte forms are, and PUSH has no byte form.
        self.push_value(v, size, flags_live);
        self.adjust_rsp(-i32::from(size));
    }

    pub(crate) fn pop(&mut self, i: &Instruction, flags_live: bool) {
        let size = self.slot(i);
        if i.op0_kind() != OpKind::Register || size == 2 {
            return self.callout(i, Action::Emulate);
        }
        let Some((n, _)) = gpr_of(i.op0_register()) else { return self.callout(i, Action::Emulate) };
        let dest = match home(n) {
            Home::Host(h) => Dest::Reg(h),
            Home::Spilled(n) => Dest::Gs(off::gpr(n)),
        };
        self.load_from(Ea::stack(0, self.mode), size, dest, flags_live);
        if n != 4 {
            self.adjust_rsp(i32::from(size));
        }
    }

    pub(crate) fn leave(&mut self, i: &Instruction, flags_live: bool) {
        let size = match i.code() {
            Code::Leaveq => 8,
            Code::Leaved => 4,
            _ => return self.callout(i, Action::Emulate),
        };
        // The frame is read through RBP before anything changes, so that a fault leaves all as it was.
        let ea = Ea { base: Some(5), ..Ea::stack(0, self.mode) };
        self.load_from(ea, size, Dest::Gs(off::TMP + 16), flags_live);
        if self.mode.is64() {
            self.asm.lea(H::GUEST_RSP, M::base(H::RBP, i32::from(size)));
        } else {
            self.asm.lea32(H::GUEST_RSP, M::base(H::RBP, i32::from(size)));
        }
        self.asm.load(H::RBP, M::gs(off::TMP + 16));
    }

    pub(crate) fn call_direct(&mut self, i: &Instruction, flags_live: bool) {
        let size = self.slot(i);
        if size == 2 {
            return self.callout(i, Action::Emulate);
        }
        let target = self.branch_target(i);
        self.push_value(Value::Imm(self.cur_next), size, flags_live);
        self.adjust_rsp(-i32::from(size));
        if !self.has_frames() {
            return self.exit_to(target, self.mode, target <= i.ip());
        }
        // Forward too: 40 functions of which each calls the next one twice never jump back, and are at it for hours.
        self.poll_before(target);
        let stub = self.asm.label();
        let patch = self.asm.call_patchable(stub);
        self.add_exit(target, self.mode, patch, stub);
        self.land();
        self.exit_to(self.cur_next, self.mode, false);
    }

    /// Whether calls and returns of this block go by the translated code's own stack.
    ///
    /// Kernel code has them where its mapping is global, so that a CR3 load concerns no call.
    fn has_frames(&self) -> bool {
        let m = self.mode;
        m.calls() && (m.has(Mode::WINDOW) || (self.start_rip >> 63 != 0 && m.has(Mode::GLOBAL)))
    }

    /// Behind a call: where the return from it arrives, and returns from elsewhere, which the guest's return address in RCX tells. Nothing
    /// else is known of them.
    fn land(&mut self) {
        let wrong = door::open(self.asm, self.cur_next);
        self.landings.push((wrong, self.cur_next));
    }

    /// Behind the block: the ways of those who arrived at the wrong place.
    pub(crate) fn emit_landings(&mut self) {
        let to = Thunk::returned(self.mode.view());
        for (wrong, rip) in std::mem::take(&mut self.landings) {
            door::turn_away(self.asm, rip, to, wrong);
        }
    }

    /// RCX = the guest register that an indirect branch names.
    fn target_of(&mut self, n: usize) {
        match home(n) {
            Home::Host(h) => self.asm.mov(H::RCX, h),
            Home::Spilled(n) => self.asm.load(H::RCX, M::gs(off::gpr(n))),
        }
    }

    pub(crate) fn call_indirect(&mut self, i: &Instruction, flags_live: bool) {
        let size = (self.mode.bits() / 8) as u8;
        // A target in memory is read before the return address is pushed, and so is RSP.
        let register = if i.op0_kind() == OpKind::Register { gpr_of(i.op0_register()) } else { None };
        let target = match register {
            Some((4, w)) if w != Width::B16 => {
                self.asm.store(M::gs(off::TMP + 16), H::GUEST_RSP);
                None
            }
            Some((n, w)) if w != Width::B16 => Some(n),
            None if i.op0_kind() == OpKind::Memory && i.memory_size().size() == usize::from(size) => {
                self.load_from(Ea::of(i, self.mode), size, Dest::Gs(off::TMP + 16), flags_live);
                None
            }
            _ => return self.callout(i, Action::Emulate),
        };
        self.push_value(Value::Imm(self.cur_next), size, flags_live);
        self.adjust_rsp(-i32::from(size));
        match target {
            Some(n) => self.target_of(n),
            None => self.asm.load(H::RCX, M::gs(off::TMP + 16)),
        }
        if !self.has_frames() {
            return self.exit_rcx(i);
        }
        let n = self.note_callout(i, Action::Branch);
        self.poll_branch(n);
        let door = self.door_of_rcx(self.mode.view());
        self.asm.call_mem(door);
        self.land();
        self.exit_to(self.cur_next, self.mode, false);
    }

    pub(crate) fn jmp_indirect(&mut self, i: &Instruction, flags_live: bool) {
        if i.op0_kind() == OpKind::Register && gpr_of(i.op0_register()).is_some_and(|(_, w)| w != Width::B16) {
            let Some((n, _)) = gpr_of(i.op0_register()) else { return };
            self.target_of(n);
            return self.exit_rcx(i);
        }
        let size = (self.mode.bits() / 8) as u8;
        if i.op0_kind() != OpKind::Memory || i.memory_size().size() != usize::from(size) {
            return self.callout(i, Action::Emulate);
        }
        self.load_from(Ea::of(i, self.mode), size, Dest::Reg(H::RCX), flags_live);
        self.exit_rcx(i);
    }

    pub(crate) fn ret(&mut self, i: &Instruction, flags_live: bool) {
        let size = self.slot_of_ret(i);
        if size == 2 {
            return self.callout(i, Action::Emulate);
        }
        let extra = if i.op_count() == 1 { i32::from(i.immediate16()) } else { 0 };
        self.load_from(Ea::stack(0, self.mode), size, Dest::Reg(H::RCX), flags_live);
        self.adjust_rsp(i32::from(size) + extra);
        if !self.has_frames() {
            return self.exit_rcx(i);
        }
        // No poll: there was one at the call, and whoever arrives elsewhere polls. Those must know who they are if RCX is not canonical.
        let n = self.note_callout(i, Action::Branch);
        self.asm.store_imm32(M::gs(off::POLL_WORD), n as i32);
        self.asm.numbered(Reloc::Callout);
        self.asm.ret();
    }

    fn slot_of_ret(&self, i: &Instruction) -> u8 {
        use iced_x86::Code as C;
        match i.code() {
            C::Retnw | C::Retnw_imm16 => 2,
            C::Retnd | C::Retnd_imm16 => 4,
            _ => 8,
        }
    }

    /// LEA is arithmetic: no lookup, but the address must be computed as the guest would.
    pub(crate) fn lea(&mut self, i: &Instruction) {
        let Some((n, w)) = gpr_of(i.op0_register()) else { return };
        let ea = Ea::of(i, self.mode);
        // All but a word is one instruction, the loads of registers that live in memory apart.
        if matches!(w, Width::B32 | Width::B64) && ea.bits != 16 && (ea.base.is_some() || ea.index.is_some()) {
            let m = M {
                base: ea.base.map(|g| self.in_host(g, H::R11)),
                index: ea.index.map(|(g, s)| (self.in_host(g, H::RCX), s)),
                disp: ea.disp as i32,
                seg: Base::Host,
            };
            let d = match home(n) {
                Home::Host(d) => d,
                Home::Spilled(_) => H::R11,
            };
            if w == Width::B64 && ea.bits == 64 {
                self.asm.lea(d, m);
            } else {
                self.asm.lea32(d, m);
            }
            if let Home::Spilled(n) = home(n) {
                self.asm.store(M::gs(off::gpr(n)), d);
            }
            return;
        }
        if let (Width::B64, 64, Home::Host(d)) = (w, ea.bits, home(n)) {
            return self.asm.mov_rip_or_short(d, ea.disp as u64);
        }
        self.emit_ea(&ea, false);
        match (home(n), w) {
            (Home::Host(d), Width::B64) => self.asm.mov(d, H::RCX),
            (Home::Host(d), Width::B32) => self.asm.mov32(d, H::RCX),
            (Home::Spilled(n), Width::B64) => self.asm.store(M::gs(off::gpr(n)), H::RCX),
            (Home::Spilled(n), Width::B32) => {
                self.asm.mov32(H::RCX, H::RCX);
                self.asm.store(M::gs(off::gpr(n)), H::RCX);
            }
            (Home::Spilled(n), _) => self.asm.store16(M::gs(off::gpr(n)), H::RCX),
            (Home::Host(d), _) => {
                let mut mov = Instruction::new();
                mov.set_code(iced_x86::Code::Mov_r16_rm16);
                mov.set_op0_kind(OpKind::Register);
                mov.set_op0_register(host_name(d, Width::B16));
                mov.set_op1_kind(OpKind::Register);
                mov.set_op1_register(Register::CX);
                if let Err(e) = self.asm.guest(&mov) {
                    self.encode_failed(i, &e);
                }
            }
        }
    }
}

/// Goes through the jump cache to a RIP that is known when the code is made, is canonical, and is already in RCX.
fn lookup_constant(a: &mut Asm, target: u64, view: usize) {
    let first = off::jc_doors(view);
    a.jmp_mem(M::gs(first + (jump_index(target) * size_of::<u64>()) as i32));
    a.numbered(|at| Reloc::Door(at, first as u32));
}

/// A stub on its own that goes to `target`, which is canonical, by way of the jump cache.
pub(crate) fn jump_cache_stub(a: &mut Asm, target: u64, view: usize) {
    a.clear();
    a.mov_imm(H::RCX, target);
    lookup_constant(a, target, view);
}
