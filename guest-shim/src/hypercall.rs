//! The hypercalls with types.
//!
//! [`Hypercalls`] is proof that an entry sequence stands ready. Its methods pass arguments on as they are: which call makes sense when is
//! said in `specs/hypercalls.md`. Kernels that want native fallbacks use [`crate::Shim`] and [`crate::Vcpu`], which are built on this.

#![allow(unsafe_code)] // A hypercall is a call of code that only the hypervisor knows.

use core::arch::asm;
use pv_abi::Version;
use pv_abi::call::{Call, Error, Shutdown};
use pv_abi::cpuid::ENTRY_BYTES;
use pv_abi::feature::Features;
use pv_abi::virtio::doorbell;

/// Where the entry sequence can be put: [`ENTRY_BYTES`] bytes that can be written at one address and executed at another (or the same).
#[derive(Clone, Copy, Debug)]
pub struct CodeSlot {
    /// Writable address.
    pub write: *mut u8,
    /// Executable address of the same memory, for as long as the shim is used.
    pub execute: *const u8,
}

impl CodeSlot {
    /// A slot that is writable and executable at the same address.
    pub const fn at(address: *mut u8) -> Self {
        Self { write: address, execute: address }
    }
}

/// What a call that works off an array came to when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    /// Elements handled, from the first on. The one behind them was not handled, for the reason given in `error`.
    pub done: u64,
    /// Why.
    pub error: Error,
}

/// Some vCPUs: bit n of `mask` stands for vCPU `first + n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpus {
    /// Which.
    pub mask: u64,
    /// The vCPU of bit 0.
    pub first: u32,
}

impl Vcpus {
    /// A single one.
    pub const fn one(vcpu: u32) -> Self {
        Self { mask: 1, first: vcpu }
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..64).filter(move |n| self.mask >> n & 1 != 0).map(move |n| self.first.saturating_add(n))
    }
}

/// An entry sequence in place.
#[derive(Clone, Copy, Debug)]
pub struct Hypercalls {
    entry: *const u8,
}

// SAFETY: it is the address of code that nobody changes, and each call acts for the vCPU that makes it.
unsafe impl Send for Hypercalls {}
// SAFETY: as above.
unsafe impl Sync for Hypercalls {}

impl Hypercalls {
    /// Copies an entry sequence as CPUID gives it ([`pv_abi::cpuid::entry_code`]) into `slot`.
    ///
    /// # Safety
    /// The bytes come from the hypervisor this runs on, at CPL 0 in 64-bit mode; `slot` holds what its fields promise.
    ///
    /// # Panics
    /// `len` is more than [`ENTRY_BYTES`].
    pub unsafe fn place(code: &[u8; ENTRY_BYTES], len: usize, slot: CodeSlot) -> Self {
        assert!(len <= ENTRY_BYTES, "an entry sequence has {ENTRY_BYTES} bytes at most");
        // SAFETY: the caller gave memory of that length. x86 CPUs notice changed code by themselves after a branch (SDM vol. 3, section 9.1.3).
        unsafe { core::ptr::copy_nonoverlapping(code.as_ptr(), slot.write, len) };
        Self { entry: slot.execute }
    }

    /// Makes a hypercall: RAX and RDX as they come back.
    ///
    /// # Safety
    /// What the call does with these arguments keeps memory safe.
    #[inline]
    pub unsafe fn raw(self, number: u64, args: [u64; 4]) -> (u64, u64) {
        let (rax, rdx);
        // SAFETY: the entry sequence is a function that changes RAX, RDX and status flags only (pv_abi::call), and memory as the caller knows.
        unsafe {
            asm!(
                "call {entry}",
                entry = in(reg) self.entry,
                inlateout("rax") number => rax,
                in("rdi") args[0],
                in("rsi") args[1],
                inlateout("rdx") args[2] => rdx,
                in("rcx") args[3],
            );
        }
        (rax, rdx)
    }

