//! Time: nanoseconds since the start, and the wall clock.
//!
//! The hypervisor's clock and the native one are the same formula over the TSC ([`Clock::ns`]). The hypervisor writes its parameters into the shared page,
//! under a sequence number; natively, they follow from the TSC's frequency. CPUID tells it where it can: the hypervisors' timing leaf, leaf 15H (the
//! crystal's frequency and ratio), leaf 16H (the base frequency). Failing that, it is measured against the PIT.

#![allow(unsafe_code)] // Shared memory and device ports.

use crate::cpu;
use crate::platform::Platform;
use crate::vcpu::Vcpu;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, Ordering::Acquire, Ordering::Relaxed, fence};
use pv_abi::cpuid;
use pv_abi::feature::Feature;
use pv_abi::shared::{Clock, Stolen};

/// How the TSC's frequency is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscSource {
    /// The kernel gave it.
    Given,
    /// From the timing leaf of a hypervisor: the ABI's ([`cpuid::TIMING`]), or 0x4000_0010, which several have.
    Timing,
    /// From CPUID leaf 15H.
    Crystal,
    /// From CPUID leaf 16H.
    Base,
    /// Measured with the PIT.
    Pit,
}

impl Vcpu<'_> {
    /// Nanoseconds since the machine started, or natively since the shim was made. Never goes back on one CPU.
    #[inline]
    pub fn ns(&self) -> u64 {
        match self.page_for(Feature::Clock) {
            // SAFETY: the page is shared for good.
            Some(page) => unsafe { read_clock(&raw const (*page).clock, |c| c.ns(cpu::tsc_ordered())) },
            None => self.shim.tsc_clock.ns(cpu::tsc_ordered()),
        }
    }

    /// Nanoseconds since 1970-01-01 00:00 UTC. Natively it reads the CMOS clock, which counts seconds and is slow to read.
    pub fn wall_ns(&self) -> u64 {
        match self.page_for(Feature::Clock) {
            // SAFETY: the page is shared for good.
            Some(page) => unsafe {
                read_clock(&raw const (*page).clock, |c| c.wall_ns.wrapping_add(c.ns(cpu::tsc_ordered())))
            },
            // SAFETY: the CMOS clock touches no memory.
            None => unsafe { read_rtc() }.wrapping_mul(1_000_000_000),
        }
    }
}

/// Reads a structure that changes under a sequence number, as [`pv_abi::shared`] says, and passes a whole copy to `f`; what `f` reads by itself
/// (the TSC) belongs to the same copy.
///
/// # Safety
/// `at` points to a `T` whose first field is the sequence number, readable all the time, written by nobody but the hypervisor. Any bits are a value of `T`.
#[inline]
unsafe fn read_sequenced<T: Copy, R>(at: *const T, f: impl Fn(&T) -> R) -> R {
    const { assert!(align_of::<T>() == 8 && size_of::<T>().is_multiple_of(8), "it can be copied in words") };
    // SAFETY: the first field is a u32, which is aligned in an aligned structure.
    let sequence = unsafe { AtomicU32::from_ptr(at.cast_mut().cast()) };
    loop {
        let before = sequence.load(Acquire);
        let mut copy = MaybeUninit::<T>::uninit();
        // Word by word: a volatile copy of the whole would become a call of memcpy.
        for n in 0..size_of::<T>() / 8 {
            // SAFETY: within the structure and its copy. A copy that was torn is thrown away below.
            unsafe { copy.as_mut_ptr().cast::<u64>().add(n).write(at.cast::<u64>().add(n).read_volatile()) };
        }
        // SAFETY: all words were written, and any bits are a value.
        let result = f(unsafe { copy.assume_init_ref() });
        fence(Acquire);
        if before & 1 == 0 && sequence.load(Relaxed) == before {
            return result;
        }
        core::hint::spin_loop();
    }
}

/// # Safety
/// As for [`read_sequenced`].
#[inline]
unsafe fn read_clock<R>(at: *const Clock, f: impl Fn(&Clock) -> R) -> R {
    // SAFETY: handed on to the caller; the type has the sequence number first.
    unsafe { read_sequenced(at, f) }
}

/// # Safety
/// As for [`read_sequenced`].
pub(crate) unsafe fn read_stolen(at: *const Stolen) -> Stolen {
    // SAFETY: handed on to the caller; the type has the sequence number first.
    unsafe { read_sequenced(at, |s| *s) }
}

/// The TSC's frequency in kHz; `base` is the ABI's base leaf.
///
/// # Safety
/// CPL 0. The PIT's channel 2 is free, if it comes to that.
pub(crate) unsafe fn tsc_khz(platform: &Platform, base: Option<u32>) -> (u32, TscSource) {
    let from_cpuid = || known_khz(|leaf| cpu::cpuid(leaf, 0), base);
    match platform.tsc_khz.map(|khz| (khz, TscSource::Given)).or_else(from_cpuid) {
        Some(known) => known,
        // SAFETY: handed on to the caller.
        None => (unsafe { measure_tsc() }, TscSource::Pit),
    }
}

