//! From facts to verdicts: what kind of KVM this is, what each engine can do, which one `auto` takes, what to mend.
//!
//! The rule for `auto` is short: KVM where it is measured to run ring 0 at about the CPU's own speed, else binary translation. A
//! CPUID bit is no measurement; a KVM that emulates may sit on a CPU that has VMX. Only where binary translation cannot run at all is
//! a slow KVM taken.

use super::kvm::Access;
use super::report::{Advice, Choice, Engine, EngineName, Engines, Fitness, Kvm, KvmKind, Report};
use paravane_bt::Requirement;
use std::collections::BTreeMap;

/// What [`decide`] finds.
pub struct Verdict {
    /// What each engine can do.
    pub engines: Engines,
    /// What `auto` takes.
    pub choice: Choice,
}

/// What is behind a device that says this.
pub fn kind(facts: &super::kvm::KvmFacts, features: &BTreeMap<String, bool>) -> KvmKind {
    let has = |name: &str| features.get(name) == Some(&true);
    if facts.access != Access::Open {
        return KvmKind::Unknown;
    }
    match facts.speeds {
        Some(s) if !s.native_ring0() => KvmKind::Emulating,
        _ if has("vmx") => KvmKind::Vmx,
        _ if has("svm") => KvmKind::Svm,
        Some(_) => KvmKind::Unknown,
        None => KvmKind::Emulating,
    }
}

/// Whether KVM runs ring 0 at the CPU's speed, as measured.
pub fn kvm_is_good(kvm: &Kvm) -> bool {
    kvm.facts.access == Access::Open && kvm.facts.speeds.is_some_and(|s| s.native_ring0())
}

/// Why KVM is not good, in one clause.
fn why_not(kvm: &Kvm) -> String {
    let error = |e: &Option<String>| e.clone().unwrap_or_else(|| "no reason given".into());
    match (kvm.facts.access, &kvm.facts.speeds) {
        (Access::Absent, _) => "there is no /dev/kvm".into(),
        (Access::Denied, _) => "this user may not open /dev/kvm".into(),
        (Access::Failed, _) => format!("/dev/kvm does not work ({})", error(&kvm.facts.error)),
        (Access::Open, Some(s)) => {
            format!("KVM only emulates ring 0 here, at {} per instruction", super::table::time(s.ring0_ns))
        }
        (Access::Open, None) => format!("KVM could not run a probe guest ({})", error(&kvm.facts.probe_error)),
    }
}

/// Judges the engines and picks one. `needs` is what binary translation needs.
pub fn decide(kvm: &Kvm, features: &BTreeMap<String, bool>, needs: &[Requirement]) -> Verdict {
    let good = kvm_is_good(kvm);
    let missing: Vec<&str> = needs.iter().filter(|r| r.essential && !r.met).map(|r| r.name).collect();
    let bt_engine = Engine {
        fitness: match () {
            () if !missing.is_empty() => Fitness::None,
            () if needs.iter().any(|r| !r.met) => Fitness::Limited,
            () => Fitness::Good,
        },
        text: match () {
            () if !missing.is_empty() => format!("needs {}, which this host does not give", missing.join(", ")),
            () if needs.iter().any(|r| !r.met) => "stock kernels; programs run slower, without host mappings".into(),
            () => "stock kernels, unprivileged, without hardware support".into(),
        },
        requirements: needs.iter().map(|r| (r.name.to_owned(), r.met)).collect(),
    };
    let kvm_engine = Engine {
        fitness: match () {
            () if kvm.facts.access != Access::Open => Fitness::None,
            () if good => Fitness::Good,
            () if kvm.facts.speeds.is_some() => Fitness::Limited,
            () => Fitness::None,
        },
        text: match () {
            () if good => "stock kernels at the CPU's speed".into(),
            () if kvm.facts.access == Access::Open && kvm.facts.speeds.is_some() => {
                "small guests only: kernels are slow and may meet what this KVM cannot emulate".into()
            }
            () => why_not(kvm),
        },
        requirements: kvm.facts.capabilities.clone(),
    };
    let choice = if good {
        let ns = kvm.facts.speeds.map_or(0.0, |s| s.ring0_ns);
        let by = match kind(&kvm.facts, features) {
            KvmKind::Vmx => ", with VMX",
            KvmKind::Svm => ", with SVM",
            _ => "",
        };
        let reason = format!("KVM runs ring 0 at the CPU's speed, {} per instruction{by}", super::table::time(ns));
        Choice { engine: EngineName::Kvm, reason }
    } else if bt_engine.fitness == Fitness::None && kvm_engine.fitness != Fitness::None {
        let reason = format!("binary translation {}; {}", bt_engine.text, why_not(kvm));
        Choice { engine: EngineName::Kvm, reason }
    } else {
        Choice { engine: EngineName::Bt, reason: why_not(kvm) }
    };
    Verdict { engines: Engines { kvm: kvm_engine, bt: bt_engine }, choice }
}

