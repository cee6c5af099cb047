//! What a request asks for, carried out in the shared folder.
//!
//! All of it happens as the user who runs the hypervisor. Owners are shown as they are; giving a file to somebody else is refused, and
//! the bits that lend rights (set-user-ID, set-group-ID) are never set, so a guest cannot leave a trap for the host's users.
//! The guest's kernel checks permissions before it asks (`default_permissions`), the host's when it carries out.

use std::mem::MaybeUninit;

use rustix::fs::{self, AtFlags, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec};
use rustix::io::Errno;

use super::share::{Node, Share};
use super::wire::{Fields, Header, IN_HEADER, OUT_HEADER, Put, dirent_len};
use super::{MAX_IO, MAX_PAGES};
use crate::devices::lock;

/// What a guest may ask for (`enum fuse_opcode`). What is not here is answered with ENOSYS, which the kernel remembers: extended
/// attributes, locks (the guest keeps them itself), access checks, ioctl, DAX mappings.
mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const FSYNCDIR: u32 = 30;
    pub(super) const CREATE: u32 = 35;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const FALLOCATE: u32 = 43;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const LSEEK: u32 = 46;
    pub(super) const SYNCFS: u32 = 50;
}

/// Protocol version that is spoken.
const VERSION: (u32, u32) = (7, 31);
/// FUSE_ASYNC_READ, FUSE_BIG_WRITES, FUSE_PARALLEL_DIROPS, FUSE_MAX_PAGES: many requests at once, and long ones.
const INIT_FLAGS: u32 = 1 << 0 | 1 << 5 | 1 << 18 | 1 << 22;
/// Bits of SETATTR's `valid`.
mod set {
    pub(super) const MODE: u32 = 1 << 0;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const ATIME: u32 = 1 << 4;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const HANDLE: u32 = 1 << 6;
    pub(super) const ATIME_NOW: u32 = 1 << 7;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
}
/// Permission bits that a guest may set.
const PERMISSIONS: u32 = 0o1777;
/// Flags of open(2) that are passed on: O_RDONLY to O_RDWR, O_DSYNC and O_SYNC. The guest's kernel does the others itself.
const OPEN_FLAGS: OFlags = OFlags::RWMODE.union(OFlags::DSYNC).union(OFlags::SYNC);

/// Serves a shared folder. Any number of threads may.
pub(super) struct Server {
    share: Share,
    readonly: bool,
}

impl Server {
    pub(super) fn new(share: Share, readonly: bool) -> Self {
        Self { share, readonly }
    }

    /// The driver is gone, or there is a new one.
    pub(super) fn reset(&self) {
        self.share.forget_all();
    }

