//! The card's thread: frames between the queues and the backend.

use super::control::{self, Change};
use super::flow::Flows;
use super::{Backend, HEADER, Header, LONGEST, Shared};
use crate::{Chain, Queue, QueueError, Signal, Stop, Wake, poll_fd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Frames taken from one queue before the backend and the other queues get their turn.
const ROUND: usize = 64;
/// Shortest frame: an Ethernet header.
const SHORTEST: usize = 14;

/// A receive and a transmit queue.
pub(super) struct Pair {
    receive: Queue,
    transmit: Queue,
    /// Receive buffers that were taken from the queue and are still empty.
    stock: VecDeque<Chain>,
}

impl Pair {
    pub(super) fn new(receive: Queue, transmit: Queue) -> Self {
        Self { receive, transmit, stock: VecDeque::new() }
    }
}

/// Everything that the thread works with.
pub(super) struct Card {
    pub(super) pairs: Vec<Pair>,
    pub(super) control: Option<Queue>,
    /// Pairs in use, as the driver has said.
    pub(super) active: usize,
    pub(super) mergeable: bool,
    pub(super) features: u64,
    pub(super) signal: Signal,
    pub(super) shared: Arc<Shared>,
}

impl Card {
    /// Serves until the card is reset, or the guest's driver does what it must not.
    pub(super) fn run(mut self, stop: &Stop, backend: &mut dyn Backend) {
        backend.begin(self.features);
        if self.serve(stop, backend).is_err() {
            self.signal.needs_reset();
        }
        backend.end();
    }

    fn serve(&mut self, stop: &Stop, backend: &mut dyn Backend) -> Result<(), QueueError> {
        let mut flows = Flows::new();
        let mut packet = vec![0; HEADER + LONGEST];
        for pair in &mut self.pairs {
            pair.transmit.disable_notifications()?;
            pair.receive.disable_notifications()?;
        }
        loop {
            self.queues().for_each(|queue| {
                queue.bell().clear();
            });
            self.obey()?;
            let timeout = loop {
                let mut moved = false;
                for (index, pair) in self.pairs.iter_mut().enumerate() {
                    moved |= transmit(&mut pair.transmit, backend, &mut packet, |frame| flows.sent(frame, index))?;
                }
                let timeout = backend.turn();
                moved |= self.receive(backend, &flows)?;
                self.note_link(backend);
                if !moved && !self.more(backend)? {
                    break timeout;
                }
                if stop.requested() {
                    return Ok(());
                }
            };
            if self.wait(stop, backend, timeout) == Wake::Stop {
                return Ok(());
            }
            for pair in &mut self.pairs {
                pair.transmit.disable_notifications()?;
                pair.receive.disable_notifications()?;
            }
        }
    }

    fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.pairs.iter().flat_map(|pair| [&pair.receive, &pair.transmit]).chain(&self.control)
    }

    /// Asks the driver to notify of what is waited for; true if there is something already.
    fn more(&mut self, backend: &mut dyn Backend) -> Result<bool, QueueError> {
        let mut more = false;
        if backend.takes() {
            for pair in &mut self.pairs {
                more |= pair.transmit.enable_notifications()?;
            }
        }
        if backend.frame().is_some() {
            for pair in &mut self.pairs {
                more |= pair.receive.enable_notifications()?;
            }
        }
        Ok(more)
    }

    fn wait(&self, stop: &Stop, backend: &dyn Backend, timeout: Option<Duration>) -> Wake {
        let mut fds: Vec<_> = self.queues().map(|queue| poll_fd(queue.as_fd(), libc::POLLIN)).collect();
        if let Some((fd, events)) = backend.wait_for() {
            fds.push(libc::pollfd { fd, events, revents: 0 });
        }
        stop.poll(&mut fds, timeout)
    }

    /// Carries out commands.
    fn obey(&mut self) -> Result<(), QueueError> {
        let (features, shared, active) = (self.features, &self.shared, &mut self.active);
        let pairs = u16::try_from(self.pairs.len()).unwrap_or(u16::MAX);
        let Some(queue) = &mut self.control else { return Ok(()) };
        queue.serve(|chain| {
            match control::serve(chain, features, pairs) {
                Change::Nothing => {}
                Change::Mac(mac) => *shared.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac,
                Change::Pairs(pairs) => *active = usize::from(pairs),
            }
            Some(chain.written())
        })
    }

    /// Tells the driver when the wire was cut or connected.
    fn note_link(&self, backend: &dyn Backend) {
        let up = backend.link_up();
        if self.shared.link.swap(up, SeqCst) != up {
            self.signal.config_changed();
        }
    }

    /// Puts the backend's frames into receive buffers; true if some were moved.
    fn receive(&mut self, backend: &mut dyn Backend, flows: &Flows) -> Result<bool, QueueError> {
        let mut moved = false;
        while let Some((header, frame)) = backend.frame() {
            let pair = &mut self.pairs[flows.pair(frame, self.active)];
            match deliver(pair, self.mergeable, &header, frame)? {
                Delivery::Done => moved = true,
                // The driver's buffers are too small for it, and will be for ever.
                Delivery::Impossible => {}
                Delivery::Later => break,
            }
            backend.consume();
        }
        if moved {
            for pair in &mut self.pairs {
                pair.receive.signal()?;
            }
        }
        Ok(moved)
    }
}

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Delivery {
    Done,
    /// There are not enough buffers now.
    Later,
    /// There can never be.
    Impossible,
}

