//! Stock Debian kernels by binary translation, as an ordinary user without `/dev/kvm`: the whole boot, real work in user
//! space with checked results, and power-off.

use paravane_tests::exercise;
use paravane_tests::host::{self, Stage};
use paravane_tests::process;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Far above what a boot takes on a busy machine, far below a patience's end.
const LIMIT: Duration = Duration::from_secs(120);

const CMDLINE: &str = "console=ttyS0 panic=-1";

/// Complaints of a kernel that are right and stay, each with the reason.
const ACCEPTED: [(&str, &str); 0] = [];

/// Complaints that are neither accepted nor given by the same kernel under QEMU's emulator.
fn new_complaints(console: &str, kernel: &Path, initrd: &Path) -> Vec<String> {
    let mut found: Vec<String> = exercise::complaints(console).into_iter().map(str::to_owned).collect();
    found.retain(|line| !ACCEPTED.iter().any(|(accepted, _)| line.contains(accepted)));
    if found.is_empty() || !host::has_tool("qemu-system-x86_64") {
        return found;
    }
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "512M", "-nodefaults", "-no-reboot", "-display", "none"]);
    qemu.args(["-serial", "stdio", "-append", CMDLINE]).arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    let (_, reference) = process::run(&mut qemu, LIMIT);
    let known = exercise::complaints(&reference);
    found.retain(|line| !known.contains(&line.as_str()));
    found
}

fn boots_works_and_powers_off(series: &str) {
    let Some(kernel) = host::guest_file(&format!("{series}/vmlinuz")) else { return };
    let Some(initrd) = host::guest_file("initramfs-script.cpio") else { return };
    let stage = Stage::new();
    let (status, console) = process::run(&mut stage.paravane(&kernel, &initrd, CMDLINE), LIMIT);
    assert!(console.contains(&format!("Linux version {series}.")), "this is not Linux {series}:\n{console}");
    let problems = exercise::problems(&console);
    assert!(problems.is_empty(), "Linux {series}: {problems:#?}\n{console}");
    assert!(console.contains("paravane-script: exit 0"), "Linux {series}: the script failed\n{console}");
    assert_eq!(status.code(), Some(0), "Linux {series} ended with {status}\n{console}");
    let complaints = new_complaints(&console, &kernel, &initrd);
    assert!(complaints.is_empty(), "Linux {series} complains: {complaints:#?}\n{console}");
    assert_eq!(stage.left_behind(), Vec::<String>::new(), "files were left behind");
}

#[test]
fn linux_6_1_boots_works_and_powers_off() {
    boots_works_and_powers_off("6.1");
}

#[test]
fn linux_6_12_boots_works_and_powers_off() {
    boots_works_and_powers_off("6.12");
}

/// A named script of the initramfs can be chosen on the kernel's command line.
#[test]
fn a_script_is_chosen_on_the_command_line() {
    let Some(kernel) = host::guest_file("6.1/vmlinuz") else { return };
    let Some(initrd) = host::guest_file("initramfs-shell.cpio") else { return };
    let stage = Stage::new();
    let cmdline = format!("{CMDLINE} paravane.script=nothing");
    let (status, console) = process::run(&mut stage.paravane(&kernel, &initrd, &cmdline), LIMIT);
    assert!(console.contains("no script named /scripts/nothing in the initramfs"), "{console}");
    assert_eq!(status.code(), Some(0), "{console}");
}
