//! What a user can ask for, checked in one place.

use crate::engine::{EngineKind, IrqChip, Windows};
use crate::pv::Offer;
use std::path::{Path, PathBuf};

pub mod devices;
pub mod options;

use devices::{DevicesConfig, FileConfig};

/// Least guest memory: below it no kernel has room for its boot data.
pub const MIN_MEMORY: u64 = 4 << 20;
/// Most guest memory: what 40 address bits reach, less the device hole.
pub const MAX_MEMORY: u64 = 1 << 39;

/// Where COM1 goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// This terminal, or whatever standard input and output are.
    Stdio,
    /// Output to a file; no input.
    File(PathBuf),
    /// Nowhere.
    Null,
}

/// Where a report goes at the end of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportTo {
    /// Standard error.
    Stderr,
    /// A file.
    File(PathBuf),
}

/// What becomes of the names that perf is given when the run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerfMap {
    /// They go: perf looks at the run while it lasts.
    Remove,
    /// They stay for a later report.
    Keep,
}

/// Most vCPUs of a machine.
pub const MAX_CPUS: u32 = 64;

/// A machine to run.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Engine.
    pub engine: EngineKind,
    /// Where local APICs are on KVM.
    pub irqchip: IrqChip,
    /// When guest processes get host mappings under binary translation.
    pub windows: Windows,
    /// What the guest is offered of the paravirtual interfaces.
    pub pv: Offer,
    /// COM1.
    pub serial: SerialConfig,
    /// Virtio devices.
    pub devices: DevicesConfig,
    /// Unix socket for commands.
    pub control: Option<PathBuf>,
    /// QEMU-compatible debug exit at port 0xf4.
    pub debug_exit: bool,
    /// Print counters at the end.
    pub stats: bool,
    /// Sample the vCPU and report at the end.
    pub profile: Option<ReportTo>,
    /// System.map or kallsyms of the guest's kernel, for the profile.
    pub profile_symbols: Option<PathBuf>,
    /// Write names of translated code for perf; whether to keep them.
    pub perf_map: Option<PerfMap>,
}

/// An option that makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A size that cannot be read.
    #[error("\"{0}\" is no memory size; write a whole number of MiB with K, M or G behind it, such as 512M")]
    Size(String),
    /// Memory out of bounds.
    #[error("a guest cannot have {0} bytes of memory; give it from 4M to 512G")]
    Memory(u64),
    /// A number of vCPUs that no machine has.
    #[error("a machine cannot have {0} vCPUs; give it from 1 to {MAX_CPUS} with --cpus")]
    Cpus(u32),
    /// Names for perf are of one vCPU.
    #[error("names for perf are written for one vCPU only; leave --cpus at 1 with --perf-map")]
    PerfMapCpus,
    /// Two consoles on one terminal.
    #[error(
        "the serial port and the virtio console cannot both be on this terminal; send one elsewhere, such as --serial null"
    )]
    TwoConsoles,
    /// An engine that does not exist.
    #[error("\"{0}\" is no engine; use auto, bt or kvm")]
    Engine(String),
    /// A place for local APICs that does not exist.
    #[error("\"{0}\" is no place for local APICs; use auto, user or split")]
    IrqChip(String),
    /// A choice about windows that does not exist.
    #[error("\"{0}\" says nothing about windows; use off, auto or always")]
    Windows(String),
    /// A choice about the paravirtual interfaces that does not exist.
    #[error("\"{0}\" says nothing about the paravirtual interfaces; use off, auto or all")]
    Pv(String),
    /// A fate of the names for perf that does not exist.
    #[error("\"{0}\" says nothing about the names for perf; use remove or keep")]
    PerfMap(String),
    /// A device option that makes no sense: option, value, and what is wrong with it.
    #[error("{0} {1}: {2}")]
    Option(&'static str, String, String),
    /// A configuration file that makes no sense.
    #[error("the configuration file \"{0}\", {1}")]
    File(String, String),
    /// Neither the command line nor a file names a kernel.
    #[error("there is no kernel to start; name one with --kernel")]
    NoKernel,
    /// A serial target that does not exist.
    #[error("\"{0}\" is no place for the serial port; use stdio, null or file=PATH")]
    Serial(String),
}

impl VmConfig {
    /// Whether the virtio console is what this terminal talks to.
    pub fn console_on_stdio(&self) -> bool {
        self.devices.console.as_ref().is_some_and(|c| c.to() == SerialConfig::Stdio)
    }

