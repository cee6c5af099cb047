//! Puts a kernel into guest memory and a vCPU at its first instruction.
//!
//! The format is told by the file's own headers. Every field of a file is an allegation until it is checked; a broken
//! image gets one sentence, whatever is wrong with it.

mod boot_params;
mod bzimage;
mod elf;
mod initrd;
mod multiboot;
mod pvh;

use crate::memory::{self, GuestRam};
use paravane_cpu::{CpuState, Seg, Segment, TableReg, state::cr0};
use vm_memory::{Bytes, GuestAddress};

/// Command line, NUL included, at most (what x86 Linux takes).
pub const CMDLINE_MAX: usize = 2048;

/// Guest-physical places of what the loader itself puts into memory, all below 640 KiB.
mod place {
    /// GDT of the entry state.
    pub(super) const GDT: u64 = 0x500;
    /// `boot_params`, `hvm_start_info` or multiboot information.
    pub(super) const INFO: u64 = 0x7000;
    /// Stack top for entry code that pushes before it sets up its own.
    pub(super) const STACK: u64 = 0x9000;
    /// Page tables of the 64-bit entry state.
    pub(super) const PAGE_TABLES: u64 = 0xa000;
    /// Command line.
    pub(super) const CMDLINE: u64 = 0x2_0000;
}

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is no kernel of a known kind.
    #[error(
        "the kernel file is not a bzImage, an ELF with a PVH note, or a multiboot1 image; give an uncompressed image of one of these kinds"
    )]
    UnknownFormat,
    /// The file ends too early or contradicts itself.
    #[error("the kernel file is damaged: {0}; fetch or build it again")]
    Damaged(&'static str),
    /// Guest memory is too small, and this many MiB are enough.
    #[error(
        "the kernel, with its initrd if there is one, needs at least {0} MiB of guest memory; start it with --memory {0}M"
    )]
    NeedsMemory(u64),
    /// The kernel cannot run in the memory it is given.
    #[error("the kernel does not fit into guest memory ({0}); use another kernel")]
    DoesNotFit(&'static str),
    /// The initrd cannot be placed.
    #[error(
        "the initrd of {0} MiB does not fit below the address up to which this kernel can have one; use a smaller one"
    )]
    InitrdDoesNotFit(u64),
    /// The initrd is nothing that Linux can use.
    #[error("the initrd {0}; build or fetch it again, or leave --initrd out")]
    Initrd(&'static str),
    /// The command line is too long or has a NUL.
    #[error("the kernel command line must be at most {max} bytes without a NUL, and this one is not; shorten it")]
    Cmdline {
        /// Most bytes this kernel takes.
        max: usize,
    },
    /// An old boot protocol.
    #[error(
        "the kernel speaks boot protocol {0}, and 2.06 is the oldest that works; use a kernel from 2.6.22 or later"
    )]
    OldProtocol(String),
}

/// What to load.
pub struct Boot<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// The initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// The command line.
    pub cmdline: &'a str,
    /// Guest-physical address of the ACPI RSDP.
    pub rsdp: u64,
}

/// Loads a kernel and sets `st` to its entry state. Gives the name of the format.
///
/// # Errors
/// See [`LoadError`].
pub fn load(mem: &GuestRam, boot: &Boot<'_>, st: &mut CpuState) -> Result<&'static str, LoadError> {
    if bzimage::is(boot.kernel) {
        return bzimage::load(mem, boot, st);
    }
    if pvh::is(boot.kernel) {
        pvh::load(mem, boot, st)?;
        return Ok("ELF with a PVH note");
    }
    if multiboot::is(boot.kernel) {
        multiboot::load(mem, boot, st)?;
        return Ok("multiboot1");
    }
    Err(LoadError::UnknownFormat)
}

/// End of RAM below the device hole.
fn low_ram_end(mem: &GuestRam) -> u64 {
    memory::ranges(mem).first().map_or(0, |r| r.1)
}

/// Checks that RAM below the device hole reaches up to `top`.
fn enough_memory(mem: &GuestRam, top: u64) -> Result<(), LoadError> {
    if top <= low_ram_end(mem) {
        return Ok(());
    }
    if top > memory::LOW_RAM_END {
        return Err(LoadError::DoesNotFit("it wants to lie where devices are, above 3 GiB"));
    }
    Err(LoadError::NeedsMemory(top.div_ceil(1 << 20)))
}

/// Writes bytes that were checked to fit.
fn put(mem: &GuestRam, at: u64, bytes: &[u8], what: &'static str) -> Result<(), LoadError> {
    mem.write_slice(bytes, GuestAddress(at)).map_err(|_| LoadError::DoesNotFit(what))
}

/// Places the command line; gives its address.
fn put_cmdline(mem: &GuestRam, cmdline: &str, max: usize) -> Result<u64, LoadError> {
    if cmdline.len() >= max || cmdline.bytes().any(|b| b == 0) {
        return Err(LoadError::Cmdline { max: max - 1 });
    }
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    put(mem, place::CMDLINE, &text, "command line")?;
    Ok(place::CMDLINE)
}

/// Places the initrd as high as `limit` and RAM allow, page-aligned, above `floor`.
fn put_initrd(mem: &GuestRam, initrd: &[u8], floor: u64, limit: u64) -> Result<u64, LoadError> {
    let too_large = LoadError::InitrdDoesNotFit((initrd.len() as u64).div_ceil(1 << 20));
    let top = floor.checked_next_multiple_of(0x1000).and_then(|f| f.checked_add(initrd.len() as u64));
    let Some(top) = top.filter(|&t| t <= limit) else { return Err(too_large) };
    enough_memory(mem, top)?;
    let at = (low_ram_end(mem).min(limit) - initrd.len() as u64) & !0xfff;
    put(mem, at, initrd, "initrd")?;
    Ok(at)
}

/// Reads a little-endian field of a file, if it is there.
fn field<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    field(file, at).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    field(file, at).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], at: usize) -> Option<u64> {
    field(file, at).map(u64::from_le_bytes)
}

