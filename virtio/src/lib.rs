//! Virtio devices (virtio 1.2), for any engine and over any transport.
//!
//! Three layers, each of which knows only the one below:
//!
//! 1. [`transport`]: how a guest finds a device, negotiates, and says where its queues are: PCI ([`transport::pci`]), memory-mapped registers
//!    ([`transport::mmio`]), or others. What all transports have in common (the status machine, feature negotiation, queue set-up, activation,
//!    reset) is [`transport::Front`].
//! 2. [`Device`]: what a device is to a transport. A device hears of its queues when the driver is ready, and serves them on threads of
//!    its own ([`Worker`]); the vCPU that notifies does no more than ring a [`Doorbell`].
//! 3. [`Queue`] and [`Chain`]: the rings in guest memory. They check every address, index and length that the guest
//!    supplies; what is wrong comes out as a [`QueueError`], upon which a device asks for a reset ([`Signal::needs_reset`], virtio
//!    1.2, section 2.1.1) and stops serving, while the machine and all other devices go on.
//!
//! Guest memory is [`paravane_ram::GuestRam`], so translated code learns of what devices write.

mod chain;
mod device;
pub mod devices;
mod doorbell;
pub mod fuzz;
mod queue;
pub mod transport;
mod worker;

pub use chain::{Chain, Short};
pub use device::{ActivateError, Activation, Device, DeviceId, Interrupt, Signal, feature, read_config, status};
pub use doorbell::Doorbell;
pub use queue::{Queue, QueueError, QueueSetup};
pub use worker::{Stop, Wake, Worker, poll_fd};

#[cfg(test)]
mod testkit;
