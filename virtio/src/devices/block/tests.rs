//! A driver's requests against raw, qcow2 and misbehaving images.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Condvar;
use std::sync::atomic::AtomicBool;

use imago::FormatCreateBuilder;

use super::image::{Buffers, OpenImage, Qcow2Image, Raw};
use super::*;
use crate::testkit::{Driver, activate, eventually, ram};
use crate::{Signal, feature};

const HEADER: u64 = 0x2000;
const STATUS: u64 = 0x3000;
const DATA: u64 = 0x20_0000;

/// A file in the temporary folder, gone with the value.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("paravane-block-{}-{name}", std::process::id())))
    }
    fn raw(name: &str, len: u64) -> Self {
        let me = Self::new(name);
        File::create(&me.0).unwrap().set_len(len).unwrap();
        me
    }
    fn qcow2(name: &str, len: u64) -> Self {
        let me = Self::new(name);
        let options = imago::StorageCreateOptions::new().filename(&me.0).overwrite(true);
        let file = <imago::file::File as imago::Storage>::create_open(options).unwrap();
        imago::qcow2::Qcow2CreateBuilder::<imago::file::File>::new(file).size(len).create().unwrap();
        me
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A disk with a driver.
struct Guest {
    d: Driver,
    device: Block,
    signal: Signal,
}

impl Guest {
    fn new(image: Box<dyn Image>, readonly: bool) -> Self {
        let options = BlockOptions { readonly, serial: "serial-1".into(), queues: 1 };
        let mut device = Block::new(image, &options);
        let d = Driver::new(&ram(), 0x1_0000, 64);
        let (signal, _) = activate(&mut device, &[&d], 0);
        Self { d, device, signal }
    }

    fn raw(temp: &Temp) -> Self {
        Self::new(Box::new(Raw::open(&temp.0, OpenImage::default()).unwrap()), false)
    }

    fn offer(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
        self.d.put(HEADER, kind);
        self.d.put(HEADER + 8, sector);
        self.d.put(STATUS, 0xeeu8);
        let mut parts = vec![(HEADER, 16, false)];
        parts.extend(data);
        parts.push((STATUS, 1, true));
        self.d.chain(0, &parts);
        self.d.offer(0);
    }

    /// A request's status and the length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        self.offer(kind, sector, data);
        let (head, len) = self.d.wait();
        assert_eq!(head, 0);
        (self.d.get(STATUS), len)
    }

    fn write(&mut self, sector: u64, len: u32) -> u8 {
        self.request(1, sector, &[(DATA, len, false)]).0
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, u32) {
        self.request(0, sector, &[(DATA, len, true)])
    }

    fn fill(&self, byte: u8, len: u64) {
        for at in 0..len {
            self.d.put(DATA + at, byte);
        }
    }

    fn segment(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.d.put(DATA, sector);
        self.d.put(DATA + 8, sectors);
        self.d.put(DATA + 12, flags);
        self.request(kind, 0, &[(DATA, 16, false)]).0
    }
}

