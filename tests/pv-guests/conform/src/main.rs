//! The conformance guest of the paravirtual ABI: one function for each clause of `specs/`, TAP on the serial port.
//!
//! The same file runs on any hypervisor that starts PVH kernels. Where there is no ABI, it says so, and what remains are the native ways (FALL).
//! `only=ID` on the command line runs one clause, `skip=ID,ID` leaves some out; `end=poweroff`, `end=reset` and `end=panic` run what ends the machine, which its exit status
//! judges; `fuzz=SEED calls=N` runs [`fuzz`].
#![no_std]
#![no_main]

mod abi;
mod calls;
mod discovery;
mod ending;
mod fallback;
mod fuzz;
mod interrupts;
mod irq;
mod kvm;
mod memory;
mod page;
mod platform;
mod safe;
mod time;
mod virtio;

use abi::{Abi, Outcome, Why};
use guest_rt::{console, cpu, entry, info, println};
use pv_abi::feature::Feature;

/// A clause's test: identifier, what it shows, and how.
pub(crate) type Test = (&'static str, &'static str, Kind);

/// What a test needs.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// The ABI with everything on offer in force and scratch page 0 shared.
    Ready(fn(Abi) -> Outcome),
    /// The ABI before anything was negotiated.
    Fresh(fn(Abi) -> Outcome),
    /// Any machine.
    Native(fn() -> Outcome),
}

const GROUPS: [&[Test]; 11] = [
    discovery::TESTS,
    calls::TESTS,
    page::TESTS,
    memory::TESTS,
    interrupts::TESTS,
    time::TESTS,
    platform::TESTS,
    virtio::TESTS,
    safe::TESTS,
    kvm::TESTS,
    fallback::TESTS,
];

entry!(main);

fn main() -> ! {
    irq::init();
    let found = Abi::find();
    for f in Feature::ALL {
        println!(
            "# feature {} {}",
            f.name(),
            if found.is_some_and(|a| a.offered.has(f)) { "offered" } else { "absent" }
        );
    }
    if let Some(abi) = found {
        if let Some(how) = info::option("end") {
            ending::end(abi, how);
        }
        if let Some(seed) = info::option("fuzz") {
            fuzz::run(abi, seed);
        }
    }
    let only = info::option("only");
    let skip = info::option("skip").unwrap_or_default();
    let (mut number, mut failed) = (0, 0);
    for (id, what, kind) in GROUPS.into_iter().flatten() {
        if only.is_some_and(|o| o != *id) {
            continue;
        }
        number += 1;
        let outcome = if skip.split(',').any(|s| s == *id) {
            Err(Why::Absent("left out, as the command line says"))
        } else {
            run(*kind, found)
        };
        match outcome {
            Ok(()) => println!("ok {number} - {id} {what}"),
            Err(Why::Absent(missing)) => println!("ok {number} - {id} {what} # SKIP {missing}"),
            Err(Why::Wrong { what: part, got, want }) => {
                failed += 1;
                println!("not ok {number} - {id} {what} # {part}: got {got:#x}, want {want:#x}");
            }
        }
    }
    println!("1..{number}");
    console::exit(u32::from(failed != 0 || number == 0))
}

fn run(kind: Kind, found: Option<Abi>) -> Outcome {
    // SAFETY: CPL 0; tests begin and end with interrupts disabled.
    unsafe { cpu::cli() };
    irq::hook(None);
    irq::forget();
    let outcome = match kind {
        Kind::Native(test) => test(),
        Kind::Ready(test) => found.ok_or(Why::Absent("no ABI here")).and_then(|abi| {
            abi.begin()?;
            let outcome = test(abi);
            // Whatever the test has set up ends here; what it has left pending arrives before the next one.
            irq::hook(None);
            abi.begin()?;
            outcome
        }),
        Kind::Fresh(test) => found.ok_or(Why::Absent("no ABI here")).and_then(test),
    };
    irq::hook(None);
    while irq::in_service() {
        irq::apic().eoi();
    }
    irq::open();
    outcome
}
