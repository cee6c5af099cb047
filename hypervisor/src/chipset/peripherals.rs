//! Virtio devices at their places: PCI slots and memory windows, their interrupts, and what happens when a guest moves a BAR.
//!
//! PCI function *n* has INTA# on I/O APIC pin 16 + n % 4, as the DSDT's _PRT says, and memory-mapped device *n* has pin 20 + n % 4: guests
//! take the two kinds for of different polarity and do not let them share. Devices of a kind do: a pin is up while any of them asks.

use std::io;
use std::sync::{Arc, Mutex};

use virtio::Device;
use virtio::transport::mmio::{self, MmioTransport};
use virtio::transport::pci::{BAR_SIZE, PciHost, PciTransport};

use super::{Chipset, Interrupts};
use crate::devices::ioapic::{Message, PINS};
use crate::devices::lock;
use crate::devices::mmio::{MmioMap, MmioTarget, Window};
use crate::devices::pci::Function;
use crate::memory::{GuestRam, PCI_MMIO32, VIRTIO_MMIO};

/// First I/O APIC pin that belongs to no ISA interrupt.
const FIRST_PIN: usize = 16;
/// Most PCI devices beside the host bridge.
const MAX_PCI: usize = 31;
/// Most memory-mapped devices.
const MAX_MMIO: usize = 32;

/// I/O APIC pins of each kind of device.
const PINS_OF_KIND: usize = (PINS - FIRST_PIN) / 2;

/// I/O APIC pin of PCI slot `n`.
pub fn pci_pin(n: usize) -> usize {
    FIRST_PIN + n % PINS_OF_KIND
}

/// I/O APIC pin of memory-mapped device `n`.
fn mmio_pin(n: usize) -> usize {
    FIRST_PIN + PINS_OF_KIND + n % PINS_OF_KIND
}

/// A memory-mapped device, for the DSDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Its interrupt: I/O APIC pin, which is the GSI.
    pub gsi: u32,
}

/// All virtio devices of the machine.
#[derive(Default)]
pub(super) struct Peripherals {
    pub(super) map: MmioMap,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    /// With the address at which each BAR is mapped.
    pci: Vec<(Arc<PciTransport>, Option<u64>)>,
    mmio: Vec<(Arc<MmioTransport>, u64)>,
}

struct PciSlot(Arc<PciTransport>);

impl Function for PciSlot {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }
    fn config_write(&mut self, offset: u8, data: &[u8]) {
        self.0.config_write(offset, data);
    }
}

impl MmioTarget for PciTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

impl MmioTarget for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

/// A PCI slot's interrupts.
struct SlotInterrupts {
    irqs: Arc<Interrupts>,
    pin: usize,
    source: u32,
}

impl PciHost for SlotInterrupts {
    fn msi(&self, address: u64, data: u32) {
        if let Some(m) = msi_message(address, data) {
            self.irqs.deliver(&m, None, 0);
        }
    }
    fn intx(&self, level: bool) {
        self.irqs.set_shared_pin(self.pin, self.source, level);
    }
}

/// The interrupt that a store of `data` to `address` by a device is (SDM vol. 3, sections 11.11.1 and 11.11.2); `None` for an address that
/// belongs to no local APIC.
fn msi_message(address: u64, data: u32) -> Option<Message> {
    if address >> 20 != 0xfee {
        return None;
    }
    Some(Message {
        destination: (address >> 12 & 0xff) as u32,
        logical: address & 4 != 0,
        delivery: (data >> 8 & 7) as u8,
        vector: data as u8,
        level: data & 1 << 15 != 0,
    })
}

impl Interrupts {
    /// One of the devices that share a pin asks for service, or no longer.
    fn set_shared_pin(&self, pin: usize, source: u32, level: bool) {
        let mut w = lock(&self.wired);
        let before = w.shared[pin];
        let now = before & !(1 << source) | u64::from(level) << source;
        w.shared[pin] = now;
        if (before == 0) == (now == 0) {
            return;
        }
        let message = w.ioapic.set_pin(pin, now != 0);
        drop(w);
        if let Some(m) = message {
            self.deliver(&m, None, 0);
        }
    }
}

