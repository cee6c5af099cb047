//! Which instructions are tested, from the instruction tables, and why the rest is not.
//!
//! Every form that iced-x86 knows is either covered or has a reason here. The reasons are printed with each run.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind as K};
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// The forms that are tested, and the others with their reasons.
#[derive(Debug)]
pub struct Catalog {
    /// Forms that sequences are made of.
    pub covered: Vec<Code>,
    /// Covered forms of integer instructions, the hot path of every guest.
    pub integer: Vec<Code>,
    /// User-mode 64-bit forms that this host has and that are not covered, by reason.
    pub excluded: BTreeMap<&'static str, Vec<Code>>,
    /// Number of forms that do not exist in 64-bit mode, are not instructions or are absent on this host.
    pub out_of_scope: usize,
}

/// The catalogue for this host.
pub fn catalog() -> &'static Catalog {
    static CATALOG: OnceLock<Catalog> = OnceLock::new();
    CATALOG.get_or_init(|| {
        let mut c = Catalog { covered: Vec::new(), integer: Vec::new(), excluded: BTreeMap::new(), out_of_scope: 0 };
        for code in Code::values() {
            if !in_scope(code) {
                c.out_of_scope += 1;
            } else if let Some(why) = exclusion(code) {
                c.excluded.entry(why).or_default().push(code);
            } else {
                c.covered.push(code);
                if is_integer(code) {
                    c.integer.push(code);
                }
            }
        }
        c
    })
}

/// Whether the form exists in 64-bit mode on this host at all.
fn in_scope(code: Code) -> bool {
    let info = code.op_code();
    info.is_instruction()
        && code != Code::INVALID
        && info.mode64()
        && !matches!(info.encoding(), EncodingKind::XOP | EncodingKind::D3NOW | EncodingKind::MVEX)
        && code.cpuid_features().iter().all(|&f| host_has(f))
}

fn is_integer(code: Code) -> bool {
    use CpuidFeature as F;
    code.op_code().encoding() == EncodingKind::Legacy
        && code
            .cpuid_features()
            .iter()
            .all(|f| matches!(f, F::INTEL8086 | F::INTEL186 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV | F::MOVBE))
}

/// Why a form that exists on this host is not covered; `None` when it is.
fn exclusion(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let info = code.op_code();
    let kinds = info.op_kinds();
    Some(match info.mnemonic() {
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpid => "its result differs from run to run",
        M::Cpuid => "the engine masks the host's values by policy",
        M::Rdpmc => "whether user mode may read performance counters is the host kernel's choice",
        M::Xgetbv if host_xcr0_other() => "the host enables state components that no guest is offered",
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => "Linux emulates it for user mode under UMIP",
        M::Syscall | M::Sysenter => "it would call the host kernel; system-level tests cover it",
        M::Lar | M::Lsl | M::Verr | M::Verw => "it reads the host kernel's descriptor tables",
        M::Lss | M::Lfs | M::Lgs => "its result depends on the host kernel's descriptor tables",
        M::Xbegin | M::Xend | M::Xabort | M::Xtest => "transactional memory is not offered to guests",
        M::Vmcall | M::Vmmcall | M::Vmfunc => "it would call the hypervisor under the host",
        M::Getsec | M::Encls | M::Enclu | M::Enclv | M::Pconfig => {
            "safer-mode and enclave leaves are not offered to guests"
        }
        M::Movdiri | M::Movdir64b | M::Serialize => "direct stores and SERIALIZE are not offered to guests",
        M::Xsaves | M::Xrstors | M::Xsaves64 | M::Xrstors64 => "supervisor state save is not offered to guests",
        M::Call | M::Jmp if kinds.iter().any(|k| matches!(k, K::mem)) && is_far(code) => {
            "far transfers through memory are covered by system-level tests"
        }
        M::Retf if code != Code::Retfq => {
            "far returns outside the directed iretq and retfq forms are covered by system-level tests"
        }
        M::Iret | M::Iretd => "it returns with 16-bit or 32-bit stack slots; system-level tests cover it",
        M::Mov | M::Pop if kinds.first().is_some_and(|k| matches!(k, K::seg_reg | K::fs | K::gs)) => {
            "it loads segment registers from the host kernel's descriptor tables"
        }
        _ if info.op_kinds().iter().any(|k| matches!(k, K::br16_1 | K::br16_2 | K::brdisp_2 | K::xbegin_2)) => {
            "16-bit branch displacements in 64-bit mode differ between vendors"
        }
        _ if matches!(
            code,
            Code::Jmp_rm16 | Code::Call_rm16 | Code::Retnw | Code::Retnw_imm16 | Code::Jmp_rm32 | Code::Call_rm32
        ) =>
        {
            "near branches with an operand-size prefix in 64-bit mode differ between vendors"
        }
        M::Jmpe => "IA-64 only",
        _ => return None,
    })
}

/// Whether a branch form is far.
fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 | Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664
    )
}

/// Whether XCR0 holds more than the components that guests are offered.
fn host_xcr0_other() -> bool {
    u64::from(__cpuid_count(0xd, 0).eax) & !crate::state::FPU_MASK != 0
}

