//! The command line of `paravane bench`.

use crate::model::{Host, Plan, Report, SCHEMA, Side, Suite};
use crate::progress::{Bar, Progress};
use crate::{Failure, Result, compare, html, linux, micro, surroundings, table};
use clap::{Args, Subcommand, ValueEnum};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What the help ends with.
pub const AFTER_HELP: &str = "\
Exit status:
  0    measured; what could not be is named in the report
  2    the command line is wrong, or a guest image that it needs is missing
  3    the host lacks something or failed

Example:
  cargo xtask guests bench
  paravane bench all --quick --out results";

/// Options of `paravane bench`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Bench {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    suite: SuiteArg,
    /// Paravane's engines
    #[arg(long, value_enum, value_delimiter = ',', default_value = "bt,kvm")]
    engines: Vec<EngineArg>,
    /// Guests that know nothing of Paravane (stock), those that use its interfaces (pv), or both
    #[arg(long, value_enum, value_delimiter = ',', default_value = "stock,pv")]
    forms: Vec<FormArg>,
    /// What to compare with: processes of this host, QEMU's emulator, both or none
    #[arg(long, value_enum, value_delimiter = ',', default_value = "host,qemu")]
    peers: Vec<PeerArg>,
    /// Less work and fewer rounds: a first look, with rougher figures
    #[arg(long)]
    quick: bool,
    /// Rounds; each suite knows a number that steadies its medians
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Only rows whose name (as in the JSON file) contains one of these
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<String>,
    /// The folder of the guests [default: target/guests of this folder or one above it]
    #[arg(long, value_name = "DIR")]
    guests: Option<PathBuf>,
    /// Write bench.json and bench.html to this folder, which is made if need be
    #[arg(long, value_name = "DIR", conflicts_with_all = ["json", "html"])]
    out: Option<PathBuf>,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as a page for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Other>,
}

#[derive(Subcommand)]
enum Other {
    /// Set two reports side by side: what is faster, what slower, which exact counters differ
    #[command(after_help = COMPARE_HELP)]
    Compare {
        /// The report to compare with
        #[arg(value_name = "A.json")]
        first: PathBuf,
        /// The report to judge
        #[arg(value_name = "B.json")]
        second: PathBuf,
    },
    /// Print a report's tables again, and write its page
    Show {
        /// The report
        #[arg(value_name = "REPORT.json")]
        report: PathBuf,
        /// Write the page
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
    },
}

const COMPARE_HELP: &str = "\
Figures are the same when their medians are closer than 5 %, or closer than what the rounds of both reports scatter.

