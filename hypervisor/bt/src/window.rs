//! Windows: host mappings of one guest process, so that its user code reaches memory without a lookup.
//!
//! The soft TLB costs a dozen instructions and two dependent loads per access. A process that computes for a while gets
//! windows instead: its pages are mapped a second time, from the file behind guest RAM, at host addresses that lie at a
//! fixed distance from the guest's. An access is then the guest's own instruction with a segment prefix, after a check
//! of the address's upper bits, which no later instruction waits for.
//!
//! | window | guest addresses | host addresses | prefix |
//! |---|---|---|---|
//! | high | in 2^46 to 2^47: position-independent programs, libraries, stacks | lower by [`High::distance`] | FS |
//! | low | below 2^31: other programs and their heaps | the vCPU's state + [`LOW_DISTANCE`] | GS |
//!
//! **Isolation.** Emitted code checks the base register (or the whole address) before it uses a prefix. For the high window
//! [a few bits](High::mask) are enough: an address that has them and any higher bit too is not canonical on the host, or nothing is
//! mapped there, once the distance is subtracted, which borrows from no higher bit. What is
//! unmapped around both windows is wider than any displacement, and any sum of the constants that a block may add to a
//! register that it has checked.
//!
//! The stack pointer is not checked where it is used but where it changes. Blocks of [`Mode::STACKED`] are entered with RSP in the
//! high window, give or take [`STACK_DRIFT`]: Rust sees to it wherever it goes to user code, kernel code where it returns to user
//! code without Rust, and a block whenever it changes RSP. What moves it by up to [`STACK_STEP`] needs no check on a way through the
//! block that accesses memory by it, for then RSP was in the window there (or the access faulted, and Rust has looked).
//!
//! Both ranges are reserved as a whole; nothing else can ever be mapped there.
//!
//! **Faithfulness.** A page is mapped only while the guest's page tables map it for user code, writable only while the PTE is
//! writable and dirty and no translated code was made from the page. What is not mapped faults, and the access takes the
//! slow path of the soft TLB, which walks the page tables, and maps the page here. INVLPG and its kin unmap; a flush of the
//! whole address space makes all pages suspect, and they are compared with the page tables before user code runs again.
//!
//! A vCPU has one pair of windows, and one address space of the guest can have them at a time. In a machine with one vCPU the high
//! window is all of 2^46 to 2^47 ([`high::WHOLE`]). With several vCPUs there is no room for that many; the first four have
//! a part each, which holds what Linux puts where. What another vCPU has mapped is unmapped memory here: [`high`] sees to it.
#![allow(unsafe_code)] // Maps memory at fixed addresses.

use crate::block::{BlockId, Mode};
use crate::engine::{Engine, Ram, WordMap};
use crate::state::{BtState, NO_MODE, Side};
use crate::vcpu::{StateMemory, Windows};
use high::Held;
pub(crate) use high::{HIGH_SHIFT, High, reserve_at};
use paravane_cpu::state::cr4;
use paravane_cpu::{CpuState, Reg, TlbFlush};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tables::Table;
use worth::{Cost, Verdict, Worth};

/// An address belongs to the low window when this many bits shifted out leave 0.
pub(crate) const LOW_SHIFT: u8 = 31;
/// The bits that [`LOW_SHIFT`] leaves.
pub(crate) const LOW_MASK: u64 = !0 << LOW_SHIFT;
// Emitted code tests for them by a sign-extended constant of 32 bits.
const _: () = assert!(LOW_MASK as i32 as i64 as u64 == LOW_MASK);
/// Where the low window begins, from the vCPU's state on.
pub(crate) const LOW_DISTANCE: i32 = 0x4000_0000;
/// Displacements that an access through the low window may have without a check of the sum.
pub(crate) const LOW_DISPLACEMENTS: std::ops::RangeInclusive<i32> = -0x2000_0000..=0x2fff_ffff;
/// What is reserved from the vCPU's state on: the state, the low window, and what its displacements can reach.
pub(crate) const LOW_SPAN: usize = LOW_DISTANCE as usize + (1 << LOW_SHIFT) + 0x4000_0000;

