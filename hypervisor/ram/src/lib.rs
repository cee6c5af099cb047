//! Guest RAM as all parts of the hypervisor share it, and how a write reaches those who keep something made from the page.
//!
//! Binary translation keeps code that was made from guest pages. Whoever writes to such a page must tell the engines that hold
//! it. There are two kinds of writers:
//!
//! - **Devices**, and Rust code in general, write through `vm-memory`, which tells a region's bitmap of every write after it
//!   was made. [`WriteWatch`] is that bitmap.
//! - **Translated code** of a vCPU stores directly, with nobody told, to pages that its engine has a *claim* to
//!   ([`WriteWatch::claim`]). A page that anybody holds code from can not be claimed: stores to it take the engine's slow path, which
//!   reports them here ([`WriteWatch::written`]).
//!
//! There are two words per page, with a bit for each engine: who *holds* the page, and who *claims* it. Nothing is missed:
//!
//! - An engine sets its bit as a holder ([`WriteWatch::hold`]) *before* it reads the bytes that it translates. A writer that reports
//!   looks at the holders *after* it has written. Both have full fences in between, so either the writer sees the holder, or
//!   the holder sees the new bytes.
//! - A claim is announced *before* the holders are looked at, and a holder looks for claims *after* it has announced itself, so at
//!   least one of them sees the other. The holder then asks for the claims to be given up ([`WriteWatch::withdraw`]) and waits
//!   until they are, before it reads the bytes.
//!
//! A write to a page that nobody holds costs a fence and two loads. Whoever writes to guest RAM by raw pointer (a read into guest memory by
//! the host's kernel, memory handed back to the host) must say so with [`vm_memory::bitmap::Bitmap::mark_dirty`] afterwards.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// Guest RAM, shared by vCPUs and devices.
pub type GuestRam = Arc<GuestMemoryMmap<WriteWatch>>;

const PAGE_SHIFT: u32 = 12;
/// Pages whose words are made together, when one of them is first needed.
const CHUNK: usize = 512;
/// Most owners of one region at a time: one bit each.
pub const MAX_OWNERS: usize = 64;

/// Somebody who keeps what was made from guest pages.
pub trait CodeOwner: Send + Sync {
    /// Bytes were written at a guest-physical address, in pages that this owner holds. Called on the writer's thread after the
    /// write and before anybody can be told of it; must not block. When it returns, the owner must be unable to run what
    /// it made from the old bytes beyond the next point where it looks at events.
    fn written(&self, gpa: u64, len: u64);
    /// Somebody else is about to hold a page that this owner claims: the claim is to be given up, soon. Gives a ticket for
    /// [`CodeOwner::withdrawn`]. Called on the holder's thread; must not block.
    fn withdraw(&self, page: u64) -> u64;
    /// Whether what a ticket stands for has been done, or will be before the owner writes anything directly again.
    fn withdrawn(&self, ticket: u64) -> bool;
    /// Somebody else wants to be alone with memory ([`WriteWatch::try_alone`]): the owner is to stay out of guest code from
    /// its next instruction on, until that one is done. Must not block. An owner that runs no guest code has nothing to do.
    fn come_out(&self) {}
    /// Whether the owner is out of guest code and looks at [`WriteWatch::another_is_alone`] before it goes in.
    fn is_out(&self) -> bool {
        true
    }
}

/// An owner's place in one region's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u8);

impl Slot {
    fn bit(self) -> u64 {
        1 << self.0
    }
}

struct Owner {
    /// Guest-physical address of the region.
    start: u64,
    owner: Weak<dyn CodeOwner>,
}

#[derive(Default)]
struct Page {
    holders: AtomicU64,
    claims: AtomicU64,
}

type Chunk = Box<[Page]>;

#[derive(Default)]
struct Inner {
    chunks: Box<[OnceLock<Chunk>]>,
    /// There is more than one owner, or has been.
    several: AtomicBool,
    /// The owner that is alone with memory: its slot plus one.
    alone: AtomicU8,
    owners: Mutex<Vec<Option<Owner>>>,
}

