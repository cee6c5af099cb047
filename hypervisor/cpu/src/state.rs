//! The complete architectural state of one vCPU.
//!
//! [`CpuState`] is `repr(C)`: translated code reaches its fields at fixed offsets from the GS base, so a field's place
//! is part of the contract between the translator and the code it emits. Fields that translated code touches
//! come first. Everything is plain data; nothing here knows about memory or devices.

use serde::{Deserialize, Serialize};

/// General-purpose register numbers in the encoding order of the instruction set (SDM vol. 2, table 3-1).
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reg {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

/// Segment register numbers in encoding order (SDM vol. 2, table 3-1, `Sreg`).
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Seg {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register with its hidden part (SDM vol. 3, section 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[repr(C)]
pub struct Segment {
    /// Linear base address in bytes.
    pub base: u64,
    /// Limit in bytes, granularity already applied (a 4 GiB flat segment has `0xffff_ffff`).
    pub limit: u32,
    /// Bits 8..24 of the descriptor's second word, moved to bit 0: type (0-3), S (4), DPL (5-6), P (7), limit 16-19
    /// (8-11, ignored here), AVL (12), L (13), D/B (14), G (15). Zero means "null: unusable".
    pub attr: u16,
    /// The visible selector.
    pub selector: u16,
}

impl Segment {
    /// Present bit in [`Segment::attr`].
    pub const P: u16 = 1 << 7;
    /// Code/data (not system) bit in [`Segment::attr`].
    pub const S: u16 = 1 << 4;
    /// Long-mode code bit in [`Segment::attr`].
    pub const L: u16 = 1 << 13;
    /// Default operation size (32-bit) bit in [`Segment::attr`].
    pub const DB: u16 = 1 << 14;
    /// Granularity bit in [`Segment::attr`].
    pub const G: u16 = 1 << 15;

    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attr >> 5) & 3) as u8
    }

    /// Whether the segment can be used at all (it is not null and it is present).
    pub fn usable(&self) -> bool {
        self.attr & Self::P != 0
    }

    /// A flat 4 GiB code segment: `l` for 64-bit, else 32-bit; ring `dpl`.
    pub fn flat_code(selector: u16, dpl: u8, l: bool) -> Self {
        let mode = if l { Self::L } else { Self::DB };
        Self { base: 0, limit: u32::MAX, attr: 0x9b | (u16::from(dpl) << 5) | Self::G | mode, selector }
    }

    /// A flat 4 GiB read/write data segment of ring `dpl`.
    pub fn flat_data(selector: u16, dpl: u8) -> Self {
        Self { base: 0, limit: u32::MAX, attr: 0x93 | (u16::from(dpl) << 5) | Self::G | Self::DB, selector }
    }

    /// The real-mode form: base = selector * 16, limit 64 KiB (SDM vol. 3, section 21.1.1).
    pub fn real(selector: u16) -> Self {
        Self { base: u64::from(selector) << 4, limit: 0xffff, attr: 0x93, selector }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[repr(C)]
pub struct TableReg {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Bits of RFLAGS (SDM vol. 1, section 3.4.3).
#[allow(missing_docs)]
pub mod rflags {
    pub const CF: u64 = 1;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The flags that arithmetic instructions produce.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
    /// Flags that live in the host's RFLAGS while translated code runs.
    pub const NATIVE: u64 = STATUS | DF;
}

/// Bits of CR0 (SDM vol. 3, section 2.5).
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4 (SDM vol. 3, section 2.5).
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u64 = 1;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// Bits of IA32_EFER (SDM vol. 3, section 2.2.1).
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Bytes kept for the XSAVE image, standard (non-compacted) format. Legacy region, header, AVX, opmask, ZMM_Hi256 and
/// Hi16_ZMM end at 2,688; AMX tile data is never offered to a guest.
pub const XSAVE_BYTES: usize = 4096;

/// The XSAVE image, aligned as the instruction wants it.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_BYTES]);

/// All of a vCPU's architectural state. See the module text for the layout rule.
#[derive(Clone)]
#[repr(C)]
pub struct CpuState {
    /// General-purpose registers, indexed by [`Reg`].
    pub gpr: [u64; 16],
    /// Instruction pointer (an offset into CS outside 64-bit mode).
    pub rip: u64,
    /// Full RFLAGS. While translated code runs, the flags in [`rflags::NATIVE`] live in the host's RFLAGS instead and
    /// their bits here are stale; whenever Rust code sees this structure it is complete and exact.
    pub rflags: u64,
    /// Segment registers, indexed by [`Seg`].
    pub seg: [Segment; 6],
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3, PCID included.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    /// Current privilege level (kept beside CS because SYSRET and friends set it on its own).
    pub cpl: u8,
    /// Interrupts are held off for one instruction (after STI, MOV SS, POP SS; SDM vol. 3, section 6.8.3).
    pub irq_shadow: u8,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: u8,
    /// Whether the vCPU runs: 0 if it does, 1 if it executed HLT and waits for an interrupt, [`AWAITS_STARTUP`].
    pub halted: u8,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableReg,
    /// Interrupt descriptor table register.
    pub idtr: TableReg,
    /// Debug registers DR0-DR7 (4 and 5 unused).
    pub dr: [u64; 8],
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL as the guest wrote it (kept, without effect).
    pub spec_ctrl: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs, in the order of MSRs 0x250, 0x258, 0x259, 0x268..=0x26f.
    pub mtrr_fixed: [u64; 11],
    /// Variable-range MTRR base/mask pairs.
    pub mtrr_var: [(u64, u64); 8],
    /// Index of this vCPU, which is also its initial APIC ID.
    pub id: u32,
    /// x87, SSE, AVX and AVX-512 state in standard XSAVE format. Exact whenever Rust code sees this structure.
    pub xsave: XsaveArea,
}

/// Value of [`CpuState::halted`]: the vCPU waits for a start-up message, after power-up or INIT. Nothing else but INIT gets through to it.
pub const AWAITS_STARTUP: u8 = 2;

impl CpuState {
    /// What INIT leaves (SDM vol. 3, table 10-1): as after a reset, but for the time-stamp counter, the cache-control bits
    /// of CR0, extended state and those MSRs that concern the system as a whole. The vCPU then waits for a start-up message, save the first one: the
    /// bootstrap processor goes on at the reset vector (section 9.4.3), where this machine has no firmware.
    pub fn init(&mut self) {
        let kept = cr0::CD | cr0::NW;
        let fresh = Self::reset(self.id);
        *self = Self {
            cr0: fresh.cr0 & !kept | self.cr0 & kept,
            halted: if self.id == 0 { 0 } else { AWAITS_STARTUP },
            xcr0: self.xcr0,
            xsave: self.xsave.clone(),
            kernel_gs_base: self.kernel_gs_base,
            star: self.star,
            lstar: self.lstar,
            cstar: self.cstar,
            sfmask: self.sfmask,
            tsc_aux: self.tsc_aux,
            tsc_offset: self.tsc_offset,
            tsc_adjust: self.tsc_adjust,
            sysenter_cs: self.sysenter_cs,
            sysenter_esp: self.sysenter_esp,
            sysenter_eip: self.sysenter_eip,
            pat: self.pat,
            misc_enable: self.misc_enable,
            spec_ctrl: self.spec_ctrl,
            mtrr_def_type: self.mtrr_def_type,
            mtrr_fixed: self.mtrr_fixed,
            mtrr_var: self.mtrr_var,
            ..fresh
        };
    }

    /// A start-up message reached a vCPU that waits for one: it goes on in real mode at `vector` * 4096 (SDM vol. 3, section 9.4.4).
    pub fn start_up(&mut self, vector: u8) {
        let cs = &mut self.seg[Seg::Cs as usize];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.halted = 0;
    }

    /// The state after power-up reset (SDM vol. 3, table 10-1), at the reset vector.
    pub fn reset(id: u32) -> Self {
        let mut xsave = XsaveArea([0; XSAVE_BYTES]);
        xsave.0[0..2].copy_from_slice(&0x037f_u16.to_le_bytes()); // FCW after FNINIT
        xsave.0[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes()); // MXCSR
        xsave.0[512] = 3; // XSTATE_BV: x87 and SSE present
        let data = Segment { base: 0, limit: 0xffff, attr: 0x93, selector: 0 };
        let mut seg = [data; 6];
        seg[Seg::Cs as usize] = Segment { base: 0xffff_0000, limit: 0xffff, attr: 0x9b, selector: 0xf000 };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            seg,
            kernel_gs_base: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            cr0: cr0::ET | cr0::CD | cr0::NW,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            tsc_aux: 0,
            tsc_offset: 0,
            cpl: 0,
            irq_shadow: 0,
            nmi_blocked: 0,
            halted: 0,
            ldtr: Segment { base: 0, limit: 0xffff, attr: 0x82, selector: 0 },
            tr: Segment { base: 0, limit: 0xffff, attr: 0x8b, selector: 0 },
            gdtr: TableReg { base: 0, limit: 0xffff },
            idtr: TableReg { base: 0, limit: 0xffff },
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            spec_ctrl: 0,
            tsc_adjust: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_var: [(0, 0); 8],
            id,
            xsave,
        }
    }

    /// Whether IA-32e mode is active (EFER.LMA).
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether the vCPU executes 64-bit code (LMA and CS.L).
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[Seg::Cs as usize].attr & Segment::L != 0
    }

    /// Whether the vCPU is in protected mode (virtual-8086 mode included).
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether the vCPU is in virtual-8086 mode.
    pub fn v8086(&self) -> bool {
        self.rflags & rflags::VM != 0 && self.protected()
    }

    /// Default operand and address size of the current code segment: 16, 32 or 64 bits.
    pub fn code_bits(&self) -> u32 {
        let cs = &self.seg[Seg::Cs as usize];
        if self.code64() {
            64
        } else if cs.attr & Segment::DB != 0 {
            32
        } else {
            16
        }
    }

    /// A segment register by name.
    pub fn segment(&self, s: Seg) -> &Segment {
        &self.seg[s as usize]
    }
}
