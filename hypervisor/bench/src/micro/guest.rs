//! The measuring guest (`tests/pv-guests/measure`) under Paravane and under QEMU: how it is started, and what it and the
//! hypervisor's counters say.
//!
//! One run is one case in one form, so that the counters belong to it. QEMU, whose counters nobody sees and whose start is long,
//! does a list of cases in one run.

use super::cases::{Case, Needs};
use crate::child::{Finished, Program};
use crate::{Failure, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// A run that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// The same for a list of all cases.
const LIST_LIMIT: Duration = Duration::from_secs(180);

/// Bytes of the disk.
const DISK: u64 = 1 << 20;

/// Paravane's engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Engine {
    /// Binary translation.
    Bt,
    /// KVM.
    Kvm,
}

/// Whether the guest uses the paravirtual ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// As an ordinary kernel.
    Stock,
    /// Through the ABI.
    Abi,
}

impl Form {
    /// The guest's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Abi => "abi",
        }
    }
}

/// What a case came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timed {
    /// TSC cycles per operation of each piece of the work, in order.
    pub pieces: Vec<f64>,
    /// The same of the quickest.
    pub best: f64,
    /// Operations, all pieces together.
    pub operations: f64,
}

impl Timed {
    /// The cycles that stand for the run: a quarter of the pieces were quicker. What disturbs a piece makes it slower, so that
    /// the quick half is steady; the quickest of all is luck.
    pub fn typical(&self) -> f64 {
        let mut sorted = self.pieces.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 4).copied().unwrap_or(self.best)
    }
}

/// What one run showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// Each case's result, or why there is none.
    pub cases: BTreeMap<String, std::result::Result<Timed, String>>,
    /// Frequency of the guest's TSC, kHz; 0 if it did not say.
    pub tsc_khz: f64,
    /// The hypervisor's counters, of the whole run.
    pub counters: BTreeMap<String, f64>,
    /// What went wrong, if something did.
    pub failure: Option<String>,
}

/// The guest, the programs that run it, and files that are removed with this.
pub struct Guest {
    elf: PathBuf,
    paravane: PathBuf,
    disk: PathBuf,
    serial: PathBuf,
}

impl Guest {
    /// The guest in the file `elf`, run by the program `paravane`.
    ///
    /// # Errors
    /// The guest is missing, or a file cannot be made.
    pub fn new(elf: &Path, paravane: &Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !elf.is_file() {
            return Err(Failure::usage(format!(
                "the measuring guest {} is missing; make it with \"cargo xtask guests bench\" or name its folder with --guests",
                elf.display()
            )));
        }
        let name = format!("paravane-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let file = |end: &str| std::env::temp_dir().join(format!("{name}.{end}"));
        let guest =
            Self { elf: elf.to_owned(), paravane: paravane.to_owned(), disk: file("disk"), serial: file("serial") };
        fs::File::create_new(&guest.disk)
            .and_then(|disk| disk.set_len(DISK))
            .map_err(|e| Failure::host(format!("cannot create {}: {e}", guest.disk.display())))?;
        Ok(guest)
    }

    /// The disk that guests read, a file of zeros.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Runs one case under Paravane. `None` runs nothing but what every run does.
    ///
    /// # Errors
    /// The program cannot be started. What happens in the guest is no error.
    pub fn run(&self, engine: Engine, form: Form, case: Option<&Case>, count: Option<u64>) -> Result<Shown> {
        let mut c = Command::new(&self.paravane);
        let engine = if engine == Engine::Bt { "bt" } else { "kvm" };
        c.args(["run", "--engine", engine, "--memory", "64M", "--debug-exit", "--stats", "--pv", "all"]);
        c.arg("--serial").arg(format!("file={}", self.serial.display()));
        let transport = match (form, case.is_some_and(Case::by_mmio)) {
            (_, true) => "mmio",
            (Form::Abi, false) => "pv",
            (Form::Stock, false) => "pci",
        };
        let disk = self.disk.display();
        match case.map_or(Needs::Nothing, |case| case.needs) {
            Needs::Nothing => {}
            Needs::Rng => drop(c.arg(format!("--rng=transport={transport}"))),
            Needs::Disk => {
                c.arg("--disk").arg(format!("path={disk},readonly=on,transport={transport}"));
            }
            Needs::Card => drop(c.arg("--net").arg(format!("user,restrict=on,transport={transport}"))),
            Needs::SecondCpu => drop(c.args(["--cpus", "2"])),
        }
        let mut cmdline = format!("case={} form={}", case.map_or("empty", |case| case.id), form.name());
        if let Some(count) = count {
            cmdline += &format!(" count={count}");
        }
        c.arg("--cmdline").arg(cmdline).arg("--kernel").arg(&self.elf);
        self.finish(&mut c, LIMIT)
    }

    /// Runs cases under QEMU's emulator, one after the other, each as often as it says.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn run_under_qemu(&self, cases: &[(&Case, u64)]) -> Result<Shown> {
        let list: Vec<_> = cases.iter().map(|(case, count)| format!("{}:{count}", case.id)).collect();
        let mut c = Command::new(crate::surroundings::QEMU);
        c.args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "64",
            "-display",
            "none",
            "-no-reboot",
            "-nodefaults",
        ]);
        c.arg("-serial").arg(format!("file:{}", self.serial.display()));
        c.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "virtio-rng-pci"]);
        c.arg("-drive").arg(format!("if=none,id=disk,format=raw,readonly=on,file={}", self.disk.display()));
        c.args(["-device", "virtio-blk-pci,drive=disk", "-netdev", "user,id=net,restrict=on"]);
        c.args(["-device", "virtio-net-pci,netdev=net", "-append"]).arg(format!("cases={}", list.join(",")));
        c.arg("-kernel").arg(&self.elf);
        self.finish(&mut c, LIST_LIMIT)
    }

    fn finish(&self, command: &mut Command, limit: Duration) -> Result<Shown> {
        // What an earlier run said must not be taken for this one's words.
        let _ = fs::remove_file(&self.serial);
        let finished = Program::start(command)?.finish(limit)?;
        let text = fs::read(&self.serial).unwrap_or_default();
        Ok(shown(&String::from_utf8_lossy(&text), &finished, limit))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for file in [&self.disk, &self.serial] {
            let _ = fs::remove_file(file);
        }
    }
}

