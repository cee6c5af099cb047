//! Guests that know the paravirtual ABI: one file boots on Paravane, which has it, and on QEMU, which has not.

use paravane_tests::guest::{self, Engine};
use paravane_tests::host;

/// Boots the measuring guest, which checks by itself that page tables, exceptions, user mode, interrupts and then every feature work: by the ABI as far
/// as it is there, and natively.
fn boots(engine: Engine, options: &[&str]) -> String {
    let (status, output) = guest::run_elf(engine, &guest::pv_elf("measure-guest"), "", options);
    assert_eq!(status, Some(1), "the guest ends with status 0:\n{output}");
    assert!(output.contains("all features work"), "{output}");
    output
}

/// Features that the first of the guest's two runs used the ABI for.
fn by_abi(output: &str) -> Vec<&str> {
    let first = output.split("form stock").next().unwrap_or_default();
    first.lines().filter_map(|l| l.strip_prefix("path ")?.split_once(" abi ").map(|(name, _)| name)).collect()
}

#[test]
fn every_feature_works_by_the_abi() {
    let output = boots(Engine::Bt, &["--pv", "all", "--rng=transport=pv"]);
    let used = by_abi(&output);
    assert!(output.contains("virtio device works"), "a device on the ABI's transport:\n{output}");
    for f in
        ["PAGE_TABLES", "VIRTUAL_IF", "CLOCK", "TIMER", "IPI", "TLB_FLUSH", "LAZY_EOI", "SCHEDULE", "CONSOLE", "VIRTIO"]
    {
        assert!(used.contains(&f), "{f} takes the native way:\n{output}");
    }
}

#[test]
fn what_pays_is_used_by_itself() {
    let output = boots(Engine::Bt, &[]);
    assert!(by_abi(&output).contains(&"PAGE_TABLES"), "{output}");
}

#[test]
fn nothing_is_used_where_nothing_is_offered() {
    let output = boots(Engine::Bt, &["--pv", "off", "--rng"]);
    assert!(output.contains("virtio device works"), "a device on PCI:\n{output}");
    assert!(by_abi(&output).is_empty(), "{output}");
}

/// The same file where there is no such thing.
#[test]
fn independent_emulator() {
    if !host::has_tool("qemu-system-x86_64") {
        eprintln!("SKIPPED: qemu-system-x86_64 is missing; install qemu-system-x86 to boot without the ABI");
        return;
    }
    let output = boots(Engine::QemuTcg, &[]);
    assert!(output.contains("absent Some(NotFound)") && by_abi(&output).is_empty(), "{output}");
}
