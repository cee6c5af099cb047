//! Is this an initial RAM disk that Linux can use?
//!
//! The kernel takes a sequence of cpio archives (newc), each plain or compressed, with zeros between them (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst), or, from older days, the image of a file system. A guest given
//! anything else panics late and obscurely, so the start is looked at here. A plain archive is walked to its end, which
//! finds a file that was cut; what is compressed only the guest can judge.

use super::LoadError;

const NEWC_HEADER: usize = 110;
const TRAILER: &[u8] = b"TRAILER!!!\0";

/// Compressions that Linux knows, by their first bytes.
const COMPRESSED: [&[u8]; 8] = [
    &[0x1f, 0x8b],                      // gzip
    b"BZh",                             // bzip2
    &[0x5d, 0, 0],                      // lzma
    &[0xfd, b'7', b'z', b'X', b'Z', 0], // xz
    &[0x89, b'L', b'Z', b'O', 0],       // lzo
    &[0x02, 0x21, 0x4c, 0x18],          // lz4, legacy frame
    &[0x28, 0xb5, 0x2f, 0xfd],          // zstd
    &[0x1f, 0x9e],                      // gzip, old
];

/// File systems that may be in an old-style RAM disk: where their magic is, and what.
const FILE_SYSTEMS: [(usize, &[u8]); 6] = [
    (0x438, &[0x53, 0xef]),         // ext2, ext3, ext4
    (0, b"hsqs"),                   // squashfs
    (0, &[0x45, 0x3d, 0xcd, 0x28]), // cramfs
    (0, b"-rom1fs-"),               // romfs
    (0x410, &[0x7f, 0x13]),         // minix
    (0x410, &[0x8f, 0x13]),         // minix, 30-character names
];

const NONSENSE: LoadError =
    LoadError::Initrd("is neither a cpio archive (newc), plain or compressed, nor a file system image");
const CUT: LoadError = LoadError::Initrd("ends in the middle of its cpio archive");

/// Looks at an initrd for Linux.
pub(super) fn check(file: &[u8]) -> Result<(), LoadError> {
    if FILE_SYSTEMS.iter().any(|&(at, magic)| file.get(at..).is_some_and(|f| f.starts_with(magic))) {
        return Ok(());
    }
    let mut rest = file;
    let mut archives = 0;
    loop {
        let zeros = rest.iter().take_while(|&&b| b == 0).count();
        rest = &rest[zeros..];
        if rest.is_empty() && archives > 0 || COMPRESSED.iter().any(|magic| rest.starts_with(magic)) {
            return Ok(());
        }
        if !(rest.starts_with(b"070701") || rest.starts_with(b"070702")) {
            return Err(NONSENSE);
        }
        rest = archive(rest).ok_or(CUT)?;
        archives += 1;
    }
}

/// Walks one plain archive; gives what follows it. `None`: it ends too early, or in garbage.
fn archive(mut rest: &[u8]) -> Option<&[u8]> {
    loop {
        let head = rest.get(..NEWC_HEADER)?;
        if !(head.starts_with(b"070701") || head.starts_with(b"070702")) {
            return None;
        }
        let field = |n: usize| {
            let hex = std::str::from_utf8(&head[6 + 8 * n..14 + 8 * n]).ok()?;
            usize::from_str_radix(hex, 16).ok()
        };
        let (size, name) = (field(6)?, field(11)?);
        let name_end = NEWC_HEADER.checked_add(name)?;
        let last = rest.get(NEWC_HEADER..name_end)? == TRAILER;
        let end = name_end.checked_next_multiple_of(4)?.checked_add(size)?;
        if end > rest.len() && !(last && name_end <= rest.len()) {
            return None;
        }
        // The padding after the very last entry may be missing.
        rest = rest.get(end.checked_next_multiple_of(4)?..).unwrap_or(&[]);
        if last {
            return Some(rest);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn entry(name: &str, data: &[u8]) -> Vec<u8> {
        let mut out = b"070701".to_vec();
        for n in 0..13 {
            let v = match n {
                6 => data.len(),
                11 => name.len() + 1,
                _ => 0,
            };
            out.extend(format!("{v:08x}").bytes());
        }
        out.extend(name.bytes().chain([0]));
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(data);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    /// An archive with one file.
    pub(in super::super) fn cpio() -> Vec<u8> {
        [entry("init", b"#!/bin/sh\n"), entry("TRAILER!!!", b"")].concat()
    }

    #[test]
    fn what_linux_takes_is_taken() {
        let padded = [&[0; 8][..], &cpio(), &[0; 512]].concat();
        let mut ext2 = vec![0; 4096];
        ext2[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        let with_microcode = [&cpio()[..], &[0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3]].concat();
        for good in [cpio(), padded, ext2, with_microcode, [cpio(), cpio()].concat(), b"\x1f\x8b\x08rest".to_vec()] {
            assert!(check(&good).is_ok(), "{good:x?}");
        }
    }

    #[test]
    fn nonsense_and_every_cut_are_found() {
        for bad in [&b""[..], b"hello", &[0; 100], &[7; 5000], b"0707", b"070707rest"] {
            assert!(check(bad).unwrap_err().to_string().contains("neither a cpio"), "{bad:?}");
        }
        let whole = cpio();
        // The last three bytes are padding.
        for len in 6..whole.len() - 3 {
            assert!(check(&whole[..len]).unwrap_err().to_string().contains("in the middle"), "cut to {len}");
        }
        let mut wild = whole.clone();
        wild[6 + 8 * 6..14 + 8 * 6].copy_from_slice(b"ffffffff");
        assert!(check(&wild).is_err());
        assert!(check(&[&whole[..], b"garbage"].concat()).is_err());
    }
}
