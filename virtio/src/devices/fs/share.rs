//! The shared folder on the host: which of its files the guest knows and has open, and how they are reached.
//!
//! A guest names a file by a number that it got for a name in a folder that it already knew; it never sends a path. Behind every
//! number is a descriptor (O_PATH) of exactly that file, got with openat2(2) from the descriptor of its folder and one
//! checked name, without following symbolic links (RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS). Symbolic links are read by the guest, and
//! followed by the guest, among the guest's own files. So there is no way out: not by "..", not by absolute paths, not by
//! links, and not by replacing a folder with a link in the middle of something.
//!
//! What is opened for reading or writing is opened through the descriptor (`/proc/self/fd`), after its type was seen: only regular files
//! and folders. Devices, pipes and sockets that the folder may hold are never opened.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::fs::{self, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::devices::lock;

/// The number of the shared folder itself (FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;
/// Most files that a guest may know and have open together, whatever the host would allow.
const MOST: u64 = 1 << 19;
/// Descriptors that are left to everything else in the process.
const SPARE: u64 = 512;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// A file that the guest knows.
pub(super) struct Node {
    fd: OwnedFd,
    pub(super) kind: FileType,
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Node {
    pub(super) fn stat(&self) -> Result<Stat, Errno> {
        fs::fstat(&self.fd)
    }
}

/// A file that the guest has open.
pub(super) struct Open {
    pub(super) fd: OwnedFd,
    /// Held while a folder is read, for that moves the descriptor's position.
    pub(super) reading: Mutex<()>,
}

struct Known {
    node: Arc<Node>,
    key: (u64, u64),
    /// How often the guest was given the number, less what it has given back.
    count: u64,
}

#[derive(Default)]
struct Tables {
    nodes: HashMap<u64, Known>,
    /// Numbers by device and inode: one file has one number, whatever its names.
    numbers: HashMap<(u64, u64), u64>,
    opens: HashMap<u64, Arc<Open>>,
    last: u64,
}

/// A folder of the host that a guest may use.
pub(super) struct Share {
    root: Arc<Node>,
    /// `/proc/self/fd`.
    own: OwnedFd,
    tables: Mutex<Tables>,
    most: usize,
}

impl Share {
    /// Opens a folder.
    ///
    /// # Errors
    /// It is none, cannot be read, or the host has no `/proc`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = Node { fd: fs::open(path, folder, Mode::empty())?, kind: FileType::Directory };
        // Whether openat2 works here is better known now.
        fs::openat2(&root.fd, c".", folder, Mode::empty(), BENEATH)?;
        let own = fs::open("/proc/self/fd", folder, Mode::empty())?;
        let most = raise_limit().saturating_sub(SPARE).clamp(64, MOST) as usize;
        let share = Self { root: Arc::new(root), own, tables: Mutex::default(), most };
        share.forget_all();
        Ok(share)
    }

    /// Forgets all numbers but the folder's own, and closes everything.
    pub(super) fn forget_all(&self) {
        let mut old = Tables { last: ROOT, ..Tables::default() };
        std::mem::swap(&mut *lock(&self.tables), &mut old);
    }

