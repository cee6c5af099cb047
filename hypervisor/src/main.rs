//! The command line: parse, then call in.

mod bench;
mod doctor;

use clap::{Args, Parser, Subcommand};
use doctor::Doctor;
use paravane::config::devices::{
    BalloonConfig, ConsoleConfig, DevicesConfig, DiskConfig, FsConfig, NetConfig, RngConfig, VsockConfig,
};
use paravane::config::{self, ConfigError, PerfMap, ReportTo, SerialConfig, VmConfig, options};
use paravane::engine::{EngineKind, IrqChip, Windows};
use paravane::pv::Offer;
use paravane::vm;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A hypervisor that needs no root, no kernel module and no /dev/kvm.
#[derive(Parser)]
#[command(name = "paravane", version, about, arg_required_else_help = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a kernel and run it until it powers off.
    #[command(after_help = EXIT_CODES)]
    Run(Box<Run>),
    /// Say what this host offers, what each engine can do here, and which one "auto" takes.
    #[command(after_help = doctor::AFTER_HELP)]
    Doctor(Doctor),
    /// Measure what each way of virtualizing costs here, and what the paravirtual interfaces save.
    #[command(after_help = paravane_bench::cli::AFTER_HELP)]
    Bench(Box<paravane_bench::cli::Bench>),
}

const EXIT_CODES: &str = "\
In a terminal, Ctrl-A x stops the guest; Ctrl-A Ctrl-A sends Ctrl-A; every other key goes to the guest.

Exit status:
  0    the guest powered off, or you stopped it with Ctrl-A x
  2    something about the command line, the kernel or the initrd is wrong
  3    the host lacks something or failed
  4    the host's KVM cannot go on with the guest, at an instruction that it cannot emulate for example; try --engine bt
  10   the guest reported a panic (through the pvpanic device)
  11   the guest crashed by a triple fault
  12   the guest asked for a reset, which Linux also does after a panic with panic=-1 on its command line
  n    with --debug-exit: (value << 1) | 1 for a value written to port 0xf4
  128+n  stopped by signal n (129 when the terminal was closed, 141 when the reader of the output left)

Example:
  paravane run --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0";

#[derive(Args)]
struct Run {
    /// Kernel: a Linux bzImage, an ELF with a PVH note, or a multiboot1 image
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// A file that says what the command line could say, in TOML or (*.json) JSON; what is given here goes before it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line; "console=ttyS0" makes Linux talk to the serial port, "panic=-1" ends the run when it panics
    /// [default: "console=ttyS0 panic=-1"]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Guest memory, with K, M or G [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = config::parse_size)]
    memory: Option<u64>,
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Engine: auto, bt (binary translation) or kvm [default: auto]
    #[arg(long, value_parser = config::parse_engine)]
    engine: Option<EngineKind>,
    /// Local APICs on KVM: user (in this process), split (in the kernel) or auto (in the kernel where KVM runs ring 0 natively)
    #[arg(long, default_value = "auto", value_parser = config::parse_irqchip)]
    irqchip: IrqChip,
    /// Host mappings for guest processes under binary translation: off, auto (those that compute) or always
    #[arg(long, default_value = "auto", value_parser = config::parse_windows)]
    windows: Windows,
    /// Paravirtual interfaces for guests that know them: off, auto (what pays on the engine) or all
    #[arg(long, default_value = "auto", value_parser = config::parse_pv)]
    pv: Offer,
    /// Where the serial port goes: stdio, null or file=PATH [default: stdio]
    #[arg(long, value_parser = config::parse_serial)]
    serial: Option<SerialConfig>,
    /// A disk: path=FILE[,readonly=on][,format=raw|qcow2][,serial=TEXT][,queues=N][,direct=on][,backing=on][,transport=pci|mmio|pv]; repeatable
    #[arg(long, value_name = "OPTIONS", value_parser = |s: &str| options::parse::<DiskConfig>("--disk", None, s))]
    disk: Vec<DiskConfig>,
    /// A network card: user[,hostfwd=tcp:ADDRESS:PORT-:PORT][,restrict=on] or tap=NAME or passt=SOCKET[,mac=MAC][,queues=N]; repeatable
    #[arg(long, value_name = "OPTIONS", value_parser = |s: &str| options::parse::<NetConfig>("--net", Some("mode"), s))]
    net: Vec<NetConfig>,
    /// Random numbers for the guest [src=FILE]
    #[arg(
        long,
        value_name = "OPTIONS",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = |s: &str| options::parse::<RngConfig>("--rng", None, s)
    )]
    rng: Option<RngConfig>,
    /// Memory balloon: size=SIZE[,deflate_on_oom=off][,free_page_reporting=off]
    #[arg(long, value_name = "OPTIONS", value_parser = |s: &str| options::parse::<BalloonConfig>("--balloon", None, s))]
    balloon: Option<BalloonConfig>,
    /// Sockets between host and guest: cid=N,socket=PATH
    #[arg(long, value_name = "OPTIONS", value_parser = |s: &str| options::parse::<VsockConfig>("--vsock", None, s))]
    vsock: Option<VsockConfig>,
    /// A shared folder, in the guest "mount -t virtiofs NAME /mnt": tag=NAME,path=FOLDER[,readonly=on][,queues=N]; repeatable
    #[arg(long, value_name = "OPTIONS", value_parser = |s: &str| options::parse::<FsConfig>("--fs", None, s))]
    fs: Vec<FsConfig>,
    /// A virtio console (hvc0): stdio (the serial port then goes nowhere unless told otherwise), null or file=PATH
    #[arg(
        long,
        value_name = "OPTIONS",
        value_parser = |s: &str| options::parse::<ConsoleConfig>("--console", Some("mode"), s)
    )]
    console: Option<ConsoleConfig>,
    /// A Unix socket at which the running machine takes commands: status, balloon, pause, resume, stop (docs/devices.md)
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Let the guest end the run with a status through port 0xf4
    #[arg(long)]
    debug_exit: bool,
    /// Print counters when the guest has stopped
    #[arg(long)]
    stats: bool,
    /// Sample what the vCPU spends its time on, and report when the guest has stopped: to standard error or to FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    profile: Option<PathBuf>,
    /// Names for the profile: System.map or a copy of /proc/kallsyms of the guest's kernel
    #[arg(long, value_name = "FILE", requires = "profile")]
    profile_symbols: Option<PathBuf>,
    /// Name translated code for perf in /tmp/perf-PID.map while the guest runs; with "keep" also after, for perf report
    #[arg(
        long,
        value_name = "FATE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "remove",
        value_parser = config::parse_perf_map
    )]
    perf_map: Option<PerfMap>,
}

