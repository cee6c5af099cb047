//! `cargo xtask bench compute`: how fast code runs in a guest, beside the host and beside QEMU's emulator.
//!
//! One static binary holds small loops and operating-system work (tests/bench) and runs real programs. It runs on the
//! host, in a stock Linux guest under Paravane's translator and in the same guest under QEMU TCG, in alternating rounds,
//! so that the drift of a shared machine meets all three. Times come from the clock of the system that does
//! the work; the guest's is checked against the host's, for a guest whose clock runs slow would look fast. The table
//! shows medians over the rounds.

use crate::boot::{self, Guest};
use crate::compute_set::{Console, Group, Measurement, Results, Side};
use crate::host::{self, Doing, Failure, Result};
use crate::row_counters::RowCounters;
use crate::{compute_root, compute_table, task_guests};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Options of the benchmark.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many rounds
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Only this group; may be given more than once
    #[arg(long, value_enum)]
    group: Vec<Group>,
    /// Only rows whose name holds one of these parts, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// An eighth of the work; the ratios are rougher and lean towards translation
    #[arg(long)]
    quick: bool,
    /// Leave QEMU out
    #[arg(long)]
    skip_tcg: bool,
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// Measure this paravane program instead of building one
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
    /// Write everything measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds after which a guest's run is ended and counts as failed
    #[arg(long, default_value_t = 900)]
    limit: u64,
}

/// Guest RAM on both sides: the image twice (packed and unpacked) and the programs' files.
const MEMORY: &str = "2G";

/// How far a guest's clock may be from the host's over a run.
const CLOCK_TOLERANCE: f64 = 0.02;
/// The markers travel over a console that is polled, so this much is no deviation.
const CLOCK_SLACK: f64 = 0.25;

/// Measures and prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let bench = Bench::prepare(args)?;
    let list = host::output(Command::new(&bench.program).arg("list"))?;
    let mut results = Results::new(&list, |group, name| {
        bench.groups.contains(&group)
            && (args.only.is_empty() || args.only.iter().any(|part| name.contains(part.as_str())))
    });
    if results.rows.is_empty() {
        let chosen: Vec<_> = bench.groups.iter().map(|group| group.name()).collect();
        let sentence = format!("no row of {} matches --only; `bench list` names them", chosen.join(", "));
        return Err(Failure::new(sentence));
    }
    // Groups in which nothing is wanted need not start.
    let groups: Vec<_> =
        Group::COMPUTE.into_iter().filter(|g| results.rows.iter().any(|row| row.group == *g)).collect();
    let bench = Bench { groups, ..bench };
    // Before the rounds, so that the load is what others cause.
    let machine = describe_host();
    for round in 1..=args.runs {
        for side in &bench.sides {
            let start = Instant::now();
            eprint!("round {round} of {}: {:5}", args.runs, side.name());
            bench.run(*side, &mut results)?;
            eprintln!("{:7.1} s", start.elapsed().as_secs_f64());
        }
    }
    println!("\n{}", compute_table::text(&results));
    if let Some(reason) = &bench.no_tcg {
        println!("no tcg column: {reason}");
    }
    for complaint in &results.complaints {
        println!("FAILED: {complaint}");
    }
    if let Some(file) = &args.json {
        let run = json!({
            "runs": args.runs,
            "quick": args.quick,
            "kernel": args.kernel,
            "memory": MEMORY,
            "no_tcg": bench.no_tcg,
        });
        let text = format!("{:#}\n", compute_table::json(&results, machine, run));
        fs::write(file, text).doing(format!("cannot write {}", file.display()))?;
    }
    Ok(if results.complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything that a run needs.
struct Bench<'a> {
    args: &'a Args,
    groups: Vec<Group>,
    sides: Vec<Side>,
    /// Why QEMU is not among the sides.
    no_tcg: Option<String>,
    program: PathBuf,
    paravane: PathBuf,
    kernel: PathBuf,
    image: PathBuf,
}

impl<'a> Bench<'a> {
    fn prepare(args: &'a Args) -> Result<Self> {
        let paravane = match &args.paravane {
            Some(program) => fs::canonicalize(program).doing(format!("cannot find {}", program.display()))?,
            None => host::build_paravane()?,
        };
        let program = compute_root::build_bench()?;
        let groups = if args.group.is_empty() { Group::COMPUTE.to_vec() } else { args.group.clone() };
        let no_tcg = if args.skip_tcg {
            Some("--skip-tcg was given".to_owned())
        } else if host::has_tool("qemu-system-x86_64") {
            None
        } else {
            let install = "get it with `apt-get install qemu-system-x86`";
            Some(format!("qemu-system-x86_64 is not installed; {install}"))
        };
        let sides = Side::ALL.into_iter().filter(|side| *side != Side::Tcg || no_tcg.is_none()).collect();
        let kernel = task_guests::fetch()?.kernel(&args.kernel)?;
        let image = compute_root::image(&program)?;
        Ok(Self { args, groups, sides, no_tcg, program, paravane, kernel, image })
    }