impl Inner {
    fn owners(&self) -> MutexGuard<'_, Vec<Option<Owner>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The words of a page that somebody has held or claimed.
    fn known(&self, page: usize) -> Option<&Page> {
        self.chunks.get(page / CHUNK)?.get()?.get(page % CHUNK)
    }

    /// The words of a page; `None` outside the region.
    fn page(&self, page: usize) -> Option<&Page> {
        let make = || (0..CHUNK).map(|_| Page::default()).collect();
        self.chunks.get(page / CHUNK)?.get_or_init(make).get(page % CHUNK)
    }

    /// Bytes were written, by somebody whose bit `except` is.
    fn written(&self, offset: usize, len: usize, except: u64) {
        if len == 0 {
            return;
        }
        fence(SeqCst);
        let last = offset.saturating_add(len - 1) >> PAGE_SHIFT;
        let last = last.min((self.chunks.len() * CHUNK).saturating_sub(1));
        let mut holders = 0;
        let mut page = offset >> PAGE_SHIFT;
        while page <= last {
            match self.chunks.get(page / CHUNK).and_then(OnceLock::get) {
                Some(chunk) => {
                    holders |= chunk[page % CHUNK].holders.load(SeqCst);
                    page += 1;
                }
                // Nobody has ever held any of its pages.
                None => page = (page / CHUNK + 1) * CHUNK,
            }
        }
        if holders & !except != 0 {
            self.tell(offset, len, holders & !except);
        }
    }

    #[cold]
    fn tell(&self, offset: usize, len: usize, holders: u64) {
        for (n, o) in self.owners().iter().enumerate() {
            if let Some(o) = o
                && holders >> n & 1 != 0
                && let Some(owner) = o.owner.upgrade()
            {
                owner.written(o.start + offset as u64, len as u64);
            }
        }
    }
}

/// One region's watch; see the module text. Clones share it.
#[derive(Clone, Default)]
pub struct WriteWatch(Arc<Inner>);

impl WriteWatch {
    /// Registers an owner, for as long as it lives. `start` is the region's guest-physical address. `None`: there are
    /// [`MAX_OWNERS`] already.
    pub fn add_owner(&self, start: u64, owner: Weak<dyn CodeOwner>) -> Option<Slot> {
        let mut owners = self.0.owners();
        let free = |o: &Option<Owner>| o.as_ref().is_none_or(|o| o.owner.strong_count() == 0);
        let n = owners.iter().position(free).unwrap_or(owners.len());
        if n >= MAX_OWNERS {
            return None;
        }
        if n == owners.len() {
            owners.push(None);
        }
        owners[n] = Some(Owner { start, owner });
        if owners.len() > 1 {
            self.0.several.store(true, SeqCst);
        }
        Some(Slot(n as u8))
    }

    /// Whether there is, or was, an owner beside the first one.
    pub fn several(&self) -> bool {
        self.0.several.load(SeqCst)
    }

    /// An owner is about to read a page, given by an offset in the region, and keep what it makes from it. Gives whether others claim
    /// the page: then [`WriteWatch::withdraw`] is due before the page is read.
    #[must_use]
    pub fn hold(&self, slot: Slot, offset: u64) -> bool {
        let Some(page) = self.0.page((offset >> PAGE_SHIFT) as usize) else { return false };
        page.holders.fetch_or(slot.bit(), SeqCst);
        page.claims.load(SeqCst) & !slot.bit() != 0
    }

    /// The owner keeps nothing of the page any more.
    pub fn release(&self, slot: Slot, offset: u64) {
        if let Some(page) = self.0.known((offset >> PAGE_SHIFT) as usize) {
            page.holders.fetch_and(!slot.bit(), SeqCst);
        }
    }

