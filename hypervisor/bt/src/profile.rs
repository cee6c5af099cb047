//! Where a vCPU's time goes: a sampling profiler for guest code and for the engine.
//!
//! A timer sends SIGPROF to the vCPU's thread about a thousand times a second. The handler, which may interrupt anything, only
//! appends a [`Sample`] to a ring that was allocated before: host RIP, guest RIP, root of the page tables, and what Rust code was
//! doing. Rust code says that in the [`Meter`], with a few stores at the entry of each callout; that is all there is to pay
//! while nobody profiles.
//!
//! A timer on the thread's CPU time would be the obvious clock, but most hosts look at those only at their tick of 100 to 250 Hz.
//! So the timer is one on real time, and a sample stands for the CPU time since the one before: a thread that slept or had
//! to wait for a CPU has little of it to give.
//!
//! Samples are attributed later, on the same thread, between runs of translated code and always before the translation
//! cache is emptied, for until then a host address in the cache belongs to one block:
//!
//! | host RIP in | cause | guest RIP |
//! |---|---|---|
//! | the translation cache | translated code, by privilege and part | the block's |
//! | a thunk of [`crate::thunks`] | what the thunk is for | what the meter says |
//! | anything else | what the meter says | what the meter says |
//!
//! Host kernel time counts where it was caused: a host page fault in translated code is time of translated code.
#![allow(unsafe_code)] // Signals, timers, and reading the state from a signal handler.

use crate::BtError;
use crate::block::{Block, Mode};
use crate::engine::Engine;
use crate::state::BtState;
use crate::thunks;
use crate::window::ADDRESS;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};
use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};

/// Time between samples, in ns. Not a divisor of what guests use as their tick.
const PERIOD: i64 = 997_000;
/// Samples the ring holds. A vCPU looks at it several times a second at worst, whenever the guest's timer ticks.
const RING: usize = 1 << 15;
/// No emitted thunk is longer, in bytes.
const LONGEST_THUNK: u64 = 2048;

/// What the time of a sample was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// Guest code as translated.
    Code {
        /// CPL 3.
        user: bool,
        /// In the part of the block that is rarely run: slow paths and exits.
        cold: bool,
        /// Memory is reached through host mappings, windows or the kernel's, not through the soft TLB.
        mapped: bool,
    },
    /// Jumps between blocks that belong to no block.
    Links,
    /// Getting into translated code, out of it, and finding the block to run.
    Dispatch,
    /// An access that missed the soft TLB or a window.
    TlbMiss,
    /// An access through the bounce buffer: MMIO, page-crossing, pages with translated code, segmentation.
    Bounce,
    /// Mapping, unmapping and checking pages of a window.
    Window,
    /// An indirect jump that missed the jump cache.
    IndirectMiss,
    /// A direct exit that was not linked.
    Chain,
    /// An instruction carried out by Rust; the number is its [`Mnemonic`]'s.
    Emulate(u16),
    /// Decoding and emitting.
    Translate,
    /// Delivery of an exception to the guest.
    Exception,
    /// Looking for interrupts and delivering them.
    Interrupt,
    /// Loading the guest's x87/SIMD registers.
    LoadSimd,
    /// Host signals in translated code.
    Signal,
}

impl Cause {
    /// As one word, for the meter.
    const fn word(self) -> u32 {
        let (kind, more) = match self {
            Self::Code { user, cold, mapped } => (0, user as u32 | (cold as u32) << 1 | (mapped as u32) << 2),
            Self::Links => (1, 0),
            Self::Dispatch => (2, 0),
            Self::TlbMiss => (3, 0),
            Self::Bounce => (4, 0),
            Self::Window => (5, 0),
            Self::IndirectMiss => (6, 0),
            Self::Chain => (7, 0),
            Self::Emulate(mnemonic) => (8, mnemonic as u32),
            Self::Translate => (9, 0),
            Self::Exception => (10, 0),
            Self::Interrupt => (11, 0),
            Self::LoadSimd => (12, 0),
            Self::Signal => (13, 0),
        };
        kind | more << 8
    }

