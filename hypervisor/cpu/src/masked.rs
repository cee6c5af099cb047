//! Which bytes of a memory operand a masked instruction really touches.
//!
//! Masked-off elements do not fault (SDM vol. 2, section 2.7, exception classes E2 to E6 and E11; VMASKMOV; MASKMOVDQU). The
//! translator reads or writes the whole operand when it can; only when that fails does it come here to learn which
//! faults count. Instructions that have a mask but no fault suppression (the "NF" classes: shuffles, packs, shifts by a vector count)
//! touch all their bytes, so for them the answer is `None`.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::gather::sign_bits;
use crate::simd::{in_use, materialise, opmask, set_in_use, zmm};
use crate::{CpuState, Env, Exception, Reg, Step, ea, mem};

/// The bytes that an instruction accesses of its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskedAccess {
    /// Size of the whole operand in bytes, at most 64.
    pub size: usize,
    /// Bit `n` is set if byte `n` of the operand is accessed.
    pub bytes: u64,
    /// The operand is written (and not read).
    pub write: bool,
}

/// The bytes of its memory operand that `i` accesses now; `None` when it has no mask, or its mask does not suppress faults.
pub fn active_bytes(st: &CpuState, i: &Instruction) -> Option<MaskedAccess> {
    legacy(st, i).or_else(|| evex(st, i))
}

/// Whether `i` is a store under a vector mask or an opmask.
pub fn is_masked_store(i: &Instruction) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq => true,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => i.op0_kind() == OpKind::Memory,
        _ => i.has_op_mask() && i.op0_kind() == OpKind::Memory,
    }
}

/// Sets `element` bytes for each set bit of the low `n` bits of `active`.
fn spread(active: u64, n: usize, element: usize) -> u64 {
    let unit = low_bits(element);
    (0..n).filter(|e| active >> e & 1 != 0).fold(0, |b, e| b | unit << (e * element))
}

fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// VMASKMOV, VPMASKMOV, MASKMOVDQU and MASKMOVQ: the mask is the sign bits of a vector.
fn legacy(st: &CpuState, i: &Instruction) -> Option<MaskedAccess> {
    use Mnemonic as M;
    let element = match i.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq => 1,
        _ => return None,
    };
    let write = i.op0_kind() != OpKind::Register;
    let mask = if element == 1 { i.op2_register() } else { i.op1_register() };
    let (value, size) = if i.mnemonic() == M::Maskmovq {
        (mmx(st, mask.number()), 8)
    } else {
        (zmm(st, mask.number() & 31), mask.size())
    };
    let n = size / element;
    Some(MaskedAccess { size, bytes: spread(sign_bits(&value, n, element), n, element), write })
}

/// MMX register `n` as the low bytes of a vector: physical x87 register `n`, stored relative to TOP.
fn mmx(st: &CpuState, n: usize) -> [u8; 64] {
    let mut v = [0; 64];
    if in_use(st) & 1 != 0 {
        let top = usize::from(st.xsave.0[3] >> 3 & 7);
        let at = 32 + 16 * ((n + 8 - top) & 7);
        v[..8].copy_from_slice(&st.xsave.0[at..at + 8]);
    }
    v
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: bytes of a register to `[rdi]` where the mask says so.
pub(crate) fn emulate<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
) -> Option<Result<Step, Exception>> {
    use Mnemonic as M;
    let mmx_form = match i.mnemonic() {
        M::Maskmovq => true,
        M::Maskmovdqu | M::Vmaskmovdqu => false,
        _ => return None,
    };
    let active = active_bytes(st, i)?;
    let from = i.op1_register();
    let value = if mmx_form { mmx(st, from.number()) } else { zmm(st, from.number() & 31) };
    let address = |st: &CpuState, n: u64| {
        let offset = ea::truncate(st.gpr[Reg::Rdi as usize], ea::address_bits(i, 0)).wrapping_add(n);
        ea::segmented(st, ea::operand_segment(st, i, 0), offset, 1, true)
    };
    let chosen = |n: &u64| active.bytes >> n & 1 != 0;
    let store = |st: &mut CpuState, env: &mut E| {
        // FSW.ES: an x87 exception waits, and MMX instructions report it.
        if mmx_form && st.xsave.0[2] & 0x80 != 0 {
            return Err(Exception::FpuError);
        }
        // Both pages are checked before the first byte is stored, whatever the mask says, on the host CPUs seen (SDM vol. 2, MASKMOVDQU, permits it).
        for n in [0, active.size as u64 - 1] {
            let at = address(st, n)?;
            mem::probe_write(st, env, at, 1, mem::Privilege::Current)?;
        }
        for n in (0..active.size as u64).filter(chosen) {
            let at = address(st, n)?;
            mem::write(st, env, at, &value[n as usize..n as usize + 1], mem::Privilege::Current)?;
        }
        if mmx_form {
            enter_mmx(st);
        }
        Ok(Step::Next)
    };
    Some(store(st, env))
}

