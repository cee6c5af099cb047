//! The card between a driver in memory and a backend that the test holds the other end of.

use super::user::User;
use super::{Backend, HEADER, Header, Net, feature, parse_mac};
use crate::testkit::{Count, Driver, activate, eventually, ram};
use crate::{Device, Signal};
use paravane_ram::GuestRam;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// What the test and the backend share.
#[derive(Default)]
struct Ends {
    sent: Vec<Vec<u8>>,
    to_guest: VecDeque<(Header, Vec<u8>)>,
    begun: Vec<u64>,
    ended: u32,
    down: bool,
}

struct Fake {
    ends: Arc<Mutex<Ends>>,
    front: Option<(Header, Vec<u8>)>,
    wake: UnixStream,
}

impl Backend for Fake {
    fn features(&self) -> u64 {
        feature::CSUM | feature::GUEST_CSUM
    }
    fn begin(&mut self, features: u64) {
        self.ends.lock().unwrap().begun.push(features);
    }
    fn end(&mut self) {
        self.ends.lock().unwrap().ended += 1;
    }
    fn wait_for(&self) -> Option<(RawFd, i16)> {
        Some((self.wake.as_raw_fd(), libc::POLLIN))
    }
    fn send(&mut self, packet: &[u8]) {
        self.ends.lock().unwrap().sent.push(packet.to_vec());
    }
    fn turn(&mut self) -> Option<Duration> {
        let mut bytes = [0; 100];
        while self.wake.read(&mut bytes).is_ok_and(|count| count > 0) {}
        None
    }
    fn frame(&mut self) -> Option<(Header, &[u8])> {
        if self.front.is_none() {
            self.front = self.ends.lock().unwrap().to_guest.pop_front();
        }
        self.front.as_ref().map(|(header, frame)| (*header, &frame[..]))
    }
    fn consume(&mut self) {
        self.front = None;
    }
    fn link_up(&self) -> bool {
        !self.ends.lock().unwrap().down
    }
}

/// A card with its queues, `pairs` of them and the control queue.
struct Bench {
    net: Net,
    drivers: Vec<Driver>,
    ends: Arc<Mutex<Ends>>,
    wake: UnixStream,
    signal: Signal,
    count: Arc<Count>,
}

fn drivers(mem: &GuestRam, pairs: u16) -> Vec<Driver> {
    (0..2 * u64::from(pairs) + 1).map(|n| Driver::new(mem, 0x20_0000 + n * 0x1_0000, 16)).collect()
}

impl Bench {
    fn new(pairs: u16, features: u64) -> Self {
        let (wake, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let ends = Arc::new(Mutex::new(Ends::default()));
        let fake = Fake { ends: ends.clone(), front: None, wake: theirs };
        let mut net = Net::new(Box::new(fake), MAC, pairs);
        let drivers = drivers(&ram(), pairs);
        let all: Vec<&Driver> = drivers.iter().collect();
        let (signal, count) = activate(&mut net, &all, features);
        Self { net, drivers, ends, wake, signal, count }
    }

    fn deliver(&mut self, header: Header, frame: Vec<u8>) {
        self.ends.lock().unwrap().to_guest.push_back((header, frame));
        self.wake.write_all(&[1]).unwrap();
    }

    /// Sends a command on the control queue, gives the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let driver = self.drivers.last_mut().unwrap();
        put(driver, 0x9_0000, bytes);
        driver.put(0x9_1000, 0xffu8);
        driver.chain(0, &[(0x9_0000, bytes.len() as u32, false), (0x9_1000, 1, true)]);
        driver.offer(0);
        assert_eq!(driver.wait(), (0, 1));
        driver.get(0x9_1000)
    }
}

fn put(driver: &Driver, at: u64, bytes: &[u8]) {
    driver.mem.write_slice(bytes, GuestAddress(at)).unwrap();
}

