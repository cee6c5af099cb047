//! Stock guest kernels and a static busybox, fetched as Debian packages.
//!
//! Nothing is downloaded by hand: apt does it, with a private state directory below `target/guests/apt`, so that an
//! ordinary user can run it and the machine's own package lists stay untouched. The sources are those the machine is
//! already configured with, with the suite name changed; `Signed-By` is kept, so every index and package is checked
//! against the same keyring as the machine's own packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Result, initramfs};

/// The release that the guests come from.
const RELEASE: &str = "bookworm";

/// Kernel versions that are fetched, with the suite that carries each.
pub(crate) const KERNELS: [(&str, &str); 2] = [("6.1", "bookworm"), ("6.12", "bookworm-backports")];

/// The files that one kernel consists of, by the prefix of their names in the package's `/boot`.
const KERNEL_FILES: [(&str, &str); 3] = [("vmlinuz-", "vmlinuz"), ("System.map-", "System.map"), ("config-", "config")];

/// The directory that holds every guest file of this checkout.
pub(crate) fn guests_dir() -> PathBuf {
    crate::repo_root().join("target/guests")
}

/// Fetches whatever is missing and returns the guest directory. Does nothing when all is there.
pub(crate) fn ensure() -> Result<PathBuf> {
    let dir = guests_dir();
    let missing_kernels: Vec<_> =
        KERNELS.iter().filter(|(v, _)| KERNEL_FILES.iter().any(|(_, f)| !dir.join(v).join(f).is_file())).collect();
    let missing_busybox: Vec<_> =
        ["amd64", "i386"].into_iter().filter(|a| !dir.join(format!("busybox-{a}")).is_file()).collect();
    if !(missing_kernels.is_empty() && missing_busybox.is_empty()) {
        fs::create_dir_all(&dir).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
        let apt = Apt::prepare(&dir)?;
        for (version, suite) in missing_kernels {
            fetch_kernel(&apt, &dir, version, suite)?;
        }
        for arch in missing_busybox {
            fetch_busybox(&apt, &dir, arch)?;
        }
    }
    initramfs::write_all(&dir)?;
    Ok(dir)
}

