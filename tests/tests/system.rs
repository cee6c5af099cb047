//! System-level behaviour: the bare-metal guest of `guests/` on every engine present.

use paravane_tests::guest::{self, Engine};

/// Whether the machine ran to the end of the guest's list of cases.
fn finished(output: &str) -> Option<usize> {
    output.lines().find_map(|l| l.strip_prefix("1..")?.trim().parse::<usize>().ok())
}

/// Every case passes but for the known failures, and those do fail: a list that is out of date is an error too.
fn check(engine: Engine) {
    if let Some(why) = engine.missing() {
        eprintln!("SKIPPED on {engine:?}: {why}");
        return;
    }
    let known = guest::known_failures(engine);
    let fatal: Vec<&str> = known.iter().filter(|k| k.fatal).map(|k| &*k.test).collect();
    let known: Vec<&str> = known.iter().filter(|k| !k.fatal).map(|k| &*k.test).collect();
    let (status, output) = guest::run(engine, &fatal);
    let cases = guest::cases(&output);
    assert_eq!(finished(&output), Some(cases.len()), "the guest did not run to its end (status {status:?}):\n{output}");
    assert!(cases.len() >= 40, "the guest has lost cases:\n{output}");
    let failed: Vec<&str> = cases.iter().filter(|(_, r)| r.is_err()).map(|(n, _)| &**n).collect();
    let unexpected: Vec<_> = failed.iter().filter(|n| !known.contains(n)).collect();
    assert!(unexpected.is_empty(), "{engine:?} fails {unexpected:?}:\n{output}");
    let mended: Vec<_> = known.iter().filter(|n| !failed.contains(n)).collect();
    assert!(mended.is_empty(), "{engine:?} passes {mended:?} now: take them off known-failures.toml");
    let expected = if failed.is_empty() { 1 } else { 3 };
    assert_eq!(status, Some(expected), "the exit status tells whether all cases passed:\n{output}");
    // What the guest does not survive gets a machine of its own.
    for case in &fatal {
        let others: Vec<&str> = fatal.iter().copied().filter(|c| c != case).collect();
        let output = guest::try_run(engine, &others);
        let cases = guest::cases(&output);
        let sane = finished(&output) == Some(cases.len()) && cases.get(*case).is_some_and(Result::is_ok);
        assert!(!sane, "{engine:?} passes {case} now: take it off known-failures.toml\n{output}");
    }
}

#[test]
fn binary_translation() {
    check(Engine::Bt);
}

#[test]
fn hardware_assist() {
    check(Engine::Kvm);
}

/// Local APICs in the kernel make no difference.
#[test]
fn hardware_assist_with_local_apics_in_the_kernel() {
    check(Engine::KvmSplit);
}

/// The guest's expectations hold elsewhere too, so a failure above is not the guest's own mistake.
#[test]
fn independent_emulator() {
    check(Engine::QemuTcg);
}

/// The same KVM below another hypervisor: it fails the very same cases, so those failures are KVM's.
#[test]
fn independent_hypervisor_on_the_same_kvm() {
    check(Engine::QemuKvm);
}
