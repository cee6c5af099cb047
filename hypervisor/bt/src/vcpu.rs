//! The engine's public face: one vCPU.
#![allow(unsafe_code)] // Owns the raw memory that translated code shares with Rust.

use crate::engine::Engine;
use crate::fault;
use crate::profile::Profile;
use crate::state::{BtState, Frames, GuardPage, NOWHERE_TO_POLL};
use crate::window::LOW_SPAN;
use paravane_cpu::snapshot::{StateError, VcpuSnapshot};
use paravane_cpu::{Bus, CpuState, VcpuExit};
use std::cell::Cell;
use std::fmt;
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

pub use paravane_ram::GuestRam;

/// What the engine is told when a vCPU is made.
#[derive(Clone, Debug)]
pub struct BtConfig {
    /// Bound of the translation cache in bytes. When it is full it is emptied.
    pub cache_bytes: usize,
    /// vCPUs in the machine, for CPUID topology.
    pub cpus: u32,
    /// TSC frequency in kHz, for CPUID.
    pub tsc_khz: u32,
    /// Local APIC timer frequency in Hz, for CPUID.
    pub apic_hz: u32,
    /// When user code reaches memory through host mappings instead of the soft TLB.
    pub windows: Windows,
    /// What the machine's paravirtual interfaces answer in CPUID: leaf, and EAX to EDX.
    pub hypervisor_leaves: Vec<(u32, [u32; 4])>,
}

/// When a process of the guest gets windows: host mappings of its own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// Never.
    Off,
    /// When it has computed for a while.
    Auto,
    /// At once; for tests.
    Always,
}

impl Default for BtConfig {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            cpus: 1,
            tsc_khz: 0,
            apic_hz: 1_000_000_000,
            windows: Windows::Auto,
            hypervisor_leaves: Vec::new(),
        }
    }
}

