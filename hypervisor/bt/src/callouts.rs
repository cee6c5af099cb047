//! What translated code asks of Rust. Each function is called by the thunk of the same name with the guest's state stored.
#![allow(unsafe_code)] // Receives the engine as a raw pointer from the thunks.

use crate::block::{Action, Mode, NO_CALLOUT, Site};
use crate::dispatch::EXIT_RESYNC;
use crate::engine::Engine;
use crate::kernel::STRING_SHIFT;
use crate::profile::Cause;
use crate::softmmu::Resolved;
use crate::vcpu::Emulating;
use iced_x86::Mnemonic;
use paravane_cpu::cpuid::Vendor;
use paravane_cpu::mmu::{self, Access, AccessKind};
use paravane_cpu::state::cr0;
use paravane_cpu::{Exception, Reg, Step, emulate};

/// How a callout goes on: a value and bits.
#[repr(C)]
pub(crate) struct Back {
    value: u64,
    bits: u64,
}

impl Back {
    const LOAD_FPU: u64 = 1;
    const JUMP: u64 = 2;
    const LEAVE: u64 = 4;

    /// Go on in the block, with a value in RCX.
    fn resume(value: u64, simd: bool) -> Self {
        Self { value, bits: if simd { Self::LOAD_FPU } else { 0 } }
    }
}

impl Engine {
    /// Go on at `cpu.rip`, in translated code if nothing else is due.
    fn go(&mut self) -> Back {
        if !self.events_wait()
            && let Some(target) = self.next_block()
        {
            return Back { value: target, bits: Back::JUMP };
        }
        Back { value: EXIT_RESYNC, bits: Back::LEAVE }
    }

    fn raise_and_go(&mut self, exc: Exception, rip: u64) -> Back {
        self.raise(exc, rip);
        self.go()
    }
}

/// An access missed the soft TLB.
pub(crate) unsafe extern "sysv64" fn mem(e: *mut Engine, la: u64, site: u32) -> Back {
    // SAFETY: the thunk passes the engine that runs on this thread, and nothing else refers to it meanwhile.
    let e = unsafe { &mut *e };
    e.stats.tlb_misses += 1;
    finish_access(e, la, site)
}

/// An access in a mode with segmentation: `offset` within the site's segment.
pub(crate) unsafe extern "sysv64" fn seg_mem(e: *mut Engine, offset: u64, site: u32) -> Back {
    // SAFETY: as in `mem`.
    let e = unsafe { &mut *e };
    let s = e.tables.sites[site as usize];
    let rip = e.site_rip(&s);
    e.doing(Cause::Bounce, rip);
    match e.segment_address(&s, offset) {
        Ok(la) => match e.resolve_segmented(la, &s) {
            Ok(Some(p)) => Back::resume(p, s.simd),
            Ok(None) => e.again_alone(rip),
            Err(exc) => e.raise_and_go(exc, rip),
        },
        Err(exc) => e.raise_and_go(exc, rip),
    }
}

fn finish_access(e: &mut Engine, la: u64, site: u32) -> Back {
    let s = e.tables.sites[site as usize];
    let rip = e.site_rip(&s);
    e.doing(Cause::TlbMiss, rip);
    if e.lost_stack(s.block) {
        e.cpu().rip = rip;
        return e.go();
    }
    match e.resolve(la, &s) {
        Ok(Resolved::Filled) => {
            let at = e.tables.blocks[s.block as usize].placed.offset(s.retry);
            if let Some(g) = s.shadow {
                e.shared().r11 = e.cpu().gpr[usize::from(g)];
            }
            let simd = if s.simd { Back::LOAD_FPU } else { 0 };
            Back { value: e.code.address(at), bits: Back::JUMP | simd }
        }
        Ok(Resolved::Bounced(p)) => Back::resume(p, s.simd),
        Ok(Resolved::OwnCode) => e.again_alone(rip),
        Err(exc) => {
            // A pending x87 exception goes before anything about the operand (SDM vol. 1, section 8.7).
            let waiting = s.x87 && e.cpu().xsave.0[2] & 0x80 != 0;
            e.raise_and_go(if waiting { Exception::FpuError } else { exc }, rip)
        }
    }
}

