//! The user's terminal: raw while a guest owns it, and always put back.
//!
//! Input goes to the guest byte by byte. Ctrl-A is the escape key: `Ctrl-A x` stops the guest, `Ctrl-A Ctrl-A` sends one
//! Ctrl-A, `Ctrl-A h` says so. In raw mode Ctrl-C is a byte like any other; SIGINT, SIGTERM, SIGHUP and SIGQUIT from outside
//! stop the guest. SIGTSTP gives the terminal back before the process stops, and SIGCONT takes it again, unless the
//! process went on in the background, where the terminal is somebody else's.
//!
//! Three threads: one waits for signals; one watches what that has to say, standard input and the escape key, and never waits for anything else;
//! the third hands input to the guest and waits while the guest does not read. A pipe is not read meanwhile, so that its writer waits too. A terminal
//! is, for the sake of the escape key; what is typed beyond the queue is dropped.
#![allow(unsafe_code)] // termios, poll and sigwait.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What the terminal saw that concerns the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The user wants the guest to stop.
    Quit,
    /// A signal asks for it.
    Signal(i32),
    /// The terminal is gone.
    Hangup,
}

/// Bytes taken from standard input at a time.
const CHUNK: usize = 4096;
/// Chunks that may wait for the guest.
const CHUNKS: usize = 4;
/// How often a chunk that found no room is offered again, in ms.
const RETRY: i32 = 10;

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

fn is_terminal() -> bool {
    // SAFETY: takes a number.
    unsafe { libc::isatty(0) == 1 }
}

/// Whether the terminal is somebody else's for now: touching it would stop us by SIGTTIN or SIGTTOU.
fn in_background() -> bool {
    // SAFETY: plain calls without memory.
    let (front, own) = unsafe { (libc::tcgetpgrp(0), libc::getpgrp()) };
    front > 0 && front != own
}

fn make_raw() {
    // SAFETY: termios is filled by tcgetattr before it is used.
    unsafe {
        let mut t: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(0, &mut t) != 0 {
            return;
        }
        if let Ok(mut saved) = SAVED.lock() {
            // What a shell left us after a stop does not replace what we began with.
            saved.get_or_insert(t);
        }
        libc::cfmakeraw(&mut t);
        // Output keeps its newline translation, for messages of our own.
        t.c_oflag |= libc::OPOST;
        libc::tcsetattr(0, libc::TCSANOW, &t);
    }
}

fn restore_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        before(info);
    }));
}

/// Watches standard input and signals until it is dropped, which also restores the terminal.
pub struct Terminal {
    /// The signals' thread is to end when the next one comes; with it ends the watching one.
    ended: Arc<AtomicBool>,
    signals: Option<JoinHandle<()>>,
    watcher: Option<JoinHandle<()>>,
    feeder: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Starts watching. With `input`, standard input is the guest's and a terminal there turns raw; `feed` is given the bytes and may
    /// block until the guest has read them or the machine stops. `handle` must not block.
    ///
    /// Signals must be blocked in all threads, which [`block_signals`] does when it is called before the first thread starts. They are waited for by
    /// a thread, not by a descriptor: whoever polls a signalfd is woken by every signal of the process, and the translator has thousands of its own.
    /// The machine must be stopping before this is dropped.
    ///
    /// # Errors
    /// When the host refuses a descriptor or a thread.
    pub fn start(
        input: bool,
        feed: impl Fn(&[u8]) + Send + 'static,
        handle: impl Fn(Event) + Send + 'static,
    ) -> io::Result<Self> {
        let (signals, to_watcher) = io::pipe()?;
        let ended = Arc::new(AtomicBool::new(false));
        let mut me = Self { ended: ended.clone(), signals: None, watcher: None, feeder: None };
        let thread = std::thread::Builder::new().name("signals".into());
        me.signals = Some(thread.spawn(move || pass_on_signals(to_watcher, &ended))?);
        let (to_guest, from_user) = mpsc::sync_channel::<Vec<u8>>(CHUNKS);
        if input {
            let thread = std::thread::Builder::new().name("input".into());
            me.feeder = Some(thread.spawn(move || from_user.iter().for_each(|bytes| feed(&bytes)))?);
        }
        let tty = input && is_terminal();
        if tty {
            restore_on_panic();
        }
        let watch = Watch { input, tty, to_guest, handle };
        // Here and not on the new thread: the guest must not speak or be typed at before the terminal is raw.
        let ours = watch.take_terminal();
        let thread = std::thread::Builder::new().name("terminal".into());
        me.watcher = Some(thread.spawn(move || watch.run(signals, ours))?);
        Ok(me)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.signals {
            // SAFETY: the thread has not been joined, and blocks the signal, which it waits for.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGTERM) };
        }
        for thread in [self.signals.take(), self.watcher.take(), self.feeder.take()].into_iter().flatten() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
        restore();
    }
}

fn signal_set() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP, libc::SIGCONT] {
            libc::sigaddset(&mut set, s);
        }
        set
    }
}

/// Blocks the signals that [`Terminal`] waits for, for this thread and those it starts.
pub fn block_signals() {
    let set = signal_set();
    // SAFETY: a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
}

/// The signals' thread: tells the watching one their numbers, a byte each.
fn pass_on_signals(mut to_watcher: PipeWriter, ended: &AtomicBool) {
    let set = signal_set();
    loop {
        let mut signal = 0;
        // SAFETY: an initialised set, and a local for the number.
        let failed = unsafe { libc::sigwait(&set, &mut signal) } != 0;
        if ended.load(Ordering::Relaxed) || failed || to_watcher.write_all(&[signal as u8]).is_err() {
            return;
        }
    }
}