/// Flat 32-bit protected mode without paging, as PVH, multiboot and the 32-bit Linux entry want it: code at selector `cs`, data at
/// `cs + 8`.
fn enter_protected(mem: &GuestRam, st: &mut CpuState, cs: u16, entry: u64) -> Result<(), LoadError> {
    put_gdt(mem, st, cs, 0x00cf_9b00_0000_ffff)?;
    st.cr0 = cr0::PE | cr0::ET | cr0::NE;
    (st.cr3, st.cr4, st.efer) = (0, 0, 0);
    st.seg = [Segment::flat_data(cs + 8, 0); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(cs, 0, false);
    st.tr = Segment { base: 0, limit: 0x67, attr: 0x8b, selector: 0 };
    st.rflags = 2;
    st.rip = entry;
    Ok(())
}

/// A GDT with a code descriptor at `cs` and flat data behind it.
fn put_gdt(mem: &GuestRam, st: &mut CpuState, cs: u16, code: u64) -> Result<(), LoadError> {
    let mut gdt = vec![0u8; usize::from(cs) + 16];
    gdt[usize::from(cs)..][..8].copy_from_slice(&code.to_le_bytes());
    gdt[usize::from(cs) + 8..][..8].copy_from_slice(&0x00cf_9300_0000_ffff_u64.to_le_bytes());
    put(mem, place::GDT, &gdt, "GDT")?;
    st.gdtr = TableReg { base: place::GDT, limit: gdt.len() as u16 - 1 };
    st.idtr = TableReg { base: 0, limit: 0 };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic pseudo-random numbers (xorshift).
    pub(super) struct Rng(pub(super) u64);
    impl Rng {
        pub(super) fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    pub(super) fn try_load(mem: &GuestRam, kernel: &[u8]) -> Result<&'static str, LoadError> {
        let boot = Boot { kernel, initrd: Some(&initrd::tests::cpio()), cmdline: "x", rsdp: 0xe0000 };
        load(mem, &boot, &mut CpuState::reset(0))
    }

    #[test]
    fn damaged_images_never_panic() {
        let mem = memory::create(32 << 20).unwrap();
        let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
        for image in [
            bzimage::tests::image(),
            pvh::tests::image(),
            multiboot::tests::image(true),
            multiboot::tests::image(false),
        ] {
            try_load(&mem, &image).unwrap();
            for len in 0..image.len().min(1200) {
                let _ = try_load(&mem, &image[..len]);
            }
            for _ in 0..20_000 {
                let mut bad = image.clone();
                for _ in 0..1 + rng.next() % 6 {
                    let at = (rng.next() % 1100) as usize % bad.len();
                    bad[at] = match rng.next() % 4 {
                        0 => 0xff,
                        1 => 0,
                        2 => 0x80,
                        _ => rng.next() as u8,
                    };
                }
                let _ = try_load(&mem, &bad);
            }
        }
    }

    #[test]
    fn nonsense_has_one_sentence() {
        let mem = memory::create(16 << 20).unwrap();
        for bad in [&b""[..], b"MZ", &[0x7f; 5000]] {
            assert!(matches!(try_load(&mem, bad), Err(LoadError::UnknownFormat)));
        }
    }
}
