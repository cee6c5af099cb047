//! The socket device (virtio 1.2, section 5.10), backed by Unix sockets.
//!
//! - *Host to guest*: a program of the host connects to the device's socket and writes `CONNECT PORT\n`. When the guest accepts, it reads
//!   `OK HOSTPORT\n`, and from then on the bytes of the stream.
//! - *Guest to host*: a connection to port P of CID 2 becomes a connection to the Unix socket `SOCKET_P`.
//!
//! This is the protocol that Firecracker and Cloud Hypervisor users know. One worker does everything with non-blocking sockets. Bytes for
//! the host wait in a buffer of bounded size per connection, which is the credit that the guest has; bytes for the guest stay in the
//! host's socket until the guest has credit and buffers for them.

mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{
    ActivateError, Activation, Chain, Device, DeviceId, Queue, QueueError, Stop, Wake, Worker, poll_fd, read_config,
};
use connection::{Connection, Fate};
use packet::{HEADER, Packet, STREAM, op};

const QUEUE_SIZE: u16 = 256;
const HOST_CID: u64 = 2;
/// Connections at a time, with those that have not said where to yet.
const MAX_CONNECTIONS: usize = 512;
/// Replies that may wait for the guest's buffers before nothing more is heard from it.
const MAX_REPLIES: usize = 256;
/// First port of the host's end of connections to the guest.
const FIRST_PORT: u32 = 1 << 30;
/// Longest first line of a connection to the guest.
const MAX_LINE: usize = 32;

/// A connection by its ports: the host's and the guest's.
type Key = (u32, u32);

/// The socket device.
pub struct Vsock {
    cid: u32,
    path: PathBuf,
    listener: Arc<UnixListener>,
    worker: Option<Worker>,
}

