//! Named counters, one per kind of exit. What binary translation counts too has the same name there.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Counters of one vCPU.
        #[derive(Clone, Copy, Debug, Default)]
        pub(super) struct Stats {
            $($(#[$doc])* pub(super) $name: u64,)*
        }

        impl Stats {
            /// All counters with their names.
            pub(super) fn list(&self) -> Vec<(String, u64)> {
                vec![$(($text.to_owned(), self.$name),)*]
            }
        }
    };
}

counters! {
    exits = "KVM exits",
    mmio_reads = "MMIO reads",
    mmio_writes = "MMIO writes",
    pio_reads = "port reads",
    pio_writes = "port writes",
    msr_reads = "MSR reads",
    msr_writes = "MSR writes",
    hypercalls = "hypercalls",
    halts = "halts",
    interrupts = "interrupts delivered",
    windows = "interrupt window exits",
    priorities = "task priority exits",
    ends = "ends of interrupt",
    interrupted = "stops for a kick",
    transfers = "state transfers",
}
