//! The page that a vCPU shares with the hypervisor.
//!
//! The guest gives a page of its RAM with [`crate::call::Call::SharePage`]; the hypervisor fills the fields of the features in force. All fields are
//! little-endian and naturally aligned. Each field says who writes it. Readers of fields with a sequence number read it first, wait
//! while it is odd, read the fields, and start over if the number has changed.

use core::mem::offset_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the page, and its alignment.
pub const BYTES: usize = 4096;

/// Bit of [`SharedPage::eoi`]: the interrupt in service needs no EOI beyond clearing this bit.
pub const EOI_SKIP: u32 = 1;

/// The clock: nanoseconds since the machine started are
/// `ns_base + ((tsc - tsc_base) << shift, or >> -shift when negative) * mult >> 32`, with a 128-bit product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Clock {
    /// Odd while the hypervisor writes.
    pub sequence: u32,
    /// Fraction of 2^32 ns per (shifted) TSC tick.
    pub mult: u32,
    /// Guest TSC at `ns_base`.
    pub tsc_base: u64,
    /// Nanoseconds since the machine started, at `tsc_base`.
    pub ns_base: u64,
    /// Nanoseconds from 1970-01-01 00:00 UTC to the machine's start: the wall clock is this plus the clock.
    pub wall_ns: u64,
    /// Shift of the TSC difference, -31 to 31; positive to the left.
    pub shift: i8,
    /// 0.
    pub reserved: [u8; 7],
}

/// Time that the vCPU wanted to run and did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stolen {
    /// Odd while the hypervisor writes.
    pub sequence: u32,
    /// 1 while the vCPU is not running although it could.
    pub preempted: u32,
    /// Nanoseconds since the page was shared.
    pub ns: u64,
}

/// The page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SharedPage {
    /// [`crate::Version`] in force. Written by the hypervisor when the page is shared.
    pub version: u32,
    /// Feature [`crate::feature::Feature::LazyEoi`]. The hypervisor sets [`EOI_SKIP`] as it delivers an interrupt whose end it need not be told of; the guest
    /// clears it with one instruction (BTR) as the interrupt ends, and accesses the local APIC only if it was clear already.
    pub eoi: u32,
    /// Feature [`crate::feature::Feature::VirtualIf`]. Not 0: interrupts may be delivered when RFLAGS.IF is set too. Written by the guest; set to 1 when the page is
    /// shared.
    pub irq_enabled: u8,
    /// Feature [`crate::feature::Feature::VirtualIf`]. The hypervisor sets it to 1 when it holds an interrupt back because `irq_enabled` is 0, and to 0 when it
    /// delivers one.
    pub irq_pending: u8,
    /// 0.
    pub reserved0: [u8; 6],
    /// Feature [`crate::feature::Feature::Virtio`]. Bit n: device n has an event (used buffers, or a changed configuration). The hypervisor sets bits; the guest takes them
    /// with an atomic exchange.
    pub events: u64,
    /// Feature [`crate::feature::Feature::Virtio`]. Bit n: device n has new buffers in some queue. The guest sets bits with an atomic OR, then calls
    /// [`crate::call::Call::Notify`]; the hypervisor takes them with an atomic exchange.
    pub doorbells: u64,
    /// Feature [`crate::feature::Feature::Clock`]. Written by the hypervisor.
    pub clock: Clock,
    /// Feature [`crate::feature::Feature::StolenTime`]. Written by the hypervisor.
    pub stolen: Stolen,
    /// 0.
    pub reserved1: [u8; 4008],
}

const _: () = {
    assert!(size_of::<Clock>() == 40 && align_of::<Clock>() == 8);
    assert!(offset_of!(Clock, mult) == 4 && offset_of!(Clock, tsc_base) == 8 && offset_of!(Clock, ns_base) == 16);
    assert!(offset_of!(Clock, wall_ns) == 24 && offset_of!(Clock, shift) == 32);
    assert!(size_of::<Stolen>() == 16 && offset_of!(Stolen, preempted) == 4 && offset_of!(Stolen, ns) == 8);
    assert!(size_of::<SharedPage>() == BYTES);
    assert!(offset_of!(SharedPage, version) == 0 && offset_of!(SharedPage, eoi) == 4);
    assert!(offset_of!(SharedPage, irq_enabled) == 8 && offset_of!(SharedPage, irq_pending) == 9);
    assert!(offset_of!(SharedPage, events) == 16 && offset_of!(SharedPage, doorbells) == 24);
    assert!(offset_of!(SharedPage, clock) == 32 && offset_of!(SharedPage, stolen) == 72);
};

impl Clock {
    /// Nanoseconds since the machine started, at guest TSC `tsc`. A TSC before `tsc_base` (another vCPU's, by a little) counts as equal.
    pub const fn ns(&self, tsc: u64) -> u64 {
        let ticks = tsc.saturating_sub(self.tsc_base);
        let scaled = if self.shift >= 0 {
            (ticks as u128) << (self.shift as u32 & 63)
        } else {
            (ticks >> (self.shift.unsigned_abs() as u32 & 63)) as u128
        };
        self.ns_base.wrapping_add((scaled.wrapping_mul(self.mult as u128) >> 32) as u64)
    }

    /// `mult` and `shift` for a TSC of `khz`, as exact as 32 bits allow.
    ///
    /// One tick is `10^6 / khz` ns. `mult` is that times 2^32, halved or doubled until its top bit is set; `shift` says how often.
    pub const fn scale(khz: u32) -> (u32, i8) {
        let khz = if khz == 0 { 1 } else { khz };
        let mut mult = (1_000_000_u128 << 64) / khz as u128;
        // mult is ns per tick in 64.64 fixed point; `mult >> 32` shall become the top 32 significant bits.
        let mut shift = 0_i8;
        while mult >> 64 != 0 {
            mult >>= 1;
            shift += 1;
        }
        while mult >> 63 == 0 {
            mult <<= 1;
            shift -= 1;
        }
        ((mult >> 32) as u32, shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_follows_the_tsc() {
        for khz in [1, 999, 1_000_000, 2_250_000, 2_900_000, 3_999_999, 4_294_967_295] {
            let (mult, shift) = Clock::scale(khz);
            let clock = Clock { mult, shift, tsc_base: 1000, ns_base: 5, ..Default::default() };
            assert_eq!(clock.ns(1000), 5);
            assert_eq!(clock.ns(0), 5, "an earlier TSC does not go back");
            let seconds = 1000_u64;
            let ns = clock.ns(1000 + u64::from(khz) * 1000 * seconds) - 5;
            let off = ns.abs_diff(seconds * 1_000_000_000);
            assert!(off <= seconds * 2, "{khz} kHz is off by {off} ns in {seconds} s");
        }
    }
}
