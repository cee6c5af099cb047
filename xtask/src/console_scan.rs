//! What a healthy Linux kernel never prints: lockups, stalls, doubts about the clock, its own warnings and oopses.

/// Parts of a line that tell of trouble.
const TROUBLE: [&str; 21] = [
    "soft lockup",
    "hard LOCKUP",
    "detected stall",
    "self-detected stall",
    "blocked for more than",
    "rcu: INFO",
    "starved for",
    "Marking clocksource",
    "Marking TSC unstable",
    "timekeeping watchdog",
    "TSC warp",
    "WARNING:",
    "BUG:",
    "Oops",
    "general protection fault",
    "Kernel panic",
    "Call Trace:",
    "failed to report alive",
    "do_boot_cpu failed",
    "is not responding",
    "segfault at",
];

/// The lines of a console that tell of trouble.
pub(crate) fn trouble(console: &str) -> Vec<&str> {
    console.lines().map(str::trim).filter(|line| TROUBLE.iter().any(|part| line.contains(part))).collect()
}

/// What `/sys/devices/system/cpu/online` says when all of `cpus` are.
pub(crate) fn all_online(cpus: u32) -> String {
    if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_messages_pass_and_trouble_is_found() {
        let good = "[    0.000000] clocksource: kvm-clock: mask: 0xffffffffffffffff max_cycles: 0x1cd42e4dffb\r\n\
                    [    0.5] smpboot: Allowing 2 CPUs, 0 hotplug CPUs\r\n[    0.9] NMI watchdog: Enabled.\r\n";
        assert!(trouble(good).is_empty());
        let bad = "[   24.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [sh:77]\r\nfine\r\n\
                   [   31.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\r\n\
                   [   40.0] clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable\r\n";
        assert_eq!(trouble(bad).len(), 3);
        assert_eq!((all_online(1), all_online(8)), ("0".to_owned(), "0-7".to_owned()));
    }
}
