//! Behind the soft TLB: fills, flushes, operands that cannot be reached in place, and stores into translated code.
#![allow(unsafe_code)] // Copies between guest RAM and the bounce buffer.

use crate::block::{BlockId, Mode, NO_BLOCK, Site};
use crate::engine::Engine;
use crate::profile::Cause;
use crate::state::{JumpEntry, Side, TLB_ENTRIES, TLB_GLOBAL, Thunk, TlbEntry, VIEWS, empty_jump_tag, empty_ntag};
use paravane_cpu::mmu::{self, Access, AccessKind};
use paravane_cpu::state::{cr4, rflags};
use paravane_cpu::{CpuState, Env, Exception, Seg, ea};

/// Marks an empty soft-TLB entry.
const NO_PAGE: u64 = u64::MAX;

/// What became of an access that missed.
pub(crate) enum Resolved {
    /// The soft TLB has it now: start over.
    Filled,
    /// The operand is in the bounce buffer, at this host address.
    Bounced(u64),
    /// The store hits the very block it is in, which is gone now.
    OwnCode,
}

/// One physically contiguous part of a bounced operand.
#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    gpa: u64,
    len: usize,
}

/// Where the operand in the bounce buffer goes when it is written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BounceTarget {
    pieces: [Piece; 2],
    /// Offset in the buffer: the operand's own alignment, so that alignment faults are as they would be in place.
    at: usize,
    /// Bytes to write, for masked vector stores; else all.
    active: Option<u64>,
    /// The store faults, unless the instruction turns out not to store because of an exception of its own: the fault, and the
    /// x87/SSE state from before.
    fault: Option<Exception>,
    /// The store is an x87 instruction's.
    x87: bool,
    /// The instruction has worked on guest RAM itself, at the first piece.
    direct: bool,
}

impl Engine {
    /// RIP of the instruction that a site belongs to.
    pub(crate) fn site_rip(&self, s: &Site) -> u64 {
        self.tables.blocks[s.block as usize].key.rip.wrapping_add(u64::from(s.delta))
    }

    /// Makes the operand at linear address `la` reachable.
    pub(crate) fn resolve(&mut self, la: u64, s: &Site) -> Result<Resolved, Exception> {
        let st = self.cpu();
        let size = u64::from(s.size);
        if s.masked && self.active_bytes(s) == Some(0) {
            // Nothing is touched, so nothing about the address matters.
            self.bounce = BounceTarget { active: Some(0), ..BounceTarget::default() };
            return Ok(Resolved::Bounced(self.shared().bounce.0.as_ptr() as u64));
        }
        if s.align > 1 && la & u64::from(s.align - 1) != 0 {
            return Err(Exception::GeneralProtection(0));
        }
        let last = la.wrapping_add(size - 1);
        if st.code64() && !(mmu::is_canonical(la) && mmu::is_canonical(last)) {
            let exc = if s.seg == 2 { Exception::StackFault(0) } else { Exception::GeneralProtection(0) };
            return if s.late_fault { Ok(self.fault_late(exc, s.x87)) } else { Err(exc) };
        }
        let kind = if s.write { AccessKind::Write } else { AccessKind::Read };
        if (la ^ last) >> 12 != 0 || last < la {
            if (s.window || s.kernel) && self.pieces(la, usize::from(s.size), kind).is_ok() {
                self.profile.begin(Cause::Window);
                let (a, b) = (self.map_directly(la, s), self.map_directly(last, s));
                if a || b {
                    return Ok(Resolved::Filled);
                }
            }
            return self.bounce_access(la, s, kind);
        }
        let t = match mmu::walk(st, self, la, Access::current(st, kind)) {
            Ok(t) => t,
            Err(exc) if s.masked => return self.masked_or_late(la, s, kind, exc),
            Err(exc) if s.late_fault => return Ok(self.fault_late(exc, s.x87)),
            Err(exc) => return Err(exc),
        };
        let page = t.gpa & !0xfff;
        let Some(hva) = self.ram.host(page, 4096) else { return self.bounce_access(la, s, kind) };
        if s.write {
            if self.pages.contains_key(&page) && self.overwrite(t.gpa, size, s.block) {
                return Ok(Resolved::OwnCode);
            }
            if !self.ram.claim(page) {
                return self.bounce_access(la, s, kind);
            }
        }
        if s.window || s.kernel {
            // The soft TLB does not serve this access: what cannot be mapped goes through the bounce buffer.
            self.profile.begin(Cause::Window);
            return if self.map_directly(la, s) { Ok(Resolved::Filled) } else { self.bounce_access(la, s, kind) };
        }
        let writable = s.write || (t.writable && t.dirty);
        let view = crate::block::Mode(self.shared().mode).view();
        self.fill(view, la, (page, hva as u64), t.global, writable, t.page_shift);
        Ok(Resolved::Filled)
    }

