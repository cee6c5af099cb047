//! Guests of the macro suite: how each side starts them, and what their consoles say.

use super::console::{Console, Group, Measurement};
use super::server::Server;
use crate::child::Program;
use crate::model::{Plan, Side};
use crate::surroundings::QEMU;
use crate::{Failure, Result};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Kernel parameters of every guest: console on the first serial port, and a panic that ends the run.
const CMDLINE: &str = "console=ttyS0 panic=-1";

/// Bytes of the disk.
const DISK: u64 = 128 << 20;

/// After so long a guest that only boots has failed, and one that works.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const WORK_LIMIT: Duration = Duration::from_secs(600);

/// How far a guest's clock may be from the host's over a run, and how much the way of the markers may take.
const CLOCK_TOLERANCE: f64 = 0.02;
const CLOCK_SLACK: f64 = 0.25;

/// What guests and programs are made of.
pub(super) struct Images {
    kernel: PathBuf,
    small: PathBuf,
    large: PathBuf,
    /// The benchmark's programs, for the host.
    pub(super) programs: PathBuf,
    /// Debian's programs, for the host.
    pub(super) root: PathBuf,
}

impl Images {
    /// Finds them below the folder of the guests.
    pub(super) fn find(guests: &Path) -> Result<Self> {
        let there = |name: &str| {
            let path = guests.join(name);
            if path.exists() {
                return Ok(path);
            }
            Err(Failure::usage(format!("there is no {}; make it with \"cargo xtask guests bench\"", path.display())))
        };
        Ok(Self {
            kernel: there("6.1/vmlinuz")?,
            small: there("bench/initramfs.cpio")?,
            large: there("initramfs-compute.cpio")?,
            programs: there("bench/programs")?,
            root: there("compute-root")?,
        })
    }
}

/// A disk in memory where the host has room. It is in memory because the virtual disk is measured here, not that of the host.
///
/// The file has no name any more when it is used: children open it through /proc while this process has it open, and it
/// goes with this process, however that ends.
pub(super) struct Disk {
    file: File,
}

impl Disk {
    /// Makes one, of zeros.
    pub(super) fn create() -> Result<Self> {
        let name = format!(".paravane-bench-{}.raw", std::process::id());
        let folders = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
        let mut last = None;
        for folder in folders {
            match Self::create_in(&folder.join(&name)) {
                Ok(file) => return Ok(Self { file }),
                Err(e) => last = Some(e),
            }
        }
        let why = last.map(|e| e.to_string()).unwrap_or_default();
        Err(Failure::host(format!(
            "cannot write a disk of {} MiB to /dev/shm or the temporary folder: {why}",
            DISK >> 20
        )))
    }

    fn create_in(path: &Path) -> std::io::Result<File> {
        let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
        fs::remove_file(path)?;
        // Written in full, so that no side pays for the file's growth.
        let zeros = vec![0; 1 << 20];
        for _ in 0..DISK >> 20 {
            file.write_all(&zeros)?;
        }
        Ok(file)
    }

    /// A path for children of this process.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }
}

/// What a guest is to do.
pub(super) struct Work<'a> {
    /// Groups of the benchmark's programs.
    pub(super) groups: &'a [Group],
    /// Their rows, as parts of names separated by commas.
    pub(super) names: &'a str,
    /// An eighth of the work.
    pub(super) quick: bool,
    /// With disk and network.
    pub(super) traffic: Option<(&'a Server, &'a Disk)>,
}

/// A boot's times since the hypervisor's start.
pub(super) struct Boot {
    /// Until the first process runs its script.
    pub(super) init: Duration,
    /// Until the hypervisor has ended.
    pub(super) off: Duration,
}

/// Boots a guest that does nothing, twice, and returns the lesser times; other processes of the host only make it longer.
pub(super) fn boot(images: &Images, plan: &Plan, side: Side) -> Result<Boot> {
    let mut best: Option<Boot> = None;
    for _ in 0..2 {
        let line = format!("{CMDLINE} bench.groups=");
        let mut guest = Program::start(&mut command(plan, side, &images.kernel, &images.small, "512M", &line, None)?)?;
        let init = guest.wait_for("bench-begin", BOOT_LIMIT)?;
        let finished = guest.finish(BOOT_LIMIT)?;
        if !finished.success() {
            return Err(Failure::host(format!("the guest did not power off: {}", finished.tail())));
        }
        let other = best.unwrap_or(Boot { init, off: finished.time });
        best = Some(Boot { init: init.min(other.init), off: finished.time.min(other.off) });
    }
    best.ok_or_else(|| Failure::host("no boot was tried"))
}

