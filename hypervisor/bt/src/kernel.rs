//! Kernel mappings: host mappings of what a guest's kernel reaches in its own half of the address space.
//!
//! A kernel uses few parts of that half, each within a TiB or two: all of RAM, stacks and what it allocates, page descriptors, its text. Each
//! such TiB is given a *slot*, host addresses of a TiB, and a table of 256 words in the vCPU's state, indexed by address bits 40
//! to 47, says for each TiB what to add to a guest address to have the host's. An access is then a look into that table and the guest's
//! own instruction (see `translate/kernel.rs`): no branch, no flags, no guess.
//!
//! **Isolation by construction.** What the table holds for an index is a place in the reservation less the canonical address of that TiB. Added
//! to an address with these bits 40 to 47, it gives an address in that place if the guest's address is canonical; otherwise the sum is
//! off by a multiple of 2^48, and not canonical on the host either. TiBs without a slot, the lower half among them, lead to a place
//! where nothing is ever mapped. Around each slot more is unmapped than a displacement reaches ([`GUARD`]).
//!
//! **Faithfulness.** It is a TLB that does not evict: a page is mapped only if the guest's page tables map it for the kernel, as a global page,
//! and have it marked as accessed; for writing only if it is writable and dirty, and no translated code was made from it. Global
//! translations outlive CR3 loads. INVLPG unmaps; a flush of global pages makes all suspect, and they are compared with the
//! page tables before anything else is translated or run. What is not mapped faults and takes the slow path of the soft TLB,
//! which maps it. Where that cannot be, device memory for one, the instruction is remembered and translated again with
//! the soft TLB.
//!
//! Pages of 2 MiB and more are mapped in units of 2 MiB.
#![allow(unsafe_code)] // Maps memory at fixed addresses.

use crate::block::{BlockId, Mode, Site};
use crate::engine::{Engine, WordMap};
use crate::vcpu::Windows;
use crate::window::{ADDRESS, UNMAPPED, reserve_at};
use paravane_cpu::state::{cr4, efer};
use paravane_cpu::{Env, TlbFlush};

/// Words of the table.
pub(crate) const TABLE: usize = 256;
/// The address bits behind those that choose a word.
pub(crate) const TIB_SHIFT: u8 = 40;
const TIB: u64 = 1 << TIB_SHIFT;
/// Unmapped on both sides of a slot: more than a displacement and an operand.
const GUARD: u64 = 8 << 30;
const STRIDE: u64 = TIB + 2 * GUARD;
/// Slots of a vCPU. The place behind them stays empty.
const SLOTS: usize = 6;
const LEN: u64 = STRIDE * (SLOTS as u64 + 1);
/// Where reservations may be: the windows are below, libraries and stacks of this process above. With two vCPUs the windows take the
/// last two.
const PLACES: [u64; 4] = [0x5800_0000_0000, 0x7200_0000_0000, 0x6000_0000_0000, 0x6800_0000_0000];
const _: () = assert!(LEN <= 0x800_0000_0000 && PLACES[1] + LEN < 0x7a00_0000_0000);

const PAGE: u64 = 4096;
const UNIT: u64 = 2 << 20;
/// Pages of a unit that are made writable together among several vCPUs.
const AROUND: u64 = 16;
/// Mappings made between two clearings, of the only vCPU and of one of several; and pages and units there may be.
const MAX_MAPS: [u32; 2] = [16_000, 4_000];
const MAX_ENTRIES: usize = 1 << 15;
/// Instructions kept from kernel mappings at most.
const MAX_KEPT: usize = 1 << 16;
/// How much of what cannot be helped is put up with from one instruction, until it is kept from them: see [`Missing::weight`].
const PATIENCE: u8 = 16;
/// A string instruction with this many elements, as a power of two, or more goes to Rust: no interrupt comes in between, so it must not take
/// long. A page is cleared or copied as a whole, by bytes too.
pub(crate) const STRING_SHIFT: u8 = 13;
/// Timer interrupts that must find kernel code running.
const NEED: u32 = 8;

/// Something mapped: a page or a unit.
#[derive(Clone, Copy)]
struct Mapped {
    gpa: u64,
    /// But for the pages in [`Kernel::shut`].
    writable: bool,
    /// log2 of the guest's page.
    shift: u32,
}

