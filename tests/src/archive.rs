//! A small archive behind an initramfs: files of a test's own. The kernel unpacks archives that follow one another
//! (Documentation/driver-api/early-userspace/buffer-format.rst), and init runs `/script` where there is one.

/// An archive in the "newc" form, from names, modes as in `st_mode`, and contents.
pub fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, (name, mode, contents)) in files.iter().enumerate() {
        entry(&mut bytes, number + 1, name, *mode, contents);
    }
    entry(&mut bytes, 0, "TRAILER!!!", 0, &[]);
    bytes
}

fn entry(bytes: &mut Vec<u8>, inode: usize, name: &str, mode: u32, contents: &[u8]) {
    bytes.extend(format!("070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}", 0, 1).bytes());
    // Length, then four device numbers, the name's length with its zero, and no checksum.
    bytes.extend(format!("{:08x}{1:08x}{1:08x}{1:08x}{1:08x}", contents.len(), 0).bytes());
    bytes.extend(format!("{:08x}{:08x}{name}\0", name.len() + 1, 0).bytes());
    pad(bytes);
    bytes.extend(contents);
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    #[test]
    fn headers_are_110_bytes() {
        let a = super::archive(&[("script", 0o100_755, b"echo")]);
        assert_eq!(&a[..14], b"07070100000001");
        assert_eq!(&a[110..117], b"script\0");
        assert_eq!(&a[120..124], b"echo");
        assert_eq!(a.len() % 4, 0);
    }
}
