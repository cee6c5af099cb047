//! Which of an engine's counters are exact: what two runs of the same guest must agree on.

/// Counters that are the same in every run, but for [`INTERRUPTIBLE`]. What is not here depends on when the host lets the hypervisor run, or
/// happens once and not with each operation.
const COUNTED: &[&str] = &[
    "instructions emulated",
    "MMIO reads",
    "MMIO writes",
    "port reads",
    "port writes",
    "TLB misses",
    "TLB flushes",
    "TLB page flushes",
    "hypercalls",
    "exceptions delivered",
    "page faults delivered",
    "interrupts delivered",
    "host signals in translated code",
    "accesses bounced",
    "chain callouts",
    "indirect jump misses",
    "window mappings made",
    "dispatcher entries",
    "halts",
    "KVM exits",
    "MSR reads",
    "MSR writes",
    "ends of interrupt",
];

/// Those that grow by one or two more when the host takes the CPU away at the wrong moment, for a loop is then entered anew: only the first
/// decimal of what an operation costs says something.
const INTERRUPTIBLE: &[&str] = &["chain callouts", "indirect jump misses", "dispatcher entries"];

/// Whether two runs agree on a counter, to the rounding of [`interruptible`] ones.
pub(crate) fn counted(name: &str) -> bool {
    COUNTED.contains(&name)
}

/// Whether an interruption of the hypervisor changes a counter.
pub(crate) fn interruptible(name: &str) -> bool {
    INTERRUPTIBLE.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_interrupted_is_counted() {
        assert!(INTERRUPTIBLE.iter().all(|name| counted(name)));
        assert!(!counted("translation time (ns)") && !counted("blocks translated"));
    }
}