/// What the guest's page tables say about an address.
#[derive(Clone, Copy)]
struct Leaf {
    /// Of the page of 4 KiB.
    gpa: u64,
    writable: bool,
    shift: u32,
}

/// What became of an access that missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// It finds its page mapped now.
    Mapped,
    /// It stores to a page that code was made from. The code goes, so the next one may find it mapped.
    Code,
    /// Kernel mappings are not for this page.
    Never,
}

impl Missing {
    /// What it counts towards [`PATIENCE`].
    fn weight(self) -> u8 {
        match self {
            Self::Mapped => 0,
            Self::Code => 1,
            Self::Never => PATIENCE / 2,
        }
    }
}

/// One vCPU's kernel mappings.
pub(crate) struct Kernel {
    when: Windows,
    /// The reservation.
    place: Option<u64>,
    table: *mut [u64; TABLE],
    /// Kernel code uses them.
    active: bool,
    /// Interrupts that found kernel code running.
    busy: u32,
    /// The TiBs that have slots, as indices of the table.
    slots: Vec<usize>,
    /// By guest page number, and by number of the 2 MiB.
    pages: WordMap<u64, Mapped>,
    units: WordMap<u64, Mapped>,
    /// Pages of units that are not writable although the unit is, by guest page number.
    shut: WordMap<u64, ()>,
    /// Where guest-physical pages and units are mapped.
    pages_of: WordMap<u64, Vec<u64>>,
    units_of: WordMap<u64, Vec<u64>>,
    /// Everything is to be compared with the page tables.
    stale: bool,
    maps: u32,
    /// Misses that could not be helped, by RIP, and the instructions that use the soft TLB.
    misses: WordMap<u64, u8>,
    pub(crate) kept: WordMap<u64, ()>,
}

fn reserve() -> Option<u64> {
    PLACES.into_iter().find(|&place| reserve_at(place, LEN as usize))
}

/// The canonical address of a TiB of the guest.
fn canonical(index: usize) -> u64 {
    (((index as u64) << 56) as i64 >> 16) as u64
}

impl Kernel {
    /// For a vCPU whose table, in its state, is `table`.
    pub(crate) fn new(possible: bool, when: Windows, table: *mut [u64; TABLE]) -> Self {
        let place = if possible && when != Windows::Off { reserve() } else { None };
        let mut k = Self {
            when,
            place,
            table,
            active: false,
            busy: 0,
            slots: Vec::new(),
            pages: WordMap::default(),
            units: WordMap::default(),
            shut: WordMap::default(),
            pages_of: WordMap::default(),
            units_of: WordMap::default(),
            stale: false,
            maps: 0,
            misses: WordMap::default(),
            kept: WordMap::default(),
        };
        // Without a reservation no code is made that looks there.
        if let Some(place) = place {
            k.lead_nowhere(place);
        }
        k
    }

    /// Where a slot begins.
    fn slot(place: u64, n: usize) -> u64 {
        place + GUARD + n as u64 * STRIDE
    }

    /// Host address of a canonical guest address whose TiB has a slot.
    fn host(&self, la: u64) -> Option<u64> {
        let index = (la >> TIB_SHIFT) as usize & (TABLE - 1);
        let n = self.slots.iter().position(|&s| s == index)?;
        Some(Self::slot(self.place?, n) + (la & (TIB - 1)))
    }

    /// Sees to it that the TiB of an address in the upper half has a slot; false when there is none left.
    fn give_slot(&mut self, la: u64) -> bool {
        let Some(place) = self.place else { return false };
        let index = (la >> TIB_SHIFT) as usize & (TABLE - 1);
        if la >> 47 != 0x1_ffff {
            return false;
        }
        if !self.slots.contains(&index) {
            if self.slots.len() == SLOTS {
                return false;
            }
            self.set_word(index, Self::slot(place, self.slots.len()));
            self.slots.push(index);
        }
        true
    }

