//! Detection and negotiation.

#![allow(unsafe_code)] // Copies code that the hypervisor supplies and calls it.

use crate::hypercall::{CodeSlot, Hypercalls};
use crate::platform::Platform;
use crate::smp::FlushRequests;
use crate::{clock, cpu};
use core::sync::atomic::AtomicU32;
use pv_abi::Version;
use pv_abi::call::Error;
use pv_abi::cpuid;
use pv_abi::feature::{Feature, Features};
use pv_abi::shared::Clock;

/// Why there is no ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// CPUID does not show it.
    NotFound,
    /// The hypervisor speaks another major version, or an older minor one.
    Version(Version),
    /// CPUID's entry sequence makes no sense.
    NoEntry,
    /// The hypervisor refused what it offers.
    Refused(Error),
    /// The kernel asked for the native way.
    NotWanted,
}

/// Which way a feature takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// The ABI's.
    Abi,
    /// The native one, which is this.
    Native(&'static str),
}

/// Limits that the hypervisor states ([`cpuid::LIMITS`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Elements of an array that one call works off.
    pub elements: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of one console write or panic report.
    pub text: u32,
    /// Virtio devices on the ABI transport.
    pub virtio_devices: u32,
}

/// What the hypervisor and the kernel agreed on. Made once, shared by all CPUs.
#[derive(Debug)]
pub struct Shim {
    pub(crate) calls: Option<Hypercalls>,
    pub(crate) features: Features,
    pub(crate) limits: Limits,
    pub(crate) platform: Platform,
    /// The native clock: counts from [`Shim::init`].
    pub(crate) tsc_clock: Clock,
    pub(crate) tsc_khz: u32,
    pub(crate) tsc_source: clock::TscSource,
    /// Frequency of the local APIC's timer in kHz; 0 until it is known.
    pub(crate) apic_khz: AtomicU32,
    pub(crate) flushes: FlushRequests,
    absent: Option<Absent>,
}

impl Shim {
    /// Finds the ABI and agrees on `wanted` features as far as they are on offer. Where there is none of it, the shim works natively.
    ///
    /// # Safety
    /// CPL 0 in 64-bit mode; once per boot. `slot` and `platform` hold what their fields promise. If the TSC frequency is not known, the
    /// PIT's channel 2 is used for some milliseconds.
    pub unsafe fn init(platform: Platform, slot: CodeSlot, wanted: Features) -> Self {
        // SAFETY: handed on to the caller.
        match unsafe { agree(slot, wanted) } {
            Ok(agreed) => {
                // SAFETY: handed on to the caller.
                let mut shim = unsafe { Self::made(platform, Some(agreed.base)) };
                shim.calls = Some(agreed.calls);
                shim.features = agreed.features;
                shim.limits = agreed.limits;
                shim.absent = None;
                shim
            }
            // SAFETY: handed on to the caller.
            Err(why) => Self { absent: Some(why), ..unsafe { Self::made(platform, None) } },
        }
    }

    /// A shim that takes the native way for everything, and leaves alone what another one has agreed on.
    ///
    /// # Safety
    /// As for [`Self::init`].
    pub unsafe fn native(platform: Platform) -> Self {
        // SAFETY: handed on to the caller.
        unsafe { Self::made(platform, None) }
    }

    /// # Safety
    /// As for [`Self::init`].
    unsafe fn made(platform: Platform, base: Option<u32>) -> Self {
        // SAFETY: handed on to the caller.
        let (tsc_khz, tsc_source) = unsafe { clock::tsc_khz(&platform, base) };
        let (mult, shift) = Clock::scale(tsc_khz);
        Self {
            calls: None,
            features: Features::NONE,
            limits: Limits { elements: pv_abi::memory::LEAST_LIMIT, vcpus: 1, text: 0, virtio_devices: 0 },
            platform,
            tsc_clock: Clock { mult, shift, tsc_base: cpu::tsc(), ..Clock::default() },
            tsc_khz,
            tsc_source,
            apic_khz: AtomicU32::new(clock::apic_khz(base)),
            flushes: FlushRequests::new(),
            absent: Some(Absent::NotWanted),
        }
    }

    /// Why there is no ABI; `None` if there is.
    pub fn absent(&self) -> Option<Absent> {
        self.absent
    }

    /// Features in force.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Whether a feature is in force.
    #[inline]
    pub fn has(&self, f: Feature) -> bool {
        self.features.has(f)
    }

