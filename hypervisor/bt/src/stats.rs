//! Named counters for everything the engine does beside running translated code.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Counters of one vCPU.
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct Stats {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl Stats {
            /// All counters with their names.
            pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$(($text, self.$name),)*]
            }
        }
    };
}

counters! {
    blocks = "blocks translated",
    instructions = "instructions translated",
    guest_bytes = "guest bytes translated",
    code_bytes = "code bytes emitted",
    translate_ns = "translation time (ns)",
    cache_flushes = "translation cache flushes",
    chained = "exits chained",
    chain_callouts = "chain callouts",
    lookup_callouts = "indirect jump misses",
    tlb_misses = "TLB misses",
    tlb_flushes = "TLB flushes",
    tlb_page_flushes = "TLB page flushes",
    bounced = "accesses bounced",
    windows_given = "windows given",
    windows_taken = "windows taken away",
    window_maps = "window mappings made",
    window_checks = "window checks",
    mmio_reads = "MMIO reads",
    mmio_writes = "MMIO writes",
    pio_reads = "port reads",
    pio_writes = "port writes",
    hypercalls = "hypercalls",
    emulated = "instructions emulated",
    exceptions = "exceptions delivered",
    page_faults = "page faults delivered",
    interrupts = "interrupts delivered",
    host_faults = "host signals in translated code",
    polls = "poll exits",
    device_writes = "device writes to pages with code",
    smc_invalidations = "blocks invalidated by writes to code",
    exits = "dispatcher entries",
    halts = "halts",
}
