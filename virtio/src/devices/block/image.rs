//! What a block device keeps its sectors in: a raw file or block device of the host ([`Raw`]), or a qcow2 image ([`Qcow2Image`]).
//!
//! Images are shared by all threads of a device. Reads and writes go straight between the file and guest memory where the
//! format allows; whoever writes to guest memory by way of the host's kernel says so afterwards (`mark_dirty`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage};
use paravane_ram::WatchSlice;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// A sector of virtio-blk, whatever the block size is.
pub const SECTOR: u64 = 512;

/// Memory of the guest: where a read puts its bytes or a write takes them from.
pub type Buffers<'a> = [VolatileSlice<'a, WatchSlice<'a>>];

/// A disk's contents. Offsets and lengths are bytes, multiples of [`SECTOR`], and within [`Self::size`].
pub trait Image: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Reads into all of `into`.
    ///
    /// # Errors
    /// The host's.
    fn read(&self, at: u64, into: &Buffers<'_>) -> io::Result<()>;
    /// As [`Self::read`], if the bytes are there without waiting; `None` when they are not or nobody knows.
    fn read_now(&self, at: u64, into: &Buffers<'_>) -> Option<io::Result<()>> {
        let _ = (at, into);
        None
    }
    /// Writes all of `from`.
    ///
    /// # Errors
    /// The host's.
    fn write(&self, at: u64, from: &Buffers<'_>) -> io::Result<()>;
    /// Makes all that was written before this call survive a power failure.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;
    /// The bytes are of no use any more; what is read there from now on is undefined.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, at: u64, len: u64) -> io::Result<()>;
    /// Makes the bytes read as zero, and frees their space if `unmap`.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenImage {
    /// Never written.
    pub readonly: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// The backing file that a qcow2 header names may be opened. It is a name from within the image, so only for images
    /// that are trusted.
    pub backing: bool,
}

/// Opens the file and locks it against other processes that use it as a disk: several may read, one may write.
fn open(path: &Path, how: OpenImage) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(!how.readonly);
    if how.direct {
        options.custom_flags(libc::O_DIRECT);
    }
    let file = options.open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    match lock(&file, how.readonly) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::Error::other("another machine is using it")),
        // Some file systems have no locks.
        _ => Ok(file),
    }
}

