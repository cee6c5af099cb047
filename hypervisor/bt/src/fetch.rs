//! From RIP to a block: translate the address, look the block up, or make it.
#![allow(unsafe_code)] // Reads guest RAM through raw pointers.

use crate::block::{Block, BlockId, Key, Mode, NO_BLOCK, NO_DOOR, NO_EXIT};
use crate::engine::{Engine, WordMap};
use crate::profile::Cause;
use crate::relocate::Firsts;
use crate::state::{JC_ENTRIES, JumpEntry, NO_SELECTOR, jump_index};
use crate::translate::{Decoded, Hint, Peek, Translator, decode, door};
use paravane_cpu::mmu::{self, Access, AccessKind};
use paravane_cpu::state::rflags;
use paravane_cpu::{Env, Exception, Seg, Segment};
use std::time::Instant;

/// Most bytes that a block is made from: more instructions than it takes, however long they are.
const MAX_BYTES: usize = 1024;
/// Longest instruction (SDM vol. 2, section 2.3.11).
const MAX_LEN: usize = 15;

/// The blocks that were translated from one guest page.
#[derive(Default)]
pub(crate) struct CodePage {
    pub(crate) blocks: Vec<BlockId>,
    /// How often others have written to it.
    pub(crate) writes: u32,
}

/// Linear pages that code was fetched from, so that not every fetch walks the page tables.
pub(crate) struct ExecTlb {
    entries: Vec<ExecEntry>,
    /// The pages fetched from since the last flush: says which page flushes concern code.
    seen: WordMap<u64, ()>,
}

#[derive(Clone, Copy)]
struct ExecEntry {
    page: u64,
    gpa: u64,
    view: usize,
    global: bool,
}

const EXEC_ENTRIES: usize = 256;
const EMPTY: ExecEntry = ExecEntry { page: 1, gpa: 0, view: 0, global: false };

impl ExecTlb {
    pub(crate) fn new() -> Self {
        Self { entries: vec![EMPTY; EXEC_ENTRIES], seen: WordMap::default() }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.fill(EMPTY);
        self.seen.clear();
    }

    /// Drops what a CR3 load drops. The set of pages seen stays: global ones are still cached.
    pub(crate) fn clear_non_global(&mut self) {
        for e in &mut self.entries {
            if !e.global {
                *e = EMPTY;
            }
        }
    }

    /// The one place a page's entry can be.
    fn index(la: u64) -> usize {
        (la >> 12) as usize & (EXEC_ENTRIES - 1)
    }

    fn note(&mut self, page: u64) {
        self.seen.insert(page, ());
    }

    /// Forgets one page.
    pub(crate) fn forget(&mut self, page: u64) {
        let e = &mut self.entries[Self::index(page)];
        if e.page == page {
            *e = EMPTY;
        }
        self.seen.remove(&page);
    }

    /// Whether code may have been fetched from the page or the one before it (whose last instruction may cross).
    pub(crate) fn seen(&self, page: u64) -> bool {
        [page, page.wrapping_sub(4096)].into_iter().any(|p| self.seen.contains_key(&p))
    }
}

impl Engine {
    /// Guest-physical address to fetch from for linear address `la`, and whether its page is global.
    fn fetch_address(&mut self, la: u64, mode: Mode) -> Result<(u64, bool), Exception> {
        let page = la & !0xfff;
        let n = ExecTlb::index(la);
        let e = self.exec_tlb.entries[n];
        if e.page == page && e.view == mode.view() {
            return Ok((e.gpa | (la & 0xfff), e.global));
        }
        let st = self.cpu();
        let t = mmu::walk(st, self, la, Access::current(st, AccessKind::Execute))?;
        let entry = ExecEntry { page, gpa: t.gpa & !0xfff, view: mode.view(), global: t.global };
        self.exec_tlb.entries[n] = entry;
        self.exec_tlb.note(page);
        if t.page_shift > 12 {
            self.note_large(la, t.page_shift);
        }
        Ok((t.gpa, t.global))
    }

