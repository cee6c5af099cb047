//! The PCI transport of modern devices (virtio 1.2, section 4.1): configuration space, one memory BAR, MSI-X, and INTx for drivers
//! without.
//!
//! The BAR's layout, one structure per page so that a host can trap or map each on its own:
//!
//! | offset | structure |
//! |---|---|
//! | 0x0000 | common configuration (section 4.1.4.3) |
//! | 0x1000 | ISR status (section 4.1.4.5) |
//! | 0x2000 | device configuration |
//! | 0x3000 | notifications, four bytes for each queue (section 4.1.4.4) |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |

use std::io;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use paravane_ram::GuestRam;

use super::{Front, Notifier, number, set_half};
use crate::{Device, DeviceId, Interrupt};

/// Size of the BAR in bytes.
pub const BAR_SIZE: u64 = 0x8000;

const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x5000;
const NO_VECTOR: u16 = 0xffff;
/// Most MSI-X vectors: their pending bits are one word.
const MAX_VECTORS: u16 = 64;

const VENDOR: u16 = 0x1af4;
/// Offsets of the capabilities in configuration space.
mod cap {
    pub(super) const COMMON: u8 = 0x40;
    pub(super) const ISR: u8 = 0x50;
    pub(super) const DEVICE: u8 = 0x60;
    pub(super) const NOTIFY: u8 = 0x70;
    pub(super) const WINDOW: u8 = 0x84;
    pub(super) const MSIX: u8 = 0x98;
}

/// What the transport needs of the machine. Called from any thread; must not block.
pub trait PciHost: Send + Sync {
    /// Sends a message-signalled interrupt (PCI Local Bus 3.0, section 6.8).
    fn msi(&self, address: u64, data: u32);
    /// Drives the function's INTA#.
    fn intx(&self, level: bool);
}

#[derive(Clone, Copy, Default)]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
}

/// Interrupt state: under a lock of its own, for devices raise interrupts while the transport's lock is held by a reset that waits for
/// them.
struct Msix {
    enabled: bool,
    function_mask: bool,
    intx_disabled: bool,
    table: Vec<Vector>,
    pending: u64,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

struct PciInterrupt {
    msix: Mutex<Msix>,
    isr: AtomicU8,
    host: Arc<dyn PciHost>,
}

impl PciInterrupt {
    fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self, vector: impl FnOnce(&Msix) -> u16, isr: u8) {
        let mut m = self.msix();
        if !m.enabled {
            self.isr.fetch_or(isr, SeqCst);
            return self.drive_line(&m);
        }
        let n = usize::from(vector(&m));
        let Some(v) = m.table.get(n).copied() else { return };
        if m.function_mask || v.masked {
            m.pending |= 1 << n;
        } else {
            self.host.msi(v.address, v.data);
        }
    }

    fn drive_line(&self, m: &Msix) {
        self.host.intx(!m.enabled && !m.intx_disabled && self.isr.load(SeqCst) != 0);
    }

    /// Sends what was pending and is not masked any more.
    fn send_pending(&self, m: &mut Msix) {
        if !m.enabled || m.function_mask || m.pending == 0 {
            return;
        }
        for (n, v) in m.table.iter().enumerate().filter(|(_, v)| !v.masked) {
            if m.pending >> n & 1 != 0 {
                m.pending &= !(1 << n);
                self.host.msi(v.address, v.data);
            }
        }
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        self.raise(|m| m.queue_vectors.get(usize::from(index)).copied().unwrap_or(NO_VECTOR), 1);
    }
    fn config(&self) {
        self.raise(|m| m.config_vector, 2);
    }
}

struct Registers {
    front: Front,
    feature_word: u32,
    driver_word: u32,
    queue: u16,
}

/// Registers of the configuration space that can be written, beside the capabilities'.
struct Config {
    command: u16,
    bar: u64,
    cache_line: u8,
    interrupt_line: u8,
    /// The access window of section 4.1.4.9: BAR, offset, length.
    window_bar: u8,
    window_offset: u32,
    window_length: u32,
}

/// A device as a PCI function.
pub struct PciTransport {
    id: DeviceId,
    vectors: u16,
    queues: u16,
    registers: Mutex<Registers>,
    config: Mutex<Config>,
    interrupt: Arc<PciInterrupt>,
    notifier: Notifier,
}

const COMMAND_MEMORY: u16 = 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const COMMAND_BITS: u16 = COMMAND_MEMORY | 1 | 4 | COMMAND_INTX_DISABLE;

