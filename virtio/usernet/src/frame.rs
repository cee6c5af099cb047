//! Frames on their way to the guest, and what the guest's card has to finish about them.
//!
//! A frame is an Ethernet frame of up to 64 KiB. That is far beyond the link's MTU of 1500 bytes and on purpose: like a
//! card with segmentation offload, this side hands over one long TCP segment and says how it would be cut
//! ([`Segments`]), and the guest takes it whole. Checksums are left to the reader in the same way ([`Checksum`]).

use smoltcp::wire::{EthernetAddress, IpAddress, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket};
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub(crate) const IPV4: usize = 20;
/// Bytes of a UDP header.
pub(crate) const UDP: usize = 8;
/// Largest IP packet that the link carries without segmentation offload, in bytes.
pub const MTU: usize = 1500;
/// Largest IP packet that this side builds: 44 segments of 1460 bytes of payload, with one header.
pub(crate) const LONGEST_PACKET: usize = 40 + 44 * 1460;
/// Largest frame that this side builds or takes, in bytes.
pub const LONGEST_FRAME: usize = ETHERNET + 65535;

/// How many frames wait for the guest at most; readers of host sockets stop before that.
const QUEUE: usize = 64;
/// So many buffers are kept for the next frames.
const SPARE: usize = 32;

/// A checksum that is still to be computed: over everything from `start` on, stored `offset` bytes after `start`. The
/// field holds the sum of the pseudo header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Where the sum starts, in bytes from the start of the frame.
    pub start: u16,
    /// Where it is stored, in bytes from `start`.
    pub offset: u16,
}

/// A TCP segment that is longer than the link's MTU: how it is to be cut where it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Bytes of payload in each segment.
    pub size: u16,
    /// Bytes of all headers, Ethernet to TCP.
    pub header: u16,
}

/// What the guest's card can finish by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// TCP and UDP checksums may be left open.
    pub checksum: bool,
    /// TCP segments over IPv4 may be longer than the MTU; needs `checksum`.
    pub tcp4: bool,
}

/// A frame for the guest.
#[derive(Debug, Default)]
pub struct Frame {
    /// Never shortened, so that a buffer is zeroed once and not for every frame.
    storage: Vec<u8>,
    len: usize,
    /// An open checksum.
    pub checksum: Option<Checksum>,
    /// How to cut the frame; only with an open checksum.
    pub segments: Option<Segments>,
}

impl Frame {
    /// The bytes, from the destination's MAC address on.
    pub fn bytes(&self) -> &[u8] {
        &self.storage[..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[..self.len]
    }
}

/// The bounded queue of frames for the guest.
pub(crate) struct Output {
    queue: VecDeque<Frame>,
    spare: Vec<Frame>,
    /// The link's two ends.
    pub(crate) guest: EthernetAddress,
    pub(crate) gateway: EthernetAddress,
    pub(crate) offloads: Offloads,
    /// Identification of the last datagram, by which its fragments find together.
    ident: u16,
}

impl Output {
    pub(crate) fn new(guest: EthernetAddress, gateway: EthernetAddress) -> Self {
        let offloads = Offloads::default();
        Self { queue: VecDeque::new(), spare: Vec::new(), guest, gateway, offloads, ident: 0 }
    }

    /// True if no more frames are taken until the guest has fetched some.
    pub(crate) fn is_full(&self) -> bool {
        self.queue.len() >= QUEUE
    }

    pub(crate) fn front(&self) -> Option<&Frame> {
        self.queue.front()
    }