#[allow(unsafe_code)] // flock(2)
fn lock(file: &File, shared: bool) -> io::Result<()> {
    let way = if shared { libc::LOCK_SH } else { libc::LOCK_EX };
    // SAFETY: an open descriptor and a plain number.
    if unsafe { libc::flock(file.as_raw_fd(), way | libc::LOCK_NB) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// A disk whose bytes are the file's.
pub struct Raw {
    file: File,
    len: u64,
    direct: bool,
}

/// Most iovecs of one call (IOV_MAX).
const MAX_VECTORS: usize = 1024;
/// Alignment that O_DIRECT is content with wherever it works at all.
const DIRECT_ALIGN: usize = 4096;
/// Bytes copied at a time where guest memory cannot be used directly.
const BOUNCE: usize = 1 << 20;

/// Bytes at an alignment that O_DIRECT accepts.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + DIRECT_ALIGN];
        let start = bytes.as_ptr().align_offset(DIRECT_ALIGN);
        Self { bytes, start, len }
    }
    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl Raw {
    /// Opens a raw disk.
    ///
    /// # Errors
    /// The host's, or what is wrong with the file.
    pub fn open(path: &Path, how: OpenImage) -> io::Result<Self> {
        use std::io::{Seek, SeekFrom};
        let mut file = open(path, how)?;
        let len = file.seek(SeekFrom::End(0))? / SECTOR * SECTOR;
        let raw = Self { file, len, direct: how.direct };
        if how.direct && len > 0 {
            let mut probe = Aligned::new(SECTOR as usize);
            let probed = probe.get();
            read_exact(&raw.file, probed, 0)
                .map_err(|_| io::Error::other("it takes no direct I/O in units of 512 bytes; leave direct off"))?;
        }
        Ok(raw)
    }

    /// Whether the host's kernel may work on guest memory as it is.
    fn usable(&self, buffers: &Buffers<'_>) -> bool {
        let fine = |n: usize| n.is_multiple_of(SECTOR as usize);
        !self.direct || buffers.iter().all(|b| fine(b.ptr_guard().as_ptr() as usize) && fine(b.len()))
    }

    fn transfer(&self, mut at: u64, buffers: &Buffers<'_>, kind: Transfer) -> io::Result<()> {
        if !self.usable(buffers) {
            return self.bounced(at, buffers, kind);
        }
        let mut first = 0;
        let mut skip = 0;
        while first < buffers.len() {
            let n = call(&self.file, &buffers[first..], skip, at, kind)?;
            if n == 0 {
                // The file has become shorter.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += n as u64;
            let mut done = n;
            while first < buffers.len() && done >= buffers[first].len() - skip {
                done -= buffers[first].len() - skip;
                (first, skip) = (first + 1, 0);
            }
            skip += done;
        }
        Ok(())
    }

    fn bounced(&self, at: u64, buffers: &Buffers<'_>, kind: Transfer) -> io::Result<()> {
        let mut bounce = Aligned::new(BOUNCE);
        by_pieces(at, buffers, BOUNCE, |at, pieces, len| {
            let bytes = &mut bounce.get()[..len];
            if kind == Transfer::Write {
                gather(pieces, bytes);
                write_all(&self.file, bytes, at)
            } else {
                read_exact(&self.file, bytes, at)?;
                scatter(bytes, pieces);
                Ok(())
            }
        })
    }
}

/// Walks buffers in pieces of at most `max` bytes in all.
fn by_pieces<'a>(
    mut at: u64,
    buffers: &Buffers<'a>,
    max: usize,
    mut each: impl FnMut(u64, &Buffers<'a>, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut pieces = Vec::new();
    let mut len = 0;
    for b in buffers {
        let mut from = 0;
        while from < b.len() {
            let n = (b.len() - from).min(max - len);
            let piece = b.subslice(from, n).map_err(io::Error::other)?;
            pieces.push(piece);
            (from, len) = (from + n, len + n);
            if len == max {
                each(at, &pieces, len)?;
                at += len as u64;
                pieces.clear();
                len = 0;
            }
        }
    }
    if len > 0 { each(at, &pieces, len) } else { Ok(()) }
}

fn gather(from: &Buffers<'_>, mut into: &mut [u8]) {
    for piece in from {
        let (head, rest) = into.split_at_mut(piece.len());
        piece.copy_to(head);
        into = rest;
    }
}

fn scatter(mut from: &[u8], into: &Buffers<'_>) {
    for piece in into {
        let (head, rest) = from.split_at(piece.len());
        piece.copy_from(head);
        from = rest;
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Read,
    ReadNow,
    Write,
}

/// One vectored call; gives the number of bytes.
#[allow(unsafe_code)] // preadv2(2), pwritev2(2)
fn call(file: &File, buffers: &Buffers<'_>, skip: usize, at: u64, kind: Transfer) -> io::Result<usize> {
    let at = i64::try_from(at).map_err(io::Error::other)?;
    let guards: Vec<_> = buffers.iter().take(MAX_VECTORS).map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<_> =
        guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }).collect();
    // A request may have no data at all, or only empty buffers.
    let Some(first) = vectors.first_mut() else { return Ok(0) };
    first.iov_base = first.iov_base.wrapping_byte_add(skip);
    first.iov_len -= skip;
    let n = loop {
        let (fd, count) = (file.as_raw_fd(), vectors.len() as i32);
        // SAFETY: each iovec is guest RAM that its slice keeps mapped; the kernel bears concurrent changes by the guest.
        let n = unsafe {
            match kind {
                Transfer::Read => libc::preadv(fd, vectors.as_ptr(), count, at),
                Transfer::ReadNow => libc::preadv2(fd, vectors.as_ptr(), count, at, libc::RWF_NOWAIT),
                Transfer::Write => libc::pwritev(fd, vectors.as_ptr(), count, at),
            }
        };
        if let Ok(n) = usize::try_from(n) {
            break n;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    if kind != Transfer::Write {
        let mut left = n + skip;
        for b in buffers {
            let here = left.min(b.len());
            b.bitmap().mark_dirty(0, here);
            left -= here;
            if left == 0 {
                break;
            }
        }
    }
    Ok(n)
}

fn read_exact(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

fn write_all(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, into: &Buffers<'_>) -> io::Result<()> {
        self.transfer(at, into, Transfer::Read)
    }

    fn read_now(&self, at: u64, into: &Buffers<'_>) -> Option<io::Result<()>> {
        if self.direct || into.len() > MAX_VECTORS {
            return None;
        }
        let all: usize = into.iter().map(VolatileSlice::len).sum();
        // A part, or EAGAIN, or a file system that cannot tell: somebody else shall wait for it.
        (call(self.file_ref(), into, 0, at, Transfer::ReadNow).ok()? == all).then_some(Ok(()))
    }

    fn write(&self, at: u64, from: &Buffers<'_>) -> io::Result<()> {
        self.transfer(at, from, Transfer::Write)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        match self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, len) {
            // It was a hint.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            r => r,
        }
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let way = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        match self.allocate(way | libc::FALLOC_FL_KEEP_SIZE, at, len) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_plain_zeroes(at, len),
            r => r,
        }
    }
}

impl Raw {
    fn file_ref(&self) -> &File {
        &self.file
    }

    #[allow(unsafe_code)] // fallocate(2)
    fn allocate(&self, mode: i32, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (at, len) = (i64::try_from(at).map_err(io::Error::other)?, i64::try_from(len).map_err(io::Error::other)?);
        // SAFETY: plain numbers and an open descriptor.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, len) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    fn write_plain_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        let mut zeroes = Aligned::new(BOUNCE.min(len as usize));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE as u64) as usize;
            write_all(&self.file, &zeroes.get()[..n], at + done)?;
            done += n as u64;
        }
        Ok(())
    }
}