/// What every image has to do.
fn exercise(g: &mut Guest) {
    // Written in two odd pieces, read in three.
    for at in 0..2048u64 {
        g.d.put(DATA + at, (at % 251) as u8);
    }
    assert_eq!(g.request(1, 3, &[(DATA, 700, false), (DATA + 700, 1348, false)]), (0, 1));
    assert_eq!(g.request(4, 0, &[]), (0, 1));
    g.fill(0, 2048);
    // No data at all, or an empty buffer of it.
    for none in [&[][..], &[(DATA, 0, true)]] {
        assert_eq!(g.request(0, 3, none), (0, 1));
    }
    assert_eq!(g.request(1, 3, &[(DATA, 0, false)]), (0, 1));
    let parts = [(DATA + 0x1000, 1, true), (DATA + 0x2000, 2000, true), (DATA + 0x3000, 47, true)];
    assert_eq!(g.request(0, 3, &parts), (0, 2049));
    assert_eq!(g.d.get::<u8>(DATA + 0x1000), 0);
    assert_eq!(g.d.get::<[u8; 3]>(DATA + 0x2000), [1, 2, 3]);
    assert_eq!(g.d.get::<u8>(DATA + 0x3000 + 46), (2047 % 251) as u8);
    // What was never written is zero.
    g.fill(9, 512);
    assert_eq!((g.read(100, 512), g.d.get::<u8>(DATA + 511)), ((0, 513), 0));
    // Zeroing with and without freeing, and a discard.
    for flags in [0, 1] {
        g.fill(7, 4096);
        assert_eq!(g.write(64, 4096), 0);
        assert_eq!(g.segment(13, 65, 2, flags), 0);
        assert_eq!(g.read(64, 4096).0, 0);
        let seen = [0, 511, 512, 1535, 1536].map(|at| g.d.get::<u8>(DATA + at));
        assert_eq!(seen, [7, 7, 0, 0, 7]);
    }
    assert_eq!(g.segment(11, 64, 8, 0), 0);
    assert_eq!(g.segment(11, 64, 8, 1), 2, "a discard has no flags");
    assert_eq!(g.segment(13, 64, 8, 2), 2);
    assert_eq!(g.segment(13, g.device.disk.image.size() / 512 - 1, 2, 0), 1);
    assert_eq!(g.segment(11, u64::MAX / 512, u32::MAX, 0), 1);
    assert_eq!(g.request(11, 0, &[(DATA, 15, false)]).0, 1);
    assert_eq!(g.request(11, 0, &[(DATA, 16 * 33, false)]).0, 1);
    // The serial number, also into a buffer that is too small.
    assert_eq!(g.request(8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(&g.d.get::<[u8; 9]>(DATA), b"serial-1\0");
    assert_eq!(g.request(8, 0, &[(DATA, 4, true)]), (0, 5));
    // Nonsense.
    let end = g.device.disk.image.size() / 512;
    assert_eq!(g.read(end - 1, 1024), (1, 1));
    assert_eq!(g.read(end, 512), (1, 1));
    assert_eq!(g.read(u64::MAX, 512), (1, 1));
    assert_eq!(g.write(u64::MAX / 512 + 1, 512), 1);
    assert_eq!(g.read(0, 511), (1, 1));
    assert_eq!(g.request(77, 0, &[]), (2, 1));
    assert_eq!(g.read(end - 1, 512), (0, 513));
    assert!(!g.signal.waits_for_reset());
}

#[test]
fn raw_disks_do_what_the_specification_says() {
    let temp = Temp::raw("raw", 1 << 20);
    let mut g = Guest::raw(&temp);
    assert_eq!(g.device.features() & feature::COMMON, 0);
    exercise(&mut g);
    g.fill(0x5a, 512);
    assert_eq!(g.write(2047, 512), 0);
    // It is in the file at once, for whoever reads it.
    let mut last = [0; 1];
    File::open(&temp.0).unwrap().read_exact_at(&mut last, (1 << 20) - 1).unwrap();
    assert_eq!(last, [0x5a]);
}

#[test]
fn qcow2_images_do_too_and_keep_it() {
    let temp = Temp::qcow2("qcow2", 8 << 20);
    let open = || Box::new(Qcow2Image::open(&temp.0, OpenImage::default()).unwrap());
    {
        let mut g = Guest::new(open(), false);
        exercise(&mut g);
        g.fill(0x5a, 512);
        assert_eq!((g.write(9999, 512), g.request(4, 0, &[])), (0, (0, 1)));
        // As kill -9 would: what was flushed is there for another who opens the file.
        let copy = Temp::new("qcow2-copy");
        std::fs::copy(&temp.0, &copy.0).unwrap();
        let mut other = Guest::new(Box::new(Qcow2Image::open(&copy.0, OpenImage::default()).unwrap()), false);
        assert_eq!((other.read(9999, 512), other.d.get::<u8>(DATA)), ((0, 513), 0x5a));
    }
    let mut g = Guest::new(open(), false);
    assert_eq!((g.read(9999, 512), g.d.get::<u8>(DATA)), ((0, 513), 0x5a));
    // A request larger than what is copied at a time.
    g.fill(3, 2 << 20);
    assert_eq!(g.write(0, 2 << 20), 0);
    g.fill(0, 2 << 20);
    assert_eq!((g.read(0, 2 << 20).0, g.d.get::<u8>(DATA + (2 << 20) - 1)), (0, 3));
}

#[test]
fn a_disk_that_may_only_be_read_is_not_written() {
    let temp = Temp::raw("ro", 1 << 16);
    let how = OpenImage { readonly: true, ..OpenImage::default() };
    let mut g = Guest::new(Box::new(Raw::open(&temp.0, how).unwrap()), true);
    assert_eq!(g.device.features() & (bit::RO | bit::DISCARD | bit::WRITE_ZEROES), bit::RO);
    g.fill(1, 512);
    assert_eq!((g.write(0, 512), g.segment(13, 0, 1, 0), g.segment(11, 0, 1, 0)), (1, 1, 1));
    assert_eq!(g.read(0, 512), (0, 513));
    assert_eq!(g.d.get::<u8>(DATA), 0);
    assert_eq!(g.request(4, 0, &[]).0, 0);
}

#[test]
fn direct_io_works_on_whatever_buffers_the_guest_has() {
    let temp = Temp::raw("direct", 1 << 20);
    let how = OpenImage { direct: true, ..OpenImage::default() };
    match Raw::open(&temp.0, how) {
        Ok(raw) => exercise(&mut Guest::new(Box::new(raw), false)),
        Err(e) => eprintln!("skipped: the temporary folder's file system has no direct I/O ({e})"),
    }
}

#[test]
fn a_disk_is_used_by_one_writer_or_several_readers() {
    let temp = Temp::raw("lock", 1 << 16);
    let reading = OpenImage { readonly: true, ..OpenImage::default() };
    let writer = Raw::open(&temp.0, OpenImage::default()).unwrap();
    for how in [OpenImage::default(), reading] {
        assert!(Raw::open(&temp.0, how).err().unwrap().to_string().contains("another machine"));
    }
    drop(writer);
    let readers = [Raw::open(&temp.0, reading).unwrap(), Raw::open(&temp.0, reading).unwrap()];
    assert!(Raw::open(&temp.0, OpenImage::default()).is_err());
    drop(readers);
    assert!(Raw::open(Path::new("/dev/null"), OpenImage::default()).is_err(), "no disk");
}

#[test]
fn a_file_that_shrinks_under_the_guest_is_an_io_error() {
    let temp = Temp::raw("shrink", 1 << 16);
    let mut g = Guest::raw(&temp);
    File::options().write(true).open(&temp.0).unwrap().set_len(1024).unwrap();
    assert_eq!(g.read(1, 512), (0, 513));
    assert_eq!(g.read(1, 1024).0, 1);
    assert_eq!(g.read(64, 512).0, 1);
    assert!(!g.signal.waits_for_reset());
}

/// An image that fails, and one whose reads wait for a go.
struct Bad {
    error: i32,
    gate: Option<Arc<(Mutex<bool>, Condvar)>>,
    reading: Arc<AtomicBool>,
}

impl Bad {
    fn result(&self) -> io::Result<()> {
        self.reading.store(true, SeqCst);
        if let Some(gate) = &self.gate {
            let open = gate.1.wait_while(gate.0.lock().unwrap(), |open| !*open);
            drop(open);
        }
        if self.error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(self.error)) }
    }
}

