//! The third memory policy: operands of kernel code reached through kernel mappings (see [`crate::kernel`]).
//!
//! RORX and MOVZX take the table's index from the base register, one load gives what to add, and the guest's instruction has the
//! sum of both as its operand's address. Nothing here touches flags, and nothing is checked: an operand that is not mapped faults, and
//! the signal handler goes on at the slow path, which is the soft TLB's.

use super::classify::{Class, classify};
use super::memory::{Access, Loc, MemOp, Slow};
use super::{Pending, Translator};
use crate::asm::{H, M};
use crate::block::{FaultKind, Mode};
use crate::kernel::{TABLE, TIB_SHIFT};
use crate::regs::{Home, gpr_of, home};
use crate::state::off;
use iced_x86::Instruction;

impl Translator<'_> {
    /// Whether code at `rip` uses kernel mappings.
    pub(super) fn maps_kernel(&self, rip: u64) -> bool {
        self.maps_in(Mode::VIEW_SMAP, rip)
    }

    /// Whether a string instruction at `rip`, where the kernel may access user memory, reaches its kernel operand by way of its mapping.
    pub(super) fn maps_one_operand(&self, rip: u64) -> bool {
        self.maps_in(Mode::VIEW_SUPER, rip)
    }

    fn maps_in(&self, view: u32, rip: u64) -> bool {
        self.mode.has(Mode::MAPPED) && self.mode.view() as u32 == view && !self.kept.contains_key(&rip)
    }

    /// Loads what to add to the address in `base` into RCX. Leaves flags alone.
    pub(super) fn emit_kernel_distance(&mut self, base: H) {
        let a = &mut self.asm;
        a.rorx(H::RCX, base, TIB_SHIFT);
        a.movzx8(H::RCX, H::RCX);
        a.load(H::RCX, M::gs_index(H::RCX, 3, off::KERNEL_TABLE));
    }

    /// Emits an access by way of kernel mappings; false when its form wants the soft TLB.
    pub(super) fn emit_kernel_access(&mut self, acc: &Access, pre: Pending, op: &MemOp, site: u32) -> bool {
        if acc.ea.bits != 64 || acc.masked {
            return false;
        }
        let Some(operand) = self.kernel_operand(acc, pre) else { return false };
        let (slow, done) = (self.asm.label(), self.asm.label());
        self.tables.sites[site as usize].kernel = true;
        self.window_site = Some(site);
        self.emit_op(op, Loc::At(operand));
        self.window_site = None;
        self.asm.bind_with_shadow(done);
        let shadow = self.asm.shadow();
        self.slow.push(Slow { slow, done, ea: acc.ea, pre, site, op: *op, write: acc.write, other: None, shadow });
        true
    }

    fn kernel_operand(&mut self, acc: &Access, pre: Pending) -> Option<M> {
        let ea = &acc.ea;
        let plain = ea.seg < 4 && matches!(pre, Pending::None);
        if plain && ea.base.is_none() && ea.index.is_none() {
            let la = ea.disp as u64;
            let disp = i32::try_from(ea.disp).ok().filter(|&d| d < 0)?;
            let index = (la >> TIB_SHIFT) as usize & (TABLE - 1);
            self.asm.load(H::RCX, M::gs(off::KERNEL_TABLE + 8 * index as i32));
            return Some(M::base(H::RCX, disp));
        }
        if plain
            && let (Some(b), None) = (ea.base, ea.index)
            && let Home::Host(h) = home(b)
            && let Ok(disp) = i32::try_from(ea.disp)
        {
            self.emit_kernel_distance(h);
            return Some(M { disp, ..M::base_index(H::RCX, h) });
        }
        self.emit_ea(ea, true);
        self.emit_pending(pre, ea.bits);
        self.asm.mov(H::R11, H::RCX);
        self.emit_kernel_distance(H::R11);
        self.asm.lea(H::R11, M::base_index(H::RCX, H::R11));
        Some(M::base(H::R11, 0))
    }

    /// A run of pushes or pops by way of kernel mappings: gives the site that stands for all of them. Whichever faults, the run is carried out
    /// again one by one: stores below the stack pointer and loads may be repeated.
    pub(super) fn emit_kernel_run(&mut self, code: &[Instruction]) -> u32 {
        let bytes = 8 * code.len() as i32;
        let push = classify(code[0].code()) == Class::Push;
        let site = self.note_kernel_site(!push);
        self.emit_kernel_distance(H::GUEST_RSP);
        for (n, i) in code.iter().enumerate() {
            let Some((g, _)) = gpr_of(i.op0_register()) else { continue };
            let n = 8 * n as i32;
            let m = M { disp: if push { -8 - n } else { n }, ..M::base_index(H::RCX, H::GUEST_RSP) };
            if let (Home::Spilled(g), true) = (home(g), push) {
                self.asm.load(H::R11, M::gs(off::gpr(g)));
            }
            let at = self.asm.pos();
            self.fault_site(at, FaultKind::Window { site, borrowed: None });
            let a = &mut self.asm;
            match (home(g), push) {
                (Home::Host(h), true) => a.store(m, h),
                (Home::Host(h), false) => a.load(h, m),
                (Home::Spilled(_), true) => a.store(m, H::R11),
                (Home::Spilled(g), false) => {
                    a.load(H::R11, m);
                    a.store(M::gs(off::gpr(g)), H::R11);
                }
            }
        }
        self.asm.lea(H::GUEST_RSP, M::base(H::GUEST_RSP, if push { -bytes } else { bytes }));
        site
    }
}
