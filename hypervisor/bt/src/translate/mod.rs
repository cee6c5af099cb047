//! From guest bytes to a translated block.
//!
//! A block is decoded first, to its end: a branch, an instruction that ends blocks, the page's end, or a length limit. It goes on
//! behind conditional jumps forward, which leave it at the side.
//! Flag liveness is then computed backwards, and the instructions are emitted one by one. No intermediate form exists: an
//! instruction is copied, rewritten, expanded, or turned into a callout (see [`mod@classify`]).

pub(crate) mod classify;
mod control;
mod copy;
pub(crate) mod door;
#[cfg(test)]
mod golden;
mod kernel;
mod known;
mod memory;
mod peek;
mod privilege;
mod rounds;
mod runs;
mod spilled;
mod stack;
mod string;
mod system;
mod window;

use crate::asm::{Asm, Base, H, Label, M, Reloc};
use crate::block::{Action, BlockId, Callout, Exit, FaultKind, FaultSite, Mode, NO_CALLOUT, NO_EXIT, Tables};
use crate::cache::Placed;
use crate::engine::WordMap;
use crate::regs::{Home, Width, home};
use crate::relocate::movable;
use crate::state::{Thunk, off};
use classify::{Class, Unit, classify, unit_of};
pub(crate) use control::jump_cache_stub;
#[cfg(test)]
pub(crate) use golden::mode as linux_mode;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, Register};
use memory::Slow;
pub(crate) use peek::Peek;
use peek::flag_liveness;
use std::sync::atomic::{AtomicU32, Ordering};
pub(crate) use window::Hint;

/// Guest instructions per block at most.
const MAX_INSTRUCTIONS: usize = 64;

/// Conditional jumps forward that a block may go on behind.
const MAX_SIDE_EXITS: usize = 6;

/// An adjustment of an address between its computation and the lookup.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pending {
    None,
    /// Add the operand-sized bit offset in a guest register, scaled down to the operand's unit (SDM vol. 2, BT).
    BitOffset(u8, Width),
}

/// A direct exit as the translator leaves it: offsets are relative to the block's start.
pub(crate) struct RawExit {
    pub(crate) target_rip: u64,
    pub(crate) target_mode: Mode,
    pub(crate) patch: u32,
    pub(crate) stub: u32,
}

/// What a translation came to.
pub(crate) struct Translated {
    pub(crate) guest_len: u32,
    pub(crate) entry: u32,
    /// The way in for indirect jumps, if it has one.
    pub(crate) door: Option<u32>,
    pub(crate) instructions: u32,
    pub(crate) exits: Vec<RawExit>,
    /// How many more operands were in the low window than in the high one, judging by the registers at hand.
    pub(crate) votes: i32,
    /// Bytes of the page that flag liveness depends on, beside the block's own.
    pub(crate) seen: std::ops::Range<u16>,
}

/// One block's translation in progress.
pub(crate) struct Translator<'a> {
    pub(crate) asm: &'a mut Asm,
    pub(crate) info: &'a mut InstructionInfoFactory,
    pub(crate) tables: &'a mut Tables,
    pub(crate) mode: Mode,
    pub(crate) block: BlockId,
    pub(crate) start_rip: u64,
    /// The guest's code from there on.
    bytes: &'a [u8],
    /// The block uses x87/SIMD registers, so they are live from its entry on.
    pub(crate) simd: bool,
    pub(crate) cur_rip: u64,
    pub(crate) cur_next: u64,
    /// The block is of [`Mode::MIXED`]; `mode` does not say so, for its exits are not.
    mixed: bool,
    /// What window blocks know about registers.
    known: known::Known,
    /// The access through a window or a kernel mapping that is being emitted.
    window_site: Option<u32>,
    /// Instructions that do not use kernel mappings.
    kept: &'a WordMap<u64, ()>,
    /// The instruction has accessed memory already: it must not be left for another version of itself.
    accessed: bool,
    /// What is known about the stack pointer, in blocks of [`Mode::STACKED`].
    stack: stack::Stack,
    slow: Vec<Slow>,
    exits: Vec<RawExit>,
    /// Side exits that cannot be linked: where they come from, the way they go.
    far_sides: Vec<(crate::asm::Label, u64)>,
    /// Where returns arrive behind calls: the ways of those that belong elsewhere, with the addresses they were taken for.
    landings: Vec<(crate::asm::Label, u64)>,
    slow_strings: Vec<string::SlowString>,
    slow_runs: Vec<runs::SlowRun>,
    /// How the block's loop is to go on, and what is left to be emitted of that.
    plan: Option<rounds::Plan>,
    rounds: Option<rounds::Rounds>,
    /// Where the block's last branch leads that polls, if no flag is live there.
    flags_free_at: Option<u64>,
    /// Polls that found a request: to be emitted, with where they were going.
    polled: Vec<(crate::asm::Label, u64)>,
    /// Stubs that go to the lookup: label, callout, which lookup.
    lookups: Vec<(crate::asm::Label, u32, Thunk)>,
    /// Exit stubs to be emitted: (exit, label).
    stubs: Vec<(u32, crate::asm::Label)>,
}