    /// Maps a page that an access through a window or a kernel mapping missed; false when that changes nothing.
    fn map_directly(&mut self, la: u64, s: &Site) -> bool {
        if s.kernel { self.map_for_kernel(la, s.write, s) } else { self.map_in_window(la, s.write) }
    }

    /// What emulated instructions and exception delivery ask: the soft TLB first, for stacks and descriptor tables stay where they are.
    pub(crate) fn translate_through_tlb(&mut self, st: &CpuState, la: u64, access: Access) -> Result<u64, Exception> {
        let view = if access.user {
            Mode::VIEW_USER
        } else if st.cr4 & cr4::SMAP != 0 && (access.implicit || st.rflags & rflags::AC == 0) {
            Mode::VIEW_SMAP
        } else {
            Mode::VIEW_SUPER
        } as usize;
        let entry = &self.shared().tlb[view][(la >> 12) as usize & (TLB_ENTRIES - 1)];
        let tag = match access.kind {
            AccessKind::Read => entry.ntag_r,
            AccessKind::Write => entry.ntag_w,
            AccessKind::Execute => return Ok(mmu::walk(st, self, la, access)?.gpa),
        };
        if tag == (la & !0xfff).wrapping_neg() {
            return Ok(entry.gpa & !0xfff | la & 0xfff);
        }
        let t = mmu::walk(st, self, la, access)?;
        let page = t.gpa & !0xfff;
        if let Some(hva) = self.ram.host(page, 4096) {
            let writable = access.kind == AccessKind::Write || (t.writable && t.dirty);
            self.fill(view, la, (page, hva as u64), t.global, writable, t.page_shift);
        }
        Ok(t.gpa)
    }

    fn fill(&mut self, view: usize, la: u64, (page, hva): (u64, u64), global: bool, writable: bool, shift: u8) {
        let n = (la >> 12) as usize & (TLB_ENTRIES - 1);
        let entry = &mut self.shared().tlb[view][n];
        let ntag = (la & !0xfff).wrapping_neg();
        if entry.gpa == NO_PAGE || (entry.gpa & TLB_GLOBAL != 0) != global {
            self.tlb_used[view].note(n, global, TLB_ENTRIES);
        }
        let was_writable = entry.ntag_r == ntag && entry.ntag_w == ntag && entry.gpa & !0xfff == page;
        let write = (writable || was_writable) && self.ram.claim(page);
        *entry = TlbEntry {
            ntag_r: ntag,
            ntag_w: if write { ntag } else { empty_ntag(n) },
            hva,
            gpa: page | if global { TLB_GLOBAL } else { 0 },
        };
        if shift > 12 {
            self.note_large(la, shift);
        }
    }

    /// Splits an access into at most two physical pieces, checking rights on both pages before anything happens.
    fn pieces(&mut self, la: u64, size: usize, kind: AccessKind) -> Result<[Piece; 2], Exception> {
        let st = self.cpu();
        let first = (4096 - (la as usize & 0xfff)).min(size);
        let access = Access::current(st, kind);
        let a = mmu::walk(st, self, la, access)?;
        let mut out = [Piece { gpa: a.gpa, len: first }, Piece::default()];
        if first < size {
            let mut next = la.wrapping_add(first as u64);
            if !st.long_mode() {
                next &= 0xffff_ffff;
            }
            let b = mmu::walk(st, self, next, access)?;
            out[1] = Piece { gpa: b.gpa, len: size - first };
        }
        Ok(out)
    }

