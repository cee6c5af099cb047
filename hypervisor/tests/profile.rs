//! `--profile`: a guest that computes is seen to compute, one that talks to devices is seen to do that, and symbols are found
//! although the guest's kernel is elsewhere than its symbol file says. `--perf-map`: perf finds the names of translated code.
#![allow(unsafe_code)] // Signals are host calls.

mod common;

use common::{ECHO, Guest, PATIENCE, POWER_OFF, SPIN, Scratch, code, finish, pvh, run, say, sentence};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

/// Where images of [`pvh`] are loaded and entered, in 32-bit mode.
const ENTRY: u32 = 0x10_0000;

/// `mov ecx, times`, `body`, `dec ecx`, and back to the body until ECX is zero.
fn repeat(times: u32, body: &[u8]) -> Vec<u8> {
    let back = -(body.len() as i8 + 3);
    code(&[&[0xb9], &times.to_le_bytes(), body, &[0x49, 0x75, back as u8]])
}

/// The share, in percent, in the first column of the line that ends with `what`.
fn share(report: &str, what: &str) -> f64 {
    let line = report.lines().find(|l| l.ends_with(what)).unwrap_or_else(|| panic!("no {what:?} in:\n{report}"));
    line.split('%').next().and_then(|n| n.trim().parse().ok()).unwrap_or_else(|| panic!("no share in {line:?}"))
}

/// Runs a guest to its orderly end; gives its report.
fn profile(kernel: &Path, to: &Path, more: &[&str]) -> String {
    let output = finish(run(kernel).arg(format!("--profile={}", to.display())).args(more));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    fs::read_to_string(to).unwrap()
}

#[test]
fn a_computing_guest_spends_its_time_in_translated_code() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&repeat(500_000_000, &[]), POWER_OFF])));
    let report = profile(&kernel, &files.path("report"), &[]);
    assert!(share(&report, "translated code, kernel") > 80.0, "{report}");
    let page = report.lines().find(|l| l.contains(&format!("kernel page {ENTRY:#x}"))).expect(&report);
    let columns: Vec<f64> = page.split('%').filter_map(|n| n.trim().parse().ok()).collect();
    assert!(columns.len() == 3 && columns[0] > 80.0 && columns[1] > 80.0 && columns[2] < 20.0, "{report}");
}

