//! Privileged and mode-sensitive instructions other than control transfers: descriptor-table registers, TLB and cache
//! control, halt, interrupt flag, port I/O, descriptor inspection, segment bases and segment-register moves.
//!
//! Functions here leave RIP alone; `emulate` advances it once they have succeeded.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::descriptor::{self, Descriptor, is_null, sys};
use crate::ea;
use crate::mem::{self, Privilege};
use crate::mmu::is_canonical;
use crate::operand::{self, mask, reg, seg_of, set_reg};
use crate::state::{Seg, TableReg, cr0, cr4, rflags};
use crate::{BusOutcome, CpuState, Env, Exception, HypercallOutcome, Step, TlbFlush, control, far};

type Outcome = Result<Step, Exception>;

const GP0: Exception = Exception::GeneralProtection(0);

/// Carries out `i` if it is one of this module's.
pub(crate) fn emulate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Option<Outcome> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Mov => return move_segment(st, env, i),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => load_far_pointer(st, env, i),
        M::Lgdt => load_table(st, env, i).map(|t| {
            st.gdtr = t;
            Step::Resync
        }),
        M::Lidt => load_table(st, env, i).map(|t| {
            st.idtr = t;
            Step::Resync
        }),
        M::Sgdt => store_table(st, env, i, st.gdtr),
        M::Sidt => store_table(st, env, i, st.idtr),
        M::Lldt => load_system(st, env, i, descriptor::load_ldtr::<E>),
        M::Ltr => load_system(st, env, i, descriptor::load_tr::<E>),
        M::Sldt => store_system(st, env, i, st.ldtr.selector),
        M::Str => store_system(st, env, i, st.tr.selector),
        M::Lmsw => lmsw(st, env, i),
        M::Smsw => umip(st).and_then(|()| store_word(st, env, i, st.cr0)),
        M::Clts => privileged(st).and_then(|()| {
            let value = st.cr0 & !cr0::TS;
            control::write_cr0(st, env, value)
        }),
        M::Lar | M::Lsl => inspect(st, env, i),
        M::Verr | M::Verw => verify(st, env, i),
        M::Invlpg => invlpg(st, env, i),
        M::Invpcid => invpcid(st, env, i),
        M::Invd | M::Wbinvd | M::Wbnoinvd => privileged(st).map(|()| Step::Next),
        M::Hlt => privileged(st).map(|()| {
            st.halted = 1;
            Step::Halt
        }),
        M::Vmcall | M::Vmmcall => hypercall(st, env),
        M::Cli => iopl(st).map(|()| {
            st.rflags &= !rflags::IF;
            Step::Resync
        }),
        M::Sti => iopl(st).map(|()| {
            if st.rflags & rflags::IF == 0 {
                st.irq_shadow = 1;
            }
            st.rflags |= rflags::IF;
            Step::Resync
        }),
        M::Clac => alignment_flag(st, env, false),
        M::Stac => alignment_flag(st, env, true),
        M::In => port_in(st, env, i),
        M::Out => port_out(st, env, i),
        M::Swapgs => swapgs(st),
        M::Rdfsbase => read_base(st, i, Seg::Fs),
        M::Rdgsbase => read_base(st, i, Seg::Gs),
        M::Wrfsbase => write_base(st, i, Seg::Fs),
        M::Wrgsbase => write_base(st, i, Seg::Gs),
        _ => return None,
    })
}

/// VMCALL and VMMCALL: whichever the host CPU would have, both reach the hypervisor. What may call is the callee's business.
fn hypercall<E: Env + ?Sized>(st: &mut CpuState, env: &mut E) -> Outcome {
    match env.hypercall(st).ok_or(Exception::InvalidOpcode)? {
        HypercallOutcome::Done => Ok(Step::Next),
        HypercallOutcome::Resync => Ok(Step::Resync),
        HypercallOutcome::Halt => {
            st.halted = 1;
            Ok(Step::Halt)
        }
        HypercallOutcome::Stopping => {
            env.note_outcome(BusOutcome::Stopping);
            Ok(Step::Resync)
        }
    }
}

/// #GP(0) unless at CPL 0.
pub(crate) fn privileged(st: &CpuState) -> Result<(), Exception> {
    if st.cpl == 0 { Ok(()) } else { Err(GP0) }
}