    /// Brings an operand into the bounce buffer.
    fn bounce_access(&mut self, la: u64, s: &Site, kind: AccessKind) -> Result<Resolved, Exception> {
        let pieces = match self.pieces(la, usize::from(s.size), kind) {
            Ok(p) => p,
            Err(exc) if s.masked => return self.masked_or_late(la, s, kind, exc),
            Err(exc) if s.late_fault => return Ok(self.fault_late(exc, s.x87)),
            Err(exc) => return Err(exc),
        };
        self.load_bounce(pieces, s, la as usize & 63)
    }

    fn load_bounce(&mut self, pieces: [Piece; 2], s: &Site, start: usize) -> Result<Resolved, Exception> {
        if s.read && s.write && pieces[1].len > 0 {
            // It may be a locked one. Until the operand has been written back.
            self.be_alone();
        }
        if s.write {
            let mut own = false;
            for p in pieces.iter().filter(|p| p.len > 0) {
                own |= self.overwrite(p.gpa, p.len as u64, s.block);
            }
            if own {
                self.end_alone();
                return Ok(Resolved::OwnCode);
            }
        }
        if let [p, Piece { len: 0, .. }] = pieces
            && let Some(host) = self.ram.host(p.gpa, p.len as u64)
        {
            // RAM within a page: the instruction works on it in place, as atomic as it is by itself, and the store is reported behind it.
            self.stats.direct += u64::from(s.write);
            self.bounce = BounceTarget { pieces, direct: true, ..BounceTarget::default() };
            return Ok(Resolved::Bounced(host as u64));
        }
        self.stats.bounced += 1;
        self.profile.begin(Cause::Bounce);
        self.bounce = BounceTarget { pieces, at: start, ..BounceTarget::default() };
        let buf = &mut self.shared().bounce.0;
        let mut at = start;
        for p in pieces.iter().filter(|p| p.len > 0) {
            let part = &mut buf[at..at + p.len];
            // A device must see reads only when there is one.
            if s.read || self.ram.host(p.gpa, p.len as u64).is_some() {
                self.read_phys(p.gpa, part);
            }
            at += p.len;
        }
        Ok(Resolved::Bounced(buf[start..].as_ptr() as u64))
    }

    /// Lets an x87 store run on the bounce buffer to see whether it would store at all before its fault is raised.
    fn fault_late(&mut self, exc: Exception, x87: bool) -> Resolved {
        let before = &self.cpu().xsave.0[..self.before_fault.len()];
        self.before_fault.copy_from_slice(before);
        self.bounce = BounceTarget { fault: Some(exc), x87, ..BounceTarget::default() };
        Resolved::Bounced(self.shared().bounce.0.as_ptr() as u64)
    }

    /// Writes the bounce buffer to where it belongs, or gives the fault that was put off.
    pub(crate) fn commit_bounce(&mut self) -> Result<(), Exception> {
        if let Some(exc) = self.bounce.fault.take() {
            let st = self.cpu();
            // An unmasked invalid operation, overflow or underflow keeps the instruction from storing.
            let (fcw, fsw) = (st.xsave.0[0], st.xsave.0[2]);
            if self.bounce.x87 && fsw & !fcw & 0x19 != 0 {
                return Ok(());
            }
            st.xsave.0[..self.before_fault.len()].copy_from_slice(&self.before_fault);
            return Err(exc);
        }
        let BounceTarget { pieces, at: start, active, direct, .. } = self.bounce;
        if direct {
            self.ram.report(pieces[0].gpa, pieces[0].len as u64);
            return Ok(());
        }
        let buf = self.shared().bounce.0;
        let mut at = start;
        for p in pieces.iter().filter(|p| p.len > 0) {
            match active {
                None => self.write_phys(p.gpa, &buf[at..at + p.len]),
                Some(active) => {
                    for k in (0..p.len).filter(|k| active >> (at - start + k) & 1 != 0) {
                        self.write_phys(p.gpa + k as u64, &buf[at + k..at + k + 1]);
                    }
                }
            }
            at += p.len;
        }
        self.end_alone();
        Ok(())
    }

