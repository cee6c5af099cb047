//! The file system device (virtio 1.2, section 5.11), virtio-fs: a folder of the host that the guest mounts by its tag.
//!
//! The guest's kernel speaks FUSE over the queues, as it would to a FUSE daemon of its own: a request in the readable part of
//! a chain, room for the reply in the writable part. `wire` reads and writes messages, `server` carries them out, `share` keeps
//! what the guest knows of the folder and sees to it that there is no way out of it.
//!
//! Queue 0 is for what must not wait behind other requests (the guest gives files back there); the others take
//! everything else. Each has a thread. There is no DAX window and no notification queue.

mod server;
mod share;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::path::Path;
use std::sync::Arc;

use server::Server;
use share::Share;

use crate::{ActivateError, Activation, Chain, Device, DeviceId, Queue, Stop, Wake, Worker, read_config};

/// Entries of a queue: a request of [`MAX_IO`] bytes takes a page each and a few more (the driver's limit).
const QUEUE_SIZE: u16 = 1024;
/// Most request queues.
pub const MAX_QUEUES: u16 = 8;
/// Longest tag, in bytes (section 5.11.4).
pub const TAG_LEN: usize = 36;
/// Most pages of one request's data.
const MAX_PAGES: u16 = 256;
/// Most bytes that one request reads or writes.
const MAX_IO: usize = MAX_PAGES as usize * 4096;
/// Most bytes of a request: data, header and arguments.
const MAX_REQUEST: usize = MAX_IO + 4096;

/// A shared folder.
pub struct Fs {
    server: Arc<Server>,
    config: [u8; 40],
    queues: u16,
    workers: Vec<Worker>,
}

impl Fs {
    /// Shares `folder` under a tag of at most [`TAG_LEN`] bytes; more are cut off. `queues`: request queues, 1 to [`MAX_QUEUES`].
    ///
    /// # Errors
    /// The folder cannot be opened, or the host has no `/proc` or a kernel older than 5.6.
    pub fn new(folder: &Path, tag: &str, readonly: bool, queues: u16) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_QUEUES);
        let mut config = [0; 40];
        let n = tag.len().min(TAG_LEN);
        config[..n].copy_from_slice(&tag.as_bytes()[..n]);
        config[36..].copy_from_slice(&u32::from(queues).to_le_bytes());
        let server = Arc::new(Server::new(Share::open(folder)?, readonly));
        Ok(Self { server, config, queues, workers: Vec::new() })
    }
}

impl Device for Fs {
    fn id(&self) -> DeviceId {
        DeviceId::Fs
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 1 + usize::from(self.queues)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        for queue in with.queues {
            let server = self.server.clone();
            let name = format!("virtio-fs{}", queue.index());
            self.workers.push(Worker::start(&name, move |stop| run(stop, queue, &server))?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
        self.server.reset();
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}

fn run(stop: &Stop, mut queue: Queue, server: &Server) {
    let (mut request, mut reply) = (Vec::new(), Vec::new());
    loop {
        queue.bell().clear();
        let fine = queue.serve_or_fail(|chain| {
            if stop.requested() {
                return None;
            }
            serve(chain, server, &mut request, &mut reply);
            Some(chain.written())
        });
        if !fine || stop.wait(&[std::os::fd::AsFd::as_fd(&queue)]) != Wake::Ready {
            return;
        }
    }
}

fn serve(chain: &mut Chain, server: &Server, request: &mut Vec<u8>, reply: &mut Vec<u8>) {
    // What is longer than any request is cut, and then found to be shorter than it says.
    request.resize((chain.readable_len() as usize).min(MAX_REQUEST), 0);
    let got = chain.read(request);
    server.serve(&request[..got], chain.writable_len() as usize, reply);
    chain.write(reply);
}

/// For fuzzers: carries out messages, one after the other, in a shared folder; gives the replies' numbers of files and handles.
pub(crate) fn exchange(folder: &Path, mut messages: impl FnMut(&[u8]) -> Option<(Vec<u8>, usize)>) -> io::Result<()> {
    let server = Server::new(Share::open(folder)?, false);
    let mut reply = Vec::new();
    while let Some((message, room)) = messages(&reply) {
        server.serve(&message, room, &mut reply);
        assert!(reply.len() <= room, "a reply is longer than its room");
    }
    Ok(())
}
