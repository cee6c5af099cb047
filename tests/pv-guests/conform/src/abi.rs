//! The ABI as a hostile guest would use it: raw calls with any registers, and pages to hand over.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};
use guest_rt::{Page, cpu};
use pv_abi::Version;
use pv_abi::call::{Call, Error};
use pv_abi::cpuid;
use pv_abi::feature::{Feature, Features};
use pv_abi::memory::Update;
use pv_abi::shared::SharedPage;

/// Why a test did not pass.
pub(crate) enum Why {
    /// Something was not as it must be.
    Wrong { what: &'static str, got: u64, want: u64 },
    /// It cannot be tried here.
    Absent(&'static str),
}

/// What a test comes to.
pub(crate) type Outcome = Result<(), Why>;

/// Compares.
pub(crate) fn check(what: &'static str, got: u64, want: u64) -> Outcome {
    if got == want { Ok(()) } else { Err(Why::Wrong { what, got, want }) }
}

/// Holds or does not.
pub(crate) fn holds(what: &'static str, condition: bool) -> Outcome {
    check(what, condition.into(), 1)
}

/// Result of a call: RAX and RDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) rax: u64,
    pub(crate) rdx: u64,
}

impl Answer {
    /// It succeeded with this value.
    pub(crate) fn gives(self, what: &'static str, value: u64) -> Outcome {
        check(what, self.rax, 0)?;
        check(what, self.rdx, value)
    }

    /// It failed with this error and nothing done.
    pub(crate) fn fails(self, what: &'static str, error: Error) -> Outcome {
        self.stops(what, error, 0)
    }

    /// It failed with this error behind so many elements.
    pub(crate) fn stops(self, what: &'static str, error: Error, done: u64) -> Outcome {
        check(what, self.rax, error.to_rax())?;
        check(what, self.rdx, done)
    }
}

/// Pages that tests hand to the hypervisor.
pub(crate) const PAGES: usize = 24;
static mut SCRATCH: [Page; PAGES] = [Page::ZERO; PAGES];

/// Address, linear and guest-physical, of a scratch page; page 0 is the shared one.
pub(crate) fn page(n: usize) -> u64 {
    assert!(n < PAGES);
    &raw const SCRATCH as u64 + 4096 * n as u64
}

/// Reads scratch memory.
pub(crate) fn get(at: u64) -> u64 {
    // SAFETY: tests pass addresses in scratch pages or in free RAM, 8 bytes aligned.
    unsafe { read_volatile(at as *const u64) }
}

/// Writes scratch memory.
pub(crate) fn put(at: u64, value: u64) {
    // SAFETY: as in `get`.
    unsafe { write_volatile(at as *mut u64, value) }
}

/// Reads a byte.
pub(crate) fn get8(at: u64) -> u8 {
    // SAFETY: as in `get`.
    unsafe { read_volatile(at as *const u8) }
}

/// Writes a byte.
pub(crate) fn put8(at: u64, value: u8) {
    // SAFETY: as in `get`.
    unsafe { write_volatile(at as *mut u8, value) }
}

/// Fills a scratch page with a byte.
pub(crate) fn fill(at: u64, byte: u8) {
    for n in 0..512 {
        put(at + 8 * n, u64::from_ne_bytes([byte; 8]));
    }
}

/// Stores an array of updates in scratch memory.
pub(crate) fn store(at: u64, updates: &[Update]) {
    for (n, u) in (0..).zip(updates) {
        put(at + 16 * n, u.target);
        put(at + 16 * n + 8, u.value);
    }
}

/// Addresses that are no RAM: the local APIC, the I/O APIC, the hole for devices, and beyond everything.
pub(crate) const NOT_RAM: [u64; 6] = [0xfee0_0000, 0xfec0_0000, 0xd000_0000, 1 << 39, 1 << 51, 0xffff_ffff_ffff_f000];

/// The first address behind RAM at which the machine has none.
pub(crate) fn ram_end() -> u64 {
    let (start, bytes) = guest_rt::info::free_ram();
    start + bytes
}

/// Offset of a field of the shared page.
#[macro_export]
macro_rules! at {
    ($field:ident) => {
        core::mem::offset_of!(pv_abi::shared::SharedPage, $field) as u64
    };
}

/// The interface that was found.
#[derive(Clone, Copy)]
pub(crate) struct Abi {
    pub(crate) base: u32,
    pub(crate) offered: Features,
    entry: u64,
}

#[repr(align(64))]
#[allow(dead_code, reason = "reached through its address")]
struct Code([u8; 64]);
static mut ENTRY: Code = Code([0; 64]);

/// A CPUID leaf.
pub(crate) fn leaf(n: u32) -> [u32; 4] {
    cpu::cpuid(n, 0)
}

impl Abi {
    /// Looks for it; `None` where there is none, or nothing on offer.
    pub(crate) fn find() -> Option<Self> {
        let base = cpuid::find(leaf)?;
        let [version, low, high, _] = leaf(base + cpuid::FEATURES);
        if !Version::CURRENT.works_with(Version::from_bits(version)) {
            return None;
        }
        let entry = &raw mut ENTRY as u64;
        let (code, len) = cpuid::entry_code(leaf(base + cpuid::ENTRY))?;
        for (at, byte) in (entry..).zip(&code[..len]) {
            put8(at, *byte);
        }
        Some(Self { base, offered: Features(u64::from(high) << 32 | u64::from(low)), entry })
    }

