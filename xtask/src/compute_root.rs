//! What the compute benchmark runs from: its own static binary, Debian's programs, and the guest image that holds both.
//!
//! Packages are fetched once with a private apt and unpacked below target/guests/compute-root, with every library they
//! need; nothing is installed. The host runs the programs from there, and the same files are packed into the image as
//! `/compute`.

use crate::apt::Apt;
use crate::cpio::Archive;
use crate::debian::MODULES;
use crate::host::{self, Doing, Failure, Result};
use crate::task_guests;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &[u8] = include_bytes!("../guest/init.sh");
const SCRIPT: &[u8] = include_bytes!("../guest/bench.sh");

/// The benchmark's target; named even where it is the host's own, so that the flags below stay off build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Static, so that it runs in a guest without libraries, and at a fixed address, so that no run is luckier than another.
const FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Builds the benchmark's binary and returns its path.
///
/// # Errors
/// It does not build.
pub(crate) fn build_bench() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| host::repo().join("target"), |dir| host::repo().join(dir))
        .join("compute");
    let mut cargo = host::cargo();
    cargo.args(["build", "--release", "--package", "bench-programs", "--target", TARGET, "--target-dir"]);
    host::run(cargo.arg(&target).env("RUSTFLAGS", FLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS"))?;
    Ok(target.join(TARGET).join("release/bench"))
}

/// A set of programs from Debian packages, unpacked below target/guests and never installed.
pub(crate) struct Set {
    /// The folder's name there.
    pub(crate) folder: &'static str,
    /// The programs' packages, then those of their libraries. The list is complete: dependencies are not resolved, so that
    /// the set stays the same when a package's dependencies change, and a missing library is an error at the first start.
    pub(crate) packages: &'static [&'static str],
    /// What the programs need of the unpacked packages, by the start of the path. The rest, such as documentation, character
    /// sets and the compiler's driver, would only make the image larger.
    pub(crate) needed: &'static [&'static str],
}

/// The benchmark's programs.
const PROGRAMS: Set = Set {
    folder: "compute-root",
    packages: &[
        "perl-base",
        "python3.11-minimal",
        "libpython3.11-minimal",
        "xz-utils",
        "gzip",
        "zstd",
        "openssl",
        "sqlite3",
        "cpp-12",
        "libc6",
        "libcrypt1",
        "libexpat1",
        "libgcc-s1",
        "libgmp10",
        "libisl23",
        "liblz4-1",
        "liblzma5",
        "libmpc3",
        "libmpfr6",
        "libreadline8",
        "libsqlite3-0",
        "libssl3",
        "libstdc++6",
        "libtinfo6",
        "libzstd1",
        "zlib1g",
        "gcc-12-base",
        "readline-common",
        "busybox-static",
    ],
    needed: &[
        "bin/busybox",
        "bin/gzip",
        "lib/x86_64-linux-gnu/",
        "usr/bin/",
        "usr/lib/gcc/x86_64-linux-gnu/12/cc1",
        "usr/lib/python3.11/",
        "usr/lib/x86_64-linux-gnu/perl-base/",
        "usr/lib/x86_64-linux-gnu/lib",
    ],
};

/// The release that the packages come from; the guests' kernel is of the same.
const SUITE: &str = "bookworm";

/// Fetches the benchmark's programs, unless they are there.
///
/// # Errors
/// See [`Set::fetch`].
pub(crate) fn fetch() -> Result<()> {
    PROGRAMS.fetch()
}

/// Where the benchmark's unpacked programs are in the cache.
pub(crate) fn root() -> PathBuf {
    PROGRAMS.root()
}

impl Set {
    /// Where the unpacked programs are in the cache.
    pub(crate) fn root(&self) -> PathBuf {
        host::guests_dir().join(self.folder)
    }

