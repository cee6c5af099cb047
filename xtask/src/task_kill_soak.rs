//! `cargo xtask kill-soak --kills N`: kills the hypervisor while its guest writes files, and looks whether what was flushed is there.
//!
//! A stock kernel writes one file after the other to an ext4 file system, calls fsync, and only then says so on the console. At a
//! random moment the hypervisor gets SIGKILL. Then, on a copy of the image: the journal is replayed, e2fsck must find
//! nothing to complain about, and every file that was said to be there must be, byte for byte. The next guest mounts the killed
//! image itself, and goes on. Every other kill is of a qcow2 image, which is read through the library that the hypervisor uses, and
//! by `qemu-img check` where that is installed.

use crate::host::{self, Doing, Failure, Result};
use crate::task_guests;
use crate::{boot, initramfs};
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage};
use paravane_tests::archive::archive;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often to kill
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Chooses the moments
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The format of the image: raw, qcow2 or both in turn
    #[arg(long, default_value = "both", value_parser = ["raw", "qcow2", "both"])]
    format: String,
    /// Use this paravane program instead of building one
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
}

/// Bytes of the disk.
const DISK: u64 = 64 << 20;
/// A guest says within this time that its disk is mounted.
const LIMIT: Duration = Duration::from_secs(120);
/// Most files of one guest; a kill comes before.
const FILES: u32 = 400;

/// What the guest does. A file's number and contents say where it belongs; "kept" comes after its fsync.
const SCRIPT: &str = r#"
insmod /virtio_blk.ko
mkdir -p /mnt
mount -t ext4 /dev/vda /mnt || { echo "K cannot mount"; exit 1; }
rm -rf /mnt/run*
run=$(cat /run-number)
mkdir /mnt/run$run && sync
echo "K ready"
n=0
while [ $n -lt FILES ]; do
    n=$((n + 1))
    yes "run $run file $n" | head -c $((4096 * (n % 16 + 1) - n)) > /tmp/next
    dd if=/tmp/next of=/mnt/run$run/$n bs=16k conv=fsync 2>/dev/null && echo "K kept $n"
done
sleep 1000
"#;

/// What file `n` of a run holds, as the script makes it.
fn contents(run: u32, n: u32) -> Vec<u8> {
    let line = format!("run {run} file {n}\n");
    let len = (4096 * (n % 16 + 1) - n) as usize;
    line.bytes().cycle().take(len).collect()
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % n
    }
}

/// A folder of this run's own, removed with everything in it.
struct Work(PathBuf);

