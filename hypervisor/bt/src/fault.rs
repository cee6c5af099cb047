//! Host signals in translated code become guest exceptions.
//!
//! The handlers are installed once per process and pass on whatever is not theirs. A vCPU thread publishes its engine in a
//! thread-local; the handler finds the faulting instruction in the engine's tables, notes the exception in the shared
//! state, and redirects the thread to [`crate::thunks::fault`], which leaves translated code with the guest's registers as
//! they were at that instruction.
#![allow(unsafe_code)] // Signal handling and machine contexts.

use crate::BtError;
use crate::asm::H;
use crate::block::FaultKind;
use crate::engine::Engine;
use std::cell::Cell;
use std::sync::OnceLock;

thread_local! {
    /// The engine whose translated code runs on this thread, or null.
    static CURRENT: Cell<*mut Engine> = const { Cell::new(std::ptr::null_mut()) };
}

/// Value of `fault_vector` for a poll that led nowhere.
pub(crate) const POLL: u32 = 0x100;

const SIGNALS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

struct Previous([libc::sigaction; 4]);
// SAFETY: plain data.
unsafe impl Send for Previous {}
// SAFETY: plain data, written once.
unsafe impl Sync for Previous {}
static PREVIOUS: OnceLock<Previous> = OnceLock::new();

/// Installs the handlers, once per process.
pub(crate) fn install() -> Result<(), BtError> {
    let mut failed = false;
    PREVIOUS.get_or_init(|| {
        // SAFETY: zeroed sigaction structures are valid; the calls get valid pointers.
        unsafe {
            let mut old: [libc::sigaction; 4] = std::mem::zeroed();
            for (n, &sig) in SIGNALS.iter().enumerate() {
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = crate::thunks::signal_entry as *const () as usize;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                failed |= libc::sigaction(sig, &new, &mut old[n]) != 0;
            }
            Previous(old)
        }
    });
    if failed {
        return Err(BtError::Host("the signal handlers of the translator cannot be installed".into()));
    }
    Ok(())
}

/// An alternate signal stack for a vCPU thread; kept while the value lives.
pub(crate) struct AltStack {
    mem: *mut libc::c_void,
    old: libc::stack_t,
}

const ALT_BYTES: usize = 64 << 10;