    /// Maps a part of a slot: from a file, or (without one) nothing. False when the host refuses.
    fn call(&mut self, la: u64, len: u64, file: Option<(i32, u64)>, writable: bool) -> bool {
        let Some(at) = self.host(la) else { return false };
        self.maps += 1;
        let (prot, flags, fd, offset) = match file {
            Some((fd, offset)) => {
                let write = if writable { libc::PROT_WRITE } else { 0 };
                // A page is most likely used at once; a unit mostly is not, as a whole.
                let populate = if len == PAGE { libc::MAP_POPULATE } else { 0 };
                (libc::PROT_READ | write, libc::MAP_SHARED | populate, fd, offset as libc::off_t)
            }
            None => (libc::PROT_NONE, UNMAPPED, -1, 0),
        };
        // SAFETY: within a slot of our reservation, which only emitted code refers to: `host` gave the start, and callers stay within the page or
        // the 2 MiB there.
        let r = unsafe { libc::mmap(at as *mut libc::c_void, len as usize, prot, flags | libc::MAP_FIXED, fd, offset) };
        r != libc::MAP_FAILED
    }

    /// Lets pages that are mapped be written, or not. False when the host refuses.
    fn allow_writes(&mut self, la: u64, len: u64, allow: bool) -> bool {
        let Some(at) = self.host(la & !(PAGE - 1)) else { return false };
        self.maps += 1;
        let prot = libc::PROT_READ | if allow { libc::PROT_WRITE } else { 0 };
        // SAFETY: pages in a slot, see `call`.
        unsafe { libc::mprotect(at as *mut libc::c_void, len as usize, prot) == 0 }
    }

    /// Unmaps everything.
    pub(crate) fn clear(&mut self) {
        self.pages.clear();
        self.units.clear();
        self.shut.clear();
        self.pages_of.clear();
        self.units_of.clear();
        (self.maps, self.stale) = (0, false);
        let Some(place) = self.place else { return };
        // SAFETY: all of our own reservation.
        let r = unsafe {
            let flags = UNMAPPED | libc::MAP_FIXED;
            libc::mmap(place as *mut libc::c_void, LEN as usize, libc::PROT_NONE, flags, -1, 0)
        };
        if r == libc::MAP_FAILED {
            // What is still mapped must never be used again, and nobody else must get these addresses.
            self.lead_nowhere(place);
            self.place = None;
        }
    }

    /// Lets every word of the table lead to where nothing is mapped.
    fn lead_nowhere(&mut self, place: u64) {
        self.slots.clear();
        for index in 0..TABLE {
            self.set_word(index, Self::slot(place, SLOTS));
        }
    }

    /// Lets addresses of a TiB lead to `host`.
    fn set_word(&mut self, index: usize, host: u64) {
        // SAFETY: the table is part of the state, which outlives the engine that owns this; nobody else refers to it but emitted code of this thread.
        unsafe { (*self.table)[index] = host.wrapping_sub(canonical(index)) };
    }

    fn forget_place(of: &mut WordMap<u64, Vec<u64>>, gpa: u64, at: u64) {
        if let Some(list) = of.get_mut(&gpa) {
            list.retain(|&x| x != at);
            if list.is_empty() {
                of.remove(&gpa);
            }
        }
    }

    /// Unmaps the page at `la`, if it is mapped by itself.
    fn drop_page(&mut self, la: u64) {
        if let Some(m) = self.pages.remove(&(la / PAGE)) {
            Self::forget_place(&mut self.pages_of, m.gpa / PAGE, la / PAGE);
            if !self.call(la & !(PAGE - 1), PAGE, None, false) {
                self.clear();
            }
        }
    }

    /// Unmaps the unit around `la`, if it is mapped.
    fn drop_unit(&mut self, la: u64) {
        if let Some(m) = self.units.remove(&(la / UNIT)) {
            Self::forget_place(&mut self.units_of, m.gpa / UNIT, la / UNIT);
            let first = la & !(UNIT - 1);
            for n in 0..UNIT / PAGE {
                self.shut.remove(&(first / PAGE + n));
            }
            if !self.call(first, UNIT, None, false) {
                self.clear();
            }
        }
    }