    /// Undoes [`Self::word`].
    const fn from_word(word: u32) -> Self {
        let more = word >> 8;
        match word & 0xff {
            0 => Self::Code { user: more & 1 != 0, cold: more & 2 != 0, mapped: more & 4 != 0 },
            1 => Self::Links,
            3 => Self::TlbMiss,
            4 => Self::Bounce,
            5 => Self::Window,
            6 => Self::IndirectMiss,
            7 => Self::Chain,
            8 => Self::Emulate(more as u16),
            9 => Self::Translate,
            10 => Self::Exception,
            11 => Self::Interrupt,
            12 => Self::LoadSimd,
            13 => Self::Signal,
            _ => Self::Dispatch,
        }
    }

    /// Whether translated code itself ran, and not the engine on its behalf.
    pub fn is_code(self) -> bool {
        matches!(self, Self::Code { .. } | Self::Links)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Code { user, cold, mapped } => {
                let who = if *user { "user" } else { "kernel" };
                let how = if *mapped { ", mapped" } else { "" };
                let part = if *cold { ", slow paths" } else { "" };
                return write!(f, "translated code, {who}{how}{part}");
            }
            Self::Links => "translated code, between blocks",
            Self::Dispatch => "dispatch and other",
            Self::TlbMiss => "TLB miss",
            Self::Bounce => "bounced access",
            Self::Window => "window mapping",
            Self::IndirectMiss => "indirect jump miss",
            Self::Chain => "chaining",
            Self::Emulate(n) => {
                let name = Mnemonic::values().nth(usize::from(*n)).map(|m| format!("{m:?}").to_lowercase());
                return write!(f, "emulated {}", name.as_deref().unwrap_or("?"));
            }
            Self::Translate => "translation",
            Self::Exception => "exception delivery",
            Self::Interrupt => "interrupts",
            Self::LoadSimd => "SIMD state load",
            Self::Signal => "host signals",
        })
    }
}

/// Samples of one cause at one place in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileEntry {
    /// What the time was spent on.
    pub cause: Cause,
    /// Guest RIP: the beginning of the block, or the instruction that the engine worked for. `None` between blocks.
    pub rip: Option<u64>,
    /// Guest-physical address of the page tables in use, which tells processes apart, for CPL 3; else `None`.
    pub process: Option<u64>,
    /// How many samples.
    pub samples: u64,
    /// The CPU time they stand for, in ns.
    pub ns: u64,
}

/// What a vCPU spent its time on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The samples, in no particular order.
    pub entries: Vec<ProfileEntry>,
    /// Samples that found no room.
    pub lost: u64,
    /// The last IA32_LSTAR that was not zero: where a 64-bit kernel's SYSCALL entry is.
    pub lstar: u64,
}

/// What Rust code is doing and for which guest instruction. Written by the vCPU's thread, read by the signal handler on it.
pub(crate) struct Meter {
    cause: AtomicU32,
    /// CPL was 3 when that began.
    user: AtomicBool,
    rip: AtomicU64,
}

/// What the signal handler writes down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sample {
    host_rip: u64,
    /// As the meter has it.
    rip: u64,
    /// CR3's address bits, with bit 0 set in what Rust code does for CPL 3.
    root: u64,
    cause: u32,
    /// CPU time in ns since the last sample that found room.
    ns: u64,
}

/// A [`Sample`] that a signal handler may write while it is not being read.
#[derive(Default)]
struct Slot([AtomicU64; 5]);

impl Slot {
    fn put(&self, s: Sample) {
        for (to, value) in self.0.iter().zip([s.host_rip, s.rip, s.root, u64::from(s.cause), s.ns]) {
            to.store(value, Relaxed);
        }
    }

    fn get(&self) -> Sample {
        let [host_rip, rip, root, cause, ns] = [0, 1, 2, 3, 4].map(|n| self.0[n].load(Relaxed));
        Sample { host_rip, rip, root, cause: cause as u32, ns }
    }
}

/// Samples on their way from the signal handler to the thread it interrupts.
#[derive(Default)]
struct Ring {
    slots: Box<[Slot]>,
    written: AtomicUsize,
    read: AtomicUsize,
    lost: AtomicU64,
}

impl Ring {
    fn new(len: usize) -> Self {
        Self { slots: (0..len).map(|_| Slot::default()).collect(), ..Self::default() }
    }

    fn len(&self) -> usize {
        self.written.load(Acquire).wrapping_sub(self.read.load(Relaxed))
    }

