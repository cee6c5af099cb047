//! Guest-physical memory.
//!
//! RAM is one memfd, mapped shared: from address 0 up to 3 GiB, and what is left from 4 GiB on. The gigabyte between is
//! for devices. A memfd from the start lets a second view of the same memory be mapped later (a memory policy that uses
//! host mappings, a device in another process), and MAP_NORESERVE means that a guest costs what it touches.
//!
//! The first touch of a 4 KiB page of shared memory costs several microseconds, so the mapping asks for huge pages
//! (MADV_HUGEPAGE). Whether they are granted is the host's choice (`shmem_enabled`); they only can be when
//! guest-physical and host-virtual addresses agree modulo 2 MiB, so the mapping is placed at such an address.
#![allow(unsafe_code)] // memfd_create and madvise

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use paravane_ram::WriteWatch;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

pub use paravane_ram::GuestRam;

/// End of the RAM below the device hole, in bytes.
pub const LOW_RAM_END: u64 = 3 << 30;

/// Start of the RAM above the device hole.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// Window for PCI BARs below 4 GiB (start, end exclusive), the part of the hole under the interrupt controllers.
pub const PCI_MMIO32: (u64, u64) = (0xc000_0000, 0xe000_0000);

/// Registers of memory-mapped virtio devices (start, end exclusive).
pub const VIRTIO_MMIO: (u64, u64) = (0xf000_0000, 0xf010_0000);

/// 256 MiB set aside for memory-mapped PCI configuration space (no MCFG table describes it yet).
pub const PCI_ECAM: (u64, u64) = (0xe000_0000, 0xf000_0000);

/// The largest RAM size accepted, in bytes: what 40 physical address bits hold, less the hole.
pub const MAX_RAM: u64 = (1 << 40) - (1 << 30);

/// A huge page.
const HUGE: usize = 2 << 20;

/// A page.
const PAGE: usize = 4096;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not usable.
    #[error("guest memory of {0} bytes is not possible: give a multiple of 1 MiB, at most {max} MiB", max = MAX_RAM >> 20)]
    Size(u64),
    /// memfd_create or ftruncate failed.
    #[error(
        "the host gave no memory file for guest RAM ({0}): free some memory or raise the file size limit (ulimit -f)"
    )]
    File(io::Error),
    /// mmap failed.
    #[error(
        "guest RAM of {0} MiB could not be mapped ({1}): give the guest less memory or raise the address space limit (ulimit -v)"
    )]
    Map(u64, MmapRegionError),
    /// The regions were refused.
    #[error("guest RAM could not be laid out: {0}; this is a defect of the hypervisor, please report it")]
    Layout(String),
}

/// Makes guest RAM of `bytes` bytes (a multiple of 1 MiB), all zero and untouched.
///
/// # Errors
/// [`MemoryError`], worded for the user.
pub fn create(bytes: u64) -> Result<GuestRam, MemoryError> {
    if bytes == 0 || bytes > MAX_RAM || !bytes.is_multiple_of(1 << 20) {
        return Err(MemoryError::Size(bytes));
    }
    let file = Arc::new(memfd(c"guest-ram", bytes).map_err(MemoryError::File)?);
    let low = bytes.min(LOW_RAM_END);
    let mut regions = vec![region(&file, 0, 0, low)?];
    if bytes > low {
        regions.push(region(&file, HIGH_RAM_START, low, bytes - low)?);
    }
    let ram = GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Layout(e.to_string()))?;
    Ok(Arc::new(ram))
}

/// The parts of guest-physical address space that are RAM when there are `bytes` of it: (start, length), ascending.
pub fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let mut parts = vec![(0, low)];
    if bytes > low {
        parts.push((HIGH_RAM_START, bytes - low));
    }
    parts
}

/// Gives memory back to the host: `len` bytes at `gpa` read as zero from now on, in every mapping. Does nothing where the range is not RAM or the
/// host refuses.
pub fn discard(ram: &GuestRam, gpa: u64, len: u64) {
    for slice in ram.get_slices(GuestAddress(gpa), len as usize).filter_map(Result::ok) {
        let guard = slice.ptr_guard_mut();
        // SAFETY: the range lies in a shared mapping of the guest's memory file, which `ram` keeps; what it holds is guest data, which
        // nobody has references into.
        unsafe { libc::madvise(guard.as_ptr().cast(), guard.len(), libc::MADV_REMOVE) };
    }
}

