//! The page that KVM and we share per vCPU (`struct kvm_run`), and the way to get a vCPU out of the guest.
//!
//! KVM_RUN looks at `immediate_exit` before it enters the guest and leaves the guest when a signal is pending. A kick therefore
//! sets the byte first and then, if the vCPU's thread is inside KVM_RUN, sends that thread a signal whose handler does
//! nothing. The thread announces itself before the system call and the kick looks at the announcement after its store, both
//! sequentially consistent, so one of the two sees the other: no kick is lost, and none costs a signal in vain.
//!
//! The page is mapped here a second time beside the mapping that the kvm-ioctls crate holds, because kicks may come after the vCPU
//! has gone and must find the page still there.
#![allow(unsafe_code)] // Shares memory with the kernel, issues KVM_RUN, sends a signal to one thread.

use std::io;
use std::os::fd::RawFd;
use std::ptr::{NonNull, addr_of, addr_of_mut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use kvm_bindings as kvm;

use crate::devices::control::Kick;

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: libc::c_ulong = 0xae80;

/// Why KVM_RUN came back, with everything but I/O data copied out of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// A signal or a kick.
    Interrupted,
    /// Port I/O; the data is at [`RunPage::io_data`].
    Io(Io),
    /// MMIO; a read's answer goes to [`RunPage::answer_mmio`].
    Mmio { gpa: u64, len: u8, write: bool, data: [u8; 8] },
    /// RDMSR (`write` is false) or WRMSR; answered with [`RunPage::answer_msr`].
    Msr { index: u32, reason: u32, write: bool, data: u64 },
    /// HLT.
    Halt,
    /// An interrupt can be injected now.
    InterruptWindow,
    /// CR8 was lowered.
    TaskPriority,
    /// Triple fault.
    Shutdown,
    /// The guest ended a level-triggered interrupt of this vector.
    EndOfInterrupt(u8),
    /// A stop that KVM relays (KVM_SYSTEM_EVENT_*).
    SystemEvent(u32),
    /// The hardware refused to enter the guest.
    EntryFailed { reason: u64, cpu: u32 },
    /// KVM cannot go on.
    InternalError(InternalError),
    /// A single step or breakpoint asked for with KVM_SET_GUEST_DEBUG.
    Debug,
    /// Any other reason, by its number.
    Other(u32),
}

/// A port access, or a string of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Io {
    pub(super) port: u16,
    /// Bytes per access: 1, 2 or 4.
    pub(super) size: u8,
    /// Accesses in a row.
    pub(super) count: u32,
    pub(super) write: bool,
    offset: u64,
}

/// KVM_EXIT_INTERNAL_ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub(super) kind: u32,
    /// What KVM says beside it; how many words count is in `words`.
    pub(super) data: [u64; 16],
    pub(super) words: u32,
    /// Instruction bytes that could not be emulated; how many count is in `insn_len`, 0 when KVM did not say.
    pub(super) insn: [u8; 15],
    pub(super) insn_len: u8,
}

/// See the module text.
pub(super) struct RunPage {
    ptr: NonNull<kvm::kvm_run>,
    len: usize,
    inside: AtomicBool,
    thread: AtomicI32,
}

