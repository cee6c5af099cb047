//! One CPU's side of the shim.

#![allow(unsafe_code)] // The shared page is memory that the hypervisor writes too.

use crate::apic::Apic;
use crate::shim::Shim;
use core::sync::atomic::{AtomicU8, AtomicU64};
use pv_abi::feature::Feature;
use pv_abi::shared::SharedPage;

/// A page for [`Vcpu::attach`].
#[derive(Clone, Copy, Debug)]
pub struct SharedMemory {
    /// Where the page is mapped.
    pub page: *mut SharedPage,
    /// Its guest-physical address.
    pub gpa: u64,
}

/// What one CPU needs of the shim. Each CPU has its own; nothing of it may be used from another one.
#[derive(Debug)]
pub struct Vcpu<'s> {
    pub(crate) shim: &'s Shim,
    index: u32,
    /// Null: no page is shared.
    page: *mut SharedPage,
    pub(crate) apic: Apic,
    /// Vector and mode that the local APIC's timer entry holds; 0: not set up.
    pub(crate) timer_vector: AtomicU8,
}

// SAFETY: it may be made on one CPU's stack and kept in per-CPU memory; the page is the vCPU's for ever.
unsafe impl Send for Vcpu<'_> {}

impl<'s> Vcpu<'s> {
    /// Sets this CPU up: shares its page, and finds out how its local APIC is reached. Without a page, or if the hypervisor refuses it,
    /// the features that need one take the native way on this CPU.
    ///
    /// # Safety
    /// Runs on the CPU `index`, with its local APIC enabled. The page is mapped where it says, zeroed, and belongs to this CPU and the
    /// hypervisor until the machine ends.
    pub unsafe fn attach(shim: &'s Shim, index: u32, memory: Option<SharedMemory>) -> Self {
        let page = match (shim.calls, memory) {
            // SAFETY: the caller gives the page away.
            (Some(calls), Some(m)) if unsafe { calls.share_page(m.gpa) }.is_ok() => m.page,
            _ => core::ptr::null_mut(),
        };
        // SAFETY: CPL 0, as the shim was made.
        let apic = unsafe { Apic::current(shim.platform.xapic) };
        Self { shim, index, page, apic, timer_vector: AtomicU8::new(0) }
    }

    /// The CPU's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The shim that it belongs to.
    pub fn shim(&self) -> &'s Shim {
        self.shim
    }

    /// Whether this CPU uses a feature of the ABI: it is in force, and if it needs the shared page there is one.
    pub fn uses(&self, f: Feature) -> bool {
        let needs_page =
            matches!(f, Feature::VirtualIf | Feature::Clock | Feature::LazyEoi | Feature::StolenTime | Feature::Virtio);
        self.shim.has(f) && !(needs_page && self.page.is_null())
    }

    /// The shared page, if `f` is in force and there is one.
    #[inline]
    pub(crate) fn page_for(&self, f: Feature) -> Option<*mut SharedPage> {
        (!self.page.is_null() && self.shim.features.has(f)).then_some(self.page)
    }

    /// Ends the interrupt in service.
    #[inline]
    pub fn eoi(&self) {
        if let Some(page) = self.page_for(Feature::LazyEoi) {
            let skip: u8;
            // SAFETY: the page is shared; one instruction, so that the hypervisor cannot come in between on this vCPU.
            unsafe {
                core::arch::asm!(
                    "btr dword ptr [{}], 0",
                    "setc {}",
                    in(reg) &raw mut (*page).eoi,
                    out(reg_byte) skip,
                    options(nostack)
                );
            }
            if skip != 0 {
                return;
            }
        }
        self.apic.eoi();
    }

    /// Nanoseconds that this vCPU wanted to run and did not, since its page was shared; 0 where nobody counts them.
    pub fn stolen_ns(&self) -> u64 {
        // SAFETY: the page is shared for good.
        self.page_for(Feature::StolenTime)
            .map_or(0, |page| unsafe { crate::clock::read_stolen(&raw const (*page).stolen).ns })
    }

    /// Takes the event bits of virtio devices: bit n stands for device n. 0 natively, where each device has an interrupt of its own.
    pub fn take_events(&self) -> u64 {
        self.page_for(Feature::Virtio).map_or(0, |page| {
            // SAFETY: the field is aligned, part of the shared page, and both sides access it atomically.
            unsafe { AtomicU64::from_ptr(&raw mut (*page).events) }.swap(0, core::sync::atomic::Ordering::AcqRel)
        })
    }

    /// Sets the doorbell bit of a virtio device, for [`Self::ring_doorbells`] to tell of. `false`: the feature is not in force.
    pub fn set_doorbell(&self, device: u32) -> bool {
        let Some(page) = self.page_for(Feature::Virtio).filter(|_| device < pv_abi::virtio::MAX_DEVICES) else {
            return false;
        };
        // SAFETY: as in `take_events`.
        unsafe { AtomicU64::from_ptr(&raw mut (*page).doorbells) }
            .fetch_or(1 << device, core::sync::atomic::Ordering::AcqRel);
        true
    }

    /// Tells all devices whose doorbell bits were set, with one call.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn ring_doorbells(&self) -> Result<(), pv_abi::call::Error> {
        self.shim.calls_for(Feature::Virtio).ok_or(pv_abi::call::Error::NotSupported)?.notify_doorbells()
    }
}
