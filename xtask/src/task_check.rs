//! `cargo xtask check`: what can be said without running anything: formatting, lints, documentation.

use crate::host::{self, Result};
use std::process::ExitCode;

/// Bare-metal guests, in tests/.
const GUESTS: [&str; 3] = ["guests", "device-guests", "pv-guests"];

/// Runs the checks and stops at the first that fails.
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
    // Workspaces of their own, with compiler flags of their own in .cargo/config.toml.
    for guests in GUESTS {
        let folder = host::repo().join("tests").join(guests);
        host::run(host::cargo().current_dir(&folder).args(["fmt", "--", "--check"]))?;
        let target = host::repo().join("target/test-guests");
        let mut clippy = host::cargo();
        clippy
            .current_dir(&folder)
            .args(["clippy", "--release", "--workspace", "--locked", "--target-dir"])
            .arg(target);
        // The outer build's flags would replace the guest's own.
        clippy.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        host::run(clippy.args(["--", "-D", "warnings"]))?;
    }
    host::run(
        host::cargo()
            .args(["doc", "--release", "--workspace", "--no-deps", "--document-private-items", "--locked"])
            // Private items are documented too, so a link to one leads somewhere.
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"),
    )
}
