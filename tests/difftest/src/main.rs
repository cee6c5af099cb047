//! Soak runs of the differential tester. `difftest --help` lists the options.

use clap::Parser;
use difftest::catalog::catalog;
use difftest::guest::Guest;
use difftest::native::Native;
use difftest::{Config, Report, Runner, Tester};
use paravane_bt::Windows;
use std::process::{Command, ExitCode, Stdio};

/// Runs random user-mode instruction sequences natively and through the binary translator and compares everything.
#[derive(Parser, Debug)]
struct Args {
    /// Number of sequences.
    #[arg(long, default_value_t = 100_000)]
    sequences: u64,
    /// Seed of the run; seed and index name a sequence.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Index of the first sequence.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Processes that share the sequences.
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Stop after so many differences (per process).
    #[arg(long, default_value_t = 10)]
    max_differences: usize,
    /// Let status flags differ at faults of instructions that compute (not at #UD or a trap).
    #[arg(long)]
    relaxed_fault_flags: bool,
    /// Run user code through host mappings instead of the soft TLB.
    #[arg(long)]
    windows: bool,
    /// Put code and data where position-independent programs have them, not below 4 GiB.
    #[arg(long)]
    high: bool,
    /// Compare the x87 instruction and data pointers too.
    #[arg(long)]
    x87_pointers: bool,
    /// Compare the host with itself instead of the engine (checks the tester).
    #[arg(long)]
    native_only: bool,
    /// Print the code of the sequences instead of running them.
    #[arg(long)]
    list: bool,
    /// Print the instructions that are not covered, with reasons, and stop.
    #[arg(long)]
    coverage: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.high {
        difftest::layout::move_high();
    }
    if args.coverage {
        print_coverage();
        return ExitCode::SUCCESS;
    }
    if args.list {
        for i in args.first..args.first + args.sequences {
            println!("sequence {i}:\n{}", difftest::listing(&difftest::generate::case(args.seed, i)));
        }
        return ExitCode::SUCCESS;
    }
    if args.jobs > 1 {
        return share(&args);
    }
    match run(&args) {
        Ok(report) => {
            print_report(&report);
            if args.first == 0 {
                print_coverage();
            }
            if report.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("difftest: {e}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> std::io::Result<Report> {
    let config = Config {
        seed: args.seed,
        first: args.first,
        count: args.sequences,
        max_differences: args.max_differences,
        relaxed_fault_flags: args.relaxed_fault_flags,
        x87_pointers: args.x87_pointers,
        progress: 100_000,
    };
    let mut native = Native::new()?;
    let mut guest;
    let mut second;
    let engine: &mut dyn Runner = if args.native_only {
        second = Native::new()?;
        &mut second
    } else {
        guest = Guest::new(if args.windows { Windows::Always } else { Windows::Off })?;
        &mut guest
    };
    Tester::new(&mut native, engine, config).run()
}

/// Runs one process per job, each with its part of the sequences.
fn share(args: &Args) -> ExitCode {
    let part = args.sequences.div_ceil(args.jobs);
    let mut children = Vec::new();
    for job in 0..args.jobs {
        let first = args.first + job * part;
        let count = part.min((args.first + args.sequences).saturating_sub(first));
        let mut c = match std::env::current_exe() {
            Ok(exe) => Command::new(exe),
            Err(e) => {
                eprintln!("difftest: cannot find its own executable: {e}");
                return ExitCode::from(2);
            }
        };
        c.args(["--jobs", "1", "--seed", &args.seed.to_string(), "--first", &first.to_string()]);
        c.args(["--sequences", &count.to_string(), "--max-differences", &args.max_differences.to_string()]);
        for (on, flag) in [
            (args.relaxed_fault_flags, "--relaxed-fault-flags"),
            (args.windows, "--windows"),
            (args.high, "--high"),
            (args.x87_pointers, "--x87-pointers"),
            (args.native_only, "--native-only"),
        ] {
            if on {
                c.arg(flag);
            }
        }
        match c.stdin(Stdio::null()).spawn() {
            Ok(child) => children.push(child),
            Err(e) => eprintln!("difftest: cannot start a job: {e}"),
        }
    }
    let mut good = children.len() as u64 == args.jobs;
    for mut c in children {
        good &= c.wait().is_ok_and(|s| s.success());
    }
    println!("{}", if good { "all jobs: no difference" } else { "some job failed or found differences" });
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_report(report: &Report) {
    for d in &report.differences {
        println!("{}", d.reproducer);
    }
    println!(
        "{} sequences compared, {} skipped (endless, or TF or AC set), {} unsteady on the host, {} differences",
        report.compared,
        report.skipped,
        report.unsteady,
        report.differences.len()
    );
    let vectors: Vec<String> = report.vectors.iter().map(|(v, n)| format!("{v}: {n}")).collect();
    println!("endings by vector: {}", vectors.join(", "));
    let unused: Vec<String> =
        catalog().covered.iter().filter(|c| !report.uses.contains_key(c)).map(|c| format!("{c:?}")).collect();
    println!("{} of {} covered forms used", catalog().covered.len() - unused.len(), catalog().covered.len());
    if !unused.is_empty() && unused.len() < 200 {
        println!("not used in this run: {}", unused.join(" "));
    }
}

fn print_coverage() {
    let c = catalog();
    println!("{} instruction forms covered; not covered:", c.covered.len());
    for (why, codes) in &c.excluded {
        let names: Vec<String> = codes.iter().map(|c| format!("{c:?}")).collect();
        println!("  {why}: {}", names.join(" "));
    }
    println!("not generated:");
    println!("  RFLAGS.TF and AC set: single steps and alignment checks are covered by system-level tests");
    println!("  locked accesses across cache lines: hosts may trap or throttle split locks");
    println!("  XSTATE_BV after components return to their initial state: init tracking is not architectural");
    println!("not compared:");
    println!(
        "  x87 instruction and data pointers and last opcode (see --x87-pointers): they hold addresses of translated code"
    );
    println!("  at a faulting masked store: which active byte CR2 names, and whether other pages were stored to");
    println!("  at a faulting gather or scatter: which elements are done, and which of several faults is raised");
    println!("  at a faulting MMX access: x87 TOP and tags; at a faulting VCVTPS2PH: MXCSR exception flags");
    println!("  at a faulting FBSTP across pages: memory");
    println!("  page-fault error code bit 0 for upper-half addresses: Linux always reports it set");
    println!("out of scope:");
    println!("  not an instruction, not in 64-bit mode, or not on this host: {} forms", c.out_of_scope);
}
