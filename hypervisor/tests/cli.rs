//! What `paravane` says to people who ask for something that cannot be had: one sentence, and the status that the help
//! documents.

mod common;

use common::{POWER_OFF, Scratch, code, finish, paravane, pvh, run, say, sentence};
use std::fs;
use std::process::{Output, Stdio};

/// Bad usage.
const USAGE: Option<i32> = Some(2);

fn refused(output: &Output, words: &[&str]) {
    let text = sentence(output);
    assert_eq!(output.status.code(), USAGE, "{text}");
    for w in words {
        assert!(text.contains(w), "\"{w}\" is not in: {text}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn help_names_every_option_and_status() {
    let output = finish(paravane().args(["run", "--help"]));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    let options =
        ["--kernel", "--initrd", "--cmdline", "--memory", "--cpus", "--engine", "--serial", "--debug-exit", "--stats"];
    for word in
        options.into_iter().chain(["Ctrl-A x", "powered off", "panic", "triple fault", "reset", "128+n", "0xf4"])
    {
        assert!(text.contains(word), "\"{word}\" is not in the help");
    }
}

#[test]
fn bad_options_are_refused() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    let wrong: [(&[&str], &str); 10] = [
        (&["--memory", "lots"], "lots"),
        (&["--memory", "1"], "512M"),
        (&["--memory", "0M"], "memory"),
        (&["--memory", "99999999G"], "memory"),
        (&["--cpus", "0"], "--cpus"),
        (&["--cpus", "65"], "--cpus"),
        (&["--cpus", "many"], "many"),
        (&["--engine", "tcg"], "auto"),
        (&["--serial", "file="], "file=PATH"),
        (&["--colour"], "--colour"),
    ];
    for (args, word) in wrong {
        let output = finish(run(&kernel).args(args));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), USAGE, "{args:?}: {text}");
        assert!(text.contains(word), "{args:?}: {text}");
    }
}

#[test]
fn unusable_kernels_are_refused() {
    let files = Scratch::new();
    refused(&finish(&mut run(&files.path("missing"))), &["kernel", "missing"]);
    refused(&finish(&mut run(&files.file("empty", b""))), &["kernel"]);
    refused(&finish(&mut run(&files.file("text", &b"not a kernel\n".repeat(1000)))), &["bzImage", "PVH", "multiboot1"]);
    refused(&finish(&mut run(&files.path("."))), &["kernel"]);
    refused(&finish(&mut run("/dev/zero".as_ref())), &["kernel", "/dev/zero"]);
    let whole = pvh(&code(&[POWER_OFF, &[0; 5000]]));
    refused(&finish(&mut run(&files.file("cut", &whole[..whole.len() - 1]))), &["kernel", "damaged"]);
}

#[test]
fn unusable_initrds_are_refused() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    refused(&finish(run(&kernel).arg("--initrd").arg(files.path("missing"))), &["initrd", "missing"]);
    refused(&finish(run(&kernel).arg("--initrd").arg(files.file("empty", b""))), &["initrd", "empty"]);
    refused(
        &finish(run(&kernel).arg("--initrd").arg(files.file("large", &vec![1; 16 << 20]))),
        &["initrd", "--memory"],
    );
}

#[test]
fn too_little_memory_is_refused() {
    let files = Scratch::new();
    // A segment that ends at 32 MiB, by its size in memory.
    let mut image = pvh(POWER_OFF);
    image[64 + 56 + 40..][..8].copy_from_slice(&(31u64 << 20).to_le_bytes());
    let kernel = files.file("kernel", &image);
    refused(&finish(&mut run(&kernel)), &["--memory"]);
    let output = finish(paravane().args(["run", "--memory", "32M", "--kernel"]).arg(&kernel).stdin(Stdio::null()));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_overlong_command_line_is_refused() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    refused(&finish(run(&kernel).arg("--cmdline").arg("x".repeat(5000))), &["command line"]);
}

#[test]
fn serial_output_goes_where_it_is_told() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&say("hello"), POWER_OFF])));
    let output = finish(&mut run(&kernel));
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"hello"[..]));

    let log = files.path("log");
    let target = format!("file={}", log.display());
    let output = finish(run(&kernel).args(["--serial", &target]));
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b""[..]));
    assert_eq!(fs::read(&log).unwrap(), b"hello");

    let output = finish(run(&kernel).args(["--serial", "null"]));
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b""[..]));

    let nowhere = format!("file={}", files.path("no/such/folder").display());
    refused(&finish(run(&kernel).args(["--serial", &nowhere])), &["serial"]);
}

#[test]
fn stats_are_printed_at_the_end() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&code(&[&say("hello"), POWER_OFF])));
    let output = finish(run(&kernel).arg("--stats"));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0));
    let counter = |name: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no \"{name}\" in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(counter("blocks translated") > 0);
    assert!(counter("instructions emulated") >= 6, "five bytes and the power-off");
    assert!(text.contains("engine: binary translation"));
}
