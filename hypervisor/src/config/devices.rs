//! The virtio devices that a user can ask for. The same types are read from `--disk ...` and the like, and from a
//! configuration file.

use std::path::PathBuf;

use serde::Deserialize;

use super::SerialConfig;
use super::options::{flag, number, optional_size, size, texts};

/// How a guest reaches a device.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// As a PCI function with MSI-X.
    #[default]
    Pci,
    /// By registers in memory, described in the DSDT.
    Mmio,
    /// By hypercalls, doorbell bits and event bits of the paravirtual ABI, for guests that speak it.
    Pv,
}

/// What a disk's file contains.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

/// A disk.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default, deserialize_with = "flag")]
    pub readonly: bool,
    /// What the file contains; raw unless said otherwise, for a guest could write a header of another format into a raw disk.
    pub format: Option<DiskFormat>,
    /// Serial number that the guest reads, up to 20 bytes.
    pub serial: Option<String>,
    /// Number of request queues.
    #[serde(default = "one", deserialize_with = "number")]
    pub queues: u16,
    /// Whether the backing file that a qcow2 image names may be opened; only for images that are trusted.
    #[serde(default, deserialize_with = "flag")]
    pub backing: bool,
    /// Whether to go past the host's page cache.
    #[serde(default, deserialize_with = "flag")]
    pub direct: bool,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

/// What is at the other end of a network card.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum NetMode {
    /// A network of its own inside the hypervisor, which needs no privileges.
    #[default]
    User,
    /// A TAP device of the host.
    Tap,
    /// A passt process, through its socket.
    Passt,
}

/// A network card: `user`, `tap=NAME` or `passt=SOCKET`, and more.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// What is at the other end; left out, the other options tell.
    #[serde(default)]
    pub mode: Option<NetMode>,
    /// Name of the TAP device.
    pub tap: Option<String>,
    /// Path of passt's socket.
    pub passt: Option<PathBuf>,
    /// Forwarded ports, each `tcp:ADDRESS:PORT-[ADDRESS]:PORT`.
    #[serde(default, deserialize_with = "texts")]
    pub hostfwd: Vec<String>,
    /// Whether the guest is kept from reaching anything outside; forwarded ports still lead in.
    #[serde(default, deserialize_with = "flag")]
    pub restrict: bool,
    /// The guest's hardware address.
    pub mac: Option<String>,
    /// Number of pairs of queues.
    #[serde(default = "one", deserialize_with = "number")]
    pub queues: u16,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

/// The entropy device.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where the bytes come from.
    #[serde(default = "urandom")]
    pub src: PathBuf,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

fn urandom() -> PathBuf {
    "/dev/urandom".into()
}

/// The memory balloon.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory that the guest is to give back, in bytes.
    #[serde(deserialize_with = "size")]
    pub size: u64,
    /// Whether the guest may take it back when it runs out of memory.
    #[serde(default = "yes", deserialize_with = "flag")]
    pub deflate_on_oom: bool,
    /// Whether the guest reports pages that it does not use.
    #[serde(default = "yes", deserialize_with = "flag")]
    pub free_page_reporting: bool,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

/// Sockets between host and guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID, from 3 up.
    #[serde(deserialize_with = "number")]
    pub cid: u32,
    /// Unix socket: the host connects to it to reach the guest, and listens at `SOCKET_PORT` to be reached.
    pub socket: PathBuf,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

/// A folder of the host that the guest mounts (`mount -t virtiofs TAG /mnt`).
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The name by which the guest mounts it, up to 36 bytes.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default, deserialize_with = "flag")]
    pub readonly: bool,
    /// Number of request queues; kernels before 6.11 use one.
    #[serde(default = "one", deserialize_with = "number")]
    pub queues: u16,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

/// Where a virtio console goes.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// `stdio`, `null` or `file=PATH`.
    #[serde(default)]
    pub mode: ConsoleMode,
    /// The file, for output only.
    pub file: Option<PathBuf>,
    /// How the guest reaches it.
    #[serde(default)]
    pub transport: TransportKind,
}

