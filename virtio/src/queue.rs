//! A split virtqueue (virtio 1.2, section 2.7) as a device uses it.
//!
//! The ring indices are `virtio-queue`'s; walking descriptors is [`crate::Chain`]'s. The guest can write to all of it at any time, so
//! nothing read from memory is read twice, and nothing is believed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use paravane_ram::GuestRam;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::{Chain, Doorbell, Signal, feature};

/// What a guest can do wrong with a queue. A device that meets one stops serving and calls [`Signal::needs_reset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, no power of two, or above the largest (section 2.7).
    #[error("a queue of {0} entries is not possible")]
    Size(u16),
    /// A part of the ring is misaligned or not in RAM.
    #[error("a queue's rings are not in RAM or misaligned")]
    Ring,
    /// The available index is further ahead than the queue is long (section 2.7.6).
    #[error("the guest offers more buffers than its queue holds")]
    AvailableIndex,
    /// A descriptor index is not below the table's size.
    #[error("a descriptor index is out of range")]
    DescriptorIndex,
    /// A chain is longer than its table: it loops (section 2.7.5.1).
    #[error("a descriptor chain loops or is too long")]
    TooLong,
    /// All buffers of a chain together exceed 4 GiB (section 2.7.5).
    #[error("a descriptor chain holds more than 4 GiB")]
    TooLarge,
    /// An indirect table was not negotiated, is nested, has both flags, or has no whole number of descriptors (section 2.7.5.3).
    #[error("an indirect descriptor table is malformed")]
    Indirect,
    /// A device-readable buffer follows a device-writable one (section 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer, wholly or partly, is not in RAM.
    #[error("a buffer is not in RAM")]
    Buffer,
}

/// Where a queue is, as the driver has told the transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Largest size.
    pub max_size: u16,
    /// Size in use.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring ("driver area").
    pub available: u64,
    /// Of the used ring ("device area").
    pub used: u64,
}

impl QueueSetup {
    /// A queue after reset.
    pub fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, ..Self::default() }
    }
}

/// A queue in use.
pub struct Queue {
    index: u16,
    ring: virtio_queue::Queue,
    mem: GuestRam,
    bell: Arc<Doorbell>,
    signal: Signal,
    indirect: bool,
    event_idx: bool,
    /// The used index when the driver was last told of it.
    signalled: u16,
}

impl Queue {
    /// Checks a set-up and makes the queue.
    ///
    /// # Errors
    /// [`QueueError::Size`] and [`QueueError::Ring`].
    pub fn new(
        index: u16,
        setup: &QueueSetup,
        features: u64,
        mem: GuestRam,
        bell: Arc<Doorbell>,
        signal: Signal,
    ) -> Result<Self, QueueError> {
        let mut ring = virtio_queue::Queue::new(setup.max_size).map_err(|_| QueueError::Size(setup.max_size))?;
        ring.try_set_size(setup.size).map_err(|_| QueueError::Size(setup.size))?;
        ring.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(|_| QueueError::Ring)?;
        ring.try_set_avail_ring_address(GuestAddress(setup.available)).map_err(|_| QueueError::Ring)?;
        ring.try_set_used_ring_address(GuestAddress(setup.used)).map_err(|_| QueueError::Ring)?;
        let event_idx = features & feature::EVENT_IDX != 0;
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        // A ring at the very end of the address space must not wrap in any sum below.
        let end = u64::MAX - (1 << 20);
        if [setup.descriptors, setup.available, setup.used].iter().any(|&at| at > end) || !ring.is_valid(&*mem) {
            return Err(QueueError::Ring);
        }
        let indirect = features & feature::INDIRECT != 0;
        Ok(Self { index, ring, mem, bell, signal, indirect, event_idx, signalled: 0 })
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Rung when the driver notifies.
    pub fn bell(&self) -> &Arc<Doorbell> {
        &self.bell
    }

    /// Guest memory.
    pub fn mem(&self) -> &GuestRam {
        &self.mem
    }

    /// The way to the driver.
    pub fn driver(&self) -> &Signal {
        &self.signal
    }

    /// Takes the next chain that the driver offers; `None` when there is none now.
    ///
    /// # Errors
    /// What the guest did wrong. The queue is of no use any more then.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let (table, size) = (self.ring.desc_table(), self.ring.size());
        let head = {
            let mut offered = self.ring.iter(&*self.mem).map_err(|e| match e {
                virtio_queue::Error::InvalidAvailRingIndex => QueueError::AvailableIndex,
                _ => QueueError::Ring,
            })?;
            let Some(chain) = offered.next() else { return Ok(None) };
            chain.head_index()
        };
        Chain::walk(&self.mem, table, size, head, self.indirect).map(Some)
    }

