//! The host: what it offers a hypervisor, and which engine fits.
//!
//! Two askers. `paravane doctor` wants everything ([`examine`]). `--engine auto` wants one answer, quickly ([`choose`]): it
//! looks at /dev/kvm, and if that opens, at how fast it runs ring 0, which is measured once per boot and [cached](cache).
//! Both decide by the same function, [`decide()`].
//!
//! [`sources`] is the only place that touches the host, so tests play hosts that are not there. [`report`] is what comes out.

pub mod cache;
pub mod decide;
pub mod features;
pub mod kvm;
pub mod report;
pub mod sources;
pub mod speed;
pub mod table;

#[cfg(test)]
mod tests;

use cache::{Cache, Key};
use decide::decide;
use kvm::Access;
use report::{Choice, FORMAT, Host, HugePages, Kvm, Limits, Report};
use sources::Sources;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

/// Where the device is, below the root.
const DEV_KVM: &str = "dev/kvm";

/// What `--engine auto` picks here, and why.
///
/// Takes microseconds where there is no /dev/kvm or the cache knows, else the milliseconds of the probe guest.
pub fn choose(s: &Sources, cache: &Cache) -> Choice {
    let features = features::find(&*s.cpuid);
    let kvm = look_at_kvm(s, cache, &features, Freshness::Cached);
    // What binary translation needs is tried only where there is a choice to make.
    let needs = if decide::kvm_is_good(&kvm) { Vec::new() } else { (s.bt)() };
    decide(&kvm, &features, &needs).choice
}

/// What is behind this host's KVM, measured as [`choose`] measures it.
pub fn kvm_kind(s: &Sources, cache: &Cache) -> report::KvmKind {
    look_at_kvm(s, cache, &features::find(&*s.cpuid), Freshness::Cached).kind
}

/// Everything about this host. Measures anew, and renews the cache.
pub fn examine(s: &Sources, cache: &Cache) -> Report {
    let features = features::find(&*s.cpuid);
    let kvm = look_at_kvm(s, cache, &features, Freshness::Measured);
    let needs = (s.bt)();
    let verdict = decide(&kvm, &features, &needs);
    let mut report = Report {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").into(),
        host: host(s, &features),
        features,
        kvm,
        huge_pages: huge_pages(s),
        limits: limits(s),
        engines: verdict.engines,
        auto: verdict.choice,
        advice: Vec::new(),
    };
    report.advice = decide::advice(&report, &needs);
    report
}

/// Whether an old measurement will do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Freshness {
    Cached,
    Measured,
}

fn look_at_kvm(s: &Sources, cache: &Cache, features: &BTreeMap<String, bool>, how: Freshness) -> Kvm {
    let path = s.path(DEV_KVM);
    let modules = modules(s);
    let key = Key {
        boot: s.text("proc/sys/kernel/random/boot_id").unwrap_or_default(),
        kernel: s.text("proc/sys/kernel/osrelease").unwrap_or_default(),
        cpu: features::brand(&*s.cpuid),
        version: env!("CARGO_PKG_VERSION").into(),
        modules: modules.clone(),
    };
    let known = if how == Freshness::Cached { cache.get(&key) } else { None };
    // What is known spares the measurement, not the question whether KVM still makes a virtual machine.
    let mut facts = (s.kvm)(&path, known.is_none());
    let cached = known.is_some() && facts.access == Access::Open;
    match &facts.speeds {
        Some(speeds) => cache.put(&key, speeds),
        None if cached => facts.speeds = known,
        None => {}
    }
    let group = std::fs::metadata(&path).ok().and_then(|m| group_name(s, m.gid()));
    Kvm { kind: decide::kind(&facts, features), modules, group, facts, cached }
}

fn modules(s: &Sources) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(s.path("sys/module")) else { return Vec::new() };
    let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut found: Vec<String> = names.filter(|n| n == "kvm" || n.starts_with("kvm_")).collect();
    found.sort();
    found
}

fn group_name(s: &Sources, gid: u32) -> Option<String> {
    s.text("etc/group")?.lines().find_map(|line| {
        let mut parts = line.split(':');
        let (name, id) = (parts.next()?, parts.nth(1)?);
        (id.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

/// A figure of /proc/meminfo in bytes.
fn meminfo(s: &Sources, key: &str) -> Option<u64> {
    let value = s.field("proc/meminfo", key)?;
    value.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn host(s: &Sources, features: &BTreeMap<String, bool>) -> Host {
    let group =
        s.text("proc/self/cgroup").and_then(|t| Some(t.lines().find_map(|l| l.strip_prefix("0::"))?.to_owned()));
    // The bound of this group and of those above it: the least counts.
    let mut bound = None;
    if let Some(path) = &group {
        let mut at = path.trim_matches('/').to_owned();
        loop {
            let file = if at.is_empty() { "memory.max".into() } else { format!("{at}/memory.max") };
            let here = s.number(&format!("sys/fs/cgroup/{file}"));
            bound = bound.into_iter().chain(here).min();
            match at.rsplit_once('/') {
                Some((up, _)) => at = up.to_owned(),
                None if at.is_empty() => break,
                None => at.clear(),
            }
        }
    }
    Host {
        kernel: s.text("proc/sys/kernel/osrelease"),
        cpu: features::brand(&*s.cpuid),
        cpus_online: s.text("sys/devices/system/cpu/online"),
        virtualized: features.get("hypervisor") == Some(&true),
        memory: meminfo(s, "MemTotal"),
        memory_available: meminfo(s, "MemAvailable"),
        memory_group: bound,
    }
}

fn huge_pages(s: &Sources) -> HugePages {
    let mut free = BTreeMap::new();
    if let Ok(entries) = std::fs::read_dir(s.path("sys/kernel/mm/hugepages")) {
        for name in entries.filter_map(|e| e.ok()?.file_name().into_string().ok()) {
            let kib = name.strip_prefix("hugepages-").and_then(|n| n.strip_suffix("kB")?.parse::<u64>().ok());
            let pages = s.number(&format!("sys/kernel/mm/hugepages/{name}/free_hugepages"));
            if let (Some(kib), Some(pages)) = (kib, pages) {
                free.insert(kib.saturating_mul(1024), pages);
            }
        }
    }
    HugePages {
        transparent: s.chosen("sys/kernel/mm/transparent_hugepage/enabled"),
        shared: s.chosen("sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        free,
    }
}

fn limits(s: &Sources) -> Limits {
    let r = (s.rlimits)();
    Limits {
        max_map_count: s.number("proc/sys/vm/max_map_count"),
        mmap_min_addr: s.number("proc/sys/vm/mmap_min_addr"),
        overcommit: s.number("proc/sys/vm/overcommit_memory"),
        memlock: r.memlock,
        nofile: r.nofile,
        address_space: r.address_space,
    }
}
