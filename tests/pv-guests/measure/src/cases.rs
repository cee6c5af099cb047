//! The cases that are measured. Each has the features that its ABI form uses; the same code runs in both forms.

use crate::device;
use crate::machine::{Form, Machine, VECTOR, arrived};
use guest_rt::apic::{Apic, register};
use guest_rt::paging::{PAGES, PRESENT_WRITABLE, Window};
use guest_rt::{Page, cpu, info, println};
use guest_shim::{Batch, Slot, Vcpus};
use pv_abi::feature::{Feature, Features};
use pv_abi::memory::FreeRange;
use virtio_drivers::transport::Transport;

/// What a case runs with.
struct Run<'a> {
    machine: Machine,
    window: &'a Window,
    count: u64,
}

/// What a case came to; `None`: the machine has not what it needs.
type Outcome = Option<Timed>;

/// Operations done, in pieces. The quickest piece counts, for a hypervisor is a process that others interrupt.
#[derive(Default)]
struct Timed {
    done: u64,
    /// TSC cycles of one operation times 10, in the quickest piece.
    best: Option<u64>,
}

impl Timed {
    /// Adds a piece.
    fn add(&mut self, operations: u64, work: impl FnOnce()) {
        let start = cpu::tsc_ordered();
        work();
        let tenths = (cpu::tsc_ordered() - start) * 10 / operations.max(1);
        self.done += operations;
        self.best = Some(self.best.map_or(tenths, |b| b.min(tenths)));
    }
}

