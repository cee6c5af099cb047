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
        let at = if may_be_memory(i.code(), n) {
            n
        } else if count == 2 && i.op_kind(1 - n) == OpKind::Register {
            if i.mnemonic() == Mnemonic::Test {
                out.set_op1_register(i.op0_register());
            } else {
                out.set_code(mirror(i.code())?);
            }
            // TEST asks the same of both; the other forms name their operands in the same order as before.
            if i.mnemonic() == Mnemonic::Test { 0 } else { n }
        } else {
            continue;
        };
        out.set_op_kind(at, OpKind::Memory);
        out.set_memory_base(Register::None);
        out.set_memory_index(Register::None);
        out.set_memory_displ_size(8);
        return Some((out, g));
    }
    None
}

/// Instructions that mean the same on memory, and cannot fault on registers.
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
            | Mn::Shl
            | Mn::Shr
            | Mn::Sar
            | Mn::Rol
            | Mn::Ror
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
