//! What a kernel uses to find out that it runs on Paravane.
//!
//! Detection is all there is so far. Typed hypercalls, batching, the virtual interrupt flag and their native fallbacks will follow with
//! the ABI in `pv-abi`.
#![no_std]

/// Whether CPUID says that this is a Paravane guest. Works on every x86-64 CPU and hypervisor, in any mode.
pub fn detect() -> bool {
    use core::arch::x86_64::__cpuid;
    // Leaf 1, ECX bit 31: a hypervisor is present, so leaf 0x40000000 means something.
    if __cpuid(1).ecx >> 31 == 0 {
        return false;
    }
    let l = __cpuid(pv_abi::CPUID_BASE);
    pv_abi::is_paravane(l.ebx, l.ecx, l.edx)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_test_host_is_not_a_paravane_guest() {
        assert!(!super::detect());
    }
}
