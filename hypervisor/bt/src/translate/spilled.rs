//! Guest registers that live in memory, as operands of instructions on registers.
//!
//! Most such instructions have a form that reads the register where it is, or changes it there: no load before it, no store behind it, and no
//! scratch register.

use crate::regs::{Home, Width, gpr_of, home};
use iced_x86::{Code, Instruction, Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register};

/// Forms with register and memory operand exchanged, each way.
const MIRRORS: [(Code, Code); 18] = [
    (Code::Mov_rm32_r32, Code::Mov_r32_rm32),
    (Code::Mov_rm64_r64, Code::Mov_r64_rm64),
    (Code::Add_rm32_r32, Code::Add_r32_rm32),
    (Code::Add_rm64_r64, Code::Add_r64_rm64),
    (Code::Or_rm32_r32, Code::Or_r32_rm32),
    (Code::Or_rm64_r64, Code::Or_r64_rm64),
    (Code::Adc_rm32_r32, Code::Adc_r32_rm32),
    (Code::Adc_rm64_r64, Code::Adc_r64_rm64),
    (Code::Sbb_rm32_r32, Code::Sbb_r32_rm32),
    (Code::Sbb_rm64_r64, Code::Sbb_r64_rm64),
    (Code::And_rm32_r32, Code::And_r32_rm32),
    (Code::And_rm64_r64, Code::And_r64_rm64),
    (Code::Sub_rm32_r32, Code::Sub_r32_rm32),
    (Code::Sub_rm64_r64, Code::Sub_r64_rm64),
    (Code::Xor_rm32_r32, Code::Xor_r32_rm32),
    (Code::Xor_rm64_r64, Code::Xor_r64_rm64),
    (Code::Cmp_rm32_r32, Code::Cmp_r32_rm32),
    (Code::Cmp_rm64_r64, Code::Cmp_r64_rm64),
];

/// The same instruction with one register that lives in memory as its memory operand, and that register's number.
///
/// `access` tells what happens to an operand. Operands are read at any width; only 64 bits are written in place, for 32 clear the upper half, and
/// fewer would make the next read of the whole register wait for the store.
pub(super) fn in_place(i: &Instruction, access: impl Fn(u32) -> OpAccess) -> Option<(Instruction, usize)> {
    if !can_have_memory(i.mnemonic()) {
        return None;
    }
    let spilled = |n: u32| match (i.op_kind(n), gpr_of(i.op_register(n))) {
        (OpKind::Register, Some((g, w))) if matches!(home(g), Home::Spilled(_)) => Some((g, w)),
        _ => None,
    };
    let count = i.op_count();
    let all = 0..count;
    if all
        .clone()
        .any(|n| i.op_kind(n) == OpKind::Register && gpr_of(i.op_register(n)).is_some_and(|r| r.1 == Width::High8))
    {
        return None;
    }
    if let Some(zero) = compared_with_zero(i) {
        return spilled(0).map(|(g, _)| (zero, g));
    }
    for n in all.clone() {
        let Some((g, w)) = spilled(n) else { continue };
        if all.clone().any(|m| m != n && spilled(m).is_some_and(|s| s.0 == g)) {
            continue;
        }
        let reads = matches!(access(n), OpAccess::Read | OpAccess::CondRead);
        if !reads && w != Width::B64 {
            continue;
        }
        let mut out = *i;
        let mut at = n;
        if !may_be_memory(i.code(), n) {
            if count != 2 || i.op_kind(1 - n) != OpKind::Register {
                continue;
            }
            if i.mnemonic() == Mnemonic::Test {
                // It asks the same of both.
                out.set_op1_register(i.op0_register());
                at = 0;
            } else {
                // The other form names its operands in the same order.
                out.set_code(mirror(i.code())?);
            }
        }
        out.set_op_kind(at, OpKind::Memory);
        out.set_memory_base(Register::None);
        out.set_memory_index(Register::None);
        out.set_memory_displ_size(8);
        return Some((out, g));
    }
    None
}

/// Instructions that mean the same on memory, and cannot fault on registers. Shifts and rotations are none: OF, which is undefined behind most of
/// them, is not the same on memory as on registers.
fn can_have_memory(m: Mnemonic) -> bool {
    use Mnemonic as Mn;
    matches!(
        m,
        Mn::Mov
            | Mn::Add
            | Mn::Or
            | Mn::Adc
            | Mn::Sbb
            | Mn::And
            | Mn::Sub
            | Mn::Xor
            | Mn::Cmp
            | Mn::Test
            | Mn::Imul
            | Mn::Mul
            | Mn::Inc
            | Mn::Dec
            | Mn::Neg
            | Mn::Not
            | Mn::Movzx
            | Mn::Movsx
            | Mn::Movsxd
            | Mn::Cmova
            | Mn::Cmovae
            | Mn::Cmovb
            | Mn::Cmovbe
            | Mn::Cmove
            | Mn::Cmovg
            | Mn::Cmovge
            | Mn::Cmovl
            | Mn::Cmovle
            | Mn::Cmovne
            | Mn::Cmovno
            | Mn::Cmovnp
            | Mn::Cmovns
            | Mn::Cmovo
            | Mn::Cmovp
            | Mn::Cmovs
    )
}

