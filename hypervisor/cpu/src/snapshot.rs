//! A vCPU's state as data: what one engine hands to another, and what a snapshot or a migration writes down.
//!
//! [`CpuState`] is laid out for translated code and knows one engine; a [`VcpuSnapshot`] belongs to none. It holds everything
//! architectural, at an instruction boundary: registers, MSRs, extended state by register (not as an XSAVE image, whose layout
//! differs between CPUs), the local APIC, and events that are on their way. Everything is typed and serde-serializable; [`VcpuSnapshot::to_json`] and
//! [`VcpuSnapshot::from_json`] are the file format, [`VERSION`] is in it.
//!
//! A snapshot that comes from outside is an allegation. [`VcpuSnapshot::restore`] and every engine's load check it as the CPU checks
//! a state that it is to enter (SDM vol. 3, section 27.3.1): what no sequence of instructions could have brought about
//! is an error of one sentence, and the vCPU that was to be loaded stays as it was.
//!
//! What is not here because it is not the vCPU's: memory, the I/O interrupt controllers, devices.

mod check;
mod fpu;
mod lapic;

use crate::CpuState;
use crate::cpuid::CpuidPolicy;
use crate::state::{AWAITS_STARTUP, Seg, Segment, TableReg, XsaveArea};
use serde::{Deserialize, Serialize};

pub use fpu::{FpuState, Hex};
pub use lapic::{LAPIC_PAGE_BYTES, LapicState};

/// Version of the format. Any change of a field's meaning raises it.
pub const VERSION: u32 = 1;

/// Bits of IA32_MISC_ENABLE that belong to the guest: fast strings and the limit of CPUID leaves. The others describe the CPU.
pub const MISC_ENABLE_BITS: u64 = 1 | 1 << 22;

/// Why a vCPU's state cannot be taken or loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not this format.
    #[error("the vCPU state cannot be read ({0}); save it again with this version of Paravane")]
    Format(String),
    /// Another version.
    #[error("the vCPU state has version {0} and this build reads version {VERSION}; use the build that wrote it")]
    Version(u64),
    /// No CPU can be in this state, or not one with these features.
    #[error("the vCPU state is not valid: {0}; it is damaged, or comes from a CPU with other features")]
    Invalid(String),
    /// A valid state that the engine cannot hold.
    #[error("this engine cannot hold the vCPU state: {0}")]
    Unsupported(&'static str),
}

/// Segment and descriptor-table registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Segments {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableReg,
    pub idtr: TableReg,
}

/// Control registers, EFER and XCR0. CR8 is the local APIC's task priority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Control {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
}

/// Debug registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debug {
    /// DR0 to DR3.
    pub address: [u64; 4],
    /// DR6, fixed bits included.
    pub dr6: u64,
    /// DR7, fixed bits included.
    pub dr7: u64,
}

/// MSRs with a value of their own. FS and GS bases are in the segments, EFER is in [`Control`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    /// Only [`MISC_ENABLE_BITS`].
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub mtrr_def_type: u64,
    /// MSRs 0x250, 0x258, 0x259, 0x268..=0x26f.
    pub mtrr_fixed: [u64; 11],
    /// Base and mask of each variable range.
    pub mtrr_var: [(u64, u64); 8],
}

/// The time-stamp counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tsc {
    /// Guest TSC minus host TSC, modulo 2^64. What counts when a state is loaded.
    pub offset: u64,
    /// IA32_TSC_ADJUST.
    pub adjust: u64,
    /// Guest TSC when the state was taken. Another host makes its offset from it, see [`VcpuSnapshot::rebase_tsc`].
    pub value: u64,
}

/// What the vCPU does when it is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// It executes instructions.
    Running,
    /// It executed HLT and waits for an interrupt; RIP is behind the HLT.
    Halted,
    /// It waits for a start-up message, after power-up or INIT (not the bootstrap processor).
    WaitForSipi,
}