    pub(crate) fn pop(&mut self) {
        if let Some(frame) = self.queue.pop_front()
            && self.spare.len() < SPARE
        {
            self.spare.push(frame);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }

    /// Queues a frame with `len` bytes after the Ethernet header, which `fill` writes; `finish` sees the whole frame. A
    /// caller that can wait looks at [`Self::is_full`] first.
    fn push<R>(
        &mut self,
        kind: u16,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
        finish: impl FnOnce(&mut Frame),
    ) -> R {
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.len = ETHERNET + len;
        if frame.storage.len() < frame.len {
            frame.storage.resize(frame.len, 0);
        }
        frame.checksum = None;
        frame.segments = None;
        frame.storage[..6].copy_from_slice(self.guest.as_bytes());
        frame.storage[6..12].copy_from_slice(self.gateway.as_bytes());
        frame.storage[12..14].copy_from_slice(&kind.to_be_bytes());
        let result = fill(&mut frame.bytes_mut()[ETHERNET..]);
        finish(&mut frame);
        // A full queue drops the frame, as a wire would.
        if !self.is_full() {
            self.queue.push_back(frame);
        }
        result
    }

    /// An ARP packet.
    pub(crate) fn arp(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) {
        self.push(0x0806, len, fill, |_| {});
    }

    /// An IPv4 packet that `fill` completes, TCP's checksum excepted, which is left open or computed here. `segment` says
    /// how much payload goes into one segment of the packet's connection.
    pub(crate) fn ipv4<R>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
        segment: impl FnOnce(&[u8]) -> u16,
    ) -> R {
        let offloads = self.offloads;
        self.push(0x0800, len, fill, |frame| finish_tcp(frame, offloads, segment))
    }

    /// A UDP datagram, in fragments if it is longer than the MTU.
    pub(crate) fn udp(&mut self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) {
        let Ok(length) = u16::try_from(UDP + payload.len()) else { return };
        let mut datagram = vec![0; usize::from(length)];
        let mut packet = UdpPacket::new_unchecked(&mut datagram);
        packet.set_src_port(from.port());
        packet.set_dst_port(to.port());
        packet.set_len(length);
        packet.payload_mut().copy_from_slice(payload);
        packet.fill_checksum(&IpAddress::Ipv4(*from.ip()), &IpAddress::Ipv4(*to.ip()));
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        // RFC 791: offsets count in units of 8 bytes.
        const PIECE: usize = (MTU - IPV4) / 8 * 8;
        let pieces = datagram.len().div_ceil(PIECE);
        for (index, piece) in datagram.chunks(PIECE).enumerate() {
            let (offset, more) = (index * PIECE, index + 1 < pieces);
            let fill = |buffer: &mut [u8]| {
                ipv4_header(buffer, *from.ip(), *to.ip(), IpProtocol::Udp, |packet| {
                    packet.set_ident(ident);
                    packet.set_more_frags(more);
                    packet.set_frag_offset(u16::try_from(offset).unwrap_or(u16::MAX));
                });
                buffer[IPV4..].copy_from_slice(piece);
            };
            self.push(0x0800, IPV4 + piece.len(), fill, |_| {});
        }
    }
}

/// Writes an IPv4 header for a packet that fills the buffer.
pub(crate) fn ipv4_header(
    buffer: &mut [u8],
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: IpProtocol,
    more: impl FnOnce(&mut Ipv4Packet<&mut [u8]>),
) {
    let len = u16::try_from(buffer.len()).unwrap_or(u16::MAX);
    let mut packet = Ipv4Packet::new_unchecked(buffer);
    packet.set_version(4);
    packet.set_header_len(IPV4 as u8);
    packet.set_dscp(0);
    packet.set_ecn(0);
    packet.set_total_len(len);
    packet.set_ident(0);
    packet.clear_flags();
    packet.set_frag_offset(0);
    packet.set_hop_limit(64);
    packet.set_next_header(protocol);
    packet.set_src_addr(from);
    packet.set_dst_addr(to);
    more(&mut packet);
    packet.fill_checksum();
}

/// Leaves the TCP checksum of a frame open, or computes it, and notes how the frame is to be cut.
fn finish_tcp(frame: &mut Frame, offloads: Offloads, segment: impl FnOnce(&[u8]) -> u16) {
    let packet = Ipv4Packet::new_unchecked(&mut frame.storage[ETHERNET..frame.len]);
    if packet.next_header() != IpProtocol::Tcp {
        return;
    }
    let (from, to) = (packet.src_addr(), packet.dst_addr());
    let ip_header = usize::from(packet.header_len());
    let start = ETHERNET + ip_header;
    let mut tcp = TcpPacket::new_unchecked(&mut frame.storage[start..frame.len]);
    if !offloads.checksum {
        tcp.fill_checksum(&IpAddress::Ipv4(from), &IpAddress::Ipv4(to));
        return;
    }
    let header = start + usize::from(tcp.header_len());
    let tcp_len = u32::try_from(frame.len - start).unwrap_or(0);
    tcp.set_checksum(pseudo_header(from, to, tcp_len));
    frame.checksum = Some(Checksum { start: start as u16, offset: 16 });
    // No segment is shorter than this in practice; most frames need no look at their connection.
    if frame.len - header <= 88 {
        return;
    }
    let segment = segment(&frame.storage[ETHERNET..frame.len]);
    if frame.len - header > usize::from(segment) {
        frame.segments = Some(Segments { size: segment, header: header as u16 });
    }
}

/// The sum over TCP's pseudo header (RFC 9293, section 3.1), folded to 16 bits, not inverted.
fn pseudo_header(from: Ipv4Addr, to: Ipv4Addr, tcp_len: u32) -> u16 {
    let words = |address: Ipv4Addr| {
        let bits = address.to_bits();
        (bits >> 16) + (bits & 0xffff)
    };
    let mut sum = words(from) + words(to) + u32::from(u8::from(IpProtocol::Tcp)) + tcp_len;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output::new(EthernetAddress([2, 0, 0, 0, 0, 1]), EthernetAddress([2, 0, 0, 0, 0, 2]))
    }

