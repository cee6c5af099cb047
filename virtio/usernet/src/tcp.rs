//! TCP between the guest and host sockets.
//!
//! smoltcp is the guest's partner: every connection of the guest ends here, in a socket of smoltcp, and its bytes go on
//! through a socket of the host. Nothing is forwarded at the level of packets, so that the host needs no privilege.
//!
//! **Out.** The guest's SYN is kept while the host connects. Once that has worked, a listening socket is made for
//! exactly the address that the guest asked for, and the SYN is let through to it; if it failed, the SYN meets no
//! socket, which smoltcp answers with a reset. So a guest sees refused connections as refused.
//!
//! **In.** A connection to a forwarded port is accepted and then made again from the gateway to the guest.
//!
//! **Long segments.** smoltcp believes that the link carries packets of 64 KiB. The guest's own long segments (TSO) fit
//! then. The other way smoltcp keeps to the segment size in the guest's SYN; where the guest takes long segments, that
//! option is raised before smoltcp reads it, and the frame says how it would have been cut.
//!
//! **Bounds.** At most [`FLOWS`] connections with two rings of [`RING`] bytes each. A full ring closes the window, or
//! stops reading from the host. A guest or a host that never answers is given up after a time.

use crate::config::{Forward, GATEWAY};
use crate::frame::{IPV4, LONGEST_PACKET, MTU, Output};
use crate::tokens::{Kind, Tokens};
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Clock;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint, IpListenEndpoint, Ipv4Packet, TcpPacket};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

/// Connections at one time, those that wait for the host included.
pub(crate) const FLOWS: usize = 512;
/// Bytes of a connection's ring in each direction.
pub(crate) const RING: usize = 256 * 1024;
/// A host that has not accepted after so long has not accepted.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// A guest that has not answered a forwarded connection after so long is not there.
const ANSWER_LIMIT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);
/// An idle guest is asked after so long whether the connection is still there ...
const KEEP_ALIVE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(75);
/// ... and given up if nothing came for so long.
const SILENCE_LIMIT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(300);
/// The segment size of a guest that does not name one (RFC 9293, section 3.7.1), in bytes.
const DEFAULT_SEGMENT: u16 = 536;
/// Connections accepted from a forwarded port before the others get their turn.
const ACCEPT_ROUND: usize = 16;

/// The guest's end and the other end, as the guest knows it.
type Key = (SocketAddrV4, SocketAddrV4);

enum Stage {
    /// The host connects; the guest's SYN waits.
    Connecting { syn: Vec<u8>, since: Instant },
    /// smoltcp has the connection.
    Joined { socket: SocketHandle, finished: bool },
}

struct Flow {
    key: Key,
    stream: TcpStream,
    stage: Stage,
    readable: bool,
    writable: bool,
    /// In the list of those that may have something to do.
    queued: bool,
    /// Payload of one segment to the guest, in bytes.
    segment: u16,
}

struct Listener {
    listener: TcpListener,
    guest: SocketAddrV4,
    ready: bool,
}

/// All TCP of the network.
pub(crate) struct Tcp {
    interface: Interface,
    sockets: SocketSet<'static>,
    flows: Vec<Option<Flow>>,
    by_key: HashMap<Key, usize>,
    queued: Vec<usize>,
    listeners: Vec<Listener>,
    start: Instant,
    next_port: u16,
    /// The last sweep over all connections.
    swept: Instant,
}

impl Tcp {
    pub(crate) fn new() -> Self {
        Self {
            interface: interface(),
            sockets: SocketSet::new(Vec::new()),
            flows: Vec::new(),
            by_key: HashMap::new(),
            queued: Vec::new(),
            listeners: Vec::new(),
            start: Instant::now(),
            next_port: FIRST_PORT,
            swept: Instant::now(),
        }
    }

