//! What the compute benchmark runs from: its own static binary and the guest image that holds it.
//!
//! The host runs the very files that are packed into the image.

use crate::cpio::Archive;
use crate::host::{self, Doing, Result};
use crate::task_guests;
use std::fs;
use std::path::{Path, PathBuf};

const INIT: &[u8] = include_bytes!("../guest/init.sh");
const SCRIPT: &[u8] = include_bytes!("../guest/bench.sh");

/// The benchmark's target; named even where it is the host's own, so that the flags below stay off build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Static, so that it runs in a guest without libraries, and at a fixed address, so that no run is luckier than another.
const FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Builds the benchmark's binary and returns its path.
///
/// # Errors
/// It does not build.
pub(crate) fn build_bench() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| host::repo().join("target"), |dir| host::repo().join(dir))
        .join("compute");
    let mut cargo = host::cargo();
    cargo.args(["build", "--release", "--package", "bench-programs", "--target", TARGET, "--target-dir"]);
    host::run(cargo.arg(&target).env("RUSTFLAGS", FLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS"))?;
    Ok(target.join(TARGET).join("release/bench"))
}

/// Packs the image, if it is not there with the same contents, and returns its path.
///
/// # Errors
/// The guests cannot be fetched, or a file cannot be read or written.
pub(crate) fn image(bench: &Path) -> Result<PathBuf> {
    task_guests::fetch()?;
    let busybox = host::guests_dir().join("busybox/busybox");
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sbin", "sys", "tmp"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 0o600, 5, 1);
    archive.device("dev/null", 0o666, 1, 3);
    archive.file("bin/busybox", 0o755, &fs::read(busybox).doing("cannot read busybox")?);
    archive.file("bin/bench", 0o755, &fs::read(bench).doing("cannot read the benchmark's binary")?);
    archive.file("init", 0o755, INIT);
    archive.file("script", 0o755, SCRIPT);
    store(&archive.finish())
}

/// Writes the image unless the cache holds the same.
fn store(image: &[u8]) -> Result<PathBuf> {
    let place = host::guests_dir().join("initramfs-compute.cpio");
    if !fs::read(&place).is_ok_and(|old| old == image) {
        let unfinished = host::guests_dir().join(format!(".initramfs-compute.cpio-{}", std::process::id()));
        fs::write(&unfinished, image).doing("cannot write the benchmark's image")?;
        fs::rename(&unfinished, &place).doing("cannot move the benchmark's image into place")?;
    }
    Ok(place)
}