    /// Host address of the code to run at the state's RIP. Fetch faults are delivered to the guest first. `None`: events
    /// are due, or the vCPU stopped.
    pub(crate) fn next_block(&mut self) -> Option<u64> {
        // Bounded: a guest whose fetches fault for ever is a triple fault before long, but be sure.
        for _ in 0..64 {
            let st = self.cpu();
            // RF holds off instruction breakpoints for one instruction, and nothing else here looks at it.
            st.rflags &= !rflags::RF;
            let mut mode = Mode::of(st);
            if st.irq_shadow != 0 {
                // The instruction in the shadow runs alone; events are looked at behind it.
                st.irq_shadow = 0;
                mode.0 |= Mode::SINGLE;
            }
            let before = self.profile.begin(Cause::Window);
            self.doing(Cause::Window, st.rip);
            let windowed = self.use_window(mode);
            self.profile.back(before);
            if windowed {
                mode.0 |= Mode::WINDOW | self.stack_mode() | self.variant;
            }
            self.variant = 0;
            mode.0 |= self.use_kernel_mappings(mode);
            match self.find(mode) {
                Ok(Some(id)) => return Some(self.prepare(id)),
                Ok(None) => {
                    self.cache_full = true;
                    return None;
                }
                Err(exc) => {
                    let rip = st.rip;
                    self.raise(exc, rip);
                    if self.stop.is_some() {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// A block that holds only the instruction at RIP, made for this once.
    pub(crate) fn single_block(&mut self) -> Option<u64> {
        let mode = Mode(Mode::of(self.cpu()).0 | Mode::SINGLE);
        match self.find(mode) {
            Ok(Some(id)) => Some(self.prepare(id)),
            Ok(None) => {
                self.cache_full = true;
                None
            }
            Err(exc) => {
                let rip = self.cpu().rip;
                self.raise(exc, rip);
                None
            }
        }
    }

    /// Gets ready to enter a block: mode word, and an entry in the jump cache.
    fn prepare(&mut self, id: BlockId) -> u64 {
        let b = &self.tables.blocks[id as usize];
        let (key, second) = (b.key, b.second_page);
        let crosses = second.is_some();
        let target = self.code.address(b.entry);
        self.entered = id;
        if key.mode.has(Mode::WINDOW) {
            self.note_window_code(key.rip & !0xfff, key.gpa & !0xfff);
            if let Some(second) = second {
                self.note_window_code((key.rip & !0xfff).wrapping_add(4096), second);
            }
        }
        self.shared().mode = key.mode.0;
        self.use_side(key.mode.side());
        self.refresh_fast_segments();
        if key.mode.alone() || !key.mode.has(Mode::FLAT) || key.mode.has(Mode::MIXED) {
            return target;
        }
        let view = key.mode.view();
        self.low_supervisor_code |= !key.mode.has(Mode::USER) && key.rip >> 47 == 0;
        // Global or not is a property of the page, not of the code that looks things up.
        let shared = Mode(key.mode.0 & !Mode::GLOBAL);
        if self.shared().jc_mode[view] != shared.0 && !self.ungate(shared) {
            self.flush_jump_cache(view);
            self.shared().jc_mode[view] = shared.0;
        }
        if shared.calls() && self.calls_mode[shared.side() as usize] != shared {
            // A call is returned to in the mode that it was made in.
            self.calls_mode[shared.side() as usize] = shared;
            self.forget_calls(shared.side());
        }
        if self.direct {
            // Direct jumps will not look there, and indirect ones may never come.
            return target;
        }
        let Some(door) = self.door(id) else { return target };
        let n = jump_index(key.rip);
        // A block whose last instruction crosses a page depends on a second mapping, which need not be global.
        let global = key.mode.has(Mode::GLOBAL) && !crosses;
        let before = std::mem::replace(&mut self.jc_first[view][n], id);
        if before != NO_BLOCK && before != id {
            let b = &self.tables.blocks[before as usize];
            let entry = JumpEntry { neg_rip: b.key.rip.wrapping_neg(), host: self.code.address(b.entry) };
            self.shared().jc[view].second[n] = entry;
        }
        if before == NO_BLOCK || self.jc_local[view][n] == global {
            self.jc_used[view].note(n, global, JC_ENTRIES);
            self.jc_local[view][n] = !global;
        }
        self.shared().jc[view].doors[n] = door;
        target
    }

    /// Where indirect jumps enter a block; `None` when there is no room for a door.
    fn door(&mut self, id: BlockId) -> Option<u64> {
        let b = &self.tables.blocks[id as usize];
        if b.door == NO_DOOR {
            let patch = door::alone(&mut self.asm, b.key.rip, b.key.mode.view());
            let entry = b.entry;
            let placed = self.code.place(&mut self.asm)?;
            self.code.patch(placed.offset(patch), entry);
            self.tables.blocks[id as usize].door = placed.hot;
        }
        Some(self.code.address(self.tables.blocks[id as usize].door))
    }

    /// Brings what SYSCALL, SYSRET and IRETQ need inside translated code up to date with the state.
    fn refresh_fast_segments(&mut self) {
        let st = self.cpu();
        let fast = &mut self.shared().fast;
        if fast.star != st.star {
            fast.star = st.star;
            let (call, ret) = ((st.star >> 32) as u16 & !3, (st.star >> 48) as u16);
            fast.syscall_cs = segment_word(&Segment::flat_code(call, 0, true));
            fast.syscall_ss = segment_word(&Segment::flat_data(call.wrapping_add(8), 0));
            fast.sysret_cs = segment_word(&Segment::flat_code(ret.wrapping_add(16) | 3, 3, true));
            fast.sysret_ss = segment_word(&Segment::flat_data(ret.wrapping_add(8) | 3, 3));
        }
        // Returning to ring 3 nulls data segments that ring 3 may not use; that is left to the long way.
        let kept = |s: Seg| !st.segment(s).usable() || st.segment(s).dpl() == 3;
        let plain = [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs].into_iter().all(kept);
        fast.iret_cs = if plain { fast.iret_known } else { NO_SELECTOR };
    }

    /// An IRETQ from ring 0 was carried out the long way: remember what it loaded, if the short way can repeat it.
    pub(crate) fn remember_iret(&mut self) {
        let st = self.cpu();
        let (cs, ss) = (*st.segment(Seg::Cs), *st.segment(Seg::Ss));
        let fast = &mut self.shared().fast;
        let in_gdt = |s: &Segment| s.selector & 4 == 0 && s.selector & !7 != 0;
        if st.cpl != 3 || !st.code64() || !in_gdt(&cs) || !in_gdt(&ss) || cs.base != 0 || ss.base != 0 {
            return;
        }
        let (cs_at, ss_at) = (st.gdtr.base + u64::from(cs.selector & !7), st.gdtr.base + u64::from(ss.selector & !7));
        let mut word = [0u8; 8];
        let mut read = |e: &mut Self, at: u64| {
            paravane_cpu::mem::read(st, e, at, &mut word, paravane_cpu::mem::Privilege::Supervisor).ok()?;
            Some(u64::from_le_bytes(word))
        };
        let (Some(c), Some(s)) = (read(self, cs_at), read(self, ss_at)) else { return };
        fast.iret_known = u32::from(cs.selector);
        fast.iret_ss = u32::from(ss.selector);
        (fast.iret_cs_at, fast.iret_cs_descriptor) = (cs_at, c);
        (fast.iret_ss_at, fast.iret_ss_descriptor) = (ss_at, s);
        fast.iret_cs_word = segment_word(&cs);
        fast.iret_ss_word = segment_word(&ss);
    }

    /// The GDT moved.
    pub(crate) fn forget_iret(&mut self) {
        self.shared().fast.iret_known = NO_SELECTOR;
    }

    /// Finds or makes the block at RIP. `None`: the cache is full.
    fn find(&mut self, mode: Mode) -> Result<Option<BlockId>, Exception> {
        let st = self.cpu();
        let rip = st.rip;
        let la = if mode.is64() {
            if !mmu::is_canonical(rip) {
                return Err(Exception::GeneralProtection(0));
            }
            rip
        } else {
            st.segment(Seg::Cs).base.wrapping_add(rip) & 0xffff_ffff
        };
        let (gpa, global) = self.fetch_address(la, mode)?;
        let mode = if global { Mode(mode.0 | Mode::GLOBAL) } else { mode };
        let key = Key { gpa, rip, mode };
        if !mode.alone()
            && let Some(&id) = self.map.get(&key)
        {
            let Some(second) = self.tables.blocks[id as usize].second_page else { return Ok(Some(id)) };
            let (now, _) = self.fetch_address(next_page(la, mode), mode)?;
            if now & !0xfff == second {
                return Ok(Some(id));
            }
            self.kill_block(id);
        }
        let before = self.profile.begin(Cause::Translate);
        if let Some(id) = self.copy_block(key) {
            self.profile.back(before);
            return Ok(Some(id));
        }
        let made = self.translate_watched(key, la);
        self.profile.back(before);
        made
    }

    /// Translates with the pages that the code comes from under watch before they are read.
    fn translate_watched(&mut self, key: Key, la: u64) -> Result<Option<BlockId>, Exception> {
        let first = key.gpa & !0xfff;
        self.hold_page(first);
        let mut second = None;
        let made = self.translate(key, la, &mut second);
        for page in [Some(first), second].into_iter().flatten() {
            self.release_unused_page(page);
        }
        made
    }

    fn translate(
        &mut self,
        mut key: Key,
        la: u64,
        second_page: &mut Option<u64>,
    ) -> Result<Option<BlockId>, Exception> {
        let began = Instant::now();
        let room = 4096 - (key.gpa as usize & 0xfff);
        let mut outside = [0u8; MAX_LEN];
        let mut copy = [0u8; MAX_BYTES];
        let bytes: &[u8] = match self.ram.host(key.gpa, room as u64) {
            Some(p) => {
                // A copy, because other vCPUs and devices may write to the page meanwhile. They tell of it afterwards, as the page is
                // watched already.
                let n = room.min(MAX_BYTES);
                // SAFETY: `room` bytes of guest RAM, which stays mapped.
                unsafe { std::ptr::copy_nonoverlapping(p, copy.as_mut_ptr(), n) };
                &copy[..n]
            }
            None => {
                // Code in device memory: one instruction at a time, never kept.
                key.mode.0 |= Mode::SINGLE;
                let n = room.min(MAX_LEN);
                self.read_phys(key.gpa, &mut outside[..n]);
                &outside[..n]
            }
        };
        let mut decoded = std::mem::take(&mut self.decoded);
        let mut outcome = decode(bytes, key.rip, key.mode, &mut decoded);
        let mut joined = [0u8; 2 * MAX_LEN];
        let mut code = bytes;
        if outcome == Decoded::NeedMore {
            let head = bytes.len().min(MAX_LEN);
            joined[..head].copy_from_slice(&bytes[bytes.len() - head..]);
            let next = next_page(la, key.mode);
            let fetched = self.fetch_address(next, key.mode);
            match fetched {
                Ok((gpa2, _)) => {
                    self.hold_page(gpa2 & !0xfff);
                    *second_page = Some(gpa2 & !0xfff);
                    self.read_phys(gpa2 & !0xfff, &mut joined[head..head + MAX_LEN]);
                    if self.ram.host(gpa2 & !0xfff, 4096).is_none() {
                        key.mode.0 |= Mode::SINGLE;
                    }
                }
                Err(exc) => {
                    self.decoded = decoded;
                    return Err(exc);
                }
            }
            outcome = decode(&joined[..head + MAX_LEN], key.rip, key.mode, &mut decoded);
            decoded.truncate(1);
            code = &joined;
            if outcome == Decoded::NeedMore {
                // More prefixes than an instruction may have: let the invalid-instruction path report it.
                let mut i = iced_x86::Instruction::new();
                i.set_len(MAX_LEN);
                i.set_ip(key.rip);
                decoded.push(i);
            }
        }
        let id = self.tables.blocks.len() as BlockId;
        let peek = if key.mode.is64() && !key.mode.alone() && second_page.is_none() {
            // SAFETY: as above, for the page as a whole.
            let page = self.ram.host(key.gpa & !0xfff, 4096).map(|p| unsafe { std::slice::from_raw_parts(p, 4096) });
            page.map(|bytes| Peek::new(bytes, key.rip & !0xfff, !key.mode.has(Mode::RING)))
        } else {
            None
        };
        let hint = Hint {
            gpr: &self.cpu().gpr,
            low: self.window.votes > 0,
            high: self.window.high(),
            kept: &self.kernel.kept,
        };
        let first = Firsts::of(&self.tables);
        let t = Translator::new(&mut self.asm, &mut self.info, &mut self.tables, key.mode, id, (key.rip, code), hint)
            .translate(&decoded, peek, !self.direct && !key.mode.alone());
        self.decoded = decoded;
        self.window.votes = (self.window.votes + t.votes).clamp(-1000, 1000);
        let Some(placed) = self.code.place(&mut self.asm) else {
            self.tables.faults.truncate(first.faults as usize);
            return Ok(None);
        };
        for x in &t.exits {
            self.tables.exits.push(x.place(id, placed));
        }
        let block = Block {
            key,
            guest_len: t.guest_len,
            seen: t.seen,
            second_page: *second_page,
            placed,
            entry: placed.offset(t.entry),
            door: t.door.map_or(NO_DOOR, |at| placed.offset(at)),
            incoming: NO_EXIT,
            exits: first.exits..self.tables.exits.len() as u32,
            faults: first.faults..self.tables.faults.len() as u32,
            live: !key.mode.alone(),
        };
        self.stats.blocks += 1;
        let len = self.asm.pos();
        self.add_block(block, t.instructions, len, began);
        self.keep_pattern(id, first, t.instructions);
        Ok(Some(id))
    }

    /// Enters a block whose code is in place, of so many guest instructions and `len` bytes; its making began at `began`.
    pub(crate) fn add_block(&mut self, b: Block, instructions: u32, len: u32, began: Instant) {
        let id = self.tables.blocks.len() as BlockId;
        let (key, guest_len, second, live) = (b.key, b.guest_len, b.second_page, b.live);
        self.tables.blocks.push(b);
        self.name_block(id);
        if live {
            self.map.insert(key, id);
            for page in [Some(key.gpa & !0xfff), second].into_iter().flatten() {
                self.watch_page(page, id);
            }
        }
        self.stats.instructions += u64::from(instructions);
        self.stats.guest_bytes += u64::from(guest_len);
        self.stats.code_bytes += u64::from(len);
        self.stats.translate_ns += began.elapsed().as_nanos() as u64;
    }

    /// Links exit `exit` to the block that was just entered at host address `target`, if that is allowed to last.
    pub(crate) fn link(&mut self, exit: u32, target: u64) {
        let Some(entry) = self.code.offset_of(target) else { return };
        let n = self.entered;
        let x = &self.tables.exits[exit as usize];
        let rip = x.target_rip;
        let from = &self.tables.blocks[x.block as usize];
        let mode = Mode(self.shared().mode);
        let shared = |m: Mode| m.0 & !Mode::GLOBAL;
        if (from.key.mode.0 ^ mode.0) & Mode::DF != 0 {
            // Both directions share a jump cache and calls to return to, which must be forgotten in between.
            return;
        }
        if !from.live || mode.alone() || self.cpu().rip != rip || shared(mode) != shared(x.target_mode) {
            return;
        }
        let Some(to) = self.tables.blocks.get(n as usize) else { return };
        if to.entry != entry || to.key.rip != rip || !to.live {
            return;
        }
        let same_page = from.key.gpa & !0xfff == to.key.gpa & !0xfff
            && from.key.rip & !0xfff == to.key.rip & !0xfff
            && to.second_page.is_none();
        let both_global = from.key.mode.has(Mode::GLOBAL) && to.key.mode.has(Mode::GLOBAL);
        let windowed = from.key.mode.has(Mode::WINDOW) && to.key.mode.has(Mode::WINDOW);
        if !same_page && windowed {
            let page = to.key.rip & !0xfff;
            let next = to.second_page.map(|_| page.wrapping_add(4096));
            for page in [Some(page), next].into_iter().flatten() {
                if !self.window.note_link(exit, page) {
                    self.unlink_page(page);
                    return;
                }
            }
        } else if !same_page && !both_global {
            // The link would not outlive a change of mappings, but the jump cache does not need the detour through Rust.
            let (patch, view) = (x.patch, x.target_mode.view());
            if x.target_mode.has(Mode::FLAT) {
                crate::translate::jump_cache_stub(&mut self.asm, rip, view);
                if let Some(stub) = self.code.place(&mut self.asm) {
                    self.code.patch(patch, stub.hot);
                }
            }
            return;
        }
        if !same_page && !windowed {
            self.cross_links.push(exit);
            self.low_cross_links |= from.key.rip >> 47 == 0 || to.key.rip >> 47 == 0;
        }
        if x.linked.is_some() {
            return;
        }
        self.attach(exit, n);
        self.stats.chained += 1;
    }

    /// Points an exit that is not linked at a block.
    pub(crate) fn attach(&mut self, exit: u32, to: BlockId) {
        let x = &mut self.tables.exits[exit as usize];
        let b = &mut self.tables.blocks[to as usize];
        x.linked = Some(to);
        x.next = std::mem::replace(&mut b.incoming, exit);
        self.code.patch(x.patch, b.entry);
    }

    /// Points an exit back at its stub.
    pub(crate) fn unlink(&mut self, exit: u32) {
        let x = &mut self.tables.exits[exit as usize];
        let Some(to) = x.linked.take() else { return };
        let next = std::mem::replace(&mut x.next, NO_EXIT);
        let (patch, stub) = (x.patch, x.stub);
        self.code.patch(patch, stub);
        // Take it out of its target's list.
        let head = &mut self.tables.blocks[to as usize].incoming;
        if *head == exit {
            *head = next;
            return;
        }
        let mut at = *head;
        while at != NO_EXIT {
            let x = &mut self.tables.exits[at as usize];
            if x.next == exit {
                x.next = next;
                return;
            }
            at = x.next;
        }
    }

    /// Makes a block unreachable. Its code stays in place until the cache is emptied.
    pub(crate) fn kill_block(&mut self, id: BlockId) {
        let b = &mut self.tables.blocks[id as usize];
        if !b.live {
            return;
        }
        b.live = false;
        let (key, second, exits) = (b.key, b.second_page, b.exits.clone());
        self.map.remove(&key);
        while self.tables.blocks[id as usize].incoming != NO_EXIT {
            let x = self.tables.blocks[id as usize].incoming;
            self.unlink(x);
        }
        for x in exits {
            self.unlink(x);
        }
        for page in [Some(key.gpa & !0xfff), second].into_iter().flatten() {
            if let Some(p) = self.pages.get_mut(&page) {
                p.blocks.retain(|&b| b != id);
            }
            self.release_unused_page(page);
        }
        for view in 0..crate::state::VIEWS {
            self.clear_jump_cache_entry(view, jump_index(key.rip));
        }
    }

    /// Forgets all translated code. Nobody may be inside a block.
    pub(crate) fn empty_cache(&mut self) {
        self.attribute_samples();
        self.cache_full = false;
        self.stats.cache_flushes += 1;
        self.map.clear();
        self.patterns.clear();
        self.release_all_pages();
        self.cross_links.clear();
        self.window.forget_links();
        self.forget_all_calls();
        self.tables.clear();
        self.code.clear();
        self.forget_names();
        for view in 0..crate::state::VIEWS {
            self.flush_jump_cache(view);
        }
    }
}

/// Linear address of the page behind the one that holds `la`.
fn next_page(la: u64, mode: Mode) -> u64 {
    let next = (la & !0xfff).wrapping_add(4096);
    if mode.is64() { next } else { next & 0xffff_ffff }
}

/// Limit, attributes and selector in one word, as they lie in memory.
fn segment_word(s: &Segment) -> u64 {
    u64::from(s.limit) | u64::from(s.attr) << 32 | u64::from(s.selector) << 48
}