/// A disk in QEMU's copy-on-write format.
pub struct Qcow2Image {
    /// Discards want it alone, all else shares it.
    inner: RwLock<FormatAccess<ImagoFile>>,
    len: u64,
    /// Holds the lock.
    _file: File,
}

impl Qcow2Image {
    /// Opens an image.
    ///
    /// # Errors
    /// The host's, or what is wrong with the image.
    pub fn open(path: &Path, how: OpenImage) -> io::Result<Self> {
        let lock = open(path, OpenImage { direct: false, ..how })?;
        let options = imago::StorageOpenOptions::new().filename(path).write(!how.readonly).direct(how.direct);
        let file = ImagoFile::open(options)?;
        let image = Qcow2::<ImagoFile>::builder(file).write(!how.readonly);
        let image = if how.backing {
            image.open(PermissiveImplicitOpenGate::default())
        } else {
            image.open(DenyImplicitOpenGate::default())
        };
        let access = FormatAccess::new(
            image.map_err(|e| io::Error::other(format!("{e}; an image with a backing file needs backing=on")))?,
        );
        let len = access.size() / SECTOR * SECTOR;
        Ok(Self { inner: RwLock::new(access), len, _file: lock })
    }

    fn shared(&self) -> std::sync::RwLockReadGuard<'_, FormatAccess<ImagoFile>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, into: &Buffers<'_>) -> io::Result<()> {
        let inner = self.shared();
        let mut bounce = Aligned::new(into.iter().map(VolatileSlice::len).sum::<usize>().min(BOUNCE));
        by_pieces(at, into, BOUNCE, |at, pieces, len| {
            let bytes = &mut bounce.get()[..len];
            inner.read(&mut *bytes, at)?;
            scatter(bytes, pieces);
            Ok(())
        })
    }

    fn write(&self, at: u64, from: &Buffers<'_>) -> io::Result<()> {
        let inner = self.shared();
        let mut bounce = Aligned::new(from.iter().map(VolatileSlice::len).sum::<usize>().min(BOUNCE));
        by_pieces(at, from, BOUNCE, |at, pieces, len| {
            let bytes = &mut bounce.get()[..len];
            gather(pieces, bytes);
            inner.write(&*bytes, at)
        })
    }

    fn flush(&self) -> io::Result<()> {
        let inner = self.shared();
        inner.flush()?;
        inner.sync()
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        match self.inner.write().unwrap_or_else(PoisonError::into_inner).discard_to_any(at, len) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            r => r,
        }
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            self.inner.write().unwrap_or_else(PoisonError::into_inner).discard_to_zero(at, len)
        } else {
            self.shared().write_zeroes(at, len)
        }
    }
}