    /// Puts the last chain that was taken back, to be taken again.
    pub fn put_back(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with the number of bytes written to it.
    ///
    /// # Errors
    /// [`QueueError::DescriptorIndex`] for a chain of some other queue.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.complete_all(&[(head, written)])
    }

    /// Gives several chains back at once: the driver sees none of them or all. A frame that is spread over several
    /// buffers needs that (section 5.1.6.4).
    ///
    /// # Errors
    /// [`QueueError::DescriptorIndex`] for a chain of some other queue.
    pub fn complete_all(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let (used, mut next) = (self.ring.used_ring(), self.ring.next_used());
        for &(head, written) in chains {
            if head >= self.ring.size() {
                return Err(QueueError::DescriptorIndex);
            }
            // Flags and index come first; an element is a head and a length of four bytes each (section 2.7.8).
            let element = used + 4 + 8 * u64::from(next % self.ring.size());
            let value = u64::from(head).to_le() | (u64::from(written) << 32).to_le();
            self.mem.write_obj(value, GuestAddress(element)).map_err(|_| QueueError::Ring)?;
            next = next.wrapping_add(1);
        }
        self.ring.set_next_used(next);
        self.mem.store(next.to_le(), GuestAddress(used + 2), Ordering::Release).map_err(|_| QueueError::Ring)
    }

    /// Interrupts the driver if it wants to know of what was completed since the last time.
    ///
    /// # Errors
    /// Never for rings in RAM.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        // The driver says what it wants, then looks at the used ring; we wrote that ring before we look at what it says.
        std::sync::atomic::fence(Ordering::SeqCst);
        let available = self.ring.avail_ring();
        let read = |at| self.mem.load::<u16>(GuestAddress(at), Ordering::Relaxed).map_err(|_| QueueError::Ring);
        let (new, old) = (self.ring.next_used(), self.signalled);
        self.signalled = new;
        let wanted = if self.event_idx {
            // used_event follows the ring; an interrupt is due when the index has passed it (section 2.7.10).
            let event = u16::from_le(read(available + 4 + 2 * u64::from(self.ring.size()))?);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            // VIRTQ_AVAIL_F_NO_INTERRUPT (section 2.7.7).
            new != old && u16::from_le(read(available)?) & 1 == 0
        };
        if wanted {
            self.signal.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to notify while the queue is being served.
    ///
    /// # Errors
    /// Never for rings in RAM.
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.ring.disable_notification(&*self.mem).map_err(|_| QueueError::Ring)
    }

