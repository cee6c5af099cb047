//! Page faults: error codes and CR2, accessed and dirty bits, invlpg.
use crate::fault;
use crate::rt::check;
use core::arch::asm;
use core::ptr::{read_volatile as read, write_volatile as write};

#[repr(align(4096))]
#[allow(dead_code, reason = "reached through raw pointers")]
struct Table([u64; 512]);
static mut TABLES: [Table; 3] = [const { Table([0; 512]) }; 3];
static mut PAGES: [Table; 3] = [const { Table([0; 512]) }; 3];
unsafe extern "C" {
    static mut pml4: [u64; 512];
}
/// Test window: PML4 slot 1, first page.
const VA: u64 = 1 << 39;
const AD: u64 = 0x60;

fn invlpg(va: u64) {
    // SAFETY: drops a translation only.
    unsafe { asm!("invlpg [{}]", in(reg) va) }
}

/// Opens the 2 MiB page that holds `va` to ring 3.
pub fn open_to_user(va: u64) {
    // SAFETY: walks the boot tables, which are identity mapped.
    unsafe {
        let mut table = &raw mut pml4 as *mut u64;
        for shift in [39, 30, 21] {
            let slot = table.add((va >> shift & 511) as usize);
            write(slot, read(slot) | 4);
            table = (read(slot) & 0xf_ffff_f000) as *mut u64;
        }
    }
    invlpg(va);
}

/// The test window, for other groups: pages 0 and 1 of it can be mapped at will.
pub struct Window {
    pub va: u64,
    /// Physical addresses of three pages to map.
    pub pages: (u64, u64, u64),
}

/// The window as `run` has set it up.
pub fn window() -> Window {
    // SAFETY: only the addresses are taken.
    let page = |n: usize| unsafe { &raw mut PAGES[n] as u64 };
    Window { va: VA, pages: (page(0), page(1), page(2)) }
}

impl Window {
    /// Writes an entry without invalidating anything.
    pub fn set(&self, n: usize, entry: u64) {
        // SAFETY: the window's own page table.
        unsafe { write((&raw mut TABLES[2] as *mut u64).add(n), entry) }
    }

    /// Writes an entry and drops the old translation.
    pub fn map(&self, n: usize, entry: u64) {
        self.set(n, entry);
        invlpg(self.va + 4096 * n as u64);
    }
}

pub fn run() {
    // SAFETY: only the test window is remapped; each fault resumes after its line.
    unsafe {
        let table = |n: usize| &raw mut TABLES[n] as *mut u64;
        write((&raw mut pml4 as *mut u64).add(1), table(0) as u64 | 7);
        write(table(0), table(1) as u64 | 7);
        write(table(1), table(2) as u64 | 7);
        let pte = table(2);
        let page = &raw mut PAGES[0] as u64;
        let other = &raw mut PAGES[1] as u64;
        write(page as *mut u64, 0x11);
        write(other as *mut u64, 0x22);
        let set = |value: u64| {
            write(pte, value);
            invlpg(VA);
        };
        set(0);
        let (t, at, n) = fault!("mov rax, [{}]", in(reg) VA + 5, out("rax") _);
        check("paging/read-not-present", (n, t.vector, t.error, t.rip, t.cr2), (1, 14, 0, at, VA + 5));
        let (t, at, n) = fault!("mov [{}], rax", in(reg) VA + 6);
        check("paging/write-not-present", (n, t.vector, t.error, t.rip, t.cr2), (1, 14, 2, at, VA + 6));
        set(page | 1);
        let (_, _, n) = fault!("mov rax, [{}]", in(reg) VA, out("rax") _);
        check("paging/read-sets-accessed-only", (n, read(pte) & AD), (0, 0x20));
        let (t, at, n) = fault!("mov [{}], rax", in(reg) VA);
        check("paging/write-protected", (n, t.error, t.rip, t.cr2, read(pte) & AD), (1, 3, at, VA, 0x20));
        set(page | 3);
        asm!("mov [{}], {}", in(reg) VA, in(reg) 0x11u64);
        check("paging/write-sets-dirty", read(pte) & AD, AD);
        set(page | 1 | 1 << 51);
        let (t, _, n) = fault!("mov rax, [{}]", in(reg) VA, out("rax") _);
        check("paging/reserved-bit", (n, t.vector, t.error, t.cr2), (1, 14, 9, VA));
        set(page | 1 | 1 << 63);
        let (t, _, n) = fault!("jmp {}", in(reg) VA);
        check("paging/no-execute", (n, t.vector, t.error, t.rip, t.cr2), (1, 14, 0x11, VA, VA));
        set(page | 3);
        let first = read(VA as *const u64);
        set(other | 3);
        check("paging/invlpg-shows-new-page", (first, read(VA as *const u64)), (0x11, 0x22));
        // Page crossing store, second page absent: nothing may be written.
        set(page | 3);
        write((page + 4088) as *mut u64, 0x5555);
        let (t, _, n) = fault!("mov [{}], {}", in(reg) VA + 4092, in(reg) u64::MAX);
        check(
            "paging/crossing-store-is-whole",
            (n, t.error, t.cr2, read((page + 4088) as *const u64)),
            (1, 2, VA + 4096, 0x5555),
        );
        // Self-modifying code through an alias of the same page.
        let code = page as *mut u8;
        for (i, byte) in [0xb8u8, 1, 0, 0, 0, 0xc3].into_iter().enumerate() {
            write(code.add(i), byte);
        }
        let call = || {
            let result: u64;
            asm!("call {}", in(reg) VA, lateout("rax") result);
            result
        };
        let first = call();
        write(code.add(1), 2);
        check("smc/alias-store", (first, call()), (1, 2));
        write(VA as *mut u8 as *mut [u8; 2], [0xb8, 3]);
        check("smc/same-mapping-store", call(), 3);
    }
}
