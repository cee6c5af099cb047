//! The network between a guest made of smoltcp and real sockets on the host's loopback.

use crate::frame::{ETHERNET, IPV4, ipv4_header};
use crate::{Config, Forward, GATEWAY, GUEST, NAME_SERVER, Offloads, Protocol, Reach, UserNet, tcp};
use mio::{Events, Poll};
use smoltcp::iface::{Config as FaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Clock;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, IpAddress, IpCidr,
    IpEndpoint, IpProtocol, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket,
};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const LIMIT: Duration = Duration::from_secs(20);

/// The guest's end of the wire.
struct Wire {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
    offloads: bool,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; len];
        let result = write(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;
    fn receive(&mut self, _: Clock) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.received.pop_front()?), Tx(&mut self.sent)))
    }
    fn transmit(&mut self, _: Clock) -> Option<Tx<'_>> {
        Some(Tx(&mut self.sent))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        // A guest with segmentation offload sends long segments too.
        capabilities.max_transmission_unit = if self.offloads { 65000 } else { 1514 };
        if self.offloads {
            capabilities.checksum = ChecksumCapabilities::ignored();
            capabilities.checksum.ipv4 = smoltcp::phy::Checksum::Both;
        }
        capabilities
    }
}

/// A network with a guest that speaks.
struct World {
    poll: Poll,
    net: UserNet,
    wire: Wire,
    face: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
    /// Frames longer than the MTU that reached the guest.
    long: usize,
}

impl World {
    fn new(config: Config, offloads: bool) -> Self {
        let poll = Poll::new().unwrap();
        let config = Config { mac: MAC, ..config };
        let mut net = UserNet::new(&config, poll.registry().try_clone().unwrap(), 1).unwrap();
        net.set_offloads(Offloads { checksum: offloads, tcp4: offloads });
        let mut wire = Wire { received: VecDeque::new(), sent: VecDeque::new(), offloads };
        let mut face = Interface::new(FaceConfig::new(EthernetAddress(MAC).into()), &mut wire, Clock::ZERO);
        face.update_ip_addrs(|all| all.push(IpCidr::new(GUEST.into(), 24)).unwrap());
        face.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        Self { poll, net, wire, face, sockets: SocketSet::new(Vec::new()), start: Instant::now(), long: 0 }
    }

    /// One turn of everybody; the guest's TCP takes its frames if `guest` is set.
    fn turn(&mut self, guest: bool) {
        if guest {
            let now = Clock::from_micros(self.start.elapsed().as_micros() as i64);
            self.face.poll(now, &mut self.wire, &mut self.sockets);
        }
        while let Some(frame) = self.wire.sent.pop_front() {
            self.net.input(&frame);
        }
        let mut events = Events::with_capacity(64);
        self.poll.poll(&mut events, Some(Duration::from_micros(200))).unwrap();
        for event in &events {
            assert!(self.net.event(event.token(), event.is_readable(), event.is_writable()));
        }
        self.net.run();
        while let Some(frame) = self.net.output() {
            let bytes = frame.bytes();
            if bytes.len() > ETHERNET + crate::MTU {
                self.long += 1;
                assert_eq!(frame.segments.map(|cut| (cut.size, cut.header)), Some((1460, 54)));
            }
            assert_eq!(bytes[..6], MAC);
            self.wire.received.push_back(bytes.to_vec());
            self.net.consume();
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !done(self) {
            assert!(began.elapsed() < LIMIT, "it does not come to pass that {what}");
            self.turn(true);
        }
    }

    fn socket(&mut self) -> SocketHandle {
        let mut socket = Socket::new(SocketBuffer::new(vec![0; 200_000]), SocketBuffer::new(vec![0; 200_000]));
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn connect(&mut self, to: SocketAddrV4) -> SocketHandle {
        let handle = self.socket();
        let socket: &mut Socket<'_> = self.sockets.get_mut(handle);
        socket.connect(self.face.context(), to, IpEndpoint::new(GUEST.into(), 40000)).unwrap();
        handle
    }

    /// Sends a frame as the guest, gives what comes back.
    fn exchange(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.net.input(frame);
        self.turn(false);
        self.wire.received.drain(..).collect()
    }

    /// Waits for a frame to the guest.
    fn receive(&mut self) -> Vec<u8> {
        let began = Instant::now();
        loop {
            if let Some(frame) = self.wire.received.pop_front() {
                return frame;
            }
            assert!(began.elapsed() < LIMIT, "no frame comes");
            self.turn(false);
        }
    }
}

fn frame(kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &MAC[..], &kind.to_be_bytes(), payload].concat()
}

fn ip(from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; IPV4 + payload.len()];
    ipv4_header(&mut packet, from, to, protocol, |_| {});
    packet[IPV4..].copy_from_slice(payload);
    frame(0x0800, &packet)
}

