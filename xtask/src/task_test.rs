//! `cargo xtask test`: everything. Formatting, lints, documentation, guests, all tests of all crates, doc tests.
//!
//! Tests run in the release profile, because the engine under test is the one people use. cargo-nextest runs them when
//! it is installed, plain `cargo test` when not. The last line is always `N passed, N failed, N skipped`.

use crate::host::{self, Doing, Failure, Result};
use crate::{debian, task_check, task_guests};
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Options of the whole test run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out formatting, lints and documentation
    #[arg(long)]
    no_check: bool,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

/// Results of test programs, summed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Count {
    /// Adds what a summary line says. Both runners print one: cargo test per program ("test result: ok. 3 passed; 0
    /// failed; 1 ignored; ..."), nextest one in all ("Summary [..] 3 tests run: 2 passed (1 slow), 1 failed, 1 skipped").
    /// Nextest repeats a failed test's own output, indented, which must not be counted again.
    fn add_line(&mut self, line: &str) {
        if !line.starts_with("test result:") && !line.trim_start().starts_with("Summary [") {
            return;
        }
        let words: Vec<&str> = line.split([' ', ';', ',', '(', ')']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed" => self.passed += number,
                "failed" | "timed" => self.failed += number,
                "ignored" | "skipped" => self.skipped += number,
                _ => {}
            }
        }
    }
}

/// Runs everything and stops at the first part that cannot even be built.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    host::need_tool("cc", "gcc libc6-dev", "link Rust programs")?;
    if !args.no_check {
        task_check::checks()?;
    }
    task_guests::fetch()?;
    if host::has_tool("mmdebstrap") {
        debian::fetch()?;
    } else {
        eprintln!(
            "tests with a Debian disk will be skipped: mmdebstrap is not installed; get it with `apt-get install \
             mmdebstrap fakechroot fakeroot`"
        );
    }
    if !host::has_tool("qemu-system-x86_64") {
        eprintln!(
            "tests that compare with QEMU will be skipped: qemu-system-x86_64 is not installed; get it with `apt-get \
             install qemu-system-x86`"
        );
    }
    let program = host::build_paravane()?;

    let mut count = Count::default();
    let nextest = host::has_tool("cargo-nextest");
    let mut tests = host::cargo();
    if nextest {
        tests.args(["nextest", "run", "--release", "--workspace", "--locked", "--no-fail-fast", "--color", "never"]);
        tests.args(["--status-level", "slow"]);
    } else {
        eprintln!("cargo-nextest is not installed (`cargo install cargo-nextest --locked`); using cargo test");
        tests.args(["test", "--release", "--workspace", "--locked", "--no-fail-fast", "--all-targets"]);
    }
    tests.args(args.filter.as_slice()).env("PARAVANE_BIN", &program);
    let mut good = counted(&mut tests, &mut count)?;
    if args.filter.is_none() {
        let mut docs = host::cargo();
        docs.args(["test", "--release", "--workspace", "--locked", "--doc", "--no-fail-fast"]);
        good &= counted(&mut docs, &mut count)?;
    }
    println!("finished in {:.0} s", start.elapsed().as_secs_f64());
    println!("{} passed, {} failed, {} skipped", count.passed, count.failed, count.skipped);
    if good && count.failed == 0 && count.passed > 0 {
        return Ok(ExitCode::SUCCESS);
    }
    // The counts are the last line; the reason is above them, in the runner's own words.
    Ok(ExitCode::FAILURE)
}

/// Runs a test command, passes its output on, and adds its summary lines to `count`. True if it succeeded.
fn counted(command: &mut Command, count: &mut Count) -> Result<bool> {
    // Nextest reports on standard error, cargo test on standard output: one pipe takes both.
    let (reader, writer) = std::io::pipe().doing("cannot make a pipe")?;
    let second = writer.try_clone().doing("cannot make a pipe")?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = command.spawn().doing("cannot start cargo")?;
    // The command holds the pipe's writing ends; without them the pipe ends with the child.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.doing("cannot read the tests' output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        count.add_line(&line);
    }
    let status = child.wait().doing("cannot wait for cargo")?;
    match status.code() {
        Some(0) => Ok(true),
        // Failed tests (cargo test: 101, nextest: 100) are in the count; nothing counted means it did not build.
        Some(_) if *count != Count::default() => Ok(false),
        _ => Err(Failure::new(format!("the tests could not be built or run ({status})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runners_summaries_are_counted() {
        let mut count = Count::default();
        count.add_line("test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out");
        assert_eq!(count, Count { passed: 3, failed: 1, skipped: 2 });
        let mut count = Count::default();
        count.add_line("     Summary [  12.345s] 10 tests run: 7 passed (1 slow), 2 failed, 1 timed out, 4 skipped");
        assert_eq!(count, Count { passed: 7, failed: 3, skipped: 4 });
        count.add_line("test says 5 passed");
        count.add_line("    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 5 filtered out");
        assert_eq!(count, Count { passed: 7, failed: 3, skipped: 4 });
    }
}
