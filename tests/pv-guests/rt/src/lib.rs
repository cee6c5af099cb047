//! A runtime for bare-metal guests: from the PVH entry to a Rust function with page tables, interrupts and text.
//!
//! A guest is a binary that names its main function with [`entry!`] and prints with [`println!`]. It starts in 64-bit mode at CPL 0 with
//! 4 GiB mapped one to one (`boot.s`), interrupts disabled, a stack of 64 KiB, SSE enabled, no heap, and all vectors handled
//! ([`trap`]). The same file runs on every hypervisor that starts PVH kernels, QEMU's `-kernel` among them.
//!
//! One vCPU runs at a time, so the runtime's state is plain statics.
//!
//! | module | what it offers |
//! |---|---|
//! | [`console`] | text on COM1, and the way out: debug-exit port, power-off |
//! | [`info`] | what the hypervisor said at the start: command line, memory map |
//! | [`trap`] | interrupt and exception handlers, faults that are expected, user mode |
//! | [`paging`] | a window of 16 MiB whose page tables the guest owns |
//! | [`apic`] | the local APIC in either form |
//!
//! Ports, MSRs and CPUID are in [`guest_shim::cpu`].
#![no_std]

pub mod apic;
pub mod console;
pub mod info;
pub mod paging;
pub mod trap;

pub use guest_shim::cpu;

core::arch::global_asm!(include_str!("boot.s"));
core::arch::global_asm!(include_str!("memory.s"));

/// Names the guest's main function, `fn() -> !`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn rt_main() -> ! {
            $crate::start();
            let main: fn() -> ! = $main;
            main()
        }
    };
}

/// What [`entry!`] does before the guest's own main function: installs handlers for all vectors and masks the 8259A pair.
pub fn start() {
    trap::init();
    apic::mask_pics();
}

/// A page of memory at a page boundary.
#[repr(C, align(4096))]
pub struct Page(pub [u8; 4096]);

impl Page {
    /// All zero.
    pub const ZERO: Self = Self([0; 4096]);
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("Bail out! {info}");
    console::exit(2)
}
