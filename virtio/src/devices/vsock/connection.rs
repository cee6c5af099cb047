//! One stream between guest and host: credit in both directions (virtio 1.2, section 5.10.6.3), and how it ends.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::packet::{Packet, op};
use crate::Chain;

/// Bytes that may wait for the host: the guest's credit.
pub(super) const BUFFER: u32 = 256 << 10;
/// Most bytes of a packet to the guest.
const MAX_PACKET: usize = 64 << 10;

/// "I will receive no more."
pub(super) const NO_RECEIVE: u32 = 1;
/// "I will send no more."
pub(super) const NO_SEND: u32 = 2;

/// What is to become of a connection.
pub(super) enum Fate {
    /// It goes on; perhaps the guest should hear of its new credit.
    Lives {
        /// It should.
        update: bool,
    },
    /// It is over; the guest is to hear of that.
    Over,
}

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    /// The guest has accepted, or asked.
    established: bool,
    /// The host's end may have something to read.
    pub(super) readable: bool,
    /// The host's end is at its end, and the guest knows.
    host_done: bool,
    /// What the guest has shut down.
    guest_done: u32,
    /// The host's end takes no more.
    broken: bool,
    /// Bytes from the guest.
    waiting: VecDeque<u8>,
    /// Bytes handed to the host's end, of all that came from the guest.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    stated: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    /// The guest was asked for credit since it last gave some.
    asked: bool,
}

impl Connection {
    fn new(stream: UnixStream, established: bool) -> Self {
        Self {
            stream,
            established,
            readable: false,
            host_done: false,
            guest_done: 0,
            broken: false,
            waiting: VecDeque::new(),
            forwarded: Wrapping(0),
            stated: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            asked: false,
        }
    }

    /// A program of the host asks for the guest.
    pub(super) fn to_guest(stream: UnixStream) -> Self {
        Self::new(stream, false)
    }

    /// The guest asks for a program of the host.
    pub(super) fn from_guest(stream: UnixStream) -> Self {
        Self::new(stream, true)
    }

    /// The guest accepts. False when nobody asked.
    pub(super) fn accepted(&mut self, port: u32) -> bool {
        let first = !self.established;
        if first {
            self.established = true;
            self.waiting.extend(format!("OK {port}\n").bytes());
            // These bytes are ours: they must not count as the guest's.
            self.forwarded -= Wrapping(self.waiting.len() as u32);
            self.stated = self.forwarded;
            self.flush();
        }
        first
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    pub(super) fn hear_credit(&mut self, p: &Packet) {
        self.guest_buffer = p.buf_alloc;
        self.guest_forwarded = Wrapping(p.fwd_cnt);
        self.asked = false;
    }

    /// Fills in what the guest may send.
    pub(super) fn state_credit(&mut self, p: &mut Packet) {
        (p.buf_alloc, p.fwd_cnt) = (BUFFER, self.forwarded.0);
        self.stated = self.forwarded;
    }

    /// Takes the data of a packet. False when the guest has no credit for it, or nothing to send any more.
    pub(super) fn take(&mut self, chain: &mut Chain, len: u32) -> bool {
        let room = BUFFER.saturating_sub(self.waiting.len() as u32);
        if !self.established || self.guest_done & NO_SEND != 0 || len > room || len > chain.readable_len() {
            return false;
        }
        let mut bytes = vec![0; len as usize];
        let n = chain.read(&mut bytes);
        self.waiting.extend(&bytes[..n]);
        self.flush();
        true
    }

    /// Hands on what waits for the host.
    pub(super) fn flush(&mut self) {
        while !self.waiting.is_empty() && !self.broken {
            match self.stream.write(self.waiting.as_slices().0) {
                Ok(0) => self.broken = true,
                Ok(n) => {
                    self.waiting.drain(..n);
                    self.forwarded += Wrapping(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.broken = true,
            }
        }
        if self.guest_done & NO_SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    pub(super) fn shut_by_guest(&mut self, flags: u32) {
        self.guest_done |= flags & (NO_RECEIVE | NO_SEND);
        self.flush();
    }

    /// Whether it is over, or the guest should be told of the room that it has.
    pub(super) fn fate(&self) -> Fate {
        let both = self.guest_done == NO_RECEIVE | NO_SEND;
        if self.broken || both && self.waiting.is_empty() {
            return Fate::Over;
        }
        Fate::Lives { update: (self.forwarded - self.stated).0 >= BUFFER / 2 }
    }

    /// What to wait for at the host's end, as poll(2) has it.
    pub(super) fn interest(&self) -> i16 {
        let out = if self.waiting.is_empty() { 0 } else { libc::POLLOUT };
        let wants = self.established && !self.readable && !self.host_done && self.guest_done & NO_RECEIVE == 0;
        out | if wants && self.credit() > 0 { libc::POLLIN } else { 0 }
    }

    /// Whether the guest should get a packet.
    pub(super) fn has_something(&self) -> bool {
        let listening = self.established && !self.host_done && self.guest_done & NO_RECEIVE == 0;
        listening && (self.credit() > 0 && self.readable || self.credit() == 0 && !self.asked)
    }

    /// The next packet for the guest: data, operation, flags. `room` is that of the guest's buffer.
    pub(super) fn next(&mut self, room: usize) -> Option<(Vec<u8>, u16, u32)> {
        if self.credit() == 0 {
            self.asked = true;
            return Some((Vec::new(), op::CREDIT_REQUEST, 0));
        }
        let mut bytes = vec![0; room.min(self.credit() as usize).min(MAX_PACKET)];
        if bytes.is_empty() {
            return None;
        }
        loop {
            match self.stream.read(&mut bytes) {
                Ok(n @ 1..) => {
                    bytes.truncate(n);
                    self.sent += Wrapping(n as u32);
                    return Some((bytes, op::RW, 0));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                // The end, or an error, after which nothing more comes either.
                _ => {
                    (self.readable, self.host_done) = (false, true);
                    return Some((Vec::new(), op::SHUTDOWN, NO_SEND));
                }
            }
        }
    }
}
