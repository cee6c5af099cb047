//! The console device with multiple ports (virtio 1.2, section 5.3).
//!
//! Port 0 is a console (`hvc0` to Linux); others, if there are, are named byte streams (`/dev/virtio-ports/NAME`). Each port has a pair of
//! queues; the control queues carry what both sides have to say about ports. One worker serves all of them.
//!
//! Queues (section 5.3.2): 0 and 1 to and from port 0, 2 and 3 control, then a pair for each further port.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use super::lock;
use crate::{
    ActivateError, Activation, Chain, Device, DeviceId, Doorbell, Queue, QueueError, Stop, Wake, Worker, read_config,
};

const QUEUE_SIZE: u16 = 128;
/// Input that may wait for the guest, per port, in bytes.
const MAX_INPUT: usize = 64 << 10;
/// Control messages that may wait for the guest: a driver gets all it can ask for with a few per port.
const MAX_CONTROL: usize = 256;

/// VIRTIO_CONSOLE_F_SIZE.
const F_SIZE: u64 = 1;
/// VIRTIO_CONSOLE_F_MULTIPORT.
const F_MULTIPORT: u64 = 2;

/// Control events (section 5.3.6.2).
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const DEVICE_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

struct Incoming {
    bytes: Mutex<VecDeque<u8>>,
    bell: Doorbell,
}

/// Where a port's input is put, from any thread.
#[derive(Clone)]
pub struct PortInput(Arc<Incoming>);

impl PortInput {
    /// Takes as many bytes as have room; gives their number. The rest is to be offered again later.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut waiting = lock(&self.0.bytes);
        let n = bytes.len().min(MAX_INPUT - waiting.len().min(MAX_INPUT));
        waiting.extend(&bytes[..n]);
        drop(waiting);
        self.0.bell.ring();
        n
    }
}

/// One port: its name, and where its output goes. Output that blocks holds up the device, so it should not for long.
pub struct Port {
    name: String,
    output: Arc<Mutex<Box<dyn Write + Send>>>,
    input: Arc<Incoming>,
}

impl Port {
    /// A port.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(name: &str, output: Box<dyn Write + Send>) -> std::io::Result<Self> {
        let input = Arc::new(Incoming { bytes: Mutex::default(), bell: Doorbell::new()? });
        Ok(Self { name: name.into(), output: Arc::new(Mutex::new(output)), input })
    }

    /// The other end of its input.
    pub fn input(&self) -> PortInput {
        PortInput(self.input.clone())
    }
}

/// The console device.
pub struct Console {
    ports: Arc<[Port]>,
    size: (u16, u16),
    worker: Option<Worker>,
}

impl Console {
    /// A device with these ports, the first of which is the console, and with a screen of so many columns and rows.
    pub fn new(ports: Vec<Port>, size: (u16, u16)) -> Self {
        Self { ports: ports.into(), size, worker: None }
    }
}

impl Device for Console {
    fn id(&self) -> DeviceId {
        DeviceId::Console
    }
    fn features(&self) -> u64 {
        F_SIZE | F_MULTIPORT
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * (self.ports.len() + 1)]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut c = [0; 12];
        c[..2].copy_from_slice(&self.size.0.to_le_bytes());
        c[2..4].copy_from_slice(&self.size.1.to_le_bytes());
        c[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        read_config(&c, offset, data);
    }
    fn activate(&mut self, mut with: Activation) -> Result<(), ActivateError> {
        let multiport = with.has(F_MULTIPORT);
        let mut lanes = Vec::new();
        for (n, _) in self.ports.iter().enumerate() {
            let first = if n == 0 { 0 } else { 2 * n as u16 + 2 };
            // A driver need not use ports beyond the first.
            let pair = (with.take(first).ok(), with.take(first + 1).ok());
            lanes.push(Lane { to_guest: pair.0, from_guest: pair.1, announced: false, open: !multiport });
        }
        let control = if multiport { Some((with.take(2)?, with.take(3)?)) } else { None };
        let run = Run { ports: self.ports.clone(), lanes, control, messages: VecDeque::new(), size: self.size };
        self.worker = Some(Worker::start("virtio-console", move |stop| run.run(stop))?);
        Ok(())
    }
    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Lane {
    to_guest: Option<Queue>,
    from_guest: Option<Queue>,
    /// The driver was told of the port and is ready for it.
    announced: bool,
    /// Somebody in the guest has it open.
    open: bool,
}

struct Run {
    ports: Arc<[Port]>,
    lanes: Vec<Lane>,
    control: Option<(Queue, Queue)>,
    /// Control messages for the guest.
    messages: VecDeque<Vec<u8>>,
    size: (u16, u16),
}

impl Run {
    fn run(mut self, stop: &Stop) {
        let signal = {
            let first = self.lanes.iter().flat_map(|l| [&l.to_guest, &l.from_guest]).flatten().next();
            let Some(queue) = first.or(self.control.as_ref().map(|c| &c.0)) else { return };
            queue.driver().clone()
        };
        loop {
            for q in self.queues() {
                q.bell().clear();
            }
            for p in &*self.ports {
                p.input.bell.clear();
            }
            if self.serve().is_err() {
                return signal.needs_reset();
            }
            let fds: Vec<_> =
                self.queues().map(AsFd::as_fd).chain(self.ports.iter().map(|p| p.input.bell.as_fd())).collect();
            if stop.wait(&fds) != Wake::Ready {
                return;
            }
        }
    }

