//! The bare-metal test guest: built from `guests/`, run on an engine, judged by its TAP output.

use crate::{host, process};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Paravane's binary translation.
    Bt,
    /// Paravane on this host's KVM, with local APICs in user space.
    Kvm,
    /// The same with local APICs in the kernel.
    KvmSplit,
    /// QEMU's TCG, as an independent opinion.
    QemuTcg,
    /// QEMU on this host's KVM: what fails there too is KVM's doing and not ours.
    QemuKvm,
}

impl Engine {
    /// Its name in `known-failures.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bt => "paravane-bt",
            Self::QemuTcg => "qemu-tcg",
            Self::Kvm | Self::KvmSplit | Self::QemuKvm if host::kvm_emulates() => "emulating-kvm",
            Self::Kvm | Self::KvmSplit | Self::QemuKvm => "kvm",
        }
    }

    /// Why it cannot run here; `None` when it can.
    pub fn missing(self) -> Option<String> {
        let qemu = matches!(self, Self::QemuTcg | Self::QemuKvm) && !host::has_tool("qemu-system-x86_64");
        let kvm = matches!(self, Self::Kvm | Self::KvmSplit | Self::QemuKvm);
        match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            _ if qemu => Some("qemu-system-x86_64 is missing; install qemu-system-x86".into()),
            Err(e) if kvm => Some(format!("/dev/kvm cannot be opened ({e})")),
            _ => None,
        }
    }
}

/// A run takes a second or two; this is for a hang.
const LIMIT: Duration = Duration::from_secs(60);

/// For a run that need not end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The guest's ELF file, built once per test process.
///
/// # Panics
/// It cannot be built.
pub fn elf() -> &'static Path {
    static ELF: OnceLock<PathBuf> = OnceLock::new();
    ELF.get_or_init(|| build("guests", "system-guest"))
}

/// The ELF file of a guest that knows the paravirtual ABI, a binary of `pv-guests/`.
///
/// # Panics
/// It cannot be built.
pub fn pv_elf(binary: &str) -> PathBuf {
    build("pv-guests", binary)
}

/// The ELF file of the guest that drives virtio devices, from `device-guests/`.
///
/// # Panics
/// It cannot be built.
pub fn devices_elf() -> PathBuf {
    build("device-guests", "devices-guest")
}

/// Builds the guests of one folder and gives the path of a binary. Cargo itself sees to it that this happens once at a time.
fn build(folder: &str, binary: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = tests.join("../target/test-guests");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(tests.join(folder)).args(["build", "--release", "--quiet", "--bin", binary]);
    cargo.arg("--target-dir").arg(&target);
    // The guest has flags of its own, which those of the surrounding build would replace.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && text != "CARGO_HOME" || text.ends_with("RUSTFLAGS") {
            cargo.env_remove(&name);
        }
    }
    let status = cargo.status().expect("cargo can be started");
    assert!(status.success(), "the test guest {binary} cannot be built");
    target.join("x86_64-unknown-linux-gnu/release").join(binary)
}

/// Runs the system guest without the cases in `skip`; its exit status and output.
///
/// # Panics
/// It does not end.
pub fn run(engine: Engine, skip: &[&str]) -> (Option<i32>, String) {
    run_elf(engine, elf(), &without(skip), &[])
}

/// Runs the system guest without the cases in `skip` for a few seconds; its output. An engine may stand still at a case that it cannot do.
pub fn try_run(engine: Engine, skip: &[&str]) -> String {
    process::run_within(&mut command(engine, elf(), &without(skip), &[]), PATIENCE).1
}

fn without(skip: &[&str]) -> String {
    format!("skip={}", skip.join(","))
}

/// Runs a bare-metal guest with a command line and further options for Paravane; its exit status and output.
///
/// # Panics
/// It does not end.
pub fn run_elf(engine: Engine, elf: &Path, cmdline: &str, options: &[&str]) -> (Option<i32>, String) {
    let (status, text) = process::run(&mut command(engine, elf, cmdline, options), LIMIT);
    (status.code(), text)
}

