//! RDMSR and WRMSR: the model-specific registers that a guest kernel may count on.
//!
//! Three kinds exist here. *Architectural* ones have an effect or keep their value in [`CpuState`]. *Local APIC* ones
//! (IA32_APIC_BASE, TSC deadline, x2APIC) belong to the machine and go to the bus. *Quiet* ones exist because stock
//! kernels touch them at boot without asking CPUID first: they read as a value that means "nothing to do" and ignore
//! writes. Everything else is #GP, which kernels probe with fixups.
//!
//! Numbers and layouts: SDM vol. 4; for 0xc001_xxxx the AMD APM vol. 2, appendix A.

use crate::cpuid::{ARCH_CAPABILITIES, Vendor};
use crate::state::{cr0, efer};
use crate::{CpuState, Env, Exception, Seg, Step, TlbFlush};

/// MSR numbers by their manual names.
#[allow(missing_docs)]
pub mod nr {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRRCAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const MISC_FEATURES_ENABLES: u32 = 0x140;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const PERF_STATUS: u32 = 0x198;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_PHYSBASE0: u32 = 0x200;
    pub const MTRR_PHYSMASK7: u32 = 0x20f;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K_80000: u32 = 0x258;
    pub const MTRR_FIX16K_A0000: u32 = 0x259;
    pub const MTRR_FIX4K_C0000: u32 = 0x268;
    pub const MTRR_FIX4K_F8000: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    /// MSRs that hypervisors define: the range that KVM uses.
    pub const HYPERVISOR_FIRST: u32 = 0x4b56_4d00;
    pub const HYPERVISOR_LAST: u32 = 0x4b56_4dff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const AMD_SYSCFG: u32 = 0xc001_0010;
    pub const AMD_HWCR: u32 = 0xc001_0015;
    pub const AMD_NB_CFG: u32 = 0xc001_001f;
    pub const AMD_DE_CFG: u32 = 0xc001_1029;
}

/// Number of variable-range MTRRs.
const MTRR_VARIABLE: u64 = 8;
/// EFER.AIBRSE, AMD's automatic IBRS (APM vol. 2, section 3.1.7): kept, without effect.
const EFER_AIBRSE: u64 = 1 << 21;
/// IA32_SPEC_CTRL: IBRS, STIBP, SSBD, BHI_DIS_S.
pub(crate) const SPEC_CTRL_BITS: u64 = 7 | 1 << 10;

fn gp<T>() -> Result<T, Exception> {
    Err(Exception::GeneralProtection(0))
}

fn canonical(value: u64) -> Result<u64, Exception> {
    if ((value << 16) as i64 >> 16) as u64 == value { Ok(value) } else { gp() }
}

/// The guest's TSC now.
pub fn guest_tsc<E: Env + ?Sized>(st: &CpuState, env: &E) -> u64 {
    env.host_tsc().wrapping_add(st.tsc_offset)
}

/// IA32_TSC_DEADLINE in terms of another TSC. Zero means "not armed" and stays; no armed one becomes zero.
pub fn shift_deadline(value: u64, offset: u64) -> u64 {
    if value == 0 { 0 } else { value.wrapping_add(offset).max(1) }
}

/// Index into `mtrr_fixed` of a fixed-range MTRR's number.
fn fixed_index(msr: u32) -> Option<usize> {
    match msr {
        nr::MTRR_FIX64K => Some(0),
        nr::MTRR_FIX16K_80000 | nr::MTRR_FIX16K_A0000 => Some((msr - nr::MTRR_FIX16K_80000 + 1) as usize),
        nr::MTRR_FIX4K_C0000..=nr::MTRR_FIX4K_F8000 => Some((msr - nr::MTRR_FIX4K_C0000 + 3) as usize),
        _ => None,
    }
}