    /// Carries out a request and makes the reply, of at most `room` bytes; empty when there is to be none.
    pub(super) fn serve(&self, request: &[u8], room: usize, reply: &mut Vec<u8>) {
        reply.clear();
        // Without a number a reply says nothing to anybody.
        let Ok(header) = Header::read(request) else { return };
        reply.resize(OUT_HEADER, 0);
        let outcome = match request.get(IN_HEADER..header.len) {
            Some(body) => self.carry_out(&header, &mut Fields(body), room.saturating_sub(OUT_HEADER), reply),
            None => Err(Errno::INVAL),
        };
        if matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) || room < OUT_HEADER {
            return reply.clear();
        }
        let outcome = if reply.len() > room { Err(Errno::IO) } else { outcome };
        if outcome.is_err() {
            reply.truncate(OUT_HEADER);
        }
        let error = outcome.err().map_or(0, |e| -e.raw_os_error());
        let len = reply.len() as u32;
        reply[..4].copy_from_slice(&len.to_le_bytes());
        reply[4..8].copy_from_slice(&error.to_le_bytes());
        reply[8..16].copy_from_slice(&header.unique.to_le_bytes());
    }

    fn carry_out(&self, header: &Header, f: &mut Fields<'_>, room: usize, out: &mut Vec<u8>) -> Result<(), Errno> {
        let share = &self.share;
        let node = || share.node(header.node);
        match header.opcode {
            op::INIT => self.init(f, out),
            op::DESTROY => {
                share.forget_all();
                Ok(())
            }
            op::LOOKUP => self.entry(&*node()?, f, out),
            op::FORGET => {
                share.forget(header.node, f.u64()?);
                Ok(())
            }
            op::BATCH_FORGET => {
                let count = f.u64()? as u32;
                for _ in 0..count {
                    share.forget(f.u64()?, f.u64()?);
                }
                Ok(())
            }
            op::GETATTR => {
                out.attr_out(&node()?.stat()?);
                Ok(())
            }
            op::READLINK => {
                out.extend(fs::readlinkat(&*node()?, c"", Vec::new())?.to_bytes());
                Ok(())
            }
            op::OPEN | op::OPENDIR => {
                let node = node()?;
                let flags = OFlags::from_bits_retain(f.u32()?) & OPEN_FLAGS;
                if (node.kind == FileType::Directory) != (header.opcode == op::OPENDIR) {
                    return Err(if node.kind == FileType::Directory { Errno::ISDIR } else { Errno::NOTDIR });
                }
                self.may_open(flags)?;
                out.open_out(share.keep(share.reopen(&node, flags)?)?);
                Ok(())
            }
            op::READ => self.read(f, room, out),
            op::READDIR => self.read_folder(header.node, f, room, out),
            op::RELEASE | op::RELEASEDIR => {
                share.close(f.u64()?);
                Ok(())
            }
            // What was written is in the host's page cache already.
            op::FLUSH => share.handle(f.u64()?).map(drop),
            op::FSYNC | op::FSYNCDIR => {
                let open = share.handle(f.u64()?)?;
                if f.u32()? & 1 != 0 { fs::fdatasync(&open.fd) } else { fs::fsync(&open.fd) }
            }
            op::SYNCFS => fs::syncfs(share.reopen(&*share.node(super::share::ROOT)?, OFlags::RDONLY)?),
            op::STATFS => {
                let s = fs::fstatvfs(&*node()?)?;
                out.u64(s.f_blocks).u64(s.f_bfree).u64(s.f_bavail).u64(s.f_files).u64(s.f_ffree);
                out.u32(s.f_bsize as u32).u32(s.f_namemax as u32).u32(s.f_frsize as u32);
                out.resize(OUT_HEADER + 80, 0);
                Ok(())
            }
            op::LSEEK => {
                let (open, offset, whence) = (share.handle(f.u64()?)?, f.u64()?, f.u32()?);
                let to = match whence {
                    3 => SeekFrom::Data(offset),
                    4 => SeekFrom::Hole(offset),
                    _ => return Err(Errno::INVAL),
                };
                out.u64(fs::seek(&open.fd, to)?);
                Ok(())
            }
            op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::WRITE
            | op::CREATE
            | op::FALLOCATE
                if self.readonly =>
            {
                Err(Errno::ROFS)
            }
            op::WRITE => self.write(f, out),
            op::SETATTR => self.set_attributes(&*node()?, f, out),
            op::CREATE => self.create(&*node()?, f, out),
            op::SYMLINK => {
                let (folder, name, target) = (node()?, f.name()?, f.text()?);
                fs::symlinkat(target, &*folder, name)?;
                self.known(&folder, name, out)
            }
            op::MKNOD => {
                let (folder, mode) = (node()?, f.u32()?);
                f.take(12)?;
                let (name, kind) = (f.name()?, FileType::from_raw_mode(mode));
                if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
                    return Err(Errno::PERM);
                }
                fs::mknodat(&*folder, name, kind, permissions(mode), 0)?;
                self.known(&folder, name, out)
            }
            op::MKDIR => {
                let (folder, mode) = (node()?, f.u32()?);
                f.take(4)?;
                let name = f.name()?;
                fs::mkdirat(&*folder, name, permissions(mode))?;
                self.known(&folder, name, out)
            }
            op::UNLINK => fs::unlinkat(&*node()?, f.name()?, AtFlags::empty()),
            op::RMDIR => fs::unlinkat(&*node()?, f.name()?, AtFlags::REMOVEDIR),
            op::RENAME | op::RENAME2 => {
                let (from, to) = (node()?, share.node(f.u64()?)?);
                let flags = if header.opcode == op::RENAME2 { f.u64()? as u32 } else { 0 };
                let flags = RenameFlags::from_bits(flags)
                    .filter(|flags| !flags.contains(RenameFlags::WHITEOUT))
                    .ok_or(Errno::INVAL)?;
                fs::renameat_with(&*from, f.name()?, &*to, f.name()?, flags)
            }
            op::LINK => {
                let (folder, old, name) = (node()?, share.node(f.u64()?)?, f.name()?);
                share
                    .with_own_name(&*old, |own, from| fs::linkat(own, from, &*folder, name, AtFlags::SYMLINK_FOLLOW))?;
                self.known(&folder, name, out)
            }
            op::FALLOCATE => {
                let (open, offset, length, mode) = (share.handle(f.u64()?)?, f.u64()?, f.u64()?, f.u32()?);
                let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
                fs::fallocate(&open.fd, mode, offset, length)
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, f: &mut Fields<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (major, _minor, readahead, flags) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        if major < VERSION.0 {
            return Err(Errno::PROTO);
        }
        self.share.forget_all();
        out.u32(VERSION.0).u32(VERSION.1);
        // A newer kernel begins again with our version.
        if major == VERSION.0 {
            out.u32(readahead.min(MAX_IO as u32)).u32(flags & INIT_FLAGS).u16(16).u16(12);
            out.u32(MAX_IO as u32).u32(1).u16(MAX_PAGES).u16(0);
        }
        out.resize(OUT_HEADER + 64, 0);
        Ok(())
    }

    fn entry(&self, folder: &Node, f: &mut Fields<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
        self.known(folder, f.name()?, out)
    }

    /// Replies with what a name means.
    fn known(&self, folder: &Node, name: &std::ffi::CStr, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (number, stat) = self.share.look_up(folder, name)?;
        out.entry_out(number, &stat);
        Ok(())
    }

    fn may_open(&self, flags: OFlags) -> Result<(), Errno> {
        let writes = flags & OFlags::RWMODE != OFlags::RDONLY;
        if writes && self.readonly { Err(Errno::ROFS) } else { Ok(()) }
    }

    fn create(&self, folder: &Node, f: &mut Fields<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (flags, mode) = (OFlags::from_bits_retain(f.u32()?), f.u32()?);
        f.take(8)?;
        let name = f.name()?;
        let (fd, number, stat) = match self.share.create(folder, name, flags & OPEN_FLAGS, permissions(mode)) {
            // Somebody on the host was faster, which only an exclusive creation minds.
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                let (number, stat) = self.share.look_up(folder, name)?;
                let opened = self.share.node(number).and_then(|node| match node.kind {
                    FileType::Directory => Err(Errno::ISDIR),
                    _ => self.share.reopen(&node, flags & (OPEN_FLAGS | OFlags::TRUNC)),
                });
                match opened {
                    Ok(fd) => (fd, number, stat),
                    Err(e) => {
                        self.share.forget(number, 1);
                        return Err(e);
                    }
                }
            }
            other => other?,
        };
        match self.share.keep(fd) {
            Ok(handle) => {
                out.entry_out(number, &stat).open_out(handle);
                Ok(())
            }
            Err(e) => {
                self.share.forget(number, 1);
                Err(e)
            }
        }
    }

    fn read(&self, f: &mut Fields<'_>, room: usize, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (open, offset, size) = (self.share.handle(f.u64()?)?, f.u64()?, f.u32()? as usize);
        let size = size.min(room).min(MAX_IO);
        out.resize(OUT_HEADER + size, 0);
        let mut done = 0;
        while done < size {
            match rustix::io::pread(&open.fd, &mut out[OUT_HEADER + done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        out.truncate(OUT_HEADER + done);
        Ok(())
    }

    fn write(&self, f: &mut Fields<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (open, offset, size) = (self.share.handle(f.u64()?)?, f.u64()?, f.u32()? as usize);
        f.take(20)?;
        let data = f.take(size)?;
        let mut done = 0;
        while done < size {
            match rustix::io::pwrite(&open.fd, &data[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        out.u32(done as u32).u32(0);
        Ok(())
    }

    fn read_folder(&self, number: u64, f: &mut Fields<'_>, room: usize, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (open, offset, size) = (self.share.handle(f.u64()?)?, f.u64()?, f.u32()? as usize);
        let end = OUT_HEADER + size.min(room).min(MAX_IO);
        let own = self.share.node(number)?.stat()?.st_ino;
        let _reading = lock(&open.reading);
        fs::seek(&open.fd, SeekFrom::Start(offset))?;
        let mut space = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&open.fd, &mut space);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if out.len() + dirent_len(name) > end {
                break;
            }
            // What is above the shared folder is not the guest's to know.
            let ino = if matches!(name.to_bytes(), b"." | b"..") { own } else { entry.ino() };
            out.dirent(ino, entry.next_entry_cookie(), entry.file_type(), name);
        }
        Ok(())
    }

    fn set_attributes(&self, node: &Node, f: &mut Fields<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (valid, _) = (f.u32()?, f.u32()?);
        let (handle, size, _owner) = (f.u64()?, f.u64()?, f.u64()?);
        let seconds = [f.u64()?, f.u64()?, f.u64()?];
        let nanoseconds = [f.u32()?, f.u32()?, f.u32()?];
        let (mode, _, uid, gid) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        let has = |bit: u32| valid & bit != 0;
        let before = node.stat()?;
        if has(set::UID) && uid != before.st_uid || has(set::GID) && gid != before.st_gid {
            return Err(Errno::PERM);
        }
        if has(set::SIZE) {
            if has(set::HANDLE) {
                fs::ftruncate(&self.share.handle(handle)?.fd, size)?;
            } else if node.kind == FileType::RegularFile {
                fs::ftruncate(self.share.reopen(node, OFlags::WRONLY)?, size)?;
            } else {
                return Err(Errno::INVAL);
            }
        }
        if has(set::MODE) {
            let mode = permissions(mode);
            self.share.with_own_name(node, |own, name| fs::chmodat(own, name, mode, AtFlags::empty()))?;
        }
        if valid & (set::ATIME | set::MTIME) != 0 {
            let time = |n: usize, set: u32, now: u32| {
                let nanoseconds = match () {
                    () if has(now) => fs::UTIME_NOW,
                    () if !has(set) => fs::UTIME_OMIT,
                    () => i64::from(nanoseconds[n]).min(999_999_999),
                };
                Timespec { tv_sec: seconds[n] as i64, tv_nsec: nanoseconds }
            };
            let times = fs::Timestamps {
                last_access: time(0, set::ATIME, set::ATIME_NOW),
                last_modification: time(1, set::MTIME, set::MTIME_NOW),
            };
            self.share.with_own_name(node, |own, name| fs::utimensat(own, name, &times, AtFlags::empty()))?;
        }
        out.attr_out(&node.stat()?);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn share(&mut self) -> &mut Share {
        &mut self.share
    }
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & PERMISSIONS)
}
