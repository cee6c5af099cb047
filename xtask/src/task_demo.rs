//! `cargo xtask demo`: a stock kernel under Paravane, on this terminal.

use std::process::Command;

use crate::{Result, build_paravane, initramfs, known_kernel, options, task_guests};

/// Runs the demonstration and returns the exit status of `paravane`.
pub(crate) fn run(args: &[&str]) -> Result<u8> {
    let (mut kernel, mut engine, mut script) = ("6.1", "auto", None);
    for (name, value) in options(args, &["--kernel", "--engine", "--script"])? {
        match name {
            "--kernel" => kernel = value,
            "--engine" => engine = value,
            _ => script = Some(value),
        }
    }
    known_kernel(kernel)?;
    let guests = task_guests::ensure()?;
    let binary = build_paravane()?;
    let initrd = match script {
        Some(commands) => initramfs::write_commands(&guests, commands)?,
        None => "initramfs-shell.cpio",
    };
    if script.is_none() {
        println!("xtask: Ctrl-A x stops the guest; exit in its shell powers it off");
    }
    let status = Command::new(binary)
        .arg("run")
        .arg("--kernel")
        .arg(guests.join(kernel).join("vmlinuz"))
        .arg("--initrd")
        .arg(guests.join(initrd))
        .args(["--cmdline", "console=ttyS0", "--memory", "512M", "--serial", "stdio", "--engine", engine])
        .status()
        .map_err(|e| format!("cannot start paravane: {e}"))?;
    Ok(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1))
}
