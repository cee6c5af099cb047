//! `cargo xtask guests debian`: a Debian 12 root disk with systemd and an SSH server, built without root.
//!
//! mmdebstrap installs the packages in its fakechroot mode: no root, no user namespaces, no loop device. It takes them
//! from the machine's own mirror, checked with the machine's keys. What makes the system ours (network by DHCP, a login
//! on the first serial port, the tests' SSH key, the stock kernel's modules) is laid over it, and `mke2fs -d` writes
//! the file system into a sparse file. fakeroot keeps the owners from one step to the next.
//!
//! Everything lies in target/guests/debian:
//!
//! | file | holds |
//! |---|---|
//! | `disk.raw` | the root disk, ext4 on the whole device; read it, copy it, do not boot from it |
//! | `initramfs.cpio` | busybox and the virtio modules; mounts /dev/vda and starts systemd |
//! | `id_ed25519` | the private key that root's account accepts |
//! | `known_host` | the disk's own SSH host key, for `known_hosts` |
//! | `VERSION` | what the folder was made from; another list makes another folder |
//!
//! root logs in on the serial console with an empty password, and over SSH with the key only. Host keys and the
//! machine id are made anew for every disk.

use crate::apt;
use crate::cpio::Archive;
use crate::host::{self, Doing, Failure, Result};
use crate::task_guests::{self, Guests, Work};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SUITE: &str = "bookworm";

/// What the disk holds beyond Debian's essential packages. fio and iperf3 are there for the benchmarks.
const PACKAGES: [&str; 17] = [
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "libpam-systemd",
    "systemd-resolved",
    "openssh-server",
    "iproute2",
    "iputils-ping",
    "curl",
    "fio",
    "iperf3",
    "e2fsprogs",
    "procps",
    "less",
    "nano",
    "netcat-openbsd",
];

/// Size of the disk in MiB; about 450 are used.
const DISK_MIB: u32 = 1024;

/// The modules that bring up a virtio disk and network card, in the order in which they need each other.
pub(crate) const MODULES: [&str; 10] = [
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/virtio/virtio_mmio.ko",
    "drivers/block/virtio_blk.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];

const INIT: &[u8] = include_bytes!("../guest/debian-init.sh");

/// Kernel parameters for this disk.
pub(crate) const CMDLINE: &str = "console=ttyS0 root=/dev/vda panic=-1";

/// The disk and what belongs to it.
pub(crate) struct Debian {
    folder: PathBuf,
    /// The stock kernel.
    pub(crate) kernel: PathBuf,
}

impl Debian {
    /// The pristine disk. Whoever boots it works on a copy.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    /// The initramfs with the virtio modules.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs.cpio")
    }

    /// The private SSH key for root's account.
    pub(crate) fn key(&self) -> PathBuf {
        self.folder.join("id_ed25519")
    }

    /// A copy of the disk in `place`, sparse as the disk is.
    ///
    /// # Errors
    /// The copy cannot be written.
    pub(crate) fn copy_disk(&self, place: &Path) -> Result<()> {
        let mut copy = Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto"]).arg(self.disk()).arg(place);
        host::output(&mut copy).map(drop)
    }

    /// The words of an ssh command that logs in as root at a port of the host's loopback and asks nothing.
    pub(crate) fn ssh(&self, port: u16) -> Vec<OsString> {
        let mut words: Vec<OsString> = ["ssh", "-p", &port.to_string(), "-i"].map(OsString::from).into();
        words.push(self.key().into());
        // Each disk has a host key of its own; on the loopback nobody stands in between.
        for option in ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"] {
            words.extend(["-o".into(), option.into()]);
        }
        words.push("root@127.0.0.1".into());
        words
    }
}

/// Makes sure that the disk is in the cache.
///
/// # Errors
/// A tool, the mirror or the network is missing; the sentence names it.
pub(crate) fn fetch() -> Result<Debian> {
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel("6.1")?;
    let folder = host::guests_dir().join("debian");
    let made_from = made_from(&kernel)?;
    if !fs::read_to_string(folder.join("VERSION")).is_ok_and(|text| text == made_from) {
        build(&guests, &kernel, &made_from)?;
    }
    Ok(Debian { folder, kernel })
}

/// What decides the contents of the folder, as text.
fn made_from(kernel: &Path) -> Result<String> {
    // Raised when the layers below change in a way that the lists do not show.
    const FORM: u32 = 1;
    Ok(format!(
        "form {FORM}, {SUITE}, {DISK_MIB} MiB, linux {}\npackages: {}\nmodules: {}\n{}",
        release(kernel)?,
        PACKAGES.join(" "),
        MODULES.join(" "),
        String::from_utf8_lossy(INIT)
    ))
}