    fn queues(&self) -> impl Iterator<Item = &Queue> {
        let ports = self.lanes.iter().flat_map(|l| [&l.to_guest, &l.from_guest]).flatten();
        ports.chain(self.control.iter().flat_map(|(a, b)| [a, b]))
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        if let Some((_, from)) = &mut self.control {
            let mut heard = Vec::new();
            from.serve(|chain| {
                let mut message = [0; 8];
                if chain.read(&mut message) == message.len() {
                    heard.push(message);
                }
                Some(0)
            })?;
            for message in heard {
                self.hear(message);
            }
        }
        for (lane, port) in self.lanes.iter_mut().zip(&*self.ports) {
            if let Some(queue) = &mut lane.from_guest {
                queue.serve(|chain| {
                    print(chain, &port.output);
                    Some(0)
                })?;
            }
            if let Some(queue) = lane.to_guest.as_mut().filter(|_| lane.open) {
                feed(queue, &port.input)?;
            }
        }
        if let Some((to, _)) = &mut self.control {
            let messages = &mut self.messages;
            to.serve(|chain| {
                let message = messages.pop_front()?;
                chain.write(&message);
                Some(chain.written())
            })?;
        }
        Ok(())
    }

    /// The driver says something about a port.
    fn hear(&mut self, message: [u8; 8]) {
        let [a, b, c, d, e0, e1, v0, v1] = message;
        let (id, event, value) =
            (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e0, e1]), u16::from_le_bytes([v0, v1]));
        if event == event::DEVICE_READY {
            if value == 1 {
                for n in 0..self.ports.len() as u32 {
                    self.say(n, event::DEVICE_ADD, 1, &[]);
                }
            }
            return;
        }
        let Some(lane) = self.lanes.get_mut(id as usize) else { return };
        match event {
            event::PORT_READY if value == 1 && !lane.announced => {
                lane.announced = true;
                if id == 0 {
                    self.say(id, event::CONSOLE_PORT, 1, &[]);
                    let (columns, rows) = self.size;
                    // Linux, as the specification has it since 1.2: columns first.
                    let size = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
                    self.say(id, event::RESIZE, 0, &size);
                }
                let name = self.ports[id as usize].name.clone();
                self.say(id, event::PORT_NAME, 1, name.as_bytes());
                self.say(id, event::PORT_OPEN, 1, &[]);
            }
            event::PORT_OPEN => lane.open = value == 1,
            _ => {}
        }
    }

    fn say(&mut self, id: u32, event: u16, value: u16, more: &[u8]) {
        // A driver that asks and never listens is not worth more memory.
        if self.messages.len() < MAX_CONTROL {
            let head = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
            self.messages.push_back([&head[..], more].concat());
        }
    }
}

/// Writes what the guest says; what cannot be written is dropped, as on a line with nobody at its end.
fn print(chain: &mut Chain, output: &Mutex<Box<dyn Write + Send>>) {
    let mut output = lock(output);
    let mut bytes = [0; 4096];
    loop {
        let n = chain.read(&mut bytes);
        if n == 0 {
            break;
        }
        let _ = output.write_all(&bytes[..n]);
    }
    let _ = output.flush();
}

