//! The TAP backend with a real kernel at the other end, without privileges: the test starts itself again in a user
//! and network namespace of its own, where making devices is allowed and nothing of the host can be reached.

use std::net::UdpSocket;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use virtio::devices::net::tap::Tap;
use virtio::devices::net::{Backend, HEADER, Header, feature};

const INSIDE: &str = "PARAVANE_TAP_TEST_INSIDE";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GUEST: [u8; 4] = [10, 99, 0, 2];
const HOST: [u8; 4] = [10, 99, 0, 1];

#[test]
fn frames_reach_the_kernel_and_come_back() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let possible = Command::new("unshare").args(["-rn", "ip", "tuntap", "add", "dev", "tap0", "mode", "tap"]).output();
    if !possible.is_ok_and(|tried| tried.status.success()) {
        eprintln!("SKIPPED: TAP devices cannot be made here, even in a namespace (unshare -rn, ip tuntap)");
        return;
    }
    let myself = std::env::current_exe().expect("the test's own program");
    let mut again = Command::new("unshare");
    again.arg("-rn").arg(myself).args(["--exact", "frames_reach_the_kernel_and_come_back", "--nocapture"]);
    let output = again.env(INSIDE, "1").output().expect("unshare worked a moment ago");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
}

fn ip(words: &[&str]) {
    let status = Command::new("ip").args(words).status().expect("ip worked a moment ago");
    assert!(status.success(), "ip {words:?}");
}

/// The next frame of a kind that passes the filter.
fn receive<T>(tap: &mut Tap, wanted: impl Fn(&[u8]) -> Option<T>) -> T {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        let found = tap.frame().and_then(|(_, frame)| wanted(frame));
        tap.consume();
        if let Some(found) = found {
            return found;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no such frame comes");
}

fn send(tap: &mut Tap, header: Header, frame: &[u8]) {
    let packet = [&header.bytes(0)[..], frame].concat();
    assert_eq!(packet.len(), HEADER + frame.len());
    tap.send(&packet);
}

/// A sum of 16-bit words as IP uses it (RFC 1071), not inverted.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn inside() {
    let mut tap = Tap::open("tap0").expect("a TAP device in this namespace");
    assert!(Tap::open("tap0").is_err(), "a device has one user");
    ip(&["addr", "add", "10.99.0.1/24", "dev", "tap0"]);
    ip(&["link", "set", "tap0", "up"]);
    tap.begin(feature::CSUM | feature::GUEST_CSUM | feature::GUEST_TSO4);
    assert!(tap.link_up() && tap.wait_for().is_some());

    // Who has the host's address? (RFC 826)
    let mut request = [[0xff; 6], MAC].concat();
    request.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend_from_slice(&[&MAC[..], &GUEST, &[0; 6], &HOST].concat());
    send(&mut tap, Header::default(), &request);
    let host_mac: [u8; 6] = receive(&mut tap, |frame| {
        (frame[12..14] == [8, 6] && frame[20..22] == [0, 2]).then(|| frame[22..28].try_into().expect("six bytes"))
    });

    // A datagram whose checksum is left open; the kernel takes it only if it completes it.
    let socket = UdpSocket::bind("10.99.0.1:0").expect("the device's address");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
    let port = socket.local_addr().expect("bound").port();
    let mut header = vec![0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0];
    header.extend_from_slice(&[GUEST, HOST].concat());
    let check = !sum(&header);
    header[10..12].copy_from_slice(&check.to_be_bytes());
    let pseudo = [&GUEST[..], &HOST, &[0, 17, 0, 13]].concat();
    let mut frame = [&host_mac[..], &MAC, &[8, 0], &header].concat();
    frame.extend_from_slice(&[0x13, 0x88]);
    frame.extend_from_slice(&port.to_be_bytes());
    frame.extend_from_slice(&[0, 13]);
    frame.extend_from_slice(&sum(&pseudo).to_be_bytes());
    frame.extend_from_slice(b"hello");
    let open = Header { flags: Header::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..Header::default() };
    send(&mut tap, open, &frame);
    let mut buffer = [0; 64];
    let (count, from) = socket.recv_from(&mut buffer).expect("the datagram arrives");
    assert_eq!((&buffer[..count], from.to_string().as_str()), (&b"hello"[..], "10.99.0.2:5000"));

    // And back, from an address that the kernel has learnt by now.
    socket.send_to(b"answer", from).expect("sent");
    let payload: Vec<u8> = receive(&mut tap, |frame| {
        (frame.len() >= 48 && frame[..6] == MAC && frame[23] == 17).then(|| frame[42..48].to_vec())
    });
    assert_eq!(payload, b"answer");
    tap.end();
}
