//! A hostile guest, driven by bytes: for a fuzzer and for the tests.
//!
//! Bytes are read as a list of things to do: raw frames, TCP segments that belong to a connection (so that they get
//! past the first check), datagrams, and turns of the network. The only reachable port of the host belongs to a listener of
//! the harness itself, which echoes; nothing leaves the process's own loopback sockets.

use crate::frame::{ETHERNET, IPV4, ipv4_header};
use crate::{Config, GATEWAY, GUEST, Offloads, Reach, UserNet};
use mio::{Events, Poll};
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpPacket, TcpSeqNumber};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

/// Bytes to decide by; an end that is never reached.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }
    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
    fn take(&mut self, len: usize) -> Vec<u8> {
        let (first, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        first.to_vec()
    }
}

/// What the guest knows of its connections: the last acknowledgement and sequence number it was sent, per port.
type Seen = [(TcpSeqNumber, TcpSeqNumber); 4];

struct Harness {
    poll: Poll,
    net: UserNet,
    listener: TcpListener,
    streams: Vec<TcpStream>,
    seen: Seen,
}

/// Does what the bytes say. Whatever that is, it returns, and no bound is exceeded.
///
/// # Panics
/// When the network does something that it promises not to do, and when the host has no sockets.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    listener.set_nonblocking(true).expect("a socket that does not wait");
    let port = listener.local_addr().expect("a bound socket").port();
    let poll = Poll::new().expect("an event loop");
    let config = Config { reach: Reach::HostPorts(vec![port]), ..Config::default() };
    let registry = poll.registry().try_clone().expect("an event loop");
    let mut net = UserNet::new(&config, registry, 0).expect("no ports to open");
    let offloads = bytes.byte() & 1 != 0;
    net.set_offloads(Offloads { checksum: offloads, tcp4: offloads });
    let mut harness =
        Harness { poll, net, listener, streams: Vec::new(), seen: [(TcpSeqNumber(0), TcpSeqNumber(0)); 4] };
    while !bytes.0.is_empty() {
        match bytes.byte() % 8 {
            0 => {
                let len = usize::from(bytes.byte());
                let frame = bytes.take(len);
                harness.net.input(&frame);
            }
            1 => {
                let (kind, len) = (bytes.byte(), usize::from(bytes.byte()));
                let payload = bytes.take(len);
                let protocol = IpProtocol::from([1, 6, 17, kind][usize::from(kind % 4)]);
                harness.packet(protocol, bytes.byte(), &payload);
            }
            2 => harness.turn(),
            _ => {
                let segment = harness.segment(&mut bytes, port);
                harness.packet(IpProtocol::Tcp, 0, &segment);
            }
        }
    }
    harness.turn();
    harness.net.reset();
    assert!(harness.net.output().is_none(), "a reset leaves nothing behind");
    assert_eq!(harness.net.counters().resets, 0, "the TCP library failed");
}

impl Harness {
    /// A packet of the guest to the gateway; bits of `odd` spoil its header.
    fn packet(&mut self, protocol: IpProtocol, odd: u8, payload: &[u8]) {
        let mut frame = vec![0; ETHERNET + IPV4 + payload.len()];
        frame[..12].copy_from_slice(&[2; 12]);
        frame[12] = 8;
        let to = if odd & 1 == 0 { GATEWAY } else { Ipv4Addr::BROADCAST };
        ipv4_header(&mut frame[ETHERNET..], GUEST, to, protocol, |_| {});
        let mut packet = Ipv4Packet::new_unchecked(&mut frame[ETHERNET..]);
        if odd & 2 != 0 {
            packet.set_header_len(odd >> 1);
        }
        if odd & 4 != 0 {
            packet.set_total_len(u16::from(odd) << 1);
        }
        frame[ETHERNET + IPV4..].copy_from_slice(payload);
        self.net.input(&frame);
    }

    /// A segment of one of four connections, near the numbers that are in use.
    fn segment(&self, bytes: &mut Bytes<'_>, port: u16) -> Vec<u8> {
        let (which, flags) = (usize::from(bytes.byte() % 4), bytes.byte());
        let (expected, heard) = self.seen[which];
        let long = if flags & 0x80 != 0 { usize::from(bytes.word()) } else { usize::from(bytes.byte()) };
        let option_bytes = usize::from(bytes.byte() % 11) * 4;
        let options = bytes.take(option_bytes);
        let header = 20 + option_bytes;
        let mut segment = vec![0x5a; (header + long).min(65000)];
        segment[20..header].fill(1);
        segment[20..20 + options.len()].copy_from_slice(&options);
        let near = |number: TcpSeqNumber, by: u8| match by {
            0..=199 => number,
            200..=227 => number + usize::from(by - 199),
            228..=250 => TcpSeqNumber(number.0.wrapping_sub(i32::from(by) * 77)),
            _ => TcpSeqNumber(number.0.wrapping_add(i32::MAX - i32::from(by))),
        };
        let mut tcp = TcpPacket::new_unchecked(&mut segment);
        tcp.set_src_port(1000 + which as u16);
        tcp.set_dst_port(port);
        tcp.set_seq_number(near(expected, bytes.byte()));
        tcp.set_ack_number(near(heard, bytes.byte()));
        tcp.clear_flags();
        tcp.set_header_len(header as u8);
        tcp.set_syn(flags & 0x11 == 0x11);
        tcp.set_ack(flags & 2 != 0 || flags & 0x11 != 0x11);
        tcp.set_fin(flags & 0x0c == 0x0c);
        tcp.set_rst(flags & 0x70 == 0x70);
        tcp.set_urgent_at(0);
        tcp.set_window_len(if flags & 0x20 != 0 { bytes.word() } else { 5000 });
        segment
    }

    fn turn(&mut self) {
        let mut events = Events::with_capacity(64);
        for _ in 0..3 {
            self.poll.poll(&mut events, Some(Duration::ZERO)).expect("an event loop");
            for event in &events {
                self.net.event(event.token(), event.is_readable(), event.is_writable());
            }
            self.net.run();
            let mut count = 0;
            while let Some(frame) = self.net.output() {
                assert!(frame.bytes().len() <= crate::LONGEST_FRAME);
                if let Some(cut) = frame.segments {
                    assert!(frame.checksum.is_some() && cut.size > 0 && usize::from(cut.header) < frame.bytes().len());
                }
                note(&frame.bytes()[ETHERNET..], &mut self.seen);
                self.net.consume();
                count += 1;
            }
            assert!(count <= 64, "the queue to the guest is bounded");
            while let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(true).expect("a socket that does not wait");
                self.streams.push(stream);
            }
            let mut buffer = [0; 4096];
            self.streams.retain_mut(|stream| match stream.read(&mut buffer) {
                Ok(0) => false,
                Ok(count) => stream.write(&buffer[..count]).is_ok(),
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            });
        }
    }
}

/// Reads from a segment to the guest where its connection is.
fn note(packet: &[u8], seen: &mut Seen) {
    let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
    let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else { return };
    if ip.next_header() != IpProtocol::Tcp {
        return;
    }
    if let Some(entry) = seen.get_mut(usize::from(tcp.dst_port().wrapping_sub(1000))) {
        *entry = (tcp.ack_number(), tcp.seq_number() + tcp.segment_len());
    }
}
