//! Copied instructions: registers mapped to their homes, the memory operand redirected, everything else as it was.

use super::classify::{Unit, unit_of};
use super::memory::{Access, Ea, Loc, MemOp};
use super::{Pending, Translator, spilled};
use crate::asm::{Base, H, M};
use crate::block::FaultKind;
use crate::regs::{Home, Width, gpr_of, home, host_name};
use crate::state::off;
use iced_x86::{Code, EncodingKind, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};

/// Guest register numbers that an instruction names and that need a temporary, with what happens to them.
#[derive(Clone, Copy, Default)]
struct Temp {
    guest: usize,
    read: bool,
    write: bool,
}

/// Registers that may be borrowed for a moment, and guest registers they hold otherwise.
const LENDERS: [H; 8] = [H::RBX, H::RSI, H::RDI, H::RBP, H(8), H(12), H(13), H(14)];

impl Translator<'_> {
    /// Translates an instruction of class Copy.
    pub(crate) fn copy(&mut self, i: &Instruction, flags_live: bool) {
        if self.mode.is64() && stays_as_it_is(i) {
            let start = self.cur_delta() as usize;
            if let Some(bytes) = self.bytes.get(start..start + i.len()) {
                return self.asm.verbatim(bytes);
            }
        }
        let mut i = *i;
        canonical_form(&mut i);
        if !flags_live {
            shift_without_flags(&mut i);
        }
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
            let acc = self.access_of(&i, flags_live);
            self.emit_access(acc, MemOp::Guest(i));
        } else {
            self.emit_guest(&i, None);
        }
    }

    /// The access that an instruction's memory operand makes.
    pub(crate) fn access_of(&mut self, i: &Instruction, flags_live: bool) -> Access {
        let info = self.info.info_options(i, InstructionInfoOptions::NO_REGISTER_USAGE);
        let how = info.used_memory().first().map_or(OpAccess::Read, |m| m.access());
        let (read, write) = match how {
            OpAccess::Write | OpAccess::CondWrite => (false, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
            _ => (true, false),
        };
        let maskmov = matches!(
            i.mnemonic(),
            Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
        );
        let masked = maskmov || matches!(how, OpAccess::CondRead | OpAccess::CondWrite) || i.has_op_mask();
        let size = i.memory_size();
        let size = if i.is_broadcast() { size.element_size() } else { size.size() };
        let size = size.max(1) as u16;
        let align = required_alignment(i, size);
        Access { ea: Ea::of(i, self.mode), size, read, write, masked, align, flags_live }
    }

    /// Emits one guest instruction, its memory operand (if any) at `loc`.
    pub(crate) fn emit_guest(&mut self, i: &Instruction, loc: Option<Loc>) {
        if loc.is_none()
            && names_spilled(i)
            && let Some((there, g)) = self.in_place(i)
            && (overwrites(&there) || (self.asm.shadow() != u8::try_from(g).ok() && !changes(&there)))
        {
            return self.emit_guest(&there, Some(Loc::At(M::gs(off::gpr(g)))));
        }
        let mut out = *i;
        let high = (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register && gpr_of(i.op_register(n)).is_some_and(|(_, w)| w == Width::High8)
        });
        let implicit = implicit_rcx(i);
        // The guest's RCX must be in a register that can be CL or CH when the instruction insists on it.
        let mut real_rcx = implicit.0 || implicit.1;
        let mut temps = [Temp::default(); 4];
        let mut count = 0;
        let mut used = 0u16; // Host registers the instruction names, by number.
        let mut names_rcx = false;
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register {
                continue;
            }
            let Some((g, w)) = gpr_of(i.op_register(n)) else { continue };
            if g == 1 {
                names_rcx = true;
                if w == Width::High8 {
                    real_rcx = true;
                }
            }
            match home(g) {
                Home::Host(h) => used |= 1 << h.0,
                Home::Spilled(_) => {
                    if !temps[..count].iter().any(|t| t.guest == g) {
                        temps[count].guest = g;
                        count += 1;
                    }
                }
            }
        }
        used |= implicit_hosts(i);
        real_rcx |= high && names_rcx;
        // RSP's home needs REX, which a high-byte register forbids: MOVZX, MOVSX and CRC32 borrow a register then.
        let rsp_named = high && loc.is_none() && used & (1 << H::GUEST_RSP.0) != 0;
        let rsp_host =
            if rsp_named { [H::RBX, H::RDX, H::RAX].into_iter().find(|h| used & (1 << h.0) == 0) } else { None };
        let (mut rcx_read, mut rcx_write) = implicit;
        if count > 0 || (real_rcx && names_rcx) {
            let info = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
            for n in 0..i.op_count() {
                if i.op_kind(n) != OpKind::Register {
                    continue;
                }
                let Some((g, w)) = gpr_of(i.op_register(n)) else { continue };
                let (r, wr) = match info.op_access(n) {
                    OpAccess::Write => (!matches!(w, Width::B32 | Width::B64), true),
                    OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite => (true, true),
                    _ => (true, false),
                };
                if g == 1 {
                    rcx_read |= r;
                    rcx_write |= wr;
                }
                for t in &mut temps[..count] {
                    if t.guest == g {
                        t.read |= r;
                        t.write |= wr;
                    }
                }
            }
        }

        // Decide where the memory operand is and which scratch registers are left.
        let mut free = [Some(H::R11), Some(H::RCX)];
        let mut mem = M::base(H::RCX, 0);
        let mut rcx_host = H::RCX;
        let mut borrowed = None;
        match loc {
            None => {}
            Some(loc) if high => {
                // A high-byte register forbids REX, so the address must be in RCX alone.
                let m = loc.operand();
                if !matches!(loc, Loc::Rcx) {
                    self.asm.lea(H::RCX, M { seg: Base::Host, ..m });
                }
                mem = M { seg: m.seg, ..mem };
                free = [None, None];
                if real_rcx {
                    let lender = [H::RBX, H::RDX, H::RAX].into_iter().find(|h| used & (1 << h.0) == 0);
                    let Some(h) = lender else { unreachable!("two operands cannot name three registers") };
                    self.asm.store(M::gs(off::TMP + 8), h);
                    borrowed = Some(h);
                    rcx_host = h;
                }
            }
            Some(Loc::Indexed) if count == 0 && !real_rcx => mem = M::base_index(H::R11, H::RCX),
            Some(Loc::Indexed) => {
                self.asm.lea(H::R11, M::base_index(H::R11, H::RCX));
                mem = M::base(H::R11, 0);
                free[0] = None;
            }
            Some(Loc::Rcx) if real_rcx => {
                self.asm.mov(H::R11, H::RCX);
                mem = M::base(H::R11, 0);
                free[0] = None;
            }
            Some(Loc::Rcx) => free[1] = None,
            Some(Loc::At(m)) if real_rcx && m.names(H::RCX) => {
                self.asm.lea(H::R11, M { seg: Base::Host, ..m });
                mem = M { seg: m.seg, ..M::base(H::R11, 0) };
                free[0] = None;
            }
            Some(Loc::At(m)) => {
                mem = m;
                for f in &mut free {
                    *f = f.filter(|h| !m.names(*h));
                }
            }
        }
        if let Some(h) = rsp_host {
            self.asm.store(M::gs(off::TMP + 8), h);
            self.asm.mov(h, H::GUEST_RSP);
            borrowed = Some(h);
        }
        if real_rcx {
            if rcx_host == H::RCX {
                free[1] = None;
            }
            if rcx_read {
                self.asm.mov(rcx_host, H::GUEST_RCX);
            }
        }
        // What R11 holds already stays there.
        if let Some(k) = temps[..count].iter().position(|t| self.asm.shadow() == u8::try_from(t.guest).ok()) {
            temps.swap(0, k);
        }
        let mut place = [H::R11; 4];
        for k in 0..count {
            place[k] = match free.iter_mut().find_map(Option::take) {
                Some(h) => h,
                None => {
                    let lender = LENDERS.into_iter().find(|h| used & (1 << h.0) == 0);
                    let Some(h) = lender else { unreachable!("no instruction names all lenders") };
                    assert!(borrowed.is_none(), "an instruction needs at most one borrowed register");
                    self.asm.store(M::gs(off::TMP + 8), h);
                    borrowed = Some(h);
                    h
                }
            };
            if temps[k].read {
                self.asm.load(place[k], M::gs(off::gpr(temps[k].guest)));
            }
        }

        // Rewrite the operands.
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register => {
                    let Some((g, w)) = gpr_of(i.op_register(n)) else { continue };
                    let host = match home(g) {
                        _ if g == 1 && real_rcx => rcx_host,
                        Home::Host(H::GUEST_RSP) if rsp_host.is_some() => rsp_host.unwrap_or(H::GUEST_RSP),
                        Home::Host(h) => h,
                        Home::Spilled(_) => {
                            let k = temps[..count].iter().position(|t| t.guest == g).unwrap_or(0);
                            place[k]
                        }
                    };
                    out.set_op_register(n, host_name(host, w));
                }
                OpKind::Memory => {
                    set_operand(&mut out, mem);
                }
                _ => {}
            }
        }
        out.set_segment_prefix(mem.seg.register());
        let at = self.asm.pos();
        let shadow = self.asm.shadow();
        if let Err(e) = self.asm.guest(&out) {
            self.encode_failed(i, &e);
        }
        if (0..count).any(|k| place[k] == H::R11 && !temps[k].write) {
            self.asm.set_shadow(shadow);
        }
        if let (Some(site), Some(Loc::At(_))) = (self.window_site, loc) {
            self.fault_site(at, FaultKind::Window { site, borrowed: borrowed.map(|h| h.0) });
        } else if may_fault(i) && !matches!(loc, Some(Loc::At(_))) {
            // The vCPU's state is always there.
            self.fault_site(at, FaultKind::Guest { delta: self.cur_delta(), borrowed: borrowed.map(|h| h.0) });
        }

        for k in 0..count {
            if temps[k].write {
                self.asm.store(M::gs(off::gpr(temps[k].guest)), place[k]);
            }
        }
        if let Some(h) = rsp_host {
            match i.op0_register().size() {
                2 => self.asm.mov16(H::GUEST_RSP, h),
                _ => self.asm.mov32(H::GUEST_RSP, h),
            }
        } else if real_rcx && rcx_write {
            self.asm.mov(H::GUEST_RCX, rcx_host);
        }
        if let Some(h) = borrowed {
            self.asm.load(h, M::gs(off::TMP + 8));
        }
    }

    /// An instruction on registers with one that lives in memory as its memory operand.
    fn in_place(&mut self, i: &Instruction) -> Option<(Instruction, usize)> {
        let info = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        spilled::in_place(i, |n| info.op_access(n))
    }

    /// BT, BTS, BTR, BTC. With a register bit offset the operand may lie far from the address.
    pub(crate) fn bit_test(&mut self, i: &Instruction, flags_live: bool) {
        if i.op0_kind() != OpKind::Memory || i.op1_kind() != OpKind::Register {
            self.copy(i, flags_live);
            return;
        }
        let acc = self.access_of(i, true);
        let Some((g, w)) = gpr_of(i.op1_register()) else { return self.copy(i, flags_live) };
        self.emit_access_with(acc, Pending::BitOffset(g as u8, w), MemOp::Bit(*i));
    }

    /// The operation of a bit-string instruction once its address includes the bit offset.
    pub(crate) fn emit_bit_op(&mut self, i: &Instruction, loc: Loc) {
        let Some((g, w)) = gpr_of(i.op1_register()) else { return };
        let m = loc.operand();
        if !m.names(H::R11) || m.index.is_some() {
            self.asm.lea(H::R11, M { seg: Base::Host, ..m });
        }
        let m = M { seg: m.seg, ..M::base(H::R11, if m.names(H::R11) && m.index.is_none() { m.disp } else { 0 }) };
        let src = match home(g) {
            Home::Host(h) => h,
            Home::Spilled(n) => {
                self.asm.load(H::RCX, M::gs(off::gpr(n)));
                H::RCX
            }
        };
        let mask = match w {
            Width::B64 => off::MASK63,
            Width::B32 => off::MASK31,
            _ => off::MASK15,
        };
        self.asm.pext(H::RCX, src, M::gs(mask));
        let mut out = *i;
        out.set_op1_register(host_name(H::RCX, w));
        set_operand(&mut out, m);
        out.set_segment_prefix(m.seg.register());
        let at = self.asm.pos();
        if let Err(e) = self.asm.guest(&out) {
            self.encode_failed(i, &e);
        }
        let kind = match (self.window_site, loc) {
            (Some(site), Loc::At(_)) => FaultKind::Window { site, borrowed: None },
            _ => FaultKind::Guest { delta: self.cur_delta(), borrowed: None },
        };
        self.fault_site(at, kind);
    }
}

