//! How fast this host's KVM runs guest code: a guest of a few bytes, timed.
//!
//! "Is /dev/kvm there" is the wrong question. Some KVMs have no hardware behind them and emulate what a kernel does,
//! instruction by instruction, a thousand times slower than the CPU; some run only user code natively. So the question is put to the guest: a loop in
//! ring 0 of 64-bit mode, the same loop in ring 3, and an OUT that leaves to user space each time.
//!
//! A loop of N rounds is timed against one of a single round, so that the cost of entering and leaving drops out. N grows while the
//! time is too short to be told from noise. What takes part of the time by accident (another process, an interrupt) only makes things
//! slower: the least of a few tries counts.
//!
//! The guest runs on a thread of its own. If KVM does not come back, a signal gets the thread out, and the answer is an error.
#![allow(unsafe_code)] // Gives memory to KVM, and sends a signal to a thread of its own.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What the probe guest measured, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speeds {
    /// One simple instruction in ring 0 of 64-bit mode.
    pub ring0_ns: f64,
    /// One in ring 3; `None` when this KVM cannot run the probe there.
    pub ring3_ns: Option<f64>,
    /// One exit to user space and back (OUT).
    pub exit_ns: f64,
    /// One simple instruction of the same loop outside any guest.
    pub host_ns: f64,
}

/// A ring that runs this many times slower than the host is not run by the CPU itself.
const NATIVE: f64 = 8.0;

impl Speeds {
    /// Whether ring 0 runs at about the CPU's own speed.
    pub fn native_ring0(&self) -> bool {
        self.ring0_ns <= self.host_ns.max(0.1) * NATIVE
    }

    /// Whether ring 3 does.
    pub fn native_ring3(&self) -> bool {
        self.ring3_ns.is_some_and(|ns| ns <= self.host_ns.max(0.1) * NATIVE)
    }

    /// Whether these can be measurements at all; a cache may hold anything.
    pub fn plausible(&self) -> bool {
        let ok = |ns: f64| ns.is_finite() && (0.0..1e9).contains(&ns);
        ok(self.ring0_ns) && ok(self.exit_ns) && ok(self.host_ns) && self.ring3_ns.is_none_or(ok)
    }
}

/// How long KVM may take before it is given up. A probe takes some milliseconds; this is for one that hangs, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(2);

/// Guest-physical addresses: page tables, code, and the end of memory.
const PML4: u64 = 0x1000;
const CODE: u64 = 0x4000;
const SIZE: usize = 0x1_0000;

/// `1: dec rcx; jnz 1b; 2: out dx, al; jmp 2b`.
const LOOP: [u8; 8] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xee, 0xeb, 0xfd];

/// Measures with an open /dev/kvm.
///
/// # Errors
/// One sentence: what KVM refused or could not run.
pub fn measure(kvm: File) -> Result<Speeds, String> {
    let stop = Arc::new(AtomicBool::new(false));
    let (tx, rx) = channel();
    let guest = {
        let stop = stop.clone();
        std::thread::Builder::new()
            .name("kvm probe".into())
            .spawn(move || {
                let _ = tx.send(Probe::new(kvm, stop).and_then(|mut p| p.measure()));
            })
            .map_err(|e| format!("the host refuses a thread ({e})"))?
    };
    let result = match rx.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err("the probe failed".into()),
        Err(RecvTimeoutError::Timeout) => {
            stop.store(true, SeqCst);
            get_out(&guest);
            // Joining it would hang, too, if the signal did not help.
            return Err(format!("KVM did not come back from the probe guest within {} s", PATIENCE.as_secs()));
        }
    };
    let _ = guest.join();
    result
}

/// Sends the thread a signal that does nothing but end KVM_RUN.
fn get_out(guest: &std::thread::JoinHandle<()>) {
    extern "C" fn nothing(_: libc::c_int) {}
    let signal = libc::SIGRTMIN() + 7;
    // SAFETY: an empty handler for a signal that nothing else here uses; the thread has not been joined.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        if libc::sigaction(signal, &action, std::ptr::null_mut()) == 0 {
            for _ in 0..20 {
                if guest.is_finished() {
                    break;
                }
                libc::pthread_kill(guest.as_pthread_t(), signal);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Anonymous memory, for the guest.
struct Memory(*mut u8);

impl Memory {
    fn new() -> Result<Self, String> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED { Err("the host refuses memory".into()) } else { Ok(Self(p.cast())) }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= SIZE);
        // SAFETY: within the mapping, and no vCPU runs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at as usize), bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0.cast(), SIZE) };
    }
}

/// A virtual machine with one vCPU. Fields drop in this order: the memory goes last.
struct Probe {
    vcpu: VcpuFd,
    stop: Arc<AtomicBool>,
    _vm: kvm_ioctls::VmFd,
    _memory: Memory,
}

