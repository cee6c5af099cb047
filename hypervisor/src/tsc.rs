//! The host's time-stamp counter and its frequency.
//!
//! The guest sees the host's TSC, so the guest must be told the host's frequency exactly: a stock kernel that trusts the
//! figure in CPUID keeps its time by it. Three sources are tried, best first: CPUID leaf 0x15 (SDM vol. 3, section
//! 19.7.3), the hypervisor timing leaf 0x4000_0010, and a measurement against CLOCK_MONOTONIC.
//!
//! A figure out of CPUID is believed only when a one-millisecond measurement agrees with it to one per cent: a hypervisor
//! that scales or migrates the TSC can leave a stale leaf behind.
//!
//! The measurement brackets each clock reading with two readings of the TSC and keeps the tightest bracket of several, so
//! each end is known to some tens of nanoseconds and 20 ms give a few parts per million.
#![allow(unsafe_code)] // CPUID and RDTSC are intrinsics

use std::arch::x86_64::{__cpuid, _rdtsc};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a full measurement takes.
const MEASURE: Duration = Duration::from_millis(20);

/// How long the plausibility check of a figure from CPUID takes.
const CHECK: Duration = Duration::from_millis(1);

/// Frequencies, in kHz, outside which a figure is nonsense.
const PLAUSIBLE: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// The host's TSC, in ticks.
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU and Linux leaves it enabled for user programs.
    unsafe { _rdtsc() }
}

/// Frequency of the host's TSC in kHz. Found on the first call, which can take about 20 ms, and kept.
pub fn tsc_khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| {
        from_cpuid()
            .filter(|&khz| agrees(khz, measure(CHECK)))
            .unwrap_or_else(|| measure(MEASURE))
            .clamp(1, u32::MAX.into()) as u32
    })
}

fn cpuid(leaf: u32) -> [u32; 4] {
    // SAFETY: CPUID exists on every x86-64 CPU.
    #[allow(unused_unsafe)]
    let r = unsafe { __cpuid(leaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// What CPUID says, in kHz, if it says anything plausible.
fn from_cpuid() -> Option<u64> {
    let mut found = None;
    if cpuid(0)[0] >= 0x15 {
        let [den, num, crystal_hz, _] = cpuid(0x15);
        if den != 0 && num != 0 && crystal_hz != 0 {
            found = Some(u64::from(crystal_hz) * u64::from(num) / u64::from(den) / 1000);
        }
    }
    let hypervisor = cpuid(1)[2] & (1 << 31) != 0;
    if found.is_none() && hypervisor && (0x4000_0010..0x4001_0000).contains(&cpuid(0x4000_0000)[0]) {
        found = Some(u64::from(cpuid(0x4000_0010)[0]));
    }
    found.filter(|khz| PLAUSIBLE.contains(khz))
}

/// Whether two frequencies agree to one per cent.
fn agrees(a: u64, b: u64) -> bool {
    a.abs_diff(b) <= a.max(b) / 100
}

/// Counts TSC ticks over `span` of CLOCK_MONOTONIC; the result is in kHz.
fn measure(span: Duration) -> u64 {
    let (tsc0, t0) = sample();
    std::thread::sleep(span);
    let (tsc1, t1) = sample();
    let ns = t1.duration_since(t0).as_nanos().max(1);
    (u128::from(tsc1.wrapping_sub(tsc0)) * 1_000_000 / ns) as u64
}

/// One pair of simultaneous readings, the tightest of several.
pub(crate) fn sample() -> (u64, Instant) {
    let mut best = (u64::MAX, 0, Instant::now());
    for _ in 0..16 {
        let before = rdtsc();
        let t = Instant::now();
        let width = rdtsc().wrapping_sub(before);
        if width < best.0 {
            best = (width, before.wrapping_add(width / 2), t);
        }
    }
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_agrees_with_the_clock() {
        let khz = u64::from(tsc_khz());
        assert!(PLAUSIBLE.contains(&khz), "{khz}");
        assert!(agrees(khz, measure(Duration::from_millis(30))), "{khz}");
        assert_eq!(khz, u64::from(tsc_khz()));
    }
}