impl Image for Bad {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read(&self, _at: u64, _into: &Buffers<'_>) -> io::Result<()> {
        self.result()
    }
    fn write(&self, _at: u64, _from: &Buffers<'_>) -> io::Result<()> {
        self.result()
    }
    fn flush(&self) -> io::Result<()> {
        self.result()
    }
    fn discard(&self, _at: u64, _len: u64) -> io::Result<()> {
        self.result()
    }
    fn write_zeroes(&self, _at: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        self.result()
    }
}

#[test]
fn a_full_or_broken_disk_fails_requests_and_nothing_else() {
    for error in [libc::ENOSPC, libc::EIO] {
        let mut g = Guest::new(Box::new(Bad { error, gate: None, reading: Arc::default() }), false);
        assert_eq!((g.write(0, 512), g.read(0, 512).0, g.request(4, 0, &[]).0), (1, 1, 1));
        assert_eq!((g.segment(11, 0, 1, 0), g.segment(13, 0, 1, 0)), (1, 1));
        assert_eq!(g.request(8, 0, &[(DATA, 20, true)]).0, 0, "the device goes on");
    }
}

#[test]
fn a_slow_request_holds_up_neither_others_nor_for_ever_a_reset() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let reading = Arc::new(AtomicBool::new(false));
    let mut g = Guest::new(Box::new(Bad { error: 0, gate: Some(gate.clone()), reading: reading.clone() }), false);
    g.offer(0, 0, &[(DATA, 512, true)]);
    eventually("the read begins", || reading.load(SeqCst));
    // Another chain, with another status byte.
    g.d.put(HEADER + 0x100, 8u32);
    g.d.chain(10, &[(HEADER + 0x100, 16, false), (DATA + 0x1000, 20, true), (STATUS + 0x100, 1, true)]);
    g.d.offer(10);
    assert_eq!(g.d.wait(), (10, 21));
    let opener = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
    });
    g.device.reset();
    opener.join().unwrap();
    // After the reset nothing moves any more; the request in flight was finished or never will be.
    let used = g.d.used();
    assert!(used.is_none() || used == Some((0, 513)));
    g.d.offer(10);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(g.d.used(), None);
}