impl Drop for Work {
    fn drop(&mut self) {
        // What stays is in nobody's way.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Work {
    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// Kills, looks, counts.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    for tool in ["mke2fs", "e2fsck", "debugfs"] {
        host::need_tool(tool, "e2fsprogs", "make and check the guest's file system")?;
    }
    let program = host::paravane(args.paravane.as_deref())?;
    let guests = task_guests::fetch()?;
    let work = Work(std::env::temp_dir().join(format!("paravane-kill-soak-{}", std::process::id())));
    fs::create_dir_all(&work.0).doing("cannot make a temporary folder")?;
    let (raw, qcow2) = (work.file("disk.raw"), work.file("disk.qcow2"));
    fs::File::create(&raw).and_then(|f| f.set_len(DISK)).doing("cannot make a disk")?;
    host::run(tool("mke2fs").args(["-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&raw))?;
    to_qcow2(&raw, &qcow2).doing("cannot make a qcow2 image")?;
    if !host::has_tool("qemu-img") {
        println!("qemu-img is not installed: qcow2 images are checked by reading them and by e2fsck alone");
    }
    let kernel = guests.kernel("6.12")?;
    host::need_tool("xz", "xz-utils", "unpack a kernel module")?;
    let module = guests.modules("6.12")?.join("kernel/drivers/block/virtio_blk.ko.xz");
    let module = tool("xz").arg("-dc").arg(&module).output().doing("cannot start xz")?.stdout;
    let shell = fs::read(guests.shell_image()).doing("cannot read the guests' image")?;
    let mut random = Random(args.seed);
    let (mut kept, mut failures) = (0, 0);
    for run in 1..=args.kills {
        let is_raw = args.format == "raw" || args.format == "both" && run % 2 == 1;
        let number = run.to_string();
        let own = [("virtio_blk.ko", 0o100_644, &module[..]), ("run-number", 0o100_644, number.as_bytes())];
        let script = SCRIPT.replace("FILES", &FILES.to_string());
        let image = [initramfs::with_script(&shell, &script), archive(&own)].concat();
        let image = host::Scratch::new("kill-soak.cpio", &image)?;
        let option = if is_raw {
            boot::disk_option(&raw)
        } else {
            let mut option = boot::disk_option(&qcow2);
            option.push(",format=qcow2");
            option
        };
        let mut command = boot::paravane_with("128M", &program, "bt", &kernel, image.path(), boot::CMDLINE);
        command.arg("--disk").arg(option);
        let console = killed(&mut command, &mut random)?;
        let said: Vec<u32> = console.lines().filter_map(|l| l.strip_prefix("K kept ")?.trim().parse().ok()).collect();
        let format = if is_raw { "raw" } else { "qcow2" };
        let copy = work.file("copy.raw");
        let looked = if is_raw {
            fs::copy(&raw, &copy).map(drop).doing("cannot copy the disk")
        } else {
            check_qcow2(&qcow2).and_then(|()| to_raw(&qcow2, &copy).doing("the qcow2 image cannot be read"))
        };
        match looked.and_then(|()| look(&work, &copy, run, &said)) {
            Ok(()) => println!("{run}: {format}, {} files kept", said.len()),
            Err(e) => {
                failures += 1;
                let place = host::guests_dir().join(format!("kill-soak-{run}.{format}"));
                let _ = fs::copy(if is_raw { &raw } else { &qcow2 }, &place);
                println!(
                    "{run}: {format}, {} files said to be kept: {e}; see {}",
                    said.len(),
                    task_guests::shown(&place)
                );
            }
        }
        kept += said.len();
        let _ = std::io::stdout().flush();
    }
    println!("{} kills, {kept} flushed files looked for, {failures} failures", args.kills);
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a guest until a random moment of its writing; gives its console.
fn killed(command: &mut Command, random: &mut Random) -> Result<String> {
    let mut guest = boot::Guest::start(command, Stdio::null())?;
    let outcome = guest.wait_for("K ready", LIMIT);
    if outcome.is_err() {
        return outcome.map(|()| String::new()).map_err(|e| {
            let console = guest.console();
            let last: Vec<&str> = console.lines().rev().take(5).collect();
            Failure::new(format!("{e}: {}", last.join(" | ")))
        });
    }
    guest.wait_for(&format!("K kept {}", 1 + random.below(30)), LIMIT)?;
    std::thread::sleep(Duration::from_micros(random.below(60_000)));
    guest.kill();
    Ok(guest.console())
}

fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", host::search_path()).env("DEBUGFS_PAGER", "cat").stdin(Stdio::null());
    command
}

/// Replays the journal of a copy, checks it, and looks for the files.
fn look(work: &Work, copy: &Path, run: u32, said: &[u32]) -> Result<()> {
    // Replaying counts as a correction: status 1. What is left to be found afterwards is damage.
    let replayed = tool("e2fsck").args(["-y", "-E", "journal_only"]).arg(copy).output().doing("cannot start e2fsck")?;
    if !matches!(replayed.status.code(), Some(0 | 1)) {
        return Err(Failure::new(format!(
            "the journal cannot be replayed: {}",
            String::from_utf8_lossy(&replayed.stdout)
        )));
    }
    let checked = tool("e2fsck").args(["-f", "-n"]).arg(copy).output().doing("cannot start e2fsck")?;
    if checked.status.code() != Some(0) {
        return Err(Failure::new(format!("e2fsck: {}", String::from_utf8_lossy(&checked.stdout))));
    }
    let place = work.file("files");
    let _ = fs::remove_dir_all(&place);
    fs::create_dir(&place).doing("cannot make a folder")?;
    host::output(tool("debugfs").args(["-R", &format!("rdump /run{run} {}", place.display())]).arg(copy))?;
    for &n in said {
        let found = fs::read(place.join(format!("run{run}/{n}")))
            .map_err(|e| Failure::new(format!("file {n} is lost: {e}")))?;
        if found != contents(run, n) {
            return Err(Failure::new(format!("file {n} is damaged")));
        }
    }
    if said.is_empty() { Err(Failure::new("the guest kept nothing")) } else { Ok(()) }
}

fn check_qcow2(image: &Path) -> Result<()> {
    if !host::has_tool("qemu-img") {
        return Ok(());
    }
    // Status 3 is for clusters that nothing refers to, which a kill may leave.
    let out = tool("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output().doing("cannot start qemu-img")?;
    match out.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(Failure::new(format!("qemu-img check: {}", String::from_utf8_lossy(&out.stdout)))),
    }
}

const PIECE: usize = 1 << 20;

fn to_qcow2(raw: &Path, image: &Path) -> std::io::Result<()> {
    let options = imago::StorageCreateOptions::new().filename(image).overwrite(true);
    let file = imago::file::File::create_open(options)?;
    Qcow2CreateBuilder::<imago::file::File>::new(file).size(DISK).create()?;
    let access = open_qcow2(image)?;
    let (mut from, mut piece, mut at) = (fs::File::open(raw)?, vec![0; PIECE], 0);
    while at < DISK {
        from.read_exact(&mut piece)?;
        if piece.iter().any(|&b| b != 0) {
            access.write(&piece[..], at)?;
        }
        at += PIECE as u64;
    }
    access.flush()?;
    access.sync()
}

fn to_raw(image: &Path, raw: &Path) -> std::io::Result<()> {
    let access = open_qcow2(image)?;
    let (mut to, mut piece, mut at) = (fs::File::create(raw)?, vec![0; PIECE], 0);
    while at < DISK {
        access.read(&mut piece[..], at)?;
        to.write_all(&piece)?;
        at += PIECE as u64;
    }
    Ok(())
}

fn open_qcow2(image: &Path) -> std::io::Result<FormatAccess<imago::file::File>> {
    let file = imago::file::File::open(imago::StorageOpenOptions::new().filename(image).write(true))?;
    let image = Qcow2::<imago::file::File>::builder(file).write(true);
    Ok(FormatAccess::new(image.open(imago::DenyImplicitOpenGate::default())?))
}
