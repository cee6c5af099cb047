//! The machine: owns memory, the chipset and the vCPUs, and runs them to the end. Read this first.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use paravane_cpu::VcpuExit;

use crate::chipset::{Chipset, ChipsetConfig};
use crate::config::{ConfigError, SerialConfig, VmConfig};
use crate::devices::control::StopCause;
use crate::devices::lapic;
use crate::engine::{self, EngineError, MachineInfo, Vcpu};
use crate::loader::{self, Boot, LoadError};
use crate::terminal::{Event, Terminal};
use crate::{acpi, memory, terminal, tsc};

/// Why a machine could not run.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// An option makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be read.
    #[error("the {what} \"{path}\" cannot be read ({why}); check the path and its permissions")]
    File {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: String,
        /// The host's reason.
        why: io::Error,
    },
    /// The serial output file cannot be made.
    #[error("the serial port's file \"{path}\" cannot be written ({why}); check the path and its permissions")]
    SerialFile {
        /// Its path.
        path: String,
        /// The host's reason.
        why: io::Error,
    },
    /// An empty initrd is surely a mistake.
    #[error("the initrd \"{0}\" is empty; build it again or leave --initrd out")]
    EmptyInitrd(String),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// No room for tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// The engine cannot work here.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host refuses a thread or a descriptor.
    #[error("the host refuses a resource ({0}); close other programs or raise its limits")]
    Host(#[from] io::Error),
}

impl VmError {
    /// Whether the user, not the host, can mend it.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Memory(_) | Self::Engine(EngineError::Bt(_)) | Self::Host(_))
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine stopped.
    Stopped(StopCause),
    /// A signal ended it.
    Signal(i32),
}

impl Outcome {
    /// The process's exit status; see the command line's help.
    pub fn status(self) -> u8 {
        match self {
            Self::Stopped(StopCause::PowerOff | StopCause::Host) => 0,
            Self::Stopped(StopCause::GuestPanic) => 10,
            Self::Stopped(StopCause::TripleFault(_)) => 11,
            Self::Stopped(StopCause::Reset) => 12,
            Self::Stopped(StopCause::DebugExit(s)) => s,
            Self::Signal(s) => 128 + s as u8,
        }
    }
}

/// Puts a machine together and runs it until it stops.
///
/// # Errors
/// See [`VmError`].
pub fn run(cfg: &VmConfig) -> Result<Outcome, VmError> {
    cfg.validate()?;
    let (kind, reason) = engine::choose(cfg.engine)?;
    let kernel = read("kernel", &cfg.kernel)?;
    let initrd = cfg.initrd.as_deref().map(|p| read("initrd", p)).transpose()?;
    if let (Some(i), Some(p)) = (&initrd, &cfg.initrd)
        && i.is_empty()
    {
        return Err(VmError::EmptyInitrd(p.display().to_string()));
    }
    terminal::block_signals();

    let mem = memory::create(cfg.memory)?;
    let serial = open_serial(&cfg.serial)?;
    let chipset = Chipset::new(ChipsetConfig { cpus: cfg.cpus, debug_exit: cfg.debug_exit, serial })?;
    let info = MachineInfo { cpus: cfg.cpus, tsc_khz: tsc::tsc_khz(), apic_hz: lapic::BUS_HZ };
    let mut vcpu = engine::make(kind, 0, mem.clone(), chipset.clone(), &info)?;
    let rsdp = acpi::write(&mem, cfg.cpus)?;
    let boot = Boot { kernel: &kernel, initrd: initrd.as_deref(), cmdline: &cfg.cmdline, rsdp };
    let format = loader::load(&mem, &boot, vcpu.state_mut())?;
    drop((kernel, initrd));
    chipset.set_kick(0, vcpu.kick());

    let signal = Arc::new(std::sync::atomic::AtomicI32::new(0));
    let terminal = {
        let (chipset, signal) = (chipset.clone(), signal.clone());
        Terminal::start(cfg.serial == SerialConfig::Stdio, move |event| match event {
            Event::Input(bytes) => chipset.serial_input(bytes),
            Event::Quit => chipset.stop(StopCause::Host),
            Event::Signal(s) => {
                signal.store(s, std::sync::atomic::Ordering::SeqCst);
                chipset.stop(StopCause::Host);
            }
            Event::Hangup => {
                signal.store(libc::SIGHUP, std::sync::atomic::Ordering::SeqCst);
                chipset.stop(StopCause::Host);
            }
        })?
    };
    let began = Instant::now();
    let ran = {
        let chipset = chipset.clone();
        std::thread::Builder::new().name("vcpu0".into()).spawn(move || run_vcpu(0, vcpu, &chipset))?.join()
    };
    drop(terminal);
    let (result, counters) = ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if cfg.stats {
        print_stats(format, reason, began, &counters);
    }
    result?;
    let cause = chipset.stop_cause().unwrap_or(StopCause::Host);
    let signal = signal.load(std::sync::atomic::Ordering::SeqCst);
    Ok(if signal != 0 && cause == StopCause::Host { Outcome::Signal(signal) } else { Outcome::Stopped(cause) })
}

type Counters = Vec<(String, u64)>;

/// A vCPU's thread.
fn run_vcpu(id: u32, mut vcpu: Box<dyn Vcpu>, chipset: &Chipset) -> (Result<(), EngineError>, Counters) {
    let result = loop {
        match vcpu.run() {
            Ok(VcpuExit::Halt) => chipset.wait_for_interrupt(id),
            Ok(VcpuExit::Stopped) => break Ok(()),
            Ok(VcpuExit::TripleFault) => {
                chipset.stop(StopCause::TripleFault(id));
                break Ok(());
            }
            Err(e) => {
                chipset.stop(StopCause::Host);
                break Err(e);
            }
        }
    };
    (result, vcpu.counters())
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, VmError> {
    fs::read(path).map_err(|why| VmError::File { what, path: path.display().to_string(), why })
}

fn open_serial(to: &SerialConfig) -> Result<Box<dyn Write + Send>, VmError> {
    Ok(match to {
        SerialConfig::Stdio => Box::new(io::stdout()),
        SerialConfig::Null => Box::new(io::sink()),
        SerialConfig::File(path) => Box::new(
            fs::File::create(path).map_err(|why| VmError::SerialFile { path: path.display().to_string(), why })?,
        ),
    })
}

/// Counters go to standard error; a closed one leaves nobody to read them.
fn print_stats(format: &str, reason: &str, began: Instant, counters: &Counters) {
    let mut text = format!("kernel format: {format}\nengine: binary translation ({reason})\n");
    text += &format!("{:<44} {:>14}\n", "wall time (ms)", began.elapsed().as_millis());
    for (name, value) in counters {
        text += &format!("{name:<44} {value:>14}\n");
    }
    let _ = io::stderr().write_all(text.as_bytes());
}
