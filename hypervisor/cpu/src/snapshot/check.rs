//! What a vCPU's state must satisfy to be entered: the checks on guest state of SDM vol. 3, section 27.3.1, as far as they
//! are the architecture's and not one engine's, and those of the instructions that write each register.

use super::{Activity, Control, Injection, MISC_ENABLE_BITS, Msrs, Segments, StateError, VERSION, VcpuSnapshot};
use crate::control::{CR0_BITS, cr4_bits};
use crate::cpuid::CpuidPolicy;
use crate::interrupt::has_error_code;
use crate::mmu::is_canonical;
use crate::msr;
use crate::state::{Segment, TableReg, cr0, cr4, efer, rflags};
use crate::{host_fpu, xsave};

type Check = Result<(), StateError>;

/// Bits of RFLAGS that exist.
const RFLAGS_BITS: u64 = rflags::STATUS
    | rflags::FIXED
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::RF
    | rflags::VM
    | rflags::AC
    | rflags::VIF
    | rflags::VIP
    | rflags::ID;

fn require(holds: bool, what: &str) -> Check {
    if holds { Ok(()) } else { Err(StateError::Invalid(what.to_owned())) }
}

fn address(value: u64, of: &str) -> Check {
    if is_canonical(value) {
        Ok(())
    } else {
        Err(StateError::Invalid(format!("{of} holds {value:#x}, which is no canonical address")))
    }
}

fn bits(value: u64, allowed: u64, of: &str) -> Check {
    if value & !allowed == 0 {
        Ok(())
    } else {
        Err(StateError::Invalid(format!("{of} has the reserved or unsupported bits {:#x} set", value & !allowed)))
    }
}

impl VcpuSnapshot {
    /// Checks that a CPU with these features can be in this state.
    ///
    /// # Errors
    /// [`StateError::Version`] or [`StateError::Invalid`], with the first thing that is wrong.
    pub fn validate(&self, cpuid: &CpuidPolicy) -> Check {
        if self.version != VERSION {
            return Err(StateError::Version(self.version.into()));
        }
        self.control.validate(cpuid)?;
        self.validate_flags()?;
        self.segments.validate(self)?;
        self.validate_privilege()?;
        if self.code64() {
            address(self.rip, "RIP")?;
        } else {
            bits(self.rip, u32::MAX.into(), "RIP")?;
        }
        bits(self.debug.dr6, 0xffff_efff, "DR6")?;
        require(self.debug.dr6 & 0xffff_0ff0 == 0xffff_0ff0, "DR6 lacks bits that are always set")?;
        bits(self.debug.dr7, 0xffff_27ff, "DR7")?;
        require(self.debug.dr7 & 0x400 != 0, "DR7 lacks bit 10, which is always set")?;
        self.msrs.validate(cpuid)?;
        self.validate_fpu()?;
        self.validate_events()?;
        self.lapic.as_ref().map_or(Ok(()), |l| l.validate(self.id, cpuid.phys_bits()))
    }

    fn long_mode(&self) -> bool {
        self.control.efer & efer::LMA != 0
    }

    fn code64(&self) -> bool {
        self.long_mode() && self.segments.cs.attr & Segment::L != 0
    }

    fn protected(&self) -> bool {
        self.control.cr0 & cr0::PE != 0
    }

    fn v8086(&self) -> bool {
        self.protected() && self.rflags & rflags::VM != 0
    }

    fn validate_flags(&self) -> Check {
        bits(self.rflags, RFLAGS_BITS, "RFLAGS")?;
        require(self.rflags & rflags::FIXED != 0, "RFLAGS lacks bit 1, which is always set")?;
        let v86 = self.rflags & rflags::VM != 0;
        require(!v86 || (self.protected() && !self.long_mode()), "RFLAGS.VM is set in a mode without virtual-8086 mode")
    }

