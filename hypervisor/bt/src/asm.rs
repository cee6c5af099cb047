//! A small assembler for the fixed sequences around guest instructions.
//!
//! Guest instructions themselves are re-encoded by iced-x86; this covers the handful of forms that address lookups,
//! exits and register moves need. Every form here leaves the flags alone unless its name says otherwise.

mod operand;
mod shadow;

use iced_x86::{Encoder, IcedError, Instruction, OpKind, Register};
pub(crate) use operand::{Base, H, M};
use shadow::spilled_at;

/// A place in the code that jumps can name before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(u32);

#[derive(Clone, Copy)]
enum Fix {
    Rel8(u32),
    Rel32(u32),
}

/// A place in a block's code that is different in a copy of it at another RIP, as an offset from where the block was assembled; see
/// [`crate::relocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reloc {
    /// 64 bits: an address as far from RIP as the other one.
    Rip(u32),
    /// The same, negated.
    MinusRip(u32),
    /// 32 bits: the number of one of the block's sites, callouts, exits.
    Site(u32),
    Callout(u32),
    Exit(u32),
    /// 32 bits: the distance to the cold part, and back.
    ToCold(u32),
    ToHot(u32),
    /// 32 bits: the place in a jump cache of the door of an address near RIP, and where the first door is.
    Door(u32, u32),
}

/// Condition codes of Jcc, as in the low four opcode bits.
#[allow(dead_code)]
pub(crate) mod cc {
    pub(crate) const A: u8 = 7;
    pub(crate) const NC: u8 = 3;
    pub(crate) const NE: u8 = 5;
    pub(crate) const E: u8 = 4;
}

const UNBOUND: u32 = u32::MAX;

/// Code under construction. Offsets are relative to its start; it is position independent until it is linked.
pub(crate) struct Asm {
    pub(crate) buf: Vec<u8>,
    labels: Vec<u32>,
    fixes: Vec<(Fix, Label)>,
    /// Where the cold part begins: code that is placed away from the rest, see [`Asm::cold`].
    cold: Option<u32>,
    /// What a copy at another RIP must change, while copies are possible.
    relocs: Option<Vec<Reloc>>,
    /// The guest register that lives in memory and that R11 holds as well, see [`Asm::shadow`].
    shadow: Option<u8>,
    encoder: Encoder,
}

impl Asm {
    pub(crate) fn new() -> Self {
        Self {
            buf: Vec::with_capacity(8192),
            labels: Vec::new(),
            fixes: Vec::new(),
            cold: None,
            relocs: None,
            shadow: None,
            encoder: Encoder::new(64),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.buf.clear();
        self.labels.clear();
        self.fixes.clear();
        self.cold = None;
        self.relocs = None;
        self.shadow = None;
    }

    /// From here on it is noted what a copy must change.
    pub(crate) fn note_relocations(&mut self) {
        self.relocs = Some(Vec::with_capacity(32));
    }

    /// What a copy must change; `None` when it could not be one.
    pub(crate) fn relocations(&self) -> Option<&[Reloc]> {
        self.relocs.as_deref()
    }

    /// The code depends on its RIP in a way that no copy can follow.
    pub(crate) fn pin(&mut self) {
        self.relocs = None;
    }

    fn reloc(&mut self, r: Reloc) {
        if let Some(all) = &mut self.relocs {
            all.push(r);
        }
    }

    /// Notes that the last four bytes depend on where the block's records are.
    pub(crate) fn numbered(&mut self, kind: impl Fn(u32) -> Reloc) {
        self.reloc(kind(self.pos() - 4));
    }

    /// As [`Self::mov_imm`], of an address that is as far from RIP wherever the code is; where it does not take 64 bits, there can be no copy.
    pub(crate) fn mov_rip(&mut self, d: H, v: u64) {
        if !self.mov_moving(d, v, Reloc::Rip) {
            self.pin();
        }
    }

    /// The same of such an address's negation.
    pub(crate) fn mov_minus_rip(&mut self, d: H, v: u64) {
        if !self.mov_moving(d, v, Reloc::MinusRip) {
            self.pin();
        }
    }

    /// As [`Self::mov_imm`], of such an address if it takes 64 bits, and of a constant otherwise.
    pub(crate) fn mov_rip_or_short(&mut self, d: H, v: u64) {
        self.mov_moving(d, v, Reloc::Rip);
    }

    /// Whether it took 64 bits, and is noted.
    fn mov_moving(&mut self, d: H, v: u64, kind: fn(u32) -> Reloc) -> bool {
        let before = self.pos();
        self.mov_imm(d, v);
        let long = self.pos() - before == 10;
        if long {
            self.reloc(kind(self.pos() - 8));
        }
        long
    }

    /// `mov r11d, n`, the number of a site.
    pub(crate) fn mov_site(&mut self, n: u32) {
        self.mov_imm(H::R11, u64::from(n));
        self.numbered(Reloc::Site);
    }

    /// What follows is rarely executed and may be placed elsewhere. Only 32-bit jumps may lead across.
    pub(crate) fn cold(&mut self) {
        self.cold = Some(self.pos());
        self.shadow = None;
    }

    /// The hot and the cold part.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        self.buf.split_at(self.cold.unwrap_or(self.pos()) as usize)
    }