/// Has a guest do its work and returns the rows that it printed.
pub(super) fn work(images: &Images, plan: &Plan, side: Side, work: &Work) -> Result<Vec<(Group, Measurement)>> {
    let groups: Vec<_> = work.groups.iter().map(|group| group.name()).collect();
    let mut line = format!(
        "{CMDLINE} transparent_hugepage={} bench.groups={} bench.only={}",
        huge_pages(),
        groups.join(","),
        work.names
    );
    if work.quick {
        line.push_str(" bench.quick=1");
    }
    if let Some((server, _)) = work.traffic {
        line.push_str(&format!(" bench.server={}", server.in_guest()));
    }
    // Debian's programs are in the large image, which is packed and unpacked in memory at the same time.
    let needs_programs = work.groups.contains(&Group::Programs);
    let (image, memory) = if needs_programs { (&images.large, "2G") } else { (&images.small, "1G") };
    let disk = work.traffic.map(|(_, disk)| disk.path());
    let disk = disk.as_deref();
    let mut guest = Program::start(&mut command(plan, side, &images.kernel, image, memory, &line, disk)?)?;
    let times = guest.wait_for("bench-begin", WORK_LIMIT).and_then(|begin| {
        let end = guest.wait_for("bench-end", WORK_LIMIT)?;
        Ok(end - begin)
    });
    // Without the last marker there is no use in waiting.
    let finished = guest.finish(if times.is_ok() { WORK_LIMIT } else { Duration::ZERO })?;
    let by_host = times.map_err(|failure| Failure::host(format!("{failure}: {}", finished.tail())))?.as_secs_f64();
    let console = Console::parse(&finished.output);
    if let Some(first) = console.failures.first() {
        return Err(Failure::host(first));
    }
    let by_guest = console.elapsed.ok_or_else(|| Failure::host("the guest's markers hold no times"))? as f64 / 1e9;
    if (by_guest - by_host).abs() > CLOCK_SLACK + CLOCK_TOLERANCE * by_host {
        return Err(Failure::host(format!("its clock saw {by_guest:.2} s where the host's saw {by_host:.2} s")));
    }
    Ok(console.rows)
}

/// The command that starts a guest on a side.
fn command(
    plan: &Plan,
    side: Side,
    kernel: &Path,
    initrd: &Path,
    memory: &str,
    cmdline: &str,
    disk: Option<&Path>,
) -> Result<Command> {
    let (engine, pv) = match side {
        Side::BtStock => ("bt", "off"),
        Side::BtPv => ("bt", "auto"),
        Side::KvmStock => ("kvm", "off"),
        Side::KvmPv => ("kvm", "auto"),
        Side::TcgStock => return Ok(qemu(kernel, initrd, memory, cmdline, disk)),
        Side::Host => return Err(Failure::host("the host is no guest")),
    };
    let mut command = Command::new(&plan.paravane);
    command.args([
        "run",
        "--engine",
        engine,
        "--pv",
        pv,
        "--memory",
        memory,
        "--serial",
        "stdio",
        "--cmdline",
        cmdline,
    ]);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    if let Some(disk) = disk {
        command.arg("--disk").arg(format!("path={}", disk.display())).args(["--net", "user"]);
    }
    Ok(command)
}

fn qemu(kernel: &Path, initrd: &Path, memory: &str, cmdline: &str, disk: Option<&Path>) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-accel", "tcg", "-cpu", "max", "-m", memory, "-smp", "1", "-nodefaults", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio", "-append", cmdline]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    if let Some(disk) = disk {
        command.arg("-drive").arg(format!("file={},format=raw,if=none,id=disk", disk.display()));
        command.args(["-device", "virtio-blk-pci,drive=disk", "-netdev", "user,id=net"]);
        command.args(["-device", "virtio-net-pci,netdev=net"]);
    }
    command
}

/// The host's setting for transparent huge pages, which the guest gets, too: the word in brackets.
fn huge_pages() -> String {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("never", |(word, _)| word).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_has_no_name_and_children_can_write_to_it() {
        let disk = Disk::create().expect("a disk");
        let path = disk.path();
        assert_eq!(fs::metadata(&path).expect("the file").len(), DISK);
        let script = format!("printf hello | dd of={} conv=notrunc status=none", path.display());
        let status = Command::new("sh").args(["-c", &script]).status().expect("a shell");
        assert!(status.success());
        let text = fs::read(&path).expect("the disk");
        assert_eq!((&text[..5], text.len() as u64), (&b"hello"[..], DISK));
        drop(disk);
        assert!(!path.exists());
    }
}