/// MSRs of AMD CPUs that kernels read (and often write back with a bit changed) whenever the vendor is AMD.
fn quiet_amd(msr: u32) -> Option<u64> {
    match msr {
        nr::AMD_HWCR => Some(1 << 24),  // TSC counts at the P0 frequency
        nr::AMD_DE_CFG => Some(1 << 1), // LFENCE serialises
        // SYSCFG, IORRs, TOP_MEM, TOP_MEM2, NB_CFG; interrupt pending; MMIO_CONF_BASE; P-states; VM_CR; OSVW.
        nr::AMD_SYSCFG | 0xc001_0016..=0xc001_001a | 0xc001_001d | nr::AMD_NB_CFG => Some(0),
        0xc001_0055 | 0xc001_0058 | 0xc001_0061..=0xc001_006b | 0xc001_0114 | 0xc001_0140 | 0xc001_0141 => Some(0),
        // LS_CFG, IC_CFG, DC_CFG, FP_CFG, BU_CFG2 and neighbours: chicken bits.
        0xc001_1020..=0xc001_1023 | 0xc001_1028 | 0xc001_102a..=0xc001_102d | 0xc001_10e3 => Some(0),
        _ => None,
    }
}

/// Reads MSR `msr`. #GP(0) if it does not exist.
pub fn read<E: Env + ?Sized>(st: &CpuState, env: &E, msr: u32) -> Result<u64, Exception> {
    let vendor = env.cpuid().vendor();
    Ok(match msr {
        nr::TSC => guest_tsc(st, env),
        nr::APIC_BASE | nr::TSC_DEADLINE | nr::X2APIC_FIRST..=nr::X2APIC_LAST => {
            let value = env.bus().apic_msr_read(st.id, msr).ok_or(Exception::GeneralProtection(0))?;
            // The machine compares deadlines with the host's TSC.
            return Ok(if msr == nr::TSC_DEADLINE { shift_deadline(value, st.tsc_offset) } else { value });
        }
        nr::HYPERVISOR_FIRST..=nr::HYPERVISOR_LAST => {
            return env.bus().hypervisor_msr_read(st.id, msr).ok_or(Exception::GeneralProtection(0));
        }
        nr::TSC_ADJUST => st.tsc_adjust,
        nr::SPEC_CTRL => st.spec_ctrl,
        nr::BIOS_SIGN_ID if vendor == Vendor::Amd => 0x0100_0065,
        nr::BIOS_SIGN_ID => 0xffff_ffff << 32, // newer than anything a kernel has on a list of bad revisions
        nr::MTRRCAP => MTRR_VARIABLE | 1 << 8 | 1 << 10,
        nr::ARCH_CAPABILITIES if vendor == Vendor::Intel => ARCH_CAPABILITIES,
        nr::SYSENTER_CS => st.sysenter_cs,
        nr::SYSENTER_ESP => st.sysenter_esp,
        nr::SYSENTER_EIP => st.sysenter_eip,
        nr::MISC_ENABLE => st.misc_enable | 1 << 11 | 1 << 12, // no BTS, no PEBS
        nr::MTRR_PHYSBASE0..=nr::MTRR_PHYSMASK7 => {
            let (base, mask) = st.mtrr_var[((msr - nr::MTRR_PHYSBASE0) / 2) as usize];
            if msr & 1 == 0 { base } else { mask }
        }
        nr::PAT => st.pat,
        nr::MTRR_DEF_TYPE => st.mtrr_def_type,
        nr::EFER => st.efer,
        nr::STAR => st.star,
        nr::LSTAR => st.lstar,
        nr::CSTAR => st.cstar,
        nr::FMASK => st.sfmask,
        nr::FS_BASE => st.segment(Seg::Fs).base,
        nr::GS_BASE => st.segment(Seg::Gs).base,
        nr::KERNEL_GS_BASE => st.kernel_gs_base,
        nr::TSC_AUX => st.tsc_aux,
        nr::FEATURE_CONTROL => 1, // locked, with VMX off
        // No machine-check banks, no CPUID faulting, no last-branch records.
        nr::PLATFORM_ID | nr::PLATFORM_INFO | nr::MISC_FEATURES_ENABLES | nr::MCG_CAP | nr::MCG_STATUS => 0,
        nr::PERF_STATUS | nr::DEBUGCTL => 0,
        _ => match fixed_index(msr) {
            Some(i) => st.mtrr_fixed[i],
            None if vendor == Vendor::Amd => return quiet_amd(msr).ok_or(Exception::GeneralProtection(0)),
            None => return gp(),
        },
    })
}

