//! Writes to guest RAM by others, devices and other vCPUs: how translated code learns of them, and how it comes that a page which
//! one vCPU has code from is not written unnoticed by another's translated code.
//!
//! A vCPU's own stores meet its soft TLB, which knows pages with translated code. A device writes from a thread of
//! its own, past all that, and so does another vCPU. [`paravane_ram::WriteWatch`] knows which engine holds code from which page and
//! which engine may store to it directly.
//!
//! **Something was written** to a page that this engine holds: [`Mailbox::written`] is called on the writer's thread. The
//! range is noted and the vCPU is kicked, so that it comes out of translated code at
//! its next poll and drops the blocks concerned before it runs anything else. The writer goes on, and tells the guest that
//! it is done, only after that, so the guest cannot wait for the writer and then run what was there before: between
//! its seeing the completion and code reached by an indirect branch, a loop, an interrupt or a serializing instruction (which SDM vol. 3, section 9.1.3
//! asks for when code is modified from outside) lies a poll.
//!
//! **Somebody is about to hold** a page that this engine claims, that is, may have entries for in its soft TLB or its windows through
//! which translated code stores: [`Mailbox::withdraw`]. The holder waits until the vCPU has dropped them. It does not wait for a
//! vCPU that is outside translated code, since that one looks at its mailbox before it goes in. While it waits it does for
//! others what they ask of it, so two that wait for each other both get on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use paravane_ram::{CodeOwner, GuestRam, Slot, WriteWatch};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::engine::{Engine, Ram};
use crate::vcpu::{BtError, StateMemory};

/// Ranges that may wait; with more, all translated code goes.
const MAX_RANGES: usize = 256;

/// Writes of others to a page, after which all its blocks go and not only those that were hit: the page is data by now.
const PATIENCE: u32 = 8;

/// How often a vCPU that waits for another looks before it offers its host CPU to others.
const SPINS: u32 = 200;

#[derive(Default)]
struct Waiting {
    ranges: Vec<(u64, u64)>,
    /// There were too many.
    all: bool,
    /// Pages to give up.
    pages: Vec<u64>,
    /// How many pages there have been.
    asked: u64,
}

/// What others have written or want, and the vCPU has not seen to yet.
pub(crate) struct Mailbox {
    waiting: Mutex<Waiting>,
    some: AtomicBool,
    /// There are pages to give up.
    pages: AtomicBool,
    /// How many pages have been given up.
    done: AtomicU64,
    /// The vCPU waits, and touches no guest memory until it has seen that nobody is alone with it.
    pub(crate) parked: AtomicBool,
    vcpu: Arc<StateMemory>,
}