impl PciTransport {
    /// Makes a device a PCI function whose BAR is at `bar` from the start, with memory decoding off.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(device: Box<dyn Device>, mem: GuestRam, host: Arc<dyn PciHost>, bar: u64) -> io::Result<Self> {
        let id = device.id();
        let queues = device.queue_sizes().len() as u16;
        // One for each queue and one for the configuration.
        let vectors = (queues + 1).min(MAX_VECTORS);
        let msix = Msix {
            enabled: false,
            function_mask: false,
            intx_disabled: false,
            table: vec![Vector { masked: true, ..Vector::default() }; usize::from(vectors)],
            pending: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; usize::from(queues)],
        };
        let interrupt = Arc::new(PciInterrupt { msix: Mutex::new(msix), isr: AtomicU8::new(0), host });
        let front = Front::new(device, mem, interrupt.clone())?;
        let notifier = front.notifier();
        let registers = Mutex::new(Registers { front, feature_word: 0, driver_word: 0, queue: 0 });
        let config = Mutex::new(Config {
            command: 0,
            bar: bar & !(BAR_SIZE - 1),
            cache_line: 0,
            interrupt_line: 0,
            window_bar: 0,
            window_offset: 0,
            window_length: 0,
        });
        Ok(Self { id, vectors, queues, registers, config, interrupt, notifier })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the BAR answers now (guest-physical address); `None` while memory decoding is off.
    pub fn bar(&self) -> Option<u64> {
        let c = self.config();
        (c.command & COMMAND_MEMORY != 0).then_some(c.bar)
    }

    /// Ends the device's threads, whatever the driver thinks.
    pub fn shut_down(&self) {
        self.registers().front.reset();
    }

    // ---- the BAR ----

    /// Reads at an offset of the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0..ISR => {
                let v = self.read_common(offset);
                let n = data.len().min(8);
                data[..n].copy_from_slice(&v.to_le_bytes()[..n]);
            }
            ISR => {
                let m = self.interrupt.msix();
                data[0] = self.interrupt.isr.swap(0, SeqCst);
                self.interrupt.drive_line(&m);
            }
            DEVICE..NOTIFY => self.registers().front.config_read(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PBA => self.read_table(offset - MSIX_TABLE, data),
            MSIX_PBA..BAR_SIZE => {
                crate::read_config(&self.interrupt.msix().pending.to_le_bytes(), offset - MSIX_PBA, data);
            }
            _ => {}
        }
    }

    /// Writes at an offset of the BAR.
    pub fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            NOTIFY..MSIX_TABLE => self.notifier.notify(((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as u16),
            0..ISR => self.write_common(offset, data),
            DEVICE..NOTIFY => self.registers().front.config_write(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PBA => self.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    /// The common configuration structure; registers are read at their own offset, as section 4.1.3.1 asks of drivers.
    fn read_common(&self, offset: u64) -> u64 {
        let r = self.registers();
        let queue = r.front.queue(r.queue);
        let half = |address: Option<u64>, high: bool| address.map_or(0, |a| if high { a >> 32 } else { a });
        match offset {
            0x00 => u64::from(r.feature_word),
            0x04 => r.front.features().checked_shr(32 * r.feature_word).unwrap_or(0) & 0xffff_ffff,
            0x08 => u64::from(r.driver_word),
            0x0c => r.front.acknowledged().checked_shr(32 * r.driver_word).unwrap_or(0) & 0xffff_ffff,
            0x10 => u64::from(self.interrupt.msix().config_vector) | u64::from(self.queues) << 16,
            0x12 => u64::from(self.queues),
            0x14 => u64::from(r.front.status()) | u64::from(r.front.generation() as u8) << 8 | u64::from(r.queue) << 16,
            0x15 => u64::from(r.front.generation() as u8),
            0x16 => u64::from(r.queue),
            // A queue that there is not has size zero.
            0x18 => queue.map_or(0, |q| u64::from(q.size)),
            0x1a => {
                let m = self.interrupt.msix();
                u64::from(m.queue_vectors.get(usize::from(r.queue)).copied().unwrap_or(NO_VECTOR))
            }
            0x1c => queue.map_or(0, |q| u64::from(q.enabled)) | u64::from(r.queue) << 16,
            0x1e => u64::from(r.queue),
            0x20 | 0x24 => half(queue.map(|q| q.descriptors), offset == 0x24),
            0x28 | 0x2c => half(queue.map(|q| q.available), offset == 0x2c),
            0x30 | 0x34 => half(queue.map(|q| q.used), offset == 0x34),
            _ => 0,
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let value = number(data);
        let low = value as u32;
        let mut r = self.registers();
        let index = r.queue;
        match offset {
            0x00 => r.feature_word = low.min(2),
            0x08 => r.driver_word = low.min(2),
            0x0c => {
                let word = r.driver_word;
                r.front.acknowledge(word, low);
            }
            0x10 => self.interrupt.msix().config_vector = self.vector(low as u16),
            0x14 => {
                r.front.set_status(value as u8);
                if value as u8 == 0 {
                    (r.feature_word, r.driver_word, r.queue) = (0, 0, 0);
                    self.reset_interrupts();
                }
            }
            0x16 => r.queue = low as u16,
            0x1a => {
                let vector = self.vector(low as u16);
                if let Some(v) = self.interrupt.msix().queue_vectors.get_mut(usize::from(index)) {
                    *v = vector;
                }
            }
            0x1c if low as u16 == 1 => r.front.enable_queue(index),
            0x18 | 0x20..0x38 => {
                let Some(q) = r.front.queue_mut(index) else { return };
                let address = match offset {
                    0x18 => {
                        q.size = low as u16;
                        return;
                    }
                    0x20 | 0x24 => &mut q.descriptors,
                    0x28 | 0x2c => &mut q.available,
                    0x30 | 0x34 => &mut q.used,
                    _ => return,
                };
                if data.len() == 8 && offset & 7 == 0 {
                    *address = value;
                } else if data.len() == 4 {
                    set_half(address, offset & 4 != 0, low);
                }
            }
            _ => {}
        }
    }

    /// A vector as the driver maps it: one that there is not maps to none (section 4.1.5.1.2).
    fn vector(&self, n: u16) -> u16 {
        if n < self.vectors { n } else { NO_VECTOR }
    }

    fn reset_interrupts(&self) {
        let mut m = self.interrupt.msix();
        m.config_vector = NO_VECTOR;
        m.queue_vectors.fill(NO_VECTOR);
        m.pending = 0;
        self.interrupt.isr.store(0, SeqCst);
        self.interrupt.drive_line(&m);
    }

    fn read_table(&self, offset: u64, data: &mut [u8]) {
        let m = self.interrupt.msix();
        let Some(v) = m.table.get((offset / 16) as usize) else { return };
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&v.address.to_le_bytes());
        entry[8..12].copy_from_slice(&v.data.to_le_bytes());
        entry[12] = u8::from(v.masked);
        crate::read_config(&entry, offset % 16, data);
    }

    fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut m = self.interrupt.msix();
        let Some(v) = m.table.get_mut((offset / 16) as usize) else { return };
        for (n, word) in data.chunks_exact(4).enumerate() {
            let word = number(word) as u32;
            match offset % 16 + 4 * n as u64 {
                0 => set_half(&mut v.address, false, word),
                4 => set_half(&mut v.address, true, word),
                8 => v.data = word,
                _ => v.masked = word & 1 != 0,
            }
        }
        self.interrupt.send_pending(&mut m);
    }

    // ---- configuration space ----

    /// Reads configuration space; `offset` and length lie within 256 bytes.
    pub fn config_read(&self, offset: u8, data: &mut [u8]) {
        if let Some((at, n)) = self.window_access(offset, data.len()) {
            self.read(at, &mut data[..n]);
            return;
        }
        let space = self.space();
        for (n, d) in data.iter_mut().enumerate() {
            *d = space.get(usize::from(offset) + n).copied().unwrap_or(0);
        }
    }

    /// Writes configuration space.
    pub fn config_write(&self, offset: u8, data: &[u8]) {
        if let Some((at, n)) = self.window_access(offset, data.len()) {
            return self.write(at, &data[..n]);
        }
        // Registers are merged with what they hold, so that narrow writes work.
        for (n, &byte) in data.iter().enumerate() {
            self.write_byte(offset.wrapping_add(n as u8), byte);
        }
        if (0x04..0x06).contains(&offset) {
            let mut m = self.interrupt.msix();
            m.intx_disabled = self.config().command & COMMAND_INTX_DISABLE != 0;
            self.interrupt.drive_line(&m);
        }
        if offset.wrapping_add(data.len() as u8) > cap::MSIX + 3 && offset <= cap::MSIX + 3 {
            let control = data[usize::from(cap::MSIX + 3 - offset)];
            let mut m = self.interrupt.msix();
            (m.enabled, m.function_mask) = (control & 0x80 != 0, control & 0x40 != 0);
            self.interrupt.drive_line(&m);
            self.interrupt.send_pending(&mut m);
        }
    }

    fn write_byte(&self, offset: u8, byte: u8) {
        let mut c = self.config();
        let put = |word: &mut u32, at: u8| {
            let shift = 8 * u32::from(at);
            *word = *word & !(0xff << shift) | u32::from(byte) << shift;
        };
        match offset {
            4 => c.command = c.command & 0xff00 & COMMAND_BITS | u16::from(byte) & COMMAND_BITS,
            5 => c.command = c.command & 0xff | u16::from(byte) << 8 & COMMAND_BITS,
            0x0c => c.cache_line = byte,
            0x10..0x18 => {
                let shift = 8 * u32::from(offset - 0x10);
                c.bar = (c.bar & !(0xff << shift) | u64::from(byte) << shift) & !(BAR_SIZE - 1);
            }
            0x3c => c.interrupt_line = byte,
            _ => match offset.wrapping_sub(cap::WINDOW) {
                4 => c.window_bar = byte,
                at @ 8..12 => put(&mut c.window_offset, at - 8),
                at @ 12..16 => put(&mut c.window_length, at - 12),
                _ => {}
            },
        }
    }

    /// What an access to the window's data reaches in the BAR: offset and length.
    fn window_access(&self, offset: u8, len: usize) -> Option<(u64, usize)> {
        if offset != cap::WINDOW + 16 {
            return None;
        }
        let c = self.config();
        let (at, n) = (u64::from(c.window_offset), c.window_length as usize);
        let fine = c.window_bar == 0 && matches!(n, 1 | 2 | 4) && n <= len && at % n as u64 == 0;
        (fine && at + n as u64 <= BAR_SIZE).then_some((at, n))
    }

    /// The configuration space as it reads now.
    fn space(&self) -> [u8; 256] {
        let c = self.config();
        let m = self.interrupt.msix();
        let mut s = [0; 256];
        let mut put = |at: u8, bytes: &[u8]| s[usize::from(at)..usize::from(at) + bytes.len()].copy_from_slice(bytes);
        put(0x00, &VENDOR.to_le_bytes());
        put(0x02, &self.id.pci().to_le_bytes());
        put(0x04, &c.command.to_le_bytes());
        let line = u16::from(self.interrupt.isr.load(SeqCst) != 0 && !m.enabled) << 3;
        put(0x06, &(0x10 | line).to_le_bytes());
        let class = self.id.pci_class();
        put(0x08, &[1, class[2], class[1], class[0], c.cache_line, 0, 0, 0]);
        // A 64-bit memory BAR.
        put(0x10, &(c.bar | 4).to_le_bytes());
        put(0x2c, &VENDOR.to_le_bytes());
        put(0x2e, &(0x40 + self.id as u16).to_le_bytes());
        put(0x34, &[cap::COMMON]);
        put(0x3c, &[c.interrupt_line, 1]);
        // Structures: vendor capability, next, length, kind, BAR, id, padding, offset, length (section 4.1.4).
        let structure = |kind: u8, next: u8, len: u8, offset: u32, length: u32| {
            let mut b = [0; 16];
            b[..4].copy_from_slice(&[9, next, len, kind]);
            b[8..12].copy_from_slice(&offset.to_le_bytes());
            b[12..].copy_from_slice(&length.to_le_bytes());
            b
        };
        put(cap::COMMON, &structure(1, cap::ISR, 16, 0, 0x38));
        put(cap::ISR, &structure(3, cap::DEVICE, 16, ISR as u32, 1));
        put(cap::DEVICE, &structure(4, cap::NOTIFY, 16, DEVICE as u32, 0x1000));
        let notify_len = NOTIFY_MULTIPLIER * u32::from(self.queues.max(1));
        put(cap::NOTIFY, &structure(2, cap::WINDOW, 20, NOTIFY as u32, notify_len));
        put(cap::NOTIFY + 16, &NOTIFY_MULTIPLIER.to_le_bytes());
        put(cap::WINDOW, &structure(5, cap::MSIX, 20, c.window_offset, c.window_length));
        put(cap::WINDOW + 4, &[c.window_bar]);
        let control = (self.vectors - 1) | u16::from(m.function_mask) << 14 | u16::from(m.enabled) << 15;
        put(cap::MSIX, &[0x11, 0]);
        put(cap::MSIX + 2, &control.to_le_bytes());
        put(cap::MSIX + 4, &(MSIX_TABLE as u32).to_le_bytes());
        put(cap::MSIX + 8, &(MSIX_PBA as u32).to_le_bytes());
        s
    }
}