    /// Fetches and unpacks the programs, unless they are there.
    ///
    /// # Errors
    /// A tool, the mirror or the network is missing.
    pub(crate) fn fetch(&self) -> Result<()> {
        let stamp = self.root().join("VERSION");
        // The first line says what the folder was made from; another list of packages makes another folder.
        let made_from = format!("{SUITE}: {} / {}", self.packages.join(" "), self.needed.join(" "));
        if fs::read_to_string(&stamp).is_ok_and(|text| text.lines().next() == Some(made_from.as_str())) {
            return Ok(());
        }
        host::need_tool("dpkg-deb", "dpkg", "unpack Debian packages")?;
        eprintln!("fetching Debian packages for {} (once)", self.folder);
        let work = Unfinished::new()?;
        let apt = Apt::new(work.0.join("apt"), &[SUITE])?;
        let (everything, ready) = (work.0.join("everything"), work.0.join("root"));
        for folder in [&everything, &ready] {
            fs::create_dir_all(folder).doing("cannot create a folder under target/guests")?;
        }
        let mut versions = format!("{made_from}\n");
        for name in self.packages {
            let package = apt.newest(&format!("{name}:amd64"), "").or_else(|_| apt.newest(name, ""))?;
            let file = apt.download(&package, &work.0.join("packages"))?;
            host::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(&everything))?;
            versions.push_str(&format!("{} {}\n", package.name, package.version));
        }
        for (name, kind) in entries(&everything)? {
            if kind != Kind::Folder && self.needed.iter().any(|start| name.starts_with(start)) {
                let to = ready.join(&name);
                fs::create_dir_all(to.parent().unwrap_or(&ready))
                    .doing("cannot create a folder under target/guests")?;
                fs::rename(everything.join(&name), to).doing(format!("cannot move {name}"))?;
            }
        }
        fs::write(ready.join("VERSION"), versions).doing("cannot write VERSION")?;
        if self.root().exists() {
            fs::rename(self.root(), work.0.join("old"))
                .doing(format!("cannot replace target/guests/{}", self.folder))?;
        }
        fs::rename(&ready, self.root()).doing(format!("cannot move {} into target/guests", self.folder))
    }
}

/// A folder for unfinished things. Its name is of the form that task_guests removes after an interrupted run.
struct Unfinished(PathBuf);

