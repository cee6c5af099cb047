//! A guest that means harm: random bytes as instructions in every mode, over descriptor tables that are partly random.
//!
//! Nothing may panic, a fault must leave the registers alone, and the mode must stay one that the architecture knows.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::*;
use crate::flat_env::TABLES;
use crate::state::Segment;
use crate::state::{cr0, efer};
use crate::testkit::*;
use crate::{StopReason, interrupt};

/// xorshift64*: the test is the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    /// A value that is likely to be at an edge: an address in RAM, a selector, a boundary.
    fn value(&mut self) -> u64 {
        match self.below(10) {
            0 => self.next(),
            1 => 0,
            2 => u64::MAX - self.below(16),
            3 => 0x7fff_ffff_fff0 + self.below(32),
            4 => 0xffff_fff0 + self.below(32),
            5 => 0xfff0 + self.below(32),
            6 => 1 << self.below(64),
            7 | 8 => self.below(0x20) * 8 + self.below(4),
            _ => self.below(0x2_0000),
        }
    }
}

/// Opcodes that lead straight to this module and its neighbours; plain random bytes seldom do.
const OPCODES: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x06],
    &[0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xa0],
    &[0x0f, 0xa1],
    &[0x0f, 0xa8],
    &[0x0f, 0xa9],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0xb5],
    &[0x0f, 0x80],
    &[0x66, 0x0f, 0x38, 0x82],
    &[0xf3, 0x0f, 0xae],
    &[0xf3, 0x48, 0x0f, 0xae],
    &[0x06],
    &[0x07],
    &[0x0e],
    &[0x16],
    &[0x17],
    &[0x1e],
    &[0x1f],
    &[0x50],
    &[0x58],
    &[0x5c],
    &[0x68],
    &[0x6a],
    &[0x70],
    &[0x8c],
    &[0x8e],
    &[0x8f],
    &[0x9a],
    &[0x9c],
    &[0x9d],
    &[0xc2],
    &[0xc3],
    &[0xc4],
    &[0xc5],
    &[0xca],
    &[0xcb],
    &[0xcc],
    &[0xcd],
    &[0xce],
    &[0xcf],
    &[0xe0],
    &[0xe2],
    &[0xe3],
    &[0xe4],
    &[0xe5],
    &[0xe6],
    &[0xe8],
    &[0xe9],
    &[0xea],
    &[0xec],
    &[0xef],
    &[0xf1],
    &[0xf4],
    &[0xfa],
    &[0xfb],
    &[0xff],
];

fn machine(r: &mut Random) -> Machine {
    let mut m = match r.below(8) {
        0 => Machine::long(0),
        1 => Machine::long(3),
        2 => Machine::protected(0),
        3 => Machine::protected(3),
        4 => Machine::real(),
        5 => Machine::v8086(3),
        6 => Machine::v8086(0),
        _ => {
            let mut m = Machine::long(3);
            m.st.seg[Seg::Cs as usize] = Segment::flat_code(UCODE32, 3, false);
            m
        }
    };
    for _ in 0..r.below(4) {
        let v = r.next();
        m.env.put64(GDT + r.below(32) * 8, v);
        let v = r.next();
        m.env.put64(IDT + r.below(512) * 8, v);
        let v = r.value();
        m.env.put64(TSS + r.below(16) * 8, v);
    }
    if r.below(4) == 0 {
        let v = r.next();
        m.env.put64(TABLES + 0x3000 + r.below(32) * 8, v);
    }
    m
}

fn shake(r: &mut Random, m: &mut Machine) {
    for n in 0..16 {
        if n != Reg::Rsp as usize || r.below(4) == 0 {
            m.st.gpr[n] = r.value();
        }
    }
    for n in 0..12 {
        let v = r.value();
        let sp = m.gpr(Reg::Rsp) % 0x1_0000;
        m.env.put64(sp + n * 8, v);
    }
    m.st.rflags ^= r.next() & (rflags::STATUS | rflags::DF);
    (m.st.star, m.st.sysenter_cs) = (r.next(), r.value());
}

fn check(m: &Machine) {
    let st = &m.st;
    assert!(st.rflags & rflags::FIXED != 0);
    assert!(!(st.long_mode() && st.v8086()), "virtual-8086 mode inside long mode");
    assert_eq!(st.long_mode(), st.cr0 & cr0::PG != 0 && st.efer & efer::LME != 0);
    if st.v8086() {
        assert_eq!(st.cpl, 3);
    } else if st.protected() {
        assert!(st.cpl <= 3);
    }
    let cs = st.segment(Seg::Cs);
    assert!(!(st.long_mode() && cs.attr & Segment::L != 0 && cs.attr & Segment::DB != 0));
}

/// String instructions and gathers keep partial progress when they fault.
fn resumable(i: &Instruction) -> bool {
    i.is_string_instruction() || i.is_vsib()
}

#[test]
fn random_instructions_never_break_the_rules() {
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    let (mut ok, mut faults, mut shutdowns) = (0, 0, 0);
    for _ in 0..6_000 {
        let mut m = machine(&mut r);
        for _ in 0..12 {
            shake(&mut r, &mut m);
            let mut bytes = [0; 15];
            for b in &mut bytes {
                *b = r.next() as u8;
            }
            let mut at = 0;
            if r.below(3) == 0 {
                bytes[0] = [0x66, 0x67, 0x48, 0x64, 0xf3][r.below(5) as usize];
                at = 1;
            }
            if r.below(4) != 0 {
                let opcode = OPCODES[r.below(OPCODES.len() as u64) as usize];
                bytes[at..at + opcode.len()].copy_from_slice(opcode);
            }
            let i = Decoder::with_ip(m.st.code_bits(), &bytes, m.st.rip, DecoderOptions::NONE).decode();
            let before = registers(&m.st);
            match step(&mut m.st, &mut m.env, &i) {
                Ok(_) => ok += 1,
                Err(e) => {
                    faults += 1;
                    if !resumable(&i) {
                        assert_eq!(registers(&m.st), before, "{e:?} from {i} changed registers");
                    }
                    if interrupt::deliver(&mut m.st, &mut m.env, e) == Err(StopReason::TripleFault) {
                        shutdowns += 1;
                        break;
                    }
                }
            }
            check(&m);
            let vector = r.next() as u8;
            if r.below(8) == 0 && interrupt::deliver_external(&mut m.st, &mut m.env, vector).is_err() {
                shutdowns += 1;
                break;
            }
        }
    }
    assert!(ok > 5_000 && faults > 5_000 && shutdowns > 100, "{ok} {faults} {shutdowns}");
}