impl AltStack {
    pub(crate) fn new() -> Result<Self, BtError> {
        // SAFETY: a fresh anonymous mapping, then a valid stack_t.
        unsafe {
            let mem = libc::mmap(
                std::ptr::null_mut(),
                ALT_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if mem == libc::MAP_FAILED {
                return Err(BtError::Host("no memory for a signal stack".into()));
            }
            let new = libc::stack_t { ss_sp: mem, ss_flags: 0, ss_size: ALT_BYTES };
            let mut old = std::mem::zeroed();
            if libc::sigaltstack(&new, &mut old) != 0 {
                libc::munmap(mem, ALT_BYTES);
                return Err(BtError::Host("the signal stack cannot be set".into()));
            }
            Ok(Self { mem, old })
        }
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        // SAFETY: restores what was there before and frees our own mapping.
        unsafe {
            libc::sigaltstack(&self.old, std::ptr::null_mut());
            libc::munmap(self.mem, ALT_BYTES);
        }
    }
}

/// Marks `engine` as the one whose code this thread runs, until the guard is dropped.
pub(crate) struct Running;

impl Running {
    pub(crate) fn new(engine: *mut Engine) -> Self {
        CURRENT.set(engine);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(std::ptr::null_mut());
    }
}

/// Keeps all signals but the translator's own from the thread until dropped: translated code may have FS elsewhere, and nobody else's
/// handler expects that.
pub(crate) struct Blocked(libc::sigset_t);

impl Blocked {
    pub(crate) fn new() -> Self {
        // SAFETY: sets on the stack, initialised before they are read.
        unsafe {
            let (mut block, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&mut block);
            // The profiler's handler comes in by the same door as the translator's.
            for sig in SIGNALS.into_iter().chain([libc::SIGPROF]) {
                libc::sigdelset(&mut block, sig);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &block, &mut before);
            Self(before)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the mask that was in effect before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

pub(crate) unsafe extern "C" fn handler(sig: i32, info: *mut libc::siginfo_t, ctx: *mut libc::c_void) {
    if sig == libc::SIGPROF {
        // SAFETY: the context is the kernel's.
        return unsafe { crate::profile::sample(ctx) };
    }
    let engine = CURRENT.get();
    if !engine.is_null() {
        // SAFETY: the engine outlives `Running`; the context is the kernel's. The thread was in translated code if the check
        // inside succeeds, so no Rust code holds a reference to the engine.
        let ours = unsafe { redirect(&mut *engine, &mut *ctx.cast::<libc::ucontext_t>()) };
        if ours {
            return;
        }
    }
    // SAFETY: passing on to whoever was there before, or to the default action.
    unsafe { pass_on(sig, info, ctx) };
}

/// Turns a fault in translated code into an exit; false when it is not in translated code or not at a known place.
unsafe fn redirect(e: &mut Engine, ctx: &mut libc::ucontext_t) -> bool {
    e.profile.begin(crate::profile::Cause::Signal);
    let regs = &mut ctx.uc_mcontext.gregs;
    let rip = regs[libc::REG_RIP as usize] as u64;
    let trap = regs[libc::REG_TRAPNO as usize] as u32;
    if trap == 14
        && e.code.offset_of(rip).is_some()
        && let Some(side) = e.in_frame_guard(regs[libc::REG_CR2 as usize] as u64)
    {
        // Too many calls without a return. Forgetting them costs predictions, nothing else.
        e.forget_calls_in(side, side);
        // SAFETY: the shared state outlives the engine.
        regs[libc::REG_RSP as usize] = unsafe { (*e.state).code_rsp } as i64;
        return true;
    }
    let Some((kind, base_rip)) = e.fault_at(rip) else { return false };
    // SAFETY: the shared state outlives the engine.
    let st = unsafe { &mut *e.state };
    match kind {
        FaultKind::Guest { delta, borrowed } => {
            // A page fault of the host at a guest operand means that our own mapping failed, not the guest.
            if trap == 14 {
                return false;
            }
            st.cpu.rip = base_rip.wrapping_add(u64::from(delta));
            st.fault_vector = trap;
            if let Some(h) = borrowed {
                regs[greg(H(h))] = st.tmp[1] as i64;
            }
        }
        FaultKind::Window { site, borrowed } => {
            if let Some(h) = borrowed {
                regs[greg(H(h))] = st.tmp[1] as i64;
            }
            let s = &e.tables.sites[site as usize];
            let b = &e.tables.blocks[s.block as usize];
            if matches!(trap, 13 | 14) {
                // The page is not in the window yet, or never can be: the access's own slow path knows what to do.
                regs[libc::REG_RIP as usize] = slow_path(e, site);
                return true;
            }
            st.cpu.rip = b.key.rip.wrapping_add(u64::from(s.delta));
            st.fault_vector = trap;
        }
        FaultKind::String { site } => {
            let s = &e.tables.sites[site as usize];
            let (di, si) = (st.tmp[2].wrapping_neg(), st.tmp[3].wrapping_neg());
            regs[libc::REG_RDI as usize] = regs[libc::REG_RDI as usize].wrapping_add(di as i64);
            if s.read {
                regs[libc::REG_RSI as usize] = regs[libc::REG_RSI as usize].wrapping_add(si as i64);
            }
            let left = regs[greg(H::GUEST_RCX)].wrapping_add(regs[libc::REG_RCX as usize]);
            regs[greg(H::GUEST_RCX)] = left;
            e.string_fault = true;
            regs[libc::REG_RIP as usize] = slow_path(e, site);
            return true;
        }
        FaultKind::Round { site } => {
            regs[libc::REG_RIP as usize] = slow_path(e, site);
            return true;
        }
        FaultKind::Poll { rip } => {
            st.cpu.rip = rip;
            st.fault_vector = POLL;
        }
        FaultKind::PollIndirect => {
            if !paravane_cpu::mmu::is_canonical(regs[libc::REG_RCX as usize] as u64) {
                // A branch that faults itself, where it stands on Intel's CPUs: it is let go, to leave word of itself. Rust sees to it, and
                // to the request behind it.
                regs[libc::REG_R11 as usize] = e.memory.poll_word() as i64;
                return true;
            }
            st.cpu.rip = regs[libc::REG_RCX as usize] as u64;
            st.fault_vector = POLL;
        }
    }
    regs[libc::REG_RIP as usize] = crate::thunks::fault as *const () as i64;
    true
}

/// Where the slow path of a site begins.
fn slow_path(e: &Engine, site: u32) -> i64 {
    let s = &e.tables.sites[site as usize];
    e.code.address(e.tables.blocks[s.block as usize].placed.offset(s.slow)) as i64
}

/// Index of a host register in a machine context.
fn greg(h: H) -> usize {
    const MAP: [i32; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    MAP[usize::from(h.0 & 15)] as usize
}

unsafe fn pass_on(sig: i32, info: *mut libc::siginfo_t, ctx: *mut libc::c_void) {
    let old = PREVIOUS.get().and_then(|p| SIGNALS.iter().position(|&s| s == sig).map(|n| p.0[n]));
    // SAFETY: calling the previous handler with the arguments the kernel gave, or restoring the default action, after
    // which the instruction faults again and ends the process.
    unsafe {
        match old {
            Some(a) if a.sa_sigaction != libc::SIG_DFL && a.sa_sigaction != libc::SIG_IGN => {
                if a.sa_flags & libc::SA_SIGINFO != 0 {
                    let f: unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(a.sa_sigaction);
                    f(sig, info, ctx);
                } else {
                    let f: unsafe extern "C" fn(i32) = std::mem::transmute(a.sa_sigaction);
                    f(sig);
                }
            }
            _ => {
                let mut dfl: libc::sigaction = std::mem::zeroed();
                dfl.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(sig, &dfl, std::ptr::null_mut());
            }
        }
    }
}