impl ConsoleConfig {
    /// Where it goes, as for the serial port.
    pub fn to(&self) -> SerialConfig {
        match (&self.file, self.mode) {
            (Some(path), _) => SerialConfig::File(path.clone()),
            (None, ConsoleMode::Stdio) => SerialConfig::Stdio,
            (None, ConsoleMode::Null) => SerialConfig::Null,
        }
    }
}

/// See [`ConsoleConfig`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleMode {
    /// This terminal, or whatever standard input and output are; the serial port must be elsewhere.
    #[default]
    Stdio,
    /// Nowhere.
    Null,
}

/// All devices of a machine beside the chipset's.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DevicesConfig {
    /// Disks, in the guest's order.
    #[serde(default)]
    pub disk: Vec<DiskConfig>,
    /// Network cards.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// Entropy.
    pub rng: Option<RngConfig>,
    /// Balloon.
    pub balloon: Option<BalloonConfig>,
    /// Sockets.
    pub vsock: Option<VsockConfig>,
    /// Shared folders.
    #[serde(default)]
    pub fs: Vec<FsConfig>,
    /// Console.
    pub console: Option<ConsoleConfig>,
}

/// A configuration file: what the command line can say, under the same names.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// `--kernel`.
    pub kernel: Option<PathBuf>,
    /// `--initrd`.
    pub initrd: Option<PathBuf>,
    /// `--cmdline`.
    pub cmdline: Option<String>,
    /// `--memory`.
    #[serde(default, deserialize_with = "optional_size")]
    pub memory: Option<u64>,
    /// `--cpus`.
    pub cpus: Option<u32>,
    /// `--engine`.
    pub engine: Option<String>,
    /// `--serial`.
    pub serial: Option<String>,
    /// `--control`.
    pub control: Option<PathBuf>,
    /// `--disk`, repeatable.
    #[serde(default)]
    pub disk: Vec<DiskConfig>,
    /// `--net`, repeatable.
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// `--rng`.
    pub rng: Option<RngConfig>,
    /// `--balloon`.
    pub balloon: Option<BalloonConfig>,
    /// `--vsock`.
    pub vsock: Option<VsockConfig>,
    /// `--fs`, repeatable.
    #[serde(default)]
    pub fs: Vec<FsConfig>,
    /// `--console`.
    pub console: Option<ConsoleConfig>,
}

impl FileConfig {
    /// Reads a file's text: JSON if its name ends so, else TOML.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        if name.ends_with(".json") {
            serde_json::from_str(text)
                .map_err(|e| format!("line {}: {}", e.line(), super::options::explain(&e.to_string())))
        } else {
            toml::from_str(text).map_err(|e| {
                let line = e.span().map_or(1, |s| 1 + text[..s.start.min(text.len())].matches('\n').count());
                format!("line {line}: {}", super::options::explain(e.message()))
            })
        }
    }

    /// The devices in it.
    pub fn devices(&self) -> DevicesConfig {
        DevicesConfig {
            disk: self.disk.clone(),
            net: self.net.clone(),
            rng: self.rng.clone(),
            balloon: self.balloon.clone(),
            vsock: self.vsock.clone(),
            fs: self.fs.clone(),
            console: self.console.clone(),
        }
    }
}

impl DevicesConfig {
    /// How many devices are reached by the paravirtual ABI.
    pub fn on_pv(&self) -> u32 {
        let lists = self.disk.iter().map(|d| d.transport).chain(self.net.iter().map(|d| d.transport));
        let lists = lists.chain(self.fs.iter().map(|d| d.transport));
        let singles = [
            self.rng.as_ref().map(|d| d.transport),
            self.balloon.as_ref().map(|d| d.transport),
            self.vsock.as_ref().map(|d| d.transport),
            self.console.as_ref().map(|d| d.transport),
        ];
        let all = lists.chain(singles.into_iter().flatten());
        all.filter(|&t| t == TransportKind::Pv).count() as u32
    }

