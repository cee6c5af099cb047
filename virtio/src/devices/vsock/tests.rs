//! A guest's driver and programs of the host talk to each other.

use std::io::Write;
use std::time::Duration;

use super::connection::{BUFFER, NO_RECEIVE, NO_SEND};
use super::*;
use crate::Signal;
use crate::testkit::{Driver, activate, eventually, ram};

const CID: u32 = 7;

struct Guest {
    rx: Driver,
    tx: Driver,
    path: PathBuf,
    signal: Signal,
    _device: Vsock,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(format!("{}_99", self.path.display()));
    }
}

impl Guest {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("paravane-vsock-{}-{name}", std::process::id()));
        let mut device = Vsock::new(CID, &path).unwrap();
        let mem = ram();
        let [rx, tx, event] = [1, 2, 3].map(|n| Driver::new(&mem, 0x1_0000 * n, 16));
        let (signal, _) = activate(&mut device, &[&rx, &tx, &event], 0);
        Self { rx, tx, path, signal, _device: device }
    }

    /// A packet from the guest with 64 KiB of room on its side.
    fn send(&mut self, host: u32, guest: u32, op: u16, flags: u32, data: &[u8]) {
        let p = Packet {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
        };
        self.send_raw(&p, data);
    }

    fn send_raw(&mut self, p: &Packet, data: &[u8]) {
        use vm_memory::{Bytes, GuestAddress};
        self.tx.mem.write_slice(&p.bytes(), GuestAddress(0x20_0000)).unwrap();
        self.tx.mem.write_slice(data, GuestAddress(0x21_0000)).unwrap();
        self.tx.chain(0, &[(0x20_0000, 44, false), (0x21_0000, data.len() as u32, false)]);
        self.tx.offer(0);
        self.tx.wait();
    }

    /// Offers a buffer and waits for the packet in it.
    fn receive(&mut self) -> (Packet, Vec<u8>) {
        self.rx.chain(0, &[(0x30_0000, 44, true), (0x30_1000, 4096, true)]);
        self.rx.offer(0);
        let (_, len) = self.rx.wait();
        let mut mem = vec![0; 44];
        use vm_memory::{Bytes, GuestAddress};
        self.rx.mem.read_slice(&mut mem, GuestAddress(0x30_0000)).unwrap();
        let word = |at: usize| u32::from_le_bytes(mem[at..at + 4].try_into().unwrap());
        let p = Packet {
            src_cid: u64::from(word(0)),
            dst_cid: u64::from(word(8)),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        };
        assert_eq!((len, p.src_cid, p.dst_cid, p.kind), (44 + p.len, HOST_CID, u64::from(CID), STREAM));
        let data = (0..u64::from(p.len)).map(|n| self.rx.get(0x30_1000 + n)).collect();
        (p, data)
    }

    fn op(&mut self) -> (u16, u32) {
        let (p, _) = self.receive();
        (p.op, p.flags)
    }
}