/// Set when a high window exists in this process. A signal handler then may find FS away from its place.
pub(crate) static IN_USE: AtomicBool = AtomicBool::new(false);

/// The largest constant that a block may add to the stack pointer, or have as a displacement from it, with no check but an
/// access on the same way through the block.
pub(crate) const STACK_STEP: i64 = 1 << 20;
/// How far the stack pointer may be from the high window where a block of [`Mode::STACKED`] is entered: 64 steps and a displacement.
const STACK_DRIFT: u64 = 1 << 27;
const _: () = assert!(65 * STACK_STEP as u64 <= STACK_DRIFT);
/// What a block may add before an access to a register that it has checked, to RSP or to one copied from it, and the displacement: it adds
/// at most 64 constants below 2^31.
const REACH: u64 = STACK_DRIFT + 65 * (1 << 31);

/// How addresses are kept that nothing is mapped at.
pub(crate) const UNMAPPED: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
const PAGE: u64 = 4096;

mod high;
mod tables;
mod worth;

/// Mode word of a jump cache that must not be used before pending pages are seen to.
const GATED: u32 = NO_MODE - 1;
/// Pages around a missing one that are mapped with it, if the guest has used them.
const AROUND: u64 = 32;
/// Calls of mmap between two clearings: each may cost a mapping, and a process has 65,530 of them.
const MAX_MAPS: u32 = 24_000;
/// Pages mapped at most, which bounds what a comparison with the page tables costs, and the host's own page tables.
const MAX_PAGES: usize = 1 << 17;
/// Least time between samples.
const SAMPLE: Duration = Duration::from_millis(2);
/// Timer interrupts in a row that must find the same process computing.
const FIRST_NEED: u32 = 3;
const LAST_NEED: u32 = 48;
/// Physical address bits of CR3 and of page-table entries.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A page in a window.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mapped {
    gpa: u64,
    writable: bool,
    /// Part of a 2 MiB page, which is flushed as a whole.
    large: bool,
}

/// A page of the code that runs through the windows.
struct CodePage {
    /// Where it was when links to it were made and calls from it began.
    gpa: u64,
    /// Exits of other pages that are, or were, linked to blocks here.
    links: Vec<u32>,
}

/// What is left of a [`CodePage`] when it may have gone.
struct Asleep {
    page: u64,
    /// Exits and the blocks that they were linked to.
    links: Vec<(u32, BlockId)>,
}

/// Pages of which that is kept.
const MAX_ASLEEP: usize = 1 << 14;

/// Links to one page that are kept in mind; with more, those that were undone meanwhile are worth forgetting.
const MAX_LINKS: usize = 1 << 16;

/// One vCPU's windows.
pub(crate) struct Window {
    when: Windows,
    /// Where the state is, for the low window's place; `None` when there are no windows.
    low: Option<u64>,
    /// The high window.
    high: High,
    /// Keeps its addresses.
    held: Option<Held>,
    /// Root of the page tables (CR3's address bits) and PCID of the process that has them.
    owner: Option<(u64, u64)>,
    /// The page tables may have changed since the pages were mapped.
    stale: bool,
    /// User code runs through the windows now.
    active: bool,
    /// It runs in blocks of [`Mode::STACKED`].
    stacked: bool,
    /// Whether operands are more often in the low window (positive) or in the high one, as translation sees it.
    pub(crate) votes: i32,
    pages: WordMap<u64, Mapped>,
    /// All guest-physical pages that are mapped to be written, and some that were.
    written: WordMap<u64, ()>,
    /// The 2 MiB regions, by number, that hold parts of large pages.
    large: WordMap<u64, ()>,
    /// The pages that the process runs code from.
    code: WordMap<u64, CodePage>,
    /// Guest-physical pages that code was run from, by this process or others, with links to them that were undone: made again
    /// at once when the page is there again.
    asleep: WordMap<u64, Asleep>,
    maps: u32,
    /// What the windows have cost since the last sample, and when that was.
    cost: Cost,
    sampled: Instant,
    /// Pages that this owner has had mapped.
    had: WordMap<u64, ()>,
    /// Pages whose translation the guest has flushed, or that it has just been told are missing: seen to before user code
    /// runs again.
    pending: Vec<u64>,
    /// Whether they pay for their owner.
    worth: Worth,
    /// A process that may get the windows: root, interrupts that found it computing.
    candidate: (u64, u32),
    /// Processes that windows did not pay for, with the interrupts they need now.
    need: WordMap<u64, u32>,
}

