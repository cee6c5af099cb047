//! ELF with a PVH note: direct boot in 32-bit protected mode with EBX = `hvm_start_info` (Xen, docs/misc/pvh.pandoc;
//! public/arch-x86/hvm/start_info.h).

use super::boot_params::e820;
use super::elf::Elf;
use super::{Boot, CMDLINE_MAX, LoadError, enter_protected, place, put, put_cmdline, put_initrd};
use crate::memory::GuestRam;
use paravane_cpu::CpuState;
use paravane_cpu::state::Reg;

const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const START_MAGIC: u32 = 0x336e_c578;
const MEMMAP: u64 = place::INFO + 0x100;
const MODULES: u64 = place::INFO + 0x80;

fn entry(elf: &Elf<'_>) -> Option<u64> {
    let desc = elf.note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY)?;
    match desc.len() {
        4 => Some(u64::from(u32::from_le_bytes(desc.try_into().ok()?))),
        8 => Some(u64::from_le_bytes(desc.try_into().ok()?)),
        _ => None,
    }
}

pub(super) fn is(file: &[u8]) -> bool {
    matches!(Elf::parse(file), Some(Ok(elf)) if entry(&elf).is_some())
}

pub(super) fn load(mem: &GuestRam, boot: &Boot<'_>, st: &mut CpuState) -> Result<(), LoadError> {
    let elf = Elf::parse(boot.kernel).ok_or(LoadError::UnknownFormat)??;
    let entry = entry(&elf).filter(|&e| e <= u64::from(u32::MAX));
    let entry = entry.ok_or(LoadError::Damaged("its PVH entry point lies beyond 4 GiB"))?;
    let top = elf.load(mem)?;
    let cmdline = put_cmdline(mem, boot.cmdline, CMDLINE_MAX)?;
    let mut modules = 0u32;
    if let Some(initrd) = boot.initrd {
        let at = put_initrd(mem, initrd, top, 1 << 32)?;
        let entry: Vec<u8> = [at, initrd.len() as u64, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        put(mem, MODULES, &entry, "module list")?;
        modules = 1;
    }
    let map = e820(mem);
    let mut table = Vec::new();
    for &(start, len, kind) in &map {
        table.extend(start.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend(0u32.to_le_bytes());
    }
    put(mem, MEMMAP, &table, "memory map")?;
    let mut info = Vec::new();
    for v in [START_MAGIC, 1, 0, modules] {
        info.extend(v.to_le_bytes());
    }
    for v in [if modules > 0 { MODULES } else { 0 }, cmdline, boot.rsdp, MEMMAP] {
        info.extend(v.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    put(mem, place::INFO, &info, "start information")?;
    enter_protected(mem, st, 0x8, entry)?;
    st.gpr[Reg::Rbx as usize] = place::INFO;
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory;
    use vm_memory::{Bytes, GuestAddress};

    /// An ELF64 with one segment at 1 MiB and a PVH note.
    pub(in super::super) fn image() -> Vec<u8> {
        let mut f = vec![0u8; 0x400];
        f[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        f[18] = 62;
        f[24..32].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        f[32] = 64;
        (f[54], f[56]) = (56, 2);
        let mut ph = |at: usize, kind: u32, offset: u64, paddr: u64, size: u64| {
            f[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            f[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
            f[at + 24..at + 32].copy_from_slice(&paddr.to_le_bytes());
            f[at + 32..at + 40].copy_from_slice(&size.to_le_bytes());
            f[at + 40..at + 48].copy_from_slice(&size.to_le_bytes());
        };
        ph(64, 1, 0x200, 0x10_0000, 0x100);
        ph(120, 4, 0x300, 0, 20);
        f[0x300..0x314].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0x10, 0, 0x10, 0]);
        f
    }

    #[test]
    fn start_info_is_found_through_ebx() {
        let mem = memory::create(16 << 20).unwrap();
        let mut st = CpuState::reset(0);
        let boot = Boot { kernel: &image(), initrd: Some(&[9; 100]), cmdline: "hello", rsdp: 0xe_0000 };
        load(&mem, &boot, &mut st).unwrap();
        assert_eq!(st.rip, 0x10_0010);
        let at = st.gpr[3];
        let word = |o: u64| mem.read_obj::<u64>(GuestAddress(at + o)).unwrap();
        assert_eq!(word(0) as u32, START_MAGIC);
        assert_eq!(word(32), 0xe_0000);
        let mut text = [0; 6];
        mem.read_slice(&mut text, GuestAddress(word(24))).unwrap();
        assert_eq!(&text, b"hello\0");
        let module = word(16);
        assert_eq!(mem.read_obj::<u64>(GuestAddress(module + 8)).unwrap(), 100);
    }
}
