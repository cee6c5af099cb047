//! The block device (virtio 1.2, section 5.2).
//!
//! Each queue has a worker. It carries out what the host can do without waiting for a disk (reads from the page cache, writes into it)
//! itself, for a hand-over to another thread costs more than that; the rest (reads that have to wait, flushes,
//! discards) goes to a small pool, so that one slow request does not hold up the queue. Requests complete in any order, as the
//! specification allows: a driver that needs an order waits for completions.
//!
//! A write is in the host's page cache when it completes, so it survives the end of this process, however that comes; a
//! flush makes it survive the host's.

pub mod image;
mod pool;
mod request;
#[cfg(test)]
mod tests;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use crate::{ActivateError, Activation, Device, DeviceId, Queue, Stop, Wake, Worker, read_config};
use image::{Image, SECTOR};
use pool::Pool;
use request::{Request, Work};

const QUEUE_SIZE: u16 = 256;
/// Most queues.
pub const MAX_QUEUES: u16 = 16;
/// Length of a serial number.
pub const SERIAL_LEN: usize = 20;
/// Threads for what waits, for the whole device.
const POOL_THREADS: usize = 4;
/// Most sectors of one discard or write-zeroes segment: 1 GiB, so that none keeps a thread for long.
const MAX_SEGMENT_SECTORS: u32 = 1 << 21;
/// Most segments of one request.
const MAX_SEGMENTS: u32 = 32;

/// Feature bits (section 5.2.3).
mod bit {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// What a disk is to the guest.
#[derive(Clone, Debug, Default)]
pub struct BlockOptions {
    /// The guest may only read.
    pub readonly: bool,
    /// Serial number, cut at [`SERIAL_LEN`] bytes.
    pub serial: String,
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
}

/// What all threads of a disk share.
struct Disk {
    image: Box<dyn Image>,
    readonly: bool,
    serial: [u8; SERIAL_LEN],
}

/// A block device.
pub struct Block {
    disk: Arc<Disk>,
    queues: u16,
    workers: Vec<Worker>,
    pool: Option<Pool>,
}

impl Block {
    /// A disk with these contents.
    pub fn new(image: Box<dyn Image>, options: &BlockOptions) -> Self {
        let mut serial = [0; SERIAL_LEN];
        let n = options.serial.len().min(SERIAL_LEN);
        serial[..n].copy_from_slice(&options.serial.as_bytes()[..n]);
        let disk = Disk { image, readonly: options.readonly, serial };
        Self { disk: Arc::new(disk), queues: options.queues.clamp(1, MAX_QUEUES), workers: Vec::new(), pool: None }
    }

    fn config(&self) -> [u8; 60] {
        let mut c = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.image.size() / SECTOR).to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        c
    }
}

impl Device for Block {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }

    fn features(&self) -> u64 {
        let queues = if self.queues > 1 { bit::MQ } else { 0 };
        let writing = if self.disk.readonly { bit::RO } else { bit::DISCARD | bit::WRITE_ZEROES };
        bit::SEG_MAX | bit::BLK_SIZE | bit::FLUSH | queues | writing
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let pool = Pool::start(POOL_THREADS)?;
        for queue in with.queues {
            let (disk, jobs) = (self.disk.clone(), pool.jobs());
            let name = format!("virtio-blk{}", queue.index());
            let lane = Arc::new(Lane { queue: Mutex::new(queue), disk, in_pool: AtomicU16::new(0) });
            self.workers.push(Worker::start(&name, move |stop| lane.run(stop, &jobs))?);
        }
        self.pool = Some(pool);
        Ok(())
    }

    fn reset(&mut self) {
        // Workers first: nothing new reaches the pool then.
        self.workers.clear();
        self.pool = None;
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}

/// A queue and its disk, shared between the queue's worker and the pool.
struct Lane {
    queue: Mutex<Queue>,
    disk: Arc<Disk>,
    /// Requests in the pool.
    in_pool: AtomicU16,
}

impl Lane {
    fn run(self: &Arc<Self>, stop: &Stop, jobs: &pool::Jobs) {
        let bell = crate::devices::lock(&self.queue).bell().clone();
        loop {
            bell.clear();
            if self.serve(stop, jobs).is_err() {
                crate::devices::lock(&self.queue).driver().needs_reset();
                return;
            }
            if stop.wait(&[bell.as_fd()]) != Wake::Ready {
                return;
            }
        }
    }

    /// Takes all that is offered. The lock is free while a request is carried out, so that the pool can complete others.
    fn serve(self: &Arc<Self>, stop: &Stop, jobs: &pool::Jobs) -> Result<(), crate::QueueError> {
        let queue = || crate::devices::lock(&self.queue);
        loop {
            queue().disable_notifications()?;
            let mut taken = 0u32;
            loop {
                let Some(chain) = queue().pop()? else { break };
                let mut request = Request::parse(chain).map_err(|_| crate::QueueError::Buffer)?;
                match request.begin(&self.disk) {
                    Work::Done => queue().complete(request.head(), request.written())?,
                    Work::Waits => {
                        // More than there are descriptors: the guest offers again what it has not got back.
                        if self.in_pool.fetch_add(1, SeqCst) >= QUEUE_SIZE {
                            return Err(crate::QueueError::AvailableIndex);
                        }
                        let me = self.clone();
                        jobs.push(Box::new(move || me.finish(request)));
                    }
                }
                taken += 1;
                if taken.is_multiple_of(u32::from(QUEUE_SIZE)) {
                    // A guest that never stops asking gets its answers, and does not keep this thread from its end.
                    queue().signal()?;
                    if stop.requested() {
                        return Ok(());
                    }
                }
            }
            let mut q = queue();
            q.signal()?;
            if !q.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// Carries out a request in the pool.
    fn finish(&self, mut request: Request) {
        request.carry_out(&self.disk);
        self.in_pool.fetch_sub(1, SeqCst);
        let mut q = crate::devices::lock(&self.queue);
        if q.complete(request.head(), request.written()).and_then(|()| q.signal()).is_err() {
            q.driver().needs_reset();
        }
    }
}