    #[test]
    fn long_datagrams_go_out_in_fragments_that_add_up() {
        let mut output = output();
        let payload: Vec<u8> = (0..4000u32).map(|i| i as u8).collect();
        let (from, to) = ("10.0.2.2:53".parse().unwrap(), "10.0.2.15:999".parse().unwrap());
        output.udp(from, to, &payload);
        let mut datagram = Vec::new();
        let mut last = false;
        while let Some(frame) = output.front() {
            let packet = Ipv4Packet::new_checked(&frame.bytes()[ETHERNET..]).unwrap();
            assert!(packet.verify_checksum() && usize::from(packet.total_len()) <= MTU && !last);
            assert_eq!(usize::from(packet.frag_offset()), datagram.len());
            datagram.extend_from_slice(packet.payload());
            last = !packet.more_frags();
            output.pop();
        }
        assert!(last);
        let packet = UdpPacket::new_checked(&datagram[..]).unwrap();
        assert!(packet.verify_checksum(&IpAddress::Ipv4(*from.ip()), &IpAddress::Ipv4(*to.ip())));
        assert_eq!(packet.payload(), payload);
    }

    #[test]
    fn an_open_checksum_completes_to_the_right_one() {
        let (from, to) = (Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(200, 250, 255, 15));
        let mut sums = Vec::new();
        for checksum in [false, true] {
            let mut output = output();
            output.offloads = Offloads { checksum, tcp4: checksum };
            let fill = |buffer: &mut [u8]| {
                ipv4_header(buffer, from, to, IpProtocol::Tcp, |_| {});
                buffer[IPV4..].fill(0x5a);
                TcpPacket::new_unchecked(&mut buffer[IPV4..]).set_header_len(20);
                TcpPacket::new_unchecked(&mut buffer[IPV4..]).set_checksum(0);
            };
            output.ipv4(IPV4 + 20 + 3001, fill, |_| 1460);
            let frame = output.front().unwrap();
            let mut bytes = frame.bytes().to_vec();
            if let Some(open) = frame.checksum {
                let start = usize::from(open.start);
                assert_eq!(frame.segments, Some(Segments { size: 1460, header: 54 }));
                let sum: u64 = bytes[start..]
                    .chunks(2)
                    .map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
                    .sum();
                let folded = (sum & 0xffff) + (sum >> 16);
                let folded = (folded & 0xffff) + (folded >> 16);
                let at = start + usize::from(open.offset);
                bytes[at..at + 2].copy_from_slice(&(!(folded as u16)).to_be_bytes());
            } else {
                assert_eq!(frame.segments, None);
            }
            sums.push(bytes);
        }
        assert_eq!(sums[0], sums[1]);
    }

    #[test]
    fn a_full_queue_drops() {
        let mut output = output();
        for _ in 0..QUEUE + 5 {
            output.arp(28, |_| {});
        }
        assert!(output.is_full());
        let mut count = 0;
        while output.front().is_some() {
            output.pop();
            count += 1;
        }
        assert_eq!(count, QUEUE);
    }
}