    /// Asks the driver to notify again. True when it has offered more meanwhile, of which it will not notify.
    ///
    /// # Errors
    /// Never for rings in RAM.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.ring.enable_notification(&*self.mem).map_err(|_| QueueError::Ring)
    }

    /// Serves all that the driver offers, with notifications off meanwhile. `serve` gives the number of bytes it wrote, or `None` to
    /// leave the chain, and all behind it, for later.
    ///
    /// # Errors
    /// What the guest did wrong.
    pub fn serve(&mut self, mut serve: impl FnMut(&mut Chain) -> Option<u32>) -> Result<(), QueueError> {
        loop {
            self.disable_notifications()?;
            let mut left = false;
            while let Some(mut chain) = self.pop()? {
                let Some(written) = serve(&mut chain) else {
                    self.put_back();
                    left = true;
                    break;
                };
                self.complete(chain.head(), written)?;
            }
            self.signal()?;
            if left || !self.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// As [`Self::serve`]; what the guest did wrong becomes DEVICE_NEEDS_RESET. False when that is so.
    pub fn serve_or_fail(&mut self, serve: impl FnMut(&mut Chain) -> Option<u32>) -> bool {
        let fine = self.serve(serve).is_ok();
        if !fine {
            self.signal.needs_reset();
        }
        fine
    }
}

impl AsFd for Queue {
    /// The doorbell's descriptor.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Doorbell {
    /// One bell per queue.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn many(n: usize) -> io::Result<Vec<Arc<Self>>> {
        (0..n).map(|_| Self::new().map(Arc::new)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{Count, Driver, INDIRECT, NEXT, WRITE, ram};
    use std::sync::atomic::Ordering::SeqCst;

    fn pair(features: u64) -> (Driver, Queue, Arc<Count>) {
        let count = Arc::new(Count::default());
        let driver = Driver::new(&ram(), 0x1_0000, 16);
        let queue = driver.queue(0, features, &Signal::new(count.clone()));
        (driver, queue, count)
    }

    #[test]
    fn a_chain_is_read_written_and_given_back() {
        let (mut d, mut q, count) = pair(feature::COMMON);
        assert!(q.pop().unwrap().is_none());
        d.put(0x2000, *b"hello");
        d.put(0x3000, *b" you");
        d.chain(3, &[(0x2000, 5, false), (0x3000, 4, false), (0x4000, 0, true), (0x4000, 3, true), (0x5000, 9, true)]);
        d.offer(3);
        let mut c = q.pop().unwrap().unwrap();
        assert_eq!((c.head(), c.readable_len(), c.writable_len()), (3, 9, 12));
        let mut b = [0; 7];
        assert_eq!(c.read(&mut b), 7);
        assert_eq!(&b, b"hello y");
        assert_eq!((c.skip_read(1), c.read(&mut b), b[0]), (1, 1, b'u'));
        assert!(c.read_obj::<u8>().is_err());
        let status = c.take_last_byte().unwrap();
        assert_eq!(status.0, 0x5008);
        assert_eq!(c.write(&[7; 20]), 11);
        assert_eq!((c.written(), d.get::<[u8; 3]>(0x4000), d.get::<[u8; 9]>(0x5000)[8]), (11, [7; 3], 0));
        q.complete(c.head(), c.written()).unwrap();
        q.signal().unwrap();
        assert_eq!((d.used(), d.used(), count.queue.load(SeqCst)), (Some((3, 11)), None, 1));
    }

    #[test]
    fn interrupts_come_when_they_are_wanted() {
        // Event index: the driver wants to hear of the third used buffer.
        let (mut d, mut q, count) = pair(feature::COMMON);
        d.put(d.base + 0x4000 + 4 + 32, 2u16);
        for n in 0..4 {
            d.chain(n, &[(0x2000, 8, true)]);
            d.offer(n);
            let c = q.pop().unwrap().unwrap();
            q.complete(c.head(), 0).unwrap();
            q.signal().unwrap();
            assert_eq!(count.queue.load(SeqCst), u32::from(n >= 2));
        }
        // The device's own wish: notify me of the next one.
        assert!(!q.enable_notifications().unwrap());
        assert_eq!(d.get::<u16>(d.base + 0x6004 + 8 * 16), 4);
        // Without event index there is a flag.
        let (mut d, mut q, count) = pair(feature::VERSION_1);
        for flag in [1u16, 0] {
            d.put(d.base + 0x4000, flag);
            d.chain(0, &[(0x2000, 8, true)]);
            d.offer(0);
            assert!(q.serve_or_fail(|_| Some(0)));
        }
        assert_eq!(count.queue.load(SeqCst), 1);
    }

    #[test]
    fn a_chain_can_be_left_for_later() {
        let (mut d, mut q, _) = pair(feature::COMMON);
        d.chain(0, &[(0x2000, 8, true)]);
        d.offer(0);
        d.offer(0);
        let mut n = 0;
        assert!(q.serve_or_fail(|_| {
            n += 1;
            (n == 1).then_some(0)
        }));
        assert!(d.used().is_some() && d.used().is_none());
        assert!(q.serve_or_fail(|c| Some(c.write(&[1; 3]) as u32)));
        assert_eq!(d.used(), Some((0, 3)));
    }

    /// What a hostile driver writes, and what it comes to.
    #[test]
    fn malformed_chains_are_refused_each_for_its_reason() {
        type Set = fn(&Driver);
        let cases: [(&str, QueueError, Set); 16] = [
            ("head out of range", QueueError::DescriptorIndex, |_| {}),
            ("next out of range", QueueError::DescriptorIndex, |d| d.descriptor(0, 0x2000, 1, NEXT, 16)),
            ("next is itself", QueueError::TooLong, |d| d.descriptor(0, 0x2000, 1, NEXT, 0)),
            ("a loop of two", QueueError::TooLong, |d| {
                d.descriptor(0, 0x2000, 1, NEXT, 1);
                d.descriptor(1, 0x2000, 1, NEXT, 0);
            }),
            ("outside RAM", QueueError::Buffer, |d| d.descriptor(0, 1 << 40, 1, 0, 0)),
            ("across the end of a region", QueueError::Buffer, |d| d.descriptor(0, (1 << 20) - 4, 8, 0, 0)),
            ("across the hole", QueueError::Buffer, |d| d.descriptor(0, (1 << 20) - 4, (1 << 20) + 8, WRITE, 0)),
            ("wraps around", QueueError::Buffer, |d| d.descriptor(0, u64::MAX - 3, 8, WRITE, 0)),
            ("readable after writable", QueueError::Order, |d| {
                d.descriptor(0, 0x2000, 1, NEXT | WRITE, 1);
                d.descriptor(1, 0x2000, 1, 0, 0);
            }),
            ("more than 4 GiB", QueueError::TooLarge, |d| {
                for n in 0..1024 {
                    d.descriptor_at(0x8_0000, n, 0x20_0000, 8 << 20, if n < 1023 { NEXT } else { 0 }, n + 1);
                }
                d.descriptor(0, 0x8_0000, 1024 * 16, INDIRECT, 0);
            }),
            ("indirect with next", QueueError::Indirect, |d| d.descriptor(0, 0x8000, 16, INDIRECT | NEXT, 1)),
            ("indirect of odd length", QueueError::Indirect, |d| d.descriptor(0, 0x8000, 17, INDIRECT, 0)),
            ("indirect and empty", QueueError::Indirect, |d| d.descriptor(0, 0x8000, 0, INDIRECT, 0)),
            ("indirect and huge", QueueError::TooLong, |d| d.descriptor(0, 0x8000, 0xffff_fff0, INDIRECT, 0)),
            ("indirect in indirect", QueueError::Indirect, |d| {
                d.descriptor(0, 0x8000, 32, INDIRECT, 0);
                d.descriptor_at(0x8000, 0, 0x8000, 32, INDIRECT, 0);
            }),
            ("indirect outside RAM", QueueError::Buffer, |d| d.descriptor(0, (1 << 20) - 8, 16, INDIRECT, 0)),
        ];
        for (name, wanted, set) in cases {
            let (mut d, mut q, _) = pair(feature::COMMON);
            set(&d);
            d.offer(if name == "head out of range" { 16 } else { 0 });
            let got = q.pop().map(|_| ()).unwrap_err();
            assert_eq!(got, wanted, "{name}");
        }
    }

    #[test]
    fn indirect_tables_work_and_need_the_feature() {
        for (features, works) in [(feature::COMMON, true), (feature::VERSION_1, false)] {
            let (mut d, mut q, _) = pair(features);
            d.descriptor(5, 0x8000, 48, INDIRECT, 0);
            d.descriptor_at(0x8000, 0, 0x2000, 4, NEXT, 2);
            d.descriptor_at(0x8000, 2, 0x3000, 4, NEXT | WRITE, 1);
            d.descriptor_at(0x8000, 1, 0x20_0000, 4, WRITE, 0);
            d.offer(5);
            match q.pop() {
                Ok(Some(c)) => assert!(works && (c.readable_len(), c.writable_len()) == (4, 8)),
                Ok(None) => panic!("nothing offered"),
                Err(e) => assert!(!works && e == QueueError::Indirect),
            }
        }
    }

    #[test]
    fn the_available_index_cannot_run_ahead() {
        let (d, mut q, _) = pair(feature::COMMON);
        d.put(d.base + 0x4002, 17u16);
        assert_eq!(q.pop().map(|_| ()), Err(QueueError::AvailableIndex));
        assert!(!q.serve_or_fail(|_| Some(0)));
        assert!(q.driver().waits_for_reset());
    }

    #[test]
    fn rings_have_to_be_in_ram_and_aligned() {
        let mem = ram();
        let d = Driver::new(&mem, 0x1_0000, 16);
        let make = |change: fn(&mut QueueSetup)| {
            let mut setup = d.setup();
            change(&mut setup);
            let signal = Signal::new(Arc::new(Count::default()));
            Queue::new(0, &setup, feature::COMMON, mem.clone(), d.bell.clone(), signal).map(|_| ())
        };
        assert_eq!(make(|_| {}), Ok(()));
        assert_eq!(make(|s| s.size = 0), Err(QueueError::Size(0)));
        assert_eq!(make(|s| s.size = 12), Err(QueueError::Size(12)));
        assert_eq!(make(|s| s.size = 32), Err(QueueError::Size(32)));
        assert_eq!(make(|s| s.descriptors += 8), Err(QueueError::Ring));
        assert_eq!(make(|s| s.available += 1), Err(QueueError::Ring));
        assert_eq!(make(|s| s.used += 2), Err(QueueError::Ring));
        assert_eq!(make(|s| s.used = (1 << 20) - 64), Err(QueueError::Ring));
        assert_eq!(make(|s| s.available = (1 << 20) - 32), Err(QueueError::Ring));
        for far in [1 << 20, 1 << 52, u64::MAX - 0xfff, u64::MAX - 0xf] {
            let mut setup = d.setup();
            (setup.descriptors, setup.available, setup.used) = (far, far, far);
            let signal = Signal::new(Arc::new(Count::default()));
            let made = Queue::new(0, &setup, feature::COMMON, mem.clone(), d.bell.clone(), signal);
            assert_eq!(made.map(|_| ()), Err(QueueError::Ring), "{far:#x}");
        }
    }
}
