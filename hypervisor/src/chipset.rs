//! The chipset: devices at their addresses, interrupt lines, deadlines, and the vCPUs' view of it all ([`Bus`]).
//!
//! Interrupts flow through `Interrupts`, which owns the controllers. Whatever changes a controller ends with a look at the
//! vCPUs concerned: is an interrupt deliverable now? The answer is kept as one bit per vCPU, so that polling is one load,
//! and a vCPU is kicked when the bit appears.
//!
//! Lock order: serial port, devices, controllers, one local APIC.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use paravane_cpu::snapshot::LapicState;
use paravane_cpu::{Bus, BusOutcome, CpuState, Env, HypercallOutcome, Startup};

use crate::devices::acpi_pm::{AcpiPm, PM_TMR};
use crate::devices::control::{Control, Kick, StopCause, event};
use crate::devices::ioapic::{self, IoApic, Message, PINS};
use crate::devices::lapic::{Action, Deadline, Lapic};
use crate::devices::local_apics::LocalApics;
use crate::devices::lock;
use crate::devices::pci::PciBus;
use crate::devices::pic::Pic;
use crate::devices::pit::Pit;
use crate::devices::rtc::Rtc;
use crate::devices::serial::{IrqTrigger, SerialPort};
use crate::pv::{self, Pv, PvConfig};
use crate::timer::{Clock, Timer, Timers};

mod paravirt;
mod peripherals;

pub use peripherals::{MmioSlot, pci_pin};

/// I/O port of the pvpanic device (QEMU's pvpanic specification).
pub const PVPANIC: u16 = 0x505;
/// End of the addresses of interrupt controllers, which no BAR hides.
const APIC_END: u64 = 0xfeef_ffff;
/// ISA interrupt of COM1.
const COM1_IRQ: u8 = 4;

/// What a chipset is made with.
pub struct ChipsetConfig {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether port 0xf4 ends the run with a status, as QEMU's isa-debug-exit does.
    pub debug_exit: bool,
    /// Where COM1's output goes.
    pub serial: Box<dyn Write + Send>,
    /// The paravirtual interfaces.
    pub pv: Option<PvConfig>,
}

/// The interrupt controllers.
struct Interrupts {
    control: Control,
    wired: Mutex<Wired>,
    lapics: Box<[Mutex<Lapic>]>,
    /// Those that the engine keeps, if it does; `lapics` lie idle then.
    elsewhere: RwLock<Option<Arc<dyn LocalApics>>>,
    are_elsewhere: AtomicBool,
    /// The 8259A pair's INTR.
    intr: AtomicBool,
    lapic_timers: OnceLock<Vec<Timer>>,
    clock: Clock,
}

struct Wired {
    pic: Pic,
    ioapic: IoApic,
    /// Who of the devices that share an I/O APIC pin asks for service.
    shared: [u64; PINS],
}

impl Interrupts {
    /// Drives an ISA interrupt line.
    fn set_irq(&self, irq: u8, level: bool) {
        let mut w = lock(&self.wired);
        w.pic.set_line(irq, level);
        let pin = if irq == 0 { 2 } else { usize::from(irq) };
        let message = w.ioapic.set_pin(pin, level);
        self.pic_changed(&w);
        drop(w);
        if let Some(m) = message {
            self.deliver(&m, None, 0);
        }
    }

    /// A rising edge; the line stays up until the next one, so that an edge-triggered 8259A input keeps its request.
    fn edge(&self, irq: u8) {
        self.set_irq(irq, false);
        self.set_irq(irq, true);
    }

    fn pic_changed(&self, w: &Wired) {
        let out = w.pic.output();
        if self.intr.swap(out, SeqCst) != out {
            self.update(0);
        }
    }

    /// Delivers a message; `from` and `shorthand` are those of an ICR write.
    fn deliver(&self, m: &Message, from: Option<u32>, shorthand: u8) {
        if let Some(apics) = self.elsewhere() {
            // Commands come from the chipset's own local APICs only, so there is no shorthand.
            return apics.send(m);
        }
        let mut lowest: Option<(u32, u32)> = None;
        for (n, apic) in self.lapics.iter().enumerate() {
            let n = n as u32;
            let mut a = lock(apic);
            let hit = match shorthand {
                0 => a.matches(m),
                1 => Some(n) == from,
                2 => true,
                _ => Some(n) != from,
            };
            if !hit {
                continue;
            }
            if m.delivery == 1 {
                let p = a.priority();
                if lowest.is_none_or(|(_, best)| p < best) {
                    lowest = Some((n, p));
                }
                continue;
            }
            a.accept(m);
            drop(a);
            self.after_accept(n, m);
        }
        if let Some((n, _)) = lowest {
            lock(&self.lapics[n as usize]).accept(m);
            self.after_accept(n, m);
        }
    }