    /// Asks everybody else to give up their claim to a page. Gives whom to wait for, each with the ticket for
    /// [`CodeOwner::withdrawn`].
    pub fn withdraw(&self, slot: Slot, offset: u64) -> Vec<(Arc<dyn CodeOwner>, u64)> {
        let Some(page) = self.0.known((offset >> PAGE_SHIFT) as usize) else { return Vec::new() };
        let owners = self.0.owners();
        let claims = page.claims.load(SeqCst) & !slot.bit();
        let mut asked = Vec::new();
        for n in (0..MAX_OWNERS).filter(|n| claims >> n & 1 != 0) {
            match owners.get(n).and_then(Option::as_ref).and_then(|o| Some((o.start, o.owner.upgrade()?))) {
                Some((start, owner)) => {
                    let ticket = owner.withdraw(start + (offset & !((1 << PAGE_SHIFT) - 1)));
                    asked.push((owner, ticket));
                }
                None => {
                    page.claims.fetch_and(!(1 << n), SeqCst);
                }
            }
        }
        asked
    }

    /// Whether an owner may store to a page directly from now on, until it is asked to withdraw. `false`: somebody, perhaps
    /// itself, holds the page.
    #[must_use]
    pub fn claim(&self, slot: Slot, offset: u64) -> bool {
        let Some(page) = self.0.page((offset >> PAGE_SHIFT) as usize) else { return false };
        if page.holders.load(SeqCst) != 0 {
            return false;
        }
        if page.claims.load(SeqCst) & slot.bit() != 0 {
            return true;
        }
        page.claims.fetch_or(slot.bit(), SeqCst);
        page.holders.load(SeqCst) == 0
    }

    /// An owner does not store to a page directly any more.
    pub fn disclaim(&self, slot: Slot, offset: u64) {
        if let Some(page) = self.0.known((offset >> PAGE_SHIFT) as usize)
            && page.claims.load(SeqCst) & slot.bit() != 0
        {
            page.claims.fetch_and(!slot.bit(), SeqCst);
        }
    }

    /// Tries to be the one owner that may touch memory, for what must be atomic and takes several accesses. Gives whether it is;
    /// the others are to be told, and to be waited for, then. One region of a machine's serves for all of them.
    #[must_use]
    pub fn try_alone(&self, slot: Slot) -> bool {
        self.0.alone.compare_exchange(0, slot.0 + 1, SeqCst, SeqCst).is_ok()
    }

    /// Takes [`WriteWatch::try_alone`] back.
    pub fn not_alone(&self, slot: Slot) {
        let _ = self.0.alone.compare_exchange(slot.0 + 1, 0, SeqCst, SeqCst);
    }

    /// Whether another owner is, or is about to be, alone with memory.
    #[inline]
    pub fn another_is_alone(&self, slot: Slot) -> bool {
        let alone = self.0.alone.load(SeqCst);
        alone != 0 && alone != slot.0 + 1
    }

    /// All other owners.
    pub fn others(&self, slot: Slot) -> Vec<Arc<dyn CodeOwner>> {
        let owners = self.0.owners();
        let others = owners.iter().enumerate().filter(|(n, _)| *n != usize::from(slot.0));
        others.filter_map(|(_, o)| o.as_ref()?.owner.upgrade()).collect()
    }

    /// An owner has written to the region without a claim: all other holders are told.
    pub fn written(&self, slot: Slot, offset: u64, len: u64) {
        if self.several() {
            self.0.written(offset as usize, len as usize, slot.bit());
        }
    }
}

impl fmt::Debug for WriteWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteWatch({} pages)", self.0.chunks.len() * CHUNK)
    }
}

impl<'a> WithBitmapSlice<'a> for WriteWatch {
    type S = WatchSlice<'a>;
}

impl Bitmap for WriteWatch {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.written(offset, len, 0);
    }
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> WatchSlice<'_> {
        WatchSlice { watch: &self.0, base: offset }
    }
}

impl NewBitmap for WriteWatch {
    /// For a region of `len` bytes.
    fn with_len(len: usize) -> Self {
        let chunks = (0..len.div_ceil(CHUNK << PAGE_SHIFT)).map(|_| OnceLock::new()).collect();
        Self(Arc::new(Inner { chunks, ..Inner::default() }))
    }
}

/// A part of a region's watch, as `vm-memory` hands it on with slices of memory.
#[derive(Clone, Copy)]
pub struct WatchSlice<'a> {
    watch: &'a Inner,
    base: usize,
}

