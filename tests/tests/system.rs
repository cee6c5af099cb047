//! System-level behaviour: the bare-metal guest of `guests/` on every engine present.

use paravane_tests::guest::{self, Engine};
use paravane_tests::host;

/// Every case passes but for the known failures, and those do fail: a list that is out of date is an error too.
fn check(engine: Engine) {
    let (status, output) = guest::run(engine);
    let cases = guest::cases(&output);
    let plan = output.lines().find_map(|l| l.strip_prefix("1..")?.trim().parse::<usize>().ok());
    assert_eq!(plan, Some(cases.len()), "the guest did not run to its end (status {status:?}):\n{output}");
    assert!(cases.len() >= 20, "the guest has lost cases:\n{output}");
    let failed: Vec<&String> = cases.iter().filter(|(_, r)| r.is_err()).map(|(n, _)| n).collect();
    let known = guest::known_failures(engine);
    let unexpected: Vec<_> = failed.iter().filter(|n| !known.contains(n)).collect();
    assert!(unexpected.is_empty(), "{} fails {unexpected:?}:\n{output}", engine.name());
    let mended: Vec<_> = known.iter().filter(|n| !failed.contains(n)).collect();
    assert!(mended.is_empty(), "{} passes {mended:?} now: take them off known-failures.toml", engine.name());
    let expected = if failed.is_empty() { 1 } else { 3 };
    assert_eq!(status, Some(expected), "the exit status tells whether all cases passed:\n{output}");
}

#[test]
fn binary_translation() {
    check(Engine::Bt);
}

/// The guest's expectations hold elsewhere too, so a failure above is not the guest's own mistake.
#[test]
fn independent_emulator() {
    if !host::has_tool("qemu-system-x86_64") {
        eprintln!("SKIPPED: qemu-system-x86_64 is missing; install qemu-system-x86 to check the guest itself");
        return;
    }
    check(Engine::QemuTcg);
}
