//! Gathers and scatters (SDM vol. 2, VGATHERDPS and neighbours): one memory access per active element, lowest first.
//!
//! Each finished element clears its mask bit. When an element faults, what was done before stays done and the mask says what is
//! left, so that the instruction can simply be run again.

use iced_x86::{EncodingKind, Instruction, Mnemonic, Register};

use crate::mem::{self, Privilege};
use crate::operand::read_linear;
use crate::simd::{get64, opmask, set_opmask, set_zmm, zmm};
use crate::state::{cr0, cr4};
use crate::{CpuState, Env, Exception, Step, ea};

/// Index and data element sizes in bytes, and whether it is a scatter.
fn shape(m: Mnemonic) -> Option<(usize, usize, bool)> {
    use Mnemonic as M;
    Some(match m {
        M::Vgatherdps | M::Vpgatherdd => (4, 4, false),
        M::Vgatherdpd | M::Vpgatherdq => (4, 8, false),
        M::Vgatherqps | M::Vpgatherqd => (8, 4, false),
        M::Vgatherqpd | M::Vpgatherqq => (8, 8, false),
        M::Vscatterdps | M::Vpscatterdd => (4, 4, true),
        M::Vscatterdpd | M::Vpscatterdq => (4, 8, true),
        M::Vscatterqps | M::Vpscatterqd => (8, 4, true),
        M::Vscatterqpd | M::Vpscatterqq => (8, 8, true),
        _ => return None,
    })
}

/// #UD unless the guest has enabled the registers that `i` uses, #NM if CR0.TS.
fn available(st: &CpuState, i: &Instruction) -> Result<(), Exception> {
    let needed = if i.encoding() == EncodingKind::EVEX { 0xe6 } else { 6 };
    if st.cr4 & cr4::OSXSAVE == 0 || st.xcr0 & needed != needed {
        return Err(Exception::InvalidOpcode);
    }
    if st.cr0 & cr0::TS != 0 { Err(Exception::DeviceNotAvailable) } else { Ok(()) }
}

/// Where the mask of a gather or scatter is.
#[derive(Clone, Copy)]
enum Mask {
    /// An opmask register, one bit per element.
    Opmask(usize),
    /// A vector register, the sign bit of each element.
    Vector(usize),
}

/// Carries out `i` if it is a gather or a scatter.
pub(crate) fn emulate<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
) -> Option<Result<Step, Exception>> {
    let (index_bytes, data_bytes, scatter) = shape(i.mnemonic())?;
    Some(available(st, i).and_then(|()| elements(st, env, i, index_bytes, data_bytes, scatter)))
}

fn elements<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    index_bytes: usize,
    data_bytes: usize,
    scatter: bool,
) -> Result<Step, Exception> {
    let (mem_op, data_op) = if scatter { (0, 1) } else { (1, 0) };
    let (data_reg, index_reg) = (i.op_register(data_op), i.memory_index());
    let mask = match i.op_mask() {
        Register::None => Mask::Vector(i.op2_register().number() & 31),
        k => Mask::Opmask(k.number() & 7),
    };
    check_registers(data_reg, index_reg, mask, scatter)?;
    let n = (index_reg.size() / index_bytes).min(data_reg.size() / data_bytes);
    let indices = zmm(st, index_reg.number() & 31);
    let mut data = zmm(st, data_reg.number() & 31);
    let mut active = active_bits(st, mask, n, data_bytes);
    let base = ea::effective(st, i, mem_op);
    let bits = ea::address_bits(i, mem_op);
    let seg = ea::operand_segment(st, i, mem_op);
    let scale = u64::from(i.memory_index_scale());
    if !scatter {
        data[n * data_bytes..].fill(0);
    }
    let mut fault = None;
    for e in 0..n {
        if active & (1 << e) == 0 {
            continue;
        }
        let index =
            if index_bytes == 8 { get64(&indices, 8 * e) } else { i64::from(le32(&indices, 4 * e) as i32) as u64 };
        let offset = ea::truncate(base.wrapping_add(index.wrapping_mul(scale)), bits);
        let slot = e * data_bytes..(e + 1) * data_bytes;
        let done = ea::segmented(st, seg, offset, data_bytes, scatter).and_then(|la| {
            if scatter {
                mem::write(st, env, la, &data[slot], Privilege::Current)
            } else {
                let value = read_linear(st, env, la, data_bytes)?;
                data[slot].copy_from_slice(&value.to_le_bytes()[..data_bytes]);
                Ok(())
            }
        });
        if let Err(e) = done {
            fault = Some(e);
            break;
        }
        active &= !(1 << e);
    }
    if !scatter {
        set_zmm(st, data_reg.number() & 31, &data);
    }
    match mask {
        Mask::Opmask(k) => set_opmask(st, k, active),
        Mask::Vector(v) => {
            // Done elements have a zero mask, the others keep theirs; what lies above the vector is cleared.
            let mut m = zmm(st, v);
            for e in (0..64 / data_bytes).filter(|&e| active & (1 << e) == 0) {
                m[e * data_bytes..(e + 1) * data_bytes].fill(0);
            }
            set_zmm(st, v, &m);
        }
    }
    fault.map_or(Ok(Step::Next), Err)
}

fn le32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The register combinations that raise #UD.
fn check_registers(data: Register, index: Register, mask: Mask, scatter: bool) -> Result<(), Exception> {
    let (d, x) = (data.number(), index.number());
    let bad = !data.is_vector_register()
        || !index.is_vector_register()
        || match mask {
            Mask::Opmask(k) => k == 0 || (!scatter && d == x),
            Mask::Vector(m) => scatter || d == x || d == m || x == m,
        };
    if bad { Err(Exception::InvalidOpcode) } else { Ok(()) }
}

fn active_bits(st: &CpuState, mask: Mask, n: usize, data_bytes: usize) -> u64 {
    match mask {
        Mask::Opmask(k) => opmask(st, k) & ((1 << n) - 1),
        Mask::Vector(v) => sign_bits(&zmm(st, v), n, data_bytes),
    }
}

/// Bit `e` is the top bit of element `e`.
pub(crate) fn sign_bits(v: &[u8; 64], n: usize, bytes: usize) -> u64 {
    (0..n).fold(0, |bits, e| bits | u64::from(v[(e + 1) * bytes - 1] >> 7) << e)
}

#[cfg(test)]
mod tests;