#[test]
fn a_talking_guest_spends_its_time_on_emulated_instructions() {
    let files = Scratch::new();
    // out 0x80, al: nobody is there, so all the time is the way out and back.
    let kernel = files.file("kernel", &pvh(&code(&[&repeat(1_000_000, &[0xe6, 0x80]), POWER_OFF])));
    let output = finish(run(&kernel).arg("--profile"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = String::from_utf8(output.stderr).unwrap();
    assert!(share(&report, "  emulated out") > 30.0, "{report}");
    assert!(report.contains(&format!("kernel page {ENTRY:#x}; emulated out")), "{report}");
}

#[test]
fn symbols_are_found_where_the_kernel_was_moved_to() {
    const SLIDE: u32 = 0x8_0000;
    let files = Scratch::new();
    let lstar = (ENTRY + 0x1_0000).to_le_bytes();
    // mov ecx, IA32_LSTAR; mov eax, lstar; xor edx, edx; wrmsr
    let set = code(&[&[0xb9, 0x82, 0, 0, 0xc0, 0xb8], &lstar, &[0x31, 0xd2, 0x0f, 0x30]]);
    let kernel = files.file("kernel", &pvh(&code(&[&set, &repeat(200_000_000, &[]), POWER_OFF])));
    let map = |entry: u32| {
        let (start, entry) = (ENTRY - SLIDE, entry - SLIDE);
        format!("0000000000000000 A nothing\n{start:016x} T guest_loop\n{entry:016x} T entry_SYSCALL_64\n")
    };
    let named = files.file("System.map", map(ENTRY + 0x1_0000).as_bytes());
    let report = profile(&kernel, &files.path("report"), &["--profile-symbols", named.to_str().unwrap()]);
    assert!(report.contains("guest_loop") && !report.contains("kernel page 0x100000"), "{report}");
    // Another kernel's symbols are not believed.
    let other = files.file("other", map(ENTRY + 0x1_0010).as_bytes());
    let report = profile(&kernel, &files.path("report"), &["--profile-symbols", other.to_str().unwrap()]);
    assert!(!report.contains("guest_loop") && report.contains("kernel page 0x100000"), "{report}");
}

#[test]
fn what_cannot_be_read_or_written_is_said_before_the_run() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    let (missing, text) = (files.path("missing"), files.file("text", b"hello\n"));
    let nowhere = format!("--profile={}", files.path("none/report").display());
    let wrong: [(&[&str], &str); 3] = [
        (&["--profile", "--profile-symbols", missing.to_str().unwrap()], "symbol file"),
        (&["--profile", "--profile-symbols", text.to_str().unwrap()], "System.map"),
        (&[&nowhere], "none/report"),
    ];
    for (args, words) in wrong {
        let output = finish(run(&kernel).args(args));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(sentence(&output).contains(words), "{output:?}");
    }
    let output = finish(run(&kernel).arg("--profile-symbols").arg(&text));
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// Where perf looks for the names of a process's code.
fn perf_map(guest: &Guest) -> PathBuf {
    PathBuf::from(format!("/tmp/perf-{}.map", guest.0.id()))
}

/// Lines of a perf map: start, length, name.
fn names(map: &Path) -> Vec<(u64, u64, String)> {
    let text = fs::read_to_string(map).unwrap();
    let number = |w: Option<&str>| u64::from_str_radix(w.unwrap(), 16).unwrap();
    let line = |l: &str| {
        let mut words = l.splitn(3, ' ');
        (number(words.next()), number(words.next()), words.next().unwrap().to_owned())
    };
    text.lines().map(line).collect()
}

#[test]
fn perf_finds_the_names_of_translated_code_while_the_guest_runs() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&say("ready"), ECHO, POWER_OFF])));
    let mut guest = Guest::start(run(&kernel).arg("--perf-map").stdin(Stdio::piped()).stdout(Stdio::piped()));
    guest.0.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
    let map = perf_map(&guest);
    let names = names(&map);
    assert!(names.iter().any(|(_, _, name)| *name == format!("guest_{ENTRY:x}_0")), "{names:?}");
    // The kernel names a mapping without a file thus, and perf goes by that.
    let maps = fs::read_to_string(format!("/proc/{}/maps", guest.0.id())).unwrap();
    for (start, len, name) in names {
        assert!(len > 0);
        let line = maps.lines().find(|l| {
            let (from, to) = l.split(' ').next().and_then(|r| r.split_once('-')).unwrap();
            let [from, to] = [from, to].map(|n| u64::from_str_radix(n, 16).unwrap());
            from <= start && start + len <= to
        });
        assert!(line.is_some_and(|l| l.contains(" r-xs ") && l.contains("/dev/zero")), "{name}: {line:?}");
    }
    guest.0.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    assert_eq!(guest.end().code(), Some(0));
    assert!(!map.exists(), "{map:?} is left behind");
}

#[test]
fn names_for_perf_stay_if_asked_and_go_with_a_stopped_guest() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    let mut guest = Guest::start(run(&kernel).arg("--perf-map=keep"));
    assert_eq!(guest.end().code(), Some(0));
    let map = perf_map(&guest);
    assert!(!names(&map).is_empty());
    fs::remove_file(&map).unwrap();

    let kernel = files.file("spin", &pvh(SPIN));
    let mut guest = Guest::start(run(&kernel).arg("--perf-map"));
    let map = perf_map(&guest);
    let began = Instant::now();
    while !map.exists() {
        assert!(began.elapsed() < PATIENCE, "no {map:?}");
    }
    // SAFETY: sends a signal to our own child, which was not waited for.
    assert_eq!(unsafe { libc::kill(guest.0.id() as i32, libc::SIGTERM) }, 0);
    assert_eq!(guest.end().code(), Some(143));
    assert!(!map.exists(), "{map:?} is left behind");
}
