//! Multiboot 1 (Multiboot Specification 0.6.96): ELF32 images and images with address fields.

use super::boot_params::e820;
use super::elf::Elf;
use super::{
    Boot, CMDLINE_MAX, LoadError, enough_memory, enter_protected, low_ram_end, place, put, put_cmdline, put_initrd,
    u32_at,
};
use crate::memory::GuestRam;
use paravane_cpu::CpuState;
use paravane_cpu::state::Reg;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies within the first 8 KiB.
const SEARCH: usize = 8192;
const PAGE_ALIGN: u32 = 1;
const MEMORY_INFO: u32 = 2;
const ADDRESS_FIELDS: u32 = 1 << 16;

const MODULES: u64 = place::INFO + 0x100;
const NAME: u64 = place::INFO + 0x180;
const MEMMAP: u64 = place::INFO + 0x200;

/// Offset of the header in the file.
fn header(file: &[u8]) -> Option<usize> {
    (0..file.len().min(SEARCH)).step_by(4).find(|&at| {
        let (Some(m), Some(f), Some(c)) = (u32_at(file, at), u32_at(file, at + 4), u32_at(file, at + 8)) else {
            return false;
        };
        m == HEADER_MAGIC && m.wrapping_add(f).wrapping_add(c) == 0
    })
}

pub(super) fn is(file: &[u8]) -> bool {
    header(file).is_some()
}

pub(super) fn load(mem: &GuestRam, boot: &Boot<'_>, st: &mut CpuState) -> Result<(), LoadError> {
    let f = boot.kernel;
    let at = header(f).ok_or(LoadError::UnknownFormat)?;
    let flags = u32_at(f, at + 4).unwrap_or(0);
    if flags & 0xffff & !(PAGE_ALIGN | MEMORY_INFO) != 0 {
        return Err(LoadError::Damaged("its multiboot header demands features that do not exist here"));
    }
    let (entry, top) = if flags & ADDRESS_FIELDS != 0 { load_by_addresses(mem, f, at)? } else { load_elf(mem, f)? };
    let cmdline = put_cmdline(mem, boot.cmdline, CMDLINE_MAX)?;
    let mut info = [0u32; 29];
    // Memory sizes, command line, memory map, loader name; modules when there are any.
    info[0] = 1 | 1 << 2 | 1 << 6 | 1 << 9;
    info[1] = 639;
    info[2] = (low_ram_end(mem).saturating_sub(1 << 20) >> 10) as u32;
    info[4] = cmdline as u32;
    if let Some(initrd) = boot.initrd {
        let start = put_initrd(mem, initrd, top.next_multiple_of(4096), 1 << 32)?;
        let module = [start as u32, (start + initrd.len() as u64) as u32, 0, 0];
        put(mem, MODULES, &words(&module), "module list")?;
        info[0] |= 1 << 3;
        (info[5], info[6]) = (1, MODULES as u32);
    }
    let mut map = Vec::new();
    for (start, len, kind) in e820(mem) {
        map.extend(20u32.to_le_bytes());
        map.extend(start.to_le_bytes());
        map.extend(len.to_le_bytes());
        map.extend(kind.to_le_bytes());
    }
    put(mem, MEMMAP, &map, "memory map")?;
    (info[11], info[12]) = (map.len() as u32, MEMMAP as u32);
    put(mem, NAME, b"paravane\0", "loader name")?;
    info[16] = NAME as u32;
    put(mem, place::INFO, &words(&info), "multiboot information")?;
    enter_protected(mem, st, 0x8, entry)?;
    st.gpr[Reg::Rax as usize] = LOADER_MAGIC;
    st.gpr[Reg::Rbx as usize] = place::INFO;
    Ok(())
}

fn words(w: &[u32]) -> Vec<u8> {
    w.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn load_elf(mem: &GuestRam, f: &[u8]) -> Result<(u64, u64), LoadError> {
    let elf = Elf::parse(f).ok_or(LoadError::Damaged("its multiboot header has no addresses and it is no ELF"))??;
    if elf.wide {
        return Err(LoadError::Damaged("a multiboot1 kernel must be a 32-bit ELF"));
    }
    let top = elf.load(mem)?;
    Ok((elf.entry, top))
}

fn load_by_addresses(mem: &GuestRam, f: &[u8], at: usize) -> Result<(u64, u64), LoadError> {
    let word = |n: usize| u32_at(f, at + 12 + 4 * n).ok_or(LoadError::Damaged("it ends inside its multiboot header"));
    let (header_addr, load_addr, load_end, bss_end, entry) = (word(0)?, word(1)?, word(2)?, word(3)?, word(4)?);
    let nonsense = LoadError::Damaged("the addresses in its multiboot header make no sense");
    // Where the byte that goes to load_addr is in the file.
    let start = (header_addr.checked_sub(load_addr)).and_then(|d| at.checked_sub(d as usize));
    let Some(start) = start else { return Err(nonsense) };
    let len =
        if load_end == 0 { f.len().checked_sub(start) } else { load_end.checked_sub(load_addr).map(|n| n as usize) };
    let bytes = len.and_then(|n| f.get(start..start.checked_add(n)?)).ok_or(nonsense)?;
    let end = u64::from(load_addr) + bytes.len() as u64;
    let top = end.max(u64::from(bss_end));
    if load_addr < 0x10_0000 {
        return Err(LoadError::Damaged("it wants to be loaded below 1 MiB, where boot data goes"));
    }
    enough_memory(mem, top)?;
    put(mem, u64::from(load_addr), bytes, "image")?;
    Ok((u64::from(entry), top))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory;
    use vm_memory::{Bytes, GuestAddress};

    /// An image by address fields, or an ELF32.
    pub(in super::super) fn image(addresses: bool) -> Vec<u8> {
        let mut f = vec![0u8; 0x400];
        let flags = if addresses { ADDRESS_FIELDS } else { 0 } | MEMORY_INFO;
        let at = 0x80;
        let sum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        let header = [HEADER_MAGIC, flags, sum, 0x10_0080, 0x10_0000, 0, 0x10_1000, 0x10_0100];
        f[at..at + 32].copy_from_slice(&words(&header));
        if !addresses {
            f[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1, 1]);
            f[18] = 3;
            f[24..28].copy_from_slice(&0x10_0040_u32.to_le_bytes());
            f[28] = 52;
            (f[42], f[44]) = (32, 1);
            f[52..52 + 24].copy_from_slice(&words(&[1, 0x100, 0, 0x10_0000, 0x200, 0x300]));
        }
        f
    }

    #[test]
    fn both_kinds_of_image() {
        let mem = memory::create(16 << 20).unwrap();
        for (addresses, entry) in [(true, 0x10_0100), (false, 0x10_0040)] {
            let mut st = CpuState::reset(0);
            let boot = Boot { kernel: &image(addresses), initrd: Some(&[5; 10]), cmdline: "m", rsdp: 0 };
            load(&mem, &boot, &mut st).unwrap();
            assert_eq!((st.rip, st.gpr[0]), (entry, LOADER_MAGIC));
            let info = |n: u64| mem.read_obj::<u32>(GuestAddress(st.gpr[3] + 4 * n)).unwrap();
            assert_eq!(info(5), 1);
            assert_eq!(info(2), 15 << 10);
            let map_len: u32 = info(11);
            assert!(map_len >= 24 && map_len.is_multiple_of(24));
        }
    }
}
