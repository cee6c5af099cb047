//! Random sequences.
//!
//! A sequence is made of pieces: single instructions of any covered form, and small arrangements (`templates`)
//! around what a translator gets wrong (flags across memory accesses, stack operations, indirect branches, loops, state
//! images). The builder keeps track of the register values it knows, so that most memory operands hit the data
//! region whatever registers they go through, and the rest fault in interesting ways.

use crate::catalog::catalog;
use crate::layout::{self, PAGE};
use crate::rng::Rng;
use crate::sequence::{Encoded, Item, Sequence, Target};
use crate::state::{FPU_BYTES, Input, Regs, component, host_components};
use iced_x86::{Code, Instruction, InstructionInfoFactory, OpAccess, Register};

/// A sequence with everything that is needed to run it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The instructions.
    pub sequence: Sequence,
    /// Code slot.
    pub slot: u64,
    /// Offset of the first byte in the slot.
    pub offset: usize,
    /// The code at its place.
    pub encoded: Encoded,
    /// Starting state.
    pub input: Box<Input>,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input {{ rip: {:#x}, image: {} }}", self.regs.rip, self.image)
    }
}

/// Builds one sequence.
pub(crate) struct Builder {
    pub(crate) rng: Rng,
    pub(crate) sequence: Sequence,
    /// Known values of the general-purpose registers.
    pub(crate) known: [Option<u64>; 16],
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    /// Address of the first instruction.
    pub(crate) base: u64,
    /// Registers that must not be written just now (a loop counter).
    pub(crate) reserved: u16,
    /// First and last item of every group that must be entered at its first (loops, state images).
    pub(crate) groups: Vec<(usize, usize)>,
    info: InstructionInfoFactory,
}

/// Sequence number `index` of the run with `seed`.
pub fn case(seed: u64, index: u64) -> Case {
    let mut rng = Rng::for_sequence(seed, index);
    for n in 0..200 {
        // In a high layout some forms have no encoding at all; another takes their turn.
        let turn = if n < 100 || layout::base() == 0 { index } else { index + n };
        if let Some(c) = attempt(&mut rng, seed, index, turn) {
            return c;
        }
    }
    unreachable!("some of two hundred attempts has an encoding")
}

fn attempt(rng: &mut Rng, seed: u64, index: u64, turn: u64) -> Option<Case> {
    let slot = index % layout::SLOTS;
    let offset = match rng.below(20) {
        // Across the two pages, and up against the unmapped one.
        0..=1 => PAGE - rng.below(60),
        2 => 2 * PAGE - 1 - rng.below(60),
        _ => rng.below(PAGE / 64) * 16,
    } as usize;
    let base = layout::slot_address(slot) + offset as u64;
    let regs = registers(rng, base);
    let mut b = Builder {
        rng: rng.clone(),
        sequence: Sequence::default(),
        known: regs.gpr.map(Some),
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        base,
        reserved: 0,
        groups: Vec::new(),
        info: InstructionInfoFactory::new(),
    };
    // Every covered form gets its turn.
    let covered = &catalog().covered;
    let start = Rng::for_sequence(seed, u64::MAX).below(covered.len() as u64);
    let featured = covered[((turn + start) % covered.len() as u64) as usize];
    let pieces = match b.rng.below(4) {
        0 => 1,
        1 => 1 + b.rng.below(4),
        _ => 2 + b.rng.below(12),
    };
    let featured_at = b.rng.below(pieces);
    for n in 0..pieces {
        if n == featured_at {
            b.place(featured);
        } else if b.rng.percent(25) {
            b.template();
        } else {
            let code = b.any_code();
            b.place(code);
        }
        if b.sequence.len() > 40 {
            break;
        }
    }
    let end = if b.rng.percent(50) { Code::Ud2 } else { Code::Int3 };
    b.push(Instruction::with(end));
    b.tame_branches();
    let encoded = b.sequence.encode(base);
    let image = b.rng.below(layout::IMAGES as u64);
    *rng = b.rng;
    Some(Case { sequence: b.sequence, slot, offset, encoded: encoded?, input: Box::new(Input { regs, image }) })
}

impl Case {
    /// The same starting point with another sequence; `None` when it has no encoding.
    pub fn with_sequence(&self, sequence: Sequence) -> Option<Self> {
        let encoded = sequence.encode(self.input.regs.rip)?;
        Some(Self { sequence, encoded, ..self.clone() })
    }

    /// The content of the slot: the code at its offset (what does not fit is cut: it is not mapped) among breakpoints.
    pub fn code(&self) -> Vec<u8> {
        let mut slot = vec![0xcc; layout::SLOT_BYTES as usize];
        let room = slot.len() - self.offset;
        let bytes = &self.encoded.bytes[..self.encoded.bytes.len().min(room)];
        slot[self.offset..self.offset + bytes.len()].copy_from_slice(bytes);
        slot
    }

    /// The item whose code contains or begins at `rip`.
    pub fn item_at(&self, rip: u64) -> Option<&Item> {
        (0..self.sequence.items.len())
            .find(|&n| (self.encoded.addresses[n]..self.encoded.addresses[n + 1]).contains(&rip))
            .and_then(|n| self.sequence.items[n].as_ref())
    }
}

impl Builder {
    /// Any covered form, integer ones more often.
    pub(crate) fn any_code(&mut self) -> Code {
        let c = catalog();
        if self.rng.percent(50) { self.rng.pick(&c.integer) } else { self.rng.pick(&c.covered) }
    }

    /// Appends an instruction and forgets the registers it writes.
    pub(crate) fn push(&mut self, i: Instruction) {
        self.forget(&i);
        self.sequence.push(i);
    }

    /// Appends an instruction with a code address.
    pub(crate) fn push_to(&mut self, i: Instruction, target: Target) {
        self.forget(&i);
        self.sequence.push_to(i, target);
    }

    /// Lets branches past the end lead to the end marker, and branches into a group from before it to its first instruction.
    fn tame_branches(&mut self) {
        let groups = std::mem::take(&mut self.groups);
        let last = self.sequence.items.len() - 1;
        for (n, item) in self.sequence.items.iter_mut().enumerate() {
            let Some(Item { target: Target::Branch(t) | Target::Immediate(t), .. }) = item else { continue };
            if let Some((start, _)) = groups.iter().find(|(start, end)| n < *start && (start + 1..=*end).contains(t)) {
                *t = *start;
            }
            *t = (*t).min(last);
        }
    }

    fn forget(&mut self, i: &Instruction) {
        let written = self.written(i);
        for n in 0..16 {
            if written & 1 << n != 0 {
                self.known[n] = None;
            }
        }
    }

    /// General-purpose registers an instruction writes, as a bit mask.
    pub(crate) fn written(&mut self, i: &Instruction) -> u16 {
        let mut mask = 0;
        for r in self.info.info(i).used_registers() {
            let writes = !matches!(r.access(), OpAccess::None | OpAccess::Read | OpAccess::CondRead);
            let full = r.register().full_register();
            if writes && full.is_gpr64() {
                mask |= 1 << (full as u32 - Register::RAX as u32);
            }
        }
        mask
    }

    /// Whether the instruction can be encoded and leaves the reserved registers alone.
    pub(crate) fn acceptable(&mut self, i: &Instruction) -> bool {
        self.written(i) & self.reserved == 0 && iced_x86::Encoder::new(64).encode(i, self.base).is_ok()
    }

    /// A register that is known to point into data or stack; one is made when there is none.
    pub(crate) fn known_pointer(&mut self) -> Option<usize> {
        let good: Vec<usize> = (0..16)
            .filter(|&n| {
                self.known[n].is_some_and(|v| (layout::data()..layout::stack() + layout::STACK_BYTES).contains(&v))
            })
            .collect();
        if good.len() > 1 || (good.len() == 1 && good[0] != 4) {
            return Some(self.rng.pick(&good));
        }
        let free: Vec<usize> = (0..16).filter(|&n| n != 4 && self.reserved & 1 << n == 0).collect();
        let n = self.rng.pick(&free);
        let value = layout::data() + self.rng.below(2 * PAGE);
        self.set(n, value);
        Some(n)
    }

    /// A register whose value is known.
    pub(crate) fn known_register(&mut self) -> Option<usize> {
        let good: Vec<usize> = (0..16).filter(|&n| self.known[n].is_some()).collect();
        if good.is_empty() { None } else { Some(self.rng.pick(&good)) }
    }

    /// Emits code that gives register `n` a value.
    pub(crate) fn set(&mut self, n: usize, value: u64) {
        let r = n as u32;
        let i = if value <= u64::from(u32::MAX) && self.rng.percent(50) {
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX + r, value as u32)
        } else {
            Instruction::with2(Code::Mov_r64_imm64, Register::RAX + r, value)
        };
        self.push(i.expect("a register and an immediate"));
        self.known[n] = Some(value);
    }

    /// Appends one instruction with random operands (several tries; some combinations have no encoding).
    pub(crate) fn generic(&mut self, code: Code) -> bool {
        for _ in 0..20 {
            let before = self.sequence.items.len();
            let known = self.known;
            if let Some(i) = self.random_operands(code)
                && self.acceptable(&i)
            {
                self.push(i);
                return true;
            }
            self.sequence.items.truncate(before);
            self.known = known;
        }
        false
    }
}

