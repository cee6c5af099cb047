//! The backend that is a network of its own: [`paravane_usernet`].

use super::{Backend, BackendError, HEADER, Header, feature};
use mio::{Events, Poll};
use paravane_usernet::{Config, Offloads, UserNet};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// Events taken from the loop at once.
const EVENTS: usize = 256;

/// User networking.
pub struct User {
    poll: Poll,
    events: Events,
    net: UserNet,
    checksums: bool,
}

impl User {
    /// Makes the network and opens its forwarded ports.
    ///
    /// # Errors
    /// A port is taken, or the host has no descriptors left.
    pub fn new(config: &Config) -> Result<Self, BackendError> {
        let poll = Poll::new()?;
        let net = UserNet::new(config, poll.registry().try_clone()?, 0)?;
        Ok(Self { poll, events: Events::with_capacity(EVENTS), net, checksums: false })
    }

    /// Where the forwarded ports listen, in the order of the configuration.
    pub fn listening(&self) -> &[SocketAddr] {
        self.net.listening()
    }
}

impl Backend for User {
    fn features(&self) -> u64 {
        feature::CSUM | feature::HOST_TSO4 | feature::GUEST_CSUM | feature::GUEST_TSO4
    }

    fn begin(&mut self, features: u64) {
        self.checksums = features & feature::GUEST_CSUM != 0;
        let tcp4 = features & feature::GUEST_TSO4 != 0;
        self.net.set_offloads(Offloads { checksum: self.checksums, tcp4 });
    }

    fn end(&mut self) {
        self.net.reset();
    }

    fn wait_for(&self) -> Option<(RawFd, i16)> {
        Some((self.poll.as_raw_fd(), libc::POLLIN))
    }

    fn send(&mut self, packet: &[u8]) {
        // Of the header nothing is needed: open checksums and long segments are taken as they are.
        self.net.input(&packet[HEADER..]);
    }

    fn turn(&mut self) -> Option<Duration> {
        // Interrupted by a signal, it finds the events at the next turn.
        if self.poll.poll(&mut self.events, Some(Duration::ZERO)).is_ok() {
            for event in &self.events {
                let readable = event.is_readable() || event.is_read_closed() || event.is_error();
                self.net.event(event.token(), readable, event.is_writable() || event.is_error());
            }
        }
        self.net.run()
    }

    fn frame(&mut self) -> Option<(Header, &[u8])> {
        let frame = self.net.output()?;
        let mut header = Header::default();
        if let Some(open) = frame.checksum {
            header.flags = Header::NEEDS_CSUM;
            (header.csum_start, header.csum_offset) = (open.start, open.offset);
        } else if self.checksums {
            header.flags = Header::DATA_VALID;
        }
        if let Some(cut) = frame.segments {
            header.gso_type = Header::TCPV4;
            (header.gso_size, header.hdr_len) = (cut.size, cut.header);
        }
        Some((header, frame.bytes()))
    }

    fn consume(&mut self) {
        self.net.consume();
    }
}