    fn masked_or_late(&mut self, la: u64, s: &Site, kind: AccessKind, exc: Exception) -> Result<Resolved, Exception> {
        match self.masked_access(la, s, kind, exc) {
            Err(exc) if s.late_fault => Ok(self.fault_late(exc, s.x87)),
            r => r,
        }
    }

    /// A masked vector access faulted as a whole: only its active bytes count (SDM vol. 1, section 15.6.4).
    fn masked_access(&mut self, la: u64, s: &Site, kind: AccessKind, exc: Exception) -> Result<Resolved, Exception> {
        let st = self.cpu();
        let Some(active) = self.active_bytes(s) else { return Err(exc) };
        let size = usize::from(s.size);
        let first = (4096 - (la as usize & 0xfff)).min(size);
        let low = if first >= 64 { u64::MAX } else { (1 << first) - 1 };
        let access = Access::current(st, kind);
        let mut pieces = [Piece::default(); 2];
        // A page without active bytes is not touched at all, and the first active byte is the one that faults.
        if active & low != 0 {
            let skip = u64::from(active.trailing_zeros());
            let t = mmu::walk(st, self, la.wrapping_add(skip), access)?;
            pieces[0] = Piece { gpa: t.gpa - skip, len: first };
        }
        if first < size && active & !low != 0 {
            let skip = u64::from((active & !low).trailing_zeros());
            let t = mmu::walk(st, self, la.wrapping_add(skip), access)?;
            pieces[1] = Piece { gpa: t.gpa - (skip - first as u64), len: size - first };
        }
        if s.write {
            let mut own = false;
            for p in pieces.iter().filter(|p| p.len > 0) {
                own |= self.overwrite(p.gpa, p.len as u64, s.block);
            }
            if own {
                return Ok(Resolved::OwnCode);
            }
        }
        let start = la as usize & 63;
        let buf = &mut self.shared().bounce.0[start..];
        buf[..size].fill(0);
        if pieces[0].len > 0 {
            self.read_phys(pieces[0].gpa, &mut buf[..first]);
        }
        if pieces[1].len > 0 {
            self.read_phys(pieces[1].gpa, &mut buf[first..size]);
        }
        self.stats.bounced += 1;
        // A piece that is not there still takes its place in the buffer.
        let place = |n: usize, len: usize| if pieces[n].len > 0 { pieces[n] } else { Piece { gpa: 0, len } };
        let pieces = [place(0, first), place(1, size - first)];
        self.bounce = BounceTarget { pieces, at: start, active: Some(active), ..BounceTarget::default() };
        Ok(Resolved::Bounced(buf.as_ptr() as u64))
    }

    /// The bytes of a masked operand that its instruction really touches.
    fn active_bytes(&mut self, s: &Site) -> Option<u64> {
        let st = self.cpu();
        st.rip = self.site_rip(s);
        let mut bytes = [0u8; 15];
        let base = if st.code64() { 0 } else { st.segment(Seg::Cs).base };
        let n = paravane_cpu::mem::fetch(st, self, base.wrapping_add(st.rip), &mut bytes).ok()?;
        let i =
            iced_x86::Decoder::with_ip(st.code_bits(), &bytes[..n], st.rip, iced_x86::DecoderOptions::NONE).decode();
        paravane_cpu::masked::active_bytes(st, &i).map(|m| m.bytes)
    }

