//! A hypervisor as a child process that cannot outlive its test.

#![allow(unsafe_code)] // Signals and process groups have no safe form in the standard library.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A running program, leader of a process group of its own. Dropping it kills that group and waits.
pub struct Process {
    child: Child,
    reaped: bool,
}

impl Process {
    /// Starts a command; it becomes the leader of a new process group unless it has already asked for a session.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Self {
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
        Self { child, reaped: false }
    }

    /// Sends a signal to the program alone.
    ///
    /// # Panics
    /// The program has ended already.
    pub fn signal(&self, signal: i32) {
        assert!(!self.reaped, "the program has ended already");
        // SAFETY: the child has not been waited for, so the number still names it.
        let result = unsafe { libc::kill(self.id(), signal) };
        assert_eq!(result, 0, "the program can be signalled");
    }

    fn id(&self) -> i32 {
        i32::try_from(self.child.id()).expect("Linux process numbers fit")
    }

    /// The status, if the program has ended.
    ///
    /// # Panics
    /// The system cannot say.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().expect("the program can be waited for");
        self.reaped |= status.is_some();
        status
    }

    /// True if a process of the program's group is still there after the program itself has ended.
    ///
    /// # Panics
    /// The program has not been waited for.
    pub fn has_left_processes(&self) -> bool {
        assert!(self.reaped, "wait for the program first");
        // SAFETY: signal 0 only asks whether the group exists.
        unsafe { libc::kill(-self.id(), 0) == 0 }
    }

    /// CPU time used so far, user and system (proc(5): fields 14 and 15 of /proc/PID/stat, in 1/100 s).
    ///
    /// # Panics
    /// /proc does not know the program.
    pub fn cpu_time(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).expect("the program runs");
        let after_name = text.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Output of the started program, if its command asked for a pipe.
    fn take_output(&mut self) -> Vec<Box<dyn Read + Send>> {
        let mut outputs: Vec<Box<dyn Read + Send>> = Vec::new();
        if let Some(output) = self.child.stdout.take() {
            outputs.push(Box::new(output));
        }
        if let Some(output) = self.child.stderr.take() {
            outputs.push(Box::new(output));
        }
        outputs
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            // SAFETY: the group is the child's own, and the child has not been waited for.
            unsafe { libc::kill(-self.id(), libc::SIGKILL) };
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs a command without input to its end and returns its status and everything it wrote; kills it at the limit.
///
/// # Panics
/// It took longer than `limit`, or a process of its group outlived it; the panic carries the output.
pub fn run(command: &mut Command, limit: Duration) -> (ExitStatus, String) {
    let (status, text) = run_within(command, limit);
    (status.unwrap_or_else(|| panic!("the guest ran longer than {limit:?}:\n{text}")), text)
}

/// As [`run`], without a status when the limit was reached.
///
/// # Panics
/// A process of the command's group outlived it; the panic carries the output.
pub fn run_within(command: &mut Command, limit: Duration) -> (Option<ExitStatus>, String) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let start = Instant::now();
    let mut process = Process::start(command);
    let output = Arc::new(Mutex::new(Vec::new()));
    let readers: Vec<JoinHandle<()>> =
        process.take_output().into_iter().map(|pipe| collect(pipe, Arc::clone(&output))).collect();
    let text = || String::from_utf8_lossy(&output.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
    let status = loop {
        if let Some(status) = process.ended() {
            break status;
        }
        if start.elapsed() >= limit {
            return (None, text());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let left = process.has_left_processes();
    assert!(!left, "a process outlived the hypervisor:\n{}", text());
    for reader in readers {
        let _ = reader.join();
    }
    let text = text();
    (Some(status), text)
}

/// Reads a pipe to its end, so that a full pipe never stops the program.
fn collect(mut pipe: Box<dyn Read + Send>, into: Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..count]);
        }
    })
}