/// Decodes a block at `rip` from `bytes`, which end at the page's end or, for an instruction that crosses it, hold that
/// instruction alone.
pub(crate) fn decode(bytes: &[u8], rip: u64, mode: Mode, out: &mut Vec<Instruction>) -> Decoded {
    out.clear();
    let mut d = Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NONE);
    let limit = if mode.alone() { 1 } else { MAX_INSTRUCTIONS };
    let mut extra = false;
    let mut sides = 0;
    while out.len() < limit {
        let i = d.decode();
        if i.is_invalid() {
            match d.last_error() {
                DecoderError::NoMoreBytes => {
                    return if out.is_empty() { Decoded::NeedMore } else { Decoded::Ok };
                }
                _ if !out.is_empty() => return Decoded::Ok,
                _ => {
                    out.push(i);
                    return Decoded::Ok;
                }
            }
        }
        out.push(i);
        if extra {
            break;
        }
        match classify(i.code()) {
            // The way on is more often the way straight on.
            Class::Jcc if sides < MAX_SIDE_EXITS && i.near_branch_target() > i.ip() && !mode.alone() => sides += 1,
            _ if ends_block(&i, mode) => break,
            // One more instruction runs in the interrupt shadow of STI, then the block ends with a check.
            Class::Sti => extra = true,
            _ => {}
        }
    }
    Decoded::Ok
}

/// Outcome of [`decode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    Ok,
    /// The first instruction crosses into the next page.
    NeedMore,
}