/// What every MMX instruction does to the x87 state: TOP becomes 0 and all registers are valid (SDM vol. 1, section 9.5).
fn enter_mmx(st: &mut CpuState) {
    materialise(st, 0);
    set_in_use(st, 0, true);
    let top = usize::from(st.xsave.0[3] >> 3 & 7);
    // Rows are stored relative to TOP; the registers themselves stay where they are.
    let mut rows = [0; 128];
    for physical in 0..8 {
        let row = 32 + 16 * ((physical + 8 - top) & 7);
        rows[16 * physical..][..16].copy_from_slice(&st.xsave.0[row..row + 16]);
    }
    st.xsave.0[32..160].copy_from_slice(&rows);
    st.xsave.0[3] &= !0x38;
    st.xsave.0[4] = 0xff;
}

/// Instructions with an opmask whose memory operand is accessed whole whatever the mask says.
fn no_suppression(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Valignd
            | M::Valignq
            | M::Vdbpsadbw
            | M::Vextractf32x4
            | M::Vextractf32x8
            | M::Vextractf64x2
            | M::Vextractf64x4
            | M::Vextracti32x4
            | M::Vextracti32x8
            | M::Vextracti64x2
            | M::Vextracti64x4
            | M::Vgf2p8affineinvqb
            | M::Vgf2p8affineqb
            | M::Vinsertf32x4
            | M::Vinsertf32x8
            | M::Vinsertf64x2
            | M::Vinsertf64x4
            | M::Vinserti32x4
            | M::Vinserti32x8
            | M::Vinserti64x2
            | M::Vinserti64x4
            | M::Vmovddup
            | M::Vmovshdup
            | M::Vmovsldup
            | M::Vpackssdw
            | M::Vpacksswb
            | M::Vpackusdw
            | M::Vpackuswb
            | M::Vpalignr
            | M::Vpconflictd
            | M::Vpconflictq
            | M::Vpermb
            | M::Vpermd
            | M::Vpermi2b
            | M::Vpermi2d
            | M::Vpermi2pd
            | M::Vpermi2ps
            | M::Vpermi2q
            | M::Vpermi2w
            | M::Vpermilpd
            | M::Vpermilps
            | M::Vpermpd
            | M::Vpermps
            | M::Vpermq
            | M::Vpermt2b
            | M::Vpermt2d
            | M::Vpermt2pd
            | M::Vpermt2ps
            | M::Vpermt2q
            | M::Vpermt2w
            | M::Vpermw
            | M::Vpmaddubsw
            | M::Vpmaddwd
            | M::Vpmultishiftqb
            | M::Vpshufb
            | M::Vpshufd
            | M::Vpshufhw
            | M::Vpshuflw
            | M::Vpunpckhbw
            | M::Vpunpckhdq
            | M::Vpunpckhqdq
            | M::Vpunpckhwd
            | M::Vpunpcklbw
            | M::Vpunpckldq
            | M::Vpunpcklqdq
            | M::Vpunpcklwd
            | M::Vshuff32x4
            | M::Vshuff64x2
            | M::Vshufi32x4
            | M::Vshufi64x2
            | M::Vshufpd
            | M::Vshufps
            | M::Vunpckhpd
            | M::Vunpckhps
            | M::Vunpcklpd
            | M::Vunpcklps
            | M::Vcvtne2ps2bf16
    )
}

