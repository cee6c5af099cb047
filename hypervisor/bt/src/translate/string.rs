//! MOVS, STOS and LODS inside translated code.
//!
//! Without REP they are two accesses. With REP, a run that stays within one page of each operand is done by the
//! host's own REP instruction; everything else (a soft-TLB miss, a page boundary, a long count) goes to Rust. The direction flag is
//! part of the mode, and only forward runs in 64-bit mode are worth the code.

use super::Translator;
use super::memory::{Access, Dest, Ea, MemOp, Value};
use crate::asm::{Base, H, Label, M, cc};
use crate::block::{Action, FaultKind, Mode};
use crate::kernel::STRING_SHIFT;
use crate::state::off;
use iced_x86::{Instruction, Mnemonic, Register};

impl Translator<'_> {
    pub(crate) fn string(&mut self, i: &Instruction, flags_live: bool) {
        let (reads, writes, size) = match i.mnemonic() {
            Mnemonic::Movsb => (true, true, 1),
            Mnemonic::Movsd => (true, true, 4),
            Mnemonic::Movsq => (true, true, 8),
            Mnemonic::Stosb => (false, true, 1),
            Mnemonic::Stosd => (false, true, 4),
            Mnemonic::Stosq => (false, true, 8),
            Mnemonic::Lodsb => (true, false, 1),
            Mnemonic::Lodsd => (true, false, 4),
            _ => (true, false, 8),
        };
        let wide = [i.memory_base(), Register::RSI, Register::RDI].contains(&Register::RSI)
            && i.op_kinds().all(|k| {
                use iced_x86::OpKind as K;
                !matches!(k, K::MemorySegESI | K::MemorySegSI | K::MemoryESEDI | K::MemoryESDI)
            });
        let overridden = matches!(i.segment_prefix(), Register::FS | Register::GS);
        let rep = i.has_rep_prefix() || i.has_repne_prefix();
        if !self.mode.is64() || self.mode.has(Mode::DF) || !wide || overridden || self.mode.alone() {
            return self.callout(i, Action::Emulate);
        }
        match (rep, reads, writes) {
            (false, _, _) => self.string_once(reads, writes, size, flags_live),
            (true, _, true) if self.mode.has(Mode::WINDOW) => self.string_rep_window(i, reads, size, flags_live),
            (true, _, true) if self.maps_kernel(self.cur_rip) => self.string_rep_kernel(i, reads, size),
            (true, _, true) if self.maps_one_operand(self.cur_rip) => {
                self.string_rep_across(i, reads, size, flags_live);
            }
            (true, _, true) => self.string_rep(i, reads, size, flags_live),
            _ => self.callout(i, Action::Emulate),
        }
    }

    fn string_once(&mut self, reads: bool, writes: bool, size: u8, flags_live: bool) {
        let at = |reg: usize| Ea { base: Some(reg), index: None, disp: 0, bits: 64, seg: 3 };
        let acc = |ea, write: bool| Access {
            ea,
            size: u16::from(size),
            read: !write,
            write,
            masked: false,
            align: 0,
            flags_live,
        };
        let step = i32::from(size);
        if reads {
            let dest = if writes || size == 1 { Dest::Gs(off::TMP + 16) } else { Dest::Reg(H::RAX) };
            self.emit_access(acc(at(6), false), MemOp::Load(dest, size));
            if !writes && size == 1 {
                // LODSB replaces AL alone.
                self.asm.store(M::gs(off::TMP), H::RAX);
                self.asm.load(H::RCX, M::gs(off::TMP + 16));
                self.asm.store8(M::gs(off::TMP), H::RCX);
                self.asm.load(H::RAX, M::gs(off::TMP));
            }
        }
        if writes {
            let v = if reads { Value::Gs(off::TMP + 16) } else { Value::Reg(H::RAX) };
            self.emit_access(acc(at(7), true), MemOp::Store(v, size));
            self.asm.lea(H::RDI, M::base(H::RDI, step));
        }
        if reads {
            self.asm.lea(H::RSI, M::base(H::RSI, step));
        }
    }

    /// REP MOVS and REP STOS. Temporary slots: 0 = RDI, 1 = RDX, 2 = host source, 3 = RSI.
    fn string_rep(&mut self, i: &Instruction, movs: bool, size: u8, flags_live: bool) {
        let (slow, restore, done, end) = (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        let shift = size.trailing_zeros() as u8;
        if flags_live {
            self.asm.pushfq();
        }
        self.asm.cmp_imm_flags(H::GUEST_RCX, 0);
        self.asm.jcc(cc::E, done);
        self.asm.cmp_imm_flags(H::GUEST_RCX, 4096);
        self.asm.jcc(cc::A, slow);
        self.asm.store(M::gs(off::TMP + 8), H::RDX);
        let run = M { base: Some(H::RCX), index: Some((H::GUEST_RCX, shift)), disp: 0, seg: Base::Host };
        if movs {
            self.asm.mov(H::RCX, H::RSI);
            self.emit_lookup(u16::from(size), false, false, restore);
            self.asm.lea(H::RDX, run);
            self.asm.cmp_imm_flags(H::RDX, 4096);
            self.asm.jcc(cc::A, restore);
            self.asm.lea(H::RCX, M::base_index(H::R11, H::RCX));
            self.asm.store(M::gs(off::TMP + 16), H::RCX);
        }
        self.asm.mov(H::RCX, H::RDI);
        self.emit_lookup(u16::from(size), true, false, restore);
        self.asm.lea(H::RDX, run);
        self.asm.cmp_imm_flags(H::RDX, 4096);
        self.asm.jcc(cc::A, restore);
        let a = &mut self.asm;
        a.lea(H::R11, M::base_index(H::R11, H::RCX));
        if movs {
            a.store(M::gs(off::TMP + 24), H::RSI);
            a.load(H::RSI, M::gs(off::TMP + 16));
        }
        a.store(M::gs(off::TMP), H::RDI);
        a.mov(H::RDI, H::R11);
        a.mov(H::RCX, H::GUEST_RCX);
        a.rep_string(movs, size);
        a.load(H::RDI, M::gs(off::TMP));
        a.lea(H::RDI, M { base: Some(H::RDI), index: Some((H::GUEST_RCX, shift)), disp: 0, seg: Base::Host });
        if movs {
            a.load(H::RSI, M::gs(off::TMP + 24));
            a.lea(H::RSI, M { base: Some(H::RSI), index: Some((H::GUEST_RCX, shift)), disp: 0, seg: Base::Host });
        }
        a.mov_imm(H::GUEST_RCX, 0);
        a.load(H::RDX, M::gs(off::TMP + 8));
        a.bind(done);
        if flags_live {
            a.popfq();
        }
        a.jmp(end);
        a.bind(restore);
        a.load(H::RDX, M::gs(off::TMP + 8));
        a.bind(slow);
        if flags_live {
            a.popfq();
        }
        self.callout(i, Action::Emulate);
        self.asm.bind(end);
    }

    /// REP MOVS and REP STOS on operands that lie in windows as a whole, each in one: the host's own instruction runs on the host's
    /// addresses, however many pages it crosses. If it faults, the signal handler turns the registers back, and Rust goes on.
    fn string_rep_window(&mut self, i: &Instruction, movs: bool, size: u8, flags_live: bool) {
        let shift = size.trailing_zeros() as u8;
        let (slow, slow_flags, end) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.keep_flags(flags_live);
        let a = &mut self.asm;
        // A count that is too large would make the end wrap around.
        a.mov(H::RCX, H::GUEST_RCX);
        a.shr_flags(H::RCX, 40);
        a.jcc(cc::NE, slow_flags);
        for (r, guest, slot) in string_operands(movs) {
            let region = self.likely(&Ea { base: Some(guest), index: None, disp: 0, bits: 64, seg: 3 });
            let (other, found) = (self.asm.label(), self.asm.label());
            let last = M { index: Some((H::GUEST_RCX, shift)), ..M::base(r, 0) };
            self.check_both_ends(region, r, last, other);
            self.asm.load(H::RCX, M::gs(region.distance()));
            self.asm.jmp(found);
            self.asm.bind(other);
            self.check_both_ends(region.other(), r, last, slow_flags);
            self.asm.load(H::RCX, M::gs(region.other().distance()));
            self.asm.bind(found);
            self.asm.store(M::gs(slot), H::RCX);
        }
        self.flags_back(flags_live);
        let a = &mut self.asm;
        for (r, _, slot) in string_operands(movs) {
            a.load(H::RCX, M::gs(slot));
            a.lea(r, M::base_index(r, H::RCX));
        }
        let site = self.string_on_host(movs, size);
        self.asm.bind(end);
        self.slow_strings.push(SlowString { site, slow, slow_flags, end, instr: *i, flags_live, rdx: false });
    }

    /// The flags into slot 1, if they are live. Clobbers RCX.
    fn keep_flags(&mut self, live: bool) {
        if live {
            self.asm.pushfq();
            self.asm.pop(H::RCX);
            self.asm.store(M::gs(off::TMP + 8), H::RCX);
        }
    }

    /// The flags from slot 1, if they are live. Clobbers RCX.
    fn flags_back(&mut self, live: bool) {
        if live {
            self.asm.load(H::RCX, M::gs(off::TMP + 8));
            self.asm.push(H::RCX);
            self.asm.popfq();
        }
    }

    /// All of a string at once, see [`Self::string_run`].
    fn string_on_host(&mut self, movs: bool, size: u8) -> u32 {
        self.asm.mov(H::RCX, H::GUEST_RCX);
        self.asm.mov_imm(H::GUEST_RCX, 0);
        self.string_run(movs, size)
    }

    /// The host's instruction, once RDI and RSI hold the host's addresses and slots 2 and 3 how far these are from the guest's, by which
    /// the signal handler turns the registers back too. RCX is the host's count, and the guest's RCX what is left behind it. Gives its site.
    fn string_run(&mut self, movs: bool, size: u8) -> u32 {
        let at = self.asm.pos();
        self.asm.rep_string(movs, size);
        let site = self.note_string_site(movs);
        self.fault_site(at, FaultKind::String { site });
        for (r, _, slot) in string_operands(movs) {
            let a = &mut self.asm;
            a.load(H::RCX, M::gs(slot));
            a.not(H::RCX);
            a.lea(r, M { disp: 1, ..M::base_index(r, H::RCX) });
        }
        site
    }

    /// REP MOVS and REP STOS by way of kernel mappings: the host's own instruction on the host's addresses. It goes through memory step by step, so
    /// it faults before it can leave what is mapped.
    fn string_rep_kernel(&mut self, i: &Instruction, movs: bool, size: u8) {
        let (slow, short, end) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.mov_imm(H::RCX, u64::from(STRING_SHIFT));
        self.asm.shrx(H::RCX, H::GUEST_RCX, H::RCX);
        self.asm.jrcxz(short);
        self.asm.jmp(slow);
        self.asm.bind(short);
        for (r, _, slot) in string_operands(movs) {
            self.emit_kernel_distance(r);
            self.asm.store(M::gs(slot), H::RCX);
            self.asm.lea(r, M::base_index(r, H::RCX));
        }
        let site = self.string_on_host(movs, size);
        self.asm.bind(end);
        let (slow_flags, flags_live, rdx) = (slow, false, false);
        self.slow_strings.push(SlowString { site, slow, slow_flags, end, instr: *i, flags_live, rdx });
    }

    /// REP MOVS and REP STOS where the kernel may access user memory: an operand of the kernel's is reached by way of its mapping, one of the user's by
    /// the soft TLB, page by page. Slot 0 keeps RDX, which is how many elements go at once; slot 1 the flags; slots 2 and 3 are as elsewhere.
    fn string_rep_across(&mut self, i: &Instruction, movs: bool, size: u8, flags_live: bool) {
        let shift = size.trailing_zeros() as u8;
        let (slow, again, end) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.keep_flags(flags_live);
        let a = &mut self.asm;
        a.store(M::gs(off::TMP), H::RDX);
        // None at all is left to Rust, too.
        a.lea(H::RCX, M::base(H::GUEST_RCX, -1));
        a.shr_flags(H::RCX, STRING_SHIFT);
        a.jcc(cc::NE, slow);
        a.bind(again);
        a.mov(H::RDX, H::GUEST_RCX);
        for (r, _, slot) in string_operands(movs) {
            let (user, found, fewer) = (self.asm.label(), self.asm.label(), self.asm.label());
            self.asm.bt_flags(r, 63);
            self.asm.jcc(cc::NC, user);
            self.emit_kernel_distance(r);
            self.asm.jmp(found);
            self.asm.bind(user);
            self.asm.mov(H::RCX, r);
            self.emit_lookup(u16::from(size), r == H::RDI, false, slow);
            let a = &mut self.asm;
            a.lea(H::R11, M::base_index(H::R11, H::RCX));
            // What is left of the page, in elements.
            a.mov32(H::RCX, r);
            a.and32_flags(H::RCX, 0xfff);
            a.not(H::RCX);
            a.lea(H::RCX, M::base(H::RCX, 4097));
            if shift > 0 {
                a.shr_flags(H::RCX, shift);
            }
            a.cmp_flags(H::RCX, H::RDX);
            a.jcc(cc::NC, fewer);
            a.mov(H::RDX, H::RCX);
            a.bind(fewer);
            a.mov(H::RCX, r);
            a.not(H::RCX);
            a.lea(H::RCX, M { disp: 1, ..M::base_index(H::R11, H::RCX) });
            a.bind(found);
            a.store(M::gs(slot), H::RCX);
        }
        let a = &mut self.asm;
        for (r, _, slot) in string_operands(movs) {
            a.load(H::RCX, M::gs(slot));
            a.lea(r, M::base_index(r, H::RCX));
        }
        a.mov(H::RCX, H::RDX);
        a.not(H::RDX);
        a.lea(H::GUEST_RCX, M { disp: 1, ..M::base_index(H::GUEST_RCX, H::RDX) });
        let site = self.string_run(movs, size);
        let a = &mut self.asm;
        a.cmp_imm_flags(H::GUEST_RCX, 0);
        a.jcc(cc::NE, again);
        a.load(H::RDX, M::gs(off::TMP));
        self.flags_back(flags_live);
        self.asm.bind(end);
        self.slow_strings.push(SlowString { site, slow, slow_flags: slow, end, instr: *i, flags_live, rdx: true });
    }

    /// Behind the block: what the windows do not hold is done by Rust.
    pub(crate) fn emit_slow_strings(&mut self) {
        for s in std::mem::take(&mut self.slow_strings) {
            self.cur_rip = s.instr.ip();
            if s.rdx {
                self.asm.bind(s.slow);
                self.tables.sites[s.site as usize].slow = self.asm.pos();
                self.asm.load(H::RDX, M::gs(off::TMP));
            } else if s.slow_flags != s.slow {
                self.asm.bind(s.slow_flags);
            }
            self.flags_back(s.flags_live);
            if !s.rdx {
                self.asm.bind(s.slow);
                self.tables.sites[s.site as usize].slow = self.asm.pos();
            }
            let action = if s.rdx { Action::StringAcross } else { Action::Emulate };
            self.callout(&s.instr, action);
            self.asm.jmp(s.end);
        }
    }
}

/// The operands of MOVS or STOS: their registers, as the host and the guest number them, and the slots for how far they are moved.
fn string_operands(movs: bool) -> impl Iterator<Item = (H, usize, i32)> {
    [Some((H::RDI, 7, off::TMP + 16)), movs.then_some((H::RSI, 6, off::TMP + 24))].into_iter().flatten()
}

/// A string instruction's way to Rust, to be emitted.
pub(crate) struct SlowString {
    site: u32,
    slow: Label,
    slow_flags: Label,
    end: Label,
    instr: Instruction,
    flags_live: bool,
    /// RDX is in slot 0, and to be brought back.
    rdx: bool,
}
