//! The other end of the network rows: a TCP server on the loopback, for one client at a time.
//!
//! Guests reach it through their gateway, 10.0.2.2, whose ports are those of the host's loopback under Paravane's
//! user networking and under QEMU's. The orders are described in tests/bench/src/traffic.rs.

use crate::{Failure, Result};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a piece.
const PIECE: usize = 256 << 10;

/// More than this nobody orders.
const MOST: u64 = 16 << 30;

/// A client that is silent for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// The server. Dropping it ends it and closes the port.
pub(super) struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on a free port of the loopback.
    pub(super) fn start() -> Result<Self> {
        let failed = |e: io::Error| Failure::host(format!("cannot listen on the loopback: {e}"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            for client in listener.incoming() {
                if stopping.load(Ordering::SeqCst) {
                    break;
                }
                // A client that fails tells its own side.
                let _ = client.and_then(serve);
            }
        });
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Its address for programs of the host.
    pub(super) fn on_host(&self) -> String {
        self.address.to_string()
    }

    /// Its address for guests.
    pub(super) fn in_guest(&self) -> String {
        format!("10.0.2.2:{}", self.address.port())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Somebody has to come for the thread to look. A client that still hangs on ends with the patience.
        if TcpStream::connect(self.address).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Does what one client orders.
fn serve(mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut request = [0; 9];
    client.read_exact(&mut request)?;
    let count = u64::from_le_bytes(request[1..].try_into().expect("eight bytes"));
    if count > MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match request[0] {
        b'S' => {
            let (mut piece, mut received) = (vec![0; PIECE], 0);
            while received < count {
                match client.read(&mut piece)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    length => received += length as u64,
                }
            }
            client.write_all(&received.to_le_bytes())
        }
        b'R' => {
            let (piece, mut left) = (vec![0xa5; PIECE], count);
            while left > 0 {
                let part = left.min(PIECE as u64);
                client.write_all(&piece[..part as usize])?;
                left -= part;
            }
            Ok(())
        }
        b'P' => (0..count).try_for_each(|_| {
            let mut byte = [0];
            client.read_exact(&mut byte)?;
            client.write_all(&byte)
        }),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(server: &Server, letter: u8, count: u64) -> TcpStream {
        let mut client = TcpStream::connect(server.on_host()).expect("the server");
        client.write_all(&[&[letter][..], &count.to_le_bytes()].concat()).expect("the order");
        client
    }

    #[test]
    fn orders_are_carried_out_and_the_port_closes() {
        let server = Server::start().expect("a port");
        let mut sender = order(&server, b'S', 1_000_000);
        sender.write_all(&vec![1; 1_000_000]).expect("sent");
        let mut answer = [0; 8];
        sender.read_exact(&mut answer).expect("an answer");
        assert_eq!(u64::from_le_bytes(answer), 1_000_000);
        let mut received = Vec::new();
        order(&server, b'R', 777_777).read_to_end(&mut received).expect("all");
        assert_eq!(received.len(), 777_777);
        let mut player = order(&server, b'P', 3);
        for turn in 0..3 {
            player.write_all(&[turn]).expect("sent");
            let mut byte = [9];
            player.read_exact(&mut byte).expect("back");
            assert_eq!(byte, [turn]);
        }
        let mut nonsense = order(&server, b'X', 1);
        assert_eq!(nonsense.read(&mut answer).expect("closed"), 0);
        assert_eq!(server.in_guest(), format!("10.0.2.2:{}", server.address.port()));
        let address = server.address;
        drop(server);
        assert!(TcpStream::connect(address).is_err());
    }
}
