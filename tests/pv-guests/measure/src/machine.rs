//! The shim of the one CPU, in either form, and its interrupt handlers.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};
use guest_rt::{Page, trap};
use guest_shim::{CodeSlot, Platform, SharedMemory, Shim, Vcpu};
use pv_abi::feature::Features;

/// Whether the guest uses the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As far as it is there.
    Abi,
    /// Not at all: as an ordinary kernel.
    Stock,
}

impl Form {
    pub(crate) const ALL: [Self; 2] = [Self::Abi, Self::Stock];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Abi => "abi",
            Self::Stock => "stock",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }
}

/// The shim and the CPU's side of it.
#[derive(Clone, Copy)]
pub(crate) struct Machine {
    pub(crate) form: Form,
    pub(crate) shim: &'static Shim,
    pub(crate) vcpu: &'static Vcpu<'static>,
}

/// Vector of interrupts that only count and end themselves.
pub(crate) const VECTOR: u8 = 0x50;
/// Vector of the native TLB flush.
pub(crate) const FLUSH: u8 = 0x51;

static mut CODE: Page = Page::ZERO;
static mut SHARED: Page = Page::ZERO;
static mut SHIM: Option<Shim> = None;
static mut VCPU: Option<Vcpu<'static>> = None;
/// What the handler reaches.
static CURRENT: AtomicPtr<Vcpu<'static>> = AtomicPtr::new(core::ptr::null_mut());
static ARRIVED: AtomicU64 = AtomicU64::new(0);

/// Interrupts at [`VECTOR`] so far.
pub(crate) fn arrived() -> u64 {
    ARRIVED.load(Relaxed)
}

impl Machine {
    /// Sets the shim up anew: what was agreed on before is forgotten, and with [`Form::Stock`] nothing is agreed on instead. `Machine`s made before
    /// must not be used any more. Interrupts are masked.
    pub(crate) fn start(form: Form, wanted: Features) -> Self {
        let (shim, vcpu) = (&raw mut SHIM, &raw mut VCPU);
        // SAFETY: CPL 0, one CPU, interrupts masked, the local APIC enabled; the pages are used for this only, and no `Machine` made before is used.
        unsafe {
            let known = (*shim).as_ref().map(|s| s.tsc_khz().0);
            let platform = Platform { tsc_khz: known, ..Platform::PC };
            let code = CodeSlot::at((&raw mut CODE).cast());
            CURRENT.store(core::ptr::null_mut(), Relaxed);
            // Even the stock form takes back what an earlier form agreed on.
            let negotiated = Shim::init(platform, code, if form == Form::Abi { wanted } else { Features::NONE });
            *shim = Some(if form == Form::Abi { negotiated } else { Shim::native(platform) });
            let shim = (*shim).as_ref().expect("just made");
            let memory = SharedMemory { page: (&raw mut SHARED).cast(), gpa: &raw const SHARED as u64 };
            *vcpu = Some(Vcpu::attach(shim, 0, (form == Form::Abi).then_some(memory)));
            let vcpu = (*vcpu).as_ref().expect("just made");
            CURRENT.store(core::ptr::from_ref(vcpu).cast_mut(), Relaxed);
            trap::set_gate(VECTOR, Some(counting_stub as *const () as u64));
            trap::handle(FLUSH, Some(|_| current().shim().flushes().serve()));
            Self { form, shim, vcpu }
        }
    }
}

fn current() -> &'static Vcpu<'static> {
    // SAFETY: set by `start` before interrupts are enabled, and to a static.
    unsafe { CURRENT.load(Relaxed).as_ref() }.expect("interrupts come after the start")
}

/// Counts and ends an interrupt.
extern "C" fn counting() {
    ARRIVED.store(ARRIVED.load(Relaxed) + 1, Relaxed);
    current().eoi();
}

/// Saves what a Rust function may change, but for vector registers, which [`counting`] has no use for.
#[unsafe(naked)]
extern "C" fn counting_stub() {
    naked_asm!(
        "push rax", "push rcx", "push rdx", "push rsi", "push rdi", "push r8", "push r9", "push r10", "push r11",
        // The CPU aligned the stack before it pushed five words; with these nine it is aligned again.
        "cld",
        "call {counting}",
        "pop r11", "pop r10", "pop r9", "pop r8", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
        "iretq",
        counting = sym counting
    )
}
