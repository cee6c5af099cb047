//! Threads for requests that wait for a disk.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::devices::lock;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Where jobs are put.
#[derive(Clone)]
pub(super) struct Jobs(Arc<Shared>);

impl Jobs {
    /// Has a job done, after those that wait already.
    pub(super) fn push(&self, job: Job) {
        lock(&self.0.state).waiting.push_back(job);
        self.0.changed.notify_one();
    }
}

/// The threads. Dropping it waits for the jobs that have begun; those that have not are dropped.
pub(super) struct Pool {
    jobs: Jobs,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `n` threads.
    pub(super) fn start(n: usize) -> io::Result<Self> {
        let jobs = Jobs(Arc::new(Shared::default()));
        // From here on, dropping ends what has been started.
        let mut pool = Self { jobs, threads: Vec::new() };
        for _ in 0..n {
            let jobs = pool.jobs.clone();
            pool.threads.push(thread::Builder::new().name("virtio-blk-io".into()).spawn(move || work(&jobs.0))?);
        }
        Ok(pool)
    }

    pub(super) fn jobs(&self) -> Jobs {
        self.jobs.clone()
    }
}

fn work(shared: &Shared) {
    loop {
        let mut state = lock(&shared.state);
        let job = loop {
            if state.ending {
                return;
            }
            if let Some(job) = state.waiting.pop_front() {
                break job;
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        job();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = lock(&self.jobs.0.state);
        state.ending = true;
        let dropped = std::mem::take(&mut state.waiting);
        drop(state);
        drop(dropped);
        self.jobs.0.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