/// Whether this host has a feature and this tester knows it.
pub fn host_has(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    let l1 = __cpuid(1);
    let max = __cpuid(0).eax;
    let (l7, l7_1) =
        if max >= 7 { (__cpuid_count(7, 0), __cpuid_count(7, 1)) } else { (__cpuid_count(0, 0), __cpuid_count(0, 0)) };
    let x1 = __cpuid(0x8000_0001);
    let xs = if max >= 0xd { __cpuid_count(0xd, 1).eax } else { 0 };
    let has = |reg: u32, bit: u32| reg >> bit & 1 != 0;
    let avx = has(l1.ecx, 27) && has(l1.ecx, 28) && crate::state::component(2).is_some();
    let avx512 = avx && has(l7.ebx, 16) && [5, 6, 7].iter().all(|&i| crate::state::component(i).is_some());
    match f {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 => true,
        F::FPU | F::FPU287 | F::FPU387 | F::CMOV | F::CX8 | F::MULTIBYTENOP | F::PAUSE | F::MSR | F::CPUID => true,
        F::TSC | F::SEP | F::SYSCALL | F::MMX | F::SSE | F::SSE2 | F::FXSR | F::SMM | F::CET_IBT => true,
        F::RDPMC => true,
        F::SSE3 => has(l1.ecx, 0),
        F::PCLMULQDQ => has(l1.ecx, 1),
        F::MONITOR => has(l1.ecx, 3),
        F::SSSE3 => has(l1.ecx, 9),
        F::FMA => avx && has(l1.ecx, 12),
        F::CMPXCHG16B => has(l1.ecx, 13),
        F::SSE4_1 => has(l1.ecx, 19),
        F::SSE4_2 => has(l1.ecx, 20),
        F::MOVBE => has(l1.ecx, 22),
        F::POPCNT => has(l1.ecx, 23),
        F::AES => has(l1.ecx, 25),
        F::XSAVE => has(l1.ecx, 27),
        F::AVX => avx,
        F::F16C => avx && has(l1.ecx, 29),
        F::RDRAND => has(l1.ecx, 30),
        F::CLFSH => has(l1.edx, 19),
        F::FSGSBASE => has(l7.ebx, 0),
        F::BMI1 => has(l7.ebx, 3),
        F::HLE | F::HLE_or_RTM => has(l7.ebx, 4) || has(l7.ebx, 11),
        F::RTM => has(l7.ebx, 11),
        F::AVX2 => avx && has(l7.ebx, 5),
        F::BMI2 => has(l7.ebx, 8),
        F::INVPCID => has(l7.ebx, 10),
        F::AVX512F => avx512,
        F::AVX512DQ => avx512 && has(l7.ebx, 17),
        F::RDSEED => has(l7.ebx, 18),
        F::ADX => has(l7.ebx, 19),
        F::SMAP => has(l7.ebx, 20),
        F::AVX512_IFMA => avx512 && has(l7.ebx, 21),
        F::CLFLUSHOPT => has(l7.ebx, 23),
        F::CLWB => has(l7.ebx, 24),
        F::AVX512CD => avx512 && has(l7.ebx, 28),
        F::SHA => has(l7.ebx, 29),
        F::AVX512BW => avx512 && has(l7.ebx, 30),
        F::AVX512VL => avx512 && has(l7.ebx, 31),
        F::PREFETCHWT1 => has(l7.ecx, 0),
        F::AVX512_VBMI => avx512 && has(l7.ecx, 1),
        F::AVX512_VBMI2 => avx512 && has(l7.ecx, 6),
        F::GFNI => has(l7.ecx, 8),
        F::VAES => avx && has(l7.ecx, 9),
        F::VPCLMULQDQ => avx && has(l7.ecx, 10),
        F::AVX512_VNNI => avx512 && has(l7.ecx, 11),
        F::AVX512_BITALG => avx512 && has(l7.ecx, 12),
        F::AVX512_VPOPCNTDQ => avx512 && has(l7.ecx, 14),
        F::RDPID => has(l7.ecx, 22),
        F::MOVDIRI => has(l7.ecx, 27),
        F::MOVDIR64B => has(l7.ecx, 28),
        F::AVX512_VP2INTERSECT => avx512 && has(l7.edx, 8),
        F::SERIALIZE => has(l7.edx, 14),
        F::AVX512_FP16 => avx512 && has(l7.edx, 23),
        F::SHA512 => avx && has(l7_1.eax, 0),
        F::SM3 => avx && has(l7_1.eax, 1),
        F::SM4 => avx && has(l7_1.eax, 2),
        F::AVX_VNNI => avx && has(l7_1.eax, 4),
        F::AVX512_BF16 => avx512 && has(l7_1.eax, 5),
        F::AVX_IFMA => avx && has(l7_1.eax, 23),
        F::AVX_VNNI_INT8 => avx && has(l7_1.edx, 4),
        F::AVX_NE_CONVERT => avx && has(l7_1.edx, 5),
        F::AVX_VNNI_INT16 => avx && has(l7_1.edx, 10),
        F::LZCNT => has(x1.ecx, 5),
        F::SSE4A => has(x1.ecx, 6),
        F::PREFETCHW => has(x1.ecx, 8),
        F::RDTSCP => has(x1.edx, 27),
        F::XSAVEOPT => has(xs, 0),
        F::XSAVEC => has(xs, 1),
        F::XSAVES => has(xs, 3),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_covered_excluded_or_out_of_scope() {
        let c = catalog();
        let excluded: usize = c.excluded.values().map(Vec::len).sum();
        assert_eq!(c.covered.len() + excluded + c.out_of_scope, Code::values().len());
        assert!(c.covered.len() > 1500, "{} forms covered", c.covered.len());
        assert!(c.excluded.keys().all(|why| why.len() > 5), "each has a reason");
        for code in [Code::Add_rm64_r64, Code::Retnq, Code::Fadd_m64fp, Code::Movaps_xmm_xmmm128] {
            assert!(c.covered.contains(&code), "{code:?}");
        }
    }
}