impl Engine {
    /// Whether a block takes the stack pointer to be in the high window, and it is not.
    fn lost_stack(&mut self, block: u32) -> bool {
        self.tables.blocks[block as usize].key.mode.has(Mode::STACKED)
            && !self.window.high().contains(self.cpu().gpr[Reg::Rsp as usize])
    }

    /// The instruction at `rip` is about to overwrite its own block: run it in a block of its own.
    fn again_alone(&mut self, rip: u64) -> Back {
        self.cpu().rip = rip;
        match self.single_block() {
            Some(target) => Back { value: target, bits: Back::JUMP },
            None => self.go(),
        }
    }
}

/// The operand in the bounce buffer has been written: pass it on.
pub(crate) unsafe extern "sysv64" fn commit(e: *mut Engine, site: u32) -> Back {
    // SAFETY: as in `mem`.
    let e = unsafe { &mut *e };
    let s = e.tables.sites[site as usize];
    e.doing(Cause::Bounce, e.site_rip(&s));
    match e.commit_bounce() {
        Ok(()) => Back::resume(0, s.simd),
        Err(exc) => {
            let rip = e.site_rip(&s);
            e.raise_and_go(exc, rip)
        }
    }
}

/// Carry out one instruction.
pub(crate) unsafe extern "sysv64" fn emulate(e: *mut Engine, callout: u32) -> Back {
    // SAFETY: as in `mem`.
    let e = unsafe { &mut *e };
    let c = &e.tables.callouts[callout as usize];
    let (i, action, simd, ends) = (c.instr, c.action, c.simd, c.ends);
    let block = c.block as usize;
    e.doing(Cause::Emulate(i.mnemonic() as u16), i.ip());
    let mode = e.tables.blocks[block].key.mode;
    let stepping = mode.has(Mode::STEP);
    let st = e.cpu();
    match action {
        Action::Emulate | Action::StringAcross | Action::Branch => {}
        Action::Undefined => return e.raise_and_go(Exception::InvalidOpcode, i.ip()),
        Action::TooLong => return e.raise_and_go(Exception::GeneralProtection(0), i.ip()),
        Action::FpuOff => {
            let x87 = i.mnemonic() == Mnemonic::Wait;
            let exc = if x87 && st.cr0 & (cr0::MP | cr0::TS) != cr0::MP | cr0::TS {
                // FWAIT looks at MP and TS together (SDM vol. 3, table 2-2).
                st.rip = i.next_ip();
                return e.go();
            } else if st.cr0 & cr0::EM != 0 && !is_x87(&i) {
                Exception::InvalidOpcode
            } else {
                Exception::DeviceNotAvailable
            };
            return e.raise_and_go(exc, i.ip());
        }
        Action::StepDone => {
            // With a default instruction the target is in the state already.
            let rip = if i.len() == 0 { st.rip } else { i.ip() };
            return e.raise_and_go(Exception::Debug(1 << 14), rip);
        }
    }
    // Whatever kind of string it was: the next one starts anew.
    let faulted = std::mem::take(&mut e.string_fault);
    if mode.has(Mode::WINDOW) && e.string_in_window(&i) {
        // A page came into the windows: the instruction goes on by itself.
        st.rip = i.ip();
        return e.go();
    }
    if mode.has(Mode::MAPPED) && mode.view() as u32 == Mode::VIEW_SMAP && e.string_in_kernel(&i, block as u32)
        || action == Action::StringAcross && e.string_across(&i, block as u32, faulted)
    {
        st.rip = i.ip();
        return e.go();
    }
    e.stats.emulated += 1;
    e.emulated[i.mnemonic() as usize] += 1;
    match i.mnemonic() {
        Mnemonic::In | Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => e.stats.pio_reads += 1,
        Mnemonic::Out | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => e.stats.pio_writes += 1,
        _ => {}
    }
    if i.mnemonic() == Mnemonic::Pause {
        e.spun();
        st.rip = i.next_ip();
        return if e.events_wait() && !stepping {
            Back { value: EXIT_RESYNC, bits: Back::LEAVE }
        } else {
            Back::resume(0, simd)
        };
    }
    st.rip = i.ip();
    if i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg {
        e.be_alone();
    }
    let outcome = {
        let _own = Emulating::new(e.state);
        emulate::step(st, e, &i)
    };
    e.end_alone();
    match outcome {
        Ok(Step::Next) if !ends && (e.tables.blocks[block].live || mode.alone()) => {
            if e.events_wait() && !stepping {
                return Back { value: EXIT_RESYNC, bits: Back::LEAVE };
            }
            if e.lost_stack(block as u32) {
                return e.go();
            }
            Back::resume(0, simd)
        }
        Ok(Step::Next | Step::Resync) => {
            match i.mnemonic() {
                Mnemonic::Iretq => e.remember_iret(),
                Mnemonic::Lgdt => e.forget_iret(),
                _ => {}
            }
            let no_trap = matches!(
                i.mnemonic(),
                Mnemonic::Syscall
                    | Mnemonic::Sysenter
                    | Mnemonic::Int
                    | Mnemonic::Int1
                    | Mnemonic::Int3
                    | Mnemonic::Into
            );
            // A REP string instruction that paused has not completed an iteration boundary worth a trap of its own.
            if stepping && !no_trap {
                let rip = st.rip;
                return e.raise_and_go(Exception::Debug(1 << 14), rip);
            }
            if matches!(i.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall) {
                // It may have let interrupts through whose kick has come and gone.
                return Back { value: EXIT_RESYNC, bits: Back::LEAVE };
            }
            e.go()
        }
        Ok(Step::Halt) => {
            st.halted = 1;
            Back { value: EXIT_RESYNC, bits: Back::LEAVE }
        }
        Ok(Step::Stop(reason)) => {
            e.stop = Some(reason);
            Back { value: EXIT_RESYNC, bits: Back::LEAVE }
        }
        Err(exc) => {
            let rip = match exc {
                // Traps report the next instruction; `emulate` leaves RIP where the exception is to be reported.
                Exception::Breakpoint | Exception::Overflow | Exception::Debug(_) => st.rip,
                _ => i.ip(),
            };
            e.raise_and_go(exc, rip)
        }
    }
}

