//! Code memory: the one door to executable pages.
//!
//! The translation cache is one memfd mapped twice, writable at one address and executable at another; no page is ever
//! both. Space is handed out in one direction and taken back all at once when it runs out, which is rare and cheap compared with
//! keeping free lists: hot code is translated again within milliseconds.
#![allow(unsafe_code)] // Mapping and writing code memory.

use crate::BtError;
use crate::asm::Asm;

/// Size of a huge page.
const HUGE: usize = 2 << 20;

/// The translation cache's memory.
pub(crate) struct CodeMemory {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    /// Where the cold region begins.
    split: usize,
    /// Next free places.
    hot: usize,
    cold: usize,
    /// Where the hot part begins that is not backed by huge pages yet. The cold part never is.
    small_hot: usize,
    /// Where copies are made.
    copy: Vec<u8>,
}

/// Where a block's two parts are in the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) hot: u32,
    pub(crate) cold: u32,
    hot_len: u32,
}

impl Placed {
    /// Cache offset of an offset in the block as it was assembled.
    pub(crate) fn offset(self, at: u32) -> u32 {
        if at < self.hot_len { self.hot + at } else { self.cold + at - self.hot_len }
    }

    /// How much further the cold part is from the hot one than it was when assembled.
    fn gap(self) -> u32 {
        self.cold - self.hot - self.hot_len
    }

    /// Whether a cache offset is in the hot part.
    pub(crate) fn is_hot(self, at: u32) -> bool {
        (self.hot..self.hot_end()).contains(&at)
    }

    /// Cache offset behind the hot part.
    pub(crate) fn hot_end(self) -> u32 {
        self.hot + self.hot_len
    }

    /// The offset in the block as it was assembled of a place in it.
    pub(crate) fn inverse(self, at: u32) -> u32 {
        if at >= self.cold { at - self.cold + self.hot_len } else { at - self.hot }
    }

    #[cfg(test)]
    pub(crate) fn new(hot: u32, hot_len: u32, cold: u32) -> Self {
        Self { hot, cold, hot_len }
    }
}

fn fail(what: &str) -> BtError {
    BtError::Host(format!("{what}: {}", std::io::Error::last_os_error()))
}

/// Reserves addresses, at a multiple of the size of huge pages.
fn reserve(len: usize) -> Option<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // Huge pages want addresses that are multiples of their size: reserve more, and give the rest back.
    // SAFETY: a fresh reservation, and parts of it given back.
    unsafe {
        let all = libc::mmap(std::ptr::null_mut(), len + HUGE, libc::PROT_NONE, flags, -1, 0);
        if all == libc::MAP_FAILED {
            return None;
        }
        let at = (all as usize).next_multiple_of(HUGE);
        let head = at - all as usize;
        if head > 0 {
            libc::munmap(all, head);
        }
        libc::munmap((at + len) as *mut libc::c_void, HUGE - head);
        Some(at as *mut libc::c_void)
    }
}

