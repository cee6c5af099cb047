//! `paravane doctor` and `--engine auto` as people and scripts meet them, on whatever host this is, and with its /dev/kvm taken away.

mod common;

use common::{POWER_OFF, Scratch, finish, paravane, pvh, run};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The doctor with a cache of its own.
fn doctor(cache: &Path) -> Command {
    let mut c = paravane();
    c.arg("doctor").env("XDG_CACHE_HOME", cache);
    c
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_str(&text(output)).unwrap()
}

#[test]
fn the_table_and_the_json_agree() {
    let files = Scratch::new();
    let table = text(&finish(&mut doctor(&files.path("cache"))));
    println!("{table}");
    for topic in
        ["paravane", "CPU", "memory", "huge pages", "limits", "/dev/kvm", "engine kvm", "engine bt", "--engine auto"]
    {
        assert!(table.lines().any(|l| l.starts_with(topic)), "no line on {topic}:\n{table}");
    }
    assert!(table.lines().count() <= 24, "{table}");
    let v = json(&finish(doctor(&files.path("cache")).arg("--json")));
    assert_eq!(v["format"], 1);
    let engine = v["auto"]["engine"].as_str().unwrap();
    assert!(table.contains(&format!("--engine auto  {engine}: ")), "{table}");
    // Whoever has a KVM that emulates is told so.
    if v["kvm"]["kind"] == "emulating" {
        assert!(table.contains("emulating") && engine == "bt", "{table}");
    }
}

/// What the doctor announces is what a run does, and a run says why. The measurement is kept.
#[test]
fn auto_does_what_the_doctor_says() {
    let files = Scratch::new();
    let cache = files.path("cache");
    let v = json(&finish(doctor(&cache).arg("--json")));
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    let kept = cache.join("paravane/host.json");
    assert_eq!(kept.exists(), !v["kvm"]["speeds"].is_null(), "what was measured is kept");
    let output = finish(run(&kernel).arg("--stats").env("XDG_CACHE_HOME", &cache));
    let stats = String::from_utf8(output.stderr).unwrap();
    let name = if v["auto"]["engine"] == "kvm" { "KVM" } else { "binary translation" };
    let line = stats.lines().find(|l| l.starts_with("engine: ")).unwrap();
    println!("{line}");
    assert!(line.starts_with(&format!("engine: {name} (")) && !line.contains("asked for"), "{line}");
    // An option of one engine decides, too.
    let output = finish(run(&kernel).args(["--stats", "--profile"]).env("XDG_CACHE_HOME", &cache));
    let stats = String::from_utf8(output.stderr).unwrap();
    assert!(stats.contains("engine: binary translation (--profile is about translated code)"), "{stats}");
}

#[test]
fn no_cache_is_needed() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    let blocked = files.file("blocked", b"a file, not a folder");
    for cache in [blocked.as_path(), Path::new("relative/path"), Path::new("/proc/nowhere")] {
        let output = finish(run(&kernel).env("XDG_CACHE_HOME", cache).env("HOME", "/nonexistent"));
        assert_eq!(output.status.code(), Some(0), "{cache:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty());
    }
}

/// A command in a mount namespace of its own, where /dev/kvm is something else; `None` where this user may not have one.
fn with_kvm_replaced(by: &str, program: &Path, args: &[&str], cache: &Path) -> Option<Command> {
    let may = |c: &mut Command| c.output().is_ok_and(|o| o.status.success());
    if !may(Command::new("unshare").args(["-m", "mount", "--bind", "/dev/null", "/dev/kvm"])) {
        eprintln!("SKIPPED: no mount namespace may be made here, so /dev/kvm cannot be hidden");
        return None;
    }
    let mut c = Command::new("unshare");
    c.args(["-m", "sh", "-c", &format!("{by} && exec \"$@\""), "sh"]).arg(program).args(args);
    c.env("XDG_CACHE_HOME", cache);
    Some(c)
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_paravane");

#[test]
fn a_hidden_kvm_is_said_and_bt_is_picked() {
    let files = Scratch::new();
    let cache = files.path("cache");
    let kernel = files.file("kernel", &pvh(POWER_OFF));
    let hide = "mount -t tmpfs none /dev";
    let program = Path::new(PROGRAM);
    let Some(mut c) = with_kvm_replaced(hide, program, &["doctor"], &cache) else { return };
    let table = text(&finish(&mut c));
    assert!(
        table.contains("/dev/kvm       absent") && table.contains("--engine auto  bt: there is no /dev/kvm"),
        "{table}"
    );
    let k = kernel.to_str().unwrap();
    let args = ["run", "--memory", "16M", "--serial", "null", "--stats", "--kernel", k];
    let output = finish(&mut with_kvm_replaced(hide, program, &args, &cache).unwrap());
    let stats = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stats}");
    assert!(stats.contains("engine: binary translation (there is no /dev/kvm)"), "{stats}");
    // Something else in its place.
    let null = "mount --bind /dev/null /dev/kvm";
    let v = json(&finish(&mut with_kvm_replaced(null, program, &["doctor", "--json"], &cache).unwrap()));
    assert_eq!((v["kvm"]["access"].as_str(), v["auto"]["engine"].as_str()), (Some("failed"), Some("bt")));
}

#[test]
fn a_denied_kvm_is_said_and_bt_is_picked() {
    let files = Scratch::new();
    let Ok(kvm) = std::fs::metadata("/dev/kvm") else {
        eprintln!("SKIPPED: there is no /dev/kvm to be denied");
        return;
    };
    if kvm.permissions().mode() & 0o006 == 0o006 {
        eprintln!("SKIPPED: anybody may open this /dev/kvm");
        return;
    }
    // A copy where any user can reach it.
    let folder = std::env::temp_dir().join(format!("paravane-denied-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let program = folder.join("paravane");
    std::fs::copy(PROGRAM, &program).unwrap();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut c = Command::new(&program);
    c.args(["doctor", "--json"]).env("XDG_CACHE_HOME", files.path("cache")).uid(65534).gid(65534);
    let output = c.output();
    std::fs::remove_dir_all(&folder).unwrap();
    let Ok(output) = output else {
        eprintln!("SKIPPED: this user may not become another one");
        return;
    };
    let v = json(&output);
    assert_eq!((v["kvm"]["access"].as_str(), v["auto"]["engine"].as_str()), (Some("denied"), Some("bt")));
    assert_eq!(v["auto"]["reason"], "this user may not open /dev/kvm");
    assert!(v["advice"].as_array().unwrap().iter().any(|a| a["topic"] == "/dev/kvm"), "{v}");
}
