//! A private apt: the machine's own mirror and keys, other suites and architectures, nothing of the system changed.
//!
//! apt keeps its sources, package lists, package database and downloads wherever its options say. All of them are put
//! below one folder here, so that no root rights are needed and the machine's apt never notices. The mirror comes from
//! the machine's configuration, with `Signed-By` kept, so signatures are checked with the same keys; without it apt's
//! default keyring applies, which stays in place.

use crate::host::{self, Doing, Failure, Result};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Releases of Debian by which a Debian mirror is told from other repositories.
const DEBIAN_SUITES: [&str; 10] =
    ["bullseye", "bookworm", "trixie", "forky", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable"];

/// One repository of the machine's configuration, as far as it matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Source {
    uris: String,
    suites: Vec<String>,
    components: Vec<String>,
    /// The value as written; an embedded key keeps its lines.
    signed_by: Option<String>,
}

impl Source {
    fn is_debian(&self) -> bool {
        self.components.iter().any(|c| c == "main") && self.suites.iter().any(|s| DEBIAN_SUITES.contains(&s.as_str()))
    }
}

/// A private apt state below one folder.
pub(crate) struct Apt {
    root: PathBuf,
}

impl Apt {
    /// Prepares the state and fetches the package lists of `suites`, for amd64 and i386.
    ///
    /// # Errors
    /// apt-get is missing, the machine has no Debian mirror configured, or the mirror cannot be reached.
    pub(crate) fn new(root: PathBuf, suites: &[&str]) -> Result<Self> {
        host::need_tool("apt-get", "apt", "fetch stock Debian kernels")?;
        let source = machine_source()?;
        for folder in ["sources", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(folder)).doing("cannot create a folder for apt under target")?;
        }
        let file = root.join("sources/guests.sources");
        fs::write(&file, stanza(&source, suites)).doing("cannot write apt's source list under target")?;
        fs::write(root.join("status"), "").doing("cannot write apt's package database under target")?;
        fs::write(root.join("apt.conf"), configuration(&root))
            .doing("cannot write apt's configuration under target")?;
        let apt = Self { root };
        host::output(apt.tool("apt-get").args(["update", "--error-on=any"])).map_err(|failure| {
            Failure::new(format!("cannot read the Debian mirror's package lists (is the network up?): {failure}"))
        })?;
        Ok(apt)
    }

    /// A tool of the apt family that sees only this state.
    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").current_dir(self.root.join("cache"));
        command.arg("-c").arg(self.root.join("apt.conf"));
        command
    }

    /// The newest version of `package` whose version starts with `prefix`, with its dependencies' names.
    ///
    /// # Errors
    /// The mirror has no such version.
    pub(crate) fn newest(&self, package: &str, prefix: &str) -> Result<Package> {
        let text = host::output(self.tool("apt-cache").args(["show", package]))?;
        // apt-cache prints versions from new to old.
        text.split("\n\n")
            .filter_map(Package::parse)
            .find(|found| found.version.starts_with(prefix))
            .ok_or_else(|| Failure::new(format!("the Debian mirror has no {package} of version {prefix}*")))
    }

    /// Downloads one package, checked against the signed lists, and returns the file.
    ///
    /// # Errors
    /// The download failed or did not match.
    pub(crate) fn download(&self, package: &Package, into: &Path) -> Result<PathBuf> {
        fs::create_dir_all(into).doing("cannot create a download folder under target")?;
        let what = format!("{}:{}={}", package.name, package.architecture, package.version);
        host::output(self.tool("apt-get").current_dir(into).args(["download", "--quiet"]).arg(&what))
            .map_err(|failure| Failure::new(format!("cannot download {}: {failure}", package.name)))?;
        let start = format!("{}_", package.name);
        let entries = fs::read_dir(into).doing("cannot read the download folder")?;
        entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start)))
            .ok_or_else(|| Failure::new(format!("apt-get downloaded nothing for {what}")))
    }
}

/// The configuration, read after the machine's own, of which proxies and the like stay in force.
fn configuration(root: &Path) -> String {
    let mut text = String::new();
    // Hooks of the machine would act on the machine.
    for list in ["APT::Architectures", "APT::Update::Pre-Invoke", "APT::Update::Post-Invoke"] {
        let _ = writeln!(text, "#clear {list};");
    }
    text.push_str("#clear APT::Update::Post-Invoke-Success;\n");
    text.push_str("APT::Architecture \"amd64\";\nAPT::Architectures { \"amd64\"; \"i386\"; };\n");
    let places = [
        ("Dir::Etc::SourceParts", "sources"),
        ("Dir::State", ""),
        ("Dir::State::Lists", "lists"),
        ("Dir::State::status", "status"),
        ("Dir::Cache", "cache"),
    ];
    for (name, place) in places {
        let _ = writeln!(text, "{name} \"{}\";", root.join(place).display());
    }
    for name in ["SourceList", "Preferences", "PreferencesParts"] {
        let _ = writeln!(text, "Dir::Etc::{name} \"/dev/null\";");
    }
    // apt would download as its own user, who need not be able to reach target/.
    text.push_str("APT::Sandbox::User \"\";\nAcquire::Languages \"none\";\nAcquire::Retries \"3\";\n");
    text
}