    /// Adds the command line's devices to a file's: lists grow, single ones are replaced.
    pub fn merge(mut self, over: Self) -> Self {
        self.disk.extend(over.disk);
        self.net.extend(over.net);
        self.fs.extend(over.fs);
        Self {
            rng: over.rng.or(self.rng),
            balloon: over.balloon.or(self.balloon),
            vsock: over.vsock.or(self.vsock),
            console: over.console.or(self.console),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::options::parse;

    #[test]
    fn options_and_files_say_the_same() {
        let disk: DiskConfig =
            parse("--disk", None, "path=a.img,readonly=on,format=qcow2,serial=0017,queues=4").unwrap();
        let toml = "memory = \"1G\"\n[[disk]]\npath = \"a.img\"\nreadonly = true\nformat = \"qcow2\"\nserial = \"0017\"\nqueues = 4\n";
        let json = r#"{"memory": 1073741824, "disk": [{"path": "a.img", "readonly": true, "format": "qcow2", "serial": "0017", "queues": "4"}]}"#;
        for (name, text) in [("c.toml", toml), ("c.json", json)] {
            let file = FileConfig::parse(name, text).unwrap();
            assert_eq!((file.memory, &file.disk), (Some(1 << 30), &vec![disk.clone()]), "{name}");
        }
        let net: NetConfig = parse("--net", Some("mode"), "user,hostfwd=tcp:127.0.0.1:2222-:22").unwrap();
        assert_eq!((net.mode, net.hostfwd.len()), (Some(NetMode::User), 1));
        let net: NetConfig = parse("--net", Some("mode"), "tap=tap0,queues=2").unwrap();
        assert_eq!((net.tap.as_deref(), net.queues), (Some("tap0"), 2));
    }

    #[test]
    fn shared_folders_are_said_on_the_command_line_and_in_files() {
        let fs: FsConfig = parse("--fs", None, "tag=work,path=/srv/work,readonly=on").unwrap();
        let file =
            FileConfig::parse("c.toml", "[[fs]]\ntag = \"work\"\npath = \"/srv/work\"\nreadonly = true\n").unwrap();
        assert_eq!((fs.readonly, fs.queues, file.devices().fs), (true, 1, vec![fs.clone()]));
        let pv = parse("--fs", None, "tag=b,path=b,transport=pv").unwrap();
        let all = file.devices().merge(DevicesConfig { fs: vec![pv], ..DevicesConfig::default() });
        assert_eq!((all.fs.len(), all.on_pv()), (2, 1));
        assert!(parse::<FsConfig>("--fs", None, "tag=work").is_err(), "a folder has to be named");
    }

    #[test]
    fn files_are_told_what_is_wrong_and_where() {
        let e = FileConfig::parse("c.toml", "kernel = \"k\"\n\n[[disks]]\npath = \"a\"\n").unwrap_err();
        assert!(e.contains("line 3") && e.contains("did you mean \"disk\"?"), "{e}");
        let e = FileConfig::parse("c.json", "{\n\"kernle\": \"k\"}").unwrap_err();
        assert!(e.contains("line 2") && e.contains("did you mean \"kernel\"?"), "{e}");
        let e = FileConfig::parse("c.toml", "[[disk]]\nreadonly = true\n").unwrap_err();
        assert!(e.contains("\"path\" is missing"), "{e}");
        assert!(FileConfig::parse("c.toml", "[balloon]\nsize = 3").unwrap_err().contains("memory size"));
    }

    #[test]
    fn the_command_line_adds_and_replaces() {
        let file = FileConfig::parse("c.toml", "[[disk]]\npath = \"a\"\n[rng]\nsrc = \"x\"\n").unwrap();
        let disk = parse("--disk", None, "path=b").unwrap();
        let rng = parse("--rng", Some("src"), "").unwrap();
        let over = DevicesConfig { disk: vec![disk], rng: Some(rng), ..DevicesConfig::default() };
        let all = file.devices().merge(over);
        assert_eq!(all.disk.iter().map(|d| d.path.to_str().unwrap()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(all.rng.unwrap().src.to_str(), Some("/dev/urandom"));
    }
}