impl Probe {
    fn new(kvm: File, stop: Arc<AtomicBool>) -> Result<Self, String> {
        // SAFETY: the descriptor is open and ours to give.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let refused = |what: &'static str| move |e: kvm_ioctls::Error| format!("KVM refuses {what} ({e})");
        let vm = kvm.create_vm().map_err(refused("a virtual machine"))?;
        let mut memory = Memory::new()?;
        memory.put(PML4, &(0x2000_u64 | 7).to_le_bytes());
        memory.put(0x2000, &(0x3000_u64 | 7).to_le_bytes());
        memory.put(0x3000, &0x87_u64.to_le_bytes());
        memory.put(CODE, &LOOP);
        // Only some CPUs want it, and only they refuse to go on without.
        let _ = vm.set_tss_address(0xfffb_d000);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: memory.0 as u64,
        };
        // SAFETY: the mapping lives until after the virtual machine.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("guest memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("a vCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("to tell its CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(refused("its own CPUID"))?;
        let mut s = vcpu.get_sregs().map_err(refused("to tell the vCPU's registers"))?;
        (s.cr0, s.cr3, s.cr4, s.efer) = (0x8005_0033, PML4, 0x20, 0x500);
        vcpu.set_sregs(&s).map_err(refused("64-bit mode"))?;
        Ok(Self { vcpu, stop, _vm: vm, _memory: memory })
    }

    /// Puts the vCPU in front of the loop, in ring `ring`, and runs it to its end; gives the time.
    fn run(&mut self, ring: u8, rounds: u64) -> Result<Duration, String> {
        let refused = |e: kvm_ioctls::Error| format!("KVM refuses registers ({e})");
        let mut s = self.vcpu.get_sregs().map_err(refused)?;
        let segment = |selector: u16, kind: u8, l: u8| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: selector | u16::from(ring),
            type_: kind,
            present: 1,
            dpl: ring,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        s.cs = segment(8, 11, 1);
        (s.ds, s.es, s.fs, s.gs, s.ss) =
            (segment(16, 3, 0), segment(16, 3, 0), segment(16, 3, 0), segment(16, 3, 0), segment(16, 3, 0));
        self.vcpu.set_sregs(&s).map_err(refused)?;
        // IOPL 3: OUT works everywhere.
        let regs = kvm_regs { rip: CODE, rcx: rounds, rdx: 0x80, rflags: 0x3002, rsp: 0x8000, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(refused)?;
        let began = Instant::now();
        self.enter()?;
        let time = began.elapsed();
        let left = self.vcpu.get_regs().map_err(refused)?.rcx;
        if left != 0 {
            return Err(format!("KVM gave up in ring {ring} with {left} of {rounds} rounds to go"));
        }
        Ok(time)
    }

    /// One KVM_RUN, to the next OUT.
    fn enter(&mut self) -> Result<(), String> {
        loop {
            if self.stop.load(SeqCst) {
                return Err("stopped".into());
            }
            return match self.vcpu.run() {
                Ok(VcpuExit::IoOut(..)) => Ok(()),
                Ok(VcpuExit::InternalError) => Err("KVM cannot emulate an instruction of the probe guest".into()),
                Ok(exit) => Err(format!("the probe guest ended in {exit:?}")),
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(e) => Err(format!("KVM cannot run the probe guest ({e})")),
            };
        }
    }

    /// Nanoseconds per instruction in a ring. The loop has two instructions a round.
    fn ring(&mut self, ring: u8) -> Result<f64, String> {
        let mut best = |rounds: u64, tries: u32| -> Result<Duration, String> {
            let mut least = Duration::MAX;
            for _ in 0..tries {
                least = least.min(self.run(ring, rounds)?);
            }
            Ok(least)
        };
        let base = best(1, 4)?;
        let mut rounds = 250;
        loop {
            let ns = nanoseconds(best(rounds, 3)?.saturating_sub(base));
            if ns > 100_000.0 || rounds > 200_000 {
                return Ok(ns / (2 * (rounds - 1)) as f64);
            }
            rounds *= 20;
        }
    }

    fn measure(&mut self) -> Result<Speeds, String> {
        let ring0_ns = self.ring(0)?;
        let exit_ns = self.exit()?;
        let ring3_ns = self.ring(3).ok();
        Ok(Speeds { ring0_ns, ring3_ns, exit_ns, host_ns: host() })
    }

    /// Nanoseconds of an exit: the vCPU is at the OUT loop.
    fn exit(&mut self) -> Result<f64, String> {
        self.run(0, 1)?;
        let mut least = Duration::MAX;
        for _ in 0..32 {
            let began = Instant::now();
            self.enter()?;
            least = least.min(began.elapsed());
        }
        Ok(nanoseconds(least))
    }
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// The guest's loop, here.
fn host() -> f64 {
    let mut least = Duration::MAX;
    const ROUNDS: u64 = 50_000;
    for _ in 0..3 {
        let began = Instant::now();
        // SAFETY: counts a register down.
        unsafe {
            std::arch::asm!("2: dec {n}", "jnz 2b", n = inout(reg) ROUNDS => _, options(nomem, nostack));
        }
        least = least.min(began.elapsed());
    }
    nanoseconds(least) / (2 * ROUNDS) as f64
}
