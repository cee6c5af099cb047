//! Hypercalls: numbers, registers and errors.
//!
//! A guest in 64-bit mode at CPL 0 calls the entry sequence ([`crate::cpuid::ENTRY`]) with the number in RAX and arguments in RDI, RSI, RDX and RCX.
//! RAX comes back with 0 or a negated [`Error`], RDX with the call's value (0 if it has none). All other registers keep their contents,
//! save the status flags of RFLAGS, which are undefined. An argument that a call does not use must be 0.

use crate::feature::Feature;

/// First hypercall number: ASCII "PV" above 16 bits, apart from the small numbers that other interfaces use.
pub const FIRST: u64 = 0x5056_0000;

/// The hypercalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Call {
    /// Agree on version and features: (version, features) gives the features in force.
    Negotiate = FIRST,
    /// Share a page for the calling vCPU: (gpa, or 0 to take it back).
    SharePage = FIRST + 1,
    /// Apply [`crate::memory::Update`]s: (gpa of the first, count) gives how many were applied.
    UpdatePages = FIRST + 2,
    /// Look at interrupts that were held back while the virtual interrupt flag was clear.
    Unmask = FIRST + 3,
    /// Set the one-shot timer: (deadline in ns of the shared clock, or 0 to disarm; vector).
    SetTimer = FIRST + 4,
    /// Send interrupts: (mask of vCPUs, first vCPU of the mask, vector) gives how many vCPUs were addressed.
    SendIpi = FIRST + 5,
    /// Invalidate on other vCPUs: (mask of vCPUs, first vCPU of the mask, first address or all ones, pages).
    FlushTlb = FIRST + 6,
    /// Enable interrupts and wait for one.
    Halt = FIRST + 7,
    /// End another vCPU's halt: (vCPU).
    Kick = FIRST + 8,
    /// Let another vCPU run: (vCPU, or all ones for anyone).
    Yield = FIRST + 9,
    /// Write text to the console: (gpa, bytes) gives how many were written.
    ConsoleWrite = FIRST + 10,
    /// Read what was typed: (gpa, bytes) gives how many were read.
    ConsoleRead = FIRST + 11,
    /// Give up contents of pages: (gpa of the first [`crate::memory::FreeRange`], count) gives how many were handled.
    FreePages = FIRST + 12,
    /// Power off or reset: ([`Shutdown`]). Does not return.
    Shutdown = FIRST + 13,
    /// Report a panic: (gpa of a text, bytes). Does not return.
    Panic = FIRST + 14,
    /// Read a register of a virtio device: (device, offset, size) gives its value.
    VirtioRead = FIRST + 15,
    /// Write a register of a virtio device: (device, offset, size, value).
    VirtioWrite = FIRST + 16,
    /// Tell devices of new buffers: (device and queue as [`crate::virtio::doorbell`], or all ones for the devices in
    /// [`crate::shared::SharedPage::doorbells`]).
    Notify = FIRST + 17,
    /// Set the vector that is raised when event bits appear: (vector, or 0 for none).
    EventVector = FIRST + 18,
}

impl Call {
    /// All calls, by number.
    pub const ALL: [Self; 19] = [
        Self::Negotiate,
        Self::SharePage,
        Self::UpdatePages,
        Self::Unmask,
        Self::SetTimer,
        Self::SendIpi,
        Self::FlushTlb,
        Self::Halt,
        Self::Kick,
        Self::Yield,
        Self::ConsoleWrite,
        Self::ConsoleRead,
        Self::FreePages,
        Self::Shutdown,
        Self::Panic,
        Self::VirtioRead,
        Self::VirtioWrite,
        Self::Notify,
        Self::EventVector,
    ];

