//! The virtio devices that a user asks for: made from their configuration and put into the machine.

mod net;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use std::io::Write;
use virtio::Device;
use virtio::devices::balloon::{Balloon, BalloonControl};
use virtio::devices::block::image::{Image, OpenImage, Qcow2Image, Raw};
use virtio::devices::block::{Block, BlockOptions, MAX_QUEUES, SERIAL_LEN};
use virtio::devices::console::{Console, Port, PortInput};
use virtio::devices::entropy::Entropy;
use virtio::devices::fs::{self, Fs};
use virtio::devices::vsock::Vsock;

use crate::chipset::{Chipset, MmioSlot};
use crate::config::devices::{DevicesConfig, DiskConfig, DiskFormat, FsConfig, TransportKind};
use crate::memory::GuestRam;

/// Columns and rows of a console about which nothing is known.
const SCREEN: (u16, u16) = (80, 25);

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PeripheralError {
    /// A file of a device cannot be used.
    #[error("the {what} \"{path}\" cannot be used ({why}); check the path and its permissions")]
    File {
        /// What it is to the device.
        what: &'static str,
        /// Its path.
        path: String,
        /// The host's reason.
        why: io::Error,
    },
    /// A number of queues that is not possible.
    #[error("a {0} cannot have {1} queues; give it from 1 to {2}")]
    Queues(&'static str, u16, u16),
    /// A serial number that does not fit.
    #[error("the serial number \"{0}\" is too long; a disk's has at most {max} bytes", max = SERIAL_LEN)]
    Serial(String),
    /// A network card's options or its other end.
    #[error("a network card cannot be made: {0}")]
    Net(String),
    /// A context ID that is not a guest's.
    #[error("a guest cannot have the context ID {0}; give it 3 or more")]
    Cid(u32),
    /// A shared folder's name that does not fit.
    #[error("\"{0}\" cannot be the tag of a shared folder; give it from 1 to {max} bytes", max = fs::TAG_LEN)]
    Tag(String),
    /// Two shared folders of one name.
    #[error("two shared folders have the tag \"{0}\"; give each its own")]
    TagTwice(String),
    /// No room, thread or descriptor.
    #[error("a device cannot be added ({0}); leave some devices out or raise the host's limits")]
    Host(io::Error),
}

/// What became of the devices.
#[derive(Default)]
pub struct Placed {
    /// Where the console's input is to go, if there is one.
    pub console: Option<PortInput>,
    /// Where the memory-mapped ones are, for the DSDT.
    pub mmio: Vec<MmioSlot>,
    /// The way to the balloon, if there is one.
    pub balloon: Option<BalloonControl>,
}

/// Makes all devices and adds them to the machine, which has not started yet. A virtio console writes to `console`.
///
/// # Errors
/// See [`PeripheralError`].
pub fn add(
    cfg: &DevicesConfig,
    mem: &GuestRam,
    chipset: &Arc<Chipset>,
    console: Box<dyn Write + Send>,
) -> Result<Placed, PeripheralError> {
    let mut machine = Machine { mem, chipset, placed: Placed::default() };
    for disk in &cfg.disk {
        machine.add(Box::new(block(disk)?), disk.transport)?;
    }
    for (index, card) in cfg.net.iter().enumerate() {
        machine.add(Box::new(net::net(card, index)?), card.transport)?;
    }
    if let Some(rng) = &cfg.rng {
        let source = File::open(&rng.src).map_err(|e| file_error("source of entropy", &rng.src, e))?;
        machine.add(Box::new(Entropy::new(source)), rng.transport)?;
    }
    if let Some(c) = &cfg.console {
        let port = Port::new("org.paravane.console", console).map_err(PeripheralError::Host)?;
        machine.placed.console = Some(port.input());
        machine.add(Box::new(Console::new(vec![port], SCREEN)), c.transport)?;
    }
    if let Some(b) = &cfg.balloon {
        let balloon = Balloon::new(b.size, b.deflate_on_oom, b.free_page_reporting);
        machine.placed.balloon = Some(balloon.control());
        machine.add(Box::new(balloon), b.transport)?;
    }
    if let Some(v) = &cfg.vsock {
        if v.cid < 3 || v.cid == u32::MAX {
            return Err(PeripheralError::Cid(v.cid));
        }
        let device = Vsock::new(v.cid, &v.socket).map_err(|e| file_error("vsock socket", &v.socket, e))?;
        machine.add(Box::new(device), v.transport)?;
    }
    for (index, shared) in cfg.fs.iter().enumerate() {
        if cfg.fs[..index].iter().any(|other| other.tag == shared.tag) {
            return Err(PeripheralError::TagTwice(shared.tag.clone()));
        }
        machine.add(Box::new(folder(shared)?), shared.transport)?;
    }
    Ok(machine.placed)
}

struct Machine<'a> {
    mem: &'a GuestRam,
    chipset: &'a Arc<Chipset>,
    placed: Placed,
}

impl Machine<'_> {
    fn add(&mut self, device: Box<dyn Device>, transport: TransportKind) -> Result<(), PeripheralError> {
        let mem = self.mem.clone();
        match transport {
            TransportKind::Pci => self.chipset.add_virtio_pci(device, mem),
            TransportKind::Mmio => self.chipset.add_virtio_mmio(device, mem).map(|slot| self.placed.mmio.push(slot)),
            TransportKind::Pv => self.chipset.add_virtio_pv(device, mem),
        }
        .map_err(PeripheralError::Host)
    }
}

fn block(cfg: &DiskConfig) -> Result<Block, PeripheralError> {
    if cfg.queues == 0 || cfg.queues > MAX_QUEUES {
        return Err(PeripheralError::Queues("disk", cfg.queues, MAX_QUEUES));
    }
    if let Some(serial) = cfg.serial.as_ref().filter(|s| s.len() > SERIAL_LEN) {
        return Err(PeripheralError::Serial(serial.clone()));
    }
    let how = OpenImage { readonly: cfg.readonly, direct: cfg.direct, backing: cfg.backing };
    let image: io::Result<Box<dyn Image>> = match cfg.format {
        None | Some(DiskFormat::Raw) => Raw::open(&cfg.path, how).map(|i| Box::new(i) as _),
        Some(DiskFormat::Qcow2) => Qcow2Image::open(&cfg.path, how).map(|i| Box::new(i) as _),
    };
    let image = image.map_err(|e| file_error("disk", &cfg.path, e))?;
    let serial = cfg.serial.clone().unwrap_or_default();
    Ok(Block::new(image, &BlockOptions { readonly: cfg.readonly, serial, queues: cfg.queues }))
}

fn folder(cfg: &FsConfig) -> Result<Fs, PeripheralError> {
    if cfg.queues == 0 || cfg.queues > fs::MAX_QUEUES {
        return Err(PeripheralError::Queues("shared folder", cfg.queues, fs::MAX_QUEUES));
    }
    if cfg.tag.is_empty() || cfg.tag.len() > fs::TAG_LEN {
        return Err(PeripheralError::Tag(cfg.tag.clone()));
    }
    Fs::new(&cfg.path, &cfg.tag, cfg.readonly, cfg.queues).map_err(|e| file_error("shared folder", &cfg.path, e))
}

fn file_error(what: &'static str, path: &Path, why: io::Error) -> PeripheralError {
    PeripheralError::File { what, path: path.display().to_string(), why }
}
