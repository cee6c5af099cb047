//! How runs end: what the guest does, what signals and terminals do, the exit status of each, and that the terminal is
//! as it was.
#![allow(unsafe_code)] // Signals and pseudo-terminals are host calls.

mod common;

use common::{
    ECHO, Guest, HALT, PATIENCE, POWER_OFF, SPIN, Scratch, code, finish, multiboot, out, pvh, run, say, sentence,
};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn each_end_has_its_status() {
    let files = Scratch::new();
    let ends: [(&str, Vec<u8>, i32); 7] = [
        ("power-off", POWER_OFF.to_vec(), 0),
        ("panic", out(0x505, 1), 10),
        ("triple fault", vec![0x0f, 0x0b], 11),
        ("reset register", out(0xcf9, 6), 12),
        ("keyboard controller reset", out(0x64, 0xfe), 12),
        ("port 0x92 reset", out(0x92, 1), 12),
        // Without --debug-exit the port is not there; the guest goes on.
        ("no debug exit", code(&[&out(0xf4, 7), POWER_OFF]), 0),
    ];
    for (name, guest, status) in ends {
        let guest = code(&[&guest, HALT]);
        for (format, image) in [("pvh", pvh(&guest)), ("multiboot", multiboot(&guest))] {
            let output = finish(&mut run(&files.file("kernel", &image)));
            assert_eq!(output.status.code(), Some(status), "{name} from {format}: {output:?}");
            if status == 0 {
                assert!(output.stderr.is_empty(), "{output:?}");
            } else {
                assert!(sentence(&output).contains("the guest"));
            }
        }
    }
}

#[test]
fn debug_exit_gives_the_status_that_qemu_gives() {
    let files = Scratch::new();
    for value in [0u8, 1, 5, 0x7f] {
        let kernel = files.file("kernel", &pvh(&code(&[&out(0xf4, value), HALT])));
        let output = finish(run(&kernel).arg("--debug-exit"));
        assert_eq!(output.status.code(), Some(i32::from(value) << 1 | 1));
    }
}

fn signal(guest: &Guest, n: i32) {
    // SAFETY: sends a signal to our own child, which was not waited for.
    assert_eq!(unsafe { libc::kill(guest.0.id() as i32, n) }, 0);
}

/// Starts a guest and waits until it has said `ready`.
fn started(command: &mut Command) -> Guest {
    let mut guest = Guest::start(command.stdout(Stdio::piped()));
    let mut got = [0; 5];
    guest.0.stdout.as_mut().unwrap().read_exact(&mut got).unwrap();
    assert_eq!(&got, b"ready");
    guest
}

#[test]
fn signals_stop_busy_and_idle_guests() {
    let files = Scratch::new();
    for body in [SPIN, HALT] {
        let kernel = files.file("kernel", &pvh(&code(&[&say("ready"), body])));
        for n in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            let mut guest = started(&mut run(&kernel));
            signal(&guest, n);
            let status = guest.end();
            assert_eq!((status.code(), status.signal()), (Some(128 + n), None));
        }
    }
}

#[test]
fn the_end_of_input_does_not_stop_the_guest() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&say("ready"), SPIN])));
    let mut guest = started(&mut run(&kernel));
    std::thread::sleep(Duration::from_millis(200));
    assert!(guest.0.try_wait().unwrap().is_none(), "standard input is /dev/null, and that stopped the guest");
    signal(&guest, libc::SIGTERM);
    assert_eq!(guest.end().code(), Some(143));
}

#[test]
fn piped_input_arrives_whole() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[ECHO, POWER_OFF])));
    let mut guest = Guest::start(run(&kernel).stdin(Stdio::piped()).stdout(Stdio::piped()));
    // Ctrl-A and x too: in a pipe they are bytes like any other. Larger than all queues on the way.
    let mut sent: Vec<u8> = (0..300_000u32).map(|n| (n % 101) as u8).collect();
    sent.extend(b"\x01xq");
    let mut input = guest.0.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || {
        input.write_all(&copy).unwrap();
        input
    });
    let mut got = Vec::new();
    guest.0.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert_eq!(guest.end().code(), Some(0));
    assert_eq!(got.len(), sent.len());
    assert!(got == sent, "the bytes arrive changed");
}

#[test]
fn input_that_nobody_reads_does_not_hold_off_signals() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&say("ready"), SPIN])));
    let mut guest = started(run(&kernel).stdin(Stdio::piped()));
    let mut input = guest.0.stdin.take().unwrap();
    // More than fits into any queue on the way, so that somebody waits for the guest.
    let writer = std::thread::spawn(move || {
        let _ = input.write_all(&vec![b'x'; 1 << 20]);
    });
    std::thread::sleep(Duration::from_millis(300));
    signal(&guest, libc::SIGTERM);
    assert_eq!(guest.end().code(), Some(143));
    writer.join().unwrap();
}

#[test]
fn output_that_nobody_reads_does_not_hold_off_signals() {
    let files = Scratch::new();
    // Writes for ever: mov dx, 0x3f8; mov al, '.'; out dx, al; jmp -3.
    let kernel = files.file("kernel", &pvh(&code(&[&say("ready"), &out(0x3f8, b'.'), &[0xeb, 0xfd]])));
    let mut guest = started(&mut run(&kernel));
    std::thread::sleep(Duration::from_millis(300));
    signal(&guest, libc::SIGTERM);
    assert_eq!(guest.end().code(), Some(143));
}

#[test]
fn a_reader_that_leaves_ends_the_run() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&say("ready"), &out(0x3f8, b'.'), &[0xeb, 0xfd]])));
    let mut guest = started(&mut run(&kernel));
    drop(guest.0.stdout.take());
    assert_eq!(guest.end().code(), Some(128 + libc::SIGPIPE));
}

