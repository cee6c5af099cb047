//! What each device is put through.

use alloc::vec::Vec;

use guest_rt::{cpu, println};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType};
use virtio_drivers::transport::{DeviceType, Transport};

use crate::Tap;
use crate::memory::Memory;

/// Writes and reads of a disk. An emulating KVM needs half a microsecond for each instruction of them.
const ROUNDS: usize = 8;
/// Cycles after which an answer is given up, some seconds.
const PATIENCE: u64 = 20_000_000_000;

pub(crate) fn exercise<T: Transport>(tap: &mut Tap, transport: T, kind: DeviceType, name: &str) {
    match kind {
        DeviceType::Block => block(tap, transport, name),
        DeviceType::Console => console_port(tap, transport, name),
        DeviceType::EntropySource => entropy(tap, transport, name),
        DeviceType::Network => network(tap, transport, name),
        DeviceType::Socket => sockets(tap, transport, name),
        _ => println!("# {kind:?} on {name} is left alone"),
    }
}

fn entropy<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::EntropySource;
    let Ok(mut driver) = VirtIORng::<Memory, _>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    let mut bytes = [[0u8; 64]; 2];
    for (n, bytes) in bytes.iter_mut().enumerate() {
        let got = driver.request_entropy(bytes);
        tap.check(got == Ok(64), kind, name, if n == 0 { "bytes come" } else { "more bytes come" });
    }
    tap.check(bytes[0] != bytes[1] && bytes[0] != [0; 64], kind, name, "they are random");
}

fn console_port<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::Console;
    let Ok(mut driver) = VirtIOConsole::<Memory, _>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    let size = driver.size();
    tap.check(matches!(size, Ok(Some(s)) if s.columns == 80 && s.rows == 25), kind, name, "it has a size");
    tap.check(driver.send_bytes(b"from the guest\n").is_ok(), kind, name, "it takes text");
    tap.check(driver.recv(true) == Ok(None), kind, name, "there is no input");
}

fn block<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::Block;
    let Ok(mut driver) = VirtIOBlk::<Memory, _>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    let mut check = |holds: bool, what: &str| tap.check(holds, kind, name, what);
    let mut id = [0; 20];
    check(driver.device_id(&mut id) == Ok(8) && &id[..8] == b"serial-7", "it has a serial number");
    let blocks = driver.capacity() as usize;
    let mut data = [0; 512];
    check(driver.read_blocks(0, &mut data).is_ok() && data == [0x5a; 512], "its first block is the host's");
    check(driver.read_blocks(blocks, &mut data).is_err(), "there is nothing behind its end");
    check(driver.read_blocks(blocks - 1, &mut data).is_ok(), "it goes on after an error");
    if driver.readonly() {
        check(driver.write_blocks(1, &[1; 512]).is_err(), "it cannot be written");
        return;
    }
    let mut fine = true;
    for round in 0..ROUNDS {
        let first = 8 + round * 16 % (blocks - 32);
        let mut bytes = [0u8; 4096];
        for (n, b) in bytes.iter_mut().enumerate() {
            *b = (n * 7 + round) as u8;
        }
        fine &= driver.write_blocks(first, &bytes).is_ok();
        let mut back = [0u8; 4096];
        fine &= driver.read_blocks(first, &mut back).is_ok() && back == bytes;
    }
    check(fine, "what is written is read back");
    check(driver.write_blocks(3, &[0xc3; 512]).is_ok() && driver.flush().is_ok(), "it can be flushed");
}

/// Calls until there is something, or it has taken too long.
fn patiently<R>(mut call: impl FnMut() -> Option<R>) -> Option<R> {
    let start = cpu::tsc();
    while cpu::tsc().wrapping_sub(start) < PATIENCE {
        if let Some(result) = call() {
            return Some(result);
        }
        core::hint::spin_loop();
    }
    None
}

/// The card's own hardware address, as `--net user` gives it to the first card.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GUEST: [u8; 4] = [10, 0, 2, 15];
const GATEWAY: [u8; 4] = [10, 0, 2, 2];

pub(crate) type Card<T> = VirtIONet<Memory, T, 16>;

/// An Ethernet frame from the guest.
fn ethernet(to: [u8; 6], kind: u16, payload: &[&[u8]]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend(MAC);
    frame.extend(kind.to_be_bytes());
    payload.iter().for_each(|p| frame.extend(*p));
    frame.resize(frame.len().max(60), 0);
    frame
}