    fn after_accept(&self, vcpu: u32, m: &Message) {
        match m.delivery {
            4 => self.control.raise(vcpu, event::NMI),
            // On a PC the bootstrap processor begins at the firmware's reset vector again.
            5 if vcpu == 0 => self.control.stop(StopCause::Reset),
            5 => self.control.raise(vcpu, event::INIT),
            6 => self.control.raise(vcpu, event::SIPI),
            7 => self.control.raise(vcpu, event::APIC),
            _ => self.update(vcpu),
        }
    }

    /// Brings a vCPU's "interrupt deliverable" bit up to date.
    fn update(&self, vcpu: u32) {
        let Some(apic) = self.lapics.get(vcpu as usize) else { return };
        let intr = vcpu == 0 && self.intr.load(SeqCst);
        let a = lock(apic);
        let pending = if self.are_elsewhere.load(SeqCst) {
            intr
        } else {
            a.pending().is_some() || a.waits_for_settlement() || (intr && a.accepts_extint())
        };
        if pending {
            self.control.raise(vcpu, event::APIC);
        } else {
            self.control.clear(vcpu, event::APIC);
        }
    }

    fn arm_lapic_timer(&self, vcpu: u32) {
        let Some(apic) = self.lapics.get(vcpu as usize) else { return };
        // The APIC stays locked until the timer is set: the vCPU and the timer thread both come here, and the one that read
        // the older deadline must not set it last.
        let a = lock(apic);
        let ns = a.deadline(self.clock.ns()).map(|d| match d {
            Deadline::Ns(n) => n,
            Deadline::Tsc(t) => self.clock.ns_of_tsc(t),
        });
        if let Some(t) = self.lapic_timers.get().and_then(|t| t.get(vcpu as usize)) {
            t.set(ns);
        }
    }

    fn lapic_timer_fired(&self, vcpu: u32) {
        let Some(apic) = self.lapics.get(vcpu as usize) else { return };
        let mut a = lock(apic);
        // It may have been set anew meanwhile.
        let due = match a.deadline(self.clock.ns().saturating_sub(1)) {
            Some(Deadline::Ns(n)) => n <= self.clock.ns(),
            Some(Deadline::Tsc(t)) => t <= self.clock.tsc(),
            None => false,
        };
        let periodic = a.periodic();
        if due || periodic {
            a.expire();
        }
        drop(a);
        self.update(vcpu);
        self.arm_lapic_timer(vcpu);
    }

    fn act(&self, vcpu: u32, action: Action) {
        match action {
            Action::None => {}
            Action::EndOfInterrupt(v) => {
                let messages = lock(&self.wired).ioapic.end_of_interrupt(v);
                for m in messages {
                    self.deliver(&m, None, 0);
                }
            }
            Action::Send(m, shorthand) => self.deliver(&m, Some(vcpu), shorthand),
            Action::Timer => self.arm_lapic_timer(vcpu),
        }
        self.update(vcpu);
    }
}

/// Devices that share a lock, for nothing about them is hot.
struct Legacy {
    pit: Pit,
    rtc: Rtc,
    pm: AcpiPm,
    pci: PciBus,
    /// Port 0x92.
    port92: u8,
    /// The keyboard controller's pending output byte.
    kbc_out: Option<u8>,
    /// The keyboard controller waits for a data byte of this command.
    kbc_command: Option<u8>,
}

/// The machine's devices, shared by all vCPUs.
pub struct Chipset {
    irqs: Arc<Interrupts>,
    legacy: Mutex<Legacy>,
    serial: Mutex<SerialPort>,
    peripherals: peripherals::Peripherals,
    input_room: Condvar,
    debug_exit: bool,
    pv: Option<Pv>,
    pit_timer: OnceLock<Timer>,
    rtc_timer: OnceLock<Timer>,
    timers: Timers,
}

