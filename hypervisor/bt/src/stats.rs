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
    copied = "blocks copied from other addresses",
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
    kernel_maps = "kernel mappings made",
    kernel_misses = "kernel mapping misses",
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
    device_writes = "writes by others to pages with code",
    withdrawals = "pages given up for others' code",
    direct = "stores to pages with code",
    alone = "locked operations that stopped other vCPUs",
    smc_invalidations = "blocks invalidated by writes to code",
    exits = "dispatcher entries",
    halts = "halts",
    yields = "yields of a spinning vCPU",
}

/// Durations by powers of two of nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Histogram {
    counts: [u64; 32],
    total: u64,
}

impl Histogram {
    pub(crate) fn note(&mut self, d: std::time::Duration) {
        let ns = d.as_nanos() as u64;
        self.total += ns;
        self.counts[(64 - ns.leading_zeros() as usize).min(31)] += 1;
    }

    /// How many there were, how long they took in total, and a bound that all but one percent keep; nothing if there were none.
    pub(crate) fn list(&self, what: &str) -> Vec<(String, u64)> {
        let count: u64 = self.counts.iter().sum();
        if count == 0 {
            return Vec::new();
        }
        let mut seen = 0;
        let at = self.counts.iter().position(|n| {
            seen += n;
            seen * 100 >= count * 99
        });
        let bound = 1u64 << at.unwrap_or(31);
        vec![
            (what.to_owned(), count),
            (format!("{what} (ns)"), self.total),
            (format!("{what}, 99 of 100 below (ns)"), bound),
        ]
    }
}
