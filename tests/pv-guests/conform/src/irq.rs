//! Interrupts as the tests see them: counted, in order, with a hook for what a test does in a handler.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering::Relaxed};
use guest_rt::apic::Apic;
use guest_rt::cpu;
use guest_rt::trap::{self, Frame};

static ARRIVED: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
static ORDER: [AtomicU8; 16] = [const { AtomicU8::new(0) }; 16];
static COUNT: AtomicUsize = AtomicUsize::new(0);
static HOOK: AtomicUsize = AtomicUsize::new(0);
static APIC: AtomicU8 = AtomicU8::new(0);

/// The APIC that was enabled.
pub(crate) fn apic() -> Apic {
    if APIC.load(Relaxed) == 2 { Apic::X2 } else { Apic::Mmio }
}

/// Enables the local APIC and takes all interrupts.
pub(crate) fn init() {
    let apic = Apic::enable();
    APIC.store(if apic == Apic::X2 { 2 } else { 1 }, Relaxed);
    for v in 32..=254 {
        trap::handle(v, Some(arrived));
    }
    // A spurious interrupt needs no EOI (SDM vol. 3, section 11.9), one that was sent with its vector does.
    trap::handle(
        255,
        Some(|_| {
            if in_service() {
                self::apic().eoi();
            }
        }),
    );
}

fn arrived(frame: &mut Frame) {
    let v = frame.vector as usize & 255;
    ARRIVED[v].fetch_add(1, Relaxed);
    let n = COUNT.fetch_add(1, Relaxed);
    if let Some(slot) = ORDER.get(n) {
        slot.store(v as u8, Relaxed);
    }
    match HOOK.load(Relaxed) {
        0 => apic().eoi(),
        // SAFETY: only function pointers of this type are stored.
        hook => (unsafe { core::mem::transmute::<usize, fn(u8)>(hook) })(v as u8),
    }
}

/// What handlers do instead of writing to the EOI register; `None`: that.
pub(crate) fn hook(h: Option<fn(u8)>) {
    HOOK.store(h.map_or(0, |h| h as usize), Relaxed);
}

/// Forgets what arrived.
pub(crate) fn forget() {
    COUNT.store(0, Relaxed);
    for slot in &ORDER {
        slot.store(0, Relaxed);
    }
}

/// How many interrupts arrived since [`forget`].
pub(crate) fn count() -> u64 {
    COUNT.load(Relaxed) as u64
}

/// How often a vector came in all.
pub(crate) fn seen(v: u8) -> u32 {
    ARRIVED[usize::from(v)].load(Relaxed)
}

/// The vector that came as number `n` since [`forget`]; 0: none.
pub(crate) fn order(n: usize) -> u64 {
    ORDER[n].load(Relaxed).into()
}

/// Enables interrupts for so long that what is pending arrives: some hypervisors take their time.
pub(crate) fn open() {
    let start = cpu::tsc();
    // SAFETY: all vectors have handlers.
    unsafe { cpu::sti() };
    let mut rounds = 0;
    while rounds < 300 || cpu::tsc().wrapping_sub(start) < 100_000 {
        rounds += 1;
        core::hint::spin_loop();
    }
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
}

/// Ticks in which everything that must happen has happened: about two seconds.
pub(crate) const LONG: u64 = 6_000_000_000;
/// About 20 ms.
pub(crate) const SHORT: u64 = 60_000_000;

/// Waits with interrupts enabled until something has arrived; false after `ticks`.
pub(crate) fn wait(ticks: u64) -> bool {
    let start = cpu::tsc();
    // SAFETY: all vectors have handlers.
    unsafe { cpu::sti() };
    while count() == 0 && cpu::tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    count() != 0
}

/// Whether the local APIC has any interrupt in service.
pub(crate) fn in_service() -> bool {
    (0..8).any(|n| apic().read(guest_rt::apic::register::ISR + 16 * n) != 0)
}