fn get(driver: &Driver, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Places for receive buffers.
fn buffer(n: u16) -> u64 {
    0x60_0000 + 0x2000 * u64::from(n)
}

#[test]
fn frames_of_the_guest_reach_the_backend_with_their_header() {
    let mut bench = Bench::new(1, feature::CSUM | feature::MRG_RXBUF);
    let driver = &mut bench.drivers[1];
    // Header and frame in pieces; then one that is too short; then a long one.
    let header = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::default() };
    driver.put(0x9_0000, header.bytes(0));
    put(driver, 0x9_1000, &[7; 64]);
    driver.chain(0, &[(0x9_0000, 5, false), (0x9_0005, 7, false), (0x9_1000, 60, false)]);
    driver.offer(0);
    assert_eq!(driver.wait(), (0, 0));
    driver.chain(4, &[(0x9_0000, 20, false)]);
    driver.offer(4);
    assert_eq!(driver.wait(), (4, 0));
    driver.chain(6, &[(0x9_0000, 12, false), (0x40_0000, 65549, false)]);
    driver.offer(6);
    assert_eq!(driver.wait(), (6, 0));
    driver.chain(8, &[(0x9_0000, 12, false), (0x40_0000, 65550, false)]);
    driver.offer(8);
    assert_eq!(driver.wait(), (8, 0));
    let sent = std::mem::take(&mut bench.ends.lock().unwrap().sent);
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [72, HEADER + 65549]);
    assert_eq!(Header::read(sent[0].first_chunk().unwrap()), header);
    assert_eq!(sent[0][HEADER..], [7; 60]);
    assert!(!bench.signal.waits_for_reset());
    bench.net.reset();
    let ends = bench.ends.lock().unwrap();
    assert_eq!((ends.begun.len(), ends.ended), (1, 1));
}

#[test]
fn long_frames_fill_as_many_buffers_as_they_need() {
    let mut bench = Bench::new(1, feature::MRG_RXBUF);
    let frame: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
    let header = Header { gso_type: Header::TCPV4, gso_size: 1460, hdr_len: 54, ..Header::default() };
    // It waits until there is room for all of it.
    bench.deliver(header, frame.clone());
    for n in 0..4 {
        assert_eq!(bench.drivers[0].used(), None);
        bench.drivers[0].chain(n, &[(buffer(n), 1536, true)]);
        bench.drivers[0].offer(n);
        std::thread::sleep(Duration::from_millis(5));
    }
    let driver = &mut bench.drivers[0];
    let lengths: Vec<u32> = (0..4).map(|_| driver.wait().1).collect();
    assert_eq!(lengths, [1536, 1536, 1536, 5012 - 3 * 1536]);
    let mut bytes = Vec::new();
    for n in 0..4 {
        bytes.extend_from_slice(&get(driver, buffer(n), 1536));
    }
    assert_eq!(bytes[..HEADER], header.bytes(4));
    assert!(bytes[HEADER..HEADER + 5000] == frame);
    assert!(bench.count.queue.load(SeqCst) >= 1);
}

