//! The control socket of a running machine with a stock kernel: the balloon grows and shrinks, the guest stands still and goes on, the run ends.

use paravane_tests::archive::archive;
use paravane_tests::host::{self, Stage};
use paravane_tests::process::Process;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(120);

const MODULES: [&str; 6] = [
    "virtio.ko",
    "virtio_ring.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_balloon.ko",
];

const SCRIPT: &str =
    "for m in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_balloon; do
    insmod /modules/$m.ko
done
n=0
while [ $n -lt 5000 ]; do n=$((n + 1)); echo \"C $n\"; sleep 0.05; done
";

struct Control(BufReader<UnixStream>);

impl Control {
    fn ask(&mut self, command: &str) -> String {
        self.0.get_mut().write_all(format!("{command}\n").as_bytes()).expect("the socket takes commands");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("the socket answers");
        answer
    }

    fn obey(&mut self, command: &str) {
        assert_eq!(self.ask(command), "{\"ok\":true}\n", "{command}");
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "it does not come to pass that {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The last number that the guest counted to.
fn count(console: &Path) -> u32 {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find_map(|line| line.strip_prefix("C ")?.trim().parse().ok()).unwrap_or(0)
}

#[test]
fn a_running_machine_takes_commands() {
    let Some(kernel) = host::guest_file("6.1/vmlinuz") else { return };
    let Some(initrd) = host::guest_file("initramfs-shell.cpio") else { return };
    let stage = Stage::new();
    let folder = stage.folder("control");
    stage.give_away(&folder);
    let (socket, console) = (folder.join("socket"), folder.join("console"));
    let mut files = vec![
        ("script".to_owned(), 0o100_755, SCRIPT.as_bytes().to_vec()),
        ("modules".to_owned(), 0o040_755, Vec::new()),
    ];
    for module in MODULES {
        let bytes = fs::read(kernel.with_file_name("modules/kernel/drivers/virtio").join(module));
        files.push((format!("modules/{module}"), 0o100_644, bytes.expect("the kernel's modules are there")));
    }
    let files: Vec<_> = files.iter().map(|(name, mode, bytes)| (name.as_str(), *mode, &bytes[..])).collect();
    let image = stage.file("image", &[fs::read(initrd).unwrap(), archive(&files)].concat());
    let mut command = stage.paravane(&kernel, &image, "console=ttyS0 panic=-1 quiet");
    command.arg("--balloon").arg("size=0").arg("--control").arg(&socket);
    command.arg("--serial").arg(format!("file={}", console.display()));
    let mut machine = Process::start(command.stdin(Stdio::null()));
    eventually("the guest counts", || count(&console) > 0);
    let mut control = Control(BufReader::new(UnixStream::connect(&socket).expect("the socket is there")));
    for (size, bytes) in [("128M", 128 << 20), ("64M", 64 << 20)] {
        control.obey(&format!("{{\"command\":\"balloon\",\"size\":\"{size}\"}}"));
        let wanted = format!("\"actual\":{bytes}");
        eventually("the guest gives as much as it is to", || control.ask("{\"command\":\"status\"}").contains(&wanted));
    }
    control.obey("{\"command\":\"pause\"}");
    std::thread::sleep(Duration::from_millis(300));
    let stopped = count(&console);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(count(&console), stopped, "a paused guest does nothing");
    control.obey("{\"command\":\"resume\"}");
    let counted = |control: &mut Control| {
        let answer = control.ask("{\"command\":\"counters\"}");
        let (_, rest) = answer.split_once("\"interrupts delivered\":").expect("every engine counts interrupts");
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().expect("a number")
    };
    let interrupts = counted(&mut control);
    assert!(interrupts > 0, "the guest has a clock");
    eventually("the guest goes on", || count(&console) > stopped + 5);
    assert!(counted(&mut control) > interrupts, "counters are taken anew");
    control.obey("{\"command\":\"stop\"}");
    let mut status = None;
    eventually("the run ends", || {
        status = machine.ended();
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    assert!(!socket.exists(), "the socket goes with the machine");
}
