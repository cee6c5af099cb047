//! The rare and bulky user-level instructions, and the few privileged ones that only touch model-specific state.
//!
//! The translator turns nearly every instruction into host code. What is left for this module is what would be too
//! large or too seldom to be worth emitting: string instructions, CPUID, MSRs, XSAVE and its family, the memory forms
//! of the x87 environment, gathers and scatters, decimal arithmetic and the like. One function, [`emulate`], takes
//! the decoded instruction and carries it out on the vCPU's state.
//!
//! The contract: `i.ip()` is the vCPU's RIP. On success RIP has moved past the instruction (or stays on it, with the
//! progress kept in registers, when a repeated instruction gives way to interrupts). On an exception the state is as
//! before, save for the partial progress that the architecture defines for repeated strings and gathers.

use iced_x86::{Instruction, Mnemonic};

use crate::operand::{self, mask};
use crate::state::{cr0, cr4, rflags};
use crate::{CpuState, Env, Exception, Reg, Step, gather, masked, misc, msr, string, x87env, xsave};

/// Carries out `i`, or gives `None` when it is not one of this module's instructions.
pub fn emulate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Option<Result<Step, Exception>> {
    use Mnemonic as M;
    if string::is_string(i) {
        return Some(string::emulate(st, env, i)); // moves RIP itself
    }
    let done = match i.mnemonic() {
        M::Cpuid => cpuid(st, env),
        M::Rdmsr => rdmsr(st, env),
        M::Wrmsr => wrmsr(st, env),
        M::Rdtsc => rdtsc(st, env, false),
        M::Rdtscp => rdtsc(st, env, true),
        M::Rdpmc => Err(Exception::GeneralProtection(0)), // no counter exists
        M::Rdpid => {
            operand::set_reg(st, i.op0_register(), st.tsc_aux);
            Ok(Step::Next)
        }
        _ => xsave::emulate(st, env, i)
            .or_else(|| x87env::emulate(st, env, i))
            .or_else(|| misc::emulate(st, env, i))
            .or_else(|| masked::emulate(st, env, i))
            .or_else(|| gather::emulate(st, env, i))?,
    };
    if done.is_ok() {
        advance(st, i);
    }
    Some(done)
}

/// Moves RIP past `i`; it wraps at 64 KiB in 16-bit code and at 4 GiB in 32-bit code.
pub(crate) fn advance(st: &mut CpuState, i: &Instruction) {
    st.rip = match st.code_bits() {
        16 => i.next_ip() & 0xffff,
        32 => i.next_ip() & 0xffff_ffff,
        _ => i.next_ip(),
    };
}

/// EDX:EAX.
pub(crate) fn edx_eax(st: &CpuState) -> u64 {
    (st.gpr[Reg::Rdx as usize] << 32) | (st.gpr[Reg::Rax as usize] & 0xffff_ffff)
}

/// Sets EDX:EAX, upper halves cleared.
pub(crate) fn set_edx_eax(st: &mut CpuState, value: u64) {
    st.gpr[Reg::Rax as usize] = value & 0xffff_ffff;
    st.gpr[Reg::Rdx as usize] = value >> 32;
}

/// Replaces the flags in `mask` with those in `value`.
pub(crate) fn set_flags(st: &mut CpuState, mask: u64, value: u64) {
    st.rflags = (st.rflags & !mask) | (value & mask);
}

/// ZF, SF and PF of a result that is `bytes` wide.
pub(crate) fn zsp(value: u64, bytes: usize) -> u64 {
    let v = mask(value, bytes);
    let mut f = 0;
    if v == 0 {
        f |= rflags::ZF;
    }
    if v >> (bytes * 8 - 1) & 1 != 0 {
        f |= rflags::SF;
    }
    if (v as u8).count_ones().is_multiple_of(2) {
        f |= rflags::PF;
    }
    f
}

/// The flags that CMP of `a` with `b` leaves.
pub(crate) fn cmp_flags(a: u64, b: u64, bytes: usize) -> u64 {
    let r = a.wrapping_sub(b);
    let mut f = zsp(r, bytes);
    if mask(a, bytes) < mask(b, bytes) {
        f |= rflags::CF;
    }
    if (a ^ b ^ r) & 0x10 != 0 {
        f |= rflags::AF;
    }
    if ((a ^ b) & (a ^ r)) >> (bytes * 8 - 1) & 1 != 0 {
        f |= rflags::OF;
    }
    f
}

