//! The root file system of the test guests: busybox for 64 and 32 bits, an init script, and the work to do.
//!
//! Two images come from the same contents: `initramfs-shell.cpio` ends in a shell for a person,
//! `initramfs-script.cpio` runs guest/exercise.sh and powers off. [`with_script`] makes a third kind, for a script that
//! somebody typed: the shell image followed by a small archive that holds only `/script`.

use crate::cpio::Archive;

const INIT: &[u8] = include_bytes!("../guest/init.sh");
const EXERCISE: &[u8] = include_bytes!("../guest/exercise.sh");

/// The programs that go into an image.
pub(crate) struct Programs {
    /// Static busybox for x86-64.
    pub(crate) busybox: Vec<u8>,
    /// Static busybox for i386.
    pub(crate) busybox32: Vec<u8>,
}

/// What init does once the system is up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A shell on the console.
    Shell,
    /// The standard work of a boot test, then power-off.
    Exercise,
}

/// Builds an image.
pub(crate) fn build(programs: &Programs, purpose: Purpose) -> Vec<u8> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sbin", "scripts", "sys", "tmp"] {
        archive.folder(folder);
    }
    // The kernel opens /dev/console for init before anything could mount devtmpfs.
    archive.device("dev/console", 0o600, 5, 1);
    archive.device("dev/null", 0o666, 1, 3);
    archive.file("bin/busybox", 0o755, &programs.busybox);
    archive.file("bin/busybox32", 0o755, &programs.busybox32);
    archive.file("init", 0o755, INIT);
    archive.file("scripts/exercise", 0o755, EXERCISE);
    if purpose == Purpose::Exercise {
        archive.file("script", 0o755, EXERCISE);
    }
    archive.finish()
}

/// An image with another script: the given image, then an archive with `/script`.
pub(crate) fn with_script(image: &[u8], script: &str) -> Vec<u8> {
    let mut archive = Archive::default();
    archive.file("script", 0o755, format!("{script}\n").as_bytes());
    [image, &archive.finish()].concat()
}
