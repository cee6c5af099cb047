//! What the gateway answers by itself: ARP, pings and DHCP.

use crate::config::{GATEWAY, GUEST, NAME_SERVER, PREFIX};
use crate::frame::{IPV4, Output, ipv4_header};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpPacket, DhcpRepr,
    IpProtocol, Ipv4Cidr,
};
use std::net::{Ipv4Addr, SocketAddrV4};

/// Seconds for which an address is given out: a day.
const LEASE: u32 = 86400;
/// Clients of the old BOOTP kind expect messages of this length at least (RFC 1542, section 2.1).
const SHORTEST_MESSAGE: usize = 300;

/// Answers requests for the gateway's and the name server's addresses. Others stay without an answer: they are the
/// guest's own to take, and a probe for a free address must find them free (RFC 5227).
pub(crate) fn arp(payload: &[u8], output: &mut Output) {
    let Ok(packet) = ArpPacket::new_checked(payload) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    if target_protocol_addr != GATEWAY && target_protocol_addr != NAME_SERVER {
        return;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: output.gateway,
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    output.arp(reply.buffer_len(), |buffer| reply.emit(&mut ArpPacket::new_unchecked(buffer)));
}

/// Answers an ICMP echo request (RFC 792) to the gateway or the name server.
pub(crate) fn icmp(from: Ipv4Addr, to: Ipv4Addr, message: &[u8], output: &mut Output) {
    const ECHO_REQUEST: u8 = 8;
    if (to != GATEWAY && to != NAME_SERVER) || message.len() < 8 || message[0] != ECHO_REQUEST || message[1] != 0 {
        return;
    }
    let fill = |buffer: &mut [u8]| {
        ipv4_header(buffer, to, from, IpProtocol::Icmp, |_| {});
        let reply = &mut buffer[IPV4..];
        reply.copy_from_slice(message);
        reply[0] = 0;
        // Type 8 has become type 0: the checksum, a one's complement sum, grows by 0x0800 (RFC 1624).
        let sum = u32::from(u16::from_be_bytes([reply[2], reply[3]])) + 0x0800;
        let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
        reply[2..4].copy_from_slice(&sum.to_be_bytes());
    };
    output.ipv4(IPV4 + message.len(), fill, |_| 0);
}

/// Answers a DHCP client (RFC 2131): there is one address to give, and everybody who asks gets it.
pub(crate) fn dhcp(message: &[u8], output: &mut Output) {
    let Ok(packet) = DhcpPacket::new_checked(message) else { return };
    let Ok(request) = DhcpRepr::parse(&packet) else { return };
    let kind = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            let other_server = request.server_identifier.is_some_and(|server| server != GATEWAY);
            if other_server {
                return;
            }
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == GUEST { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return,
    };
    let given = kind != DhcpMessageType::Nak;
    let leased = given && request.message_type != DhcpMessageType::Inform;
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: if leased { GUEST } else { Ipv4Addr::UNSPECIFIED },
        server_ip: GATEWAY,
        router: given.then_some(GATEWAY),
        subnet_mask: given.then(|| Ipv4Cidr::new(GUEST, PREFIX).netmask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: given.then(|| [NAME_SERVER].into_iter().collect()),
        max_size: None,
        lease_duration: leased.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut buffer = vec![0; reply.buffer_len().max(SHORTEST_MESSAGE)];
    if reply.emit(&mut DhcpPacket::new_unchecked(&mut buffer)).is_ok() {
        let to = SocketAddrV4::new(Ipv4Addr::BROADCAST, DHCP_CLIENT_PORT);
        output.udp(SocketAddrV4::new(GATEWAY, DHCP_SERVER_PORT), to, &buffer);
    }
}