/// #GP(0) unless CPL is within IOPL (virtual-8086 mode: IOPL 3).
fn iopl(st: &CpuState) -> Result<(), Exception> {
    let level = ((st.rflags & rflags::IOPL) >> 12) as u8;
    if !st.protected() || st.cpl <= level { Ok(()) } else { Err(GP0) }
}

/// #GP(0) when user-mode instruction prevention forbids SGDT, SIDT, SLDT, SMSW or STR.
fn umip(st: &CpuState) -> Result<(), Exception> {
    if st.cpl > 0 && st.cr4 & cr4::UMIP != 0 { Err(GP0) } else { Ok(()) }
}

/// #UD in real and virtual-8086 mode.
fn protected_only(st: &CpuState) -> Result<(), Exception> {
    if st.protected() && !st.v8086() { Ok(()) } else { Err(Exception::InvalidOpcode) }
}

/// What loading `seg` means for translated code: in 64-bit mode only FS and GS matter, and code reads their bases afresh.
fn after_load(st: &mut CpuState, seg: Seg) -> Step {
    if seg == Seg::Ss {
        st.irq_shadow = 1;
        return Step::Resync;
    }
    if st.code64() { Step::Next } else { Step::Resync }
}

/// MOV to and from segment registers; `None` for every other MOV.
fn move_segment<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Option<Outcome> {
    match i.code() {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            let selector = reg(st, i.op1_register());
            Some(store_word(st, env, i, selector))
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => Some(load_from_operand(st, env, i)),
        _ => control::emulate(st, env, i),
    }
}

fn load_from_operand<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let Some(seg) = seg_of(i.op0_register()).filter(|&s| s != Seg::Cs) else {
        return Err(Exception::InvalidOpcode);
    };
    let selector = operand::read(st, env, i, 1, 2)? as u16;
    descriptor::load_segment(st, env, seg, selector)?;
    Ok(after_load(st, seg))
}

/// POP of a segment register, its value popped by the caller.
pub(crate) fn load_popped<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, seg: Seg, selector: u16) -> Outcome {
    descriptor::load_segment(st, env, seg, selector)?;
    Ok(after_load(st, seg))
}

/// LDS, LES, LFS, LGS, LSS.
fn load_far_pointer<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let seg = match i.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lfs => Seg::Fs,
        Mnemonic::Lgs => Seg::Gs,
        _ => Seg::Ss,
    };
    let to = i.op0_register();
    let (selector, offset) = far::far_pointer(st, env, i, 1, to.size())?;
    descriptor::load_segment(st, env, seg, selector)?;
    set_reg(st, to, offset);
    // LSS sets stack pointer and segment together and needs no interrupt shadow.
    Ok(if st.code64() { Step::Next } else { Step::Resync })
}

/// Stores a 16-bit value in memory, or a value of the register's own width (SLDT, STR, SMSW, MOV from a segment register).
fn store_word<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, value: u64) -> Outcome {
    operand::write(st, env, i, 0, 2, value)?;
    Ok(Step::Next)
}

/// LGDT and LIDT: the new value.
fn load_table<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Result<TableReg, Exception> {
    privileged(st)?;
    let size = if matches!(i.code(), Code::Lgdt_m1664 | Code::Lidt_m1664) { 10 } else { 6 };
    let la = ea::linear(st, i, 0, size, false)?;
    let mut b = [0; 10];
    mem::read(st, env, la, &mut b[..size], Privilege::Current)?;
    let mut base = [0; 8];
    base.copy_from_slice(&b[2..]);
    let mut base = u64::from_le_bytes(base);
    if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if !is_canonical(base) {
        return Err(GP0);
    }
    Ok(TableReg { base, limit: u16::from_le_bytes([b[0], b[1]]) })
}

/// SGDT and SIDT.
fn store_table<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, table: TableReg) -> Outcome {
    umip(st)?;
    let size = if matches!(i.code(), Code::Sgdt_m1664 | Code::Sidt_m1664) { 10 } else { 6 };
    let mut b = [0; 10];
    b[..2].copy_from_slice(&table.limit.to_le_bytes());
    b[2..].copy_from_slice(&table.base.to_le_bytes());
    let la = ea::linear(st, i, 0, size, true)?;
    mem::write(st, env, la, &b[..size], Privilege::Current)?;
    Ok(Step::Next)
}