    /// Linear address of an offset in a site's segment, checked against its limit and type.
    pub(crate) fn segment_address(&mut self, s: &Site, offset: u64) -> Result<u64, Exception> {
        const SEGS: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];
        let st = self.cpu();
        st.rip = self.site_rip(s);
        ea::segmented(st, SEGS[usize::from(s.seg).min(5)], offset, usize::from(s.size), s.write)
    }

    /// As [`Self::resolve`], always by way of the bounce buffer. `None`: the store hits its own block.
    pub(crate) fn resolve_segmented(&mut self, la: u64, s: &Site) -> Result<Option<u64>, Exception> {
        let kind = if s.write { AccessKind::Write } else { AccessKind::Read };
        match self.bounce_access(la, s, kind)? {
            Resolved::Bounced(p) => Ok(Some(p)),
            _ => Ok(None),
        }
    }

    /// `len` bytes at `gpa` are about to be written: blocks made from them go. True when `block` is one of them.
    pub(crate) fn overwrite(&mut self, gpa: u64, len: u64, block: BlockId) -> bool {
        let before = self.tables.blocks[block as usize].live;
        self.ram_written(gpa, len);
        before && !self.tables.blocks[block as usize].live
    }

    /// Guest RAM changes at `gpa`: blocks made from those bytes go.
    pub(crate) fn ram_written(&mut self, gpa: u64, len: u64) {
        let mut page = gpa & !0xfff;
        while page < gpa.saturating_add(len) {
            if let Some(p) = self.pages.get(&page) {
                let hit: Vec<BlockId> = p.blocks.iter().copied().filter(|&b| self.block_covers(b, gpa, len)).collect();
                for b in hit {
                    self.stats.smc_invalidations += 1;
                    self.kill_block(b);
                }
            }
            page += 4096;
        }
    }

    fn block_covers(&self, id: BlockId, gpa: u64, len: u64) -> bool {
        let b = &self.tables.blocks[id as usize];
        let in_first = u64::from(b.guest_len).min(4096 - (b.key.gpa & 0xfff));
        let overlaps = |start: u64, n: u64| gpa < start + n && start < gpa.saturating_add(len);
        let page = b.key.gpa & !0xfff;
        overlaps(b.key.gpa, in_first)
            || overlaps(page + u64::from(b.seen.start), u64::from(b.seen.end - b.seen.start))
            || b.second_page.is_some_and(|p| overlaps(p, u64::from(b.guest_len).saturating_sub(in_first)))
    }

    /// A block was made from a page: stores into it must be noticed from now on.
    pub(crate) fn watch_page(&mut self, page: u64, id: BlockId) {
        let p = self.pages.entry(page).or_default();
        p.blocks.push(id);
        if p.blocks.len() > 1 {
            return;
        }
        self.drop_write_access(page);
    }

    /// Takes write access from every soft-TLB entry of a guest-physical page.
    pub(crate) fn drop_write_entries(&mut self, page: u64) {
        for view in 0..VIEWS {
            let used = &self.tlb_used[view];
            for n in used.local.iter().chain(&used.global).map(|&n| usize::from(n)) {
                let e = &mut self.shared().tlb[view][n];
                if e.gpa & !0xfff == page {
                    e.ntag_w = empty_ntag(n);
                }
            }
        }
    }

    // ---- flushes ----

    pub(crate) fn clear_tlb_arrays(&mut self) {
        for view in 0..VIEWS {
            for n in 0..TLB_ENTRIES {
                self.clear_tlb_entry(view, n);
            }
            self.tlb_used[view] = Default::default();
        }
    }

    fn clear_tlb_entry(&mut self, view: usize, n: usize) {
        let t = empty_ntag(n);
        self.shared().tlb[view][n] = TlbEntry { ntag_r: t, ntag_w: t, hva: 0, gpa: NO_PAGE };
    }

    pub(crate) fn init_jump_caches(&mut self) {
        for view in 0..VIEWS {
            // All other second ones are empty as fresh memory is.
            self.clear_jump_cache_entry(view, 0);
            let miss = self.shared().thunks[Thunk::lookup(view) as usize];
            self.shared().jc[view].doors.fill(miss);
            self.jc_used[view] = Default::default();
        }
    }

    pub(crate) fn clear_jump_cache_entry(&mut self, view: usize, n: usize) {
        let sh = self.shared();
        let miss = sh.thunks[Thunk::lookup(view) as usize];
        sh.jc[view].doors[n] = miss;
        sh.jc[view].second[n] = JumpEntry { neg_rip: empty_jump_tag(n), host: 0 };
        self.jc_first[view][n] = NO_BLOCK;
    }

    pub(crate) fn flush_jump_cache(&mut self, view: usize) {
        for n in self.jc_used[view].take() {
            self.clear_jump_cache_entry(view, n);
        }
    }

    /// Drops a supervisor view's jump-cache entries for the lower half, if a guest kernel runs code there.
    fn flush_low_jumps(&mut self, view: usize) {
        if self.low_supervisor_code {
            self.flush_jump_cache(view);
        }
    }

    fn flush_code_mappings(&mut self) {
        for view in 0..VIEWS {
            self.flush_jump_cache(view);
        }
        self.low_cross_links = false;
        self.low_supervisor_code = false;
        self.forget_calls(Side::Kernel);
        for x in std::mem::take(&mut self.cross_links) {
            self.unlink(x);
        }
    }

    /// Drops every cached translation of addresses.
    pub(crate) fn flush_all_translations(&mut self) {
        self.stats.tlb_flushes += 1;
        for view in 0..VIEWS {
            for n in self.tlb_used[view].take() {
                self.clear_tlb_entry(view, n);
            }
        }
        for (_, set) in &mut self.large {
            set.clear();
        }
        self.exec_tlb.clear();
        self.flush_code_mappings();
    }

    /// Drops what a CR3 load drops.
    pub(crate) fn flush_non_global(&mut self) {
        self.stats.tlb_flushes += 1;
        self.exec_tlb.clear_non_global();
        for view in 0..VIEWS {
            let mut used = std::mem::take(&mut self.tlb_used[view].local);
            for n in used.drain(..) {
                self.clear_tlb_entry(view, usize::from(n));
            }
            self.tlb_used[view].local = used;
            let mut used = std::mem::take(&mut self.jc_used[view].local);
            for n in used.drain(..) {
                self.clear_jump_cache_entry(view, usize::from(n));
            }
            self.jc_used[view].local = used;
        }
    }

    /// Drops one page.
    pub(crate) fn flush_page(&mut self, la: u64) {
        self.stats.tlb_page_flushes += 1;
        let page = la & !0xfff;
        if let Some(shift) = self.large_shift(la) {
            return self.flush_large(la, shift);
        }
        let n = (la >> 12) as usize & (TLB_ENTRIES - 1);
        for view in 0..VIEWS {
            let e = &self.shared().tlb[view][n];
            if e.gpa != NO_PAGE && e.ntag_r == page.wrapping_neg() {
                self.clear_tlb_entry(view, n);
            }
        }
        if self.exec_tlb.seen(page) {
            self.exec_tlb.forget(page);
            if la >> 47 == 0 && !self.low_cross_links {
                // Links lead across pages of the kernel's half only.
                self.flush_jump_cache(crate::block::Mode::VIEW_USER as usize);
                for view in [crate::block::Mode::VIEW_SMAP, crate::block::Mode::VIEW_SUPER] {
                    self.flush_low_jumps(view as usize);
                }
            } else {
                self.flush_code_mappings();
            }
        }
    }

    /// Drops every entry that stands for a part of the large page around `la`.
    fn flush_large(&mut self, la: u64, shift: u32) {
        for view in 0..VIEWS {
            let used = &self.tlb_used[view];
            let all: Vec<u16> = used.local.iter().chain(&used.global).copied().collect();
            for n in all.into_iter().map(usize::from) {
                let e = &self.shared().tlb[view][n];
                if e.gpa != NO_PAGE && e.ntag_r.wrapping_neg() >> shift == la >> shift {
                    self.clear_tlb_entry(view, n);
                }
            }
        }
        self.exec_tlb.clear();
        self.flush_code_mappings();
    }

    /// Remembers that the soft TLB holds parts of a page of `1 << shift` bytes around `la`.
    pub(crate) fn note_large(&mut self, la: u64, shift: u8) {
        if let Some(set) = self.large.iter_mut().find(|s| s.0 == u32::from(shift)) {
            set.1.insert(la >> shift, ());
        }
    }

    /// The size of the largest page around `la` that entries stand for parts of.
    pub(crate) fn large_shift(&self, la: u64) -> Option<u32> {
        self.large.iter().filter(|(shift, set)| set.contains_key(&(la >> shift))).map(|(shift, _)| *shift).max()
    }
}