/// The kernel's release, as in `uname -r` (Documentation/arch/x86/boot.rst: kernel_version at 0x20e, counted from 0x200).
fn release(kernel: &Path) -> Result<String> {
    let image = fs::read(kernel).doing(format!("cannot read {}", kernel.display()))?;
    let version = image.get(0x20e..0x210).map(|two| 0x200 + usize::from(u16::from_le_bytes([two[0], two[1]])));
    let text = version.and_then(|start| image.get(start..)).unwrap_or_default();
    let text: Vec<u8> = text.iter().copied().take_while(|byte| byte.is_ascii_graphic()).take(64).collect();
    if text.is_empty() {
        return Err(Failure::new(format!("{} names no kernel release", kernel.display())));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn build(guests: &Guests, kernel: &Path, made_from: &str) -> Result<()> {
    for (tool, package) in [
        ("mmdebstrap", "mmdebstrap"),
        ("fakechroot", "fakechroot"),
        ("fakeroot", "fakeroot"),
        ("mke2fs", "e2fsprogs"),
        ("ssh-keygen", "openssh-client"),
        ("tar", "tar"),
    ] {
        host::need_tool(tool, package, "build the Debian disk")?;
    }
    eprintln!("building a Debian 12 root disk (once, two minutes or so)");
    let work = Work::new(&host::guests_dir())?;
    let ready = work.path("debian");
    fs::create_dir_all(&ready).doing("cannot create a folder under target/guests")?;
    let release = release(kernel)?;
    make_key(&ready)?;
    let overlay = work.path("overlay");
    lay_over(&overlay, &ready)?;
    let tar = install(&work, &overlay, &guests.modules("6.1")?, &release)?;
    make_disk(&work, &tar, &ready)?;
    fs::write(ready.join("initramfs.cpio"), initramfs(guests)?).doing("cannot write the Debian initramfs")?;
    fs::write(ready.join("VERSION"), made_from).doing("cannot write VERSION")?;
    let place = host::guests_dir().join("debian");
    if place.exists() {
        fs::rename(&place, work.path("old-debian")).doing("cannot replace target/guests/debian")?;
    }
    fs::rename(&ready, &place).doing("cannot move the Debian disk into target/guests")
}

/// The key by which the tests log in.
fn make_key(ready: &Path) -> Result<()> {
    host::output(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "paravane-guest", "-f"])
            .arg(ready.join("id_ed25519")),
    )
    .map(drop)
}

/// The files that are laid over Debian's own.
fn lay_over(overlay: &Path, ready: &Path) -> Result<()> {
    let key = fs::read_to_string(ready.join("id_ed25519.pub")).doing("cannot read the new SSH key")?;
    let files: [(&str, &str, u32); 8] = [
        ("etc/hostname", "paravane\n", 0o644),
        ("etc/hosts", "127.0.0.1 localhost paravane\n::1 localhost\n", 0o644),
        ("etc/fstab", "/dev/vda / ext4 errors=remount-ro 0 0\n", 0o644),
        (
            "etc/systemd/network/10-wired.network",
            "[Match]\nName=en* eth*\n\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
            0o644,
        ),
        (
            "etc/apt/sources.list",
            "deb http://deb.debian.org/debian bookworm main\n\
             deb http://deb.debian.org/debian bookworm-updates main\n\
             deb http://security.debian.org/debian-security bookworm-security main\n",
            0o644,
        ),
        ("etc/machine-id", &machine_id()?, 0o444),
        ("etc/issue", "Debian GNU/Linux 12 under a hypervisor \\n \\l; root's password is empty\n\n", 0o644),
        ("root/.ssh/authorized_keys", &key, 0o600),
    ];
    for (name, contents, permissions) in files {
        let place = overlay.join(name);
        fs::create_dir_all(place.parent().unwrap_or(overlay)).doing("cannot create a folder under target/guests")?;
        fs::write(&place, contents).doing(format!("cannot write {name}"))?;
        fs::set_permissions(&place, fs::Permissions::from_mode(permissions))
            .doing("cannot set a file's permissions")?;
    }
    let private = overlay.join("root/.ssh");
    fs::set_permissions(private, fs::Permissions::from_mode(0o700)).doing("cannot set a folder's permissions")
}

/// A machine id for machine-id(5): 32 random hexadecimal digits, from the kernel's own source of such.
fn machine_id() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").doing("cannot read random bytes")?;
    Ok(format!("{}\n", uuid.trim().replace('-', "")))
}

