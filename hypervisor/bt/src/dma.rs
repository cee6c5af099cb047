//! Writes to guest RAM by devices: how translated code learns of them.
//!
//! The guest's own stores meet the soft TLB, which knows pages with translated code. A device writes from a thread of
//! its own, past all that. [`paravane_ram::WriteWatch`] notices writes to pages that this engine holds and calls
//! [`Mailbox::written`] on the device's thread: the range is noted and the vCPU is kicked, so that it comes out of translated code at
//! its next poll and drops the blocks concerned before it runs anything else. The device tells the guest that
//! it is done only after that, so the guest cannot wait for the device and then run what was there before: between
//! its seeing the completion and code reached by an indirect branch, a loop, or a serializing instruction (which SDM vol. 3, section 9.1.3
//! asks for when code is modified from outside) lies a poll.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use paravane_ram::{CodeOwner, GuestRam};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::engine::{Engine, Ram};
use crate::vcpu::StateMemory;

/// Ranges that may wait; with more, all translated code goes.
const MAX_RANGES: usize = 256;

#[derive(Default)]
struct Waiting {
    ranges: Vec<(u64, u64)>,
    /// There were too many.
    all: bool,
}

/// What devices have written and the vCPU has not seen to yet.
pub(crate) struct Mailbox {
    waiting: Mutex<Waiting>,
    some: AtomicBool,
    vcpu: Arc<StateMemory>,
}

impl Mailbox {
    /// An empty mailbox for a vCPU, registered with all of its RAM.
    pub(crate) fn new(vcpu: Arc<StateMemory>, mem: &GuestRam) -> Arc<Self> {
        let me = Arc::new(Self { waiting: Mutex::default(), some: AtomicBool::new(false), vcpu });
        let owner: Weak<dyn CodeOwner> = Arc::downgrade(&(me.clone() as Arc<dyn CodeOwner>));
        for region in mem.iter() {
            map(region).bitmap().add_owner(region.start_addr().raw_value(), owner.clone());
        }
        me
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CodeOwner for Mailbox {
    fn written(&self, gpa: u64, len: u64) {
        let mut waiting = self.waiting();
        if waiting.ranges.len() < MAX_RANGES {
            waiting.ranges.push((gpa, len));
        } else {
            waiting.all = true;
        }
        drop(waiting);
        self.some.store(true, SeqCst);
        self.vcpu.kick();
    }
}

/// A region's mapping, which has its watch.
pub(crate) fn map(region: &GuestRegionMmap<paravane_ram::WriteWatch>) -> &MmapRegion<paravane_ram::WriteWatch> {
    region
}

impl Ram {
    /// Code is about to be made from a page, if it is RAM: writes to it by others are reported from now on.
    pub(crate) fn hold(&self, page: u64) {
        if let Some((watch, offset)) = self.watch(page) {
            watch.hold(offset);
        }
    }

    /// No code made from a page is left.
    pub(crate) fn release(&self, page: u64) {
        if let Some((watch, offset)) = self.watch(page) {
            watch.release(offset);
        }
    }
}

impl Engine {
    /// Drops code whose bytes were written by devices. Nobody may be inside a block.
    pub(crate) fn see_to_device_writes(&mut self) {
        if !self.mailbox.some.load(SeqCst) {
            return;
        }
        self.mailbox.some.store(false, SeqCst);
        let Waiting { ranges, all } = std::mem::take(&mut *self.mailbox.waiting());
        if all {
            self.cache_full = true;
            return;
        }
        for (gpa, len) in ranges {
            self.stats.device_writes += 1;
            self.ram_written(gpa, len);
        }
    }

    /// Starts to watch a page before code is made from it.
    pub(crate) fn hold_page(&mut self, page: u64) {
        if !self.pages.contains_key(&page) {
            self.ram.hold(page);
            self.pages.insert(page, Default::default());
        }
    }

    /// Stops to watch a page without any code.
    pub(crate) fn release_unused_page(&mut self, page: u64) {
        if self.pages.get(&page).is_some_and(|p| p.blocks.is_empty()) {
            self.pages.remove(&page);
            self.ram.release(page);
        }
    }

    /// Stops to watch all pages.
    pub(crate) fn release_all_pages(&mut self) {
        for (page, _) in self.pages.drain() {
            self.ram.release(page);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.release_all_pages();
    }
}