    /// Makes a call; its value, or the error.
    ///
    /// # Safety
    /// As for [`Self::raw`].
    #[inline]
    unsafe fn call(self, call: Call, args: [u64; 4]) -> Result<u64, Error> {
        // SAFETY: handed on to the caller.
        let (rax, rdx) = unsafe { self.raw(call.number(), args) };
        result(rax, rdx)
    }

    /// NEGOTIATE: agrees on a version and features, and forgets what was agreed before. Gives the features in force.
    ///
    /// # Errors
    /// [`Error::BadVersion`], [`Error::BadFeatures`].
    ///
    /// # Safety
    /// It ends all use of features agreed on before: nothing may rely on them any more.
    pub unsafe fn negotiate(self, version: Version, features: Features) -> Result<Features, Error> {
        // SAFETY: handed on to the caller.
        unsafe { self.call(Call::Negotiate, [u64::from(version.to_bits()), features.0, 0, 0]) }.map(Features)
    }

    /// SHARE_PAGE: shares the page at `gpa` for this vCPU, or takes it back with 0.
    ///
    /// # Errors
    /// [`Error::BadAddress`].
    ///
    /// # Safety
    /// The hypervisor writes to the page whenever it likes, until it is taken back.
    pub unsafe fn share_page(self, gpa: u64) -> Result<(), Error> {
        // SAFETY: handed on to the caller.
        unsafe { self.call(Call::SharePage, [gpa, 0, 0, 0]) }.map(drop)
    }

    /// UPDATE_PAGES: applies `count` updates that stand in memory at `gpa`. Gives how many were applied, which may be fewer: call again
    /// with the rest.
    ///
    /// # Errors
    /// How many were applied, and why the next one was not.
    ///
    /// # Safety
    /// The updates leave everything mapped that is in use.
    #[inline]
    pub unsafe fn update_pages(self, gpa: u64, count: u64) -> Result<u64, Partial> {
        // SAFETY: handed on to the caller.
        let (rax, rdx) = unsafe { self.raw(Call::UpdatePages.number(), [gpa, count, 0, 0]) };
        result(rax, rdx).map_err(|error| Partial { done: rdx.min(count), error })
    }

    /// UNMASK: has interrupts delivered that were held back.
    ///
    /// # Errors
    /// [`Error::NoSharedPage`], [`Error::NotNegotiated`].
    #[inline]
    pub fn unmask(self) -> Result<(), Error> {
        // SAFETY: interrupts may come where the caller has set the virtual interrupt flag itself.
        unsafe { self.call(Call::Unmask, [0; 4]) }.map(drop)
    }

    /// SET_TIMER: raises `vector` once at `deadline` ns of the clock; 0 disarms.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a vector below 16.
    #[inline]
    pub fn set_timer(self, deadline: u64, vector: u8) -> Result<(), Error> {
        // SAFETY: it raises an interrupt, which a kernel must be ready for when it enables interrupts.
        unsafe { self.call(Call::SetTimer, [deadline, u64::from(vector), 0, 0]) }.map(drop)
    }

    /// SEND_IPI: raises `vector` on vCPUs. Gives how many were addressed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a vector below 16.
    pub fn send_ipi(self, to: Vcpus, vector: u8) -> Result<u64, Error> {
        // SAFETY: as for `set_timer`.
        unsafe { self.call(Call::SendIpi, [to.mask, u64::from(to.first), u64::from(vector), 0]) }
    }

    /// FLUSH_TLB: invalidates `pages` pages from `address` on, or with all ones the whole address space, on vCPUs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`].
    pub fn flush_tlb(self, on: Vcpus, address: u64, pages: u64) -> Result<(), Error> {
        // SAFETY: it drops cached translations only.
        unsafe { self.call(Call::FlushTlb, [on.mask, u64::from(on.first), address, pages]) }.map(drop)
    }

