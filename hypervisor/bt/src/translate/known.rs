//! What is known about guest registers at a place of a window block, and so about addresses made of them.
//!
//! A check of an address costs more than the access itself in a loop of four instructions, so each ought to serve as many accesses as it
//! can. A base register that was checked serves all accesses by it, with displacements that stay within what is reserved around the
//! windows; and with indexes too, if the index register is known to hold little, because an instruction wrote its lower half or a
//! byte or a word into it. Where an index may be anything, the sum of base and scaled index is checked, once for all accesses that differ
//! in their displacements only.

use super::Translator;
use super::classify::{Class, classify};
use super::memory::Ea;
use super::window::{Hint, Region};
use crate::regs::{Width, gpr_of};
use crate::window::{HIGH_SHIFT, High, LOW_DISPLACEMENTS, LOW_DISTANCE, LOW_SHIFT, LOW_SPAN};
use iced_x86::{Code, Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};

/// The sum of a base register and an index register, which is scaled by a shift count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    base: u8,
    index: u8,
    shift: u8,
}

impl Sum {
    pub(super) fn of(ea: &Ea) -> Option<Self> {
        let (index, shift) = ea.index?;
        Some(Self { base: ea.base? as u8, index: index as u8, shift })
    }

    fn names(self, set: u16) -> bool {
        (1 << self.base | 1 << self.index) & set != 0
    }
}

/// What is known about guest registers at this place of a window block. Sets of registers have a bit for each.
pub(crate) struct Known {
    pub(super) gpr: [u64; 16],
    pub(super) low_more_often: bool,
    /// The vCPU's high window.
    pub(super) window: High,
    pub(super) votes: i32,
    /// Registers that are as they were at the block's entry.
    pub(super) unchanged: u16,
    /// Registers that were checked for the high window, and for the low one.
    high: u16,
    low: u16,
    /// Registers below 2^32, and those below 2^16.
    half: u16,
    word: u16,
    /// Sums that were checked.
    sums: Vec<(Sum, Region)>,
    /// Sums that several operands of the block have.
    frequent: Vec<Sum>,
}

/// The stack pointer in such a set.
pub(super) const RSP: u16 = 1 << 4;

/// In the low window a block adds at most 64 constants of a byte, an index below 2^16 and a displacement to what it has checked. `High::apart`
/// is about the high one.
const _: () = assert!(
    *LOW_DISPLACEMENTS.end() as u64 + 64 * 128 + (8 << 16) + 64
        <= LOW_SPAN as u64 - LOW_DISTANCE as u64 - (1 << LOW_SHIFT)
);

/// The largest constant in a register that counts as known to be below 2^16.
const WORD: u64 = 0xffff;

impl Known {
    pub(crate) fn at_entry(hint: Hint<'_>, stacked: bool) -> Self {
        Self {
            gpr: *hint.gpr,
            low_more_often: hint.low,
            window: hint.high,
            votes: 0,
            unchanged: u16::MAX,
            high: if stacked { RSP } else { 0 },
            low: 0,
            half: 0,
            word: 0,
            sums: Vec::new(),
            frequent: Vec::new(),
        }
    }

    /// Whether a register was checked for the high window.
    pub(super) fn is_high(&self, g: usize) -> bool {
        self.high >> g & 1 != 0
    }

    /// Whether all addresses from 2^46 to 2^47 pass the check for the high window.
    pub(super) fn upper_half(&self) -> bool {
        self.window.bit() == Some(HIGH_SHIFT)
    }

    pub(crate) fn votes(&self) -> i32 {
        self.votes
    }

    fn region(&self, g: usize) -> Option<Region> {
        if self.high >> g & 1 != 0 {
            Some(Region::High)
        } else if self.low >> g & 1 != 0 {
            Some(Region::Low)
        } else {
            None
        }
    }

    /// A register was checked.
    pub(super) fn note(&mut self, g: usize, region: Region) {
        match region {
            Region::High => self.high |= 1 << g,
            Region::Low => self.low |= 1 << g,
        }
    }

