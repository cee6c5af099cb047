//! CPUID as the guest sees it: the host's leaves, masked to what the engine carries out.
//!
//! Three rules make the policy:
//!
//! 1. *User-mode instructions* run natively, so a guest may have what the host has, by allow-list: a bit nobody here
//!    has thought about is off.
//! 2. *System features* (PCID, SMEP, SMAP, UMIP, x2APIC, TSC deadline, 1 GiB pages and so on) are the engine's own
//!    work and do not depend on the host: they are on.
//! 3. *Never*: VMX, SVM, PKU, CET, LA57, XSAVES, TSX, MPX, SGX, PT, MONITOR, performance counters, AMX, user interrupts,
//!    LAM, FRED, Key Locker, thermal and power management. See [`CpuidPolicy::host`] for the masks.
//!
//! # Speculation controls
//!
//! The guest is told that its CPU is immune to the known speculation flaws (IA32_ARCH_CAPABILITIES on Intel, the `_NO`
//! bits of leaves 0x80000008 and 0x80000021 on AMD) and has enhanced IBRS, so a stock kernel turns on neither page-table
//! isolation, nor retpolines, nor buffer clears. Those measures protect one guest context from another inside what is,
//! for the host, one process. They would not work here anyway: guest ring 0 and ring 3 share one host address space and
//! privilege level, and the translator decides which branches are indirect. What is lost, plainly: a program *inside* the
//! guest may be able to read other guest memory of the same VM through speculation on a CPU that has those flaws. The
//! boundary between the VM and the host is the host kernel's process boundary; its mitigations stay in force.

use std::collections::BTreeMap;

use crate::host_fpu::{self, host_cpuid};
use crate::{CpuState, state::cr4};

/// What the machine decides about its CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Number of vCPUs: single-threaded cores of one package, APIC IDs 0 to `cpus - 1`.
    pub cpus: u32,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Frequency in Hz at which the local APIC timer counts with divide-by-1.
    pub apic_hz: u32,
}

/// Who made the host CPU; the guest sees the same vendor, because user programs choose code paths by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD or HygonGenuine.
    Amd,
    /// Anything else; treated as Intel where a choice is needed.
    Other,
}

/// The guest-visible CPUID of one machine, fixed when the machine is made.
#[derive(Clone, Debug)]
pub struct CpuidPolicy {
    vendor: Vendor,
    cpus: u32,
    leaves: BTreeMap<(u32, u32), [u32; 4]>,
}

/// Leaves that hypervisors answer.
const HYPERVISOR: std::ops::Range<u32> = 0x4000_0000..0x5000_0000;

