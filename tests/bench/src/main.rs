//! The programs of `cargo xtask bench compute`: one static binary that runs unchanged on the host and in guests.
//!
//! `kernels`, `os`, `storms` and `traffic` do the work of this binary itself, `programs` runs Debian's, and `run` times any command. Every result is a line of
//! name, nanoseconds and checksum; whoever compares sides wants equal checksums first.

mod kernels;
mod os;
mod programs;
mod report;
mod storms;
mod sys;
mod traffic;

use clap::{Parser, Subcommand};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "bench", about = "Fixed work, timed: name, nanoseconds and checksum on each line")]
struct Cli {
    #[command(subcommand)]
    work: Work,
}

#[derive(Subcommand)]
enum Work {
    /// Small loops: nanoseconds per repetition
    Kernels(report::Choice),
    /// System calls, processes, memory, signals, files: nanoseconds per operation
    Os {
        #[command(flatten)]
        choice: report::Choice,
        /// Where files are created and removed; a tmpfs
        #[arg(long, default_value = "/dev/shm")]
        folder: PathBuf,
    },
    /// Programs unpacked from Debian packages: nanoseconds per run
    Programs {
        #[command(flatten)]
        choice: report::Choice,
        /// The folder they are unpacked in
        #[arg(long)]
        root: PathBuf,
        /// Where inputs and outputs are kept meanwhile; a tmpfs
        #[arg(long, default_value = "/dev/shm")]
        folder: PathBuf,
    },
    /// Many processes, many page faults: nanoseconds per operation
    Storms(report::Choice),
    /// Disk and network: nanoseconds per 10^6 bytes or per request
    Traffic {
        #[command(flatten)]
        choice: report::Choice,
        /// A block device or a file of some MiB; its contents are lost
        #[arg(long)]
        disk: PathBuf,
        /// ADDRESS:PORT of the benchmark's server
        #[arg(long)]
        server: String,
    },
    /// Any command: nanoseconds per run, with the checksum of its output
    Run {
        /// The name of the row
        name: String,
        /// Where the output is kept meanwhile; a tmpfs
        #[arg(long, default_value = "/dev/shm")]
        folder: PathBuf,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print the names of all rows with their group
    List,
    /// Print the clock's nanoseconds since boot
    Clock,
    /// Do nothing, successfully
    True,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().work {
        Work::Kernels(choice) => sys::pin().and_then(|()| kernels::run(&choice)),
        Work::Os { choice, folder } => sys::pin().and_then(|()| os::run(&choice, &folder)),
        Work::Programs { choice, root, folder } => sys::pin().and_then(|()| programs::run(&choice, &root, &folder)),
        Work::Storms(choice) => sys::pin().and_then(|()| storms::run(&choice)),
        Work::Traffic { choice, disk, server } => traffic::run(&choice, &disk, &server),
        Work::Run { name, folder, command } => sys::pin().and_then(|()| programs::run_one(&name, &command, &folder)),
        Work::List => {
            kernels::names().for_each(|name| println!("kernels\t{name}"));
            os::names().for_each(|name| println!("os\t{name}"));
            programs::names().for_each(|name| println!("programs\t{name}"));
            storms::names().for_each(|name| println!("storms\t{name}"));
            traffic::NAMES.iter().for_each(|name| println!("traffic\t{name}"));
            Ok(())
        }
        Work::Clock => {
            println!("{}", sys::uptime().as_nanos());
            Ok(())
        }
        Work::True => Ok(()),
    };
    finish(outcome)
}

fn finish(outcome: io::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
