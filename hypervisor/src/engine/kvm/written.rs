//! Which pages were written: KVM's log of what vCPUs write, and the watch on guest RAM for everybody else.
//!
//! KVM marks a page when guest code stores to it (KVM_MEM_LOG_DIRTY_PAGES, KVM_GET_DIRTY_LOG). Devices, and this process on a vCPU's behalf,
//! write without KVM; they report to `paravane-ram`'s watch, where the log is registered as a holder of every page. [`WriteLog::take`] joins the
//! two. Both are exact to the page, and nothing that was written before a `take` began is missed by it or the next one.
//!
//! A slot that is removed takes its marks along, so whoever removes slots ([`KvmVm::forget_memory`]) has them collected first.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Weak};

use paravane_ram::{CodeOwner, Slot, WriteWatch};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{KvmError, KvmVm};
use crate::devices::lock;
use crate::memory::GuestRam;

const PAGE_SHIFT: u32 = 12;

/// A region's own watch.
fn watch(region: &GuestRegionMmap<WriteWatch>) -> &WriteWatch {
    let map: &MmapRegion<WriteWatch> = region;
    map.bitmap()
}

/// A bit per page for each region of RAM.
struct Marks(Vec<(u64, Vec<AtomicU64>)>);

impl Marks {
    fn new(ram: &GuestRam) -> Self {
        let words = |len: u64| (0..(len >> PAGE_SHIFT).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self(ram.iter().map(|r| (r.start_addr().raw_value() >> PAGE_SHIFT, words(r.len()))).collect())
    }

    /// Takes all marks off; gives the numbers of the pages.
    fn take(&self, into: &mut BTreeSet<u64>) {
        for (first, words) in &self.0 {
            for (n, word) in (0_u64..).zip(words) {
                if word.load(SeqCst) != 0 {
                    collect(into, first + n * 64, word.swap(0, SeqCst));
                }
            }
        }
    }
}

/// Adds the pages of a word of marks, of which `first` is the lowest.
fn collect(into: &mut BTreeSet<u64>, first: u64, word: u64) {
    into.extend((0..64).filter(|n| word >> n & 1 != 0).map(|n| first + n));
}

impl CodeOwner for Marks {
    fn written(&self, gpa: u64, len: u64) {
        let (from, to) = (gpa >> PAGE_SHIFT, gpa.saturating_add(len.saturating_sub(1)) >> PAGE_SHIFT);
        for (first, words) in &self.0 {
            let end = first + words.len() as u64 * 64;
            for page in from.max(*first)..=to.min(end.saturating_sub(1)) {
                let n = page - first;
                words[(n / 64) as usize].fetch_or(1 << (n % 64), SeqCst);
            }
        }
    }

    /// Nothing is ever claimed.
    fn withdraw(&self, _page: u64) -> u64 {
        0
    }

    fn withdrawn(&self, _ticket: u64) -> bool {
        true
    }
}

/// A log of written pages, from its start until it is dropped. A machine has one at a time.
pub struct WriteLog {
    vm: Arc<KvmVm>,
    others: Arc<Marks>,
    slots: Vec<Slot>,
}

impl WriteLog {
    /// Starts logging.
    ///
    /// # Errors
    /// When KVM refuses, there is a log already, or too many others watch the RAM.
    pub(in crate::engine) fn start(vm: Arc<KvmVm>) -> Result<Self, KvmError> {
        let others = Arc::new(Marks::new(&vm.ram));
        let weak: Weak<dyn CodeOwner> = Arc::downgrade(&others) as Weak<dyn CodeOwner>;
        let slots: Option<Vec<Slot>> =
            vm.ram.iter().map(|r| watch(r).add_owner(r.start_addr().raw_value(), weak.clone())).collect();
        let slots = slots.ok_or_else(|| KvmError::refused("a log of written pages", "too many watch guest RAM"))?;
        {
            let mut kept = lock(&vm.kept);
            if kept.is_some() {
                return Err(KvmError::refused("a second log of written pages", "there is one already"));
            }
            *kept = Some(BTreeSet::new());
        }
        let log = Self { vm, others, slots };
        for (region, &slot) in log.vm.ram.iter().zip(&log.slots) {
            for page in 0..region.len() >> PAGE_SHIFT {
                let claimed = watch(region).hold(slot, page << PAGE_SHIFT);
                debug_assert!(!claimed, "translated code runs in a machine of KVM's");
            }
        }
        log.vm.add_ram()?;
        Ok(log)
    }

    /// Guest-physical addresses of the pages written since the start or the last time, in ascending order.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn take(&mut self) -> Result<Vec<u64>, KvmError> {
        let mut pages = self.vm.logged()?;
        pages.append(lock(&self.vm.kept).get_or_insert_default());
        self.others.take(&mut pages);
        Ok(pages.into_iter().map(|n| n << PAGE_SHIFT).collect())
    }
}

impl Drop for WriteLog {
    fn drop(&mut self) {
        *lock(&self.vm.kept) = None;
        // Failing, it goes on logging, which only costs time.
        let _ = self.vm.add_ram();
        for (region, &slot) in self.vm.ram.iter().zip(&self.slots) {
            for page in 0..region.len() >> PAGE_SHIFT {
                watch(region).release(slot, page << PAGE_SHIFT);
            }
        }
    }
}

impl KvmVm {
    /// Takes KVM's marks; gives the numbers of the pages.
    fn logged(&self) -> Result<BTreeSet<u64>, KvmError> {
        let mut pages = BTreeSet::new();
        for (slot, region) in (0_u32..).zip(self.ram.iter()) {
            let len = usize::try_from(region.len()).map_err(|e| KvmError::refused("a region's log", e))?;
            let words = self.fd.get_dirty_log(slot, len).map_err(|e| KvmError::refused("KVM_GET_DIRTY_LOG", e))?;
            let first = region.start_addr().raw_value() >> PAGE_SHIFT;
            for (n, word) in (0_u64..).zip(words) {
                collect(&mut pages, first + n * 64, word);
            }
        }
        Ok(pages)
    }

    /// Collects what is marked, if there is a log, before slots are removed.
    pub(super) fn keep_log(&self) -> Result<(), KvmError> {
        let mut kept = lock(&self.kept);
        if let Some(kept) = &mut *kept {
            kept.append(&mut self.logged()?);
        }
        Ok(())
    }
}
