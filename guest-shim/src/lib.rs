//! What a kernel uses to run well on Paravane and as well as before everywhere else.
//!
//! The paravirtual ABI (`pv-abi`, described in `specs/`) has features, each of which may be there or not. This crate finds out, and offers for
//! every feature one function that takes the ABI's way where it is there and the native way where it is not. So one kernel binary runs on
//! Paravane, on other hypervisors and on bare metal. It is `no_std`, allocates nothing and starts no thread.
//!
//! A kernel calls [`Shim::init`] once, and [`Vcpu::attach`] once on each CPU:
//!
//! | feature | with the ABI | natively |
//! |---|---|---|
//! | [`Batch`] of page-table updates | UPDATE_PAGES | stores, INVLPG, MOV to CR3 |
//! | [`Vcpu::mask`] | a byte of the shared page, UNMASK | CLI, POPF |
//! | [`Vcpu::ns`] | the shared page's clock | TSC; frequency by CPUID or the PIT |
//! | [`Vcpu::wall_ns`] | the shared page's clock | CMOS clock |
//! | [`Vcpu::set_timer`] | SET_TIMER | TSC deadline, or the local APIC's counter |
//! | [`Vcpu::send_ipi`] | SEND_IPI | ICR |
//! | [`Vcpu::flush_tlb`] | FLUSH_TLB | an IPI and a [handler](smp::FlushRequests::serve) |
//! | [`Vcpu::eoi`] | a bit of the shared page | the EOI register |
//! | [`Vcpu::halt`], [`Vcpu::kick`], [`Vcpu::yield_to`] | HALT, KICK, YIELD | STI and HLT, IPI, PAUSE |
//! | [`Vcpu::stolen_ns`] | the shared page | 0 |
//! | [`Shim::write`], [`Shim::read`] | CONSOLE_WRITE, CONSOLE_READ | 16550 UART |
//! | [`Shim::free_pages`] | FREE_PAGES | nothing |
//! | [`Shim::power_off`], [`Shim::reset`], [`Shim::report_panic`] | SHUTDOWN, PANIC | ACPI PM1a, keyboard controller, pvpanic |
//! | `virtio::Either` (cargo feature `virtio-drivers`) | VIRTIO_READ, VIRTIO_WRITE, NOTIFY | another transport |
//!
//! # Example
//!
//! `tests/pv-guests/measure` is a whole kernel written with this crate; it boots on Paravane and on QEMU. In short:
//!
//! ```no_run
//! # use guest_shim::{CodeSlot, Platform, Shim, Vcpu, SharedMemory};
//! # use pv_abi::{feature::Features, shared::SharedPage};
//! # fn identity(a: u64) -> u64 { a }
//! # fn example(slot: *mut u8, page: *mut SharedPage) {
//! let platform = Platform { to_gpa: identity, to_linear: identity, ..Platform::PC };
//! // SAFETY: CPL 0 in 64-bit mode; `slot` is executable memory of this kernel.
//! let shim = unsafe { Shim::init(platform, CodeSlot::at(slot), Features::all()) };
//! // SAFETY: the page is this CPU's for good, and its local APIC is enabled.
//! let vcpu = unsafe { Vcpu::attach(&shim, 0, Some(SharedMemory { page, gpa: page as u64 })) };
//! let before = vcpu.ns();
//! {
//!     let _masked = vcpu.mask();
//!     // No interrupt comes here.
//! }
//! shim.write(b"hello\n");
//! # let _ = before;
//! # }
//! ```
#![no_std]

pub mod apic;
pub mod batch;
pub mod clock;
pub mod console;
pub mod cpu;
pub mod hypercall;
pub mod irq;
pub mod platform;
pub mod power;
pub mod shim;
pub mod smp;
pub mod timer;
pub mod vcpu;
#[cfg(feature = "virtio-drivers")]
pub mod virtio;

pub use batch::{Batch, Slot};
pub use hypercall::{CodeSlot, Hypercalls, Vcpus};
pub use irq::IrqGuard;
pub use platform::Platform;
pub use shim::{Absent, Limits, Path, Shim};
pub use vcpu::{SharedMemory, Vcpu};

/// Whether CPUID says that this is a Paravane guest. Works on every x86-64 CPU and hypervisor, in any mode.
pub fn detect() -> bool {
    pv_abi::cpuid::find(|leaf| cpu::cpuid(leaf, 0)).is_some()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_test_host_is_not_a_paravane_guest() {
        assert!(!super::detect());
    }
}