impl Chipset {
    /// The devices after power-up, as firmware would leave them for a kernel.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn new(cfg: ChipsetConfig) -> io::Result<Arc<Self>> {
        let clock = Clock::new();
        let timers = Timers::start(clock.clone())?;
        let mut pic = Pic::new();
        pic.mask_all();
        let irqs = Arc::new(Interrupts {
            control: Control::new(cfg.cpus),
            wired: Mutex::new(Wired { pic, ioapic: IoApic::default(), shared: [0; PINS] }),
            lapics: (0..cfg.cpus).map(|n| Mutex::new(Lapic::new(n))).collect(),
            elsewhere: RwLock::new(None),
            are_elsewhere: AtomicBool::new(false),
            intr: AtomicBool::new(false),
            lapic_timers: OnceLock::new(),
            clock,
        });
        let lapic_timers = (0..cfg.cpus)
            .map(|n| {
                let weak = Arc::downgrade(&irqs);
                timers.add(move || {
                    if let Some(irqs) = weak.upgrade() {
                        irqs.lapic_timer_fired(n);
                    }
                })
            })
            .collect();
        let _ = irqs.lapic_timers.set(lapic_timers);
        let pv = cfg.pv.map(|c| Pv::new(c, cfg.cpus, irqs.clock.clone()));
        let com1 = irqs.clone();
        let trigger = IrqTrigger(Box::new(move || com1.edge(COM1_IRQ)));
        let legacy = Legacy {
            pit: Pit::default(),
            rtc: Rtc::default(),
            pm: AcpiPm::default(),
            pci: PciBus::default(),
            port92: 2,
            kbc_out: None,
            kbc_command: None,
        };
        let chipset = Arc::new_cyclic(|weak: &Weak<Self>| {
            let call = |f: fn(&Self)| {
                let weak = weak.clone();
                timers.add(move || {
                    if let Some(me) = weak.upgrade() {
                        f(&me);
                    }
                })
            };
            Self {
                irqs,
                legacy: Mutex::new(legacy),
                serial: Mutex::new(SerialPort::new(cfg.serial, trigger)),
                peripherals: peripherals::Peripherals::default(),
                input_room: Condvar::new(),
                debug_exit: cfg.debug_exit,
                pv,
                pit_timer: OnceLock::from(call(Self::pit_fired)),
                rtc_timer: OnceLock::from(call(Self::rtc_fired)),
                timers,
            }
        });
        if let Some(pv) = &chipset.pv {
            for n in 0..cfg.cpus {
                let weak = Arc::downgrade(&chipset);
                let fire = move || {
                    if let Some(me) = weak.upgrade()
                        && let Some(vector) = me.pv.as_ref().and_then(|pv| pv.timer_vector(n))
                    {
                        me.inject(n, vector);
                    }
                };
                pv.set_timer(n, chipset.timers.add(fire));
            }
        }
        Ok(chipset)
    }

    /// What CPUID answers a vCPU from 0x4000_0000 on: leaf, and EAX to EDX.
    pub fn hypervisor_leaves(&self, vcpu: u32, tsc_khz: u32, apic_hz: u32) -> Vec<(u32, [u32; 4])> {
        self.pv.as_ref().map_or_else(Vec::new, |pv| pv.leaves(vcpu, tsc_khz, apic_hz))
    }

    /// Registers how a vCPU is made to look at its events.
    pub fn set_kick(&self, vcpu: u32, kick: Arc<dyn Kick>) {
        self.irqs.control.set_kick(vcpu, kick);
    }

    /// Blocks the calling thread, a halted vCPU's own, until there is something for it to do.
    pub fn wait_for_interrupt(&self, vcpu: u32) {
        self.irqs.control.sleep_until(vcpu, || self.irqs.control.events(vcpu) != 0);
    }

    /// As [`Chipset::wait_for_interrupt`], but until something comes that is not an interrupt.
    pub fn wait_for_others(&self, vcpu: u32) {
        self.irqs.control.sleep_until(vcpu, || self.irqs.control.events(vcpu) & !event::APIC != 0);
    }

    /// Blocks the calling thread, that of a vCPU that waits for a start-up message, until INIT or such a message comes.
    pub fn wait_for_startup(&self, vcpu: u32) {
        let startup = event::INIT | event::SIPI;
        self.irqs.control.sleep_until(vcpu, || self.irqs.control.events(vcpu) & startup != 0);
    }

    /// Stops the machine. The first cause counts.
    pub fn stop(&self, cause: StopCause) {
        self.irqs.control.stop(cause);
        self.input_room.notify_all();
    }

    /// Makes all vCPUs leave their run loops at the next instruction boundary, until [`Chipset::resume`]. Devices and their
    /// timers go on.
    pub fn pause(&self) {
        self.irqs.control.pause();
    }

    /// Takes one [`Chipset::pause`] back.
    pub fn resume(&self) {
        self.irqs.control.resume();
    }

    /// Whether somebody wants the vCPUs to stay out of their run loops.
    pub fn paused(&self) -> bool {
        self.irqs.control.paused()
    }

    /// Why the machine stops; `None` while it runs.
    pub fn stop_cause(&self) -> Option<StopCause> {
        self.irqs.control.cause()
    }

    /// Feeds COM1. Blocks while the guest does not read; gives up when the machine stops.
    pub fn serial_input(&self, mut bytes: &[u8]) {
        let mut port = lock(&self.serial);
        while !bytes.is_empty() && !self.irqs.control.stopping() {
            let taken = port.input(bytes);
            bytes = &bytes[taken..];
            if taken == 0 {
                let wait = Duration::from_millis(100);
                port = self.input_room.wait_timeout(port, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Adds a PCI function on bus 0.
    pub fn add_pci(&self, device: u8, function: u8, f: Box<dyn crate::devices::pci::Function>) {
        lock(&self.legacy).pci.add(device, function, f);
    }

    fn at(&self, deadline: Option<Instant>) -> Option<u64> {
        let (now, ns) = (Instant::now(), self.timers.clock().ns());
        deadline.map(|d| ns + d.saturating_duration_since(now).as_nanos() as u64)
    }

    fn arm_pit(&self, legacy: &Legacy) {
        if let Some(t) = self.pit_timer.get() {
            t.set(self.at(legacy.pit.deadline(Instant::now())));
        }
    }

    fn arm_rtc(&self, legacy: &Legacy) {
        if let Some(t) = self.rtc_timer.get() {
            t.set(self.at(legacy.rtc.deadline()));
        }
    }

    fn pit_fired(&self) {
        self.irqs.edge(0);
        self.arm_pit(&lock(&self.legacy));
    }

    fn rtc_fired(&self) {
        let mut l = lock(&self.legacy);
        let due = l.rtc.expire(Instant::now());
        self.arm_rtc(&l);
        drop(l);
        if due {
            self.irqs.edge(8);
        }
    }

    fn read_port(&self, port: u16) -> u8 {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                let mut w = lock(&self.irqs.wired);
                let v = w.pic.read(port);
                self.irqs.pic_changed(&w);
                v
            }
            0x40..=0x43 | 0x61 => lock(&self.legacy).pit.read(port, Instant::now()),
            0x60 => lock(&self.legacy).kbc_out.take().unwrap_or(0),
            // System flag set; output buffer full when there is a byte.
            0x64 => 4 | u8::from(lock(&self.legacy).kbc_out.is_some()),
            0x70 | 0x71 => {
                let v = lock(&self.legacy).rtc.read(port);
                if port == 0x71 {
                    self.irqs.set_irq(8, false);
                }
                v
            }
            0x92 => lock(&self.legacy).port92,
            0x3f8..=0x3ff => {
                let mut s = lock(&self.serial);
                let v = s.read((port - 0x3f8) as u8);
                if port == 0x3f8 {
                    self.input_room.notify_all();
                }
                v
            }
            PVPANIC => 1,
            0x600..=0x607 => lock(&self.legacy).pm.read(port),
            _ => 0xff,
        }
    }

    fn write_port(&self, port: u16, v: u8) {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                let mut w = lock(&self.irqs.wired);
                w.pic.write(port, v);
                self.irqs.pic_changed(&w);
            }
            0x40..=0x43 | 0x61 => {
                let mut l = lock(&self.legacy);
                if l.pit.write(port, v, Instant::now()) {
                    self.arm_pit(&l);
                }
            }
            0x60 | 0x64 => self.keyboard_controller(port, v),
            0x70 | 0x71 => {
                let mut l = lock(&self.legacy);
                if l.rtc.write(port, v, Instant::now()) {
                    self.arm_rtc(&l);
                }
            }
            0x92 => {
                lock(&self.legacy).port92 = v & !1;
                if v & 1 != 0 {
                    self.stop(StopCause::Reset);
                }
            }
            0x3f8..=0x3ff => lock(&self.serial).write((port - 0x3f8) as u8, v),
            0xcf9 if v & 4 != 0 => self.stop(StopCause::Reset),
            PVPANIC if v & 1 != 0 => self.stop(StopCause::GuestPanic),
            0x600..=0x607 if lock(&self.legacy).pm.write(port, v) => self.stop(StopCause::PowerOff),
            _ => {}
        }
    }

    /// An 8042 without keyboard or mouse: self-test, command byte, reset.
    fn keyboard_controller(&self, port: u16, v: u8) {
        let mut l = lock(&self.legacy);
        if port == 0x60 {
            if l.kbc_command.take().is_none() {
                l.kbc_out = Some(0xfe); // No device answers: resend.
            }
            return;
        }
        match v {
            0xaa => l.kbc_out = Some(0x55),
            0xab | 0xa9 => l.kbc_out = Some(1),
            0x20 => l.kbc_out = Some(0x34),
            0x60 | 0xd1..=0xd4 => l.kbc_command = Some(v),
            0xf0..=0xff if v & 1 == 0 => {
                drop(l);
                self.stop(StopCause::Reset);
            }
            _ => {}
        }
    }

    fn outcome(&self) -> BusOutcome {
        if self.irqs.control.leaving() { BusOutcome::Stopping } else { BusOutcome::Done }
    }

    /// Offset in the local APIC's page, when the access is for it.
    fn lapic_offset(&self, vcpu: u32, gpa: u64) -> Option<u64> {
        let window = lock(self.irqs.lapics.get(vcpu as usize)?).window()?;
        (gpa & !0xfff == window).then_some(gpa & 0xfff)
    }
}