fn need_ring0(st: &CpuState) -> Result<(), Exception> {
    if st.cpl == 0 { Ok(()) } else { Err(Exception::GeneralProtection(0)) }
}

fn cpuid<E: Env + ?Sized>(st: &mut CpuState, env: &mut E) -> Result<Step, Exception> {
    let (leaf, subleaf) = (st.gpr[Reg::Rax as usize] as u32, st.gpr[Reg::Rcx as usize] as u32);
    let mut r = env.cpuid().query(st, leaf, subleaf);
    if leaf == 1 && env.bus().apic_msr_read(st.id, msr::nr::APIC_BASE).is_some_and(|base| base & (1 << 11) == 0) {
        r[3] &= !(1 << 9); // the APIC is globally disabled: it is as if it were not there (SDM vol. 3, section 11.4.3)
    }
    for (reg, value) in [Reg::Rax, Reg::Rbx, Reg::Rcx, Reg::Rdx].into_iter().zip(r) {
        st.gpr[reg as usize] = value.into();
    }
    Ok(Step::Next)
}

fn rdmsr<E: Env + ?Sized>(st: &mut CpuState, env: &mut E) -> Result<Step, Exception> {
    need_ring0(st)?;
    let value = msr::read(st, env, st.gpr[Reg::Rcx as usize] as u32)?;
    set_edx_eax(st, value);
    Ok(Step::Next)
}

fn wrmsr<E: Env + ?Sized>(st: &mut CpuState, env: &mut E) -> Result<Step, Exception> {
    need_ring0(st)?;
    msr::write(st, env, st.gpr[Reg::Rcx as usize] as u32, edx_eax(st))
}

fn rdtsc<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, with_aux: bool) -> Result<Step, Exception> {
    if st.cr4 & cr4::TSD != 0 && st.cr0 & cr0::PE != 0 && st.cpl != 0 {
        return Err(Exception::GeneralProtection(0));
    }
    let now = msr::guest_tsc(st, env);
    set_edx_eax(st, now);
    if with_aux {
        st.gpr[Reg::Rcx as usize] = st.tsc_aux & 0xffff_ffff;
    }
    Ok(Step::Next)
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat_env::{FlatEnv, run};

    #[test]
    fn privilege_and_timestamp_rules() {
        let (mut st, mut env) = FlatEnv::long_mode();
        assert_eq!(run(&mut st, &mut env, &[0x0f, 0x32]), Some(Err(Exception::GeneralProtection(0))));
        assert_eq!(run(&mut st, &mut env, &[0x0f, 0x33]), Some(Err(Exception::GeneralProtection(0))));
        assert_eq!(st.rip, 0x1000);
        (env.tsc, st.tsc_offset, st.tsc_aux) = (0x1_0000_0000, 5, 7);
        assert_eq!(run(&mut st, &mut env, &[0x0f, 0x01, 0xf9]), Some(Ok(Step::Next)));
        assert_eq!((st.gpr[0], st.gpr[2], st.gpr[1], st.rip), (5, 1, 7, 0x1003));
        st.cr4 |= cr4::TSD;
        assert_eq!(run(&mut st, &mut env, &[0x0f, 0x31]), Some(Err(Exception::GeneralProtection(0))));
        assert_eq!(run(&mut st, &mut env, &[0x90]), None);
    }

    #[test]
    fn cpuid_clears_upper_halves() {
        let (mut st, mut env) = FlatEnv::long_mode();
        st.gpr = [u64::MAX; 16];
        st.gpr[0] = 0xdead_0000_4000_0000;
        assert_eq!(run(&mut st, &mut env, &[0x0f, 0xa2]), Some(Ok(Step::Next)));
        assert_eq!(st.gpr[0], 0x4000_0010);
        assert_eq!(st.gpr[3], u64::from(u32::from_le_bytes(*b"Para")));
    }

    #[test]
    fn rip_wraps_with_the_code_size() {
        let (mut st, mut env) = FlatEnv::legacy(16);
        st.rip = 0xffff;
        assert!(run(&mut st, &mut env, &[0x0f, 0xa2]).unwrap().is_ok());
        assert_eq!(st.rip, 1);
    }
}
