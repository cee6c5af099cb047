//! System-level conformance guest: boots through PVH, runs exact-value tests in ring 0 and ring 3 and prints TAP.
//!
//! The same file runs on Paravane and on `qemu-system-x86_64 -kernel`, which serves as the neutral oracle. The
//! debug-exit port 0xf4 receives 0 when every test passed (host exit status 1) and 1 otherwise (status 3).
#![no_std]
#![no_main]

mod flow;
mod paging;
mod rt;
mod syscall;
mod traps;

core::arch::global_asm!(include_str!("boot.s"));

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    rt::init();
    traps::run();
    paging::run();
    flow::run();
    syscall::run();
    rt::finish()
}
