//! What a kernel uses to find out that it runs on Paravane.
//!
//! Detection is all there is so far. Typed hypercalls, batching, the virtual interrupt flag and their native fallbacks will follow with
//! the ABI in `pv-abi`.
#![no_std]

pub mod cpu;

/// Whether CPUID says that this is a Paravane guest. Works on every x86-64 CPU and hypervisor, in any mode.
pub fn detect() -> bool {
    pv_abi::cpuid::find(|leaf| cpu::cpuid(leaf, 0)).is_some()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_test_host_is_not_a_paravane_guest() {
        assert!(!super::detect());
    }
}
