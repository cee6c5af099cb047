//! The memory balloon (virtio 1.2, section 5.5): the guest gives pages back to the host.
//!
//! Two ways. The *balloon* proper has a target: the driver takes so many pages from the guest and names them (inflate), or takes some
//! back (deflate), also by itself when the guest runs out of memory, if that was negotiated. *Free page reporting* needs no target: the driver names runs of
//! pages that nobody uses at the moment; the guest may use them again at any time and finds zeroes there.
//!
//! Either way the host frees the memory behind the page (MADV_REMOVE on the file that is guest RAM). That changes what is
//! read there, so it is a write as far as translated code is concerned.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use paravane_ram::{GuestRam, WatchSlice};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::lock;
use crate::{ActivateError, Activation, Chain, Device, DeviceId, Queue, Signal, Stop, Wake, Worker, read_config};

const QUEUE_SIZE: u16 = 128;
const PAGE: u64 = 4096;
/// Page numbers of one request: Linux sends 256. More are looked at in the next rounds of this size.
const BATCH: usize = 1024;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Behind the two comes whatever queue there is of the optional ones.
const REPORTING: u16 = 2;

#[derive(Default)]
struct State {
    /// Pages that the guest is to give.
    target: AtomicU32,
    /// Pages that it says it has given.
    actual: AtomicU32,
    /// Bytes that went back to the host so far.
    returned: AtomicU64,
    signal: Mutex<Option<Signal>>,
}

/// What is known of a balloon, and the way to change its target, from any thread.
#[derive(Clone)]
pub struct BalloonControl(Arc<State>);

impl BalloonControl {
    /// Sets how much memory the guest is to give, in bytes (whole pages, at most 16 TiB), and tells the driver.
    pub fn set_target(&self, bytes: u64) {
        self.0.target.store(u32::try_from(bytes / PAGE).unwrap_or(u32::MAX), SeqCst);
        if let Some(signal) = &*lock(&self.0.signal) {
            signal.config_changed();
        }
    }

    /// How much the guest is to give, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(SeqCst)) * PAGE
    }

    /// How much it has given by way of the balloon, as it says itself, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(SeqCst)) * PAGE
    }

    /// Bytes that went back to the host so far, by balloon or report, some perhaps more than once.
    pub fn returned(&self) -> u64 {
        self.0.returned.load(SeqCst)
    }
}

/// The balloon device.
pub struct Balloon {
    state: Arc<State>,
    features: u64,
    worker: Option<Worker>,
}

impl Balloon {
    /// A balloon with a target in bytes. `deflate_on_oom`: the guest may take pages back when it runs out; `reporting`: it reports free
    /// pages.
    pub fn new(target: u64, deflate_on_oom: bool, reporting: bool) -> Self {
        let state = Arc::new(State::default());
        state.target.store(u32::try_from(target / PAGE).unwrap_or(u32::MAX), SeqCst);
        let oom = if deflate_on_oom { F_DEFLATE_ON_OOM } else { 0 };
        Self { state, features: oom | if reporting { F_REPORTING } else { 0 }, worker: None }
    }

    /// The way to it.
    pub fn control(&self) -> BalloonControl {
        BalloonControl(self.state.clone())
    }
}

impl Device for Balloon {
    fn id(&self) -> DeviceId {
        DeviceId::Balloon
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; if self.features & F_REPORTING != 0 { 3 } else { 2 }]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut c = [0; 8];
        c[..4].copy_from_slice(&self.state.target.load(SeqCst).to_le_bytes());
        c[4..].copy_from_slice(&self.state.actual.load(SeqCst).to_le_bytes());
        read_config(&c, offset, data);
    }
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        if offset == 4
            && let Ok(bytes) = data.try_into()
        {
            self.state.actual.store(u32::from_le_bytes(bytes), SeqCst);
        }
    }
    fn activate(&mut self, mut with: Activation) -> Result<(), ActivateError> {
        let (inflate, deflate) = (with.take(INFLATE)?, with.take(DEFLATE)?);
        let reporting = if with.has(F_REPORTING) { Some(with.take(REPORTING)?) } else { None };
        *lock(&self.state.signal) = Some(with.signal.clone());
        let state = self.state.clone();
        let queues = [Some(inflate), Some(deflate), reporting];
        self.worker = Some(Worker::start("virtio-balloon", move |stop| run(stop, queues, &state))?);
        Ok(())
    }
    fn reset(&mut self) {
        self.worker = None;
        *lock(&self.state.signal) = None;
        self.state.actual.store(0, SeqCst);
    }
}

