//! `cargo xtask demo`: a stock Linux kernel on this terminal.
//!
//! The hypervisor takes this process's place, so that keys, signals, a closed terminal and the exit status are between it
//! and the caller, and nobody is left in the middle.

use crate::host::{self, Doing, Failure, Result};
use crate::{boot, initramfs, task_guests};
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

/// Options of the demo.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run these shell commands in the guest and power off, instead of giving a shell
    #[arg(long, value_name = "COMMANDS")]
    script: Option<String>,
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