impl Mailbox {
    /// An empty mailbox for a vCPU, registered with all of its RAM: its slot in each region.
    pub(crate) fn new(vcpu: Arc<StateMemory>, mem: &GuestRam) -> Result<(Arc<Self>, Vec<Slot>), BtError> {
        let me = Arc::new(Self {
            waiting: Mutex::default(),
            some: AtomicBool::new(false),
            pages: AtomicBool::new(false),
            done: AtomicU64::new(0),
            parked: AtomicBool::new(false),
            vcpu,
        });
        let owner: Weak<dyn CodeOwner> = Arc::downgrade(&(me.clone() as Arc<dyn CodeOwner>));
        let slots = mem.iter().map(|r| map(r).bitmap().add_owner(r.start_addr().raw_value(), owner.clone())).collect();
        let slots: Option<Vec<Slot>> = slots;
        match slots {
            Some(slots) => Ok((me, slots)),
            None => Err(BtError::Host("guest memory is shared by too many vCPUs; use 64 at most".into())),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both ranges in one, if they lie in the same page or touch.
fn union((a, alen): (u64, u64), (b, blen): (u64, u64)) -> Option<(u64, u64)> {
    let (first, end) = (a.min(b), (a + alen).max(b + blen));
    let near = a >> 12 == b >> 12 && end <= (a & !0xfff) + 4096;
    (near || (a <= b + blen && b <= a + alen)).then(|| (first, end - first))
}

impl CodeOwner for Mailbox {
    fn written(&self, gpa: u64, len: u64) {
        let mut waiting = self.waiting();
        let last = waiting.ranges.last_mut();
        if let Some(last) = last
            && let Some(both) = union(*last, (gpa, len))
        {
            *last = both;
        } else if waiting.ranges.len() < MAX_RANGES {
            waiting.ranges.push((gpa, len));
        } else {
            waiting.all = true;
        }
        drop(waiting);
        self.some.store(true, SeqCst);
        self.vcpu.kick();
    }

    fn withdraw(&self, page: u64) -> u64 {
        let mut waiting = self.waiting();
        waiting.pages.push(page);
        waiting.asked += 1;
        let ticket = waiting.asked;
        drop(waiting);
        self.pages.store(true, SeqCst);
        self.vcpu.kick();
        ticket
    }

    fn withdrawn(&self, ticket: u64) -> bool {
        self.done.load(SeqCst) >= ticket || !self.vcpu.inside()
    }

    fn come_out(&self) {
        self.vcpu.kick();
    }

    fn is_out(&self) -> bool {
        self.parked.load(SeqCst) || !self.vcpu.inside()
    }
}

/// A region's mapping, which has its watch.
pub(crate) fn map(region: &GuestRegionMmap<WriteWatch>) -> &MmapRegion<WriteWatch> {
    region
}

impl Ram {
    /// Code is about to be made from a page, if it is RAM: writes to it by others are reported from now on. Whether others
    /// claim it.
    fn hold(&self, page: u64) -> bool {
        self.watch(page).is_some_and(|(watch, slot, offset)| watch.hold(slot, offset))
    }

    /// No code made from a page is left.
    fn release(&self, page: u64) {
        if let Some((watch, slot, offset)) = self.watch(page) {
            watch.release(slot, offset);
        }
    }

    /// Whether this vCPU may store to a page of RAM directly from now on.
    pub(crate) fn claim(&self, page: u64) -> bool {
        self.watch(page).is_some_and(|(watch, slot, offset)| watch.claim(slot, offset))
    }

    /// This vCPU does not store to a page directly any more.
    fn disclaim(&self, page: u64) {
        if let Some((watch, slot, offset)) = self.watch(page) {
            watch.disclaim(slot, offset);
        }
    }

    /// This vCPU has written to RAM without a claim, within a page: those who hold code from there learn of it.
    #[inline]
    pub(crate) fn report(&self, gpa: u64, len: u64) {
        if self.several()
            && let Some((watch, slot, offset)) = self.watch(gpa)
        {
            watch.written(slot, offset, len);
        }
    }
}

impl Engine {
    /// Whether others have written or want something that was not seen to yet.
    pub(crate) fn mail_waits(&self) -> bool {
        self.mailbox.some.load(SeqCst) || self.mailbox.pages.load(SeqCst)
    }

    /// Drops code whose bytes were written by others, and entries for pages that others make code from. Nobody may be inside a
    /// block.
    pub(crate) fn see_to_mail(&mut self) {
        self.give_pages_up();
        if !self.mailbox.some.load(SeqCst) {
            return;
        }
        self.mailbox.some.store(false, SeqCst);
        let (ranges, all) = {
            let mut waiting = self.mailbox.waiting();
            (std::mem::take(&mut waiting.ranges), std::mem::take(&mut waiting.all))
        };
        if all {
            self.cache_full = true;
            return;
        }
        for (gpa, len) in ranges {
            self.stats.device_writes += 1;
            let page = gpa & !0xfff;
            let impatient = self.pages.get_mut(&page).is_some_and(|p| {
                p.writes += 1;
                p.writes >= PATIENCE
            });
            if impatient && gpa + len <= page + 4096 {
                self.ram_written(page, 4096);
            } else {
                self.ram_written(gpa, len);
            }
        }
    }

    /// Gives up the claims that others asked for. Between any two instructions, and within one that stores nothing directly.
    pub(crate) fn give_pages_up(&mut self) {
        if !self.mailbox.pages.load(SeqCst) {
            return;
        }
        self.mailbox.pages.store(false, SeqCst);
        let (pages, asked) = {
            let mut waiting = self.mailbox.waiting();
            (std::mem::take(&mut waiting.pages), waiting.asked)
        };
        for page in pages {
            self.stats.withdrawals += 1;
            self.drop_write_access(page);
        }
        self.mailbox.done.store(asked, SeqCst);
    }

    /// Takes from translated code every way to write to a page of RAM directly.
    pub(crate) fn drop_write_access(&mut self, page: u64) {
        self.protect_in_window(page);
        self.protect_in_kernel(page);
        self.drop_write_entries(page);
        self.ram.disclaim(page);
    }

    /// Starts to watch a page before code is made from it.
    pub(crate) fn hold_page(&mut self, page: u64) {
        if self.pages.contains_key(&page) {
            return;
        }
        self.pages.insert(page, Default::default());
        if self.ram.hold(page) {
            self.await_withdrawal(page);
        }
    }

    /// Waits until nobody else can write to a held page unnoticed.
    fn await_withdrawal(&mut self, page: u64) {
        let Some((watch, slot, offset)) = self.ram.watch(page) else { return };
        let asked = watch.withdraw(slot, offset);
        let began = Instant::now();
        for (owner, ticket) in asked {
            let mut looked = 0;
            while !owner.withdrawn(ticket) {
                self.give_pages_up();
                self.let_another_be_alone();
                looked += 1;
                if looked < SPINS {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
        }
        self.waits.note(began.elapsed());
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
        self.end_alone();
        self.release_all_pages();
    }
}

#[cfg(test)]
mod tests {
    use super::union;

    #[test]
    fn ranges_are_joined_within_a_page_and_where_they_touch() {
        assert_eq!(union((0x1000, 4), (0x1100, 4)), Some((0x1000, 0x104)));
        assert_eq!(union((0x1100, 4), (0x1000, 4)), Some((0x1000, 0x104)));
        assert_eq!(union((0x1000, 4), (0x2000, 4)), None);
        assert_eq!(union((0x1000, 0x1000), (0x2000, 4)), Some((0x1000, 0x1004)));
        assert_eq!(union((0x1ffc, 8), (0x1000, 4)), None, "more than what was written in the second page would go");
    }
}
