//! The second memory policy: operands reached through a window (see [`crate::window`]).
//!
//! In line stands a check for the window that the operand is likely in, then the guest's instruction with that window's
//! segment prefix. An access that faults goes to the slow path, which is the soft TLB's, by way of the signal handler.
//!
//! What was checked need not be checked again in the block ([`super::known`]). If a check that later ones rely on
//! fails, the rest of the block is left for a version of itself that concludes nothing from its first instruction ([`Mode::MIXED`]). If another
//! check fails, code behind the block tries the other window, and then the slow path.

use super::known::Sum;
use super::memory::{Access, Ea, Loc, MemOp, Slow};
use super::{Pending, Translator};
use crate::asm::{Asm, Base, H, Label, M, cc};
use crate::block::{FaultKind, Mode};
use crate::engine::WordMap;
use crate::regs::{Home, home};
use crate::state::off;
use crate::window::{High, LOW_DISPLACEMENTS, LOW_DISTANCE, LOW_SHIFT};

/// One of the two windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Region {
    High,
    Low,
}

impl Region {
    pub(super) fn other(self) -> Self {
        match self {
            Self::High => Self::Low,
            Self::Low => Self::High,
        }
    }

    /// Where the state holds what to add to a guest address in the window to have the host's.
    pub(super) fn distance(self) -> i32 {
        match self {
            Self::High => off::HIGH_OFFSET,
            Self::Low => off::LOW_OFFSET,
        }
    }