    /// Limits of the hypervisor, or of the shim itself without one.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The typed hypercalls, where the ABI is there.
    pub fn hypercalls(&self) -> Option<Hypercalls> {
        self.calls
    }

    /// TSC frequency in kHz, and how it is known.
    pub fn tsc_khz(&self) -> (u32, clock::TscSource) {
        (self.tsc_khz, self.tsc_source)
    }

    /// Native TLB flushes in progress, for the handler of their vector.
    pub fn flushes(&self) -> &FlushRequests {
        &self.flushes
    }

    /// The hypercalls, if `f` is in force.
    #[inline]
    pub(crate) fn calls_for(&self, f: Feature) -> Option<Hypercalls> {
        if self.features.has(f) { self.calls } else { None }
    }

    /// Which way a feature takes.
    pub fn path(&self, f: Feature) -> Path {
        if self.has(f) {
            return Path::Abi;
        }
        Path::Native(match f {
            Feature::PageTables => "stores and INVLPG",
            Feature::VirtualIf => "CLI and POPF",
            Feature::Clock => match self.tsc_source {
                clock::TscSource::Given => "TSC, frequency given",
                clock::TscSource::Timing => "TSC, frequency by the hypervisor's CPUID",
                clock::TscSource::Crystal => "TSC, frequency by CPUID.15H",
                clock::TscSource::Base => "TSC, frequency by CPUID.16H",
                clock::TscSource::Pit => "TSC, frequency measured with the PIT",
            },
            Feature::Timer if crate::timer::has_tsc_deadline() => "local APIC, TSC deadline",
            Feature::Timer => "local APIC, one-shot count",
            Feature::Ipi => "ICR",
            Feature::TlbFlush => "IPI and INVLPG",
            Feature::LazyEoi => "EOI register",
            Feature::Schedule => "STI and HLT, IPI, PAUSE",
            Feature::StolenTime => "none: 0",
            Feature::Console => "16550 UART",
            Feature::FreePages => "none: ignored",
            Feature::Power => "ACPI PM1a, keyboard controller, pvpanic",
            Feature::Virtio => "MMIO or PCI",
        })
    }
}

/// What [`agree`] came to.
struct Agreed {
    base: u32,
    calls: Hypercalls,
    features: Features,
    limits: Limits,
}

/// # Safety
/// As for [`Shim::init`].
unsafe fn agree(slot: CodeSlot, wanted: Features) -> Result<Agreed, Absent> {
    let leaf = |n| cpu::cpuid(n, 0);
    let base = cpuid::find(leaf).ok_or(Absent::NotFound)?;
    let offer = offered(leaf(base + cpuid::FEATURES))?;
    let (code, len) = cpuid::entry_code(leaf(base + cpuid::ENTRY)).ok_or(Absent::NoEntry)?;
    // SAFETY: the bytes are this hypervisor's; the rest is handed on to the caller.
    let calls = unsafe { Hypercalls::place(&code, len, slot) };
    // SAFETY: nothing was agreed on before, as this is done once per boot.
    let features = unsafe { calls.negotiate(Version::CURRENT, offer.and(wanted)) }.map_err(Absent::Refused)?;
    let [elements, vcpus, text, virtio_devices] = leaf(base + cpuid::LIMITS);
    Ok(Agreed { base, calls, features, limits: Limits { elements: elements.max(1), vcpus, text, virtio_devices } })
}

/// The features that [`cpuid::FEATURES`] offers and this crate knows.
fn offered([version, low, high, _]: [u32; 4]) -> Result<Features, Absent> {
    let version = Version::from_bits(version);
    if !Version::CURRENT.works_with(version) {
        return Err(Absent::Version(version));
    }
    Ok(Features(u64::from(high) << 32 | u64::from(low)).and(Features::all()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_features_of_a_known_version_count() {
        let v = Version::CURRENT.to_bits();
        assert_eq!(offered([v, u32::MAX, u32::MAX, 0]), Ok(Features::all()));
        assert_eq!(offered([v, 5, 0, 3]), Ok(Features(5)));
        assert_eq!(offered([v + 1, 5, 0, 3]), Ok(Features(5)), "a later minor version");
        let major = Version { major: 2, minor: 0 };
        assert_eq!(offered([major.to_bits(), 5, 0, 0]), Err(Absent::Version(major)));
    }
}
