//! Blocks copied to where another process has the same code.
//!
//! A library or a position-independent program lies at other addresses in every process, so its code is translated once more in each, although
//! little in a block depends on its RIP: constants made from it, and the numbers of its records in [`Tables`]. The assembler notes
//! where they are, and a block of the same guest-physical code in the same mode is then a copy with those places changed.
//!
//! Only blocks at high user addresses are copied. There everything that is made from RIP takes 64 bits in emitted code, whatever the process, so
//! a copy is byte for byte what a translation would have been; but for the guesses that a translation makes from the registers at hand, which
//! the copy inherits.

use crate::asm::Reloc;
use crate::block::{Block, BlockId, Callout, FaultSite, Key, Mode, NO_DOOR, NO_EXIT, Site, Tables};
use crate::engine::Engine;
use crate::state::{JC_ENTRIES, jump_index};
use crate::translate::RawExit;
use crate::window::High;
use iced_x86::{Instruction, OpKind, Register};
use std::ops::Range;
use std::time::Instant;

/// How far from a block the addresses are that it makes from its RIP, at most.
const REACH: u64 = 1 << 32;

/// What a copy is made from: a block, and its records that [`Block`] does not list.
pub(crate) struct Pattern {
    block: BlockId,
    /// Length of the code as it was assembled.
    len: u32,
    instructions: u32,
    sites: Range<u32>,
    callouts: Range<u32>,
    relocs: Range<u32>,
}

/// Lengths of the tables before a block was translated, from which its records are counted.
#[derive(Clone, Copy)]
pub(crate) struct Firsts {
    pub(crate) sites: u32,
    pub(crate) callouts: u32,
    pub(crate) exits: u32,
    pub(crate) faults: u32,
}

impl Firsts {
    pub(crate) fn of(t: &Tables) -> Self {
        Self {
            sites: t.sites.len() as u32,
            callouts: t.callouts.len() as u32,
            exits: t.exits.len() as u32,
            faults: t.faults.len() as u32,
        }
    }
}

/// What changes from a block to its copy.
#[derive(Clone, Copy)]
struct Change {
    rip: u64,
    sites: u32,
    callouts: u32,
    exits: u32,
    /// How much further the cold part is from the hot one.
    cold: u32,
}

/// Whether code of this mode at `rip` can be copied, and copied to.
pub(crate) fn movable(mode: Mode, rip: u64, high: High) -> bool {
    mode.is64()
        && mode.has(Mode::USER)
        && !mode.alone()
        && [rip.wrapping_sub(REACH), rip.wrapping_add(REACH)].into_iter().all(|la| high.contains(la))
}

/// The key of a pattern: of all RIPs that the code may be at.
fn anywhere(key: Key) -> Key {
    Key { rip: 0, ..key }
}

/// So many bytes of a block's code.
fn bytes<const N: usize>(code: &mut [u8], at: u32) -> &mut [u8; N] {
    code[at as usize..].first_chunk_mut().expect("what a copy changes lies in its block")
}

fn add64(code: &mut [u8], at: u32, n: u64) {
    let b = bytes(code, at);
    *b = u64::from_le_bytes(*b).wrapping_add(n).to_le_bytes();
}

fn add32(code: &mut [u8], at: u32, n: u32) {
    let b = bytes(code, at);
    *b = u32::from_le_bytes(*b).wrapping_add(n).to_le_bytes();
}

/// Changes a copy of a block's code.
fn relocate(code: &mut [u8], relocs: &[Reloc], by: Change) {
    for &r in relocs {
        match r {
            Reloc::Rip(at) => add64(code, at, by.rip),
            Reloc::MinusRip(at) => add64(code, at, by.rip.wrapping_neg()),
            Reloc::Site(at) => add32(code, at, by.sites),
            Reloc::Callout(at) => add32(code, at, by.callouts),
            Reloc::Exit(at) => add32(code, at, by.exits),
            Reloc::ToCold(at) => add32(code, at, by.cold),
            Reloc::ToHot(at) => add32(code, at, by.cold.wrapping_neg()),
            Reloc::Door(at, first) => {
                let b = bytes(code, at);
                let old = (u32::from_le_bytes(*b) - first) as usize / size_of::<u64>();
                // The distance is a number of whole pages: it does not touch the bits of RIP that no index has.
                let new = (old + jump_index(by.rip)) % JC_ENTRIES;
                *b = (first + (new * size_of::<u64>()) as u32).to_le_bytes();
            }
        }
    }
}