    /// An operand in the window, given its address in guest terms.
    pub(super) fn operand(self, m: M) -> M {
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

/// What a check that succeeds says beyond its own access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Learnt {
    /// This register is in the window.
    Base(usize),
    /// This sum is.
    Sum(Sum),
    Nothing,
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
    /// Kernel instructions that are to use the soft TLB.
    pub(crate) kept: &'a WordMap<u64, ()>,
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
            match self.known_operand(acc, pre) {
                Some((region, m)) => {
                    if ea.base == Some(4) && ea.index.is_none() && !acc.masked {
                        self.stack.note_access(m);
                    }
                    region.operand(m)
                }
                None => {
                    let region = self.likely(ea);
                    // Behind an access that may touch nothing, nothing is known about its address.
                    let s = &self.tables.sites[site as usize];
                    // A mixed block must not lead to itself.
                    let first = self.mixed && self.cur_rip == self.start_rip;
                    let may_rely = !s.masked && !s.late_fault && !first && !self.accessed;
                    let (subject, m, learnt) = self.subject(acc, pre, region, may_rely);
                    let label = self.asm.label();
                    let patch = self.emit_check(region, subject, acc.flags_live, label);
                    match learnt {
                        Learnt::Base(b) => self.known.note(b, region),
                        Learnt::Sum(sum) => self.known.note_sum(sum, region),
                        Learnt::Nothing => {}
                    }
                    if learnt == Learnt::Nothing {
                        let flags_live = acc.flags_live;
                        other = Some(Other { label, region: region.other(), subject, operand: m, flags_live });
                    } else {
                        self.add_exit(self.cur_rip, Mode(self.mode.0 | Mode::MIXED), patch, label);
                    }
                    region.operand(m)
                }
            }
        };
        self.tables.sites[site as usize].window = true;
        self.window_site = Some(site);
        self.emit_op(op, Loc::At(operand));
        self.window_site = None;
        self.accessed = true;
        self.asm.bind_with_shadow(done);
        let shadow = self.asm.shadow();
        self.slow.push(Slow { slow, done, ea: acc.ea, pre, site, op: *op, write: acc.write, other, shadow });
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
        self.asm.mov_rip(H::RCX, la);
        Some(Region::High.operand(M::base(H::RCX, 0)))
    }

    /// Jumps to `fail` unless both a register and the address that an operand computes lie in the window. Clobbers RCX and flags.
    pub(super) fn check_both_ends(&mut self, region: Region, r: H, end: M, fail: Label) {
        self.emit_check(region, Subject::Register(r), false, fail);
        self.emit_check(region, Subject::Address(end), false, fail);
    }

    /// The displacement of a plain operand, one that is made of registers and a constant that windows leave room for.
    pub(super) fn plain_displacement(ea: &Ea, pre: Pending) -> Option<i32> {
        let disp = i32::try_from(ea.disp).ok().filter(|d| LOW_DISPLACEMENTS.contains(d));
        disp.filter(|_| ea.seg < 4 && matches!(pre, Pending::None))
    }

    /// A guest register's value in its home, or in `scratch`.
    pub(super) fn in_host(&mut self, g: usize, scratch: H) -> H {
        match home(g) {
            Home::Host(h) => h,
            Home::Spilled(g) => {
                self.asm.load(scratch, M::gs(off::gpr(g)));
                scratch
            }
        }
    }

    /// An operand of which it is known which window it is in. Clobbers R11 and RCX, as all of these.
    fn known_operand(&mut self, acc: &Access, pre: Pending) -> Option<(Region, M)> {
        let ea = &acc.ea;
        let disp = Self::plain_displacement(ea, pre)?;
        let region = self.known.region_of(ea)?;
        let base = ea.base.map(|b| self.in_host(b, H::R11));
        let scratch = if base == Some(H::R11) { H::RCX } else { H::R11 };
        let index = ea.index.map(|(x, s)| (self.in_host(x, scratch), s));
        let m = M { base, index, disp, seg: Base::Host };
        if m.names(H::R11) && m.names(H::RCX) {
            // The instruction itself may need one of them.
            self.asm.lea(H::R11, M { disp: 0, ..m });
            return Some((region, M::base(H::R11, disp)));
        }
        Some((region, m))
    }

    /// What to check, the operand in guest terms, and what is known when the check succeeds, if that may be relied on. All survive
    /// the check. Leaves flags alone.
    fn subject(&mut self, acc: &Access, pre: Pending, region: Region, may_rely: bool) -> (Subject, M, Learnt) {
        let ea = &acc.ea;
        let in_place = |g: usize| matches!(home(g), Home::Host(_));
        if let Some(disp) = Self::plain_displacement(ea, pre) {
            match (ea.base, ea.index) {
                (Some(b), None) => {
                    let h = self.in_host(b, H::R11);
                    let learnt = if may_rely { Learnt::Base(b) } else { Learnt::Nothing };
                    return (Subject::Register(h), M::base(h, disp), learnt);
                }
                // If the base is in the window, so is this, or next to it.
                (Some(b), Some((x, s))) if may_rely && in_place(x) && self.known.small_index(x, region) => {
                    let h = self.in_host(b, H::R11);
                    let index = Some((self.in_host(x, H::RCX), s));
                    return (Subject::Register(h), M { base: Some(h), index, disp, seg: Base::Host }, Learnt::Base(b));
                }
                (base, Some((x, s))) if in_place(x) && !acc.flags_live => {
                    let sum = Sum::of(ea).filter(|s| may_rely && self.known.is_frequent(*s));
                    let base = base.map(|b| self.in_host(b, H::R11));
                    let index = Some((self.in_host(x, H::RCX), s));
                    let m = M { base, index, disp, seg: Base::Host };
                    // What holds for all displacements is checked without one.
                    return match sum {
                        Some(sum) => (Subject::Address(M { disp: 0, ..m }), m, Learnt::Sum(sum)),
                        None => (Subject::Address(m), m, Learnt::Nothing),
                    };
                }
                (Some(_), Some(_)) => {
                    if let Some(sum) = Sum::of(ea).filter(|s| may_rely && self.known.is_frequent(*s)) {
                        self.emit_ea(&Ea { disp: 0, ..*ea }, true);
                        self.asm.mov(H::R11, H::RCX);
                        return (Subject::Register(H::R11), M::base(H::R11, disp), Learnt::Sum(sum));
                    }
                }
                _ => {}
            }
        }
        let disp = i32::try_from(ea.disp).ok().filter(|d| LOW_DISPLACEMENTS.contains(d));
        if ea.seg >= 4
            && ea.index.is_none()
            && matches!(pre, Pending::None)
            && let Some(disp) = disp
        {
            // Thread-local data.
            self.asm.load(H::R11, M::gs(off::seg_base(usize::from(ea.seg))));
            if let Some(b) = ea.base {
                let b = self.in_host(b, H::RCX);
                self.asm.lea(H::R11, M::base_index(H::R11, b));
            }
            return (Subject::Register(H::R11), M::base(H::R11, disp), Learnt::Nothing);
        }
        self.emit_ea(ea, true);
        self.emit_pending(pre, ea.bits);
        self.asm.mov(H::R11, H::RCX);
        (Subject::Register(H::R11), M::base(H::R11, 0), Learnt::Nothing)
    }

    /// Jumps to `fail` unless the subject lies in the window; gives the place of the jump's displacement. Clobbers RCX.
    pub(super) fn emit_check(&mut self, region: Region, subject: Subject, flags_live: bool, fail: Label) -> u32 {
        let window = self.known.window;
        let a = &mut self.asm;
        match subject {
            Subject::Register(h) if flags_live => {
                let ok = a.label();
                match region {
                    Region::High => {
                        a.pext(H::RCX, h, M::gs(off::HIGH_MASK));
                        a.lea32(H::RCX, M::base(H::RCX, 1 - (1 << window.mask.count_ones())));
                    }
                    Region::Low => a.pext(H::RCX, h, M::gs(off::LOW_MASK)),
                }
                a.jrcxz(ok);
                let patch = a.jump_patchable(None, fail);
                a.bind_with_shadow(ok);
                return patch;
            }
            Subject::Register(h) if region == Region::High => return Self::emit_high_check(a, window, h, fail),
            Subject::Register(H::RCX) => {}
            Subject::Register(h) => {
                // The test and the jump are one operation.
                a.test_upper_flags(h);
                return a.jump_patchable(Some(cc::NE), fail);
            }
            Subject::Address(m) => a.lea(H::RCX, m),
        }
        match region {
            Region::High => Self::emit_high_check(a, window, H::RCX, fail),
            Region::Low => {
                a.test_upper_flags(H::RCX);
                a.jump_patchable(Some(cc::NE), fail)
            }
        }
    }

    /// The check for the high window. Clobbers RCX and flags.
    fn emit_high_check(a: &mut Asm, window: High, h: H, fail: Label) -> u32 {
        if let Some(bit) = window.bit() {
            a.bt_flags(h, bit);
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
        self.back_in_line(s);
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
}