impl Unfinished {
    fn new() -> Result<Self> {
        let folder = host::guests_dir().join(format!(".unfinished-{}", std::process::id()));
        fs::create_dir_all(&folder).doing("cannot create a folder under target/guests")?;
        Ok(Self(folder))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // What stays after a failure here is found and removed by the next run.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What kind of thing an entry of a folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Folder,
    File,
    Link,
}

/// Everything below a folder, by its path relative to it, sorted, folders before what is in them.
fn entries(top: &Path) -> Result<Vec<(String, Kind)>> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(folder) = open.pop() {
        let failed = || format!("cannot read {}", top.join(&folder).display());
        for entry in fs::read_dir(top.join(&folder)).doing(failed())? {
            let entry = entry.doing(failed())?;
            let path = folder.join(entry.file_name());
            let kind = entry.file_type().doing(failed())?;
            let name = path.to_str().ok_or_else(|| Failure::new(format!("{} is not UTF-8", path.display())))?;
            if kind.is_dir() {
                found.push((name.to_owned(), Kind::Folder));
                open.push(path);
            } else {
                found.push((name.to_owned(), if kind.is_symlink() { Kind::Link } else { Kind::File }));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Adds everything below `from` to an archive as the folder `to`, or at its top if that is empty.
pub(crate) fn pack(archive: &mut Archive, from: &Path, to: &str) -> Result<()> {
    if !to.is_empty() {
        archive.folder(to);
    }
    for (name, kind) in entries(from)? {
        let place = if to.is_empty() { name.clone() } else { format!("{to}/{name}") };
        let path = from.join(&name);
        let failed = || format!("cannot read {}", path.display());
        match kind {
            Kind::Folder => archive.folder(&place),
            Kind::Link => {
                let target = fs::read_link(&path).doing(failed())?;
                archive.link(&place, &target.to_string_lossy());
            }
            Kind::File => {
                let executable = path.metadata().doing(failed())?.permissions().mode() & 0o111 != 0;
                archive.file(&place, if executable { 0o755 } else { 0o644 }, &fs::read(&path).doing(failed())?);
            }
        }
    }
    Ok(())
}

/// Packs the image, if it is not there with the same contents, and returns its path.
///
/// # Errors
/// The guests cannot be fetched, or a file cannot be read or written.
pub(crate) fn image(bench: &Path) -> Result<PathBuf> {
    task_guests::fetch()?;
    fetch()?;
    let mut archive = base(bench)?;
    pack(&mut archive, &root(), "compute")?;
    store("initramfs-compute.cpio", &archive.finish())
}

/// What `paravane bench macro` needs, built and put where it looks: the programs for the host, a small image for boots,
/// disk and network, and the image with Debian's programs.
///
/// # Errors
/// Something cannot be built, fetched or written.
pub(crate) fn for_bench() -> Result<[PathBuf; 3]> {
    let program = build_bench()?;
    let large = image(&program)?;
    let guests = task_guests::fetch()?;
    let mut archive = base(&program)?;
    archive.folder("lib");
    let (kernel, mut list) = (guests.modules("6.1")?.join("kernel"), String::new());
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        let file = fs::read(kernel.join(module)).doing(format!("the kernel package holds no {module}"))?;
        archive.file(&format!("lib/{name}"), 0o644, &file);
        list.push_str(name);
        list.push('\n');
    }
    archive.file("modules", 0o644, list.as_bytes());
    fs::create_dir_all(host::guests_dir().join("bench")).doing("cannot create target/guests/bench")?;
    let small = store("bench/initramfs.cpio", &archive.finish())?;
    let programs = store("bench/programs", &fs::read(&program).doing("cannot read the benchmark's binary")?)?;
    fs::set_permissions(&programs, fs::Permissions::from_mode(0o755)).doing("cannot set a file's permissions")?;
    Ok([programs, small, large])
}

/// The start of every image: busybox, the benchmark's binary and the scripts.
fn base(bench: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sbin", "sys", "tmp"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 0o600, 5, 1);
    archive.device("dev/null", 0o666, 1, 3);
    archive.file("bin/busybox", 0o755, &fs::read(root().join("bin/busybox")).doing("cannot read busybox")?);
    archive.file("bin/bench", 0o755, &fs::read(bench).doing("cannot read the benchmark's binary")?);
    archive.file("init", 0o755, INIT);
    archive.file("script", 0o755, SCRIPT);
    Ok(archive)
}

/// Writes a file of the cache unless it is there with the same contents.
fn store(name: &str, contents: &[u8]) -> Result<PathBuf> {
    let place = host::guests_dir().join(name);
    if !fs::read(&place).is_ok_and(|old| old == contents) {
        let unfinished = host::guests_dir().join(format!(".{}-{}", name.replace('/', "-"), std::process::id()));
        fs::write(&unfinished, contents).doing(format!("cannot write {name}"))?;
        fs::rename(&unfinished, &place).doing(format!("cannot move {name} into place"))?;
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_listed_with_folders_first_and_links_as_links() {
        let top = std::env::temp_dir().join(format!("xtask-entries-{}", std::process::id()));
        fs::create_dir_all(top.join("b/c")).expect("a folder");
        fs::write(top.join("b/c/file"), "x").expect("a file");
        std::os::unix::fs::symlink("c/file", top.join("b/link")).expect("a link");
        fs::write(top.join("a"), "").expect("a file");
        let found = entries(&top);
        fs::remove_dir_all(&top).expect("removed");
        let expected = [
            ("a", Kind::File),
            ("b", Kind::Folder),
            ("b/c", Kind::Folder),
            ("b/c/file", Kind::File),
            ("b/link", Kind::Link),
        ];
        let found = found.expect("a list");
        assert_eq!(found.iter().map(|(name, kind)| (name.as_str(), *kind)).collect::<Vec<_>>(), expected);
    }
}