    /// False when there is no room.
    fn push(&self, s: Sample) -> bool {
        if self.len() >= self.slots.len() {
            self.lost.fetch_add(1, Relaxed);
            return false;
        }
        let at = self.written.load(Relaxed);
        self.slots[at % self.slots.len()].put(s);
        self.written.store(at.wrapping_add(1), Release);
        true
    }

    fn pop(&self) -> Option<Sample> {
        if self.len() == 0 {
            return None;
        }
        let at = self.read.load(Relaxed);
        let s = self.slots[at % self.slots.len()].get();
        self.read.store(at.wrapping_add(1), Release);
        Some(s)
    }
}

/// What the signal handler refers to.
struct Shared {
    meter: Meter,
    ring: Ring,
    state: *const BtState,
    /// CPU time of the thread at the last sample.
    sampled: AtomicU64,
}

thread_local! {
    /// What the profiled vCPU that runs on this thread shares with the signal handler, or null.
    static CURRENT: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// SIGPROF: note where the thread is.
///
/// # Safety
/// `ctx` is what the kernel gave a signal handler on this thread.
pub(crate) unsafe fn sample(ctx: *mut libc::c_void) {
    let shared = CURRENT.get();
    if shared.is_null() {
        return;
    }
    // SAFETY: the pointer is set only while what it points to lives; all that is written through it is atomic.
    let s = unsafe { &*shared };
    // SAFETY: the kernel's context, and a plain word of a state that outlives `shared` and is written by the thread that this
    // handler interrupts, if at all.
    let (host_rip, cr3) = unsafe {
        let regs = &(*ctx.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        (regs[libc::REG_RIP as usize] as u64, (&raw const (*s.state).cpu.cr3).read_volatile())
    };
    let now = cpu_ns();
    let taken = s.ring.push(Sample {
        host_rip,
        rip: s.meter.rip.load(Relaxed),
        root: cr3 & ADDRESS | u64::from(s.meter.user.load(Relaxed)),
        cause: s.meter.cause.load(Relaxed),
        ns: now.saturating_sub(s.sampled.load(Relaxed)),
    });
    if taken {
        s.sampled.store(now, Relaxed);
    }
}

/// A thunk's place in host memory and what its time counts as; `None` for what the meter says.
struct ThunkRange {
    range: Range<u64>,
    cause: Option<Cause>,
}

/// All thunks that run between translated code and Rust, by address.
fn thunk_ranges() -> Vec<ThunkRange> {
    type Door = unsafe extern "sysv64" fn();
    let doors: [(Door, Option<Cause>); 18] = [
        (thunks::exit, Some(Cause::Dispatch)),
        (thunks::fault, Some(Cause::Signal)),
        (thunks::mem, Some(Cause::TlbMiss)),
        (thunks::seg_mem, Some(Cause::Bounce)),
        (thunks::commit, Some(Cause::Bounce)),
        // Which instruction is known to the callout only, and to the meter after it.
        (thunks::emulate, None),
        (thunks::lookup, Some(Cause::IndirectMiss)),
        (thunks::lookup_second::<0>, Some(Cause::IndirectMiss)),
        (thunks::lookup_second::<1>, Some(Cause::IndirectMiss)),
        (thunks::lookup_second::<2>, Some(Cause::IndirectMiss)),
        (thunks::returned::<0>, Some(Cause::IndirectMiss)),
        (thunks::returned::<1>, Some(Cause::IndirectMiss)),
        (thunks::returned::<2>, Some(Cause::IndirectMiss)),
        (thunks::underflow::<0>, Some(Cause::IndirectMiss)),
        (thunks::underflow::<1>, Some(Cause::IndirectMiss)),
        (thunks::underflow::<2>, Some(Cause::IndirectMiss)),
        (thunks::chain, Some(Cause::Chain)),
        (thunks::load_fpu, Some(Cause::LoadSimd)),
    ];
    let enter = thunks::enter as unsafe extern "sysv64" fn(u64) -> u64;
    let mut all: Vec<_> = doors.iter().map(|&(f, cause)| (f as *const () as u64, cause)).collect();
    all.push((enter as *const () as u64, Some(Cause::Dispatch)));
    all.push((thunks::signal_entry as *const () as u64, Some(Cause::Signal)));
    all.sort_unstable();
    let ends = all.iter().skip(1).map(|t| t.0).chain([u64::MAX]);
    let ranges = all.iter().zip(ends).map(|(&(start, cause), next)| {
        // SAFETY: the beginning of a function of this program.
        let len = unsafe { function_len(start, LONGEST_THUNK.min(next - start)) };
        ThunkRange { range: start..start + len, cause }
    });
    ranges.collect()
}

/// Length in bytes of a function without calls that do not return, found by reading it: it ends behind the first instruction that
/// goes nowhere else and that no branch before it leads beyond.
///
/// # Safety
/// There is a function at `start`, in readable memory.
unsafe fn function_len(start: u64, limit: u64) -> u64 {
    let (mut at, mut reaches) = (start, start);
    while at < start + limit {
        // SAFETY: within the function, or at most an instruction's length behind it, where the text segment goes on.
        let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, 15) };
        let i = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode();
        at = i.next_ip();
        match i.flow_control() {
            FlowControl::ConditionalBranch => reaches = reaches.max(i.near_branch_target()),
            FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch if at > reaches => {
                break;
            }
            FlowControl::Exception if at > reaches => break,
            _ => {}
        }
    }
    at.min(start + limit) - start
}

