//! What the hypervisor said at the start: `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h).

use core::ffi::CStr;
use core::ptr::{addr_of, read};

const MAGIC: u32 = 0x336e_c578;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_at: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// A range of guest-physical addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
    /// E820 type: 1 is RAM.
    pub kind: u32,
    reserved: u32,
}

unsafe extern "C" {
    static rt_start_info: u64;
    static image_end: u8;
}

fn start_info() -> StartInfo {
    // SAFETY: boot.s stored what PVH left in EBX, which stays identity-mapped RAM that nobody writes.
    let info = unsafe { read(rt_start_info as *const StartInfo) };
    assert!(info.magic == MAGIC && info.version >= 1, "this is no PVH start");
    info
}

/// The command line; empty if there is none or it is not UTF-8.
pub fn cmdline() -> &'static str {
    let at = start_info().cmdline;
    if at == 0 {
        return "";
    }
    // SAFETY: the loader wrote a string with a final zero there, and nobody changes it.
    unsafe { CStr::from_ptr(at as *const core::ffi::c_char) }.to_str().unwrap_or("")
}

/// The value of `name=value` on the command line, or the empty text of a lone `name`.
pub fn option(name: &str) -> Option<&'static str> {
    cmdline().split_ascii_whitespace().find_map(|word| {
        let (n, value) = word.split_once('=').unwrap_or((word, ""));
        (n == name).then_some(value)
    })
}

/// The memory map.
pub fn memory_map() -> &'static [Range] {
    let info = start_info();
    // SAFETY: the loader wrote that many entries there, and nobody changes them.
    unsafe { core::slice::from_raw_parts(info.memory_map as *const Range, info.memory_map_entries as usize) }
}

/// Guest-physical address of the ACPI RSDP; 0 if there is none.
pub fn rsdp() -> u64 {
    start_info().rsdp
}

/// RAM that the guest may use as it likes: page-aligned start and bytes, behind the guest's image.
///
/// # Panics
/// The memory map has no RAM where the guest is.
pub fn free_ram() -> (u64, u64) {
    let start = (addr_of!(image_end) as u64).next_multiple_of(4096);
    let end = memory_map()
        .iter()
        .filter(|r| r.kind == 1 && r.start <= start && start < r.start + r.bytes)
        .map(|r| r.start + r.bytes)
        .next()
        .expect("the guest is in RAM");
    // The boot page tables map 4 GiB.
    (start, (end.min(1 << 32) & !0xfff).saturating_sub(start))
}
