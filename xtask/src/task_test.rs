//! `cargo xtask test`: every check of the project, the test run last.

use std::process::{Command, Stdio};

use crate::{Result, build_paravane, cargo, step, task_guests};

/// Runs all checks and stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    step(cargo().args(["fmt", "--all", "--check"]))?;
    step(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    step(cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    task_guests::ensure()?;
    let binary = build_paravane()?;
    step(cargo().args(["test", "--release", "--workspace", "--doc"]))?;
    let nextest = Command::new("cargo-nextest")
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    let runner: &[&str] = if nextest {
        &["nextest", "run", "--release", "--workspace"]
    } else {
        &["test", "--release", "--workspace", "--all-targets"]
    };
    step(cargo().args(runner).env("PARAVANE_BIN", binary))
}
