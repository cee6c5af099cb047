//! The memory-mapped transport, version 2 (virtio 1.2, section 4.2).
//!
//! One page of registers and one level-triggered interrupt per device. All registers are 32 bits wide and aligned; other accesses to them read as
//! zero and write nothing. The configuration space, from 0x100 on, takes accesses of any size.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use paravane_ram::GuestRam;

use super::{Front, Notifier, number, set_half};
use crate::{Device, Interrupt};

/// Bytes of the register window.
pub const WINDOW: u64 = 0x1000;

const MAGIC: u32 = 0x7472_6976;
const VENDOR: u32 = u32::from_le_bytes(*b"PARV");

const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const CONFIG: u64 = 0x100;

/// Drives the device's interrupt line; called from any thread, must not block.
pub type Line = Box<dyn Fn(bool) + Send + Sync>;

/// Tells the driver of an event; called from any thread, must not block.
pub type Edge = Box<dyn Fn() + Send + Sync>;

/// How a device's interrupt reaches the driver.
enum Wire {
    /// A level: up while the driver has not acknowledged all causes.
    Level(Mutex<Line>),
    /// Every event by itself: the driver need neither read nor acknowledge the causes.
    Edge(Edge),
}

struct LineInterrupt {
    /// Bit 0: used buffers; bit 1: configuration change.
    status: AtomicU32,
    wire: Wire,
}

impl LineInterrupt {
    fn raise(&self, bit: u32) {
        let before = self.status.fetch_or(bit, SeqCst);
        match &self.wire {
            Wire::Edge(edge) => edge(),
            Wire::Level(_) if before == 0 => self.drive(),
            Wire::Level(_) => {}
        }
    }

    fn acknowledge(&self, bits: u32) {
        if self.status.fetch_and(!bits, SeqCst) & !bits == 0 {
            self.drive();
        }
    }

    /// Brings the line in agreement with the status, under a lock so that the last to come here reads the last status.
    fn drive(&self) {
        if let Wire::Level(line) = &self.wire {
            let line = line.lock().unwrap_or_else(PoisonError::into_inner);
            line(self.status.load(SeqCst) != 0);
        }
    }
}

impl Interrupt for LineInterrupt {
    fn queue(&self, _index: u16) {
        self.raise(1);
    }
    fn config(&self) {
        self.raise(2);
    }
}

struct Registers {
    front: Front,
    feature_word: u32,
    driver_word: u32,
    queue: u16,
}

/// A device behind memory-mapped registers.
pub struct MmioTransport {
    registers: Mutex<Registers>,
    interrupt: Arc<LineInterrupt>,
    notifier: Notifier,
}

