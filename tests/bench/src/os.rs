//! Work of the operating system, as programs ask for it: system calls, processes, memory, signals, files.
//!
//! A row repeats one operation and times the repetitions itself, without preparation. Of three such measurements the
//! shortest counts; the figure is nanoseconds per operation. The process is pinned to one CPU (see [`crate::sys::pin`]), so
//! that whatever takes two processes or threads is a switch between them everywhere.

use crate::report::{self, Choice};
use crate::sys::{self, Fork, Mapping, PAGE};
use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// One measurement: the time of all operations, how many there were, and what they returned.
struct Sample {
    time: Duration,
    operations: u64,
    checksum: u64,
}

/// A row: its name, its full number of operations, and the measurement, given a folder for files and the number.
struct Row(&'static str, u64, fn(&Path, u64) -> io::Result<Sample>);

const ROWS: &[Row] = &[
    Row("getppid", 400_000, |_, count| {
        let parent = sys::getppid();
        timed(count, |_| Ok(u64::from(sys::getppid() == parent)))
    }),
    Row("read-1", 300_000, |_, count| {
        let file = File::open("/dev/zero")?;
        timed(count, |_| (&file).read(&mut [1]).map(|read| read as u64))
    }),
    Row("write-1", 300_000, |_, count| {
        let file = OpenOptions::new().write(true).open("/dev/null")?;
        timed(count, |_| (&file).write(&[1]).map(|written| written as u64))
    }),
    Row("pipe-ping-pong", 10_000, |_, count| ping_pong(count)),
    Row("fork-exit", 300, |_, count| {
        timed(count, |turn| match sys::fork()? {
            Fork::Child => sys::exit_now(turn as i32 & 1),
            Fork::Parent(child) => sys::wait(child).map(|status| status as u64),
        })
    }),
    Row("fork-exec", 150, |_, count| {
        let own = std::env::current_exe()?;
        let program = sys::Program::new(&[own.to_str().unwrap_or_default(), "true"])?;
        timed(count, |_| match sys::fork()? {
            Fork::Child => {
                let _ = program.exec();
                sys::exit_now(111)
            }
            Fork::Parent(child) => sys::wait(child).map(|status| 1 + status as u64),
        })
    }),
    Row("page-fault", 16_384, |_, count| page_faults(count)),
    Row("mmap-munmap", 60_000, |_, count| {
        timed(count, |_| {
            let mapping = black_box(Mapping::plain(16 * PAGE)?);
            drop(mapping);
            Ok(1)
        })
    }),
    Row("mprotect", 30_000, |_, count| mprotect(count)),
    Row("signal", 60_000, |_, count| {
        sys::count_signals()?;
        let before = sys::signal_self();
        timed(count, |turn| Ok(u64::from(sys::signal_self() == before + turn + 1)))
    }),
    Row("thread-switch", 10_000, |_, count| thread_switch(count)),
    Row("file-create-unlink", 10_000, |folder, count| {
        let path = folder.join(format!("bench-{}", std::process::id()));
        timed(count, |_| {
            drop(OpenOptions::new().write(true).create_new(true).open(&path)?);
            fs::remove_file(&path).map(|()| 1)
        })
    }),
];

/// Measurements per row.
const REPETITIONS: u32 = 3;

/// Runs the chosen rows, with files below `folder`, and prints a line for each.
///
/// # Errors
/// A system call failed; the sentence names the row.
pub(crate) fn run(choice: &Choice, folder: &Path) -> io::Result<()> {
    for Row(name, full, measure) in ROWS {
        if choice.takes(name) {
            let (mut best, mut checksum) = (f64::INFINITY, None);
            for _ in 0..REPETITIONS {
                let sample = measure(folder, choice.amount(*full))
                    .map_err(|error| io::Error::other(format!("{name} failed: {error}")))?;
                best = best.min(report::nanoseconds(sample.time) / sample.operations as f64);
                if *checksum.get_or_insert(sample.checksum) != sample.checksum {
                    return Err(io::Error::other(format!("repetitions of {name} returned different results")));
                }
            }
            report::row(name, best, checksum.unwrap_or_default())?;
        }
    }
    Ok(())
}

/// The names of all rows.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.0)
}