/// Writes MSR `msr`. #GP(0) if it does not exist, is read-only, or the value is not allowed.
pub fn write<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, msr: u32, value: u64) -> Result<Step, Exception> {
    let vendor = env.cpuid().vendor();
    match msr {
        nr::TSC => {
            let delta = value.wrapping_sub(guest_tsc(st, env));
            st.tsc_offset = st.tsc_offset.wrapping_add(delta);
            st.tsc_adjust = st.tsc_adjust.wrapping_add(delta);
            env.bus().tsc_moved(st.id, st.tsc_offset);
        }
        nr::TSC_ADJUST => {
            st.tsc_offset = st.tsc_offset.wrapping_add(value.wrapping_sub(st.tsc_adjust));
            st.tsc_adjust = value;
            env.bus().tsc_moved(st.id, st.tsc_offset);
        }
        nr::APIC_BASE | nr::TSC_DEADLINE | nr::X2APIC_FIRST..=nr::X2APIC_LAST => {
            let value =
                if msr == nr::TSC_DEADLINE { shift_deadline(value, st.tsc_offset.wrapping_neg()) } else { value };
            let outcome = env.bus().apic_msr_write(st.id, msr, value).ok_or(Exception::GeneralProtection(0))?;
            env.note_outcome(outcome);
            return Ok(Step::Resync); // the APIC may have an interrupt for us now, or have moved
        }
        nr::HYPERVISOR_FIRST..=nr::HYPERVISOR_LAST => {
            let outcome = env.hypervisor_msr_write(st.id, msr, value).ok_or(Exception::GeneralProtection(0))?;
            env.note_outcome(outcome);
        }
        nr::SPEC_CTRL if value & !SPEC_CTRL_BITS == 0 => st.spec_ctrl = value,
        nr::PRED_CMD if value & !1 == 0 => {}
        nr::FLUSH_CMD if vendor == Vendor::Intel && value & !1 == 0 => {}
        nr::SYSENTER_CS => st.sysenter_cs = value & 0xffff_ffff,
        nr::SYSENTER_ESP => st.sysenter_esp = canonical(value)?,
        nr::SYSENTER_EIP => st.sysenter_eip = canonical(value)?,
        // Fast strings, limit CPUID, xTPR disable, XD disable: only the first two may change here.
        nr::MISC_ENABLE => st.misc_enable = value & (1 | 1 << 22),
        nr::MTRR_PHYSBASE0..=nr::MTRR_PHYSMASK7 => {
            let phys = env.cpuid().phys_bits();
            let pair = &mut st.mtrr_var[((msr - nr::MTRR_PHYSBASE0) / 2) as usize];
            match msr & 1 {
                0 if mtrr_base_valid(value, phys) => pair.0 = value,
                1 if mtrr_mask_valid(value, phys) => pair.1 = value,
                _ => return gp(),
            }
        }
        nr::PAT if pat_valid(value) => st.pat = value,
        nr::MTRR_DEF_TYPE if mtrr_def_type_valid(value) => st.mtrr_def_type = value,
        nr::EFER => return write_efer(st, env, value, vendor),
        nr::STAR => st.star = value,
        nr::LSTAR => st.lstar = canonical(value)?,
        nr::CSTAR => st.cstar = canonical(value)?,
        nr::FMASK => st.sfmask = value & 0xffff_ffff,
        nr::FS_BASE => st.seg[Seg::Fs as usize].base = canonical(value)?,
        nr::GS_BASE => st.seg[Seg::Gs as usize].base = canonical(value)?,
        nr::KERNEL_GS_BASE => st.kernel_gs_base = canonical(value)?,
        nr::TSC_AUX if value >> 32 == 0 => st.tsc_aux = value,
        nr::BIOS_SIGN_ID | nr::BIOS_UPDT_TRIG => {} // there is no microcode to load
        nr::MISC_FEATURES_ENABLES | nr::MCG_STATUS if value == 0 => {}
        // LBR and BTF are accepted and have no effect, as on other hypervisors without branch records.
        nr::DEBUGCTL if value & !3 == 0 => {}
        _ => match fixed_index(msr) {
            Some(i) if mtrr_fixed_valid(value) => st.mtrr_fixed[i] = value,
            None if vendor == Vendor::Amd && quiet_amd(msr).is_some() => {}
            _ => return gp(),
        },
    }
    Ok(Step::Next)
}

