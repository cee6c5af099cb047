//! Memory for devices, pages of a static array that are mapped one to one, and a heap for their drivers.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use guest_rt::Page;
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

const POOL: usize = 256;
static mut PAGES: [Page; POOL] = [const { Page::ZERO }; POOL];
static TAKEN: [AtomicBool; POOL] = [const { AtomicBool::new(false) }; POOL];

/// The pool, as drivers ask for it.
pub(crate) struct Memory;

// SAFETY: no page is given out twice, and each is zeroed when it is; addresses are the same for guest and device.
unsafe impl Hal for Memory {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let free = |first: &usize| TAKEN[*first..*first + pages].iter().all(|t| !t.load(Relaxed));
        let first = (0..=POOL - pages).find(free).expect("there is memory for a few queues");
        TAKEN[first..first + pages].iter().for_each(|t| t.store(true, Relaxed));
        // SAFETY: in bounds, and nobody else has these pages.
        let at = unsafe {
            let at = (&raw mut PAGES).cast::<Page>().add(first);
            at.write_bytes(0, pages);
            at
        };
        (at as u64, NonNull::new(at.cast()).expect("not at 0"))
    }
    unsafe fn dma_dealloc(paddr: PhysAddr, _vaddr: NonNull<u8>, pages: usize) -> i32 {
        let first = (paddr - &raw const PAGES as u64) as usize / 4096;
        TAKEN[first..first + pages].iter().for_each(|t| t.store(false, Relaxed));
        0
    }
    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        assert!(paddr + size as u64 <= 1 << 32, "4 GiB are mapped");
        NonNull::new(paddr as *mut u8).expect("not at 0")
    }
    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as u64
    }
    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// Bytes of the heap.
const HEAP: usize = 1 << 20;

#[repr(align(4096))]
struct Heap(#[allow(dead_code, reason = "reached through its address")] [u8; HEAP]);
static mut BYTES: Heap = Heap([0; HEAP]);
static USED: AtomicUsize = AtomicUsize::new(0);

/// A heap that only grows: the guest does its work and ends.
struct Bump;

// SAFETY: every piece lies in the static array, is aligned, and is given out once.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = USED.load(Relaxed).next_multiple_of(layout.align().min(4096));
        if layout.align() > 4096 || start + layout.size() > HEAP {
            return core::ptr::null_mut();
        }
        USED.store(start + layout.size(), Relaxed);
        // SAFETY: in bounds, which was just checked.
        unsafe { (&raw mut BYTES).cast::<u8>().add(start) }
    }
    unsafe fn dealloc(&self, _at: *mut u8, _layout: Layout) {}
}

#[global_allocator]
static BUMP: Bump = Bump;
