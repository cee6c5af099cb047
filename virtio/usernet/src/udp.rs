//! UDP between the guest and host sockets.
//!
//! Each source address of the guest gets one host socket, from which its datagrams go out. A datagram that comes back is
//! taken only from somebody whom this source has written to, and shows the address that the guest knew it by: the
//! host's loopback is the gateway, the resolver is the name server. Port forwards work the other way round: each peer of
//! the host's port becomes a port of the gateway.
//!
//! Everything is bounded: sources, peers of each, datagrams per round. What has been quiet longest makes room.

use crate::config::{Forward, GATEWAY};
use crate::frame::Output;
use crate::tokens::{Kind, Tokens};
use mio::net::UdpSocket;
use mio::{Interest, Registry};
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

/// Sources of the guest with a socket at one time.
const SOURCES: usize = 256;
/// Addresses that a source, or a forward, talks with at one time.
const PEERS: usize = 32;
/// A source that has been quiet for so long loses its socket.
const QUIET: Duration = Duration::from_secs(60);
/// Datagrams taken from one socket before the others get their turn.
const ROUND: usize = 32;
/// Longest payload of a datagram over IPv4, in bytes.
const LONGEST: usize = 65507;

/// A peer by its two names, with the time it was last heard of.
struct Peer {
    host: SocketAddr,
    shown: SocketAddrV4,
    used: Instant,
}

/// A source of the guest and its host socket.
struct Source {
    key: Key,
    socket: UdpSocket,
    readable: bool,
    peers: Vec<Peer>,
    used: Instant,
}

/// The guest's address, and whether the other side speaks IPv6, which a host resolver may.
type Key = (SocketAddrV4, bool);

/// A forwarded port.
struct Forwarded {
    socket: UdpSocket,
    guest: SocketAddrV4,
    readable: bool,
    peers: Vec<Peer>,
}

/// All UDP of the network.
pub(crate) struct Udp {
    sources: Vec<Option<Source>>,
    by_key: HashMap<Key, usize>,
    forwards: Vec<Forwarded>,
    buffer: Vec<u8>,
}

impl Udp {
    pub(crate) fn new() -> Self {
        Self { sources: Vec::new(), by_key: HashMap::new(), forwards: Vec::new(), buffer: vec![0; LONGEST] }
    }

    /// Opens a forwarded port and returns its address.
    pub(crate) fn forward(&mut self, forward: &Forward, registry: &Registry, tokens: Tokens) -> io::Result<SocketAddr> {
        let mut socket = UdpSocket::bind(forward.host)?;
        let token = tokens.token(Kind::UdpForward, self.forwards.len());
        registry.register(&mut socket, token, Interest::READABLE)?;
        let address = socket.local_addr()?;
        self.forwards.push(Forwarded { socket, guest: forward.guest, readable: true, peers: Vec::new() });
        Ok(address)
    }

    /// Sends a datagram of the guest to `host`, which the guest knows as `to`. False if it answers a forward's peer, or
    /// there is no socket for it; nothing is left to do for the caller either way.
    pub(crate) fn send(
        &mut self,
        from: SocketAddrV4,
        to: SocketAddrV4,
        host: Option<SocketAddr>,
        payload: &[u8],
        registry: &Registry,
        tokens: Tokens,
    ) {
        let now = Instant::now();
        // A datagram that a full socket does not take is lost, as datagrams are.
        for forward in &mut self.forwards {
            if forward.guest == from
                && let Some(peer) = forward.peers.iter_mut().find(|peer| peer.shown == to)
            {
                peer.used = now;
                let _ = forward.socket.send_to(payload, peer.host);
                return;
            }
        }
        let Some(host) = host else { return };
        let Ok(index) = self.source((from, host.is_ipv6()), now, registry, tokens) else { return };
        let Some(source) = self.sources[index].as_mut() else { return };
        source.used = now;
        remember(&mut source.peers, host, to, now);
        let _ = source.socket.send_to(payload, host);
    }

