//! A driver's side of a queue in memory, for tests: also one that does everything wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use paravane_ram::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{Activation, Device, Doorbell, Interrupt, Queue, QueueSetup, Signal, feature};

/// Two regions with a hole between them: 1 MiB at 0, 8 MiB at 2 MiB.
pub(crate) fn ram() -> GuestRam {
    let parts = [(GuestAddress(0), 1 << 20), (GuestAddress(2 << 20), 8 << 20)];
    Arc::new(GuestMemoryMmap::from_ranges(&parts).unwrap())
}

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Count {
    pub(crate) queue: AtomicU32,
    pub(crate) config: AtomicU32,
}

impl Interrupt for Count {
    fn queue(&self, _index: u16) {
        self.queue.fetch_add(1, SeqCst);
    }
    fn config(&self) {
        self.config.fetch_add(1, SeqCst);
    }
}

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A driver with one queue of `size` entries at fixed places from `base` on.
pub(crate) struct Driver {
    pub(crate) mem: GuestRam,
    pub(crate) base: u64,
    pub(crate) size: u16,
    pub(crate) offered: u16,
    pub(crate) seen: u16,
    pub(crate) bell: Arc<Doorbell>,
}

impl Driver {
    pub(crate) fn new(mem: &GuestRam, base: u64, size: u16) -> Self {
        Self { mem: mem.clone(), base, size, offered: 0, seen: 0, bell: Arc::new(Doorbell::new().unwrap()) }
    }

    pub(crate) fn setup(&self) -> QueueSetup {
        QueueSetup {
            max_size: self.size,
            size: self.size,
            enabled: true,
            descriptors: self.base,
            available: self.base + 0x4000,
            used: self.base + 0x6000,
        }
    }

    pub(crate) fn queue(&self, index: u16, features: u64, signal: &Signal) -> Queue {
        Queue::new(index, &self.setup(), features, self.mem.clone(), self.bell.clone(), signal.clone()).unwrap()
    }

    pub(crate) fn put<T: vm_memory::ByteValued>(&self, at: u64, v: T) {
        self.mem.write_obj(v, GuestAddress(at)).unwrap();
    }

    pub(crate) fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn descriptor_at(&self, table: u64, n: u16, at: u64, len: u32, flags: u16, next: u16) {
        let d = table + 16 * u64::from(n);
        self.put(d, at);
        self.put(d + 8, len);
        self.put(d + 12, flags);
        self.put(d + 14, next);
    }

    pub(crate) fn descriptor(&self, n: u16, at: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.base, n, at, len, flags, next);
    }

    /// A chain of buffers from descriptor `first` on: (address, length, writable).
    pub(crate) fn chain(&self, first: u16, parts: &[(u64, u32, bool)]) {
        for (n, &(at, len, writable)) in parts.iter().enumerate() {
            let here = first + n as u16;
            let more = if n + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(here, at, len, more | if writable { WRITE } else { 0 }, here + 1);
        }
    }

    /// Offers the chain that starts at `head`, and notifies.
    pub(crate) fn offer(&mut self, head: u16) {
        self.put(self.base + 0x4000 + 4 + 2 * u64::from(self.offered % self.size), head);
        self.offered = self.offered.wrapping_add(1);
        self.mem.store(self.offered, GuestAddress(self.base + 0x4002), std::sync::atomic::Ordering::Release).unwrap();
        self.bell.ring();
    }

    /// The next used element, if there is one: head and length.
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.mem.load(GuestAddress(self.base + 0x6002), std::sync::atomic::Ordering::Acquire).unwrap();
        if index == self.seen {
            return None;
        }
        let at = self.base + 0x6004 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((self.get(at), self.get(at + 4)))
    }

    /// Waits for the next used element.
    pub(crate) fn wait(&mut self) -> (u32, u32) {
        let began = Instant::now();
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "the device does not answer");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not come to pass that {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Activates a device with one driver per queue; gives the way that the device was given.
pub(crate) fn activate(device: &mut dyn Device, drivers: &[&Driver], features: u64) -> (Signal, Arc<Count>) {
    let count = Arc::new(Count::default());
    let signal = Signal::new(count.clone());
    signal.0.status.store(0xf, SeqCst);
    let features = features | feature::COMMON;
    let queues = drivers.iter().enumerate().map(|(n, d)| d.queue(n as u16, features, &signal)).collect();
    let mem = drivers[0].mem.clone();
    device.activate(Activation { features, mem, queues, signal: signal.clone() }).unwrap();
    (signal, count)
}
