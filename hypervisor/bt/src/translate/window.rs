//! The second memory policy: operands reached through a window (see [`crate::window`]).
//!
//! In line stands a check for the window that the operand is likely in, then the guest's instruction with that window's
//! segment prefix. An access that faults goes to the slow path, which is the soft TLB's, by way of the signal handler.
//!
//! A base register that was checked need not be checked again in the block while it moves by constants only. If such a check
//! fails, the rest of the block is left for a version of itself that concludes nothing ([`Mode::MIXED`]). If another
//! check fails, code behind the block tries the other window, and then the slow path.

use super::classify::{Class, classify};
use super::memory::{Access, Ea, Loc, MemOp, Slow};
use super::{Pending, Translator};
use crate::asm::{Asm, Base, H, Label, M, cc};
use crate::block::{FaultKind, Mode};
use crate::regs::{Home, gpr_of, home};
use crate::state::off;
use crate::window::{HIGH_SHIFT, High, LOW_DISPLACEMENTS, LOW_DISTANCE, LOW_SHIFT};
use iced_x86::{Code, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};

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

    /// Where the state holds what to add to a guest address in the window to have the host's, and the other way round.
    pub(super) fn distances(self) -> (i32, i32) {
        match self {
            Self::High => (off::HIGH_OFFSET, off::HIGH_BACK),
            Self::Low => (off::LOW_OFFSET, off::LOW_BACK),
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
pub(super) enum Subject {
    /// A register, which stays as it is: the base, or R11 with the whole address.
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

/// What helps to guess the window of an operand.
#[derive(Clone, Copy)]
pub(crate) struct Hint<'a> {
    /// The registers' values when the block is translated, on its way to be run.
    pub(crate) gpr: &'a [u64; 16],
    /// Operands of this process are more often in the low window.
    pub(crate) low: bool,
    /// The vCPU's high window.
    pub(crate) high: High,
}

/// What is known about guest registers at this place of a window block.
pub(crate) struct Known {
    gpr: [u64; 16],
    low_more_often: bool,
    /// The vCPU's high window.
    window: High,
    votes: i32,
    /// Registers that are as they were at the block's entry, as a bit set.
    unchanged: u16,
    /// Registers that were checked for the high window, and for the low one.
    high: u16,
    low: u16,
}

/// The stack pointer in such a set.
const RSP: u16 = 1 << 4;

impl Known {
    pub(crate) fn at_entry(hint: Hint<'_>, stacked: bool) -> Self {
        let high = if stacked { RSP } else { 0 };
        let (low_more_often, window) = (hint.low, hint.high);
        Self { gpr: *hint.gpr, low_more_often, window, votes: 0, unchanged: u16::MAX, high, low: 0 }
    }

    /// Whether a register was checked for the high window.
    pub(super) fn is_high(&self, g: usize) -> bool {
        self.high >> g & 1 != 0
    }

    /// Whether the high window is one of several, told by more than one bit.
    pub(super) fn several_windows(&self) -> bool {
        self.window.mask.count_ones() > 1
    }

    pub(crate) fn votes(&self) -> i32 {
        self.votes
    }

    fn region(&self, g: usize) -> Option<Region> {
        if self.high >> g & 1 != 0 {
            Some(Region::High)
        } else if self.low >> g & 1 != 0 {
            Some(Region::Low)
        } else {
            None
        }
    }

    fn note(&mut self, g: usize, region: Region) {
        match region {
            Region::High => self.high |= 1 << g,
            Region::Low => self.low |= 1 << g,
        }
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
            let base = ea.base.filter(|_| base_only);
            if let Some(region) = base.and_then(|b| self.known.region(b)) {
                if base == Some(4) && !acc.masked {
                    self.stack.note_access(m);
                }
                region.operand(m)
            } else {
                let region = self.likely(ea);
                // Behind an access that may touch nothing, nothing is known about its address.
                let s = &self.tables.sites[site as usize];
                let concluding = base.filter(|_| !s.masked && !s.late_fault && !self.mixed && !self.accessed);
                let label = self.asm.label();
                let patch = self.emit_check(region, subject, acc.flags_live, label);
                if let Some(b) = concluding {
                    self.known.note(b, region);
                    self.add_exit(self.cur_rip, Mode(self.mode.0 | Mode::MIXED), patch, label);
                } else {
                    let flags_live = acc.flags_live;
                    other = Some(Other { label, region: region.other(), subject, operand: m, flags_live });
                }
                region.operand(m)
            }
        };
        self.tables.sites[site as usize].window = true;
        self.window_site = Some(site);
        self.emit_op(op, Loc::At(operand));
        self.window_site = None;
        self.accessed = true;
        self.asm.bind(done);
        self.slow.push(Slow { slow, done, ea: acc.ea, pre, site, op: *op, write: acc.write, other });
        true
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
        if !self.known.window.contains(la) {
            return None;
        }
        self.asm.mov_imm(H::RCX, la);
        Some(Region::High.operand(M::base(H::RCX, 0)))
    }

    /// Jumps to `fail` unless both a register and the address that an operand computes lie in the window. Clobbers RCX and flags.
    pub(super) fn check_both_ends(&mut self, region: Region, r: H, end: M, fail: Label) {
        self.emit_check(region, Subject::Register(r), false, fail);
        self.emit_check(region, Subject::Address(end), false, fail);
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
                        self.asm.load(H::R11, M::gs(off::gpr(b)));
                        H::R11
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
        if ea.seg >= 4
            && ea.base.is_none()
            && ea.index.is_none()
            && matches!(pre, Pending::None)
            && let Some(disp) = disp
            && LOW_DISPLACEMENTS.contains(&disp)
        {
            // Thread-local data at a fixed place.
            self.asm.load(H::R11, M::gs(off::seg_base(usize::from(ea.seg))));
            return (Subject::Register(H::R11), M::base(H::R11, disp));
        }
        self.emit_ea(ea, true);
        self.emit_pending(pre, ea.bits);
        self.asm.mov(H::R11, H::RCX);
        (Subject::Register(H::R11), M::base(H::R11, 0))
    }

    /// Jumps to `fail` unless the subject lies in the window; gives the place of the jump's displacement. Clobbers RCX.
    pub(super) fn emit_check(&mut self, region: Region, subject: Subject, flags_live: bool, fail: Label) -> u32 {
        let bits = self.known.window.mask.count_ones();
        let a = &mut self.asm;
        match subject {
            Subject::Register(h) if flags_live => {
                let ok = a.label();
                match region {
                    Region::High => {
                        a.pext(H::RCX, h, M::gs(off::HIGH_MASK));
                        a.lea32(H::RCX, M::base(H::RCX, 1 - (1 << bits)));
                    }
                    Region::Low => a.pext(H::RCX, h, M::gs(off::LOW_MASK)),
                }
                a.jrcxz(ok);
                let patch = a.jump_patchable(None, fail);
                a.bind(ok);
                return patch;
            }
            Subject::Register(h) if region == Region::High => return Self::emit_high_check(a, bits, h, fail),
            Subject::Register(h) => a.mov(H::RCX, h),
            Subject::Address(m) => a.lea(H::RCX, m),
        }
        match region {
            Region::High => Self::emit_high_check(a, bits, H::RCX, fail),
            Region::Low => {
                a.shr_flags(H::RCX, LOW_SHIFT);
                a.jump_patchable(Some(cc::NE), fail)
            }
        }
    }

    /// The check for the high window, which so many bits tell. Clobbers RCX and flags.
    fn emit_high_check(a: &mut Asm, bits: u32, h: H, fail: Label) -> u32 {
        if bits == 1 {
            a.bt_flags(h, HIGH_SHIFT);
            return a.jump_patchable(Some(cc::NC), fail);
        }
        a.andn_flags(H::RCX, h, M::gs(off::HIGH_MASK));
        a.jump_patchable(Some(cc::NE), fail)
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
    pub(super) fn likely(&mut self, ea: &Ea) -> Region {
        let k = &mut self.known;
        let fresh = |g: Option<usize>| g.is_none_or(|g| k.unchanged >> g & 1 != 0);
        if fresh(ea.base) && fresh(ea.index.map(|x| x.0)) && ea.seg < 4 {
            let index = ea.index.map_or(0, |(x, s)| k.gpr[x] << s);
            let la = ea.base.map_or(0, |b| k.gpr[b]).wrapping_add(index).wrapping_add(ea.disp as u64);
            let low = la >> LOW_SHIFT == 0;
            if ea.base != Some(4) {
                k.votes += if low { 1 } else { -1 };
            }
            return if low { Region::Low } else { Region::High };
        }
        if ea.base.is_none() && ea.seg < 4 {
            // A table at a fixed address.
            return Region::Low;
        }
        if ea.base == Some(4) || ea.seg >= 4 || !k.low_more_often { Region::High } else { Region::Low }
    }

    /// Brings [`Known`] up to date with an instruction that was just emitted. `rest` is the block's code behind it, and
    /// `flags_live` tells of the flags there.
    pub(super) fn track(&mut self, i: &Instruction, rest: &[Instruction], flags_live: bool) {
        let rsp = if self.mode.has(Mode::STACKED) { RSP } else { 0 };
        let written = self.written(i);
        let change = if rsp & written != 0 { self.stack_change(i) } else { None };
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
                (self.known.unchanged, self.known.high, self.known.low) = (0, rsp, 0);
                if let Some(change) = change {
                    self.check_stack(change, rest, flags_live);
                }
                return;
            }
        }
        let high = self.kept(i, self.known.high, false);
        let low = self.kept(i, self.known.low, true);
        self.known.unchanged &= !written;
        self.known.high &= !written;
        self.known.low &= !written;
        self.known.high |= high | rsp;
        self.known.low |= low & !rsp;
        if let Some(change) = change {
            self.check_stack(change, rest, flags_live);
        }
    }

    /// The general registers that an instruction writes, or may write, in whole or in part.
    fn written(&mut self, i: &Instruction) -> u16 {
        let info = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        let reads = [OpAccess::Read, OpAccess::CondRead, OpAccess::None, OpAccess::NoMemAccess];
        let written = info.used_registers().iter().filter(|r| !reads.contains(&r.access()));
        written.filter_map(|r| gpr_of(r.register())).fold(0, |set, (g, _)| set | 1 << g)
    }

    /// Registers that an instruction writes and that are checked nevertheless, of a set: those that move by a constant, which
    /// must be `small` in the low window, and copies.
    fn kept(&self, i: &Instruction, set: u16, small: bool) -> u16 {
        let has = |g: usize| set >> g & 1 != 0;
        let named =
            |n: u32| (i.op_kind(n) == OpKind::Register).then(|| gpr_of(i.op_register(n))).flatten().map(|r| r.0);
        let if_kept = |g: Option<usize>| g.filter(|&g| has(g)).map_or(0, |g| 1u16 << g);
        match i.code() {
            Code::Add_rm64_imm8 | Code::Sub_rm64_imm8 | Code::Inc_rm64 | Code::Dec_rm64 => if_kept(named(0)),
            Code::Add_rm64_imm32 | Code::Sub_rm64_imm32 | Code::Add_RAX_imm32 | Code::Sub_RAX_imm32 if !small => {
                if_kept(named(0))
            }
            // Rounds down, by less than that.
            Code::And_rm64_imm8 if (i.immediate(1) as i64) < 0 => if_kept(named(0)),
            Code::Lea_r64_m => {
                let plain = i.memory_index() == Register::None
                    && i.memory_base().is_gpr64()
                    && (!small || i8::try_from(i.memory_displacement64() as i64).is_ok());
                match (named(0), gpr_of(i.memory_base())) {
                    (Some(d), Some((b, _))) if plain && has(b) => 1 << d,
                    _ => 0,
                }
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => match (named(0), named(1)) {
                (Some(d), Some(s)) if has(s) => 1 << d,
                _ => 0,
            },
            _ => match i.mnemonic() {
                Mnemonic::Push => if_kept(Some(4)),
                Mnemonic::Pop if named(0) != Some(4) => if_kept(Some(4)),
                Mnemonic::Leave if has(5) => 1 << 4,
                _ => 0,
            },
        }
    }
}
