//! Where the program under test and its guests are, and how they are offered to a user without rights.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// User and group "nobody": owner of nothing, no access to /dev/kvm.
const NOBODY: u32 = 65534;

fn repo() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// Whether this host's KVM, if there is one, can only emulate ring 0: no CPU offers VMX or SVM.
pub fn kvm_emulates() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    !info.lines().any(|l| l.starts_with("flags") && l.split_whitespace().any(|f| f == "vmx" || f == "svm"))
}

/// The program under test: `PARAVANE_BIN`, which `cargo xtask test` sets, or a fresh release build.
///
/// # Panics
/// The build failed.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("PARAVANE_BIN") {
            return path.into();
        }
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(repo()).args(["build", "--release", "--package", "paravane", "--bin", "paravane"]);
        let status = cargo.status().expect("cargo can be started");
        assert!(status.success(), "paravane cannot be built");
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        repo().join(target).join("release/paravane")
    })
}

/// A file of the guest cache, such as `6.1/vmlinuz`; `None`, with a printed reason, if it was never fetched.
///
/// # Panics
/// It is missing although `cargo xtask test`, which fetches it, runs the tests.
pub fn guest_file(name: &str) -> Option<PathBuf> {
    let path = repo().join("target/guests").join(name);
    if path.is_file() {
        return Some(path);
    }
    assert!(std::env::var_os("PARAVANE_BIN").is_none(), "target/guests/{name} is missing");
    eprintln!("SKIPPED: target/guests/{name} is missing; `cargo xtask guests` fetches it");
    None
}

/// True if `tool` is in one of PATH's folders.
pub fn has_tool(tool: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(tool).is_file())
}

/// A folder in which the program runs as an ordinary user: copies of the files it may read, and an empty folder, which
/// is its working directory and TMPDIR, to see what it leaves behind. Removed when dropped.
pub struct Stage {
    folder: PathBuf,
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

impl Stage {
    /// Makes the folder.
    ///
    /// # Panics
    /// The host's temporary folder cannot be written.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("paravane-test-{}-{number}", std::process::id()));
        let stage = Self { folder };
        fs::create_dir_all(stage.work()).expect("the temporary folder can be written");
        for (folder, mode) in [(&stage.folder, 0o755), (&stage.work(), 0o777)] {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).expect("permissions can be set");
        }
        stage
    }

    fn work(&self) -> PathBuf {
        self.folder.join("work")
    }

    /// A copy that everybody may read and run: the checkout may lie where only its owner can look.
    fn offer(&self, file: &Path, name: &str) -> PathBuf {
        let copy = self.folder.join(name);
        fs::copy(file, &copy).unwrap_or_else(|error| panic!("{} cannot be copied: {error}", file.display()));
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("permissions can be set");
        copy
    }

    /// The command `paravane run` by binary translation on the given guest, as nobody where this test is root, and as
    /// this user, who then has no rights either, where it is not.
    pub fn paravane(&self, kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
        let mut command = Command::new(self.offer(program(), "paravane"));
        command.args(["run", "--engine", "bt", "--memory", "512M", "--serial", "stdio", "--cmdline", cmdline]);
        command.arg("--kernel").arg(self.offer(kernel, "kernel")).arg("--initrd").arg(self.offer(initrd, "initrd"));
        command.current_dir(self.work()).env("TMPDIR", self.work()).env("HOME", self.work());
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    /// A copy of a disk that the program may write, sparse as the disk is.
    ///
    /// # Panics
    /// It cannot be copied or given away.
    pub fn disk(&self, disk: &Path) -> PathBuf {
        let copy = self.folder.join("disk");
        let status = Command::new("cp").arg("--sparse=always").arg(disk).arg(&copy).status();
        assert!(status.is_ok_and(|status| status.success()), "{} cannot be copied", disk.display());
        if is_root() {
            std::os::unix::fs::chown(&copy, Some(NOBODY), Some(NOBODY)).expect("root can give files away");
        }
        copy
    }

    /// A file with these contents beside the program, for this test to hand on.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn file(&self, name: &str, contents: &[u8]) -> PathBuf {
        let path = self.folder.join(format!("own-{name}"));
        fs::write(&path, contents).expect("the temporary folder can be written");
        path
    }

    /// A new folder beside the program.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.folder.join(name);
        fs::create_dir(&path).expect("the temporary folder can be written");
        path
    }

    /// Gives a folder and everything in it to the user that the program runs as.
    ///
    /// # Panics
    /// It cannot be given away.
    pub fn give_away(&self, folder: &Path) {
        if is_root() {
            let owner = format!("{NOBODY}:{NOBODY}");
            let status = Command::new("chown").args(["-R", "-h", &owner]).arg(folder).status();
            assert!(status.is_ok_and(|status| status.success()), "root can give files away");
        }
    }

    /// Names of the files that the program left in its working directory.
    ///
    /// # Panics
    /// The folder cannot be read.
    pub fn left_behind(&self) -> Vec<String> {
        let entries = fs::read_dir(self.work()).expect("the working directory can be read");
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}
