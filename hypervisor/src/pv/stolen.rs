//! How long a vCPU's thread waited for a CPU although it could run: what a guest calls stolen time.
//!
//! The host's scheduler keeps that figure per thread (`run_delay`, the second number of `/proc/thread-self/schedstat`; Linux,
//! Documentation/scheduler/sched-stats.rst). Reading it is a system call, so it is read every few milliseconds at most.

use std::fs::File;
use std::os::unix::fs::FileExt;

const PATH: &str = "/proc/thread-self/schedstat";

/// Nanoseconds between two readings.
const EVERY: u64 = 4_000_000;

/// Whether this host tells.
pub fn available() -> bool {
    File::open(PATH).is_ok_and(|f| read(&f).is_some())
}

fn read(file: &File) -> Option<u64> {
    let mut text = [0; 96];
    let n = file.read_at(&mut text, 0).ok()?;
    delay(std::str::from_utf8(&text[..n]).ok()?)
}

/// The second number of the line.
fn delay(line: &str) -> Option<u64> {
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// One vCPU's stolen time.
#[derive(Default)]
pub(super) struct StolenTime {
    /// The vCPU thread's file, from when somebody asked for it.
    file: Option<File>,
    /// The figure when it began.
    began: u64,
    read_at: u64,
}

impl StolenTime {
    /// Starts to count, on the vCPU's own thread.
    pub(super) fn start(&mut self, now: u64) {
        if self.file.is_some() {
            return;
        }
        self.file = File::open(PATH).ok();
        self.began = self.file.as_ref().and_then(read).unwrap_or(0);
        self.read_at = now;
    }

    /// The stolen time in ns, if it is time for another reading.
    pub(super) fn update(&mut self, now: u64) -> Option<u64> {
        let file = self.file.as_ref()?;
        if now.saturating_sub(self.read_at) < EVERY {
            return None;
        }
        self.read_at = now;
        Some(read(file)?.saturating_sub(self.began))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_number_counts() {
        assert_eq!(delay("123 456 7\n"), Some(456));
        assert_eq!(delay(""), None);
        assert_eq!(delay("1 x 3"), None);
    }

    #[test]
    fn readings_are_rare_and_never_decrease() {
        if !available() {
            eprintln!("SKIPPED: this host keeps no scheduling statistics");
            return;
        }
        let mut s = StolenTime::default();
        assert_eq!(s.update(EVERY), None, "nobody asked");
        s.start(0);
        assert_eq!(s.update(EVERY - 1), None);
        let first = s.update(EVERY).unwrap();
        assert_eq!(s.update(EVERY + 1), None);
        assert!(s.update(2 * EVERY).unwrap() >= first);
    }
}
