//! Runs a hypervisor with a guest as a child process: console captured, time limit kept, cost measured from /proc.

use crate::host::{Doing, Failure, Result};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Kernel parameters for every boot: console on the first serial port, and a panic that ends the run.
pub(crate) const CMDLINE: &str = "console=ttyS0 panic=-1";

/// Clock ticks per second in /proc's CPU times; Linux gives USER_HZ = 100 on x86.
const TICKS_PER_SECOND: f64 = 100.0;

/// Guest RAM for every boot that does not ask for another size.
const MEMORY: &str = "512M";

/// The command that boots a guest under Paravane with the console on standard output.
pub(crate) fn paravane(program: &Path, engine: &str, kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
    paravane_with(MEMORY, program, engine, kernel, initrd, cmdline)
}

/// [`paravane`] with an amount of guest RAM, such as "2G".
pub(crate) fn paravane_with(
    memory: &str,
    program: &Path,
    engine: &str,
    kernel: &Path,
    initrd: &Path,
    cmdline: &str,
) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--engine", engine, "--memory", memory, "--serial", "stdio", "--cmdline", cmdline]);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    command
}

/// The value of `--disk` for a raw image.
pub(crate) fn disk_option(disk: &Path) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from("path=");
    option.push(disk);
    option
}

/// The command that boots the same guest under QEMU's emulator.
pub(crate) fn qemu(kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
    qemu_with(MEMORY, kernel, initrd, cmdline)
}

/// [`qemu`] with an amount of guest RAM, such as "2G".
pub(crate) fn qemu_with(memory: &str, kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", memory, "-smp", "1", "-nodefaults", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio", "-append", cmdline]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    command
}

/// What came of a whole run.
pub(crate) struct Outcome {
    /// How the process ended; `None` if it was killed at the time limit.
    pub(crate) status: Option<ExitStatus>,
    /// From the start of the process to its end.
    pub(crate) time: Duration,
    /// The largest resident set seen, in bytes.
    pub(crate) peak_rss: u64,
    /// Everything the guest wrote to its console, then what the hypervisor itself had to say.
    pub(crate) console: String,
}

/// A running guest. Dropping it kills the process and waits for it.
pub(crate) struct Guest {
    child: Child,
    console: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Guest {
    /// Starts the command with its output captured; `stdin` is what the guest's console reads from.
    pub(crate) fn start(command: &mut Command, stdin: Stdio) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().doing(format!("cannot start {name}"))?;
        let console = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        if let Some(output) = child.stdout.take() {
            readers.push(collect(output, &console));
        }
        if let Some(output) = child.stderr.take() {
            readers.push(collect(output, &console));
        }
        Ok(Self { child, console, readers })
    }

    /// The console so far.
    pub(crate) fn console(&self) -> String {
        let bytes = self.console.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the console holds `text`.
    ///
    /// # Errors
    /// The process ended or the limit passed first.
    pub(crate) fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.watch_for(text, limit, |_| {})
    }

    /// As [`Guest::wait_for`], and shows the console to `watch` each time that it is looked at.
    ///
    /// # Errors
    /// The process ended or the limit passed first.
    pub(crate) fn watch_for(&mut self, text: &str, limit: Duration, mut watch: impl FnMut(&str)) -> Result<()> {
        let start = Instant::now();
        loop {
            let console = self.console();
            watch(&console);
            if console.contains(text) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait().doing("cannot wait for the guest")? {
                return Err(Failure::new(format!("the guest ended ({status}) before it printed \"{text}\"")));
            }
            if start.elapsed() > limit {
                return Err(Failure::new(format!("the guest did not print \"{text}\" within {limit:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// CPU time that the process has used so far, in seconds (proc(5): utime and stime of /proc/PID/stat).
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let text = fs::read_to_string(self.proc("stat")).unwrap_or_default();
        // The second field is the program's name in parentheses and may hold blanks.
        let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }

    /// Resident memory in bytes: guest RAM (mappings of the memfd "guest-ram") and everything else. Proportional sizes
    /// (Pss) are summed, so that a page counts once however many views of it are mapped.
    pub(crate) fn resident(&self) -> (u64, u64) {
        let text = fs::read_to_string(self.proc("smaps")).unwrap_or_default();
        let (mut guest, mut other, mut in_guest) = (0, 0, false);
        for line in text.lines() {
            if let Some(size) = line.strip_prefix("Pss:") {
                let size = 1024 * size.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
                *(if in_guest { &mut guest } else { &mut other }) += size;
            } else if line.split_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
                in_guest = line.contains("/memfd:guest-ram");
            }
        }
        (guest, other)
    }

    /// Waits for the end, or kills the process at the limit.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<Outcome> {
        let start = Instant::now();
        let mut peak_rss = 0;
        let status = loop {
            if let Some(status) = self.child.try_wait().doing("cannot wait for the guest")? {
                break Some(status);
            }
            peak_rss = peak_rss.max(self.high_water());
            if start.elapsed() > limit {
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let time = start.elapsed();
        self.stop();
        Ok(Outcome { status, time, peak_rss, console: self.console() })
    }

    /// The largest resident set so far, in bytes (VmHWM of /proc/PID/status).
    fn high_water(&self) -> u64 {
        let text = fs::read_to_string(self.proc("status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
        1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0)
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }

    /// Kills the process, as `kill -9` does; all that it wrote is in the console then.
    pub(crate) fn kill(&mut self) {
        self.stop();
    }

    /// Ends the process if it still runs, reaps it, and lets the readers reach the end of its output.
    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Reads a pipe to its end on a thread of its own, so that a full pipe never stops the guest.
fn collect(mut pipe: impl Read + Send + 'static, into: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let into = Arc::clone(into);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            into.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend_from_slice(&buffer[..count]);
        }
    })
}
