//! What all transports have in common: the device status machine, feature negotiation, queue set-up, activation and reset (virtio
//! 1.2, sections 2.1, 2.2 and 3.1).
//!
//! A transport keeps a [`Front`] under a lock, translates its registers into calls of it, and supplies an [`Interrupt`]. Notifications
//! go past the lock: [`Notifier::notify`] rings the queue's bell, from any thread.

pub mod mmio;
pub mod pci;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use paravane_ram::GuestRam;

use crate::device::status;
use crate::{Activation, Device, DeviceId, Doorbell, Interrupt, Queue, QueueSetup, Signal, feature};

/// Rings the bells of a device's queues. Cheap to clone; no lock is taken.
#[derive(Clone)]
pub struct Notifier(Arc<[Arc<Doorbell>]>);

impl Notifier {
    /// The driver notifies a queue; a number that there is not is dropped.
    pub fn notify(&self, queue: u16) {
        if let Some(bell) = self.0.get(usize::from(queue)) {
            bell.ring();
        }
    }

    /// The driver notifies all queues.
    pub fn notify_all(&self) {
        for bell in self.0.iter() {
            bell.ring();
        }
    }

    /// The bell of a queue, for a transport that has the host ring it (KVM's ioeventfd).
    pub fn bell(&self, queue: u16) -> Option<&Arc<Doorbell>> {
        self.0.get(usize::from(queue))
    }
}

/// A device with the part of its registers that every transport has.
pub struct Front {
    device: Box<dyn Device>,
    mem: GuestRam,
    signal: Signal,
    notifier: Notifier,
    queues: Vec<QueueSetup>,
    acknowledged: u64,
    active: bool,
}

impl Front {
    /// A device after reset.
    ///
    /// # Errors
    /// When the host has no descriptors for the queues' bells.
    pub fn new(device: Box<dyn Device>, mem: GuestRam, interrupt: Arc<dyn Interrupt>) -> io::Result<Self> {
        let queues: Vec<_> = device.queue_sizes().into_iter().map(QueueSetup::new).collect();
        let notifier = Notifier(Doorbell::many(queues.len())?.into());
        Ok(Self { device, mem, signal: Signal::new(interrupt), notifier, queues, acknowledged: 0, active: false })
    }

    /// What it is.
    pub fn id(&self) -> DeviceId {
        self.device.id()
    }

    /// The way to ring its bells.
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// The device's way to the driver, for a device that has something to say before it is active.
    pub fn signal(&self) -> Signal {
        self.signal.clone()
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Offered features.
    pub fn features(&self) -> u64 {
        self.device.features() | feature::COMMON
    }

    /// Features that the driver has acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// The driver acknowledges 32 feature bits; `word` 0 is the lower half. Too late once FEATURES_OK is set.
    pub fn acknowledge(&mut self, word: u32, bits: u32) {
        if self.status() & status::FEATURES_OK != 0 || word > 1 {
            return;
        }
        let shift = 32 * word;
        self.acknowledged = self.acknowledged & !(0xffff_ffff << shift) | u64::from(bits) << shift;
    }

    /// Device status (section 2.1).
    pub fn status(&self) -> u8 {
        self.signal.0.status.load(SeqCst)
    }

    /// Counts the changes of the configuration space.
    pub fn generation(&self) -> u32 {
        self.signal.0.generation.load(SeqCst)
    }

    /// The driver writes the device status. Zero resets; a bit once set is cleared by nothing else (section 2.1.1).
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let before = self.status();
        let mut set = value & !before & !status::NEEDS_RESET;
        if set & status::FEATURES_OK != 0 && !self.acceptable() {
            set &= !status::FEATURES_OK;
        }
        let ready = set & status::DRIVER_OK != 0;
        if ready && (before | set) & status::FEATURES_OK == 0 {
            // A driver that goes on without features has not understood the device.
            set &= !status::DRIVER_OK;
            self.signal.0.status.fetch_or(set, SeqCst);
            self.signal.needs_reset();
            return;
        }
        self.signal.0.status.fetch_or(set, SeqCst);
        if ready && before & status::NEEDS_RESET == 0 {
            self.activate();
        }
    }

    fn acceptable(&self) -> bool {
        self.acknowledged & !self.features() == 0 && self.acknowledged & feature::VERSION_1 != 0
    }

    fn activate(&mut self) {
        let mut queues = Vec::new();
        for (n, setup) in self.queues.iter().enumerate().filter(|(_, q)| q.enabled) {
            let bell = self.notifier.0[n].clone();
            bell.clear();
            match Queue::new(n as u16, setup, self.acknowledged, self.mem.clone(), bell, self.signal.clone()) {
                Ok(q) => queues.push(q),
                Err(_) => return self.signal.needs_reset(),
            }
        }
        self.active = true;
        let with =
            Activation { features: self.acknowledged, mem: self.mem.clone(), queues, signal: self.signal.clone() };
        if self.device.activate(with).is_err() {
            self.device.reset();
            self.signal.needs_reset();
        }
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        self.acknowledged = 0;
        for q in &mut self.queues {
            *q = QueueSetup::new(q.max_size);
        }
        self.signal.0.status.store(0, SeqCst);
    }

    /// A queue's set-up.
    pub fn queue(&self, index: u16) -> Option<&QueueSetup> {
        self.queues.get(usize::from(index))
    }

    /// A queue's set-up for change; `None` for a queue that there is not or whose device runs already (section 4.1.4.3.2: a driver configures
    /// queues before it enables them).
    pub fn queue_mut(&mut self, index: u16) -> Option<&mut QueueSetup> {
        if self.active {
            return None;
        }
        self.queues.get_mut(usize::from(index)).filter(|q| !q.enabled)
    }

    /// Enables a queue.
    pub fn enable_queue(&mut self, index: u16) {
        if let Some(q) = self.queue_mut(index) {
            q.enabled = true;
        }
    }

    /// Disables a queue, which the memory-mapped transport has (section 4.2.2.2): when this returns, its memory is the driver's again. A
    /// device does not go on with a part of its queues: one that runs is stopped as a whole, and waits for a reset, which is what drivers do
    /// next.
    pub fn disable_queue(&mut self, index: u16) {
        let Some(q) = self.queues.get_mut(usize::from(index)).filter(|q| q.enabled) else { return };
        q.enabled = false;
        if self.active {
            self.device.reset();
            self.signal.needs_reset();
        }
    }

    /// Reads the device's configuration space.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.device.config_read(offset, data);
    }

    /// Writes the device's configuration space.
    pub fn config_write(&mut self, offset: u64, data: &[u8]) {
        self.device.config_write(offset, data);
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// Replaces one half of an address.
pub(crate) fn set_half(address: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

/// A register access of at most eight bytes as a number.
pub(crate) fn number(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |n, &b| n << 8 | u64::from(b))
}