/// apt with a private state below the guest directory.
struct Apt {
    dir: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// Writes the private sources list and fetches the indices.
    fn prepare(guests: &Path) -> Result<Self> {
        for (tool, package) in [("apt-get", "apt"), ("apt-cache", "apt"), ("dpkg-deb", "dpkg")] {
            if Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
                return Err(format!("{tool} is missing: install the Debian package {package}"));
            }
        }
        let dir = guests.join("apt");
        for sub in ["state/lists/partial", "cache/archives/partial", "etc/parts", "download"] {
            fs::create_dir_all(dir.join(sub)).map_err(|e| format!("cannot create {}: {e}", dir.display()))?;
        }
        let sources = derive_sources(&read_machine_sources());
        if sources.is_empty() {
            return Err("no Debian mirror is configured: add one to /etc/apt/sources.list and run this again".into());
        }
        let list = dir.join("etc/guests.list");
        fs::write(&list, sources.join("\n") + "\n").map_err(|e| format!("cannot write {}: {e}", list.display()))?;
        let status = dir.join("state/status");
        fs::write(&status, "").map_err(|e| format!("cannot write {}: {e}", status.display()))?;
        let at = |sub: &str| dir.join(sub).display().to_string();
        let mut settings = vec![
            format!("Dir::State={}", at("state")),
            format!("Dir::State::lists={}", at("state/lists")),
            format!("Dir::State::status={}", status.display()),
            format!("Dir::Cache={}", at("cache")),
            format!("Dir::Etc::sourcelist={}", list.display()),
            format!("Dir::Etc::sourceparts={}", at("etc/parts")),
            "APT::Architecture=amd64".into(),
            "APT::Architectures::=amd64".into(),
            "APT::Architectures::=i386".into(),
            "Acquire::Languages=none".into(),
            "Debug::NoLocking=1".into(),
        ];
        if crate::is_root() {
            // apt would otherwise drop to a user that may not be able to enter the checkout.
            settings.push("APT::Sandbox::User=root".into());
        }
        let apt = Apt { dir, options: settings.into_iter().flat_map(|s| ["-o".to_string(), s]).collect() };
        println!("guests: fetching package lists of {RELEASE}");
        // An archive that cannot be fetched or verified is left out as a whole; whether the others suffice shows when
        // a package is asked for, and apt refuses packages that no verified index lists.
        if let Err(why) = apt.run("apt-get", &["-q", "update"]) {
            println!("guests: continuing without one archive: {why}");
        }
        Ok(apt)
    }

    /// Runs one apt tool in the download directory and returns what it printed.
    fn run(&self, tool: &str, args: &[&str]) -> Result<String> {
        let out = Command::new(tool)
            .args(&self.options)
            .args(args)
            .current_dir(self.dir.join("download"))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .output()
            .map_err(|e| format!("cannot run {tool}: {e}"))?;
        let errors = String::from_utf8_lossy(&out.stderr);
        if !out.status.success() || errors.lines().any(|l| l.starts_with("E:")) {
            let line = errors.lines().find(|l| l.starts_with("E:")).unwrap_or("no reason given");
            return Err(format!("{tool} {} failed ({line}): check the network and the mirror", args.join(" ")));
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Downloads one package and unpacks it into a fresh directory, which is returned.
    fn unpack(&self, package: &str) -> Result<PathBuf> {
        println!("guests: fetching {package}");
        let download = self.dir.join("download");
        let _ = fs::remove_dir_all(&download);
        let tree = download.join("tree");
        fs::create_dir_all(&tree).map_err(|e| format!("cannot create {}: {e}", tree.display()))?;
        self.run("apt-get", &["-q", "download", package])?;
        let deb = fs::read_dir(&download)
            .map_err(|e| format!("cannot read {}: {e}", download.display()))?
            .flatten()
            .map(|e| e.path())
            .find(|p| p.extension().is_some_and(|e| e == "deb"))
            .ok_or_else(|| format!("apt-get downloaded no file for {package}"))?;
        let status = Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree).status();
        if !status.is_ok_and(|s| s.success()) {
            return Err(format!("dpkg-deb cannot unpack {}: delete target/guests and try again", deb.display()));
        }
        Ok(tree)
    }
}

/// The text of every sources file of the machine, with whether it is in the deb822 format.
fn read_machine_sources() -> Vec<(bool, String)> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|e| e.path()));
    }
    files.sort();
    files
        .iter()
        .filter_map(|f| Some((f.extension().is_some_and(|e| e == "sources"), fs::read_to_string(f).ok()?)))
        .collect()
}

/// One-line sources for the guests' release, derived from the Debian entries among `files`.
fn derive_sources(files: &[(bool, String)]) -> Vec<String> {
    let mut out = Vec::new();
    for (deb822, text) in files {
        let entries = if *deb822 { parse_deb822(text) } else { text.lines().filter_map(parse_line).collect() };
        for entry in entries {
            let Some(kind) = entry.suites.iter().find_map(|s| debian_suite(s)) else { continue };
            if !entry.components.iter().any(|c| c == "main") {
                continue;
            }
            // The only i386 package is busybox, which the main archive has.
            let (arches, suites): (&str, &[&str]) = match kind {
                SuiteKind::Security => ("amd64", &["-security"]),
                SuiteKind::Main => ("amd64,i386", &["", "-updates", "-backports"]),
            };
            let signed = entry.signed_by.as_ref().map_or(String::new(), |k| format!(" signed-by={k}"));
            for uri in &entry.uris {
                for suffix in suites {
                    let line = format!("deb [arch={arches}{signed}] {uri} {RELEASE}{suffix} main");
                    if !out.contains(&line) {
                        out.push(line);
                    }
                }
            }
        }
    }
    out
}