// SAFETY: other threads touch only the atomics and the `immediate_exit` byte, through an atomic.
unsafe impl Send for RunPage {}
// SAFETY: see above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of the vCPU behind `fd`; `len` is what KVM_GET_VCPU_MMAP_SIZE says.
    pub(super) fn new(fd: RawFd, len: usize) -> io::Result<Arc<Self>> {
        install_handler()?;
        if len < size_of::<kvm::kvm_run>() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: a fresh shared mapping of a vCPU descriptor, which KVM allows any number of times.
        let p = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(p.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Arc::new(Self { ptr, len, inside: AtomicBool::new(false), thread: AtomicI32::new(0) }))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in our mapping; both we and the kernel access it as a single byte.
        unsafe { AtomicU8::from_ptr(addr_of_mut!((*self.ptr.as_ptr()).immediate_exit)) }
    }

    /// Names the calling thread as the one that runs the vCPU from now on.
    pub(super) fn adopt_thread(&self) {
        // SAFETY: has no arguments and cannot fail.
        let tid = unsafe { libc::syscall(libc::SYS_gettid) };
        self.thread.store(tid as i32, SeqCst);
    }

    /// Takes kicks back; the vCPU is about to look at what there is to do.
    pub(super) fn acknowledge(&self) {
        self.immediate_exit().store(0, SeqCst);
    }

    /// Enters the guest, until the next exit.
    ///
    /// # Errors
    /// When KVM refuses; a signal is no error.
    pub(super) fn enter(&self, fd: RawFd) -> io::Result<Exit> {
        self.inside.store(true, SeqCst);
        // SAFETY: KVM_RUN takes no argument; `fd` is the vCPU's.
        let r = unsafe { libc::ioctl(fd, KVM_RUN, 0) };
        let error = (r < 0).then(io::Error::last_os_error);
        self.inside.store(false, SeqCst);
        match error {
            None => Ok(self.exit()),
            Some(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => Ok(Exit::Interrupted),
            Some(e) => Err(e),
        }
    }

    /// Completes an instruction whose exit was answered, without running another one. Gives the next exit if the instruction needs
    /// one more.
    ///
    /// # Errors
    /// As [`Self::enter`].
    pub(super) fn complete(&self, fd: RawFd) -> io::Result<Exit> {
        self.immediate_exit().store(1, SeqCst);
        self.enter(fd)
    }

    fn exit(&self) -> Exit {
        let p = self.ptr.as_ptr();
        // SAFETY: the page is mapped; after KVM_RUN returned nobody writes to it, and the exit reason says which member of the union
        // the kernel has filled. All members are plain integers, so any bytes are valid.
        unsafe {
            let u = addr_of!((*p).__bindgen_anon_1);
            match (*p).exit_reason {
                kvm::KVM_EXIT_INTR => Exit::Interrupted,
                kvm::KVM_EXIT_IO => {
                    let io = (*u).io;
                    Exit::Io(Io {
                        port: io.port,
                        size: io.size,
                        count: io.count,
                        write: u32::from(io.direction) == kvm::KVM_EXIT_IO_OUT,
                        offset: io.data_offset,
                    })
                }
                kvm::KVM_EXIT_MMIO => {
                    let m = (*u).mmio;
                    Exit::Mmio { gpa: m.phys_addr, len: m.len.min(8) as u8, write: m.is_write != 0, data: m.data }
                }
                r @ (kvm::KVM_EXIT_X86_RDMSR | kvm::KVM_EXIT_X86_WRMSR) => {
                    let m = (*u).msr;
                    let write = r == kvm::KVM_EXIT_X86_WRMSR;
                    Exit::Msr { index: m.index, reason: m.reason, write, data: m.data }
                }
                kvm::KVM_EXIT_HLT => Exit::Halt,
                kvm::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::InterruptWindow,
                kvm::KVM_EXIT_SET_TPR => Exit::TaskPriority,
                kvm::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
                kvm::KVM_EXIT_IOAPIC_EOI => Exit::EndOfInterrupt((*u).eoi.vector),
                kvm::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent((*u).system_event.type_),
                kvm::KVM_EXIT_FAIL_ENTRY => {
                    let f = (*u).fail_entry;
                    Exit::EntryFailed { reason: f.hardware_entry_failure_reason, cpu: f.cpu }
                }
                kvm::KVM_EXIT_INTERNAL_ERROR => Exit::InternalError(Self::internal_error(&*u)),
                kvm::KVM_EXIT_DEBUG => Exit::Debug,
                other => Exit::Other(other),
            }
        }
    }

    /// Reads the member that an internal error fills.
    ///
    /// # Safety
    /// The exit reason is KVM_EXIT_INTERNAL_ERROR.
    unsafe fn internal_error(u: &kvm::kvm_run__bindgen_ty_1) -> InternalError {
        // SAFETY: the caller's promise; integers only.
        let (i, f) = unsafe { (u.internal, u.emulation_failure) };
        let mut e =
            InternalError { kind: i.suberror, data: i.data, words: i.ndata.min(16), insn: [0; 15], insn_len: 0 };
        let flagged = f.flags & u64::from(kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if i.suberror == kvm::KVM_INTERNAL_ERROR_EMULATION && i.ndata >= 1 && flagged {
            // SAFETY: the flag says that the bytes are there.
            let bytes = unsafe { f.__bindgen_anon_1.__bindgen_anon_1 };
            e.insn = bytes.insn_bytes;
            e.insn_len = bytes.insn_size.min(15);
        }
        e
    }

    /// The data of a port access, `count` items of `size` bytes; `None` when KVM's description does not fit its own page.
    ///
    /// The slice must be dropped before the vCPU is entered again, which `&mut self` of the vCPU sees to.
    #[allow(clippy::mut_from_ref)] // The area belongs to the exit at hand; see the SAFETY argument.
    pub(super) fn io_data(&self, io: &Io) -> Option<&mut [u8]> {
        let (len, at) = ((io.count as usize).checked_mul(io.size.into())?, usize::try_from(io.offset).ok()?);
        if io.size == 0 || at < size_of::<kvm::kvm_run>() || at.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: inside our mapping and behind `kvm_run`, checked above. Only the vCPU's own thread comes here, between two KVM_RUNs,
        // and makes one such slice per exit.
        Some(unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast::<u8>().add(at), len) })
    }

    /// Gives the guest the value of its MMIO load.
    pub(super) fn answer_mmio(&self, data: [u8; 8]) {
        // SAFETY: the page is mapped and the vCPU is not inside KVM_RUN.
        unsafe { (*self.ptr.as_ptr()).__bindgen_anon_1.mmio.data = data }
    }

    /// Gives the guest the value of its RDMSR or lets its WRMSR pass; `None` means #GP.
    pub(super) fn answer_msr(&self, value: Option<u64>) {
        // SAFETY: as in `answer_mmio`; both members are integers.
        unsafe {
            let msr = addr_of_mut!((*self.ptr.as_ptr()).__bindgen_anon_1.msr);
            (*msr).error = u8::from(value.is_none());
            (*msr).data = value.unwrap_or(0);
        }
    }

    /// Whether KVM_INTERRUPT may be used now, as of the last exit.
    pub(super) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: reads a byte of the mapped page.
        unsafe { addr_of!((*self.ptr.as_ptr()).ready_for_interrupt_injection).read_volatile() != 0 }
    }

    /// Asks for [`Exit::InterruptWindow`] as soon as an interrupt can be injected.
    pub(super) fn request_window(&self, on: bool) {
        // SAFETY: writes a byte of the mapped page that the kernel only reads, inside KVM_RUN.
        unsafe { addr_of_mut!((*self.ptr.as_ptr()).request_interrupt_window).write_volatile(on.into()) }
    }

    /// Has every exit leave general and system registers in the page (KVM_CAP_SYNC_REGS).
    pub(super) fn sync_registers(&self) {
        let what = kvm::KVM_SYNC_X86_REGS | kvm::KVM_SYNC_X86_SREGS;
        // SAFETY: writes a word of the mapped page that the kernel only reads, inside KVM_RUN.
        unsafe { addr_of_mut!((*self.ptr.as_ptr()).kvm_valid_regs).write_volatile(what.into()) }
    }

    /// Registers as of the last exit, once [`Self::sync_registers`] was in force for it.
    pub(super) fn registers(&self) -> (kvm::kvm_regs, kvm::kvm_sregs) {
        // SAFETY: reads integers of the mapped page; the vCPU is not inside KVM_RUN.
        unsafe {
            let s = addr_of!((*self.ptr.as_ptr()).s.regs);
            ((*s).regs, (*s).sregs)
        }
    }

    /// Has the next KVM_RUN begin with taking these general registers.
    pub(super) fn set_registers(&self, regs: &kvm::kvm_regs) {
        // SAFETY: writes integers of the mapped page; the vCPU is not inside KVM_RUN.
        unsafe {
            let run = self.ptr.as_ptr();
            (*addr_of_mut!((*run).s.regs)).regs = *regs;
            (*run).kvm_dirty_regs |= u64::from(kvm::KVM_SYNC_X86_REGS);
        }
    }

    /// CR8 as of the last exit (local APIC in user space).
    pub(super) fn cr8(&self) -> u8 {
        // SAFETY: reads a word of the mapped page.
        unsafe { addr_of!((*self.ptr.as_ptr()).cr8).read_volatile() as u8 & 15 }
    }

    /// Sets CR8 for the next entry (local APIC in user space).
    pub(super) fn set_cr8(&self, value: u8) {
        // SAFETY: writes a word of the mapped page that the kernel reads inside KVM_RUN.
        unsafe { addr_of_mut!((*self.ptr.as_ptr()).cr8).write_volatile(value.into()) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody holds it any more.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

impl Kick for RunPage {
    fn kick(&self) {
        self.immediate_exit().store(1, SeqCst);
        if self.inside.load(SeqCst) {
            // SAFETY: a signal with a handler that does nothing, to a thread of this process. If the thread has just ended, its number
            // is unknown or another thread's of ours, which does not mind.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread.load(SeqCst), kick_signal()) };
        }
    }
}

/// The signal that gets a thread out of KVM_RUN.
fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 2
}

/// Installs the empty handler, once per process.
fn install_handler() -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        // SAFETY: installs a handler that does nothing. SA_RESTART spares other system calls of the thread; KVM_RUN returns all the same.
        let r = unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = nothing as extern "C" fn(i32) as usize;
            new.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut new.sa_mask);
            libc::sigaction(kick_signal(), &new, std::ptr::null_mut())
        };
        (r != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    });
    failed.map_or(Ok(()), |e| Err(io::Error::from_raw_os_error(e)))
}