#[test]
fn without_mergeable_buffers_a_frame_has_to_fit_into_one() {
    let mut bench = Bench::new(1, 0);
    for n in [0, 1] {
        bench.drivers[0].chain(2 * n, &[(buffer(n), 12, true), (buffer(n) + 12, 1514, true)]);
        bench.drivers[0].offer(2 * n);
    }
    bench.deliver(Header::default(), vec![1; 1515]);
    bench.deliver(Header::default(), vec![2; 1514]);
    assert_eq!(bench.drivers[0].wait(), (0, 1526));
    assert_eq!(bench.drivers[0].get::<[u8; 16]>(buffer(0) + 10), [1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
    assert_eq!(bench.drivers[0].used(), None);
}

#[test]
fn commands_change_the_card() {
    let mut bench = Bench::new(2, feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_MAC_ADDR | feature::MQ);
    let config = |net: &Net| {
        let mut bytes = [0xff; 12];
        net.config_read(0, &mut bytes);
        bytes
    };
    assert_eq!(config(&bench.net), [0x52, 0x54, 0, 1, 2, 3, 1, 0, 2, 0, 0, 0]);
    assert_eq!(bench.command(&[0, 0, 1]), 0);
    assert_eq!(bench.command(&[1, 1, 2, 4, 6, 8, 10, 12]), 0);
    assert_eq!(config(&bench.net)[..6], [2, 4, 6, 8, 10, 12]);
    assert_eq!(bench.command(&[1, 1, 2, 4]), 1);
    assert_eq!(bench.command(&[4, 0, 2, 0]), 0);
    assert_eq!(bench.command(&[4, 0, 3, 0]), 1);
    assert_eq!(bench.command(&[77, 0]), 1);
    // The wire is cut, and the driver hears of it.
    bench.ends.lock().unwrap().down = true;
    bench.wake.write_all(&[1]).unwrap();
    eventually("the driver hears of the link", || bench.count.config.load(SeqCst) == 1);
    assert_eq!(config(&bench.net)[6], 0);
}

#[test]
fn answers_come_on_the_pair_that_asked() {
    let mut bench = Bench::new(2, feature::MQ | feature::CTRL_VQ | feature::MRG_RXBUF);
    assert_eq!(bench.command(&[4, 0, 2, 0]), 0);
    let mut frame = vec![0u8; 60];
    frame[12] = 8;
    frame[26..38].copy_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2, 0x9c, 0x40, 0, 80]);
    let mut answer = frame.clone();
    answer[26..38].copy_from_slice(&[10, 0, 2, 2, 10, 0, 2, 15, 0, 80, 0x9c, 0x40]);
    put(&bench.drivers[3], 0x9_1000, &frame);
    bench.drivers[3].chain(0, &[(0x9_0000, 12, false), (0x9_1000, 60, false)]);
    bench.drivers[3].offer(0);
    bench.drivers[3].wait();
    for queue in [0, 2] {
        bench.drivers[queue].chain(0, &[(buffer(queue as u16), 2000, true)]);
        bench.drivers[queue].offer(0);
    }
    bench.deliver(Header::default(), answer);
    assert_eq!(bench.drivers[2].wait(), (0, 72));
    assert_eq!(bench.drivers[0].used(), None);
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset() {
    type Break = fn(&mut Bench);
    let cases: [(&str, Break); 4] = [
        ("a transmit buffer outside RAM", |bench| {
            bench.drivers[1].chain(0, &[(1 << 40, 100, false)]);
            bench.drivers[1].offer(0);
        }),
        ("a receive buffer that loops", |bench| {
            bench.drivers[0].descriptor(0, 0x9_0000, 10, crate::testkit::NEXT | crate::testkit::WRITE, 0);
            bench.drivers[0].offer(0);
            bench.deliver(Header::default(), vec![1; 100]);
        }),
        ("a command out of range", |bench| bench.drivers[2].offer(99)),
        ("an index that runs ahead", |bench| {
            bench.drivers[1].offered = 100;
            bench.drivers[1].offer(0);
        }),
    ];
    for (name, spoil) in cases {
        let mut bench = Bench::new(1, feature::MRG_RXBUF | feature::CTRL_VQ);
        spoil(&mut bench);
        eventually(name, || bench.signal.waits_for_reset());
        assert_eq!(bench.count.config.load(SeqCst), 1, "{name}");
        // After a reset the card works again.
        bench.net.reset();
        let mem = ram();
        let mut fresh = drivers(&mem, 1);
        let all: Vec<&Driver> = fresh.iter().collect();
        let _kept = activate(&mut bench.net, &all, feature::MRG_RXBUF);
        fresh[1].chain(0, &[(0x9_0000, 12, false), (0x9_1000, 60, false)]);
        fresh[1].offer(0);
        assert_eq!(fresh[1].wait(), (0, 0), "{name}");
    }
}

#[test]
fn receive_buffers_of_no_length_do_not_stop_the_card() {
    let mut bench = Bench::new(1, feature::MRG_RXBUF);
    for n in 0..16 {
        bench.drivers[0].chain(n, &[(buffer(n), if n < 15 { 0 } else { 64 }, true)]);
        bench.drivers[0].offer(n);
    }
    // Too long for all buffers together: dropped. The next one fits.
    bench.deliver(Header::default(), vec![1; 100]);
    bench.deliver(Header::default(), vec![2; 40]);
    let mut total = 0;
    for _ in 0..16 {
        total += bench.drivers[0].wait().1;
    }
    assert_eq!(total, 52);
}

#[test]
fn the_gateway_of_the_user_network_answers() {
    let user = User::new(&paravane_usernet::Config::default()).unwrap();
    let mut net = Net::new(Box::new(user), MAC, 1);
    let mut drivers = drivers(&ram(), 1);
    let all: Vec<&Driver> = drivers.iter().collect();
    let _kept = activate(&mut net, &all, feature::MRG_RXBUF | feature::GUEST_CSUM);
    drivers[0].chain(0, &[(buffer(0), 2048, true)]);
    drivers[0].offer(0);
    // Who has 10.0.2.2? (RFC 826)
    let request = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 1, 2, 3, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 1, 2,
        3, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
    ];
    put(&drivers[1], 0x9_1000, &request);
    drivers[1].chain(0, &[(0x9_0000, 12, false), (0x9_1000, request.len() as u32, false)]);
    drivers[1].offer(0);
    assert_eq!(drivers[0].wait(), (0, 12 + 42));
    let reply = get(&drivers[0], buffer(0), 54);
    assert_eq!(reply[HEADER..HEADER + 6], MAC);
    assert_eq!(reply[HEADER + 20..HEADER + 22], [0, 2], "a reply");
    assert_eq!(reply[HEADER + 28..HEADER + 32], [10, 0, 2, 2]);
}

