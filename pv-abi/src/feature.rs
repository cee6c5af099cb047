//! Feature bits: what a hypervisor offers and what a guest acknowledges.
//!
//! A hypervisor offers a feature only where it is implemented *and* pays: a guest that finds a bit set may use the feature without
//! asking whether the native way were faster. Calls of a feature that was not acknowledged with [`crate::call::Call::Negotiate`] fail.

/// One feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Feature {
    /// Batched page-table updates and invalidations ([`crate::memory::Update`]).
    PageTables = 0,
    /// A byte of the shared page masks interrupts ([`crate::shared::SharedPage::irq_enabled`]).
    VirtualIf = 1,
    /// Nanoseconds and wall-clock time in the shared page ([`crate::shared::Clock`]).
    Clock = 2,
    /// A one-shot timer in nanoseconds.
    Timer = 3,
    /// Inter-processor interrupts to many vCPUs in one call.
    Ipi = 4,
    /// TLB invalidation on many vCPUs in one call.
    TlbFlush = 5,
    /// Ends of interrupts that need no access to the local APIC ([`crate::shared::SharedPage::eoi`]).
    LazyEoi = 6,
    /// Halt, kick and yield.
    Schedule = 7,
    /// Time that the vCPU wanted to run and did not ([`crate::shared::Stolen`]).
    StolenTime = 8,
    /// Text from and to the machine's console.
    Console = 9,
    /// Pages whose contents the guest does not need.
    FreePages = 10,
    /// Power-off, reset and panic reports.
    Power = 11,
    /// Virtio devices without trapped registers, with doorbell and event bits.
    Virtio = 12,
}

impl Feature {
    /// All features, by bit.
    pub const ALL: [Self; 13] = [
        Self::PageTables,
        Self::VirtualIf,
        Self::Clock,
        Self::Timer,
        Self::Ipi,
        Self::TlbFlush,
        Self::LazyEoi,
        Self::Schedule,
        Self::StolenTime,
        Self::Console,
        Self::FreePages,
        Self::Power,
        Self::Virtio,
    ];

    /// Its name in the header and the specification.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PageTables => "PAGE_TABLES",
            Self::VirtualIf => "VIRTUAL_IF",
            Self::Clock => "CLOCK",
            Self::Timer => "TIMER",
            Self::Ipi => "IPI",
            Self::TlbFlush => "TLB_FLUSH",
            Self::LazyEoi => "LAZY_EOI",
            Self::Schedule => "SCHEDULE",
            Self::StolenTime => "STOLEN_TIME",
            Self::Console => "CONSOLE",
            Self::FreePages => "FREE_PAGES",
            Self::Power => "POWER",
            Self::Virtio => "VIRTIO",
        }
    }

    /// What it is, in one line.
    pub const fn summary(self) -> &'static str {
        match self {
            Self::PageTables => "page-table updates and invalidations in batches",
            Self::VirtualIf => "interrupts masked by a byte of the shared page",
            Self::Clock => "nanoseconds and wall-clock time in the shared page",
            Self::Timer => "one-shot timer in nanoseconds",
            Self::Ipi => "interrupts to many vCPUs in one call",
            Self::TlbFlush => "TLB invalidation on many vCPUs in one call",
            Self::LazyEoi => "ends of interrupts without access to the local APIC",
            Self::Schedule => "halt, kick and yield",
            Self::StolenTime => "time that the vCPU wanted to run and did not",
            Self::Console => "text from and to the machine's console",
            Self::FreePages => "hints about pages whose contents are not needed",
            Self::Power => "power-off, reset and panic reports",
            Self::Virtio => "virtio devices with doorbell and event bits",
        }
    }

    /// Its bit.
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);

    /// A set of the features listed.
    pub const fn of(list: &[Feature]) -> Self {
        let (mut bits, mut n) = (0, 0);
        while n < list.len() {
            bits |= list[n].bit();
            n += 1;
        }
        Self(bits)
    }

    /// All features that this version defines.
    pub const fn all() -> Self {
        Self::of(&Feature::ALL)
    }

    /// Whether `f` is in the set.
    pub const fn has(self, f: Feature) -> bool {
        self.0 & f.bit() != 0
    }

    /// Whether nothing is in the set that `other` has not.
    pub const fn within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// What both sets have.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The set without `f`.
    pub const fn without(self, f: Feature) -> Self {
        Self(self.0 & !f.bit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_dense_and_names_differ() {
        for (n, f) in Feature::ALL.iter().enumerate() {
            assert_eq!(*f as usize, n);
            assert_eq!(Feature::ALL.iter().filter(|g| g.name() == f.name()).count(), 1);
        }
        assert_eq!(Features::all().0, (1 << Feature::ALL.len()) - 1);
        assert!(Features::of(&[Feature::Clock]).within(Features::all()));
        assert!(!Features(1 << 40).within(Features::all()));
    }
}
