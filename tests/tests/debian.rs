//! A stock Debian system from a disk, with systemd and a network, by binary translation as an ordinary user.
//!
//! One boot serves all: the login prompt, all units up, a page from a web server on the host's loopback, a login over a
//! forwarded port, 100 MB to the guest's disk and back unchanged, and an orderly end that leaves a clean file system.

use paravane_tests::host::{self, Stage};
use paravane_tests::process;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// A boot takes a quarter of it on a quiet machine.
const LIMIT: Duration = Duration::from_secs(170);

const CMDLINE: &str = "console=ttyS0 root=/dev/vda panic=-1";

/// What the guest reads from the host's web server.
const PAGE: &str = "a page from the host's loopback\n";

/// The disk and what belongs to it, if all of it is there.
fn debian(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests/debian").join(name);
    if !path.is_file() {
        eprintln!("SKIPPED: target/guests/debian/{name} is missing; `cargo xtask guests debian` builds it");
        return None;
    }
    Some(path)
}

/// Answers every request with the page until the test process ends; returns the port.
fn web_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port on the loopback");
    let port = listener.local_addr().expect("a bound socket").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
                request.push(byte[0]);
            }
            let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{PAGE}", PAGE.len());
            stream.write_all(answer.as_bytes()).expect("the guest reads the page");
        }
    });
    port
}

/// The guest's shell over SSH.
struct Ssh {
    key: PathBuf,
    port: u16,
    known_hosts: PathBuf,
}

impl Ssh {
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("ssh");
        command.arg("-p").arg(self.port.to_string()).arg("-i").arg(&self.key);
        command.args(["-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]);
        command.args(["-o", "ConnectTimeout=60", "-o", "IdentitiesOnly=yes"]);
        command.arg("-o").arg(format!("UserKnownHostsFile={}", self.known_hosts.display()));
        command.arg("root@127.0.0.1").arg(script).stdin(Stdio::null());
        command
    }

    fn output(&self, script: &str) -> Output {
        self.command(script).output().expect("ssh can be started")
    }

    /// Standard output of a script that has to succeed.
    fn run(&self, script: &str) -> String {
        let output = self.output(script);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{script}` in the guest: {}\n{text}{errors}", output.status);
        text
    }
}

/// 100 MB that do not repeat.
fn blob() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(100_000_000);
    while bytes.len() < 100_000_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn sha256(file: &Path) -> String {
    let output = Command::new("sha256sum").arg(file).output().expect("sha256sum is in coreutils");
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or_default().to_owned()
}

/// Copies the file to the guest's disk and back and compares.
fn copy_both_ways(ssh: &Ssh, folder: &Path) {
    let file = folder.join("blob");
    let bytes = blob();
    fs::write(&file, &bytes).expect("the temporary folder has room");
    let mut copy = ssh.command("cat > /root/blob && sync");
    let status = copy.stdin(fs::File::open(&file).expect("written above")).status().expect("ssh can be started");
    assert!(status.success(), "the copy to the guest failed");
    let sum = ssh.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum /root/blob");
    assert_eq!(sum.split_whitespace().next(), Some(sha256(&file).as_str()), "the guest has something else");
    let back = ssh.output("cat /root/blob");
    assert!(back.status.success() && back.stdout == bytes, "something else came back");
}

/// The whole life of a system, seen over SSH; the console is for failures.
fn live(ssh: &Ssh, web: u16, folder: &Path) {
    let state = ssh.output("systemctl is-system-running --wait");
    let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
    let failed = if state == "running" { String::new() } else { ssh.run("systemctl --failed --no-legend --plain") };
    assert_eq!(state, "running", "units that failed:\n{failed}");
    assert_eq!(ssh.run(&format!("curl --silent --fail http://10.0.2.2:{web}/")), PAGE);
    assert!(ssh.run("networkctl --no-pager list --no-legend").contains("routable"));
    copy_both_ways(ssh, folder);
    // The connection ends with the guest, so how ssh ends says nothing.
    ssh.output("systemctl poweroff");
}

#[test]
fn debian_boots_works_and_powers_off() {
    let Some(kernel) = host::guest_file("6.1/vmlinuz") else { return };
    let names = ["disk.raw", "initramfs.cpio", "id_ed25519", "known_host"];
    let Some(files) = names.map(debian).into_iter().collect::<Option<Vec<_>>>() else { return };
    if !host::has_tool("ssh") {
        eprintln!("SKIPPED: ssh is not installed; get it with `apt-get install openssh-client`");
        return;
    }
    let stage = Stage::new();
    let disk = stage.disk(&files[0]);
    let folder = disk.parent().expect("a file in a folder").to_path_buf();
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
    let key = folder.join("key");
    fs::copy(&files[2], &key).expect("the key can be copied");
    let host_key = fs::read_to_string(&files[3]).expect("the host key can be read");
    let known_hosts = folder.join("known_hosts");
    fs::write(&known_hosts, format!("[127.0.0.1]:{port} {host_key}")).expect("the temporary folder can be written");
    let ssh = Ssh { key, port, known_hosts };
    let web = web_server();

    let mut command = stage.paravane(&kernel, &files[1], CMDLINE);
    command.arg("--disk").arg(format!("path={}", disk.display()));
    command.arg("--net").arg(format!("user,hostfwd=tcp:127.0.0.1:{port}-:22"));
    let (tell, told) = mpsc::channel();
    let began = Instant::now();
    let guest = thread::spawn(move || {
        let outcome = process::run_within(&mut command, LIMIT);
        tell.send(()).expect("the test waits");
        outcome
    });
    // The forwarded port listens from the start, so ssh itself waits for the guest's server.
    let work = folder.clone();
    let life = thread::spawn(move || {
        while began.elapsed() < LIMIT && !ssh.output("true").status.success() {
            thread::sleep(Duration::from_millis(500));
        }
        live(&ssh, web, &work);
    });
    let lived = life.join();
    if lived.is_err() {
        // What the guest had to say comes with the limit; it is worth the wait.
        eprintln!("the guest's console follows when it ends or is ended");
    }
    told.recv().expect("the guest's thread reports");
    let (status, console) = guest.join().expect("the guest's thread ends");
    assert!(lived.is_ok(), "see above; the console:\n{console}");
    assert!(console.contains("paravane login:"), "no login prompt:\n{console}");
    assert_eq!(status.and_then(|status| status.code()), Some(0), "the end is not an orderly one:\n{console}");
    let check = Command::new("/sbin/e2fsck").arg("-fn").arg(&disk).output();
    match check {
        Ok(check) => {
            let report = String::from_utf8_lossy(&check.stdout).into_owned();
            assert!(check.status.success(), "the file system is not clean:\n{report}");
        }
        Err(error) => eprintln!("SKIPPED: the file system is not checked, e2fsck cannot be started: {error}"),
    }
    assert_eq!(stage.left_behind(), Vec::<String>::new(), "files were left behind");
}
