//! Guest RAM as all parts of the hypervisor share it, and how a write by a device reaches those who keep something
//! made from the page.
//!
//! Binary translation keeps code that was made from guest pages. Stores by the guest itself are caught by the engine's
//! soft TLB; stores by a device come from another thread and know nothing of that. They do go through `vm-memory`,
//! which tells a region's bitmap of every write after it was made. [`WriteWatch`] is that bitmap: one counter per page of how many
//! engines hold code made from it. A write to a page whose counter is zero costs a fence and a byte load; any other
//! is reported to the [`CodeOwner`]s.
//!
//! Nothing is missed: an engine counts itself in ([`WriteWatch::hold`]) *before* it reads the bytes that it
//! translates, and a writer looks at the counter *after* it has written, both with full fences. So either the writer sees the counter,
//! or the engine sees the new bytes.
//!
//! Whoever writes to guest RAM by raw pointer (a read into guest memory by the host's kernel, memory handed
//! back to the host) must say so with [`vm_memory::bitmap::Bitmap::mark_dirty`] afterwards.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// Guest RAM, shared by vCPUs and devices.
pub type GuestRam = Arc<GuestMemoryMmap<WriteWatch>>;

const PAGE_SHIFT: u32 = 12;

/// Somebody who keeps what was made from guest pages.
pub trait CodeOwner: Send + Sync {
    /// Bytes were written at a guest-physical address, in pages that somebody holds. Called on the writer's thread after the
    /// write and before anybody can be told of it; must not block. When it returns, the owner must be unable to run what
    /// it made from the old bytes beyond the next point where it looks at events.
    fn written(&self, gpa: u64, len: u64);
}

struct Owner {
    /// Guest-physical address of the region.
    start: u64,
    owner: Weak<dyn CodeOwner>,
}

#[derive(Default)]
struct Inner {
    /// Per page, how many owners hold it.
    held: Box<[AtomicU8]>,
    owners: Mutex<Vec<Owner>>,
}

impl Inner {
    fn written(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        fence(SeqCst);
        let last = offset.saturating_add(len - 1) >> PAGE_SHIFT;
        let pages = self.held.get(offset >> PAGE_SHIFT..self.held.len().min(last + 1)).unwrap_or_default();
        if pages.iter().any(|held| held.load(SeqCst) != 0) {
            self.tell(offset, len);
        }
    }

    #[cold]
    fn tell(&self, offset: usize, len: usize) {
        for o in &*self.owners.lock().unwrap_or_else(PoisonError::into_inner) {
            if let Some(owner) = o.owner.upgrade() {
                owner.written(o.start + offset as u64, len as u64);
            }
        }
    }
}

/// One region's watch; see the module text. Clones share it.
#[derive(Clone, Default)]
pub struct WriteWatch(Arc<Inner>);

impl WriteWatch {
    /// Registers an owner, for as long as it lives. `start` is the region's guest-physical address.
    pub fn add_owner(&self, start: u64, owner: Weak<dyn CodeOwner>) {
        let mut owners = self.0.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|o| o.owner.strong_count() > 0);
        owners.push(Owner { start, owner });
    }

    /// An owner is about to read a page, given by an offset in the region, and keep what it makes from it.
    pub fn hold(&self, offset: u64) {
        if let Some(held) = self.0.held.get((offset >> PAGE_SHIFT) as usize) {
            held.fetch_add(1, SeqCst);
        }
    }

    /// The owner keeps nothing of the page any more.
    pub fn release(&self, offset: u64) {
        if let Some(held) = self.0.held.get((offset >> PAGE_SHIFT) as usize) {
            held.fetch_sub(1, SeqCst);
        }
    }
}

impl fmt::Debug for WriteWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteWatch({} pages)", self.0.held.len())
    }
}

impl<'a> WithBitmapSlice<'a> for WriteWatch {
    type S = WatchSlice<'a>;
}

impl Bitmap for WriteWatch {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.written(offset, len);
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
        let held = (0..len.div_ceil(1 << PAGE_SHIFT)).map(|_| AtomicU8::new(0)).collect();
        Self(Arc::new(Inner { held, owners: Mutex::default() }))
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
        self.watch.written(self.base.saturating_add(offset), len);
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

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, u64)>>);

    impl CodeOwner for Log {
        fn written(&self, gpa: u64, len: u64) {
            self.0.lock().unwrap().push((gpa, len));
        }
    }

    fn ram() -> (GuestRam, Arc<Log>) {
        let parts = [(GuestAddress(0), 1 << 16), (GuestAddress(1 << 20), 1 << 16)];
        let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&parts).unwrap());
        let log = Arc::new(Log::default());
        for region in ram.iter() {
            let owner: Arc<dyn CodeOwner> = log.clone();
            region.get_mmap().bitmap().add_owner(region.start(), Arc::downgrade(&owner));
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
        map.bitmap().hold(offset);
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

        map.bitmap().release(offset);
        ram.write_slice(&[2; 64], GuestAddress(at)).unwrap();
        assert_eq!(log.0.lock().unwrap().len(), expected.len());
    }

    #[test]
    fn owners_leave_with_their_last_reference() {
        let (ram, log) = ram();
        let (map, offset) = watch(&ram, 0x5000);
        map.bitmap().hold(offset);
        drop(log);
        ram.write_slice(&[2; 4], GuestAddress(0x5000)).unwrap();
        let again = Arc::new(Log::default());
        let owner: Arc<dyn CodeOwner> = again.clone();
        map.bitmap().add_owner(0, Arc::downgrade(&owner));
        ram.write_slice(&[2; 4], GuestAddress(0x5ffe)).unwrap();
        assert_eq!(*again.0.lock().unwrap(), [(0x5ffe, 4)]);
    }
}
