//! What a kernel uses to find out that it runs on Paravane.
//!
//! Detection is all there is so far. Typed hypercalls, batching, the virtual interrupt flag and their native fallbacks will follow with
//! the ABI in `pv-abi`.
#![no_std]

use core::arch::x86_64::__cpuid;

/// Whether CPUID says that this is a Paravane guest. Works on every x86-64 CPU and hypervisor, in any mode.
pub fn detect() -> bool {
    pv_abi::cpuid::find(|leaf| {
        let l = __cpuid(leaf);
        [l.eax, l.ebx, l.ecx, l.edx]
    })
    .is_some()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_test_host_is_not_a_paravane_guest() {
        assert!(!super::detect());
    }
}