Exit status:
  0    nothing is slower and all exact counters are equal
  1    something is slower or an exact counter differs
  2    a report cannot be read, or the two have no figure in common";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SuiteArg {
    /// Single operations in a bare-metal guest
    Micro,
    /// Stock Linux and programs under it
    Macro,
    /// Both
    All,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EngineArg {
    /// Binary translation
    Bt,
    /// KVM
    Kvm,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormArg {
    /// The guest knows nothing of Paravane
    Stock,
    /// The guest uses the paravirtual interfaces
    Pv,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PeerArg {
    /// Processes of this machine
    Host,
    /// QEMU's emulator (TCG)
    Qemu,
    /// Nothing
    None,
}

impl Bench {
    /// Does what the command line says and returns the exit status. `host` is what the binary knows of the machine; asked
    /// for only if something is measured.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn run(&self, host: impl FnOnce() -> Host) -> Result<u8> {
        match &self.command {
            None => self.measure(host()),
            Some(Other::Compare { first, second }) => compare(first, second),
            Some(Other::Show { report, html }) => {
                let report = read(report)?;
                print(&table::text(&report));
                html.as_ref().map_or(Ok(0), |file| write(file, &html::page(&report)).map(|()| 0))
            }
        }
    }

    fn measure(&self, mut host: Host) -> Result<u8> {
        host.date = surroundings::now();
        host.commit = surroundings::commit();
        host.qemu = surroundings::qemu();
        host.load = surroundings::load();
        let plan = self.plan(&host)?;
        let (json, html) = self.files()?;
        let start = Instant::now();
        let mut bar = Bar::default();
        let mut rows = Vec::new();
        for (side, reason) in &plan.absent {
            bar.note(&format!("paravane: {side} is left out: {reason}"));
        }
        for suite in &plan.suites {
            rows.extend(match suite {
                Suite::Micro => micro::run(&plan, &mut bar)?,
                Suite::Macro => linux::run(&plan, &mut bar)?,
            });
        }
        rows.sort_by_key(|row| row.group);
        let report = Report { schema: SCHEMA, host, plan, seconds: start.elapsed().as_secs_f64(), rows };
        print(&table::text(&report));
        for (file, text) in [(json, to_json as fn(&Report) -> String), (html, html::page)] {
            if let Some(file) = file {
                write(&file, &text(&report))?;
                print(&format!("written: {}\n", file.display()));
            }
        }
        Ok(0)
    }

    /// Where the files go. The folder is made now, so that a long run does not end in an error.
    fn files(&self) -> Result<(Option<PathBuf>, Option<PathBuf>)> {
        match &self.out {
            None => Ok((self.json.clone(), self.html.clone())),
            Some(folder) => {
                fs::create_dir_all(folder)
                    .map_err(|e| Failure::usage(format!("cannot create the folder {}: {e}", folder.display())))?;
                Ok((Some(folder.join("bench.json")), Some(folder.join("bench.html"))))
            }
        }
    }

    fn plan(&self, host: &Host) -> Result<Plan> {
        let suites = match self.suite {
            SuiteArg::Micro => vec![Suite::Micro],
            SuiteArg::Macro => vec![Suite::Macro],
            SuiteArg::All => vec![Suite::Micro, Suite::Macro],
        };
        if self.peers.contains(&PeerArg::None) && self.peers.len() > 1 {
            return Err(Failure::usage("--peers none stands alone; leave \"none\" out or everything else"));
        }
        let sides: Vec<_> = Side::ALL.into_iter().filter(|side| self.wants(*side)).collect();
        let guests = match &self.guests {
            Some(folder) if folder.is_dir() => folder.clone(),
            Some(folder) => return Err(Failure::usage(format!("there is no folder {}", folder.display()))),
            None => surroundings::guests().ok_or_else(|| {
                Failure::usage("there is no folder target/guests here; make it with \"cargo xtask guests bench\" or name it with --guests")
            })?,
        };
        let paravane = std::env::current_exe()
            .map_err(|e| Failure::host(format!("cannot find this program, which is to be measured: {e}")))?;
        let absent = absent(&sides, host);
        let only = self.only.clone();
        let kvm_emulates = host.kvm.emulating;
        Ok(Plan { suites, sides, absent, quick: self.quick, rounds: self.rounds, only, kvm_emulates, guests, paravane })
    }

    fn wants(&self, side: Side) -> bool {
        let paravane = |engine, form| self.engines.contains(&engine) && self.forms.contains(&form);
        match side {
            Side::Host => self.peers.contains(&PeerArg::Host),
            Side::BtStock => paravane(EngineArg::Bt, FormArg::Stock),
            Side::BtPv => paravane(EngineArg::Bt, FormArg::Pv),
            Side::KvmStock => paravane(EngineArg::Kvm, FormArg::Stock),
            Side::KvmPv => paravane(EngineArg::Kvm, FormArg::Pv),
            Side::TcgStock => self.peers.contains(&PeerArg::Qemu),
        }
    }
}

/// Sides that cannot run here, and why.
fn absent(sides: &[Side], host: &Host) -> BTreeMap<Side, String> {
    let reason = |side: &Side| match side {
        Side::KvmStock | Side::KvmPv if !host.kvm.usable => Some(format!("/dev/kvm {}", host.kvm.text)),
        Side::TcgStock if host.qemu.is_none() => {
            Some(format!("{} is not installed; get it with \"apt-get install qemu-system-x86\"", surroundings::QEMU))
        }
        _ => None,
    };
    sides.iter().filter_map(|side| Some((*side, reason(side)?))).collect()
}

/// Prints what two reports say about each other.
fn compare(first: &Path, second: &Path) -> Result<u8> {
    let (a, b) = (read(first)?, read(second)?);
    let of = |report: &Report| {
        let host = &report.host;
        let commit = host.commit.as_deref().map_or("unknown commit", |commit| commit.get(..12).unwrap_or(commit));
        let quick = if report.plan.quick { ", quick" } else { "" };
        format!("{}, Paravane {} ({commit}), {}{quick}", host.date, host.paravane, host.cpu)
    };
    let comparison = compare::compare(&a, &b);
    print(&format!("first:  {}\nsecond: {}\n\n{}", of(&a), of(&b), comparison.text()));
    if comparison.figures.is_empty() {
        return Ok(2);
    }
    Ok(u8::from(!comparison.good()))
}

/// Reads a report.
fn read(file: &Path) -> Result<Report> {
    let text = fs::read_to_string(file).map_err(|e| Failure::usage(format!("cannot read {}: {e}", file.display())))?;
    let report: Report = serde_json::from_str(&text)
        .map_err(|e| Failure::usage(format!("{} is no report of \"paravane bench\": {e}", file.display())))?;
    if report.schema == SCHEMA {
        return Ok(report);
    }
    let (name, schema) = (file.display(), report.schema);
    Err(Failure::usage(format!("{name} has the form {schema}, and this program reads {SCHEMA}; measure again")))
}

/// Prints to standard output; when that is closed, nobody is left to read it.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn to_json(report: &Report) -> String {
    serde_json::to_string_pretty(report).expect("plain data with string keys always serializes") + "\n"
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).map_err(|e| Failure::host(format!("cannot write {}: {e}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Cell, Kvm};
    use crate::testing;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        bench: Bench,
    }

    fn parsed(words: &str) -> Bench {
        let words = std::iter::once("bench").chain(words.split_whitespace());
        Program::try_parse_from(words).unwrap_or_else(|e| panic!("{e}")).bench
    }

    fn unmeasured() -> Host {
        panic!("nothing is measured here")
    }

    /// A folder of its own that goes with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("paravane-bench-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("a folder");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn options_choose_suites_and_sides() {
        let folder = Folder::new("plan");
        let host = Host { kvm: Kvm { text: "absent".into(), ..Kvm::default() }, ..Host::default() };
        let plan = |words: &str| parsed(&format!("{words} --guests {}", folder.0.display())).plan(&host).expect(words);
        let all = plan("");
        assert_eq!((all.suites.len(), all.sides.as_slice()), (2, Side::ALL.as_slice()));
        assert_eq!(all.runnable().collect::<Vec<_>>(), [Side::Host, Side::BtStock, Side::BtPv]);
        assert_eq!(all.absent[&Side::KvmPv], "/dev/kvm absent");
        let some = plan("micro --quick --engines bt --forms pv --peers none --only a,b");
        assert_eq!((some.suites, some.sides, some.quick), (vec![Suite::Micro], vec![Side::BtPv], true));
        assert_eq!(some.only, ["a", "b"]);
        assert!(parsed("--peers none,qemu").plan(&host).is_err());
        assert!(parsed("--guests /nowhere").plan(&host).is_err());
    }

    #[test]
    fn a_missing_image_is_named_with_the_command_that_makes_it() {
        let folder = Folder::new("images");
        let words = format!("macro --only boot --guests {}", folder.0.display());
        let failure = parsed(&words).run(Host::default).expect_err("nothing is there");
        assert_eq!(failure.status(), 2);
        let text = failure.to_string();
        assert!(text.contains("6.1/vmlinuz") && text.contains("cargo xtask guests bench"), "{text}");
    }

    #[test]
    fn comparisons_end_with_their_verdict_as_status() {
        let folder = Folder::new("compare");
        let put = |name: &str, text: &str| {
            let path = folder.0.join(name);
            fs::write(&path, text).expect("a file");
            path.display().to_string()
        };
        let report = testing::report();
        let mut slower = report.clone();
        for row in &mut slower.rows {
            for cell in row.cells.values_mut() {
                if let Cell::Measured(measured) = cell {
                    measured.median *= 2.0;
                    measured.samples.iter_mut().for_each(|sample| *sample *= 2.0);
                }
            }
        }
        let a = put("a.json", &to_json(&report));
        let b = put("b.json", &to_json(&slower));
        let none = put("none.json", &to_json(&Report { rows: Vec::new(), ..report.clone() }));
        let other = put("other.json", &to_json(&Report { schema: SCHEMA + 1, ..report.clone() }));
        let bad = put("bad.json", "{}");
        let status = |x: &str, y: &str| parsed(&format!("compare {x} {y}")).run(unmeasured);
        assert_eq!(status(&a, &a), Ok(0));
        assert_eq!(status(&a, &b), Ok(1));
        assert_eq!(status(&a, &none), Ok(2));
        for wrong in [&other, &bad, &"/nowhere".to_owned()] {
            assert_eq!(status(&a, wrong).expect_err("no report").status(), 2);
        }
        let page = folder.0.join("page.html");
        assert_eq!(parsed(&format!("show {a} --html {}", page.display())).run(unmeasured), Ok(0));
        assert_eq!(fs::read_to_string(&page).expect("the page"), html::page(&report));
    }
}
