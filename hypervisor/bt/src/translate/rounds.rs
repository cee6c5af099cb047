//! Loops of one block: the rounds behind the first.
//!
//! A block that ends in a conditional jump back to its own start is emitted as always, for the first round. Where it would go on to itself it
//! comes to a second copy of its code, in which each guest instruction is one host instruction and nothing else stands but a poll:
//!
//! - **No checks.** Every address of a round is that of the round before, moved by a small constant, or has a base that the loop does not change and
//!   an index that is small. What addresses are made of is checked on the way in. From then on every access is made in every round, so the
//!   first that leaves its window comes to what is unmapped around it, and faults. Who faults leaves the rounds.
//! - **No registers in memory.** Guest R9 to R11 have host registers: the scratch registers, and those of guest registers that the loop does
//!   not name, which are in their places in the vCPU's state meanwhile.
//!
//! Whoever leaves the rounds, at a jump, a poll or a fault, brings all registers home first, behind the block. As no instruction is
//! more than one, a fault finds the guest as it was in front of it.

use super::classify::{Class, Unit, classify, unit_of};
use super::copy::{canonical_form, implicit_rcx, may_fault, set_operand};
use super::known::{RSP, constant_added, small_result};
use super::memory::{Access, Ea, MemOp};
use super::window::{Region, Subject};
use super::{Pending, Translator};
use crate::asm::{Base, H, Label, M, cc};
use crate::block::{FaultKind, Mode};
use crate::regs::{Home, Width, gpr_of, home, host_name};
use crate::state::off;
use crate::window::LOW_SHIFT;
use iced_x86::{Instruction, InstructionInfoOptions, OpKind, Register};

/// Guest instructions of a loop at most.
const LONGEST: usize = 40;
/// Accesses of a loop at most: each has a slow path of its own.
const MOST_ACCESSES: usize = 16;
/// By how many bytes an address may move in a round. Less than a page, so that no address leaps over what is unmapped.
const FURTHEST: i64 = 4096;

/// Guest registers that may give their host registers away, those first that compilers use least.
const LENDERS: [usize; 11] = [15, 14, 13, 12, 8, 3, 5, 7, 6, 2, 0];

/// What a loop does to a guest register in a round.
#[derive(Clone, Copy)]
enum Change {
    /// Adds constants: by so much at most, one way or the other.
    Moves(i64),
    /// Anything.
    Any,
}

/// What an address is made of, but for its displacement.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sum {
    base: usize,
    index: Option<(usize, u8)>,
    region: Region,
}

/// A guest register that has another host register in the rounds.
#[derive(Clone, Copy)]
struct Renamed {
    guest: usize,
    host: H,
    /// The guest register that lives there otherwise.
    instead_of: Option<usize>,
    written: bool,
}

/// A loop that can have rounds.
pub(super) struct Plan {
    code: Vec<Instruction>,
    sums: Vec<Sum>,
    renamed: Vec<Renamed>,
}

/// A way out of the rounds, to be emitted behind the block.
enum Way {
    /// To another RIP.
    Exit(u64),
    /// A poll found a request.
    Polled,
    /// This access missed its window.
    Missed { site: u32, access: Access, op: MemOp, rip: u64, next: u64 },
    /// The host raised an exception at an instruction without memory.
    Faulted { site: u32, rip: u64 },
}

/// Rounds to be finished behind the block.
pub(super) struct Rounds {
    renamed: Vec<Renamed>,
    ways: Vec<(Label, Way)>,
    /// Where those go on who failed a check on the way in.
    again: Label,
}

impl Plan {
    fn host(&self, guest: usize) -> H {
        let there = self.renamed.iter().find(|r| r.guest == guest).map(|r| r.host);
        there.unwrap_or_else(|| match home(guest) {
            Home::Host(h) => h,
            Home::Spilled(_) => unreachable!("all registers in memory that the loop uses are renamed"),
        })
    }

    /// A memory operand in host terms.
    fn operand(&self, ea: &Ea) -> M {
        M {
            base: ea.base.map(|b| self.host(b)),
            index: ea.index.map(|(x, s)| (self.host(x), s)),
            disp: ea.disp as i32,
            seg: Base::Host,
        }
    }