/// An event whose delivery has begun (an interrupt is acknowledged and in service, a fault was found) but of which the guest has seen nothing. It
/// is delivered before the next instruction.
///
/// INT n, INT3, INTO and INT1 are never here: RIP is still at the instruction then, which is executed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Injection {
    /// An exception. CR2 and DR6 are up to date; RIP is what is to be pushed.
    Exception {
        /// Vector, 0..=31.
        vector: u8,
        /// What is pushed with it; there is one if the exception has one and CR0.PE is set.
        error_code: Option<u32>,
    },
    /// An external interrupt with this vector.
    Interrupt {
        /// Vector.
        vector: u8,
    },
    /// An NMI.
    Nmi {},
}

/// Events and what holds them off. NMI, INIT and start-up messages that wait are in [`LapicState`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// Interrupts are held off for one instruction (after STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// NMIs are held off until IRET.
    pub nmi_blocked: bool,
    /// What is being delivered.
    pub injection: Option<Injection>,
}

/// One vCPU at an instruction boundary. See the module text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuSnapshot {
    /// [`VERSION`].
    pub version: u32,
    /// Index of the vCPU, which is also its APIC ID.
    pub id: u32,
    /// General-purpose registers in encoding order, see [`crate::Reg`].
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Current privilege level. Equal to SS.DPL where SS is usable.
    pub cpl: u8,
    /// Segment registers and descriptor tables.
    pub segments: Segments,
    /// Control registers.
    pub control: Control,
    /// Debug registers.
    pub debug: Debug,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// The time-stamp counter.
    pub tsc: Tsc,
    /// x87, SSE, AVX and AVX-512 registers.
    pub fpu: FpuState,
    /// Running, halted, waiting.
    pub activity: Activity,
    /// Events on their way.
    pub events: Events,
    /// The local APIC; `None` where the machine has none.
    pub lapic: Option<LapicState>,
}

/// A segment register in canonical form: what cannot be used has no attributes, and bits 8-11, which repeat the limit, are zero.
fn canonical(s: &Segment) -> Segment {
    Segment { attr: if s.usable() { s.attr & !0x0f00 } else { 0 }, ..*s }
}

impl VcpuSnapshot {
    /// Takes everything that [`CpuState`] holds. Nothing is being delivered; there is no local APIC yet.
    pub fn capture(st: &CpuState, host_tsc: u64) -> Self {
        let seg = |s: Seg| canonical(st.segment(s));
        Self {
            version: VERSION,
            id: st.id,
            gpr: st.gpr,
            rip: st.rip,
            rflags: st.rflags,
            cpl: st.cpl,
            segments: Segments {
                es: seg(Seg::Es),
                cs: seg(Seg::Cs),
                ss: seg(Seg::Ss),
                ds: seg(Seg::Ds),
                fs: seg(Seg::Fs),
                gs: seg(Seg::Gs),
                ldtr: canonical(&st.ldtr),
                tr: canonical(&st.tr),
                gdtr: st.gdtr,
                idtr: st.idtr,
            },
            control: Control { cr0: st.cr0, cr2: st.cr2, cr3: st.cr3, cr4: st.cr4, efer: st.efer, xcr0: st.xcr0 },
            debug: Debug { address: [st.dr[0], st.dr[1], st.dr[2], st.dr[3]], dr6: st.dr[6], dr7: st.dr[7] },
            msrs: Msrs {
                star: st.star,
                lstar: st.lstar,
                cstar: st.cstar,
                sfmask: st.sfmask,
                kernel_gs_base: st.kernel_gs_base,
                tsc_aux: st.tsc_aux,
                sysenter_cs: st.sysenter_cs,
                sysenter_esp: st.sysenter_esp,
                sysenter_eip: st.sysenter_eip,
                pat: st.pat,
                misc_enable: st.misc_enable & MISC_ENABLE_BITS,
                spec_ctrl: st.spec_ctrl,
                mtrr_def_type: st.mtrr_def_type,
                mtrr_fixed: st.mtrr_fixed,
                mtrr_var: st.mtrr_var,
            },
            tsc: Tsc { offset: st.tsc_offset, adjust: st.tsc_adjust, value: host_tsc.wrapping_add(st.tsc_offset) },
            fpu: FpuState::from_xsave(&st.xsave),
            activity: match st.halted {
                0 => Activity::Running,
                AWAITS_STARTUP => Activity::WaitForSipi,
                _ => Activity::Halted,
            },
            events: Events { interrupt_shadow: st.irq_shadow != 0, nmi_blocked: st.nmi_blocked != 0, injection: None },
            lapic: None,
        }
    }