    /// A sum was checked.
    pub(super) fn note_sum(&mut self, sum: Sum, region: Region) {
        self.sums.push((sum, region));
    }

    /// Whether an index leads from a base to its window or what is reserved around that, whatever the register holds.
    pub(super) fn small_index(&self, index: usize, region: Region) -> bool {
        let set = if region == Region::High { self.half } else { self.word };
        set >> index & 1 != 0
    }

    /// The window that an operand is in for certain, but for its displacement.
    pub(super) fn region_of(&self, ea: &Ea) -> Option<Region> {
        match (ea.base, ea.index) {
            (Some(b), None) => self.region(b),
            // From a table at a fixed address.
            (None, Some((x, _))) => (ea.disp >= 0 && self.small_index(x, Region::Low)).then_some(Region::Low),
            (Some(b), Some((x, _))) => {
                let sum = Sum::of(ea)?;
                let checked = self.sums.iter().find(|s| s.0 == sum).map(|s| s.1);
                checked.or_else(|| self.region(b).filter(|&r| self.small_index(x, r)))
            }
            (None, None) => None,
        }
    }

    /// Whether a check of a sum is worth relying on.
    pub(super) fn is_frequent(&self, sum: Sum) -> bool {
        self.frequent.contains(&sum)
    }

    /// Looks through a block's code for sums that are used more than once.
    pub(super) fn count_sums(&mut self, code: &[Instruction]) {
        let mut once = Vec::new();
        for i in code {
            if i.memory_index() == Register::None || classify(i.code()) == Class::Lea {
                continue;
            }
            let (base, index) = (gpr_of(i.memory_base()), gpr_of(i.memory_index()));
            let (Some((base, Width::B64)), Some((index, Width::B64))) = (base, index) else { continue };
            let shift = i.memory_index_scale().trailing_zeros() as u8;
            let sum = Sum { base: base as u8, index: index as u8, shift };
            if !once.contains(&sum) {
                once.push(sum);
            } else if !self.frequent.contains(&sum) {
                self.frequent.push(sum);
            }
        }
    }
}

impl Translator<'_> {
    /// Brings [`Known`] up to date with an instruction that was just emitted. `rest` is the block's code behind it, and
    /// `flags_live` tells of the flags there.
    pub(super) fn track(&mut self, i: &Instruction, rest: &[Instruction], flags_live: bool) {
        let rsp = if self.mode.has(crate::block::Mode::STACKED) { RSP } else { 0 };
        let written = self.written(i);
        let change = if rsp & written != 0 { self.stack_change(i) } else { None };
        let k = &mut self.known;
        match classify(i.code()) {
            Class::Copy(_)
            | Class::Nop
            | Class::Lea
            | Class::BitTest
            | Class::Push
            | Class::Pop
            | Class::String
            | Class::Leave => {
                let (high, low) = (kept(i, k.high, false), kept(i, k.low, true));
                let (half, word) = small_result(i, k.half, k.word);
                k.unchanged &= !written;
                k.high = k.high & !written | high | rsp;
                k.low = k.low & !written | low & !rsp;
                k.half = k.half & !written | half;
                k.word = k.word & !written | word;
                k.sums.retain(|s| !s.0.names(written));
            }
            // Rust code may change anything.
            _ => {
                (k.unchanged, k.high, k.low, k.half, k.word) = (0, rsp, 0, 0, 0);
                k.sums.clear();
            }
        }
        if let Some(change) = change {
            self.check_stack(change, rest, flags_live);
        }
    }

    /// The general registers that an instruction writes, or may write, in whole or in part.
    pub(super) fn written(&mut self, i: &Instruction) -> u16 {
        let info = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        let reads = [OpAccess::Read, OpAccess::CondRead, OpAccess::None, OpAccess::NoMemAccess];
        let written = info.used_registers().iter().filter(|r| !reads.contains(&r.access()));
        written.filter_map(|r| gpr_of(r.register())).fold(0, |set, (g, _)| set | 1 << g)
    }
}

