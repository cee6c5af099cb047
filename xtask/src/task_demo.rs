//! `cargo xtask demo`: a stock Linux kernel on this terminal.

use crate::host::{self, Doing, Result};
use crate::{boot, initramfs, task_guests};
use std::fs;
use std::path::PathBuf;
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

/// Removes the initrd that was made for a typed script.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Builds, fetches, boots; the hypervisor's exit status becomes the task's.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let program = host::build_paravane()?;
    let guests = task_guests::fetch()?;
    let kernel = guests.kernel(&args.kernel)?;
    let shell = guests.shell_image();
    let mut initrd = shell.clone();
    let mut _temporary = None;
    if let Some(script) = &args.script {
        let image = fs::read(&shell).doing("cannot read the shell initramfs")?;
        initrd = shell.with_file_name(format!(".demo-{}.cpio", std::process::id()));
        fs::write(&initrd, initramfs::with_script(&image, script)).doing("cannot write the script's initramfs")?;
        _temporary = Some(Temporary(initrd.clone()));
    } else {
        eprintln!("Linux {} is starting. Ctrl-A x leaves the hypervisor, whatever the guest does.", args.kernel);
    }
    // A shell is for a person, who need not read the boot log; a script's log is its record.
    let quiet = if args.script.is_some() { "" } else { " quiet" };
    let cmdline = format!("{}{quiet}", boot::CMDLINE);
    let status = boot::paravane(&program, &args.engine, &kernel, &initrd, &cmdline)
        .status()
        .doing("cannot start the hypervisor that was just built")?;
    Ok(match status.code() {
        Some(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
        None => {
            eprintln!("xtask: the hypervisor ended with {status}");
            ExitCode::FAILURE
        }
    })
}