    /// Address of the entry sequence.
    pub(crate) fn entry(self) -> u64 {
        self.entry
    }

    /// EAX to EDX of the leaf with the limits.
    pub(crate) fn limits(self) -> [u64; 4] {
        leaf(self.base + cpuid::LIMITS).map(u64::from)
    }

    /// A call with all registers as given.
    pub(crate) fn raw(self, number: u64, arguments: [u64; 4]) -> Answer {
        let [a, b, c, d] = arguments;
        let (rax, rdx);
        // SAFETY: the entry sequence keeps all registers but these two. What the call does to memory is what tests are about: they give
        // it scratch pages or what must be refused.
        unsafe {
            asm!("call {}", in(reg) self.entry, inlateout("rax") number => rax, in("rdi") a, in("rsi") b,
                inlateout("rdx") c => rdx, in("rcx") d);
        }
        Answer { rax, rdx }
    }

    /// A call; arguments that are not given are 0.
    pub(crate) fn call(self, call: Call, arguments: &[u64]) -> Answer {
        let mut all = [0; 4];
        all[..arguments.len()].copy_from_slice(arguments);
        self.raw(call.number(), all)
    }

    /// A NEGOTIATE with the current version.
    pub(crate) fn negotiate(self, features: Features) -> Answer {
        self.call(Call::Negotiate, &[Version::CURRENT.to_bits().into(), features.0])
    }

    /// Everything on offer in force, and scratch page 0 shared.
    pub(crate) fn begin(self) -> Outcome {
        self.begin_with(self.offered)
    }

    /// These features in force, and scratch page 0 shared.
    pub(crate) fn begin_with(self, features: Features) -> Outcome {
        self.negotiate(features).gives("NEGOTIATE", features.0)?;
        self.call(Call::SharePage, &[page(0)]).gives("SHARE_PAGE", 0)
    }

    /// Whether a feature is on offer; the test is skipped if not.
    pub(crate) fn need(self, f: Feature) -> Outcome {
        if self.offered.has(f) { Ok(()) } else { Err(Why::Absent(f.name())) }
    }

    /// The clock as the shared page has it.
    pub(crate) fn clock(self) -> pv_abi::shared::Clock {
        // SAFETY: the page holds the structure.
        unsafe { read_volatile((page(0) + at!(clock)) as *const pv_abi::shared::Clock) }
    }

    /// Now, in ns of the clock.
    pub(crate) fn now(self) -> u64 {
        self.clock().ns(cpu::tsc_ordered())
    }
}

/// Every byte of the shared page, as a checksum.
pub(crate) fn sum(at: u64) -> u64 {
    (0..512).fold(0, |sum: u64, n| sum.rotate_left(5).wrapping_add(get(at + 8 * n)))
}

const _: () = assert!(size_of::<SharedPage>() == 4096);
