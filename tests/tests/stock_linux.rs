//! Stock Debian kernels under the real `paravane` program, as an ordinary user without `/dev/kvm`, and what becomes
//! of the terminal when the program is stopped from outside.
#![allow(unsafe_code)] // openpty, tcgetattr and kill have no safe form in the standard library.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const MARKERS: [&str; 7] = ["mounts", "loop", "fork", "pipes", "i386", "dd", "done"];
const NOBODY: u32 = 65534;

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn cargo(args: &[&str]) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).current_dir(repo()).args(args).status().expect("cargo starts");
    assert!(status.success(), "cargo {args:?} failed: {status}");
}

/// The program under test: `PARAVANE_BIN`, or a fresh build.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("PARAVANE_BIN") {
            return path.into();
        }
        cargo(&["build", "--release", "-p", "paravane"]);
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        repo().join(target).join("release/paravane")
    })
}

/// The directory of guest files, fetched when something is missing.
fn guests() -> &'static Path {
    static GUESTS: OnceLock<PathBuf> = OnceLock::new();
    GUESTS.get_or_init(|| {
        let dir = repo().join("target/guests");
        let needed = ["6.1/vmlinuz", "6.12/vmlinuz", "initramfs-script.cpio", "initramfs-shell.cpio"];
        if needed.iter().any(|f| !dir.join(f).is_file()) {
            cargo(&["xtask", "guests"]);
        }
        dir
    })
}

/// `paravane run` on a kernel and an initramfs, without privileges where this test has them.
fn paravane(kernel: &str, initrd: &str) -> Command {
    let mut command = Command::new(program());
    command.args(["run", "--engine", "bt", "--memory", "512M", "--serial", "stdio", "--cmdline", "console=ttyS0"]);
    command.arg("--kernel").arg(guests().join(kernel).join("vmlinuz"));
    command.arg("--initrd").arg(guests().join(initrd));
    command.current_dir("/");
    if std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0) {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// Waits for the child to end; kills it, by its own id, at the limit.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            return Some(status);
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn boots_and_powers_off(kernel: &str) {
    let mut child = paravane(kernel, "initramfs-script.cpio")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("paravane starts");
    let mut output = child.stdout.take().expect("its output is piped");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let status = wait(&mut child, Duration::from_secs(120));
    let log = reader.join().expect("the reader ends").expect("the output can be read");
    let status = status.unwrap_or_else(|| panic!("kernel {kernel} ran longer than 120 s:\n{log}"));
    for marker in MARKERS {
        let line = format!("PARAVANE-OK {marker}");
        assert!(log.lines().any(|l| l.trim_end() == line), "kernel {kernel} did not print {line}:\n{log}");
    }
    for line in log.lines() {
        let bad = ["WARNING", "BUG", "Call Trace"].iter().any(|word| line.contains(word));
        assert!(!bad, "kernel {kernel} complained: {line}\n{log}");
    }
    assert_eq!(status.code(), Some(0), "kernel {kernel} ended with {status}:\n{log}");
}

#[test]
fn kernel_6_1_runs_its_script_and_powers_off() {
    boots_and_powers_off("6.1");
}

#[test]
fn kernel_6_12_runs_its_script_and_powers_off() {
    boots_and_powers_off("6.12");
}

/// A new pseudo-terminal: master and slave.
fn open_pty() -> (File, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: the two descriptors are valid places to write to, and null asks for the defaults of the rest.
    let result = unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) };
    assert_eq!(result, 0, "a pseudo-terminal can be opened");
    for fd in [master, slave] {
        // SAFETY: the descriptor was just opened; the call changes only its flags. The guest must not inherit it.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
    }
    // SAFETY: openpty succeeded, so both descriptors are open and owned by nobody else.
    unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

/// The local, input and output modes of a terminal.
fn modes(fd: &OwnedFd) -> (u32, u32, u32) {
    // SAFETY: termios is plain data, for which zero is a valid value.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `termios` is a valid place to write to.
    assert_eq!(unsafe { libc::tcgetattr(fd.as_raw_fd(), &mut termios) }, 0, "the terminal has modes");
    (termios.c_lflag, termios.c_iflag, termios.c_oflag)
}

/// Starts a guest on a terminal and waits until it has put the terminal into raw mode.
fn start_on_terminal(slave: &OwnedFd, before: (u32, u32, u32)) -> Child {
    let fd = || Stdio::from(slave.try_clone().expect("the terminal can be duplicated"));
    let mut command = paravane("6.1", "initramfs-shell.cpio");
    let mut child = command.stdin(fd()).stdout(fd()).stderr(fd()).spawn().expect("paravane starts");
    let start = Instant::now();
    while modes(slave) == before {
        assert!(child.try_wait().expect("the child can be waited for").is_none(), "paravane ended at once");
        if start.elapsed() > Duration::from_secs(20) {
            let _ = child.kill();
            let _ = child.wait();
            panic!("paravane did not put its terminal into raw mode");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

#[test]
fn sigterm_stops_the_guest_and_restores_the_terminal() {
    let (mut master, slave) = open_pty();
    let before = modes(&slave);
    let mut child = start_on_terminal(&slave, before);
    // The guest's output has to go somewhere; the thread ends when the last slave is closed.
    let drain = std::thread::spawn(move || while master.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {});
    // SAFETY: the child has not been waited for, so its id still names it.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let status = wait(&mut child, Duration::from_secs(20));
    let after = modes(&slave);
    drop(slave);
    drain.join().expect("the reader ends");
    assert!(status.is_some(), "paravane was still running 20 s after SIGTERM");
    assert_eq!(after, before, "the terminal was not restored");
}

#[test]
fn a_closed_terminal_stops_the_guest() {
    let (master, slave) = open_pty();
    let before = modes(&slave);
    let mut child = start_on_terminal(&slave, before);
    drop(slave);
    drop(master);
    assert!(wait(&mut child, Duration::from_secs(20)).is_some(), "paravane outlived its terminal by 20 s");
}
