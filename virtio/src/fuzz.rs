//! What a hostile guest can do to a device, driven by bytes: entry points for fuzzers.
//!
//! [`run`] takes the bytes for a program of a guest: set a device up, write descriptors, move ring indices, notify, access
//! registers of any size anywhere, write to memory that is in use, reset. Nothing that it does may make the host panic, hang or touch
//! memory that is not the guest's. The device is on the transport that its name says; workers run as in a machine.

use std::fs::{self, File};
use std::sync::Arc;

use paravane_ram::GuestRam;
use paravane_usernet::{Config, Reach};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Device;
use crate::devices::balloon::Balloon;
use crate::devices::block::image::{OpenImage, Raw};
use crate::devices::block::{Block, BlockOptions};
use crate::devices::console::{Console, Port};
use crate::devices::entropy::Entropy;
use crate::devices::fs::{self as shared, Fs};
use crate::devices::net::{Net, user::User};
use crate::devices::vsock::Vsock;
use crate::transport::mmio::MmioTransport;
use crate::transport::pci::{BAR_SIZE, PciHost, PciTransport};

/// What there is to be fuzzed.
///
/// "fuse" are messages to a shared folder without rings around them, which get further than those of "fs" do.
pub const TARGETS: [&str; 10] = ["block", "net", "console", "entropy", "balloon", "vsock", "fs", "fuse", "pci", "mmio"];

/// Size of the guest's memory: small, so that things collide.
const RAM: u64 = 1 << 20;
/// Where queue `n` has its parts when it is set up orderly: 16 KiB each.
const RINGS: u64 = 0x1_0000;
const SIZE: u16 = 16;

/// A temporary path of this process's own.
fn temporary(name: &str) -> std::path::PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Relaxed);
    std::env::temp_dir().join(format!("paravane-fuzz-{}-{name}-{n}", std::process::id()))
}

/// A shared folder with a few things in it, gone with the value.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> std::io::Result<Self> {
        let me = Self(temporary("folder"));
        fs::create_dir_all(me.0.join("d"))?;
        fs::write(me.0.join("f"), [7; 5000])?;
        std::os::unix::fs::symlink("..", me.0.join("l"))?;
        Ok(me)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn device(target: &str, folder: Option<&Folder>) -> std::io::Result<Box<dyn Device>> {
    Ok(match target {
        "block" => {
            let path = temporary("disk");
            File::create(&path)?.set_len(1 << 20)?;
            let raw = Raw::open(&path, OpenImage::default());
            fs::remove_file(&path)?;
            Box::new(Block::new(Box::new(raw?), &BlockOptions { queues: 2, ..BlockOptions::default() }))
        }
        "console" => {
            let ports = [Port::new("a", Box::new(std::io::sink()))?, Port::new("b", Box::new(std::io::sink()))?];
            ports[0].input().offer(&[7; 5000]);
            ports[1].input().offer(&[7; 5000]);
            Box::new(Console::new(ports.into(), (80, 25)))
        }
        "balloon" => Box::new(Balloon::new(1 << 20, true, true)),
        "net" => {
            let mac = [0x52, 0x54, 0, 1, 2, 3];
            // Nothing of the host's is to be reached.
            let config = Config { mac, forwards: Vec::new(), reach: Reach::Nothing, resolver: None };
            Box::new(Net::new(Box::new(User::new(&config).map_err(std::io::Error::other)?), mac, 2))
        }
        "fs" => Box::new(Fs::new(&folder.expect("it was made").0, "fuzz", false, 2)?),
        "vsock" => Box::new(Vsock::new(3, &temporary("vsock"))?),
        _ => Box::new(Entropy::new(File::open("/dev/zero")?)),
    })
}

struct NoInterrupts;

impl PciHost for NoInterrupts {
    fn msi(&self, _address: u64, _data: u32) {}
    fn intx(&self, _level: bool) {}
}

#[derive(Clone, Copy)]
enum Kind {
    Frames,
    Messages,
    Headers,
}

enum Transport {
    Mmio(MmioTransport),
    Pci(PciTransport),
}

