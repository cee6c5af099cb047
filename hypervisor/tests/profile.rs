//! `--profile`: a guest that computes is seen to compute, one that talks to devices is seen to do that, and symbols are found
//! although the guest's kernel is elsewhere than its symbol file says.

mod common;

use common::{POWER_OFF, Scratch, code, finish, pvh, run, sentence};
use std::fs;
use std::path::Path;

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