fn run(stop: &Stop, mut queues: [Option<Queue>; 3], state: &State) {
    loop {
        for queue in queues.iter_mut().flatten() {
            queue.bell().clear();
            let (index, mem) = (queue.index(), queue.mem().clone());
            let fine = queue.serve_or_fail(|chain| {
                let returned = match index {
                    INFLATE => inflate(chain, &mem),
                    REPORTING => chain.writable().map(|part| give_back(&part)).sum(),
                    // Deflated pages come back by themselves when they are touched.
                    _ => 0,
                };
                state.returned.fetch_add(returned, SeqCst);
                (!stop.requested()).then_some(0)
            });
            if !fine {
                return;
            }
        }
        let fds: Vec<_> = queues.iter().flatten().map(AsFd::as_fd).collect();
        if stop.wait(&fds) != Wake::Ready {
            return;
        }
    }
}

/// Gives the pages back that a chain names by number, runs of consecutive ones at once; numbers of no RAM are nobody's
/// loss but the guest's. Gives the bytes.
fn inflate(chain: &mut Chain, mem: &GuestRam) -> u64 {
    let mut returned = 0;
    let mut bytes = [0; 4 * BATCH];
    loop {
        let n = chain.read(&mut bytes) / 4;
        if n == 0 {
            return returned;
        }
        let mut numbers: Vec<u64> =
            bytes[..4 * n].chunks_exact(4).map(|b| b.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            let (start, len) = (run[0] * PAGE, run.len() as u64 * PAGE);
            match mem.get_slice(GuestAddress(start), len as usize) {
                Ok(part) => returned += give_back(&part),
                // A part of the run may be RAM.
                Err(_) => {
                    for n in run {
                        if let Ok(part) = mem.get_slice(GuestAddress(n * PAGE), PAGE as usize) {
                            returned += give_back(&part);
                        }
                    }
                }
            }
        }
    }
}

