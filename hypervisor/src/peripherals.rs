//! The virtio devices that a user asks for: made from their configuration and put into the machine.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio::Device;
use virtio::devices::entropy::Entropy;

use crate::chipset::{Chipset, MmioSlot};
use crate::config::devices::{DevicesConfig, TransportKind};
use crate::memory::GuestRam;

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
    /// No room, thread or descriptor.
    #[error("a device cannot be added ({0}); leave some devices out or raise the host's limits")]
    Host(io::Error),
}

/// Where the devices came to be, for the DSDT.
#[derive(Clone, Debug, Default)]
pub struct Placed {
    /// Memory-mapped ones.
    pub mmio: Vec<MmioSlot>,
}

/// Makes all devices and adds them to the machine, which has not started yet.
///
/// # Errors
/// See [`PeripheralError`].
pub fn add(cfg: &DevicesConfig, mem: &GuestRam, chipset: &Arc<Chipset>) -> Result<Placed, PeripheralError> {
    let mut machine = Machine { mem, chipset, placed: Placed::default() };
    if let Some(rng) = &cfg.rng {
        let source = File::open(&rng.src).map_err(|e| file_error("source of entropy", &rng.src, e))?;
        machine.add(Box::new(Entropy::new(source)), rng.transport)?;
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

fn file_error(what: &'static str, path: &Path, why: io::Error) -> PeripheralError {
    PeripheralError::File { what, path: path.display().to_string(), why }
}