    /// Opens a forwarded port and returns its address.
    pub(crate) fn forward(&mut self, forward: &Forward, registry: &Registry, tokens: Tokens) -> io::Result<SocketAddr> {
        let mut listener = TcpListener::bind(forward.host)?;
        registry.register(&mut listener, tokens.token(Kind::Listener, self.listeners.len()), Interest::READABLE)?;
        let address = listener.local_addr()?;
        self.listeners.push(Listener { listener, guest: forward.guest, ready: true });
        Ok(address)
    }

    /// Takes a packet of the guest, IP header included. `host` says where a new connection goes; `None` refuses it.
    pub(crate) fn input(
        &mut self,
        packet: &[u8],
        host: impl FnOnce(SocketAddrV4) -> Option<SocketAddr>,
        output: &mut Output,
        registry: &Registry,
        tokens: Tokens,
    ) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
        let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else { return };
        let key = (SocketAddrV4::new(ip.src_addr(), tcp.src_port()), SocketAddrV4::new(ip.dst_addr(), tcp.dst_port()));
        if key.0.port() == 0 || key.1.port() == 0 || !is_unicast(*key.0.ip()) || !is_unicast(*key.1.ip()) {
            return;
        }
        if let Some(&index) = self.by_key.get(&key) {
            self.input_known(index, packet, tcp.syn(), tcp.rst(), output, registry);
        } else if tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin() {
            self.open(key, packet, host(key.1), output, registry, tokens);
        } else {
            // Nobody's: smoltcp sends a reset where one is due.
            self.ingress(packet, output, 0);
        }
    }

    fn input_known(
        &mut self,
        index: usize,
        packet: &[u8],
        syn: bool,
        rst: bool,
        output: &mut Output,
        registry: &Registry,
    ) {
        let Some(flow) = self.flows[index].as_mut() else { return };
        let segment = match flow.stage {
            // The guest repeats its SYN; the one that waits will do.
            Stage::Connecting { .. } => {
                if rst {
                    self.remove(index, registry);
                }
                return;
            }
            Stage::Joined { .. } => flow.segment,
        };
        self.queue(index);
        if syn {
            let (packet, segment) = raise_segment_size(packet, output.offloads.tcp4);
            if let Some(flow) = self.flows[index].as_mut() {
                flow.segment = segment;
            }
            self.ingress(&packet, output, segment);
        } else {
            self.ingress(packet, output, segment);
        }
    }

    /// Starts a connection that the guest asks for.
    fn open(
        &mut self,
        key: Key,
        syn: &[u8],
        host: Option<SocketAddr>,
        output: &mut Output,
        registry: &Registry,
        tokens: Tokens,
    ) {
        if self.by_key.len() >= FLOWS {
            // The guest repeats its SYN after a second; perhaps there is room then.
            return;
        }
        let Some(stream) = host.and_then(|host| TcpStream::connect(host).ok()) else {
            self.ingress(syn, output, 0);
            return;
        };
        let (syn, segment) = raise_segment_size(syn, output.offloads.tcp4);
        let stage = Stage::Connecting { syn, since: Instant::now() };
        let flow = Flow { key, stream, stage, readable: false, writable: false, queued: false, segment };
        // If the event loop takes no more sockets, the guest tries again.
        let _ = self.insert(flow, registry, tokens);
    }

    fn insert(&mut self, mut flow: Flow, registry: &Registry, tokens: Tokens) -> io::Result<usize> {
        // Small writes are the guest's decision, not to be held back a second time.
        let _ = flow.stream.set_nodelay(true);
        let index = self.flows.iter().position(Option::is_none).unwrap_or(self.flows.len());
        let token = tokens.token(Kind::Flow, index);
        registry.register(&mut flow.stream, token, Interest::READABLE | Interest::WRITABLE)?;
        self.by_key.insert(flow.key, index);
        if index == self.flows.len() {
            self.flows.push(None);
        }
        self.flows[index] = Some(flow);
        Ok(index)
    }

    fn remove(&mut self, index: usize, registry: &Registry) {
        if let Some(mut flow) = self.flows[index].take() {
            self.by_key.remove(&flow.key);
            // The socket goes away next, and its registration with it.
            let _ = registry.deregister(&mut flow.stream);
            if let Stage::Joined { socket, .. } = flow.stage {
                self.sockets.remove(socket);
            }
        }
    }

    fn queue(&mut self, index: usize) {
        if let Some(Some(flow)) = self.flows.get_mut(index)
            && !flow.queued
        {
            flow.queued = true;
            self.queued.push(index);
        }
    }

    pub(crate) fn flow_event(&mut self, index: usize, readable: bool, writable: bool) {
        if let Some(Some(flow)) = self.flows.get_mut(index) {
            flow.readable |= readable;
            flow.writable |= writable;
            self.queue(index);
        }
    }

    pub(crate) fn listener_event(&mut self, index: usize) {
        if let Some(listener) = self.listeners.get_mut(index) {
            listener.ready = true;
        }
    }

    /// Moves bytes between the two sides until nothing moves or `output` is full.
    pub(crate) fn run(&mut self, output: &mut Output, registry: &Registry, tokens: Tokens) {
        self.accept(registry, tokens);
        if self.swept.elapsed() > Duration::from_millis(200) {
            self.swept = Instant::now();
            (0..self.flows.len()).for_each(|index| self.queue(index));
        }
        let queued = std::mem::take(&mut self.queued);
        for &index in &queued {
            if let Some(flow) = self.flows[index].as_mut() {
                flow.queued = false;
                self.pump(index, output, registry);
            }
        }
        self.egress(output);
        for index in queued {
            self.reap(index, output, registry);
        }
    }

    /// Sends what smoltcp has to send.
    fn egress(&mut self, output: &mut Output) {
        let now = self.now();
        let segments = Some((&self.by_key, &self.flows[..]));
        let mut link = Link { incoming: None, output, segment: DEFAULT_SEGMENT, segments };
        // A round sends one packet of each connection at most.
        while !link.output.is_full()
            && self.interface.poll_egress(now, &mut link, &mut self.sockets) == PollResult::SocketStateChanged
        {}
    }

    /// Gives smoltcp one packet.
    fn ingress(&mut self, packet: &[u8], output: &mut Output, segment: u16) {
        let now = self.now();
        let mut link = Link { incoming: Some(packet), output, segment, segments: None };
        self.interface.poll_ingress_single(now, &mut link, &mut self.sockets);
    }

    fn now(&self) -> Clock {
        Clock::from_micros(i64::try_from(self.start.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Takes new connections of forwarded ports.
    fn accept(&mut self, registry: &Registry, tokens: Tokens) {
        for index in 0..self.listeners.len() {
            for _ in 0..ACCEPT_ROUND {
                let listener = &mut self.listeners[index];
                if !listener.ready || self.by_key.len() >= FLOWS {
                    break;
                }
                let guest = listener.guest;
                match listener.listener.accept() {
                    Ok((stream, _)) => self.join_forwarded(stream, guest, registry, tokens),
                    // Out of descriptors, or a peer that is gone already: the next event or round tries again.
                    Err(_) => listener.ready = false,
                }
            }
        }
    }

    /// Makes an accepted connection again towards the guest.
    fn join_forwarded(&mut self, stream: TcpStream, guest: SocketAddrV4, registry: &Registry, tokens: Tokens) {
        let Some(port) = self.free_port(guest) else { return };
        let key = (guest, SocketAddrV4::new(GATEWAY, port));
        let mut socket = new_socket();
        socket.set_timeout(Some(ANSWER_LIMIT));
        let local = IpEndpoint::from(key.1);
        if socket.connect(self.interface.context(), guest, local).is_err() {
            return;
        }
        let socket = self.sockets.add(socket);
        let stage = Stage::Joined { socket, finished: false };
        let segment = DEFAULT_SEGMENT;
        let flow = Flow { key, stream, stage, readable: true, writable: true, queued: false, segment };
        match self.insert(flow, registry, tokens) {
            Ok(index) => self.queue(index),
            Err(_) => drop(self.sockets.remove(socket)),
        }
    }

    /// A port of the gateway that has no connection to this address of the guest.
    fn free_port(&mut self, guest: SocketAddrV4) -> Option<u16> {
        // One more than there may be connections is always enough.
        for _ in 0..=FLOWS {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.by_key.contains_key(&(guest, SocketAddrV4::new(GATEWAY, port))) {
                return Some(port);
            }
        }
        None
    }

    /// Moves what can be moved for one connection.
    fn pump(&mut self, index: usize, output: &mut Output, registry: &Registry) {
        let Some(flow) = self.flows[index].as_mut() else { return };
        match flow.stage {
            Stage::Connecting { since, .. } => {
                let failed = since.elapsed() > CONNECT_LIMIT;
                if flow.writable || failed {
                    self.join(index, failed, output, registry);
                }
            }
            Stage::Joined { socket, ref mut finished } => {
                let socket = self.sockets.get_mut::<Socket<'_>>(socket);
                pump_to_host(socket, &mut flow.stream, &mut flow.writable, finished);
                pump_to_guest(socket, &mut flow.stream, &mut flow.readable);
            }
        }
    }

    /// The host has connected, or has not: the guest's SYN is let through.
    fn join(&mut self, index: usize, mut failed: bool, output: &mut Output, registry: &Registry) {
        let Some(flow) = self.flows[index].as_mut() else { return };
        if !failed {
            failed = !matches!(flow.stream.take_error(), Ok(None));
            if !failed && flow.stream.peer_addr().is_err() {
                // connect(2) is still at it.
                flow.writable = false;
                return;
            }
        }
        let Stage::Connecting { syn, .. } = &mut flow.stage else { return };
        let syn = std::mem::take(syn);
        let (key, segment) = (flow.key, flow.segment);
        if failed {
            self.remove(index, registry);
            self.ingress(&syn, output, 0);
            return;
        }
        let mut socket = new_socket();
        let endpoint = IpListenEndpoint { addr: Some((*key.1.ip()).into()), port: key.1.port() };
        let listening = socket.listen(endpoint).is_ok();
        let handle = self.sockets.add(socket);
        flow.stage = Stage::Joined { socket: handle, finished: false };
        self.ingress(&syn, output, segment);
        // No socket may be left listening: it would take somebody else's SYN.
        if !listening || self.sockets.get::<Socket<'_>>(handle).state() != State::SynReceived {
            self.remove(index, registry);
        }
    }

    /// Removes a connection that is over.
    fn reap(&mut self, index: usize, output: &Output, registry: &Registry) {
        let Some(flow) = self.flows[index].as_ref() else { return };
        let Stage::Joined { socket, .. } = flow.stage else { return };
        let socket = self.sockets.get_mut::<Socket<'_>>(socket);
        let over = match socket.state() {
            // A reset that is still to be sent keeps its addresses.
            State::Closed if socket.remote_endpoint().is_none() => {
                let clean = flow_is_clean(flow);
                if !clean {
                    // The host's peer is to see a reset as well.
                    let _ = socket2::SockRef::from(&flow.stream).set_linger(Some(Duration::ZERO));
                }
                true
            }
            // The guest's last segment was answered unless there was no room for the answer.
            State::TimeWait => !output.is_full() && flow_is_clean(flow),
            State::Established => {
                socket.set_timeout(Some(SILENCE_LIMIT));
                false
            }
            _ => false,
        };
        if over {
            self.remove(index, registry);
        }
    }

    /// When to run again though nothing happens; `None` if only events matter.
    pub(crate) fn deadline(&mut self) -> Option<Duration> {
        if self.by_key.is_empty() {
            return None;
        }
        let now = self.now();
        let timer = self.interface.poll_delay(now, &self.sockets).map(Duration::from);
        // Connections that the host does not answer have no timer of smoltcp's.
        let sweep = Duration::from_millis(500);
        Some(timer.map_or(sweep, |timer| timer.min(sweep)))
    }

    /// Ends all connections, as after a reset of the guest's card. Forwarded ports stay open. Nothing of smoltcp's state is
    /// looked at: it may be what failed.
    pub(crate) fn reset(&mut self, registry: &Registry) {
        for mut flow in self.flows.drain(..).flatten() {
            // The host's peers are to see a reset; whether that can be had or not, the socket goes away.
            let _ = socket2::SockRef::from(&flow.stream).set_linger(Some(Duration::ZERO));
            let _ = registry.deregister(&mut flow.stream);
        }
        self.by_key.clear();
        self.queued.clear();
        self.sockets = SocketSet::new(Vec::new());
        self.interface = interface();
    }
}

/// First of the gateway's ports for forwarded connections (RFC 6335, section 6: dynamic ports).
const FIRST_PORT: u16 = 49152;

/// True if both directions were closed in order.
fn flow_is_clean(flow: &Flow) -> bool {
    matches!(flow.stage, Stage::Joined { finished: true, .. })
}

/// An interface that takes packets for any address.
fn interface() -> Interface {
    let mut output = Output::new(smoltcp::wire::EthernetAddress([0; 6]), smoltcp::wire::EthernetAddress([0; 6]));
    let mut link = Link { incoming: None, output: &mut output, segment: 0, segments: None };
    let mut config = Config::new(HardwareAddress::Ip);
    // Initial sequence numbers are not to be guessed from outside; the hasher's keys are random in every process.
    config.random_seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), Instant::now());
    let mut interface = Interface::new(config, &mut link, Clock::ZERO);
    interface.update_ip_addrs(|addresses| {
        // A new list has room for one address.
        let _ = addresses.push(IpCidr::new(GATEWAY.into(), crate::config::PREFIX));
    });
    interface.set_any_ip(true);
    // smoltcp takes a packet for itself if its route leads to one of its own addresses.
    let _ = interface.routes_mut().add_default_ipv4_route(GATEWAY);
    interface
}