impl Vsock {
    /// A device for the guest with this context ID, reached at a Unix socket, which is made.
    ///
    /// # Errors
    /// The host's; a socket at which somebody listens is not taken over.
    pub fn new(cid: u32, path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
        if stale {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { cid, path: path.to_owned(), listener: Arc::new(listener), worker: None })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.worker = None;
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Device for Vsock {
    fn id(&self) -> DeviceId {
        DeviceId::Vsock
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }
    fn activate(&mut self, mut with: Activation) -> Result<(), ActivateError> {
        let hub = Hub {
            cid: u64::from(self.cid),
            path: self.path.clone(),
            listener: self.listener.clone(),
            to_guest: with.take(0)?,
            from_guest: with.take(1)?,
            connections: HashMap::new(),
            greeting: Vec::new(),
            replies: VecDeque::new(),
            next_port: FIRST_PORT,
        };
        // The third queue carries events; none of them happens here.
        with.take(2)?;
        self.worker = Some(Worker::start("virtio-vsock", move |stop| hub.run(stop))?);
        Ok(())
    }
    fn reset(&mut self) {
        self.worker = None;
    }
}

/// All connections.
struct Hub {
    cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    to_guest: Queue,
    from_guest: Queue,
    connections: HashMap<Key, Connection>,
    /// Programs of the host that have not said yet where to.
    greeting: Vec<(UnixStream, Vec<u8>)>,
    /// Packets without data for the guest.
    replies: VecDeque<Packet>,
    next_port: u32,
}

impl Hub {
    fn run(mut self, stop: &Stop) {
        loop {
            self.to_guest.bell().clear();
            self.from_guest.bell().clear();
            // Replies first: they make room to hear more.
            let served = self.send().and_then(|()| self.hear()).and_then(|()| self.send());
            if served.is_err() {
                return self.to_guest.driver().needs_reset();
            }
            if !self.wait(stop) {
                return;
            }
        }
    }

    /// Waits for the guest or the host, and takes what the host has.
    fn wait(&mut self, stop: &Stop) -> bool {
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        let mut fds = vec![
            poll_fd(self.to_guest.as_fd(), libc::POLLIN),
            poll_fd(self.from_guest.as_fd(), libc::POLLIN),
            poll_fd(self.listener.as_fd(), libc::POLLIN),
        ];
        if self.connections.len() + self.greeting.len() >= MAX_CONNECTIONS {
            fds[2].fd = -1;
        }
        fds.extend(self.greeting.iter().map(|g| poll_fd(g.0.as_fd(), libc::POLLIN)));
        fds.extend(keys.iter().map(|k| {
            let c = &self.connections[k];
            let events = c.interest();
            // A descriptor that is hung up is reported whatever is asked for, so one of no interest is left out.
            libc::pollfd { fd: if events == 0 { -1 } else { c.stream.as_raw_fd() }, events, revents: 0 }
        }));
        if stop.poll(&mut fds, None) == Wake::Stop {
            return false;
        }
        let (first, rest) = fds.split_at(3);
        let (greeting, connected) = rest.split_at(self.greeting.len());
        for (key, fd) in keys.iter().zip(connected) {
            if let Some(c) = self.connections.get_mut(key) {
                if fd.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0 {
                    c.readable = true;
                }
                if fd.revents & (libc::POLLOUT | libc::POLLERR) != 0 {
                    c.flush();
                }
                self.look_after(*key);
            }
        }
        let ready: Vec<bool> = greeting.iter().map(|fd| fd.revents != 0).collect();
        self.greet(&ready);
        if first[2].revents != 0
            && let Ok((stream, _)) = self.listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            self.greeting.push((stream, Vec::new()));
        }
        true
    }

    /// Reads first lines; a whole one becomes a request to the guest.
    fn greet(&mut self, ready: &[bool]) {
        let waiting = std::mem::take(&mut self.greeting);
        for ((mut stream, mut line), ready) in waiting.into_iter().zip(ready) {
            let mut byte = [0];
            let mut keep = true;
            // Byte by byte: what follows the line belongs to the guest.
            while keep && *ready && line.last() != Some(&b'\n') {
                match stream.read(&mut byte) {
                    Ok(1) if line.len() < MAX_LINE => line.push(byte[0]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    _ => keep = false,
                }
            }
            if line.last() == Some(&b'\n') {
                let text = String::from_utf8_lossy(&line);
                if let Some(port) = text.trim_end().strip_prefix("CONNECT ").and_then(|p| p.parse().ok()) {
                    self.connect_guest(stream, port);
                }
            } else if keep {
                self.greeting.push((stream, line));
            }
        }
    }

    fn connect_guest(&mut self, stream: UnixStream, guest: u32) {
        let mut host = self.next_port;
        while self.connections.contains_key(&(host, guest)) {
            host = host.checked_add(1).unwrap_or(FIRST_PORT);
        }
        self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
        self.connections.insert((host, guest), Connection::to_guest(stream));
        self.reply((host, guest), op::REQUEST, 0);
    }

    /// Queues a packet without data for the guest.
    fn reply(&mut self, (host, guest): Key, op: u16, flags: u32) {
        let mut packet = Packet {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: host,
            dst_port: guest,
            kind: STREAM,
            op,
            flags,
            ..Packet::default()
        };
        if let Some(c) = self.connections.get_mut(&(host, guest)) {
            c.state_credit(&mut packet);
        }
        self.replies.push_back(packet);
    }

    /// Sees to what a connection has to say beside data, and whether it is over.
    fn look_after(&mut self, key: Key) {
        let Some(c) = self.connections.get_mut(&key) else { return };
        match c.fate() {
            Fate::Lives { update } => {
                if update {
                    self.reply(key, op::CREDIT_UPDATE, 0);
                }
            }
            Fate::Over => {
                self.connections.remove(&key);
                self.reply(key, op::RST, 0);
            }
        }
    }

    /// Gives the guest replies and data, as far as it has buffers.
    fn send(&mut self) -> Result<(), QueueError> {
        let mut busy: VecDeque<Key> =
            self.connections.iter().filter(|(_, c)| c.has_something()).map(|(k, _)| *k).collect();
        let Self { to_guest, replies, connections, cid, .. } = self;
        let mut seen = Vec::new();
        to_guest.serve(|chain| {
            if let Some(packet) = replies.pop_front() {
                chain.write(&packet.bytes());
                return Some(chain.written());
            }
            while let Some(key) = busy.pop_front() {
                let Some(c) = connections.get_mut(&key) else { continue };
                if let Some(packet) = data(chain, c, key, *cid) {
                    if packet.op == op::RW && c.has_something() {
                        busy.push_back(key);
                    }
                    seen.push(key);
                    return Some(chain.written());
                }
            }
            None
        })?;
        for key in seen {
            self.look_after(key);
        }
        Ok(())
    }

    /// Takes the guest's packets, unless it does not take our replies.
    fn hear(&mut self) -> Result<(), QueueError> {
        loop {
            if self.replies.len() >= MAX_REPLIES {
                return Ok(());
            }
            self.from_guest.disable_notifications()?;
            while self.replies.len() < MAX_REPLIES {
                let Some(mut chain) = self.from_guest.pop()? else { break };
                self.packet(&mut chain);
                self.from_guest.complete(chain.head(), 0)?;
            }
            self.from_guest.signal()?;
            // With replies waiting the guest's next buffer wakes us, or its next notification here does.
            if !self.from_guest.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// One packet of the guest.
    fn packet(&mut self, chain: &mut Chain) {
        let Some(p) = Packet::read(chain) else { return };
        // Somebody else's address: nobody to answer to (section 5.10.6.4.1).
        if p.src_cid != self.cid {
            return;
        }
        let key = (p.dst_port, p.src_port);
        if p.dst_cid != HOST_CID || p.kind != STREAM {
            if p.op != op::RST {
                self.reply(key, op::RST, 0);
            }
            return;
        }
        let Some(c) = self.connections.get_mut(&key) else {
            match p.op {
                op::REQUEST => self.connect_host(key, &p),
                op::RST => {}
                _ => self.reply(key, op::RST, 0),
            }
            return;
        };
        c.hear_credit(&p);
        let fine = match p.op {
            op::RESPONSE => c.accepted(key.0),
            op::RW => c.take(chain, p.len),
            op::SHUTDOWN => {
                c.shut_by_guest(p.flags);
                true
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                self.reply(key, op::CREDIT_UPDATE, 0);
                true
            }
            op::RST => {
                self.connections.remove(&key);
                return;
            }
            _ => false,
        };
        if fine {
            self.look_after(key);
        } else {
            self.connections.remove(&key);
            self.reply(key, op::RST, 0);
        }
    }

    /// The guest wants to reach a port of the host.
    fn connect_host(&mut self, key: Key, p: &Packet) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.0));
        let room = self.connections.len() + self.greeting.len() < MAX_CONNECTIONS;
        // A Unix socket is connected or refused at once.
        let stream = UnixStream::connect(&path).ok().filter(|s| room && s.set_nonblocking(true).is_ok());
        let Some(stream) = stream else { return self.reply(key, op::RST, 0) };
        let mut c = Connection::from_guest(stream);
        c.hear_credit(p);
        self.connections.insert(key, c);
        self.reply(key, op::RESPONSE, 0);
    }
}

/// Puts a packet of a connection's data, or of its end, into a buffer of the guest; `None` when there is nothing after all.
fn data(chain: &mut Chain, c: &mut Connection, (host, guest): Key, cid: u64) -> Option<Packet> {
    let room = (chain.writable_len() as usize).saturating_sub(HEADER);
    let (bytes, op, flags) = c.next(room)?;
    let mut packet = Packet {
        src_cid: HOST_CID,
        dst_cid: cid,
        src_port: host,
        dst_port: guest,
        len: bytes.len() as u32,
        kind: STREAM,
        op,
        flags,
        ..Packet::default()
    };
    c.state_credit(&mut packet);
    chain.write(&packet.bytes());
    chain.write(&bytes);
    Some(packet)
}