/// Mappings that a process may need: windows are cleared after 24,000, and there is the rest of the process.
const MAPPINGS: u64 = 32_000;
/// Descriptors that a machine with a few devices may need.
const DESCRIPTORS: u64 = 256;
/// Memory below which hardly any guest runs, bytes.
const MEMORY: u64 = 256 << 20;

/// What is not as it should be.
pub fn advice(r: &Report, needs: &[Requirement]) -> Vec<Advice> {
    let mut list = Vec::new();
    let mut add = |topic: &str, essential: bool, text: String| {
        list.push(Advice { topic: topic.into(), essential, text });
    };
    let hardware = ["vmx", "svm"].into_iter().find(|f| r.features.get(*f) == Some(&true));
    match (r.kvm.facts.access, hardware) {
        (Access::Denied, _) => {
            let how = match &r.kvm.group {
                Some(group) if group != "root" => format!("ask for membership in the group \"{group}\""),
                _ => "ask for permission on the device".into(),
            };
            add("/dev/kvm", false, format!("this user may not open it; {how}"));
        }
        (Access::Absent, Some(f)) => {
            let module = if f == "vmx" { "kvm_intel" } else { "kvm_amd" };
            add(
                "/dev/kvm",
                false,
                format!(
                    "the CPU has {}, but there is no device; load the module {module}, or pass the device into the container",
                    f.to_uppercase()
                ),
            );
        }
        (Access::Failed, _) => {
            let why = r.kvm.facts.error.as_deref().unwrap_or("no reason given");
            add("/dev/kvm", false, format!("it does not work ({why}); look at the host kernel's log"));
        }
        _ => {}
    }
    if let Some(why) = &r.kvm.facts.probe_error {
        add("/dev/kvm", false, format!("a guest of a few bytes did not run ({why}); the KVM engine will not, either"));
    }
    for need in needs.iter().filter(|n| !n.met) {
        add("engine bt", need.essential, format!("no {}: {}", need.name, need.why));
    }
    if let Some(n) = r.limits.max_map_count.filter(|&n| n < MAPPINGS) {
        add(
            "limits",
            false,
            format!(
                "a process may have only {n} mappings, and host mappings for guest processes run out; sysctl -w vm.max_map_count=65530"
            ),
        );
    }
    if let Some(n) = r.limits.nofile.filter(|&n| n < DESCRIPTORS) {
        add("limits", false, format!("a process may have only {n} open files; raise it with \"ulimit -n 1024\""));
    }
    if matches!(r.huge_pages.shared.as_deref(), Some("never" | "deny")) {
        add(
            "huge pages",
            false,
            "guest memory gets none, which costs compute-bound guests some per cent; echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled".into(),
        );
    }
    if r.limits.overcommit == Some(2) {
        add(
            "memory",
            false,
            "overcommit is off (vm.overcommit_memory=2), so large reservations may be refused; sysctl -w vm.overcommit_memory=0".into(),
        );
    }
    let room = r.host.memory_available.into_iter().chain(r.host.memory_group).min();
    if let Some(n) = room.filter(|&n| n < MEMORY) {
        add("memory", false, format!("only {} are to be had; give guests little with --memory", super::table::size(n)));
    }
    list
}