    fn region(&self, ea: &Ea) -> Option<Region> {
        let exact = |s: &&Sum| Some(s.base) == ea.base && s.index == ea.index;
        let by_base = |s: &&Sum| Some(s.base) == ea.base && s.index.is_none();
        let found = self.sums.iter().find(exact).or_else(|| self.sums.iter().find(by_base));
        found.map(|s| s.region)
    }
}

impl Translator<'_> {
    /// Whether a block can have rounds, and how.
    pub(super) fn plan_rounds(&mut self, code: &[Instruction]) -> Option<Plan> {
        let m = self.mode;
        let (last, body) = code.split_last()?;
        let fit = m.is64() && m.has(Mode::WINDOW) && !m.alone() && !m.has(Mode::STEP) && !self.mixed;
        let itself = classify(last.code()) == Class::Jcc && last.near_branch_target() == self.start_rip;
        // The poll and the checks on the way in clobber the flags.
        if !fit || !itself || self.flags_free_at != Some(self.start_rip) || body.is_empty() || code.len() > LONGEST {
            return None;
        }
        let mut change = [Change::Moves(0); 16];
        let mut used = 0u16;
        let writes: Option<Vec<u16>> = body.iter().map(|i| self.fits_rounds(i, last.ip(), &mut used)).collect();
        let writes = writes?;
        for (i, set) in body.iter().zip(&writes) {
            for (g, change) in change.iter_mut().enumerate().filter(|(g, _)| set >> g & 1 != 0) {
                *change = match (*change, constant_added(i, g)) {
                    (Change::Moves(far), Some(c)) => Change::Moves(far + c.abs()),
                    _ => Change::Any,
                };
            }
        }
        let mut sums = Vec::new();
        let mut accesses = 0;
        let mut small = 0;
        for (i, set) in body.iter().zip(&writes) {
            if has_memory(i) && matches!(classify(i.code()), Class::Copy(_)) {
                accesses += 1;
                let sum = self.sum_of(i, &change, small)?;
                if !sums.contains(&sum) {
                    sums.push(sum);
                }
            }
            small = small & !set | small_result(i, small, 0).0;
        }
        let spilled: Vec<usize> = (9..=11).filter(|g| used >> g & 1 != 0).collect();
        if accesses > MOST_ACCESSES || (accesses == 0 && spilled.is_empty()) {
            return None;
        }
        let lent = LENDERS.into_iter().filter(|g| used >> g & 1 == 0);
        let lent = lent.filter_map(|g| if let Home::Host(h) = home(g) { Some((h, Some(g))) } else { None });
        let mut hosts = [(H::R11, None), (H::RCX, None)].into_iter().chain(lent);
        let mut renamed = Vec::new();
        for guest in spilled {
            let (host, instead_of) = hosts.next()?;
            let written = writes.iter().any(|set| set >> guest & 1 != 0);
            renamed.push(Renamed { guest, host, instead_of, written });
        }
        Some(Plan { code: code.to_vec(), sums, renamed })
    }

    /// The registers that an instruction writes, if it can be in rounds; adds those that it uses.
    fn fits_rounds(&mut self, i: &Instruction, end: u64, used: &mut u16) -> Option<u16> {
        let class = classify(i.code());
        let in_loop = |to: u64| self.start_rip < to && to <= end;
        match class {
            Class::Nop => return Some(0),
            // A way around a part of the loop is as likely as the way through it.
            Class::Jcc => return (!in_loop(i.near_branch_target())).then_some(0),
            // A constant, which is not always the one that the operand's 32 bits are.
            Class::Lea if i.memory_base() == Register::None && i.memory_index() == Register::None => return None,
            Class::Lea if i.is_ip_rel_memory_operand() => return None,
            Class::Lea => {}
            Class::Copy(Unit::Integer | Unit::Sse | Unit::Avx) if self.unit_enabled(unit_of(i.code())).is_none() => {}
            _ => return None,
        }
        if i.is_invalid() || i.has_rep_prefix() || i.has_repne_prefix() || implicit_rcx(i) != (false, false) {
            return None;
        }
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register => {
                    if let Some((_, Width::High8) | (4, _)) = gpr_of(i.op_register(n)) {
                        return None;
                    }
                }
                OpKind::Memory => {
                    let ea = Ea::of(i, self.mode);
                    let registers = [(ea.base, i.memory_base()), (ea.index.map(|x| x.0), i.memory_index())];
                    let vector = registers.iter().any(|(g, r)| g.is_none() && *r != Register::None);
                    if vector || ea.bits != 64 || ea.seg >= 4 || (ea.base.is_none() && class != Class::Lea) {
                        return None;
                    }
                }
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => return None,
                k if k >= OpKind::Immediate8 && k <= OpKind::Immediate32to64 => {}
                _ => return None,
            }
        }
        let info = self.info.info_options(i, InstructionInfoOptions::NONE);
        let memory = usize::from(has_memory(i) && class != Class::Lea);
        if info.used_memory().len() != memory && class != Class::Lea {
            return None;
        }
        let named = info.used_registers().iter().filter_map(|r| gpr_of(r.register()));
        *used = named.fold(*used, |set, (g, _)| set | 1 << g);
        Some(self.written(i)).filter(|writes| writes & RSP == 0)
    }

    /// What an access needs checked on the way in, if the rounds can do without checks then. `small` are the registers below 2^32 there.
    fn sum_of(&mut self, i: &Instruction, change: &[Change; 16], small: u16) -> Option<Sum> {
        let access = self.access_of(i, true);
        let ea = access.ea;
        let base = ea.base?;
        Self::plain_displacement(&ea, Pending::None)?;
        if access.masked {
            return None;
        }
        let Change::Moves(far) = change[base] else { return None };
        let at = |g: usize| self.known.gpr[g];
        let (index, far) = match ea.index {
            None => (None, far),
            Some((x, s)) => match change[x] {
                Change::Moves(by) => (Some((x, s)), far + (by << s)),
                // Wherever that leads to is next to the base, which stays.
                Change::Any if far == 0 && small >> x & 1 != 0 => (None, 0),
                Change::Any => return None,
            },
        };
        let la = at(base).wrapping_add(index.map_or(0, |(x, s)| at(x) << s)).wrapping_add(ea.disp as u64);
        let region = if la >> LOW_SHIFT == 0 { Region::Low } else { Region::High };
        let guessed = region == Region::Low || self.known.window.contains(la);
        // What may be next to a base in the low window is less.
        let near = region == Region::High || index == ea.index;
        (far < FURTHEST && guessed && near).then_some(Sum { base, index, region })
    }

    /// Emits the rounds at the end of a block, where its first round went on to itself; `next` is the way out of the loop.
    pub(super) fn emit_rounds(&mut self, plan: &Plan, cond: u8, next: u64) {
        let again = self.asm.label();
        for s in &plan.sums {
            if s.base == 4 && s.index.is_none() && s.region == Region::High && self.mode.has(Mode::STACKED) {
                continue;
            }
            let ea = Ea { base: Some(s.base), index: s.index, disp: 0, bits: 64, seg: 3 };
            self.emit_ea(&ea, false);
            self.emit_check(s.region, Subject::Register(H::RCX), false, again);
        }
        for r in &plan.renamed {
            if let Some(g) = r.instead_of {
                self.asm.store(M::gs(off::gpr(g)), r.host);
            }
        }
        for r in &plan.renamed {
            self.asm.load(r.host, M::gs(off::gpr(r.guest)));
        }
        let mut ways = Vec::new();
        let top = self.asm.here();
        let polled = self.asm.label();
        self.asm.cmp32_mem_imm_flags(M::gs(off::REQUEST), 0);
        self.asm.jcc(cc::NE, polled);
        ways.push((polled, Way::Polled));
        for i in &plan.code[..plan.code.len() - 1] {
            self.cur_rip = i.ip();
            self.cur_next = i.next_ip();
            match classify(i.code()) {
                Class::Nop => {}
                Class::Jcc => {
                    let out = self.asm.label();
                    self.asm.jcc(i.condition_code() as u8 - 1, out);
                    ways.push((out, Way::Exit(self.branch_target(i))));
                }
                _ => ways.extend(self.round_instruction(plan, i)),
            }
        }
        self.asm.jcc(cond, top);
        self.registers_home(&plan.renamed);
        self.leave_for(next);
        self.rounds = Some(Rounds { renamed: plan.renamed.clone(), ways, again });
    }

    /// Emits one instruction of a round; gives the way out for those who fault there.
    fn round_instruction(&mut self, plan: &Plan, i: &Instruction) -> Option<(Label, Way)> {
        let mut guest = *i;
        canonical_form(&mut guest);
        let mut out = guest;
        let mut access = None;
        for n in 0..out.op_count() {
            match out.op_kind(n) {
                OpKind::Register => {
                    if let Some((g, w)) = gpr_of(out.op_register(n)) {
                        out.set_op_register(n, host_name(plan.host(g), w));
                    }
                }
                OpKind::Memory => {
                    let ea = Ea::of(&guest, self.mode);
                    let mut m = plan.operand(&ea);
                    if classify(i.code()) != Class::Lea {
                        access = Some(self.access_of(&guest, true));
                        // Planned, so the region is known.
                        m = plan.region(&ea).unwrap_or(Region::High).operand(m);
                    }
                    set_operand(&mut out, m);
                    out.set_segment_prefix(m.seg.register());
                }
                _ => {}
            }
        }
        let (rip, next) = (self.cur_rip, self.cur_next);
        let way = self.asm.label();
        let found = match access {
            Some(access) => {
                let op = MemOp::Guest(guest);
                let site = self.note_site(&access, &op);
                self.tables.sites[site as usize].window = true;
                self.fault_site(self.asm.pos(), FaultKind::Round { site });
                Some((way, Way::Missed { site, access, op, rip, next }))
            }
            None if may_fault(&guest) => {
                let site = self.note_plain_site();
                self.fault_site(self.asm.pos(), FaultKind::Round { site });
                Some((way, Way::Faulted { site, rip }))
            }
            None => None,
        };
        if self.asm.guest(&out).is_err() {
            // As the first copy says, which raises #UD.
            self.asm.jmp(way);
            return found.or_else(|| Some((way, Way::Faulted { site: self.note_plain_site(), rip })));
        }
        found
    }

    /// Brings registers to where they live outside of rounds. Leaves flags alone.
    fn registers_home(&mut self, renamed: &[Renamed]) {
        for r in renamed.iter().filter(|r| r.written) {
            self.asm.store(M::gs(off::gpr(r.guest)), r.host);
        }
        for r in renamed {
            if let Some(g) = r.instead_of {
                self.asm.load(r.host, M::gs(off::gpr(g)));
            }
        }
    }

    /// Leaves for a RIP by an exit that can be linked.
    fn leave_for(&mut self, rip: u64) {
        let stub = self.asm.label();
        let patch = self.asm.jump_patchable(None, stub);
        self.add_exit(rip, self.mode, patch, stub);
    }

    /// Behind the block: the ways out of rounds.
    pub(super) fn emit_ways_out(&mut self) {
        let Some(rounds) = self.rounds.take() else { return };
        self.asm.bind(rounds.again);
        self.exit_to(self.start_rip, self.mode, true);
        for (label, way) in rounds.ways {
            self.asm.bind(label);
            let at = self.asm.pos();
            self.registers_home(&rounds.renamed);
            match way {
                Way::Exit(target) => self.leave_for(target),
                Way::Polled => self.leave_polled(self.start_rip),
                Way::Missed { site, access, op, rip, next } => {
                    self.tables.sites[site as usize].slow = at;
                    (self.cur_rip, self.cur_next) = (rip, next);
                    self.access_by_rust(&access.ea, Pending::None, site, &op, access.write);
                    self.leave_for(next);
                    self.tables.sites[site as usize].retry = self.asm.pos();
                    self.leave_for(rip);
                }
                Way::Faulted { site, rip } => {
                    self.tables.sites[site as usize].slow = at;
                    self.leave_for(rip);
                }
            }
        }
    }
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}
