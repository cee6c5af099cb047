//! The memory policy: how a guest operand reaches host memory.
//!
//! This is the soft-TLB policy. An access computes the guest's effective address in RCX, looks the page up inline, and
//! leaves the operand at `[r11 + rcx]`. A miss goes to a stub behind the block, which calls Rust: that either fills the TLB
//! (and the access starts over) or hands out the bounce buffer, on which a second copy of the instruction runs.
//!
//! The lookup comes in two forms: one that clobbers the flags, for places where they are dead, and one that uses PEXT,
//! LEA and JRCXZ only.

use super::classify::{Unit, unit_of};
use super::{Pending, Translator};
use crate::asm::{Base, H, Label, M, cc};
use crate::block::{Mode, Site};
use crate::regs::{Home, gpr_of, home};
use crate::state::{Thunk, TlbEntry, off};
use iced_x86::{Instruction, Register};
use std::mem::offset_of;

/// An effective address in guest terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ea {
    pub(crate) base: Option<usize>,
    /// Register and scale as a shift count.
    pub(crate) index: Option<(usize, u8)>,
    /// Displacement, or the whole address when there is no register.
    pub(crate) disp: i64,
    /// Address size in bits.
    pub(crate) bits: u32,
    /// Segment number (encoding order), for its base or for the segmented path.
    pub(crate) seg: u8,
}

impl Ea {
    /// `[rsp + disp]` with the stack's address size.
    pub(crate) fn stack(disp: i64, mode: Mode) -> Self {
        Self { base: Some(4), index: None, disp, bits: mode.bits().max(32), seg: 2 }
    }

    /// The memory operand of an instruction.
    pub(crate) fn of(i: &Instruction, mode: Mode) -> Self {
        let seg = match i.memory_segment() {
            // In 64-bit mode the other overrides are ignored, and the base decides.
            s if mode.is64() && !matches!(s, Register::FS | Register::GS) => {
                let stack = matches!(i.memory_base().full_register(), Register::RSP | Register::RBP);
                if stack { 2 } else { 3 }
            }
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::FS => 4,
            Register::GS => 5,
            _ => 3,
        };
        let base = i.memory_base();
        if i.is_ip_rel_memory_operand() {
            let bits = if base == Register::EIP { 32 } else { 64 };
            return Self { base: None, index: None, disp: i.ip_rel_memory_address() as i64, bits, seg };
        }
        let index = i.memory_index();
        let width = |r: Register| {
            if r.is_gpr16() {
                16
            } else if r.is_gpr32() {
                32
            } else {
                64
            }
        };
        let bits = if base != Register::None {
            width(base)
        } else if index != Register::None {
            width(index)
        } else {
            match i.memory_displ_size() {
                2 => 16,
                8 => 64,
                _ if mode.is64() => 64,
                _ => 32,
            }
        };
        let disp = i.memory_displacement64() as i64;
        Self {
            base: gpr_of(base).map(|(n, _)| n),
            index: gpr_of(index).map(|(n, _)| (n, i.memory_index_scale().trailing_zeros() as u8)),
            // 32- and 16-bit displacements come zero-extended; as i32 they wrap the same way.
            disp: if bits == 64 { disp } else { i64::from(disp as i32) },
            bits,
            seg,
        }
    }
}

/// Where an operand can be reached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Loc {
    /// `[r11 + rcx]`, both scratch registers taken.
    Indexed,
    /// `[rcx]`, R11 free.
    Rcx,
    /// At an operand in a window: scratch registers are free that it does not name.
    At(M),
}

impl Loc {
    /// The operand.
    pub(crate) fn operand(self) -> M {
        match self {
            Self::Indexed => M::base_index(H::R11, H::RCX),
            Self::Rcx => M::base(H::RCX, 0),
            Self::At(m) => m,
        }
    }
}

/// What to do at an operand once it is reachable. Emitted twice: in line and, for the bounce buffer, in the stub.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MemOp {
    /// The guest instruction itself.
    Guest(Instruction),
    /// Store a value.
    Store(Value, u8),
    /// Load into a destination, zero-extended.
    Load(Dest, u8),
    /// BTS and kin with a register bit offset, whose low bits are what is left once the address is known.
    Bit(Instruction),
}

/// A value to store.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value {
    Reg(H),
    /// `gs:[offset]`.
    Gs(i32),
    Imm(u64),
}

/// Where to load to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dest {
    Reg(H),
    /// `gs:[offset]`, as 64 bits.
    Gs(i32),
}

/// One access to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) ea: Ea,
    pub(crate) size: u16,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) masked: bool,
    /// See [`Site::align`].
    pub(crate) align: u16,
    /// Flags must survive the lookup.
    pub(crate) flags_live: bool,
}

