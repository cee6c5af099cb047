//! `cargo xtask bench --check`: how often single operations leave guest code, against `tests/bench/counters.json`.
//!
//! `--bless` writes the file; the difference then shows in the change that is to be reviewed.

use crate::host::{Failure, Result};
use paravane_tests::counters;
use std::process::ExitCode;
use std::time::Instant;

/// Compares, or writes the file.
pub(crate) fn run(bless: bool) -> Result<ExitCode> {
    let start = Instant::now();
    let found = counters::count();
    let cases: usize = found.machines.values().map(std::collections::BTreeMap::len).sum();
    let machines: Vec<_> = found.machines.keys().cloned().collect();
    let lines = counters::differences(&found);
    let lines = if bless { lines.unwrap_or_default() } else { lines.map_err(Failure::new)? };
    for line in &lines {
        println!("{line}");
    }
    if bless {
        counters::bless(found).map_err(Failure::new)?;
        println!("wrote {}", counters::file().display());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{cases} cases on {} in {seconds:.0} s: {} differ", machines.join(" and "), lines.len());
    Ok(if bless || lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