/// Gives an instruction its operand in host terms, but for the segment.
pub(super) fn set_operand(out: &mut Instruction, m: M) {
    out.set_memory_base(m.base.map_or(Register::None, |b| host_name(b, Width::B64)));
    out.set_memory_index(m.index.map_or(Register::None, |(x, _)| host_name(x, Width::B64)));
    out.set_memory_index_scale(m.index.map_or(1, |(_, s)| 1 << s));
    out.set_memory_displacement64(i64::from(m.disp) as u64);
    // Without a base register the encoding has 32 bits and no choice.
    let size = if m.base.is_none() {
        8
    } else if m.disp == 0 {
        0
    } else {
        1
    };
    out.set_memory_displ_size(size);
}

/// Rewrites forms that only 16- and 32-bit modes encode, or that cannot take a register address.
pub(super) fn canonical_form(i: &mut Instruction) {
    use Code as C;
    let code = match i.code() {
        C::Mov_AL_moffs8 => C::Mov_r8_rm8,
        C::Mov_AX_moffs16 => C::Mov_r16_rm16,
        C::Mov_EAX_moffs32 => C::Mov_r32_rm32,
        C::Mov_RAX_moffs64 => C::Mov_r64_rm64,
        C::Mov_moffs8_AL => C::Mov_rm8_r8,
        C::Mov_moffs16_AX => C::Mov_rm16_r16,
        C::Mov_moffs32_EAX => C::Mov_rm32_r32,
        C::Mov_moffs64_RAX => C::Mov_rm64_r64,
        C::Inc_r16 => C::Inc_rm16,
        C::Inc_r32 => C::Inc_rm32,
        C::Dec_r16 => C::Dec_rm16,
        C::Dec_r32 => C::Dec_rm32,
        C::Add_rm8_imm8_82 => C::Add_rm8_imm8,
        C::Or_rm8_imm8_82 => C::Or_rm8_imm8,
        C::Adc_rm8_imm8_82 => C::Adc_rm8_imm8,
        C::Sbb_rm8_imm8_82 => C::Sbb_rm8_imm8,
        C::And_rm8_imm8_82 => C::And_rm8_imm8,
        C::Sub_rm8_imm8_82 => C::Sub_rm8_imm8,
        C::Xor_rm8_imm8_82 => C::Xor_rm8_imm8,
        C::Cmp_rm8_imm8_82 => C::Cmp_rm8_imm8,
        // XCHG with the accumulator's short form would turn into NOP or name the wrong register class after mapping.
        C::Xchg_r16_AX => C::Xchg_rm16_r16,
        C::Xchg_r32_EAX => C::Xchg_rm32_r32,
        C::Xchg_r64_RAX => C::Xchg_rm64_r64,
        other => other,
    };
    i.set_code(code);
}