    /// HALT: enables interrupts and waits for one.
    ///
    /// # Errors
    /// [`Error::NotNegotiated`].
    ///
    /// # Safety
    /// Handlers for what may come are in place, and the caller does not rely on masked interrupts.
    pub unsafe fn halt(self) -> Result<(), Error> {
        // SAFETY: handed on to the caller.
        unsafe { self.call(Call::Halt, [0; 4]) }.map(drop)
    }

    /// KICK: ends another vCPU's halt.
    ///
    /// # Errors
    /// [`Error::NoSuchTarget`].
    pub fn kick(self, vcpu: u32) -> Result<(), Error> {
        // SAFETY: it wakes a vCPU up, no more.
        unsafe { self.call(Call::Kick, [u64::from(vcpu), 0, 0, 0]) }.map(drop)
    }

    /// YIELD: lets another vCPU run; `None`: anyone.
    ///
    /// # Errors
    /// [`Error::NoSuchTarget`].
    pub fn yield_to(self, vcpu: Option<u32>) -> Result<(), Error> {
        // SAFETY: it takes time, no more.
        unsafe { self.call(Call::Yield, [vcpu.map_or(pv_abi::call::ALL_ONES, u64::from), 0, 0, 0]) }.map(drop)
    }

    /// CONSOLE_WRITE: writes `bytes` bytes at `gpa`. Gives how many were written.
    ///
    /// # Errors
    /// [`Error::BadAddress`], [`Error::TooMany`].
    pub fn console_write(self, gpa: u64, bytes: u64) -> Result<u64, Error> {
        // SAFETY: it reads memory only.
        unsafe { self.call(Call::ConsoleWrite, [gpa, bytes, 0, 0]) }
    }

    /// CONSOLE_READ: reads at most `bytes` bytes to `gpa`. Gives how many were read.
    ///
    /// # Errors
    /// [`Error::BadAddress`], [`Error::TooMany`].
    ///
    /// # Safety
    /// The memory may be overwritten.
    pub unsafe fn console_read(self, gpa: u64, bytes: u64) -> Result<u64, Error> {
        // SAFETY: handed on to the caller.
        unsafe { self.call(Call::ConsoleRead, [gpa, bytes, 0, 0]) }
    }

    /// FREE_PAGES: gives up contents of the pages in `count` ranges that stand in memory at `gpa`. Gives how many ranges were handled.
    ///
    /// # Errors
    /// How many were handled, and why the next one was not.
    ///
    /// # Safety
    /// Nothing needs those contents.
    pub unsafe fn free_pages(self, gpa: u64, count: u64) -> Result<u64, Partial> {
        // SAFETY: handed on to the caller.
        let (rax, rdx) = unsafe { self.raw(Call::FreePages.number(), [gpa, count, 0, 0]) };
        result(rax, rdx).map_err(|error| Partial { done: rdx.min(count), error })
    }

    /// SHUTDOWN: powers off or resets. Comes back only with an error.
    pub fn shutdown(self, how: Shutdown) -> Error {
        // SAFETY: it ends the machine.
        unsafe { self.call(Call::Shutdown, [how as u64, 0, 0, 0]) }.err().unwrap_or(Error::NotSupported)
    }

    /// PANIC: reports a panic with a text of `bytes` bytes at `gpa`. Comes back only with an error.
    pub fn panic(self, gpa: u64, bytes: u64) -> Error {
        // SAFETY: it ends the machine.
        unsafe { self.call(Call::Panic, [gpa, bytes, 0, 0]) }.err().unwrap_or(Error::NotSupported)
    }

    /// VIRTIO_READ: reads a register of 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// [`Error::NoSuchTarget`], [`Error::InvalidArgument`].
    #[inline]
    pub fn virtio_read(self, device: u32, offset: u64, size: u64) -> Result<u64, Error> {
        // SAFETY: reading a virtio register touches no memory of the guest.
        unsafe { self.call(Call::VirtioRead, [u64::from(device), offset, size, 0]) }
    }

