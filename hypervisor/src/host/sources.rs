//! Where facts about the host come from, in one place, so that tests can play other hosts.

use super::kvm::{self, KvmFacts};
use paravane_bt::Requirement;
use paravane_cpu::host_fpu::host_cpuid;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// CPUID: leaf and subleaf to EAX, EBX, ECX, EDX.
pub type Cpuid = Box<dyn Fn(u32, u32) -> [u32; 4] + Send + Sync>;

/// A look at a /dev/kvm, see [`Sources::kvm`].
pub type Look = Box<dyn Fn(&Path, bool) -> KvmFacts + Send + Sync>;

/// Resource limits of this process; `None` is "unlimited".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rlimits {
    /// RLIMIT_MEMLOCK, bytes.
    pub memlock: Option<u64>,
    /// RLIMIT_NOFILE.
    pub nofile: Option<u64>,
    /// RLIMIT_AS, bytes.
    pub address_space: Option<u64>,
}

/// The host, as far as Paravane looks at it.
pub struct Sources {
    /// What /dev, /etc, /proc and /sys are below.
    pub root: PathBuf,
    /// The CPU.
    pub cpuid: Cpuid,
    /// This process's limits.
    pub rlimits: Box<dyn Fn() -> Rlimits + Send + Sync>,
    /// Opens a /dev/kvm at this path and asks it; with `true` also measures, which takes some milliseconds.
    pub kvm: Look,
    /// What binary translation needs.
    pub bt: Box<dyn Fn() -> Vec<Requirement> + Send + Sync>,
}

impl Sources {
    /// This host.
    pub fn host() -> Self {
        Self {
            root: "/".into(),
            cpuid: Box::new(host_cpuid),
            rlimits: Box::new(rlimits),
            kvm: Box::new(kvm::look),
            bt: Box::new(paravane_bt::requirements),
        }
    }

    /// A file of the host, by its path below the root.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The text of a small file, trimmed; `None` when it cannot be read.
    pub fn text(&self, path: &str) -> Option<String> {
        read_small(&self.path(path)).map(|t| t.trim().to_owned())
    }

    /// A file that holds a number.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The bracketed word of a file such as `always [madvise] never`.
    pub fn chosen(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }

    /// The value after `key` in a file of "key: value" lines.
    pub fn field(&self, path: &str, key: &str) -> Option<String> {
        let text = self.text(path)?;
        text.lines().find_map(|l| {
            let (k, v) = l.split_once(':')?;
            (k.trim() == key).then(|| v.trim().to_owned())
        })
    }
}

/// A file's text, as far as 256 KiB.
pub(super) fn read_small(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(256 << 10).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn rlimits() -> Rlimits {
    let get = |resource| rlimit(resource).filter(|&n| n != libc::RLIM_INFINITY);
    Rlimits {
        memlock: get(libc::RLIMIT_MEMLOCK),
        nofile: get(libc::RLIMIT_NOFILE),
        address_space: get(libc::RLIMIT_AS),
    }
}

#[allow(unsafe_code)] // getrlimit has no safe form in the standard library
fn rlimit(resource: libc::__rlimit_resource_t) -> Option<u64> {
    let mut r = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes the structure that it is given.
    (unsafe { libc::getrlimit(resource, &mut r) } == 0).then_some(r.rlim_cur)
}