const fn bits(list: &[u32]) -> u32 {
    let (mut mask, mut i) = (0, 0);
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

// Leaf 1 ECX: SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND.
const L1_ECX_HOST: u32 = bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
// Leaf 1 ECX: PCID x2APIC TSC-deadline hypervisor.
const L1_ECX_OWN: u32 = bits(&[17, 21, 24, 31]);
// Leaf 1 EDX: FPU CX8 CMOV CLFSH MMX FXSR SSE SSE2 SS.
const L1_EDX_HOST: u32 = bits(&[0, 8, 15, 19, 23, 24, 25, 26, 27]);
// Leaf 1 EDX: DE PSE TSC MSR PAE MCE APIC SEP MTRR PGE MCA PAT PSE36.
const L1_EDX_OWN: u32 = bits(&[2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17]);
// Leaf 7 EBX: FSGSBASE BMI1 AVX2 FDP-only-on-exception BMI2 ERMS AVX512F/DQ RDSEED ADX IFMA CLFLUSHOPT CLWB CD SHA BW VL.
const L7_EBX_HOST: u32 = bits(&[0, 3, 5, 6, 8, 9, 16, 17, 18, 19, 21, 23, 24, 28, 29, 30, 31]);
// Leaf 7 EBX: TSC_ADJUST SMEP INVPCID "FCS and FDS are zero" SMAP.
const L7_EBX_OWN: u32 = bits(&[1, 7, 10, 13, 20]);
// Leaf 7 ECX: VBMI VBMI2 GFNI VAES VPCLMULQDQ VNNI BITALG VPOPCNTDQ RDPID.
const L7_ECX_HOST: u32 = bits(&[1, 6, 8, 9, 10, 11, 12, 14, 22]);
// Leaf 7 ECX: UMIP.
const L7_ECX_OWN: u32 = bits(&[2]);
// Leaf 7 EDX: FSRM VP2INTERSECT AVX512_FP16.
const L7_EDX_HOST: u32 = bits(&[4, 8, 23]);
// Leaf 7 EDX on Intel: IBRS/IBPB STIBP L1D_FLUSH ARCH_CAPABILITIES SSBD.
const L7_EDX_INTEL: u32 = bits(&[26, 27, 28, 29, 31]);
// Leaf 7.1 EAX: SHA512 SM3 SM4 AVX_VNNI AVX512_BF16 AVX_IFMA. EDX: AVX_VNNI_INT8 AVX_NE_CONVERT AVX_VNNI_INT16.
const L7_1_EAX_HOST: u32 = bits(&[0, 1, 2, 4, 5, 23]);
const L7_1_EDX_HOST: u32 = bits(&[4, 5, 10]);
// Leaf 0x80000001 ECX: LZCNT SSE4A 3DNOWPREFETCH (host); LAHF (own).
const X1_ECX_HOST: u32 = bits(&[5, 6, 8]);
const X1_ECX_OWN: u32 = bits(&[0]);
// Leaf 7.2 EDX on Intel: BHI_CTRL MCDT_NO. Recent kernels clear the branch history by a loop at each system call even if the CPU says
// BHI_NO, unless it can be told not to use the history.
const L7_2_EDX_INTEL: u32 = bits(&[4, 5]);
// Leaf 0x80000001 EDX: SYSCALL NX 1G RDTSCP LM (own); AMD's MMXEXT (host).
const X1_EDX_OWN: u32 = bits(&[11, 20, 26, 27, 29]);
const X1_EDX_AMD: u32 = bits(&[22]);
// Leaf 0x80000001 EDX bits that repeat leaf 1 EDX on AMD.
const X1_EDX_COPY: u32 = 0x0183_f3ff;
// Leaf 0x80000008 EBX on AMD: XSAVE always stores the error pointers (host).
const X8_EBX_HOST: u32 = bits(&[2]);
// The same: IBPB IBRS STIBP IBRS-preferred SSBD SSB_NO BTC_NO.
const X8_EBX_AMD: u32 = bits(&[12, 14, 15, 18, 24, 26, 29]);
// Leaf 0x80000021 on AMD: LFENCE serialises, automatic IBRS, SRSO_NO, SRSO_USER_KERNEL_NO; ECX: TSA_SQ_NO TSA_L1_NO.
const X21_EAX_AMD: u32 = bits(&[2, 8, 29, 30]);
const X21_ECX_AMD: u32 = bits(&[1, 2]);

/// IA32_ARCH_CAPABILITIES (SDM vol. 4, MSR 0x10a): RDCL_NO IBRS_ALL SKIP_L1DFL_VMENTRY SSB_NO MDS_NO PSCHANGE_MC_NO TAA_NO
/// SBDR_SSDP_NO FBSDP_NO PSDP_NO BHI_NO PBRSB_NO GDS_NO RFDS_NO ITS_NO.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

impl CpuidPolicy {
    /// The policy for this host and a machine shaped like `cfg`.
    pub fn host(cfg: &CpuidConfig) -> Self {
        Self::from_source(cfg, host_cpuid)
    }

    /// As [`CpuidPolicy::host`], with CPUID taken from `cpuid` (so that tests can play other hosts).
    fn from_source(cfg: &CpuidConfig, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let l0 = cpuid(0, 0);
        let vendor = match (l0[1], l0[3], l0[2]) {
            (0x756e_6547, 0x4965_6e69, 0x6c65_746e) => Vendor::Intel,
            (0x6874_7541, 0x6974_6e65, 0x444d_4163) | (0x6f67_7948, 0x6e65_476e, 0x656e_6975) => Vendor::Amd,
            _ => Vendor::Other,
        };
        let mut p = Self { vendor, cpus: cfg.cpus.max(1), leaves: BTreeMap::new() };
        let host_max = l0[0];
        let max = if vendor == Vendor::Amd { 0xd } else { 0x16 };
        p.put(0, 0, [max, l0[1], l0[2], l0[3]]);
        p.basic(&cpuid, host_max);
        p.xstate(&cpuid);
        p.topology(&cpuid, host_max);
        if vendor != Vendor::Amd {
            p.timing(cfg, if host_max >= 0x16 { cpuid(0x16, 0) } else { [0; 4] });
        }
        p.extended(&cpuid);
        p
    }

    /// Adds what the machine's paravirtual interfaces answer: leaves from 0x4000_0000 on, EAX to EDX. Others are left out.
    #[must_use]
    pub fn with_hypervisor_leaves(mut self, leaves: &[(u32, [u32; 4])]) -> Self {
        for &(leaf, regs) in leaves.iter().filter(|(leaf, _)| HYPERVISOR.contains(leaf)) {
            self.put(leaf, 0, regs);
        }
        self
    }

    fn put(&mut self, leaf: u32, subleaf: u32, regs: [u32; 4]) {
        self.leaves.insert((leaf, subleaf), regs);
    }

    fn basic(&mut self, cpuid: &impl Fn(u32, u32) -> [u32; 4], host_max: u32) {
        let [eax, ebx, ecx, edx] = cpuid(1, 0);
        let htt = if self.cpus > 1 { 1 << 28 } else { 0 };
        self.put(
            1,
            0,
            [
                eax,
                (ebx & 0xffff) | (self.cpus.next_power_of_two().min(255) << 16),
                (ecx & L1_ECX_HOST) | L1_ECX_OWN,
                (edx & L1_EDX_HOST) | L1_EDX_OWN | htt,
            ],
        );
        if self.vendor == Vendor::Intel {
            self.put(2, 0, cpuid(2, 0)); // cache and TLB descriptors
        }
        self.put(6, 0, [1 << 2, 0, 0, 0]); // ARAT only: the APIC timer never stops
        if host_max < 7 {
            return;
        }
        let [subleaves, ebx, ecx, edx] = cpuid(7, 0);
        let spec = if self.vendor == Vendor::Intel { L7_EDX_INTEL } else { 0 };
        let avx512 = host_fpu::offered_xcr0() & 0xe0 == 0xe0;
        let mut b = (ebx & L7_EBX_HOST) | L7_EBX_OWN;
        if !avx512 {
            b &= !bits(&[16, 17, 21, 28, 30, 31]);
        }
        let last = if self.vendor == Vendor::Intel { 2 } else { subleaves.min(1) };
        self.put(7, 0, [last, b, (ecx & L7_ECX_HOST) | L7_ECX_OWN, (edx & L7_EDX_HOST) | spec]);
        if subleaves >= 1 {
            let [eax, _, _, edx] = cpuid(7, 1);
            self.put(7, 1, [eax & L7_1_EAX_HOST, 0, 0, edx & L7_1_EDX_HOST]);
        }
        if self.vendor == Vendor::Intel {
            self.put(7, 2, [0, 0, 0, L7_2_EDX_INTEL]);
        }
    }

    /// Leaf 0xD. Sizes that depend on XCR0 are filled in by [`CpuidPolicy::query`].
    fn xstate(&mut self, cpuid: &impl Fn(u32, u32) -> [u32; 4]) {
        let offered = host_fpu::offered_xcr0();
        self.put(0xd, 0, [offered as u32, 0, host_fpu::standard_size(offered) as u32, 0]);
        self.put(0xd, 1, [cpuid(0xd, 1)[0] & 7, 0, 0, 0]); // XSAVEOPT XSAVEC XGETBV1
        for i in host_fpu::EXTENDED.into_iter().filter(|i| offered & (1 << i) != 0) {
            let c = host_fpu::component(i);
            self.put(0xd, i, [c.size as u32, c.offset as u32, u32::from(c.align64) << 1, 0]);
        }
    }

    /// Leaves 4 and 0xB: one package of single-threaded cores; the last-level cache is shared by all.
    fn topology(&mut self, cpuid: &impl Fn(u32, u32) -> [u32; 4], host_max: u32) {
        let ids = self.cpus.next_power_of_two();
        if self.vendor == Vendor::Intel && host_max >= 4 {
            for sub in 0..8 {
                let [eax, ebx, ecx, edx] = cpuid(4, sub);
                if eax & 0x1f == 0 {
                    break;
                }
                let sharing = if (eax >> 5) & 7 >= 3 { (ids - 1).min(0xfff) } else { 0 };
                let fixed = (eax & 0x3fff) | (sharing << 14) | ((ids - 1).min(63) << 26);
                self.put(4, sub, [fixed, ebx, ecx, edx]);
            }
        }
        self.put(0xb, 0, [0, 1, 1 << 8, 0]);
        self.put(0xb, 1, [ids.trailing_zeros(), self.cpus, 1 | 2 << 8, 0]);
    }

    /// Leaves 0x15 and 0x16: with these Linux takes the TSC frequency as known and calibrates nothing. It also takes the
    /// crystal for the APIC timer's clock, so the crystal reported is `apic_hz`.
    fn timing(&mut self, cfg: &CpuidConfig, host16: [u32; 4]) {
        if let Some((num, den)) = tsc_ratio(cfg.tsc_khz, cfg.apic_hz / 1000) {
            self.put(0x15, 0, [den, num, cfg.apic_hz, 0]);
        }
        let mhz = cfg.tsc_khz / 1000;
        self.put(0x16, 0, [mhz & 0xffff, (host16[1] & 0xffff).max(mhz & 0xffff), 100, 0]);
    }

    fn extended(&mut self, cpuid: &impl Fn(u32, u32) -> [u32; 4]) {
        let host_max = cpuid(0x8000_0000, 0)[0];
        let amd = self.vendor == Vendor::Amd;
        let [_, v_ebx, v_ecx, v_edx] = cpuid(0x8000_0000, 0);
        let max = if amd { 0x8000_0021 } else { 0x8000_0008 };
        self.put(0x8000_0000, 0, [max, v_ebx, v_ecx, v_edx]);
        let [eax, ebx, ecx, edx] = cpuid(0x8000_0001, 0);
        let legacy = if amd { (self.leaves[&(1, 0)][3] & X1_EDX_COPY) | (edx & X1_EDX_AMD) } else { 0 };
        self.put(0x8000_0001, 0, [eax, ebx, (ecx & X1_ECX_HOST) | X1_ECX_OWN, X1_EDX_OWN | legacy]);
        for leaf in 0x8000_0002..=0x8000_0006 {
            if leaf <= host_max {
                self.put(leaf, 0, cpuid(leaf, 0)); // brand string, cache geometry
            }
        }
        self.put(0x8000_0007, 0, [0, 0, 0, 1 << 8]); // invariant TSC
        let ebx = if host_max >= 0x8000_0008 { cpuid(0x8000_0008, 0)[1] } else { 0 };
        let phys = crate::mmu::PHYS_BITS;
        let (b, c) = if amd {
            let ids = self.cpus.next_power_of_two();
            ((ebx & X8_EBX_HOST) | X8_EBX_AMD, (self.cpus - 1).min(255) | (ids.trailing_zeros() << 12))
        } else {
            (0, 0)
        };
        self.put(0x8000_0008, 0, [phys | 48 << 8, b, c, 0]);
        if amd {
            for leaf in [0x8000_0019, 0x8000_001a] {
                if leaf <= host_max {
                    self.put(leaf, 0, cpuid(leaf, 0)); // TLB geometry, preferred vector widths
                }
            }
            self.put(0x8000_0021, 0, [X21_EAX_AMD, 0, X21_ECX_AMD, 0]);
        }
    }

    /// Whether a leaf's answer depends on ECX.
    pub fn has_subleaves(leaf: u32) -> bool {
        matches!(leaf, 4 | 7 | 0xb | 0xd)
    }

    /// The leaves and subleaves that exist, ascending.
    pub fn leaves(&self) -> impl Iterator<Item = (u32, u32)> + use<'_> {
        self.leaves.keys().copied()
    }

    /// Takes away what another engine does not offer: `offered` gives EAX, EBX, ECX, EDX of what it can do (KVM_GET_SUPPORTED_CPUID,
    /// for one). Identity, topology, caches, timing and the hypervisor's own leaves stay.
    pub fn restrict(&mut self, offered: impl Fn(u32, u32) -> [u32; 4]) {
        // The machine has the local APIC, whatever the engine says: x2APIC, TSC deadline; and it is a hypervisor.
        const MACHINE_ECX: u32 = bits(&[21, 24, 31]);
        const HTT: u32 = 1 << 28;
        // "FDP only on exceptions" and "FCS and FDS are zero" say that something is missing.
        const L7_EBX_MISSING: u32 = bits(&[6, 13]);
        let xsave = offered(1, 0)[2] >> 26 & 1 != 0;
        if !xsave {
            self.leaves.retain(|&(leaf, _), _| leaf != 0xd);
        }
        for (&(leaf, sub), regs) in &mut self.leaves {
            let can = offered(leaf, sub);
            let keep = match leaf {
                1 => [u32::MAX, u32::MAX, can[2] | MACHINE_ECX, can[3] | HTT],
                7 if sub == 0 => [u32::MAX, can[1] | L7_EBX_MISSING, can[2], can[3]],
                7 => can,
                0xd if sub <= 1 => [can[0], u32::MAX, u32::MAX, u32::MAX],
                0x8000_0001 => [u32::MAX, u32::MAX, can[2], can[3]],
                0x8000_0007 => [u32::MAX, u32::MAX, u32::MAX, can[3]],
                0x8000_0008 => [u32::MAX, can[1], u32::MAX, u32::MAX],
                0x8000_0021 => can,
                _ => [u32::MAX; 4],
            };
            for (r, k) in regs.iter_mut().zip(keep) {
                *r &= k;
            }
            if leaf == 0x8000_0008 && can[0] & 0xff != 0 {
                regs[0] = regs[0] & !0xff | (regs[0] & 0xff).min(can[0] & 0xff);
            }
        }
    }

    /// The CPU's vendor.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Width of guest-physical addresses in bits (MAXPHYADDR).
    pub fn phys_bits(&self) -> u32 {
        self.leaves[&(0x8000_0008, 0)][0] & 0xff
    }

    /// What CPUID answers but for what depends on the vCPU's state.
    pub(crate) fn fixed(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.leaves.get(&(leaf, subleaf)).copied().unwrap_or([0; 4])
    }

    /// EAX, EBX, ECX, EDX of CPUID for a vCPU in state `st`. Leaves that do not exist read as zero.
    pub fn query(&self, st: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let sub = if Self::has_subleaves(leaf) { subleaf } else { 0 };
        let mut r = self.leaves.get(&(leaf, sub)).copied().unwrap_or([0; 4]);
        match (leaf, sub) {
            (1, _) => {
                r[1] |= st.id << 24;
                if st.cr4 & cr4::OSXSAVE != 0 {
                    r[2] |= 1 << 27;
                }
            }
            (0xb, _) => {
                r[2] |= sub & 0xff;
                r[3] = st.id;
            }
            (0xd, 0) if r[0] != 0 => r[1] = host_fpu::standard_size(st.xcr0) as u32,
            (0xd, 1) if r[0] & 2 != 0 => r[1] = host_fpu::compacted_size(st.xcr0) as u32,
            _ => {}
        }
        r
    }
}

