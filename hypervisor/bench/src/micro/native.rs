//! The host's side: what a process of this machine can do that comes closest to what the guest does.
//!
//! A process has system calls where the guest's kernel has instructions, signals where it has interrupts, and mprotect(2) where
//! it has page tables, so each of these figures says what the host's kernel adds to the processor's own work. What a
//! process may not do at all has a reason instead of a figure.
#![allow(unsafe_code)] // Single instructions, signal handlers, and system calls without a wrapper.

use std::arch::asm;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// What a case has on the host.
#[derive(Clone, Copy)]
pub enum Native {
    /// A form, which gives ns per operation of each piece of its work.
    Run(fn(&Place) -> Outcome),
    /// None, for this reason.
    Missing(&'static str),
}

/// ns per operation, piece by piece.
pub type Outcome = io::Result<Vec<f64>>;

/// What a form may use.
pub struct Place<'a> {
    /// A file of at least a sector.
    pub file: &'a Path,
}

/// Pieces of the work, as in the guest.
const PIECES: u32 = 20;

/// Has `work` do `count` operations in pieces; a first piece warms up and is not timed.
fn in_pieces(count: u32, mut work: impl FnMut(u32) -> io::Result<()>) -> Outcome {
    let piece = (count / PIECES).max(1);
    work(piece)?;
    let timed = |_| {
        let start = Instant::now();
        work(piece)?;
        Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(piece))
    };
    (0..PIECES).map(timed).collect()
}

fn repeated(count: u32, mut work: impl FnMut() -> io::Result<()>) -> Outcome {
    in_pieces(count, |piece| (0..piece).try_for_each(|_| work()))
}

