//! A window of linear addresses whose page tables the guest owns.
//!
//! The boot page tables map RAM and devices one to one with large pages and stay as they are. What guests do with 4 KiB pages they do
//! in a window of [`PAGES`] pages in a PML4 slot of its own.

use crate::cpu;
use core::ptr::{read_volatile, write_volatile};

/// Pages of a window: 16 MiB.
pub const PAGES: usize = 4096;
/// Bits of an entry: present and writable.
pub const PRESENT_WRITABLE: u64 = 3;
/// Bit of an entry: user mode may use it.
pub const USER: u64 = 4;

/// A page table.
#[repr(C, align(4096))]
pub struct Table(pub [u64; 512]);

impl Table {
    /// Maps nothing.
    pub const EMPTY: Self = Self([0; 512]);
}

/// The tables of a window. Put them into a static and hand them to [`Window::install`].
pub struct Tables {
    pdpt: Table,
    pd: Table,
    pts: [Table; PAGES / 512],
}

impl Tables {
    /// Maps nothing.
    pub const EMPTY: Self = Self { pdpt: Table::EMPTY, pd: Table::EMPTY, pts: [const { Table::EMPTY }; PAGES / 512] };
}

/// A window.
#[derive(Clone, Copy)]
pub struct Window {
    base: u64,
    entries: *mut u64,
}

unsafe extern "C" {
    static mut rt_pml4: [u64; 512];
}

/// Address of the PML4 that the guest booted with.
pub fn boot_root() -> u64 {
    &raw const rt_pml4 as u64
}

impl Window {
    /// Hangs the tables into PML4 slot `slot` (1 to 255) of the boot page tables. All levels above the entries allow everything.
    ///
    /// # Panics
    /// The slot is not from 1 to 255.
    pub fn install(slot: usize, tables: &'static mut Tables) -> Self {
        assert!((1..256).contains(&slot), "the window needs a PML4 slot from 1 to 255");
        let allow = PRESENT_WRITABLE | USER;
        tables.pdpt.0[0] = &raw const tables.pd as u64 | allow;
        for (n, pt) in tables.pts.iter().enumerate() {
            tables.pd.0[n] = pt as *const Table as u64 | allow;
        }
        // SAFETY: one CPU; the slot maps nothing so far that anybody uses, and the tables live for ever.
        unsafe { write_volatile(&raw mut rt_pml4[slot], &raw const tables.pdpt as u64 | allow) };
        Self { base: (slot as u64) << 39, entries: (&raw mut tables.pts).cast() }
    }

    /// Linear address of page `n`.
    pub fn address(&self, n: usize) -> u64 {
        assert!(n < PAGES);
        self.base + 4096 * n as u64
    }

    /// Guest-physical address of the page-table entry of page `n`.
    pub fn entry_gpa(&self, n: usize) -> u64 {
        assert!(n < PAGES);
        self.entries as u64 + 8 * n as u64
    }

    /// The page-table entry of page `n`.
    pub fn entry(&self, n: usize) -> u64 {
        // SAFETY: in the window's tables, which live for ever.
        unsafe { read_volatile(self.entry_gpa(n) as *const u64) }
    }

    /// Stores an entry and invalidates nothing.
    pub fn set(&self, n: usize, entry: u64) {
        // SAFETY: in the window's tables; nothing that Rust knows of lies in the window.
        unsafe { write_volatile(self.entry_gpa(n) as *mut u64, entry) }
    }

    /// Stores an entry and invalidates the page.
    pub fn map(&self, n: usize, entry: u64) {
        self.set(n, entry);
        // SAFETY: the guest runs at CPL 0.
        unsafe { cpu::invlpg(self.address(n)) };
    }
}

/// Opens the 2 MiB page of the boot page tables that holds `address` to user mode.
///
/// # Panics
/// The address is beyond the 4 GiB that they map.
pub fn open_to_user(address: u64) {
    assert!(address < 1 << 32, "the boot page tables map 4 GiB");
    // SAFETY: walks the boot page tables, which are identity-mapped and always there.
    unsafe {
        let mut table = &raw mut rt_pml4 as *mut u64;
        for shift in [39, 30, 21] {
            let slot = table.add((address >> shift & 511) as usize);
            write_volatile(slot, read_volatile(slot) | USER);
            table = (read_volatile(slot) & 0xf_ffff_f000) as *mut u64;
        }
        cpu::invlpg(address);
    }
}
