//! Instructions that a kernel needs and Rust has no name for: ports, MSRs, CPUID, the time-stamp counter, invalidation.
//!
//! These are the building blocks of the native fallbacks. They are public because every kernel has to have them anyway; nothing here
//! knows of hypervisors.

#![allow(unsafe_code)] // Each function is one privileged or I/O instruction, which only assembly can express.

use core::arch::asm;

/// IN of 1 byte.
///
/// # Safety
/// Reading the port must have no effect that breaks memory safety (a device that is made to write to memory in use, for example).
#[inline]
pub unsafe fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: the caller answers for the port; the instruction changes AL only.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of 1 byte.
///
/// # Safety
/// As for [`in8`].
#[inline]
pub unsafe fn out8(port: u16, value: u8) {
    // SAFETY: the caller answers for the port. Not `nomem`: a device may be told of memory that was written before.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// IN of 2 bytes.
///
/// # Safety
/// As for [`in8`].
#[inline]
pub unsafe fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as in `in8`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of 2 bytes.
///
/// # Safety
/// As for [`in8`].
#[inline]
pub unsafe fn out16(port: u16, value: u16) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

/// IN of 4 bytes.
///
/// # Safety
/// As for [`in8`].
#[inline]
pub unsafe fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as in `in8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of 4 bytes.
///
/// # Safety
/// As for [`in8`].
#[inline]
pub unsafe fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// RDMSR.
///
/// # Safety
/// CPL 0, and the MSR exists (otherwise #GP).
#[inline]
pub unsafe fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller answers for the MSR.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR.
///
/// # Safety
/// CPL 0, the MSR exists, and what the write causes keeps memory safe.
#[inline]
pub unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: the caller answers for MSR and value.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// CPUID: EAX, EBX, ECX and EDX of a leaf and subleaf.
#[inline]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let l = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [l.eax, l.ebx, l.ecx, l.edx]
}

/// RDTSC.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has a TSC, and kernels may always read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// RDTSC behind all earlier loads (LFENCE; SDM vol. 2B, RDTSC).
#[inline]
pub fn tsc_ordered() -> u64 {
    // SAFETY: every x86-64 CPU has SSE2 and a TSC.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// INVLPG.
///
/// # Safety
/// CPL 0. (It drops a cached translation; what the page tables then say is the caller's business.)
#[inline]
pub unsafe fn invlpg(address: u64) {
    // SAFETY: privileged, which the caller answers for. Not `nomem`: later accesses see the new mapping.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// MOV from CR3.
///
/// # Safety
/// CPL 0.
#[inline]
pub unsafe fn read_cr3() -> u64 {
    let value;
    // SAFETY: privileged, which the caller answers for.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// MOV to CR3.
///
/// # Safety
/// CPL 0; the new page tables map code, stack and data that are in use.
#[inline]
pub unsafe fn write_cr3(value: u64) {
    // SAFETY: the caller answers for the page tables.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// MOV from CR4.
///
/// # Safety
/// CPL 0.
#[inline]
pub unsafe fn read_cr4() -> u64 {
    let value;
    // SAFETY: privileged, which the caller answers for.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// MOV to CR4.
///
/// # Safety
/// CPL 0; the bits are supported, and code, stack and data in use stay mapped.
#[inline]
pub unsafe fn write_cr4(value: u64) {
    // SAFETY: the caller answers for the bits.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// RFLAGS.
#[inline]
pub fn flags() -> u64 {
    let value;
    // SAFETY: reads the flags through the stack, which the compiler keeps usable for it.
    unsafe { asm!("pushfq", "pop {}", out(reg) value, options(nomem, preserves_flags)) };
    value
}

/// RFLAGS.IF.
pub const FLAG_IF: u64 = 1 << 9;

/// CLI.
///
/// # Safety
/// CPL 0 (or IOPL 3).
#[inline]
pub unsafe fn cli() {
    // SAFETY: privileged, which the caller answers for. Not `nomem`: it orders accesses against interrupt handlers.
    unsafe { asm!("cli", options(nostack)) };
}

/// STI.
///
/// # Safety
/// CPL 0 (or IOPL 3), and handlers for what may come are in place.
#[inline]
pub unsafe fn sti() {
    // SAFETY: the caller answers for the handlers.
    unsafe { asm!("sti", options(nostack)) };
}

/// STI and HLT: enables interrupts and waits for one. None is lost in between, because STI takes effect behind the next instruction.
///
/// # Safety
/// As for [`sti`].
#[inline]
pub unsafe fn enable_and_halt() {
    // SAFETY: the caller answers for the handlers.
    unsafe { asm!("sti", "hlt", options(nostack)) };
}
