//! `paravane bench`: hands the host report to the benchmark, which is a crate of its own.

use paravane::host::cache::Cache;
use paravane::host::kvm::Access;
use paravane::host::report::{KvmKind, Report};
use paravane::host::sources::Sources;
use paravane::host::{self, table};
use paravane_bench::cli::Bench;
use paravane_bench::model::{Host, Kvm};
use std::process::ExitCode;

pub(crate) fn run(bench: &Bench) -> ExitCode {
    match bench.run(|| describe(&host::examine(&Sources::host(), &Cache::user()))) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            crate::say(&failure);
            ExitCode::from(failure.status())
        }
    }
}

/// What of the doctor's report the figures depend on.
fn describe(report: &Report) -> Host {
    let speeds = report.kvm.facts.speeds.as_ref();
    let emulating = report.kvm.kind == KvmKind::Emulating || speeds.is_some_and(|speeds| !speeds.native_ring0());
    Host {
        paravane: report.version.clone(),
        cpu: report.host.cpu.clone(),
        cpus_online: report.host.cpus_online.clone(),
        virtualized: report.host.virtualized,
        memory: report.host.memory,
        kernel: report.host.kernel.clone(),
        kvm: Kvm {
            usable: report.kvm.facts.access == Access::Open,
            emulating,
            text: table::kvm(report),
            ring0_ns: speeds.map(|speeds| speeds.ring0_ns),
            exit_ns: speeds.map(|speeds| speeds.exit_ns),
            host_ns: speeds.map(|speeds| speeds.host_ns),
        },
        ..Host::default()
    }
}
