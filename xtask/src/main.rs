//! The project's chores, one file per task: `cargo xtask demo` shows the hypervisor at work, `cargo xtask test`
//! checks everything, and the others are their parts.
//!
//! Nothing here is linked into the hypervisor. A task either does all it promises or ends with one sentence that
//! says what is missing and how to get it.

mod abi_text;
mod apt;
mod boot;
mod compute_root;
mod compute_set;
mod compute_table;
mod console_scan;
mod cpio;
mod debian;
mod host;
mod initramfs;
mod row_counters;
mod task_abi;
mod task_bench_boot;
mod task_bench_check;
mod task_bench_compute;
mod task_bench_debian;
mod task_bench_smp;
mod task_boots;
mod task_check;
mod task_conform;
mod task_demo;
mod task_fuzz;
mod task_fuzz_calls;
mod task_fuzz_device;
mod task_guests;
mod task_kill_soak;
mod task_measure;
mod task_stress;
mod task_test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Paravane's chores: demo, tests, guests, benchmarks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build, fetch a stock Linux kernel and boot it to a shell on this terminal
    Demo(task_demo::Args),
    /// Run everything: formatting, lints, documentation, guests, all tests
    Test(task_test::Args),
    /// Run the quick part of `test`: formatting, lints, documentation
    Check,
    /// Fetch stock Debian kernels and busybox, and build the initramfs images, under target/guests
    Guests(task_guests::Args),
    /// Boot a stock kernel many times in a row and count the failures
    Boots(task_boots::Args),
    /// Keep several vCPUs busy with stress-ng, or with code that the kernel patches while it runs
    Stress(task_stress::Args),
    /// Kill the hypervisor while its guest writes, again and again, and look whether flushed data are there
    KillSoak(task_kill_soak::Args),
    /// Try random damage for as long as you like
    Fuzz {
        #[command(subcommand)]
        what: Fuzz,
    },
    /// Write the C header and the tables of the specification from pv-abi
    Abi(task_abi::Args),
    /// Run the conformance guest of the paravirtual ABI and print clause, test and result
    Conform(task_conform::Args),
    /// Measure what the paravirtual ABI gains, case by case, in time and exits
    Measure(task_measure::Args),
    /// Measure, beside QEMU where it is installed; or compare counters of single operations
    Bench(BenchArgs),
}

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct BenchArgs {
    /// Compare how often single operations leave guest code with tests/bench/counters.json
    #[arg(long)]
    check: bool,
    /// Write that file
    #[arg(long, conflicts_with = "check")]
    bless: bool,
    #[command(subcommand)]
    what: Option<Bench>,
}

#[derive(Subcommand)]
enum Fuzz {
    /// What a hostile guest does to virtio devices
    Device(task_fuzz_device::Args),
    /// Load damaged vCPU states into live vCPUs and let them run
    State(task_fuzz::Args),
    /// Random calls of the paravirtual ABI, from a bare-metal guest under binary translation
    Hypercalls(task_fuzz_calls::Args),
}

#[derive(Subcommand)]
enum Bench {
    /// Kernel start to power-off, alternating with QEMU's emulator, with memory and idle cost
    Boot(task_bench_boot::Args),
    /// A fixed set of loops, system work and programs on the host, under Paravane and under QEMU's emulator
    Compute(task_bench_compute::Args),
    /// A Debian disk: time to login, disk and network throughput, alternating with QEMU's emulator
    Debian(task_bench_debian::Args),
    /// What further vCPUs gain in throughput
    Smp(task_bench_smp::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().task {
        Task::Demo(args) => task_demo::run(&args),
        Task::Test(args) => task_test::run(&args),
        Task::Check => task_check::run(),
        Task::Guests(args) => task_guests::run(&args),
        Task::Boots(args) => task_boots::run(&args),
        Task::KillSoak(args) => task_kill_soak::run(&args),
        Task::Fuzz { what: Fuzz::Device(args) } => task_fuzz_device::run(&args),
        Task::Stress(args) => task_stress::run(&args),
        Task::Fuzz { what: Fuzz::State(args) } => task_fuzz::run(&args),
        Task::Abi(args) => task_abi::run(&args),
        Task::Conform(args) => task_conform::run(&args),
        Task::Fuzz { what: Fuzz::Hypercalls(args) } => task_fuzz_calls::run(&args),
        Task::Measure(args) => task_measure::run(&args),
        Task::Bench(BenchArgs { what: Some(Bench::Boot(args)), .. }) => task_bench_boot::run(&args),
        Task::Bench(BenchArgs { what: Some(Bench::Compute(args)), .. }) => task_bench_compute::run(&args),
        Task::Bench(BenchArgs { what: Some(Bench::Debian(args)), .. }) => task_bench_debian::run(&args),
        Task::Bench(BenchArgs { what: Some(Bench::Smp(args)), .. }) => task_bench_smp::run(&args),
        Task::Bench(args) => task_bench_check::run(args.bless),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}