    /// An option that only binary translation has, if one was given.
    pub fn only_bt(&self) -> Option<&'static str> {
        if self.profile.is_some() {
            Some("--profile")
        } else if self.perf_map.is_some() {
            Some("--perf-map")
        } else {
            None
        }
    }

    /// Checks what depends on several options.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory) {
            return Err(ConfigError::Memory(self.memory));
        }
        if self.console_on_stdio() && self.serial == SerialConfig::Stdio {
            return Err(ConfigError::TwoConsoles);
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.cpus > 1 && self.perf_map.is_some() {
            return Err(ConfigError::PerfMapCpus);
        }
        Ok(())
    }
}

/// Reads a configuration file.
///
/// # Errors
/// When it cannot be read or something in it makes no sense.
pub fn read_file(path: &Path) -> Result<FileConfig, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| {
        ConfigError::File(name.clone(), format!("which cannot be read ({e}): check the path and its permissions"))
    })?;
    FileConfig::parse(&name, &text).map_err(|why| ConfigError::File(name, why))
}

/// Reads a size: a number with an optional K, M or G (powers of 1024), a whole number of MiB.
///
/// # Errors
/// When it is none.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let error = || ConfigError::Size(text.to_owned());
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let n: u64 = digits.parse().map_err(|_| error())?;
    let bytes = n.checked_mul(1 << shift).ok_or_else(error)?;
    if bytes % (1 << 20) != 0 {
        return Err(error());
    }
    Ok(bytes)
}

/// Reads when guest processes get windows.
///
/// # Errors
/// When it is none of the three words.
pub fn parse_windows(text: &str) -> Result<Windows, ConfigError> {
    match text {
        "off" => Ok(Windows::Off),
        "auto" => Ok(Windows::Auto),
        "always" => Ok(Windows::Always),
        _ => Err(ConfigError::Windows(text.to_owned())),
    }
}

/// Reads where local APICs are on KVM.
///
/// # Errors
/// When it is none of the three words.
pub fn parse_irqchip(text: &str) -> Result<IrqChip, ConfigError> {
    match text {
        "auto" => Ok(IrqChip::Auto),
        "user" => Ok(IrqChip::User),
        "split" => Ok(IrqChip::Split),
        _ => Err(ConfigError::IrqChip(text.to_owned())),
    }
}

/// Reads what is offered of the paravirtual interfaces.
///
/// # Errors
/// When it is none of the three words.
pub fn parse_pv(text: &str) -> Result<Offer, ConfigError> {
    match text {
        "off" => Ok(Offer::Off),
        "auto" => Ok(Offer::Auto),
        "all" => Ok(Offer::All),
        _ => Err(ConfigError::Pv(text.to_owned())),
    }
}

/// Reads what becomes of the names for perf.
///
/// # Errors
/// When it is neither word.
pub fn parse_perf_map(text: &str) -> Result<PerfMap, ConfigError> {
    match text {
        "remove" => Ok(PerfMap::Remove),
        "keep" => Ok(PerfMap::Keep),
        _ => Err(ConfigError::PerfMap(text.to_owned())),
    }
}

/// Reads the name of an engine.
///
/// # Errors
/// When there is none of that name.
pub fn parse_engine(text: &str) -> Result<EngineKind, ConfigError> {
    match text {
        "auto" => Ok(EngineKind::Auto),
        "bt" => Ok(EngineKind::Bt),
        "kvm" => Ok(EngineKind::Kvm),
        _ => Err(ConfigError::Engine(text.to_owned())),
    }
}

/// Reads where the serial port goes.
///
/// # Errors
/// When it is none of the known places.
pub fn parse_serial(text: &str) -> Result<SerialConfig, ConfigError> {
    match (text, text.strip_prefix("file=")) {
        ("stdio", _) => Ok(SerialConfig::Stdio),
        ("null", _) => Ok(SerialConfig::Null),
        (_, Some(path)) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
        _ => Err(ConfigError::Serial(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        assert_eq!(parse_size("2097152"), Ok(2 << 20));
        for bad in ["", "M", "12X", "-1M", "1.5G", "99999999999G", "1000"] {
            assert_eq!(parse_size(bad), Err(ConfigError::Size(bad.into())));
        }
    }

    #[test]
    fn words() {
        assert_eq!(parse_serial("file=/x"), Ok(SerialConfig::File("/x".into())));
        assert!(parse_serial("file=").is_err() && parse_serial("tty").is_err());
        assert!(parse_engine("tcg").is_err());
    }
}
