//! `cargo xtask demo`: a stock Linux kernel on this terminal.
//!
//! The hypervisor takes this process's place, so that keys, signals, a closed terminal and the exit status are between it
//! and the caller, and nobody is left in the middle.

use crate::host::{self, Doing, Failure, Result};
use crate::{boot, debian, initramfs, task_guests};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

/// Options of the demo.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run these shell commands in the guest and power off, instead of giving a shell
    #[arg(long, value_name = "COMMANDS")]
    script: Option<String>,
    /// Boot a Debian system from a disk, with a network, instead of a shell
    #[arg(long, conflicts_with_all = ["script", "kernel"])]
    debian: bool,
    /// With --debian: the port of this machine's loopback that leads to the guest's SSH server
    #[arg(long, value_name = "PORT", default_value_t = 2222, requires = "debian")]
    ssh_port: u16,
    /// The engine: auto (what fits this host), kvm, or bt (binary translation)
    #[arg(long, default_value = "auto")]
    engine: String,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
}

/// Builds, fetches, and becomes the hypervisor; returns only if that fails.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::build_paravane()?;
    if args.debian {
        return run_debian(args, &program);
    }
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    let shell = guests.shell_image();
    let mut command = if let Some(script) = &args.script {
        let image = fs::read(&shell).doing("cannot read the shell initramfs")?;
        let initrd = shell.with_file_name("demo.cpio");
        // Written beside and renamed, so that a demo that starts at the same time reads one whole script.
        let unfinished = shell.with_file_name(format!(".demo-{}.cpio", std::process::id()));
        fs::write(&unfinished, initramfs::with_script(&image, script)).doing("cannot write the script's initramfs")?;
        fs::rename(&unfinished, &initrd).doing("cannot move the script's initramfs into place")?;
        // A script's boot log is part of its record.
        boot::paravane(&program, &args.engine, &kernel, &initrd, boot::CMDLINE)
    } else {
        eprintln!("Linux {} is starting. Ctrl-A x stops it, whatever the guest does.", args.kernel);
        boot::paravane(&program, &args.engine, &kernel, &shell, &format!("{} quiet", boot::CMDLINE))
    };
    Err(Failure::new(format!("cannot start the hypervisor that was just built: {}", command.exec())))
}

/// A Debian system to its login prompt. Its disk is a copy that keeps what is done to it until a new one is built.
fn run_debian(args: &Args, program: &Path) -> Result<ExitCode> {
    let debian = debian::fetch()?;
    let disk = host::guests_dir().join("debian-demo.raw");
    let age = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
    let stale = age(&disk).and_then(|copy| Ok(copy < age(&debian.disk())?)).unwrap_or(true);
    if stale {
        let unfinished = host::guests_dir().join(format!(".debian-demo-{}.raw", std::process::id()));
        debian.copy_disk(&unfinished)?;
        fs::rename(&unfinished, &disk).doing("cannot move the demo's disk into place")?;
    }
    let ssh: Vec<_> = debian.ssh(args.ssh_port).iter().map(|word| word.to_string_lossy().into_owned()).collect();
    eprintln!(
        "Debian 12 is starting; log in as root with an empty password. `poweroff` ends it, Ctrl-A x in any case."
    );
    eprintln!("From another terminal, once it is up: {}", ssh.join(" "));
    let cmdline = format!("{} quiet", debian::CMDLINE);
    let mut command = boot::paravane(program, &args.engine, &debian.kernel, &debian.initramfs(), &cmdline);
    command.arg("--disk").arg(boot::disk_option(&disk));
    command.arg("--net").arg(format!("user,hostfwd=tcp:127.0.0.1:{}-:22", args.ssh_port));
    Err(Failure::new(format!("cannot start the hypervisor that was just built: {}", command.exec())))
}