/// Turns a shift of a register by CL into one that leaves the flags alone, which takes a third of the work.
fn shift_without_flags(i: &mut Instruction) {
    use Code as C;
    let (code, count) = match i.code() {
        C::Shl_rm32_CL => (C::VEX_Shlx_r32_rm32_r32, Register::ECX),
        C::Shr_rm32_CL => (C::VEX_Shrx_r32_rm32_r32, Register::ECX),
        C::Sar_rm32_CL => (C::VEX_Sarx_r32_rm32_r32, Register::ECX),
        C::Shl_rm64_CL => (C::VEX_Shlx_r64_rm64_r64, Register::RCX),
        C::Shr_rm64_CL => (C::VEX_Shrx_r64_rm64_r64, Register::RCX),
        C::Sar_rm64_CL => (C::VEX_Sarx_r64_rm64_r64, Register::RCX),
        _ => return,
    };
    if i.op0_kind() != OpKind::Register {
        return;
    }
    let shifted = i.op0_register();
    i.set_code(code);
    i.set_op1_kind(OpKind::Register);
    i.set_op1_register(shifted);
    i.set_op2_kind(OpKind::Register);
    i.set_op2_register(count);
}

/// Whether an instruction writes its first operand without reading it, and has it in memory.
fn overwrites(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Memory && i.mnemonic() == Mnemonic::Mov
}