/// An instruction as it is `by` further on.
fn moved(mut i: Instruction, by: u64) -> Instruction {
    i.set_ip(i.ip().wrapping_add(by));
    if i.memory_base() == Register::RIP {
        i.set_memory_displacement64(i.memory_displacement64().wrapping_add(by));
    }
    if i.op0_kind() == OpKind::NearBranch64 {
        i.set_near_branch64(i.near_branch64().wrapping_add(by));
    }
    i
}

impl Engine {
    /// A block was translated whose code may be copied: keeps what that takes. The assembler still has it.
    pub(crate) fn keep_pattern(&mut self, id: BlockId, first: Firsts, instructions: u32) {
        let b = &self.tables.blocks[id as usize];
        if b.second_page.is_some() {
            return;
        }
        let Some(relocs) = self.asm.relocations() else { return };
        let from = self.tables.relocs.len() as u32;
        self.tables.relocs.extend_from_slice(relocs);
        let t = &self.tables;
        let pattern = Pattern {
            block: id,
            len: self.asm.pos(),
            instructions,
            sites: first.sites..t.sites.len() as u32,
            callouts: first.callouts..t.callouts.len() as u32,
            relocs: from..t.relocs.len() as u32,
        };
        self.patterns.insert(anywhere(b.key), pattern);
    }