impl Chipset {
    /// Puts a device into the next PCI slot.
    ///
    /// # Errors
    /// When all slots are taken, or the host has no descriptors left.
    pub fn add_virtio_pci(&self, device: Box<dyn Device>, mem: GuestRam) -> io::Result<()> {
        let mut slots = lock(&self.peripherals.slots);
        let slot = slots.pci.len() + 1;
        if slot > MAX_PCI {
            return Err(io::Error::other(format!("a machine has room for {MAX_PCI} PCI devices")));
        }
        let host = SlotInterrupts { irqs: self.irqs.clone(), pin: pci_pin(slot), source: slot as u32 };
        let bar = PCI_MMIO32.0 + slot as u64 * BAR_SIZE;
        let transport = Arc::new(PciTransport::new(device, mem, Arc::new(host), bar)?);
        slots.pci.push((transport.clone(), None));
        drop(slots);
        self.add_pci(slot as u8, 0, Box::new(PciSlot(transport)));
        Ok(())
    }

    /// Puts a device behind registers in memory, and says where.
    ///
    /// # Errors
    /// When all places are taken, or the host has no descriptors left.
    pub fn add_virtio_mmio(&self, device: Box<dyn Device>, mem: GuestRam) -> io::Result<MmioSlot> {
        let mut slots = lock(&self.peripherals.slots);
        let n = slots.mmio.len();
        if n >= MAX_MMIO {
            return Err(io::Error::other(format!("a machine has room for {MAX_MMIO} memory-mapped devices")));
        }
        // Sources up to 31 are PCI slots.
        let (irqs, pin, source) = (self.irqs.clone(), mmio_pin(n), 32 + n as u32);
        let line = Box::new(move |level| irqs.set_shared_pin(pin, source, level));
        let base = VIRTIO_MMIO.0 + n as u64 * mmio::WINDOW;
        slots.mmio.push((Arc::new(MmioTransport::new(device, mem, line)?), base));
        self.peripherals.publish(&slots);
        Ok(MmioSlot { base, gsi: pin as u32 })
    }

    /// Looks whether a guest has moved, switched on or switched off a BAR.
    pub(super) fn follow_bars(&self) {
        let mut slots = lock(&self.peripherals.slots);
        let mut changed = false;
        for (transport, mapped) in &mut slots.pci {
            let now = transport.bar();
            changed |= std::mem::replace(mapped, now) != now;
        }
        if changed {
            self.peripherals.publish(&slots);
        }
    }

    /// Ends all threads of devices. No vCPU may run any more.
    pub fn shut_down_devices(&self) {
        let slots = lock(&self.peripherals.slots);
        for (transport, _) in &slots.pci {
            transport.shut_down();
        }
        for (transport, _) in &slots.mmio {
            transport.shut_down();
        }
        if let Some(pv) = self.pv() {
            pv.shut_down_devices();
        }
    }
}

