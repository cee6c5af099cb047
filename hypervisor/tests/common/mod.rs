//! What the tests of the program share: tiny guests as kernel images, and a way to run `paravane` on them.
#![allow(dead_code, unreachable_pub)] // Each test program uses its part.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// No guest here needs longer; a hang is a failure and not a stuck test run.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Powers off through PM1a_CNT.
pub const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];
/// `cli; hlt` for ever.
pub const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfc];
/// A jump to itself.
pub const SPIN: &[u8] = &[0xeb, 0xfe];
/// Sends what COM1 receives back until it is a `q`.
pub const ECHO: &[u8] =
    &[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, 0x71, 0x75, 0xed];

/// `mov dx, port; mov al, value; out dx, al`.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let p = port.to_le_bytes();
    vec![0x66, 0xba, p[0], p[1], 0xb0, value, 0xee]
}

/// Code that writes `text` to COM1.
pub fn say(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|b| out(0x3f8, b)).collect()
}

/// Joins pieces of code.
pub fn code(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// An ELF64 with a PVH note whose 32-bit entry is `code`, at 1 MiB.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    const NOTE: usize = 20;
    let mut f = vec![0; HEADERS];
    f[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    f[16..20].copy_from_slice(&[2, 0, 62, 0]);
    f[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
    f[32] = 64;
    (f[52], f[54], f[56]) = (64, 56, 2);
    let mut header = |n: usize, kind: u32, at: usize, len: usize| {
        let h = &mut f[64 + n * 56..][..56];
        h[..4].copy_from_slice(&kind.to_le_bytes());
        h[8..16].copy_from_slice(&(at as u64).to_le_bytes());
        for (field, value) in [(24, 0x10_0000), (32, len as u64), (40, len as u64), (48, 4)] {
            h[field..field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(0, 4, HEADERS, NOTE);
    header(1, 1, HEADERS + NOTE, code.len());
    for word in [4u32, 4, 18] {
        f.extend(word.to_le_bytes());
    }
    f.extend(b"Xen\0");
    f.extend(0x10_0000u32.to_le_bytes());
    f.extend(code);
    f
}

/// A multiboot1 image by address fields whose entry is `code`.
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    let flags = 1u32 << 16;
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    let words = [0x1bad_b002, flags, sum, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020];
    let mut f: Vec<u8> = words.iter().flat_map(|w: &u32| w.to_le_bytes()).collect();
    f.extend(code);
    f
}

/// A directory for one test's files, removed with it.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{n}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file and gives its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The program.
pub fn paravane() -> Command {
    Command::new(env!("CARGO_BIN_EXE_paravane"))
}

/// `paravane run` on a kernel, with little memory and nothing on its input.
pub fn run(kernel: &Path) -> Command {
    let mut c = paravane();
    c.args(["run", "--memory", "16M", "--kernel"]).arg(kernel).stdin(Stdio::null());
    c
}

/// A child process that does not outlive its test.
pub struct Guest(pub Child);

impl Guest {
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// Waits for the end, within [`PATIENCE`].
    pub fn end(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "the program does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs to the end with output and errors kept. Both must be short.
pub fn finish(command: &mut Command) -> Output {
    let mut guest = Guest::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let status = guest.end();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    std::io::Read::read_to_end(&mut guest.0.stdout.take().unwrap(), &mut stdout).unwrap();
    std::io::Read::read_to_end(&mut guest.0.stderr.take().unwrap(), &mut stderr).unwrap();
    Output { status, stdout, stderr }
}

/// Standard error as one sentence: exactly one line, which begins with the program's name.
pub fn sentence(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(text.starts_with("paravane: ") && text.lines().count() == 1, "not one sentence: {text:?}");
    text
}
