//! Linux bzImage: 64-bit entry where the kernel has one, else the 32-bit entry (Linux, Documentation/arch/x86/boot.rst).

use super::boot_params::{HEADER, ZeroPage};
use super::{
    Boot, CMDLINE_MAX, LoadError, enough_memory, enter_protected, initrd, place, put, put_cmdline, put_gdt, put_initrd,
    u16_at, u32_at, u64_at,
};
use crate::memory::GuestRam;
use paravane_cpu::state::{Reg, cr0, cr4, efer};
use paravane_cpu::{CpuState, Seg, Segment};

const MAGIC: usize = 0x202;
const XLF_KERNEL_64: u16 = 1;

pub(super) fn is(file: &[u8]) -> bool {
    file.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

pub(super) fn load(mem: &GuestRam, boot: &Boot<'_>, st: &mut CpuState) -> Result<&'static str, LoadError> {
    let f = boot.kernel;
    let cut = LoadError::Damaged("it ends inside its header");
    let version = u16_at(f, 0x206).ok_or(LoadError::Damaged("it ends inside its header"))?;
    if version < 0x206 {
        return Err(LoadError::OldProtocol(format!("{}.{:02}", version >> 8, version & 0xff)));
    }
    let header_end = 0x202 + usize::from(*f.get(0x201).ok_or(cut)?);
    let header = f.get(HEADER..header_end).ok_or(LoadError::Damaged("it ends inside its header"))?;
    let sects = match f[HEADER] {
        0 => 4,
        n => usize::from(n),
    };
    // Its size in 16-byte units. What follows in the file, such as a signature, is not for the kernel.
    let units = u32_at(f, 0x1f4).map_or(0, |n| n as usize);
    if units == 0 {
        return Err(LoadError::Damaged("its header says that there is no code"));
    }
    let start = (sects + 1) * 512;
    let payload = units.checked_mul(16).and_then(|n| f.get(start..start.checked_add(n)?));
    let payload = payload.ok_or(LoadError::Damaged("it ends before its last byte of code"))?;
    let modern = version >= 0x20a;
    let loaded_high = f[0x211] & 1 != 0;
    let preferred = if modern { u64_at(f, 0x258).unwrap_or(0x10_0000) } else { 0x10_0000 };
    let init_size = if modern { u64::from(u32_at(f, 0x260).unwrap_or(0)) } else { 0 };
    if !loaded_high {
        return Err(LoadError::Damaged("it is a zImage, which loads below 640 KiB"));
    }
    // A relocatable kernel loaded below its preferred address moves itself up to it, so nothing is gained by loading it lower
    // (boot.rst, init_size).
    let at = preferred;
    if at < 0x10_0000 {
        return Err(LoadError::Damaged("its preferred address lies below 1 MiB"));
    }
    let end = at.checked_add(init_size.max(payload.len() as u64));
    let end = end.ok_or(LoadError::Damaged("its preferred address makes no sense"))?;
    enough_memory(mem, end)?;
    put(mem, at, payload, "protected-mode code")?;

    let mut page = ZeroPage::new(header);
    let max = (u32_at(f, 0x238).unwrap_or(255) as usize).clamp(255, CMDLINE_MAX - 1) + 1;
    page.cmdline(put_cmdline(mem, boot.cmdline, max)?);
    if let Some(initrd) = boot.initrd {
        initrd::check(initrd)?;
        let limit = u64::from(u32_at(f, 0x22c).unwrap_or(0x37ff_ffff)) + 1;
        page.ramdisk(put_initrd(mem, initrd, end, limit)?, initrd.len() as u64);
    }
    let zero_page = page.finish(mem, boot.rsdp)?;

    let entry64 = version >= 0x20c && u16_at(f, 0x236).is_some_and(|x| x & XLF_KERNEL_64 != 0) && payload.len() > 0x200;
    if entry64 {
        enter_long(mem, st, at + 0x200)?;
    } else {
        enter_protected(mem, st, 0x10, at)?;
    }
    st.gpr[Reg::Rsi as usize] = zero_page;
    st.gpr[Reg::Rsp as usize] = place::STACK;
    Ok(if entry64 { "bzImage, 64-bit entry" } else { "bzImage, 32-bit entry" })
}

/// 64-bit mode with the first 4 GiB mapped one to one by 2 MiB pages.
fn enter_long(mem: &GuestRam, st: &mut CpuState, entry: u64) -> Result<(), LoadError> {
    const PRESENT_WRITE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let t = place::PAGE_TABLES;
    let mut tables = vec![0u64; 6 * 512];
    tables[0] = (t + 0x1000) | PRESENT_WRITE;
    for g in 0..4 {
        tables[512 + g] = (t + 0x2000 + g as u64 * 0x1000) | PRESENT_WRITE;
    }
    for n in 0..2048 {
        tables[1024 + n] = ((n as u64) << 21) | PRESENT_WRITE | LARGE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
    put(mem, t, &bytes, "page tables")?;
    put_gdt(mem, st, 0x10, 0x00af_9b00_0000_ffff)?;
    st.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
    st.cr3 = t;
    st.cr4 = cr4::PAE;
    st.efer = efer::LME | efer::LMA;
    st.seg = [Segment::flat_data(0x18, 0); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(0x10, 0, true);
    st.tr = Segment { base: 0, limit: 0x67, attr: 0x8b, selector: 0 };
    st.rflags = 2;
    st.rip = entry;
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::try_load;
    use super::*;
    use crate::memory;

    /// A bzImage header with a few bytes of code.
    pub(in super::super) fn image() -> Vec<u8> {
        let mut f = vec![0u8; 512 * 3 + 0x400];
        f[0x1f1] = 2;
        f[0x1f4] = 0x40;
        f[0x201] = 0x66;
        f[0x202..0x206].copy_from_slice(b"HdrS");
        f[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        f[0x211] = 1;
        f[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        f[0x230..0x234].copy_from_slice(&0x20_0000_u32.to_le_bytes());
        f[0x234] = 1;
        f[0x236] = 1;
        f[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
        f[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        f[0x260..0x264].copy_from_slice(&0x40_0000_u32.to_le_bytes());
        f
    }

    #[test]
    fn entry_state_of_both_kinds() {
        let mem = memory::create(64 << 20).unwrap();
        let mut st = CpuState::reset(0);
        let mut f = image();
        let initrd = initrd::tests::cpio();
        let boot = Boot { kernel: &f.clone(), initrd: Some(&initrd), cmdline: "quiet", rsdp: 0xe0000 };
        assert_eq!(load(&mem, &boot, &mut st).unwrap(), "bzImage, 64-bit entry");
        assert_eq!((st.rip, st.gpr[6]), (0x100_0200, 0x7000));
        assert!(st.code64());
        f[0x236] = 0;
        let boot = Boot { kernel: &f, ..boot };
        assert_eq!(load(&mem, &boot, &mut st).unwrap(), "bzImage, 32-bit entry");
        assert_eq!(st.rip, 0x100_0000);
        assert!(!st.long_mode() && st.protected());
    }

    #[test]
    fn every_cut_is_found() {
        let mem = memory::create(64 << 20).unwrap();
        let whole = image();
        try_load(&mem, &whole).unwrap();
        try_load(&mem, &[&whole[..], b"signature"].concat()).unwrap();
        for len in 0..whole.len() {
            assert!(try_load(&mem, &whole[..len]).is_err(), "cut to {len} bytes");
        }
    }

    #[test]
    fn too_little_memory_is_said() {
        let mem = memory::create(4 << 20).unwrap();
        let e = try_load(&mem, &image()).unwrap_err();
        assert!(e.to_string().contains("--memory 20M"), "{e}");
        try_load(&memory::create(21 << 20).unwrap(), &image()).unwrap();
    }

    #[test]
    fn big_initrd_is_said() {
        let mem = memory::create(32 << 20).unwrap();
        let mut big = initrd::tests::cpio();
        big.resize(20 << 20, 0);
        let boot = Boot { kernel: &image(), initrd: Some(&big), cmdline: "", rsdp: 0 };
        let e = load(&mem, &boot, &mut CpuState::reset(0)).unwrap_err();
        assert!(matches!(e, LoadError::NeedsMemory(40)), "{e}");
        // The same in enough memory, with an address limit in the header that leaves too little.
        let mem = memory::create(64 << 20).unwrap();
        let mut low = image();
        low[0x22c..0x230].copy_from_slice(&0x1ff_ffff_u32.to_le_bytes());
        let boot = Boot { kernel: &low, ..boot };
        let e = load(&mem, &boot, &mut CpuState::reset(0)).unwrap_err();
        assert!(matches!(e, LoadError::InitrdDoesNotFit(20)), "{e}");
    }

    #[test]
    fn long_command_lines_are_refused() {
        let mem = memory::create(64 << 20).unwrap();
        let long = "a".repeat(2048);
        let boot = Boot { kernel: &image(), initrd: None, cmdline: &long, rsdp: 0 };
        assert!(matches!(load(&mem, &boot, &mut CpuState::reset(0)), Err(LoadError::Cmdline { max: 2047 })));
    }
}
