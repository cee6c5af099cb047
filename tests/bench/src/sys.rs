//! The system calls that std has no plain form of: fork, exec, mappings, futexes, signals, and pinning to one CPU.
//!
//! Each wrapper is safe to call from this program, which is single-threaded wherever it forks. What a benchmark row
//! does with them is in [`crate::os`].

// fork, mmap, mprotect and the like have no safe form; this module gives them one and holds all of this crate's unsafe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// The page size of x86-64's smallest pages, in bytes.
pub(crate) const PAGE: usize = 4096;

/// Turns the C convention (negative means errno) into a result.
fn checked(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Keeps this process and its children on the CPU it is on. A guest of the benchmark has one vCPU; on a host with
/// more, a ping-pong between two processes would otherwise measure the wake-up of another core.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn pin() -> io::Result<()> {
    // SAFETY: takes no arguments and only returns a number.
    let cpu = checked(i64::from(unsafe { libc::sched_getcpu() }))?;
    // SAFETY: a cpu_set_t is an array of integers, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` comes from the kernel and CPU_SET checks it against the set's size.
    unsafe { libc::CPU_SET(cpu as usize, &mut set) };
    // SAFETY: the set is valid for its own size and only read.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    checked(i64::from(result)).map(|_| ())
}

/// The parent's process number, asked of the kernel each time.
pub(crate) fn getppid() -> i32 {
    // SAFETY: takes no arguments and cannot fail.
    unsafe { libc::getppid() }
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The old one, with the new one's process number.
    Parent(i32),
}

/// Duplicates the process.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn fork() -> io::Result<Fork> {
    // SAFETY: no other thread of this process runs when a row forks, so the child may use everything it inherits.
    match checked(i64::from(unsafe { libc::fork() }))? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid as i32)),
    }
}

/// Ends the process at once, without the work that a normal exit does for the parent's inherited state.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: does not return and touches nothing of this process.
    unsafe { libc::_exit(code) }
}

/// Waits for a child and returns its exit status; one that a signal ended counts as an error.
///
/// # Errors
/// There is no such child, or it was killed.
pub(crate) fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    checked(i64::from(unsafe { libc::waitpid(pid, &raw mut status, 0) }))?;
    if libc::WIFEXITED(status) {
        Ok(libc::WEXITSTATUS(status))
    } else {
        Err(io::Error::other(format!("a child was ended by signal {}", libc::WTERMSIG(status))))
    }
}

/// A program and its arguments, converted before the fork so that the child only has to exec.
pub(crate) struct Program {
    words: Vec<CString>,
}

impl Program {
    /// The program at `words[0]` with the words as its arguments.
    ///
    /// # Errors
    /// A word holds a zero byte.
    pub(crate) fn new(words: &[&str]) -> io::Result<Self> {
        let words: Result<_, _> = words.iter().map(|word| CString::new(*word)).collect();
        Ok(Self { words: words? })
    }

    /// Becomes that program, with an empty environment; returns only on failure.
    pub(crate) fn exec(&self) -> io::Error {
        let mut pointers: Vec<_> = self.words.iter().map(|word| word.as_ptr()).collect();
        pointers.push(std::ptr::null());
        let environment = [std::ptr::null()];
        // SAFETY: both lists end in a null pointer and every other entry is a string that lives in `self`.
        unsafe { libc::execve(pointers[0], pointers.as_ptr(), environment.as_ptr()) };
        io::Error::last_os_error()
    }
}

/// Private zeroed memory of its own, in 4 KiB pages, unmapped when dropped.
pub(crate) struct Mapping {
    address: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    /// Maps `length` bytes. Huge pages are declined: how eagerly a kernel gives them is a setting, and the sides
    /// of a comparison may have different ones.
    ///
    /// # Errors
    /// There is no memory.
    pub(crate) fn new(length: usize) -> io::Result<Self> {
        let mapping = Self::plain(length)?;
        // SAFETY: the range is this mapping, which nobody else knows of. A kernel without huge pages reports
        // EINVAL, and then there is nothing to decline.
        unsafe { libc::madvise(mapping.address, length, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    /// Maps `length` bytes with one call and nothing else.
    ///
    /// # Errors
    /// There is no memory.
    pub(crate) fn plain(length: usize) -> io::Result<Self> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at a place of the kernel's choice disturbs no other memory.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { address, length }) }
    }

    /// Makes the memory read-only or writable again with mprotect; a read-only mapping is lent only as `&[u8]`.
    ///
    /// # Errors
    /// The kernel refuses.
    fn protect(&self, access: i32) -> io::Result<()> {
        // SAFETY: the range is this mapping; both callers below leave it readable and restore write access before
        // anything can write.
        checked(i64::from(unsafe { libc::mprotect(self.address, self.length, access) })).map(|_| ())
    }

    /// Read-only while `body` looks at it, writable afterwards.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn while_read_only(&mut self, body: impl FnOnce(&[u8])) -> io::Result<()> {
        self.protect(libc::PROT_READ)?;
        // SAFETY: the mapping is `length` readable bytes as long as `self` lives.
        body(unsafe { std::slice::from_raw_parts(self.address.cast(), self.length) });
        self.protect(libc::PROT_READ | libc::PROT_WRITE)
    }

    /// The memory.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `length` readable and writable bytes, borrowed together with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.length) }
    }

    /// The memory as 64-bit words.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        // SAFETY: mappings start at a page and any bits are a u64; the slice ends within the mapping.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.length / size_of::<u64>()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: every borrow of the memory has ended with `self`.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

/// Sleeps while `word` still holds `value`, at most a second.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32) {
    let limit = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word and the limit live across the call. Returning early is allowed: callers look at the word again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, &raw const limit) };
}

/// Wakes one sleeper on `word`.
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word lives across the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// How often [`on_signal`] ran.
static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Installs a handler for SIGUSR1 that counts.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn count_signals() -> io::Result<()> {
    // SAFETY: sigaction is a plain C structure for which zero means no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler only adds to an atomic, which is safe at any time.
    let result = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    checked(i64::from(result)).map(|_| ())
}

/// Sends SIGUSR1 to this thread and returns how many have been handled so far; it is delivered before this returns.
pub(crate) fn signal_self() -> u64 {
    // SAFETY: raise only sends the signal, whose handler count_signals installed; without it the process ends.
    unsafe { libc::raise(libc::SIGUSR1) };
    SIGNALS.load(Ordering::Relaxed)
}

/// CLOCK_MONOTONIC since boot, which std's `Instant` reads as well but does not show.
pub(crate) fn uptime() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
