//! The machine the tasks run on: where the repository is, which tools are there, how a command is run.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why a task stopped: one sentence for the person who started it.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    /// Wraps the sentence.
    pub(crate) fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a task returns.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Adds what was being done to an I/O error.
pub(crate) trait Doing<T> {
    /// Turns the error into a sentence that starts with `what`, as in "cannot write FILE".
    fn doing(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure::new(format!("{what}: {error}")))
    }
}

/// The repository's top folder.
pub(crate) fn repo() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// Where guests are cached: always inside the repository, whatever CARGO_TARGET_DIR says, so that tests started
/// in any way find them.
pub(crate) fn guests_dir() -> PathBuf {
    repo().join("target/guests")
}

/// Cargo, as the one that started this program where that is known.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repo());
    command
}

/// PATH, followed by the folders of system tools such as mke2fs, which an ordinary user's PATH often leaves out.
pub(crate) fn search_path() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    std::env::join_paths(folders).unwrap_or(path)
}

/// True if `tool` is an executable file in one of the folders of [`search_path`].
pub(crate) fn has_tool(tool: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::env::split_paths(&search_path()).any(|folder| {
        folder.join(tool).metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// Ends with a sentence that names the tool and the Debian package it comes in, if it is not there.
pub(crate) fn need_tool(tool: &str, package: &str, why: &str) -> Result<()> {
    if has_tool(tool) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{tool} is needed to {why} and is not installed; get it with `apt-get install {package}`"
    )))
}

/// Runs a command with this terminal's output and fails unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = shown(command);
    let status = command.status().doing(format!("cannot start `{name}`"))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("`{name}` failed ({status})")))
}

/// Runs a command and returns what it wrote to standard output; on failure the sentence carries its last error line.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = shown(command);
    let output = command.output().doing(format!("cannot start `{name}`"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(Failure::new(format!("`{name}` failed ({}): {}", output.status, last.trim())))
}

/// A command's program and plain arguments, short enough for a sentence.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("?")).to_string_lossy();
    let words: Vec<_> =
        command.get_args().map(OsStr::to_string_lossy).filter(|word| !word.contains('=')).take(6).collect();
    format!("{program} {}", words.join(" ")).trim_end().to_owned()
}

/// Builds the hypervisor with the release profile and returns the program's path.
pub(crate) fn build_paravane() -> Result<PathBuf> {
    run(cargo().args(["build", "--release", "--package", "paravane", "--bin", "paravane"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo().join("target"), |dir| repo().join(dir));
    Ok(target.join("release/paravane"))
}

/// The given paravane program, or else a fresh build.
pub(crate) fn paravane(given: Option<&Path>) -> Result<PathBuf> {
    match given {
        Some(program) => fs::canonicalize(program).doing(format!("cannot find {}", program.display())),
        None => build_paravane(),
    }
}

/// A file under target/guests for as long as this process needs it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Writes it; the name gets this process's number in front.
    pub(crate) fn new(name: &str, contents: &[u8]) -> Result<Self> {
        let folder = guests_dir();
        fs::create_dir_all(&folder).doing("cannot create target/guests")?;
        let me = Self(folder.join(format!(".{}-{name}", std::process::id())));
        fs::write(&me.0, contents).doing(format!("cannot write {name} under target/guests"))?;
        Ok(me)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A file that stays behind is in nobody's way.
        let _ = fs::remove_file(&self.0);
    }
}

/// A number of bytes as MiB with one decimal.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