/// The general register that an operand is.
fn named(i: &Instruction, n: u32) -> Option<usize> {
    (i.op_kind(n) == OpKind::Register).then(|| gpr_of(i.op_register(n))).flatten().map(|r| r.0)
}

/// The constant that an instruction adds to a register that it writes, if that is all it does to it.
pub(super) fn constant_added(i: &Instruction, g: usize) -> Option<i64> {
    let named = i.op0_kind() == OpKind::Register && gpr_of(i.op0_register()) == Some((g, Width::B64));
    if !named {
        return None;
    }
    match i.code() {
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => Some(i.immediate(1) as i64),
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => Some(-(i.immediate(1) as i64)),
        Code::Inc_rm64 => Some(1),
        Code::Dec_rm64 => Some(-1),
        Code::Lea_r64_m => {
            let itself = gpr_of(i.memory_base()) == Some((g, Width::B64)) && i.memory_index() == Register::None;
            itself.then(|| i.memory_displacement64() as i64)
        }
        _ => None,
    }
}

/// Registers that an instruction writes and that are checked nevertheless, of a set: those that move by a constant, which
/// must be `small` in the low window, and copies.
fn kept(i: &Instruction, set: u16, small: bool) -> u16 {
    let has = |g: usize| set >> g & 1 != 0;
    let if_kept = |g: Option<usize>| g.filter(|&g| has(g)).map_or(0, |g| 1u16 << g);
    match i.code() {
        Code::Add_rm64_imm8 | Code::Sub_rm64_imm8 | Code::Inc_rm64 | Code::Dec_rm64 => if_kept(named(i, 0)),
        Code::Add_rm64_imm32 | Code::Sub_rm64_imm32 | Code::Add_RAX_imm32 | Code::Sub_RAX_imm32 if !small => {
            if_kept(named(i, 0))
        }
        // Rounds down, by less than that.
        Code::And_rm64_imm8 if (i.immediate(1) as i64) < 0 => if_kept(named(i, 0)),
        Code::Lea_r64_m => {
            let plain = i.memory_index() == Register::None
                && i.memory_base().is_gpr64()
                && (!small || i8::try_from(i.memory_displacement64() as i64).is_ok());
            match (named(i, 0), gpr_of(i.memory_base())) {
                (Some(d), Some((b, _))) if plain && has(b) => 1 << d,
                _ => 0,
            }
        }
        Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => match (named(i, 0), named(i, 1)) {
            (Some(d), Some(s)) if has(s) => 1 << d,
            _ => 0,
        },
        _ => match i.mnemonic() {
            Mnemonic::Push => if_kept(Some(4)),
            Mnemonic::Pop if named(i, 0) != Some(4) => if_kept(Some(4)),
            Mnemonic::Leave if has(5) => 1 << 4,
            _ => 0,
        },
    }
}