/// What one configured source offers.
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SuiteKind {
    Main,
    Security,
}

/// Whether `suite` names a Debian release, and which archive it lives in.
fn debian_suite(suite: &str) -> Option<SuiteKind> {
    let (release, rest) = suite.split_once(['-', '/']).unwrap_or((suite, ""));
    let known = ["bullseye", "bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"];
    match rest {
        _ if !known.contains(&release) => None,
        "security" => Some(SuiteKind::Security),
        "" | "updates" | "backports" => Some(SuiteKind::Main),
        _ => None,
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// One `deb [options] uri suite component...` line.
fn parse_line(line: &str) -> Option<Source> {
    let rest = line.split('#').next()?.trim().strip_prefix("deb ")?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(r) => r.split_once(']')?,
        None => ("", rest),
    };
    let mut fields = words(rest).into_iter();
    let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by=")).map(str::to_owned);
    Some(Source { uris: vec![fields.next()?], suites: vec![fields.next()?], components: fields.collect(), signed_by })
}

/// The stanzas of a deb822 file that are enabled and offer binary packages.
fn parse_deb822(text: &str) -> Vec<Source> {
    let body: String = text.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{}\n", l.trim_end())).collect();
    body.split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| {
                stanza.lines().find_map(|l| {
                    let (key, value) = l.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
                })
            };
            let enabled = field("Enabled").is_none_or(|v| v != "no");
            (enabled && words(&field("Types")?).iter().any(|t| t == "deb")).then_some(())?;
            Some(Source {
                uris: words(&field("URIs")?),
                suites: words(&field("Suites")?),
                components: words(&field("Components")?),
                signed_by: field("Signed-By").filter(|k| k.starts_with('/')),
            })
        })
        .collect()
}

/// Fetches the kernel image that the cloud metapackage of `suite` depends on.
fn fetch_kernel(apt: &Apt, guests: &Path, version: &str, suite: &str) -> Result<()> {
    let shown = apt.run("apt-cache", &["show", "linux-image-cloud-amd64"])?;
    let prefix = format!("linux-image-{version}.");
    let image = shown
        .lines()
        .filter_map(|l| l.strip_prefix("Depends: "))
        .flat_map(|d| d.split([',', ' ']))
        .find(|p| p.starts_with(&prefix))
        .ok_or_else(|| format!("the mirror has no {version} cloud kernel in {suite}: use a full Debian mirror"))?;
    let boot = apt.unpack(image)?.join("boot");
    let made = apt.dir.join("download").join(version);
    fs::create_dir_all(&made).map_err(|e| format!("cannot create {}: {e}", made.display()))?;
    for (prefix, name) in KERNEL_FILES {
        let file = find_prefixed(&boot, prefix).ok_or_else(|| format!("the package {image} has no {prefix} file"))?;
        fs::copy(&file, made.join(name)).map_err(|e| format!("cannot copy {}: {e}", file.display()))?;
    }
    let target = guests.join(version);
    let _ = fs::remove_dir_all(&target);
    fs::rename(&made, &target).map_err(|e| format!("cannot create {}: {e}", target.display()))
}

fn find_prefixed(dir: &Path, prefix: &str) -> Option<PathBuf> {
    let mut found = fs::read_dir(dir).ok()?.flatten().map(|e| e.path());
    found.find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
}

/// Fetches the static busybox of one architecture.
fn fetch_busybox(apt: &Apt, guests: &Path, arch: &str) -> Result<()> {
    let tree = apt.unpack(&format!("busybox-static:{arch}"))?;
    let file = ["bin/busybox", "usr/bin/busybox"]
        .into_iter()
        .map(|p| tree.join(p))
        .find(|p| p.is_file())
        .ok_or_else(|| format!("the package busybox-static:{arch} has no busybox"))?;
    let target = guests.join(format!("busybox-{arch}"));
    fs::rename(&file, &target).map_err(|e| format!("cannot create {}: {e}", target.display()))
}
