//! A network for one guest, in this process, with no privileges: Ethernet frames in, host sockets out.
//!
//! The guest finds an ordinary little network, the one that users of QEMU know:
//!
//! | address | who answers |
//! |---|---|
//! | 10.0.2.15 | the guest itself, by DHCP |
//! | 10.0.2.2 | the gateway; its ports are those of the host's loopback |
//! | 10.0.2.3 | the name server; requests go on to the host's resolver |
//! | anything else | whatever the host reaches, through host sockets |
//!
//! It knows nothing of virtio. Whoever owns the network card runs an event loop of `mio` on a thread of its own and
//! calls, in this order: [`UserNet::input`] for each frame of the guest, [`UserNet::event`] for each event of a socket,
//! [`UserNet::run`] to let everything move, [`UserNet::output`] and [`UserNet::consume`] for frames to the guest.
//! `run` says when it wants to be called again though nothing happens. No call blocks.
//!
//! Inside, [`tcp`] ends the guest's connections with smoltcp and joins them to host sockets, [`udp`] carries datagrams,
//! [`local`] answers ARP, pings and DHCP, and [`frame`] holds the bounded queue to the guest. A guest may send what it
//! likes: what cannot be read is dropped and counted, everything that grows has a bound, and no frame makes the network
//! fail.
//!
//! IPv6 and IP fragments from the guest are dropped; ICMP beyond a ping of the gateway is not carried.
#![forbid(unsafe_code)]

mod config;
mod frame;
pub mod fuzz;
mod local;
mod tcp;
#[cfg(test)]
mod tests;
mod tokens;
mod udp;

pub use config::{Config, Forward, ForwardError, GATEWAY, GUEST, NAME_SERVER, Protocol, Reach};
pub use frame::{Checksum, Frame, LONGEST_FRAME, MTU, Offloads, Segments};

use frame::{ETHERNET, Output};
use mio::{Registry, Token};
use smoltcp::wire::{
    DHCP_SERVER_PORT, EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, UdpPacket,
};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

/// The gateway's MAC address, from the locally administered range.
const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
/// Quiet UDP sockets are looked for this often.
const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// A port forward that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for a port forward: {error}; is another program using the port?")]
pub struct ListenError {
    /// Where it should listen.
    pub address: SocketAddr,
    /// What the system said.
    pub error: io::Error,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames of the guest.
    pub received: u64,
    /// Those among them that could not be read or are of a kind that is not carried.
    pub ignored: u64,
    /// Times that the TCP library failed on what it was given; connections were reset each time.
    pub resets: u64,
}

/// The network.
pub struct UserNet {
    registry: Registry,
    tokens: tokens::Tokens,
    reach: Reach,
    resolver: SocketAddr,
    output: Output,
    tcp: tcp::Tcp,
    udp: udp::Udp,
    counters: Counters,
    cleaned: Instant,
    listening: Vec<SocketAddr>,
}

impl UserNet {
    /// Makes the network and opens its forwarded ports. Its sockets are registered in `registry` with tokens from
    /// `first_token` on, without an upper end.
    ///
    /// # Errors
    /// A forwarded port cannot be opened.
    pub fn new(config: &Config, registry: Registry, first_token: usize) -> Result<Self, ListenError> {
        let tokens = tokens::Tokens(first_token);
        let (mut tcp, mut udp) = (tcp::Tcp::new(), udp::Udp::new());
        let mut listening = Vec::new();
        for forward in &config.forwards {
            let opened = match forward.protocol {
                Protocol::Tcp => tcp.forward(forward, &registry, tokens),
                Protocol::Udp => udp.forward(forward, &registry, tokens),
            };
            listening.push(opened.map_err(|error| ListenError { address: forward.host, error })?);
        }
        Ok(Self {
            registry,
            tokens,
            reach: config.reach.clone(),
            resolver: config.resolver(),
            output: Output::new(EthernetAddress(config.mac), GATEWAY_MAC),
            tcp,
            udp,
            counters: Counters::default(),
            cleaned: Instant::now(),
            listening,
        })
    }

    /// Where the forwarded ports listen, in the order of the configuration; port 0 has become a real one.
    pub fn listening(&self) -> &[SocketAddr] {
        &self.listening
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Says what the guest's card can finish by itself. Connections that are open keep what they began with.
    pub fn set_offloads(&mut self, offloads: Offloads) {
        self.output.offloads = Offloads { tcp4: offloads.tcp4 && offloads.checksum, ..offloads };
    }

    /// Ends all connections and forgets waiting frames, as after a reset of the guest's card. Forwarded ports stay open.
    pub fn reset(&mut self) {
        self.output.clear();
        self.output.offloads = Offloads::default();
        self.tcp.reset(&self.registry);
        self.udp.reset(&self.registry);
        self.output.clear();
    }

    /// Takes a frame of the guest. Its TCP and UDP checksums are not looked at: between the guest and here nothing gets
    /// lost, and a card with checksum offload leaves them open.
    pub fn input(&mut self, frame: &[u8]) {
        self.counters.received += 1;
        if self.take(frame).is_none() {
            self.counters.ignored += 1;
        }
    }

    fn take(&mut self, frame: &[u8]) -> Option<()> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        if frame.len() > LONGEST_FRAME {
            return None;
        }
        let source = ethernet.src_addr();
        if source.is_unicast() {
            self.output.guest = source;
        }
        match ethernet.ethertype() {
            EthernetProtocol::Arp => local::arp(ethernet.payload(), &mut self.output),
            EthernetProtocol::Ipv4 => return self.take_ipv4(&frame[ETHERNET..]),
            _ => return None,
        }
        Some(())
    }