    /// Runs the set once on one side.
    fn run(&self, side: Side, results: &mut Results) -> Result<()> {
        let cmdline = self.cmdline();
        match side {
            Side::Host => self.run_host(results),
            Side::Bt => {
                let mut command =
                    boot::paravane_with(MEMORY, &self.paravane, "bt", &self.kernel, &self.image, &cmdline);
                let socket = std::env::temp_dir().join(format!("paravane-bench-{}.socket", std::process::id()));
                command.arg("--control").arg(&socket);
                self.run_guest(side, command, Some(&socket), results)
            }
            Side::Tcg => {
                self.run_guest(side, boot::qemu_with(MEMORY, &self.kernel, &self.image, &cmdline), None, results)
            }
        }
    }

    fn run_host(&self, results: &mut Results) -> Result<()> {
        let mut rows = Vec::new();
        for group in &self.groups {
            let mut command = Command::new(&self.program);
            command.arg(group.name());
            if *group == Group::Programs {
                command.arg("--root").arg(compute_root::root());
            }
            if !self.args.only.is_empty() {
                command.arg("--only").arg(self.args.only.join(","));
            }
            if self.args.quick {
                command.arg("--quick");
            }
            let text = host::output(&mut command)?;
            rows.extend(text.lines().filter_map(Measurement::parse).map(|row| (*group, row)));
        }
        results.add(Side::Host, rows);
        Ok(())
    }

    /// The kernel's parameters, with what guest/bench.sh reads. Huge pages are as on the host.
    fn cmdline(&self) -> String {
        let groups: Vec<_> = self.groups.iter().map(|group| group.name()).collect();
        let mut line =
            format!("{} transparent_hugepage={} bench.groups={}", boot::CMDLINE, huge_pages(), groups.join(","));
        if !self.args.only.is_empty() {
            line.push_str(&format!(" bench.only={}", self.args.only.join(",")));
        }
        if self.args.quick {
            line.push_str(" bench.quick=1");
        }
        line
    }

    /// Runs a guest; `socket` is where it takes commands, if it does.
    fn run_guest(&self, side: Side, mut command: Command, socket: Option<&Path>, results: &mut Results) -> Result<()> {
        let limit = Duration::from_secs(self.args.limit);
        let mut guest = Guest::start(&mut command, Stdio::null())?;
        let mut counters = None;
        let markers = guest.wait_for("bench-begin", limit).and_then(|()| {
            counters = socket.map(RowCounters::start).transpose()?;
            let start = Instant::now();
            let watch = |console: &str| counters.iter_mut().for_each(|c| c.look(console));
            guest.watch_for("bench-end", limit, watch).map(|()| start.elapsed())
        });
        // After the last marker only the power-off is left; after a failure the rest of the console may say why.
        let grace = if markers.is_ok() { Duration::from_secs(60) } else { Duration::from_secs(1) };
        let outcome = guest.finish(grace)?;
        let console = Console::parse(&outcome.console);
        let mut trouble = console.failures;
        match (&markers, console.elapsed) {
            (Ok(elapsed), Some(by_guest)) => {
                let (host, guest) = (elapsed.as_secs_f64(), by_guest as f64 / 1e9);
                if (guest - host).abs() > CLOCK_SLACK + CLOCK_TOLERANCE * host {
                    trouble.push(format!("its clock saw {guest:.2} s where the host's saw {host:.2} s"));
                }
            }
            (Err(failure), _) => trouble.push(failure.to_string()),
            (Ok(_), None) => trouble.push("its markers hold no times".to_owned()),
        }
        if markers.is_ok() && !outcome.status.is_some_and(|status| status.success()) {
            trouble.push(outcome.status.map_or_else(|| "it did not power off".into(), |status| status.to_string()));
        }
        if !trouble.is_empty() {
            let log = host::guests_dir().join(format!("failed-bench-{}.log", side.name()));
            fs::write(&log, &outcome.console).doing("cannot write the guest's console below target/guests")?;
            let place = log.strip_prefix(host::repo()).unwrap_or(&log).display().to_string();
            results.complaints.push(format!("the {} guest: {} (console: {place})", side.name(), trouble.join("; ")));
        }
        results.add(side, console.rows);
        if let Some(counters) = counters {
            results.count(counters.finish());
        }
        Ok(())
    }
}

/// The host's setting for transparent huge pages: the word in brackets.
fn huge_pages() -> String {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("never", |(word, _)| word).to_owned()
}

/// What the numbers depend on, as far as /proc tells.
fn describe_host() -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
        line.map(|(_, value)| value.trim().to_owned())
    };
    let read = |path: &Path| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let first_line = |command: &mut Command| {
        let output = command.output().ok()?;
        String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
    };
    json!({
        "cpu": field("model name"),
        "cpu_flags": field("flags"),
        "cpus": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        "hypervisor": cpuinfo.contains(" hypervisor"),
        "memory": meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).map(str::trim),
        "kernel": read(Path::new("/proc/sys/kernel/osrelease")),
        "huge_pages": huge_pages(),
        "rustc": first_line(Command::new("rustc").arg("--version")),
        "qemu": first_line(Command::new("qemu-system-x86_64").arg("--version")),
        "commit": first_line(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(host::repo())),
        "loadavg": read(Path::new("/proc/loadavg")),
    })
}