/// Whether an instruction writes to its first operand, a register, and that register is below 2^32 then, or below 2^16; as sets. `half` and
/// `word` are the registers that were before.
pub(super) fn small_result(i: &Instruction, half: u16, word: u16) -> (u16, u16) {
    use Mnemonic as M;
    if i.op_count() == 0 || i.op0_kind() != OpKind::Register {
        return (0, 0);
    }
    let Some((d, width)) = gpr_of(i.op0_register()) else { return (0, 0) };
    let wide = matches!(width, Width::B32 | Width::B64);
    let of = |set: u16, n: u32| named(i, n).is_some_and(|g| set >> g & 1 != 0);
    let immediate = |n: u32| (i.op_count() > n && i.op_kind(n) >= OpKind::Immediate8).then(|| i.immediate(n));
    let is_word = match i.code() {
        Code::Movzx_r32_rm8 | Code::Movzx_r64_rm8 | Code::Movzx_r32_rm16 | Code::Movzx_r64_rm16 => true,
        Code::Mov_r32_imm32 | Code::Mov_rm32_imm32 | Code::Mov_rm64_imm32 => immediate(1).is_some_and(|v| v <= WORD),
        // Constants are sign-extended: one that is small has no upper half.
        Code::And_rm32_imm8 | Code::And_rm32_imm32 | Code::And_EAX_imm32 => {
            immediate(1).is_some_and(|v| v & 0xffff_ffff <= WORD)
        }
        Code::And_rm64_imm8 | Code::And_rm64_imm32 | Code::And_RAX_imm32 => immediate(1).is_some_and(|v| v <= WORD),
        Code::Mov_r32_rm32 | Code::Mov_rm32_r32 | Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => {
            i.op1_kind() == OpKind::Register && of(word, 1)
        }
        _ => false,
    };
    let is_half = match i.mnemonic() {
        _ if is_word => true,
        // A result of 32 bits clears the upper half.
        M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Lea
        | M::Add
        | M::Sub
        | M::And
        | M::Or
        | M::Xor
        | M::Neg
        | M::Not
            if width == Width::B32 =>
        {
            true
        }
        M::Mov if wide && i.op1_kind() == OpKind::Register => {
            gpr_of(i.op1_register()).is_some_and(|(_, w)| w == Width::B64) && of(half, 1)
        }
        _ => false,
    };
    let set = |known: bool| u16::from(known) << d;
    (set(is_half), set(is_word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn result(bytes: &[u8], half: u16, word: u16) -> (u16, u16) {
        small_result(&Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode(), half, word)
    }

    #[test]
    fn results_are_small_only_where_the_upper_bits_are_cleared() {
        const A: u16 = 1;
        // movzx eax, sil; movzx rax, word [rbx]; mov eax, 0xffff; and eax, 127; and rax, 127
        for small in [
            &[0x40, 0x0f, 0xb6, 0xc6][..],
            &[0x48, 0x0f, 0xb7, 0x03],
            &[0xb8, 0xff, 0xff, 0, 0],
            &[0x83, 0xe0, 0x7f],
            &[0x48, 0x83, 0xe0, 0x7f],
        ] {
            assert_eq!(result(small, 0, 0), (A, A), "{small:x?}");
        }
        // mov eax, 0x10000; mov eax, [rbx]; add eax, ebx; and eax, -1; lea eax, [rbx]; movsx eax, bl
        for half in [
            &[0xb8, 0, 0, 1, 0][..],
            &[0x8b, 0x03],
            &[0x01, 0xd8],
            &[0x83, 0xe0, 0xff],
            &[0x8d, 0x03],
            &[0x0f, 0xbe, 0xc3],
        ] {
            assert_eq!(result(half, 0, 0), (A, 0), "{half:x?}");
        }
        // mov rax, [rbx]; mov rax, -1; mov al, 1; mov ax, 1; movzx ax, bl; and rax, -1; cdqe; xadd eax, ebx (which writes both); cmpxchg eax, ebx
        for large in [
            &[0x48, 0x8b, 0x03][..],
            &[0x48, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff],
            &[0xb0, 1],
            &[0x66, 0xb8, 1, 0],
            &[0x66, 0x0f, 0xb6, 0xc3],
            &[0x48, 0x83, 0xe0, 0xff],
            &[0x48, 0x98],
            &[0x0f, 0xc1, 0xd8],
            &[0x0f, 0xb1, 0xd8],
        ] {
            assert_eq!(result(large, u16::MAX, u16::MAX), (0, 0), "{large:x?}");
        }
        // Copies are what their source is: mov rax, rbx; mov eax, ebx; and a load is not.
        assert_eq!(result(&[0x48, 0x89, 0xd8], 1 << 3, 1 << 3), (A, A));
        assert_eq!(result(&[0x48, 0x89, 0xd8], 1 << 3, 0), (A, 0));
        assert_eq!(result(&[0x48, 0x89, 0xd8], 0, 0), (0, 0));
        assert_eq!(result(&[0x89, 0xd8], 0, 1 << 3), (A, A));
        assert_eq!(result(&[0x89, 0xd8], 0, 0), (A, 0));
    }
}