/// Whether a memory type is one MTRRs know: UC, WC, WT, WP, WB.
fn mtrr_type(t: u8) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

/// Whether IA32_PAT may hold `value`.
pub(crate) fn pat_valid(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(|t| mtrr_type(t) || t == 7)
}

/// Whether IA32_MTRR_DEF_TYPE may hold `value`.
pub(crate) fn mtrr_def_type_valid(value: u64) -> bool {
    value & !0xcff == 0 && mtrr_type(value as u8)
}

/// Whether a fixed-range MTRR may hold `value`.
pub(crate) fn mtrr_fixed_valid(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(mtrr_type)
}

/// Whether a variable-range MTRR's base may be `value`, with physical addresses of `phys` bits.
pub(crate) fn mtrr_base_valid(value: u64, phys: u32) -> bool {
    value & !(((1 << phys) - 1) & !0xfff | 0xff) == 0 && mtrr_type(value as u8)
}

/// Whether a variable-range MTRR's mask may be `value`.
pub(crate) fn mtrr_mask_valid(value: u64, phys: u32) -> bool {
    value & !(((1 << phys) - 1) & !0xfff | 1 << 11) == 0
}

/// Bits of EFER that software may set.
pub(crate) fn efer_bits(vendor: Vendor) -> u64 {
    efer::SCE | efer::LME | efer::NXE | if vendor == Vendor::Amd { EFER_AIBRSE } else { 0 }
}