fn main() -> ExitCode {
    let r = match Cli::parse().command {
        Command::Run(r) => *r,
        Command::Doctor(d) => return d.run(),
        Command::Bench(b) => return bench::run(&b),
    };
    let cfg = match config(r) {
        Ok(cfg) => cfg,
        Err(e) => {
            say(&e);
            return ExitCode::from(2);
        }
    };
    match vm::run(&cfg) {
        Ok(outcome) => {
            if let Some(text) = outcome.remark() {
                say(&text);
            }
            ExitCode::from(outcome.status())
        }
        Err(e) => {
            say(&e);
            ExitCode::from(e.status())
        }
    }
}

/// What the command line and the configuration file say together.
fn config(r: Run) -> Result<VmConfig, ConfigError> {
    let file = r.config.as_deref().map(config::read_file).transpose()?.unwrap_or_default();
    let over = DevicesConfig {
        disk: r.disk,
        net: r.net,
        rng: r.rng,
        balloon: r.balloon,
        vsock: r.vsock,
        fs: r.fs,
        console: r.console,
    };
    let devices = file.devices().merge(over);
    let on_terminal = devices.console.as_ref().is_some_and(|c| c.to() == SerialConfig::Stdio);
    let engine = file.engine.as_deref().map(config::parse_engine).transpose()?;
    let serial = file.serial.as_deref().map(config::parse_serial).transpose()?;
    Ok(VmConfig {
        kernel: r.kernel.or(file.kernel).ok_or(ConfigError::NoKernel)?,
        initrd: r.initrd.or(file.initrd),
        cmdline: r.cmdline.or(file.cmdline).unwrap_or_else(|| "console=ttyS0 panic=-1".into()),
        memory: r.memory.or(file.memory).unwrap_or(512 << 20),
        cpus: r.cpus.or(file.cpus).unwrap_or(1),
        engine: r.engine.or(engine).unwrap_or(EngineKind::Auto),
        irqchip: r.irqchip,
        windows: r.windows,
        pv: r.pv,
        serial: r.serial.or(serial).unwrap_or(if on_terminal { SerialConfig::Null } else { SerialConfig::Stdio }),
        devices,
        control: r.control.or(file.control),
        debug_exit: r.debug_exit,
        stats: r.stats,
        profile: r.profile.map(|p| if p == Path::new("-") { ReportTo::Stderr } else { ReportTo::File(p) }),
        profile_symbols: r.profile_symbols,
        perf_map: r.perf_map,
    })
}

/// Tells the user; a closed standard error leaves nobody to hear it.
fn say(text: &dyn Display) {
    let _ = writeln!(io::stderr(), "paravane: {text}");
}
