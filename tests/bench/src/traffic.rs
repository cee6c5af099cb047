//! Disk and network: how much goes through, and how long one small request takes.
//!
//! The disk is a block device, read and written past the page cache, or a file, whose page cache then is the disk; what it holds is
//! overwritten. The network is a TCP connection to a server of the benchmark, which takes orders: a letter, a count of 64 bits (little
//! endian), then the traffic. `S`: the client sends so many bytes, the server answers with the count. `R`: the server sends so many.
//! `P`: so many times a byte goes there and comes back.

use crate::report::{self, Choice, Numbers};
use crate::sys::{Mapping, PAGE};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

/// Bytes of a large request.
const BLOCK: usize = 1 << 20;

/// Small requests to the disk.
const REQUESTS: u64 = 8_000;

/// Bytes through a connection in each direction.
const STREAM: u64 = 64 << 20;

/// Times there and back.
const TURNS: u64 = 4_000;

/// Measurements of each row, of which the quickest counts.
const REPETITIONS: u32 = 3;

/// The names of all rows. Sequential ones print nanoseconds per 10^6 bytes, the others per request.
pub(crate) const NAMES: [&str; 6] = ["disk-write", "disk-read", "disk-read-4k", "net-send", "net-receive", "net-turn"];

/// Runs the chosen rows and prints a line for each.
///
/// # Errors
/// The disk or the server fails; the sentence names the row.
pub(crate) fn run(choice: &Choice, disk: &Path, server: &str) -> io::Result<()> {
    let mut disk = Disk::open(disk).map_err(|error| io::Error::other(format!("{}: {error}", disk.display())))?;
    for name in NAMES.into_iter().filter(|name| choice.takes(name)) {
        let (mut best, mut checksum) = (f64::INFINITY, 0);
        for _ in 0..REPETITIONS {
            let sample = match name {
                "disk-write" => disk.write(),
                "disk-read" => disk.read(),
                "disk-read-4k" => disk.random(choice.amount(REQUESTS)),
                "net-send" => send(server, choice.amount(STREAM)),
                "net-receive" => receive(server, choice.amount(STREAM)),
                _ => turns(server, choice.amount(TURNS)),
            };
            let (time, sum) = sample.map_err(|error| io::Error::other(format!("{name} failed: {error}")))?;
            best = best.min(time);
            checksum = sum;
        }
        report::row(name, best, checksum)?;
    }
    Ok(())
}

/// Nanoseconds since `start` for each of `count`.
fn each(start: Instant, count: f64) -> f64 {
    report::nanoseconds(start.elapsed()) / count
}

/// The disk and a buffer for direct requests, which have to start at a page.
struct Disk {
    file: File,
    blocks: u64,
    buffer: Mapping,
}

impl Disk {
    fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if path.metadata()?.file_type().is_block_device() {
            options.custom_flags(libc::O_DIRECT);
        }
        let mut file = options.open(path)?;
        let blocks = file.seek(SeekFrom::End(0))? / BLOCK as u64;
        if blocks == 0 {
            return Err(io::Error::other("it is smaller than a block of 1 MiB"));
        }
        Ok(Self { file, blocks, buffer: Mapping::new(BLOCK)? })
    }

    /// Megabytes of the whole disk.
    fn megabytes(&self) -> f64 {
        (self.blocks * BLOCK as u64) as f64 / 1e6
    }

    /// Writes all blocks, each with its number in it, and flushes.
    fn write(&mut self) -> io::Result<(f64, u64)> {
        let start = Instant::now();
        for block in 0..self.blocks {
            self.buffer.words()[0] = block;
            self.file.write_all_at(self.buffer.bytes(), block * BLOCK as u64)?;
        }
        self.file.sync_data()?;
        Ok((each(start, self.megabytes()), self.blocks))
    }

    /// Reads all blocks; the checksum is that of their numbers.
    fn read(&mut self) -> io::Result<(f64, u64)> {
        let (start, mut sum) = (Instant::now(), report::SEED);
        for block in 0..self.blocks {
            self.file.read_exact_at(self.buffer.bytes(), block * BLOCK as u64)?;
            sum = report::fold(sum, self.buffer.words()[0]);
        }
        Ok((each(start, self.megabytes()), sum))
    }

    /// Reads single pages anywhere, one after the other.
    fn random(&mut self, count: u64) -> io::Result<(f64, u64)> {
        let (mut numbers, mut sum) = (Numbers::new(4), report::SEED);
        let pages = self.blocks * (BLOCK / PAGE) as u64;
        let start = Instant::now();
        for _ in 0..count {
            let place = numbers.below(pages) * PAGE as u64;
            self.file.read_exact_at(&mut self.buffer.bytes()[..PAGE], place)?;
            sum = report::fold(sum, place);
        }
        Ok((each(start, count as f64), sum))
    }
}

/// A connection with an order on its way.
fn connect(server: &str, order: u8, count: u64) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    let mut request = vec![order];
    request.extend(count.to_le_bytes());
    stream.write_all(&request)?;
    Ok(stream)
}

/// Bytes to the server until it says that it has them.
fn send(server: &str, count: u64) -> io::Result<(f64, u64)> {
    let buffer = vec![0x5a; BLOCK];
    let mut stream = connect(server, b'S', count)?;
    let start = Instant::now();
    let mut left = count;
    while left > 0 {
        let part = left.min(BLOCK as u64);
        stream.write_all(&buffer[..part as usize])?;
        left -= part;
    }
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    Ok((each(start, count as f64 / 1e6), u64::from_le_bytes(answer)))
}

/// Bytes from the server to the last.
fn receive(server: &str, count: u64) -> io::Result<(f64, u64)> {
    let mut buffer = vec![0; BLOCK];
    let mut stream = connect(server, b'R', count)?;
    let (start, mut received) = (Instant::now(), 0);
    while received < count {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => received += length as u64,
        }
    }
    Ok((each(start, count as f64 / 1e6), received))
}

/// A byte there and back.
fn turns(server: &str, count: u64) -> io::Result<(f64, u64)> {
    let mut stream = connect(server, b'P', count)?;
    let (start, mut sum) = (Instant::now(), 0);
    for turn in 0..count {
        let mut byte = [turn as u8];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        sum += u64::from(byte[0]);
    }
    Ok((each(start, count as f64), sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_back() {
        let path = std::env::temp_dir().join(format!("bench-traffic-{}", std::process::id()));
        std::fs::write(&path, vec![0; 3 * BLOCK + 17]).expect("a file");
        let mut disk = Disk::open(&path).expect("the file");
        assert_eq!(disk.write().expect("written").1, 3);
        let sum = (0..3).fold(report::SEED, report::fold);
        assert_eq!(disk.read().expect("read").1, sum);
        assert!(disk.random(10).expect("read").0 > 0.0);
        std::fs::write(&path, "small").expect("a file");
        assert!(Disk::open(&path).is_err());
        std::fs::remove_file(&path).expect("removed");
    }
}
