//! A bare-metal guest in C, compiled against the generated header alone: the ABI belongs to no language.

use paravane_tests::guest::{self, Engine};
use paravane_tests::host;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles the guest into `folder`; `None`, with a printed reason, without a C compiler.
fn compile(folder: &Path) -> Option<PathBuf> {
    if !host::has_tool("cc") {
        eprintln!("SKIPPED: cc is missing; install gcc to compile the guest in C");
        return None;
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guests = tests.join("pv-guests");
    let (start, elf) = (folder.join("boot.o"), folder.join("c-guest"));
    let run = |command: &mut Command| {
        let output = command.output().expect("cc can be started");
        assert!(output.status.success(), "cc fails:\n{}", String::from_utf8_lossy(&output.stderr));
    };
    run(Command::new("cc")
        .args(["-c", "-x", "assembler-with-cpp", "-Wa,-msyntax=intel,-mnaked-reg"])
        .arg(guests.join("rt/src/boot.s"))
        .arg("-o")
        .arg(&start));
    run(Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-ffreestanding", "-fno-pic", "-fno-stack-protector"])
        .args(["-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-mno-red-zone", "-mgeneral-regs-only"])
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments", "-Wl,-T"])
        .arg(guests.join("link.ld"))
        .arg("-I")
        .arg(tests.join("../pv-abi/include"))
        .arg(guests.join("c/guest.c"))
        .arg(&start)
        .arg("-o")
        .arg(&elf));
    Some(elf)
}

/// Runs the guest where `way` is the way it must take.
fn run(engine: Engine, options: &[&str], way: &str) {
    let folder = std::env::temp_dir().join(format!("paravane-c-guest-{}-{}", std::process::id(), way.len()));
    std::fs::create_dir_all(&folder).expect("the temporary folder can be written");
    let result = compile(&folder).map(|elf| guest::run_elf(engine, &elf, "", options));
    let _ = std::fs::remove_dir_all(&folder);
    let Some((status, output)) = result else { return };
    assert_eq!(status, Some(1), "the guest ends with status 0:\n{output}");
    assert!(output.contains(way) && !output.contains("not ok"), "{output}");
}

#[test]
fn paravane() {
    run(Engine::Bt, &["--pv", "all"], "way: abi\n");
}

#[test]
fn independent_emulator() {
    if !host::has_tool("qemu-system-x86_64") {
        eprintln!("SKIPPED: qemu-system-x86_64 is missing; install qemu-system-x86 to boot without the ABI");
        return;
    }
    run(Engine::QemuTcg, &[], "way: native");
}