impl Bus for Chipset {
    fn pio_read(&self, _vcpu: u32, port: u16, data: &mut [u8]) {
        match port {
            0xcf8..=0xcff => lock(&self.legacy).pci.read(port, data),
            PM_TMR if data.len() == 4 => {
                data.copy_from_slice(&lock(&self.legacy).pm.read_timer().to_le_bytes());
            }
            _ => {
                for (n, d) in data.iter_mut().enumerate() {
                    *d = self.read_port(port.wrapping_add(n as u16));
                }
            }
        }
    }

    fn pio_write(&self, _vcpu: u32, port: u16, data: &[u8]) -> BusOutcome {
        match port {
            0xf4 if self.debug_exit => {
                let v = data.iter().rev().fold(0u32, |n, &b| n << 8 | u32::from(b));
                self.stop(StopCause::DebugExit((v << 1 | 1) as u8));
            }
            0xcf9 => self.write_port(port, data[0]),
            0xcf8..=0xcff => {
                lock(&self.legacy).pci.write(port, data);
                if port >= 0xcfc {
                    self.follow_bars();
                }
            }
            _ => {
                for (n, &d) in data.iter().enumerate() {
                    self.write_port(port.wrapping_add(n as u16), d);
                }
            }
        }
        self.outcome()
    }