/// "Who has the gateway's address?" (RFC 826)
pub(crate) fn who_has() -> Vec<u8> {
    ethernet([0xff; 6], 0x0806, &[&[0, 1, 8, 0, 6, 4, 0, 1], &MAC, &GUEST, &[0; 6], &GATEWAY])
}

/// A ping of the gateway with 200 bytes.
fn ping(gateway: [u8; 6]) -> Vec<u8> {
    let mut echo = Vec::from([8, 0, 0, 0, 0x12, 0x34, 0, 1]);
    echo.extend((0..200).map(|n| n as u8));
    let sum = checksum(&echo);
    echo[2..4].copy_from_slice(&sum);
    let length = ((20 + echo.len()) as u16).to_be_bytes();
    let mut header = [0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[12..16].copy_from_slice(&GUEST);
    header[16..].copy_from_slice(&GATEWAY);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    ethernet(gateway, 0x0800, &[&header, &echo])
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

pub(crate) fn send<T: Transport>(card: &mut Card<T>, frame: &[u8]) -> bool {
    let mut buffer = card.new_tx_buffer(frame.len());
    buffer.packet_mut().copy_from_slice(frame);
    card.send(buffer).is_ok()
}

/// The next frame of which `is` holds; others are dropped.
pub(crate) fn receive<T: Transport>(card: &mut Card<T>, is: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    patiently(|| {
        let buffer = card.receive().ok()?;
        let frame = Vec::from(buffer.packet());
        card.recycle_rx_buffer(buffer).ok()?;
        is(&frame).then_some(frame)
    })
}

fn network<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::Network;
    let Ok(mut card) = Card::new(transport, 2048) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    tap.check(card.mac_address() == MAC, kind, name, "it has the address that it was given");
    let reply = |f: &[u8]| f.len() >= 42 && f[12..14] == [8, 6] && f[20..22] == [0, 2] && f[28..32] == GATEWAY;
    let gateway = if send(&mut card, &who_has()) { receive(&mut card, reply) } else { None };
    tap.check(gateway.is_some(), kind, name, "the gateway says where it is");
    let mut address = [0; 6];
    if let Some(frame) = gateway {
        address.copy_from_slice(&frame[22..28]);
    }
    let request = ping(address);
    let echo = |f: &[u8]| f.len() >= 42 && f[12..14] == [8, 0] && f[23] == 1 && f[34] == 0;
    let answer = if send(&mut card, &request) { receive(&mut card, echo) } else { None };
    let same = answer.is_some_and(|f| f.len() >= request.len() && f[38..request.len()] == request[38..]);
    tap.check(same, kind, name, "the gateway sends a ping back as it was");
}

/// Who sends back what comes: a port of the host.
const ECHO: VsockAddr = VsockAddr { cid: 2, port: 1234 };

fn sockets<T: Transport>(tap: &mut Tap, transport: T, name: &str) {
    let kind = DeviceType::Socket;
    let Ok(driver) = VirtIOSocket::<Memory, T, 512>::new(transport) else {
        return tap.check(false, kind, name, "the driver starts");
    };
    tap.check(driver.guest_cid() == 7, kind, name, "the guest has the number that it was given");
    let mut sockets = VsockConnectionManager::new(driver);
    let connected = sockets.connect(ECHO, 99).is_ok()
        && patiently(|| match sockets.poll() {
            Ok(Some(event)) => Some(matches!(event.event_type, VsockEventType::Connected)),
            Ok(None) => None,
            Err(_) => Some(false),
        }) == Some(true);
    tap.check(connected, kind, name, "the host takes a connection");
    let mut text = [0; 2000];
    text.iter_mut().enumerate().for_each(|(n, b)| *b = (n % 251) as u8);
    let (mut sent, mut back) = (0, Vec::<u8>::new());
    let all = connected.then(|| {
        patiently(|| {
            if sent < text.len() && sockets.send(ECHO, 99, &text[sent..(sent + 400).min(text.len())]).is_ok() {
                sent = (sent + 400).min(text.len());
            }
            if sockets.poll().is_err() {
                return Some(());
            }
            let mut piece = [0; 500];
            let got = sockets.recv(ECHO, 99, &mut piece).unwrap_or(0);
            back.extend(&piece[..got]);
            (back.len() >= text.len()).then_some(())
        })
    });
    tap.check(all.is_some() && back == text, kind, name, "the host sends back what it gets");
    tap.check(sockets.force_close(ECHO, 99).is_ok(), kind, name, "the connection ends");
}
