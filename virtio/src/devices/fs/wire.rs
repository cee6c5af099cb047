//! FUSE messages as they stand in memory (the kernel's `include/uapi/linux/fuse.h`, protocol 7.31): little-endian fields without
//! padding. Requests are read field by field from a copy that the guest cannot change any more.

use std::ffi::CStr;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

/// Bytes of the header of a request.
pub(super) const IN_HEADER: usize = 40;
/// Bytes of the header of a reply.
pub(super) const OUT_HEADER: usize = 16;
/// Longest name of a file.
const NAME_MAX: usize = 255;
/// Seconds for which the guest may believe what it knows of a name or a file: the host changes files too.
const VALID: u64 = 1;

/// The header of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) len: usize,
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
}

impl Header {
    /// Reads it; the fields behind (who asks) are not looked at: the guest's kernel has checked permissions.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Errno> {
        let mut r = Fields(bytes.get(..IN_HEADER).ok_or(Errno::INVAL)?);
        Ok(Self { len: r.u32()? as usize, opcode: r.u32()?, unique: r.u64()?, node: r.u64()? })
    }
}

/// The rest of a request.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], Errno> {
        let (first, rest) = self.0.split_at_checked(n).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(first)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.take(4)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.take(8)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Text up to a zero byte.
    pub(super) fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.to_bytes_with_nul().len()..];
        Ok(text)
    }

    /// The name of one entry of a folder: never a path, and never the way up.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// Appends fields to a reply.
pub(super) trait Put {
    fn u16(&mut self, v: u16) -> &mut Self;
    fn u32(&mut self, v: u32) -> &mut Self;
    fn u64(&mut self, v: u64) -> &mut Self;
    /// `struct fuse_attr`, 88 bytes.
    fn attr(&mut self, s: &Stat) -> &mut Self;
    /// `struct fuse_attr_out`, 104 bytes.
    fn attr_out(&mut self, s: &Stat) -> &mut Self;
    /// `struct fuse_entry_out`, 128 bytes.
    fn entry_out(&mut self, node: u64, s: &Stat) -> &mut Self;
    /// `struct fuse_open_out`, 16 bytes.
    fn open_out(&mut self, handle: u64) -> &mut Self;
    /// `struct fuse_dirent` with its name, padded to eight bytes.
    fn dirent(&mut self, ino: u64, next: u64, kind: FileType, name: &CStr) -> &mut Self;
}

/// Bytes of a folder's entry in a reply.
pub(super) fn dirent_len(name: &CStr) -> usize {
    (24 + name.count_bytes()).next_multiple_of(8)
}

impl Put for Vec<u8> {
    fn u16(&mut self, v: u16) -> &mut Self {
        self.extend(v.to_le_bytes());
        self
    }
    fn u32(&mut self, v: u32) -> &mut Self {
        self.extend(v.to_le_bytes());
        self
    }
    fn u64(&mut self, v: u64) -> &mut Self {
        self.extend(v.to_le_bytes());
        self
    }
    fn attr(&mut self, s: &Stat) -> &mut Self {
        self.u64(s.st_ino).u64(s.st_size as u64).u64(s.st_blocks as u64);
        self.u64(s.st_atime as u64).u64(s.st_mtime as u64).u64(s.st_ctime as u64);
        self.u32(s.st_atime_nsec as u32).u32(s.st_mtime_nsec as u32).u32(s.st_ctime_nsec as u32);
        // A device of the host is none of the guest's: no number.
        self.u32(s.st_mode).u32(s.st_nlink as u32).u32(s.st_uid).u32(s.st_gid).u32(0).u32(s.st_blksize as u32).u32(0)
    }
    fn attr_out(&mut self, s: &Stat) -> &mut Self {
        self.u64(VALID).u32(0).u32(0).attr(s)
    }
    fn entry_out(&mut self, node: u64, s: &Stat) -> &mut Self {
        self.u64(node).u64(0).u64(VALID).u64(VALID).u32(0).u32(0).attr(s)
    }
    fn open_out(&mut self, handle: u64) -> &mut Self {
        self.u64(handle).u32(0).u32(0)
    }
    fn dirent(&mut self, ino: u64, next: u64, kind: FileType, name: &CStr) -> &mut Self {
        let end = self.len() + dirent_len(name);
        self.u64(ino).u64(next).u32(name.count_bytes() as u32).u32(kind.as_raw_mode() >> 12);
        self.extend(name.to_bytes());
        self.resize(end, 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_component() {
        for (bytes, fine) in [
            (&b"a\0"[..], true),
            (b"..a\0", true),
            (b"\0", false),
            (b".\0", false),
            (b"..\0", false),
            (b"a/b\0", false),
            (b"/\0", false),
            (b"../x\0", false),
            (b"unended", false),
        ] {
            assert_eq!(Fields(bytes).name().is_ok(), fine, "{bytes:?}");
        }
        let long = [vec![b'x'; 256], vec![0]].concat();
        assert_eq!(Fields(&long).name().err(), Some(Errno::NAMETOOLONG));
        assert!(Fields(&long[1..]).name().is_ok());
    }

    #[test]
    fn fields_are_bounded() {
        let mut f = Fields(&[1, 0, 0, 0, 2]);
        assert_eq!((f.u32(), f.u32(), f.u64().is_err()), (Ok(1), Err(Errno::INVAL), true));
        assert!(Header::read(&[0; IN_HEADER - 1]).is_err());
    }
}
