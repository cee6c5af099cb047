//! What the benchmark's programs print, and what a guest's console holds of it.
//!
//! The programs (tests/bench) print a line per row: name, nanoseconds, checksum. A guest prints the same lines between
//! markers on its console (xtask/guest/bench.sh). `cargo xtask bench compute` reads them here, too.

/// A part of the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Group {
    /// Small loops, time per repetition
    Kernels,
    /// Operating-system work, time per operation
    Os,
    /// Programs from Debian packages, time per run
    Programs,
    /// Many processes and page faults, time per operation
    #[value(skip)]
    Storms,
    /// Disk and network, time per 10^6 bytes or per request
    #[value(skip)]
    Traffic,
}

impl Group {
    /// All groups in the order in which they run.
    pub const ALL: [Self; 5] = [Self::Kernels, Self::Os, Self::Programs, Self::Storms, Self::Traffic];

    /// Those of `cargo xtask bench compute`.
    pub const COMPUTE: [Self; 3] = [Self::Kernels, Self::Os, Self::Programs];

    /// The name in every interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernels => "kernels",
            Self::Os => "os",
            Self::Programs => "programs",
            Self::Storms => "storms",
            Self::Traffic => "traffic",
        }
    }

    /// The group of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|group| group.name() == name)
    }
}

/// One line of a side's output.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// The row.
    pub name: String,
    /// Per repetition, operation or run, depending on the group.
    pub nanoseconds: f64,
    /// What the work computed.
    pub checksum: String,
}

impl Measurement {
    /// Reads a line; anything that is not one is `None`.
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = line.trim_end().split('\t');
        let (name, nanoseconds, checksum) = (fields.next()?, fields.next()?, fields.next()?);
        let nanoseconds = nanoseconds.parse::<f64>().ok().filter(|time| time.is_finite() && *time > 0.0)?;
        let good = fields.next().is_none() && !name.is_empty() && checksum.len() == 16;
        good.then(|| Self { name: name.to_owned(), nanoseconds, checksum: checksum.to_owned() })
    }
}

/// What a guest's console said between the markers.
#[derive(Debug, Default, PartialEq)]
pub struct Console {
    /// The rows in order.
    pub rows: Vec<(Group, Measurement)>,
    /// Groups that did not end with status 0, with what was printed there that is no row.
    pub failures: Vec<String>,
    /// Nanoseconds by the guest's clock between the markers; `None` if the end was not reached.
    pub elapsed: Option<u64>,
}

impl Console {
    /// Reads a console's text.
    pub fn parse(text: &str) -> Self {
        let (mut console, mut begin, mut group, mut notes) = (Self::default(), None, None, Vec::new());
        for line in text.lines().map(str::trim_end) {
            if let Some(clock) = line.strip_prefix("bench-begin ") {
                begin = clock.parse::<u64>().ok();
            } else if let Some(name) = line.strip_prefix("bench-group ") {
                group = Group::from_name(name);
                notes.clear();
            } else if let Some(status) = line.strip_prefix("bench-status ") {
                if let Some((name, code)) = status.split_once(' ').filter(|(_, code)| *code != "0") {
                    console.failures.push(format!("{name} ended with status {code}: {}", notes.join("; ")));
                }
                group = None;
            } else if let Some(clock) = line.strip_prefix("bench-end ") {
                let end = clock.parse::<u64>().ok();
                console.elapsed = begin.zip(end).and_then(|(begin, end)| end.checked_sub(begin));
            } else if let Some(group) = group {
                match Measurement::parse(line) {
                    Some(row) => console.rows.push((group, row)),
                    None => notes.push(line.to_owned()),
                }
            }
        }
        console
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &str, nanoseconds: f64, checksum: &str) -> Measurement {
        Measurement { name: name.into(), nanoseconds, checksum: checksum.into() }
    }

    const SUM: &str = "00000000000000aa";

    #[test]
    fn only_whole_rows_are_read() {
        assert_eq!(Measurement::parse("getppid\t80.9\t00000000000000aa\r"), Some(measured("getppid", 80.9, SUM)));
        for line in [
            "getppid\t80.9",
            "getppid\tx\t00000000000000aa",
            "getppid\t80.9\t00aa",
            "\t1\t00000000000000aa",
            "a\tNaN\t00000000000000aa",
            "a\t1.0\t00000000000000aa\tmore",
            "[    1.0] kernel: hello",
            "",
        ] {
            assert_eq!(Measurement::parse(line), None, "{line}");
        }
    }

    #[test]
    fn consoles_give_rows_failures_and_the_guests_time() {
        let text = format!(
            "[0.0] Linux\r\nbench-begin 1000\r\nbench-group kernels\r\na\t5.0\t{SUM}\r\nbench-status kernels 0\r\n\
             bench-group os\r\nb\t6.5\t{SUM}\r\nbench: no memory\r\nbench-status os 1\r\nbench-end 4500\r\n"
        );
        let console = Console::parse(&text);
        assert_eq!(console.rows, [(Group::Kernels, measured("a", 5.0, SUM)), (Group::Os, measured("b", 6.5, SUM))]);
        assert_eq!(console.failures, ["os ended with status 1: bench: no memory"]);
        assert_eq!(console.elapsed, Some(3500));
        let cut = Console::parse(&text[..text.find("bench-end").expect("the marker")]);
        assert_eq!((cut.rows.len(), cut.elapsed), (2, None));
    }
}
