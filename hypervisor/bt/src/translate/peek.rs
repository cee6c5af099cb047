//! Which status flags are live, looking past the end of the block.
//!
//! A lookup or a check that may clobber the flags is half as long as one that must not. Flags are dead before an instruction if
//! whatever runs next writes them before anything reads them. Within a block that is a walk backwards; where it ends, the
//! instructions at the targets of its last jumps are looked at, if they are in the same page. The bytes looked at become bytes that
//! the block depends on: a store to them kills it.

use super::classify::{Class, classify};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, RflagsBits as B};
use std::ops::Range;

/// All status flags.
const ALL: u32 = B::OF | B::SF | B::ZF | B::AF | B::CF | B::PF;
/// Instructions looked at from one target on at most.
const FAR: usize = 6;
/// Conditional jumps that are followed both ways, one behind the other.
const DEEP: usize = 1;

/// The page of guest code that a 64-bit block is in.
pub(crate) struct Peek<'a> {
    bytes: &'a [u8],
    base: u64,
    seen: Range<u16>,
    /// A RIP, and the flags that are live there.
    back: Option<(u64, u32)>,
    /// The code runs in ring 0.
    kernel: bool,
}

impl<'a> Peek<'a> {
    /// `bytes` are the whole page that begins at RIP `base`.
    pub(crate) fn new(bytes: &'a [u8], base: u64, kernel: bool) -> Self {
        Self { bytes, base, seen: 0..0, back: None, kernel }
    }

    /// What was looked at.
    pub(crate) fn seen(self) -> Range<u16> {
        self.seen
    }

    /// Whether no flag is live at `rip`, where the block's last branch leads back to; that is asked once more for the block itself.
    pub(super) fn none_live_at(&mut self, rip: u64) -> bool {
        let live = self.live_at(rip, DEEP);
        self.back = Some((rip, live));
        live == 0
    }

    /// The flags that are live where the block goes on.
    fn ahead(&mut self, rip: u64) -> u32 {
        match self.back {
            Some((at, live)) if at == rip => live,
            _ => self.live_at(rip, DEEP),
        }
    }

    fn note(&mut self, from: usize, to: usize) {
        let (from, to) = (from as u16, to as u16);
        self.seen = if self.seen.is_empty() { from..to } else { self.seen.start.min(from)..self.seen.end.max(to) };
    }

    /// The flags that are live at `rip`.
    fn live_at(&mut self, rip: u64, deep: usize) -> u32 {
        let bytes = self.bytes;
        let start = rip.wrapping_sub(self.base);
        if start >= bytes.len() as u64 {
            return ALL;
        }
        let mut at = start as usize;
        let mut d = Decoder::with_ip(64, &bytes[at..], rip, DecoderOptions::NONE);
        // Flags that nothing has overwritten yet, and those that were read before.
        let (mut open, mut live) = (ALL, 0);
        for _ in 0..FAR {
            let i = d.decode();
            if i.is_invalid() {
                return live | open;
            }
            self.note(start as usize, at + i.len());
            at += i.len();
            let (kills, reads) = effect(&i, self.kernel);
            live |= reads & open;
            match classify(i.code()) {
                Class::Jcc if deep > 0 && open & !live != 0 => {
                    let next = self.live_at(i.next_ip(), deep - 1) | self.live_at(i.near_branch_target(), deep - 1);
                    return live | next & open;
                }
                Class::JmpDirect if deep > 0 => return live | self.live_at(i.near_branch_target(), deep - 1) & open,
                Class::Jcc | Class::JmpDirect => return live | open,
                _ => open &= !kills,
            }
            if open & !live == 0 {
                return live;
            }
        }
        live | open
    }
}

