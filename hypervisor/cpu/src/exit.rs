//! Closed enums: what an instruction can raise, what a step came to, why a vCPU stopped.

/// Error code bits of a page fault (SDM vol. 3, section 4.7).
pub type PageFaultCode = u32;

/// An exception that the guest is to see (SDM vol. 3, table 6-1). It is an outcome of guest execution, never a host error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #DE, vector 0.
    DivideError,
    /// #DB, vector 1. The bits to merge into DR6.
    Debug(u64),
    /// #BP, vector 3 (INT3: a trap, RIP already advanced).
    Breakpoint,
    /// #OF, vector 4 (INTO: a trap).
    Overflow,
    /// #BR, vector 5.
    BoundRange,
    /// #UD, vector 6.
    InvalidOpcode,
    /// #NM, vector 7.
    DeviceNotAvailable,
    /// #DF, vector 8.
    DoubleFault,
    /// #TS, vector 10.
    InvalidTss(u16),
    /// #NP, vector 11.
    SegmentNotPresent(u16),
    /// #SS, vector 12.
    StackFault(u16),
    /// #GP, vector 13.
    GeneralProtection(u16),
    /// #PF, vector 14.
    PageFault {
        /// Faulting linear address, for CR2.
        addr: u64,
        /// Error code.
        code: PageFaultCode,
    },
    /// #MF, vector 16.
    FpuError,
    /// #AC, vector 17.
    AlignmentCheck,
    /// #XM, vector 19.
    SimdError,
}

impl Exception {
    /// The exception's vector.
    pub fn vector(self) -> u8 {
        match self {
            Self::DivideError => 0,
            Self::Debug(_) => 1,
            Self::Breakpoint => 3,
            Self::Overflow => 4,
            Self::BoundRange => 5,
            Self::InvalidOpcode => 6,
            Self::DeviceNotAvailable => 7,
            Self::DoubleFault => 8,
            Self::InvalidTss(_) => 10,
            Self::SegmentNotPresent(_) => 11,
            Self::StackFault(_) => 12,
            Self::GeneralProtection(_) => 13,
            Self::PageFault { .. } => 14,
            Self::FpuError => 16,
            Self::AlignmentCheck => 17,
            Self::SimdError => 19,
        }
    }

    /// The error code pushed with it, if it has one.
    pub fn error_code(self) -> Option<u32> {
        match self {
            Self::DoubleFault | Self::AlignmentCheck => Some(0),
            Self::InvalidTss(c) | Self::SegmentNotPresent(c) | Self::StackFault(c) | Self::GeneralProtection(c) => {
                Some(u32::from(c))
            }
            Self::PageFault { code, .. } => Some(code),
            _ => None,
        }
    }
}

/// What emulating one instruction came to. RIP has been advanced (or set) in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on with the next instruction; nothing that affects translation changed.
    Next,
    /// RIP went elsewhere, or a mode, mapping or interrupt-related bit changed: look the next block up afresh.
    Resync,
    /// HLT: the vCPU waits for an interrupt.
    Halt,
    /// The vCPU must stop with this reason.
    Stop(StopReason),
}

/// Why a vCPU cannot go on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A fault while delivering a double fault (SDM vol. 3, section 6.15, interrupt 8).
    TripleFault,
}

/// Why `run()` on a vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// The vCPU executed HLT with nothing pending. Run it again once an interrupt is pending.
    Halt,
    /// The vCPU executed HLT, and the interrupt that is pending is masked (RFLAGS.IF). Run it again once anything else has come: an NMI, a
    /// start-up message, or a kick by another vCPU.
    HaltMasked,
    /// The vCPU waits for a start-up message. Run it again once INIT or a start-up message has come.
    AwaitsStartup,
    /// Someone asked this vCPU to come out (see the engine's kick handle with `stop`), or the machine is stopping.
    Stopped,
    /// Triple fault.
    TripleFault,
}
