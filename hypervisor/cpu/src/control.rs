//! Control and debug registers (SDM vol. 3, sections 2.5 and 17.2): what may be written, and what each change invalidates.
//!
//! The order is always the same: check everything, flush what the change makes stale, then write the register.

use iced_x86::{Code, Instruction, Register};

use crate::cpuid::CpuidPolicy;
use crate::mmu::{self, PHYS_BITS};
use crate::operand::{reg, set_reg};
use crate::state::{Seg, Segment, cr0, cr4, efer};
use crate::{CpuState, Env, Exception, Step, TlbFlush};

type Outcome = Result<Step, Exception>;

const GP0: Exception = Exception::GeneralProtection(0);

/// Bits of CR0 that exist; the processor ignores writes to the others below bit 32.
pub(crate) const CR0_BITS: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

/// Bit 63 of a value for CR3: keep the cached translations of the PCID (SDM vol. 3, section 4.10.4.1).
const CR3_NO_FLUSH: u64 = 1 << 63;

/// DR7.GD: the next access to a debug register raises #DB.
const DR7_GD: u64 = 1 << 13;
/// DR6.BD: that it did.
const DR6_BD: u64 = 1 << 13;

/// Carries out MOV to and from control and debug registers; `None` for any other instruction.
pub(crate) fn emulate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Option<Outcome> {
    let (r0, r1) = (i.op0_register(), i.op1_register());
    Some(match i.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => read_cr(st, env, r0, r1.number()),
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => write_cr(st, env, r0.number(), reg(st, r1)),
        Code::Mov_r32_dr | Code::Mov_r64_dr => read_dr(st, r0, r1.number()),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => write_dr(st, r0.number(), reg(st, r1)),
        _ => return None,
    })
}

fn privileged(st: &CpuState) -> Result<(), Exception> {
    if st.cpl == 0 { Ok(()) } else { Err(GP0) }
}

fn cr_exists(number: usize) -> Result<(), Exception> {
    if matches!(number, 0 | 2 | 3 | 4 | 8) { Ok(()) } else { Err(Exception::InvalidOpcode) }
}

fn read_cr<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, to: Register, number: usize) -> Outcome {
    cr_exists(number)?;
    privileged(st)?;
    let value = match number {
        0 => st.cr0,
        2 => st.cr2,
        3 => st.cr3,
        4 => st.cr4,
        _ => u64::from(env.bus().cr8_read(st.id)),
    };
    set_reg(st, to, value);
    Ok(Step::Next)
}

fn write_cr<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, number: usize, value: u64) -> Outcome {
    cr_exists(number)?;
    privileged(st)?;
    match number {
        0 => write_cr0(st, env, value),
        2 => {
            st.cr2 = value;
            Ok(Step::Next)
        }
        3 => write_cr3(st, env, value),
        4 => write_cr4(st, env, value),
        _ => {
            if value > 15 {
                return Err(GP0);
            }
            env.bus().cr8_write(st.id, value as u8);
            Ok(Step::Resync)
        }
    }
}

/// MOV to CR0, with the entry to and the exit from IA-32e mode (SDM vol. 3, section 9.8.5).
pub(crate) fn write_cr0<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, value: u64) -> Outcome {
    let cs_long = st.seg[Seg::Cs as usize].attr & Segment::L != 0;
    if value >> 32 != 0 {
        return Err(GP0);
    }
    let new = (value & CR0_BITS) | cr0::ET;
    if new & cr0::PG != 0 && new & cr0::PE == 0 || new & cr0::NW != 0 && new & cr0::CD == 0 {
        return Err(GP0);
    }
    let changed = new ^ st.cr0;
    let mut lma = st.efer & efer::LMA;
    if changed & cr0::PG != 0 {
        if new & cr0::PG != 0 {
            if st.efer & efer::LME != 0 {
                if st.cr4 & cr4::PAE == 0 || cs_long || st.tr.attr & 0xd == 1 {
                    return Err(GP0);
                }
                lma = efer::LMA;
            } else if st.cr4 & cr4::PAE != 0 {
                check_pdptes(env, st.cr3)?;
            }
        } else {
            if st.code64() || st.cr4 & cr4::PCIDE != 0 {
                return Err(GP0);
            }
            lma = 0;
        }
    }
    if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        env.flush_tlb(TlbFlush::All);
    }
    st.cr0 = new;
    st.efer = (st.efer & !efer::LMA) | lma;
    Ok(Step::Resync)
}

