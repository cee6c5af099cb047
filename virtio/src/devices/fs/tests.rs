//! Messages as a kernel sends them, and as one that means no good does.

use super::server::Server;
use super::share::Share;
use super::*;
use crate::testkit::{Driver, activate, eventually, ram};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

const ENOENT: i32 = -2;
const EBADF: i32 = -9;
const EPERM: i32 = -1;
const EACCES: i32 = -13;
const EINVAL: i32 = -22;
const ENFILE: i32 = -23;
const EROFS: i32 = -30;
const ENOSYS: i32 = -38;
const ELOOP: i32 = -40;
const ESTALE: i32 = -116;

/// A folder with a secret beside it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let me = Self(std::env::temp_dir().join(format!("paravane-fs-{name}-{}", std::process::id())));
        fs::create_dir_all(me.shared()).unwrap();
        fs::write(me.0.join("secret"), "secret").unwrap();
        me
    }
    fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }
    fn file(&self, name: &str) -> PathBuf {
        self.shared().join(name)
    }
    fn server(&self, readonly: bool) -> Server {
        Server::new(Share::open(&self.shared()).unwrap(), readonly)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn message(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let len = (40 + body.len()) as u32;
    let mut m = [len.to_le_bytes(), opcode.to_le_bytes()].concat();
    m.extend(0x77u64.to_le_bytes());
    m.extend(node.to_le_bytes());
    m.extend([0; 16]);
    m.extend(body);
    m
}

fn le(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn q(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// The reply's payload, or its error.
fn ask(server: &Server, opcode: u32, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, i32> {
    let mut reply = Vec::new();
    server.serve(&message(opcode, node, body), 1 << 20, &mut reply);
    assert_eq!(reply[..4], (reply.len() as u32).to_le_bytes());
    assert_eq!(reply[8..16], 0x77u64.to_le_bytes());
    match i32::from_le_bytes(reply[4..8].try_into().unwrap()) {
        0 => Ok(reply[16..].to_vec()),
        error => {
            assert_eq!(reply.len(), 16, "an error has no payload");
            Err(error)
        }
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn look(server: &Server, folder: u64, name: &str) -> Result<u64, i32> {
    let reply = ask(server, 1, folder, &[name.as_bytes(), &[0]])?;
    assert_eq!(reply.len(), 128);
    Ok(u64_at(&reply, 0))
}

fn open(server: &Server, node: u64, flags: u32) -> Result<u64, i32> {
    Ok(u64_at(&ask(server, 14, node, &[&le(&[flags, 0])])?, 0))
}

fn read(server: &Server, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
    ask(server, 15, 1, &[&q(&[handle, offset]), &le(&[size, 0]), &q(&[0]), &le(&[0, 0])])
}

fn write(server: &Server, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
    let fixed = [q(&[handle, offset]), le(&[data.len() as u32, 0]), q(&[0]), le(&[0, 0])].concat();
    let reply = ask(server, 16, 1, &[&fixed, data])?;
    Ok(u64_at(&reply, 0) as u32)
}

/// Node and handle of a new file.
fn create(server: &Server, folder: u64, name: &str, flags: u32, mode: u32) -> Result<(u64, u64), i32> {
    let reply = ask(server, 35, folder, &[&le(&[flags, mode, 0, 0]), name.as_bytes(), &[0]])?;
    assert_eq!(reply.len(), 144);
    Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
}

fn names(server: &Server, folder: u64) -> Vec<String> {
    let handle = u64_at(&ask(server, 27, folder, &[&le(&[0, 0])]).unwrap(), 0);
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        // Little room, so that it takes several requests.
        let fixed = [q(&[handle, offset]), le(&[120, 0]), q(&[0]), le(&[0, 0])].concat();
        let reply = ask(server, 28, folder, &[&fixed]).unwrap();
        assert!(reply.len() <= 120);
        if reply.is_empty() {
            break;
        }
        let mut at = 0;
        while at < reply.len() {
            offset = u64_at(&reply, at + 8);
            let len = u64_at(&reply, at + 16) as u32 as usize;
            names.push(String::from_utf8(reply[at + 24..at + 24 + len].to_vec()).unwrap());
            at = (at + 24 + len).next_multiple_of(8);
        }
    }
    ask(server, 29, folder, &[&q(&[handle, 0, 0])]).unwrap();
    names.sort();
    names
}

/// `struct fuse_setattr_in`.
fn attributes(valid: u32, handle: u64, size: u64, mode: u32, uid: u32) -> Vec<u8> {
    [le(&[valid, 0]), q(&[handle, size, 0, 1_000_000, 2_000_000, 0]), le(&[0, 0, 0, mode, 0, uid, 0, 0])].concat()
}

#[test]
fn versions_are_agreed_on() {
    let place = Place::new("init");
    let s = place.server(false);
    let reply = ask(&s, 26, 0, &[&le(&[7, 40, 1 << 24, !0])]).unwrap();
    assert_eq!(reply.len(), 64);
    assert_eq!(reply[..16], le(&[7, 31, 1 << 20, 0x44_0021])[..]);
    assert_eq!((u64_at(&reply, 20) as u32, u64_at(&reply, 28) as u16), (1 << 20, 256));
    assert_eq!(ask(&s, 26, 0, &[&le(&[8, 0, 0, 0])]).unwrap()[..8], le(&[7, 31])[..], "it is for a newer one to yield");
    assert_eq!(ask(&s, 26, 0, &[&le(&[6, 0, 0, 0])]), Err(-71));
}

#[test]
fn files_are_made_written_read_renamed_and_removed() {
    let place = Place::new("work");
    let s = place.server(false);
    let (node, handle) = create(&s, 1, "a", 2 | 0o200, 0o6640).unwrap();
    assert_eq!(write(&s, handle, 0, b"hello"), Ok(5));
    assert_eq!(write(&s, handle, 10_000, b"end"), Ok(3));
    assert_eq!(fs::read(place.file("a")).unwrap().len(), 10_003, "the host sees it at once");
    assert_eq!(fs::metadata(place.file("a")).unwrap().mode() & 0o7777, 0o640, "no bits that lend rights");
    assert_eq!(create(&s, 1, "a", 2 | 0o200, 0o600), Err(-17));
    let (same, again) = create(&s, 1, "a", 2, 0o600).unwrap();
    assert_eq!(same, node);
    assert_eq!(read(&s, again, 10_000, 100).unwrap(), b"end");
    assert_eq!(read(&s, again, 20_000, 100).unwrap(), b"");
    for flags in [0, 1] {
        ask(&s, 20, node, &[&q(&[handle]), &le(&[flags, 0])]).unwrap();
    }
    ask(&s, 25, node, &[&q(&[handle, 0, 0])]).unwrap();
    // A hole between the two.
    assert_eq!(ask(&s, 46, node, &[&q(&[handle, 0]), &le(&[4, 0])]).map(|r| u64_at(&r, 0) < 10_003), Ok(true));
    assert_eq!(ask(&s, 46, node, &[&q(&[handle, 0]), &le(&[0, 0])]), Err(EINVAL));
    ask(&s, 43, node, &[&q(&[handle, 0, 20_000]), &le(&[0, 0])]).unwrap();
    assert_eq!(fs::metadata(place.file("a")).unwrap().len(), 20_000);
    // Attributes: by number, by handle; times, mode, size.
    let reply = ask(&s, 4, node, &[&attributes(0x8 | 0x1 | 0x20 | 0x10, 0, 3, 0o4600, 0)]).unwrap();
    assert_eq!((u64_at(&reply, 24), reply.len()), (3, 104));
    let meta = fs::metadata(place.file("a")).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777, meta.mtime(), meta.atime()), (3, 0o600, 2_000_000, 1_000_000));
    ask(&s, 4, node, &[&attributes(0x8 | 0x40, handle, 4, 0, 0)]).unwrap();
    ask(&s, 4, node, &[&attributes(0x80 | 0x100, 0, 0, 0, 0)]).unwrap();
    assert!(fs::metadata(place.file("a")).unwrap().mtime() > 1_600_000_000);
    ask(&s, 4, node, &[&attributes(0x2, 0, 0, 0, meta.uid())]).unwrap();
    assert_eq!(ask(&s, 4, node, &[&attributes(0x2, 0, 0, 0, meta.uid() + 1)]), Err(EPERM));
    // Folders, names, links.
    let folder = u64_at(&ask(&s, 9, 1, &[&le(&[0o755, 0]), b"d\0"]).unwrap(), 0);
    ask(&s, 12, 1, &[&q(&[folder]), b"a\0b\0"]).unwrap();
    assert_eq!((look(&s, 1, "a"), look(&s, folder, "b")), (Err(ENOENT), Ok(node)), "a file keeps its number");
    ask(&s, 13, folder, &[&q(&[node]), b"hard\0"]).unwrap();
    assert_eq!(fs::metadata(place.file("d/hard")).unwrap().nlink(), 2);
    ask(&s, 6, folder, &[b"soft\0", b"../../secret\0"]).unwrap();
    let soft = look(&s, folder, "soft").unwrap();
    assert_eq!(ask(&s, 5, soft, &[]).unwrap(), b"../../secret", "a link is the guest's to follow");
    assert_eq!(names(&s, folder), [".", "..", "b", "hard", "soft"]);
    // RENAME2: not over what is there, exchanged, and no whiteouts.
    let rename = |flags: u64| ask(&s, 45, folder, &[&q(&[folder, flags]), b"b\0soft\0"]);
    assert_eq!((rename(1), rename(4), rename(0x100)), (Err(-17), Err(EINVAL), Err(EINVAL)));
    rename(2).unwrap();
    assert_eq!(fs::read_link(place.file("d/b")).unwrap().to_str(), Some("../../secret"));
    ask(&s, 8, folder, &[&le(&[0o010_644, 0, 0, 0]), b"pipe\0"]).unwrap();
    assert_eq!(ask(&s, 8, folder, &[&le(&[0o020_644, 0x103, 0, 0]), b"null\0"]), Err(EPERM), "no devices");
    assert_eq!(ask(&s, 11, 1, &[b"d\0"]), Err(-39), "a folder that is not empty");
    for name in [&b"b\0"[..], b"hard\0", b"soft\0", b"pipe\0"] {
        ask(&s, 10, folder, &[name]).unwrap();
    }
    ask(&s, 11, 1, &[b"d\0"]).unwrap();
    assert_eq!(ask(&s, 17, 1, &[]).unwrap().len(), 80);
    // What is open can be used although it has no name any more.
    assert_eq!(read(&s, handle, 0, 3).unwrap(), b"hel");
    for opcode in [21, 22, 23, 24, 31, 34, 39, 48, 4000] {
        assert_eq!(ask(&s, opcode, 1, &[&[0; 64]]), Err(ENOSYS));
    }
    ask(&s, 50, 1, &[&q(&[0])]).unwrap();
}

#[test]
fn there_is_no_way_out() {
    let place = Place::new("escape");
    symlink("../secret", place.file("relative")).unwrap();
    symlink(place.0.join("secret"), place.file("absolute")).unwrap();
    symlink("..", place.file("up")).unwrap();
    fs::create_dir(place.file("d")).unwrap();
    let mut s = place.server(false);
    for name in ["..", ".", "", "../secret", "/etc/passwd", "d/../../secret", "up/secret", "d/"] {
        assert_eq!(look(&s, 1, name), Err(EINVAL), "{name:?}");
        assert_eq!(create(&s, 1, name, 2, 0o600), Err(EINVAL), "{name:?}");
        assert_eq!(ask(&s, 9, 1, &[&le(&[0o755, 0]), name.as_bytes(), &[0]]), Err(EINVAL));
        assert_eq!(ask(&s, 10, 1, &[name.as_bytes(), &[0]]), Err(EINVAL));
        assert_eq!(ask(&s, 12, 1, &[&q(&[1]), b"d\0", name.as_bytes(), &[0]]), Err(EINVAL));
        assert_eq!(ask(&s, 13, 1, &[&q(&[1]), name.as_bytes(), &[0]]), Err(EINVAL));
    }
    for name in ["relative", "absolute", "up"] {
        let link = look(&s, 1, name).unwrap();
        assert_eq!(open(&s, link, 2), Err(ELOOP), "{name} is not followed");
        assert_eq!(look(&s, link, "secret"), Err(-20), "a link is no folder");
        // Cannot be written through, nor created through.
        assert_eq!(create(&s, 1, name, 2 | 0o1000, 0o600), Err(ELOOP));
        assert_eq!(ask(&s, 4, link, &[&attributes(0x8, 0, 0, 0, 0)]), Err(EINVAL));
    }
    // Changing a link's mode or times is not changing the file's that it names.
    let before = fs::metadata(place.0.join("secret")).unwrap();
    let link = look(&s, 1, "relative").unwrap();
    let _ = ask(&s, 4, link, &[&attributes(0x1, 0, 0, 0o777, 0)]);
    let _ = ask(&s, 4, link, &[&attributes(0x20, 0, 0, 0, 0)]);
    ask(&s, 13, 1, &[&q(&[link]), b"hard\0"]).unwrap();
    assert!(fs::symlink_metadata(place.file("hard")).unwrap().is_symlink());
    let after = fs::metadata(place.0.join("secret")).unwrap();
    assert_eq!((before.mode(), before.mtime(), before.nlink()), (after.mode(), after.mtime(), after.nlink()));
    // A folder that turns into a link while the guest holds it stays the folder.
    let d = look(&s, 1, "d").unwrap();
    fs::rename(place.file("d"), place.file("e")).unwrap();
    symlink("..", place.file("d")).unwrap();
    assert_eq!(look(&s, d, "secret"), Err(ENOENT));
    // "..": neither a name nor told of.
    let up = ask(&s, 27, 1, &[&le(&[0, 0])]).unwrap();
    let reply = ask(&s, 28, 1, &[&q(&[u64_at(&up, 0), 0]), &le(&[4096, 0]), &q(&[0]), &le(&[0, 0])]).unwrap();
    let parent = fs::metadata(&place.0).unwrap().ino();
    assert!(reply.chunks_exact(8).all(|w| u64_at(w, 0) != parent));
    // Numbers that were never given, handles of nobody.
    assert_eq!(look(&s, 4711, "x"), Err(ESTALE));
    assert_eq!(read(&s, 4711, 0, 10), Err(EBADF));
    // What would block or do things when opened.
    let status = std::process::Command::new("mkfifo").arg(place.file("pipe")).status().unwrap();
    assert!(status.success());
    let pipe = look(&s, 1, "pipe").unwrap();
    assert_eq!(open(&s, pipe, 0), Err(EACCES));
    assert_eq!(create(&s, 1, "pipe", 0, 0o600), Err(EACCES));
    // More than it may hold.
    s.share().limit(8);
    let errors: Vec<_> = (0..10).filter_map(|n| create(&s, 1, &format!("n{n}"), 2, 0o600).err()).collect();
    assert!(!errors.is_empty() && errors.iter().all(|&e| e == ENFILE), "{errors:?}");
}

#[test]
fn a_folder_to_be_read_only_is() {
    let place = Place::new("readonly");
    fs::write(place.file("f"), "text").unwrap();
    let s = place.server(true);
    let node = look(&s, 1, "f").unwrap();
    assert_eq!((open(&s, node, 1), open(&s, node, 2)), (Err(EROFS), Err(EROFS)));
    let handle = open(&s, node, 0).unwrap();
    assert_eq!(read(&s, handle, 0, 9).unwrap(), b"text");
    assert_eq!(write(&s, handle, 0, b"x"), Err(EROFS));
    assert_eq!(create(&s, 1, "f", 0, 0o600), Err(EROFS));
    for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 43, 45] {
        assert_eq!(ask(&s, opcode, 1, &[&[b'f', 0].repeat(50)]), Err(EROFS), "{opcode}");
    }
    assert_eq!(names(&s, 1), [".", "..", "f"]);
}

#[test]
fn what_is_forgotten_is_closed() {
    let place = Place::new("forget");
    let mut s = place.server(false);
    for n in 0..10 {
        fs::write(place.file(&format!("f{n}")), "").unwrap();
    }
    let nodes: Vec<u64> = (0..10).map(|n| look(&s, 1, &format!("f{n}")).unwrap()).collect();
    assert_eq!(look(&s, 1, "f0"), Ok(nodes[0]));
    let mut none = Vec::new();
    s.serve(&message(2, nodes[0], &[&q(&[1])]), 100, &mut none);
    s.serve(&message(42, 0, &[&le(&[2, 0]), &q(&[nodes[1], 1, nodes[2], u64::MAX])]), 100, &mut none);
    assert!(none.is_empty(), "these have no reply");
    assert_eq!(s.share().held(), (8, 0));
    s.serve(&message(2, nodes[0], &[&q(&[1])]), 100, &mut none);
    s.serve(&message(2, 1, &[&q(&[99])]), 100, &mut none);
    s.serve(&message(42, 0, &[&le(&[u32::MAX, 0]), &q(&[nodes[3], 1])]), 100, &mut none);
    assert_eq!(s.share().held(), (6, 0));
    assert_eq!(look(&s, nodes[0], "x"), Err(ESTALE));
    assert!(look(&s, 1, "f0").unwrap() > nodes[9], "numbers are not used again");
    let handle = open(&s, nodes[5], 0).unwrap();
    ask(&s, 18, nodes[5], &[&q(&[handle, 0, 0])]).unwrap();
    assert_eq!((s.share().held(), read(&s, handle, 0, 1)), ((7, 0), Err(EBADF)));
    ask(&s, 38, 0, &[]).unwrap();
    assert_eq!(s.share().held(), (0, 0));
}

#[test]
fn messages_that_are_none() {
    let place = Place::new("broken");
    let s = place.server(false);
    let mut reply = vec![1; 3];
    for cut in 0..40 {
        s.serve(&message(1, 1, &[b"x\0"])[..cut], 4096, &mut reply);
        assert!(reply.is_empty(), "nobody to answer");
    }
    // Longer than it is, shorter than its header, without room for an answer.
    let mut long = message(1, 1, &[b"x\0"]);
    long[0] += 1;
    s.serve(&long, 4096, &mut reply);
    assert_eq!(reply[4..8], EINVAL.to_le_bytes());
    long[0] = 39;
    s.serve(&long, 4096, &mut reply);
    assert_eq!(reply[4..8], EINVAL.to_le_bytes());
    s.serve(&message(3, 1, &[&q(&[0, 0])]), 15, &mut reply);
    assert!(reply.is_empty());
    s.serve(&message(3, 1, &[&q(&[0, 0])]), 100, &mut reply);
    assert_eq!((reply.len(), &reply[4..8]), (16, &(-5i32).to_le_bytes()[..]), "there is no room for the attributes");
    assert_eq!(write_more_than_sent(&s), Err(EINVAL));
}

fn write_more_than_sent(s: &Server) -> Result<Vec<u8>, i32> {
    let (_, handle) = create(s, 1, "w", 2, 0o600)?;
    ask(s, 16, 1, &[&q(&[handle, 0]), &le(&[100, 0]), &q(&[0]), &le(&[0, 0]), b"short"])
}

#[test]
fn the_device_serves_its_queues_until_a_reset() {
    let place = Place::new("device");
    fs::write(place.file("f"), "text").unwrap();
    fs::set_permissions(place.file("f"), fs::Permissions::from_mode(0o640)).unwrap();
    let mut device = Fs::new(&place.shared(), "work", false, 1).unwrap();
    let mut config = [0; 41];
    device.config_read(0, &mut config);
    assert_eq!((&config[..5], &config[36..]), (&b"work\0"[..], &[1, 0, 0, 0, 0][..]));
    assert_eq!(device.queue_sizes(), [1024, 1024]);
    let mem = ram();
    let mut d = [Driver::new(&mem, 0x1_0000, 16), Driver::new(&mem, 0x2_0000, 16)];
    let (signal, _) = activate(&mut device, &[&d[0], &d[1]], 0);
    let lookup = message(1, 1, &[b"f\0"]);
    for (n, byte) in lookup.iter().enumerate() {
        d[1].put(0x3000 + n as u64, *byte);
    }
    // Header and name apart, the reply in two pieces, as a driver does.
    d[1].chain(0, &[(0x3000, 40, false), (0x3028, 2, false), (0x4000, 16, true), (0x5000, 128, true)]);
    d[1].offer(0);
    assert_eq!(d[1].wait(), (0, 144));
    assert_eq!((d[1].get::<u32>(0x4004), d[1].get::<u32>(0x5000 + 40 + 60)), (0, 0o100_640));
    let node: u64 = d[1].get(0x5000);
    for (n, byte) in message(2, node, &[&q(&[1])]).iter().enumerate() {
        d[0].put(0x3000 + n as u64, *byte);
    }
    d[0].chain(0, &[(0x3000, 48, false)]);
    d[0].offer(0);
    assert_eq!(d[0].wait(), (0, 0));
    device.reset();
    d[1].offer(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(d[1].used(), None);
    let mut d = Driver::new(&mem, 0x1_0000, 16);
    d.put(0x1_6002, 0u16);
    let (again, _) = activate(&mut device, &[&d], 0);
    d.chain(0, &[(1 << 40, 40, false)]);
    d.offer(0);
    eventually("a bad chain asks for a reset", || again.waits_for_reset());
    assert!(!signal.waits_for_reset());
}
