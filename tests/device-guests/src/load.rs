//! Many equal requests to one device, for the hypervisor's counters: run with `count=0` and with more, and take the difference.
//!
//! The drivers poll, as a driver does that is busy anyway, so there are no interrupts: what is counted is what telling the device costs.

use alloc::vec;
use alloc::vec::Vec;

use guest_rt::{info, println};
use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::{DeviceType, Transport};

use crate::exercise::{Card, receive, send, who_has};
use crate::memory::Memory;

/// What was asked for.
pub(crate) struct Load {
    device: DeviceType,
    depth: usize,
    count: usize,
    done: bool,
}

impl Load {
    /// From the command line.
    pub(crate) fn asked_for() -> Option<Self> {
        let device = match info::option("load")? {
            "block" => DeviceType::Block,
            _ => DeviceType::Network,
        };
        let number = |name| info::option(name).and_then(|n| n.parse().ok()).unwrap_or(1);
        Some(Self { device, depth: number("depth"), count: number("count"), done: false })
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    pub(crate) fn put_on<T: Transport>(&mut self, transport: T, kind: DeviceType, name: &str) {
        if kind != self.device || self.done {
            return;
        }
        self.done = if kind == DeviceType::Block { self.block(transport) } else { self.network(transport) };
        println!("{kind:?} on {name}: {} requests, {} at a time", self.count, self.depth);
    }

    /// Reads of 4 KiB, so many at a time; all of them are complete before the next are sent.
    fn block<T: Transport>(&self, transport: T) -> bool {
        let Ok(mut disk) = VirtIOBlk::<Memory, T>::new(transport) else { return false };
        let mut flight: Vec<_> =
            (0..self.depth).map(|_| (BlkReq::default(), BlkResp::default(), vec![0; 4096], 0)).collect();
        for round in 0..self.count.div_ceil(self.depth) {
            for (n, (request, response, data, token)) in flight.iter_mut().enumerate() {
                // SAFETY: none of them is touched before it is complete.
                match unsafe { disk.read_blocks_nb((round * 8 + n * 8) % 1024, request, data, response) } {
                    Ok(t) => *token = t,
                    Err(_) => return false,
                }
            }
            let mut left = flight.len();
            while left > 0 {
                let Some(done) = disk.peek_used() else {
                    core::hint::spin_loop();
                    continue;
                };
                let Some((request, response, data, token)) = flight.iter_mut().find(|f| f.3 == done) else {
                    return false;
                };
                // SAFETY: the same as were given for this token.
                if unsafe { disk.complete_read_blocks(*token, request, data, response) }.is_err() {
                    return false;
                }
                left -= 1;
            }
        }
        true
    }

    /// A question and its answer each, so many questions before the answers are waited for.
    fn network<T: Transport>(&self, transport: T) -> bool {
        let Ok(mut card) = Card::new(transport, 2048) else { return false };
        let question = who_has();
        for _ in 0..self.count.div_ceil(self.depth) {
            if !(0..self.depth).all(|_| send(&mut card, &question)) {
                return false;
            }
            if !(0..self.depth).all(|_| receive(&mut card, |f| f.len() >= 42 && f[12..14] == [8, 6]).is_some()) {
                return false;
            }
        }
        true
    }
}
