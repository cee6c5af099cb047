//! `cargo xtask guests`: stock kernels and busybox from Debian, and the initramfs images built from them.
//!
//! Everything lies under target/guests: `6.1/` and `6.12/` with `vmlinuz`, `config`, `System.map`, `modules/` and
//! `VERSION`, `busybox/` with both programs, `initramfs-shell.cpio` and `initramfs-script.cpio`. Each piece is made in a
//! folder of its own and renamed into place when it is complete, so what has a name is whole, and a second run
//! only looks.

use crate::apt::Apt;
use crate::host::{self, Doing, Failure, Result};
use crate::initramfs::{self, Programs, Purpose};
use crate::{compute_root, debian, task_measure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The suites that hold both kernels; 6.1 is bookworm's own, 6.12 its backport.
const SUITES: [&str; 2] = ["bookworm", "bookworm-backports"];

/// The kernels, by the name of their folder.
pub(crate) const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// The guests in the cache.
pub(crate) struct Guests {
    folder: PathBuf,
}

impl Guests {
    /// A kernel image by series, "6.1" or "6.12".
    ///
    /// # Errors
    /// There is no such series.
    pub(crate) fn kernel(&self, series: &str) -> Result<PathBuf> {
        if KERNELS.contains(&series) {
            return Ok(self.folder.join(series).join("vmlinuz"));
        }
        Err(Failure::new(format!("there is no kernel \"{series}\"; choose one of {}", KERNELS.join(", "))))
    }

    /// A kernel's modules, the folder that would be /lib/modules/RELEASE.
    ///
    /// # Errors
    /// There is no such series.
    pub(crate) fn modules(&self, series: &str) -> Result<PathBuf> {
        Ok(self.kernel(series)?.with_file_name("modules"))
    }

    /// Static busybox for x86-64.
    pub(crate) fn busybox(&self) -> PathBuf {
        self.folder.join("busybox/busybox")
    }

    /// The initramfs that ends in a shell.
    pub(crate) fn shell_image(&self) -> PathBuf {
        self.folder.join("initramfs-shell.cpio")
    }

    /// The initramfs that does the standard work and powers off.
    pub(crate) fn script_image(&self) -> PathBuf {
        self.folder.join("initramfs-script.cpio")
    }
}

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(clap::Subcommand)]
enum What {
    /// Build a Debian 12 root disk with systemd and an SSH server, and the initramfs that starts it
    Debian,
    /// Build what `paravane bench` measures: the bare-metal guest, the programs and the images that hold them
    Bench,
}

/// Fetches and builds what is missing, and says where it is.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(What::Bench) = args.what {
        println!("single operations: {}", shown(&bench()?));
        let [programs, small, large] = compute_root::for_bench()?;
        println!("macro suite: {}, {} and {}", shown(&programs), shown(&small), shown(&large));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(What::Debian) = args.what {
        let debian = debian::fetch()?;
        println!("disk: {} (boot from a copy)", shown(&debian.disk()));
        println!("kernel: {}, initramfs: {}", shown(&debian.kernel), shown(&debian.initramfs()));
        println!("parameters: {}", debian::CMDLINE);
        println!("login: root, no password on the console; over SSH with the key {}", shown(&debian.key()));
        return Ok(ExitCode::SUCCESS);
    }
    let guests = fetch()?;
    for series in KERNELS {
        let version = fs::read_to_string(guests.folder.join(series).join("VERSION")).unwrap_or_default();
        println!("linux {series}: {} (package version {})", shown(&guests.kernel(series)?), version.trim());
    }
    println!("initramfs: {} and {}", shown(&guests.shell_image()), shown(&guests.script_image()));
    Ok(ExitCode::SUCCESS)
}

/// Builds the bare-metal guest that `paravane bench micro` runs and puts it into the cache; gives its path.
///
/// # Errors
/// It cannot be built or copied.
pub(crate) fn bench() -> Result<PathBuf> {
    let built = task_measure::build_guest("measure-guest")?;
    let place = host::guests_dir().join(paravane_bench::micro::GUEST);
    let folder = place.parent().unwrap_or(&place);
    fs::create_dir_all(folder).doing(format!("cannot create {}", shown(folder)))?;
    // Renamed into place, so that whoever runs the old one keeps it.
    let new = place.with_extension("new");
    fs::copy(&built, &new).doing(format!("cannot write {}", shown(&new)))?;
    fs::rename(&new, &place).doing(format!("cannot write {}", shown(&place)))?;
    Ok(place)
}

/// Makes sure that all guests are in the cache.
///
/// # Errors
/// A tool, the mirror or the network is missing; the sentence names it.
pub(crate) fn fetch() -> Result<Guests> {
    let folder = host::guests_dir();
    fs::create_dir_all(&folder).doing(format!("cannot create {}", shown(&folder)))?;
    remove_leftovers(&folder)?;
    let kernels: Vec<_> = KERNELS.into_iter().filter(|series| !complete(&folder, series)).collect();
    let busybox_missing = !complete(&folder, "busybox");
    if !kernels.is_empty() || busybox_missing {
        host::need_tool("dpkg-deb", "dpkg", "unpack Debian packages")?;
        eprintln!("fetching Debian packages for the guests (once)");
        let work = Work::new(&folder)?;
        let apt = Apt::new(work.path("apt"), &SUITES)?;
        for series in kernels {
            fetch_kernel(&apt, &work, series)?;
        }
        if busybox_missing {
            fetch_busybox(&apt, &work)?;
        }
    }
    build_images(&folder)?;
    Ok(Guests { folder })
}

/// True if a folder of the cache is there and made in today's form; VERSION is what every form has to hold.
fn complete(cache: &Path, name: &str) -> bool {
    cache.join(name).join("VERSION").is_file()
}