fn memfd(name: &CStr, bytes: u64) -> io::Result<File> {
    // SAFETY: the name is NUL-terminated and outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

/// Keeps a piece of address space from being given to anybody else for a while.
struct Spacer(Option<(*mut libc::c_void, usize)>);

impl Spacer {
    fn new(at: usize, len: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping without rights; NOREPLACE leaves whatever is there already as it is.
        let p = unsafe { libc::mmap(at as *mut libc::c_void, len, libc::PROT_NONE, flags, -1, 0) };
        Self((p != libc::MAP_FAILED).then_some((p, len)))
    }
}

impl Drop for Spacer {
    fn drop(&mut self) {
        if let Some((p, len)) = self.0 {
            // SAFETY: our own mapping, of which nobody has the address.
            unsafe { libc::munmap(p, len) };
        }
    }
}

fn region(file: &Arc<File>, gpa: u64, offset: u64, bytes: u64) -> Result<GuestRegionMmap<WriteWatch>, MemoryError> {
    let failed = |e| MemoryError::Map(bytes >> 20, e);
    let len = usize::try_from(bytes).map_err(|_| MemoryError::Size(bytes))?;
    let map = || {
        MmapRegionBuilder::new_with_bitmap(len, WriteWatch::with_len(len))
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
    };
    let mut mapped = map().map_err(failed)?;
    for _ in 0..4 {
        let excess = mapped.as_ptr() as usize % HUGE;
        if excess == 0 {
            break;
        }
        // Linux places mappings top-down, each below the one before. A spacer of the excess, put where the first try
        // ended, makes the second end up lower by as much. Another thread's mmap can spoil a try, hence the loop; a placement
        // that stays unaligned only costs speed.
        let end = mapped.as_ptr() as usize + len.next_multiple_of(PAGE);
        drop(mapped);
        let spacer = Spacer::new(end - excess, excess);
        mapped = map().map_err(failed)?;
        drop(spacer);
    }
    // SAFETY: the range is a mapping of ours; the advice changes no contents. A kernel without huge pages refuses, which is fine.
    unsafe { libc::madvise(mapped.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
    GuestRegionMmap::new(mapped, GuestAddress(gpa)).ok_or_else(|| MemoryError::Layout("address overflow".into()))
}

/// The guest-physical ranges of RAM: (start, length).
pub fn ranges(mem: &GuestRam) -> Vec<(u64, u64)> {
    mem.iter().map(|r| (r.start_addr().raw_value(), r.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn small_ram_is_one_aligned_region() {
        let ram = create(64 << 20).unwrap();
        assert_eq!(ram.num_regions(), 1);
        let hva = ram.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(hva as usize % HUGE, 0);
        ram.write_obj(0x1122_3344_u32, GuestAddress((64 << 20) - 4)).unwrap();
        assert_eq!(ram.read_obj::<u32>(GuestAddress((64 << 20) - 4)).unwrap(), 0x1122_3344);
        assert!(ram.write_obj(1_u32, GuestAddress((64 << 20) - 3)).is_err());
    }

    #[test]
    fn large_ram_leaves_the_device_hole_and_shares_one_file() {
        let ram = create(5 << 30).unwrap();
        assert!(ram.address_in_range(GuestAddress(LOW_RAM_END - 1)));
        assert!(!ram.address_in_range(GuestAddress(LOW_RAM_END)));
        assert!(!ram.address_in_range(GuestAddress(HIGH_RAM_START - 1)));
        assert!(ram.address_in_range(GuestAddress(HIGH_RAM_START + (2 << 30) - 1)));
        assert!(!ram.address_in_range(GuestAddress(HIGH_RAM_START + (2 << 30))));
        ram.write_obj(7_u8, GuestAddress(LOW_RAM_END - 1)).unwrap();
        assert_eq!(
            ram.read_obj::<u8>(GuestAddress(HIGH_RAM_START)).unwrap(),
            0,
            "the two parts must not overlap in the file"
        );
        let parts: Vec<_> = ram.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(parts, layout(5 << 30));
        for part in ram.iter() {
            assert_eq!(part.as_ptr() as usize % HUGE, 0);
            let offset = part.file_offset().unwrap().start();
            assert_eq!(offset, if part.start_addr().0 == 0 { 0 } else { LOW_RAM_END });
        }
    }

    #[test]
    fn impossible_sizes_are_refused_with_advice() {
        for bytes in [0, 1, 4096, (1 << 20) + 1, MAX_RAM + (1 << 20), u64::MAX] {
            let text = create(bytes).unwrap_err().to_string();
            assert!(text.contains("multiple of 1 MiB"), "{text}");
        }
    }
}