/// Frees the memory behind all whole pages of a piece of guest RAM; gives the bytes.
#[allow(unsafe_code)] // madvise(2)
fn give_back(part: &VolatileSlice<'_, WatchSlice<'_>>) -> u64 {
    let guard = part.ptr_guard_mut();
    let start = guard.as_ptr() as usize;
    let first = start.next_multiple_of(PAGE as usize);
    let end = (start + part.len()) & !(PAGE as usize - 1);
    if first >= end {
        return 0;
    }
    let len = end - first;
    // SAFETY: whole pages of guest RAM, which stay mapped; their contents are the guest's, which gave them up. Private memory, as in tests,
    // knows no MADV_REMOVE.
    let done = unsafe {
        libc::madvise(first as *mut libc::c_void, len, libc::MADV_REMOVE) == 0
            || libc::madvise(first as *mut libc::c_void, len, libc::MADV_DONTNEED) == 0
    };
    part.bitmap().mark_dirty(first - start, len);
    if done { len as u64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{Driver, activate, eventually, ram};

    fn drivers() -> Vec<Driver> {
        let mem = ram();
        (0..3).map(|n| Driver::new(&mem, 0x1_0000 * (n + 1), 16)).collect()
    }

    #[test]
    fn pages_named_or_reported_go_back_to_the_host() {
        let mut balloon = Balloon::new(64 << 20, true, true);
        let control = balloon.control();
        assert_eq!((balloon.features(), balloon.queue_sizes().len()), (F_DEFLATE_ON_OOM | F_REPORTING, 3));
        let mut d = drivers();
        let (signal, count) = activate(&mut balloon, &d.iter().collect::<Vec<_>>(), F_REPORTING);
        for page in 0..16u64 {
            d[0].put(0x30_0000 + page * PAGE, 0x5555_5555u32);
        }
        // Two runs, one page twice, and numbers of no RAM at all.
        for (n, page) in [0x301u32, 0x300, 0x303, 0x303, 0x120, 0xffff_ffff].iter().enumerate() {
            d[0].put(0x2000 + 4 * n as u64, *page);
        }
        d[0].chain(0, &[(0x2000, 24, false)]);
        d[0].offer(0);
        assert_eq!(d[0].wait(), (0, 0));
        let seen: Vec<u32> = (0..5).map(|n| d[0].get(0x30_0000 + n * PAGE)).collect();
        assert_eq!(seen, [0, 0, 0x5555_5555, 0, 0x5555_5555]);
        assert_eq!(control.returned(), 3 * PAGE);
        d[1].chain(0, &[(0x2000, 24, false)]);
        d[1].offer(0);
        assert_eq!(d[1].wait(), (0, 0));
        // A report: only whole pages go.
        d[2].chain(0, &[(0x30_5000, 0x2000, true), (0x30_8800, 0x1000, true), (0x30_a000, 100, true)]);
        d[2].offer(0);
        assert_eq!(d[2].wait(), (0, 0));
        let seen: Vec<bool> = (4..11).map(|n| d[0].get::<u32>(0x30_0000 + n * PAGE) != 0).collect();
        assert_eq!(seen, [true, false, false, true, true, true, true]);
        assert_eq!(control.returned(), 5 * PAGE);
        // Target and answer.
        let mut word = [0; 8];
        balloon.config_read(0, &mut word);
        assert_eq!(word, [0, 0x40, 0, 0, 0, 0, 0, 0]);
        balloon.config_write(4, &7u32.to_le_bytes());
        balloon.config_write(0, &9u32.to_le_bytes());
        control.set_target(3 << 20);
        balloon.config_read(0, &mut word);
        assert_eq!((word, control.actual()), ([0, 3, 0, 0, 7, 0, 0, 0], 7 * PAGE));
        assert_eq!(count.config.load(SeqCst), 1, "the driver is told of a new target");
        d[0].chain(0, &[(0x2000, 24, false), (1 << 30, 4, false)]);
        d[0].offer(0);
        eventually("a bad chain asks for a reset", || signal.waits_for_reset());
    }

    #[test]
    fn what_is_given_back_counts_as_written() {
        use paravane_ram::CodeOwner;
        use vm_memory::GuestMemoryRegion;
        #[derive(Default)]
        struct Log(Mutex<Vec<(u64, u64)>>);
        impl CodeOwner for Log {
            fn written(&self, gpa: u64, len: u64) {
                lock(&self.0).push((gpa, len));
            }
            fn withdraw(&self, _page: u64) -> u64 {
                0
            }
            fn withdrawn(&self, _ticket: u64) -> bool {
                true
            }
        }
        let mut d = drivers();
        let log = Arc::new(Log::default());
        let owner: Arc<dyn CodeOwner> = log.clone();
        let region = d[0].mem.find_region(GuestAddress(0x30_0000)).unwrap();
        let map = region.get_mmap();
        let slot = map.bitmap().add_owner(region.start_addr().0, Arc::downgrade(&owner)).unwrap();
        let _ = map.bitmap().hold(slot, 0x30_0000 - region.start_addr().0);
        let mut balloon = Balloon::new(0, false, false);
        activate(&mut balloon, &[&d[0], &d[1]], 0);
        d[0].put(0x2000, 0x300u32);
        d[0].chain(0, &[(0x2000, 4, false)]);
        d[0].offer(0);
        d[0].wait();
        assert_eq!(*lock(&log.0), [(0x30_0000, PAGE)]);
    }
}
