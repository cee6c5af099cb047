//! What the translator does with each instruction of the instruction set, as a table over iced's `Code`.
//!
//! The table is a white list: an instruction is copied only when every CPUID feature it belongs to is known to be plain
//! user-mode computation. Whatever is not on it is emulated, which ends in #UD for what no guest is offered.

use iced_x86::{Code, CpuidFeature, FlowControl, Mnemonic, OpCodeOperandKind as K};
use std::sync::OnceLock;

/// Which register state an instruction needs enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// General-purpose registers only.
    Integer,
    /// x87 or MMX.
    X87,
    /// FWAIT (#NM depends on CR0.MP).
    Wait,
    Sse,
    Avx,
    Avx512,
}

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Re-encoded with registers mapped and its memory operand redirected.
    Copy(Unit),
    /// No effect.
    Nop,
    Lea,
    /// BT, BTS, BTR, BTC.
    BitTest,
    Push,
    Pop,
    Leave,
    JmpDirect,
    JmpIndirect,
    CallDirect,
    CallIndirect,
    Ret,
    Jcc,
    Loop,
    Cli,
    Sti,
    Stac,
    Clac,
    Rdtsc,
    /// PAUSE: now and then a hint that the vCPU spins.
    Pause,
    Rdtscp,
    Swapgs,
    ReadCr,
    ReadBase,
    Pushf,
    Cld,
    Std,
    /// MOVS, STOS, LODS of sizes that are worth it.
    String,
    Syscall,
    Sysretq,
    Iretq,
    /// MOV from a segment register.
    ReadSegment,
    /// WRFSBASE and WRGSBASE.
    WriteBase,
    /// Carried out by Rust code; goes on behind it.
    Emulate,
    /// Carried out by Rust code; ends the block.
    EmulateEnd,
}

/// The register state that an instruction needs enabled, whatever its class.
pub(crate) fn unit_of(code: Code) -> Unit {
    static TABLE: OnceLock<Vec<Unit>> = OnceLock::new();
    TABLE.get_or_init(|| Code::values().map(unit).collect())[code as usize]
}

/// The class of an instruction.
pub(crate) fn classify(code: Code) -> Class {
    static TABLE: OnceLock<Vec<Class>> = OnceLock::new();
    TABLE.get_or_init(|| Code::values().map(compute).collect())[code as usize]
}

/// Features whose instructions may be copied when all operands are plain.
fn plain(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::MOVBE
            | F::RDRAND
            | F::RDSEED
            | F::CLFSH
            | F::CLFLUSHOPT
            | F::CLWB
            | F::PREFETCHW
            | F::PREFETCHWT1
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::CET_IBT
    ) || vector(f)
}

fn vector(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::FXSR
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::AVX
            | F::AVX2
            | F::F16C
            | F::FMA
            | F::SHA
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
            | F::AVX512F
            | F::AVX512VL
            | F::AVX512DQ
            | F::AVX512BW
            | F::AVX512CD
            | F::AVX512_IFMA
            | F::AVX512_VBMI
            | F::AVX512_VBMI2
            | F::AVX512_VNNI
            | F::AVX512_BITALG
            | F::AVX512_VPOPCNTDQ
            | F::AVX512_BF16
            | F::AVX512_FP16
            | F::AVX_VNNI
            | F::AVX_IFMA
            | F::AVX_VNNI_INT8
            | F::AVX_NE_CONVERT
    )
}