fn new_socket() -> Socket<'static> {
    let mut socket = Socket::new(SocketBuffer::new(vec![0; RING]), SocketBuffer::new(vec![0; RING]));
    socket.set_nagle_enabled(false);
    // Many segments are taken before one acknowledgement goes out anyway.
    socket.set_ack_delay(None);
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket.set_timeout(Some(SILENCE_LIMIT));
    socket
}

/// Writes what the guest has sent to the host, and passes on the guest's end.
fn pump_to_host(socket: &mut Socket<'_>, stream: &mut TcpStream, writable: &mut bool, finished: &mut bool) {
    while *writable && socket.can_recv() {
        let written = socket.recv(|bytes| match stream.write(bytes) {
            Ok(count) => (count, Ok(count)),
            Err(error) => (0, Err(error)),
        });
        match written {
            Ok(Ok(1..)) => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => *writable = false,
            _ => return socket.abort(),
        }
    }
    let ended = matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
    if ended && !*finished && !socket.can_recv() {
        *finished = true;
        // The host has closed already, or sees the guest's end now.
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
}

/// Reads what the host has into the ring to the guest, and passes on the host's end.
fn pump_to_guest(socket: &mut Socket<'_>, stream: &mut TcpStream, readable: &mut bool) {
    while *readable && socket.can_send() {
        let read = socket.send(|room| match stream.read(room) {
            Ok(count) => (count, Ok(count)),
            Err(error) => (0, Err(error)),
        });
        match read {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) => {
                *readable = false;
                return socket.close();
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => *readable = false,
            _ => return socket.abort(),
        }
    }
}

/// Addresses that a connection may have: no broadcast, multicast or "this network".
fn is_unicast(address: Ipv4Addr) -> bool {
    !address.is_broadcast() && !address.is_multicast() && !address.is_unspecified()
}

/// A copy of a packet with SYN whose segment size option is raised to the link's pretended one, if the guest takes long
/// segments; and the size that the guest had named.
fn raise_segment_size(packet: &[u8], raise: bool) -> (Vec<u8>, u16) {
    const OPTION: u8 = 2;
    let mut copy = packet.to_vec();
    let mut named = DEFAULT_SEGMENT;
    let header = usize::from(copy[0] & 0xf) * 4;
    let Some(options) = copy.get_mut(header..) else { return (copy, named) };
    let end = options.get(12).map_or(0, |byte| usize::from(byte >> 4) * 4).min(options.len());
    let mut at = 20;
    // RFC 9293, section 3.1: kind 0 ends the list, kind 1 is padding, others carry their length.
    while at < end {
        let length = match (options[at], options.get(at + 1)) {
            (0, _) => break,
            (1, _) => 1,
            (OPTION, Some(4)) if at + 4 <= end => {
                // Less than what RFC 9293 asks every host to take is a mistake or an attack.
                named = u16::from_be_bytes([options[at + 2], options[at + 3]]).clamp(88, (MTU - IPV4 - 20) as u16);
                let size = if raise { (LONGEST_PACKET - IPV4 - 20) as u16 } else { named };
                options[at + 2..at + 4].copy_from_slice(&size.to_be_bytes());
                4
            }
            (_, Some(&length)) if length >= 2 => usize::from(length),
            _ => break,
        };
        at += length;
    }
    (copy, named)
}

/// The connections, by their addresses.
type Known<'a> = (&'a HashMap<Key, usize>, &'a [Option<Flow>]);

/// The link as smoltcp sees it: at most one packet in, frames out.
struct Link<'a> {
    incoming: Option<&'a [u8]>,
    output: &'a mut Output,
    /// Payload of one segment in an answer to `incoming`.
    segment: u16,
    /// Where to look it up for packets of smoltcp's own.
    segments: Option<Known<'a>>,
}

