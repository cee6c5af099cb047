//! Many of one kind in a row: ten thousand processes, a quarter of a gigabyte of page faults.
//!
//! Rows of [`crate::os`] repeat an operation until its time is known; these go on until caches of the hypervisor, such as those for
//! translated code or page tables, have been filled and emptied. A row runs once and prints nanoseconds per operation.

use crate::report::{self, Choice};
use crate::sys::{self, Fork, Mapping, PAGE};
use std::io;
use std::time::Instant;

/// A row: its name, its number of operations, and what does them and returns a checksum.
struct Row(&'static str, u64, fn(u64) -> io::Result<u64>);

const ROWS: &[Row] = &[
    Row("forkwait", 10_000, |count| {
        (0..count).try_fold(0, |sum, turn| match sys::fork()? {
            Fork::Child => sys::exit_now(turn as i32 & 1),
            Fork::Parent(child) => sys::wait(child).map(|status| sum + status as u64),
        })
    }),
    Row("fault-storm", 65_536, |count| {
        let mut memory = Mapping::new(count as usize * PAGE)?;
        let touched = memory.bytes().iter_mut().step_by(PAGE).map(|byte| {
            *byte += 1;
            u64::from(*byte)
        });
        Ok(touched.sum())
    }),
];

/// The names of all rows.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.0)
}

/// Runs the chosen rows and prints a line for each.
///
/// # Errors
/// A system call failed; the sentence names the row.
pub(crate) fn run(choice: &Choice) -> io::Result<()> {
    for Row(name, full, work) in ROWS {
        if choice.takes(name) {
            let (count, start) = (choice.amount(*full), Instant::now());
            let checksum = work(count).map_err(|error| io::Error::other(format!("{name} failed: {error}")))?;
            report::row(name, report::nanoseconds(start.elapsed()) / count as f64, checksum)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_touched_once() {
        let Row(name, _, storm) = &ROWS[1];
        assert_eq!((*name, storm(100).expect("memory")), ("fault-storm", 100));
    }
}
