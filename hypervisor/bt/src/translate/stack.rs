//! The stack pointer in window blocks: checked where it changes instead of where it is used.
//!
//! Nearly every block uses the stack, and RSP nearly always moves by constants, so a check per block is mostly wasted. In blocks of
//! [`crate::block::Mode::STACKED`] it is in or near the high window when the block is entered and when it is left; [`crate::window`] tells who
//! sees to that. Here is the part of emitted code: which changes of RSP are followed by a check.

use super::Translator;
use super::classify::{Class, Unit, classify};
use super::known::constant_added;
use super::memory::Ea;
use super::window::{Region, Subject};
use crate::asm::{H, Label, M};
use crate::block::NO_CALLOUT;
use crate::regs::gpr_of;
use crate::state::{Thunk, off};
use crate::window::STACK_STEP;
use iced_x86::{Code, Instruction, OpKind, Register};

/// What is known about the stack pointer at this place of a block.
#[derive(Default)]
pub(super) struct Stack {
    /// Memory was accessed by it on the way here, or it was checked: it is in the window but for the steps since.
    proved: bool,
    /// Checks that failed, with where to go on in a block that takes nothing for granted: to be emitted.
    lost: Vec<(Label, u64)>,
}

impl Stack {
    /// An operand in the high window with RSP as its base is being accessed.
    pub(super) fn note_access(&mut self, m: M) {
        self.proved |= near(i64::from(m.disp));
    }
}

/// How an instruction changes the stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// By a small constant.
    Step,
    /// By a constant, or to what another register that was checked is plus a constant.
    Jump,
    /// To anything.
    Any,
}

fn near(d: i64) -> bool {
    (-STACK_STEP..=STACK_STEP).contains(&d)
}

impl Translator<'_> {
    /// How an instruction that writes RSP changes it, unless it is an access by RSP itself. To be asked before [`super::known::Known`] is
    /// brought up to date.
    pub(super) fn stack_change(&self, i: &Instruction) -> Option<Change> {
        let names = |n: u32| i.op_count() > n && i.op_kind(n) == OpKind::Register && i.op_register(n) == Register::RSP;
        let by = |d: i64| if near(d) { Change::Step } else { Change::Jump };
        let high = |r: Register| r.is_gpr64() && gpr_of(r).is_some_and(|(g, _)| self.known.is_high(g));
        if let Some(d) = constant_added(i, 4) {
            return Some(by(d));
        }
        Some(match i.code() {
            // Their own access is by RSP, and moves it by a slot.
            _ if classify(i.code()) == Class::Push => return None,
            _ if classify(i.code()) == Class::Pop && !writes_operand(i) => return None,
            Code::Leaveq if high(Register::RBP) => Change::Jump,
            Code::And_rm64_imm8 if names(0) && (i.immediate(1) as i64) < 0 => Change::Step,
            Code::Lea_r64_m if i.memory_index() == Register::None && names(0) => match i.memory_base() {
                r if high(r) => Change::Jump,
                _ => Change::Any,
            },
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64
                if names(0) && i.op1_kind() == OpKind::Register && high(i.op1_register()) =>
            {
                Change::Jump
            }
            _ => Change::Any,
        })
    }

    /// Behind a change of RSP: a check, unless there is an access by it on every way out of the block.
    pub(super) fn check_stack(&mut self, change: Change, rest: &[Instruction], flags_live: bool) {
        let good = match change {
            Change::Step => self.stack.proved || self.will_prove(rest),
            Change::Jump => {
                self.stack.proved = false;
                self.will_prove(rest)
            }
            Change::Any => false,
        };
        if good {
            return;
        }
        let lost = self.asm.label();
        self.emit_check(Region::High, Subject::Register(H::GUEST_RSP), flags_live, lost);
        self.stack.lost.push((lost, self.cur_next));
        self.stack.proved = true;
    }

    /// Whether code accesses memory by RSP before it can leave the block in any way other than by Rust.
    fn will_prove(&self, rest: &[Instruction]) -> bool {
        for i in rest {
            let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
            match classify(i.code()) {
                // The operand of a push may be anywhere and have a check of its own that leaves the block.
                Class::Push => return !memory,
                Class::Pop => return i.op0_kind() == OpKind::Register && !writes_operand(i),
                Class::CallDirect | Class::Ret => return true,
                Class::Copy(Unit::Integer) if memory => {
                    let ea = Ea::of(i, self.mode);
                    return ea.base == Some(4) && ea.index.is_none() && ea.bits == 64 && ea.seg < 4 && near(ea.disp);
                }
                Class::Copy(_) if memory => return false,
                Class::Copy(_) | Class::Nop | Class::Lea => {}
                _ => return false,
            }
        }
        false
    }

    /// Behind the block: where RSP proved to be elsewhere. Rust finds another kind of block to go on in.
    pub(super) fn emit_lost_stacks(&mut self) {
        for (label, next) in std::mem::take(&mut self.stack.lost) {
            self.asm.bind(label);
            self.asm.mov_rip(H::RCX, next);
            self.asm.store(M::gs(off::RIP), H::RCX);
            let lookup = self.lookup_stub(NO_CALLOUT, Thunk::Lookup);
            self.asm.jmp(lookup);
        }
    }
}

/// Whether POP's operand is the stack pointer itself, at any width.
fn writes_operand(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Register && gpr_of(i.op0_register()).is_some_and(|(g, _)| g == 4)
}