/// What samples are added up by: cause, guest RIP, process; see [`ProfileEntry`].
type Spot = (Cause, Option<u64>, Option<u64>);

/// Samples, and the CPU time in ns that they stand for.
type Count = (u64, u64);

/// The part of a profiler that exists only while somebody profiles.
struct Sampling {
    thunks: Vec<ThunkRange>,
    counts: HashMap<Spot, Count>,
    /// The timer, and the thread it belongs to.
    timer: Option<(libc::timer_t, libc::pid_t)>,
    lstar: u64,
}

impl Drop for Sampling {
    fn drop(&mut self) {
        if let Some((timer, _)) = self.timer.take() {
            // SAFETY: our own timer.
            unsafe { libc::timer_delete(timer) };
        }
    }
}

/// One vCPU's profiler.
pub(crate) struct Profiler {
    shared: Rc<Shared>,
    sampling: Option<Sampling>,
}

impl Profiler {
    /// A profiler that is off.
    pub(crate) fn new(state: *const BtState) -> Self {
        Self { shared: Rc::new(Self::shared(state, Ring::default())), sampling: None }
    }

    fn shared(state: *const BtState, ring: Ring) -> Shared {
        let cause = AtomicU32::new(Cause::Dispatch.word());
        let meter = Meter { cause, user: AtomicBool::new(false), rip: AtomicU64::new(0) };
        Shared { meter, ring, state, sampled: AtomicU64::new(0) }
    }

    /// Takes samples from the next run on.
    pub(crate) fn start(&mut self) -> Result<(), BtError> {
        install()?;
        self.shared = Rc::new(Self::shared(self.shared.state, Ring::new(RING)));
        let thunks = thunk_ranges();
        self.sampling = Some(Sampling { thunks, counts: HashMap::new(), timer: None, lstar: 0 });
        Ok(())
    }

    /// Rust code now does this, for the same guest instruction as before; gives what it did before, for [`Self::back`].
    #[inline]
    pub(crate) fn begin(&self, cause: Cause) -> Cause {
        let before = self.shared.meter.cause.load(Relaxed);
        self.shared.meter.cause.store(cause.word(), Relaxed);
        Cause::from_word(before)
    }

    /// Rust code again does what it did before.
    #[inline]
    pub(crate) fn back(&self, before: Cause) {
        self.shared.meter.cause.store(before.word(), Relaxed);
    }

    /// Whether samples should be attributed soon.
    #[inline]
    pub(crate) fn filling(&self) -> bool {
        self.shared.ring.len() > RING / 2
    }
}

/// Installs the signal's handler.
fn install() -> Result<(), BtError> {
    // SAFETY: a zeroed sigaction is valid; the entry takes what the kernel passes.
    let failed = unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = thunks::signal_entry as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGPROF, &new, std::ptr::null_mut()) != 0
    };
    if failed {
        return Err(BtError::Host("the profiler's signal handler cannot be installed".into()));
    }
    Ok(())
}