/// Shifts whose count may be a 128-bit memory operand, which is then read whole.
fn shift_by_count(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vpsllw | M::Vpslld | M::Vpsllq | M::Vpsrlw | M::Vpsrld | M::Vpsrlq | M::Vpsraw | M::Vpsrad | M::Vpsraq
    )
}

fn memory_operand(i: &Instruction) -> Option<u32> {
    (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)
}

/// Elements that an embedded broadcast stands for: the decoder's name of the memory size has the width they fill, in bits.
fn broadcast_elements(i: &Instruction, element: usize) -> usize {
    let name = format!("{:?}", i.memory_size());
    let digits: String = name.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse::<usize>().unwrap_or(512) / 8 / element.max(1)
}

/// AVX-512 instructions under an opmask.
fn evex(st: &CpuState, i: &Instruction) -> Option<MaskedAccess> {
    use Mnemonic as M;
    if i.op_mask() == Register::None || i.memory_index().is_vector_register() || no_suppression(i.mnemonic()) {
        return None;
    }
    let op = memory_operand(i)?;
    let shift_imm = i.op_count() == 3 && matches!(i.op_kind(2), OpKind::Immediate8);
    if shift_by_count(i.mnemonic()) && !shift_imm {
        return None;
    }
    let active = opmask(st, i.op_mask().number());
    let info = i.memory_size().info();
    let size = info.size().min(64);
    // Elements of the operand, as the mask counts them.
    let element = match i.mnemonic() {
        M::Vpmuldq | M::Vpmuludq => 8,
        M::Vpdpbusd | M::Vpdpbusds | M::Vpdpwssd | M::Vpdpwssds => 4,
        // A complex number of two halves.
        M::Vfmulcsh | M::Vfcmulcsh | M::Vfmaddcsh | M::Vfcmaddcsh => 4,
        _ => info.element_size(),
    }
    .clamp(1, size.max(1));
    let write = op == 0;
    if i.is_broadcast() {
        let n = broadcast_elements(i, element);
        let bytes = if active & low_bits(n) != 0 { low_bits(size) } else { 0 };
        return Some(MaskedAccess { size, bytes, write });
    }
    let n = size / element;
    let bytes = match i.mnemonic() {
        M::Vcompressps | M::Vpcompressd | M::Vexpandps | M::Vpexpandd => packed(active, size, 4),
        M::Vcompresspd | M::Vpcompressq | M::Vexpandpd | M::Vpexpandq => packed(active, size, 8),
        M::Vpcompressb | M::Vpexpandb => packed(active, size, 1),
        M::Vpcompressw | M::Vpexpandw => packed(active, size, 2),
        m if is_repeating(m) => {
            let lanes = i.op0_register().size() / element;
            let folded = (0..lanes).filter(|e| active >> e & 1 != 0).fold(0_u64, |b, e| b | 1 << (e % n));
            spread(folded, n, element)
        }
        _ => spread(active, n, element),
    };
    Some(MaskedAccess { size, bytes, write })
}

/// Compress and expand touch as many elements as there are active ones, from the bottom.
fn packed(active: u64, size: usize, element: usize) -> u64 {
    let n = (active & low_bits(size / element)).count_ones() as usize;
    low_bits(n * element)
}

/// Broadcasts of one element or a group of them to a whole vector.
fn is_repeating(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
            | M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
    )
}

#[cfg(test)]
mod host;
#[cfg(test)]
mod tests;