/// A slow path to be emitted behind the block.
pub(crate) struct Slow {
    pub(super) slow: Label,
    pub(super) done: Label,
    pub(super) ea: Ea,
    /// Extra code between the address and the access, see [`Pending`].
    pub(super) pre: Pending,
    pub(super) site: u32,
    pub(super) op: MemOp,
    pub(super) write: bool,
    /// An access through a window: the other window is tried first.
    pub(super) other: Option<super::window::Other>,
    /// The guest register that R11 has to hold behind the access.
    pub(super) shadow: Option<u8>,
}

impl Translator<'_> {
    /// Computes the effective address (plus the segment base) in RCX. May use R11. Leaves flags alone.
    pub(crate) fn emit_ea(&mut self, ea: &Ea, with_base: bool) {
        let disp = ea.disp as i32;
        let a = &mut self.asm;
        match (ea.base.map(home), ea.index.map(|(n, s)| (home(n), s))) {
            (None, None) => {
                let v = if ea.bits == 64 { ea.disp as u64 } else { u64::from(ea.disp as u32) };
                // Other addresses of 64 bits are pinned.
                a.mov_rip_or_short(H::RCX, v);
            }
            (Some(Home::Host(b)), None) => {
                if disp == 0 {
                    a.mov(H::RCX, b);
                } else {
                    a.lea(H::RCX, M::base(b, disp));
                }
            }
            (Some(Home::Host(b)), Some((Home::Host(x), s))) => {
                a.lea(H::RCX, M { base: Some(b), index: Some((x, s)), disp, seg: Base::Host });
            }
            (Some(Home::Host(b)), Some((Home::Spilled(x), s))) => {
                a.load(H::RCX, M::gs(off::gpr(x)));
                a.lea(H::RCX, M { base: Some(b), index: Some((H::RCX, s)), disp, seg: Base::Host });
            }
            (Some(Home::Spilled(b)), None) => {
                a.load(H::RCX, M::gs(off::gpr(b)));
                if disp != 0 {
                    a.lea(H::RCX, M::base(H::RCX, disp));
                }
            }
            (Some(Home::Spilled(b)), Some((Home::Host(x), s))) => {
                a.load(H::RCX, M::gs(off::gpr(b)));
                a.lea(H::RCX, M { base: Some(H::RCX), index: Some((x, s)), disp, seg: Base::Host });
            }
            (Some(Home::Spilled(b)), Some((Home::Spilled(x), s))) => {
                a.load(H::RCX, M::gs(off::gpr(x)));
                a.load(H::R11, M::gs(off::gpr(b)));
                a.lea(H::RCX, M { base: Some(H::R11), index: Some((H::RCX, s)), disp, seg: Base::Host });
            }
            (None, Some((Home::Host(x), s))) => {
                a.lea(H::RCX, M { base: None, index: Some((x, s)), disp, seg: Base::Host });
            }
            (None, Some((Home::Spilled(x), s))) => {
                a.load(H::RCX, M::gs(off::gpr(x)));
                a.lea(H::RCX, M { base: None, index: Some((H::RCX, s)), disp, seg: Base::Host });
            }
        }
        match ea.bits {
            32 if ea.base.is_some() || ea.index.is_some() => a.mov32(H::RCX, H::RCX),
            16 => a.movzx16(H::RCX, H::RCX),
            _ => {}
        }
        if with_base && ea.seg >= 4 {
            a.load(H::R11, M::gs(off::seg_base(usize::from(ea.seg))));
            a.lea(H::RCX, M::base_index(H::R11, H::RCX));
            if !self.mode.is64() {
                self.asm.mov32(H::RCX, H::RCX);
            }
        }
    }

    /// Whether an access with this segment must take the segmented path.
    fn segmented(&self, seg: u8) -> bool {
        let flat = match seg {
            4 => Mode::FLAT | Mode::FLAT_FS,
            5 => Mode::FLAT | Mode::FLAT_GS,
            _ => Mode::FLAT,
        };
        !self.mode.is64() && self.mode.0 & flat != flat
    }

    /// Emits one access: address, lookup, operation, and (behind the block) the slow path.
    pub(crate) fn emit_access(&mut self, acc: Access, op: MemOp) {
        self.emit_access_with(acc, Pending::None, op);
    }

    /// As [`Self::emit_access`], with an adjustment of the address between its computation and the lookup.
    pub(crate) fn emit_access_with(&mut self, acc: Access, pre: Pending, op: MemOp) {
        let site = self.note_site(&acc, &op);
        if self.segmented(acc.ea.seg) {
            self.emit_ea(&acc.ea, false);
            self.emit_pending(pre, acc.ea.bits);
            self.asm.mov_site(site);
            self.asm.call_gs(Thunk::SegMem.offset());
            self.emit_op(&op, Loc::Rcx);
            if acc.write {
                self.asm.mov_site(site);
                self.asm.call_gs(Thunk::Commit.offset());
            }
            return;
        }
        if self.mode.has(Mode::WINDOW) && self.emit_window_access(&acc, pre, &op, site) {
            return;
        }
        if self.maps_kernel(self.cur_rip) && self.emit_kernel_access(&acc, pre, &op, site) {
            return;
        }
        let (slow, done) = (self.asm.label(), self.asm.label());
        self.emit_ea(&acc.ea, true);
        self.emit_pending(pre, acc.ea.bits);
        self.emit_lookup(acc.size, acc.write, acc.flags_live, slow);
        self.emit_op(&op, Loc::Indexed);
        self.asm.bind(done);
        self.slow.push(Slow { slow, done, ea: acc.ea, pre, site, op, write: acc.write, other: None, shadow: None });
    }

    /// Records an access that begins here; gives its number.
    pub(super) fn note_site(&mut self, acc: &Access, op: &MemOp) -> u32 {
        self.tables.sites.push(Site {
            size: acc.size,
            read: acc.read,
            write: acc.write,
            x87: matches!(op, MemOp::Guest(i) if waits_for_x87(i)),
            late_fault: acc.write && matches!(op, MemOp::Guest(i) if stores_after_exceptions(i)),
            masked: acc.masked,
            align: acc.align,
            seg: acc.ea.seg,
            ..self.plain_site()
        });
        self.tables.sites.len() as u32 - 1
    }

    /// A site at this place with nothing particular about it.
    fn plain_site(&self) -> Site {
        Site {
            delta: self.cur_delta(),
            retry: self.asm.pos(),
            shadow: self.asm.shadow(),
            simd: self.simd,
            ..Site::plain(self.block)
        }
    }

    /// Records a place with nothing particular about it; gives its number.
    pub(super) fn note_plain_site(&mut self) -> u32 {
        self.tables.sites.push(self.plain_site());
        self.tables.sites.len() as u32 - 1
    }

    /// Records a run of pushes or pops through kernel mappings; gives its number.
    pub(super) fn note_kernel_site(&mut self, read: bool) -> u32 {
        self.tables.sites.push(Site { kernel: true, read, ..self.plain_site() });
        self.tables.sites.len() as u32 - 1
    }

    /// Records a string instruction that runs on the host's addresses; gives its number.
    pub(super) fn note_string_site(&mut self, movs: bool) -> u32 {
        self.tables.sites.push(Site { read: movs, write: true, ..self.plain_site() });
        self.tables.sites.len() as u32 - 1
    }

    /// Records a run of pushes or pops that goes through a window; gives its number.
    pub(super) fn note_run_site(&mut self, push: bool) -> u32 {
        let site = Site { window: true, size: 8, read: !push, write: push, seg: 2, ..self.plain_site() };
        self.tables.sites.push(site);
        self.tables.sites.len() as u32 - 1
    }

    /// RCX = linear address in; operand at `[r11 + rcx]` out, or a jump to `slow`.
    pub(super) fn emit_lookup(&mut self, size: u16, write: bool, flags_live: bool, slow: Label) {
        let view = self.mode.view();
        let tag = if write { offset_of!(TlbEntry, ntag_w) } else { offset_of!(TlbEntry, ntag_r) };
        let (tag, hva) = (off::tlb(view, tag), off::tlb(view, offset_of!(TlbEntry, hva)));
        let a = &mut self.asm;
        if !flags_live {
            a.mov32(H::R11, H::RCX);
            a.shr32_flags(H::R11, 7);
            a.and32_flags(H::R11, 0x7fe0);
            a.add_flags(H::RCX, M::gs_base(H::R11, tag));
            a.cmp_imm_flags(H::RCX, 4096 - i32::from(size));
            a.jcc(cc::A, slow);
            a.load(H::R11, M::gs_base(H::R11, hva));
            return;
        }
        let hit = a.label();
        a.pext(H::R11, H::RCX, M::gs(off::TLB_MASK));
        a.store(M::gs(off::TMP), H::RDX);
        a.lea32(H::R11, M { base: None, index: Some((H::R11, 2)), disp: 0, seg: Base::Host });
        a.load(H::RDX, M::gs_index(H::R11, 3, tag));
        a.lea(H::RDX, M::base_index(H::RDX, H::RCX));
        a.lea(H::RCX, M::base(H::RDX, i32::from(size) - 1));
        a.pext(H::RCX, H::RCX, M::gs(off::PAGE_MASK));
        a.load(H::R11, M::gs_index(H::R11, 3, hva));
        a.jrcxz(hit);
        a.load(H::RDX, M::gs(off::TMP));
        a.jmp(slow);
        a.bind(hit);
        a.mov(H::RCX, H::RDX);
        a.load(H::RDX, M::gs(off::TMP));
    }

    /// Emits the slow paths collected so far.
    pub(crate) fn emit_slow_paths(&mut self) {
        for s in std::mem::take(&mut self.slow) {
            self.cur_rip = self.start_rip.wrapping_add(u64::from(self.tables.sites[s.site as usize].delta));
            if let Some(other) = &s.other {
                self.emit_other_window(&s, other);
            }
            self.asm.bind(s.slow);
            self.tables.sites[s.site as usize].slow = self.asm.pos();
            self.access_by_rust(&s.ea, s.pre, s.site, &s.op, s.write);
            self.back_in_line(&s);
        }
    }

    /// Has Rust see to an access, which starts over at its retry address then; goes on behind this if it was made on the bounce buffer instead.
    pub(super) fn access_by_rust(&mut self, ea: &Ea, pre: Pending, site: u32, op: &MemOp, write: bool) {
        self.emit_ea(ea, true);
        self.emit_pending(pre, ea.bits);
        self.asm.mov_site(site);
        self.asm.call_gs(Thunk::Mem.offset());
        // It comes back here only with the bounce buffer in RCX.
        self.emit_op(op, Loc::Rcx);
        if write {
            self.asm.mov_site(site);
            self.asm.call_gs(Thunk::Commit.offset());
        }
    }

    /// Goes on behind the access.
    pub(super) fn back_in_line(&mut self, s: &Slow) {
        if let Some(g) = s.shadow {
            self.asm.load(H::R11, M::gs(off::gpr(usize::from(g))));
        }
        self.asm.jmp(s.done);
    }

    /// Emits what is done at a reachable operand.
    pub(super) fn emit_op(&mut self, op: &MemOp, loc: Loc) {
        match op {
            MemOp::Guest(i) => self.emit_guest(i, Some(loc)),
            MemOp::Bit(i) => self.emit_bit_op(i, loc),
            MemOp::Store(v, size) => {
                let m = loc.operand();
                match *v {
                    Value::Reg(r) => self.store_at(loc, m, r, *size),
                    Value::Imm(v) if *size == 8 && i64::from(v as i32) == v as i64 => {
                        self.note_window_fault(loc);
                        self.asm.store_simm32(m, v as i32);
                    }
                    Value::Imm(v) if *size == 4 => {
                        self.note_window_fault(loc);
                        self.asm.store_imm32(m, v as u32 as i32);
                    }
                    Value::Gs(_) | Value::Imm(_) => {
                        let (m, t) = match loc {
                            Loc::Indexed => {
                                self.asm.lea(H::R11, m);
                                (M::base(H::R11, 0), H::RCX)
                            }
                            Loc::Rcx => (m, H::R11),
                            Loc::At(m) => (m, if m.names(H::R11) { H::RCX } else { H::R11 }),
                        };
                        match *v {
                            Value::Gs(o) => self.asm.load(t, M::gs(o)),
                            // No instruction stores other constants of 64 bits.
                            Value::Imm(v) => self.asm.mov_rip_or_short(t, v),
                            Value::Reg(_) => unreachable!("registers are handled above"),
                        }
                        self.store_at(loc, m, t, *size);
                    }
                }
            }
            MemOp::Load(d, size) => {
                let m = loc.operand();
                self.note_window_fault(loc);
                let a = &mut self.asm;
                let r = match *d {
                    Dest::Reg(r) => r,
                    Dest::Gs(_) => H::RCX,
                };
                match size {
                    8 => a.load(r, m),
                    4 => a.load32(r, m),
                    2 => a.load16(r, m),
                    _ => a.load8(r, m),
                }
                if let Dest::Gs(o) = *d {
                    a.store(M::gs(o), H::RCX);
                }
            }
        }
    }

    fn store_at(&mut self, loc: Loc, m: M, r: H, size: u8) {
        self.note_window_fault(loc);
        store_sized(self.asm, m, r, size);
    }
}

fn store_sized(a: &mut crate::asm::Asm, m: M, r: H, size: u8) {
    match size {
        8 => a.store(m, r),
        4 => a.store32(m, r),
        2 => a.store16(m, r),
        _ => a.store8(m, r),
    }
}

/// Whether an instruction reports a pending x87 exception before it does anything.
fn waits_for_x87(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as Mn;
    unit_of(i.code()) == Unit::X87
        && !matches!(
            i.mnemonic(),
            Mn::Fnstcw | Mn::Fnstsw | Mn::Fnstenv | Mn::Fnsave | Mn::Fninit | Mn::Fnclex | Mn::Cvtpi2pd | Mn::Cvtpi2ps
        )
}

/// Whether an instruction computes, and may raise an exception, before it stores.
fn stores_after_exceptions(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as Mn;
    matches!(i.mnemonic(), Mn::Fst | Mn::Fstp | Mn::Fist | Mn::Fistp | Mn::Fisttp | Mn::Fbstp | Mn::Vcvtps2ph)
}