impl phy::Device for Link<'_> {
    type RxToken<'b>
        = Incoming<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Outgoing<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Clock) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing { output: self.output, segment: self.segment, segments: self.segments }))
    }

    fn transmit(&mut self, _: Clock) -> Option<Outgoing<'_>> {
        if self.output.is_full() {
            return None;
        }
        Some(Outgoing { output: self.output, segment: self.segment, segments: self.segments })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::ignored();
        checksum.ipv4 = phy::Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = LONGEST_PACKET;
        capabilities.checksum = checksum;
        capabilities
    }
}

struct Incoming<'a>(&'a [u8]);

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

struct Outgoing<'a> {
    output: &'a mut Output,
    segment: u16,
    segments: Option<Known<'a>>,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        if self.output.is_full() {
            // An answer came up while the queue is full: it is lost, as on a wire, but has to be written somewhere.
            return write(&mut vec![0; len]);
        }
        let (segment, segments) = (self.segment, self.segments);
        let look_up = |packet: &[u8]| {
            let known = segments.and_then(|(by_key, flows)| segment_of(packet, by_key, flows));
            known.unwrap_or(segment)
        };
        self.output.ipv4(len, write, look_up)
    }
}

/// Payload of one segment of the connection that a packet to the guest belongs to.
fn segment_of(packet: &[u8], by_key: &HashMap<Key, usize>, flows: &[Option<Flow>]) -> Option<u16> {
    let ip = Ipv4Packet::new_checked(packet).ok()?;
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    let key = (SocketAddrV4::new(ip.dst_addr(), tcp.dst_port()), SocketAddrV4::new(ip.src_addr(), tcp.src_port()));
    flows.get(*by_key.get(&key)?)?.as_ref().map(|flow| flow.segment)
}
