//! The report for people: a short table, and what to mend below it.

use super::kvm::Access;
use super::report::{EngineName, Fitness, KvmKind, Report};
use std::fmt::Write;

/// A time given in nanoseconds, with two or three significant digits.
pub fn time(ns: f64) -> String {
    match ns {
        n if n < 10.0 => format!("{n:.2} ns"),
        n if n < 1000.0 => format!("{n:.0} ns"),
        n if n < 10_000.0 => format!("{:.1} us", n / 1e3),
        n if n < 1e6 => format!("{:.0} us", n / 1e3),
        n => format!("{:.0} ms", n / 1e6),
    }
}

/// A number of bytes.
pub fn size(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        n if n >= 1 << 30 => format!("{:.1} GiB", b / f64::from(1 << 30)),
        n if n >= 1 << 20 => format!("{:.0} MiB", b / f64::from(1 << 20)),
        n if n >= 1 << 10 => format!("{:.0} KiB", b / 1024.0),
        n => format!("{n} bytes"),
    }
}

/// What /dev/kvm is, in a clause that follows its name.
pub fn kvm(r: &Report) -> String {
    let k = &r.kvm;
    let modules = if k.modules.is_empty() { String::new() } else { format!(" ({})", k.modules.join(", ")) };
    match k.facts.access {
        Access::Absent => "absent".into(),
        Access::Denied => "there, but this user may not open it".into(),
        Access::Failed => format!("does not work: {}", k.facts.error.as_deref().unwrap_or("no reason given")),
        Access::Open => {
            let kind = match k.kind {
                KvmKind::Vmx => "VMX",
                KvmKind::Svm => "SVM",
                KvmKind::Emulating => "emulating: there is no VMX or SVM behind it",
                KvmKind::Unknown => "of an unknown kind",
            };
            format!("opens, {kind}{modules}")
        }
    }
}

/// The table.
pub fn render(r: &Report) -> String {
    let mut out = String::new();
    let mut row = |topic: &str, text: &str| {
        let _ = writeln!(out, "{topic:<14} {text}");
    };
    let unknown = || "unknown".to_owned();
    row("paravane", &format!("{} on Linux {}", r.version, r.host.kernel.clone().unwrap_or_else(unknown)));
    let guest = if r.host.virtualized { ", itself a guest" } else { "" };
    let online = r.host.cpus_online.clone().unwrap_or_else(unknown);
    row("CPU", &format!("{}{guest}; online: {online}", r.host.cpu));
    let (yes, no): (Vec<_>, Vec<_>) =
        r.features.iter().filter(|(n, _)| *n != "hypervisor").partition(|(_, there)| **there);
    let names = |list: Vec<(&String, &bool)>| list.into_iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(" ");
    row("CPU has", &names(yes));
    if !no.is_empty() {
        row("CPU lacks", &names(no));
    }
    let memory = |n: Option<u64>| n.map_or_else(unknown, size);
    let group = r.host.memory_group.map_or(String::new(), |n| format!(", at most {} for this group", size(n)));
    row("memory", &format!("{}, {} available{group}", memory(r.host.memory), memory(r.host.memory_available)));
    let pools: Vec<_> = r.huge_pages.free.iter().map(|(n, free)| format!("{free} of {}", size(*n))).collect();
    let pools = if pools.is_empty() { "none".into() } else { pools.join(", ") };
    row(
        "huge pages",
        &format!(
            "guest memory: {}; private memory: {}; free in pools: {pools}",
            r.huge_pages.shared.clone().unwrap_or_else(unknown),
            r.huge_pages.transparent.clone().unwrap_or_else(unknown)
        ),
    );
    let l = &r.limits;
    let bytes = |n: Option<u64>| n.map_or_else(|| "unlimited".into(), size);
    let count = |n: Option<u64>| n.map_or_else(|| "unlimited".into(), |n: u64| n.to_string());
    row(
        "limits",
        &format!(
            "mappings {}, open files {}, locked memory {}, addresses {}",
            count(l.max_map_count),
            count(l.nofile),
            bytes(l.memlock),
            bytes(l.address_space)
        ),
    );
    row("/dev/kvm", &kvm(r));
    if let Some(s) = &r.kvm.facts.speeds {
        let ring3 = s.ring3_ns.map_or_else(|| "not run".into(), time);
        row(
            "KVM speed",
            &format!(
                "ring 0 {}, ring 3 {ring3} per instruction (host {}); exit {}",
                time(s.ring0_ns),
                time(s.host_ns),
                time(s.exit_ns)
            ),
        );
    }
    for (topic, engine) in [("engine kvm", &r.engines.kvm), ("engine bt", &r.engines.bt)] {
        let word = match engine.fitness {
            Fitness::Good => "good: ",
            Fitness::Limited => "limited: ",
            Fitness::None => "no: ",
        };
        row(topic, &format!("{word}{}", engine.text));
    }
    let picked = if r.auto.engine == EngineName::Kvm { "kvm" } else { "bt" };
    row("--engine auto", &format!("{picked}: {}", r.auto.reason));
    if !r.advice.is_empty() {
        out.push_str("\nTo mend:\n");
        for a in &r.advice {
            let grade = if a.essential { " (needed)" } else { "" };
            let _ = writeln!(out, "  {}{grade}: {}", a.topic, a.text);
        }
    }
    out
}