impl Engine {
    /// Brings the pages that a REP MOVS or REP STOS is at into the windows; false when there is nothing to bring.
    fn string_in_window(&mut self, i: &iced_x86::Instruction) -> bool {
        let Some(movs) = rep_moves(i) else { return false };
        let st = self.cpu();
        let (rsi, rdi) = (st.gpr[Reg::Rsi as usize], st.gpr[Reg::Rdi as usize]);
        (movs && self.map_in_window(rsi, false)) | self.map_in_window(rdi, true)
    }
}

impl Engine {
    /// The same for kernel mappings.
    fn string_in_kernel(&mut self, i: &iced_x86::Instruction, block: u32) -> bool {
        let Some(movs) = rep_moves(i) else { return false };
        let st = self.cpu();
        let (rsi, rdi, count) = (st.gpr[Reg::Rsi as usize], st.gpr[Reg::Rdi as usize], st.gpr[Reg::Rcx as usize]);
        // Long ones come to Rust in any case.
        let whole = count.wrapping_mul(i.memory_size().size() as u64) >= 4096;
        count >> STRING_SHIFT == 0 && self.map_string_for_kernel(movs.then_some(rsi), rdi, whole, i.ip(), block)
    }
}

impl Engine {
    /// Brings what a REP MOVS or REP STOS between the kernel and user memory is at to where translated code finds it: the page of the kernel's
    /// operand into its mapping, if the host's instruction has `faulted` there, or that of the user's into the soft TLB. False when neither helps.
    fn string_across(&mut self, i: &iced_x86::Instruction, block: u32, faulted: bool) -> bool {
        let Some(movs) = rep_moves(i) else { return false };
        let st = self.cpu();
        let (rsi, rdi, count) = (st.gpr[Reg::Rsi as usize], st.gpr[Reg::Rdi as usize], st.gpr[Reg::Rcx as usize]);
        let kernel = |la: u64| la >> 63 != 0;
        let one_of_each = !movs || kernel(rsi) != kernel(rdi);
        if count.wrapping_sub(1) >> STRING_SHIFT != 0 || !one_of_each || self.kernel.kept.contains_key(&i.ip()) {
            return false;
        }
        let (la, write) = if kernel(rdi) == faulted { (rdi, true) } else { (rsi, false) };
        if !movs && !write {
            return false;
        }
        if faulted {
            return self.map_operand_for_kernel(la, write, i.ip(), block);
        }
        // A device must not be asked for what is read again afterwards.
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let size = i.memory_size().size() as u16;
        let inside = la & 0xfff <= 4096 - u64::from(size);
        let ram = inside
            && mmu::walk(st, self, la, Access::current(st, kind))
                .is_ok_and(|t| self.ram.host(t.gpa & !0xfff, 4096).is_some());
        let site = Site { size, read: !write, write, ..Site::plain(block) };
        ram && matches!(self.resolve(la, &site), Ok(Resolved::Filled))
    }
}

