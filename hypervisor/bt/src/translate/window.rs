//! The second memory policy: operands reached through a window (see [`crate::window`]).
//!
//! In line stands a check for the window that the operand is likely in, then the guest's instruction with that window's
//! segment prefix. If the check fails, code behind the block tries the other window, and then the slow path, which is
//! the soft TLB's. An access that faults goes to the same slow path, by way of the signal handler.
//!
//! A base register that was checked need not be checked again in the block while it moves by constants only. That holds
//! in code of the high window, whose pointers nearly all are in the high window too; elsewhere only for the stack pointer.

use super::classify::{Class, classify};
use super::memory::{Access, Ea, Loc, MemOp, Slow};
use super::{Pending, Translator};
use crate::asm::{Base, H, Label, M, cc};
use crate::block::FaultKind;
use crate::regs::{Home, gpr_of, home};
use crate::state::off;
use crate::window::{HIGH_SHIFT, LOW_DISPLACEMENTS, LOW_DISTANCE, LOW_SHIFT};
use iced_x86::{Code, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind};

/// One of the two windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Region {
    High,
    Low,
}

impl Region {
    fn other(self) -> Self {
        match self {
            Self::High => Self::Low,
            Self::Low => Self::High,
        }
    }

    /// An operand in the window, given its address in guest terms.
    fn operand(self, m: M) -> M {
        match self {
            Self::High => m.relative(Base::Window, 0),
            Self::Low => m.relative(Base::State, LOW_DISTANCE),
        }
    }
}

/// What is checked before an access.
#[derive(Clone, Copy, Debug)]
enum Subject {
    /// A register, which stays as it is: the base, or R15 with the whole address.
    Register(H),
    /// The address that this operand computes.
    Address(M),
}

/// The attempt at the other window, behind the block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Other {
    label: Label,
    region: Region,
    subject: Subject,
    operand: M,
    flags_live: bool,
}

/// What is known about guest registers at this place of a window block.
#[derive(Default)]
pub(crate) struct Known {
    /// The registers' values when the block was translated, on its way to be run: a hint which window they point to.
    hint: [u64; 16],
    /// Registers that are as they were at the block's entry, as a bit set.
    unchanged: u16,
    /// Registers that were checked for the high window.
    high: u16,
}

impl Known {
    pub(crate) fn at_entry(hint: &[u64; 16]) -> Self {
        Self { hint: *hint, unchanged: u16::MAX, high: 0 }
    }
}