    /// Makes the block of `key` from one of the same code at another RIP. `None`: there is none, or no room in the cache.
    pub(crate) fn copy_block(&mut self, key: Key) -> Option<BlockId> {
        if !movable(key.mode, key.rip, self.window.high()) {
            return None;
        }
        let p = self.patterns.get(&anywhere(key))?;
        let began = Instant::now();
        let old = &self.tables.blocks[p.block as usize];
        if !old.live {
            return None;
        }
        let (from, faults, seen, guest_len) = (old.placed, old.faults.clone(), old.seen.clone(), old.guest_len);
        let (old_exits, old_rip, old_entry) = (old.exits.clone(), old.key.rip, old.entry);
        // A door elsewhere is the other one's alone.
        let old_door = Some(old.door).filter(|&at| from.is_hot(at));
        let t = &mut self.tables;
        let id = t.blocks.len() as BlockId;
        let first = Firsts::of(t);
        let mut by = Change {
            rip: key.rip.wrapping_sub(old_rip),
            sites: first.sites - p.sites.start,
            callouts: first.callouts - p.callouts.start,
            exits: first.exits - old_exits.start,
            cold: 0,
        };
        let relocs = &t.relocs[p.relocs.start as usize..p.relocs.end as usize];
        let placed = self.code.place_copy(from, p.len, |code, further| {
            by.cold = further;
            relocate(code, relocs, by);
        })?;
        for n in p.sites.clone() {
            let site = Site { block: id, ..t.sites[n as usize] };
            t.sites.push(site);
        }
        for n in p.callouts.clone() {
            let c = &t.callouts[n as usize];
            let copy = Callout { block: id, instr: moved(c.instr, by.rip), ..*c };
            t.callouts.push(copy);
        }
        for n in faults {
            let copy: FaultSite = t.faults[n as usize].renumbered(by.sites);
            t.faults.push(copy);
        }
        for n in old_exits {
            let x = &t.exits[n as usize];
            let copy = RawExit {
                target_rip: x.target_rip.wrapping_add(by.rip),
                target_mode: x.target_mode,
                patch: from.inverse(x.patch),
                stub: from.inverse(x.stub),
            }
            .place(id, placed);
            // The other one may be linked.
            self.code.patch(copy.patch, copy.stub);
            t.exits.push(copy);
        }
        let block = Block {
            key,
            guest_len,
            seen,
            second_page: None,
            placed,
            entry: placed.offset(from.inverse(old_entry)),
            door: old_door.map_or(NO_DOOR, |at| placed.offset(from.inverse(at))),
            incoming: NO_EXIT,
            exits: first.exits..t.exits.len() as u32,
            faults: first.faults..t.faults.len() as u32,
            live: true,
        };
        self.stats.copied += 1;
        let (instructions, len) = (p.instructions, p.len);
        self.add_block(block, instructions, len, began);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::Asm;
    use crate::block::FaultKind;
    use crate::engine::WordMap;
    use crate::translate::{Decoded, Hint, Peek, Translator, decode, linux_mode};
    use iced_x86::InstructionInfoFactory;

    /// A block as it would be placed, with its parts so much further apart.
    struct Made {
        code: Vec<u8>,
        relocs: Option<Vec<Reloc>>,
        exits: Vec<(u64, u32, u32)>,
        len: u32,
        first: Firsts,
        faults: Range<usize>,
    }

    struct Maker {
        asm: Asm,
        info: InstructionInfoFactory,
        tables: Tables,
    }

    impl Maker {
        /// Translates what is at `offset` of a page that is at `base`.
        fn make(&mut self, mode: Mode, page: &[u8], base: u64, offset: usize, gap: i64, door: bool) -> Option<Made> {
            let rip = base + offset as u64;
            let mut code = Vec::new();
            if decode(&page[offset..], rip, mode, &mut code) != Decoded::Ok {
                return None;
            }
            let first = Firsts::of(&self.tables);
            let hint =
                Hint { gpr: &[1 << 46 | 1 << 40; 16], low: false, high: High::one_of(1), kept: &WordMap::default() };
            let at = (rip, &page[offset..]);
            let t = Translator::new(&mut self.asm, &mut self.info, &mut self.tables, mode, 0, at, hint).translate(
                &code,
                Some(Peek::new(page, base, true)),
                door,
            );
            self.asm.resolve(gap);
            self.tables.exits.extend(t.exits.iter().map(|x| x.place(0, crate::cache::Placed::new(0, u32::MAX, 0))));
            Some(Made {
                code: self.asm.buf.clone(),
                relocs: self.asm.relocations().map(<[Reloc]>::to_vec),
                exits: t.exits.iter().map(|x| (x.target_rip, x.patch, x.stub)).collect(),
                len: t.guest_len,
                first,
                faults: first.faults as usize..self.tables.faults.len(),
            })
        }
    }

    /// The pages of this program's code, which is position-independent, and for each mode one of loops.
    fn pages() -> Vec<Vec<u8>> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let here = relocate as *const () as u64;
        let range = maps.lines().find_map(|l| {
            let (range, rest) = l.split_once(' ')?;
            let (a, b) = range.split_once('-')?;
            let (a, b) = (u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?);
            (rest.starts_with("r-x") && (a..b).contains(&here)).then_some((a, b, rest.to_owned()))
        });
        let (start, end, rest) = range.unwrap();
        let offset = u64::from_str_radix(rest.split_whitespace().nth(1).unwrap(), 16).unwrap();
        let file = std::fs::read("/proc/self/exe").unwrap();
        let text = &file[offset as usize..(offset + end - start).min(file.len() as u64) as usize];
        // 2: movups xmm2, [r10]; addps xmm2, [r9]; movups [r9], xmm2; add r10, 16; add r9, 16; cmp r11, r9; jb 3f; dec rax; jne 2b; 3:
        let round = [
            0x41, 0x0f, 0x10, 0x12, 0x41, 0x0f, 0x58, 0x11, 0x41, 0x0f, 0x11, 0x11, 0x49, 0x83, 0xc2, 16, 0x49, 0x83,
            0xc1, 16, 0x4d, 0x39, 0xcb, 0x72, 5, 0x48, 0xff, 0xc8, 0x75, 0xe2,
        ];
        let loops = std::iter::repeat_n(round.repeat(4096 / round.len()), 4);
        loops.chain(text.chunks_exact(4096).step_by(7).take(400).map(<[u8]>::to_vec)).collect()
    }

