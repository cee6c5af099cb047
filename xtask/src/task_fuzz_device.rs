//! `cargo xtask fuzz device [TARGET] --seconds N`: what a hostile guest can do to a virtio device (see `virtio/src/fuzz.rs`).

use crate::host::{self, Doing, Result};
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// block, net, console, entropy, balloon, vsock, fs, fuse (messages to a shared folder), pci or mmio; all of them, one after the other, when left out
    target: Option<String>,
    /// How long, for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Which programs: the same seed gives the same ones
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const ALL: [&str; 10] = ["block", "net", "console", "entropy", "balloon", "vsock", "fs", "fuse", "pci", "mmio"];

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let targets = args.target.as_deref().map_or(ALL.to_vec(), |t| vec![t]);
    for target in targets {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(host::repo());
        command.args(["run", "--quiet", "--release", "--package", "virtio", "--example", "fuzz", "--", target]);
        command.args(["--seconds", &args.seconds.to_string(), "--seed", &args.seed.to_string()]);
        if !command.status().doing("cannot start cargo")?.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}