#[test]
fn what_cannot_be_answered_asks_for_a_reset() {
    let temp = Temp::raw("broken", 1 << 16);
    let cases: [&[(u64, u32, bool)]; 4] = [
        &[(HEADER, 16, false)],
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
    ];
    for parts in cases {
        let mut g = Guest::raw(&temp);
        g.d.chain(0, parts);
        g.d.offer(0);
        let signal = g.signal.clone();
        eventually("the device asks for a reset", || signal.waits_for_reset());
        assert_eq!(g.d.used(), None);
    }
    // The same request over and over, without waiting for the answer: as many as there are descriptors, then no more.
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let mut g = Guest::new(Box::new(Bad { error: 0, gate: Some(gate.clone()), reading: Arc::default() }), false);
    for _ in 0..QUEUE_SIZE + 1 {
        g.offer(4, 0, &[]);
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
    let signal = g.signal.clone();
    eventually("the device has enough", || signal.waits_for_reset());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
}

#[test]
fn several_queues_serve_one_disk() {
    let temp = Temp::raw("queues", 1 << 20);
    let raw = Box::new(Raw::open(&temp.0, OpenImage::default()).unwrap());
    let mut device = Block::new(raw, &BlockOptions { queues: 3, ..BlockOptions::default() });
    assert_eq!((device.queue_sizes().len(), device.features() & bit::MQ), (3, bit::MQ));
    let mut queues = [0; 2];
    device.config_read(34, &mut queues);
    assert_eq!(queues, [3, 0]);
    let mem = ram();
    let mut drivers: Vec<_> = (0..3).map(|n| Driver::new(&mem, 0x1_0000 * (n + 1), 16)).collect();
    activate(&mut device, &drivers.iter().collect::<Vec<_>>(), bit::MQ);
    for (n, d) in drivers.iter_mut().enumerate() {
        let base = DATA + 0x1_0000 * n as u64;
        d.put(base, 1u32);
        d.put(base + 8, n as u64);
        d.put(base + 0x1000, n as u8 + 1);
        d.chain(0, &[(base, 16, false), (base + 0x1000, 512, false), (base + 0x2000, 1, true)]);
        d.offer(0);
        assert_eq!(d.wait(), (0, 1));
    }
    let bytes = std::fs::read(&temp.0).unwrap();
    assert_eq!([bytes[0], bytes[512], bytes[1024]], [1, 2, 3]);
}