    fn validate_privilege(&self) -> Check {
        let (cs, ss) = (&self.segments.cs, &self.segments.ss);
        require(self.cpl <= 3, "the privilege level is above 3")?;
        if !self.protected() {
            return require(self.cpl == 0, "the privilege level is not 0 in real mode");
        }
        if self.v8086() {
            return require(self.cpl == 3, "the privilege level is not 3 in virtual-8086 mode");
        }
        require(!ss.usable() || ss.dpl() == self.cpl, "SS is of another privilege level than the CPU")?;
        // A conforming code segment runs at its caller's level.
        let conforming = cs.attr & 0xc == 0xc;
        require(
            if conforming { cs.dpl() <= self.cpl } else { cs.dpl() == self.cpl },
            "CS is of another privilege level than the CPU",
        )
    }

    fn validate_fpu(&self) -> Check {
        let f = &self.fpu;
        bits(f.in_use, host_fpu::offered_xcr0(), "the list of extended state in use")?;
        bits(f.mxcsr.into(), host_fpu::mxcsr_mask().into(), "MXCSR")?;
        bits(f.fop.into(), 0x7ff, "the x87 opcode register")?;
        require(f.canonical() == *f, "extended state that is not in use has contents")
    }

    fn validate_events(&self) -> Check {
        let e = &self.events;
        let waits = self.activity == Activity::WaitForSipi;
        require(!(waits && self.id == 0), "the bootstrap processor waits for a start-up message")?;
        let Some(injection) = e.injection else { return Ok(()) };
        require(self.activity == Activity::Running, "an event is delivered to a vCPU that does not run")?;
        require(
            !e.interrupt_shadow || matches!(injection, Injection::Exception { .. }),
            "an event is delivered in an interrupt shadow",
        )?;
        match injection {
            Injection::Exception { vector, error_code } => {
                require(
                    matches!(vector, 0 | 1 | 5..=8 | 10..=14 | 16 | 17 | 19),
                    "an exception is delivered that this CPU does not raise",
                )?;
                let expected = has_error_code(vector) && self.protected();
                require(error_code.is_some() == expected, "an exception has an error code too many or too few")?;
                let widest = if vector == 14 { 0x1f } else { 0xffff };
                bits(error_code.unwrap_or(0).into(), widest, "an exception's error code")
            }
            Injection::Interrupt { .. } => {
                require(self.rflags & rflags::IF != 0, "an interrupt is delivered while RFLAGS.IF is clear")
            }
            Injection::Nmi {} => require(e.nmi_blocked, "an NMI is delivered and NMIs are not blocked"),
        }
    }
}

impl Control {
    fn validate(&self, cpuid: &CpuidPolicy) -> Check {
        let c = self;
        bits(c.cr0, CR0_BITS, "CR0")?;
        require(c.cr0 & cr0::ET != 0, "CR0 lacks ET, which is always set")?;
        require(c.cr0 & cr0::PG == 0 || c.cr0 & cr0::PE != 0, "CR0 has paging without protection")?;
        require(c.cr0 & cr0::NW == 0 || c.cr0 & cr0::CD != 0, "CR0 has NW without CD")?;
        bits(c.cr4, cr4_bits(cpuid), "CR4")?;
        bits(c.efer, msr::efer_bits(cpuid.vendor()) | efer::LMA, "EFER")?;
        let lma = c.efer & efer::LMA != 0;
        let wanted = c.efer & efer::LME != 0 && c.cr0 & cr0::PG != 0;
        require(lma == wanted, "EFER.LMA does not follow from EFER.LME and CR0.PG")?;
        require(!lma || c.cr4 & cr4::PAE != 0, "IA-32e mode is on without CR4.PAE")?;
        require(lma || c.cr4 & cr4::PCIDE == 0, "CR4.PCIDE is set outside IA-32e mode")?;
        // Outside IA-32e mode only the lower half can be written, but what is there from before stays.
        bits(c.cr3, (1 << cpuid.phys_bits()) - 1, "CR3")?;
        bits(c.xcr0, host_fpu::offered_xcr0(), "XCR0")?;
        require(xsave::xcr0_consistent(c.xcr0), "XCR0 enables state without the state that it extends")
    }
}