fn udp(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; 8 + payload.len()];
    let mut packet = UdpPacket::new_unchecked(&mut datagram);
    packet.set_src_port(from.port());
    packet.set_dst_port(to.port());
    packet.set_len(8 + payload.len() as u16);
    packet.payload_mut().copy_from_slice(payload);
    ip(*from.ip(), *to.ip(), IpProtocol::Udp, &datagram)
}

/// Source, destination and payload of a frame with a datagram, checksums checked.
fn read_udp(frame: &[u8]) -> (SocketAddrV4, SocketAddrV4, Vec<u8>) {
    let packet = Ipv4Packet::new_checked(&frame[ETHERNET..]).unwrap();
    let udp = UdpPacket::new_checked(packet.payload()).unwrap();
    assert!(packet.verify_checksum());
    assert!(udp.verify_checksum(&packet.src_addr().into(), &packet.dst_addr().into()));
    let from = SocketAddrV4::new(packet.src_addr(), udp.src_port());
    (from, SocketAddrV4::new(packet.dst_addr(), udp.dst_port()), udp.payload().to_vec())
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn arp_and_pings_are_answered_for_the_gateway_only() {
    let mut world = World::new(Config::default(), false);
    for (target, answered) in
        [(GATEWAY, true), (NAME_SERVER, true), (GUEST, false), (Ipv4Addr::new(10, 0, 2, 9), false)]
    {
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress(MAC),
            source_protocol_addr: GUEST,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut payload = vec![0; 28];
        request.emit(&mut ArpPacket::new_unchecked(&mut payload));
        let replies = world.exchange(&frame(0x0806, &payload));
        assert_eq!(replies.len(), usize::from(answered), "{target}");
        if let Some(reply) = replies.first() {
            let reply = ArpRepr::parse(&ArpPacket::new_checked(&reply[ETHERNET..]).unwrap()).unwrap();
            let ArpRepr::EthernetIpv4 { operation, source_protocol_addr, target_protocol_addr, .. } = reply else {
                panic!("another kind of ARP")
            };
            assert_eq!((operation, source_protocol_addr, target_protocol_addr), (ArpOperation::Reply, target, GUEST));
        }
        // An echo request with identifier 1, sequence 2 and data; the checksum by RFC 1071.
        let mut message = [&[8, 0, 0, 0, 0, 1, 0, 2], &b"ping"[..]].concat();
        let sum: u32 = message.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let replies = world.exchange(&ip(GUEST, target, IpProtocol::Icmp, &message));
        assert_eq!(replies.len(), usize::from(answered), "{target}");
        if let Some(reply) = replies.first() {
            let packet = Ipv4Packet::new_checked(&reply[ETHERNET..]).unwrap();
            assert!(packet.verify_checksum() && packet.src_addr() == target && packet.dst_addr() == GUEST);
            let reply = packet.payload();
            let sum: u32 = reply.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
            assert_eq!(((sum & 0xffff) + (sum >> 16), reply[0], &reply[4..]), (0xffff, 0, &message[4..]));
        }
    }
}

#[test]
fn dhcp_gives_the_one_address() {
    let mut world = World::new(Config::default(), false);
    let mut ask = |kind, wanted, server| {
        let request = DhcpRepr {
            message_type: kind,
            transaction_id: 77,
            secs: 0,
            client_hardware_address: EthernetAddress(MAC),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: wanted,
            client_identifier: None,
            server_identifier: server,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut message = vec![0; request.buffer_len()];
        request.emit(&mut DhcpPacket::new_unchecked(&mut message)).unwrap();
        let to = SocketAddrV4::new(Ipv4Addr::BROADCAST, 67);
        let replies = world.exchange(&udp(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68), to, &message));
        replies.first().map(|reply| {
            let (from, to, message) = read_udp(reply);
            assert_eq!((from, to.port()), (SocketAddrV4::new(GATEWAY, 67), 68));
            let packet = DhcpPacket::new_checked(&message[..]).unwrap();
            let reply = DhcpRepr::parse(&packet).unwrap();
            assert_eq!((reply.transaction_id, reply.client_hardware_address.0), (77, MAC));
            let servers = reply.dns_servers.map(|all| all.to_vec());
            (reply.message_type, reply.your_ip, reply.router, servers, reply.lease_duration.is_some())
        })
    };
    let good = |kind| Some((kind, GUEST, Some(GATEWAY), Some(vec![NAME_SERVER]), true));
    assert_eq!(ask(DhcpMessageType::Discover, None, None), good(DhcpMessageType::Offer));
    assert_eq!(ask(DhcpMessageType::Request, Some(GUEST), Some(GATEWAY)), good(DhcpMessageType::Ack));
    let wrong = ask(DhcpMessageType::Request, Some(Ipv4Addr::new(10, 0, 2, 99)), None).unwrap();
    assert_eq!((wrong.0, wrong.1), (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED));
    assert_eq!(ask(DhcpMessageType::Request, Some(GUEST), Some(Ipv4Addr::new(10, 0, 2, 1))), None);
}

/// A server on the host that accepts connections, as the kernel does for it, and says nothing.
fn silent_server() -> u16 {
    // It is there until the test process ends.
    let listener = Box::leak(Box::new(TcpListener::bind("127.0.0.1:0").unwrap()));
    listener.local_addr().unwrap().port()
}

/// A server on the host that sends back all it gets, until the end, then ends too.
fn echo_server() -> (u16, std::thread::JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut total) = (vec![0; 50_000], 0);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return total,
                count => stream.write_all(&buffer[..count]).unwrap(),
            }
            total += 1;
        }
    });
    (port, thread)
}