    /// Unmaps what a guest page around `la` was mapped for.
    fn drop_around(&mut self, la: u64) {
        if la >> 47 != 0x1_ffff {
            return;
        }
        self.drop_page(la);
        let Some(shift) = self.units.get(&(la / UNIT)).map(|m| m.shift) else {
            // The rest of a larger page may be mapped, and this part of it not.
            self.drop_large(la, 30);
            return;
        };
        if shift > 21 { self.drop_large(la, shift) } else { self.drop_unit(la) }
    }

    /// Unmaps all units of a page larger than they are.
    fn drop_large(&mut self, la: u64, shift: u32) {
        let hit: Vec<u64> = self
            .units
            .iter()
            .filter(|(n, m)| m.shift == shift && (*n * UNIT) >> shift == la >> shift)
            .map(|(n, _)| n * UNIT)
            .collect();
        for la in hit {
            self.drop_unit(la);
        }
    }

    /// Takes write access from every mapping of a guest-physical page.
    fn protect(&mut self, gpa: u64) {
        let pages = self.pages_of.get(&(gpa / PAGE)).cloned().unwrap_or_default();
        for at in pages {
            if let Some(m) = self.pages.get_mut(&at)
                && std::mem::take(&mut m.writable)
                && !self.allow_writes(at * PAGE, PAGE, false)
            {
                return self.clear();
            }
        }
        let units = self.units_of.get(&(gpa / UNIT)).cloned().unwrap_or_default();
        for at in units {
            let page = at * UNIT / PAGE + (gpa % UNIT) / PAGE;
            if self.units.get(&at).is_some_and(|m| m.writable)
                && self.shut.insert(page, ()).is_none()
                && !self.allow_writes(page * PAGE, PAGE, false)
            {
                return self.clear();
            }
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            // SAFETY: our own reservation; no code that refers to it can be running any more.
            unsafe { libc::munmap(place as *mut libc::c_void, LEN as usize) };
        }
    }
}

impl Engine {
    /// [`Mode::MAPPED`] if code of this mode uses kernel mappings. What is suspect is seen to first.
    pub(crate) fn use_kernel_mappings(&mut self, mode: Mode) -> u32 {
        if self.kernel.stale {
            self.revalidate_kernel();
        }
        let k = &mut self.kernel;
        if k.place.is_none() || !mode.is64() || mode.has(Mode::RING) || !mode.has(Mode::SMAP) || mode.alone() {
            return 0;
        }
        k.active |= k.when == Windows::Always || k.busy >= NEED;
        if k.active { Mode::MAPPED } else { 0 }
    }

    /// A timer interrupt was taken: it may have found kernel code at work.
    pub(crate) fn sample_kernel(&mut self) {
        let st = self.cpu();
        self.kernel.busy += u32::from(st.cpl == 0 && st.code64());
    }

    /// The guest flushes translations of addresses.
    pub(crate) fn flush_kernel(&mut self, what: TlbFlush) {
        match what {
            TlbFlush::All => self.kernel.stale = true,
            TlbFlush::Page(la) => self.kernel.drop_around(la),
            // These keep global translations.
            TlbFlush::NonGlobal | TlbFlush::SwitchPcid | TlbFlush::Pcid(_) | TlbFlush::PcidPage(..) => {}
        }
    }

    /// A page holds translated code from now on.
    pub(crate) fn protect_in_kernel(&mut self, gpa: u64) {
        self.kernel.protect(gpa);
    }

    /// Compares what is mapped with the page tables and unmaps what is no longer so.
    fn revalidate_kernel(&mut self) {
        self.kernel.stale = false;
        let pages: Vec<_> = self.kernel.pages.iter().map(|(&n, &m)| (n * PAGE, m)).collect();
        for (la, m) in pages {
            if !self.still(la, m) {
                self.kernel.drop_page(la);
            }
        }
        let units: Vec<_> = self.kernel.units.iter().map(|(&n, &m)| (n * UNIT, m)).collect();
        for (la, m) in units {
            if !self.still(la, m) {
                self.kernel.drop_unit(la);
            }
        }
    }

    fn still(&mut self, la: u64, m: Mapped) -> bool {
        self.kernel_leaf(la).is_some_and(|l| l.gpa == m.gpa && l.shift == m.shift && (l.writable || !m.writable))
    }