/// Whether an instruction reads its first operand and writes it, and has it in memory.
fn changes(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Memory && !matches!(i.mnemonic(), Mnemonic::Mov | Mnemonic::Cmp | Mnemonic::Test)
}

/// Whether an instruction names a register that lives in memory.
fn names_spilled(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register
            && gpr_of(i.op_register(n)).is_some_and(|(g, _)| matches!(home(g), Home::Spilled(_)))
    })
}

/// Whether RCX takes part without being named (or must be CL): (read, written).
pub(super) fn implicit_rcx(i: &Instruction) -> (bool, bool) {
    use Mnemonic as Mn;
    let last = i.op_count().wrapping_sub(1);
    match i.mnemonic() {
        Mn::Shl | Mn::Shr | Mn::Sar | Mn::Sal | Mn::Rol | Mn::Ror | Mn::Rcl | Mn::Rcr | Mn::Shld | Mn::Shrd
            if i.op_kind(last) == OpKind::Register && i.op_register(last) == Register::CL =>
        {
            // When the shifted operand is RCX itself its own access decides about the write.
            (true, false)
        }
        Mn::Cmpxchg8b | Mn::Cmpxchg16b => (true, false),
        Mn::Pcmpestri | Mn::Pcmpistri | Mn::Vpcmpestri | Mn::Vpcmpistri | Mn::Pcmpestri64 | Mn::Vpcmpestri64 => {
            (true, true)
        }
        _ => (false, false),
    }
}

