//! What the engine needs of a host, found out by trying: the same calls that a vCPU would make, undone at once.

use crate::cache::CodeMemory;
use crate::vcpu::StateMemory;
use crate::window;

/// Something the engine needs or can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// A short name.
    pub name: &'static str,
    /// Without it no guest runs; else guests run slower.
    pub essential: bool,
    /// Whether it is here.
    pub met: bool,
    /// What it is for and, where it is missing, what to do.
    pub why: &'static str,
}

/// Looks at everything. Takes well below a millisecond. In a process that runs a vCPU with windows, the address room is taken and
/// reported as missing.
pub fn requirements() -> Vec<Requirement> {
    let need = |name, essential, met, why| Requirement { name, essential, met, why };
    vec![
        need(
            "BMI2",
            true,
            std::arch::is_x86_feature_detected!("bmi2"),
            "translated code shifts and extracts address bits without touching flags; use a CPU from 2013 or later, or tell the hypervisor above to pass it on",
        ),
        need(
            "XSAVE",
            true,
            std::arch::is_x86_feature_detected!("xsave"),
            "guest vector registers are saved with it; boot the host kernel without \"noxsave\"",
        ),
        need(
            "executable memory",
            true,
            CodeMemory::new(1 << 21).is_ok(),
            "the translation cache is a memfd mapped writable here and executable there; allow it (sysctl vm.memfd_noexec=0, SELinux execmem, seccomp)",
        ),
        need("vCPU state", true, StateMemory::new().is_ok(), "a vCPU needs some MiB of memory; raise the limits on it"),
        need(
            "FSGSBASE",
            false,
            window::fsgsbase(),
            "host mappings for guest processes need user-mode WRFSBASE; use a host kernel from 5.9 on",
        ),
        need(
            "address room",
            false,
            window::room(),
            "host mappings for guest processes reserve some TiB of addresses; lift \"ulimit -v\"",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_is_undone() {
        let first = requirements();
        for _ in 0..50 {
            assert_eq!(requirements(), first);
        }
        // Where this test runs, the engine's other tests do.
        assert!(first.iter().filter(|r| r.essential).all(|r| r.met), "{first:?}");
    }
}