impl Window {
    /// For one of `cpus` vCPUs.
    pub(crate) fn new(memory: &Arc<StateMemory>, ram: &Ram, when: Windows, cpus: u32) -> Self {
        let possible = when != Windows::Off && memory.span() >= LOW_SPAN && ram.has_files() && fsgsbase();
        let held = if possible { Held::new(cpus) } else { None };
        let possible = held.is_some();
        if possible {
            IN_USE.store(true, Ordering::SeqCst);
        }
        Self {
            when,
            high: held.as_ref().map_or(high::WHOLE, Held::window),
            held,
            low: possible.then_some(memory.ptr() as u64 + LOW_DISTANCE as u64),
            owner: None,
            stale: false,
            active: false,
            stacked: false,
            votes: 0,
            pages: WordMap::default(),
            written: WordMap::default(),
            large: WordMap::default(),
            code: WordMap::default(),
            asleep: WordMap::default(),
            maps: 0,
            cost: Cost::default(),
            had: WordMap::default(),
            pending: Vec::new(),
            sampled: Instant::now(),
            worth: Worth::default(),
            candidate: (0, 0),
            need: WordMap::default(),
        }
    }

    /// The high window, or what would be it.
    pub(crate) fn high(&self) -> High {
        self.high
    }

    /// Host address of a guest page, if a window covers it.
    fn host(&self, la: u64) -> Option<u64> {
        let low = self.low?;
        if self.high.covers(la) {
            Some(la - self.high.distance)
        } else if la >> LOW_SHIFT == 0 {
            Some(low + la)
        } else {
            None
        }
    }

    /// Maps or (without a file) unmaps pages. False when the host refuses.
    fn call(&mut self, la: u64, pages: u64, file: Option<(i32, u64)>, writable: bool) -> bool {
        let Some(at) = self.host(la) else { return false };
        self.maps += 1;
        let (prot, flags, fd, offset) = match file {
            Some((fd, offset)) => {
                let write = if writable { libc::PROT_WRITE } else { 0 };
                (libc::PROT_READ | write, libc::MAP_SHARED | libc::MAP_POPULATE, fd, offset as libc::off_t)
            }
            None => (libc::PROT_NONE, UNMAPPED, -1, 0),
        };
        // SAFETY: the range lies within what was reserved for the windows: `host` gave its start, and callers stay within the
        // 2 MiB around it. Nothing in this process refers to memory there but emitted code.
        let r = unsafe {
            libc::mmap(at as *mut libc::c_void, (pages * PAGE) as usize, prot, flags | libc::MAP_FIXED, fd, offset)
        };
        r != libc::MAP_FAILED
    }

    /// Unmaps everything.
    fn clear(&mut self) {
        self.cost.cleared(self.pages.len());
        self.pages.clear();
        self.written.clear();
        self.large.clear();
        self.pending.clear();
        self.maps = 0;
        let Some(low) = self.low else { return };
        // What is still mapped must never be used again.
        if !self.clear_high() || !unmap(low, 1 << LOW_SHIFT) {
            self.give_up();
        }
    }