/// A timer that sends SIGPROF to a thread for as long as it exists.
fn thread_timer(thread: libc::pid_t) -> Result<libc::timer_t, BtError> {
    let fail = || BtError::Host(format!("the host refuses a profiling timer: {}", std::io::Error::last_os_error()));
    // SAFETY: plain data, filled in before use; results are checked.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGPROF;
        event.sigev_notify_thread_id = thread;
        let mut timer = std::mem::zeroed();
        if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
            return Err(fail());
        }
        let every = libc::timespec { tv_sec: 0, tv_nsec: PERIOD };
        let when = libc::itimerspec { it_interval: every, it_value: every };
        if libc::timer_settime(timer, 0, &when, std::ptr::null_mut()) != 0 {
            let e = fail();
            libc::timer_delete(timer);
            return Err(e);
        }
        Ok(timer)
    }
}

/// CPU time of the calling thread in ns. A signal handler may call it.
fn cpu_ns() -> u64 {
    // SAFETY: fills a timespec of ours.
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

/// While it lives, the calling thread runs the vCPU, and is sampled if somebody profiles.
pub(crate) struct Running;

impl Running {
    /// Nothing may replace the profiler's parts meanwhile.
    pub(crate) fn new(profiler: &mut Profiler) -> Result<Option<Self>, BtError> {
        let Some(sampling) = &mut profiler.sampling else { return Ok(None) };
        // SAFETY: takes nothing, gives a number.
        let thread = unsafe { libc::gettid() };
        if sampling.timer.is_none_or(|t| t.1 != thread) {
            let timer = thread_timer(thread)?;
            if let Some((old, _)) = sampling.timer.replace((timer, thread)) {
                // SAFETY: our own timer.
                unsafe { libc::timer_delete(old) };
            }
            profiler.shared.sampled.store(cpu_ns(), Relaxed);
        }
        CURRENT.set(Rc::as_ptr(&profiler.shared));
        // SAFETY: a set of one signal, of which our handler is in place.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGPROF);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
        }
        Ok(Some(Self))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(std::ptr::null());
    }
}

/// The block that holds a cache offset, in one of the cache's parts, if any does.
fn block_at(blocks: &[Block], at: u32, cold: bool) -> Option<&Block> {
    let n = blocks.partition_point(|b| if cold { b.placed.cold <= at } else { b.placed.hot <= at }).checked_sub(1)?;
    // Between the hot parts of blocks are stubs that belong to none.
    (cold || at < blocks[n].placed.hot_end()).then_some(&blocks[n])
}

impl Engine {
    /// Rust code now does this, for the guest instruction at `rip`, at the current CPL.
    #[inline]
    pub(crate) fn doing(&self, cause: Cause, rip: u64) {
        let meter = &self.profile.shared.meter;
        meter.cause.store(cause.word(), Relaxed);
        meter.user.store(self.cpu().cpl == 3, Relaxed);
        meter.rip.store(rip, Relaxed);
    }

    /// Attributes all samples so far; host addresses of translated code mean the blocks that are in the cache now.
    pub(crate) fn attribute_samples(&mut self) {
        let lstar = self.cpu().lstar;
        let Some(s) = &mut self.profile.sampling else { return };
        if lstar != 0 {
            s.lstar = lstar;
        }
        while let Some(sample) = self.profile.shared.ring.pop() {
            let root = sample.root & ADDRESS;
            let user = sample.root & 1 != 0;
            let key = if let Some(at) = self.code.offset_of(sample.host_rip) {
                let cold = self.code.is_cold(at);
                match block_at(&self.tables.blocks, at, cold) {
                    Some(b) => {
                        let user = b.key.mode.has(Mode::USER);
                        let mapped = b.key.mode.has(Mode::WINDOW) || b.key.mode.has(Mode::MAPPED);
                        (Cause::Code { user, cold, mapped }, Some(b.key.rip), user.then_some(root))
                    }
                    None => (Cause::Links, None, None),
                }
            } else {
                let thunk = s.thunks.iter().find(|t| t.range.contains(&sample.host_rip));
                let cause = thunk.and_then(|t| t.cause).unwrap_or(Cause::from_word(sample.cause));
                (cause, Some(sample.rip), user.then_some(root))
            };
            let count = s.counts.entry(key).or_default();
            count.0 += 1;
            count.1 += sample.ns;
        }
    }

