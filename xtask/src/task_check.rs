//! `cargo xtask check`: what can be said without running anything: formatting, lints, documentation.

use crate::host::{self, Result};
use std::process::ExitCode;

/// Runs the three checks and stops at the first that fails.
pub(crate) fn run() -> Result<ExitCode> {
    checks()?;
    Ok(ExitCode::SUCCESS)
}

/// The checks, shared with `cargo xtask test`.
///
/// # Errors
/// One of them failed; its own output says where.
pub(crate) fn checks() -> Result<()> {
    host::run(host::cargo().args(["fmt", "--all", "--", "--check"]))?;
    host::run(host::cargo().args([
        "clippy",
        "--release",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]))?;
    host::run(
        host::cargo()
            .args(["doc", "--release", "--workspace", "--no-deps", "--document-private-items", "--locked"])
            // Private items are documented too, so a link to one leads somewhere.
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"),
    )
}