/// The command that runs a bare-metal guest with a command line and further options for Paravane.
pub fn command(engine: Engine, elf: &Path, cmdline: &str, options: &[&str]) -> Command {
    match engine {
        Engine::Bt | Engine::Kvm | Engine::KvmSplit => {
            let mut c = Command::new(host::program());
            c.args(["run", "--engine", if engine == Engine::Bt { "bt" } else { "kvm" }]);
            c.args(["--irqchip", if engine == Engine::KvmSplit { "split" } else { "user" }]);
            c.args(["--memory", "64M", "--debug-exit", "--serial", "stdio"]);
            c.args(options).args(["--cmdline", cmdline]).arg("--kernel").arg(elf);
            c
        }
        Engine::QemuTcg | Engine::QemuKvm => {
            let mut c = Command::new("qemu-system-x86_64");
            let how = if engine == Engine::QemuTcg { ["tcg", "max"] } else { ["kvm", "host"] };
            c.args(["-accel", how[0], "-cpu", how[1], "-m", "64", "-display", "none", "-no-reboot"])
                .args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
                .args(["-append", cmdline, "-kernel"])
                .arg(elf);
            c
        }
    }
}

/// The cases of a TAP listing: name, and the failure's details.
pub fn cases(tap: &str) -> BTreeMap<String, Result<(), String>> {
    tap.lines()
        .filter_map(|line| {
            let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
                (Some(rest), _) => (true, rest),
                (_, Some(rest)) => (false, rest),
                _ => return None,
            };
            let rest = rest.split_once(" - ")?.1;
            let (name, details) = rest.split_once(" # ").unwrap_or((rest, ""));
            Some((name.trim().to_owned(), if passed { Ok(()) } else { Err(details.to_owned()) }))
        })
        .collect()
}

/// A case that an engine is known to fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    engine: String,
    /// The case.
    pub test: String,
    /// It ends the machine, so that no case after it can run.
    pub fatal: bool,
}

/// Cases that an engine is known to fail, from `known-failures.toml`.
pub fn known_failures(engine: Engine) -> Vec<Known> {
    known_failures_of(engine.name())
}

/// The same for the conformance guest: entries whose engine begins with `conform-`.
pub fn known_conformance_failures(engine: Engine) -> Vec<Known> {
    known_failures_of(&format!("conform-{}", engine.name()))
}

fn known_failures_of(engine: &str) -> Vec<Known> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("known-failures.toml");
    let text = std::fs::read_to_string(&path).expect("tests/known-failures.toml can be read");
    parse_known(&text).into_iter().filter(|k| k.engine == engine).collect()
}

/// The file is a flat list of `key = "value"` lines under `[[failure]]` headings.
fn parse_known(text: &str) -> Vec<Known> {
    text.split("[[failure]]")
        .skip(1)
        .filter_map(|entry| {
            let value = |key: &str| {
                let line = entry.lines().find(|l| l.split('=').next().is_some_and(|k| k.trim() == key))?;
                Some(line.split_once('"')?.1.rsplit_once('"')?.0.to_owned())
            };
            assert!(value("reason").is_some_and(|r| !r.is_empty()), "a known failure has no reason: {entry}");
            let fatal = value("effect").is_some_and(|e| e == "fatal");
            Some(Known { engine: value("engine")?, test: value("test")?, fatal })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tap_and_the_list_are_read() {
        let c = cases("1..2\nok 1 - a/b\nnoise\nnot ok 2 - c/d # cr2 wrong\n");
        assert_eq!(c.len(), 2);
        assert_eq!(c["c/d"], Err("cr2 wrong".into()));
        let known = parse_known("# x\n[[failure]]\nengine = \"e\"\ntest = \"t\"\nreason = \"r\"\n");
        assert_eq!(known, [Known { engine: "e".into(), test: "t".into(), fatal: false }]);
    }
}