    /// What the current page tables let the kernel do with a page that it has used before, if the page is global. Changes nothing.
    fn kernel_leaf(&mut self, la: u64) -> Option<Leaf> {
        use paravane_cpu::mmu::pte::{A, D, G, NX, P, PS, RW, US};
        let st = self.cpu();
        if st.efer & efer::LMA == 0 || st.cr4 & cr4::PGE == 0 {
            return None;
        }
        let (mut at, mut writable, mut user) = (st.cr3 & ADDRESS, true, true);
        for shift in [39, 30, 21, 12] {
            let e = self.read_pte(at + ((la >> shift) & 0x1ff) * 8, 8)?;
            if e & (P | A) != P | A || (e & NX != 0 && st.efer & efer::NXE == 0) {
                return None;
            }
            writable &= e & RW != 0;
            user &= e & US != 0;
            if shift == 12 || e & PS != 0 {
                if shift == 39 || user || e & G == 0 {
                    return None;
                }
                let inside = (1u64 << shift) - 1;
                let gpa = (e & ADDRESS & !inside) | (la & inside & !(PAGE - 1));
                return Some(Leaf { gpa, writable: writable && e & D != 0, shift });
            }
            at = e & ADDRESS;
        }
        None
    }

    /// An access of kernel code missed the page of `la`, which was just walked for it. Maps it; false when that changes nothing.
    pub(crate) fn map_for_kernel(&mut self, la: u64, write: bool, s: &Site) -> bool {
        self.map_operand_for_kernel(la, write, self.site_rip(s), s.block)
    }

    /// Maps what a string instruction at `rip` is at; false when that changes nothing. If that goes on, it is kept from kernel mappings.
    /// `whole` if it goes over a page or more.
    pub(crate) fn map_string_for_kernel(
        &mut self,
        from: Option<u64>,
        to: u64,
        whole: bool,
        rip: u64,
        block: BlockId,
    ) -> bool {
        // Text is patched by way of addresses in the lower half, by the function that copies everything else.
        let lower = |la: u64| la >> 63 == 0;
        if self.kernel.kept.contains_key(&rip) || lower(to) || from.is_some_and(lower) {
            return false;
        }
        self.stats.kernel_misses += 1;
        let read = from.map(|la| self.map_kernel_page(la, false));
        let written = self.map_kernel_page(to, true);
        let done = written == Missing::Mapped || read == Some(Missing::Mapped);
        // Who clears or copies pages comes across pages that code was in; the next one is another.
        let excused = whole && written == Missing::Code;
        if !(done || excused) {
            self.keep_from_kernel(rip, block, written.weight());
        }
        done
    }

    /// Maps one operand of the instruction at `rip`; false when that changes nothing. If that goes on, it is kept from kernel mappings.
    pub(crate) fn map_operand_for_kernel(&mut self, la: u64, write: bool, rip: u64, block: BlockId) -> bool {
        self.stats.kernel_misses += 1;
        let found = self.map_kernel_page(la, write);
        if found != Missing::Mapped {
            self.keep_from_kernel(rip, block, found.weight());
        }
        found == Missing::Mapped
    }

    /// An instruction whose operand cannot be mapped: if that goes on, it is translated with the soft TLB.
    fn keep_from_kernel(&mut self, rip: u64, block: BlockId, weight: u8) {
        let k = &mut self.kernel;
        if k.misses.len() >= MAX_KEPT {
            k.misses.clear();
        }
        let n = k.misses.entry(rip).or_insert(0);
        *n = n.saturating_add(weight);
        if *n >= PATIENCE && k.kept.len() < MAX_KEPT {
            k.kept.insert(rip, ());
            self.kill_block(block);
        }
    }

    fn map_kernel_page(&mut self, la: u64, write: bool) -> Missing {
        if self.kernel.stale || !self.kernel.give_slot(la) {
            return Missing::Never;
        }
        let Some(leaf) = self.kernel_leaf(la) else { return Missing::Never };
        if write && !leaf.writable {
            return Missing::Never;
        }
        if self.kernel.maps > MAX_MAPS[usize::from(self.ram.several())]
            || self.kernel.pages.len() + self.kernel.units.len() > MAX_ENTRIES
        {
            self.kernel.clear();
        }
        let done = if leaf.shift == 12 {
            self.map_kernel_small(la, leaf, write)
        } else {
            self.map_kernel_unit(la, leaf, write)
        };
        match done {
            true => Missing::Mapped,
            false if write && self.ram.host(leaf.gpa, PAGE).is_some() && !self.ram.claim(leaf.gpa) => Missing::Code,
            false => Missing::Never,
        }
    }

