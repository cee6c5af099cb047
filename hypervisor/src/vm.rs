//! The machine: owns memory, the chipset and the vCPUs, and runs them to the end. Read this first.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use virtio::devices::console::PortInput;

use crate::census::{self, Census, Counters};
use crate::chipset::{Chipset, ChipsetConfig};
use crate::config::devices::ConsoleConfig;
use crate::config::{ConfigError, PerfMap, ReportTo, SerialConfig, VmConfig};
use crate::control_socket::{ControlSocket, Reach};
use crate::devices::control::StopCause;
use crate::devices::lapic;
use crate::engine::kvm::{self, KvmError};
use crate::engine::{self, EngineError, EngineKind, EngineVm, MachineInfo, Profile, Vcpu};
use crate::loader::{self, Boot, LoadError};
use crate::output::Output;
use crate::peripherals::{self, PeripheralError};
use crate::profile::{self, Symbols};
use crate::running::Driven;
use crate::terminal::{Event, Terminal};
use crate::{acpi, memory, running, smbios, terminal, tsc};

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
    /// The control socket cannot be made.
    #[error("the control socket \"{path}\" cannot be made ({why}); choose a path where nothing is yet")]
    Control {
        /// Its path.
        path: String,
        /// The host's reason.
        why: io::Error,
    },
    /// The profile's file cannot be made or written.
    #[error("the profile's file \"{path}\" cannot be written ({why}); check the path and its permissions")]
    ProfileFile {
        /// Its path.
        path: String,
        /// The host's reason.
        why: io::Error,
    },
    /// The symbol file is of no use.
    #[error(transparent)]
    Symbols(#[from] profile::SymbolsError),
    /// The kernel or initrd is no file whose end can be reached.
    #[error("the {what} \"{path}\" is a device; name a file instead")]
    Device {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: String,
    },
    /// The serial output's file or standard output fails.
    #[error("the serial port's output cannot be written ({0}); make room there or send it elsewhere with --serial")]
    Output(Arc<io::Error>),
    /// The vCPU's thread panicked, which the panic hook has reported.
    #[error(
        "the hypervisor itself failed, as the message above says; please report it with the command line that led to it"
    )]
    Defect,
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
    /// No room for tables.
    #[error(transparent)]
    Smbios(#[from] smbios::SmbiosError),
    /// A device cannot be had.
    #[error(transparent)]
    Peripheral(#[from] PeripheralError),
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
        !matches!(
            self,
            Self::Memory(_)
                | Self::Engine(EngineError::Bt(_) | EngineError::Kvm(_))
                | Self::Host(_)
                | Self::Output(_)
                | Self::Defect
        )
    }

    /// The process's exit status; see the command line's help.
    pub fn status(&self) -> u8 {
        match self {
            Self::Engine(EngineError::Kvm(KvmError::GaveUp(_))) => 4,
            e if e.is_usage() => 2,
            _ => 3,
        }
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
    /// One sentence for the user when the guest ended in a way that may surprise.
    pub fn remark(self) -> Option<&'static str> {
        match self {
            Self::Stopped(StopCause::GuestPanic) => Some("the guest reported a panic"),
            Self::Stopped(StopCause::TripleFault(_)) => {
                Some("the guest crashed by a triple fault; its last words, if any, are on its serial port")
            }
            Self::Stopped(StopCause::Reset) => Some("the guest asked for a reset, which ends the run"),
            _ => None,
        }
    }

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
    let (kind, reason) = engine::choose(cfg.engine, cfg.only_bt());
    if kind == EngineKind::Kvm && kvm::emulates_ring0() {
        warn("this host's KVM only emulates ring 0, so a kernel runs slowly and may fail; --engine bt is faster here");
    }
    let kernel = read("kernel", &cfg.kernel)?;
    let initrd = cfg.initrd.as_deref().map(|p| read("initrd", p)).transpose()?;
    if let (Some(i), Some(p)) = (&initrd, &cfg.initrd)
        && i.is_empty()
    {
        return Err(VmError::EmptyInitrd(p.display().to_string()));
    }
    let profiling = cfg.profile.as_ref().map(|to| Profiling::open(to, cfg.profile_symbols.as_deref())).transpose()?;
    terminal::block_signals();

    let mem = memory::create(cfg.memory)?;
    let ending = Arc::new(Ending::default());
    let serial = Serial::open(&cfg.serial, &ending)?;
    let (output, port) = (serial.output, serial.port);
    let vm = EngineVm::new(kind, mem.clone(), cfg.irqchip)?;
    let pv = vm.paravirt(cfg.pv, cfg.devices.on_pv());
    let chipset = Chipset::new(ChipsetConfig { cpus: cfg.cpus, debug_exit: cfg.debug_exit, serial: port, pv })?;
    let _ = ending.chipset.set(Arc::downgrade(&chipset));
    let tsc_khz = tsc::tsc_khz();
    let mut info = MachineInfo {
        cpus: cfg.cpus,
        tsc_khz,
        apic_hz: lapic::BUS_HZ,
        windows: cfg.windows,
        hypervisor_leaves: Vec::new(),
    };
    let mut vcpus = Vec::new();
    for n in 0..cfg.cpus {
        info.hypervisor_leaves = chipset.hypervisor_leaves(n, tsc_khz, lapic::BUS_HZ);
        vcpus.push(vm.vcpu(n, chipset.clone(), &info)?);
    }
    chipset.use_local_apics(vm.local_apics());
    let console = Serial::open(&cfg.devices.console.as_ref().map_or(SerialConfig::Null, ConsoleConfig::to), &ending)?;
    let outputs: Vec<Output> = [output, console.output].into_iter().flatten().collect();
    let placed = peripherals::add(&cfg.devices, &mem, &chipset, console.port)?;
    let rsdp = acpi::write(&mem, cfg.cpus, &placed.mmio)?;
    smbios::write(&mem)?;
    let boot = Boot { kernel: &kernel, initrd: initrd.as_deref(), cmdline: &cfg.cmdline, rsdp };
    let format = loader::load(&mem, &boot, vcpus[0].state_mut())?;
    drop((kernel, initrd));
    if let Some(names) = cfg.perf_map {
        vcpus[0].write_perf_map(names == PerfMap::Keep)?;
    }
    for (n, vcpu) in vcpus.iter_mut().enumerate() {
        if n != 0 {
            vcpu.state_mut().init();
        }
        chipset.set_kick(n as u32, vcpu.kick());
        if profiling.is_some() {
            vcpu.start_profile()?;
        }
    }

    let terminal = {
        let (feed, ending, outputs) = (chipset.clone(), ending.clone(), outputs.clone());
        let handle = move |event| {
            match event {
                Event::Quit => ending.stop(Early::Quit),
                Event::Signal(s) => ending.stop(Early::Signal(s)),
                Event::Hangup => ending.stop(Early::Signal(libc::SIGHUP)),
            }
            // Who stops the guest from outside does not wait for its last words to be read.
            for output in &outputs {
                output.abandon();
            }
        };
        let to_console = placed.console.filter(|_| cfg.console_on_stdio());
        let interactive = cfg.serial == SerialConfig::Stdio || to_console.is_some();
        let input = move |bytes: &[u8]| match &to_console {
            Some(console) => feed_console(console, bytes, &feed),
            None => feed.serial_input(bytes),
        };
        Terminal::start(interactive, input, handle)?
    };
    let census = Arc::new(Census::new(vcpus.len()));
    let control = cfg.control.as_deref().map(|path| {
        let (ending, chipset, census) = (ending.clone(), chipset.clone(), census.clone());
        let stop = Box::new(move || ending.stop(Early::Quit));
        let reach = Reach { chipset, balloon: placed.balloon, census, stop };
        ControlSocket::start(path, reach).map_err(|why| VmError::Control { path: path.display().to_string(), why })
    });
    let control = control.transpose()?;
    let began = Instant::now();
    let ran = run_vcpus(vcpus, &chipset, &census);
    let ran_for = began.elapsed();
    // Whatever happened to the vCPU, nobody is to wait for it from here on. The first cause counts.
    chipset.stop(StopCause::Host);
    drop(control);
    chipset.shut_down_devices();
    // Signals are still seen while the last output is on its way.
    for output in outputs {
        output.finish();
    }
    drop(terminal);
    let ran = ran?;
    if cfg.stats {
        print_stats(format, (kind, &reason), ran_for, &ran.counters);
    }
    if let (Some(to), Some(profile)) = (profiling, &ran.profile) {
        to.report(profile)?;
    }
    ran.result?;
    let cause = chipset.stop_cause().unwrap_or(StopCause::Host);
    match ending.early.get() {
        Some(Early::Signal(s)) if cause == StopCause::Host => Ok(Outcome::Signal(*s)),
        Some(Early::Output(e)) if cause == StopCause::Host => Err(VmError::Output(e.clone())),
        _ => Ok(Outcome::Stopped(cause)),
    }
}

