//! What was measured, kept until the host boots again or anything that it depends on changes.
//!
//! A file of its own per user, below the XDG cache directory. Nothing depends on it: one that is missing, damaged, of another
//! host or not writable costs a measurement. Its content is believed only where it is plausible; all that it can bring about is
//! the choice of the other engine.

use super::speed::Speeds;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What a measurement depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// The kernel's random identifier of this boot.
    pub boot: String,
    /// Release of the kernel.
    pub kernel: String,
    /// The CPU's name.
    pub cpu: String,
    /// Paravane's version.
    pub version: String,
    /// KVM's modules: they can be replaced at run time.
    pub modules: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: Key,
    speeds: Speeds,
}

/// The cache file, if there is a place for it.
#[derive(Clone, Debug)]
pub struct Cache(Option<PathBuf>);

impl Cache {
    /// This user's, by the XDG base directory specification: below `$XDG_CACHE_HOME` if that is an absolute path, else below
    /// `$HOME/.cache`.
    pub fn user() -> Self {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Self(base.map(|b| b.join("paravane/host.json")))
    }

    /// One in a file of the caller's choice.
    pub fn at(path: &Path) -> Self {
        Self(Some(path.to_owned()))
    }

    /// None at all.
    pub fn none() -> Self {
        Self(None)
    }

    /// What was measured under the same conditions.
    pub fn get(&self, key: &Key) -> Option<Speeds> {
        // Without it another boot could not be told from this one.
        if key.boot.is_empty() {
            return None;
        }
        let text = super::sources::read_small(self.0.as_deref()?)?;
        let entry: Entry = serde_json::from_str(&text).ok()?;
        (entry.key == *key && entry.speeds.plausible()).then_some(entry.speeds)
    }

    /// Keeps a measurement, if possible. Readers see the old file or the new one, never a part.
    pub fn put(&self, key: &Key, speeds: &Speeds) {
        let Some(path) = &self.0 else { return };
        let entry = Entry { key: key.clone(), speeds: *speeds };
        let Ok(text) = serde_json::to_vec(&entry) else { return };
        if let Some(folder) = path.parent() {
            let _ = fs::create_dir_all(folder);
        }
        let new = path.with_extension(format!("{}.new", std::process::id()));
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut f| f.write_all(&text))
            .and_then(|()| fs::rename(&new, path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
    }
}