#[test]
fn megabytes_go_out_and_come_back_unchanged() {
    for offloads in [false, true] {
        let (port, server) = echo_server();
        let mut world = World::new(Config::default(), offloads);
        let handle = world.connect(SocketAddrV4::new(GATEWAY, port));
        let data = pattern(3_000_000);
        let (mut sent, mut back) = (0, Vec::new());
        world.until("all bytes come back", |world| {
            let socket = world.tcp(handle);
            if socket.can_send() && sent < data.len() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            if sent == data.len() && socket.may_send() {
                socket.close();
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
            }
            back.len() == data.len()
        });
        assert!(back == data, "the bytes differ");
        world.until("the connection ends in order", |world| {
            matches!(world.tcp(handle).state(), State::TimeWait | State::Closed)
        });
        server.join().unwrap();
        assert_eq!(world.long > 0, offloads, "long segments go to a guest that takes them, and to no other");
    }
}

#[test]
fn a_refused_connection_is_refused_to_the_guest() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (reach, to) in [
        (Reach::Everything, SocketAddrV4::new(GATEWAY, port)),
        (Reach::Everything, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)),
        (Reach::Everything, SocketAddrV4::new(NAME_SERVER, 54)),
        (Reach::Nothing, SocketAddrV4::new(GATEWAY, port)),
        (Reach::HostPorts(vec![1]), SocketAddrV4::new(GATEWAY, port)),
    ] {
        let mut world = World::new(Config { reach, ..Config::default() }, false);
        let handle = world.connect(to);
        world.until("the guest is refused", |world| world.tcp(handle).state() == State::Closed);
    }
}