    /// Unmaps all of the high window; false when the host refuses.
    fn clear_high(&self) -> bool {
        let distance = self.high.distance;
        self.high.mapped.iter().all(|&(start, end)| unmap(start - distance, end - start))
    }

    /// A page was missing.
    fn miss(&mut self, page: u64) {
        if self.had.len() > MAX_PAGES {
            self.had.clear();
        }
        let again = self.had.contains_key(&page);
        self.cost.missed(again);
    }

    /// An exit was linked to a block in another page: the link is good while that page stays where it is. False when that cannot be
    /// kept in mind.
    pub(crate) fn note_link(&mut self, exit: u32, page: u64) -> bool {
        let Some(code) = self.code.get_mut(&page) else { return false };
        let room = code.links.len() < MAX_LINKS;
        if room {
            code.links.push(exit);
        }
        room
    }

    /// All blocks are gone, and their links with them.
    pub(crate) fn forget_links(&mut self) {
        self.code.clear();
        self.asleep.clear();
    }

    fn give_up(&mut self) {
        // Its addresses stay as they are: nobody else must get them.
        std::mem::forget(self.held.take());
        self.low = None;
        self.owner = None;
        self.pages.clear();
        self.written.clear();
    }

    /// Unmaps one page, and the large page around it.
    fn drop_page(&mut self, la: u64) {
        let page = la & !(PAGE - 1);
        let (first, count) =
            if self.large.remove(&(page >> 21)).is_some() { (page & !0x1f_ffff, 512) } else { (page, 1) };
        let mut any = false;
        for n in 0..count {
            any |= self.pages.remove(&(first + n * PAGE)).is_some();
        }
        if any {
            self.change(first, count, None);
        }
    }

    /// Unmaps pages, neighbours by one call: each interrupts other CPUs that run this process.
    fn drop_pages(&mut self, mut pages: Vec<u64>) {
        pages.sort_unstable();
        let mut run = (0, 0);
        for la in pages {
            if self.large.contains_key(&(la >> 21)) {
                self.drop_page(la);
            } else if self.pages.remove(&la).is_some() {
                if run.0 + run.1 * PAGE != la || la >> 21 != run.0 >> 21 {
                    self.drop_run(run);
                    run = (la, 0);
                }
                run.1 += 1;
            }
        }
        self.drop_run(run);
    }

    /// Unmaps so many pages that are forgotten already.
    fn drop_run(&mut self, (la, count): (u64, u64)) {
        if count > 0 {
            self.change(la, count, None);
        }
    }

    /// Takes write access from every mapping of a guest-physical page.
    fn protect(&mut self, gpa: u64, ram: &Ram) {
        // Pages that become code were hardly ever mapped to be written, and looking through all takes long.
        if self.written.remove(&gpa).is_none() {
            return;
        }
        let hit: Vec<u64> = self.pages.iter().filter(|(_, m)| m.gpa == gpa && m.writable).map(|(&la, _)| la).collect();
        for la in hit {
            // Nothing is left to change once the windows have been cleared.
            let Some(m) = self.pages.get_mut(&la) else { return };
            m.writable = false;
            self.change(la, 1, ram.file(gpa));
        }
    }

    /// Unmaps pages, or maps them without write access; if that cannot be done, nothing stays mapped.
    fn change(&mut self, la: u64, pages: u64, file: Option<(i32, u64)>) {
        self.cost.changed();
        if self.maps > MAX_MAPS || !self.call(la, pages, file, false) {
            self.clear();
        }
    }
}

/// Unmaps a part of a window; false when the host refuses.
fn unmap(start: u64, len: u64) -> bool {
    // SAFETY: callers name a part of what is reserved, their own window's alone; nothing but emitted code refers to memory there.
    let r = unsafe {
        let flags = UNMAPPED | libc::MAP_FIXED;
        libc::mmap(start as *mut libc::c_void, len as usize, libc::PROT_NONE, flags, -1, 0)
    };
    r != libc::MAP_FAILED
}

