//! `cargo xtask conform`: the conformance guest of the paravirtual ABI on every machine present, clause by clause.
//!
//! Prints a table of clause, page and result on each machine, and fails if a clause fails or has neither a test nor a reason for none.

use crate::host::Result;
use paravane_tests::conform::{self, Machine};
use std::process::ExitCode;

/// Which engine to run on.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Bt,
    Kvm,
    All,
}

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Engine of Paravane; QEMU, without the ABI, goes with each
    #[arg(long, value_enum, default_value = "all")]
    engine: Engine,
    /// Print the guests' own output too
    #[arg(long)]
    verbose: bool,
}

/// Runs the guest and prints the table.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let wanted = |m: &Machine| match m {
        Machine::BtAll | Machine::BtAuto => args.engine != Engine::Kvm,
        Machine::KvmAll => args.engine != Engine::Bt,
        Machine::Qemu => true,
    };
    let mut runs = Vec::new();
    for machine in Machine::ALL.into_iter().filter(wanted) {
        let run = conform::run(machine).map(|(verdicts, output)| {
            if args.verbose {
                println!("{output}");
            }
            verdicts
        });
        runs.push((machine, run));
    }
    let report = conform::report(&runs);
    print!("{}", report.table);
    for line in &report.wrong {
        println!("{line}");
    }
    Ok(if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