/// A path for people: relative to the repository where possible.
pub(crate) fn shown(path: &Path) -> String {
    path.strip_prefix(host::repo()).unwrap_or(path).display().to_string()
}

/// A folder for unfinished things, named after this process and removed with everything in it.
pub(crate) struct Work {
    cache: PathBuf,
    folder: PathBuf,
}

impl Work {
    pub(crate) fn new(cache: &Path) -> Result<Self> {
        let folder = cache.join(format!(".unfinished-{}", std::process::id()));
        fs::create_dir_all(&folder).doing("cannot create a folder under target/guests")?;
        Ok(Self { cache: cache.to_path_buf(), folder })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Moves a finished folder into the cache, in place of an incomplete one. Another process that finished first has
    /// made the same.
    pub(crate) fn finish(&self, ready: &Path, name: &str) -> Result<()> {
        let place = self.cache.join(name);
        if place.exists() && !complete(&self.cache, name) {
            fs::rename(&place, self.path(&format!("old-{name}"))).doing(format!("cannot replace {}", shown(&place)))?;
        }
        match fs::rename(ready, &place) {
            Err(_) if complete(&self.cache, name) => Ok(()),
            other => other.doing(format!("cannot move {name} into target/guests")),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What stays after a failure here is found and removed by the next run.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Removes what interrupted runs left, that is, unfinished folders whose process is gone.
fn remove_leftovers(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).doing("cannot read target/guests")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(".unfinished-") else { continue };
        if !Path::new("/proc").join(pid).exists() {
            fs::remove_dir_all(entry.path()).doing(format!("cannot remove {}", shown(&entry.path())))?;
        }
    }
    Ok(())
}

/// Fetches one kernel: the meta package names the versioned one, which holds the files.
fn fetch_kernel(apt: &Apt, work: &Work, series: &str) -> Result<()> {
    let meta = apt.newest("linux-image-cloud-amd64", &format!("{series}."))?;
    let image =
        meta.depends.iter().find(|name| name.starts_with("linux-image-")).ok_or_else(|| {
            Failure::new(format!("linux-image-cloud-amd64 {} depends on no kernel image", meta.version))
        })?;
    let package = apt.newest(image, &meta.version)?;
    eprintln!("  {} {}", package.name, package.version);
    let root = unpack(&apt.download(&package, &work.path("packages"))?, &work.path(&format!("root-{series}")))?;
    let ready = work.path(series);
    fs::create_dir_all(&ready).doing("cannot create a folder under target/guests")?;
    let release = package.name.trim_start_matches("linux-image-");
    for file in ["vmlinuz", "config", "System.map"] {
        let to = ready.join(file);
        fs::rename(root.join(format!("boot/{file}-{release}")), &to)
            .doing(format!("{} does not hold boot/{file}-{release}", package.name))?;
        // Readable for everybody: the tests run the hypervisor as another user.
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644)).doing("cannot set a file's permissions")?;
    }
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|folder| root.join(folder).join(release))
        .into_iter()
        .find(|folder| folder.exists())
        .ok_or_else(|| Failure::new(format!("{} holds no modules", package.name)))?;
    fs::rename(modules, ready.join("modules")).doing("cannot move the kernel's modules")?;
    fs::write(ready.join("VERSION"), format!("{}\n", package.version)).doing("cannot write VERSION")?;
    work.finish(&ready, series)
}

/// Fetches busybox for both architectures. Debian builds `busybox-static` for each.
fn fetch_busybox(apt: &Apt, work: &Work) -> Result<()> {
    let ready = work.path("busybox");
    fs::create_dir_all(&ready).doing("cannot create a folder under target/guests")?;
    for (name, package, program) in
        [("amd64", "busybox-static:amd64", "busybox"), ("i386", "busybox-static:i386", "busybox32")]
    {
        let package = apt.newest(package, "")?;
        eprintln!("  {} {} ({name})", package.name, package.version);
        fs::write(ready.join("VERSION"), format!("{}\n", package.version)).doing("cannot write VERSION")?;
        let root = unpack(
            &apt.download(&package, &work.path(&format!("packages-{name}")))?,
            &work.path(&format!("root-{name}")),
        )?;
        let from = ["bin/busybox", "usr/bin/busybox"]
            .map(|path| root.join(path))
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| Failure::new(format!("the {name} busybox-static package holds no busybox")))?;
        fs::rename(from, ready.join(program)).doing("cannot move busybox")?;
    }
    work.finish(&ready, "busybox")
}

/// Unpacks a package into a new folder.
fn unpack(package: &Path, into: &Path) -> Result<PathBuf> {
    fs::create_dir_all(into).doing("cannot create a folder under target/guests")?;
    host::output(Command::new("dpkg-deb").arg("-x").arg(package).arg(into))?;
    Ok(into.to_path_buf())
}

/// Builds the images and replaces those in the cache that differ, as they do when a guest script was edited.
fn build_images(folder: &Path) -> Result<()> {
    let read = |name: &str| fs::read(folder.join("busybox").join(name)).doing(format!("cannot read {name}"));
    let programs = Programs { busybox: read("busybox")?, busybox32: read("busybox32")? };
    for (name, purpose) in [("initramfs-shell.cpio", Purpose::Shell), ("initramfs-script.cpio", Purpose::Exercise)] {
        let image = initramfs::build(&programs, purpose);
        let place = folder.join(name);
        if fs::read(&place).is_ok_and(|old| old == image) {
            continue;
        }
        let unfinished = folder.join(format!(".{name}-{}", std::process::id()));
        fs::write(&unfinished, &image).doing(format!("cannot write {name}"))?;
        fs::rename(&unfinished, &place).doing(format!("cannot move {name} into place"))?;
    }
    Ok(())
}
