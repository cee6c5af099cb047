//! Masking interrupts.
//!
//! With the ABI, a byte of the shared page masks interrupts beside RFLAGS.IF: a store masks, a store and a look at "something waits" unmask, and only
//! if something waits there is a call. RFLAGS.IF stays set. Natively it is CLI and POPF.

#![allow(unsafe_code)] // The shared page, and privileged instructions.

use crate::cpu;
use crate::vcpu::Vcpu;
use core::sync::atomic::{Ordering::SeqCst, compiler_fence};
use pv_abi::feature::Feature;
use pv_abi::shared::SharedPage;

/// How interrupts were before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// They were masked already.
    Masked,
    /// RFLAGS.IF was set, and was cleared natively.
    Flag,
    /// The byte of this page was set.
    Byte(*mut SharedPage),
}

/// Interrupts are masked while this exists. Guards may be nested; they end in reverse order.
#[derive(Debug)]
#[must_use = "interrupts are unmasked as it is dropped"]
pub struct IrqGuard<'v> {
    vcpu: &'v Vcpu<'v>,
    before: Before,
}

impl<'s> Vcpu<'s> {
    /// Masks interrupts until the guard is dropped.
    #[inline]
    pub fn mask(&self) -> IrqGuard<'_> {
        let before = match self.page_for(Feature::VirtualIf) {
            Some(page) => {
                // SAFETY: the page is shared for good.
                unsafe { mask_byte(page) }
            }
            None => {
                let enabled = cpu::flags() & cpu::FLAG_IF != 0;
                // SAFETY: the shim runs at CPL 0.
                unsafe { cpu::cli() };
                if enabled { Before::Flag } else { Before::Masked }
            }
        };
        compiler_fence(SeqCst);
        IrqGuard { vcpu: self, before }
    }

    /// Whether an interrupt may be delivered now.
    pub fn interrupts_enabled(&self) -> bool {
        let byte = self.page_for(Feature::VirtualIf).is_none_or(|page| {
            // SAFETY: the page is shared for good.
            unsafe { (&raw const (*page).irq_enabled).read_volatile() != 0 }
        });
        byte && cpu::flags() & cpu::FLAG_IF != 0
    }

    /// Enables interrupts and waits for one; none that comes meanwhile is missed. To be called with interrupts masked, as the last step of "there is
    /// nothing to do". Interrupts are enabled afterwards.
    ///
    /// # Safety
    /// Handlers for what may come are in place.
    pub unsafe fn halt(&self) {
        if let Some(calls) = self.shim.calls_for(Feature::Schedule) {
            // SAFETY: handed on to the caller.
            if unsafe { calls.halt() }.is_ok() {
                return;
            }
        }
        if let Some(page) = self.page_for(Feature::VirtualIf) {
            // SAFETY: the page is shared for good; RFLAGS.IF holds interrupts back until STI, whose shadow reaches over HLT.
            unsafe {
                cpu::cli();
                (&raw mut (*page).irq_enabled).write_volatile(1);
                compiler_fence(SeqCst);
                if (&raw const (*page).irq_pending).read_volatile() != 0 {
                    self.unmask_call();
                }
            }
        }
        // SAFETY: handed on to the caller.
        unsafe { cpu::enable_and_halt() };
    }

    #[cold]
    fn unmask_call(&self) {
        if let Some(calls) = self.shim.calls_for(Feature::VirtualIf) {
            // It fails only if the feature is not in force, and then nothing was held back.
            let _ = calls.unmask();
        }
    }
}

/// # Safety
/// The page is shared.
#[inline]
unsafe fn mask_byte(page: *mut SharedPage) -> Before {
    // SAFETY: the byte is this CPU's to write; the hypervisor only reads it.
    unsafe {
        let byte = &raw mut (*page).irq_enabled;
        let enabled = byte.read_volatile() != 0;
        byte.write_volatile(0);
        if enabled { Before::Byte(page) } else { Before::Masked }
    }
}

/// Gives whether an interrupt waits that UNMASK must be called for.
///
/// # Safety
/// The page is shared.
#[inline]
unsafe fn unmask_byte(page: *mut SharedPage) -> bool {
    // SAFETY: as in `mask_byte`. The order matters: an interrupt that comes between the two is delivered at once.
    unsafe {
        (&raw mut (*page).irq_enabled).write_volatile(1);
        compiler_fence(SeqCst);
        (&raw const (*page).irq_pending).read_volatile() != 0
    }
}

impl Drop for IrqGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        compiler_fence(SeqCst);
        match self.before {
            Before::Masked => {}
            // SAFETY: interrupts were enabled when the guard was made.
            Before::Flag => unsafe { cpu::sti() },
            Before::Byte(page) => {
                // SAFETY: the page is shared for good.
                if unsafe { unmask_byte(page) } {
                    self.vcpu.unmask_call();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A zeroed page.
    fn zeroed() -> SharedPage {
        // SAFETY: all fields are integers, for which every bit pattern is a value.
        unsafe { core::mem::zeroed() }
    }

    #[test]
    fn the_byte_is_masked_once_and_pending_interrupts_show() {
        let mut page = zeroed();
        page.irq_enabled = 1;
        let at = &raw mut page;
        // SAFETY: a page of this test's own.
        unsafe {
            assert_eq!(mask_byte(at), Before::Byte(at));
            assert_eq!((*at).irq_enabled, 0);
            assert_eq!(mask_byte(at), Before::Masked, "nested");
            assert!(!unmask_byte(at));
            assert_eq!((*at).irq_enabled, 1);
            let _ = mask_byte(at);
            (*at).irq_pending = 1;
            assert!(unmask_byte(at));
        }
    }
}