/// A case.
struct Case {
    name: &'static str,
    /// What the ABI form uses. Without any, there is only one form, named "stock".
    features: &'static [Feature],
    /// Operations when the command line does not say.
    count: u64,
    run: fn(&Run<'_>) -> Outcome,
}

const fn case(name: &'static str, features: &'static [Feature], count: u64, run: fn(&Run<'_>) -> Outcome) -> Case {
    Case { name, features, count, run }
}

const CASES: &[Case] = &[
    // 16 rounds of 4096.
    case("page-update", &[Feature::PageTables], 16 * 4096, page_updates),
    case("page-update-touch", &[Feature::PageTables], 16 * 4096, page_updates_and_use),
    case("mask", &[Feature::VirtualIf], 1_000_000, mask_pairs),
    case("mask-pending", &[Feature::VirtualIf], 100_000, mask_with_interrupt),
    case("read-pm-timer", &[], 100_000, read_pm_timer),
    case("read-lapic-timer", &[], 100_000, read_lapic_timer),
    case("read-tsc", &[], 100_000, read_tsc),
    case("read-clock", &[Feature::Clock], 100_000, read_clock),
    case("eoi", &[Feature::LazyEoi], 100_000, eoi),
    case("ipi", &[Feature::Ipi], 100_000, ipi),
    case("timer-arm", &[Feature::Timer], 100_000, timer_arm),
    case("halt", &[Feature::Schedule], 10_000, halt),
    case("virtio-notify", &[Feature::Virtio], 100_000, notify),
    case("console-line", &[Feature::Console], 10_000, console_lines),
    case("free-page", &[Feature::FreePages], 4096, free_pages),
    case("call", &[Feature::Schedule], 100_000, hypercall),
];

/// Measures one case in one form.
///
/// # Panics
/// There is no such case.
pub(crate) fn run_one(name: &str, form: Form, window: &Window, count: Option<u64>) {
    if name == "empty" {
        // What every run costs, to be taken off.
        Machine::start(form, Features::NONE);
        return;
    }
    let case = CASES.iter().find(|c| c.name == name).expect("case= names a case");
    measure(case, form, window, count);
}

/// Measures all cases in both forms.
pub(crate) fn run_all(window: &Window, count: Option<u64>) {
    for case in CASES {
        for form in [Form::Stock, Form::Abi] {
            measure(case, form, window, count);
        }
    }
}

fn measure(case: &Case, form: Form, window: &Window, count: Option<u64>) {
    let wanted = Features::of(case.features);
    let machine = Machine::start(form, wanted);
    let there = form == Form::Stock || (!case.features.is_empty() && machine.shim.features() == wanted);
    let run = Run { machine, window, count: count.unwrap_or(case.count) };
    match there.then(|| (case.run)(&run)).flatten() {
        Some(Timed { done, best }) => {
            let tenths = best.unwrap_or(0);
            println!("measure {} {} {}.{} {done}", case.name, form.name(), tenths / 10, tenths % 10);
        }
        None => println!("measure {} {} absent", case.name, form.name()),
    }
    println!("tsc_khz {}", machine.shim.tsc_khz().0);
}

/// Pieces that [`repeated`] makes.
const PIECES: u64 = 20;

/// Does `work` `count` times, or a few times less so that all pieces are equal.
fn repeated(count: u64, mut work: impl FnMut()) -> Outcome {
    let mut timed = Timed::default();
    let piece = (count / PIECES).max(1);
    for _ in 0..PIECES.min(count) {
        timed.add(piece, || {
            for _ in 0..piece {
                work();
            }
        });
    }
    Some(timed)
}

static mut PAIR: [Page; 2] = [const { Page::ZERO }; 2];

/// Rounds of [`PAGES`] updates, each with its invalidation, that map two pages in turn.
fn rounds(run: &Run<'_>, mut after: impl FnMut()) -> Outcome {
    // A page of updates fits in every hypervisor's limit and lies in one piece.
    #[repr(align(4096))]
    struct Buffer([Slot; 256]);
    static mut BUFFER: Buffer = Buffer([Slot::EMPTY; 256]);
    let pages = [0, 1].map(|n| &raw const PAIR as u64 + 4096 * n);
    let rounds = run.count.div_ceil(PAGES as u64);
    let buffer = &raw mut BUFFER;
    let mut timed = Timed::default();
    for round in 0..rounds as usize {
        // SAFETY: the only reference, as cases do not nest; the window's entries are nobody else's.
        timed.add(PAGES as u64, || unsafe {
            let mut batch = Batch::new(run.machine.shim, &mut (*buffer).0);
            for n in 0..PAGES {
                batch.set_entry(run.window.entry_gpa(n), pages[(round + n) % 2] | PRESENT_WRITABLE);
                batch.invalidate(run.window.address(n), 0);
            }
            batch.flush();
            assert_eq!(batch.refused(), 0);
            after();
        });
    }
    Some(timed)
}

fn page_updates(run: &Run<'_>) -> Outcome {
    rounds(run, || {})
}

fn page_updates_and_use(run: &Run<'_>) -> Outcome {
    rounds(run, || {
        for n in 0..PAGES {
            // SAFETY: `rounds` has mapped a page there.
            unsafe { core::ptr::read_volatile(run.window.address(n) as *const u64) };
        }
    })
}

/// With interrupts enabled by RFLAGS.
fn enabled<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: handlers are in place; CPL 0.
    unsafe { cpu::sti() };
    let result = work();
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    result
}

fn mask_pairs(run: &Run<'_>) -> Outcome {
    enabled(|| repeated(run.count, || drop(run.machine.vcpu.mask())))
}

/// An interrupt comes in while they are masked, each time.
fn mask_with_interrupt(run: &Run<'_>) -> Outcome {
    let apic = apic();
    let before = arrived();
    let outcome = enabled(|| {
        repeated(run.count, || {
            let before = arrived();
            let guard = run.machine.vcpu.mask();
            apic.send_self(VECTOR);
            drop(guard);
            while arrived() == before {
                core::hint::spin_loop();
            }
        })
    });
    assert!(arrived() > before);
    outcome
}

/// Port of the ACPI PM timer, on Paravane's and on QEMU's PC.
const PM_TIMER: u16 = 0x608;

fn read_pm_timer(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        // SAFETY: a counter.
        core::hint::black_box(unsafe { cpu::in32(PM_TIMER) });
    })
}

/// The local APIC in the mode that `boot` chose.
fn apic() -> Apic {
    // SAFETY: every x86-64 CPU has the MSR.
    if unsafe { cpu::read_msr(0x1b) } >> 10 & 1 != 0 { Apic::X2 } else { Apic::Mmio }
}

