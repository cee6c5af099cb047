//! What a user can ask of the network: addresses, port forwards, how far the guest may reach.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::str::FromStr;

/// The host as the guest sees it, and its router. The host's own loopback services answer at this address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server that DHCP announces; requests go on to the host's resolver.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The address that DHCP gives to the guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Bits of the network part of the addresses above.
pub(crate) const PREFIX: u8 = 24;

/// The protocol of a port forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// What is forwarded.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddr,
    /// Where it goes in the guest.
    pub guest: SocketAddrV4,
}

/// A port forward that cannot be read; the text says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("hostfwd \"{text}\" {problem}; write it as tcp:127.0.0.1:2222-:22")]
pub struct ForwardError {
    text: String,
    problem: &'static str,
}

impl FromStr for Forward {
    type Err = ForwardError;

    /// Reads QEMU's form, `PROTOCOL:[HOST]:PORT-[GUEST]:PORT`. An empty host address is the host's loopback, not, as in
    /// QEMU, every address; an empty guest address is the one DHCP gives out.
    fn from_str(text: &str) -> Result<Self, ForwardError> {
        let failed = |problem| ForwardError { text: text.to_owned(), problem };
        let (protocol, rest) = text.split_once(':').ok_or_else(|| failed("has no protocol"))?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(failed("has another protocol than tcp or udp")),
        };
        let (host, guest) = rest.rsplit_once('-').ok_or_else(|| failed("has no \"-\" before the guest's port"))?;
        let (address, port) = host.rsplit_once(':').ok_or_else(|| failed("has no port for the host"))?;
        let address = address.trim_start_matches('[').trim_end_matches(']');
        let address: IpAddr = if address.is_empty() {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            address.parse().map_err(|_| failed("has a host address that is none"))?
        };
        let host = SocketAddr::new(address, port.parse().map_err(|_| failed("has a host port that is none"))?);
        let (address, port) = guest.rsplit_once(':').ok_or_else(|| failed("has no port for the guest"))?;
        let address: Ipv4Addr = if address.is_empty() {
            GUEST
        } else {
            address.parse().map_err(|_| failed("has a guest address that is none"))?
        };
        let port: u16 = port.parse().map_err(|_| failed("has a guest port that is none"))?;
        if port == 0 {
            return Err(failed("has guest port 0"));
        }
        Ok(Self { protocol, host, guest: SocketAddrV4::new(address, port) })
    }
}

/// How far connections of the guest may go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// The host, and everything that the host reaches.
    #[default]
    Everything,
    /// These ports of the host's loopback, and nothing else.
    HostPorts(Vec<u16>),
    /// Nothing; port forwards into the guest still work.
    Nothing,
}

/// What a network is made from.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The guest's MAC address, used until its first frame shows another.
    pub mac: [u8; 6],
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// How far the guest may go.
    pub reach: Reach,
    /// The resolver behind [`NAME_SERVER`]; `None` looks it up in the host's /etc/resolv.conf.
    pub resolver: Option<SocketAddr>,
}

impl Config {
    /// Where requests to the name server go.
    pub(crate) fn resolver(&self) -> SocketAddr {
        self.resolver.unwrap_or_else(|| {
            let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            // resolv.conf(5): without a nameserver line it is the one on the local machine.
            SocketAddr::new(first_nameserver(&text).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), 53)
        })
    }
}

/// The first name server of a resolv.conf.
fn first_nameserver(text: &str) -> Option<IpAddr> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_read_as_in_qemu() {
        let forward: Forward = "tcp:127.0.0.1:2222-:22".parse().unwrap();
        assert_eq!(forward.protocol, Protocol::Tcp);
        assert_eq!((forward.host, forward.guest), ("127.0.0.1:2222".parse().unwrap(), SocketAddrV4::new(GUEST, 22)));
        let forward: Forward = "udp::53-10.0.2.20:5353".parse().unwrap();
        assert_eq!(forward.host, "127.0.0.1:53".parse().unwrap());
        assert_eq!(forward.guest, "10.0.2.20:5353".parse().unwrap());
        let forward: Forward = "tcp:[::1]:80-:8080".parse().unwrap();
        assert_eq!(forward.host, "[::1]:80".parse().unwrap());
        for wrong in
            ["", "tcp", "icmp::1-:2", "tcp::1", "tcp::x-:2", "tcp:h:1-:2", "tcp::1-:0", "tcp::1-x:2", "tcp:1-2"]
        {
            assert!(wrong.parse::<Forward>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_resolver_comes_from_resolv_conf() {
        assert_eq!(first_nameserver("# x\nsearch a\nnameserver 192.0.2.1\nnameserver ::1\n"), "192.0.2.1".parse().ok());
        assert_eq!(first_nameserver("nameserver\nnameserver bad\nnameserver ::1"), "::1".parse().ok());
        assert_eq!(first_nameserver("search a"), None);
    }
}