    /// Checks the snapshot, then makes the [`CpuState`] of it. What [`CpuState`] does not hold (an injection, the
    /// local APIC) remains for the caller.
    ///
    /// # Errors
    /// See [`VcpuSnapshot::validate`].
    pub fn restore(&self, cpuid: &CpuidPolicy) -> Result<CpuState, StateError> {
        self.validate(cpuid)?;
        let (s, c, m, d) = (&self.segments, &self.control, &self.msrs, &self.debug);
        Ok(CpuState {
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            seg: [s.es, s.cs, s.ss, s.ds, s.fs, s.gs],
            kernel_gs_base: m.kernel_gs_base,
            star: m.star,
            lstar: m.lstar,
            cstar: m.cstar,
            sfmask: m.sfmask,
            cr0: c.cr0,
            cr2: c.cr2,
            cr3: c.cr3,
            cr4: c.cr4,
            efer: c.efer,
            xcr0: c.xcr0,
            tsc_aux: m.tsc_aux,
            tsc_offset: self.tsc.offset,
            cpl: self.cpl,
            irq_shadow: self.events.interrupt_shadow.into(),
            nmi_blocked: self.events.nmi_blocked.into(),
            halted: match self.activity {
                Activity::Running => 0,
                Activity::Halted => 1,
                Activity::WaitForSipi => AWAITS_STARTUP,
            },
            ldtr: s.ldtr,
            tr: s.tr,
            gdtr: s.gdtr,
            idtr: s.idtr,
            dr: [d.address[0], d.address[1], d.address[2], d.address[3], 0, 0, d.dr6, d.dr7],
            sysenter_cs: m.sysenter_cs,
            sysenter_esp: m.sysenter_esp,
            sysenter_eip: m.sysenter_eip,
            pat: m.pat,
            misc_enable: m.misc_enable,
            spec_ctrl: m.spec_ctrl,
            tsc_adjust: self.tsc.adjust,
            mtrr_def_type: m.mtrr_def_type,
            mtrr_fixed: m.mtrr_fixed,
            mtrr_var: m.mtrr_var,
            id: self.id,
            xsave: self.fpu.to_xsave(),
        })
    }

    /// Lets the guest's TSC go on from where it was when the state was taken, on a host whose TSC is `host_tsc` now.
    pub fn rebase_tsc(&mut self, host_tsc: u64) {
        self.tsc.offset = self.tsc.value.wrapping_sub(host_tsc);
    }

    /// The snapshot as JSON, one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data with string keys always serializes")
    }

    /// Reads a snapshot. It is well-formed then, but not checked: see [`VcpuSnapshot::validate`].
    ///
    /// # Errors
    /// When it is not JSON, not of this version, or not this structure.
    pub fn from_json(text: &[u8]) -> Result<Self, StateError> {
        /// The only field that every version has.
        #[derive(Deserialize)]
        struct Head {
            version: u64,
        }
        let format = |e: serde_json::Error| StateError::Format(e.to_string());
        let head: Head = serde_json::from_slice(text).map_err(format)?;
        if head.version != u64::from(VERSION) {
            return Err(StateError::Version(head.version));
        }
        serde_json::from_slice(text).map_err(format)
    }
}

/// The extended state as an XSAVE image in the host's standard format, for engines that want one.
impl From<&FpuState> for XsaveArea {
    fn from(fpu: &FpuState) -> Self {
        fpu.to_xsave()
    }
}

#[cfg(test)]
mod tests;
