//! Writes the archive that Linux unpacks as its first root file system: cpio in the "newc" form.
//!
//! The kernel's Documentation/driver-api/early-userspace/buffer-format.rst describes the form: a 110-byte header
//! of ASCII hexadecimal fields, the name with its terminating zero padded to four bytes, the contents padded to four
//! bytes, and a last entry named `TRAILER!!!`. Archives may follow one another in an initrd; later files replace
//! earlier ones. Writing it here needs neither a cpio tool nor the right to make device nodes.

/// File type and permission bits of an entry, as in `st_mode`.
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive under construction; owners, times and inode numbers are fixed, so equal contents give equal bytes.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder; parents must be added before their children.
    pub(crate) fn folder(&mut self, name: &str) {
        self.entry(name, S_IFDIR | 0o755, (0, 0), &[]);
    }

    /// Adds a file with the given permission bits.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.entry(name, S_IFREG | permissions, (0, 0), contents);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) {
        self.entry(name, S_IFLNK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device node.
    pub(crate) fn device(&mut self, name: &str, permissions: u32, major: u32, minor: u32) {
        self.entry(name, S_IFCHR | permissions, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes, padded to 512 as cpio's own tools do.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let links = if mode & S_IFDIR != 0 && mode & S_IFREG == 0 { 2 } else { 1 };
        let size = u32::try_from(contents.len()).expect("an initramfs file is far below 4 GiB");
        let name_size = name.len() as u32 + 1;
        // Inode, mode, uid, gid, links, mtime, size, device of the file, device it names, name size, checksum.
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0]
            .map(|f| format!("{f:08x}"));
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(fields.concat().as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, multiple: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(multiple), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads one entry at `at`: name, mode, device numbers, contents, and where the next one starts.
    fn entry(bytes: &[u8], at: usize) -> (String, u32, (u32, u32), Vec<u8>, usize) {
        assert_eq!(&bytes[at..at + 6], b"070701");
        let field = |index: usize| {
            let start = at + 6 + index * 8;
            u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name_at = at + 110;
        assert_eq!(bytes[name_at + name_size - 1], 0);
        let name = String::from_utf8(bytes[name_at..name_at + name_size - 1].to_vec()).unwrap();
        let data_at = (name_at + name_size).next_multiple_of(4);
        let data = bytes[data_at..data_at + size].to_vec();
        (name, field(1), (field(9), field(10)), data, (data_at + size).next_multiple_of(4))
    }

    #[test]
    fn entries_read_back_in_order() {
        let mut archive = Archive::default();
        archive.folder("dev");
        archive.device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"#!/bin/sh\n");
        archive.link("bin/sh", "busybox");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let (name, mode, _, data, next) = entry(&bytes, 0);
        assert_eq!((name.as_str(), mode, data.len()), ("dev", 0o040_755, 0));
        let (name, mode, device, _, next) = entry(&bytes, next);
        assert_eq!((name.as_str(), mode, device), ("dev/console", 0o020_600, (5, 1)));
        let (name, mode, _, data, next) = entry(&bytes, next);
        assert_eq!((name.as_str(), mode, data.as_slice()), ("init", 0o100_755, b"#!/bin/sh\n".as_slice()));
        let (name, mode, _, data, next) = entry(&bytes, next);
        assert_eq!((name.as_str(), mode, data.as_slice()), ("bin/sh", 0o120_777, b"busybox".as_slice()));
        assert_eq!(entry(&bytes, next).0, "TRAILER!!!");
    }
}