impl Peripherals {
    fn publish(&self, slots: &Slots) {
        let pci = slots.pci.iter().filter_map(|(t, at)| {
            let target: Arc<dyn MmioTarget> = t.clone();
            Some(Window { start: (*at)?, len: BAR_SIZE, target })
        });
        let mmio = slots.mmio.iter().map(|(t, at)| {
            let target: Arc<dyn MmioTarget> = t.clone();
            Window { start: *at, len: mmio::WINDOW, target }
        });
        self.map.set(pci.chain(mmio).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::ChipsetConfig;
    use paravane_cpu::Bus;
    use virtio::devices::entropy::Entropy;

    fn chipset() -> (Arc<Chipset>, GuestRam) {
        let cfg = ChipsetConfig { cpus: 1, debug_exit: false, serial: Box::new(io::sink()), pv: None };
        (Chipset::new(cfg).unwrap(), crate::memory::create(4 << 20).unwrap())
    }

    fn rng() -> Box<dyn Device> {
        Box::new(Entropy::new(std::fs::File::open("/dev/urandom").unwrap()))
    }

    fn config(c: &Chipset, slot: u32, offset: u32) -> u32 {
        c.pio_write(0, 0xcf8, &(1 << 31 | slot << 11 | offset).to_le_bytes());
        let mut b = [0; 4];
        c.pio_read(0, 0xcfc, &mut b);
        u32::from_le_bytes(b)
    }

    fn set_config(c: &Chipset, slot: u32, offset: u32, value: u32) {
        c.pio_write(0, 0xcf8, &(1 << 31 | slot << 11 | offset).to_le_bytes());
        c.pio_write(0, 0xcfc, &value.to_le_bytes());
    }

    fn load(c: &Chipset, gpa: u64) -> u32 {
        let mut b = [0; 4];
        c.mmio_read(0, gpa, &mut b);
        u32::from_le_bytes(b)
    }

    #[test]
    fn a_bar_answers_where_the_guest_puts_it() {
        let (c, mem) = chipset();
        for _ in 0..MAX_PCI {
            c.add_virtio_pci(rng(), mem.clone()).unwrap();
        }
        assert!(c.add_virtio_pci(rng(), mem).is_err(), "bus 0 is full");
        assert_eq!(config(&c, 2, 0), 0x1044_1af4);
        let first = config(&c, 2, 0x10);
        assert_eq!((first & 0xf, u64::from(first & !0xf)), (4, PCI_MMIO32.0 + 2 * BAR_SIZE));
        let features = u64::from(first & !0xf) + 4;
        assert_eq!(load(&c, features), u32::MAX, "memory decoding is off");
        set_config(&c, 2, 4, 2);
        assert_eq!(load(&c, features), 0x3000_0000);
        // Sizing, as drivers do it, then a new place above 4 GiB.
        set_config(&c, 2, 0x10, u32::MAX);
        set_config(&c, 2, 0x14, u32::MAX);
        assert_eq!((config(&c, 2, 0x10), config(&c, 2, 0x14)), (!(BAR_SIZE as u32 - 1) | 4, u32::MAX));
        set_config(&c, 2, 0x10, 0x1234_8000);
        set_config(&c, 2, 0x14, 0x20);
        assert_eq!((load(&c, features), load(&c, 0x20_1234_8004)), (u32::MAX, 0x3000_0000));
        set_config(&c, 2, 4, 0);
        assert_eq!(load(&c, 0x20_1234_8004), u32::MAX);
    }

    #[test]
    fn memory_mapped_devices_are_where_they_say() {
        let (c, mem) = chipset();
        let slots: Vec<_> = (0..9).map(|_| c.add_virtio_mmio(rng(), mem.clone()).unwrap()).collect();
        assert_eq!((slots[8].gsi, slots[0].gsi, slots[7].gsi), (20, 20, 23));
        for s in slots {
            assert_eq!((load(&c, s.base), load(&c, s.base + 8)), (0x7472_6976, 4));
        }
        c.shut_down_devices();
    }

    #[test]
    fn a_shared_pin_stays_up_for_the_last_who_asks() {
        let (c, _) = chipset();
        // Pin 17 to vector 0x51, level-triggered; the local APIC on.
        for (register, value) in [(0x32, 0x8051), (0x33, 0)] {
            c.mmio_write(0, crate::devices::ioapic::BASE, &u32::to_le_bytes(register));
            c.mmio_write(0, crate::devices::ioapic::BASE + 0x10, &u32::to_le_bytes(value));
        }
        let apic = crate::devices::lapic::BASE;
        c.mmio_write(0, apic + 0xf0, &0x1ffu32.to_le_bytes());
        c.irqs.set_shared_pin(17, 1, true);
        c.irqs.set_shared_pin(17, 40, true);
        assert_eq!(c.interrupt_ack(0), Some(0x51));
        c.irqs.set_shared_pin(17, 1, false);
        c.mmio_write(0, apic + 0xb0, &0u32.to_le_bytes());
        assert_eq!(c.interrupt_ack(0), Some(0x51), "source 40 still asks");
        c.irqs.set_shared_pin(17, 40, false);
        c.mmio_write(0, apic + 0xb0, &0u32.to_le_bytes());
        assert_eq!(c.interrupt_ack(0), None);
    }

    #[test]
    fn messages_are_read_as_the_manual_says() {
        let m = msi_message(0xfee0_300c, 0x4041).unwrap();
        assert_eq!((m.destination, m.logical, m.delivery, m.vector, m.level), (3, true, 0, 0x41, false));
        assert_eq!(msi_message(0xfed0_0000, 0x41), None);
        assert_eq!(msi_message(0x1_fee0_0000, 0x41), None);
    }
}