#[test]
fn a_forwarded_port_reaches_the_guest() {
    let forward: Forward = "tcp:127.0.0.1:0-:7".parse().unwrap();
    let mut world = World::new(Config { forwards: vec![forward], ..Config::default() }, true);
    let address = world.net.listening()[0];
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let data = pattern(500_000);
        let mut copy = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            copy.write_all(&pattern(500_000)).unwrap();
            copy.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        sender.join().unwrap();
        assert!(back == data);
    });
    let handle = world.socket();
    world.tcp(handle).listen(7).unwrap();
    world.until("the guest has echoed all", |world| {
        let socket = world.tcp(handle);
        if socket.can_recv() && socket.can_send() {
            let mut bytes = vec![0; socket.send_capacity() - socket.send_queue()];
            let count = socket.recv_slice(&mut bytes).unwrap();
            assert_eq!(socket.send_slice(&bytes[..count]).unwrap(), count);
        }
        if socket.state() == State::CloseWait && !socket.can_recv() {
            socket.close();
        }
        client.is_finished()
    });
    client.join().unwrap();
    // Nobody listens any more: the next one is reset.
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nonblocking(true).unwrap();
    world.until("the guest's refusal reaches the client", |_| match stream.read(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
        Ok(_) => panic!("an orderly end"),
    });
}

#[test]
fn resets_reach_the_other_side() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut world = World::new(Config::default(), false);
    // The guest aborts.
    let handle = world.connect(SocketAddrV4::new(GATEWAY, port));
    world.until("the guest is connected", |world| world.tcp(handle).state() == State::Established);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    world.tcp(handle).abort();
    world.until("the host's peer sees a reset", |_| {
        stream.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
    });
    world.sockets.remove(handle);
    // The host's peer goes away with unread bytes, which the kernel makes a reset.
    let handle = world.connect(SocketAddrV4::new(GATEWAY, port));
    world.until("the guest is connected", |world| world.tcp(handle).state() == State::Established);
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    world.tcp(handle).send_slice(b"unread").unwrap();
    world.until("the bytes arrive", |_| stream.peek(&mut [0; 6]).is_ok_and(|count| count == 6));
    drop(stream);
    world.until("the guest sees a reset", |world| world.tcp(handle).state() == State::Closed);
}

#[test]
fn a_peer_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut world = World::new(Config::default(), true);
    let handle = world.connect(SocketAddrV4::new(GATEWAY, listener.local_addr().unwrap().port()));
    world.until("the guest is connected", |world| world.tcp(handle).may_send());
    let (mut stream, _) = listener.accept().unwrap();
    let data = pattern(20_000_000);
    let (mut sent, mut still) = (0, 0);
    world.until("the guest cannot send any more", |world| {
        let socket = world.tcp(handle);
        let count = if socket.can_send() { socket.send_slice(&data[sent..]).unwrap() } else { 0 };
        sent += count;
        still = if count == 0 { still + 1 } else { 0 };
        still > 300
    });
    assert!(sent < data.len(), "{sent} bytes are nowhere");
    stream.set_nonblocking(true).unwrap();
    let (mut got, mut buffer) = (0, vec![0; 1 << 20]);
    world.until("the peer has read all", |_| {
        while let Ok(count) = stream.read(&mut buffer) {
            assert_eq!(buffer[..count], data[got..got + count]);
            got += count;
        }
        got == sent
    });
}

#[test]
fn datagrams_go_out_and_answers_find_their_way() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let resolver = server.local_addr().unwrap();
    let mut world = World::new(Config { resolver: Some(resolver), ..Config::default() }, false);
    let guest = SocketAddrV4::new(GUEST, 5000);
    // The name server stands for the resolver, the gateway for the loopback.
    for to in [SocketAddrV4::new(NAME_SERVER, 53), SocketAddrV4::new(GATEWAY, resolver.port())] {
        world.net.input(&udp(guest, to, b"question"));
        let mut buffer = [0; 100];
        let (count, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"question");
        stranger.send_to(b"not asked for", (Ipv4Addr::LOCALHOST, from.port())).unwrap();
        server.send_to(b"answer", (Ipv4Addr::LOCALHOST, from.port())).unwrap();
        let (from, back, payload) = read_udp(&world.receive());
        // Both names mean one socket of the host; the one that was used first is shown.
        assert_eq!((from, back), (SocketAddrV4::new(NAME_SERVER, 53), guest));
        assert_eq!(payload, b"answer");
    }
    world.turn(false);
    assert!(world.wire.received.is_empty(), "a stranger got through");
}

