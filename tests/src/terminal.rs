//! A pseudo-terminal with a program on it: the test is the person at the keyboard.
//!
//! The program gets the terminal as standard input, output and error and as its controlling terminal, in a session of
//! its own, as it would from a login shell. So closing the test's side is what closing a terminal window is.

#![allow(unsafe_code)] // openpty, tcgetattr and the controlling terminal have no safe form in the standard library.

use crate::process::Process;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Input, output, control and local modes, and the control characters: everything that raw mode changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modes {
    flags: [u32; 4],
    characters: [u8; libc::NCCS],
}

/// A terminal: the side with the keyboard and the screen, and the side that programs open.
pub struct Terminal {
    /// `None` once closed.
    keyboard: Option<File>,
    line: OwnedFd,
    screen: Vec<u8>,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// Opens a new pseudo-terminal.
    ///
    /// # Panics
    /// The system has none to give.
    pub fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: both numbers are valid places to write to, and null asks for the defaults of the rest.
        let result = unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) };
        assert_eq!(result, 0, "a pseudo-terminal can be opened");
        for fd in [master, slave] {
            // SAFETY: the descriptor was just opened. A program must not inherit it by accident.
            assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        }
        // SAFETY: the descriptor was just opened; the keyboard side must never block the test.
        assert_eq!(unsafe { libc::fcntl(master, libc::F_SETFL, libc::O_NONBLOCK) }, 0);
        // SAFETY: openpty succeeded, so both descriptors are open and nobody else's.
        let (keyboard, line) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        Self { keyboard: Some(keyboard), line, screen: Vec::new() }
    }

    /// The terminal's modes now.
    ///
    /// # Panics
    /// The terminal has been closed.
    pub fn modes(&self) -> Modes {
        // SAFETY: termios is plain data, for which zero is a valid value.
        let mut termios: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and `termios` a valid place to write to.
        let result = unsafe { libc::tcgetattr(self.line.as_raw_fd(), &mut termios) };
        assert_eq!(result, 0, "the terminal has modes");
        Modes { flags: [termios.c_iflag, termios.c_oflag, termios.c_cflag, termios.c_lflag], characters: termios.c_cc }
    }

    /// Starts a command on this terminal.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(&self, command: &mut Command) -> Process {
        let fd = || Stdio::from(self.line.try_clone().expect("the descriptor can be duplicated"));
        command.stdin(fd()).stdout(fd()).stderr(fd());
        // SAFETY: setsid and ioctl are async-signal-safe, and nothing else runs between fork and exec.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Process::start(command)
    }

    /// Reads what has reached the screen.
    fn look(&mut self) {
        let Some(keyboard) = &mut self.keyboard else { return };
        let mut buffer = [0; 4096];
        loop {
            match keyboard.read(&mut buffer) {
                Ok(count @ 1..) => self.screen.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nothing more for now, or (EIO) nobody has the terminal open.
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Everything that has reached the screen so far.
    pub fn screen(&mut self) -> String {
        self.look();
        String::from_utf8_lossy(&self.screen).into_owned()
    }

    /// Presses keys.
    ///
    /// # Panics
    /// The terminal has been closed or takes no more.
    pub fn press(&mut self, keys: &str) {
        let keyboard = self.keyboard.as_mut().expect("the terminal is open");
        keyboard.write_all(keys.as_bytes()).expect("the terminal takes the keys");
    }

    /// Waits until the screen shows `text` after its first `from` bytes, and returns where the text ends.
    ///
    /// # Panics
    /// The program ended or the time passed first; the panic carries the screen.
    pub fn wait_for(&mut self, process: &mut Process, text: &str, from: usize, limit: Duration) -> usize {
        let start = Instant::now();
        loop {
            let screen = self.screen();
            if let Some(at) = screen.get(from..).and_then(|rest| rest.find(text)) {
                return from + at + text.len();
            }
            if let Some(status) = process.ended() {
                panic!("the program ended ({status}) before it showed \"{text}\":\n{}", self.screen());
            }
            assert!(start.elapsed() < limit, "no \"{text}\" within {limit:?}:\n{screen}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the terminal's modes differ from `before`, that is, until the program has it in raw mode.
    ///
    /// # Panics
    /// The program ended or the time passed first.
    pub fn wait_for_raw_mode(&mut self, process: &mut Process, before: &Modes, limit: Duration) {
        let start = Instant::now();
        while self.modes() == *before {
            if let Some(status) = process.ended() {
                panic!("the program ended ({status}) before it took the terminal:\n{}", self.screen());
            }
            assert!(start.elapsed() < limit, "the terminal is not in raw mode after {limit:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the program's end.
    ///
    /// # Panics
    /// The time passed first; the panic carries the screen.
    pub fn wait_for_end(&mut self, process: &mut Process, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            self.look();
            if let Some(status) = process.ended() {
                return status;
            }
            assert!(start.elapsed() < limit, "the program runs on after {limit:?}:\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Closes the window: the keyboard side goes away.
    pub fn close(&mut self) {
        self.keyboard = None;
    }
}