// SAFETY: the mappings are owned by this value and are not tied to a thread.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `len` bytes; pages are committed when first used.
    pub(crate) fn new(len: usize) -> Result<Self, BtError> {
        // SAFETY: the name is a valid C string; the descriptor is checked and closed below.
        let fd = unsafe { libc::memfd_create(c"paravane-tc".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(fail("the translation cache cannot be created"));
        }
        let len = len.next_multiple_of(HUGE);
        let map = |prot| {
            let at = reserve(len)?;
            // SAFETY: our own descriptor over our own reservation.
            let p = unsafe { libc::mmap(at, len, prot, libc::MAP_SHARED | libc::MAP_FIXED, fd, 0) };
            (p != libc::MAP_FAILED).then_some(p)
        };
        // SAFETY: `fd` is ours.
        let sized = unsafe { libc::ftruncate(fd, len as libc::off_t) } == 0;
        let views = map(libc::PROT_READ | libc::PROT_WRITE).zip(map(libc::PROT_READ | libc::PROT_EXEC));
        // SAFETY: `fd` is ours and no longer needed; the mappings keep the memory.
        unsafe { libc::close(fd) };
        Self::with_views(views.filter(|_| sized), len)
    }

    /// The same in memory without a file, which perf wants: it looks for the names of code in `/tmp/perf-PID.map` only if
    /// the code is in no file. The second view is a copy of the first one's mapping, which not every host can make.
    pub(crate) fn anonymous(len: usize) -> Result<Self, BtError> {
        let len = len.next_multiple_of(HUGE);
        let views = reserve(len).zip(reserve(len)).and_then(|(rw, rx)| {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: over our own reservations. Copying a shared mapping makes another view of the same memory.
            unsafe {
                let rw = libc::mmap(rw, len, prot, flags, -1, 0);
                if rw == libc::MAP_FAILED {
                    return None;
                }
                let to = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let rx = libc::mremap(rw, 0, len, to, rx);
                let made = rx != libc::MAP_FAILED && libc::mprotect(rx, len, libc::PROT_READ | libc::PROT_EXEC) == 0;
                made.then_some((rw, rx))
            }
        });
        Self::with_views(views, len)
    }

    fn with_views(views: Option<(*mut libc::c_void, *mut libc::c_void)>, len: usize) -> Result<Self, BtError> {
        let Some((rw, rx)) = views else {
            return Err(fail("the translation cache cannot be mapped (does this host forbid executable mappings?)"));
        };
        let split = (len / 2).next_multiple_of(HUGE);
        Ok(Self { rw: rw.cast(), rx: rx.cast(), len, split, hot: 0, cold: split, small_hot: 0, copy: Vec::new() })
    }

    /// Bytes in the cache.
    pub(crate) fn size(&self) -> usize {
        self.len
    }

    /// Address of an offset, as executed.
    pub(crate) fn address(&self, offset: u32) -> u64 {
        self.rx as u64 + u64::from(offset)
    }

    /// Offset of an executed address, if it lies in the cache.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u32> {
        let d = address.wrapping_sub(self.rx as u64);
        (d < self.len as u64).then_some(d as u32)
    }

    /// Places what `asm` holds, its hot and its cold part apart, so that code that runs is not diluted with code that
    /// rarely does. `None` when the cache is full.
    pub(crate) fn place(&mut self, asm: &mut Asm) -> Option<Placed> {
        let (hot, cold) = asm.parts();
        let at = self.room(hot.len(), cold.len())?;
        asm.resolve(i64::from(at.gap()));
        let (hot, cold) = asm.parts();
        self.put(at, hot, cold);
        Some(at)
    }

    /// Places a copy of a block of `len` bytes, as `change` leaves it; that is told how much further apart the copy's parts are.
    pub(crate) fn place_copy(&mut self, from: Placed, len: u32, change: impl FnOnce(&mut [u8], u32)) -> Option<Placed> {
        let (hot_len, len) = (from.hot_len as usize, len as usize);
        let at = self.room(hot_len, len - hot_len)?;
        let mut code = std::mem::take(&mut self.copy);
        code.clear();
        for (start, n) in [(from.hot, hot_len), (from.cold, len - hot_len)] {
            assert!(start as usize + n <= self.len, "a block lies within the translation cache");
            // SAFETY: in bounds of the writable view as just checked; only this vCPU's thread writes to it.
            code.extend_from_slice(unsafe { std::slice::from_raw_parts(self.rw.add(start as usize), n) });
        }
        change(&mut code, at.gap().wrapping_sub(from.gap()));
        let (hot, cold) = code.split_at(hot_len);
        self.put(at, hot, cold);
        self.copy = code;
        Some(at)
    }

    /// Where the next block goes, if there is room for it.
    fn room(&mut self, hot_len: usize, cold_len: usize) -> Option<Placed> {
        if self.hot + hot_len > self.split || self.cold + cold_len > self.len {
            return None;
        }
        while self.small_hot < (self.hot + hot_len).min(self.split) {
            self.make_huge(self.small_hot);
            self.small_hot += HUGE;
        }
        Some(Placed { hot: self.hot as u32, cold: self.cold as u32, hot_len: hot_len as u32 })
    }

    /// Puts a block where there is room for it.
    fn put(&mut self, at: Placed, hot: &[u8], cold: &[u8]) {
        // SAFETY: `room` has checked that both ranges lie within the writable view, which nothing else refers to.
        unsafe {
            std::ptr::copy_nonoverlapping(hot.as_ptr(), self.rw.add(at.hot as usize), hot.len());
            std::ptr::copy_nonoverlapping(cold.as_ptr(), self.rw.add(at.cold as usize), cold.len());
        }
        self.hot = (self.hot + hot.len() + 15) & !15;
        self.cold += cold.len();
    }

    /// Backs 2 MiB with a huge page, if the host can. Translated code is large: with small pages, misses of the
    /// instruction TLB cost a program of any size half its speed. Most hosts grant memory files no huge pages when they are
    /// touched, whatever the advice, but do grant them to a request.
    fn make_huge(&mut self, at: usize) {
        const MADV_COLLAPSE: libc::c_int = 25;
        // SAFETY: within our own mappings, `at` being a multiple of 2 MiB below `len`. The first page must exist; its first
        // byte is written back as it is. A refusal (before Linux 6.1, no memory) leaves small pages.
        unsafe {
            let first = self.rw.add(at);
            first.write_volatile(first.read_volatile());
            for view in [self.rw, self.rx] {
                libc::madvise(view.add(at).cast(), HUGE, MADV_COLLAPSE);
            }
        }
    }

    /// Whether an offset lies in the cold part.
    pub(crate) fn is_cold(&self, offset: u32) -> bool {
        offset as usize >= self.split
    }

    /// Points the 32-bit displacement at `at` to `target`.
    pub(crate) fn patch(&mut self, at: u32, target: u32) {
        assert!(at as usize + 4 <= self.len, "a patch lies within the translation cache");
        let d = (i64::from(target) - i64::from(at) - 4) as i32;
        // SAFETY: in bounds as just checked; only this vCPU's thread runs or writes this code.
        unsafe { self.rw.add(at as usize).cast::<i32>().write_unaligned(d) };
    }

    /// Forgets all code and gives its pages back to the host.
    pub(crate) fn clear(&mut self) {
        (self.hot, self.cold) = (0, self.split);
        self.small_hot = 0;
        // SAFETY: the whole of our own shared mapping; its content is no longer needed.
        unsafe { libc::madvise(self.rw.cast(), self.len, libc::MADV_REMOVE) };
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and no code of this cache can be running any more.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}