/// `cmp r, 0` for `test r, r`: the flags are the same.
fn compared_with_zero(i: &Instruction) -> Option<Instruction> {
    let code = match i.code() {
        Code::Test_rm32_r32 => Code::Cmp_rm32_imm8,
        Code::Test_rm64_r64 => Code::Cmp_rm64_imm8,
        _ => return None,
    };
    if i.op0_register() != i.op1_register() {
        return None;
    }
    let mut out = *i;
    out.set_code(code);
    out.set_op0_kind(OpKind::Memory);
    out.set_memory_displ_size(8);
    out.set_op1_kind(if code == Code::Cmp_rm32_imm8 { OpKind::Immediate8to32 } else { OpKind::Immediate8to64 });
    out.set_immediate8(0);
    Some(out)
}

/// Whether an operand may be in a register or in memory.
fn may_be_memory(code: Code, n: u32) -> bool {
    use OpCodeOperandKind as K;
    matches!(code.op_code().op_kind(n), K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem)
}

fn mirror(code: Code) -> Option<Code> {
    MIRRORS.iter().find_map(|&(a, b)| match code {
        c if c == a => Some(b),
        c if c == b => Some(a),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Encoder, InstructionInfoFactory};

    /// The instruction with a register in place, as it is encoded with that at `gs:[0x48]`, and the register.
    fn placed(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
        let i = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&i);
        let (mut out, g) = in_place(&i, |n| info.op_access(n))?;
        out.set_segment_prefix(Register::GS);
        out.set_memory_displacement64(0x48);
        let mut encoder = Encoder::new(64);
        encoder.encode(&out, 0x1000).unwrap();
        Some((encoder.take_buffer(), g))
    }

    const AT: [u8; 6] = [0x04, 0x25, 0x48, 0, 0, 0];

    /// ModRM with `reg`, SIB and displacement behind these bytes.
    fn at(before: &[u8], reg: u8) -> Vec<u8> {
        let mut m = AT;
        m[0] |= reg << 3;
        [before, &m[..]].concat()
    }

    #[test]
    fn registers_in_memory_are_read_there_at_any_width() {
        // add rax, r9; cmp ebx, r10d; movzx ecx, r11b; cmp r9d, 7; imul rdx, r10; mov rsi, r11
        for (bytes, want, g) in [
            (&[0x4c, 0x01, 0xc8][..], at(&[0x65, 0x48, 0x03], 0), 9),
            (&[0x44, 0x39, 0xd3], at(&[0x65, 0x3b], 3), 10),
            (&[0x41, 0x0f, 0xb6, 0xcb], at(&[0x65, 0x0f, 0xb6], 1), 11),
            (&[0x41, 0x83, 0xf9, 7], [at(&[0x65, 0x83], 7), vec![7]].concat(), 9),
            (&[0x49, 0x0f, 0xaf, 0xd2], at(&[0x65, 0x48, 0x0f, 0xaf], 2), 10),
            (&[0x4c, 0x89, 0xde], at(&[0x65, 0x48, 0x8b], 6), 11),
        ] {
            assert_eq!(placed(bytes), Some((want, g)), "{bytes:x?}");
        }
        // test r9d, r9d asks what cmp r9d, 0 does; test r9, rax is the same either way round, and so is test rax, r9.
        assert_eq!(placed(&[0x45, 0x85, 0xc9]), Some(([at(&[0x65, 0x83], 7), vec![0]].concat(), 9)));
        for both in [&[0x49, 0x85, 0xc1], &[0x4c, 0x85, 0xc8]] {
            assert_eq!(placed(both), Some((at(&[0x65, 0x48, 0x85], 0), 9)));
        }
    }

    #[test]
    fn only_whole_registers_are_written_there() {
        // mov r9, rax; add r10, 1
        assert_eq!(placed(&[0x49, 0x89, 0xc1]), Some((at(&[0x65, 0x48, 0x89], 0), 9)));
        assert_eq!(placed(&[0x49, 0x83, 0xc2, 1]), Some(([at(&[0x65, 0x48, 0x83], 0), vec![1]].concat(), 10)));
        // Not: mov r9d, eax; inc r10d; mov r11b, 1; add r9, r9, which names it twice; mov ah, al; xchg r9, rax, which would lock; bt r9, rax, which would
        // reach beyond it; div r9, which may fault; rol r11, 47, whose OF would be another.
        for bytes in [
            &[0x41, 0x89, 0xc1][..],
            &[0x41, 0xff, 0xc2],
            &[0x41, 0xb3, 1],
            &[0x4d, 0x01, 0xc9],
            &[0x88, 0xc4],
            &[0x49, 0x87, 0xc1],
            &[0x49, 0x0f, 0xa3, 0xc1],
            &[0x49, 0xf7, 0xf1],
            &[0x49, 0xc1, 0xc3, 47],
        ] {
            assert_eq!(placed(bytes), None, "{bytes:x?}");
        }
    }
}