/// Why the machine is stopped from outside.
enum Early {
    /// The escape key.
    Quit,
    /// A signal, or what stands for one.
    Signal(i32),
    /// Serial output failed.
    Output(Arc<io::Error>),
}

/// Stops the machine from outside; the first reason counts.
#[derive(Default)]
struct Ending {
    early: OnceLock<Early>,
    chipset: OnceLock<Weak<Chipset>>,
}

impl Ending {
    fn stop(&self, why: Early) {
        let _ = self.early.set(why);
        if let Some(chipset) = self.chipset.get().and_then(Weak::upgrade) {
            chipset.stop(StopCause::Host);
        }
    }

    /// A reader that left or a closed terminal ends the run as the signals for that would; else it is an error.
    fn output_lost(&self, e: io::Error) {
        self.stop(match e.raw_os_error() {
            Some(libc::EPIPE) => Early::Signal(libc::SIGPIPE),
            Some(libc::EIO) => Early::Signal(libc::SIGHUP),
            _ => Early::Output(Arc::new(e)),
        });
    }
}

/// Feeds the virtio console. Waits while the guest does not read; gives up when the machine stops.
fn feed_console(console: &PortInput, mut bytes: &[u8], chipset: &Chipset) {
    while !bytes.is_empty() && chipset.stop_cause().is_none() {
        let taken = console.offer(bytes);
        bytes = &bytes[taken..];
        if taken == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Both ends of COM1's output, or of a virtio console's.
struct Serial {
    port: Box<dyn Write + Send>,
    output: Option<Output>,
}

impl Serial {
    fn open(to: &SerialConfig, ending: &Arc<Ending>) -> Result<Self, VmError> {
        let file: Box<dyn Write + Send> = match to {
            SerialConfig::Null => return Ok(Self { port: Box::new(io::sink()), output: None }),
            // The descriptor itself: the standard library's buffering would only add copies.
            SerialConfig::Stdio => match io::stdout().as_fd().try_clone_to_owned() {
                Ok(fd) => Box::new(fs::File::from(fd)),
                // Standard output is closed: there is nobody to hear the guest.
                Err(_) => return Ok(Self { port: Box::new(io::sink()), output: None }),
            },
            SerialConfig::File(path) => Box::new(
                fs::File::create(path).map_err(|why| VmError::SerialFile { path: path.display().to_string(), why })?,
            ),
        };
        let ending = ending.clone();
        let (output, port) = Output::start(file, move |e| ending.output_lost(e))?;
        Ok(Self { port: Box::new(port), output: Some(output) })
    }
}

/// What vCPUs leave behind.
struct Ran {
    result: Result<(), EngineError>,
    counters: Counters,
    profile: Option<Profile>,
}

/// A vCPU's thread.
fn run_vcpu(id: u32, mut vcpu: Box<dyn Vcpu>, chipset: &Chipset, census: &Census) -> Ran {
    /// Stops the machine when the thread panics, so that the other vCPUs end, too.
    struct Panicking<'a>(&'a Chipset);
    impl Drop for Panicking<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.stop(StopCause::Host);
            }
        }
    }
    let _guard = Panicking(chipset);
    let result = loop {
        match running::drive(id, &mut *vcpu, chipset) {
            Ok(Driven::Paused) => wait_while_paused(chipset, || census.tell(id, || vcpu.counters())),
            other => break other.map(|_| ()),
        }
    };
    Ran { result, counters: vcpu.counters(), profile: vcpu.take_profile() }
}

