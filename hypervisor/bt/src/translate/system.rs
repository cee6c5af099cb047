//! Privileged instructions that need no device: done inside translated code.

use super::Translator;
use super::memory::{Access, Ea, MemOp, Value};
use crate::asm::{H, M};
use crate::block::{Action, Mode};
use crate::regs::{Home, Width, gpr_of, home};
use crate::state::off;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// `RFLAGS` bits 8 to 15: in the plain mode IF is the only one of them that the state keeps.
const FLAGS_BYTE1: i32 = off::RFLAGS + 1;

impl Translator<'_> {
    /// CLI is a store to the virtual IF.
    pub(crate) fn cli(&mut self, i: &Instruction) {
        if self.mode.has(Mode::PLAIN_IF) {
            self.asm.store_imm8(M::gs(FLAGS_BYTE1), 0);
        } else {
            self.callout(i, Action::Emulate);
        }
    }

    /// STI sets the virtual IF; the check for a waiting interrupt comes behind the next instruction, at the block's end.
    pub(crate) fn sti(&mut self, i: &Instruction) {
        if self.mode.has(Mode::PLAIN_IF) && !self.mode.alone() {
            self.asm.store_imm8(M::gs(FLAGS_BYTE1), 2);
        } else {
            self.callout(i, Action::Emulate);
        }
    }

    /// STAC and CLAC switch between the two supervisor views.
    pub(crate) fn stac_clac(&mut self, i: &Instruction) -> bool {
        let set = i.mnemonic() == Mnemonic::Stac;
        let view = self.mode.view() as u32;
        if !self.mode.has(Mode::SMAP) || self.mode.has(Mode::USER) || self.mode.has(Mode::RING) || self.mode.alone() {
            self.callout(i, Action::Emulate);
            return true;
        }
        // With SMAP on, the view says what AC is.
        let to = if set { Mode::VIEW_SUPER } else { Mode::VIEW_SMAP };
        let mode = self.mode.with_view(to);
        if view != to {
            let a = &mut self.asm;
            a.load8(H::RCX, M::gs(off::RFLAGS + 2));
            a.lea32(H::RCX, M::base(H::RCX, if set { 4 } else { -4 }));
            a.store8(M::gs(off::RFLAGS + 2), H::RCX);
            a.store_imm32(M::gs(off::MODE), mode.0 as i32);
        }
        self.exit_to(self.cur_next, mode, false);
        true
    }

    pub(crate) fn rdtsc(&mut self, i: &Instruction) {
        if self.mode.native_tsc() {
            if let Err(e) = self.asm.guest(i) {
                self.encode_failed(i, &e);
            }
        } else {
            self.callout(i, Action::Emulate);
        }
    }

    /// Every so often Rust hears of it, and may give the host CPU to whom the vCPU waits for.
    pub(crate) fn pause(&mut self, i: &Instruction) {
        let at = M::gs(off::PAUSES);
        let a = &mut self.asm;
        let (often, done) = (a.label(), a.label());
        a.load32(H::RCX, at);
        a.lea32(H::RCX, M::base(H::RCX, -1));
        a.store32(at, H::RCX);
        a.jrcxz(often);
        if let Err(e) = a.guest(i) {
            self.encode_failed(i, &e);
        }
        self.asm.jmp8(done);
        self.asm.bind(often);
        self.callout(i, Action::Emulate);
        self.asm.bind(done);
    }

    pub(crate) fn rdtscp(&mut self, i: &Instruction) {
        if self.mode.native_tsc() {
            if let Err(e) = self.asm.guest(i) {
                self.encode_failed(i, &e);
            }
            self.asm.load32(H::GUEST_RCX, M::gs(off::TSC_AUX));
        } else {
            self.callout(i, Action::Emulate);
        }
    }

    pub(crate) fn swapgs(&mut self, i: &Instruction) {
        if !self.mode.is64() || self.mode.has(Mode::RING) {
            return self.callout(i, Action::Emulate);
        }
        let (gs, kernel) = (M::gs(off::seg_base(5)), M::gs(off::KERNEL_GS));
        let a = &mut self.asm;
        a.load(H::RCX, gs);
        a.load(H::R11, kernel);
        a.store(gs, H::R11);
        a.store(kernel, H::RCX);
    }

    /// MOV from a control register.
    pub(crate) fn read_cr(&mut self, i: &Instruction) {
        let from = match i.op1_register() {
            Register::CR0 => off::CR0,
            Register::CR2 => off::CR2,
            Register::CR3 => off::CR3,
            Register::CR4 => off::CR4,
            _ => return self.callout(i, Action::Emulate),
        };
        let Some((n, w)) = gpr_of(i.op0_register()) else { return self.callout(i, Action::Emulate) };
        if self.mode.has(Mode::RING) || self.mode.has(Mode::V86) {
            return self.callout(i, Action::Emulate);
        }
        let load = |a: &mut crate::asm::Asm, r: H| {
            if w == Width::B64 { a.load(r, M::gs(from)) } else { a.load32(r, M::gs(from)) }
        };
        match home(n) {
            Home::Host(h) => load(self.asm, h),
            Home::Spilled(n) => {
                load(self.asm, H::RCX);
                self.asm.store(M::gs(off::gpr(n)), H::RCX);
            }
        }
    }

    /// CLD and STD: the direction is part of the mode, so that string instructions know it.
    pub(crate) fn change_direction(&mut self, i: &Instruction) {
        if let Err(e) = self.asm.guest(i) {
            self.encode_failed(i, &e);
        }
        let mode = Mode(self.mode.0 ^ Mode::DF);
        self.asm.store_imm32(M::gs(off::MODE), mode.0 as i32);
        self.exit_to(self.cur_next, mode, false);
    }

    /// MOV from a segment register.
    pub(crate) fn read_segment(&mut self, i: &Instruction, flags_live: bool) {
        let seg = match i.op1_register() {
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::DS => 3,
            Register::FS => 4,
            Register::GS => 5,
            _ => return self.callout(i, Action::Emulate),
        };
        let from = off::seg_selector(seg);
        if i.op0_kind() == OpKind::Memory {
            // Two bytes, whatever the operand size.
            let ea = Ea::of(i, self.mode);
            let acc = Access { ea, size: 2, read: false, write: true, masked: false, align: 0, flags_live };
            return self.emit_access(acc, MemOp::Store(Value::Gs(from), 2));
        }
        let Some((n, width)) = gpr_of(i.op0_register()) else { return self.callout(i, Action::Emulate) };
        let a = &mut self.asm;
        match (home(n), width) {
            (Home::Host(h), Width::B32 | Width::B64) => a.load16(h, M::gs(from)),
            (Home::Host(h), _) => {
                a.load16(H::RCX, M::gs(from));
                a.mov16(h, H::RCX);
            }
            (Home::Spilled(n), Width::B32 | Width::B64) => {
                a.load16(H::RCX, M::gs(from));
                a.store(M::gs(off::gpr(n)), H::RCX);
            }
            (Home::Spilled(n), _) => {
                a.load16(H::RCX, M::gs(from));
                a.store16(M::gs(off::gpr(n)), H::RCX);
            }
        }
    }

    /// WRFSBASE and WRGSBASE. Leaves flags alone.
    pub(crate) fn write_base(&mut self, i: &Instruction) {
        let seg = if i.mnemonic() == Mnemonic::Wrfsbase { 4 } else { 5 };
        let Some((n, w)) = gpr_of(i.op0_register()) else { return self.callout(i, Action::Emulate) };
        if !self.mode.is64() || !self.mode.has(Mode::FSGSBASE) {
            return self.callout(i, Action::Undefined);
        }
        let a = &mut self.asm;
        match home(n) {
            Home::Host(h) => a.mov(H::R11, h),
            Home::Spilled(n) => a.load(H::R11, M::gs(off::gpr(n))),
        }
        if w == Width::B64 {
            // Canonical: bits 47 and up are all 0 or all 1. If not, Rust raises #GP.
            let good = a.label();
            a.mov_imm(H::RCX, 47);
            a.sarx(H::RCX, H::R11, H::RCX);
            a.jrcxz(good);
            a.lea(H::RCX, M::base(H::RCX, 1));
            a.jrcxz(good);
            self.callout(i, Action::Emulate);
            self.asm.bind(good);
        } else {
            a.mov32(H::R11, H::R11);
        }
        self.asm.store(M::gs(off::seg_base(seg)), H::R11);
    }

    /// RDFSBASE and RDGSBASE.
    pub(crate) fn read_base(&mut self, i: &Instruction) {
        let seg = if i.mnemonic() == Mnemonic::Rdfsbase { 4 } else { 5 };
        let Some((n, w)) = gpr_of(i.op0_register()) else { return self.callout(i, Action::Emulate) };
        if !self.mode.is64() || !self.mode.has(Mode::FSGSBASE) {
            return self.callout(i, Action::Undefined);
        }
        let a = &mut self.asm;
        if w == Width::B64 {
            a.load(H::RCX, M::gs(off::seg_base(seg)));
        } else {
            a.load32(H::RCX, M::gs(off::seg_base(seg)));
        }
        match home(n) {
            Home::Host(h) => a.mov(h, H::RCX),
            Home::Spilled(n) => a.store(M::gs(off::gpr(n)), H::RCX),
        }
    }

    /// PUSHFQ: native flags from the host's RFLAGS, the rest from the state. PEXT and PDEP mask without touching flags.
    pub(crate) fn pushfq(&mut self, i: &Instruction) {
        if i.stack_pointer_increment() != -8 {
            return self.callout(i, Action::Emulate);
        }
        let a = &mut self.asm;
        a.pushfq();
        a.pop(H::RCX);
        a.pext(H::RCX, H::RCX, M::gs(off::FLAGS_MASK));
        a.pdep(H::RCX, H::RCX, M::gs(off::FLAGS_MASK));
        a.load(H::R11, M::gs(off::RFLAGS));
        a.lea(H::RCX, M::base_index(H::RCX, H::R11));
        a.store(M::gs(off::TMP + 16), H::RCX);
        let acc = Access {
            ea: Ea::stack(-8, self.mode),
            size: 8,
            read: false,
            write: true,
            masked: false,
            align: 0,
            flags_live: true,
        };
        self.emit_access(acc, MemOp::Store(Value::Gs(off::TMP + 16), 8));
        a_adjust(self.asm);
    }
}

fn a_adjust(a: &mut crate::asm::Asm) {
    a.lea(H::GUEST_RSP, M::base(H::GUEST_RSP, -8));
}