/// Why the engine cannot work on this host.
#[derive(Debug)]
pub enum BtError {
    /// The host CPU lacks an instruction-set extension that emitted code is made of.
    Unsupported(&'static str),
    /// A host resource could not be had.
    Host(String),
}

impl fmt::Display for BtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(what) => {
                write!(
                    f,
                    "binary translation needs {what}, which this host's CPU does not have; use a host that has it"
                )
            }
            Self::Host(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for BtError {}

/// Size of a huge page.
const HUGE: usize = 2 << 20;

/// The memory of one [`BtState`], kept alive by the vCPU and by every kick handle.
pub(crate) struct StateMemory {
    state: NonNull<BtState>,
    span: usize,
}

// SAFETY: other threads touch only the atomics in it.
unsafe impl Send for StateMemory {}
// SAFETY: see above.
unsafe impl Sync for StateMemory {}

impl StateMemory {
    pub(crate) fn new() -> Result<Arc<Self>, BtError> {
        // The low window lies at a fixed distance from the state. What cannot have the whole span does without windows.
        Self::with_span(LOW_SPAN)
            .or_else(|| Self::with_span(size_of::<BtState>().next_multiple_of(4096)))
            .map(Arc::new)
            .ok_or_else(|| BtError::Host("no memory for the vCPU's state".into()))
    }

    /// Reserves `span` bytes, the first of which become the state.
    fn with_span(span: usize) -> Option<Self> {
        // SAFETY: a fresh reservation; its head is made accessible and is page-aligned, large enough and zero, which is a valid
        // BtState.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // The low window is to lie at a multiple of the size of a huge page: reserve more, and give the rest back.
            let all = libc::mmap(std::ptr::null_mut(), span + HUGE, libc::PROT_NONE, flags, -1, 0);
            if all == libc::MAP_FAILED {
                return None;
            }
            let p = (all as usize).next_multiple_of(HUGE) as *mut libc::c_void;
            let head = p as usize - all as usize;
            if head > 0 {
                libc::munmap(all, head);
            }
            libc::munmap(p.cast::<u8>().add(span).cast(), HUGE - head);
            if libc::mprotect(p, size_of::<BtState>(), libc::PROT_READ | libc::PROT_WRITE) != 0 {
                libc::munmap(p, span);
                return None;
            }
            for side in 0..2 {
                let frames = p.cast::<u8>().add(offset_of!(BtState, frames) + side * size_of::<Frames>());
                let guard = frames.add(offset_of!(Frames, guard));
                if libc::mprotect(guard.cast(), size_of::<GuardPage>(), libc::PROT_NONE) != 0 {
                    libc::munmap(p, span);
                    return None;
                }
            }
            let memory = Self { state: NonNull::new(p.cast())?, span };
            memory.acknowledge();
            Some(memory)
        }
    }

    /// Bytes reserved from the state's address on.
    pub(crate) fn span(&self) -> usize {
        self.span
    }

    pub(crate) fn ptr(&self) -> *mut BtState {
        self.state.as_ptr()
    }

    fn atomics(&self) -> (&AtomicU32, &AtomicU8, &AtomicU64) {
        // SAFETY: references to the atomic fields only, which may be shared between threads.
        unsafe {
            let p = self.ptr();
            (&(*p).request, &(*p).in_tc, &(*p).poll_at)
        }
    }

    /// The address that polls go to while nobody wants anything.
    pub(crate) fn poll_word(&self) -> u64 {
        self.ptr() as u64 + offset_of!(BtState, poll_word) as u64
    }

    /// Asks the vCPU to come out of translated code.
    pub(crate) fn kick(&self) {
        let (request, in_tc, poll_at) = self.atomics();
        request.store(1, SeqCst);
        if EMULATING.get() != self.ptr() && in_tc.load(SeqCst) != 0 {
            poll_at.store(NOWHERE_TO_POLL, SeqCst);
        }
    }

    /// Takes the request back; the vCPU is about to look at what there is to do.
    ///
    /// The request goes last: what a kick in between leaves behind is the pointer, and at worst a poll finds it for nothing.
    pub(crate) fn acknowledge(&self) {
        let (request, _, poll_at) = self.atomics();
        poll_at.store(self.poll_word(), SeqCst);
        request.store(0, SeqCst);
    }

    /// Announces that the vCPU enters translated code; false when there is a request to see to first.
    pub(crate) fn enter(&self) -> bool {
        let (request, in_tc, _) = self.atomics();
        in_tc.store(1, SeqCst);
        if request.load(SeqCst) != 0 {
            in_tc.store(0, SeqCst);
            return false;
        }
        true
    }

    pub(crate) fn leave(&self) {
        self.atomics().1.store(0, SeqCst);
    }

    /// Whether the vCPU is in translated code or in what that called.
    pub(crate) fn inside(&self) -> bool {
        self.atomics().1.load(SeqCst) != 0
    }

    /// Whether somebody wants the vCPU's attention.
    pub(crate) fn requested(&self) -> bool {
        self.atomics().0.load(SeqCst) != 0
    }
}

thread_local! {
    /// The state of the vCPU for which this thread carries out an instruction, or null.
    static EMULATING: Cell<*mut BtState> = const { Cell::new(std::ptr::null_mut()) };
}

/// While this exists, kicks of the vCPU by its own thread only leave the request: whoever makes one looks at it before translated code
/// goes on. A poll that faults would cost microseconds, and an interrupt that a guest sends to itself has no need of it.
pub(crate) struct Emulating;

impl Emulating {
    pub(crate) fn new(state: *mut BtState) -> Self {
        EMULATING.set(state);
        Self
    }
}

impl Drop for Emulating {
    fn drop(&mut self) {
        EMULATING.set(std::ptr::null_mut());
    }
}

impl Drop for StateMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody holds it any more.
        unsafe { libc::munmap(self.ptr().cast(), self.span) };
    }
}

/// Makes a running vCPU come out of translated code within microseconds, from any thread.
#[derive(Clone)]
pub struct BtKick(Arc<StateMemory>);

impl BtKick {
    /// Asks the vCPU to look at its events.
    pub fn kick(&self) {
        self.0.kick();
    }

    /// Whether the vCPU is in translated code or in what that called. If not, it looks at its events before it is again.
    pub fn inside(&self) -> bool {
        self.0.inside()
    }
}