impl Drop for Window {
    fn drop(&mut self) {
        // What is mapped must be gone before its addresses are somebody else's. The low window goes with the state, which may be
        // gone already.
        if self.low.is_some() && !self.clear_high() {
            std::mem::forget(self.held.take());
        }
    }
}

/// Whether the host lets user code change the FS base (AT_HWCAP2 bit 1).
pub(crate) fn fsgsbase() -> bool {
    // SAFETY: takes a number, gives a number.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

/// Whether both windows' addresses can be had; takes nothing.
pub(crate) fn room() -> bool {
    Held::new(1).is_some() && StateMemory::new().is_ok_and(|m| m.span() >= LOW_SPAN)
}

/// Root and PCID in effect.
fn space(st: &CpuState) -> (u64, u64) {
    (st.cr3 & ADDRESS, if st.cr4 & cr4::PCIDE != 0 { st.cr3 & 0xfff } else { 0 })
}

impl Engine {
    /// Whether the code about to run in `mode` is to use the windows; they are made fit for use then.
    pub(crate) fn use_window(&mut self, mode: Mode) -> bool {
        if self.window.low.is_none() {
            self.activate(false);
            return false;
        }
        if !mode.is64() || !mode.has(Mode::USER) || mode.alone() {
            return false;
        }
        let now = space(self.cpu());
        let w = &self.window;
        if w.when == Windows::Always && w.owner.is_none_or(|o| o.0 != now.0) {
            self.give_window(now);
        }
        let w = &mut self.window;
        let Some(owner) = &mut w.owner else { return false };
        if owner.0 != now.0 {
            return false;
        }
        w.stale |= owner.1 != now.1;
        owner.1 = now.1;
        if w.stale {
            w.pending.clear();
            self.revalidate();
        } else if !w.pending.is_empty() {
            self.see_to_pending();
        }
        // Making them fit may have cost the windows themselves.
        self.activate(self.window.low.is_some());
        self.window.active
    }

    /// Whether user code that is about to run through the windows may take its stack pointer to be in the high one.
    pub(crate) fn stack_mode(&mut self) -> u32 {
        let stacked = self.window.high.contains(self.cpu().gpr[Reg::Rsp as usize]);
        if self.window.stacked != stacked {
            self.window.stacked = stacked;
            // Nothing must lead back into blocks of the other kind.
            self.forget_calls(Side::User);
            self.shared().jc_mode[Mode::VIEW_USER as usize] = NO_MODE;
            self.flush_jump_cache(Mode::VIEW_USER as usize);
        }
        if stacked { Mode::STACKED } else { 0 }
    }

    /// Switches translated user code between its two forms.
    fn activate(&mut self, on: bool) {
        if self.window.active == on {
            return;
        }
        self.window.active = on;
        let sh = self.shared();
        sh.window_fs = if on { self.window.high.distance.wrapping_neg() } else { 0 };
        // SYSRET and IRETQ inside translated code go by this word.
        sh.jc_mode[Mode::VIEW_USER as usize] = NO_MODE;
        self.flush_jump_cache(Mode::VIEW_USER as usize);
    }

    /// An interrupt was taken: if it found 64-bit user code running, that process computes.
    pub(crate) fn sample_window(&mut self) {
        let st = self.cpu();
        if self.window.low.is_none() {
            return;
        }
        let computing = st.cpl == 3 && st.code64();
        let now = space(st);
        let w = &mut self.window;
        let elapsed = w.sampled.elapsed();
        if elapsed < SAMPLE {
            // Interrupts come in bunches.
            return;
        }
        w.sampled = Instant::now();
        let cost = std::mem::take(&mut w.cost).time();
        if w.owner.is_some() {
            let found_it = computing && w.owner.is_some_and(|o| o.0 == now.0);
            if w.worth.sample(cost, elapsed, found_it) == Verdict::TakeAway {
                return self.take_window();
            }
        }
        if w.owner.is_some_and(|o| o.0 == now.0) {
            w.candidate = (0, 0);
            return;
        }
        // Whoever is found in the kernel every other time has little to gain.
        w.candidate = match w.candidate {
            _ if !computing => (0, 0),
            (root, n) if root == now.0 => (root, n + 1),
            _ => (now.0, 1),
        };
        let need = w.need.get(&now.0).copied().unwrap_or(FIRST_NEED);
        if w.candidate.1 >= need {
            w.candidate = (0, 0);
            self.give_window(now);
        }
    }

    /// Undoes links to a page of the process's code.
    pub(crate) fn unlink_page(&mut self, page: u64) {
        self.forget_calls(Side::User);
        let Some(code) = self.window.code.remove(&page) else { return };
        let mut links = Vec::with_capacity(code.links.len());
        // The last one is found first in its target's list.
        for x in code.links.into_iter().rev() {
            if let Some(to) = self.tables.exits[x as usize].linked {
                links.push((x, to));
                self.unlink(x);
            }
        }
        if self.window.asleep.len() >= MAX_ASLEEP {
            self.window.asleep.clear();
        }
        self.window.asleep.insert(code.gpa, Asleep { page, links });
    }

    /// Code runs from a page at `gpa` now: makes the links again that were undone when it was last there.
    fn wake_page(&mut self, page: u64, gpa: u64) {
        if self.window.asleep.get(&gpa).is_none_or(|a| a.page != page) {
            return;
        }
        let Some(asleep) = self.window.asleep.remove(&gpa) else { return };
        // In the order in which they were made.
        for (x, to) in asleep.links.into_iter().rev() {
            let exit = &self.tables.exits[x as usize];
            let (from, target) = (&self.tables.blocks[exit.block as usize], &self.tables.blocks[to as usize]);
            // A block that goes on in another page depends on that page too.
            let good = exit.linked.is_none() && from.live && target.live && target.second_page.is_none();
            if good && self.window.note_link(x, page) {
                self.attach(x, to);
            }
        }
    }

    /// Undoes links to pages that the current page tables do not have where they were. Links to the others stay good: the
    /// next process that runs the same program mostly has the same pages.
    fn check_code(&mut self) {
        let mut code: Vec<(u64, u64)> = self.window.code.iter().map(|(&la, c)| (la, c.gpa)).collect();
        code.sort_unstable();
        let mut cached = None;
        for (la, gpa) in code {
            if !self.leaf(la, &mut cached).is_some_and(|l| l.executable && l.gpa == gpa) {
                self.unlink_page(la);
            }
        }
    }

    fn give_window(&mut self, to: (u64, u64)) {
        self.activate(false);
        self.forget_calls(Side::User);
        self.check_code();
        let w = &mut self.window;
        w.clear();
        if w.low.is_some() {
            w.owner = Some(to);
            (w.stale, w.worth, w.cost, w.votes) = (false, Worth::default(), Cost::default(), 0);
            w.had.clear();
            self.stats.windows_given += 1;
        }
    }

    /// The windows cost their process more than they save.
    fn take_window(&mut self) {
        self.activate(false);
        self.forget_calls(Side::User);
        let w = &mut self.window;
        if let Some((root, _)) = w.owner.take() {
            if w.need.len() > 1024 {
                w.need.clear();
            }
            let need = w.need.entry(root).or_insert(FIRST_NEED);
            *need = (*need * 2).min(LAST_NEED);
            self.stats.windows_taken += 1;
        }
        w.clear();
    }

    /// The guest flushes translations of addresses.
    pub(crate) fn flush_window(&mut self, what: TlbFlush) {
        let Some(owner) = self.window.owner else { return self.activate(false) };
        let st = self.cpu();
        let now = space(st);
        let tagged = st.cr4 & cr4::PCIDE != 0;
        match what {
            TlbFlush::All => self.window.stale = true,
            TlbFlush::NonGlobal => self.window.stale |= !tagged || now.1 == owner.1,
            TlbFlush::SwitchPcid => {}
            TlbFlush::Pcid(p) => self.window.stale |= !tagged || u64::from(p) == owner.1,
            // INVLPG drops global entries whatever their PCID.
            TlbFlush::Page(la) => return self.flush_window_page(la),
            TlbFlush::PcidPage(p, la) if u64::from(p) == owner.1 => return self.flush_window_page(la),
            TlbFlush::PcidPage(..) => return,
        }
        if now != owner || self.window.stale {
            self.activate(false);
        }
    }

    fn flush_window_page(&mut self, la: u64) {
        if self.window.active && self.window.pages.contains_key(&(la & !(PAGE - 1))) {
            // More often than not there is another page in its place when user code gets there.
            self.await_page(la);
        } else {
            self.window.drop_page(la);
        }
        // A large page goes as a whole.
        match self.large_shift(la) {
            None if !self.window.code.contains_key(&(la & !(PAGE - 1))) => {}
            None => self.unlink_page(la & !(PAGE - 1)),
            Some(shift) => {
                let hit: Vec<u64> =
                    self.window.code.keys().copied().filter(|page| page >> shift == la >> shift).collect();
                for page in hit {
                    self.unlink_page(page);
                }
            }
        }
    }

    /// Code of the process is at `gpa` now. If it was elsewhere before, what relied on that goes.
    pub(crate) fn note_window_code(&mut self, page: u64, gpa: u64) {
        match self.window.code.get(&page) {
            Some(code) if code.gpa == gpa => return,
            Some(_) => self.unlink_page(page),
            None => {}
        }
        self.window.code.insert(page, CodePage { gpa, links: Vec::new() });
        self.wake_page(page, gpa);
    }

    /// A page holds translated code from now on: user code must not write it unnoticed.
    pub(crate) fn protect_in_window(&mut self, gpa: u64) {
        if self.window.owner.is_some() {
            self.window.protect(gpa, &self.ram);
        }
    }

    /// User code is about to miss a page that the guest's kernel has been told of: if it is there when user code goes on, that
    /// saves a signal.
    pub(crate) fn expect_in_window(&mut self, la: u64) {
        if self.window.active && self.window.host(la).is_some() {
            self.await_page(la);
        }
    }

    /// Sees to a page before user code runs again, which it must not do without coming here.
    fn await_page(&mut self, la: u64) {
        self.window.pending.push(la & !(PAGE - 1));
        self.shared().jc_mode[Mode::VIEW_USER as usize] = GATED;
    }

    /// Whether the jump cache of the user view holds what its mode word would say, were it not for pending pages.
    pub(crate) fn ungate(&mut self, mode: Mode) -> bool {
        let word = &mut self.shared().jc_mode[Mode::VIEW_USER as usize];
        let gated = *word == GATED && self.window.active && mode.has(Mode::WINDOW);
        if gated {
            *word = mode.0;
        }
        gated
    }

    /// Maps, maps anew or unmaps what is pending.
    fn see_to_pending(&mut self) {
        let mut gone = Vec::new();
        for page in std::mem::take(&mut self.window.pending) {
            self.window.miss(page);
            let mut cached = None;
            let wanted = self.wanted(page, &mut cached);
            match (wanted, self.window.pages.get(&page).copied()) {
                (Some(w), Some(m)) if w == m => {}
                (Some(w), None) if w.large => {}
                (Some(w), m) if !w.large && m.is_none_or(|m| !m.large) => {
                    if !self.map_run(page, w, 1) {
                        self.window.clear();
                    }
                }
                _ => gone.push(page),
            }
        }
        self.window.drop_pages(gone);
    }

    /// Compares what is mapped with the page tables and unmaps what is no longer so.
    fn revalidate(&mut self) {
        self.window.cost.compared(self.window.pages.len());
        self.window.stale = false;
        self.stats.window_checks += 1;
        let mut all: Vec<(u64, Mapped)> = self.window.pages.iter().map(|(&la, &m)| (la, m)).collect();
        all.sort_unstable_by_key(|p| p.0);
        let (mut cached, mut gone) = (None, Vec::new());
        for (la, m) in all {
            let good = self
                .leaf(la, &mut cached)
                .is_some_and(|l| l.gpa == m.gpa && (l.writable || !m.writable) && l.large == m.large);
            if !good {
                gone.push(la);
            }
        }
        self.window.drop_pages(gone);
        self.check_code();
    }

    /// The page of `la` was just walked for a user access that missed it here: maps it, with what is around it. False
    /// when that changes nothing, because no window covers it, or it is there already, or the host refuses.
    pub(crate) fn map_in_window(&mut self, la: u64, write: bool) -> bool {
        let page = la & !(PAGE - 1);
        if self.window.owner.is_none_or(|o| o.0 != space(self.cpu()).0) || self.window.host(page).is_none() {
            self.window.cost.missed(true);
            return false;
        }
        if self.window.maps > MAX_MAPS || self.window.pages.len() > MAX_PAGES {
            self.window.clear();
        }
        let mut cached = None;
        let Some(wanted) = self.wanted(page, &mut cached) else {
            self.window.cost.missed(true);
            return false;
        };
        if self.window.pages.get(&page) == Some(&wanted) {
            self.window.cost.missed(true);
            return false;
        }
        self.window.miss(page);
        if write && !wanted.writable {
            return false;
        }
        let (first, count) =
            if wanted.large { (page & !0x1f_ffff, 512) } else { (page & !(AROUND * PAGE - 1), AROUND) };
        // A run of pages that can be mapped by one call: start, what its first page is, length.
        let mut run: Option<(u64, Mapped, u64)> = None;
        let mut good = true;
        for n in 0..=count {
            let here = first + n * PAGE;
            let next = if n == count { None } else { self.wanted(here, &mut cached) };
            let next = next.filter(|w| self.window.pages.get(&here) != Some(w));
            if let (Some((_, head, len)), Some(w)) = (&mut run, next)
                && w.gpa == head.gpa + *len * PAGE
                && w.writable == head.writable
            {
                *len += 1;
                continue;
            }
            if let Some((start, head, len)) = run.take() {
                good &= self.map_run(start, head, len);
            }
            run = next.map(|w| (here, w, 1));
        }
        if !good {
            // The host has no more mappings or memory to give. The code that runs now goes by the windows, so they are taken
            // away at the next opportunity.
            self.window.worth = Worth::NONE;
        }
        good
    }

    fn map_run(&mut self, start: u64, head: Mapped, len: u64) -> bool {
        let file = self.ram.file(head.gpa);
        if file.is_none() || !self.window.call(start, len, file, head.writable) {
            return false;
        }
        self.stats.window_maps += 1;
        let again = self.window.had.contains_key(&start);
        self.window.cost.mapped(again);
        if head.large {
            self.window.large.insert(start >> 21, ());
        }
        for n in 0..len {
            self.window.pages.insert(start + n * PAGE, Mapped { gpa: head.gpa + n * PAGE, ..head });
            self.window.had.insert(start + n * PAGE, ());
            if head.writable {
                self.window.written.insert(head.gpa + n * PAGE, ());
            }
        }
        true
    }

    /// How a page ought to be mapped.
    fn wanted(&mut self, page: u64, cached: &mut Option<Table>) -> Option<Mapped> {
        self.window.host(page)?;
        let leaf = self.leaf(page, cached)?;
        self.ram.host(leaf.gpa, PAGE)?;
        let writable = leaf.writable && self.ram.claim(leaf.gpa);
        Some(Mapped { gpa: leaf.gpa, writable, large: leaf.large })
    }
}

/// The state's address as GS has it is where the low window is counted from.
const _: () = assert!(size_of::<BtState>() < LOW_DISTANCE as usize / 2 - (8 << 20));