/// Host registers that an instruction uses without naming them, as a bit set.
fn implicit_hosts(i: &Instruction) -> u16 {
    use Mnemonic as Mn;
    match i.mnemonic() {
        Mn::Mul | Mn::Imul | Mn::Div | Mn::Idiv | Mn::Cmpxchg | Mn::Mulx => 0b101,
        Mn::Cmpxchg8b | Mn::Cmpxchg16b => 0b1101,
        _ => 0,
    }
}

/// Alignment that an instruction's memory operand must have (SDM vol. 1, section 4.1.1 and table 14-22).
fn required_alignment(i: &Instruction, size: u16) -> u16 {
    use Mnemonic as Mn;
    let legacy = i.code().op_code().encoding() == EncodingKind::Legacy;
    match i.mnemonic() {
        Mn::Cmpxchg16b => 16,
        Mn::Movaps | Mn::Movapd | Mn::Movdqa | Mn::Movntps | Mn::Movntpd | Mn::Movntdq | Mn::Movntdqa => 16,
        Mn::Vmovaps
        | Mn::Vmovapd
        | Mn::Vmovdqa
        | Mn::Vmovdqa32
        | Mn::Vmovdqa64
        | Mn::Vmovntps
        | Mn::Vmovntpd
        | Mn::Vmovntdq
        | Mn::Vmovntdqa => size,
        Mn::Movups
        | Mn::Movupd
        | Mn::Movdqu
        | Mn::Lddqu
        | Mn::Pcmpestri
        | Mn::Pcmpestrm
        | Mn::Pcmpistri
        | Mn::Pcmpistrm
        | Mn::Pcmpestri64
        | Mn::Pcmpestrm64 => 0,
        _ if legacy && size == 16 && unit_of(i.code()) != Unit::Integer => 16,
        _ => 0,
    }
}

/// Whether 64-bit code can have an instruction as the guest wrote it: its operands are constants and registers that live where the guest has them, and
/// it cannot fault.
fn stays_as_it_is(i: &Instruction) -> bool {
    let in_place = |n: u32| match i.op_kind(n) {
        OpKind::Register => {
            gpr_of(i.op_register(n)).is_some_and(|(g, _)| matches!(home(g), Home::Host(h) if usize::from(h.0) == g))
        }
        OpKind::Immediate8 | OpKind::Immediate32 | OpKind::Immediate64 | OpKind::Immediate8to32 => true,
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => true,
        _ => false,
    };
    (0..i.op_count()).all(in_place)
        && !(i.has_rep_prefix() || i.has_repne_prefix() || i.has_lock_prefix())
        && i.segment_prefix() == Register::None
        && implicit_rcx(i) == (false, false)
        && !may_fault(i)
}

/// Whether the host CPU may raise an exception at a copied instruction. Integer instructions on registers cannot, but for
/// division; operands in memory can be misaligned.
pub(super) fn may_fault(i: &Instruction) -> bool {
    unit_of(i.code()) != Unit::Integer
        || matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
        || !plain_on_registers(i)
}

/// Whether an integer instruction on registers is one that every supported host has.
fn plain_on_registers(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    i.cpuid_features()
        .iter()
        .all(|f| matches!(f, F::INTEL8086 | F::INTEL186 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV))
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::DecoderOptions;

    #[test]
    fn shifts_by_cl_of_registers_have_a_form_without_flags() {
        let shifted = |bytes: &[u8]| {
            let mut i = iced_x86::Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
            shift_without_flags(&mut i);
            i
        };
        // shl r13, cl; sar ecx, cl
        let i = shifted(&[0x49, 0xd3, 0xe5]);
        assert_eq!((i.mnemonic(), i.op0_register(), i.op1_register()), (Mnemonic::Shlx, Register::R13, Register::R13));
        assert_eq!((i.op2_register(), i.op_count()), (Register::RCX, 3));
        assert_eq!(shifted(&[0xd3, 0xf9]).to_string(), "sarx ecx,ecx,ecx");
        // shl r13w, cl; shl qword [rax], cl; rol ecx, cl stay.
        for same in [&[0x66, 0x41, 0xd3, 0xe5][..], &[0x48, 0xd3, 0x20], &[0xd3, 0xc1]] {
            assert_ne!(shifted(same).op_count(), 3);
        }
    }
}