/// Random starting registers.
fn registers(rng: &mut Rng, rip: u64) -> Regs {
    let mut r = Regs::new();
    for g in &mut r.gpr {
        *g = match rng.below(10) {
            0..=4 => layout::data() + (rng.below(2 * PAGE) & if rng.percent(60) { !63 } else { !0 }),
            5..=6 => rng.below(80),
            _ => rng.interesting(),
        };
    }
    let slack = if rng.percent(10) { rng.below(64) } else { rng.below(64) * 8 };
    r.gpr[4] = layout::stack() + PAGE + slack - 256;
    r.rip = rip;
    let status = rng.next_u64() & 0x8d5;
    r.rflags = 0x202 | status | if rng.percent(5) { 1 << 10 } else { 0 };
    // ID and NT mean nothing to user code and must survive it.
    r.rflags |= if rng.percent(20) { 1 << 21 } else { 0 } | if rng.percent(3) { 1 << 14 } else { 0 };
    r.fs_base = layout::data() + rng.below(PAGE);
    r.gs_base = layout::data() + rng.below(PAGE);
    fill_fpu(rng, &mut r.fpu);
    r
}

/// Random FPU state in the standard XSAVE format.
fn fill_fpu(rng: &mut Rng, fpu: &mut [u8; FPU_BYTES]) {
    let control = match rng.below(20) {
        0..=11 => 0x37f,
        12..=16 => 0x7f | (rng.next_u64() as u16 & 0x0f00),
        _ => 0x40 | (rng.next_u64() as u16 & 0x0f3f),
    };
    let mut status = (rng.below(8) as u16) << 11;
    if rng.percent(30) {
        status |= rng.next_u64() as u16 & 0x4700;
    }
    if rng.percent(10) {
        status |= rng.next_u64() as u16 & 0x3f;
    }
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    let tags = if rng.percent(40) { 0 } else { rng.next_u64() as u8 };
    fpu[0..2].copy_from_slice(&control.to_le_bytes());
    fpu[2..4].copy_from_slice(&status.to_le_bytes());
    fpu[4] = tags;
    let mxcsr: u32 = match rng.below(20) {
        0..=13 => 0x1f80,
        14..=16 => 0x1f80 | (rng.next_u64() as u32 & 0xe07f),
        _ => rng.next_u64() as u32 & 0xffff,
    };
    fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for st in 0..8 {
        let (significand, exponent): (u64, u16) = match rng.below(8) {
            0 => (0, rng.pick(&[0, 0x8000])),
            1 => (rng.next_u64(), 0xffff),
            2 => (1 << 63 | rng.next_u64(), rng.next_u64() as u16),
            3 => (rng.pick(&[1 << 63, 3 << 62, 1 << 63 | 1]), rng.pick(&[0x7fff, 0xffff, 0])),
            4 => (rng.next_u64() >> 1, 0),
            _ => (
                1 << 63 | rng.next_u64() & !0xfff,
                (0x3fff - 40 + rng.below(80) as u16) | (rng.next_u64() as u16 & 0x8000),
            ),
        };
        fpu[32 + 16 * st..40 + 16 * st].copy_from_slice(&significand.to_le_bytes());
        fpu[40 + 16 * st..42 + 16 * st].copy_from_slice(&exponent.to_le_bytes());
    }
    let bv = host_components();
    fpu[512..520].copy_from_slice(&bv.to_le_bytes());
    fill_vector(rng, &mut fpu[160..416]);
    for i in [2, 6, 7] {
        if let Some((at, len)) = component(i) {
            fill_vector(rng, &mut fpu[at..at + len]);
        }
    }
    if let Some((at, len)) = component(5) {
        for k in fpu[at..at + len].chunks_exact_mut(8) {
            let v = if rng.percent(40) { rng.next_u64() } else { rng.interesting() };
            k.copy_from_slice(&v.to_le_bytes());
        }
    }
}