    fn map_kernel_small(&mut self, la: u64, leaf: Leaf, write: bool) -> bool {
        if self.ram.host(leaf.gpa, PAGE).is_none() || self.kernel.units.contains_key(&(la / UNIT)) {
            // A large page that was split: the guest has not flushed it yet.
            self.kernel.drop_unit(la);
            return false;
        }
        let writable = leaf.writable && self.ram.claim(leaf.gpa);
        if write && !writable {
            return false;
        }
        let k = &mut self.kernel;
        if let Some(&m) = k.pages.get(&(la / PAGE)) {
            if m.gpa == leaf.gpa && m.writable == writable {
                return false;
            }
            k.drop_page(la);
        }
        if !k.call(la & !(PAGE - 1), PAGE, self.ram.file(leaf.gpa), writable) {
            return false;
        }
        self.stats.kernel_maps += 1;
        k.pages.insert(la / PAGE, Mapped { gpa: leaf.gpa, writable, shift: 12 });
        k.pages_of.entry(leaf.gpa / PAGE).or_default().push(la / PAGE);
        true
    }

    fn map_kernel_unit(&mut self, la: u64, leaf: Leaf, write: bool) -> bool {
        let first = la & !(UNIT - 1);
        let gpa = leaf.gpa & !(UNIT - 1);
        if let Some(&m) = self.kernel.units.get(&(la / UNIT)) {
            if m.gpa == gpa && m.writable && write && self.kernel.shut.contains_key(&(la / PAGE)) {
                return self.open_pages(la, leaf.gpa);
            }
            if m.gpa == gpa && m.writable == leaf.writable {
                return false;
            }
            self.kernel.drop_unit(la);
        }
        if self.ram.host(gpa, UNIT).is_none() {
            return false;
        }
        for n in 0..UNIT / PAGE {
            self.kernel.drop_page(first + n * PAGE);
        }
        // Among several vCPUs a page is claimed when it is first written: whoever makes code from a page asks those who claim it.
        let several = self.ram.several();
        if !self.kernel.call(first, UNIT, self.ram.file(gpa), leaf.writable && !several) {
            return false;
        }
        self.stats.kernel_maps += 1;
        let k = &mut self.kernel;
        k.units.insert(la / UNIT, Mapped { gpa, writable: leaf.writable, shift: leaf.shift });
        k.units_of.entry(gpa / UNIT).or_default().push(la / UNIT);
        for n in 0..UNIT / PAGE {
            if leaf.writable && (several || !self.ram.claim(gpa + n * PAGE)) {
                self.kernel.shut.insert(first / PAGE + n, ());
                if !several && !self.kernel.allow_writes(first + n * PAGE, PAGE, false) {
                    self.kernel.clear();
                    return false;
                }
            }
        }
        !write || !self.kernel.shut.contains_key(&(la / PAGE)) || self.open_pages(la, leaf.gpa)
    }

    /// Lets the page of `la` be written, which is shut in its unit, unless code was made from it; among several vCPUs its neighbours too.
    fn open_pages(&mut self, la: u64, gpa: u64) -> bool {
        let count = if self.ram.several() { AROUND } else { 1 };
        let back = (la / PAGE) % count;
        let (mut run, mut good) = (0, true);
        for n in 0..=count {
            let page = la / PAGE - back + n;
            let at = gpa - back * PAGE + n * PAGE;
            if n < count && self.kernel.shut.contains_key(&page) && self.ram.claim(at) {
                self.kernel.shut.remove(&page);
                run += 1;
            } else if run > 0 {
                good &= self.kernel.allow_writes((page - run) * PAGE, run * PAGE, true);
                run = 0;
            }
        }
        if !good {
            self.kernel.clear();
        }
        good && !self.kernel.shut.contains_key(&(la / PAGE))
    }
}