/// MOV to CR3, as an instruction or at a hypervisor's hands. #GP(0) if the value is not allowed.
pub fn write_cr3<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, value: u64) -> Outcome {
    let mut flush = TlbFlush::NonGlobal;
    let mut value = value;
    if st.long_mode() {
        if st.cr4 & cr4::PCIDE != 0 && value & CR3_NO_FLUSH != 0 {
            value &= !CR3_NO_FLUSH;
            flush = TlbFlush::SwitchPcid;
        }
        if value >> PHYS_BITS != 0 {
            return Err(GP0);
        }
    } else {
        value &= 0xffff_ffff;
        if st.cr0 & cr0::PG != 0 && st.cr4 & cr4::PAE != 0 {
            check_pdptes(env, value)?;
        }
    }
    // The engine needs the new PCID to know what "current" means.
    st.cr3 = value;
    env.flush_tlb(flush);
    Ok(Step::Resync)
}

/// #GP(0) when one of the four PAE page-directory pointers that CR3 would load has a reserved bit set (SDM vol. 3, section 4.4.1).
fn check_pdptes<E: Env + ?Sized>(env: &mut E, cr3: u64) -> Result<(), Exception> {
    for n in 0..4 {
        let entry = env.read_pte((cr3 & 0xffff_ffe0) + n * 8, 8).unwrap_or(u64::MAX);
        if !mmu::pdpte_valid(entry) {
            return Err(GP0);
        }
    }
    Ok(())
}

/// The CR4 bits that a guest may set: the always offered ones and those that CPUID announces.
pub(crate) fn cr4_bits(cpuid: &CpuidPolicy) -> u64 {
    let [_, _, ecx1, edx1] = cpuid.fixed(1, 0);
    let [_, ebx7, ecx7, _] = cpuid.fixed(7, 0);
    let offered = [
        (edx1, 2, cr4::DE),
        (edx1, 3, cr4::PSE),
        (edx1, 4, cr4::TSD),
        (edx1, 6, cr4::PAE),
        (edx1, 7, cr4::MCE),
        (edx1, 13, cr4::PGE),
        (edx1, 24, cr4::OSFXSR),
        (edx1, 25, cr4::OSXMMEXCPT),
        (ecx1, 17, cr4::PCIDE),
        (ecx1, 26, cr4::OSXSAVE),
        (ebx7, 0, cr4::FSGSBASE),
        (ebx7, 7, cr4::SMEP),
        (ebx7, 20, cr4::SMAP),
        (ecx7, 2, cr4::UMIP),
    ];
    offered.iter().filter(|(word, bit, _)| word >> bit & 1 != 0).fold(cr4::PCE, |bits, (_, _, cr4)| bits | cr4)
}

/// MOV to CR4.
fn write_cr4<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, value: u64) -> Outcome {
    if value & !cr4_bits(env.cpuid()) != 0 {
        return Err(GP0);
    }
    let changed = value ^ st.cr4;
    if st.long_mode() && value & cr4::PAE == 0 {
        return Err(GP0);
    }
    if changed & value & cr4::PCIDE != 0 && (!st.long_mode() || st.cr3 & 0xfff != 0) {
        return Err(GP0);
    }
    let paging = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
    let pae_active = value & cr4::PAE != 0 && st.cr0 & cr0::PG != 0 && !st.long_mode();
    if pae_active && changed & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0 {
        check_pdptes(env, st.cr3)?;
    }
    if changed & paging != 0 {
        env.flush_tlb(TlbFlush::All);
    }
    st.cr4 = value;
    Ok(Step::Resync)
}

/// Common checks of a debug-register access; gives the register that `number` names (DR4 and DR5 are DR6 and DR7 unless CR4.DE).
fn debug_register(st: &CpuState, number: usize) -> Result<usize, Exception> {
    let number = match number {
        4 | 5 if st.cr4 & cr4::DE != 0 => return Err(Exception::InvalidOpcode),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(Exception::InvalidOpcode),
    };
    privileged(st)?;
    if st.dr[7] & DR7_GD != 0 {
        return Err(Exception::Debug(DR6_BD));
    }
    Ok(number)
}

fn read_dr(st: &mut CpuState, to: Register, number: usize) -> Outcome {
    let number = debug_register(st, number)?;
    set_reg(st, to, st.dr[number]);
    Ok(Step::Next)
}

fn write_dr(st: &mut CpuState, number: usize, value: u64) -> Outcome {
    let number = debug_register(st, number)?;
    st.dr[number] = match number {
        6 | 7 if value >> 32 != 0 => return Err(GP0),
        // Reserved bits read as SDM vol. 3, figure 17-1 has them; RTM is not offered.
        6 => (value & 0xe00f) | 0xffff_0ff0,
        7 => (value & 0xffff_23ff) | 0x400,
        _ => value,
    };
    Ok(Step::Resync)
}
