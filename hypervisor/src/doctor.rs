//! `paravane doctor`: the command line of the host report.

use clap::Args;
use paravane::host::cache::Cache;
use paravane::host::report::Fitness;
use paravane::host::sources::Sources;
use paravane::host::{self, table};
use std::io::{self, Write};
use std::process::ExitCode;

/// What the help ends with.
pub(crate) const AFTER_HELP: &str = "\
Exit status:
  0    guests run here, with one engine at least
  3    no engine works here; the last lines say what to mend";

#[derive(Args)]
pub(crate) struct Doctor {
    /// Print JSON, in a stable form that docs/doctor.md describes
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(crate) fn run(&self) -> ExitCode {
        let report = host::examine(&Sources::host(), &Cache::user());
        let text = if self.json {
            serde_json::to_string_pretty(&report).expect("plain data with string keys always serializes") + "\n"
        } else {
            table::render(&report)
        };
        // A closed standard output leaves nobody to read it.
        let _ = io::stdout().write_all(text.as_bytes());
        let works = [&report.engines.kvm, &report.engines.bt].iter().any(|e| e.fitness != Fitness::None);
        ExitCode::from(if works { 0 } else { 3 })
    }
}