    /// What was sampled since profiling began; `None` when it did not.
    pub(crate) fn take_profile(&mut self) -> Option<Profile> {
        self.attribute_samples();
        let s = self.profile.sampling.as_mut()?;
        let entries = s.counts.drain();
        let entries =
            entries.map(|((cause, rip, process), (samples, ns))| ProfileEntry { cause, rip, process, samples, ns });
        Some(Profile {
            entries: entries.collect(),
            lost: self.profile.shared.ring.lost.swap(0, Relaxed),
            lstar: s.lstar,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Key, NO_EXIT};
    use crate::cache::Placed;

    #[test]
    fn causes_survive_the_meter() {
        let mut all = vec![Cause::Emulate(0), Cause::Emulate(u16::MAX)];
        for n in 0..8 {
            all.push(Cause::Code { user: n & 1 != 0, cold: n & 2 != 0, mapped: n & 4 != 0 });
        }
        all.extend([Cause::Links, Cause::Dispatch, Cause::TlbMiss, Cause::Bounce, Cause::Window, Cause::IndirectMiss]);
        all.extend([
            Cause::Chain,
            Cause::Translate,
            Cause::Exception,
            Cause::Interrupt,
            Cause::LoadSimd,
            Cause::Signal,
        ]);
        for c in all {
            assert_eq!(Cause::from_word(c.word()), c);
        }
        assert_eq!(Cause::Emulate(Mnemonic::Cpuid as u16).to_string(), "emulated cpuid");
    }

    #[test]
    fn the_ring_keeps_order_and_counts_what_it_loses() {
        let ring = Ring::new(4);
        let sample = |n| Sample { host_rip: n, rip: n + 1, root: n + 2, cause: n as u32 + 3, ns: n + 4 };
        for round in 0..3 {
            for n in 0..5 {
                assert_eq!(ring.push(sample(round * 10 + n)), n < 4);
            }
            assert_eq!(ring.lost.load(Relaxed), round + 1);
            let got: Vec<_> = std::iter::from_fn(|| ring.pop()).collect();
            assert_eq!(got, (0..4).map(|n| sample(round * 10 + n)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn host_addresses_lead_to_blocks_and_gaps_to_none() {
        let block = |rip, hot, hot_len, cold| Block {
            key: Key { gpa: 0, rip, mode: Mode(0) },
            guest_len: 1,
            seen: 0..0,
            second_page: None,
            placed: Placed::new(hot, hot_len, cold),
            entry: hot,
            door: crate::block::NO_DOOR,
            incoming: NO_EXIT,
            exits: 0..0,
            faults: 0..0,
            live: true,
        };
        // The second block has no cold part.
        let blocks = [block(1, 16, 20, 1000), block(2, 48, 10, 1050), block(3, 64, 40, 1050)];
        let rip = |at, cold| block_at(&blocks, at, cold).map(|b| b.key.rip);
        assert_eq!(
            [15, 16, 35, 36, 48, 57, 58, 64, 103, 104].map(|at| rip(at, false)),
            [None, Some(1), Some(1), None, Some(2), Some(2), None, Some(3), Some(3), None]
        );
        assert_eq!([999, 1000, 1049, 1050, 2000].map(|at| rip(at, true)), [None, Some(1), Some(1), Some(3), Some(3)]);
    }

    #[test]
    fn thunks_are_measured_whole() {
        let ranges = thunk_ranges();
        assert_eq!(ranges.len(), 20);
        for (n, t) in ranges.iter().enumerate() {
            let len = t.range.end - t.range.start;
            assert!((8..LONGEST_THUNK).contains(&len), "{n}: {len}");
            assert!(ranges[n + 1..].iter().all(|next| t.range.end <= next.range.start));
        }
        // All that save the guest's registers and give them back are about as long as one another.
        let len = |f: unsafe extern "sysv64" fn()| {
            let t = ranges.iter().find(|t| t.range.start == f as *const () as u64).unwrap();
            t.range.end - t.range.start
        };
        let (mem, chain) = (len(thunks::mem), len(thunks::chain));
        assert!(mem > 300 && mem.abs_diff(chain) < 16 && len(thunks::load_fpu) < 100, "{mem} {chain}");
    }
}