/// Base leaf of a hypervisor whose timing leaf there may be.
fn timing_leaf(leaf: impl Fn(u32) -> [u32; 4], base: Option<u32>) -> Option<[u32; 4]> {
    let base = base.unwrap_or(cpuid::FIRST);
    let there = leaf(1)[2] >> 31 != 0 && (base + cpuid::TIMING..base + cpuid::STEP).contains(&leaf(base)[0]);
    there.then(|| leaf(base + cpuid::TIMING))
}

/// What CPUID knows about the TSC.
fn known_khz(leaf: impl Fn(u32) -> [u32; 4], base: Option<u32>) -> Option<(u32, TscSource)> {
    if let Some(khz) = timing_leaf(&leaf, base).map(|t| t[0]).filter(|&khz| khz != 0) {
        return Some((khz, TscSource::Timing));
    }
    let highest = leaf(0)[0];
    if highest >= 0x15 {
        let [denominator, numerator, crystal, _] = leaf(0x15).map(u64::from);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            return u32::try_from(crystal * numerator / denominator / 1000).ok().map(|khz| (khz, TscSource::Crystal));
        }
    }
    let mhz = if highest >= 0x16 { leaf(0x16)[0] & 0xffff } else { 0 };
    (mhz != 0).then_some((mhz * 1000, TscSource::Base))
}

/// Frequency of the local APIC's timer in kHz as a hypervisor tells it; 0: unknown.
pub(crate) fn apic_khz(base: Option<u32>) -> u32 {
    timing_leaf(|leaf| cpu::cpuid(leaf, 0), base).map_or(0, |t| t[1])
}

/// The PIT's frequency in Hz (82C54).
const PIT_HZ: u64 = 1_193_182;

/// Counts TSC ticks while the PIT's channel 2 counts down for 10 ms. The shortest of three tries is the least disturbed.
///
/// # Safety
/// CPL 0, channel 2 is free.
unsafe fn measure_tsc() -> u32 {
    let count = PIT_HZ / 100;
    let mut best = u64::MAX;
    for _ in 0..3 {
        // SAFETY: the ports are the PIT's and its gate's, and touch no memory.
        let ticks = unsafe {
            // Gate on, speaker off; mode 0, both bytes.
            let gate = cpu::in8(0x61);
            cpu::out8(0x61, gate & !2 | 1);
            cpu::out8(0x43, 0xb0);
            cpu::out8(0x42, count as u8);
            cpu::out8(0x42, (count >> 8) as u8);
            let start = cpu::tsc_ordered();
            // Output goes high at the end. The bound serves machines without a PIT.
            let mut polls = 0;
            while cpu::in8(0x61) & 0x20 == 0 && polls < 10_000_000 {
                polls += 1;
            }
            let ticks = cpu::tsc_ordered() - start;
            cpu::out8(0x61, gate);
            ticks
        };
        best = best.min(ticks);
    }
    u32::try_from(best * PIT_HZ / count / 1000).unwrap_or(u32::MAX).max(1)
}

/// Reads the CMOS clock: seconds since 1970.
///
/// # Safety
/// CPL 0, and nobody else uses the CMOS ports meanwhile.
unsafe fn read_rtc() -> u64 {
    let register = |n: u8| {
        // SAFETY: the CMOS ports touch no memory; bit 7 keeps NMIs enabled when it is 0.
        unsafe {
            cpu::out8(0x70, n);
            cpu::in8(0x71)
        }
    };
    let fields = || [0, 2, 4, 7, 8, 9].map(register);
    // Two equal readings outside an update belong together. The bound serves machines without a clock.
    for _ in 0..100_000 {
        if register(0xa) & 0x80 != 0 {
            continue;
        }
        let first = fields();
        if register(0xa) & 0x80 == 0 && fields() == first {
            return rtc_seconds(first, register(0xb));
        }
    }
    0
}