/// For each instruction, whether any status flag that is live before it may still be read later. All flags are live wherever Rust
/// code may look at them and, without `peek`, at the block's end.
pub(super) fn flag_liveness(code: &[Instruction], mut peek: Option<&mut Peek<'_>>) -> Vec<bool> {
    let mut out = vec![true; code.len()];
    let kernel = peek.as_ref().is_some_and(|p| p.kernel);
    let mut ahead = |rip: u64| peek.as_mut().map_or(ALL, |p| p.ahead(rip));
    let mut live = ALL;
    for (n, i) in code.iter().enumerate().rev() {
        let last = n + 1 == code.len();
        let (kills, reads) = effect(i, kernel);
        live = match classify(i.code()) {
            Class::Jcc => {
                let next = if last { ahead(i.next_ip()) } else { live };
                let all_read = reads | next == ALL;
                reads | next | if all_read { 0 } else { ahead(i.near_branch_target()) }
            }
            Class::JmpDirect | Class::CallDirect => ahead(i.near_branch_target()),
            _ => {
                if last && kills != ALL && reads != ALL {
                    live = ahead(i.next_ip());
                }
                live & !kills | reads
            }
        };
        out[n] = live != 0;
    }
    out
}

/// Flags that an instruction overwrites for certain, and flags that it may read, or leave for somebody who does.
fn effect(i: &Instruction, kernel: bool) -> (u32, u32) {
    match classify(i.code()) {
        Class::Copy(_) | Class::Nop | Class::Lea | Class::BitTest | Class::Push | Class::Pop | Class::Leave => {}
        Class::Jcc => return (0, i.rflags_read() & ALL),
        Class::JmpDirect => return (0, 0),
        // In ring 0 they leave the flags alone, also where Rust carries them out. Elsewhere they may fault.
        Class::Cli | Class::Sti | Class::Stac | Class::Clac | Class::Swapgs if kernel => return (0, 0),
        Class::Rdtsc | Class::Rdtscp | Class::Pause if kernel => return (0, 0),
        Class::ReadCr | Class::ReadBase | Class::ReadSegment | Class::WriteBase if kernel => return (0, 0),
        // These replace them all. A fault shows others, as any fault may.
        Class::Sysretq | Class::Iretq if kernel => return (ALL, 0),
        // Rust code may look at them.
        _ => return (0, ALL),
    }
    let mut kills = i.rflags_written() | i.rflags_cleared() | i.rflags_set();
    if matches!(i.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test) {
        // AF is undefined, which is to say that it does not keep its value.
        kills |= B::AF;
    }
    if matches!(i.mnemonic(), Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar) {
        // OF and AF likewise; nothing is undefined if the count is 0.
        kills |= i.rflags_undefined();
    }
    if maybe_unwritten(i) {
        kills = 0;
    }
    (kills & ALL, i.rflags_read() & ALL)
}