/// Times `count` calls of `operation` with the numbers from 0; the checksum is the sum of what they return.
fn timed(count: u64, mut operation: impl FnMut(u64) -> io::Result<u64>) -> io::Result<Sample> {
    let (start, mut checksum) = (Instant::now(), 0);
    for turn in 0..count {
        checksum += operation(turn)?;
    }
    Ok(Sample { time: start.elapsed(), operations: count, checksum })
}

/// A byte to another process and back, through two pipes.
fn ping_pong(count: u64) -> io::Result<Sample> {
    let (mut here_in, there_out) = io::pipe()?;
    let (there_in, mut here_out) = io::pipe()?;
    match sys::fork()? {
        Fork::Child => {
            // With these ends closed, the parent's end is the end of input.
            drop((here_in, here_out));
            let mut byte = [0];
            while matches!((&there_in).read(&mut byte), Ok(1)) {
                byte[0] = byte[0].wrapping_add(1);
                if (&there_out).write_all(&byte).is_err() {
                    break;
                }
            }
            sys::exit_now(0)
        }
        Fork::Parent(child) => {
            drop((there_in, there_out));
            let sample = timed(count, |turn| {
                let mut byte = [turn as u8];
                here_out.write_all(&byte)?;
                here_in.read_exact(&mut byte)?;
                Ok(u64::from(byte[0]))
            });
            drop((here_in, here_out));
            sys::wait(child)?;
            sample
        }
    }
}

/// The first write to each page of new memory.
fn page_faults(count: u64) -> io::Result<Sample> {
    let mut memory = Mapping::new(count as usize * PAGE)?;
    let bytes = memory.bytes();
    timed(count, |page| {
        let byte = &mut bytes[page as usize * PAGE];
        *byte += 1;
        Ok(u64::from(*byte))
    })
}

/// One page made read-only, read, made writable, written; two system calls per operation.
fn mprotect(count: u64) -> io::Result<Sample> {
    let mut memory = Mapping::new(PAGE)?;
    memory.bytes()[0] = 1;
    timed(count, |turn| {
        let mut seen = 0;
        memory.while_read_only(|bytes| seen = u64::from(black_box(bytes)[0]))?;
        memory.bytes()[0] = turn as u8;
        Ok(seen)
    })
}

/// Two threads that wake each other by turns through a futex; one operation is there and back.
fn thread_switch(count: u64) -> io::Result<Sample> {
    let word = AtomicU32::new(0);
    // Even: the main thread's turn. Each side waits for its parity, then hands over.
    let hand_over = |mine: u32| {
        loop {
            let value = word.load(Ordering::Acquire);
            if value % 2 == mine {
                word.store(value + 1, Ordering::Release);
                sys::futex_wake(&word);
                return value;
            }
            sys::futex_wait(&word, value);
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            for _ in 0..count {
                hand_over(1);
            }
        });
        let sample = timed(count, |_| Ok(u64::from(hand_over(0))));
        other.join().map_err(|_| io::Error::other("the second thread failed"))?;
        sample
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that fork are left out: a test's process has other threads.
    #[test]
    fn rows_count_what_they_did() {
        let folder = std::env::temp_dir();
        for Row(name, _, measure) in ROWS {
            let expected = match *name {
                "getppid" | "read-1" | "write-1" | "page-fault" | "mmap-munmap" | "file-create-unlink" => 10,
                // The page holds 1, then the number of the previous turn.
                "mprotect" => 1 + (0..9).sum::<u64>(),
                "thread-switch" => (0..10).map(|turn| 2 * turn).sum(),
                _ => continue,
            };
            let sample = measure(&folder, 10).expect(name);
            assert_eq!((sample.checksum, sample.operations), (expected, 10), "{name}");
        }
    }
}