/// The watching thread.
struct Watch<H> {
    /// Standard input is the guest's.
    input: bool,
    /// And it is a terminal.
    tty: bool,
    to_guest: SyncSender<Vec<u8>>,
    handle: H,
}

/// What a read of standard input came to.
enum Read {
    Bytes(Vec<u8>),
    End,
    Gone,
    Later,
}

impl<H: Fn(Event)> Watch<H> {
    fn run(self, mut signals: PipeReader, mut ours: bool) {
        let poll = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut open = self.input;
        let mut escape = Escape::default();
        // Input for which the guest has no room yet.
        let mut held: Option<Vec<u8>> = None;
        loop {
            if let Some(bytes) = held.take() {
                held = self.offer(bytes);
            }
            let listen = open && ours && (self.tty || held.is_none());
            let mut fds = [poll(signals.as_raw_fd()), poll(if listen { 0 } else { -1 })];
            // SAFETY: an array of initialised pollfd.
            let n = unsafe {
                libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, if held.is_some() { RETRY } else { -1 })
            };
            if n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                continue;
            }
            if n < 0 {
                return;
            }
            if fds[0].revents != 0 {
                match next_signal(&mut signals) {
                    libc::SIGTSTP => {
                        restore();
                        // SAFETY: stops this process, as the default action of SIGTSTP does.
                        unsafe { libc::raise(libc::SIGSTOP) };
                    }
                    libc::SIGCONT => ours = self.take_terminal(),
                    // The other thread has ended.
                    0 => return,
                    signal => (self.handle)(Event::Signal(signal)),
                }
            }
            if fds[1].revents == 0 {
                continue;
            }
            match self.read() {
                Read::Bytes(bytes) => {
                    let (bytes, quit) = if self.tty { escape.filter(&bytes) } else { (bytes, false) };
                    if held.is_none() && !bytes.is_empty() {
                        held = self.offer(bytes);
                    }
                    if quit {
                        (self.handle)(Event::Quit);
                    }
                }
                // The end of a pipe or file is no reason to stop; the guest may have plenty to do.
                Read::End => open = false,
                Read::Gone => {
                    open = false;
                    (self.handle)(Event::Hangup);
                }
                Read::Later => {}
            }
        }
    }

    /// Makes the terminal raw if it is ours to use; gives whether standard input is.
    fn take_terminal(&self) -> bool {
        if !self.tty {
            return true;
        }
        let ours = !in_background();
        if ours {
            make_raw();
        }
        ours
    }

    /// Gives bytes to the feeding thread, or back.
    fn offer(&self, bytes: Vec<u8>) -> Option<Vec<u8>> {
        match self.to_guest.try_send(bytes) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => None,
            Err(TrySendError::Full(bytes)) => Some(bytes),
        }
    }

    fn read(&self) -> Read {
        let mut buf = vec![0u8; CHUNK];
        // SAFETY: reads into a local buffer of this size.
        let n = unsafe { libc::read(0, buf.as_mut_ptr().cast(), buf.len()) };
        match n {
            1.. => {
                buf.truncate(n as usize);
                Read::Bytes(buf)
            }
            0 if self.tty => Read::Gone,
            0 => Read::End,
            _ => match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Read::Later,
                _ if self.tty => Read::Gone,
                // A closed descriptor, a directory: there is no input, and that is all.
                _ => Read::End,
            },
        }
    }
}

/// The next signal's number; 0 when there will be none.
fn next_signal(signals: &mut PipeReader) -> i32 {
    let mut signal = [0];
    signals.read_exact(&mut signal).map_or(0, |()| i32::from(signal[0]))
}

const CTRL_A: u8 = 1;

/// The escape key's state between reads.
#[derive(Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    /// What is for the guest, and whether the user wants to quit. For terminals only: elsewhere nobody means the escape key.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
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

    /// How often the process' thread of this name has waited, once it has its name.
    fn waits(name: &str) -> u64 {
        let of_name = |text: &String| text.lines().next().and_then(|l| l.split_whitespace().nth(1)) == Some(name);
        loop {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
            let Some(text) = texts.into_iter().find(of_name) else { continue };
            let count = text.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
            return count.expect("Linux counts them").trim().parse().unwrap();
        }
    }

    extern "C" fn nothing(_: i32) {}

    /// The translator's own signals come by thousands.
    #[test]
    fn signals_of_others_wake_nobody_and_ours_arrive() {
        block_signals();
        let (to, events) = mpsc::channel();
        let terminal = Terminal::start(false, |_| {}, move |e| to.send(e).unwrap()).unwrap();
        // SAFETY: a handler that does nothing, for a signal that nobody else uses here.
        unsafe {
            let action: extern "C" fn(i32) = nothing;
            libc::signal(libc::SIGUSR2, action as *const () as libc::sighandler_t);
        }
        // The threads come to where they wait first.
        while waits("terminal") == 0 || waits("signals") == 0 {
            std::thread::yield_now();
        }
        let before = waits("terminal") + waits("signals");
        for _ in 0..500 {
            // SAFETY: sends this thread a signal that it handles.
            unsafe { libc::raise(libc::SIGUSR2) };
            std::thread::yield_now();
        }
        assert!(waits("terminal") + waits("signals") <= before + 5);
        let thread = terminal.signals.as_ref().expect("it was started").as_pthread_t();
        // SAFETY: sends a thread that runs a signal that it waits for. The whole process is not ours here.
        unsafe { libc::pthread_kill(thread, libc::SIGINT) };
        assert_eq!(events.recv_timeout(std::time::Duration::from_secs(10)), Ok(Event::Signal(libc::SIGINT)));
        drop(terminal);
    }
}