#[test]
fn mac_addresses_are_read() {
    assert_eq!(parse_mac("52:54:00:12:34:Ff").unwrap(), [0x52, 0x54, 0, 0x12, 0x34, 0xff]);
    for wrong in
        ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "53:54:00:12:34:56", "5:54:00:12:34:56", "00:00:00:00:00:00"]
    {
        assert!(parse_mac(wrong).is_err(), "{wrong}");
    }
}

/// A driver that writes at random over rings and descriptors while frames go both ways. The card may call for a reset,
/// and works again after it; its thread never fails.
#[test]
fn whatever_a_driver_writes_the_card_survives() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    // PARAVANE_FUZZ_RUNS=100000 makes an afternoon of it.
    let runs = std::env::var("PARAVANE_FUZZ_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    for _ in 0..runs {
        let features = [feature::MRG_RXBUF, feature::CTRL_VQ, feature::MQ, feature::CSUM];
        let features = features.iter().filter(|_| random(4) > 0).sum();
        let mut bench = Bench::new(2, features);
        for _ in 0..random(300) {
            let which = random(5) as usize;
            match random(8) {
                // A descriptor, mostly of sensible parts.
                0..=3 => {
                    let at =
                        [buffer(0), 0x9_0000, (1 << 20) - 8, 1 << 40, u64::MAX - 7][random(5).min(random(5)) as usize];
                    let len = [12, 60, 1526, 70_000, u32::MAX][random(5).min(random(5)) as usize];
                    let (n, flags, next) = (random(17) as u16, random(8).min(random(8)) as u16, random(17) as u16);
                    bench.drivers[which].descriptor(n, at, len, flags, next);
                }
                // A head, and the index with it.
                4 | 5 => bench.drivers[which].offer(random(17).min(random(20)) as u16),
                6 => {
                    let at = bench.drivers[which].base + [0, 0x4000, 0x6000][random(3) as usize] + 2 * random(40);
                    bench.drivers[which].put(at, random(1 << 16) as u16);
                    bench.drivers[which].bell.ring();
                }
                _ => {
                    let len = [14, 60, 1514, 20_000, 65_549][random(5) as usize];
                    bench.deliver(Header::default(), vec![random(256) as u8; len]);
                }
            }
        }
        bench.net.reset();
        assert!(!bench.net.backend.is_poisoned(), "the card's thread failed");
        let ends = bench.ends.lock().unwrap();
        assert!(ends.sent.iter().all(|packet| (HEADER + 14..=HEADER + super::LONGEST).contains(&packet.len())));
        assert_eq!((ends.begun.len(), ends.ended), (1, 1));
    }
}