fn read(stream: &mut UnixStream, n: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = vec![0; n];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_host_reaches_the_guest() {
    let mut g = Guest::new("in");
    let mut host = UnixStream::connect(&g.path).unwrap();
    host.write_all(b"CONNECT 1234\nearly").unwrap();
    let (p, _) = g.receive();
    assert_eq!((p.op, p.dst_port, p.buf_alloc), (op::REQUEST, 1234, BUFFER));
    let port = p.src_port;
    g.send(port, 1234, op::RESPONSE, 0, b"");
    let ok = format!("OK {port}\n");
    assert_eq!(read(&mut host, ok.len()), ok.as_bytes());
    let (p, data) = g.receive();
    assert_eq!((p.op, p.fwd_cnt, data), (op::RW, 0, b"early".to_vec()));
    g.send(port, 1234, op::RW, 0, b"reply");
    assert_eq!(read(&mut host, 5), b"reply");
    g.send(port, 1234, op::CREDIT_REQUEST, 0, b"");
    let (p, _) = g.receive();
    assert_eq!((p.op, p.fwd_cnt), (op::CREDIT_UPDATE, 5));
    drop(host);
    assert_eq!(g.op(), (op::SHUTDOWN, NO_SEND));
    g.send(port, 1234, op::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    assert_eq!(g.op(), (op::RST, 0));
    assert!(!g.signal.waits_for_reset());
}

#[test]
fn the_guest_reaches_the_host() {
    let mut g = Guest::new("out");
    g.send(99, 5, op::REQUEST, 0, b"");
    assert_eq!(g.op(), (op::RST, 0), "nobody listens");
    let listener = UnixListener::bind(format!("{}_99", g.path.display())).unwrap();
    g.send(99, 5, op::REQUEST, 0, b"");
    assert_eq!(g.op(), (op::RESPONSE, 0));
    let (mut host, _) = listener.accept().unwrap();
    g.send(99, 5, op::RW, 0, b"hello");
    assert_eq!(read(&mut host, 5), b"hello");
    // The guest has sent all; the host still may.
    g.send(99, 5, op::SHUTDOWN, NO_SEND, b"");
    assert_eq!(host.read(&mut [0; 4]).unwrap(), 0);
    host.write_all(b"late").unwrap();
    let (p, data) = g.receive();
    assert_eq!((p.op, data), (op::RW, b"late".to_vec()));
    g.send(99, 5, op::RST, 0, b"");
    assert_eq!(host.read(&mut [0; 4]).unwrap_or(0), 0);
    // It is forgotten now.
    g.send(99, 5, op::RW, 0, b"x");
    assert_eq!(g.op(), (op::RST, 0));
}

#[test]
fn nobody_sends_beyond_credit() {
    let mut g = Guest::new("credit");
    let listener = UnixListener::bind(format!("{}_99", g.path.display())).unwrap();
    g.send(99, 5, op::REQUEST, 0, b"");
    g.op();
    let (mut host, _) = listener.accept().unwrap();
    // The guest has 64 KiB and never says that it took any.
    let writer = std::thread::spawn(move || {
        let _ = host.write_all(&vec![1; 1 << 20]);
        host
    });
    let mut total = 0;
    loop {
        let (p, data) = g.receive();
        if p.op != op::RW {
            assert_eq!(p.op, op::CREDIT_REQUEST);
            break;
        }
        total += data.len();
    }
    assert_eq!(total, 1 << 16);
    // The other way: what the host does not read waits, up to the buffer; beyond that is the guest's fault.
    let chunk = vec![2; 1 << 15];
    let mut ended = false;
    for _ in 0..64 {
        g.send(99, 5, op::RW, 0, &chunk);
        g.rx.chain(0, &[(0x30_0000, 44, true), (0x30_1000, 4096, true)]);
        g.rx.offer(0);
        std::thread::sleep(Duration::from_millis(2));
        if g.rx.used().is_some() && g.rx.get::<u16>(0x30_0000 + 30) == op::RST {
            ended = true;
            break;
        }
    }
    assert!(ended, "a guest without credit is cut off");
    writer.join().unwrap();
}

#[test]
fn nonsense_is_answered_or_dropped() {
    let mut g = Guest::new("nonsense");
    let good = Packet {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        kind: STREAM,
        op: op::RW,
        ..Packet::default()
    };
    g.send_raw(&Packet { kind: 9, ..good }, b"");
    assert_eq!(g.op(), (op::RST, 0));
    g.send_raw(&Packet { dst_cid: 77, ..good }, b"");
    assert_eq!(g.op(), (op::RST, 0));
    g.send_raw(&Packet { op: 55, ..good }, b"");
    assert_eq!(g.op(), (op::RST, 0));
    // No answer: resets, strangers, short packets.
    g.send_raw(&Packet { op: op::RST, ..good }, b"");
    g.send_raw(&Packet { src_cid: 3, ..good }, b"");
    g.tx.chain(0, &[(0x20_0000, 43, false)]);
    g.tx.offer(0);
    g.tx.wait();
    // A length that is not there.
    let listener = UnixListener::bind(format!("{}_99", g.path.display())).unwrap();
    g.send(99, 5, op::REQUEST, 0, b"");
    assert_eq!(g.op(), (op::RESPONSE, 0));
    let _host = listener.accept().unwrap();
    g.send_raw(&Packet { src_port: 5, dst_port: 99, len: 100, ..good }, b"short");
    assert_eq!(g.op(), (op::RST, 0));
    // A host that says nothing sensible is dropped.
    let mut host = UnixStream::connect(&g.path).unwrap();
    host.write_all(b"GET / HTTP/1.0\n").unwrap();
    assert_eq!(host.read(&mut [0; 4]).unwrap(), 0);
    let mut host = UnixStream::connect(&g.path).unwrap();
    host.write_all(&[b'x'; 40]).unwrap();
    assert_eq!(host.read(&mut [0; 4]).unwrap_or(0), 0);
    assert!(!g.signal.waits_for_reset());
}

#[test]
fn a_guest_that_takes_no_answers_is_not_heard_for_ever() {
    let mut g = Guest::new("deaf");
    let mut heard = 0;
    for _ in 0..2 * MAX_REPLIES {
        // No buffers: every one of these would be answered.
        g.tx.chain(0, &[(0x20_0000, 44, false)]);
        use vm_memory::{Bytes, GuestAddress};
        let p = Packet { src_cid: u64::from(CID), dst_cid: 3, op: op::RW, ..Packet::default() };
        g.tx.mem.write_slice(&p.bytes(), GuestAddress(0x20_0000)).unwrap();
        g.tx.offer(0);
        // Long enough for a busy host: who is not heard now is not heard at all.
        let until = std::time::Instant::now() + Duration::from_secs(2);
        let mut used = g.tx.used();
        while used.is_none() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_micros(200));
            used = g.tx.used();
        }
        match used {
            Some(_) => heard += 1,
            None => break,
        }
    }
    assert!((MAX_REPLIES - 1..=MAX_REPLIES + 1).contains(&heard), "{heard}");
    // It listens again: everything goes on.
    assert_eq!(g.op(), (op::RST, 0));
    g.tx.wait();
}

#[test]
fn a_socket_in_use_is_not_taken_over_and_a_stale_one_is() {
    let g = Guest::new("busy");
    assert!(Vsock::new(3, &g.path).is_err());
    let stale = std::env::temp_dir().join(format!("paravane-vsock-{}-stale", std::process::id()));
    drop(UnixListener::bind(&stale).unwrap());
    let again = Vsock::new(3, &stale).unwrap();
    drop(again);
    eventually("the socket is gone", || !stale.exists());
}