/// A package version that the mirror offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
    pub(crate) depends: Vec<String>,
}

impl Package {
    /// Reads a record of `apt-cache show`.
    fn parse(record: &str) -> Option<Self> {
        let field = |name: &str| {
            record
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(|value| value.trim().to_owned())
        };
        let depends = field("Depends").unwrap_or_default();
        let depends =
            depends.split([',', '|']).filter_map(|one| one.split_whitespace().next()).map(str::to_owned).collect();
        Some(Self {
            name: field("Package")?,
            version: field("Version")?,
            architecture: field("Architecture")?,
            depends,
        })
    }
}

/// The first Debian repository in the machine's apt configuration.
fn machine_source() -> Result<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let sources = match file.extension().and_then(|e| e.to_str()) {
            Some("list") => parse_lines(&text),
            Some("sources") => parse_stanzas(&text),
            _ => continue,
        };
        if let Some(source) = sources.into_iter().find(Source::is_debian) {
            return Ok(source);
        }
    }
    Err(Failure::new(
        "no Debian mirror is configured in /etc/apt/sources.list or sources.list.d; add one (with its Signed-By key) so \
         that stock kernels can be fetched from it",
    ))
}

/// Reads the one-line form: `deb [option=value ...] uri suite component...`.
fn parse_lines(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let Some(mut rest) = line.trim().strip_prefix("deb ").map(str::trim) else { continue };
        let mut source = Source::default();
        if let Some((options, after)) = rest.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            source.signed_by =
                options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
            rest = after.trim();
        }
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        source.uris = uri;
        source.suites = vec![suite];
        source.components = words.collect();
        sources.push(source);
    }
    sources
}

/// Reads the stanza form (deb822): `Field: value` lines, continued by lines that start with a blank.
fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for stanza in text.split("\n\n") {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines().filter(|line| !line.starts_with('#')) {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line);
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let field = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        let words = |name: &str| -> Vec<String> {
            field(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        if !words("types").iter().any(|t| t == "deb") || field("enabled").is_some_and(|e| e == "no") {
            continue;
        }
        sources.push(Source {
            uris: words("uris").join(" "),
            suites: words("suites"),
            components: words("components"),
            signed_by: field("signed-by"),
        });
    }
    sources
}

/// A source list with the machine's mirror and keys for other suites, for a tool that keeps its own apt state.
///
/// # Errors
/// The machine has no Debian mirror configured.
pub(crate) fn machine_stanza(suites: &[&str]) -> Result<String> {
    Ok(stanza(&machine_source()?, suites))
}

/// The private source list: the machine's mirror with other suites.
fn stanza(source: &Source, suites: &[&str]) -> String {
    let mut text = format!("Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n", source.uris, suites.join(" "));
    if let Some(key) = &source.signed_by {
        let _ = writeln!(text, "Signed-By: {key}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_source_lists_keep_mirror_and_key() {
        let lines = "# deb http://old/debian bookworm main\n\
                     deb-src http://mirror/debian bookworm main\n\
                     deb [arch=amd64 signed-by=/keys/a.gpg] http://mirror/debian bookworm main contrib # note\n";
        let sources = parse_lines(lines);
        assert_eq!(sources.len(), 1);
        assert!(sources[0].is_debian());
        assert_eq!(sources[0].signed_by.as_deref(), Some("/keys/a.gpg"));
        let stanzas = "Types: deb\nURIs: http://other/apt\nSuites: stable-tools\nComponents: main\n\n\
                       Enabled: no\nTypes: deb\nURIs: http://off/debian\nSuites: bookworm\nComponents: main\n\n\
                       Types: deb deb-src\n# why\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
                       Components: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let sources = parse_stanzas(stanzas);
        let debian = sources.iter().find(|source| source.is_debian()).expect("the last one");
        assert_eq!(debian.uris, "http://mirror/debian");
        let text = stanza(debian, &["bookworm-backports"]);
        assert!(text.contains("Suites: bookworm-backports\n"), "{text}");
        assert!(text.contains("Signed-By: \n -----BEGIN\n .\n abc\n"), "{text}");
    }

    #[test]
    fn package_records_name_their_dependencies() {
        let record = "Package: linux-image-cloud-amd64\nArchitecture: amd64\nVersion: 6.1.1-1\n\
                      Depends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1), other | third";
        let package = Package::parse(record).expect("complete");
        assert_eq!(package.depends, ["linux-image-6.1.0-1-cloud-amd64", "other", "third"]);
        assert_eq!(package.version, "6.1.1-1");
        assert_eq!(Package::parse("Package: x"), None);
    }
}