/// Gives the guest what waits for it.
fn feed(queue: &mut Queue, input: &Incoming) -> Result<(), QueueError> {
    queue.serve(|chain| {
        let mut waiting = lock(&input.bytes);
        if waiting.is_empty() {
            return None;
        }
        let n = waiting.len().min(chain.writable_len() as usize);
        let bytes: Vec<u8> = waiting.drain(..n).collect();
        drop(waiting);
        chain.write(&bytes);
        Some(chain.written())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{Driver, activate, eventually, ram};
    use std::io;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn drivers(n: u64) -> Vec<Driver> {
        let mem = ram();
        (0..n).map(|n| Driver::new(&mem, 0x1_0000 * (n + 1), 16)).collect()
    }

    /// Reads the next control message.
    fn message(d: &mut Driver) -> (u32, u16, u16, Vec<u8>) {
        let at = 0x20_0000;
        d.chain(0, &[(at, 64, true)]);
        d.offer(0);
        let (_, len) = d.wait();
        let name = (8..u64::from(len)).map(|n| d.get::<u8>(at + n)).collect();
        (d.get(at), d.get(at + 4), d.get(at + 6), name)
    }

    fn say(d: &mut Driver, id: u32, event: u16, value: u16) {
        d.put(0x21_0000, id);
        d.put(0x21_0004, event);
        d.put(0x21_0006, value);
        d.chain(0, &[(0x21_0000, 8, false)]);
        d.offer(0);
        d.wait();
    }

    #[test]
    fn a_plain_driver_reads_and_writes_port_0() {
        let screen = Screen::default();
        let port = Port::new("con", Box::new(screen.clone())).unwrap();
        let input = port.input();
        let mut console = Console::new(vec![port], (80, 25));
        let mut d = drivers(2);
        activate(&mut console, &d.iter().collect::<Vec<_>>(), 0);
        d[1].put(0x20_0000, *b"hello, host");
        d[1].chain(0, &[(0x20_0000, 5, false), (0x20_0005, 6, false)]);
        d[1].offer(0);
        assert_eq!(d[1].wait(), (0, 0));
        assert_eq!(*lock(&screen.0), b"hello, host");
        // Input waits for buffers, and buffers for input.
        assert_eq!(input.offer(b"abcdef"), 6);
        d[0].chain(0, &[(0x20_0100, 4, true)]);
        d[0].offer(0);
        assert_eq!((d[0].wait(), d[0].get::<[u8; 4]>(0x20_0100)), ((0, 4), *b"abcd"));
        d[0].offer(0);
        assert_eq!((d[0].wait(), d[0].get::<[u8; 2]>(0x20_0100)), ((0, 2), *b"ef"));
        d[0].offer(0);
        input.offer(b"g");
        assert_eq!(d[0].wait(), (0, 1));
        assert_eq!(input.offer(&vec![0; MAX_INPUT + 5]), MAX_INPUT);
    }

    #[test]
    fn ports_are_announced_named_and_opened() {
        let screens = [Screen::default(), Screen::default()];
        let ports = ["con", "agent"].iter().zip(&screens).map(|(n, s)| Port::new(n, Box::new(s.clone())).unwrap());
        let ports: Vec<_> = ports.collect();
        let input = ports[1].input();
        let mut console = Console::new(ports, (80, 25));
        let mut d = drivers(6);
        let (signal, _) = activate(&mut console, &d.iter().collect::<Vec<_>>(), F_MULTIPORT);
        say(&mut d[3], 0, event::DEVICE_READY, 1);
        assert_eq!(message(&mut d[2]), (0, event::DEVICE_ADD, 1, vec![]));
        assert_eq!(message(&mut d[2]), (1, event::DEVICE_ADD, 1, vec![]));
        say(&mut d[3], 1, event::PORT_READY, 1);
        assert_eq!(message(&mut d[2]), (1, event::PORT_NAME, 1, b"agent".to_vec()));
        assert_eq!(message(&mut d[2]), (1, event::PORT_OPEN, 1, vec![]));
        say(&mut d[3], 0, event::PORT_READY, 1);
        assert_eq!(message(&mut d[2]), (0, event::CONSOLE_PORT, 1, vec![]));
        assert_eq!(message(&mut d[2]), (0, event::RESIZE, 0, vec![80, 0, 25, 0]));
        // Nonsense about ports is ignored.
        for (id, event, value) in [(2, event::PORT_READY, 1), (u32::MAX, event::PORT_OPEN, 1), (0, 99, 7)] {
            say(&mut d[3], id, event, value);
        }
        // Input arrives once somebody has the port open.
        input.offer(b"x");
        d[4].chain(0, &[(0x20_0100, 4, true)]);
        d[4].offer(0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(d[4].used(), None);
        say(&mut d[3], 1, event::PORT_OPEN, 1);
        assert_eq!(d[4].wait(), (0, 1));
        d[5].put(0x20_0000, *b"yes");
        d[5].chain(0, &[(0x20_0000, 3, false)]);
        d[5].offer(0);
        d[5].wait();
        assert_eq!((&*lock(&screens[1].0), lock(&screens[0].0).len()), (&b"yes".to_vec(), 0));
        // A control message that is too short is dropped; a bad chain is not.
        d[3].chain(0, &[(0x21_0000, 7, false)]);
        d[3].offer(0);
        d[3].wait();
        assert!(!signal.waits_for_reset());
        d[3].chain(0, &[(1 << 33, 8, false)]);
        d[3].offer(0);
        eventually("the device asks for a reset", || signal.waits_for_reset());
    }
}