/// One vCPU run by binary translation.
pub struct BtVcpu {
    memory: Arc<StateMemory>,
    engine: Box<Engine>,
}

// SAFETY: a vCPU may move between threads as long as one thread at a time runs it, which `&mut self` sees to.
unsafe impl Send for BtVcpu {}

impl BtVcpu {
    /// A vCPU in its reset state.
    ///
    /// # Errors
    /// When the host CPU lacks BMI2 or XSAVE, or memory cannot be mapped.
    pub fn new(id: u32, mem: GuestRam, bus: Arc<dyn Bus>, cfg: BtConfig) -> Result<Self, BtError> {
        if !std::arch::is_x86_feature_detected!("bmi2") {
            return Err(BtError::Unsupported("the BMI2 instruction-set extension"));
        }
        if !std::arch::is_x86_feature_detected!("xsave") {
            return Err(BtError::Unsupported("XSAVE enabled by the host kernel"));
        }
        fault::install()?;
        let memory = StateMemory::new()?;
        let engine = Box::new(Engine::new(id, memory.clone(), mem, bus, &cfg)?);
        Ok(Self { memory, engine })
    }

    /// The architectural state. Exact between calls of [`Self::run`].
    pub fn state(&self) -> &CpuState {
        // SAFETY: the vCPU is not running, so this thread is the only one to touch the state.
        unsafe { &(*self.memory.ptr()).cpu }
    }

    /// The architectural state for change. Cached translations are dropped, as any of it may change.
    pub fn state_mut(&mut self) -> &mut CpuState {
        self.engine.state_replaced();
        // SAFETY: as in `state`.
        unsafe { &mut (*self.memory.ptr()).cpu }
    }

    /// Everything architectural, the local APIC included if the machine has one. Between calls of [`Self::run`] the vCPU is at an
    /// instruction boundary.
    pub fn save(&self) -> VcpuSnapshot {
        self.engine.save()
    }

    /// Goes on from a state that this or another engine saved. All that was derived from the old one is dropped, translated code
    /// included: memory may have changed, too.
    ///
    /// # Errors
    /// When the state is not valid or cannot be held; the vCPU is as it was, then.
    pub fn load(&mut self, state: &VcpuSnapshot) -> Result<(), StateError> {
        self.engine.load(state)
    }

    /// Runs until the vCPU halts, stops or is told to stop.
    ///
    /// # Errors
    /// When a host resource fails; never because of what the guest does.
    pub fn run(&mut self) -> Result<VcpuExit, BtError> {
        self.engine.run()
    }

    /// A handle that makes [`Self::run`] look at its events.
    pub fn kick_handle(&self) -> BtKick {
        BtKick(self.memory.clone())
    }

    /// Named counters since the vCPU was made.
    pub fn stats(&self) -> Vec<(String, u64)> {
        self.engine.counters()
    }

    /// Samples what the vCPU spends its time on, from now on.
    ///
    /// # Errors
    /// When the host refuses the signal's handler.
    pub fn start_profile(&mut self) -> Result<(), BtError> {
        self.engine.profile.start()
    }

    /// What was sampled since [`Self::start_profile`] or the last call; `None` when nobody asked for samples.
    pub fn take_profile(&mut self) -> Option<Profile> {
        self.engine.take_profile()
    }

    /// Writes names of translated blocks for perf to `/tmp/perf-PID.map`, which is removed with the vCPU unless it is to be
    /// kept. Only before the first [`Self::run`], and for one vCPU of a process.
    ///
    /// # Errors
    /// When the file cannot be made, or the host cannot map the translation cache as perf wants it.
    pub fn write_perf_map(&mut self, keep: bool) -> Result<(), BtError> {
        self.engine.write_perf_map(keep)
    }

    /// Tells the engine that guest RAM was written behind its back: by raw pointer, as nothing in the machine does. Writes
    /// through [`GuestRam`], by whatever thread, are noticed without.
    pub fn invalidate_ram(&mut self, gpa: u64, len: u64) {
        self.engine.ram_written(gpa, len);
    }
}
