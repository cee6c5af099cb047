//! What the translator did during each row of a benchmark.
//!
//! The guest prints a line when a row is done. When it appears on the console, the running paravane is asked for its counters at its control
//! socket; a row's are what they grew by since the row before. The console is looked at every 20 ms, so the end of a row may
//! count towards the next one; where two lines appear at once, neither row has counters.

use crate::host::{Doing, Failure, Result};
use paravane_bench::linux::console::{Console, Group};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Counters by name.
pub(crate) type Counters = BTreeMap<String, u64>;

/// Collects while a guest runs.
pub(crate) struct RowCounters {
    socket: BufReader<UnixStream>,
    /// Rows seen so far, and the counters then.
    seen: usize,
    last: Counters,
    rows: Vec<(Group, String, Counters)>,
}

impl RowCounters {
    /// Starts to count, at the control socket of a guest that runs.
    pub(crate) fn start(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).doing("cannot reach paravane's control socket")?;
        let mut this = Self { socket: BufReader::new(stream), seen: 0, last: Counters::new(), rows: Vec::new() };
        this.last = this.ask()?;
        Ok(this)
    }

    /// Looks at the console so far. A guest that has stopped meanwhile has no more to say.
    pub(crate) fn look(&mut self, console: &str) {
        let rows = Console::parse(console).rows;
        let new = rows.len().saturating_sub(self.seen);
        if new == 0 {
            return;
        }
        self.seen = rows.len();
        let Ok(now) = self.ask() else { return };
        if let ([.., (group, row)], 1) = (rows.as_slice(), new) {
            self.rows.push((*group, row.name.clone(), growth(&self.last, &now)));
        }
        self.last = now;
    }

    /// The rows with what was counted in each.
    pub(crate) fn finish(self) -> Vec<(Group, String, Counters)> {
        self.rows
    }

    fn ask(&mut self) -> Result<Counters> {
        self.socket.get_mut().write_all(b"{\"command\":\"counters\"}\n").doing("cannot ask paravane")?;
        let mut line = String::new();
        self.socket.read_line(&mut line).doing("paravane does not answer")?;
        read(&line).ok_or_else(|| Failure::new(format!("paravane has no counters: {}", line.trim_end())))
    }
}

/// Reads an answer.
fn read(line: &str) -> Option<Counters> {
    let answer: Value = serde_json::from_str(line).ok()?;
    let counters = answer.get("counters")?.as_object()?;
    Some(counters.iter().filter_map(|(name, n)| Some((name.clone(), n.as_u64()?))).collect())
}

/// What counters grew by; a bound does not grow.
fn growth(before: &Counters, now: &Counters) -> Counters {
    now.iter()
        .filter(|(name, _)| !name.contains("below"))
        .map(|(name, n)| (name.clone(), n - before.get(name).copied().unwrap_or(0).min(*n)))
        .filter(|(_, n)| *n > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = "\t100.0\t00000000000000aa\n";

    #[test]
    fn a_row_has_what_was_counted_since_the_last_one() {
        let (mine, theirs) = UnixStream::pair().expect("a pair");
        let answers = [(10, 5), (15, 5), (40, 6), (41, 6)];
        let server = std::thread::spawn(move || {
            let mut theirs = BufReader::new(theirs);
            for (misses, blocks) in answers {
                let mut line = String::new();
                theirs.read_line(&mut line).expect("a question");
                assert_eq!(line, "{\"command\":\"counters\"}\n");
                let counters =
                    format!("{{\"TLB misses\":{misses},\"blocks\":{blocks},\"x, 99 of 100 below\":{misses}}}");
                let answer = format!("{{\"ok\":true,\"counters\":{counters}}}\n");
                theirs.get_mut().write_all(answer.as_bytes()).expect("it listens");
            }
        });
        let mut counters =
            RowCounters { socket: BufReader::new(mine), seen: 0, last: Counters::new(), rows: Vec::new() };
        counters.last = counters.ask().expect("an answer");
        let mut console = "bench-begin 1\nbench-group kernels\n".to_owned();
        counters.look(&console);
        console += &format!("a{ROW}");
        counters.look(&console);
        counters.look(&console);
        // Two at once, one of which stays unknown whose it is.
        console += &format!("b{ROW}c{ROW}");
        counters.look(&console);
        console += &format!("d{ROW}e\t100.0\t00");
        counters.look(&console);
        let rows = counters.finish();
        server.join().expect("all was asked");
        let one = |misses| Counters::from([("TLB misses".to_owned(), misses)]);
        assert_eq!(rows, [(Group::Kernels, "a".into(), one(5)), (Group::Kernels, "d".into(), one(1))]);
    }

    #[test]
    fn refusals_are_no_counters() {
        assert_eq!(read("{\"ok\":false,\"error\":\"the machine is stopping\"}\n"), None);
        assert_eq!(read(""), None);
    }
}
