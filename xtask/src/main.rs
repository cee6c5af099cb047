//! The project's chores: `cargo xtask demo`, `test`, `guests`, `bench boot` and `boots`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

mod initramfs;
mod task_boot;
mod task_demo;
mod task_guests;
mod task_test;

/// What a task gives: a failure is one sentence for the person who called it.
pub(crate) type Result<T> = std::result::Result<T, String>;

const USAGE: &str = "Usage: cargo xtask TASK

  demo [--kernel 6.1|6.12] [--engine auto|kvm|bt] [--script \"COMMANDS\"]
                      boot a stock Debian kernel to a shell, or run COMMANDS in it and power off
  test                everything: formatting, lints, documentation, all tests
  guests              fetch the stock kernels and build the initramfs images below target/guests
  bench boot [--runs 5] [--kernel 6.1]
                      time from kernel start to power-off, beside QEMU's TCG
  boots [--count 50] [--kernel 6.1]
                      boot again and again; fails if one boot fails";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["demo", rest @ ..] => task_demo::run(rest),
        ["test"] => task_test::run().map(|()| 0),
        ["guests"] => task_guests::ensure().map(|dir| {
            println!("guests: ready in {}", dir.display());
            0
        }),
        ["bench", "boot", rest @ ..] => task_boot::bench(rest).map(|()| 0),
        ["boots", rest @ ..] => task_boot::soak(rest).map(|()| 0),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(0)
        }
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the checkout that this program was built from.
pub(crate) fn repo_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// The cargo that called this program.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(repo_root());
    cargo
}

/// Runs one visible step to its end.
pub(crate) fn step(command: &mut Command) -> Result<()> {
    let shown: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    println!(
        "xtask: {} {}",
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy(),
        shown.join(" ")
    );
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{} failed ({status})", shown.join(" "))),
        Err(e) => Err(format!("cannot start {}: {e}", command.get_program().to_string_lossy())),
    }
}

/// Builds the `paravane` program and returns its path.
pub(crate) fn build_paravane() -> Result<PathBuf> {
    step(cargo().args(["build", "--release", "-p", "paravane"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo_root().join("target"), PathBuf::from);
    let binary = repo_root().join(target).join("release/paravane");
    if !binary.is_file() {
        return Err(format!("the build left no program at {}", binary.display()));
    }
    Ok(binary)
}

/// Splits `--name value` pairs, accepting only the names given.
pub(crate) fn options<'a>(args: &[&'a str], names: &[&str]) -> Result<Vec<(&'a str, &'a str)>> {
    args.chunks(2)
        .map(|pair| match pair {
            [name, value] if names.contains(name) => Ok((*name, *value)),
            [name] if names.contains(name) => Err(format!("{name} needs a value")),
            _ => Err(format!("unknown option {}: use one of {}", pair[0], names.join(", "))),
        })
        .collect()
}

/// Checks that `version` is a kernel that `cargo xtask guests` fetches.
pub(crate) fn known_kernel(version: &str) -> Result<()> {
    if task_guests::KERNELS.iter().any(|(v, _)| *v == version) {
        return Ok(());
    }
    let known: Vec<_> = task_guests::KERNELS.iter().map(|(v, _)| *v).collect();
    Err(format!("there is no kernel {version}: use one of {}", known.join(", ")))
}