    /// VIRTIO_WRITE: writes a register of 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// [`Error::NoSuchTarget`], [`Error::InvalidArgument`].
    ///
    /// # Safety
    /// What it makes the device do with memory is right (queue addresses, above all).
    #[inline]
    pub unsafe fn virtio_write(self, device: u32, offset: u64, size: u64, value: u64) -> Result<(), Error> {
        // SAFETY: handed on to the caller.
        unsafe { self.call(Call::VirtioWrite, [u64::from(device), offset, size, value]) }.map(drop)
    }

    /// NOTIFY: tells one queue of one device of new buffers.
    ///
    /// # Errors
    /// [`Error::NoSuchTarget`].
    #[inline]
    pub fn notify(self, device: u32, queue: u16) -> Result<(), Error> {
        // SAFETY: the device looks at a queue whose memory was given to it when it was set up.
        unsafe { self.call(Call::Notify, [doorbell(device, queue), 0, 0, 0]) }.map(drop)
    }

    /// NOTIFY: tells all devices whose doorbell bits are set in the shared page.
    ///
    /// # Errors
    /// [`Error::NoSharedPage`].
    pub fn notify_doorbells(self) -> Result<(), Error> {
        // SAFETY: as for `notify`.
        unsafe { self.call(Call::Notify, [pv_abi::call::ALL_ONES, 0, 0, 0]) }.map(drop)
    }

    /// EVENT_VECTOR: sets the vector that is raised when event bits appear; `None` for none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a vector below 16.
    pub fn event_vector(self, vector: Option<u8>) -> Result<(), Error> {
        // SAFETY: as for `set_timer`.
        unsafe { self.call(Call::EventVector, [vector.map_or(0, u64::from), 0, 0, 0]) }.map(drop)
    }
}

/// RAX and RDX as a result. An error that this version does not know counts as "not supported".
fn result(rax: u64, rdx: u64) -> Result<u64, Error> {
    if rax == 0 { Ok(rdx) } else { Err(Error::from_rax(rax).unwrap_or(Error::NotSupported)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_from_errors() {
        assert_eq!(result(0, 7), Ok(7));
        for e in Error::ALL {
            assert_eq!(result(e.to_rax(), 7), Err(e));
        }
        assert_eq!(result(4096_u64.wrapping_neg(), 7), Err(Error::NotSupported), "a code of a later version");
    }

    #[test]
    fn sets_of_vcpus_are_listed() {
        let list = |mask, first| Vcpus { mask, first }.iter().fold([0; 4], |a, v| [a[1], a[2], a[3], v]);
        assert_eq!(list(0b1011, 64), [0, 64, 65, 67]);
        assert_eq!(list(1 << 63, 0), [0, 0, 0, 63]);
        assert_eq!(Vcpus::one(9).iter().count(), 1);
    }

    /// The register convention, with an entry sequence made here: it gives back RAX = RDI + RSI and RDX = RDX + RCX.
    #[test]
    fn arguments_and_results_are_where_the_abi_says() {
        // SAFETY: a fresh page, unmapped at the end; the code in it keeps the convention.
        let (rax, rdx) = unsafe {
            let page = map_executable_page();
            let code = *b"\x48\x8d\x04\x37\x48\x01\xca\xc3\0\0\0\0"; // lea rax, [rdi+rsi]; add rdx, rcx; ret
            let calls = Hypercalls::place(&code, 8, CodeSlot::at(page));
            let answer = calls.raw(99, [1, 2, 30, 40]);
            munmap(page, 4096);
            answer
        };
        assert_eq!((rax, rdx), (3, 70));
    }

    unsafe extern "C" {
        fn mmap(addr: *mut u8, len: usize, prot: i32, flags: i32, fd: i32, off: i64) -> *mut u8;
        fn munmap(addr: *mut u8, len: usize) -> i32;
    }

    /// An anonymous private page with all rights.
    unsafe fn map_executable_page() -> *mut u8 {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let page = unsafe { mmap(core::ptr::null_mut(), 4096, 7, 0x22, -1, 0) };
        assert_ne!(page as isize, -1, "a page can be mapped");
        page
    }
}
