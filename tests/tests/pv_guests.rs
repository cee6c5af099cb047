//! Guests that know the paravirtual ABI: one file boots on Paravane, which has it, and on QEMU, which has not.

use paravane_tests::guest::{self, Engine};
use paravane_tests::host;

/// Boots the measuring guest, which checks its page tables, exceptions, user mode and interrupts by itself.
fn boots(engine: Engine) -> String {
    let (status, output) = guest::run_elf(engine, &guest::pv_elf("measure-guest"), "", &[]);
    assert_eq!(status, Some(1), "the guest ends with status 0:\n{output}");
    assert!(output.contains("user mode and interrupts work"), "{output}");
    output
}

#[test]
fn binary_translation() {
    boots(Engine::Bt);
}

#[test]
fn independent_emulator() {
    if !host::has_tool("qemu-system-x86_64") {
        eprintln!("SKIPPED: qemu-system-x86_64 is missing; install qemu-system-x86 to boot without the ABI");
        return;
    }
    boots(Engine::QemuTcg);
}