impl<'a> Translator<'a> {
    pub(crate) fn new(
        asm: &'a mut Asm,
        info: &'a mut InstructionInfoFactory,
        tables: &'a mut Tables,
        mode: Mode,
        block: BlockId,
        (start_rip, bytes): (u64, &'a [u8]),
        hint: window::Hint<'a>,
    ) -> Self {
        asm.clear();
        if movable(mode, start_rip, hint.high) {
            asm.note_relocations();
        }
        Self {
            asm,
            info,
            tables,
            mode: Mode(mode.0 & !Mode::MIXED),
            mixed: mode.has(Mode::MIXED),
            block,
            start_rip,
            bytes,
            simd: false,
            cur_rip: start_rip,
            cur_next: start_rip,
            known: known::Known::at_entry(hint, mode.has(Mode::STACKED)),
            window_site: None,
            kept: hint.kept,
            accessed: false,
            stack: stack::Stack::default(),
            slow: Vec::new(),
            exits: Vec::new(),
            far_sides: Vec::new(),
            landings: Vec::new(),
            slow_strings: Vec::new(),
            slow_runs: Vec::new(),
            plan: None,
            rounds: None,
            flags_free_at: None,
            polled: Vec::new(),
            lookups: Vec::new(),
            stubs: Vec::new(),
        }
    }

    /// Translates decoded instructions, with a door for indirect jumps if `door` says so. `peek` is the page they are in, if what follows
    /// them may be looked at.
    pub(crate) fn translate(mut self, code: &[Instruction], mut peek: Option<Peek<'_>>, door: bool) -> Translated {
        self.flags_free_at = peek.as_mut().zip(code.last()).and_then(|(p, i)| {
            let direct = matches!(classify(i.code()), Class::Jcc | Class::JmpDirect | Class::CallDirect);
            let target = i.near_branch_target();
            let polls = target <= i.ip() || classify(i.code()) == Class::CallDirect;
            (direct && polls && p.none_live_at(target)).then_some(target)
        });
        let live = flag_liveness(code, peek.as_mut());
        if !live[0] && code.last().is_some_and(|i| i.near_branch_target() == self.start_rip) {
            // What is looked at of a loop from its end may be less than the loop.
            self.flags_free_at = Some(self.start_rip);
        }
        let mut done = self.emit(code, &live, door);
        done.seen = peek.map_or(0..0, Peek::seen);
        done
    }

    fn emit(mut self, code: &[Instruction], live: &[bool], door: bool) -> Translated {
        self.simd = code.iter().any(|i| match classify(i.code()) {
            Class::Copy(u) => u != Unit::Integer && self.unit_enabled(u).is_none(),
            _ => false,
        });
        if self.simd {
            // The island stands before the entry so that a short JRCXZ reaches it.
            let back = self.asm.label();
            let island = self.asm.here();
            self.asm.call_gs(Thunk::LoadFpu.offset());
            self.asm.jmp8(back);
            let door = self.open_door(door);
            let entry = self.asm.pos();
            self.asm.load32(H::RCX, M::gs(off::FPU_LIVE));
            self.asm.jrcxz(island);
            self.asm.bind(back);
            self.body(code, live, (door, entry))
        } else {
            let door = self.open_door(door);
            let entry = self.asm.pos();
            self.body(code, live, (door, entry))
        }
    }

    /// Emits a door, if there is to be one; gives its place, and where those go who are wrong there.
    fn open_door(&mut self, wanted: bool) -> Option<(u32, Label)> {
        let at = self.asm.pos();
        wanted.then(|| (at, door::open(self.asm, self.start_rip)))
    }

    fn body(mut self, code: &[Instruction], live: &[bool], (door, entry): (Option<(u32, Label)>, u32)) -> Translated {
        let mut ended = false;
        let mut in_run = 0;
        if self.mode.has(Mode::WINDOW) {
            self.known.count_sums(code);
            self.plan = self.plan_rounds(code);
        }
        for (n, i) in code.iter().enumerate() {
            if n < in_run {
                continue;
            }
            let run = self.run_length(&code[n..]);
            if run > 0 {
                self.stack_run(&code[n..n + run], live[n]);
                in_run = n + run;
                if self.mode.has(Mode::WINDOW) {
                    for k in n..in_run {
                        self.track(&code[k], &code[k + 1..], true);
                    }
                }
                continue;
            }
            self.cur_rip = i.ip();
            self.cur_next = self.wrap(i.next_ip());
            self.accessed = false;
            if n + 1 < code.len() && classify(i.code()) == Class::Jcc {
                self.side_exit(i);
                continue;
            }
            ended = self.instruction(i, live[n]);
            if ended {
                break;
            }
            if self.mode.has(Mode::WINDOW) {
                let rest = &code[n + 1..];
                self.track(i, rest, live.get(n + 1).copied().unwrap_or(true));
            }
        }
        let last = code[code.len() - 1];
        if !ended {
            let next = self.wrap(last.next_ip());
            if self.mode.has(Mode::STEP) {
                self.cur_rip = next;
                let at = last.with_ip(next);
                self.callout(&at, Action::StepDone);
                self.asm.ud2();
            } else {
                let after_sti = code.len() >= 2 && classify(code[code.len() - 2].code()) == Class::Sti;
                let lone_sti = classify(last.code()) == Class::Sti;
                if after_sti || lone_sti {
                    self.irq_window_exit(next);
                }
                self.exit_to(next, self.mode, false);
            }
        }
        self.asm.cold();
        if let Some((_, wrong)) = door {
            door::turn_away(self.asm, self.start_rip, Thunk::lookup(self.mode.view()), wrong);
        }
        self.emit_slow_runs();
        self.emit_slow_paths();
        self.emit_slow_strings();
        self.emit_ways_out();
        self.emit_far_sides();
        self.emit_lost_stacks();
        self.emit_polled();
        self.emit_landings();
        self.emit_stubs();
        let guest_len = (last.ip().wrapping_add(last.len() as u64)).wrapping_sub(self.start_rip) as u32;
        Translated {
            guest_len: guest_len.max(1),
            entry,
            door: door.map(|d| d.0),
            instructions: code.len() as u32,
            exits: self.exits,
            votes: self.known.votes(),
            seen: 0..0,
        }
    }

    /// Truncates an instruction pointer to the code size.
    pub(crate) fn wrap(&self, rip: u64) -> u64 {
        match self.mode.bits() {
            64 => rip,
            32 => rip & 0xffff_ffff,
            _ => rip & 0xffff,
        }
    }

    pub(crate) fn cur_delta(&self) -> u32 {
        self.cur_rip.wrapping_sub(self.start_rip) as u32
    }

    /// Records that the host may raise an exception at `at`.
    pub(crate) fn fault_site(&mut self, at: u32, kind: FaultKind) {
        self.tables.faults.extend(FaultSite::new(at, kind, self.start_rip));
    }

    /// The callout to make instead when a unit is switched off.
    fn unit_enabled(&self, u: Unit) -> Option<Action> {
        let need = match u {
            Unit::Integer => return None,
            Unit::X87 | Unit::Wait => 0,
            Unit::Sse => Mode::SSE,
            Unit::Avx => Mode::AVX,
            Unit::Avx512 => Mode::AVX512,
        };
        if need != 0 && !self.mode.has(need) {
            Some(Action::Undefined)
        } else if self.mode.has(Mode::FPU_OFF) {
            Some(Action::FpuOff)
        } else {
            None
        }
    }

    /// Emits one instruction; true when the block ends with it.
    fn instruction(&mut self, i: &Instruction, flags_live: bool) -> bool {
        let base = i.memory_base();
        if base == Register::EIP || (base == Register::None && i.memory_displ_size() == 8) {
            // An address of 64 bits that is no distance from RIP, or one of 32 that is.
            self.asm.pin();
        }
        if i.is_invalid() {
            let action = if i.len() >= 15 { Action::TooLong } else { Action::Undefined };
            self.callout(i, action);
            return true;
        }
        let flat = self.mode.has(Mode::FLAT) && self.mode.has(Mode::WIDE_STACK);
        let class = classify(i.code());
        if matches!(class, Class::Copy(_) | Class::Emulate)
            && let Some(action) = self.unit_enabled(unit_of(i.code()))
        {
            self.callout(i, action);
            return true;
        }
        match class {
            Class::Copy(_) => self.copy(i, flags_live),
            Class::Nop => {}
            Class::Lea => self.lea(i),
            Class::BitTest => self.bit_test(i, flags_live),
            Class::Push if flat => self.push(i, flags_live),
            Class::Pop if flat => self.pop(i, flags_live),
            Class::Leave if flat => self.leave(i, flags_live),
            Class::Pushf if flat && self.mode.is64() && self.mode.has(Mode::PLAIN_IF) => self.pushfq(i),
            Class::Push | Class::Pop | Class::Leave | Class::Pushf => self.callout(i, Action::Emulate),
            Class::JmpDirect => self.exit_to(self.branch_target(i), self.mode, self.branch_target(i) <= i.ip()),
            Class::Jcc => self.jcc(i),
            Class::Loop if self.mode.is64() || self.mode.has(Mode::FLAT) => self.loop_or_jrcxz(i),
            Class::CallDirect if flat => self.call_direct(i, flags_live),
            Class::CallIndirect if flat => self.call_indirect(i, flags_live),
            Class::JmpIndirect if flat => self.jmp_indirect(i, flags_live),
            Class::Ret if flat => self.ret(i, flags_live),
            Class::Loop | Class::CallDirect | Class::CallIndirect | Class::JmpIndirect | Class::Ret => {
                self.callout(i, Action::Emulate);
            }
            Class::Cli => self.cli(i),
            Class::Sti => self.sti(i),
            Class::Stac | Class::Clac => return self.stac_clac(i),
            Class::Rdtsc => self.rdtsc(i),
            Class::Pause => self.pause(i),
            Class::Rdtscp => self.rdtscp(i),
            Class::Swapgs => self.swapgs(i),
            Class::ReadCr => self.read_cr(i),
            Class::ReadBase => self.read_base(i),
            Class::Cld | Class::Std if ends_block(i, self.mode) => self.change_direction(i),
            Class::Cld | Class::Std => {}
            Class::String => self.string(i, flags_live),
            Class::Syscall => self.syscall(i),
            Class::Sysretq => self.sysretq(i),
            Class::Iretq => self.iretq(i),
            Class::ReadSegment => self.read_segment(i, flags_live),
            Class::WriteBase => self.write_base(i),
            Class::Emulate | Class::EmulateEnd => self.callout(i, Action::Emulate),
        }
        ends_block(i, self.mode)
    }

    /// Emits a callout for an instruction. Rust code either comes back behind it or goes elsewhere.
    pub(crate) fn callout(&mut self, i: &Instruction, action: Action) {
        let n = self.note_callout(i, action);
        self.asm.mov_imm(H::R11, u64::from(n));
        self.asm.numbered(Reloc::Callout);
        self.asm.call_gs(Thunk::Emulate.offset());
    }

    /// Records a callout; gives its number.
    fn note_callout(&mut self, i: &Instruction, action: Action) -> u32 {
        let ends = ends_block(i, self.mode);
        self.tables.callouts.push(Callout { block: self.block, instr: *i, action, simd: self.simd, ends });
        self.tables.callouts.len() as u32 - 1
    }

    /// The encoder refused a mapped instruction: a hole in the translator, reported and survived by raising #UD.
    pub(crate) fn encode_failed(&mut self, i: &Instruction, e: &iced_x86::IcedError) {
        // A guest must not be able to flood the log.
        static REPORTED: AtomicU32 = AtomicU32::new(0);
        if REPORTED.fetch_add(1, Ordering::Relaxed) < 8 {
            eprintln!("paravane: no translation for {i} ({:?}): {e}; it raises #UD", i.code());
        }
        self.callout(i, Action::Undefined);
    }

    fn emit_pending(&mut self, p: Pending, bits: u32) {
        let Pending::BitOffset(g, w) = p else { return };
        // RCX = address; add (offset >> log2(bits)) * bytes, sign-extended. TMP keeps the address meanwhile.
        let a = &mut self.asm;
        let src = match home(usize::from(g)) {
            Home::Host(h) => h,
            Home::Spilled(n) => {
                a.load(H::R11, M::gs(off::gpr(n)));
                H::R11
            }
        };
        a.store(M::gs(off::TMP), H::RCX);
        let (shift, scale) = match w {
            Width::B64 => {
                a.mov(H::R11, src);
                (6, 3)
            }
            Width::B32 => {
                a.movsxd(H::R11, src);
                (5, 2)
            }
            _ => {
                a.movsx16(H::R11, src);
                (4, 1)
            }
        };
        a.mov_imm(H::RCX, shift);
        a.sarx(H::R11, H::R11, H::RCX);
        a.load(H::RCX, M::gs(off::TMP));
        a.lea(H::RCX, M { base: Some(H::RCX), index: Some((H::R11, scale)), disp: 0, seg: Base::Host });
        match bits {
            32 => self.asm.mov32(H::RCX, H::RCX),
            16 => self.asm.movzx16(H::RCX, H::RCX),
            _ => {}
        }
    }

    fn emit_stubs(&mut self) {
        for (label, callout, thunk) in std::mem::take(&mut self.lookups) {
            self.asm.bind(label);
            self.asm.mov_imm(H::R11, u64::from(callout));
            if callout != NO_CALLOUT {
                self.asm.numbered(Reloc::Callout);
            }
            self.asm.jmp_mem(M::gs(thunk.offset()));
        }
        let first = self.tables.exits.len() as u32;
        for (n, label) in std::mem::take(&mut self.stubs) {
            self.asm.bind(label);
            self.exits[n as usize].stub = self.asm.pos();
            self.asm.mov_imm(H::R11, u64::from(first + n));
            self.asm.numbered(Reloc::Exit);
            self.asm.jmp_mem(M::gs(Thunk::Chain.offset()));
        }
    }
}

impl RawExit {
    /// The exit as the engine keeps it.
    pub(crate) fn place(&self, block: BlockId, at: Placed) -> Exit {
        Exit {
            block,
            target_rip: self.target_rip,
            target_mode: self.target_mode,
            patch: at.offset(self.patch),
            stub: at.offset(self.stub),
            linked: None,
            next: NO_EXIT,
        }
    }
}

/// Whether translation stops behind an instruction.
fn ends_block(i: &Instruction, mode: Mode) -> bool {
    match classify(i.code()) {
        Class::JmpDirect
        | Class::JmpIndirect
        | Class::CallDirect
        | Class::CallIndirect
        | Class::Ret
        | Class::Jcc
        | Class::Loop
        | Class::Stac
        | Class::Clac
        | Class::Syscall
        | Class::Sysretq
        | Class::Iretq
        | Class::EmulateEnd => true,
        Class::Cld => mode.has(Mode::DF),
        Class::Std => !mode.has(Mode::DF),
        _ => i.is_invalid(),
    }
}

/// A copy of an instruction that stands elsewhere.
trait WithIp {
    fn with_ip(self, ip: u64) -> Self;
}

impl WithIp for Instruction {
    fn with_ip(mut self, ip: u64) -> Self {
        self.set_ip(ip);
        self
    }
}