/// Instructions whose flag results depend on a count that may be zero: they overwrite nothing for certain.
fn maybe_unwritten(i: &Instruction) -> bool {
    use Mnemonic as M;
    if matches!(i.mnemonic(), M::Shl | M::Shr | M::Sar) && i.op1_kind() == OpKind::Immediate8 {
        // The count is taken modulo the operand's width or 32, whichever is more.
        let mask =
            if matches!(i.code(), Code::Shl_rm64_imm8 | Code::Shr_rm64_imm8 | Code::Sar_rm64_imm8) { 63 } else { 31 };
        return i.immediate8() & mask == 0;
    }
    matches!(i.mnemonic(), M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd)
        && !matches!(
            i.code(),
            Code::Shl_rm8_1
                | Code::Shl_rm16_1
                | Code::Shl_rm32_1
                | Code::Shl_rm64_1
                | Code::Shr_rm8_1
                | Code::Shr_rm16_1
                | Code::Shr_rm32_1
                | Code::Shr_rm64_1
                | Code::Sar_rm8_1
                | Code::Sar_rm16_1
                | Code::Sar_rm32_1
                | Code::Sar_rm64_1
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::DecoderOptions;

    const BASE: u64 = 0x40_0000;

    /// Liveness before each instruction of the block at the page's start, which is `count` instructions, and what was seen.
    fn live(bytes: &[u8], count: usize) -> (Vec<bool>, Range<u16>) {
        let mut page = bytes.to_vec();
        page.resize(4096, 0xcc);
        let code: Vec<_> = Decoder::with_ip(64, &page, BASE, DecoderOptions::NONE).into_iter().take(count).collect();
        let mut peek = Peek::new(&page, BASE, true);
        let out = flag_liveness(&code, Some(&mut peek));
        (out, peek.seen())
    }

    #[test]
    fn flags_are_dead_where_the_target_overwrites_them() {
        // mov rax, [rbx]; jmp +0; xor ecx, ecx
        let (out, seen) = live(&[0x48, 0x8b, 0x03, 0xeb, 0, 0x31, 0xc9], 2);
        assert_eq!((out, seen), (vec![false, false], 5..7));
    }

    #[test]
    fn flags_are_live_where_one_way_reads_them() {
        // mov rax, [rbx]; jne +2; xor ecx, ecx; setc al: ZF is read by the jump, CF on the way that is taken.
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0x75, 2, 0x31, 0xc9, 0x0f, 0x92, 0xc0], 2);
        assert_eq!(out, [true, true]);
        // test eax, eax; mov rax, [rbx]; je +0; xor ecx, ecx: only ZF lives between the test and the jump.
        let (out, seen) = live(&[0x85, 0xc0, 0x48, 0x8b, 0x03, 0x74, 0, 0x31, 0xc9], 3);
        assert_eq!((out, seen), (vec![false, true, true], 7..9));
        // inc eax, which keeps CF; then a way out of the page.
        let (out, _) = live(&[0xeb, 0, 0xff, 0xc0, 0xe9, 0, 0x10, 0, 0], 1);
        assert_eq!(out, [true]);
    }

    #[test]
    fn flags_are_dead_before_a_return_to_user_code() {
        // mov rax, [rbx]; swapgs; sysretq, and the same with IRETQ
        for last in [[0x48, 0x0f, 0x07], [0x48, 0xcf, 0x90]] {
            let (out, _) = live(&[&[0x48, 0x8b, 0x03, 0x0f, 0x01, 0xf8][..], &last].concat(), 3);
            assert_eq!(out, [false, false, false]);
        }
        // mov rax, [rbx]; cli; setc al
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0xfa, 0x0f, 0x92, 0xc0], 3);
        assert_eq!(out, [true, true, true]);
    }

    #[test]
    fn shifts_by_constants_overwrite_all_flags_unless_they_shift_by_nothing() {
        // mov rax, [rbx]; shr bp, 8; ret
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0x66, 0xc1, 0xed, 8, 0xc3], 3);
        assert_eq!(out, [false, false, true]);
        // The same by 32, and by CL.
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0x66, 0xc1, 0xed, 32, 0xc3], 3);
        assert_eq!(out, [true, true, true]);
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0x66, 0xd3, 0xed, 0xc3], 3);
        assert_eq!(out, [true, true, true]);
        // A shift that may be by nothing leaves the flags for who reads them, and nobody does: mov rax, [rbx]; shr ebp, cl; xor ecx, ecx
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0xd3, 0xed, 0x31, 0xc9], 3);
        assert_eq!(out, [false, false, false]);
        // Rotations keep most flags: rol ebp, 8.
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0xc1, 0xc5, 8, 0xc3], 3);
        assert_eq!(out, [true, true, true]);
    }

    #[test]
    fn nothing_is_known_without_the_page_or_behind_a_return() {
        let code: Vec<_> = Decoder::with_ip(64, &[0xeb, 0xfe], BASE, DecoderOptions::NONE).into_iter().collect();
        assert_eq!(flag_liveness(&code, None), [true]);
        // mov rax, [rbx]; jmp +0; ret
        let (out, _) = live(&[0x48, 0x8b, 0x03, 0xeb, 0, 0xc3], 2);
        assert_eq!(out, [true, true]);
        // A jump to itself never reads them, but nothing overwrites them either.
        let (out, _) = live(&[0xeb, 0xfe], 1);
        assert_eq!(out, [true]);
    }
}
