//! What the paravirtual interfaces need of the chipset, and lazy EOI.
//!
//! # Lazy EOI
//!
//! An interrupt's end matters to the local APIC only if something waits for it: another request, or the I/O APIC of a level-triggered one. When
//! an edge-triggered interrupt is delivered and nothing else is requested or in service, the guest is told by a bit in its memory that it
//! need not say when it has ended. The APIC then believes it in service for as long as nobody looks. Before anything that depends on
//! it (a delivery, an access to the APIC's registers), [`Chipset::settle_eoi`] takes the bit back: if the guest had cleared it, the
//! interrupt has ended; if not, the guest will end it with a real EOI.
//!
//! The guest clears the bit without a locked instruction, so only the vCPU's own thread may take it back, while no guest code runs. A request that arrives
//! meanwhile, whatever its priority, makes the vCPU come out and settle.

use super::{Chipset, Interrupts};
use crate::devices::control::{StopCause, event};
use crate::devices::ioapic::Message;
use crate::devices::local_apics::LocalApics;
use crate::devices::lock;
use crate::memory::GuestRam;
use crate::pv::Pv;
use std::io::{self, Write};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};
use virtio::Device;
use virtio::transport::mmio::MmioTransport;

impl Interrupts {
    /// Requests a fixed interrupt of one vCPU.
    pub(super) fn inject(&self, vcpu: u32, vector: u8) {
        let Some(apic) = self.lapics.get(vcpu as usize) else { return };
        let m = Message { destination: vcpu, logical: false, delivery: 0, vector, level: false };
        if let Some(apics) = self.elsewhere() {
            return apics.send(&m);
        }
        lock(apic).accept(&m);
        self.update(vcpu);
    }
}

impl Interrupts {
    /// The local APICs that the engine keeps, if it does.
    pub(super) fn elsewhere(&self) -> Option<Arc<dyn LocalApics>> {
        if !self.are_elsewhere.load(SeqCst) {
            return None;
        }
        self.elsewhere.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Chipset {
    /// Hands interrupts to local APICs that the engine keeps, or (`None`) to the chipset's own again. While vCPUs stand still.
    ///
    /// For a hand-over: to the chipset's own before the old engine's state is saved, so that what devices send from then on stays pending
    /// here and is merged when the state is loaded; to an engine's after its state was loaded, when what came in between is passed on.
    pub fn use_local_apics(&self, apics: Option<Arc<dyn LocalApics>>) {
        let irqs = &self.irqs;
        // Nobody who drives a line of the I/O APIC gets in between.
        let wired = lock(&irqs.wired);
        let on = apics.is_some();
        *irqs.elsewhere.write().unwrap_or_else(PoisonError::into_inner) = apics.clone();
        irqs.are_elsewhere.store(on, SeqCst);
        if let Some(apics) = apics {
            apics.set_routes(&wired.ioapic.routes());
            for (n, own) in irqs.lapics.iter().enumerate() {
                for vector in lock(own).take_since_save() {
                    let destination = n as u32;
                    apics.send(&Message { destination, logical: false, delivery: 0, vector, level: false });
                }
            }
        } else {
            let now = irqs.clock.ns();
            for own in &irqs.lapics {
                let _ = lock(own).save(now);
            }
        }
        drop(wired);
        for n in 0..irqs.lapics.len() as u32 {
            irqs.update(n);
        }
    }

    /// Requests a fixed interrupt of one vCPU, from any thread.
    pub fn inject(&self, vcpu: u32, vector: u8) {
        self.irqs.inject(vcpu, vector);
    }

    /// Whether the vCPU should soon look at its events or stop.
    pub(crate) fn attention(&self, vcpu: u32) -> bool {
        self.irqs.control.events(vcpu) != 0 || self.irqs.control.stopping()
    }

    /// Looks afresh whether an interrupt is deliverable.
    pub(crate) fn look_again(&self, vcpu: u32) {
        self.irqs.update(vcpu);
    }

    /// Gets a vCPU out of its halt, or makes it look at the bus.
    pub(crate) fn wake(&self, vcpu: u32) {
        self.irqs.control.raise(vcpu, event::WAKE);
    }

    /// Makes a vCPU come out of guest code, if it is there.
    pub(crate) fn kick(&self, vcpu: u32) {
        self.irqs.control.kick(vcpu);
    }

    /// Whether a vCPU may be in guest code.
    pub(crate) fn inside(&self, vcpu: u32) -> bool {
        self.irqs.control.inside(vcpu)
    }

    /// Writes to the console, which is what COM1 is connected to.
    pub(crate) fn console_write(&self, text: &[u8]) {
        lock(&self.serial).print(text);
    }

    /// Takes what was typed at the console; gives how many bytes there were.
    pub(crate) fn console_read(&self, buffer: &mut [u8]) -> usize {
        let n = lock(&self.serial).take(buffer);
        self.input_room.notify_all();
        n
    }

    /// The guest says why it died.
    pub(crate) fn guest_panicked(&self, text: &[u8]) {
        let text: String =
            String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        // A closed standard error leaves nobody to read it.
        let _ = writeln!(io::stderr(), "paravane: the guest's last words: {}", text.trim());
        self.stop(StopCause::GuestPanic);
    }

    /// Puts a device on the ABI's own transport.
    ///
    /// # Errors
    /// When the machine has no paravirtual interfaces or no place left, or the host has no descriptors left.
    pub fn add_virtio_pv(self: &Arc<Self>, device: Box<dyn Device>, mem: GuestRam) -> io::Result<()> {
        let pv = self.pv().ok_or_else(|| io::Error::other("this engine has no paravirtual interfaces"))?;
        pv.add_device(|n| {
            let weak = Arc::downgrade(self);
            let edge = move || {
                if let Some(me) = weak.upgrade()
                    && let Some(vector) = me.pv().and_then(|pv| pv.raise_event(n))
                {
                    me.inject(0, vector);
                }
            };
            MmioTransport::with_events(device, mem, Box::new(edge))
        })
    }

    pub(super) fn pv(&self) -> Option<&Pv> {
        self.pv.as_ref()
    }

    /// Ends an interrupt whose EOI the guest was told to skip, if it did; on the vCPU's thread.
    pub(crate) fn settle_eoi(&self, vcpu: u32) {
        let Some(pv) = self.pv() else { return };
        let Some(apic) = self.irqs.lapics.get(vcpu as usize) else { return };
        let mut a = lock(apic);
        if !a.eoi_skippable() {
            return;
        }
        a.settle(pv.eoi_skipped(vcpu));
        drop(a);
        self.irqs.update(vcpu);
    }

    /// Whether a pending interrupt may be delivered as far as the paravirtual interfaces are concerned. On the vCPU's thread, with the event bit set.
    pub(super) fn pending_unmasked(&self, vcpu: u32) -> bool {
        let Some(pv) = self.pv() else { return true };
        self.settle_eoi(vcpu);
        self.irqs.control.events(vcpu) & event::APIC != 0 && !pv.masks(vcpu)
    }

    /// An interrupt of the local APIC was acknowledged.
    pub(super) fn acknowledged(&self, vcpu: u32, vector: u8) {
        let Some(pv) = self.pv() else { return };
        pv.delivered(vcpu);
        pv.note_stolen(vcpu);
        if !pv.lazy_eoi(vcpu) {
            return;
        }
        let mut a = lock(&self.irqs.lapics[vcpu as usize]);
        if a.may_skip_eoi(vector) && pv.skip_eoi(vcpu) {
            a.skip_eoi();
        }
    }
}
