//! Programs that are measured: started as children, output captured, time limited. None outlives its handle.

use crate::{Failure, Result};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a wait sleeps between two looks. Long enough not to disturb what is measured.
const LOOK: Duration = Duration::from_millis(2);

/// A running program. Dropping it kills the process and waits for it.
pub struct Program {
    name: String,
    child: Child,
    started: Instant,
    output: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

/// What came of a program.
pub struct Finished {
    /// How it ended; `None` if it was killed at the limit.
    pub status: Option<ExitStatus>,
    /// From its start to its end.
    pub time: Duration,
    /// Both of its outputs.
    pub output: String,
}

impl Finished {
    /// Whether it ended by itself, with status 0.
    pub fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// The last lines of the output, for a sentence about a failure.
    pub fn tail(&self) -> String {
        let lines: Vec<_> = self.output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join(" | ")
    }
}

impl Program {
    /// Starts it with an empty standard input. It dies with this process, whatever ends that.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_parent(command);
        let started = Instant::now();
        let mut child = command.spawn().map_err(|e| Failure::host(format!("cannot start {name}: {e}")))?;
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, &output));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, &output));
        }
        Ok(Self { name, child, started, output, readers })
    }

    /// The output so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until the output holds `text` and says how long after the start that was seen.
    ///
    /// # Errors
    /// The program ended, or `limit` after its start passed, before that.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<Duration> {
        let needle = text.as_bytes();
        loop {
            let there = {
                let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
                output.windows(needle.len()).any(|part| part == needle)
            };
            if there {
                return Ok(self.started.elapsed());
            }
            if self.child.try_wait().ok().flatten().is_some() {
                return Err(Failure::host(format!("{} ended before it printed \"{text}\"", self.name)));
            }
            if self.started.elapsed() > limit {
                return Err(Failure::host(format!("{} did not print \"{text}\" within {limit:?}", self.name)));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits for the end and returns all output; kills the program at `limit` after its start.
    ///
    /// # Errors
    /// The host does not let us wait.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        let status = loop {
            let ended = self.child.try_wait();
            match ended.map_err(|e| Failure::host(format!("cannot wait for {}: {e}", self.name)))? {
                Some(status) => break Some(status),
                None if self.started.elapsed() > limit => break None,
                None => std::thread::sleep(LOOK),
            }
        };
        let time = self.started.elapsed();
        if status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(Finished { status, time, output: self.output() })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // After `finish` it has been waited for, and both of these do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end, or kills it at the limit.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    Program::start(command)?.finish(limit)
}

fn collect(mut pipe: impl Read + Send + 'static, output: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let output = output.clone();
    std::thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut part) {
            output.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&part[..length]);
        }
    })
}

/// Has the kernel kill the child when this thread goes, so that an interrupted benchmark leaves no guest behind.
#[allow(unsafe_code)] // Runs code between fork and exec
fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: prctl(2) and getppid(2) may be called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have gone before the call.
            if libc::getppid() as u32 == parent { Ok(()) } else { Err(std::io::ErrorKind::Interrupted.into()) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_status_come_back() {
        let finished = run(&mut shell("echo one; echo two >&2; exit 3"), LONG).expect("a shell");
        assert_eq!(finished.status.and_then(|status| status.code()), Some(3));
        assert!(finished.output.contains("one\n") && finished.output.contains("two\n"), "{}", finished.output);
        assert!(!finished.success());
    }

    #[test]
    fn limits_end_a_program_and_dropping_does_too() {
        let finished = run(&mut shell("echo here; exec sleep 1000"), Duration::from_millis(300)).expect("a shell");
        assert!(finished.status.is_none() && finished.time < LONG);
        let mut program = Program::start(&mut shell("echo here; exec sleep 1000")).expect("a shell");
        program.wait_for("here", LONG).expect("its first line");
        let pid = program.child.id();
        drop(program);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_program_that_ends_early_is_not_waited_for() {
        let mut program = Program::start(&mut shell("echo this")).expect("a shell");
        let failure = program.wait_for("that", LONG).expect_err("it never prints it");
        assert!(failure.to_string().contains("ended before it printed \"that\""), "{failure}");
    }
}
