//! Busybox initramfs images, written as cpio `newc` archives.
//!
//! The archive is encoded here rather than by cpio(1) because a device node can then be described without the right
//! to create one, and because the same inputs always give the same bytes.

use std::fs;
use std::path::Path;

use crate::Result;

/// Markers that the scripted initramfs prints after `PARAVANE-OK`, in order.
pub(crate) const MARKERS: [&str; 7] = ["mounts", "loop", "fork", "pipes", "i386", "dd", "done"];

/// Start of every `/init`: the file systems and standard streams that the commands need.
const PROLOGUE: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ PS1='guest# '
";

const SHELL_INIT: &str = "echo 'Type exit to power the guest off.'
setsid cttyhack sh
poweroff -f
";

const SCRIPT_INIT: &str = "sh /script
poweroff -f
";

/// What the scripted guest does. Each step prints its marker only when its result is the known one.
const SCRIPT: &str = "ok() { echo \"PARAVANE-OK $1\"; }
cat /proc/mounts
grep -q '^proc /proc proc' /proc/mounts && grep -q '^sysfs /sys' /proc/mounts && \\
    grep -q '^devtmpfs /dev' /proc/mounts && ok mounts
i=0; s=0
while [ $i -lt 100000 ]; do i=$((i+1)); s=$((s+i)); done
[ $s -eq 5000050000 ] && ok loop
i=0; n=0
while [ $i -lt 200 ]; do i=$((i+1)); [ \"$(/bin/busybox echo $i)\" = $i ] && n=$((n+1)); done
[ $n -eq 200 ] && ok fork
[ \"$(seq 1 20000 | sort -rn | sort -n | sha256sum)\" = '@SEQ@  -' ] && ok pipes
[ \"$(/bin/busybox-i386 echo thirty-two)\" = thirty-two ] && /bin/busybox-i386 uname -a && \\
    [ \"$(/bin/busybox-i386 sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $i')\" = 20000 ] && ok i386
[ \"$(dd if=/dev/zero bs=1M count=20 2>/dev/null | sha256sum)\" = '@ZERO@  -' ] && ok dd
ok done
";

const SEQ_SHA256: &str = "f6351f5ead9a700e34275480b3856ea738122a7c57bdeb744a631251c069587a";
const ZERO_SHA256: &str = "cd52d81e25f372e6fa4db2c0dfceb59862c1969cab17096da352b34950c973cc";

/// A cpio archive in the `newc` format under construction.
struct Cpio {
    bytes: Vec<u8>,
    next_inode: u32,
}

impl Cpio {
    fn new() -> Self {
        Cpio { bytes: Vec::new(), next_inode: 1 }
    }

    /// Appends one entry; `rdev` is the device's major and minor number.
    fn entry(&mut self, name: &str, mode: u32, rdev: (u32, u32), data: &[u8]) {
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // The sizes are below 4 GiB by far: the largest file is a two-megabyte busybox.
        let fields =
            [self.next_inode, mode, 0, 0, links, 0, data.len() as u32, 0, 0, rdev.0, rdev.1, name.len() as u32 + 1, 0];
        self.next_inode += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

/// Builds an image with the given end of `/init` and, if any, a `/script`.
fn build(guests: &Path, init: &str, script: Option<&str>) -> Result<Vec<u8>> {
    let read = |name: &str| {
        fs::read(guests.join(name))
            .map_err(|e| format!("cannot read target/guests/{name}: {e}; run cargo xtask guests"))
    };
    let mut cpio = Cpio::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "root"] {
        cpio.entry(dir, 0o040_755, (0, 0), &[]);
    }
    cpio.entry("dev/console", 0o020_600, (5, 1), &[]);
    cpio.entry("dev/null", 0o020_666, (1, 3), &[]);
    cpio.entry("bin/busybox", 0o100_755, (0, 0), &read("busybox-amd64")?);
    cpio.entry("bin/busybox-i386", 0o100_755, (0, 0), &read("busybox-i386")?);
    cpio.entry("bin/sh", 0o120_777, (0, 0), b"busybox");
    cpio.entry("init", 0o100_755, (0, 0), format!("{PROLOGUE}{init}").as_bytes());
    if let Some(script) = script {
        cpio.entry("script", 0o100_755, (0, 0), script.as_bytes());
    }
    Ok(cpio.finish())
}

/// Writes the interactive and the scripted image, leaving files that are already right alone.
pub(crate) fn write_all(guests: &Path) -> Result<()> {
    let script = SCRIPT.replace("@SEQ@", SEQ_SHA256).replace("@ZERO@", ZERO_SHA256);
    store(guests, "initramfs-shell.cpio", &build(guests, SHELL_INIT, None)?)?;
    store(guests, "initramfs-script.cpio", &build(guests, SCRIPT_INIT, Some(&script))?)
}

/// Writes an image that runs `commands` and powers off, and returns its file name.
pub(crate) fn write_commands(guests: &Path, commands: &str) -> Result<&'static str> {
    let name = "initramfs-commands.cpio";
    store(guests, name, &build(guests, SCRIPT_INIT, Some(&format!("{commands}\n")))?)?;
    Ok(name)
}

fn store(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let target = dir.join(name);
    if fs::read(&target).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let temporary = dir.join(format!("{name}.{}.new", std::process::id()));
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, &target))
        .map_err(|e| format!("cannot write {}: {e}", target.display()))
}
