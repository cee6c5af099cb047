//! `cargo xtask bench debian`: a distribution from a disk, beside QEMU's emulator.
//!
//! Both boot copies of the same disk with the same kernel, initramfs and memory, in alternating runs: a virtio disk on a
//! raw file through the host's page cache, and user networking without privileges. Measured are the time from the
//! start of the process to the login prompt, fio on the disk, and iperf3 with a server on the host's loopback, both
//! ways. fio and iperf3 run inside the guest, started over SSH through a forwarded port. The table shows medians.

use crate::apt::Apt;
use crate::boot::{self, Guest};
use crate::debian::{self, Debian};
use crate::host::{self, Doing, Failure, Result};
use crate::task_guests::Work;
use serde_json::{Value, json};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Options of the benchmark.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many runs of each
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Seconds of each fio and iperf3 measurement
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Paravane's engine: auto, kvm or bt
    #[arg(long, default_value = "bt")]
    engine: String,
    /// How the guest reaches disk and card under Paravane: pci, mmio or pv
    #[arg(long, default_value = "pci")]
    transport: String,
    /// Measure this paravane program instead of building one
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
    /// Write everything measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A boot that takes longer counts as failed.
const LIMIT: Duration = Duration::from_secs(240);
/// The last words of a boot.
const PROMPT: &str = "paravane login:";

/// The file that fio works on, in MiB.
const FILE_MIB: u32 = 128;

/// fio's jobs: name, access pattern, block size, queue depth, and whether requests per second are the figure, else MiB/s.
const JOBS: [(&str, &str, &str, u32, bool); 4] = [
    ("disk: random 4 KiB reads", "randread", "4k", 32, true),
    ("disk: random 4 KiB writes", "randwrite", "4k", 32, true),
    ("disk: sequential reads", "read", "1M", 8, false),
    ("disk: sequential writes", "write", "1M", 8, false),
];

const LOGIN: &str = "time to login";
const UPLOAD: &str = "network: guest to host";
const DOWNLOAD: &str = "network: host to guest";

