//! Runs of PUSH and POP: one lookup for all of them, and one change of the stack pointer.
//!
//! Kernel entries and function prologues push many registers in a row. If the whole run lies within one page and the soft TLB has it,
//! the operands follow each other at the address that one lookup gave. Otherwise the instructions are carried out one by one behind
//! the block, so that a fault finds exactly those done that come before it.
//!
//! Kernel mappings need no such condition (see `kernel.rs`).
//!
//! In window blocks that take the stack pointer to be in the high window ([`Mode::STACKED`]) there is no lookup. If one of a run's accesses
//! faults, the run starts over one by one: what was stored is stored again, what was loaded is loaded again.

use super::Translator;
use super::classify::{Class, classify};
use super::memory::Loc;
use super::window::Region;
use crate::asm::{H, Label, M};
use crate::block::Mode;
use crate::regs::{Home, Width, gpr_of, home};
use crate::state::off;
use iced_x86::{Instruction, OpKind};

/// A run done one by one, to be emitted.
pub(crate) struct SlowRun {
    slow: Label,
    done: Label,
    code: Vec<Instruction>,
    /// The accesses through a window or a kernel mapping that lead here when they fault.
    site: Option<u32>,
}

/// Instructions in a run at most: more would seldom lie within a page.
const LONGEST: usize = 16;

impl Translator<'_> {
    /// How many instructions from the start of `code` form a run; 0 or at least 2.
    pub(super) fn run_length(&self, code: &[Instruction]) -> usize {
        let m = self.mode;
        if !m.is64() || m.has(Mode::WINDOW) && !m.has(Mode::STACKED) || m.alone() {
            return 0;
        }
        let Some(first) = code.first() else { return 0 };
        let class = classify(first.code());
        if !matches!(class, Class::Push | Class::Pop) {
            return 0;
        }
        let n = code.iter().take(LONGEST).take_while(|i| classify(i.code()) == class && plain(i)).count();
        if n < 2 { 0 } else { n }
    }

    /// Emits a run.
    pub(super) fn stack_run(&mut self, code: &[Instruction], flags_live: bool) {
        let bytes = 8 * code.len() as i32;
        let push = classify(code[0].code()) == Class::Push;
        let (slow, done) = (self.asm.label(), self.asm.label());
        if self.mode.has(Mode::WINDOW) {
            self.cur_rip = code[0].ip();
            let site = self.window_run(code, push);
            self.asm.lea(H::GUEST_RSP, M::base(H::GUEST_RSP, if push { -bytes } else { bytes }));
            self.asm.bind(done);
            self.slow_runs.push(SlowRun { slow, done, code: code.to_vec(), site: Some(site) });
            return;
        }
        if code.iter().all(|i| self.maps_kernel(i.ip())) {
            self.cur_rip = code[0].ip();
            let site = Some(self.emit_kernel_run(code));
            self.asm.bind(done);
            self.slow_runs.push(SlowRun { slow, done, code: code.to_vec(), site });
            return;
        }
        self.asm.lea(H::RCX, M::base(H::GUEST_RSP, if push { -bytes } else { 0 }));
        self.emit_lookup(bytes as u16, push, flags_live, slow);
        let a = &mut self.asm;
        a.lea(H::R11, M::base_index(H::R11, H::RCX));
        for (n, i) in code.iter().enumerate() {
            let Some((g, _)) = gpr_of(i.op0_register()) else { continue };
            let n = 8 * n as i32;
            let m = M::base(H::R11, if push { bytes - 8 - n } else { n });
            match (home(g), push) {
                (Home::Host(h), true) => a.store(m, h),
                (Home::Host(h), false) => a.load(h, m),
                (Home::Spilled(g), true) => {
                    a.load(H::RCX, M::gs(off::gpr(g)));
                    a.store(m, H::RCX);
                }
                (Home::Spilled(g), false) => {
                    a.load(H::RCX, m);
                    a.store(M::gs(off::gpr(g)), H::RCX);
                }
            }
        }
        a.lea(H::GUEST_RSP, M::base(H::GUEST_RSP, if push { -bytes } else { bytes }));
        a.bind(done);
        self.slow_runs.push(SlowRun { slow, done, code: code.to_vec(), site: None });
    }

    /// The accesses of a run through the high window; gives their site.
    fn window_run(&mut self, code: &[Instruction], push: bool) -> u32 {
        let site = self.note_run_site(push);
        self.window_site = Some(site);
        for (n, i) in code.iter().enumerate() {
            let Some((g, _)) = gpr_of(i.op0_register()) else { continue };
            let n = n as i32;
            let m = M::base(H::GUEST_RSP, if push { -8 * (n + 1) } else { 8 * n });
            self.stack.note_access(m);
            let m = Region::High.operand(m);
            let (h, spilled) = match home(g) {
                Home::Host(h) => (h, None),
                Home::Spilled(g) => (H::RCX, Some(M::gs(off::gpr(g)))),
            };
            if let (Some(at), true) = (spilled, push) {
                self.asm.load(h, at);
            }
            self.note_window_fault(Loc::At(m));
            if push {
                self.asm.store(m, h);
            } else {
                self.asm.load(h, m);
            }
            if let (Some(at), false) = (spilled, push) {
                self.asm.store(at, h);
            }
        }
        self.window_site = None;
        site
    }

    /// Behind the block: the runs' instructions one by one. Flags are left alone, as if they were live.
    pub(super) fn emit_slow_runs(&mut self) {
        for run in std::mem::take(&mut self.slow_runs) {
            self.asm.bind(run.slow);
            if let Some(site) = run.site {
                self.tables.sites[site as usize].slow = self.asm.pos();
            }
            for i in &run.code {
                self.cur_rip = i.ip();
                self.cur_next = self.wrap(i.next_ip());
                if classify(i.code()) == Class::Push {
                    self.push(i, true);
                } else {
                    self.pop(i, true);
                }
            }
            self.asm.jmp(run.done);
        }
    }
}

/// A 64-bit register other than the stack pointer.
fn plain(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Register && matches!(gpr_of(i.op0_register()), Some((g, Width::B64)) if g != 4)
}
