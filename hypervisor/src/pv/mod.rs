//! The host side of the paravirtual interfaces: what a guest that knows it is a guest can ask for.

use pv_abi::cpuid;

/// What CPUID answers from 0x4000_0000 on: leaf, and EAX to EDX.
pub fn leaves(tsc_khz: u32, apic_hz: u32) -> Vec<(u32, [u32; 4])> {
    let base = cpuid::FIRST;
    let [b, c, d] = cpuid::signature_words();
    vec![(base, [base + cpuid::TIMING, b, c, d]), (base + cpuid::TIMING, [tsc_khz, apic_hz / 1000, 0, 0])]
}
