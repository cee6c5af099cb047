//! Random instructions of this module in random states: nothing may panic, and a fault must leave the state as it was.

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use super::emulate;
use crate::flat_env::{FlatEnv, Random};
use crate::state::{Segment, cr0, rflags};
use crate::{CpuState, string};

/// Opcodes (without prefixes) that this module has a say in; the bytes that follow are random.
const OPCODES: &[&[u8]] = &[
    &[0xa4],
    &[0xa5],
    &[0xaa],
    &[0xab],
    &[0xac],
    &[0xad],
    &[0xae],
    &[0xaf],
    &[0xa6],
    &[0xa7],
    &[0x6c],
    &[0x6d],
    &[0x6e],
    &[0x6f],
    &[0x0f, 0xa2],
    &[0x0f, 0x32],
    &[0x0f, 0x30],
    &[0x0f, 0x31],
    &[0x0f, 0x01],
    &[0x0f, 0x33],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0xd9],
    &[0xdd],
    &[0xdb, 0xe3],
    &[0x27],
    &[0x2f],
    &[0x37],
    &[0x3f],
    &[0xd4],
    &[0xd5],
    &[0xd6],
    &[0x60],
    &[0x61],
    &[0x62],
    &[0xc8],
    &[0xc9],
    &[0xd7],
    &[0x63],
    &[0xc4, 0xe2],
    &[0x62, 0xf2, 0x7d],
    &[0x62, 0xf2, 0xfd],
];
const PREFIXES: &[u8] = &[0xf3, 0xf2, 0x66, 0x67, 0x64, 0x65, 0x36, 0x48, 0x44, 0xf0];

fn state(random: &mut Random) -> (CpuState, FlatEnv) {
    let (mut st, mut env) = match random.below(4) {
        0 => FlatEnv::legacy(16),
        1 => FlatEnv::legacy(32),
        _ => FlatEnv::long_mode(),
    };
    env.fast = random.below(2) == 0;
    for g in &mut st.gpr {
        *g = match random.below(6) {
            0 => random.next(),
            1 => [0, u64::MAX, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, 0xffff, 0xffff_ffff][random.below(6) as usize],
            2 => random.below(300),
            // Ordinary memory, sometimes right before a hole.
            3 => 0x9000 - random.below(80),
            _ => random.below(0x1f_0000) & !63,
        };
    }
    if st.long_mode() {
        env.unmap(0x9000);
        env.protect(0xa000);
        if random.below(2) == 0 {
            st.cpl = 0;
        }
    } else {
        for s in &mut st.seg {
            match random.below(4) {
                0 => s.limit = random.next() as u32,
                1 => s.base = random.next() & 0xffff_ffff,
                _ => {}
            }
        }
        if random.below(8) == 0 {
            st.seg[random.below(6) as usize] = Segment::default();
            st.seg[1] = Segment::flat_code(8, 0, false);
        }
    }
    st.rflags = 2 | (random.next() & (rflags::STATUS | rflags::DF | rflags::TF));
    if random.below(10) == 0 {
        st.cr0 |= cr0::TS;
    }
    if random.below(10) == 0 {
        st.cr4 = 0x20;
    }
    random.fill(&mut st.xsave.0[..512]);
    st.xsave.0[512] = random.next() as u8 & 0xe7;
    (st, env)
}

#[test]
fn nothing_panics_and_faults_change_nothing() {
    let mut random = Random(0xdead_10cc);
    let (mut done, mut faulted) = (0, 0);
    for _ in 0..30_000 {
        let (mut st, mut env) = state(&mut random);
        let mut code = Vec::new();
        for _ in 0..random.below(4) {
            code.push(PREFIXES[random.below(PREFIXES.len() as u64) as usize]);
        }
        code.extend_from_slice(OPCODES[random.below(OPCODES.len() as u64) as usize]);
        code.extend((0..12).map(|_| random.next() as u8));
        code.truncate(15);
        let i = Decoder::with_ip(st.code_bits(), &code, st.rip, DecoderOptions::NONE).decode();
        if i.mnemonic() == Mnemonic::INVALID {
            continue;
        }
        let before = st.clone();
        match emulate(&mut st, &mut env, &i) {
            None => assert!(st.gpr == before.gpr && st.rip == before.rip, "{i}"),
            Some(Ok(_)) => done += 1,
            Some(Err(e)) => {
                faulted += 1;
                assert_eq!(st.rip, before.rip, "{i}: {e:?}");
                if !string::is_string(&i) && !i.memory_index().is_vector_register() {
                    assert_eq!(
                        (st.gpr, st.rflags, st.cr0, st.xcr0),
                        (before.gpr, before.rflags, before.cr0, before.xcr0),
                        "{i}"
                    );
                    assert!(st.xsave.0 == before.xsave.0, "{i}: {e:?}");
                }
            }
        }
    }
    assert!(done > 2_500 && faulted > 2_500, "the generator has gone dull: {done} done, {faulted} faulted");
}
