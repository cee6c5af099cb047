//! Counters of single operations against `bench/counters.json`: a guard against changes that make an operation leave
//! translated code more often than before. Times are not looked at, so that it can run on any machine, however loaded.

use crate::guest::{self, Engine};
use crate::host;
use paravane_bench::micro::check::{self, Counts};
use paravane_bench::micro::guest::{self as measuring, Guest};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file that is kept with the source.
pub fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/counters.json")
}

/// What is expected, by that file.
///
/// # Errors
/// It cannot be read; a sentence that says how it is written.
pub fn expected() -> Result<Counts, String> {
    let path = file();
    let text = fs::read_to_string(&path)
        .map_err(|e| format!("cannot read {}, which `cargo xtask bench --bless` writes: {e}", path.display()))?;
    serde_json::from_str(&text)
        .map_err(|e| format!("{} is not what `cargo xtask bench --bless` writes: {e}", path.display()))
}

/// Counts on every engine that is there; says which is not.
///
/// # Panics
/// The guest cannot be built, or Paravane cannot be started.
pub fn count() -> Counts {
    let guest = Guest::new(&guest::pv_elf("measure-guest"), host::program()).expect("the guest was just built");
    let mut counts = Counts { compiler: compiler(), ..Counts::default() };
    for (engine, run) in [(Engine::Bt, measuring::Engine::Bt), (Engine::Kvm, measuring::Engine::Kvm)] {
        match engine.missing() {
            Some(reason) => eprintln!("{} is left out: {reason}", engine.name()),
            None => {
                let counted = check::count(&guest, run).expect("Paravane can be started");
                counts.machines.insert(engine.name().to_owned(), counted);
            }
        }
    }
    counts
}

/// What differs from the file, a line each.
///
/// # Errors
/// The file cannot be read.
pub fn differences(found: &Counts) -> Result<Vec<String>, String> {
    let expected = expected()?;
    if expected.compiler != found.compiler {
        eprintln!("what was translated is not compared: the guest was built by another compiler ({})", found.compiler);
    }
    Ok(check::differences(&expected, found))
}

/// Writes the file. What it says of engines that are not here stays.
///
/// # Errors
/// It cannot be written.
pub fn bless(found: Counts) -> Result<(), String> {
    let mut all = expected().unwrap_or_default();
    all.compiler = found.compiler;
    all.machines.extend(found.machines);
    let text = serde_json::to_string_pretty(&all).map_err(|e| e.to_string())?;
    fs::write(file(), text + "\n").map_err(|e| format!("cannot write {}: {e}", file().display()))
}

/// The compiler's version, as it says it.
fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output().expect("rustc can be started");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
