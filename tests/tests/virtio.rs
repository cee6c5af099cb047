//! Virtio devices as guests see them: a bare-metal guest with the drivers of the `virtio-drivers` crate, on each transport.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use paravane_tests::guest::{self, Engine};

/// A folder of this test's own, gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let me = Self(std::env::temp_dir().join(format!("paravane-virtio-{name}-{}", std::process::id())));
        fs::create_dir_all(&me.0).unwrap();
        me
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A disk whose first block is full of 0x5a.
    fn disk(&self, name: &str) -> PathBuf {
        let mut bytes = vec![0; 1 << 20];
        bytes[..512].fill(0x5a);
        fs::write(self.file(name), bytes).unwrap();
        self.file(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Sends back what comes to a socket, until the test process ends.
fn echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut piece = [0; 1000];
            while let Ok(n @ 1..) = stream.read(&mut piece) {
                if stream.write_all(&piece[..n]).is_err() {
                    break;
                }
            }
        }
    });
}

fn drive(engine: Engine, transport: &str) {
    if let Some(why) = engine.missing() {
        eprintln!("SKIPPED: {why}");
        return;
    }
    let folder = Folder::new(&format!("{transport}-{}", engine.name()));
    let (written, kept) = (folder.disk("rw.img"), folder.disk("ro.img"));
    let before = fs::read(&kept).unwrap();
    let text = folder.file("console");
    let show = |p: &Path| p.display().to_string();
    let options = [
        "--disk".to_owned(),
        format!("path={},serial=serial-7,transport={transport}", show(&written)),
        "--disk".to_owned(),
        format!("path={},serial=serial-7,readonly=on,transport={transport}", show(&kept)),
        "--rng".to_owned(),
        format!("transport={transport}"),
        "--console".to_owned(),
        format!("file={},transport={transport}", show(&text)),
        "--net".to_owned(),
        format!("user,restrict=on,transport={transport}"),
        "--vsock".to_owned(),
        format!("cid=7,socket={},transport={transport}", show(&folder.file("vsock"))),
        "--pv".to_owned(),
        "all".to_owned(),
    ];
    echo(&folder.file("vsock_1234"));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let (status, output) = guest::run_elf(engine, &guest::devices_elf(), "", &options);
    assert_eq!(status, Some(1), "the guest ends with status 0:\n{output}");
    // Every device passed everything twice: 6 checks of the disk, 5 of the one that is read-only, 4 of the sockets, 3 of the others each.
    assert!(output.contains("1..48"), "{output}");
    assert_eq!(output.lines().filter(|l| l.starts_with("ok ")).count(), 48, "{output}");
    assert_eq!(fs::read(&kept).unwrap(), before, "a disk that may only be read");
    let bytes = fs::read(&written).unwrap();
    assert_eq!((bytes[0], bytes[3 * 512], bytes[4 * 512 - 1]), (0x5a, 0xc3, 0xc3));
    assert_eq!(fs::read_to_string(&text).unwrap(), "from the guest\nfrom the guest\n");
}

#[test]
fn drivers_of_others_work_on_pci() {
    drive(Engine::Bt, "pci");
}

#[test]
fn drivers_of_others_work_behind_registers_in_memory() {
    drive(Engine::Bt, "mmio");
}

#[test]
fn drivers_of_others_work_on_the_abi() {
    drive(Engine::Bt, "pv");
}

#[test]
fn drivers_of_others_work_on_pci_on_kvm() {
    drive(Engine::Kvm, "pci");
}

#[test]
fn drivers_of_others_work_behind_registers_in_memory_on_kvm() {
    drive(Engine::Kvm, "mmio");
}

#[test]
fn drivers_of_others_work_on_the_abi_on_kvm() {
    drive(Engine::Kvm, "pv");
}
