//! SYSCALL, SYSRETQ and IRETQ to ring 3 without leaving translated code.
//!
//! Each has a short way for what 64-bit kernels do all the time and hands everything else to Rust, before anything has changed.
//! The modes on both sides are functions of the current one ([`Mode::kernel64`], [`Mode::user64`]); the target is found in the
//! other view's jump cache, provided that cache holds blocks of that very mode.

use super::Translator;
use crate::asm::{H, Label, M, cc};
use crate::block::{Action, Mode};
use crate::state::{FastSegments, Side, off};
use iced_x86::Instruction;
use paravane_cpu::state::rflags;
use std::mem::offset_of;

/// Flags that rule out the short ways: the state behind them would have another mode.
const SPECIAL: u64 = rflags::TF
    | rflags::NT
    | rflags::IOPL
    | rflags::RF
    | rflags::VM
    | rflags::AC
    | rflags::DF
    | rflags::VIF
    | rflags::VIP;

fn fast(field: usize) -> M {
    M::gs(off::STAR_FAST + field as i32)
}

impl Translator<'_> {
    /// Jumps to `slow` unless the jump cache of `mode`'s view holds blocks of `mode`. Clobbers flags and RCX.
    fn require_cache(&mut self, mode: Mode, slow: Label) {
        let at = M::gs(off::JC_MODE + 4 * mode.view() as i32);
        // Code comes in several forms; which one is wanted is in the word.
        let forms = if mode.has(Mode::USER) { Mode::WINDOW | Mode::STACKED } else { Mode::MAPPED };
        self.asm.load32(H::RCX, at);
        self.asm.and32_flags(H::RCX, !(forms as i32));
        self.asm.cmp32_imm_flags(H::RCX, mode.0 as i32);
        self.asm.jcc(cc::NE, slow);
    }

    /// Stores a flat segment whose second word is in `from`. Clobbers R11.
    fn load_segment(&mut self, seg: usize, from: M) {
        self.asm.load(H::R11, from);
        self.asm.store(M::gs(off::seg_word(seg)), H::R11);
        self.asm.store_simm32(M::gs(off::seg_base(seg)), 0);
    }

    /// Makes the flags in RCX current: the native ones in the host, the rest in the state. DF is clear, in them and in the host. Clobbers R11.
    fn load_flags(&mut self) {
        let a = &mut self.asm;
        let native = rflags::NATIVE as i32;
        a.mov32(H::R11, H::RCX);
        a.and32_flags(H::R11, !native);
        a.or32_flags(H::R11, rflags::FIXED as i32);
        a.store(M::gs(off::RFLAGS), H::R11);
        // POPF takes some twenty cycles, and all of the flags are status flags here. OF first: adding 0x7f to one overflows a byte. SAHF leaves it.
        a.store(M::gs(off::TMP + 8), H::RAX);
        a.mov32(H::RAX, H::RCX);
        a.mov32(H::R11, H::RCX);
        a.shr32_flags(H::R11, 11);
        a.and32_flags(H::R11, 1);
        a.add8_flags(H::R11, 0x7f);
        a.mov_ah_al();
        a.sahf();
        a.load(H::RAX, M::gs(off::TMP + 8));
    }

    pub(crate) fn syscall(&mut self, i: &Instruction) {
        let m = self.mode;
        let short = m.is64() && m.has(Mode::USER) && m.has(Mode::SCE) && !m.has(Mode::DF) && !m.alone();
        if !short {
            return self.callout(i, Action::Emulate);
        }
        let to = m.kernel64();
        let slow = self.asm.label();
        let a = &mut self.asm;
        // RCX = RFLAGS, complete; kept in a slot too, for the long way and for R11.
        a.pushfq();
        a.pop(H::RCX);
        a.and32_flags(H::RCX, rflags::NATIVE as i32);
        a.load(H::R11, M::gs(off::RFLAGS));
        a.lea(H::RCX, M::base_index(H::RCX, H::R11));
        a.store(M::gs(off::TMP + 16), H::RCX);
        self.require_cache(to, slow);
        let a = &mut self.asm;
        a.load(H::R11, M::gs(off::SFMASK));
        a.not(H::R11);
        a.and_mem_flags(H::R11, M::gs(off::TMP + 16));
        a.store(M::gs(off::TMP + 24), H::R11);
        a.and32_flags(H::R11, SPECIAL as i32);
        a.jcc(cc::NE, slow);
        a.load(H::R11, M::gs(off::TMP + 16));
        a.store(M::gs(off::gpr(11)), H::R11);
        a.mov_rip(H::GUEST_RCX, self.cur_next);
        self.load_segment(1, fast(offset_of!(FastSegments, syscall_cs)));
        self.load_segment(2, fast(offset_of!(FastSegments, syscall_ss)));
        let a = &mut self.asm;
        a.store_imm8(M::gs(off::CPL), 0);
        a.load32(H::RCX, M::gs(off::JC_MODE + 4 * to.view() as i32));
        a.store32(M::gs(off::MODE), H::RCX);
        a.load(H::RCX, M::gs(off::TMP + 24));
        self.load_flags();
        self.switch_side(Side::Kernel);
        self.asm.load(H::RCX, M::gs(off::LSTAR));
        self.jump_through_cache(to.view());
        self.asm.bind(slow);
        // The flags are clobbered: bring them back from the slot.
        let a = &mut self.asm;
        a.load(H::RCX, M::gs(off::TMP + 16));
        self.load_flags();
        self.callout(i, Action::Emulate);
    }

    /// Checks the flags in RCX for a return to ring 3: nothing special, and no interrupt waiting. Clobbers R11.
    fn check_return_flags(&mut self, slow: Label) {
        let a = &mut self.asm;
        a.mov32(H::R11, H::RCX);
        a.and32_flags(H::R11, SPECIAL as i32);
        a.jcc(cc::NE, slow);
        a.cmp32_mem_imm_flags(M::gs(off::IRQ_WINDOW), 0);
        a.jcc(cc::NE, slow);
    }

    /// Changes to the other side's stack of calls.
    fn switch_side(&mut self, to: Side) {
        let from = if to == Side::User { Side::Kernel } else { Side::User };
        self.asm.store(M::gs(off::side_rsp(from)), H::RSP);
        self.asm.load(H::RSP, M::gs(off::side_rsp(to)));
    }

    /// Goes to ring 3 at the RIP in RCX. Flags are the guest's already.
    fn enter_user(&mut self, to: Mode) {
        self.switch_side(Side::User);
        let a = &mut self.asm;
        a.store_imm8(M::gs(off::CPL), 3);
        a.load32(H::R11, M::gs(off::JC_MODE + 4 * to.view() as i32));
        a.store32(M::gs(off::MODE), H::R11);
        self.jump_through_cache(to.view());
    }

    /// Goes the long way if user code takes its stack pointer to be in the high window and it is not: the one in its home, or in
    /// the frame that `frame` points at. Clobbers R11 and flags.
    fn check_user_stack(&mut self, to: Mode, frame: Option<M>, slow: Label) {
        let a = &mut self.asm;
        let fine = a.label();
        a.load32(H::R11, M::gs(off::JC_MODE + 4 * to.view() as i32));
        a.and32_flags(H::R11, Mode::STACKED as i32);
        a.jcc(cc::E, fine);
        match frame {
            Some(frame) => {
                a.load(H::R11, frame);
                a.load(H::R11, M::base(H::R11, 24));
            }
            None => a.mov(H::R11, H::GUEST_RSP),
        }
        if self.known.upper_half() {
            a.shr_flags(H::R11, crate::window::HIGH_SHIFT);
            a.cmp_imm_flags(H::R11, 1);
        } else {
            a.andn_flags(H::R11, H::R11, M::gs(off::HIGH_MASK));
        }
        a.jcc(cc::NE, slow);
        a.bind(fine);
    }

    fn short_return(&self) -> bool {
        let m = self.mode;
        m.is64() && !m.has(Mode::RING) && m.has(Mode::PLAIN_IF) && !m.has(Mode::DF) && !m.alone()
    }

    pub(crate) fn sysretq(&mut self, i: &Instruction) {
        if !self.short_return() || !self.mode.has(Mode::SCE) {
            return self.callout(i, Action::Emulate);
        }
        let to = self.mode.user64();
        let slow = self.asm.label();
        self.asm.pushfq();
        self.asm.pop(H::RCX);
        self.asm.store(M::gs(off::TMP + 16), H::RCX);
        self.require_cache(to, slow);
        self.asm.load(H::RCX, M::gs(off::gpr(11)));
        self.check_return_flags(slow);
        let a = &mut self.asm;
        a.mov(H::R11, H::GUEST_RCX);
        a.shr_flags(H::R11, 47);
        a.jcc(cc::NE, slow);
        self.check_user_stack(to, None, slow);
        self.load_segment(1, fast(offset_of!(FastSegments, sysret_cs)));
        self.load_segment(2, fast(offset_of!(FastSegments, sysret_ss)));
        let a = &mut self.asm;
        a.load32(H::RCX, M::gs(off::gpr(11)));
        a.and32_flags(H::RCX, 0x3c_7fd7);
        self.load_flags();
        self.asm.mov(H::RCX, H::GUEST_RCX);
        self.enter_user(to);
        self.asm.bind(slow);
        self.reload_native_flags();
        self.callout(i, Action::Emulate);
    }

    /// Native flags from slot 2; the state's own share is untouched.
    fn reload_native_flags(&mut self) {
        let a = &mut self.asm;
        a.load(H::RCX, M::gs(off::TMP + 16));
        a.push(H::RCX);
        a.popfq();
    }

    /// IRETQ to 64-bit ring 3 with selectors that were returned to before.
    pub(crate) fn iretq(&mut self, i: &Instruction) {
        if !self.short_return() {
            return self.callout(i, Action::Emulate);
        }
        let to = self.mode.user64();
        let slow = self.asm.label();
        let a = &mut self.asm;
        a.pushfq();
        a.pop(H::RCX);
        a.store(M::gs(off::TMP + 16), H::RCX);
        self.require_cache(to, slow);
        // It serializes: what others changed and told of must be seen to (see `crate::dma`).
        self.asm.cmp32_mem_imm_flags(M::gs(off::REQUEST), 0);
        self.asm.jcc(cc::NE, slow);
        self.asm.mov(H::RCX, H::GUEST_RSP);
        self.emit_lookup(40, false, false, slow);
        let a = &mut self.asm;
        a.lea(H::R11, M::base_index(H::R11, H::RCX));
        a.store(M::gs(off::TMP + 24), H::R11);
        a.load16(H::RCX, M::base(H::R11, 8));
        a.cmp32_mem_flags(H::RCX, fast(offset_of!(FastSegments, iret_cs)));
        a.jcc(cc::NE, slow);
        a.load16(H::RCX, M::base(H::R11, 32));
        a.cmp32_mem_flags(H::RCX, fast(offset_of!(FastSegments, iret_ss)));
        a.jcc(cc::NE, slow);
        a.load(H::RCX, M::base(H::R11, 0));
        a.shr_flags(H::RCX, 47);
        a.jcc(cc::NE, slow);
        a.load(H::RCX, M::base(H::R11, 16));
        self.check_return_flags(slow);
        self.check_user_stack(to, Some(M::gs(off::TMP + 24)), slow);
        for (at, descriptor) in [
            (offset_of!(FastSegments, iret_cs_at), offset_of!(FastSegments, iret_cs_descriptor)),
            (offset_of!(FastSegments, iret_ss_at), offset_of!(FastSegments, iret_ss_descriptor)),
        ] {
            self.asm.load(H::RCX, fast(at));
            self.emit_lookup(8, false, false, slow);
            self.asm.load(H::RCX, M::base_index(H::R11, H::RCX));
            self.asm.cmp_mem_flags(H::RCX, fast(descriptor));
            self.asm.jcc(cc::NE, slow);
        }
        self.load_segment(1, fast(offset_of!(FastSegments, iret_cs_word)));
        self.load_segment(2, fast(offset_of!(FastSegments, iret_ss_word)));
        let a = &mut self.asm;
        a.store_imm8(M::gs(off::NMI_BLOCKED), 0);
        a.load(H::R11, M::gs(off::TMP + 24));
        a.load(H::RCX, M::base(H::R11, 0));
        a.store(M::gs(off::TMP), H::RCX);
        a.load(H::GUEST_RSP, M::base(H::R11, 24));
        a.load32(H::RCX, M::base(H::R11, 16));
        a.and32_flags(H::RCX, 0x3f_7fd7);
        self.load_flags();
        self.asm.load(H::RCX, M::gs(off::TMP));
        self.enter_user(to);
        self.asm.bind(slow);
        self.reload_native_flags();
        self.callout(i, Action::Emulate);
    }
}