/// Best fraction `num / den` for `tsc_khz / crystal_khz` whose product `crystal_khz * num` stays below 2^32, because Linux
/// multiplies in 32 bits before it divides.
fn tsc_ratio(tsc_khz: u32, crystal_khz: u32) -> Option<(u32, u32)> {
    if tsc_khz == 0 || crystal_khz == 0 {
        return None;
    }
    let (tsc, crystal) = (u64::from(tsc_khz), u64::from(crystal_khz));
    let mut best: Option<(u64, u64, u64)> = None; // error numerator over `den`, num, den
    for den in 1..=4096_u64 {
        let num = (tsc * den + crystal / 2) / crystal;
        if num == 0 {
            continue;
        }
        if crystal * num > u64::from(u32::MAX) {
            break;
        }
        let error = (crystal * num).abs_diff(tsc * den);
        if best.is_none_or(|(e, _, d)| error * d < e * den) {
            best = Some((error, num, den));
        }
    }
    best.map(|(_, num, den)| (num as u32, den as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CFG: CpuidConfig = CpuidConfig { cpus: 3, tsc_khz: 2_793_437, apic_hz: 1_000_000_000 };

    /// A host that claims everything.
    fn boastful(vendor: [u32; 3]) -> impl Fn(u32, u32) -> [u32; 4] {
        move |leaf, sub| match leaf {
            0 => [0x1f, vendor[0], vendor[1], vendor[2]],
            0x8000_0000 => [0x8000_0028, vendor[0], vendor[1], vendor[2]],
            4 if sub > 3 => [0; 4],
            _ => [u32::MAX; 4],
        }
    }

    const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

    /// (leaf, subleaf, register, bit) that no guest may ever see.
    const NEVER: &[(u32, u32, usize, u32)] = &[
        (1, 0, 2, 3),            // MONITOR
        (1, 0, 2, 5),            // VMX
        (1, 0, 2, 6),            // SMX
        (1, 0, 2, 7),            // EIST
        (1, 0, 2, 15),           // PDCM
        (1, 0, 3, 21),           // DS
        (1, 0, 3, 22),           // ACPI thermal
        (1, 0, 3, 29),           // TM
        (7, 0, 1, 2),            // SGX
        (7, 0, 1, 4),            // HLE
        (7, 0, 1, 11),           // RTM
        (7, 0, 1, 14),           // MPX
        (7, 0, 1, 25),           // PT
        (7, 0, 2, 3),            // PKU
        (7, 0, 2, 4),            // OSPKE
        (7, 0, 2, 5),            // WAITPKG
        (7, 0, 2, 7),            // CET_SS
        (7, 0, 2, 16),           // LA57
        (7, 0, 2, 23),           // Key Locker
        (7, 0, 2, 28),           // MOVDIR64B
        (7, 0, 2, 29),           // ENQCMD
        (7, 0, 3, 5),            // UINTR
        (7, 0, 3, 18),           // PCONFIG
        (7, 0, 3, 20),           // CET_IBT
        (7, 0, 3, 22),           // AMX_BF16
        (7, 0, 3, 24),           // AMX_TILE
        (7, 0, 3, 25),           // AMX_INT8
        (7, 1, 0, 17),           // FRED
        (7, 1, 0, 18),           // LKGS
        (7, 1, 0, 26),           // LAM
        (0xd, 1, 0, 3),          // XSAVES
        (0xd, 1, 0, 4),          // XFD
        (0x8000_0001, 0, 2, 2),  // SVM
        (0x8000_0001, 0, 2, 9),  // OSVW
        (0x8000_0001, 0, 2, 10), // IBS
        (0x8000_0001, 0, 2, 15), // LWP
        (0x8000_0001, 0, 2, 22), // topology extensions
        (0x8000_0001, 0, 2, 29), // MONITORX
    ];

    #[test]
    fn never_offers_what_is_not_emulated() {
        let st = CpuState::reset(0);
        for p in [
            CpuidPolicy::host(&CFG),
            CpuidPolicy::from_source(&CFG, boastful(INTEL)),
            CpuidPolicy::from_source(&CFG, boastful(AMD)),
        ] {
            for &(leaf, sub, reg, bit) in NEVER {
                assert_eq!(p.query(&st, leaf, sub)[reg] >> bit & 1, 0, "leaf {leaf:#x}.{sub} reg {reg} bit {bit}");
            }
            for leaf in [5, 0xa, 0xf, 0x10, 0x12, 0x14, 0x17, 0x19, 0x1d, 0x8000_000a, 0x8000_001b, 0x8000_001e] {
                assert_eq!(p.query(&st, leaf, 0), [0; 4], "leaf {leaf:#x}");
            }
            assert_eq!(u64::from(p.query(&st, 0xd, 0)[0]) & !host_fpu::OFFERED, 0);
            assert_eq!(p.query(&st, 0x8000_0008, 0)[0] >> 8 & 0xff, 48);
        }
    }

    #[test]
    fn dynamic_bits_follow_the_state() {
        let leaf = (0x4000_0000, [0x4000_0010, 1, 2, 3]);
        let p = CpuidPolicy::host(&CFG).with_hypervisor_leaves(&[leaf, (1, [0; 4])]);
        let mut st = CpuState::reset(2);
        assert_eq!(p.query(&st, 1, 0)[2] >> 27 & 1, 0);
        assert_eq!(p.query(&st, 0xd, 0)[1], 576);
        st.cr4 |= cr4::OSXSAVE;
        st.xcr0 = host_fpu::offered_xcr0();
        assert_eq!(p.query(&st, 1, 0)[2] >> 27 & 1, 1);
        assert_eq!(p.query(&st, 1, 0)[1] >> 24, 2);
        assert_eq!(p.query(&st, 0xd, 0)[1], p.query(&st, 0xd, 0)[2]);
        assert_eq!(p.query(&st, 0xb, 1), [2, 3, 0x201, 2]);
        assert_eq!(p.query(&st, 0xb, 5), [0, 0, 5, 2]);
        assert_eq!(p.query(&st, leaf.0, 7), leaf.1);
        assert_ne!(p.query(&st, 1, 0), [0; 4], "other leaves are not the machine's");
    }

    #[test]
    fn user_mode_bits_come_from_the_host() {
        let p = CpuidPolicy::host(&CFG);
        let st = CpuState::reset(0);
        let (host, guest) = (host_cpuid(1, 0), p.query(&st, 1, 0));
        assert_eq!(guest[2] & L1_ECX_HOST, host[2] & L1_ECX_HOST);
        assert_eq!(guest[0], host[0]);
        assert_eq!(p.query(&st, 7, 0)[2] & L7_ECX_HOST, host_cpuid(7, 0)[2] & L7_ECX_HOST);
    }

    #[test]
    fn restriction_takes_features_and_leaves_the_rest() {
        const HV: u32 = 0x4000_0000;
        let mut p = CpuidPolicy::host(&CFG).with_hypervisor_leaves(&[(HV, [HV, 1, 2, 3])]);
        let (before, st) = (p.clone(), CpuState::reset(1));
        p.restrict(|_, _| [u32::MAX; 4]);
        assert_eq!(p.leaves, before.leaves);
        // As poor an engine as can be: no XSAVE, so no leaf 0xD; what the machine itself provides stays.
        p.restrict(|leaf, _| if leaf == 0x8000_0008 { [36, 0, 0, 0] } else { [0; 4] });
        let (l1, was) = (p.query(&st, 1, 0), before.query(&st, 1, 0));
        assert_eq!((l1[0], l1[1], l1[2], l1[3]), (was[0], was[1], bits(&[21, 24, 31]), 1 << 28));
        assert_eq!(p.query(&st, 7, 0)[2..], [0, 0]);
        assert_eq!(p.query(&st, 0xd, 0), [0; 4]);
        assert_eq!(p.query(&st, 0x8000_0001, 0)[2..], [0, 0]);
        assert_eq!(p.phys_bits(), 36);
        assert_eq!(p.query(&st, 0xb, 1), before.query(&st, 0xb, 1));
        assert_eq!(p.query(&st, HV, 0), before.query(&st, HV, 0));
    }

    #[test]
    fn linux_computes_the_tsc_from_leaf_15() {
        for (tsc, apic) in
            [(2_793_437_u32, 1_000_000_u32), (4_700_123, 1_000_000), (2_100_000, 24_000), (800_001, 200_000)]
        {
            let (num, den) = tsc_ratio(tsc, apic).unwrap();
            let product = apic.checked_mul(num).expect("32-bit overflow in the guest");
            let error = (product / den).abs_diff(tsc);
            assert!(f64::from(error) / f64::from(tsc) < 20e-6, "{tsc} {apic}: {num}/{den} off by {error} kHz");
        }
        assert_eq!(tsc_ratio(2_000_000, 0), None);
    }
}