impl fmt::Debug for WatchSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WatchSlice(from {:#x})", self.base)
    }
}

impl WithBitmapSlice<'_> for WatchSlice<'_> {
    type S = Self;
}

impl BitmapSlice for WatchSlice<'_> {}

impl Bitmap for WatchSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.watch.written(self.base.saturating_add(offset), len, 0);
    }
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self { watch: self.watch, base: self.base.saturating_add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    /// What was written, and which pages were to be given up.
    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>, Mutex<Vec<u64>>);

    impl CodeOwner for Log {
        fn written(&self, gpa: u64, len: u64) {
            self.0.lock().unwrap().push((gpa, len));
        }
        fn withdraw(&self, page: u64) -> u64 {
            let mut pages = self.1.lock().unwrap();
            pages.push(page);
            pages.len() as u64
        }
        fn withdrawn(&self, _: u64) -> bool {
            true
        }
    }

    /// The first slot of every region.
    const FIRST: Slot = Slot(0);

    fn ram() -> (GuestRam, Arc<Log>) {
        let parts = [(GuestAddress(0), 1 << 16), (GuestAddress(1 << 20), 1 << 16)];
        let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&parts).unwrap());
        let log = Arc::new(Log::default());
        for region in ram.iter() {
            let owner: Arc<dyn CodeOwner> = log.clone();
            assert_eq!(region.get_mmap().bitmap().add_owner(region.start(), Arc::downgrade(&owner)), Some(FIRST));
        }
        (ram, log)
    }

    trait Start {
        fn start(&self) -> u64;
    }
    impl Start for vm_memory::GuestRegionMmap<WriteWatch> {
        fn start(&self) -> u64 {
            vm_memory::GuestMemoryRegion::start_addr(self).0
        }
    }

    fn watch(ram: &GuestRam, gpa: u64) -> (Arc<vm_memory::MmapRegion<WriteWatch>>, u64) {
        let region = ram.find_region(GuestAddress(gpa)).unwrap();
        (region.get_mmap(), gpa - region.start())
    }

    #[test]
    fn only_writes_to_held_pages_are_reported_by_whatever_way_they_come() {
        let (ram, log) = ram();
        let at = (1 << 20) + 0x3000;
        ram.write_slice(&[1; 64], GuestAddress(at)).unwrap();
        assert!(log.0.lock().unwrap().is_empty());
        let (map, offset) = watch(&ram, at);
        assert!(!map.bitmap().hold(FIRST, offset));
        ram.write_slice(&[1; 64], GuestAddress(at + 0x1000)).unwrap();
        ram.write_slice(&[1; 64], GuestAddress(at - 0x1000)).unwrap();
        ram.write_slice(&[1; 64], GuestAddress(0x3000)).unwrap();
        ram.read_slice(&mut [0; 64], GuestAddress(at)).unwrap();
        assert!(log.0.lock().unwrap().is_empty());

        ram.write_slice(&[2; 64], GuestAddress(at + 8)).unwrap();
        ram.write_obj(7_u32, GuestAddress(at + 0xffc)).unwrap();
        ram.store(7_u16, GuestAddress(at), std::sync::atomic::Ordering::Release).unwrap();
        GuestMemoryBackend::get_slices(&*ram, GuestAddress(at - 4), 8).for_each(|s| s.unwrap().copy_from(&[0u8; 8]));
        ram.get_slice(GuestAddress(at), 16).unwrap().subslice(4, 4).unwrap().bitmap().mark_dirty(0, 2);
        let expected = [(at + 8, 64), (at + 0xffc, 4), (at, 2), (at - 4, 8), (at + 4, 2)];
        assert_eq!(*log.0.lock().unwrap(), expected);

        map.bitmap().release(FIRST, offset);
        ram.write_slice(&[2; 64], GuestAddress(at)).unwrap();
        assert_eq!(log.0.lock().unwrap().len(), expected.len());
    }

    #[test]
    fn owners_leave_with_their_last_reference() {
        let (ram, log) = ram();
        let (map, offset) = watch(&ram, 0x5000);
        assert!(!map.bitmap().hold(FIRST, offset));
        drop(log);
        ram.write_slice(&[2; 4], GuestAddress(0x5000)).unwrap();
        let again = Arc::new(Log::default());
        let owner: Arc<dyn CodeOwner> = again.clone();
        assert_eq!(map.bitmap().add_owner(0, Arc::downgrade(&owner)), Some(FIRST));
        ram.write_slice(&[2; 4], GuestAddress(0x5ffe)).unwrap();
        assert_eq!(*again.0.lock().unwrap(), [(0x5ffe, 4)]);
    }
    #[test]
    fn a_page_is_claimed_or_held_and_writers_are_not_told_of_their_own_writes() {
        let (ram, first) = ram();
        let (map, offset) = watch(&ram, (1 << 20) + 0x5000);
        let watch = map.bitmap();
        let second = Arc::new(Log::default());
        let owner: Arc<dyn CodeOwner> = second.clone();
        assert!(!watch.several());
        let other = watch.add_owner(1 << 20, Arc::downgrade(&owner)).unwrap();
        assert!(watch.several() && other != FIRST);

        assert!(watch.claim(FIRST, offset) && watch.claim(other, offset + 8));
        assert!(watch.hold(other, offset), "the first one's claim is seen");
        assert!(!watch.claim(FIRST, offset) && !watch.claim(other, offset), "nobody gets a held page");
        assert!(watch.claim(FIRST, offset + 4096));
        let asked = watch.withdraw(other, offset + 16);
        assert_eq!(asked.len(), 1);
        assert_eq!(*first.1.lock().unwrap(), [(1 << 20) + 0x5000]);
        assert!(second.1.lock().unwrap().is_empty());
        watch.disclaim(FIRST, offset);
        assert!(watch.withdraw(other, offset).is_empty());

        watch.written(other, offset + 1, 2);
        assert!(first.0.lock().unwrap().is_empty() && second.0.lock().unwrap().is_empty());
        watch.written(FIRST, offset + 1, 2);
        assert_eq!(*second.0.lock().unwrap(), [((1 << 20) + 0x5001, 2)]);
        assert!(first.0.lock().unwrap().is_empty());
        watch.release(other, offset);
        assert!(watch.claim(FIRST, offset));

        // An owner that is gone is nobody to wait for.
        drop((first, asked));
        assert!(watch.hold(other, offset));
        assert!(watch.withdraw(other, offset).is_empty());
        assert!(!watch.hold(other, offset), "its claim is gone, too");
    }

    #[test]
    fn one_owner_at_a_time_is_alone() {
        let (ram, first) = ram();
        let (map, _) = watch(&ram, 0);
        let watch = map.bitmap();
        let second = Arc::new(Log::default());
        let owner: Arc<dyn CodeOwner> = second.clone();
        let other = watch.add_owner(0, Arc::downgrade(&owner)).unwrap();
        assert_eq!(watch.others(FIRST).len(), 1);
        assert!(watch.try_alone(FIRST) && !watch.try_alone(other) && !watch.try_alone(FIRST));
        assert!(watch.another_is_alone(other) && !watch.another_is_alone(FIRST));
        watch.not_alone(other);
        assert!(watch.another_is_alone(other), "only its own");
        watch.not_alone(FIRST);
        assert!(!watch.another_is_alone(other) && watch.try_alone(other));
        drop(first);
        assert!(watch.others(other).is_empty());
    }

    #[test]
    fn there_is_room_for_64_owners() {
        let (ram, _first) = ram();
        let (map, _) = watch(&ram, 0);
        let all: Vec<Arc<dyn CodeOwner>> = (0..MAX_OWNERS).map(|_| Arc::new(Log::default()) as _).collect();
        let slots: Vec<_> = all.iter().map(|o| map.bitmap().add_owner(0, Arc::downgrade(o))).collect();
        assert!(slots[..MAX_OWNERS - 1].iter().all(Option::is_some));
        assert_eq!(slots[MAX_OWNERS - 1], None);
    }
}