fn compute(code: Code) -> Class {
    use Mnemonic as M;
    let info = code.op_code();
    if !info.is_instruction() || code == Code::INVALID {
        return Class::EmulateEnd;
    }
    match info.mnemonic() {
        M::Nop
        | M::Reservednop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetch
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote
        | M::Rdsspd
        | M::Rdsspq => return Class::Nop,
        M::Lea => return Class::Lea,
        M::Cld => return Class::Cld,
        M::Std => return Class::Std,
        M::Movsb | M::Movsq | M::Stosb | M::Stosd | M::Stosq | M::Lodsb | M::Lodsd | M::Lodsq => return Class::String,
        M::Movsd if code == Code::Movsd_m32_m32 => return Class::String,
        M::Syscall => return Class::Syscall,
        M::Sysretq => return Class::Sysretq,
        M::Iretq => return Class::Iretq,
        M::Bt | M::Bts | M::Btr | M::Btc => return Class::BitTest,
        M::Push => {
            return match info.op_kind(0) {
                K::seg_rSI | K::seg_reg => Class::Emulate,
                _ if is_sreg_push(code) => Class::Emulate,
                _ => Class::Push,
            };
        }
        M::Pop => return if is_sreg_push(code) { Class::EmulateEnd } else { Class::Pop },
        M::Leave => return Class::Leave,
        M::Cli => return Class::Cli,
        M::Sti => return Class::Sti,
        M::Stac => return Class::Stac,
        M::Clac => return Class::Clac,
        M::Pause => return Class::Pause,
        M::Rdtsc => return Class::Rdtsc,
        M::Rdtscp => return Class::Rdtscp,
        M::Swapgs => return Class::Swapgs,
        M::Rdfsbase | M::Rdgsbase => return Class::ReadBase,
        M::Wrfsbase | M::Wrgsbase => return Class::WriteBase,
        M::Pushfq => return Class::Pushf,
        M::Pushf | M::Pushfd => return Class::Emulate,
        M::Popf | M::Popfd | M::Popfq | M::Lss | M::Lds | M::Les | M::Lfs | M::Lgs => return Class::EmulateEnd,
        M::Mov => match info.op_kind(0) {
            K::cr_reg => return Class::EmulateEnd,
            K::dr_reg => return Class::EmulateEnd,
            K::tr_reg => return Class::EmulateEnd,
            K::seg_reg => return Class::EmulateEnd,
            _ => match info.op_kind(1) {
                K::cr_reg => return Class::ReadCr,
                K::seg_reg => return Class::ReadSegment,
                K::dr_reg | K::tr_reg => return Class::Emulate,
                _ => {}
            },
        },
        M::Cpuid
        | M::Vmcall
        | M::Vmmcall
        | M::Xgetbv
        | M::Rdmsr
        | M::Rdpmc
        | M::Rdpid
        | M::In
        | M::Fxsave
        | M::Fxsave64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Enter
        | M::Xlatb
        | M::Pusha
        | M::Pushad
        | M::Popa
        | M::Popad
        | M::Daa
        | M::Das
        | M::Aaa
        | M::Aas
        | M::Aam
        | M::Aad
        | M::Bound
        | M::Salc
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Maskmovq
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xrstor
        | M::Xrstor64
        | M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Smsw
        | M::Str
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Arpl
        | M::Movsw
        | M::Stosw
        | M::Lodsw
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsq
        | M::Insb
        | M::Insw
        | M::Insd => return Class::Emulate,
        // MOVSD and CMPSD name both a string and an SSE2 instruction.
        M::Movsd | M::Cmpsd if info.op_count() == 2 && matches!(info.op_kind(0), K::es_rDI | K::seg_rSI) => {
            return Class::Emulate;
        }
        M::Outsb
        | M::Outsw
        | M::Outsd
        | M::Out
        | M::Hlt
        | M::Invlpg
        | M::Invpcid
        | M::Wrmsr
        | M::Xsetbv
        | M::Mwait
        | M::Monitor
        | M::Lgdt
        | M::Lidt
        | M::Lldt
        | M::Ltr
        | M::Clts
        | M::Lmsw
        | M::Wbinvd
        | M::Invd => return Class::EmulateEnd,
        M::Loop => return Class::Loop,
        M::Jcxz | M::Jecxz | M::Jrcxz => return Class::Loop,
        M::Loope | M::Loopne => return Class::EmulateEnd,
        M::Xbegin | M::Xabort | M::Xend | M::Xtest => return Class::EmulateEnd,
        _ => {}
    }
    match code.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch if code.is_jmp_short_or_near() => return Class::JmpDirect,
        FlowControl::IndirectBranch if code.is_jmp_near_indirect() => return Class::JmpIndirect,
        FlowControl::Call if code.is_call_near() => return Class::CallDirect,
        FlowControl::IndirectCall if code.is_call_near_indirect() => return Class::CallIndirect,
        FlowControl::ConditionalBranch if code.is_jcc_short_or_near() => return Class::Jcc,
        FlowControl::Return if info.mnemonic() == M::Ret => return Class::Ret,
        _ => return Class::EmulateEnd,
    }
    if info.is_privileged() {
        return Class::EmulateEnd;
    }
    if uses_vsib(code) || !code.cpuid_features().iter().all(|&f| plain(f)) {
        return Class::Emulate;
    }
    Class::Copy(unit(code))
}

fn is_sreg_push(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Pushw_ES
            | C::Pushd_ES
            | C::Pushw_CS
            | C::Pushd_CS
            | C::Pushw_SS
            | C::Pushd_SS
            | C::Pushw_DS
            | C::Pushd_DS
            | C::Pushw_FS
            | C::Pushd_FS
            | C::Pushq_FS
            | C::Pushw_GS
            | C::Pushd_GS
            | C::Pushq_GS
            | C::Popw_ES
            | C::Popd_ES
            | C::Popw_CS
            | C::Popw_SS
            | C::Popd_SS
            | C::Popw_DS
            | C::Popd_DS
            | C::Popw_FS
            | C::Popd_FS
            | C::Popq_FS
            | C::Popw_GS
            | C::Popd_GS
            | C::Popq_GS
    )
}

fn uses_vsib(code: Code) -> bool {
    code.op_code().op_kinds().iter().any(|k| {
        matches!(k, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y | K::mem_vsib32z | K::mem_vsib64z)
    })
}

fn unit(code: Code) -> Unit {
    use iced_x86::EncodingKind as E;
    let info = code.op_code();
    if info.mnemonic() == Mnemonic::Wait {
        return Unit::Wait;
    }
    let fpu = code
        .cpuid_features()
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
    let has = |want: &[K]| info.op_kinds().iter().any(|k| want.contains(k));
    let mmx = has(&[K::mm_reg, K::mm_rm, K::mm_or_mem]);
    if fpu || mmx || info.mnemonic() == Mnemonic::Emms || info.mnemonic() == Mnemonic::Fisttp {
        return Unit::X87;
    }
    match info.encoding() {
        E::EVEX => return Unit::Avx512,
        E::VEX => {
            if has(&[K::k_reg, K::k_rm, K::k_or_mem, K::k_vvvv]) {
                return Unit::Avx512;
            }
            let xmm = has(&[
                K::xmm_reg,
                K::xmm_rm,
                K::xmm_vvvv,
                K::xmm_or_mem,
                K::xmm_is4,
                K::xmm_is5,
                K::ymm_reg,
                K::ymm_rm,
                K::ymm_vvvv,
                K::ymm_or_mem,
                K::ymm_is4,
            ]);
            let state = matches!(
                info.mnemonic(),
                Mnemonic::Vzeroupper | Mnemonic::Vzeroall | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
            );
            return if xmm || state { Unit::Avx } else { Unit::Integer };
        }
        _ => {}
    }
    let xmm = has(&[K::xmm_reg, K::xmm_rm, K::xmm_or_mem]);
    let csr = matches!(info.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr);
    if xmm || csr { Unit::Sse } else { Unit::Integer }
}