fn read_lapic_timer(run: &Run<'_>) -> Outcome {
    let apic = apic();
    apic.write(register::TIMER_DIVIDE, 3);
    // Masked, as after reset.
    apic.write(register::LVT_TIMER, 1 << 16);
    apic.write(register::TIMER_INITIAL, u32::MAX);
    let outcome = repeated(run.count, || {
        core::hint::black_box(apic.read(register::TIMER_CURRENT));
    });
    apic.write(register::TIMER_INITIAL, 0);
    outcome
}

fn read_tsc(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        core::hint::black_box(cpu::tsc_ordered());
    })
}

fn read_clock(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        core::hint::black_box(run.machine.vcpu.ns());
    })
}

/// Interrupts that this CPU sends to itself by `send`, one by one.
fn interrupts(run: &Run<'_>, send: impl Fn()) -> Outcome {
    let before = arrived();
    let outcome = enabled(|| {
        repeated(run.count, || {
            let before = arrived();
            send();
            while arrived() == before {
                core::hint::spin_loop();
            }
        })
    });
    assert!(arrived() > before);
    outcome
}

/// Sent natively in both forms.
fn eoi(run: &Run<'_>) -> Outcome {
    let apic = apic();
    interrupts(run, || apic.send_self(VECTOR))
}

/// Ended natively in both forms.
fn ipi(run: &Run<'_>) -> Outcome {
    interrupts(run, || {
        run.machine.vcpu.send_ipi(Vcpus::one(0), VECTOR);
    })
}

fn timer_arm(run: &Run<'_>) -> Outcome {
    let vcpu = run.machine.vcpu;
    let later = vcpu.ns() + 100_000_000_000;
    let mut n = 0;
    let outcome = repeated(run.count, || {
        n += 1;
        vcpu.set_timer(Some(later + n * 1000), VECTOR);
    });
    vcpu.set_timer(None, VECTOR);
    outcome
}

/// An interrupt is on its way already when the CPU halts: what the way in and out costs, without sleep.
fn halt(run: &Run<'_>) -> Outcome {
    let apic = apic();
    let before = arrived();
    let outcome = repeated(run.count, || {
        // SAFETY: CPL 0; handlers are in place.
        unsafe {
            cpu::cli();
            apic.send_self(VECTOR);
            run.machine.vcpu.halt();
        }
    });
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    assert!(arrived() > before);
    outcome
}

fn notify(run: &Run<'_>) -> Outcome {
    let mut transport = device::with_empty_queue(&run.machine, run.machine.form == Form::Abi)?;
    repeated(run.count, || transport.notify(0))
}

fn console_lines(run: &Run<'_>) -> Outcome {
    const LINE: &[u8; 64] = b"line of 64 characters, as a kernel's log has them: 123456789012\n";
    repeated(run.count, || run.machine.shim.write(LINE))
}

/// Pages of one range.
const RANGE: u64 = 16;

fn free_pages(run: &Run<'_>) -> Outcome {
    let (start, bytes) = info::free_ram();
    let pages = run.count.min(bytes >> 12) / RANGE * RANGE;
    // SAFETY: free RAM, mapped one to one: the pages have contents to lose.
    unsafe { core::ptr::write_bytes(start as *mut u8, 1, (pages << 12) as usize) };
    let mut ranges = [FreeRange { gpa: 0, pages: RANGE }; 32];
    let mut timed = Timed::default();
    while timed.done < pages {
        let count = ((pages - timed.done) / RANGE).min(ranges.len() as u64) as usize;
        for (n, r) in ranges[..count].iter_mut().enumerate() {
            r.gpa = start + ((timed.done + n as u64 * RANGE) << 12);
        }
        timed.add(count as u64 * RANGE, || {
            // SAFETY: nobody needs those pages.
            unsafe { run.machine.shim.free_pages(&ranges[..count]) };
        });
    }
    Some(timed)
}

/// The cheapest call: a number that does not exist. Natively the cheapest exit: a port that nobody answers.
fn hypercall(run: &Run<'_>) -> Outcome {
    match run.machine.shim.hypercalls() {
        // SAFETY: there is no such call.
        Some(calls) => repeated(run.count, || unsafe {
            calls.raw(0, [0; 4]);
        }),
        // SAFETY: the port is used for delays and diagnostics.
        None => repeated(run.count, || unsafe { cpu::out8(0x80, 0) }),
    }
}
