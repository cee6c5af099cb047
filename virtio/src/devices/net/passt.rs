//! The backend that is a passt process: a Unix stream socket on which each frame follows its length, four bytes
//! big-endian (passt(1), the protocol of QEMU's stream socket). passt completes nothing, so the guest is offered no
//! checksum or segmentation offload.

use super::{Backend, BackendError, HEADER, Header, LONGEST};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Bytes of a length.
const LENGTH: usize = 4;
/// The guest's frames wait for passt up to so many bytes; then the guest waits.
const WAITING: usize = 256 * 1024;

/// A connection to passt.
pub struct Passt {
    stream: UnixStream,
    up: bool,
    /// Bytes that passt has not taken yet, from `sent` on.
    waiting: Vec<u8>,
    sent: usize,
    /// Bytes of passt, from `taken` to `filled`.
    buffer: Vec<u8>,
    taken: usize,
    filled: usize,
}

impl Passt {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens at the path.
    pub fn connect(path: &Path) -> Result<Self, BackendError> {
        let failed = |error| BackendError::Passt(path.display().to_string(), error);
        let stream = UnixStream::connect(path).map_err(failed)?;
        Self::new(stream).map_err(failed)
    }

    /// Uses a connected socket.
    ///
    /// # Errors
    /// The socket cannot be made not to block.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let buffer = vec![0; 2 * (LENGTH + LONGEST)];
        Ok(Self { stream, up: true, waiting: Vec::new(), sent: 0, buffer, taken: 0, filled: 0 })
    }

    /// Writes what waits.
    fn flush(&mut self) {
        while self.up && self.sent < self.waiting.len() {
            match self.stream.write(&self.waiting[self.sent..]) {
                Ok(count) if count > 0 => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => self.up = false,
            }
        }
        self.waiting.clear();
        self.sent = 0;
    }

    /// Reads more, if a whole frame is not there yet.
    fn fill(&mut self) {
        if self.taken > 0 {
            self.buffer.copy_within(self.taken..self.filled, 0);
            self.filled -= self.taken;
            self.taken = 0;
        }
        while self.up && self.complete().is_none() {
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(count) if count > 0 => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => self.up = false,
            }
        }
    }

    /// Length of the frame at the front, if all of it is there. A length that cannot be ends the connection.
    fn complete(&mut self) -> Option<usize> {
        let (length, rest) = self.front()?;
        if length == 0 || length > LONGEST {
            // The stream has lost its rhythm; there is no way to find it again.
            self.up = false;
            return None;
        }
        (rest >= length).then_some(length)
    }

    /// The length that is announced, and the number of bytes that are there.
    fn front(&self) -> Option<(usize, usize)> {
        let (length, rest) = self.buffer[self.taken..self.filled].split_first_chunk::<LENGTH>()?;
        Some((usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX), rest.len()))
    }
}

impl Backend for Passt {
    fn features(&self) -> u64 {
        0
    }

    fn begin(&mut self, _features: u64) {}

    fn end(&mut self) {}

    fn wait_for(&self) -> Option<(RawFd, i16)> {
        let out = if self.waiting.is_empty() { 0 } else { libc::POLLOUT };
        // While a frame waits for the guest, more of them are no reason to wake.
        let held = self.front().is_some_and(|(length, there)| there >= length);
        let events = out | if held { 0 } else { libc::POLLIN };
        (self.up && events != 0).then(|| (self.stream.as_raw_fd(), events))
    }

    fn takes(&self) -> bool {
        self.waiting.len() - self.sent < WAITING
    }

    fn send(&mut self, packet: &[u8]) {
        let frame = &packet[HEADER..];
        let Ok(length) = u32::try_from(frame.len()) else { return };
        if self.up {
            self.waiting.extend_from_slice(&length.to_be_bytes());
            self.waiting.extend_from_slice(frame);
        }
    }

    fn turn(&mut self) -> Option<Duration> {
        self.flush();
        None
    }

    fn frame(&mut self) -> Option<(Header, &[u8])> {
        let length = match self.complete() {
            Some(length) => length,
            None => {
                self.fill();
                self.complete()?
            }
        };
        let start = self.taken + LENGTH;
        Some((Header::default(), &self.buffer[start..start + length]))
    }

    fn consume(&mut self) {
        if let Some(length) = self.complete() {
            self.taken += LENGTH + length;
        }
    }

    fn link_up(&self) -> bool {
        self.up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(frame: &[u8]) -> Vec<u8> {
        [&[0; HEADER], frame].concat()
    }

    #[test]
    fn frames_keep_their_borders_both_ways() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut passt = Passt::new(ours).unwrap();
        let frames: Vec<Vec<u8>> = [14, 60, 1514, LONGEST].iter().map(|len| vec![*len as u8; *len]).collect();
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            for _ in 0..4 {
                let mut length = [0; 4];
                theirs.read_exact(&mut length).unwrap();
                let mut frame = vec![0; u32::from_be_bytes(length) as usize];
                theirs.read_exact(&mut frame).unwrap();
                got.push(frame);
            }
            // Back again, a few bytes at a time.
            for frame in &got {
                let bytes = [&(frame.len() as u32).to_be_bytes()[..], frame].concat();
                for piece in bytes.chunks(777) {
                    theirs.write_all(piece).unwrap();
                }
            }
            (got, theirs)
        });
        for frame in &frames {
            passt.send(&packet(frame));
        }
        let mut back = Vec::new();
        while back.len() < 4 {
            passt.turn();
            while let Some((_, frame)) = passt.frame() {
                back.push(frame.to_vec());
                passt.consume();
            }
            std::thread::yield_now();
        }
        let (got, theirs) = reader.join().unwrap();
        assert!(got == frames && back == frames);
        assert!(passt.link_up());
        drop(theirs);
        assert!(passt.frame().is_none() && !passt.link_up() && passt.wait_for().is_none());
        passt.send(&packet(&frames[0]));
        assert!(passt.takes());
    }

    #[test]
    fn a_peer_that_does_not_read_makes_the_guest_wait() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut passt = Passt::new(ours).unwrap();
        let mut count = 0;
        while passt.takes() {
            passt.send(&packet(&[0; 1514]));
            passt.turn();
            count += 1;
            assert!(count < 10_000);
        }
        assert_eq!(passt.wait_for().map(|(_, events)| events & libc::POLLOUT), Some(libc::POLLOUT));
    }

    #[test]
    fn an_impossible_length_ends_the_connection() {
        for length in [0, LONGEST as u32 + 1, u32::MAX] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut passt = Passt::new(ours).unwrap();
            theirs.write_all(&length.to_be_bytes()).unwrap();
            assert!(passt.frame().is_none());
            assert!(!passt.link_up(), "{length}");
        }
    }
}