/// The status with which the guest ends the machine.
const GOOD: i32 = 1;

fn shown(text: &str, finished: &Finished, limit: Duration) -> Shown {
    let mut shown = parsed(text, &finished.output);
    shown.failure = match finished.status {
        Some(status) if status.code() == Some(GOOD) || status.success() => None,
        Some(status) => Some(reason(text, &finished.output).unwrap_or_else(|| format!("it ended with {status}"))),
        None => Some(format!("it did not finish within {} s", limit.as_secs())),
    };
    shown
}

/// The guest's or the hypervisor's last words, as a clause.
fn reason(text: &str, output: &str) -> Option<String> {
    let mut ours = output.lines().filter_map(|line| line.strip_prefix("paravane: "));
    let ours = ours.rfind(|line| !line.starts_with("warning") && !line.starts_with("note"));
    let guest = text.lines().rfind(|line| line.starts_with("Bail out!"));
    ours.or(guest).map(|line| line.trim_end_matches('.').to_owned())
}

/// Reads what the guest printed and what the hypervisor counted.
fn parsed(text: &str, counters: &str) -> Shown {
    let mut shown = Shown::default();
    let mut pieces = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["pieces", case, _, ref cycles @ ..] => {
                pieces.insert(
                    case,
                    cycles.iter().filter_map(|c| c.parse().ok()).filter(|c| *c > 0.0).collect::<Vec<f64>>(),
                );
            }
            ["measure", case, _, "absent", ref reason @ ..] => {
                shown.cases.insert(case.to_owned(), Err(reason.join(" ")));
            }
            ["measure", case, _, best, operations] => {
                if let (Ok(best), Ok(operations)) = (best.parse(), operations.parse()) {
                    let timed = Timed { pieces: pieces.remove(case).unwrap_or_default(), best, operations };
                    shown.cases.insert(case.to_owned(), Ok(timed));
                }
            }
            ["tsc_khz", khz] => shown.tsc_khz = khz.parse().unwrap_or(0.0),
            _ => {}
        }
    }
    for line in counters.lines() {
        // Names and numbers are columns, at least two blanks apart.
        if let Some((name, value)) = line.trim_end().rsplit_once("  ")
            && let Ok(value) = value.trim().parse()
        {
            shown.counters.insert(name.trim().to_owned(), value);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "boot works (X2 APIC)\npieces eoi stock 00012.50 00010.00 00011.00 00090.00 00000.00\n\
        measure eoi stock 00010.00 000000000400\nmeasure mask abi absent the machine does not do it\ntsc_khz 02000000\n";
    const COUNTERS: &str = "kernel format: ELF with a PVH note\nwall time (ms)                7\n\
        instructions emulated        350\nhypercalls            1\n";

    #[test]
    fn results_and_counters_are_read() {
        let shown = parsed(TEXT, COUNTERS);
        let timed = shown.cases["eoi"].as_ref().expect("measured");
        assert_eq!((timed.best, timed.operations, timed.pieces.len()), (10.0, 400.0, 4));
        assert_eq!(timed.typical(), 11.0);
        assert_eq!(shown.cases["mask"], Err("the machine does not do it".into()));
        assert_eq!(shown.tsc_khz, 2e6);
        assert_eq!(shown.counters["instructions emulated"], 350.0);
        assert_eq!(shown.counters["hypercalls"], 1.0);
        assert_eq!(shown.counters.len(), 3);
    }

    #[test]
    fn the_last_words_are_the_reason() {
        let output = "paravane: warning: slow\nparavane: the KVM engine cannot go on.\n  at 0x20\n";
        assert_eq!(reason("", output).as_deref(), Some("the KVM engine cannot go on"));
        assert_eq!(reason("Bail out! vector 0xe\n", "").as_deref(), Some("Bail out! vector 0xe"));
        assert_eq!(reason("", "paravane: warning: slow\n"), None);
    }

    #[test]
    fn a_missing_guest_is_named_with_the_command_that_makes_it() {
        let failure = Guest::new(Path::new("/nonexistent/guest"), Path::new("paravane")).err().expect("missing");
        assert!(failure.to_string().contains("cargo xtask guests bench"), "{failure}");
    }
}