/// The error of a system call that gave `result`.
fn checked(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The error of a function that gives its number.
fn numbered(error: libc::c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

pub(super) fn syscall(_: &Place<'_>) -> Outcome {
    repeated(100_000, || {
        // SAFETY: getppid(2) changes nothing.
        unsafe { asm!("syscall", inout("rax") libc::SYS_getppid => _, out("rcx") _, out("r11") _) };
        Ok(())
    })
}

pub(super) fn call_return(_: &Place<'_>) -> Outcome {
    in_pieces(1_000_000, |count| {
        // SAFETY: a loop around a call of what follows it.
        unsafe {
            // The red zone is left alone.
            asm!("sub rsp, 128", "2:", "call 4f", "dec {n}", "jnz 2b", "jmp 5f", "4: ret", "5:", "add rsp, 128",
                n = inout(reg) u64::from(count) => _);
        }
        Ok(())
    })
}

/// Where the instruction is that [`skip`] may skip, and its length.
static FAULT_AT: AtomicU64 = AtomicU64::new(0);
static FAULT_LENGTH: AtomicU64 = AtomicU64::new(0);

/// Goes on behind the instruction that is expected to fault. Any other fault ends the process, as it would without this handler.
extern "C" fn skip(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO this structure.
    let rip = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    if *rip as u64 == FAULT_AT.load(SeqCst) {
        *rip += FAULT_LENGTH.load(SeqCst) as i64;
    } else {
        // SAFETY: resets one signal's disposition; the instruction faults again.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// A signal's handler for as long as this exists.
struct Handler {
    signal: libc::c_int,
    before: libc::sigaction,
}

impl Handler {
    fn new(signal: libc::c_int, handler: usize, flags: libc::c_int) -> io::Result<Self> {
        // SAFETY: zero is a valid sigaction; both are used as sigaction(2) wants them.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = flags;
            let mut before = std::mem::zeroed();
            checked(libc::sigaction(signal, &raw const action, &raw mut before))?;
            Ok(Self { signal, before })
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // SAFETY: what sigaction(2) gave before.
        unsafe { libc::sigaction(self.signal, &raw const self.before, null_mut()) };
    }
}

pub(super) fn page_fault(_: &Place<'_>) -> Outcome {
    let page = Mapping::new(1, libc::PROT_NONE)?;
    let _handler = Handler::new(libc::SIGSEGV, skip as *const () as usize, libc::SA_SIGINFO)?;
    FAULT_LENGTH.store(3, SeqCst);
    in_pieces(10_000, |count| {
        // SAFETY: the load faults, and the handler goes on behind it.
        unsafe {
            asm!("lea {at}, [rip + 2f]", "mov [{place}], {at}", "2:", "mov rax, [r14]", "dec {n}", "jnz 2b",
                at = out(reg) _, place = in(reg) FAULT_AT.as_ptr(), n = inout(reg) u64::from(count) => _,
                in("r14") page.at, out("rax") _);
        }
        Ok(())
    })
}

pub(super) fn divide_by_zero(_: &Place<'_>) -> Outcome {
    let _handler = Handler::new(libc::SIGFPE, skip as *const () as usize, libc::SA_SIGINFO)?;
    FAULT_LENGTH.store(2, SeqCst);
    in_pieces(10_000, |count| {
        // SAFETY: the division faults, and the handler goes on behind it.
        unsafe {
            asm!("lea {at}, [rip + 2f]", "mov [{place}], {at}", "2:", "div ecx", "dec {n}", "jnz 2b",
                at = out(reg) _, place = in(reg) FAULT_AT.as_ptr(), n = inout(reg) u64::from(count) => _,
                in("ecx") 0, inout("rax") 1_u64 => _, inout("rdx") 0_u64 => _);
        }
        Ok(())
    })
}

/// Pages of anonymous memory.
struct Mapping {
    at: *mut u8,
    bytes: usize,
}

const PAGE: usize = 4096;

impl Mapping {
    fn new(pages: usize, protection: libc::c_int) -> io::Result<Self> {
        let bytes = pages * PAGE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { libc::mmap(null_mut(), bytes, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = Self { at: at.cast(), bytes };
        // Page by page, as in the guest. A kernel without huge pages refuses, and has none to avoid.
        // SAFETY: the mapping was just made.
        unsafe { libc::madvise(at, bytes, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    fn pages(&self) -> usize {
        self.bytes / PAGE
    }

    /// Reads from each page.
    fn read(&self) {
        for n in 0..self.pages() {
            // SAFETY: inside the mapping, which is readable wherever this is called.
            unsafe { self.at.add(n * PAGE).read_volatile() };
        }
    }

    /// Writes to each page.
    fn write(&self) {
        for n in 0..self.pages() {
            // SAFETY: inside the mapping, which is writable wherever this is called.
            unsafe { self.at.add(n * PAGE).write_volatile(1) };
        }
    }

    fn protect(&self, protection: libc::c_int) -> io::Result<()> {
        // SAFETY: this object's own mapping.
        checked(unsafe { libc::mprotect(self.at.cast(), self.bytes, protection) }).map(drop)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// Read-only and writable in turn: one entry of the page tables changes, and its translation is invalidated.
fn toggled(pages: usize, count: u32, then: impl Fn(&Mapping)) -> Outcome {
    const READ: libc::c_int = libc::PROT_READ;
    let mapping = Mapping::new(pages, READ | libc::PROT_WRITE)?;
    mapping.write();
    let mut now = 0;
    let each = repeated(count, || {
        now = READ | libc::PROT_WRITE & !now;
        mapping.protect(now)?;
        then(&mapping);
        Ok(())
    })?;
    Ok(each.into_iter().map(|ns| ns / pages as f64).collect())
}

pub(super) fn protect(_: &Place<'_>) -> Outcome {
    toggled(1, 40_000, |_| {})
}

pub(super) fn protect_many(_: &Place<'_>) -> Outcome {
    toggled(4096, PIECES, |_| {})
}

pub(super) fn remap<const N: usize>(_: &Place<'_>) -> Outcome {
    toggled(N, (40_000 / N as u32).max(PIECES), Mapping::read)
}

pub(super) fn map_and_unmap(_: &Place<'_>) -> Outcome {
    const PAGES: usize = 4096;
    let each = repeated(PIECES, || {
        Mapping::new(PAGES, libc::PROT_READ)?.read();
        Ok(())
    })?;
    Ok(each.into_iter().map(|ns| ns / PAGES as f64).collect())
}

pub(super) fn free_pages(_: &Place<'_>) -> Outcome {
    let range = Mapping::new(16, libc::PROT_READ | libc::PROT_WRITE)?;
    let timed = |_| {
        range.write();
        let start = Instant::now();
        // SAFETY: nobody needs what is in this object's own mapping.
        checked(unsafe { libc::madvise(range.at.cast(), range.bytes, libc::MADV_DONTNEED) })?;
        Ok(start.elapsed().as_secs_f64() * 1e9 / range.pages() as f64)
    };
    (0..10 * PIECES).map(timed).collect()
}

/// This thread on one CPU, for as long as this exists.
struct Pinned(libc::cpu_set_t);

impl Pinned {
    fn new() -> io::Result<Self> {
        let bytes = size_of::<libc::cpu_set_t>();
        // SAFETY: zero is an empty set; the calls read and write one of that size.
        unsafe {
            let (mut before, mut one) = (std::mem::zeroed::<libc::cpu_set_t>(), std::mem::zeroed());
            checked(libc::sched_getaffinity(0, bytes, &raw mut before))?;
            let cpu = checked(libc::sched_getcpu())? as usize;
            libc::CPU_SET(cpu, &mut one);
            checked(libc::sched_setaffinity(0, bytes, &raw const one))?;
            Ok(Self(before))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the set that was there before.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const self.0) };
    }
}

/// A process that answers every byte with one, and is gone when this is.
struct Echo {
    pid: libc::pid_t,
    /// Where to write, where to read.
    pipes: [libc::c_int; 2],
}

impl Echo {
    fn new() -> io::Result<Self> {
        let (mut there, mut back) = ([0; 2], [0; 2]);
        // SAFETY: pipes of this function; the child calls nothing but what may be called after fork(2) in a process with threads.
        unsafe {
            checked(libc::pipe2(there.as_mut_ptr(), libc::O_CLOEXEC))?;
            if let Err(e) = checked(libc::pipe2(back.as_mut_ptr(), libc::O_CLOEXEC)) {
                close(&there);
                return Err(e);
            }
            let pid = libc::fork();
            if pid == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(there[1]);
                let mut byte = 0_u8;
                while libc::read(there[0], (&raw mut byte).cast(), 1) == 1
                    && libc::write(back[1], (&raw const byte).cast(), 1) == 1
                {}
                libc::_exit(0);
            }
            let failure = io::Error::last_os_error();
            close(&[there[0], back[1]]);
            if pid < 0 {
                close(&[there[1], back[0]]);
                return Err(failure);
            }
            Ok(Self { pid, pipes: [there[1], back[0]] })
        }
    }

    /// There and back.
    fn round(&self) -> io::Result<()> {
        let mut byte = 0_u8;
        // SAFETY: one byte of this function's.
        unsafe {
            checked(libc::write(self.pipes[0], (&raw const byte).cast(), 1) as i64)?;
            checked(libc::read(self.pipes[1], (&raw mut byte).cast(), 1) as i64)?;
        }
        Ok(())
    }
}

fn close(descriptors: &[libc::c_int]) {
    for &fd in descriptors {
        // SAFETY: the callers own them.
        unsafe { libc::close(fd) };
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        close(&self.pipes);
        // SAFETY: the child of this object, which nobody else waits for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, null_mut(), 0);
        }
    }
}

/// Two processes on one CPU that wake each other through pipes; an operation is one switch.
pub(super) fn switch(_: &Place<'_>) -> Outcome {
    let _pinned = Pinned::new()?;
    let echo = Echo::new()?;
    let rounds = repeated(5000, || echo.round())?;
    Ok(rounds.into_iter().map(|ns| ns / 2.0).collect())
}

pub(super) fn cpuid(_: &Place<'_>) -> Outcome {
    repeated(2000, || {
        std::hint::black_box(std::arch::x86_64::__cpuid(0));
        Ok(())
    })
}

pub(super) fn rdtsc(_: &Place<'_>) -> Outcome {
    repeated(1_000_000, || {
        // SAFETY: Linux lets processes read the TSC; one that may not dies of it, which only prctl(2) brings about.
        std::hint::black_box(unsafe { std::arch::x86_64::_rdtsc() });
        Ok(())
    })
}

pub(super) fn rdtsc_ordered(_: &Place<'_>) -> Outcome {
    repeated(1_000_000, || {
        // SAFETY: as in `rdtsc`.
        unsafe {
            std::arch::x86_64::_mm_lfence();
            std::hint::black_box(std::arch::x86_64::_rdtsc());
        }
        Ok(())
    })
}

pub(super) fn clock(_: &Place<'_>) -> Outcome {
    repeated(400_000, || {
        std::hint::black_box(Instant::now());
        Ok(())
    })
}

/// Signals that arrived.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn counting(_: libc::c_int) {
    SIGNALS.fetch_add(1, SeqCst);
}

/// A real-time signal that nothing else here uses.
fn own_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

fn own_set() -> libc::sigset_t {
    // SAFETY: an empty set, to which a valid signal is added.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, own_signal());
        set
    }
}

fn set_mask(how: libc::c_int) -> io::Result<()> {
    let set = own_set();
    // SAFETY: changes whether this thread takes one signal.
    numbered(unsafe { libc::pthread_sigmask(how, &raw const set, null_mut()) })
}

/// Sends the signal to this thread.
fn send() -> io::Result<()> {
    // SAFETY: a handler is in place wherever this is called.
    numbered(unsafe { libc::pthread_kill(libc::pthread_self(), own_signal()) })
}

pub(super) fn mask(_: &Place<'_>) -> Outcome {
    repeated(50_000, || {
        set_mask(libc::SIG_BLOCK)?;
        set_mask(libc::SIG_UNBLOCK)
    })
}

pub(super) fn mask_with_signal(_: &Place<'_>) -> Outcome {
    let _handler = Handler::new(own_signal(), counting as *const () as usize, 0)?;
    repeated(20_000, || {
        set_mask(libc::SIG_BLOCK)?;
        send()?;
        set_mask(libc::SIG_UNBLOCK)
    })
}

pub(super) fn signal(_: &Place<'_>) -> Outcome {
    let _handler = Handler::new(own_signal(), counting as *const () as usize, 0)?;
    repeated(20_000, send)
}

pub(super) fn timer_arm(_: &Place<'_>) -> Outcome {
    // SAFETY: a descriptor of its own.
    let timer = checked(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) })? as libc::c_int;
    let mut n = 0;
    let outcome = repeated(50_000, || {
        n += 1;
        let never = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let value = libc::itimerspec { it_interval: never, it_value: libc::timespec { tv_sec: 100, tv_nsec: n } };
        // SAFETY: the timer is this function's.
        checked(unsafe { libc::timerfd_settime(timer, 0, &raw const value, null_mut()) }).map(drop)
    });
    close(&[timer]);
    outcome
}

pub(super) fn sleep_latency(_: &Place<'_>) -> Outcome {
    // As far ahead as in the guest.
    const AHEAD: i64 = 500_000;
    let now = || {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: fills in the structure.
        checked(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) })?;
        Ok::<_, io::Error>(now.tv_sec * 1_000_000_000 + now.tv_nsec)
    };
    let late = |_| {
        let deadline = now()? + AHEAD;
        let at = libc::timespec { tv_sec: deadline / 1_000_000_000, tv_nsec: deadline % 1_000_000_000 };
        // SAFETY: sleeps; there is nothing to write.
        unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const at, null_mut()) };
        Ok((now()? - deadline).max(1) as f64)
    };
    (0..5 * PIECES).map(late).collect()
}