    /// The call with this number.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(number.checked_sub(FIRST)?).ok()?).copied()
    }

    /// Its number.
    pub const fn number(self) -> u64 {
        self as u64
    }

    /// Its name in the header and the specification.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Negotiate => "NEGOTIATE",
            Self::SharePage => "SHARE_PAGE",
            Self::UpdatePages => "UPDATE_PAGES",
            Self::Unmask => "UNMASK",
            Self::SetTimer => "SET_TIMER",
            Self::SendIpi => "SEND_IPI",
            Self::FlushTlb => "FLUSH_TLB",
            Self::Halt => "HALT",
            Self::Kick => "KICK",
            Self::Yield => "YIELD",
            Self::ConsoleWrite => "CONSOLE_WRITE",
            Self::ConsoleRead => "CONSOLE_READ",
            Self::FreePages => "FREE_PAGES",
            Self::Shutdown => "SHUTDOWN",
            Self::Panic => "PANIC",
            Self::VirtioRead => "VIRTIO_READ",
            Self::VirtioWrite => "VIRTIO_WRITE",
            Self::Notify => "NOTIFY",
            Self::EventVector => "EVENT_VECTOR",
        }
    }

    /// Feature that must be in force for it; `None` for the calls that set the interface up.
    pub const fn feature(self) -> Option<Feature> {
        Some(match self {
            Self::Negotiate | Self::SharePage => return None,
            Self::UpdatePages => Feature::PageTables,
            Self::Unmask => Feature::VirtualIf,
            Self::SetTimer => Feature::Timer,
            Self::SendIpi => Feature::Ipi,
            Self::FlushTlb => Feature::TlbFlush,
            Self::Halt | Self::Kick | Self::Yield => Feature::Schedule,
            Self::ConsoleWrite | Self::ConsoleRead => Feature::Console,
            Self::FreePages => Feature::FreePages,
            Self::Shutdown | Self::Panic => Feature::Power,
            Self::VirtioRead | Self::VirtioWrite | Self::Notify | Self::EventVector => Feature::Virtio,
        })
    }

    /// How many of the four argument registers it uses; the others must be 0.
    pub const fn arguments(self) -> usize {
        match self {
            Self::Unmask | Self::Halt => 0,
            Self::SharePage | Self::Kick | Self::Yield | Self::Shutdown | Self::Notify | Self::EventVector => 1,
            Self::Negotiate
            | Self::UpdatePages
            | Self::SetTimer
            | Self::ConsoleWrite
            | Self::ConsoleRead
            | Self::FreePages
            | Self::Panic => 2,
            Self::SendIpi | Self::VirtioRead => 3,
            Self::FlushTlb | Self::VirtioWrite => 4,
        }
    }
}

/// Why a hypercall did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum Error {
    /// There is no such call, or its feature is not on offer.
    NotSupported = 1,
    /// The call's feature was not acknowledged.
    NotNegotiated = 2,
    /// The caller is not in 64-bit mode at CPL 0.
    NotPermitted = 3,
    /// A value is out of its range, or a reserved bit or an unused argument is not 0.
    InvalidArgument = 4,
    /// An address is misaligned or not RAM in its whole length.
    BadAddress = 5,
    /// A count is above the limit that CPUID gives.
    TooMany = 6,
    /// A vCPU or device does not exist.
    NoSuchTarget = 7,
    /// The version asked for is not one that the hypervisor speaks.
    BadVersion = 8,
    /// A feature was asked for that is not on offer.
    BadFeatures = 9,
    /// The call needs a shared page and there is none.
    NoSharedPage = 10,
}

impl Error {
    /// All errors, by code.
    pub const ALL: [Self; 10] = [
        Self::NotSupported,
        Self::NotNegotiated,
        Self::NotPermitted,
        Self::InvalidArgument,
        Self::BadAddress,
        Self::TooMany,
        Self::NoSuchTarget,
        Self::BadVersion,
        Self::BadFeatures,
        Self::NoSharedPage,
    ];

    /// As it stands in RAX.
    pub const fn to_rax(self) -> u64 {
        (self as i64).wrapping_neg() as u64
    }

    /// From RAX; `None` for success and for codes that a later version may add.
    pub fn from_rax(rax: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.to_rax() == rax)
    }

    /// Its name in the header and the specification.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotSupported => "NOT_SUPPORTED",
            Self::NotNegotiated => "NOT_NEGOTIATED",
            Self::NotPermitted => "NOT_PERMITTED",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::BadAddress => "BAD_ADDRESS",
            Self::TooMany => "TOO_MANY",
            Self::NoSuchTarget => "NO_SUCH_TARGET",
            Self::BadVersion => "BAD_VERSION",
            Self::BadFeatures => "BAD_FEATURES",
            Self::NoSharedPage => "NO_SHARED_PAGE",
        }
    }
}

/// Argument of [`Call::Shutdown`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Shutdown {
    /// The machine goes off.
    PowerOff = 0,
    /// The machine starts anew.
    Reset = 1,
}

impl Shutdown {
    /// From the argument.
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::PowerOff),
            1 => Some(Self::Reset),
            _ => None,
        }
    }
}

/// Stands for "anyone" in [`Call::Yield`], "all of the address space" in [`Call::FlushTlb`] and "the doorbell bits" in [`Call::Notify`].
pub const ALL_ONES: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_errors_are_small_and_negative() {
        for (n, c) in Call::ALL.iter().enumerate() {
            assert_eq!(c.number(), FIRST + n as u64);
            assert_eq!(Call::from_number(c.number()), Some(*c));
            assert!(c.arguments() <= 4);
        }
        for bad in [0, 1, FIRST - 1, FIRST + Call::ALL.len() as u64, u64::MAX] {
            assert_eq!(Call::from_number(bad), None);
        }
        for e in Error::ALL {
            assert!((-4095..0).contains(&(e.to_rax() as i64)));
            assert_eq!(Error::from_rax(e.to_rax()), Some(e));
        }
        assert_eq!(Error::from_rax(0), None);
    }
}
