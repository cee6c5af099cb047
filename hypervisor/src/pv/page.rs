//! The page that a vCPU shares with the hypervisor, and the words that the KVM interface keeps elsewhere.
//!
//! Guest RAM is reached by guest-physical address at every access, so a page that goes away (it cannot: RAM is fixed) or is given to somebody
//! else by the guest does no harm to anybody but the guest. Words that both sides change are changed by atomic instructions.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use pv_abi::feature::Feature;
use pv_abi::shared::{Clock as SharedClock, EOI_SKIP, SharedPage, Stolen};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};
use zerocopy::{FromZeros, IntoBytes};

use super::{Pv, lock};
use crate::tsc;
use paravane_cpu::Env;

/// Offset of a field of the shared page.
macro_rules! at {
    ($field:ident) => {
        std::mem::offset_of!(SharedPage, $field) as u64
    };
}

/// Parts of `data` that do not cross a page, with their addresses.
pub(super) fn parts(gpa: u64, mut data: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut at = gpa;
    std::iter::from_fn(move || {
        let here = data.len().min((4096 - at % 4096) as usize);
        let (part, rest) = data.split_at(here);
        let from = at;
        (at, data) = (at + here as u64, rest);
        (here != 0).then_some((from, part))
    })
}

impl Pv {
    /// Whether all of `len` bytes at `gpa` are RAM.
    pub(crate) fn is_ram(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_add(len).is_some() && len <= 1 << 40 && self.ram.check_range(GuestAddress(gpa), len as usize)
    }

    /// Guest-physical address of the vCPU's page.
    pub(super) fn page(&self, vcpu: u32) -> Option<u64> {
        self.vcpu(vcpu).map(|v| v.page.load(SeqCst)).filter(|&p| p != 0)
    }

    /// Makes `gpa`, a page of RAM, the vCPU's page and fills it.
    pub(super) fn share_page(&self, vcpu: u32, gpa: u64, env: &mut dyn Env) {
        let Some(v) = self.vcpu(vcpu) else { return };
        let mut page = SharedPage::new_zeroed();
        page.version = self.version.load(SeqCst);
        page.irq_enabled = 1;
        env.write_phys(gpa, page.as_bytes());
        v.page.store(gpa, SeqCst);
        if self.has(Feature::LazyEoi) {
            v.eoi_word.store(gpa + at!(eoi), SeqCst);
        }
        if self.has(Feature::StolenTime) {
            lock(&v.stolen).start(self.clock.ns());
        }
        self.write_clocks(vcpu);
    }

    /// Ends the sharing; what the guest makes of the memory is its business from here on.
    pub(super) fn unshare_page(&self, vcpu: u32) {
        let Some(v) = self.vcpu(vcpu) else { return };
        let page = v.page.swap(0, SeqCst);
        if page != 0 && v.eoi_word.load(SeqCst) == page + at!(eoi) {
            v.eoi_word.store(0, SeqCst);
        }
    }

    /// Nanoseconds since the machine started, as a function of the vCPU's TSC.
    pub(super) fn clock_now(&self, vcpu: u32, tsc_khz: u32) -> SharedClock {
        let offset = self.vcpu(vcpu).map_or(0, |v| v.tsc_offset.load(SeqCst));
        let (mult, shift) = SharedClock::scale(tsc_khz);
        let (tsc, ns) = self.origin;
        SharedClock {
            sequence: 0,
            mult,
            tsc_base: tsc.wrapping_add(offset),
            ns_base: ns,
            wall_ns: self.wall_ns,
            shift,
            reserved: [0; 7],
        }
    }

    /// Writes all clocks that the vCPU reads: its TSC or its page changed.
    pub(super) fn write_clocks(&self, vcpu: u32) {
        let now = self.clock_now(vcpu, tsc::tsc_khz());
        if let Some(page) = self.page(vcpu)
            && self.has(Feature::Clock)
        {
            self.write_sequenced(page + at!(clock), now.as_bytes());
        }
        self.write_kvm_clock(vcpu, &now);
    }