    /// The socket of a source, opened if need be.
    fn source(&mut self, key: Key, now: Instant, registry: &Registry, tokens: Tokens) -> io::Result<usize> {
        if let Some(&index) = self.by_key.get(&key) {
            return Ok(index);
        }
        if self.by_key.len() >= SOURCES {
            let open = self.sources.iter().enumerate();
            let quietest = open.filter_map(|(index, source)| Some((source.as_ref()?.used, index))).min();
            if let Some((_, index)) = quietest {
                self.close(index, registry);
            }
        }
        let any: SocketAddr = if key.1 { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() };
        let mut socket = UdpSocket::bind(any)?;
        let index = self.sources.iter().position(Option::is_none).unwrap_or(self.sources.len());
        registry.register(&mut socket, tokens.token(Kind::UdpSource, index), Interest::READABLE)?;
        if index == self.sources.len() {
            self.sources.push(None);
        }
        self.sources[index] = Some(Source { key, socket, readable: false, peers: Vec::new(), used: now });
        self.by_key.insert(key, index);
        Ok(index)
    }

    fn close(&mut self, index: usize, registry: &Registry) {
        if let Some(mut source) = self.sources[index].take() {
            self.by_key.remove(&source.key);
            // The socket goes away next, and its registration with it.
            let _ = registry.deregister(&mut source.socket);
        }
    }

    pub(crate) fn source_event(&mut self, index: usize) {
        if let Some(Some(source)) = self.sources.get_mut(index) {
            source.readable = true;
        }
    }

    pub(crate) fn forward_event(&mut self, index: usize) {
        if let Some(forward) = self.forwards.get_mut(index) {
            forward.readable = true;
        }
    }

    /// Moves datagrams to the guest; true if some are left in the host's sockets and there is room for them.
    pub(crate) fn run(&mut self, output: &mut Output) -> bool {
        let now = Instant::now();
        let mut left = false;
        for source in self.sources.iter_mut().flatten().filter(|source| source.readable) {
            source.readable = drain(&source.socket, &mut self.buffer, output, |host, payload, output| {
                if let Some(peer) = source.peers.iter_mut().find(|peer| peer.host == host) {
                    peer.used = now;
                    source.used = now;
                    output.udp(peer.shown, source.key.0, payload);
                }
            });
            left |= source.readable;
        }
        for forward in self.forwards.iter_mut().filter(|forward| forward.readable) {
            forward.readable = drain(&forward.socket, &mut self.buffer, output, |host, payload, output| {
                let shown = show(&forward.peers, host);
                remember(&mut forward.peers, host, shown, now);
                output.udp(shown, forward.guest, payload);
            });
            left |= forward.readable;
        }
        left && !output.is_full()
    }

    /// Closes what has been quiet for long. To be called every now and then.
    pub(crate) fn expire(&mut self, registry: &Registry) {
        let now = Instant::now();
        for index in 0..self.sources.len() {
            if self.sources[index].as_ref().is_some_and(|source| now.duration_since(source.used) > QUIET) {
                self.close(index, registry);
            }
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Closes all sources, as after a reset of the guest's card.
    pub(crate) fn reset(&mut self, registry: &Registry) {
        for index in 0..self.sources.len() {
            self.close(index, registry);
        }
        for forward in &mut self.forwards {
            forward.peers.clear();
        }
    }
}

/// Takes up to a round of datagrams; true if there may be more.
fn drain(
    socket: &UdpSocket,
    buffer: &mut [u8],
    output: &mut Output,
    mut take: impl FnMut(SocketAddr, &[u8], &mut Output),
) -> bool {
    for _ in 0..ROUND {
        if output.is_full() {
            return true;
        }
        match socket.recv_from(buffer) {
            Ok((len, from)) => take(from, &buffer[..len], output),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // An earlier datagram was refused, or a signal came in between.
            Err(_) => {}
        }
    }
    true
}

/// Notes that a peer is in use; the one that was quiet longest makes room.
fn remember(peers: &mut Vec<Peer>, host: SocketAddr, shown: SocketAddrV4, now: Instant) {
    if let Some(peer) = peers.iter_mut().find(|peer| peer.host == host && peer.shown == shown) {
        peer.used = now;
        return;
    }
    if peers.len() >= PEERS
        && let Some((index, _)) = peers.iter().enumerate().min_by_key(|(_, peer)| peer.used)
    {
        peers.swap_remove(index);
    }
    peers.push(Peer { host, shown, used: now });
}

/// The address under which the guest sees a peer of a forward: the gateway, with the peer's own port if that is free.
fn show(peers: &[Peer], host: SocketAddr) -> SocketAddrV4 {
    if let Some(peer) = peers.iter().find(|peer| peer.host == host) {
        return peer.shown;
    }
    let mut port = host.port().max(1);
    // There are far fewer peers than ports.
    while peers.iter().any(|peer| peer.shown.port() == port) {
        port = port.checked_add(1).unwrap_or(1024);
    }
    SocketAddrV4::new(GATEWAY, port)
}