/// A pseudo-terminal: our end and the guest's.
struct Pty {
    master: File,
    slave: File,
}

impl Pty {
    fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let none = std::ptr::null_mut();
        // SAFETY: both results are live locals; no name or settings are asked for or given.
        let r = unsafe { libc::openpty(&mut master, &mut slave, none, none.cast(), none.cast()) };
        assert_eq!(r, 0, "no pseudo-terminal");
        for fd in [master, slave] {
            // SAFETY: descriptors that were just opened.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        // SAFETY: new descriptors that nobody else owns.
        unsafe { Self { master: File::from_raw_fd(master), slave: File::from_raw_fd(slave) } }
    }

    /// Whether lines are edited and Ctrl-C is a signal, as a shell leaves it.
    fn cooked(&self) -> bool {
        // SAFETY: termios is plain data, filled by tcgetattr before it is read.
        unsafe {
            let mut t: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &mut t), 0);
            let all = libc::ICANON | libc::ECHO | libc::ISIG;
            t.c_lflag & all == all && t.c_oflag & libc::OPOST != 0
        }
    }

    /// Starts the guest in a session of its own that has this as its terminal.
    fn start(&self, kernel: &Path) -> Guest {
        let mut command = run(kernel);
        command.stdin(self.slave.try_clone().unwrap());
        command.stdout(self.slave.try_clone().unwrap()).stderr(self.slave.try_clone().unwrap());
        // SAFETY: between fork and exec only async-signal-safe calls are made.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Guest::start(&mut command)
    }

    fn expect(&mut self, text: &[u8]) {
        let mut got = Vec::<u8>::new();
        let began = Instant::now();
        while !got.windows(text.len()).any(|w| w == text) {
            let mut poll = libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one initialised pollfd.
            unsafe { libc::poll(&mut poll, 1, 1000) };
            if poll.revents & libc::POLLIN != 0 {
                let mut buf = [0; 512];
                let n = self.master.read(&mut buf).unwrap();
                got.extend(&buf[..n]);
            }
            assert!(began.elapsed() < PATIENCE, "expected {text:?}, got {got:?}");
        }
    }
}

fn echo_guest(files: &Scratch) -> std::path::PathBuf {
    files.file("kernel", &pvh(&code(&[&say("ready"), ECHO, POWER_OFF])))
}

#[test]
fn a_terminal_is_raw_for_the_guest_and_restored_after() {
    let files = Scratch::new();
    let mut pty = Pty::new();
    assert!(pty.cooked());
    let mut guest = pty.start(&echo_guest(&files));
    pty.expect(b"ready");
    assert!(!pty.cooked());
    // Ctrl-C and the doubled escape key are the guest's.
    pty.master.write_all(b"a\x03b\x01\x01c").unwrap();
    pty.expect(b"a\x03b\x01c");
    pty.master.write_all(b"\x01h").unwrap();
    pty.expect(b"Ctrl-A x");
    pty.master.write_all(b"q").unwrap();
    assert_eq!(guest.end().code(), Some(0));
    assert!(pty.cooked());
}

#[test]
fn the_escape_key_and_signals_restore_the_terminal() {
    let files = Scratch::new();
    let kernel = echo_guest(&files);
    let mut pty = Pty::new();
    let mut guest = pty.start(&kernel);
    pty.expect(b"ready");
    pty.master.write_all(b"\x01x").unwrap();
    assert_eq!(guest.end().code(), Some(0));
    assert!(pty.cooked());
    for n in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let mut guest = pty.start(&kernel);
        pty.expect(b"ready");
        assert!(!pty.cooked());
        signal(&guest, n);
        assert_eq!(guest.end().code(), Some(128 + n));
        assert!(pty.cooked());
    }
}

#[test]
fn a_suspended_guest_gives_the_terminal_back_and_takes_it_again() {
    let files = Scratch::new();
    let mut pty = Pty::new();
    let mut guest = pty.start(&echo_guest(&files));
    pty.expect(b"ready");
    // A process that leads an orphaned group is not stopped by SIGTSTP itself, but SIGSTOP and SIGCONT are the same to it.
    signal(&guest, libc::SIGSTOP);
    // SAFETY: settings that tcgetattr gave for this descriptor, made sane as a shell would.
    unsafe {
        let mut t: libc::termios = std::mem::zeroed();
        libc::tcgetattr(pty.slave.as_raw_fd(), &mut t);
        t.c_lflag |= libc::ICANON | libc::ECHO | libc::ISIG;
        t.c_oflag |= libc::OPOST;
        libc::tcsetattr(pty.slave.as_raw_fd(), libc::TCSANOW, &t);
    }
    assert!(pty.cooked());
    signal(&guest, libc::SIGCONT);
    let began = Instant::now();
    while pty.cooked() {
        assert!(began.elapsed() < PATIENCE, "the terminal stays cooked after SIGCONT");
        std::thread::sleep(Duration::from_millis(5));
    }
    pty.master.write_all(b"q").unwrap();
    assert_eq!(guest.end().code(), Some(0));
    assert!(pty.cooked());
}

#[test]
fn a_closed_terminal_stops_the_guest() {
    let files = Scratch::new();
    let mut pty = Pty::new();
    let mut guest = pty.start(&echo_guest(&files));
    pty.expect(b"ready");
    let Pty { master, slave } = pty;
    drop(slave);
    drop(master);
    assert_eq!(guest.end().code(), Some(128 + libc::SIGHUP));
}