fn write_efer<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, value: u64, vendor: Vendor) -> Result<Step, Exception> {
    let own = efer_bits(vendor);
    if value & !(own | efer::LMA) != 0 {
        return gp();
    }
    if (value ^ st.efer) & efer::LME != 0 && st.cr0 & cr0::PG != 0 {
        return gp(); // SDM vol. 3, section 4.1.1
    }
    let new = (value & own) | (st.efer & efer::LMA); // LMA is the CPU's to set
    if (new ^ st.efer) & efer::NXE != 0 {
        env.flush_tlb(TlbFlush::All);
    }
    st.efer = new;
    Ok(Step::Resync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat_env::FlatEnv;

    #[test]
    fn bases_must_be_canonical() {
        let (mut st, mut env) = (CpuState::reset(0), FlatEnv::new(0));
        for msr in [nr::FS_BASE, nr::GS_BASE, nr::KERNEL_GS_BASE, nr::LSTAR, nr::CSTAR, nr::SYSENTER_EIP] {
            assert_eq!(write(&mut st, &mut env, msr, 0x8000_0000_0000), gp());
            assert_eq!(write(&mut st, &mut env, msr, 0xffff_8000_0000_1234), Ok(Step::Next));
            assert_eq!(read(&st, &env, msr), Ok(0xffff_8000_0000_1234));
        }
    }

    /// What stock kernels read at boot without asking CPUID and without a fixup, or write back as read.
    #[test]
    fn kernels_find_what_they_do_not_ask_for() {
        let (mut st, mut env) = (CpuState::reset(0), FlatEnv::new(0));
        let mut list = vec![
            0x10, 0x17, 0x1b, 0x3a, 0x3b, 0x48, 0x8b, 0xce, 0xfe, 0x140, 0x174, 0x175, 0x176, 0x179, 0x17a, 0x198,
            0x1a0, 0x1d9, 0x250, 0x258, 0x259, 0x277, 0x2ff,
        ];
        list.extend(0x200..=0x20f);
        list.extend(0x268..=0x26f);
        list.extend(0xc000_0080..=0xc000_0084_u32);
        list.extend(0xc000_0100..=0xc000_0103);
        match env.cpuid().vendor() {
            Vendor::Amd => list.extend([0xc001_0010, 0xc001_0015, 0xc001_001f, 0xc001_0140, 0xc001_0141, 0xc001_1029]),
            _ => list.push(0x10a),
        }
        for msr in list {
            let value = read(&st, &env, msr);
            assert!(value.is_ok(), "{msr:#x}");
            // Read-only, or the local APIC's.
            if !matches!(msr, 0x17 | 0x1b | 0x3a | 0xce | 0xfe | 0x10a | 0x179 | 0x198) {
                assert!(write(&mut st, &mut env, msr, value.unwrap()).is_ok(), "{msr:#x}");
                assert_eq!(read(&st, &env, msr), value, "{msr:#x}");
            }
        }
    }

    #[test]
    fn efer_checks() {
        let (mut st, mut env) = (CpuState::reset(0), FlatEnv::new(0));
        assert_eq!(write(&mut st, &mut env, nr::EFER, 1 << 12), gp()); // SVME
        assert_eq!(write(&mut st, &mut env, nr::EFER, efer::LME | efer::NXE | efer::LMA), Ok(Step::Resync));
        assert_eq!(st.efer, efer::LME | efer::NXE);
        assert_eq!(env.flushes, [TlbFlush::All]);
        st.cr0 |= cr0::PG;
        assert_eq!(write(&mut st, &mut env, nr::EFER, efer::NXE), gp());
    }

    #[test]
    fn tsc_and_its_adjustment_move_together() {
        let (mut st, mut env) = (CpuState::reset(0), FlatEnv::new(0));
        env.tsc = 1_000;
        write(&mut st, &mut env, nr::TSC, 500).unwrap();
        assert_eq!(read(&st, &env, nr::TSC), Ok(500));
        assert_eq!(read(&st, &env, nr::TSC_ADJUST), Ok(0_u64.wrapping_sub(500)));
        write(&mut st, &mut env, nr::TSC_ADJUST, 0).unwrap();
        assert_eq!(read(&st, &env, nr::TSC), Ok(1_000));
    }

    #[test]
    fn memory_types_are_checked() {
        let (mut st, mut env) = (CpuState::reset(0), FlatEnv::new(0));
        assert_eq!(write(&mut st, &mut env, nr::PAT, 0x0007_0406_0007_0402), gp());
        assert_eq!(write(&mut st, &mut env, nr::PAT, 0x0007_0105_0007_0406), Ok(Step::Next));
        assert_eq!(write(&mut st, &mut env, nr::MTRR_FIX4K_F8000, 0x0606_0606_0606_0607), gp());
        assert_eq!(write(&mut st, &mut env, nr::MTRR_FIX4K_F8000, 0x0606_0606_0606_0606), Ok(Step::Next));
        assert_eq!(st.mtrr_fixed[10], 0x0606_0606_0606_0606);
        assert_eq!(write(&mut st, &mut env, 0x20f, 0xffff_f800), Ok(Step::Next));
        assert_eq!(read(&st, &env, 0x20f), Ok(0xffff_f800));
        assert_eq!(write(&mut st, &mut env, 0x20f, 1 << 60), gp());
        assert_eq!(write(&mut st, &mut env, nr::MTRRCAP, 0), gp());
        assert_eq!(read(&st, &env, 0x1234_5678), gp());
    }
}
