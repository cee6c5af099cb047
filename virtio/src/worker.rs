//! A device's thread: started when the driver is ready, ended by a reset or with the device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::Doorbell;

/// A thread that ends when this is dropped: it is told to stop and waited for.
pub struct Worker {
    stop: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

/// The worker's own end: what it waits with.
pub struct Stop(Arc<Doorbell>);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The worker is to return, soon.
    Stop,
    /// One of the descriptors is ready, or has failed.
    Ready,
    /// The time is over.
    Timeout,
}

impl Worker {
    /// Starts a thread. Its body must return when [`Stop::wait`] says so or [`Stop::requested`] turns true.
    ///
    /// # Errors
    /// When the host refuses a thread or a descriptor.
    pub fn start(name: &str, body: impl FnOnce(&Stop) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(Doorbell::new()?);
        let theirs = Stop(stop.clone());
        let thread = thread::Builder::new().name(name.into()).spawn(move || body(&theirs))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(worker) = self.thread.take() {
            // A worker that panicked is gone too; the panic hook has reported it. A test is to fail of it.
            let gone = worker.join();
            if cfg!(test) && !thread::panicking() {
                gone.expect("a worker panicked");
            }
        }
    }
}

impl Stop {
    /// Waits until one of the descriptors can be read.
    pub fn wait(&self, on: &[BorrowedFd<'_>]) -> Wake {
        let mut fds: Vec<_> = on.iter().map(|fd| poll_fd(*fd, libc::POLLIN)).collect();
        self.poll(&mut fds, None)
    }

    /// Waits for the `events` of each descriptor, as poll(2) does, for at most `timeout`; fills in `revents`.
    pub fn poll(&self, fds: &mut Vec<libc::pollfd>, timeout: Option<Duration>) -> Wake {
        fds.push(poll_fd(self.0.as_fd(), libc::POLLIN));
        let timeout = timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let n = loop {
            let n = poll(fds, timeout);
            if n >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                break n;
            }
        };
        let stop = fds.pop().is_none_or(|me| me.revents != 0);
        match n {
            // Out of memory in the kernel: the worker cannot wait, so it must not go on.
            ..0 => Wake::Stop,
            _ if stop => Wake::Stop,
            0 => Wake::Timeout,
            1.. => Wake::Ready,
        }
    }

    /// Whether the worker is to return.
    pub fn requested(&self) -> bool {
        self.poll(&mut Vec::new(), Some(Duration::ZERO)) == Wake::Stop
    }
}

/// One entry for [`Stop::poll`].
pub fn poll_fd(fd: BorrowedFd<'_>, events: i16) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

#[allow(unsafe_code)] // poll(2)
fn poll(fds: &mut [libc::pollfd], timeout: i32) -> i32 {
    // SAFETY: a slice of initialised entries and its length.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_worker_serves_its_bell_and_ends_with_its_owner() {
        let bell = Arc::new(Doorbell::new().unwrap());
        let (tell, told) = mpsc::channel();
        let theirs = bell.clone();
        let worker = Worker::start("test", move |stop| {
            assert!(!stop.requested());
            while stop.wait(&[theirs.as_fd()]) == Wake::Ready {
                assert!(theirs.clear());
                tell.send(()).unwrap();
            }
            assert!(stop.requested());
        })
        .unwrap();
        for _ in 0..100 {
            bell.ring();
            told.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(worker);
        assert!(told.recv().is_err(), "the thread is gone");
    }

    #[test]
    fn a_wait_can_time_out() {
        let (tell, told) = mpsc::channel();
        let worker = Worker::start("test", move |stop| {
            tell.send(stop.poll(&mut Vec::new(), Some(Duration::from_millis(1)))).unwrap();
        })
        .unwrap();
        assert_eq!(told.recv().unwrap(), Wake::Timeout);
        drop(worker);
    }
}
