//! The network device (virtio 1.2, section 5.1): a card whose other end is a [`Backend`].
//!
//! One thread serves all queues of a card (`run`): it takes frames from the transmit queues to the backend, lets the
//! backend do its work, and puts the backend's frames into receive buffers. Frames may be as long as 64 KiB in both
//! directions (segmentation offload), and a long frame to the guest takes as many of its buffers as it needs
//! (mergeable buffers).
//!
//! | backend | what is at the other end |
//! |---|---|
//! | [`user::User`] | a network inside this process, with host sockets; needs no privileges |
//! | [`tap::Tap`] | a TAP device of the host |
//! | [`passt::Passt`] | a passt process, through its socket |
//!
//! Queue pairs are chosen by the guest for what it sends; what it receives comes on the pair on which it last sent on
//! the same flow. Filters by MAC address are accepted and not applied, which the specification leaves to the device
//! (section 5.1.6.5): the other end of the wire is the guest's alone.

mod control;
mod flow;
pub mod passt;
mod run;
pub mod tap;
#[cfg(test)]
mod tests;
pub mod user;

use crate::{ActivateError, Activation, Device, DeviceId, Worker, read_config};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Feature bits (section 5.1.3), as masks.
pub mod feature {
    /// VIRTIO_NET_F_CSUM: the device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// VIRTIO_NET_F_GUEST_CSUM: the driver does.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// VIRTIO_NET_F_MAC.
    pub const MAC: u64 = 1 << 5;
    /// VIRTIO_NET_F_GUEST_TSO4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// VIRTIO_NET_F_GUEST_TSO6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// VIRTIO_NET_F_HOST_TSO4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// VIRTIO_NET_F_HOST_TSO6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// VIRTIO_NET_F_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// VIRTIO_NET_F_CTRL_VQ.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// VIRTIO_NET_F_CTRL_RX.
    pub const CTRL_RX: u64 = 1 << 18;
    /// VIRTIO_NET_F_MQ.
    pub const MQ: u64 = 1 << 22;
    /// VIRTIO_NET_F_CTRL_MAC_ADDR.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
}

/// Bytes of the header in front of every frame (section 5.1.6).
pub const HEADER: usize = 12;
/// Longest frame, in bytes: an IP packet of 64 KiB behind an Ethernet header.
pub const LONGEST: usize = 14 + 65535;
/// Most pairs of queues.
pub const MAX_PAIRS: u16 = 8;
/// Entries of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 16;

/// The header in front of every frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`Header::NEEDS_CSUM`], [`Header::DATA_VALID`].
    pub flags: u8,
    /// How the frame is to be cut: [`Header::TCPV4`] or 0 for not at all.
    pub gso_type: u8,
    /// Bytes of all headers of a frame that is to be cut.
    pub hdr_len: u16,
    /// Bytes of payload in each piece.
    pub gso_size: u16,
    /// Where the checksum starts.
    pub csum_start: u16,
    /// Where it is stored, from there.
    pub csum_offset: u16,
}

impl Header {
    /// VIRTIO_NET_HDR_F_NEEDS_CSUM.
    pub const NEEDS_CSUM: u8 = 1;
    /// VIRTIO_NET_HDR_F_DATA_VALID.
    pub const DATA_VALID: u8 = 2;
    /// VIRTIO_NET_HDR_GSO_TCPV4.
    pub const TCPV4: u8 = 1;

    /// As it stands in memory, with `buffers` for num_buffers.
    pub fn bytes(&self, buffers: u16) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, buffers];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads it, without the number of buffers.
    pub fn read(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }
}

/// The other end of a card. All methods are called by the card's thread, apart from `features`.
pub trait Backend: Send {
    /// Which of the offload features it can serve ([`feature`]).
    fn features(&self) -> u64;

    /// The driver is ready, with these features.
    fn begin(&mut self, features: u64);

    /// The card was reset.
    fn end(&mut self);

    /// What to wait for besides the guest: a descriptor and events of poll(2).
    fn wait_for(&self) -> Option<(RawFd, i16)>;

    /// Whether it takes frames now. If not, `wait_for` is ready when it does again.
    fn takes(&self) -> bool {
        true
    }

    /// Takes a frame of the guest; `packet` starts with the header. What it cannot use it drops.
    fn send(&mut self, packet: &[u8]);

    /// Does what is to be done for events of the host. Gives the time after which to call again in any case.
    fn turn(&mut self) -> Option<Duration>;

