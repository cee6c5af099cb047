//! The user's terminal: raw while a guest owns it, and always put back.
//!
//! Input goes to the guest byte by byte. Ctrl-A is the escape key: `Ctrl-A x` stops the guest, `Ctrl-A Ctrl-A` sends one
//! Ctrl-A, `Ctrl-A h` says so. In raw mode Ctrl-C is a byte like any other; SIGINT, SIGTERM and SIGHUP from outside stop
//! the guest.
#![allow(unsafe_code)] // termios, poll and signalfd.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::thread::JoinHandle;

/// What the terminal saw that concerns the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes for the guest.
    Input(&'a [u8]),
    /// The user wants the guest to stop.
    Quit,
    /// A signal asks for it.
    Signal(i32),
    /// The terminal is gone.
    Hangup,
}

/// Settings to go back to, for whoever ends the process.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Puts the terminal back as it was. Safe to call at any time, more than once.
pub fn restore() {
    if let Ok(mut saved) = SAVED.lock()
        && let Some(t) = saved.take()
    {
        // SAFETY: settings that tcgetattr gave for this descriptor.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, &t) };
    }
}

fn make_raw() {
    // SAFETY: isatty takes a number; termios is filled by tcgetattr before it is used.
    unsafe {
        let mut t: libc::termios = std::mem::zeroed();
        if libc::isatty(0) == 0 || libc::tcgetattr(0, &mut t) != 0 {
            return;
        }
        if let Ok(mut saved) = SAVED.lock() {
            *saved = Some(t);
        }
        libc::cfmakeraw(&mut t);
        // Output keeps its newline translation, for messages of our own.
        t.c_oflag |= libc::OPOST;
        libc::tcsetattr(0, libc::TCSANOW, &t);
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        before(info);
    }));
}

/// Watches standard input and signals until it is dropped, which also restores the terminal.
pub struct Terminal {
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Starts watching. With `input`, standard input is the guest's and a terminal there turns raw. Signals must be blocked in all threads, which
    /// [`block_signals`] does when it is called before the first thread starts.
    ///
    /// # Errors
    /// When the host refuses a descriptor or a thread.
    pub fn start(input: bool, handle: impl Fn(Event<'_>) + Send + 'static) -> io::Result<Self> {
        let signals = signal_fd()?;
        // SAFETY: plain calls; results are checked.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nothing else owns.
        let wake = unsafe { OwnedFd::from_raw_fd(wake) };
        if input {
            make_raw();
        }
        let wake_fd = wake.as_raw_fd();
        let thread = std::thread::Builder::new()
            .name("terminal".into())
            .spawn(move || watch(input, &signals, wake_fd, &handle))?;
        Ok(Self { wake, thread: Some(thread) })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // SAFETY: writes eight bytes of a live local to our own descriptor.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const ONE).cast(), 8) };
        if let Some(t) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = t.join();
        }
        restore();
    }
}

static ONE: u64 = 1;

fn signal_set() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(&mut set, s);
        }
        set
    }
}

/// Blocks the signals that [`Terminal`] takes by descriptor, for this thread and those it starts.
pub fn block_signals() {
    let set = signal_set();
    // SAFETY: a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
}

fn signal_fd() -> io::Result<OwnedFd> {
    let set = signal_set();
    // SAFETY: a valid set; the result is checked.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn watch(input: bool, signals: &OwnedFd, wake: RawFd, handle: &(impl Fn(Event<'_>) + Send)) {
    let poll = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(wake), poll(signals.as_raw_fd()), poll(if input { 0 } else { -1 })];
    let mut escape = Escape::default();
    loop {
        // SAFETY: an array of initialised pollfd.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
            continue;
        }
        if n < 0 || fds[0].revents != 0 {
            return;
        }
        if fds[1].revents != 0 {
            // SAFETY: zeroed is valid for this plain structure; the length is its own.
            let signal = unsafe {
                let mut info: libc::signalfd_siginfo = std::mem::zeroed();
                let len = size_of::<libc::signalfd_siginfo>();
                libc::read(signals.as_raw_fd(), (&raw mut info).cast(), len);
                info.ssi_signo as i32
            };
            handle(Event::Signal(signal));
            fds[1].fd = -1;
        }
        if fds[2].revents != 0 {
            let mut buf = [0u8; 4096];
            // SAFETY: reads into a local buffer of this size.
            let n = unsafe { libc::read(0, buf.as_mut_ptr().cast(), buf.len()) };
            match n {
                1.. => {
                    let (bytes, quit) = escape.filter(&buf[..n as usize]);
                    if !bytes.is_empty() {
                        handle(Event::Input(&bytes));
                    }
                    if quit {
                        handle(Event::Quit);
                    }
                }
                // The end of a pipe or file is no reason to stop; the guest may have plenty to do.
                0 if fds[2].revents & libc::POLLHUP == 0 || !is_terminal() => fds[2].fd = -1,
                _ => {
                    let again = n < 0
                        && matches!(
                            io::Error::last_os_error().kind(),
                            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                        );
                    if !again {
                        fds[2].fd = -1;
                        handle(Event::Hangup);
                    }
                }
            }
        }
    }
}

/// Whether standard input was a terminal when we started.
fn is_terminal() -> bool {
    SAVED.lock().is_ok_and(|s| s.is_some())
}

const CTRL_A: u8 = 1;

/// The escape key's state between reads.
#[derive(Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    /// What is for the guest, and whether the user wants to quit.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        // Only a terminal has somebody in front of it who could mean the escape key.
        if !is_terminal() {
            return (bytes.to_vec(), false);
        }
        let mut out = Vec::with_capacity(bytes.len());
        let quit = self.scan(bytes, &mut out);
        (out, quit)
    }

    fn scan(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        for &b in bytes {
            if !std::mem::take(&mut self.pending) {
                if b == CTRL_A {
                    self.pending = true;
                } else {
                    out.push(b);
                }
                continue;
            }
            match b {
                b'x' | b'X' => return true,
                CTRL_A => out.push(CTRL_A),
                b'h' | b'?' => {
                    let text = b"\r\nCtrl-A x stops the guest, Ctrl-A Ctrl-A sends Ctrl-A.\r\n";
                    // A closed standard error leaves nobody to read it.
                    let _ = io::stderr().write_all(text);
                }
                _ => {}
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_key() {
        let mut e = Escape::default();
        let mut out = Vec::new();
        assert!(!e.scan(b"ab\x01", &mut out));
        assert!(!e.scan(b"\x01c\x01q", &mut out));
        assert_eq!(out, b"ab\x01c");
        assert!(e.scan(b"\x01xd", &mut out));
    }
}
