//! What the serial port says, on its way to the host.
//!
//! The vCPU that executes OUT must wait neither for a terminal nor for a stalled pipe, or nothing could stop the machine
//! any more. So [`Port`], the chipset's end, fills a bounded queue, and a thread of its own empties it into the file. Only when
//! the queue is full does the guest wait, as on a line with flow control; [`Output::abandon`] ends that, and drops
//! what is left, when somebody wants the machine to stop now. An orderly end goes through [`Output::finish`], which waits
//! until everything has been written.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::devices::lock;

/// Bytes that may wait before the guest does.
const QUEUE: usize = 64 << 10;
/// How long an abandoned queue may still take to be written.
const GRACE: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Queue {
    waiting: VecDeque<u8>,
    /// The thread has taken bytes that are not written yet.
    writing: bool,
    /// No more is to come.
    closed: bool,
    /// Nobody waits for the file any more: it failed, or the machine is to stop at once.
    dropped: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }
}

/// The chipset's end. It never fails: what cannot be written is dropped, as on a line with nobody at its end.
pub struct Port(Arc<Shared>);

impl Write for Port {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = lock(&self.0.queue);
        while queue.waiting.len() >= QUEUE && !queue.dropped {
            queue = self.0.wait(queue);
        }
        if !queue.dropped {
            let idle = queue.waiting.is_empty();
            queue.waiting.extend(bytes);
            if idle {
                self.0.changed.notify_all();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The machine's end.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

impl Output {
    /// Starts the thread that writes to `file`. `lost` is called, at most once, when the file takes no more.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(
        file: Box<dyn Write + Send>,
        lost: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<(Self, Port)> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        thread::Builder::new().name("serial-output".into()).spawn(move || drain(&theirs, file, lost))?;
        Ok((Self(shared.clone()), Port(shared)))
    }

    /// Drops what waits, now and later, so that nobody waits for the file.
    pub fn abandon(&self) {
        let mut queue = lock(&self.0.queue);
        queue.dropped = true;
        self.0.changed.notify_all();
    }

    /// Waits until everything is written; after [`Self::abandon`] only for a moment, and the thread is left to the end of the
    /// process if the host holds it.
    pub fn finish(self) {
        let mut queue = lock(&self.0.queue);
        queue.closed = true;
        self.0.changed.notify_all();
        let mut until = None;
        while queue.writing || !queue.waiting.is_empty() && !queue.dropped {
            if !queue.dropped {
                queue = self.0.wait(queue);
                continue;
            }
            let left = until.get_or_insert_with(|| Instant::now() + GRACE).saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self.0.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The thread: takes all there is, writes it, and tells those who wait.
fn drain(shared: &Shared, mut file: Box<dyn Write + Send>, lost: impl FnOnce(io::Error)) {
    let mut batch = VecDeque::new();
    loop {
        let mut queue = lock(&shared.queue);
        queue.writing = false;
        shared.changed.notify_all();
        while queue.waiting.is_empty() && !queue.closed && !queue.dropped {
            queue = shared.wait(queue);
        }
        if queue.dropped || queue.waiting.is_empty() {
            return;
        }
        mem::swap(&mut batch, &mut queue.waiting);
        queue.writing = true;
        shared.changed.notify_all();
        drop(queue);
        if let Err(e) = write_all(&mut *file, batch.make_contiguous()) {
            let mut queue = lock(&shared.queue);
            (queue.writing, queue.dropped) = (false, true);
            shared.changed.notify_all();
            drop(queue);
            lost(e);
            return;
        }
        batch.clear();
    }
}

/// [`Write::write_all`] that also bears a descriptor in non-blocking mode, which standard output is when another
/// process made it so.
fn write_all(file: &mut (dyn Write + Send), mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A file whose every write waits for a go and is then recorded.
    struct Gated(mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            lock(&self.1).extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_is_written_before_an_orderly_end() {
        let (go, gate) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let (output, mut port) = Output::start(Box::new(Gated(gate, written.clone())), |_| {}).unwrap();
        for n in 0..=255u8 {
            port.write_all(&[n]).unwrap();
        }
        let opener = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            while go.send(()).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        output.finish();
        assert_eq!(*lock(&written), (0..=255).collect::<Vec<u8>>());
        opener.join().unwrap();
    }

    #[test]
    fn a_stalled_file_holds_the_guest_until_it_is_abandoned() {
        let (_go, gate) = mpsc::channel();
        let (output, mut port) = Output::start(Box::new(Gated(gate, Arc::default())), |_| {}).unwrap();
        let guest = thread::spawn(move || {
            for _ in 0..3 * QUEUE {
                port.write_all(b".").unwrap();
            }
        });
        thread::sleep(Duration::from_millis(100));
        assert!(!guest.is_finished(), "the queue has no bound");
        output.abandon();
        guest.join().unwrap();
        let began = Instant::now();
        output.finish();
        assert!(began.elapsed() < 10 * GRACE);
    }

    #[test]
    fn a_file_that_fails_is_reported_once_and_holds_nobody() {
        let (go, gate) = mpsc::channel();
        drop(go);
        let (tell, told) = mpsc::channel();
        let file = Box::new(Gated(gate, Arc::default()));
        let (output, mut port) = Output::start(file, move |e| tell.send(e.kind()).unwrap()).unwrap();
        port.write_all(b"x").unwrap();
        assert_eq!(told.recv().unwrap(), io::ErrorKind::BrokenPipe);
        for _ in 0..3 * QUEUE {
            port.write_all(b".").unwrap();
        }
        output.finish();
        assert!(told.recv().is_err());
    }
}
