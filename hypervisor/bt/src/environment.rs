//! The engine as the environment of emulated instructions: guest-physical memory, the bus, flushes.
#![allow(unsafe_code)] // Copies to and from guest RAM.

use crate::engine::Engine;
use paravane_cpu::cpuid::CpuidPolicy;
use paravane_cpu::mmu::Access;
use paravane_cpu::{Bus, BusOutcome, CpuState, Env, Exception, HypercallOutcome, TlbFlush};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

impl Env for Engine {
    fn read_phys(&mut self, gpa: u64, data: &mut [u8]) {
        if let Some(p) = self.ram.host(gpa, data.len() as u64) {
            // SAFETY: `data.len()` bytes of mapped guest RAM; the guest may change them meanwhile, which plain copies
            // of bytes tolerate.
            unsafe { load(p, data) };
            return;
        }
        self.stats.mmio_reads += 1;
        for (at, len) in device_parts(gpa, data.len()) {
            self.bus.mmio_read(self.id, gpa + at as u64, &mut data[at..at + len]);
        }
    }

    fn write_phys(&mut self, gpa: u64, data: &[u8]) {
        if let Some(p) = self.ram.host(gpa, data.len() as u64) {
            if self.pages.contains_key(&(gpa & !0xfff)) {
                self.ram_written(gpa, data.len() as u64);
            }
            // SAFETY: as in `read_phys`.
            unsafe { store(p, data) };
            self.ram.report(gpa, data.len() as u64);
            return;
        }
        self.stats.mmio_writes += 1;
        for (at, len) in device_parts(gpa, data.len()) {
            let outcome = self.bus.mmio_write(self.id, gpa + at as u64, &data[at..at + len]);
            self.note_outcome(outcome);
        }
    }

    fn read_pte(&mut self, gpa: u64, bytes: u8) -> Option<u64> {
        let p = self.ram.host(gpa, u64::from(bytes))?;
        // SAFETY: naturally aligned and within mapped guest RAM.
        Some(unsafe {
            if bytes == 8 {
                (*p.cast::<AtomicU64>()).load(Ordering::Relaxed)
            } else {
                u64::from((*p.cast::<AtomicU32>()).load(Ordering::Relaxed))
            }
        })
    }

    fn update_pte(&mut self, gpa: u64, bytes: u8, old: u64, new: u64) -> bool {
        let Some(p) = self.ram.host(gpa, u64::from(bytes)) else { return false };
        if self.pages.contains_key(&(gpa & !0xfff)) {
            self.ram_written(gpa, u64::from(bytes));
        }
        // SAFETY: as in `read_pte`.
        let done = unsafe {
            if bytes == 8 {
                (*p.cast::<AtomicU64>()).compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            } else {
                (*p.cast::<AtomicU32>())
                    .compare_exchange(old as u32, new as u32, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            }
        };
        self.ram.report(gpa, u64::from(bytes));
        done
    }

    fn translate(&mut self, st: &CpuState, la: u64, access: Access) -> Result<u64, Exception> {
        self.translate_through_tlb(st, la, access)
    }

    fn write_pte(&mut self, gpa: u64, value: u64) -> bool {
        let Some(p) = self.ram.host(gpa, 8) else { return false };
        if self.pages.contains_key(&(gpa & !0xfff)) {
            self.ram_written(gpa, 8);
        }
        // SAFETY: as in `read_pte`; callers pass naturally aligned addresses.
        unsafe { (*p.cast::<AtomicU64>()).store(value, Ordering::SeqCst) };
        self.ram.report(gpa, 8);
        true
    }

    fn bus(&self) -> &dyn Bus {
        &*self.bus
    }

    fn flush_tlb(&mut self, what: TlbFlush) {
        self.flush_window(what);
        self.flush_kernel(what);
        match what {
            TlbFlush::All => self.flush_all_translations(),
            // The soft TLB is not tagged: another PCID's entries are gone already, and the current one's go now.
            TlbFlush::NonGlobal | TlbFlush::SwitchPcid | TlbFlush::Pcid(_) => self.flush_non_global(),
            TlbFlush::Page(la) => self.flush_page(la),
            TlbFlush::PcidPage(_, la) => self.flush_page(la),
        }
    }

    fn attend(&mut self) {
        self.give_pages_up();
        self.let_another_be_alone();
    }

    fn host_tsc(&self) -> u64 {
        // SAFETY: RDTSC is available in user mode on every supported host.
        unsafe { std::arch::x86_64::_rdtsc() }
    }

    fn note_outcome(&mut self, outcome: BusOutcome) {
        if outcome == BusOutcome::Stopping {
            self.machine_stopping = true;
        }
    }

    fn cpuid(&self) -> &CpuidPolicy {
        &self.cpuid
    }

    fn hypercall(&mut self, st: &mut CpuState) -> Option<HypercallOutcome> {
        self.stats.hypercalls += 1;
        let bus = self.bus.clone();
        bus.hypercall(st, self)
    }

    fn hypervisor_msr_write(&mut self, vcpu: u32, msr: u32, value: u64) -> Option<BusOutcome> {
        let bus = self.bus.clone();
        bus.hypervisor_msr_write(vcpu, msr, value, self)
    }

    fn ram_slice(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8> {
        let host = self.ram.host(gpa, len as u64)?;
        (!write || self.ram.claim(gpa)).then_some(host)
    }
}

/// Reads guest RAM; naturally aligned operands of up to 8 bytes in one piece, as other vCPUs expect of a CPU.
///
/// # Safety
/// `from` is good for reads of `data.len()` bytes.
unsafe fn load(from: *const u8, data: &mut [u8]) {
    let aligned = (from as usize).is_multiple_of(data.len().max(1));
    // SAFETY: as the caller says; the atomics are aligned.
    unsafe {
        match data.len() {
            1 => data[0] = (*from.cast::<AtomicU8>()).load(Ordering::Acquire),
            2 if aligned => data.copy_from_slice(&(*from.cast::<AtomicU16>()).load(Ordering::Acquire).to_le_bytes()),
            4 if aligned => data.copy_from_slice(&(*from.cast::<AtomicU32>()).load(Ordering::Acquire).to_le_bytes()),
            8 if aligned => data.copy_from_slice(&(*from.cast::<AtomicU64>()).load(Ordering::Acquire).to_le_bytes()),
            n => std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), n),
        }
    }
}

/// Writes guest RAM; see [`load`].
///
/// # Safety
/// `to` is good for writes of `data.len()` bytes.
unsafe fn store(to: *mut u8, data: &[u8]) {
    let aligned = (to as usize).is_multiple_of(data.len().max(1));
    // SAFETY: as the caller says; the atomics are aligned.
    unsafe {
        match *data {
            [a] => (*to.cast::<AtomicU8>()).store(a, Ordering::Release),
            [a, b] if aligned => (*to.cast::<AtomicU16>()).store(u16::from_le_bytes([a, b]), Ordering::Release),
            [a, b, c, d] if aligned => {
                (*to.cast::<AtomicU32>()).store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
            }
            [a, b, c, d, e, f, g, h] if aligned => {
                let v = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                (*to.cast::<AtomicU64>()).store(v, Ordering::Release);
            }
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()),
        }
    }
}

/// Splits an access to device memory into naturally aligned parts of at most eight bytes.
fn device_parts(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let here = gpa + at as u64;
        let mut n = 8;
        while n > len - at || !here.is_multiple_of(n as u64) {
            n /= 2;
        }
        let part = (at, n);
        at += n;
        Some(part)
    })
}
