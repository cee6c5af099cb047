//! A kernel that knows the paravirtual ABI and runs anywhere: it boots, says which path it takes for each feature, and measures.
//!
//! Without a word on the command line it checks that every feature works ([`check`]), once with the ABI as far as there is one, once
//! natively. `case=NAME form=stock|abi count=N` measures one case ([`cases`]), so that the hypervisor's counters belong to it alone;
//! `case=all` measures all in both forms, `cases=NAME:N,NAME:N` some in the stock form. A result is two lines, cycles being those of the TSC: each of the first 20
//! pieces of the work (0 for pieces that there were not), then the quickest and the number of operations.
//!
//!     pieces NAME FORM CYCLES_PER_OPERATION ...
//!     measure NAME FORM CYCLES_PER_OPERATION OPERATIONS
//!     measure NAME FORM absent REASON
#![no_std]
#![no_main]

mod boot;
mod cases;
mod check;
mod classic;
mod device;
mod harness;
mod interrupts;
mod io;
mod machine;
mod second_cpu;
mod tables;

use guest_rt::{console, entry, info, println};
use guest_shim::Path;
use machine::{Form, Machine};
use pv_abi::feature::{Feature, Features};

entry!(main);

fn main() -> ! {
    let (window, _) = boot::bring_up();
    let count = info::option("count").and_then(|n| n.parse().ok());
    match (info::option("case"), info::option("cases")) {
        (None, Some(list)) => cases::run_list(list, &window),
        (None, None) => {
            for form in Form::ALL {
                let machine = Machine::start(form, Features::all());
                report(&machine);
                check::run(&machine, &window);
            }
            println!("all features work");
        }
        (Some("all"), _) => cases::run_all(&window, count),
        (Some(name), _) => {
            let form = info::option("form").and_then(Form::from_name).expect("form=stock or form=abi");
            cases::run_one(name, form, &window, count);
        }
    }
    console::exit(0)
}

/// Says which way each feature takes.
fn report(machine: &Machine) {
    let shim = machine.shim;
    let (khz, source) = shim.tsc_khz();
    println!(
        "form {} absent {:?} tsc_khz {khz} by {source:?} limits {:?}",
        machine.form.name(),
        shim.absent(),
        shim.limits()
    );
    for f in Feature::ALL {
        match shim.path(f) {
            Path::Abi => println!("path {} abi ({})", f.name(), f.summary()),
            Path::Native(how) => println!("path {} native ({how})", f.name()),
        }
    }
}
