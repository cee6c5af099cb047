//! Random operands for an instruction form, by the operand kinds of the instruction tables.

use crate::generate::Builder;
use crate::layout::{self, PAGE};
use iced_x86::{Code, EncodingKind, Instruction, OpCodeOperandKind as K, OpKind, Register, RoundingControl};

/// What an instruction's memory operand asks for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MemWish {
    /// Never across a cache line (locked accesses).
    pub(crate) aligned: bool,
    /// Within the plain writable pages.
    pub(crate) safe: bool,
}

impl Builder {
    /// An instruction of form `code` with random operands; `None` when this combination is not one.
    pub(crate) fn random_operands(&mut self, code: Code) -> Option<Instruction> {
        let info = code.op_code();
        let mut i = Instruction::default();
        i.set_code(code);
        let kinds = info.op_kinds();
        let evex = info.encoding() == EncodingKind::EVEX;
        let vectors = if evex { 32 } else { 16 };
        let or_mem = kinds.iter().any(|&k| is_or_mem(k));
        let use_mem = kinds.iter().any(|&k| is_mem(k)) || (or_mem && self.rng.percent(60));
        let lock = use_mem
            && info.can_use_lock_prefix()
            && kinds.first().is_some_and(|&k| is_mem(k) || is_or_mem(k))
            && self.rng.percent(20);
        let implicit_lock =
            matches!(code, Code::Xchg_rm8_r8 | Code::Xchg_rm16_r16 | Code::Xchg_rm32_r32 | Code::Xchg_rm64_r64);
        let wish = MemWish { aligned: lock || implicit_lock, safe: false };
        // One address size for the implied operands of string instructions.
        let narrow = self.rng.percent(8);
        let mut immediates = 0;
        for (n, &kind) in kinds.iter().enumerate() {
            let n = n as u32;
            if let Some(reg) = self.register(kind, vectors) {
                if is_or_mem(kind) && use_mem {
                    i.set_op_kind(n, OpKind::Memory);
                    self.memory(&mut i, wish);
                } else {
                    i.set_op_kind(n, OpKind::Register);
                    i.set_op_register(n, reg);
                }
                continue;
            }
            match kind {
                K::mem | K::mem_mib => {
                    i.set_op_kind(n, OpKind::Memory);
                    self.memory(&mut i, wish);
                }
                K::mem_offs => {
                    i.set_op_kind(n, OpKind::Memory);
                    i.set_memory_displacement64(self.target_address(wish));
                    i.set_memory_displ_size(8);
                }
                K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y | K::mem_vsib32z | K::mem_vsib64z => {
                    i.set_op_kind(n, OpKind::Memory);
                    self.vector_memory(&mut i, kind, evex)?;
                }
                K::seg_rSI => i.set_op_kind(n, if narrow { OpKind::MemorySegESI } else { OpKind::MemorySegRSI }),
                K::es_rDI => i.set_op_kind(n, if narrow { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI }),
                K::seg_rDI => i.set_op_kind(n, if narrow { OpKind::MemorySegEDI } else { OpKind::MemorySegRDI }),
                K::seg_rBX_al => {
                    i.set_op_kind(n, OpKind::Memory);
                    i.set_memory_base(if narrow { Register::EBX } else { Register::RBX });
                    i.set_memory_index(Register::AL);
                }
                _ => {
                    self.immediate(&mut i, n, kind, immediates)?;
                    immediates += 1;
                }
            }
        }
        if lock {
            i.set_has_lock_prefix(true);
        }
        if info.can_use_rep_prefix() && is_string(kinds) && self.rng.percent(60) {
            i.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix() && is_string(kinds) && self.rng.percent(40) {
            i.set_has_repne_prefix(true);
        }
        if is_string(kinds) && self.rng.percent(5) {
            i.set_segment_prefix(self.rng.pick(&[Register::FS, Register::GS]));
        }
        if evex {
            self.evex_extras(&mut i, use_mem);
        }
        Some(i)
    }

    fn evex_extras(&mut self, i: &mut Instruction, use_mem: bool) {
        let info = i.code().op_code();
        if info.can_use_op_mask_register() && (info.require_op_mask_register() || self.rng.percent(55)) {
            i.set_op_mask(Register::K1 + self.rng.below(7) as u32);
            let to_memory = i.op0_kind() == OpKind::Memory;
            if info.can_use_zeroing_masking() && !to_memory && self.rng.percent(40) {
                i.set_zeroing_masking(true);
            }
        }
        if use_mem {
            if info.can_broadcast() && self.rng.percent(35) {
                i.set_is_broadcast(true);
            }
        } else if info.can_use_rounding_control() && self.rng.percent(35) {
            i.set_rounding_control(self.rng.pick(&[
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ]));
        } else if info.can_suppress_all_exceptions() && self.rng.percent(35) {
            i.set_suppress_all_exceptions(true);
        }
    }

    /// A register for an operand kind, `None` for kinds that are not registers.
    fn register(&mut self, kind: K, vectors: u64) -> Option<Register> {
        let rng = &mut self.rng;
        // RSP now and then: a spoilt stack pointer ends most sequences early.
        let mut gpr = |first: Register| {
            let n = rng.below(16) as u32;
            let n = if n == 4 && rng.percent(70) { 3 } else { n };
            first + n
        };
        Some(match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => Register::AL + rng.below(20) as u32,
            K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => gpr(Register::AX),
            K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => gpr(Register::EAX),
            K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => gpr(Register::RAX),
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + rng.below(8) as u32,
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv => Register::XMM0 + rng.below(vectors) as u32,
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv => Register::YMM0 + rng.below(vectors) as u32,
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => Register::ZMM0 + rng.below(vectors) as u32,
            K::xmm_is4 | K::xmm_is5 => Register::XMM0 + rng.below(16) as u32,
            K::ymm_is4 | K::ymm_is5 => Register::YMM0 + rng.below(16) as u32,
            K::xmmp3_vvvv => Register::XMM0 + 4 * rng.below(vectors / 4) as u32,
            K::zmmp3_vvvv => Register::ZMM0 + 4 * rng.below(vectors / 4) as u32,
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => Register::K0 + rng.below(8) as u32,
            K::kp1_reg => Register::K0 + 2 * rng.below(4) as u32,
            K::seg_reg => Register::ES + rng.below(6) as u32,
            K::cr_reg => rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8]),
            K::dr_reg => Register::DR0 + rng.below(8) as u32,
            K::es => Register::ES,
            K::cs => Register::CS,
            K::ss => Register::SS,
            K::ds => Register::DS,
            K::fs => Register::FS,
            K::gs => Register::GS,
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + rng.below(8) as u32,
            _ => return None,
        })
    }

    fn immediate(&mut self, i: &mut Instruction, n: u32, kind: K, earlier: u32) -> Option<()> {
        let v = self.rng.interesting();
        match kind {
            K::imm8 if earlier > 0 => {
                i.set_op_kind(n, OpKind::Immediate8_2nd);
                i.set_immediate8_2nd(v as u8);
            }
            K::imm8 | K::imm4_m2z => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(if kind == K::imm8 { v as u8 } else { v as u8 & 3 });
            }
            K::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
            }
            K::imm8sex16 => {
                i.set_op_kind(n, OpKind::Immediate8to16);
                i.set_immediate8to16(i16::from(v as i8));
            }
            K::imm8sex32 => {
                i.set_op_kind(n, OpKind::Immediate8to32);
                i.set_immediate8to32(i32::from(v as i8));
            }
            K::imm8sex64 => {
                i.set_op_kind(n, OpKind::Immediate8to64);
                i.set_immediate8to64(i64::from(v as i8));
            }
            K::imm16 => {
                i.set_op_kind(n, OpKind::Immediate16);
                i.set_immediate16(v as u16);
            }
            K::imm32 => {
                i.set_op_kind(n, OpKind::Immediate32);
                i.set_immediate32(v as u32);
            }
            K::imm32sex64 => {
                i.set_op_kind(n, OpKind::Immediate32to64);
                i.set_immediate32to64(i64::from(v as i32));
            }
            K::imm64 => {
                i.set_op_kind(n, OpKind::Immediate64);
                i.set_immediate64(v);
            }
            K::br64_1 | K::br64_4 => i.set_op_kind(n, OpKind::NearBranch64),
            _ => return None,
        }
        Some(())
    }

    /// An address to access: mostly plain data, sometimes at an edge or where it faults.
    pub(crate) fn target_address(&mut self, wish: MemWish) -> u64 {
        let rng = &mut self.rng;
        let near = 1 + rng.below(70);
        let at = match if wish.safe { 0 } else { rng.below(100) } {
            0..=69 => {
                let at = rng.below(2 * PAGE - 0x200);
                layout::data() + if rng.percent(70) { at & !63 } else { at }
            }
            70..=77 => layout::data() + PAGE - near,
            78..=80 => layout::data_ro() - near,
            81..=84 => layout::data_ro() + rng.below(PAGE - 64),
            85..=86 => layout::data_ro() + PAGE - near,
            87..=88 => layout::data_ro() + PAGE + rng.below(PAGE),
            89..=90 => layout::data_island() - near,
            91 => layout::data_island() + PAGE - near,
            92..=93 => layout::data_island() + rng.below(PAGE - 64),
            94 => self.base + rng.below(64),
            95 => layout::data() - near,
            _ => layout::stack() + rng.below(layout::STACK_BYTES - 64),
        };
        if wish.aligned { at & !15 } else { at }
    }

    /// Sets a memory operand. Registers whose values are known are combined so that the chosen address comes out.
    pub(crate) fn memory(&mut self, i: &mut Instruction, wish: MemWish) {
        let target = self.target_address(wish);
        let style = if wish.safe { self.rng.below(70) } else { self.rng.below(100) };
        match style {
            0..=64 => {
                let Some(base) = self.known_pointer() else { return self.rip_relative(i, target) };
                self.based(i, base, target, false);
            }
            65..=72 => self.rip_relative(i, target),
            73..=78 => {
                // Absolute, 32 bits sign-extended.
                i.set_memory_displacement64(target);
                i.set_memory_displ_size(8);
            }
            79..=83 => {
                i.set_memory_base(Register::RSP);
                let d = self.rng.below(0x200);
                self.displacement(i, if wish.aligned { d & !15 } else { d });
            }
            84..=88 => {
                let Some(base) = self.known_pointer() else { return self.rip_relative(i, target) };
                self.based(i, base, target, true);
            }
            89..=93 => {
                // Through FS or GS, whose bases are known.
                let (seg, base) =
                    if self.rng.percent(50) { (Register::FS, self.fs_base) } else { (Register::GS, self.gs_base) };
                i.set_segment_prefix(seg);
                let Some(index) = self.known_register() else { return };
                let value = self.known[index].unwrap_or(0);
                i.set_memory_base(Register::RAX + index as u32);
                let d = target.wrapping_sub(base).wrapping_sub(value);
                self.displacement(i, if fits(d) { d } else { 0 });
            }
            94..=95 => {
                // A segment override without effect in 64-bit mode.
                i.set_segment_prefix(self.rng.pick(&[Register::ES, Register::CS, Register::SS, Register::DS]));
                let Some(base) = self.known_pointer() else { return };
                self.based(i, base, target, false);
            }
            _ if wish.aligned => self.rip_relative(i, target),
            _ => {
                // Whatever the registers hold: mostly a fault.
                i.set_memory_base(Register::RAX + self.rng.below(16) as u32);
                let index = self.rng.below(16) as u32;
                if index != 4 && self.rng.percent(50) {
                    i.set_memory_index(Register::RAX + index);
                    i.set_memory_index_scale(1 << self.rng.below(4));
                }
                let d = self.rng.next_u64() as i32 as i64 as u64;
                self.displacement(i, d);
            }
        }
    }

    fn rip_relative(&mut self, i: &mut Instruction, target: u64) {
        i.set_memory_base(Register::RIP);
        i.set_memory_displacement64(target);
        i.set_memory_displ_size(8);
    }

    /// `[base + index * scale + disp]` that gives `target`.
    fn based(&mut self, i: &mut Instruction, base: usize, target: u64, narrow: bool) {
        let first = if narrow { Register::EAX } else { Register::RAX };
        let mut sum = self.known[base].unwrap_or(0);
        i.set_memory_base(first + base as u32);
        if self.rng.percent(50)
            && let Some(index) = self.known_register()
            && index != 4
        {
            let scale = 1u64 << self.rng.below(4);
            let with = sum.wrapping_add(self.known[index].unwrap_or(0).wrapping_mul(scale));
            if fits(target.wrapping_sub(with)) {
                i.set_memory_index(first + index as u32);
                i.set_memory_index_scale(scale as u32);
                sum = with;
            }
        }
        let d = target.wrapping_sub(sum);
        if narrow {
            i.set_memory_displacement64(u64::from(d as u32));
            i.set_memory_displ_size(4);
        } else {
            self.displacement(i, if fits(d) { d } else { 0 });
        }
    }

    fn displacement(&mut self, i: &mut Instruction, d: u64) {
        i.set_memory_displacement64(d);
        i.set_memory_displ_size(if d == 0 && self.rng.percent(50) {
            0
        } else if self.rng.percent(50) {
            1
        } else {
            8
        });
    }

    /// A vector-indexed operand whose indices are mostly small: they are loaded just before.
    fn vector_memory(&mut self, i: &mut Instruction, kind: K, evex: bool) -> Option<()> {
        let n = self.rng.below(if evex { 32 } else { 16 }) as u32;
        let wide = matches!(kind, K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z);
        let (first, narrow_code, wide_code) = match (kind, evex) {
            (K::mem_vsib32x | K::mem_vsib64x, false) => {
                (Register::XMM0, Code::VEX_Vpmovzxbd_xmm_xmmm32, Code::VEX_Vpmovzxbq_xmm_xmmm16)
            }
            (K::mem_vsib32y | K::mem_vsib64y, false) => {
                (Register::YMM0, Code::VEX_Vpmovzxbd_ymm_xmmm64, Code::VEX_Vpmovzxbq_ymm_xmmm32)
            }
            (K::mem_vsib32x | K::mem_vsib64x, true) => {
                (Register::XMM0, Code::EVEX_Vpmovzxbd_xmm_k1z_xmmm32, Code::EVEX_Vpmovzxbq_xmm_k1z_xmmm16)
            }
            (K::mem_vsib32y | K::mem_vsib64y, true) => {
                (Register::YMM0, Code::EVEX_Vpmovzxbd_ymm_k1z_xmmm64, Code::EVEX_Vpmovzxbq_ymm_k1z_xmmm32)
            }
            _ => (Register::ZMM0, Code::EVEX_Vpmovzxbd_zmm_k1z_xmmm128, Code::EVEX_Vpmovzxbq_zmm_k1z_xmmm64),
        };
        if self.rng.percent(90) {
            let mut load = Instruction::default();
            load.set_code(if wide { wide_code } else { narrow_code });
            load.set_op0_kind(OpKind::Register);
            load.set_op0_register(first + n);
            load.set_op1_kind(OpKind::Memory);
            self.rip_relative(&mut load, layout::data() + (n as u64) * 64);
            self.push(load);
        }
        let base = self.known_pointer()?;
        i.set_memory_base(Register::RAX + base as u32);
        i.set_memory_index(first + n);
        i.set_memory_index_scale(1 << self.rng.below(4));
        let target = layout::data() + self.rng.below(PAGE);
        let d = target.wrapping_sub(self.known[base].unwrap_or(0));
        self.displacement(i, if fits(d) { d } else { 0 });
        Some(())
    }
}

/// Whether a displacement fits in 32 bits, sign-extended.
fn fits(d: u64) -> bool {
    d as i64 == i64::from(d as i32)
}

fn is_or_mem(k: K) -> bool {
    matches!(
        k,
        K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
    )
}

fn is_mem(k: K) -> bool {
    matches!(
        k,
        K::mem
            | K::mem_mib
            | K::mem_offs
            | K::mem_vsib32x
            | K::mem_vsib64x
            | K::mem_vsib32y
            | K::mem_vsib64y
            | K::mem_vsib32z
            | K::mem_vsib64z
    )
}

/// Whether an instruction with these operands is a string instruction.
pub(crate) fn is_string(kinds: &[K]) -> bool {
    kinds.iter().any(|k| matches!(k, K::seg_rSI | K::es_rDI))
}