/// What one run measured, by row.
type Run = Vec<(&'static str, &'static str, f64)>;

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    host::need_tool("ssh", "openssh-client", "log in to the guests")?;
    let program = args.paravane.clone().map_or_else(host::build_paravane, Ok)?;
    let debian = debian::fetch()?;
    let server = IperfServer::start()?;
    let work = Work::new(&host::guests_dir())?;
    fs::create_dir_all(work.path("disks")).doing("cannot create a folder under target/guests")?;
    let disk = work.path("disks").join("disk.raw");
    let with_qemu = host::has_tool("qemu-system-x86_64");
    if !with_qemu {
        println!("no comparison: qemu-system-x86_64 is not installed; get it with `apt-get install qemu-system-x86`");
    }
    let (mut ours, mut theirs, mut failed) = (Vec::new(), Vec::new(), 0);
    for _ in 0..args.runs {
        for (name, runs) in [("paravane", &mut ours), ("qemu-tcg", &mut theirs)] {
            if name == "qemu-tcg" && !with_qemu {
                continue;
            }
            debian.copy_disk(&disk)?;
            let port = free_port()?;
            let mut command = if name == "paravane" {
                paravane(&program, args, &debian, &disk, port)
            } else {
                qemu(&debian, &disk, port)
            };
            match measure(&mut command, args, &debian, port, server.port) {
                Ok(run) => {
                    let figures: Vec<_> = run.iter().map(|(_, unit, value)| format!("{value:.1} {unit}")).collect();
                    println!("{name:10} {}", figures.join(", "));
                    runs.push(run);
                }
                Err(failure) => {
                    println!("{name:10} FAILED: {failure}");
                    failed += 1;
                }
            }
        }
    }
    report(&ours, &theirs);
    if let Some(file) = &args.json {
        let runs = |all: &[Run]| -> Value { all.iter().map(|run| json!(run)).collect() };
        let text = json!({ "paravane": runs(&ours), "qemu-tcg": runs(&theirs), "failed": failed });
        fs::write(file, format!("{text:#}\n")).doing(format!("cannot write {}", file.display()))?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn paravane(program: &Path, args: &Args, debian: &Debian, disk: &Path, port: u16) -> Command {
    let mut command = boot::paravane(program, &args.engine, &debian.kernel, &debian.initramfs(), debian::CMDLINE);
    let mut option = boot::disk_option(disk);
    option.push(format!(",transport={}", args.transport));
    command.arg("--disk").arg(option);
    command.arg("--net").arg(format!("user,hostfwd=tcp:127.0.0.1:{port}-:22,transport={}", args.transport));
    command
}

fn qemu(debian: &Debian, disk: &Path, port: u16) -> Command {
    let mut command = boot::qemu(&debian.kernel, &debian.initramfs(), debian::CMDLINE);
    command.arg("-drive").arg(format!("file={},format=raw,if=none,id=disk", disk.display()));
    command.args(["-device", "virtio-blk-pci,drive=disk", "-device", "virtio-net-pci,netdev=net"]);
    command.arg("-netdev").arg(format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"));
    command
}

/// Boots once and measures everything.
fn measure(command: &mut Command, args: &Args, debian: &Debian, port: u16, iperf: u16) -> Result<Run> {
    let start = Instant::now();
    // The pipe stays open and empty until the guest is dropped, which kills it.
    let mut guest = Guest::start(command, Stdio::piped())?;
    guest.wait_for(PROMPT, LIMIT)?;
    let mut run = vec![(LOGIN, "s", start.elapsed().as_secs_f64())];
    let shell = |script: &str| -> Result<String> {
        let words = debian.ssh(port);
        host::output(Command::new("timeout").arg("120").args(words).arg(script))
    };
    // The prompt may come before the SSH server, and QEMU takes connections that nobody in the guest answers yet.
    while let Err(failure) = shell("systemctl is-system-running --wait") {
        if start.elapsed() > LIMIT {
            return Err(failure);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    shell(&format!("dd if=/dev/urandom of=/root/fio.data bs=1M count={FILE_MIB} && sync"))?;
    for (name, pattern, block, depth, requests) in JOBS {
        let report = shell(&format!(
            "fio --name=job --filename=/root/fio.data --size={FILE_MIB}M --direct=1 --ioengine=libaio --rw={pattern} \
             --bs={block} --iodepth={depth} --runtime={} --time_based --output-format=json",
            args.seconds
        ))?;
        let side = if pattern.ends_with("read") { "read" } else { "write" };
        let field = if requests { "iops" } else { "bw_bytes" };
        let value = figure(&report, &format!("/jobs/0/{side}/{field}"))?;
        run.push(if requests { (name, "requests/s", value) } else { (name, "MiB/s", value / f64::from(1 << 20)) });
    }
    for (name, direction) in [(UPLOAD, ""), (DOWNLOAD, "-R")] {
        let report = shell(&format!("iperf3 -J -c 10.0.2.2 -p {iperf} -t {} {direction}", args.seconds))?;
        run.push((name, "Mbit/s", figure(&report, "/end/sum_received/bits_per_second")? / 1e6));
    }
    Ok(run)
}

/// A number in a JSON report, after whatever warnings stand before it.
fn figure(report: &str, place: &str) -> Result<f64> {
    let text = report.find('{').map_or("", |start| &report[start..]);
    let value: Option<Value> = serde_json::from_str(text).ok();
    value
        .as_ref()
        .and_then(|value| value.pointer(place)?.as_f64())
        .ok_or_else(|| Failure::new(format!("a report in the guest has no {place}: {}", report.trim())))
}

/// Prints the medians and their ratios.
fn report(ours: &[Run], theirs: &[Run]) {
    let Some(first) = ours.first() else { return };
    println!("\n{:28} {:>12} {:>12} {:>8}", "median", "paravane", "qemu-tcg", "ratio");
    for (row, (name, unit, _)) in first.iter().enumerate() {
        let median = |runs: &[Run]| -> Option<f64> {
            let mut values: Vec<f64> = runs.iter().filter_map(|run| Some(run.get(row)?.2)).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        let (a, b) = (median(ours), median(theirs));
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        let ratio = a.zip(b).map_or("-".to_owned(), |(a, b)| format!("{:.2}", a / b));
        println!("{name:28} {:>12} {:>12} {ratio:>8}  {unit}", shown(a), shown(b));
    }
}

/// A port of the loopback that is free now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").doing("cannot open a port on the loopback")?;
    Ok(listener.local_addr().doing("cannot read a port's number")?.port())
}

/// iperf3 on the host's loopback, from Debian's packages; killed when dropped.
struct IperfServer {
    child: Child,
    port: u16,
}

impl IperfServer {
    fn start() -> Result<Self> {
        let folder = fetch_iperf()?;
        let port = free_port()?;
        let mut command = Command::new(folder.join("usr/bin/iperf3"));
        command.env("LD_LIBRARY_PATH", folder.join("usr/lib/x86_64-linux-gnu"));
        command.args(["--server", "--bind", "127.0.0.1", "--port", &port.to_string()]);
        let child = command.stdout(Stdio::null()).spawn().doing("cannot start iperf3")?;
        Ok(Self { child, port })
    }
}

impl Drop for IperfServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fetches iperf3 and its libraries, unless they are there, and returns where they are.
fn fetch_iperf() -> Result<PathBuf> {
    let place = host::guests_dir().join("iperf3");
    if place.join("VERSION").is_file() {
        return Ok(place);
    }
    host::need_tool("dpkg-deb", "dpkg", "unpack Debian packages")?;
    let work = Work::new(&host::guests_dir())?;
    let apt = Apt::new(work.path("apt"), &["bookworm"])?;
    let ready = work.path("iperf3");
    fs::create_dir_all(&ready).doing("cannot create a folder under target/guests")?;
    let mut versions = String::new();
    for name in ["iperf3", "libiperf0", "libsctp1"] {
        let package = apt.newest(&format!("{name}:amd64"), "").or_else(|_| apt.newest(name, ""))?;
        let file = apt.download(&package, &work.path("packages"))?;
        host::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(&ready))?;
        versions.push_str(&format!("{} {}\n", package.name, package.version));
    }
    fs::write(ready.join("VERSION"), versions).doing("cannot write VERSION")?;
    work.finish(&ready, "iperf3")?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_behind_warnings() {
        let report = "fio: a note\n{\"jobs\": [{\"read\": {\"iops\": 12.5}}]}";
        assert!(figure(report, "/jobs/0/read/iops").is_ok_and(|value| value > 12.4 && value < 12.6));
        assert!(figure(report, "/jobs/0/write/iops").is_err());
        assert!(figure("nothing", "/jobs").is_err());
    }
}