/// The program.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A number that means something more often than chance would have it.
    fn number(&mut self) -> Option<u64> {
        let kind = self.byte()?;
        let (a, b) = (u64::from(self.byte()?), u64::from(self.byte()?));
        Some(match kind % 10 {
            0 => a & 7,
            1 => a,
            2 => a << 8 | b,
            3 => 1 << (a % 64),
            4 => (1u64 << (a % 64)).wrapping_sub(b & 7),
            5 => RAM.wrapping_sub(b),
            6 => u64::MAX - b,
            7 => u64::from(u32::MAX) - b,
            8 => RINGS + (a << 8) + b,
            _ => 0x8_0000 + (a << 9) + 16 * b,
        })
    }
}

struct Guest {
    /// What requests have to look like to mean something.
    kind: Kind,
    mem: GuestRam,
    transport: Transport,
    offered: [u16; 6],
}

impl Guest {
    fn write(&self, offset: u64, data: &[u8]) {
        match &self.transport {
            Transport::Mmio(t) => t.write(offset, data),
            Transport::Pci(t) => t.write(offset % BAR_SIZE, data),
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.mem.write_slice(bytes, GuestAddress(at));
    }

    fn notify(&self, queue: u32) {
        match &self.transport {
            Transport::Mmio(t) => t.write(0x50, &queue.to_le_bytes()),
            Transport::Pci(t) => t.write(0x3000 + 4 * u64::from(queue & 0x3ff), &[0; 2]),
        }
    }

    /// Orderly initialisation, but for what `odd` bends.
    fn set_up(&mut self, odd: u64) {
        self.offered = [0; 6];
        let features: [u32; 2] = [0x3000_0000 | (odd >> 8) as u32 & 0xff, 1];
        match &self.transport {
            Transport::Mmio(t) => {
                let set = |offset: u64, value: u32| t.write(offset, &value.to_le_bytes());
                set(0x70, 0);
                set(0x70, 3);
                for (n, bits) in features.into_iter().enumerate() {
                    set(0x24, n as u32);
                    set(0x20, bits);
                }
                set(0x70, 0xb);
                for n in 0..6u32 {
                    let at = RINGS as u32 + 0x4000 * n;
                    set(0x30, n);
                    set(0x38, u32::from(SIZE));
                    set(0x80, at);
                    set(0x90, at + 0x1000);
                    set(0xa0, at + 0x2000);
                    set(0x44, u32::from(odd >> n & 1 == 0));
                }
                set(0x70, 0xf);
            }
            Transport::Pci(t) => {
                let set = |offset: u64, value: u32, n: usize| t.write(offset, &value.to_le_bytes()[..n]);
                set(0x14, 0, 1);
                set(0x14, 3, 1);
                for (n, bits) in features.into_iter().enumerate() {
                    set(0x08, n as u32, 4);
                    set(0x0c, bits, 4);
                }
                set(0x14, 0xb, 1);
                set(0x16, 0, 2);
                set(0x18, u32::from(SIZE), 2);
                set(0x20, RINGS as u32, 4);
                set(0x28, RINGS as u32 + 0x1000, 4);
                set(0x30, RINGS as u32 + 0x2000, 4);
                set(0x1c, u32::from(odd & 1 == 0), 2);
                set(0x14, 0xf, 1);
            }
        }
    }

    /// One step; `None` at the end of the program.
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let what = input.byte()?;
        let queue = u64::from(what >> 4) % 6;
        let ring = RINGS + 0x4000 * queue;
        match what & 15 {
            0 => {
                let odd = input.number()?;
                self.set_up(odd);
            }
            1 | 2 => {
                let (offset, value, size) = (input.number()?, input.number()?, input.byte()?);
                self.write(offset % 0x8000, &value.to_le_bytes()[..1 << (size & 3)]);
            }
            3 => {
                let (offset, size) = (input.number()?, input.byte()?);
                let mut data = [0; 8];
                match &self.transport {
                    Transport::Mmio(t) => t.read(offset, &mut data[..1 << (size & 3)]),
                    Transport::Pci(t) => t.read(offset % BAR_SIZE, &mut data[..1 << (size & 3)]),
                }
            }
            4 => {
                let (at, value) = (input.number()?, input.number()?);
                self.put(at, &value.to_le_bytes());
            }
            // A descriptor.
            5..=9 => {
                let index = u64::from(input.byte()?) % 20;
                let (at, len, flags, next) = (input.number()?, input.number()?, input.byte()?, input.byte()?);
                let at = if what & 15 < 8 { 0x8_0000 + at % 0x4_0000 } else { at };
                let len = if what & 15 < 8 { len % 0x2000 } else { len } as u32;
                let d = ring + 16 * index;
                self.put(d, &at.to_le_bytes());
                self.put(d + 8, &len.to_le_bytes());
                self.put(d + 12, &[flags & 7, 0, next % 20, 0]);
            }
            // Offer a chain.
            10..=12 => {
                let head = u16::from(input.byte()?) % (SIZE + 1);
                let n = &mut self.offered[queue as usize];
                let slot = ring + 0x1004 + 2 * u64::from(*n % SIZE);
                *n = n.wrapping_add(1);
                let index = *n;
                self.put(slot, &head.to_le_bytes());
                let _ = self.mem.store(index, GuestAddress(ring + 0x1002), std::sync::atomic::Ordering::Release);
                self.notify(queue as u32);
            }
            13 => {
                let n = input.number()?;
                self.notify(n as u32);
            }
            // Requests that mean something to the devices: headers of blocks, sockets and ports.
            14 => {
                let at = 0x8_0000 + 16 * u64::from(input.byte()?);
                let (kind, value) = (u32::from(input.byte()? % 16), input.number()?);
                match self.kind {
                    Kind::Headers => {}
                    Kind::Frames => {
                        self.put(at, &frame(kind as u8, value));
                        return Some(());
                    }
                    Kind::Messages => {
                        let (_, message) = message(input, &[])?;
                        self.put(at, &message);
                        return Some(());
                    }
                }
                self.put(at, &kind.to_le_bytes());
                self.put(at + 4, &value.to_le_bytes());
                self.put(at + 8, &[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
            }
            _ => {
                let (offset, value, size) = (input.byte()?, input.number()?, input.byte()?);
                if let Transport::Pci(t) = &self.transport {
                    let n = 1usize << (size % 3);
                    let offset = offset & !(n as u8 - 1);
                    t.config_write(offset, &value.to_le_bytes()[..n]);
                    t.config_read(offset, &mut [0; 4][..n]);
                } else {
                    std::thread::yield_now();
                }
            }
        }
        Some(())
    }
}

/// The beginning of a packet as the network device takes it: its header, Ethernet, and IPv4 or something else.
fn frame(kind: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![kind & 3, (value & 7) as u8];
    bytes.extend(&value.to_le_bytes()[..8]);
    bytes.resize(12, 0);
    bytes.extend([0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 1, 2, 3, 8, if kind & 4 != 0 { 6 } else { 0 }]);
    bytes.extend([0x45, 0, (value >> 8) as u8, value as u8, 0, 0, 0, 0, 64, [1, 6, 17, kind][usize::from(kind & 3)]]);
    bytes.extend([0, 0, 10, 0, 2, 15, 10, 0, 2, (value >> 16) as u8, 0, 67, 0, 68]);
    bytes
}

/// A FUSE message that may mean something, and the room for its answer. Numbers are small ones or what the last
/// `reply` held.
fn message(input: &mut Input<'_>, reply: &[u8]) -> Option<(usize, Vec<u8>)> {
    const NAMES: [&[u8]; 8] = [b"f\0", b"d\0", b"l\0", b"..\0", b"new\0", b"d/../..\0", b"n\0m\0", b"\0"];
    let id = |n: u8| match n {
        0..128 => u64::from(n % 16),
        _ => {
            let at = 16 + 8 * (usize::from(n) % 17);
            reply.get(at..at + 8).map_or(1, |b| b.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)))
        }
    };
    let (opcode, node, odd) = (u32::from(input.byte()? % 56), id(input.byte()?), input.byte()?);
    // Mostly what is there: fields first, names last.
    let mut body = Vec::new();
    for _ in 0..odd % 5 {
        let field = match input.byte()? {
            n @ 0..192 => id(n),
            _ => input.number()?,
        };
        body.extend(field.to_le_bytes());
    }
    if opcode == 43 {
        // An allocation is the one thing that would really take the host's space.
        body.truncate(8);
        body.extend([0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]);
        body.extend([input.byte()?, 0, 0, 0, 0, 0, 0, 0]);
    }
    if opcode == 15 {
        body.resize(40, 0);
        body[16..20].copy_from_slice(&[0, odd, 0, 0]);
    }
    if opcode == 16 {
        body.resize(40, 0);
        body[16..20].copy_from_slice(&u32::from(odd).to_le_bytes());
        body.extend([9; 256]);
    }
    for _ in 0..odd >> 6 {
        body.extend(NAMES[usize::from(input.byte()? % 8)]);
    }
    let len = (40 + body.len()) as u32 + u32::from(odd == 7);
    let mut message = [len.to_le_bytes(), opcode.to_le_bytes()].concat();
    message.extend(1u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    message.extend([0; 16]);
    message.extend(body);
    Some((if odd == 9 { 20 } else { 8192 }, message))
}

/// Messages to a shared folder, none of which may reach what lies beside it.
fn messages(folder: &Folder, input: &mut Input<'_>) {
    let shared = folder.0.join("shared");
    fs::create_dir_all(shared.join("d")).expect("the host has files");
    fs::write(shared.join("f"), [7; 5000]).expect("the host has files");
    std::os::unix::fs::symlink("../f", shared.join("l")).expect("the host has files");
    let around = || {
        let mut names: Vec<_> =
            fs::read_dir(&folder.0).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
        names.sort();
        (names, fs::read(folder.0.join("f")).ok())
    };
    let before = around();
    shared::exchange(&shared, |reply| message(input, reply).map(|(room, message)| (message, room)))
        .expect("the host has descriptors");
    assert!(around() == before, "a message got out of the shared folder");
}

/// Carries out a program against one of [`TARGETS`].
///
/// # Panics
/// When a target does not exist or the host has no resources: never because of what the bytes say.
pub fn run(target: &str, bytes: &[u8]) {
    assert!(TARGETS.contains(&target), "there is no target {target}");
    let parts = [(GuestAddress(0), RAM as usize), (GuestAddress(2 * RAM), RAM as usize)];
    let mem: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&parts).expect("the host has memory"));
    let folder = matches!(target, "fs" | "fuse").then(|| Folder::new().expect("the host has files"));
    if let Some(folder) = folder.as_ref().filter(|_| target == "fuse") {
        return messages(folder, &mut Input(bytes));
    }
    let device = device(target, folder.as_ref()).expect("the host has files");
    let transport = if target == "pci" {
        Transport::Pci(
            PciTransport::new(device, mem.clone(), Arc::new(NoInterrupts), 0xc000_0000)
                .expect("the host has descriptors"),
        )
    } else {
        Transport::Mmio(MmioTransport::new(device, mem.clone(), Box::new(|_| {})).expect("the host has descriptors"))
    };
    let kind = match target {
        "net" => Kind::Frames,
        "fs" => Kind::Messages,
        _ => Kind::Headers,
    };
    let mut guest = Guest { kind, mem, transport, offered: [0; 6] };
    if target != "mmio" {
        guest.set_up(0);
    }
    let mut input = Input(bytes);
    while guest.step(&mut input).is_some() {}
    match &guest.transport {
        Transport::Mmio(t) => t.shut_down(),
        Transport::Pci(t) => t.shut_down(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_random_programs_do_no_harm() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for target in TARGETS {
            run(target, &[]);
            for _ in 0..20 {
                let bytes: Vec<u8> = (0..400)
                    .map(|_| {
                        seed ^= seed << 13;
                        seed ^= seed >> 7;
                        seed ^= seed << 17;
                        (seed >> 24) as u8
                    })
                    .collect();
                run(target, &bytes);
            }
        }
    }
}