impl Translator<'_> {
    /// Emits an access by way of a window; false when its form wants the soft TLB.
    pub(super) fn emit_window_access(&mut self, acc: &Access, pre: Pending, op: &MemOp, site: u32) -> bool {
        let ea = &acc.ea;
        if ea.bits != 64 {
            return false;
        }
        let constant = ea.base.is_none() && ea.index.is_none() && ea.seg < 4 && matches!(pre, Pending::None);
        let (slow, done) = (self.asm.label(), self.asm.label());
        let mut other = None;
        let operand = if constant {
            match self.constant_operand(ea.disp as u64) {
                Some(m) => m,
                None => return false,
            }
        } else {
            let (subject, m) = self.subject(acc, pre);
            let base_only = matches!((subject, ea.base), (Subject::Register(h), Some(b)) if home(b) == Home::Host(h));
            let region = self.likely(ea);
            let known = base_only && ea.base.is_some_and(|b| self.known.high >> b & 1 != 0);
            if known {
                Region::High.operand(m)
            } else {
                let label = self.asm.label();
                self.emit_check(region, subject, acc.flags_live, label);
                other = Some(Other { label, region: region.other(), subject, operand: m, flags_live: acc.flags_live });
                // Behind an access that may touch nothing, nothing is known about its address.
                let s = &self.tables.sites[site as usize];
                let certain = base_only && !s.masked && !s.late_fault && region == Region::High;
                if let Some(b) = ea.base
                    && certain
                    && (b == 4 || self.high_code())
                {
                    self.known.high |= 1 << b;
                }
                region.operand(m)
            }
        };
        self.tables.sites[site as usize].window = true;
        self.window_site = Some(site);
        self.emit_op(op, Loc::At(operand));
        self.window_site = None;
        self.asm.bind(done);
        self.slow.push(Slow { slow, done, ea: acc.ea, pre, site, op: *op, write: acc.write, other });
        true
    }

    /// Whether this code itself is in the high window.
    fn high_code(&self) -> bool {
        self.start_rip >> HIGH_SHIFT == 1
    }

    /// An operand whose address is known now.
    fn constant_operand(&mut self, la: u64) -> Option<M> {
        if la >> LOW_SHIFT == 0 {
            if let Ok(disp) = i32::try_from(la as i64 + i64::from(LOW_DISTANCE)) {
                return Some(M::gs(disp));
            }
            self.asm.mov_imm(H::RCX, la);
            return Some(Region::Low.operand(M::base(H::RCX, 0)));
        }
        if la >> HIGH_SHIFT != 1 {
            return None;
        }
        self.asm.mov_imm(H::RCX, la);
        Some(Region::High.operand(M::base(H::RCX, 0)))
    }

    /// What to check, and the operand in guest terms; both survive a check. Leaves flags alone.
    fn subject(&mut self, acc: &Access, pre: Pending) -> (Subject, M) {
        let ea = &acc.ea;
        let disp = i32::try_from(ea.disp).ok();
        let host = |g: usize| match home(g) {
            Home::Host(h) => Some(h),
            Home::Spilled(_) => None,
        };
        if ea.seg < 4
            && matches!(pre, Pending::None)
            && let Some(disp) = disp
        {
            match (ea.base, ea.index) {
                (Some(b), None) if LOW_DISPLACEMENTS.contains(&disp) => {
                    let h = host(b).unwrap_or_else(|| {
                        self.asm.load(H::R15, M::gs(off::gpr(b)));
                        H::R15
                    });
                    return (Subject::Register(h), M::base(h, disp));
                }
                (base, Some((x, s)))
                    if host(x).is_some()
                        && base.is_none_or(|b| host(b).is_some())
                        && LOW_DISPLACEMENTS.contains(&disp)
                        && !acc.flags_live =>
                {
                    let m = M { base: base.and_then(host), index: host(x).map(|h| (h, s)), disp, seg: Base::Host };
                    return (Subject::Address(m), m);
                }
                _ => {}
            }
        }
        self.emit_ea(ea, true);
        self.emit_pending(pre, ea.bits);
        self.asm.mov(H::R15, H::RCX);
        (Subject::Register(H::R15), M::base(H::R15, 0))
    }

    /// Jumps to `fail` unless the subject lies in the window. Clobbers RCX.
    fn emit_check(&mut self, region: Region, subject: Subject, flags_live: bool, fail: Label) {
        let a = &mut self.asm;
        let shift = match region {
            Region::High => HIGH_SHIFT,
            Region::Low => LOW_SHIFT,
        };
        match subject {
            Subject::Register(h) if flags_live => {
                let ok = a.label();
                match region {
                    Region::High => {
                        a.pext(H::RCX, h, M::gs(off::HIGH_MASK));
                        a.lea32(H::RCX, M::base(H::RCX, -1));
                    }
                    Region::Low => a.pext(H::RCX, h, M::gs(off::LOW_MASK)),
                }
                a.jrcxz(ok);
                a.jmp(fail);
                a.bind(ok);
                return;
            }
            Subject::Register(h) => a.mov(H::RCX, h),
            Subject::Address(m) => a.lea(H::RCX, m),
        }
        a.shr_flags(H::RCX, shift);
        if region == Region::High {
            a.cmp32_imm_flags(H::RCX, 1);
        }
        a.jcc(cc::NE, fail);
    }

    /// Behind the block: the same access through the other window, or on to the slow path.
    pub(super) fn emit_other_window(&mut self, s: &Slow, o: &Other) {
        self.asm.bind(o.label);
        self.emit_check(o.region, o.subject, o.flags_live, s.slow);
        self.window_site = Some(s.site);
        self.emit_op(&s.op, Loc::At(o.region.operand(o.operand)));
        self.window_site = None;
        self.asm.jmp(s.done);
    }

    /// The instruction emitted next may fault at a window.
    pub(super) fn note_window_fault(&mut self, loc: Loc) {
        if let (Some(site), Loc::At(_)) = (self.window_site, loc) {
            let at = self.asm.pos();
            self.fault_site(at, FaultKind::Window { site, borrowed: None });
        }
    }

    /// The window that an operand is likely in.
    fn likely(&self, ea: &Ea) -> Region {
        let fresh = |g: Option<usize>| g.is_none_or(|g| self.known.unchanged >> g & 1 != 0);
        if fresh(ea.base) && fresh(ea.index.map(|x| x.0)) && ea.seg < 4 {
            let of = |g: usize| self.known.hint[g];
            let index = ea.index.map_or(0, |(x, s)| of(x) << s);
            let la = ea.base.map_or(0, of).wrapping_add(index).wrapping_add(ea.disp as u64);
            return if la >> LOW_SHIFT == 0 { Region::Low } else { Region::High };
        }
        if ea.base == Some(4) || ea.seg >= 4 || self.high_code() { Region::High } else { Region::Low }
    }

    /// Brings [`Known`] up to date with an instruction that was just emitted.
    pub(super) fn track(&mut self, i: &Instruction) {
        match classify(i.code()) {
            Class::Copy(_)
            | Class::Nop
            | Class::Lea
            | Class::BitTest
            | Class::Push
            | Class::Pop
            | Class::String
            | Class::Leave => {}
            // Rust code may change anything.
            _ => {
                self.known.unchanged = 0;
                self.known.high = 0;
                return;
            }
        }
        let high = self.high_after(i);
        let info = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        for r in info.used_registers() {
            let writes =
                !matches!(r.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
            if let Some((g, _)) = gpr_of(r.register())
                && writes
            {
                self.known.unchanged &= !(1 << g);
                self.known.high &= !(1 << g);
            }
        }
        self.known.high |= high;
    }

    /// Registers that an instruction writes and that are checked nevertheless: those that move by a constant, and copies.
    fn high_after(&self, i: &Instruction) -> u16 {
        let high = self.known.high;
        let has = |g: usize| high >> g & 1 != 0;
        let named =
            |n: u32| (i.op_kind(n) == OpKind::Register).then(|| gpr_of(i.op_register(n))).flatten().map(|r| r.0);
        let immediate = |n: u32| {
            matches!(i.op_kind(n), OpKind::Immediate8to64 | OpKind::Immediate32to64).then(|| i.immediate(n) as i64)
        };
        let bit = |g: usize| 1u16 << g;
        match i.code() {
            Code::Add_rm64_imm8
            | Code::Add_rm64_imm32
            | Code::Sub_rm64_imm8
            | Code::Sub_rm64_imm32
            | Code::Add_RAX_imm32
            | Code::Sub_RAX_imm32
            | Code::Inc_rm64
            | Code::Dec_rm64 => named(0).filter(|&g| has(g)).map_or(0, bit),
            // Rounds down, by less than a block's constants may move it.
            Code::And_rm64_imm8 => named(0).filter(|&g| has(g) && immediate(1).is_some_and(|v| v < 0)).map_or(0, bit),
            Code::Lea_r64_m => {
                let plain = i.memory_index() == iced_x86::Register::None && !i.is_ip_rel_memory_operand();
                let base = gpr_of(i.memory_base()).filter(|_| plain && i.memory_base().is_gpr64());
                match (named(0), base) {
                    (Some(d), Some((b, _))) if has(b) => bit(d),
                    _ => 0,
                }
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => match (named(0), named(1)) {
                (Some(d), Some(s)) if has(s) => bit(d),
                _ => 0,
            },
            _ => match i.mnemonic() {
                Mnemonic::Push if has(4) => bit(4),
                Mnemonic::Pop if has(4) && named(0) != Some(4) => bit(4),
                Mnemonic::Leave if has(5) => bit(4),
                _ => 0,
            },
        }
    }
}