/// Whether an instruction is REP MOVS (true) or REP STOS (false).
fn rep_moves(i: &iced_x86::Instruction) -> Option<bool> {
    use Mnemonic as M;
    let moves = match i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => true,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => false,
        _ => return None,
    };
    i.has_rep_prefix().then_some(moves)
}

fn is_x87(i: &iced_x86::Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    i.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

/// An indirect jump missed the jump cache; the target is in `cpu.rip`.
pub(crate) unsafe extern "sysv64" fn lookup(e: *mut Engine, branch: u32) -> Back {
    // SAFETY: as in `mem`.
    let e = unsafe { &mut *e };
    e.stats.lookup_callouts += 1;
    e.doing(Cause::IndirectMiss, e.cpu().rip);
    if let Some(back) = e.wild_branch(branch) {
        return back;
    }
    if branch != NO_CALLOUT {
        let block = e.tables.callouts[branch as usize].block as usize;
        if e.tables.blocks[block].key.mode.has(Mode::STEP) {
            let rip = e.cpu().rip;
            return e.raise_and_go(Exception::Debug(1 << 14), rip);
        }
    }
    e.go()
}

/// A jump found nothing in the jump cache; the target is in `cpu.rip`. `branch` is right if the target is not canonical, and may
/// be anything otherwise: only indirect branches can have such a target, and they say who they are.
pub(crate) unsafe extern "sysv64" fn missed(e: *mut Engine, branch: u32) -> Back {
    // SAFETY: as in `mem`.
    let e = unsafe { &mut *e };
    e.stats.lookup_callouts += 1;
    e.doing(Cause::IndirectMiss, e.cpu().rip);
    e.wild_branch(branch).unwrap_or_else(|| e.go())
}

impl Engine {
    /// A branch to an address that is not canonical, where the CPU raises that at the branch, before it has any effect: Intel's do, AMD's
    /// raise it at the target.
    fn wild_branch(&mut self, branch: u32) -> Option<Back> {
        let st = self.cpu();
        if !st.code64() || mmu::is_canonical(st.rip) || self.cpuid.vendor() == Vendor::Amd {
            return None;
        }
        let i = self.tables.callouts.get(branch as usize)?.instr;
        let rsp = &mut st.gpr[Reg::Rsp as usize];
        match i.mnemonic() {
            Mnemonic::Ret => {
                let extra = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
                *rsp = rsp.wrapping_sub(8 + extra);
            }
            Mnemonic::Call => *rsp = rsp.wrapping_add(8),
            _ => {}
        }
        Some(self.raise_and_go(Exception::GeneralProtection(0), i.ip()))
    }
}

/// A direct exit is taken for the first time, or cannot be linked.
pub(crate) unsafe extern "sysv64" fn chain(e: *mut Engine, exit: u32) -> Back {
    // SAFETY: as in `mem`.
    let e = unsafe { &mut *e };
    e.stats.chain_callouts += 1;
    let x = &e.tables.exits[exit as usize];
    e.doing(Cause::Chain, x.target_rip);
    e.variant = x.target_mode.0 & Mode::MIXED;
    e.cpu().rip = x.target_rip;
    let generation = e.stats.cache_flushes;
    e.direct = true;
    let back = e.go();
    (e.variant, e.direct) = (0, false);
    if back.bits == Back::JUMP && generation == e.stats.cache_flushes {
        e.link(exit, back.value);
    }
    back
}