/// Puts one frame into as many buffers as it needs.
fn deliver(pair: &mut Pair, mergeable: bool, header: &Header, frame: &[u8]) -> Result<Delivery, QueueError> {
    let wanted = HEADER + frame.len();
    let (mut room, mut count) = (0, 0);
    while room < wanted {
        if count == pair.stock.len() {
            let Some(chain) = pair.receive.pop()? else {
                // All buffers of the queue are here, and they are too few.
                let all = count >= usize::from(pair.receive.size());
                return Ok(if all { Delivery::Impossible } else { Delivery::Later });
            };
            pair.stock.push_back(chain);
        }
        room += pair.stock[count].writable_len() as usize;
        count += 1;
        if !mergeable && room < wanted {
            return Ok(Delivery::Impossible);
        }
    }
    let buffers = u16::try_from(count).map_err(|_| QueueError::AvailableIndex)?;
    let header = header.bytes(buffers);
    let (mut header, mut rest) = (&header[..], frame);
    let mut done = Vec::with_capacity(count);
    for mut chain in pair.stock.drain(..count) {
        header = &header[chain.write(header)..];
        if header.is_empty() {
            rest = &rest[chain.write(rest)..];
        }
        done.push((chain.head(), chain.written()));
    }
    pair.receive.complete_all(&done)?;
    Ok(Delivery::Done)
}

/// Takes frames of the guest to the backend; true if there were some.
fn transmit(
    queue: &mut Queue,
    backend: &mut dyn Backend,
    packet: &mut [u8],
    mut sent: impl FnMut(&[u8]),
) -> Result<bool, QueueError> {
    let mut done = Vec::new();
    while done.len() < ROUND && backend.takes() {
        let Some(mut chain) = queue.pop()? else { break };
        let len = chain.readable_len() as usize;
        // Frames that are none are dropped, as on a wire.
        if (HEADER + SHORTEST..=packet.len()).contains(&len) {
            let len = chain.read(&mut packet[..len]);
            sent(&packet[HEADER..len]);
            backend.send(&packet[..len]);
        }
        done.push((chain.head(), 0));
    }
    if done.is_empty() {
        return Ok(false);
    }
    queue.complete_all(&done)?;
    queue.signal()?;
    Ok(true)
}

/// A descriptor that a backend waits on.
pub(super) fn readable(fd: BorrowedFd<'_>) -> (std::os::fd::RawFd, i16) {
    use std::os::fd::AsRawFd;
    (fd.as_raw_fd(), libc::POLLIN)
}