/// Vector register contents: floats of all kinds, integers of all sizes.
fn fill_vector(rng: &mut Rng, bytes: &mut [u8]) {
    for lane in bytes.chunks_exact_mut(16) {
        let kind = rng.below(6);
        for part in lane.chunks_exact_mut(8) {
            let v = match kind {
                0 => rng.next_u64(),
                1 => {
                    let (a, b) = (single(rng), single(rng));
                    u64::from(a) << 32 | u64::from(b)
                }
                2 => double(rng),
                3 => rng.below(256) * 0x0001_0001_0001_0001,
                _ => rng.interesting(),
            };
            part.copy_from_slice(&v.to_le_bytes());
        }
    }
}

fn single(rng: &mut Rng) -> u32 {
    match rng.below(8) {
        0 => rng.pick(&[0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7f80_0001, 1, 0x807f_ffff]),
        1 => rng.next_u64() as u32,
        _ => ((rng.below(2_000_000) as f32 - 1e6) / 64.0).to_bits(),
    }
}

fn double(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => rng.pick(&[0, 1 << 63, 0x7ff << 52, 0xfff << 52, 0x7ff8 << 48, 0x7ff0_0000_0000_0001, 1]),
        1 => rng.next_u64(),
        _ => ((rng.below(2_000_000) as f64 - 1e6) / 64.0).to_bits(),
    }
}