/// Seconds since 1970 of the CMOS clock's registers (second, minute, hour, day, month, year) and its register B (MC146818A).
fn rtc_seconds(registers: [u8; 6], control: u8) -> u64 {
    let binary = control & 4 != 0;
    let number = |v: u8| u64::from(if binary { v } else { (v >> 4) * 10 + (v & 0xf) });
    let [second, minute, hour, day, month, year] = registers;
    let mut hours = number(hour & 0x7f);
    if control & 2 == 0 {
        // 12 hours: bit 7 means afternoon, and 12 stands for 0.
        hours = hours % 12 + if hour & 0x80 != 0 { 12 } else { 0 };
    }
    let days = days_from_civil(2000 + number(year), number(month), number(day));
    days * 86_400 + hours * 3600 + number(minute) * 60 + number(second)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar from 1970 on. Years are taken to start in March, so that leap days end them.
fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days_of_years = 365 * y + y / 4 - y / 100 + y / 400;
    // Months from March on have 31, 30, 31, 30, 31 days, and again.
    let days_of_months = (153 * m + 2) / 5;
    // 719 468 days lie between 0000-03-01 and 1970-01-01.
    (days_of_years + days_of_months + day).saturating_sub(719_469)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Release};

    #[test]
    fn a_reader_never_sees_half_a_change() {
        /// As the ABI's structures: the sequence number first; here two fields that must agree.
        #[repr(C)]
        struct Pair {
            sequence: AtomicU32,
            a: AtomicU32,
            b: AtomicU64,
        }
        #[derive(Clone, Copy)]
        #[repr(C)]
        struct Copied {
            _sequence: u32,
            a: u32,
            b: u64,
        }
        let pair = Pair { sequence: AtomicU32::new(0), a: AtomicU32::new(0), b: AtomicU64::new(0) };
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                for n in 1..=200_000_u32 {
                    pair.sequence.fetch_add(1, Acquire);
                    fence(Release);
                    pair.a.store(n, Relaxed);
                    std::hint::spin_loop();
                    pair.b.store(u64::from(n), Relaxed);
                    pair.sequence.fetch_add(1, Release);
                }
                stop.store(true, Relaxed);
            });
            let mut last = 0;
            while !stop.load(Relaxed) {
                // SAFETY: the fields have the same layout, and the writer follows the protocol.
                let got = unsafe { read_sequenced((&raw const pair).cast::<Copied>(), |c| (c.a, c.b)) };
                assert_eq!(u64::from(got.0), got.1);
                assert!(got.0 >= last);
                last = got.0;
            }
        });
    }

    #[test]
    fn an_odd_sequence_is_waited_for() {
        let clock = Clock { sequence: 1, ns_base: 7, ..Clock::default() };
        let sequence = (&raw const clock.sequence).cast_mut();
        let reads = core::cell::Cell::new(0);
        // SAFETY: a structure of this test's own, whose sequence number is changed through the same pointer.
        let ns = unsafe {
            read_clock(&raw const clock, |c| {
                reads.set(reads.get() + 1);
                if reads.get() == 3 {
                    sequence.write_volatile(2);
                }
                c.ns_base
            })
        };
        assert_eq!((ns, reads.get()), (7, 4), "the reading during which it became even does not count");
    }

    fn cpu(leaves: &[(u32, [u32; 4])]) -> impl Fn(u32) -> [u32; 4] {
        move |leaf| leaves.iter().find(|l| l.0 == leaf).map_or([0; 4], |l| l.1)
    }

    #[test]
    fn the_frequency_is_taken_from_the_best_leaf() {
        let guest = (1, [0, 0, 1 << 31, 0]);
        let vmware = [guest, (0x4000_0000, [0x4000_0010, 0, 0, 0]), (0x4000_0010, [2_500_000, 66_000, 0, 0])];
        assert_eq!(known_khz(cpu(&vmware), None), Some((2_500_000, TscSource::Timing)));
        let other_base = [guest, (0x4000_0100, [0x4000_0110, 0, 0, 0]), (0x4000_0110, [3_000_000, 0, 0, 0])];
        assert_eq!(known_khz(cpu(&other_base), Some(0x4000_0100)), Some((3_000_000, TscSource::Timing)));
        assert_eq!(known_khz(cpu(&other_base), None), None);
        let crystal = [(0, [0x16, 0, 0, 0]), (0x15, [2, 176, 24_000_000, 0]), (0x16, [2100, 0, 0, 0])];
        assert_eq!(known_khz(cpu(&crystal), None), Some((2_112_000, TscSource::Crystal)));
        let base = [(0, [0x16, 0, 0, 0]), (0x15, [2, 176, 0, 0]), (0x16, [2100, 0, 0, 0])];
        assert_eq!(known_khz(cpu(&base), None), Some((2_100_000, TscSource::Base)));
        assert_eq!(known_khz(cpu(&[(0, [0xd, 0, 0, 0])]), None), None);
    }

    #[test]
    fn the_cmos_clock_is_understood_in_every_form() {
        // 2026-11-21 15:04:05 UTC.
        let expected = 1_795_273_445;
        assert_eq!(rtc_seconds([5, 4, 15, 21, 11, 26], 6), expected, "binary, 24 hours");
        assert_eq!(rtc_seconds([5, 4, 0x15, 0x21, 0x11, 0x26], 2), expected, "BCD, 24 hours");
        assert_eq!(rtc_seconds([5, 4, 0x83, 0x21, 0x11, 0x26], 0), expected, "BCD, 12 hours");
        assert_eq!(rtc_seconds([5, 4, 0x12, 0x21, 0x11, 0x26], 0), expected - 15 * 3600, "midnight of 12 hours");
        assert_eq!(days_from_civil(1970, 1, 1), 0);
        assert_eq!(days_from_civil(2000, 2, 29), 11_016);
    }
}