    /// The file behind a number.
    pub(super) fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        if number == ROOT {
            return Ok(self.root.clone());
        }
        lock(&self.tables).nodes.get(&number).map(|known| known.node.clone()).ok_or(Errno::STALE)
    }

    /// The file behind a handle.
    pub(super) fn handle(&self, handle: u64) -> Result<Arc<Open>, Errno> {
        lock(&self.tables).opens.get(&handle).cloned().ok_or(Errno::BADF)
    }

    /// Looks a name up in a folder; gives the file's number, which the guest then knows once more.
    pub(super) fn look_up(&self, folder: &Node, name: &CStr) -> Result<(u64, Stat), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.learn(fs::openat2(folder, name, flags, Mode::empty(), BENEATH)?)
    }

    /// Gives a number to the file behind a descriptor (O_PATH).
    fn learn(&self, fd: OwnedFd) -> Result<(u64, Stat), Errno> {
        let stat = fs::fstat(&fd)?;
        let key = (stat.st_dev, stat.st_ino);
        if fs::fstat(&self.root).is_ok_and(|root| key == (root.st_dev, root.st_ino)) {
            return Ok((ROOT, stat));
        }
        let mut tables = lock(&self.tables);
        let tables = &mut *tables;
        // An inode that is known is held by its descriptor, so its number cannot have passed to another file.
        if let Some(number) = tables.numbers.get(&key)
            && let Some(known) = tables.nodes.get_mut(number)
        {
            known.count = known.count.saturating_add(1);
            return Ok((*number, stat));
        }
        tables.room(self.most)?;
        let number = tables.next();
        let node = Arc::new(Node { fd, kind: FileType::from_raw_mode(stat.st_mode) });
        tables.nodes.insert(number, Known { node, key, count: 1 });
        tables.numbers.insert(key, number);
        Ok((number, stat))
    }

    /// The guest gives a number back, as often as it says.
    pub(super) fn forget(&self, number: u64, times: u64) {
        let mut tables = lock(&self.tables);
        let Some(known) = tables.nodes.get_mut(&number) else { return };
        known.count = known.count.saturating_sub(times);
        if known.count == 0 {
            let key = known.key;
            tables.nodes.remove(&number);
            tables.numbers.remove(&key);
        }
    }

    /// Keeps an open file; gives its handle.
    pub(super) fn keep(&self, fd: OwnedFd) -> Result<u64, Errno> {
        let mut tables = lock(&self.tables);
        tables.room(self.most)?;
        let handle = tables.next();
        tables.opens.insert(handle, Arc::new(Open { fd, reading: Mutex::new(()) }));
        Ok(handle)
    }

    /// Closes a handle.
    pub(super) fn close(&self, handle: u64) {
        let old = lock(&self.tables).opens.remove(&handle);
        drop(old);
    }

    /// Opens what is known, if it is a regular file or a folder.
    pub(super) fn reopen(&self, node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        match node.kind {
            FileType::Directory => {
                fs::openat2(node, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), BENEATH)
            }
            FileType::RegularFile => self.with_own_name(node, |own, name| fs::openat(own, name, flags, Mode::empty())),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::ACCESS),
        }
    }

    /// Makes a file that is not there yet, open with `flags`.
    pub(super) fn create(
        &self,
        folder: &Node,
        name: &CStr,
        flags: OFlags,
        mode: Mode,
    ) -> Result<(OwnedFd, u64, Stat), Errno> {
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat2(folder, name, flags | new, mode, BENEATH)?;
        let path =
            self.with_own_name(&fd, |own, name| fs::openat(own, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
        let (number, stat) = self.learn(path)?;
        Ok((fd, number, stat))
    }

    /// Calls with `/proc/self/fd` and the name that a descriptor has there, a link that leads to exactly that file: for
    /// calls that take no descriptor of the O_PATH kind.
    pub(super) fn with_own_name<T>(
        &self,
        of: impl AsFd,
        call: impl FnOnce(BorrowedFd<'_>, &str) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        call(self.own.as_fd(), &of.as_fd().as_raw_fd().to_string())
    }

    /// How many numbers and handles the guest holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let tables = lock(&self.tables);
        (tables.nodes.len(), tables.opens.len())
    }

    /// Lowers how much the guest may hold.
    #[cfg(test)]
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most;
    }
}

impl Tables {
    /// A number that nothing had before.
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn room(&self, most: usize) -> Result<(), Errno> {
        if self.nodes.len() + self.opens.len() < most { Ok(()) } else { Err(Errno::NFILE) }
    }
}

/// Raises this process's limit of descriptors as far as it may, for each file that a guest knows takes one; gives the limit.
fn raise_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let old = getrlimit(Resource::Nofile);
    let wanted = old.maximum.map_or(MOST, |most| most.min(MOST));
    let now = old.current.unwrap_or(u64::MAX);
    if now >= wanted {
        return now;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: old.maximum }) {
        Ok(()) => wanted,
        Err(_) => now,
    }
}