/// LLDT and LTR.
fn load_system<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    load: fn(&mut CpuState, &mut E, u16) -> Result<(), Exception>,
) -> Outcome {
    protected_only(st)?;
    privileged(st)?;
    let selector = operand::read(st, env, i, 0, 2)? as u16;
    load(st, env, selector)?;
    Ok(Step::Next)
}

/// SLDT and STR.
fn store_system<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, selector: u16) -> Outcome {
    protected_only(st)?;
    umip(st)?;
    store_word(st, env, i, u64::from(selector))
}

/// LMSW: the low four bits of CR0; PE can be set but not cleared.
fn lmsw<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    privileged(st)?;
    let value = operand::read(st, env, i, 0, 2)?;
    let bits = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let new = (st.cr0 & !bits) | (value & bits) | (st.cr0 & cr0::PE);
    control::write_cr0(st, env, new)
}

/// Reads the descriptor that LAR, LSL, VERR or VERW asks about, if it may be seen.
fn visible<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, selector: u16) -> Result<Option<Descriptor>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = descriptor::read(st, env, selector)? else { return Ok(None) };
    let outer = st.cpl.max((selector & 3) as u8);
    Ok((d.is_conforming() || d.dpl() >= outer).then_some(d))
}

fn set_zf(st: &mut CpuState, zf: bool) -> Outcome {
    st.rflags = (st.rflags & !rflags::ZF) | if zf { rflags::ZF } else { 0 };
    Ok(Step::Next)
}

/// LAR and LSL (SDM vol. 2, with the tables of valid system types).
fn inspect<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    protected_only(st)?;
    let selector = operand::read(st, env, i, 1, 2)? as u16;
    let Some(d) = visible(st, env, selector)? else { return set_zf(st, false) };
    let lar = i.mnemonic() == Mnemonic::Lar;
    let valid = d.is_segment()
        || match d.kind() {
            sys::LDT | sys::TSS | sys::TSS_BUSY => true,
            sys::CALL => lar,
            sys::TSS16 | sys::TSS16_BUSY => !st.long_mode(),
            sys::CALL16 | sys::TASK_GATE => lar && !st.long_mode(),
            _ => false,
        };
    if !valid {
        return set_zf(st, false);
    }
    let value = if lar { (d.raw >> 32) & 0x00ff_ff00 } else { u64::from(d.limit()) };
    set_reg(st, i.op0_register(), value);
    set_zf(st, true)
}

/// VERR and VERW.
fn verify<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    protected_only(st)?;
    let selector = operand::read(st, env, i, 0, 2)? as u16;
    let ok = match visible(st, env, selector)? {
        Some(d) if i.mnemonic() == Mnemonic::Verr => d.is_readable(),
        Some(d) => d.is_writable_data(),
        None => false,
    };
    set_zf(st, ok)
}

/// INVLPG: no segment or canonical fault; an address that is not canonical is a no-op.
fn invlpg<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    privileged(st)?;
    let seg = ea::operand_segment(st, i, 0);
    let offset = ea::effective(st, i, 0);
    let base = if st.code64() && !matches!(seg, Seg::Fs | Seg::Gs) { 0 } else { st.segment(seg).base };
    let mut la = base.wrapping_add(offset);
    if !st.code64() {
        la &= 0xffff_ffff;
    }
    if is_canonical(la) {
        env.flush_tlb(TlbFlush::Page(la));
    }
    Ok(Step::Resync)
}

/// INVPCID (SDM vol. 2). Type 3 drops more than it must: everything, global pages too.
fn invpcid<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let [_, ebx7, _, _] = env.cpuid().query(st, 7, 0);
    if ebx7 & (1 << 10) == 0 || !st.protected() {
        return Err(Exception::InvalidOpcode);
    }
    privileged(st)?;
    let kind = reg(st, i.op0_register());
    let la = ea::linear(st, i, 1, 16, false)?;
    let mut b = [0; 16];
    mem::read(st, env, la, &mut b, Privilege::Current)?;
    let b = u128::from_le_bytes(b);
    let (pcid, address) = (b as u64, (b >> 64) as u64);
    let pcid_ok = pcid >> 12 == 0 && (st.cr4 & cr4::PCIDE != 0 || pcid == 0);
    let flush = match kind {
        0 if pcid_ok && is_canonical(address) => TlbFlush::PcidPage(pcid as u16, address),
        1 if pcid_ok => TlbFlush::Pcid(pcid as u16),
        2 | 3 if pcid >> 12 == 0 => TlbFlush::All,
        _ => return Err(GP0),
    };
    env.flush_tlb(flush);
    Ok(Step::Resync)
}