pub(super) fn read_file(place: &Place<'_>) -> Outcome {
    let file = File::open(place.file)?;
    let mut sector = [0; 512];
    repeated(20_000, || file.read_exact_at(&mut sector, 0))
}

pub(super) fn send_datagram(_: &Place<'_>) -> Outcome {
    let (from, to) = (UdpSocket::bind(("127.0.0.1", 0))?, UdpSocket::bind(("127.0.0.1", 0))?);
    from.connect(to.local_addr()?)?;
    // As many bytes as the guest's frame. Nobody reads them: what does not fit is thrown away.
    repeated(10_000, || from.send(&[0; 60]).map(drop))
}

pub(super) fn write_line(_: &Place<'_>) -> Outcome {
    let (mut reader, mut writer) = io::pipe()?;
    let thread = std::thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
    let outcome = repeated(10_000, || io::Write::write_all(&mut writer, &[b'.'; 64]));
    drop(writer);
    let _ = thread.join();
    outcome
}

/// How long a woken thread may take before the measurement is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// A thread that sleeps on a futex; an operation ends when it has said that it runs.
pub(super) fn wake_thread(_: &Place<'_>) -> Outcome {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    static DONE: AtomicU32 = AtomicU32::new(0);
    const STOP: u32 = u32::MAX;
    let wake = || {
        // SAFETY: wakes whoever waits at a static's address.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                ASKED.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                1,
                null::<u8>(),
                0,
                0,
            )
        };
    };
    ASKED.store(0, SeqCst);
    DONE.store(0, SeqCst);
    let thread = std::thread::spawn(|| {
        let mut seen = 0;
        loop {
            // SAFETY: sleeps while the static holds `seen`.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    ASKED.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    seen,
                    null::<u8>(),
                    0,
                    0,
                )
            };
            match ASKED.load(SeqCst) {
                STOP => return,
                asked => seen = asked,
            }
            DONE.store(seen, SeqCst);
        }
    });
    let mut n = 0;
    let outcome = repeated(2000, || {
        n += 1;
        ASKED.store(n, SeqCst);
        wake();
        let start = Instant::now();
        while DONE.load(SeqCst) != n {
            if start.elapsed() > PATIENCE {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            std::hint::spin_loop();
        }
        Ok(())
    });
    ASKED.store(STOP, SeqCst);
    wake();
    let _ = thread.join();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_count_and_faults_are_skipped() {
        let place = Place { file: Path::new("/proc/self/exe") };
        let before = SIGNALS.load(SeqCst);
        let pieces = signal(&place).expect("signals");
        assert_eq!(pieces.len(), PIECES as usize);
        assert!(SIGNALS.load(SeqCst) - before >= 20_000);
        for form in [page_fault, divide_by_zero, call_return, protect, switch, read_file, free_pages] {
            let pieces = form(&place).expect("it works");
            assert!(pieces.len() >= PIECES as usize && pieces.iter().all(|ns| *ns > 0.0), "{pieces:?}");
        }
        // A load costs less than a fault, or the handler was never there.
        let [loads, faults] = [read_file, page_fault].map(|form| form(&place).expect("it works")[0]);
        assert!(loads > 0.0 && faults > 100.0);
    }

    #[test]
    fn a_process_that_echoes_is_gone_with_its_handle() {
        let echo = Echo::new().expect("a process");
        echo.round().expect("an answer");
        let pid = echo.pid;
        drop(echo);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
