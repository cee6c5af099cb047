//! Doors: where code comes in whose target was not known before.
//!
//! An indirect jump takes some bits of the target's RIP, picks an address from the jump cache by them, and jumps there. Whether that is the
//! right block is for the block to find out: its door compares RCX, the RIP that is wanted, with the block's own. A comparison with a
//! constant waits for no memory, and the host CPU predicts the jump meanwhile. Whoever comes to the wrong door, or to an empty place of the
//! cache, is sent on to a thunk that looks further. The flags stay as they are: dead in this block, they may be live where the wrong
//! ones are going.
//!
//! A block that is made for an indirect jump has its door in front of it, and what comes in goes on to its entry. A block that is
//! reached by direct jumps gets one elsewhere when the first indirect jump comes along; many never do.

use crate::asm::{Asm, H, Label, M};
use crate::state::Thunk;

/// Adds RIP, or its negation, to RCX. Clobbers R11, no flags.
fn add_to_rcx(a: &mut Asm, rip: u64, negated: bool) {
    let v = if negated { rip.wrapping_neg() } else { rip };
    match i32::try_from(v as i64) {
        Ok(v) => {
            a.pin();
            a.lea(H::RCX, M::base(H::RCX, v));
        }
        Err(_) => {
            if negated {
                a.mov_minus_rip(H::R11, v);
            } else {
                a.mov_rip(H::R11, v);
            }
            a.lea(H::RCX, M::base_index(H::RCX, H::R11));
        }
    }
}

/// Goes on behind this if RCX is `rip`, otherwise at the label given back. Clobbers RCX and R11.
pub(super) fn open(a: &mut Asm, rip: u64) -> Label {
    let (right, wrong) = (a.label(), a.label());
    add_to_rcx(a, rip, true);
    a.jrcxz(right);
    a.jmp(wrong);
    a.bind(right);
    wrong
}

/// What stands at that label: RCX becomes what it was, and the search goes on.
pub(super) fn turn_away(a: &mut Asm, rip: u64, to: Thunk, wrong: Label) {
    a.bind(wrong);
    add_to_rcx(a, rip, false);
    a.jmp_mem(M::gs(to.offset()));
}

/// A door that stands alone. Gives the place of the displacement of its jump to the block's entry.
pub(crate) fn alone(a: &mut Asm, rip: u64, view: usize) -> u32 {
    a.clear();
    let (right, end) = (a.label(), a.label());
    add_to_rcx(a, rip, true);
    a.jrcxz(right);
    let wrong = a.here();
    turn_away(a, rip, Thunk::lookup(view), wrong);
    a.bind(right);
    let patch = a.jump_patchable(None, end);
    a.bind(end);
    patch
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, RflagsBits};

    #[test]
    fn doors_leave_flags_alone_whatever_the_address() {
        for rip in [0, 0x40_1000, 0x7f00_1234_5678, 0xffff_ffff_8100_0000, 0xffff_ffff_8000_0000, 0x8000_0000] {
            let mut a = Asm::new();
            let patch = alone(&mut a, rip, 0);
            a.resolve(0);
            let code: Vec<Instruction> =
                Decoder::with_ip(64, a.parts().0, 0, DecoderOptions::NONE).into_iter().collect();
            assert!(code.iter().all(|i| i.rflags_modified() == RflagsBits::NONE), "{rip:x}");
            // One conditional jump, to the last instruction, whose displacement can be patched.
            let last = code.last().unwrap();
            let jumps: Vec<_> = code.iter().filter(|i| i.flow_control() == FlowControl::ConditionalBranch).collect();
            assert_eq!(jumps.iter().map(|i| i.near_branch_target()).collect::<Vec<_>>(), [last.ip()]);
            assert_eq!(u64::from(patch) + 4, last.next_ip());
            // What the door takes from RCX, turning away gives back: as displacements, or by way of R11.
            let sum = code.iter().fold(0u64, |sum, i| match i.mnemonic() {
                iced_x86::Mnemonic::Lea => sum.wrapping_add(i.memory_displacement64()),
                iced_x86::Mnemonic::Mov => sum.wrapping_add(i.immediate(1)),
                _ => sum,
            });
            assert_eq!(sum, 0, "{rip:x}");
        }
    }
}