    /// The next frame for the guest.
    fn frame(&mut self) -> Option<(Header, &[u8])>;

    /// Removes the frame that `frame` gave.
    fn consume(&mut self);

    /// Whether the wire is connected.
    fn link_up(&self) -> bool {
        true
    }
}

/// What the card's thread and its registers share.
#[derive(Debug)]
struct Shared {
    mac: Mutex<[u8; 6]>,
    link: AtomicBool,
}

/// The network device.
pub struct Net {
    backend: Arc<Mutex<Box<dyn Backend>>>,
    shared: Arc<Shared>,
    pairs: u16,
    features: u64,
    worker: Option<Worker>,
}

impl Net {
    /// A card with a MAC address and a number of queue pairs, 1 to [`MAX_PAIRS`]; others are taken for the nearest.
    pub fn new(backend: Box<dyn Backend>, mac: [u8; 6], pairs: u16) -> Self {
        let pairs = pairs.clamp(1, MAX_PAIRS);
        let own = feature::MAC | feature::MRG_RXBUF | feature::STATUS | feature::CTRL_VQ | feature::CTRL_RX;
        let many = if pairs > 1 { feature::MQ } else { 0 };
        let features = own | feature::CTRL_MAC_ADDR | many | backend.features();
        let shared = Shared { mac: Mutex::new(mac), link: AtomicBool::new(backend.link_up()) };
        Self { backend: Arc::new(Mutex::new(backend)), shared: Arc::new(shared), pairs, features, worker: None }
    }
}

impl Device for Net {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.pairs)];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    /// Section 5.1.4: mac, status (VIRTIO_NET_S_LINK_UP), max_virtqueue_pairs.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 10];
        config[..6].copy_from_slice(&*self.shared.mac.lock().unwrap_or_else(PoisonError::into_inner));
        config[6] = u8::from(self.shared.link.load(SeqCst));
        config[8..].copy_from_slice(&self.pairs.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn activate(&mut self, mut with: Activation) -> Result<(), ActivateError> {
        // Without MQ there is one pair, and the control queue follows it (section 5.1.2).
        let pairs = if with.has(feature::MQ) { self.pairs } else { 1 };
        let mut queues = Vec::new();
        for pair in 0..pairs {
            // A driver may leave out pairs that it does not use, the first excepted.
            match (with.take(2 * pair), with.take(2 * pair + 1)) {
                (Ok(receive), Ok(transmit)) => queues.push(run::Pair::new(receive, transmit)),
                (Err(error), _) | (_, Err(error)) if pair == 0 => return Err(error),
                _ => break,
            }
        }
        let control = if with.has(feature::CTRL_VQ) { with.take(2 * pairs).ok() } else { None };
        let card = run::Card {
            pairs: queues,
            control,
            active: 1,
            mergeable: with.has(feature::MRG_RXBUF),
            features: with.features,
            signal: with.signal,
            shared: self.shared.clone(),
        };
        let backend = self.backend.clone();
        self.worker = Some(Worker::start("virtio-net", move |stop| {
            let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
            card.run(stop, backend.as_mut());
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// A MAC address from text such as `52:54:00:12:34:56`; only addresses that a card may have.
///
/// # Errors
/// It is none, or a group's.
pub fn parse_mac(text: &str) -> Result<[u8; 6], MacError> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(|| MacError(text.into()))?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| MacError(text.into()))?;
    }
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(MacError(text.into()));
    }
    Ok(mac)
}

/// A text that is no MAC address of a card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no MAC address for a card; write it as 52:54:00:12:34:56, with an even first byte")]
pub struct MacError(String);

/// A backend that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// No port, thread or descriptor for user networking.
    #[error(transparent)]
    Listen(#[from] paravane_usernet::ListenError),
    /// A TAP device cannot be used.
    #[error(
        "the TAP device \"{0}\" cannot be used ({1}); make it with `ip tuntap add dev {0} mode tap user NAME`, or take user \
         networking, which needs no rights"
    )]
    Tap(String, io::Error),
    /// Nobody answers at a socket.
    #[error("passt cannot be reached at \"{0}\" ({1}); start it first, with `passt --socket {0}`")]
    Passt(String, io::Error),
    /// The host is out of something.
    #[error("the network cannot be set up ({0}); close other programs or raise the host's limits")]
    Host(#[from] io::Error),
}