    fn take_ipv4(&mut self, packet: &[u8]) -> Option<()> {
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        if ip.version() != 4 || ip.more_frags() || ip.frag_offset() != 0 {
            return None;
        }
        let packet = packet.get(..usize::from(ip.total_len()))?;
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        match ip.next_header() {
            IpProtocol::Tcp => self.take_tcp(packet),
            IpProtocol::Udp => self.take_udp(from, to, ip.payload())?,
            IpProtocol::Icmp => local::icmp(from, to, ip.payload(), &mut self.output),
            _ => return None,
        }
        Some(())
    }

    fn take_tcp(&mut self, packet: &[u8]) {
        let (reach, resolver) = (&self.reach, self.resolver);
        let host = |to| translate(to, reach, resolver);
        let (tcp, output, registry) = (&mut self.tcp, &mut self.output, &self.registry);
        let fine = guarded(|| tcp.input(packet, host, output, registry, self.tokens));
        self.recover(fine);
    }

    /// Resets all connections if the TCP library has failed.
    fn recover(&mut self, fine: bool) {
        if !fine {
            self.counters.resets += 1;
            self.tcp.reset(&self.registry);
        }
    }

    fn take_udp(&mut self, from: Ipv4Addr, to: Ipv4Addr, datagram: &[u8]) -> Option<()> {
        let udp = UdpPacket::new_checked(datagram).ok()?;
        let (source, target) = (udp.src_port(), udp.dst_port());
        if target == DHCP_SERVER_PORT && (to == GATEWAY || to.is_broadcast()) {
            local::dhcp(udp.payload(), &mut self.output);
            return Some(());
        }
        if source == 0 || target == 0 || from.is_unspecified() {
            return None;
        }
        let (from, to) = (SocketAddrV4::new(from, source), SocketAddrV4::new(to, target));
        let host = translate(to, &self.reach, self.resolver);
        self.udp.send(from, to, host, udp.payload(), &self.registry, self.tokens);
        Some(())
    }

    /// Takes an event of the loop; false if its token is somebody else's.
    pub fn event(&mut self, token: Token, readable: bool, writable: bool) -> bool {
        let Some((kind, index)) = self.tokens.read(token) else { return false };
        match kind {
            tokens::Kind::Flow => self.tcp.flow_event(index, readable, writable),
            tokens::Kind::Listener => self.tcp.listener_event(index),
            tokens::Kind::UdpSource => self.udp.source_event(index),
            tokens::Kind::UdpForward => self.udp.forward_event(index),
        }
        true
    }

    /// Lets everything move that can. Returns after what time to call again though nothing happens; `None` if only
    /// events and frames matter. While [`Self::output`] has frames, it is to be called again when they are gone.
    pub fn run(&mut self) -> Option<Duration> {
        let more = self.udp.run(&mut self.output);
        let (tcp, output, registry) = (&mut self.tcp, &mut self.output, &self.registry);
        let fine = guarded(|| tcp.run(output, registry, self.tokens));
        self.recover(fine);
        if self.cleaned.elapsed() > HOUSEKEEPING {
            self.cleaned = Instant::now();
            self.udp.expire(&self.registry);
        }
        if more {
            return Some(Duration::ZERO);
        }
        let cleaning = (!self.udp.is_idle()).then_some(HOUSEKEEPING);
        // A full queue holds TCP up, whose timers would ask for a turn at once and get nowhere.
        let timer = if self.output.is_full() { None } else { self.tcp.deadline() };
        timer.into_iter().chain(cleaning).min()
    }

    /// The next frame for the guest.
    pub fn output(&self) -> Option<&Frame> {
        self.output.front()
    }

    /// Removes the frame that [`Self::output`] returned.
    pub fn consume(&mut self) {
        self.output.pop();
    }
}

/// Runs something that hands the guest's bytes to the TCP library; false if that panicked. The library is meant not to, and
/// fuzzing has not made it; but its sequence arithmetic asserts, and a guest is not to get more out of a hole in it
/// than the loss of its own connections. Whoever gets false throws the library's state away.
fn guarded(run: impl FnOnce()) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_ok()
}

/// Where a connection or datagram to `to` goes on the host.
fn translate(to: SocketAddrV4, reach: &Reach, resolver: SocketAddr) -> Option<SocketAddr> {
    const NAMES: u16 = 53;
    let ip = *to.ip();
    let host = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), to.port());
    match reach {
        Reach::Nothing => return None,
        Reach::HostPorts(ports) => return (ip == GATEWAY && ports.contains(&to.port())).then_some(host),
        Reach::Everything => {}
    }
    if ip == GATEWAY {
        return Some(host);
    }
    if ip == NAME_SERVER {
        return (to.port() == NAMES).then_some(resolver);
    }
    let own_network = ip.octets()[..3] == GATEWAY.octets()[..3];
    // The host's loopback is reached as the gateway, and not by names that mean the guest itself.
    let nowhere = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast();
    (!own_network && !nowhere && ip.octets()[0] != 0).then_some(SocketAddr::V4(to))
}