impl Segments {
    fn validate(&self, s: &VcpuSnapshot) -> Check {
        let all = [
            (&self.es, "ES"),
            (&self.cs, "CS"),
            (&self.ss, "SS"),
            (&self.ds, "DS"),
            (&self.fs, "FS"),
            (&self.gs, "GS"),
            (&self.ldtr, "LDTR"),
            (&self.tr, "TR"),
        ];
        for (seg, name) in all {
            let invalid = |what: &str| Err(StateError::Invalid(format!("{name} {what}")));
            if seg.attr & 0x0f00 != 0 || (seg.attr != 0 && !seg.usable()) {
                return invalid("has attributes that are not in canonical form");
            }
            if matches!(name, "FS" | "GS" | "LDTR" | "TR") {
                address(seg.base, name)?;
            } else if seg.base >> 32 != 0 {
                return invalid("has a base above 4 GiB");
            }
            if !seg.usable() {
                continue;
            }
            let granular = seg.attr & Segment::G != 0;
            if (granular && seg.limit & 0xfff != 0xfff) || (!granular && seg.limit >> 20 != 0) {
                return invalid("has a limit that its granularity cannot express");
            }
            let (system, kind) = (seg.attr & Segment::S == 0, seg.attr & 0xf);
            match name {
                "LDTR" if system && kind == 2 => {}
                "TR" if system && (matches!(kind, 9 | 11) || (!s.long_mode() && matches!(kind, 1 | 3))) => {}
                // Real mode and the first steps of protected mode run from a data segment.
                "CS" if !system && (kind & 8 != 0 || kind & 0xa == 2) => {}
                "SS" if !system && kind & 0xa == 2 => {}
                "ES" | "DS" | "FS" | "GS" if !system && kind & 0xa != 8 => {}
                _ => return invalid("is of a type that cannot be loaded there"),
            }
            if s.v8086() && !matches!(name, "LDTR" | "TR") {
                let base = u64::from(seg.selector) << 4;
                if seg.base != base || seg.limit != 0xffff {
                    return invalid("is not what virtual-8086 mode makes of its selector");
                }
            }
        }
        require(self.cs.usable(), "CS is not usable")?;
        let both = Segment::L | Segment::DB;
        require(!s.long_mode() || self.cs.attr & both != both, "CS is a 64-bit and a 32-bit segment at once")?;
        let table = |t: &TableReg, of: &str| address(t.base, of);
        table(&self.gdtr, "GDTR")?;
        table(&self.idtr, "IDTR")
    }
}

impl Msrs {
    fn validate(&self, cpuid: &CpuidPolicy) -> Check {
        for (value, of) in [
            (self.lstar, "IA32_LSTAR"),
            (self.cstar, "IA32_CSTAR"),
            (self.kernel_gs_base, "IA32_KERNEL_GS_BASE"),
            (self.sysenter_esp, "IA32_SYSENTER_ESP"),
            (self.sysenter_eip, "IA32_SYSENTER_EIP"),
        ] {
            address(value, of)?;
        }
        let low = u64::from(u32::MAX);
        bits(self.sfmask, low, "IA32_FMASK")?;
        bits(self.tsc_aux, low, "IA32_TSC_AUX")?;
        bits(self.sysenter_cs, low, "IA32_SYSENTER_CS")?;
        bits(self.misc_enable, MISC_ENABLE_BITS, "IA32_MISC_ENABLE")?;
        bits(self.spec_ctrl, msr::SPEC_CTRL_BITS, "IA32_SPEC_CTRL")?;
        require(msr::pat_valid(self.pat), "IA32_PAT has a memory type that does not exist")?;
        require(msr::mtrr_def_type_valid(self.mtrr_def_type), "IA32_MTRR_DEF_TYPE is not valid")?;
        require(
            self.mtrr_fixed.iter().all(|&v| msr::mtrr_fixed_valid(v)),
            "a fixed-range MTRR has a memory type that does not exist",
        )?;
        let phys = cpuid.phys_bits();
        require(
            self.mtrr_var.iter().all(|&(b, m)| msr::mtrr_base_valid(b, phys) && msr::mtrr_mask_valid(m, phys)),
            "a variable-range MTRR is not valid",
        )
    }
}
