//! The entropy device (virtio 1.2, section 5.4): one queue of writable buffers, filled with random bytes of the host.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use crate::{ActivateError, Activation, Chain, Device, DeviceId, Queue, Stop, Wake, Worker};

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one buffer: drivers ask for some dozens, and the host is not to be kept busy by one that asks for gigabytes.
const MAX_BYTES: usize = 64 << 10;

/// The entropy device.
pub struct Entropy {
    source: File,
    worker: Option<Worker>,
}

impl Entropy {
    /// A device that takes its bytes from a file, as a rule `/dev/urandom`.
    pub fn new(source: File) -> Self {
        Self { source, worker: None }
    }
}

impl Device for Entropy {
    fn id(&self) -> DeviceId {
        DeviceId::Entropy
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }
    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&mut self, mut with: Activation) -> Result<(), ActivateError> {
        let queue = with.take(0)?;
        let source = self.source.try_clone()?;
        self.worker = Some(Worker::start("virtio-rng", move |stop| run(stop, queue, source))?);
        Ok(())
    }
    fn reset(&mut self) {
        self.worker = None;
    }
}

fn run(stop: &Stop, mut queue: Queue, mut source: File) {
    loop {
        queue.bell().clear();
        if !queue.serve_or_fail(|chain| Some(fill(chain, &mut source))) {
            return;
        }
        if stop.wait(&[queue.as_fd()]) != Wake::Ready {
            return;
        }
    }
}

/// Fills a buffer; gives the number of bytes. A source at its end gives none, which drivers take for "try again".
fn fill(chain: &mut Chain, source: &mut impl Read) -> u32 {
    let mut left = (chain.writable_len() as usize).min(MAX_BYTES);
    let mut bytes = [0; 4096];
    while left > 0 {
        let n = left.min(bytes.len());
        match source.read(&mut bytes[..n]) {
            Ok(0) => break,
            Ok(n) => left -= chain.write(&bytes[..n]).max(1),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    chain.written()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{Driver, activate, eventually, ram};
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn buffers_are_filled_until_a_reset_and_again_after_it() {
        let mem = ram();
        let mut device = Entropy::new(File::open("/dev/urandom").unwrap());
        for _ in 0..2 {
            let mut d = Driver::new(&mem, 0x1_0000, 16);
            mem_clear(&d);
            let (signal, count) = activate(&mut device, &[&d], 0);
            d.chain(0, &[(0x3000, 64, true), (0x20_0000, 8192, true)]);
            d.offer(0);
            assert_eq!(d.wait(), (0, 64 + 8192));
            assert_ne!(d.get::<[u8; 32]>(0x3000), [0; 32]);
            assert_ne!(d.get::<[u8; 32]>(0x20_0000 + 8192 - 32), [0; 32]);
            eventually("an interrupt arrives", || count.queue.load(SeqCst) == 1);
            // One that can only be read is given back empty; so is one that asks for too much, with what there is.
            d.chain(2, &[(0x3000, 64, false)]);
            d.offer(2);
            assert_eq!(d.wait(), (2, 0));
            d.chain(4, &[(0x20_0000, 1 << 20, true)]);
            d.offer(4);
            assert_eq!(d.wait(), (4, MAX_BYTES as u32));
            device.reset();
            d.offer(0);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert_eq!(d.used(), None, "a device that was reset does nothing");
            assert!(!signal.waits_for_reset());
        }
    }

    fn mem_clear(d: &Driver) {
        for at in (d.base..d.base + 0x8000).step_by(8) {
            d.put(at, 0u64);
        }
    }

    #[test]
    fn a_bad_chain_stops_the_device_and_calls_for_a_reset() {
        let mut d = Driver::new(&ram(), 0x1_0000, 16);
        let mut device = Entropy::new(File::open("/dev/urandom").unwrap());
        let (signal, count) = activate(&mut device, &[&d], 0);
        d.chain(0, &[(1 << 30, 64, true)]);
        d.offer(0);
        eventually("the device needs a reset", || signal.waits_for_reset());
        assert_eq!((count.config.load(SeqCst), d.used()), (1, None));
    }

    #[test]
    fn a_source_that_fails_gives_nothing() {
        let mut d = Driver::new(&ram(), 0x1_0000, 16);
        let mut device = Entropy::new(File::open("/").unwrap());
        activate(&mut device, &[&d], 0);
        d.chain(0, &[(0x3000, 64, true)]);
        d.offer(0);
        assert_eq!(d.wait(), (0, 0));
    }
}
