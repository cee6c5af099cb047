//! A sequence as a list of instructions with branches that name their targets, and its encoding.

use iced_x86::{Code, Encoder, Instruction, OpKind};

/// Where an instruction's code address operand comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// None.
    None,
    /// A near branch to item `n` (or the first one behind it that is still there).
    Branch(usize),
    /// An immediate operand that holds the address of item `n`.
    Immediate(usize),
}

/// One instruction of a sequence.
#[derive(Clone, Debug)]
pub struct Item {
    /// The instruction; branch displacements and code addresses are filled in by [`Sequence::encode`].
    pub instruction: Instruction,
    /// What to fill in.
    pub target: Target,
    /// Bytes to emit instead of the instruction's own encoding.
    pub raw: Option<Vec<u8>>,
}

/// A list of instructions. `None` marks what the minimiser took out.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// The instructions in order.
    pub items: Vec<Option<Item>>,
}

/// A sequence turned into bytes.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The code.
    pub bytes: Vec<u8>,
    /// Address of each item (of the next one for those taken out), and of the end.
    pub addresses: Vec<u64>,
}

impl Sequence {
    /// Adds an instruction.
    pub fn push(&mut self, instruction: Instruction) {
        self.items.push(Some(Item { instruction, target: Target::None, raw: None }));
    }

    /// Adds an instruction with a code address to fill in.
    pub fn push_to(&mut self, instruction: Instruction, target: Target) {
        self.items.push(Some(Item { instruction, target, raw: None }));
    }

    /// Number of instructions that are there.
    pub fn len(&self) -> usize {
        self.items.iter().flatten().count()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sequence as code at `base`; `None` when an instruction has no encoding (a short branch that is too far).
    pub fn encode(&self, base: u64) -> Option<Encoded> {
        let mut encoder = Encoder::new(64);
        // Sizes first: they do not depend on where a branch of a given form goes.
        let mut addresses = Vec::with_capacity(self.items.len() + 1);
        let mut at = base;
        for item in &self.items {
            addresses.push(at);
            if let Some(item) = item {
                at += encode_one(&mut encoder, item, at, at)?.len() as u64;
            }
        }
        addresses.push(at);
        let mut bytes = Vec::with_capacity((at - base) as usize);
        for (n, item) in self.items.iter().enumerate() {
            let Some(item) = item else { continue };
            let target = match item.target {
                Target::None => addresses[n],
                Target::Branch(t) | Target::Immediate(t) => addresses[t.min(self.items.len())],
            };
            let code = encode_one(&mut encoder, item, addresses[n], target)?;
            if addresses[n] + code.len() as u64 != addresses[n + 1] {
                return None;
            }
            bytes.extend_from_slice(&code);
        }
        Some(Encoded { bytes, addresses })
    }
}

/// Encodes one instruction at `at` with its code address operand set to `target`.
fn encode_one(encoder: &mut Encoder, item: &Item, at: u64, target: u64) -> Option<Vec<u8>> {
    if let Some(raw) = &item.raw {
        return Some(raw.clone());
    }
    let mut i = item.instruction;
    match item.target {
        Target::None => {}
        Target::Branch(_) => i.set_near_branch64(target),
        Target::Immediate(_) => match i.op1_kind() {
            OpKind::Immediate64 => i.set_immediate64(target),
            _ => i.set_immediate32(target as u32),
        },
    }
    encoder.encode(&i, at).ok()?;
    Some(encoder.take_buffer())
}

/// Whether the instruction is a marker that ends a sequence.
pub fn is_end(code: Code) -> bool {
    matches!(code, Code::Ud2 | Code::Int3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Register};

    #[test]
    fn branches_follow_their_targets_when_items_are_taken_out() {
        let mut s = Sequence::default();
        s.push_to(Instruction::with_branch(Code::Jne_rel8_64, 0).expect("valid"), Target::Branch(3));
        s.push(Instruction::with2(Code::Mov_r64_imm64, Register::RAX, 5u64).expect("valid"));
        s.push(Instruction::with(Code::Nopd));
        s.push(Instruction::with(Code::Ud2));
        for taken in [None, Some(1), Some(2)] {
            let mut s = s.clone();
            if let Some(n) = taken {
                s.items[n] = None;
            }
            let e = s.encode(0x1000).expect("encodes");
            let i = Decoder::with_ip(64, &e.bytes, 0x1000, DecoderOptions::NONE).decode();
            assert_eq!(i.near_branch64(), e.addresses[3]);
            assert_eq!(e.bytes[(e.addresses[3] - 0x1000) as usize..], [0x0f, 0x0b]);
        }
    }
}