/// Runs mmdebstrap and returns the archive with the whole system.
fn install(work: &Work, overlay: &Path, modules: &Path, release: &str) -> Result<PathBuf> {
    let tar = work.path("root.tar");
    let sources = work.path("mirror.sources");
    fs::write(&sources, apt::machine_stanza(&[SUITE])?).doing("cannot write the mirror's source list")?;
    let settings = [
        // Console logins with the empty password; SSH takes the key only.
        "chroot \"$1\" passwd --delete root",
        "chroot \"$1\" chown -R root:root /root /etc/systemd/network",
        "chroot \"$1\" systemctl enable systemd-networkd.service systemd-resolved.service serial-getty@ttyS0.service",
        // Nothing that downloads or scans by itself: a guest's idle time is to be idle.
        "chroot \"$1\" systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service \
         fstrim.timer dpkg-db-backup.timer getty@tty1.service",
        "ln -sf ../run/systemd/resolve/stub-resolv.conf \"$1/etc/resolv.conf\"",
        "rm -f \"$1\"/etc/apt/sources.list.d/*",
    ];
    let mut command = Command::new("mmdebstrap");
    command.env("PATH", host::search_path()).args(["--mode=fakechroot", "--variant=minbase", "--format=tar"]);
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=path-exclude=/usr/share/man/*"]);
    command.args(["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*"]);
    command.arg(format!("--customize-hook=sync-in {} /", quoted(overlay)));
    command.arg(format!("--customize-hook=mkdir -p \"$1/usr/lib/modules/{release}\""));
    command.arg(format!("--customize-hook=sync-in {} /usr/lib/modules/{release}", quoted(modules)));
    command.arg(format!("--customize-hook=chroot \"$1\" depmod {release}"));
    for setting in settings {
        command.arg(format!("--customize-hook={setting}"));
    }
    command.arg(SUITE).arg(&tar).arg(&sources);
    host::output(&mut command)?;
    Ok(tar)
}

/// A path as one word of a shell command.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

/// Unpacks the archive and writes the disk, in one fakeroot session that remembers who owns what.
fn make_disk(work: &Work, tar: &Path, ready: &Path) -> Result<()> {
    let root = work.path("root");
    fs::create_dir_all(&root).doing("cannot create a folder under target/guests")?;
    let script = "set -e\n\
                  tar --extract --preserve-permissions --numeric-owner --file \"$1\" --directory \"$2\"\n\
                  mke2fs -q -t ext4 -L debian -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d \"$2\" \"$3\" \"$4\"\n";
    host::output(
        Command::new("fakeroot")
            .env("PATH", host::search_path())
            .args(["--", "sh", "-c", script, "sh"])
            .arg(tar)
            .arg(&root)
            .arg(ready.join("disk.raw"))
            .arg(format!("{DISK_MIB}M")),
    )?;
    let host_key =
        fs::read_to_string(root.join("etc/ssh/ssh_host_ed25519_key.pub")).doing("the disk has no host key")?;
    fs::write(ready.join("known_host"), host_key).doing("cannot write the disk's host key")
}

/// busybox, the modules and the script that mounts the disk.
fn initramfs(guests: &Guests) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "lib", "proc", "root", "sys"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 0o600, 5, 1);
    archive.device("dev/null", 0o666, 1, 3);
    archive.file("bin/busybox", 0o755, &fs::read(guests.busybox()).doing("cannot read busybox")?);
    archive.file("init", 0o755, INIT);
    let kernel = guests.modules("6.1")?.join("kernel");
    let mut list = String::new();
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(
            &format!("lib/{name}"),
            0o644,
            &fs::read(kernel.join(module)).doing(format!("the kernel package holds no {module}"))?,
        );
        list.push_str(name);
        list.push('\n');
    }
    archive.file("modules", 0o644, list.as_bytes());
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_names_its_release() {
        let place = std::env::temp_dir().join(format!("xtask-release-{}", std::process::id()));
        let mut image = vec![0; 0x1000];
        image[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
        image[0x500..0x51d].copy_from_slice(b"6.1.0-1-cloud-amd64 (who) #1 ");
        fs::write(&place, &image).expect("written");
        let named = release(&place);
        fs::write(&place, b"short").expect("written");
        let short = release(&place);
        fs::remove_file(&place).expect("removed");
        assert_eq!(named.expect("named"), "6.1.0-1-cloud-amd64");
        assert!(short.is_err());
    }

    #[test]
    fn paths_survive_the_shell() {
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