/// Comes back when the machine goes on or stops, and calls now and then meanwhile. Whoever resumes a machine by hand does not mind two
/// milliseconds.
fn wait_while_paused(chipset: &Chipset, now_and_then: impl Fn()) {
    while chipset.paused() && chipset.stop_cause().is_none() {
        now_and_then();
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs all vCPUs, each on a thread of its own, until the machine stops. Gives what they leave behind, taken together.
fn run_vcpus(vcpus: Vec<Box<dyn Vcpu>>, chipset: &Arc<Chipset>, census: &Arc<Census>) -> Result<Ran, VmError> {
    let mut threads = Vec::new();
    let mut refused = None;
    for (n, vcpu) in vcpus.into_iter().enumerate() {
        let (its, census) = (chipset.clone(), census.clone());
        let thread = std::thread::Builder::new().name(format!("vcpu{n}"));
        match thread.spawn(move || run_vcpu(n as u32, vcpu, &its, &census)) {
            Ok(t) => threads.push(t),
            Err(e) => {
                chipset.stop(StopCause::Host);
                refused = Some(e);
                break;
            }
        }
    }
    let all: Vec<_> = threads.into_iter().map(std::thread::JoinHandle::join).collect();
    if let Some(e) = refused {
        return Err(e.into());
    }
    let mut sum: Option<Ran> = None;
    for ran in all {
        let ran = ran.map_err(|_| VmError::Defect)?;
        match &mut sum {
            None => sum = Some(ran),
            Some(sum) => sum.add(ran),
        }
    }
    sum.ok_or(VmError::Defect)
}

impl Ran {
    /// Adds another vCPU's.
    fn add(&mut self, other: Self) {
        if self.result.is_ok() {
            self.result = other.result;
        }
        census::add(&mut self.counters, other.counters);
        match (&mut self.profile, other.profile) {
            (Some(all), Some(more)) => {
                all.entries.extend(more.entries);
                all.lost += more.lost;
                all.lstar = all.lstar.max(more.lstar);
            }
            (all @ None, more) => *all = more,
            (Some(_), None) => {}
        }
    }
}

/// Where a profile goes and what it is read with: both are opened before the run, so that none is in vain.
struct Profiling {
    /// A file and its name, or else standard error.
    file: Option<(fs::File, String)>,
    symbols: Option<Symbols>,
}

impl Profiling {
    fn open(to: &ReportTo, symbols: Option<&Path>) -> Result<Self, VmError> {
        let symbols = symbols.map(|p| read("symbol file", p)).transpose()?;
        let symbols = symbols.map(|bytes| Symbols::parse(&String::from_utf8_lossy(&bytes))).transpose()?;
        let file = match to {
            ReportTo::Stderr => None,
            ReportTo::File(path) => {
                let name = path.display().to_string();
                let file = fs::File::create(path).map_err(|why| VmError::ProfileFile { path: name.clone(), why })?;
                Some((file, name))
            }
        };
        Ok(Self { file, symbols })
    }

    fn report(self, profile: &Profile) -> Result<(), VmError> {
        let text = profile::report(profile, self.symbols.as_ref());
        match self.file {
            Some((mut file, path)) => file.write_all(text.as_bytes()).map_err(|why| VmError::ProfileFile { path, why }),
            // A closed standard error leaves nobody to read it.
            None => {
                let _ = io::stderr().write_all(text.as_bytes());
                Ok(())
            }
        }
    }
}

/// Reads a file, which may be a pipe but no device: those have no end.
fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, VmError> {
    let name = || path.display().to_string();
    let failed = |why| VmError::File { what, path: name(), why };
    let mut file = fs::File::open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_char_device() || kind.is_block_device() {
        return Err(VmError::Device { what, path: name() });
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Tells the user something to mind; a closed standard error leaves nobody to hear it.
fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "paravane: warning: {text}");
}

/// Counters go to standard error; a closed one leaves nobody to read them.
fn print_stats(format: &str, (engine, reason): (EngineKind, &str), ran_for: Duration, counters: &Counters) {
    let engine = if engine == EngineKind::Kvm { "KVM" } else { "binary translation" };
    let mut text = format!("kernel format: {format}\nengine: {engine} ({reason})\n");
    text += &format!("{:<44} {:>14}\n", "wall time (ms)", ran_for.as_millis());
    for (name, value) in counters {
        text += &format!("{name:<44} {value:>14}\n");
    }
    let _ = io::stderr().write_all(text.as_bytes());
}