    /// Writes a structure whose first word is a sequence number: odd before, even behind it. `new` holds any number there.
    pub(super) fn write_sequenced(&self, gpa: u64, new: &[u8]) {
        let at = GuestAddress(gpa);
        let Ok(old) = self.ram.load::<u32>(at, SeqCst) else { return };
        let odd = old.wrapping_add(1) | 1;
        // Every address here was found to be RAM when the guest gave it, and RAM stays.
        let _ = self.ram.store(odd, at, SeqCst);
        let _ = self.ram.write_slice(&new[4..], GuestAddress(gpa + 4));
        let _ = self.ram.store(odd.wrapping_add(1), at, SeqCst);
    }

    /// Brings the stolen time up to date, on the vCPU's thread; costs nothing unless some milliseconds have passed.
    pub(crate) fn note_stolen(&self, vcpu: u32) {
        let Some(v) = self.vcpu(vcpu) else { return };
        let Some(ns) = lock(&v.stolen).update(self.clock.ns()) else { return };
        if let Some(page) = self.page(vcpu)
            && self.has(Feature::StolenTime)
        {
            self.write_sequenced(page + at!(stolen), Stolen { sequence: 0, preempted: 0, ns }.as_bytes());
        }
        self.write_kvm_stolen(vcpu, ns);
    }

    fn word<T>(&self, gpa: u64, then: impl FnOnce(&AtomicU32) -> T) -> Option<T> {
        let slice = self.ram.get_slice(GuestAddress(gpa), 4).ok()?;
        slice.get_atomic_ref::<AtomicU32>(0).ok().map(then)
    }

    /// Whether the vCPU's guest looks at an EOI bit.
    pub(crate) fn lazy_eoi(&self, vcpu: u32) -> bool {
        self.vcpu(vcpu).is_some_and(|v| v.eoi_word.load(SeqCst) != 0)
    }

    /// Tells the guest that the interrupt being delivered needs no EOI; false when nobody looks.
    pub(crate) fn skip_eoi(&self, vcpu: u32) -> bool {
        let Some(gpa) = self.vcpu(vcpu).map(|v| v.eoi_word.load(SeqCst)).filter(|&p| p != 0) else { return false };
        self.word(gpa, |w| w.fetch_or(EOI_SKIP, SeqCst)).is_some()
    }

    /// Takes the offer of [`Pv::skip_eoi`] back; gives whether the guest had taken it: the interrupt has ended.
    pub(crate) fn eoi_skipped(&self, vcpu: u32) -> bool {
        let Some(gpa) = self.vcpu(vcpu).map(|v| v.eoi_word.load(SeqCst)).filter(|&p| p != 0) else { return false };
        self.word(gpa, |w| w.fetch_and(!EOI_SKIP, SeqCst) & EOI_SKIP == 0).unwrap_or(false)
    }

    /// Whether the virtual IF masks an interrupt that waits now; notes in the page that one does.
    pub(crate) fn masks(&self, vcpu: u32) -> bool {
        let masked = self.irqs_off(vcpu);
        if masked && let Some(page) = self.page(vcpu) {
            let _ = self.ram.store(1_u8, GuestAddress(page + at!(irq_pending)), SeqCst);
        }
        masked
    }

    /// An interrupt is being delivered.
    pub(crate) fn delivered(&self, vcpu: u32) {
        if self.has(Feature::VirtualIf)
            && let Some(page) = self.page(vcpu)
        {
            let _ = self.ram.store(0_u8, GuestAddress(page + at!(irq_pending)), SeqCst);
        }
    }

    /// Whether an interrupt was held back by the virtual IF.
    pub(super) fn holds_back(&self, vcpu: u32) -> bool {
        self.irqs_off(vcpu)
            && self.page(vcpu).is_some_and(|page| {
                self.ram.load::<u8>(GuestAddress(page + at!(irq_pending)), SeqCst).is_ok_and(|v| v != 0)
            })
    }

    fn irqs_off(&self, vcpu: u32) -> bool {
        self.has(Feature::VirtualIf)
            && self.page(vcpu).is_some_and(|page| {
                self.ram.load::<u8>(GuestAddress(page + at!(irq_enabled)), SeqCst).is_ok_and(|v| v == 0)
            })
    }

    /// Lets the vCPU's interrupts through, as HALT does.
    pub(super) fn enable_irqs(&self, vcpu: u32) {
        if self.has(Feature::VirtualIf)
            && let Some(page) = self.page(vcpu)
        {
            let _ = self.ram.store(1_u8, GuestAddress(page + at!(irq_enabled)), SeqCst);
        }
    }
}