#[test]
fn a_forwarded_datagram_port_reaches_the_guest() {
    let forward =
        Forward { protocol: Protocol::Udp, host: "127.0.0.1:0".parse().unwrap(), guest: SocketAddrV4::new(GUEST, 69) };
    let mut world = World::new(Config { forwards: vec![forward], reach: Reach::Nothing, ..Config::default() }, false);
    let address = world.net.listening()[0];
    let clients = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    for client in &clients {
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.send_to(b"request", address).unwrap();
        let (from, to, payload) = read_udp(&world.receive());
        assert_eq!((*from.ip(), to, &payload[..]), (GATEWAY, forward.guest, &b"request"[..]));
        world.net.input(&udp(to, from, b"reply"));
        let mut buffer = [0; 100];
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (5, address));
    }
}

/// A SYN of the guest.
fn syn(from: u16, to: SocketAddrV4) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: from,
        dst_port: to.port(),
        control: TcpControl::Syn,
        seq_number: TcpSeqNumber(1000),
        ack_number: None,
        window_len: 65535,
        window_scale: Some(7),
        max_seg_size: Some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    let (from, to) = (IpAddress::Ipv4(GUEST), IpAddress::Ipv4(*to.ip()));
    repr.emit(&mut TcpPacket::new_unchecked(&mut bytes), &from, &to, &ChecksumCapabilities::default());
    let IpAddress::Ipv4(to) = to;
    ip(GUEST, to, IpProtocol::Tcp, &bytes)
}

#[test]
fn a_flood_of_connections_is_bounded_and_the_network_lives_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let to = SocketAddrV4::new(GATEWAY, listener.local_addr().unwrap().port());
    let mut world = World::new(Config::default(), false);
    let mut accepted = Vec::new();
    for from in 1..=3 * tcp::FLOWS as u16 {
        world.net.input(&syn(from, to));
        if from % 16 == 0 {
            world.turn(false);
            while let Ok((stream, _)) = listener.accept() {
                accepted.push(stream);
            }
            world.wire.received.clear();
        }
    }
    assert!(accepted.len() <= tcp::FLOWS && accepted.len() > tcp::FLOWS / 2, "{}", accepted.len());
    world.net.reset();
    drop(accepted);
    let handle = world.connect(to);
    world.until("the guest is connected again", |world| world.tcp(handle).may_send());
}

#[test]
fn a_failure_of_the_tcp_library_costs_connections_and_no_more() {
    let [port, port_again] = [(); 2].map(|()| silent_server());
    let mut world = World::new(Config::default(), false);
    let handle = world.connect(SocketAddrV4::new(GATEWAY, port));
    world.until("the guest is connected", |world| world.tcp(handle).may_send());
    let fine = crate::guarded(|| panic!("a panic that this test asks for"));
    world.net.recover(fine);
    assert_eq!(world.net.counters().resets, 1);
    world.tcp(handle).send_slice(b"anybody?").unwrap();
    world.until("the old connection is gone", |world| world.tcp(handle).state() == State::Closed);
    let handle = world.connect(SocketAddrV4::new(GATEWAY, port_again));
    world.until("a new one works", |world| world.tcp(handle).may_send());
}

#[test]
fn a_port_that_is_taken_is_reported() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = taken.local_addr().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, host: address, guest: SocketAddrV4::new(GUEST, 1) };
    let poll = Poll::new().unwrap();
    let config = Config { forwards: vec![forward], ..Config::default() };
    let error = UserNet::new(&config, poll.registry().try_clone().unwrap(), 0).err().unwrap();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn whatever_a_guest_sends_the_network_survives() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    // PARAVANE_FUZZ_RUNS=1000000 makes an afternoon of it.
    let runs = std::env::var("PARAVANE_FUZZ_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    for _ in 0..runs {
        let data: Vec<u8> = (0..2000)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        crate::fuzz::run(&data);
    }
}