impl MmioTransport {
    /// Puts a device behind registers.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(device: Box<dyn Device>, mem: GuestRam, line: Line) -> io::Result<Self> {
        Self::wired(device, mem, Wire::Level(Mutex::new(line)))
    }

    /// The same registers reached otherwise, with events instead of an interrupt line. The causes in InterruptStatus gather until the driver
    /// acknowledges them, which it may leave.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn with_events(device: Box<dyn Device>, mem: GuestRam, edge: Edge) -> io::Result<Self> {
        Self::wired(device, mem, Wire::Edge(edge))
    }

    fn wired(device: Box<dyn Device>, mem: GuestRam, wire: Wire) -> io::Result<Self> {
        let interrupt = Arc::new(LineInterrupt { status: AtomicU32::new(0), wire });
        let front = Front::new(device, mem, interrupt.clone())?;
        let notifier = front.notifier();
        let registers = Registers { front, feature_word: 0, driver_word: 0, queue: 0 };
        Ok(Self { registers: Mutex::new(registers), interrupt, notifier })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads registers at an offset of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            return self.registers().front.config_read(offset - CONFIG, data);
        }
        data.fill(0);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        if offset == INTERRUPT_STATUS {
            return self.interrupt.status.load(SeqCst);
        }
        let r = self.registers();
        let queue = r.front.queue(r.queue);
        match offset {
            0x00 => MAGIC,
            0x04 => 2,
            0x08 => r.front.id() as u32,
            0x0c => VENDOR,
            0x10 => r.front.features().checked_shr(32 * r.feature_word).unwrap_or(0) as u32,
            0x34 => queue.map_or(0, |q| u32::from(q.max_size)),
            0x44 => queue.map_or(0, |q| u32::from(q.enabled)),
            0x70 => u32::from(r.front.status()),
            0xfc => r.front.generation(),
            // No shared memory regions: length -1 (section 4.2.2).
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            _ => 0,
        }
    }

    /// Writes registers at an offset of the window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            return self.registers().front.config_write(offset - CONFIG, data);
        }
        if data.len() != 4 {
            return;
        }
        let value = number(data) as u32;
        match offset {
            QUEUE_NOTIFY => self.notifier.notify(value as u16),
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            _ => self.write_register(offset, value),
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut r = self.registers();
        let index = r.queue;
        match offset {
            0x14 => r.feature_word = value.min(2),
            0x20 => {
                let word = r.driver_word;
                r.front.acknowledge(word, value);
            }
            0x24 => r.driver_word = value.min(2),
            0x30 => r.queue = u16::try_from(value).unwrap_or(u16::MAX),
            0x44 if value & 1 != 0 => r.front.enable_queue(index),
            0x44 => r.front.disable_queue(index),
            0x70 => {
                r.front.set_status(value as u8);
                if value == 0 {
                    (r.feature_word, r.driver_word, r.queue) = (0, 0, 0);
                    self.interrupt.acknowledge(u32::MAX);
                }
            }
            _ => {
                let Some(q) = r.front.queue_mut(index) else { return };
                match offset {
                    0x38 => q.size = u16::try_from(value).unwrap_or(0),
                    0x80 | 0x84 => set_half(&mut q.descriptors, offset == 0x84, value),
                    0x90 | 0x94 => set_half(&mut q.available, offset == 0x94, value),
                    0xa0 | 0xa4 => set_half(&mut q.used, offset == 0xa4, value),
                    _ => {}
                }
            }
        }
    }

    /// Where notifications go, past the registers.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Ends the device's threads, whatever the driver thinks.
    pub fn shut_down(&self) {
        self.registers().front.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::status;
    use crate::devices::entropy::Entropy;
    use crate::testkit::{Driver, eventually, ram};
    use std::sync::atomic::AtomicBool;

    struct Machine {
        mem: GuestRam,
        line: Arc<AtomicBool>,
        transport: MmioTransport,
    }

    fn machine() -> Machine {
        let (mem, line) = (ram(), Arc::new(AtomicBool::new(false)));
        let device = Box::new(Entropy::new(std::fs::File::open("/dev/urandom").unwrap()));
        let wire = line.clone();
        let transport = MmioTransport::new(device, mem.clone(), Box::new(move |up| wire.store(up, SeqCst))).unwrap();
        Machine { mem, line, transport }
    }

    impl Machine {
        fn get(&self, offset: u64) -> u32 {
            let mut b = [0; 4];
            self.transport.read(offset, &mut b);
            u32::from_le_bytes(b)
        }
        fn set(&self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }
        fn start(&self, d: &Driver) {
            self.set(0x70, 0);
            self.set(0x70, 1);
            self.set(0x70, 3);
            self.set(0x24, 1);
            self.set(0x20, 1);
            self.set(0x70, 0xb);
            self.set(0x38, u32::from(d.size));
            self.set(0x80, d.base as u32);
            self.set(0x90, d.base as u32 + 0x4000);
            self.set(0xa0, d.base as u32 + 0x6000);
            self.set(0x44, 1);
            self.set(0x70, 0xf);
        }
    }

    #[test]
    fn a_driver_finds_negotiates_and_uses_the_device() {
        let m = machine();
        assert_eq!((m.get(0), m.get(4), m.get(8)), (MAGIC, 2, 4));
        m.set(0x14, 1);
        assert_eq!(m.get(0x10), 1);
        m.set(0x14, 2);
        assert_eq!(m.get(0x10), 0);
        m.set(0x14, 7);
        assert_eq!((m.get(0x10), m.get(0x34), m.get(0x44)), (0, 64, 0));
        let mut d = Driver::new(&m.mem, 0x1_0000, 16);
        m.start(&d);
        assert_eq!((m.get(0x70), m.get(0x44)), (0xf, 1));
        d.chain(0, &[(0x3000, 64, true)]);
        d.offer(0);
        m.set(0x50, 0);
        assert_eq!(d.wait(), (0, 64));
        eventually("the line rises", || m.line.load(SeqCst));
        assert_eq!(m.get(0x60), 1);
        m.set(0x64, 1);
        assert!(!m.line.load(SeqCst) && m.get(0x60) == 0);
        // A reset takes everything back.
        m.set(0x70, 0);
        assert_eq!((m.get(0x70), m.get(0x44), m.get(0x60)), (0, 0, 0));
        m.set(0x30, 1);
        assert_eq!(m.get(0x34), 0, "there is no queue 1");
    }

    #[test]
    fn events_come_one_by_one_whether_acknowledged_or_not() {
        let (mem, events) = (ram(), Arc::new(AtomicU32::new(0)));
        let device = Box::new(Entropy::new(std::fs::File::open("/dev/urandom").unwrap()));
        let count = events.clone();
        let edge = Box::new(move || {
            count.fetch_add(1, SeqCst);
        });
        let transport = MmioTransport::with_events(device, mem.clone(), edge).unwrap();
        let m = Machine { mem, line: Arc::default(), transport };
        let mut d = Driver::new(&m.mem, 0x1_0000, 16);
        m.start(&d);
        for round in 1..4 {
            d.chain(0, &[(0x3000, 64, true)]);
            d.offer(0);
            m.transport.notifier().notify_all();
            assert_eq!(d.wait(), (0, 64));
            eventually("the event comes", || events.load(SeqCst) == round);
            assert_eq!(m.get(0x60), 1);
        }
    }

    #[test]
    fn features_that_were_not_offered_or_the_lack_of_version_1_are_refused() {
        for (low, high) in [(0, 0), (1, 1), (1 << 28, 0)] {
            let m = machine();
            m.set(0x70, 3);
            m.set(0x20, low);
            m.set(0x24, 1);
            m.set(0x20, high);
            m.set(0x70, 0xb);
            assert_eq!(m.get(0x70), 3, "{low:#x} {high:#x}");
            m.set(0x70, 0xf);
            assert_eq!(m.get(0x70) as u8 & (status::DRIVER_OK | status::NEEDS_RESET), status::NEEDS_RESET);
        }
    }

    #[test]
    fn a_queue_outside_memory_or_missing_asks_for_a_reset() {
        let m = machine();
        m.start(&Driver::new(&m.mem, 0x1ff_0000, 16));
        assert_eq!(m.get(0x70), 0x4f);
        m.set(0x70, 0);
        m.set(0x70, 3);
        m.set(0x24, 1);
        m.set(0x20, 1);
        m.set(0x70, 0xb);
        m.set(0x70, 0xf);
        assert_eq!((m.get(0x70), m.get(0x60)), (0x4f, 2));
        // And it works after one.
        let mut d = Driver::new(&m.mem, 0x1_0000, 16);
        m.start(&d);
        d.chain(0, &[(0x3000, 64, true)]);
        d.offer(0);
        m.set(0x50, 0);
        assert_eq!(d.wait(), (0, 64));
    }

    #[test]
    fn a_running_queue_stays_where_it_is() {
        let m = machine();
        let mut d = Driver::new(&m.mem, 0x1_0000, 16);
        m.start(&d);
        m.set(0x80, 0xffff_f000);
        m.set(0x38, 1);
        d.chain(0, &[(0x3000, 64, true)]);
        d.offer(0);
        m.set(0x50, 0xffff_ffff);
        m.set(0x50, 0);
        assert_eq!(d.wait(), (0, 64));
        // Until the driver takes it away, and reads that it has.
        m.set(0x44, 0);
        assert_eq!((m.get(0x44), m.get(0x70)), (0, 0x4f));
        d.offer(0);
        m.set(0x50, 0);
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(d.used(), None);
        let mut d = Driver::new(&m.mem, 0x3_0000, 16);
        m.start(&d);
        d.chain(0, &[(0x3000, 64, true)]);
        d.offer(0);
        m.set(0x50, 0);
        assert_eq!(d.wait(), (0, 64));
    }
}