    fn mmio_read(&self, vcpu: u32, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !(ioapic::BASE..=APIC_END).contains(&gpa) && self.peripherals.map.read(gpa, data) {
            return;
        }
        let value = if let Some(offset) = self.lapic_offset(vcpu, gpa) {
            self.settle_eoi(vcpu);
            let now = self.irqs.clock.ns();
            // Registers are 32 bits wide on 16-byte boundaries; other bytes read as zero.
            let v = lock(&self.irqs.lapics[vcpu as usize]).read((offset >> 4) as u32, now).unwrap_or(0);
            u64::from(v) >> (8 * (offset & 3)) & if offset & 15 < 4 { u64::MAX } else { 0 }
        } else if gpa & !0xfff == ioapic::BASE {
            u64::from(lock(&self.irqs.wired).ioapic.read(gpa & 0xfff))
        } else {
            return;
        };
        let n = data.len().min(8);
        data[..n].copy_from_slice(&value.to_le_bytes()[..n]);
    }

    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8]) -> BusOutcome {
        if !(ioapic::BASE..=APIC_END).contains(&gpa) && self.peripherals.map.write(gpa, data) {
            return BusOutcome::Done;
        }
        let Some(v) = data.get(..4).and_then(|d| d.try_into().ok()).map(u32::from_le_bytes) else {
            // Narrow stores to the APICs are undefined; they are dropped.
            return BusOutcome::Done;
        };
        if let Some(offset) = self.lapic_offset(vcpu, gpa) {
            self.settle_eoi(vcpu);
            if offset & 15 == 0 {
                let now = self.irqs.clock.ns();
                let action = lock(&self.irqs.lapics[vcpu as usize]).write((offset >> 4) as u32, u64::from(v), now);
                self.irqs.act(vcpu, action.unwrap_or(Action::None));
            }
        } else if gpa & !0xfff == ioapic::BASE {
            let mut wired = lock(&self.irqs.wired);
            let messages = wired.ioapic.write(gpa & 0xfff, v);
            if let Some(apics) = self.irqs.elsewhere() {
                apics.set_routes(&wired.ioapic.routes());
            }
            drop(wired);
            for m in messages {
                self.irqs.deliver(&m, None, 0);
            }
        }
        BusOutcome::Done
    }

    fn apic_msr_read(&self, vcpu: u32, msr: u32) -> Option<u64> {
        self.settle_eoi(vcpu);
        let mut a = lock(self.irqs.lapics.get(vcpu as usize)?);
        match msr {
            0x1b => Some(a.base()),
            0x6e0 => Some(a.tsc_deadline()),
            0x830 if a.x2() => Some(a.icr()),
            // EOI, ICR high and SELF IPI cannot be read.
            0x80b | 0x831 | 0x83f => None,
            0x800..=0x8ff if a.x2() => a.read(msr - 0x800, self.irqs.clock.ns()).map(u64::from),
            _ => None,
        }
    }

    fn apic_msr_write(&self, vcpu: u32, msr: u32, value: u64) -> Option<BusOutcome> {
        self.settle_eoi(vcpu);
        let mut a = lock(self.irqs.lapics.get(vcpu as usize)?);
        let action = match msr {
            0x1b => a.set_base(value).then_some(Action::Timer)?,
            0x6e0 => a.set_tsc_deadline(value),
            0x831 | 0x802 | 0x80d => return None,
            0x830 if a.x2() => a.write(0x30, value, self.irqs.clock.ns())?,
            0x800..=0x8ff if a.x2() && value >> 32 == 0 => a.write(msr - 0x800, value, self.irqs.clock.ns())?,
            _ => return None,
        };
        drop(a);
        self.irqs.act(vcpu, action);
        Some(BusOutcome::Done)
    }

    fn cr8_read(&self, vcpu: u32) -> u8 {
        self.irqs.lapics.get(vcpu as usize).map_or(0, |a| lock(a).tpr() >> 4)
    }

    fn cr8_write(&self, vcpu: u32, value: u8) {
        if let Some(a) = self.irqs.lapics.get(vcpu as usize) {
            lock(a).set_tpr(value << 4);
        }
        self.irqs.update(vcpu);
    }

    fn interrupt_pending(&self, vcpu: u32) -> bool {
        self.irqs.control.events(vcpu) & event::APIC != 0 && self.pending_unmasked(vcpu)
    }

    fn interrupt_ack(&self, vcpu: u32) -> Option<u8> {
        self.settle_eoi(vcpu);
        let mut a = lock(self.irqs.lapics.get(vcpu as usize)?);
        // Whether the 8259A's output gets through is for the engine to say, where it keeps the local APIC.
        let elsewhere = self.irqs.are_elsewhere.load(SeqCst);
        let mut vector = if elsewhere { None } else { a.acknowledge() };
        let extint = vector.is_none() && vcpu == 0 && (elsewhere || a.accepts_extint());
        drop(a);
        if let Some(v) = vector {
            self.acknowledged(vcpu, v);
        }
        if extint {
            let mut w = lock(&self.irqs.wired);
            vector = w.pic.ack();
            self.irqs.pic_changed(&w);
        }
        self.irqs.update(vcpu);
        vector
    }

    fn take_nmi(&self, vcpu: u32) -> bool {
        self.irqs.control.events(vcpu) & event::NMI != 0
            && self.irqs.control.clear(vcpu, event::NMI)
            && self.irqs.lapics.get(vcpu as usize).is_some_and(|a| lock(a).take_nmi())
    }

    fn take_startup(&self, vcpu: u32) -> Option<Startup> {
        let control = &self.irqs.control;
        if control.events(vcpu) & (event::INIT | event::SIPI) == 0 {
            return None;
        }
        if control.clear(vcpu, event::INIT) {
            self.settle_eoi(vcpu);
            let taken = lock(self.irqs.lapics.get(vcpu as usize)?).take_init();
            self.irqs.update(vcpu);
            self.irqs.arm_lapic_timer(vcpu);
            if taken {
                return Some(Startup::Init);
            }
        }
        if control.clear(vcpu, event::SIPI) {
            return lock(self.irqs.lapics.get(vcpu as usize)?).take_sipi().map(Startup::Sipi);
        }
        None
    }

    fn end_of_interrupt(&self, vector: u8) {
        let messages = lock(&self.irqs.wired).ioapic.end_of_interrupt(vector);
        for m in messages {
            self.irqs.deliver(&m, None, 0);
        }
    }

    fn lapic_save(&self, vcpu: u32) -> Option<LapicState> {
        self.settle_eoi(vcpu);
        let mut a = lock(self.irqs.lapics.get(vcpu as usize)?);
        Some(a.save(self.irqs.clock.ns()))
    }

    fn lapic_load(&self, vcpu: u32, state: &LapicState) -> bool {
        let Some(apic) = self.irqs.lapics.get(vcpu as usize) else { return false };
        lock(apic).load(state, self.irqs.clock.ns());
        let control = &self.irqs.control;
        for (bit, waits) in [(event::NMI, state.nmi), (event::INIT, state.init), (event::SIPI, state.sipi.is_some())] {
            if waits {
                control.raise(vcpu, bit);
            } else {
                control.clear(vcpu, bit);
            }
        }
        self.irqs.update(vcpu);
        self.irqs.arm_lapic_timer(vcpu);
        true
    }

    fn stopping(&self) -> bool {
        self.irqs.control.leaving()
    }

    fn wakes(&self, vcpu: u32) -> bool {
        self.irqs.control.clear(vcpu, event::WAKE);
        self.pv.as_ref().is_some_and(|pv| pv.wakes(vcpu))
    }

    fn asked_to_flush(&self, vcpu: u32) -> bool {
        self.pv.as_ref().is_some_and(|pv| pv.asked_to_flush(vcpu))
    }

    fn flush_as_asked(&self, vcpu: u32, env: &mut dyn Env) {
        if let Some(pv) = &self.pv {
            pv.flush_as_asked(vcpu, env);
        }
    }

    fn tsc_moved(&self, vcpu: u32, offset: u64) {
        if let Some(pv) = &self.pv {
            pv.tsc_moved(vcpu, offset);
        }
    }

    fn hypercall(&self, st: &mut CpuState, env: &mut dyn Env) -> Option<HypercallOutcome> {
        self.pv.as_ref().map(|pv| pv::calls::hypercall(pv, self, st, env))
    }

    fn hypervisor_msr_read(&self, vcpu: u32, msr: u32) -> Option<u64> {
        self.pv.as_ref()?.kvm_msr_read(vcpu, msr)
    }

    fn hypervisor_msr_write(&self, vcpu: u32, msr: u32, value: u64, _env: &mut dyn Env) -> Option<BusOutcome> {
        self.settle_eoi(vcpu);
        self.pv.as_ref()?.kvm_msr_write(vcpu, msr, value)
    }
}

