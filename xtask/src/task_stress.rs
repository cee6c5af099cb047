//! `cargo xtask stress`: a stock kernel under load on several vCPUs, with everything verified that can be.
//!
//! By default Debian's stress-ng runs its classes cpu, vm, fork, futex, mmap and signal with `--verify`, one after the other and then
//! together. `--cross-modify` instead lets the kernel patch its code in a loop while all CPUs run it: static keys, the function
//! tracer, probes. Either way the kernel's log must have no trouble to report ([`crate::console_scan`]).

use crate::compute_root::{self, Set};
use crate::console_scan::{all_online, trouble};
use crate::cpio::Archive;
use crate::host::{self, Doing, Failure, Result};
use crate::{boot, initramfs, task_guests};
use std::fs;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many vCPUs
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// How long the guest is kept busy
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// The engine: auto, kvm or bt
    #[arg(long, default_value = "bt")]
    engine: String,
    /// Toggle static keys, tracers and probes instead of running stress-ng
    #[arg(long)]
    cross_modify: bool,
    /// Run the guest under this paravane program instead of building one
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
}

/// Guest RAM.
const MEMORY: &str = "1G";

/// Beyond its working time: boot, unpacking, and a machine that is busy with other things.
const GRACE: Duration = Duration::from_secs(900);

const STRESS: &str = include_str!("../guest/stress.sh");
const CROSS_MODIFY: &str = include_str!("../guest/cross_modify.sh");

/// stress-ng and what it is linked with.
const STRESS_NG: Set = Set {
    folder: "stress-root",
    packages: &[
        "stress-ng",
        "libapparmor1",
        "libbsd0",
        "libc6",
        "libcrypt1",
        "libdrm2",
        "libegl1",
        "libexpat1",
        "libffi8",
        "libgbm1",
        "libgcc-s1",
        "libgles2",
        "libglvnd0",
        "libipsec-mb1",
        "libjpeg62-turbo",
        "libjudydebian1",
        "libkmod2",
        "liblzma5",
        "libmd0",
        "libsctp1",
        "libssl3",
        "libwayland-server0",
        "libxxhash0",
        "libzstd1",
        "zlib1g",
    ],
    needed: &["lib/x86_64-linux-gnu/", "usr/bin/stress-ng", "usr/lib/x86_64-linux-gnu/lib"],
};

/// Runs the guest and judges its console.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::paravane(args.paravane.as_deref())?;
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    let shell = fs::read(guests.shell_image()).doing("cannot read the guests' image")?;
    let image = if args.cross_modify {
        initramfs::with_script(&shell, CROSS_MODIFY)
    } else {
        STRESS_NG.fetch()?;
        let mut archive = Archive::default();
        // Where programs look for their loader.
        archive.link("lib64", "lib/x86_64-linux-gnu");
        compute_root::pack(&mut archive, &STRESS_NG.root(), "")?;
        [shell.as_slice(), &archive.finish(), &initramfs::with_script(&[], STRESS)].concat()
    };
    let image = host::Scratch::new("stress.cpio", &image)?;
    let cmdline = format!("{} stress.seconds={}", boot::CMDLINE, args.seconds);
    let mut command = boot::paravane_with(MEMORY, &program, &args.engine, &kernel, image.path(), &cmdline);
    command.args(["--stats", "--cpus", &args.cpus.to_string()]);
    let limit = Duration::from_secs(3 * args.seconds) + GRACE;
    let outcome = boot::Guest::start(&mut command, Stdio::null())?.finish(limit)?;

    let console = &outcome.console;
    let mut problems = Vec::new();
    match outcome.status {
        None => problems.push(format!("killed after {} s", limit.as_secs())),
        Some(status) if !status.success() => problems.push(status.to_string()),
        Some(_) => {}
    }
    let says = |text: &str| console.lines().any(|line| line.trim() == text);
    if !says(&format!("cpus-online {}", all_online(args.cpus))) {
        problems.push("not all CPUs are online".to_owned());
    }
    if !says("stress-done 0") {
        problems.push("the guest's work failed or did not end".to_owned());
    }
    problems.extend(console.lines().filter(|line| line.contains("stress-broken")).map(|line| line.trim().to_owned()));
    problems.extend(trouble(console).into_iter().map(|line| format!("the log says \"{line}\"")));
    for line in console.lines().filter(|line| line.contains("stress-") || line.contains("other vCPUs")) {
        println!("{}", line.trim_end());
    }
    if problems.is_empty() {
        println!("{} vCPUs of Linux {} worked for {:.0} s", args.cpus, args.kernel, outcome.time.as_secs_f64());
        return Ok(ExitCode::SUCCESS);
    }
    let name = format!("failed-stress-{}-{}.log", args.kernel, args.cpus);
    fs::write(host::guests_dir().join(&name), console).doing("cannot keep the guest's console")?;
    for problem in &problems {
        println!("FAILED: {problem}");
    }
    Err(Failure::new(format!("{} problems; the console is in target/guests/{name}", problems.len())))
}