    pub(crate) fn pos(&self) -> u32 {
        self.buf.len() as u32
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() as u32 - 1)
    }

    pub(crate) fn bind(&mut self, l: Label) {
        self.labels[l.0 as usize] = self.pos();
        self.shadow = None;
    }

    pub(crate) fn here(&mut self) -> Label {
        let l = self.label();
        self.bind(l);
        l
    }

    /// Resolves all jumps between labels of this buffer, given the distance by which the cold part is moved further away
    /// from the hot part than it is here.
    pub(crate) fn resolve(&mut self, moved: i64) {
        let cold = self.cold.unwrap_or(u32::MAX);
        for (fix, label) in self.fixes.drain(..) {
            let target = self.labels[label.0 as usize];
            assert_ne!(target, UNBOUND, "a jump in emitted code names a label that was never placed");
            let far = |at: u32| i64::from(at) + if at >= cold { moved } else { 0 };
            match fix {
                Fix::Rel8(at) => {
                    let d = far(target) - far(at) - 1;
                    self.buf[at as usize] = i8::try_from(d).expect("short jump in emitted code is in reach") as u8;
                }
                Fix::Rel32(at) => {
                    let d = (far(target) - far(at) - 4) as i32;
                    if let Some(all) = &mut self.relocs
                        && (at < cold) != (target < cold)
                    {
                        all.push(if at < cold { Reloc::ToCold(at) } else { Reloc::ToHot(at) });
                    }
                    self.buf[at as usize..at as usize + 4].copy_from_slice(&d.to_le_bytes());
                }
            }
        }
    }

    fn b(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    fn imm32(&mut self, v: i32) {
        self.b(&v.to_le_bytes());
    }

    /// ModRM, SIB and displacement for `reg, m`.
    fn modrm(&mut self, reg: u8, m: M) {
        let reg = (reg & 7) << 3;
        match (m.base, m.index) {
            (None, None) => {
                self.b(&[reg | 4, 0x25]);
                self.imm32(m.disp);
            }
            (None, Some((i, s))) => {
                self.b(&[reg | 4, (s << 6) | (i.low() << 3) | 5]);
                self.imm32(m.disp);
            }
            (Some(base), index) => {
                let small = i8::try_from(m.disp).is_ok();
                let md = if m.disp == 0 && base.low() != 5 {
                    0
                } else if small {
                    0x40
                } else {
                    0x80
                };
                match index {
                    None if base.low() != 4 => self.b(&[md | reg | base.low()]),
                    None => self.b(&[md | reg | 4, 0x24]),
                    Some((i, s)) => self.b(&[md | reg | 4, (s << 6) | (i.low() << 3) | base.low()]),
                }
                match md {
                    0 => {}
                    0x40 => self.b(&[m.disp as i8 as u8]),
                    _ => self.imm32(m.disp),
                }
            }
        }
    }

    /// `[gs] [rex] op modrm` with `reg` in the reg field. `pre` is a mandatory prefix or 0.
    fn rm(&mut self, w: bool, op: &[u8], reg: u8, m: M) {
        self.b(m.seg.prefix());
        let x = m.index.map_or(0, |(i, _)| i.high());
        let bb = m.base.map_or(0, H::high);
        let rex = 0x40 | (u8::from(w) << 3) | ((reg >> 3) << 2) | (x << 1) | bb;
        if rex != 0x40 {
            self.b(&[rex]);
        }
        self.b(op);
        self.modrm(reg, m);
    }

    fn rr(&mut self, w: bool, op: &[u8], reg: u8, rm: H) {
        let rex = 0x40 | (u8::from(w) << 3) | ((reg >> 3) << 2) | rm.high();
        if rex != 0x40 {
            self.b(&[rex]);
        }
        self.b(op);
        self.b(&[0xc0 | ((reg & 7) << 3) | rm.low()]);
    }

    pub(crate) fn mov(&mut self, d: H, s: H) {
        if d != s {
            self.writes(d);
            self.rr(true, &[0x8b], d.0, s);
        }
    }

    /// 32-bit move, zero-extending (also when `d` is `s`).
    pub(crate) fn mov32(&mut self, d: H, s: H) {
        self.writes(d);
        self.rr(false, &[0x8b], d.0, s);
    }

    /// 16-bit move, which leaves the rest of `d` alone.
    pub(crate) fn mov16(&mut self, d: H, s: H) {
        self.writes(d);
        self.b(&[0x66]);
        self.rr(false, &[0x8b], d.0, s);
    }

    pub(crate) fn movzx16(&mut self, d: H, s: H) {
        self.writes(d);
        self.rr(false, &[0x0f, 0xb7], d.0, s);
    }

    pub(crate) fn movsxd(&mut self, d: H, s: H) {
        self.writes(d);
        self.rr(true, &[0x63], d.0, s);
    }

    pub(crate) fn movsx16(&mut self, d: H, s: H) {
        self.writes(d);
        self.rr(true, &[0x0f, 0xbf], d.0, s);
    }

    pub(crate) fn load(&mut self, d: H, m: M) {
        let g = m.slot().and_then(spilled_at);
        if g.is_some() && g == self.shadow {
            return self.mov(d, H::R11);
        }
        self.writes(d);
        self.rm(true, &[0x8b], d.0, m);
        if d == H::R11 {
            self.shadow = g;
        }
    }

    pub(crate) fn load32(&mut self, d: H, m: M) {
        self.writes(d);
        self.rm(false, &[0x8b], d.0, m);
    }

    pub(crate) fn load8(&mut self, d: H, m: M) {
        self.writes(d);
        self.rm(false, &[0x0f, 0xb6], d.0, m);
    }

    pub(crate) fn load16(&mut self, d: H, m: M) {
        self.writes(d);
        self.rm(false, &[0x0f, 0xb7], d.0, m);
    }

    pub(crate) fn store(&mut self, m: M, s: H) {
        self.writes_memory(m);
        self.rm(true, &[0x89], s.0, m);
        if s == H::R11 {
            self.shadow = m.slot().and_then(spilled_at).or(self.shadow);
        }
    }

    pub(crate) fn store32(&mut self, m: M, s: H) {
        self.writes_memory(m);
        self.rm(false, &[0x89], s.0, m);
    }

    pub(crate) fn store16(&mut self, m: M, s: H) {
        self.writes_memory(m);
        self.b(&[0x66]);
        // A segment prefix may follow the operand-size prefix; REX stays last.
        self.rm(false, &[0x89], s.0, m);
    }

    /// Stores the low byte of RCX or of R8-R15 (no legacy high-byte registers here).
    pub(crate) fn store8(&mut self, m: M, s: H) {
        self.writes_memory(m);
        debug_assert!(s.0 < 4 || s.0 >= 8);
        self.rm(false, &[0x88], s.0, m);
    }

    pub(crate) fn store_imm8(&mut self, m: M, v: u8) {
        self.writes_memory(m);
        self.rm(false, &[0xc6], 0, m);
        self.b(&[v]);
    }

    pub(crate) fn store_imm32(&mut self, m: M, v: i32) {
        self.writes_memory(m);
        self.rm(false, &[0xc7], 0, m);
        self.imm32(v);
    }

    /// Stores a sign-extended 32-bit immediate as 64 bits.
    pub(crate) fn store_simm32(&mut self, m: M, v: i32) {
        self.writes_memory(m);
        self.rm(true, &[0xc7], 0, m);
        self.imm32(v);
    }

    pub(crate) fn mov_imm(&mut self, d: H, v: u64) {
        self.writes(d);
        if v <= u64::from(u32::MAX) {
            if d.high() != 0 {
                self.b(&[0x41]);
            }
            self.b(&[0xb8 | d.low()]);
            self.imm32(v as u32 as i32);
        } else if i64::from(v as i32) == v as i64 {
            self.rr(true, &[0xc7], 0, d);
            self.imm32(v as i32);
        } else {
            self.b(&[0x48 | d.high(), 0xb8 | d.low()]);
            self.b(&v.to_le_bytes());
        }
    }

    pub(crate) fn lea(&mut self, d: H, m: M) {
        self.writes(d);
        self.rm(true, &[0x8d], d.0, m);
    }

    pub(crate) fn lea32(&mut self, d: H, m: M) {
        self.writes(d);
        self.rm(false, &[0x8d], d.0, m);
    }

    fn vex_0f38(&mut self, pp: u8, op: u8, reg: H, vvvv: H, m: M) {
        self.b(m.seg.prefix());
        let x = m.index.map_or(0, |(i, _)| i.high());
        let bb = m.base.map_or(0, H::high);
        let b1 = (((reg.high() ^ 1) << 7) | ((x ^ 1) << 6) | ((bb ^ 1) << 5)) | 2;
        let b2 = 0x80 | ((!vvvv.0 & 15) << 3) | pp;
        self.b(&[0xc4, b1, b2, op]);
        self.modrm(reg.0, m);
    }

    /// `andn d, s, m` (64-bit): the bits of `m` that `s` lacks. Sets ZF by them.
    pub(crate) fn andn_flags(&mut self, d: H, s: H, m: M) {
        self.writes(d);
        self.vex_0f38(0, 0xf2, d, s, m);
    }

    /// `pext d, s, m` (64-bit).
    pub(crate) fn pext(&mut self, d: H, s: H, m: M) {
        self.writes(d);
        self.vex_0f38(2, 0xf5, d, s, m);
    }

    /// `pdep d, s, m` (64-bit).
    pub(crate) fn pdep(&mut self, d: H, s: H, m: M) {
        self.writes(d);
        self.vex_0f38(3, 0xf5, d, s, m);
    }

    /// `rorx d, s, n` (64-bit).
    pub(crate) fn rorx(&mut self, d: H, s: H, n: u8) {
        self.writes(d);
        let b1 = (((d.high() ^ 1) << 7) | 0x40 | ((s.high() ^ 1) << 5)) | 3;
        self.b(&[0xc4, b1, 0xfb, 0xf0, 0xc0 | (d.low() << 3) | s.low(), n]);
    }

    /// `movzx d32, s8`, of registers whose low bytes need no REX or are numbered from 8 on.
    pub(crate) fn movzx8(&mut self, d: H, s: H) {
        self.writes(d);
        self.rr(false, &[0x0f, 0xb6], d.0, s);
    }

    /// `sarx d, s, count` (64-bit).
    pub(crate) fn sarx(&mut self, d: H, s: H, count: H) {
        self.shift_x(2, d, s, count);
    }

    /// `shrx d, s, count` (64-bit).
    pub(crate) fn shrx(&mut self, d: H, s: H, count: H) {
        self.shift_x(3, d, s, count);
    }

    fn shift_x(&mut self, pp: u8, d: H, s: H, count: H) {
        self.writes(d);
        let b1 = (((d.high() ^ 1) << 7) | 0x40 | ((s.high() ^ 1) << 5)) | 2;
        let b2 = 0x80 | ((!count.0 & 15) << 3) | pp;
        self.b(&[0xc4, b1, b2, 0xf7, 0xc0 | (d.low() << 3) | s.low()]);
    }

    /// Clobbers flags.
    pub(crate) fn shr32_flags(&mut self, d: H, n: u8) {
        self.writes(d);
        self.rr(false, &[0xc1], 5, d);
        self.b(&[n]);
    }

    /// Clobbers flags.
    pub(crate) fn and32_flags(&mut self, d: H, v: i32) {
        self.writes(d);
        self.rr(false, &[0x81], 4, d);
        self.imm32(v);
    }

    /// Clobbers flags.
    pub(crate) fn add_flags(&mut self, d: H, m: M) {
        self.writes(d);
        self.rm(true, &[0x03], d.0, m);
    }

    /// Clobbers flags.
    pub(crate) fn cmp_imm_flags(&mut self, d: H, v: i32) {
        self.rr(true, &[0x81], 7, d);
        self.imm32(v);
    }

    /// Clobbers flags.
    pub(crate) fn cmp32_imm_flags(&mut self, d: H, v: i32) {
        if let Ok(small) = i8::try_from(v) {
            self.rr(false, &[0x83], 7, d);
            self.b(&[small as u8]);
        } else {
            self.rr(false, &[0x81], 7, d);
            self.imm32(v);
        }
    }

    /// ZF = the upper 33 bits of `r` are zero. Clobbers the other flags.
    pub(crate) fn test_upper_flags(&mut self, r: H) {
        if r == H::RAX {
            self.b(&[0x48, 0xa9]);
        } else {
            self.rr(true, &[0xf7], 0, r);
        }
        self.imm32(crate::window::LOW_MASK as i32);
    }

    /// CF = bit `n` of `r`; the other flags are undefined.
    pub(crate) fn bt_flags(&mut self, r: H, n: u8) {
        self.rr(true, &[0x0f, 0xba], 4, r);
        self.b(&[n]);
    }

    pub(crate) fn jcc(&mut self, cond: u8, l: Label) {
        self.b(&[0x0f, 0x80 | cond]);
        self.fixes.push((Fix::Rel32(self.pos()), l));
        self.imm32(0);
    }

    pub(crate) fn jmp(&mut self, l: Label) {
        self.b(&[0xe9]);
        self.fixes.push((Fix::Rel32(self.pos()), l));
        self.imm32(0);
    }

    pub(crate) fn jmp8(&mut self, l: Label) {
        self.b(&[0xeb]);
        self.fixes.push((Fix::Rel8(self.pos()), l));
        self.b(&[0]);
    }

    pub(crate) fn jrcxz(&mut self, l: Label) {
        self.b(&[0xe3]);
        self.fixes.push((Fix::Rel8(self.pos()), l));
        self.b(&[0]);
    }

    /// `jmp rel32` or `jcc rel32` whose displacement is patched later; returns the displacement's offset.
    pub(crate) fn jump_patchable(&mut self, cond: Option<u8>, l: Label) -> u32 {
        match cond {
            Some(c) => self.jcc(c, l),
            None => self.jmp(l),
        }
        self.pos() - 4
    }

    pub(crate) fn call_gs(&mut self, off: i32) {
        self.shadow = None;
        self.rm(false, &[0xff], 2, M::gs(off));
    }

    pub(crate) fn jmp_mem(&mut self, m: M) {
        self.rm(false, &[0xff], 4, m);
    }

    /// Clobbers flags.
    pub(crate) fn or32_flags(&mut self, d: H, v: i32) {
        self.writes(d);
        self.rr(false, &[0x81], 1, d);
        self.imm32(v);
    }

    /// Clobbers flags.
    pub(crate) fn cmp32_mem_imm_flags(&mut self, m: M, v: i32) {
        self.rm(false, &[0x81], 7, m);
        self.imm32(v);
    }

    /// Clobbers flags: `cmp r, s` (64-bit).
    pub(crate) fn cmp_flags(&mut self, r: H, s: H) {
        self.rr(true, &[0x3b], r.0, s);
    }

    /// Clobbers flags: `cmp r, m` (64-bit).
    pub(crate) fn cmp_mem_flags(&mut self, r: H, m: M) {
        self.rm(true, &[0x3b], r.0, m);
    }

    /// Clobbers flags: `cmp r32, m`.
    pub(crate) fn cmp32_mem_flags(&mut self, r: H, m: M) {
        self.rm(false, &[0x3b], r.0, m);
    }

    /// Clobbers flags: `and r, m` (64-bit).
    pub(crate) fn and_mem_flags(&mut self, r: H, m: M) {
        self.writes(r);
        self.rm(true, &[0x23], r.0, m);
    }

    /// `not r` (64-bit); no flags.
    pub(crate) fn not(&mut self, r: H) {
        self.writes(r);
        self.rr(true, &[0xf7], 2, r);
    }

    /// Clobbers flags.
    pub(crate) fn shr_flags(&mut self, d: H, n: u8) {
        self.writes(d);
        self.rr(true, &[0xc1], 5, d);
        self.b(&[n]);
    }

    /// `rep movs` or `rep stos` of bytes, doublewords or quadwords with the host's RCX, RSI, RDI.
    pub(crate) fn rep_string(&mut self, movs: bool, size: u8) {
        self.b(&[0xf3]);
        if size == 8 {
            self.b(&[0x48]);
        }
        self.b(&[match (movs, size) {
            (true, 1) => 0xa4,
            (true, _) => 0xa5,
            (false, 1) => 0xaa,
            (false, _) => 0xab,
        }]);
    }

    /// Adds to the low byte. Clobbers flags.
    pub(crate) fn add8_flags(&mut self, d: H, v: i8) {
        self.writes(d);
        self.b(&[0x40 | d.high(), 0x80, 0xc0 | d.low(), v as u8]);
    }

    /// `mov ah, al`.
    pub(crate) fn mov_ah_al(&mut self) {
        self.b(&[0x88, 0xc4]);
    }

    /// SF, ZF, AF, PF and CF from AH.
    pub(crate) fn sahf(&mut self) {
        self.b(&[0x9e]);
    }

    pub(crate) fn pushfq(&mut self) {
        self.b(&[0x9c]);
    }

    pub(crate) fn popfq(&mut self) {
        self.b(&[0x9d]);
    }

    pub(crate) fn push(&mut self, r: H) {
        if r.high() != 0 {
            self.b(&[0x41]);
        }
        self.b(&[0x50 | r.low()]);
    }

    pub(crate) fn pop(&mut self, r: H) {
        self.writes(r);
        if r.high() != 0 {
            self.b(&[0x41]);
        }
        self.b(&[0x58 | r.low()]);
    }

    /// `call rel32` whose displacement is patched later; returns the displacement's offset.
    pub(crate) fn call_patchable(&mut self, l: Label) -> u32 {
        self.shadow = None;
        self.b(&[0xe8]);
        self.fixes.push((Fix::Rel32(self.pos()), l));
        self.imm32(0);
        self.pos() - 4
    }

    pub(crate) fn call_mem(&mut self, m: M) {
        self.shadow = None;
        self.rm(false, &[0xff], 2, m);
    }

    pub(crate) fn ret(&mut self) {
        self.b(&[0xc3]);
    }

    pub(crate) fn ud2(&mut self) {
        self.b(&[0x0f, 0x0b]);
    }

    /// A guest instruction as it stands in the guest's code.
    pub(crate) fn verbatim(&mut self, bytes: &[u8]) {
        self.b(bytes);
    }

    /// Appends one instruction as iced-x86 encodes it. Nothing is appended when it cannot be encoded.
    pub(crate) fn guest(&mut self, i: &Instruction) -> Result<(), IcedError> {
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register if i.op_register(n).full_register() == Register::R11 => self.shadow = None,
                // It may be the operand that is written, in part.
                OpKind::Memory
                    if i.segment_prefix() == Register::GS
                        && i.memory_base() == Register::None
                        && i.memory_index() == Register::None
                        && spilled_at(i.memory_displacement64() as i32) == self.shadow =>
                {
                    self.shadow = None;
                }
                _ => {}
            }
        }
        let mark = self.buf.len();
        self.encoder.set_buffer(std::mem::take(&mut self.buf));
        let r = self.encoder.encode(i, mark as u64);
        self.buf = self.encoder.take_buffer();
        match r {
            Ok(_) => Ok(()),
            Err(e) => {
                self.buf.truncate(mark);
                Err(e)
            }
        }
    }
}