    /// A copy is byte for byte what a translation would have been, and so are its exits and its records.
    #[test]
    fn copies_are_what_a_translation_would_be() {
        let (from, to) = (0x5555_5555_4000u64, 0x7f12_3456_7000u64);
        let windowed = Mode(linux_mode(3).0 | Mode::WINDOW);
        let modes = [linux_mode(3), windowed, Mode(windowed.0 | Mode::STACKED), Mode(windowed.0 | Mode::MIXED)];
        let mut maker = Maker { asm: Asm::new(), info: InstructionInfoFactory::new(), tables: Tables::default() };
        let (mut blocks, mut copies, mut numbered, mut rounds) = (0, 0, 0, 0);
        for (n, page) in pages().into_iter().enumerate() {
            let mode = modes[n % modes.len()];
            let mut offset = 0;
            while offset < 4000 {
                let door = offset % 3 == 0;
                let Some(a) = maker.make(mode, &page, from, offset, 0x1000, door) else { break };
                let Some(b) = maker.make(mode, &page, to, offset, 0x2345, door) else { break };
                offset += a.len as usize;
                blocks += 1;
                let Some(relocs) = a.relocs else { continue };
                copies += 1;
                let by = Change {
                    rip: to - from,
                    sites: b.first.sites - a.first.sites,
                    callouts: b.first.callouts - a.first.callouts,
                    exits: b.first.exits - a.first.exits,
                    cold: 0x1345,
                };
                let mut code = a.code.clone();
                relocate(&mut code, &relocs, by);
                assert_eq!(code, b.code, "page {n}, at {:#x} of it, mode {mode:?}", offset - a.len as usize);
                let exits: Vec<_> = a.exits.iter().map(|x| (x.0.wrapping_add(by.rip), x.1, x.2)).collect();
                assert_eq!(exits, b.exits);
                let t = &maker.tables;
                let faults: Vec<_> = t.faults[a.faults.clone()].iter().map(|f| f.renumbered(by.sites)).collect();
                assert_eq!(faults, t.faults[b.faults.clone()]);
                rounds += faults.iter().filter(|f| matches!(f.kind(to), FaultKind::Round { .. })).count();
                numbered += usize::from(relocs.iter().any(|r| matches!(r, Reloc::Site(_)))) * faults.len();
                for k in a.first.callouts..a.first.callouts + by.callouts {
                    let (old, new) = (&t.callouts[k as usize], &t.callouts[(k + by.callouts) as usize]);
                    assert_eq!(format!("{:?}", moved(old.instr, by.rip)), format!("{:?}", new.instr));
                }
            }
        }
        assert!(blocks > 5_000 && copies * 100 > blocks * 98 && numbered > 10_000, "{copies} of {blocks}, {numbered}");
        assert!(rounds > 500, "{rounds}");
    }

    #[test]
    fn only_code_at_high_user_addresses_moves() {
        let high = High::one_of(1);
        assert!(movable(linux_mode(3), 0x5555_5555_4000, high) && movable(linux_mode(3), 0x7f12_3456_7000, high));
        for rip in [0x40_0000, 0x4000_0000_1000, 0x7fff_f7dd_0000, 0xffff_ffff_8100_0000] {
            assert!(!movable(linux_mode(3), rip, high), "{rip:#x}");
        }
        assert!(!movable(Mode(linux_mode(3).0 | Mode::SINGLE), 0x5555_5555_4000, high));
        assert!(!movable(Mode(linux_mode(3).0 & !Mode::USER), 0x5555_5555_4000, high));
    }
}