/// STAC and CLAC.
fn alignment_flag<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, set: bool) -> Outcome {
    let [_, ebx7, _, _] = env.cpuid().query(st, 7, 0);
    if st.cpl != 0 || ebx7 & (1 << 20) == 0 {
        return Err(Exception::InvalidOpcode);
    }
    st.rflags = (st.rflags & !rflags::AC) | if set { rflags::AC } else { 0 };
    Ok(Step::Resync)
}

/// Whether the running program may access `size` bytes of I/O ports from `port` on (SDM vol. 1, section 19.5): by IOPL, or by the
/// permission bitmap of a 32- or 64-bit TSS. Fails with #GP(0), or with a page fault on the TSS.
pub fn check_io<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, port: u16, size: u8) -> Result<(), Exception> {
    if !st.protected() || (!st.v8086() && iopl(st).is_ok()) {
        return Ok(());
    }
    let limit = u64::from(st.tr.limit);
    let wide = st.tr.usable() && matches!(st.tr.attr & 0xf, 9 | 11);
    if !wide || limit < 103 {
        return Err(GP0);
    }
    let map = mem::read_u16(st, env, st.tr.base.wrapping_add(102), Privilege::Supervisor)?;
    let at = u64::from(map) + u64::from(port) / 8;
    // Two bytes are always read, so the map ends with a byte of ones.
    if at + 1 > limit {
        return Err(GP0);
    }
    let bits = mem::read_u16(st, env, st.tr.base.wrapping_add(at), Privilege::Supervisor)?;
    let wanted = (1_u16 << size) - 1;
    if (bits >> (port % 8)) & wanted != 0 { Err(GP0) } else { Ok(()) }
}

/// Port operand `op`: DX or an immediate byte.
fn port(st: &CpuState, i: &Instruction, op: u32) -> u16 {
    if i.op_kind(op) == OpKind::Register { reg(st, Register::DX) as u16 } else { u16::from(i.immediate8()) }
}

fn port_in<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let to = i.op0_register();
    let port = port(st, i, 1);
    check_io(st, env, port, to.size() as u8)?;
    let mut data = [0; 8];
    env.bus().pio_read(st.id, port, &mut data[..to.size()]);
    set_reg(st, to, u64::from_le_bytes(data));
    Ok(Step::Next)
}

fn port_out<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Outcome {
    let from = i.op1_register();
    let port = port(st, i, 0);
    check_io(st, env, port, from.size() as u8)?;
    let data = reg(st, from).to_le_bytes();
    let outcome = env.bus().pio_write(st.id, port, &data[..from.size()]);
    env.note_outcome(outcome);
    Ok(Step::Next)
}

fn swapgs(st: &mut CpuState) -> Outcome {
    if !st.code64() {
        return Err(Exception::InvalidOpcode);
    }
    privileged(st)?;
    std::mem::swap(&mut st.seg[Seg::Gs as usize].base, &mut st.kernel_gs_base);
    Ok(Step::Next)
}

fn base_access(st: &CpuState) -> Result<(), Exception> {
    if st.code64() && st.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(Exception::InvalidOpcode) }
}

fn read_base(st: &mut CpuState, i: &Instruction, seg: Seg) -> Outcome {
    base_access(st)?;
    set_reg(st, i.op0_register(), st.segment(seg).base);
    Ok(Step::Next)
}

fn write_base(st: &mut CpuState, i: &Instruction, seg: Seg) -> Outcome {
    base_access(st)?;
    let from = i.op0_register();
    let value = mask(reg(st, from), from.size());
    if !is_canonical(value) {
        return Err(GP0);
    }
    st.seg[seg as usize].base = value;
    Ok(Step::Next)
}

#[cfg(test)]
mod tests;
