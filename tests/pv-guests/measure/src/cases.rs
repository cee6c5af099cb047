//! The cases that are measured. Each has the features that its ABI form uses; the same code runs in both forms.

use crate::harness::{Hundredths, Outcome, Run, repeated};
use crate::machine::{Form, Machine};
use crate::{classic, interrupts, io, second_cpu, tables};
use guest_rt::apic::Apic;
use guest_rt::console::Digits;
use guest_rt::paging::Window;
use guest_rt::{cpu, println};
use pv_abi::feature::{Feature, Features};

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
    case("syscall", &[], 100_000, classic::syscall),
    case("in", &[], 100_000, classic::port_in),
    case("cr8-write", &[], 100_000, classic::write_cr8),
    case("call-return", &[], 1_000_000, classic::calls),
    case("page-fault", &[], 100_000, classic::page_fault),
    case("divide-by-zero", &[], 100_000, classic::divide_by_zero),
    case("pte-modify", &[Feature::PageTables], 100_000, tables::modify_entry),
    case("user-call-return", &[], 1_000_000, classic::user_calls),
    case("cpuid", &[], 100_000, classic::cpuid),
    case("rdtsc", &[], 100_000, classic::rdtsc),
    case("msr-read", &[], 100_000, classic::read_msr),
    case("msr-write", &[], 100_000, classic::write_msr),
    case("call", &[Feature::Schedule], 100_000, hypercall),
    case("read-tsc", &[], 100_000, read_tsc),
    case("read-clock", &[Feature::Clock], 100_000, read_clock),
    case("invalidate-page", &[], 100_000, tables::invalidate_page),
    case("cr3-write", &[], 100_000, tables::load_root),
    // 16 rounds of 4096.
    case("page-update", &[Feature::PageTables], 16 * 4096, tables::updates),
    case("update-1", &[Feature::PageTables], 20_000, tables::updates_of::<1>),
    case("update-16", &[Feature::PageTables], 32_000, tables::updates_of::<16>),
    case("update-256", &[Feature::PageTables], 20 * 4096, tables::updates_of::<256>),
    case("update-4096", &[Feature::PageTables], 20 * 4096, tables::updates_of::<4096>),
    case("map-unmap", &[Feature::PageTables], 10 * 4096, tables::map_and_unmap),
    case("switch-space", &[Feature::PageTables], 20_000, tables::switch_spaces),
    case("free-page", &[Feature::FreePages], 4096, tables::free_pages),
    case("mask", &[Feature::VirtualIf], 1_000_000, interrupts::mask_pairs),
    case("mask-pending", &[Feature::VirtualIf], 100_000, interrupts::mask_with_interrupt),
    case("eoi-register", &[], 100_000, interrupts::end_nothing),
    case("eoi", &[Feature::LazyEoi], 100_000, interrupts::eoi),
    case("ipi", &[Feature::Ipi], 100_000, interrupts::ipi),
    case("ipi-other", &[Feature::Ipi], 10_000, second_cpu::to_busy),
    case("ipi-halted", &[Feature::Ipi], 2_000, second_cpu::to_halted),
    case("timer-arm", &[Feature::Timer], 100_000, interrupts::timer_arm),
    case("timer-latency", &[Feature::Timer, Feature::Clock], 200, interrupts::timer_latency),
    case("halt", &[Feature::Schedule], 10_000, interrupts::halt),
    case("halt-latency", &[Feature::Schedule, Feature::Timer, Feature::Clock], 200, interrupts::halt_latency),
    case("read-pm-timer", &[], 100_000, io::read_pm_timer),
    case("port-write", &[], 100_000, io::port_out),
    case("read-lapic-timer", &[], 100_000, io::read_lapic_timer),
    case("mmio-read", &[], 100_000, io::read_register),
    case("mmio-write", &[], 100_000, io::write_register),
    case("virtio-notify", &[Feature::Virtio], 100_000, io::notify),
    case("block-read", &[Feature::Virtio], 2_000, io::read_block),
    case("block-read-mmio", &[], 2_000, io::read_block_mmio),
    case("net-send", &[Feature::Virtio], 2_000, io::send_frame),
    case("net-send-mmio", &[], 2_000, io::send_frame_mmio),
    case("console-line", &[Feature::Console], 10_000, io::console_lines),
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

/// Measures cases one after the other in the stock form: `NAME:COUNT,NAME:COUNT`.
///
/// # Panics
/// There is no such case.
pub(crate) fn run_list(list: &str, window: &Window) {
    for word in list.split(',') {
        let (name, count) = word.split_once(':').unwrap_or((word, ""));
        run_one(name, Form::Stock, window, count.parse().ok());
    }
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
    let outcome = if there { (case.run)(&run) } else { Err("the hypervisor does not offer this feature of the ABI") };
    match outcome {
        Ok(timed) => {
            let (name, form) = (case.name, form.name());
            println!("pieces {name} {form}{timed}");
            println!("measure {name} {form} {} {}", Hundredths(timed.best()), Digits(timed.done, 12));
        }
        Err(reason) => println!("measure {} {} absent {reason}", case.name, form.name()),
    }
    println!("tsc_khz {}", Digits(machine.shim.tsc_khz().0.into(), 8));
}

/// The local APIC in the mode that `boot` chose.
pub(crate) fn apic() -> Apic {
    // SAFETY: every x86-64 CPU has the MSR.
    if unsafe { cpu::read_msr(0x1b) } >> 10 & 1 != 0 { Apic::X2 } else { Apic::Mmio }
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