/// Number of I/O APIC pins, for the ACPI tables.
pub const IOAPIC_PINS: usize = PINS;

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU that sets the next deadline as soon as it is woken by the last one, while the timer thread is still busy with that:
    /// no deadline may get lost.
    #[test]
    fn deadlines_set_while_the_last_one_fires_are_kept() {
        const ROUNDS: u32 = 20_000;
        let cfg = ChipsetConfig { cpus: 1, debug_exit: false, serial: Box::new(io::sink()), pv: None };
        let chipset = Chipset::new(cfg).unwrap();
        let apic = |register: u64, value: u32| {
            chipset.mmio_write(0, crate::devices::lapic::BASE + register, &value.to_le_bytes());
        };
        apic(0xf0, 0x1ff);
        apic(0x320, 0x4_0040);
        let began = Instant::now();
        for round in 0..ROUNDS {
            let at = crate::tsc::rdtsc() + 20_000 + u64::from(round % 64) * 500;
            chipset.apic_msr_write(0, 0x6e0, at).unwrap();
            while !chipset.interrupt_pending(0) {
                assert!(began.elapsed() < Duration::from_secs(60), "the deadline of round {round} was lost");
                std::hint::spin_loop();
            }
            assert_eq!(chipset.interrupt_ack(0), Some(0x40));
            apic(0xb0, 0);
        }
    }
}
