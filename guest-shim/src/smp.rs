//! Other CPUs: interrupts, TLB invalidation, kick and yield.
//!
//! Natively, a TLB flush is a request in memory, an IPI to the CPUs concerned, and a wait until each of them has served it. The kernel gives the flush
//! a vector and calls [`FlushRequests::serve`] in its handler. One flush is under way at a time.

#![allow(unsafe_code)] // Invalidation is privileged.

use crate::batch;
use crate::cpu;
use crate::hypercall::Vcpus;
use crate::vcpu::Vcpu;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use pv_abi::call::ALL_ONES;
use pv_abi::feature::Feature;

/// What is to be invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// The pages from the one at `address` on.
    Pages {
        /// Linear address of the first.
        address: u64,
        /// How many, at least 1.
        pages: u64,
    },
    /// The whole address space but for global pages.
    Space,
}

impl Flush {
    /// The arguments of FLUSH_TLB.
    fn to_arguments(self) -> (u64, u64) {
        match self {
            Self::Pages { address, pages } => (address & !0xfff, pages.max(1)),
            Self::Space => (ALL_ONES, 0),
        }
    }

    /// Invalidates on this CPU.
    fn apply(self) {
        // SAFETY: the shim runs at CPL 0; invalidation drops cached translations only.
        unsafe {
            match self {
                Self::Pages { address, pages } => batch::invalidate_pages(address, pages.max(1) - 1),
                Self::Space => cpu::write_cr3(cpu::read_cr3()),
            }
        }
    }
}

/// The native flush that is under way.
#[derive(Debug)]
pub struct FlushRequests {
    busy: AtomicBool,
    address: AtomicU64,
    pages: AtomicU64,
    /// CPUs that have not served it yet, counted.
    left: AtomicU64,
}

impl FlushRequests {
    pub(crate) const fn new() -> Self {
        Self {
            busy: AtomicBool::new(false),
            address: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            left: AtomicU64::new(0),
        }
    }

    /// To be called by the handler of the flush vector, on the CPU that got it, before it ends the interrupt.
    pub fn serve(&self) {
        self.serve_with(Flush::apply);
    }

    fn serve_with(&self, invalidate: impl Fn(Flush)) {
        // Read before the count goes down: then the next request may overwrite it.
        let (address, pages) = (self.address.load(Acquire), self.pages.load(Acquire));
        invalidate(if address == ALL_ONES { Flush::Space } else { Flush::Pages { address, pages } });
        let _ = self.left.fetch_update(Release, Relaxed, |left| left.checked_sub(1));
    }

    /// Makes a request of `count` CPUs: `send` interrupts them, `wait` is called until all have served it.
    fn request(&self, what: Flush, count: u64, send: impl FnOnce(), mut wait: impl FnMut()) {
        while self.busy.compare_exchange_weak(false, true, Acquire, Relaxed).is_err() {
            wait();
        }
        let (address, pages) = what.to_arguments();
        self.address.store(address, Relaxed);
        self.pages.store(pages, Relaxed);
        self.left.store(count, Release);
        send();
        while self.left.load(Acquire) != 0 {
            wait();
        }
        self.busy.store(false, Release);
    }
}

impl Vcpu<'_> {
    /// Raises `vector` (32 to 255) on other CPUs. Gives how many were addressed.
    pub fn send_ipi(&self, to: Vcpus, vector: u8) -> u64 {
        if let Some(calls) = self.shim.calls_for(Feature::Ipi)
            && let Ok(addressed) = calls.send_ipi(to, vector)
        {
            return addressed;
        }
        let mut addressed = 0;
        for cpu in to.iter() {
            self.apic.send((self.shim.platform.apic_id)(cpu), vector);
            addressed += 1;
        }
        addressed
    }

    /// Invalidates on other CPUs (`on`), and on this one if it is among them; back when it is done. `vector` is the one whose handler calls
    /// [`FlushRequests::serve`].
    ///
    /// Interrupts must be enabled while several CPUs may do this at a time, or they wait for each other for ever.
    pub fn flush_tlb(&self, on: Vcpus, what: Flush, vector: u8) {
        if let Some(calls) = self.shim.calls_for(Feature::TlbFlush) {
            let (address, pages) = what.to_arguments();
            if calls.flush_tlb(on, address, pages).is_ok() {
                return;
            }
        }
        let mut others = on;
        if let Some(me) = self.index().checked_sub(on.first).filter(|&n| n < 64 && on.mask >> n & 1 != 0) {
            others.mask &= !(1 << me);
            what.apply();
        }
        if others.mask != 0 {
            let count = u64::from(others.mask.count_ones());
            let send = || {
                self.send_ipi(others, vector);
            };
            self.shim.flushes.request(what, count, send, core::hint::spin_loop);
        }
    }

    /// Ends another CPU's [`Vcpu::halt`]. `vector` is one whose handler does nothing but end the interrupt; the ABI needs none.
    pub fn kick(&self, cpu: u32, vector: u8) {
        if let Some(calls) = self.shim.calls_for(Feature::Schedule)
            && calls.kick(cpu).is_ok()
        {
            return;
        }
        self.send_ipi(Vcpus::one(cpu), vector);
    }

    /// To be called while waiting for another CPU, `None` for any: lets it run where CPUs are shared.
    pub fn yield_to(&self, cpu: Option<u32>) {
        match self.shim.calls_for(Feature::Schedule) {
            Some(calls) if calls.yield_to(cpu).is_ok() => {}
            _ => core::hint::spin_loop(),
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn arguments_name_whole_pages() {
        assert_eq!(Flush::Pages { address: 0x1234, pages: 0 }.to_arguments(), (0x1000, 1));
        assert_eq!(Flush::Space.to_arguments(), (ALL_ONES, 0));
    }

    /// Two requesters at a time, and threads in the place of interrupted CPUs: each request is served by all before it ends.
    #[test]
    fn every_cpu_serves_every_request_before_it_ends() {
        const CPUS: u64 = 3;
        let requests = FlushRequests::new();
        let served = Mutex::new(std::vec::Vec::new());
        std::thread::scope(|s| {
            for me in 0..2_u64 {
                let (requests, served) = (&requests, &served);
                s.spawn(move || {
                    for n in 0..50 {
                        let what = Flush::Pages { address: (me * 50 + n) << 12, pages: n + 1 };
                        let send = || {
                            for _ in 0..CPUS {
                                s.spawn(|| requests.serve_with(|f| served.lock().unwrap().push(f)));
                            }
                        };
                        requests.request(what, CPUS, send, std::thread::yield_now);
                        let count = served.lock().unwrap().iter().filter(|f| **f == what).count() as u64;
                        assert_eq!(count, CPUS, "{what:?} came back early");
                    }
                });
            }
        });
        assert_eq!(served.into_inner().unwrap().len(), 2 * 50 * CPUS as usize);
    }
}
