//! The reference is the definition: element by element over plain arrays; where the host has AVX2, also the host.
#![allow(unsafe_code)] // The native reference is an intrinsic.

use crate::flat_env::{FlatEnv, Random, run};
use crate::simd::{opmask, set_opmask, set_zmm, zmm};
use crate::state::cr0;
use crate::{CpuState, Exception, Reg, Step};

const AT: u64 = 0x8000;

/// A vCPU with random indices (scaled ones stay within ±0x400 of 0x8000) in register 1 and random memory.
fn guest(random: &mut Random, index_bytes: usize) -> (CpuState, FlatEnv) {
    let (mut st, mut env) = FlatEnv::long_mode();
    st.gpr[Reg::Rsi as usize] = AT;
    random.fill(&mut env.mem[0x7000..0xa000]);
    let mut indices = [0; 64];
    for e in 0..64 / index_bytes {
        let index = random.below(256) as i64 - 128;
        indices[e * index_bytes..(e + 1) * index_bytes].copy_from_slice(&index.to_le_bytes()[..index_bytes]);
    }
    set_zmm(&mut st, 1, &indices);
    let mut old = [0; 64];
    random.fill(&mut old);
    set_zmm(&mut st, 2, &old);
    (st, env)
}

fn index_of(st: &CpuState, e: usize, bytes: usize) -> u64 {
    let v = zmm(st, 1);
    let b = &v[e * bytes..(e + 1) * bytes];
    if bytes == 8 {
        u64::from_le_bytes(b.try_into().unwrap())
    } else {
        i64::from(i32::from_le_bytes(b.try_into().unwrap())) as u64
    }
}

/// (opcode byte, W, index bytes, data bytes) of the four data forms; +0x10 in the opcode makes it a scatter.
const FORMS: &[(u8, u8, usize, usize)] =
    &[(0x90, 0, 4, 4), (0x90, 1, 4, 8), (0x91, 0, 8, 4), (0x91, 1, 8, 8), (0x92, 0, 4, 4), (0x93, 1, 8, 8)];

fn has_avx512() -> bool {
    crate::host_fpu::offered_xcr0() & 0xe0 == 0xe0
}

#[test]
fn vex_gathers() {
    let mut random = Random(11);
    for round in 0..200 {
        for &(opcode, w, index_bytes, data_bytes) in FORMS {
            for l in [0_u8, 1] {
                let (mut st, mut env) = guest(&mut random, index_bytes);
                let mut mask = [0; 64];
                random.fill(&mut mask);
                set_zmm(&mut st, 3, &mask);
                let vector = if l == 1 { 32 } else { 16 };
                // op xmm2, [rsi + xmm1 * 4], xmm3
                let bytes = [0xc4, 0xe2, (w << 7) | (0xc << 3) | (l << 2) | 1, opcode, 0x14, 0x8e];
                let n = (vector / index_bytes).min(vector / data_bytes);
                let mut expected = zmm(&st, 2);
                expected[n * data_bytes..].fill(0);
                for e in (0..n).filter(|e| mask[(e + 1) * data_bytes - 1] & 0x80 != 0) {
                    let at = (AT.wrapping_add(index_of(&st, e, index_bytes).wrapping_mul(4))) as usize;
                    expected[e * data_bytes..(e + 1) * data_bytes].copy_from_slice(&env.mem[at..at + data_bytes]);
                }
                assert_eq!(run(&mut st, &mut env, &bytes), Some(Ok(Step::Next)));
                assert_eq!(zmm(&st, 2), expected, "round {round} {bytes:02x?}");
                assert_eq!(zmm(&st, 3), [0; 64]);
            }
        }
    }
}

#[test]
fn evex_gathers_and_scatters() {
    if !has_avx512() {
        return; // without the registers the guest is never offered the instructions
    }
    let mut random = Random(12);
    for round in 0..200 {
        for &(opcode, w, index_bytes, data_bytes) in FORMS {
            for (ll, scatter) in [(0_u8, false), (1, false), (2, false), (0, true), (1, true), (2, true)] {
                let (mut st, mut env) = guest(&mut random, index_bytes);
                let k = random.next();
                set_opmask(&mut st, 5, k);
                let vector = 16 << ll;
                let op = if scatter { opcode + 0x10 } else { opcode };
                // op zmm2 {k5}, [rsi + zmm1 * 4]
                let bytes = [0x62, 0xf2, (w << 7) | 0x7d, (ll << 5) | 8 | 5, op, 0x14, 0x8e];
                let n = (vector / index_bytes).min(vector / data_bytes);
                let mut expected = zmm(&st, 2);
                let mut memory = env.mem.clone();
                if !scatter {
                    expected[n * data_bytes..].fill(0);
                }
                for e in (0..n).filter(|e| k >> e & 1 != 0) {
                    let at = (AT.wrapping_add(index_of(&st, e, index_bytes).wrapping_mul(4))) as usize;
                    let slot = e * data_bytes..(e + 1) * data_bytes;
                    if scatter {
                        memory[at..at + data_bytes].copy_from_slice(&expected[slot]);
                    } else {
                        expected[slot].copy_from_slice(&memory[at..at + data_bytes]);
                    }
                }
                assert_eq!(run(&mut st, &mut env, &bytes), Some(Ok(Step::Next)));
                assert_eq!(zmm(&st, 2), expected, "round {round} {bytes:02x?}");
                assert!(env.mem[..0x1f_0000] == memory[..0x1f_0000], "round {round} {bytes:02x?}");
                assert_eq!(opmask(&st, 5), 0);
            }
        }
    }
}

#[test]
fn agrees_with_the_host() {
    use std::arch::x86_64::*;
    if !std::is_x86_feature_detected!("avx2") {
        return;
    }
    #[target_feature(enable = "avx2")]
    fn host(base: *const i32, old: &mut [u8; 32], index: &[u8; 32], mask: &[u8; 32]) {
        // SAFETY: the indices stay within the memory around `base`; the arrays are 32 bytes.
        unsafe {
            let v = _mm256_mask_i32gather_epi32::<4>(
                _mm256_loadu_si256(old.as_ptr().cast()),
                base,
                _mm256_loadu_si256(index.as_ptr().cast()),
                _mm256_loadu_si256(mask.as_ptr().cast()),
            );
            _mm256_storeu_si256(old.as_mut_ptr().cast(), v);
        }
    }
    let mut random = Random(13);
    for _ in 0..200 {
        let (mut st, mut env) = guest(&mut random, 4);
        let mut mask = [0; 64];
        random.fill(&mut mask);
        set_zmm(&mut st, 3, &mask);
        let low = |v: [u8; 64]| -> [u8; 32] { v[..32].try_into().unwrap() };
        let mut expected = low(zmm(&st, 2));
        // SAFETY: AVX2 was detected.
        unsafe { host(env.mem[AT as usize..].as_ptr().cast(), &mut expected, &low(zmm(&st, 1)), &low(mask)) };
        assert_eq!(run(&mut st, &mut env, &[0xc4, 0xe2, 0x65, 0x90, 0x14, 0x8e]), Some(Ok(Step::Next)));
        assert_eq!(low(zmm(&st, 2)), expected);
    }
}

#[test]
fn faults_keep_progress_in_the_mask() {
    let (mut st, mut env) = FlatEnv::long_mode();
    st.gpr[Reg::Rsi as usize] = AT;
    env.put64(AT, 0x2222_2222_1111_1111);
    env.unmap(0x9000);
    let lanes = |v: [u32; 8]| {
        let mut z = [0; 64];
        for (e, x) in v.into_iter().enumerate() {
            z[4 * e..4 * e + 4].copy_from_slice(&x.to_le_bytes());
        }
        z
    };
    set_zmm(&mut st, 1, &lanes([0, 0x400, 1, 0x401, 0, 0, 0, 0])); // elements 1 and 3 lie in the missing page
    set_zmm(&mut st, 2, &lanes([7; 8]));
    set_zmm(&mut st, 3, &lanes([!0, 0, !0, !0, !0, 0, 0, 0]));
    let gather = [0xc4, 0xe2, 0x65, 0x90, 0x14, 0x8e];
    let seen = run(&mut st, &mut env, &gather);
    assert_eq!(seen, Some(Err(Exception::PageFault { addr: 0x9004, code: 4 })));
    assert_eq!(zmm(&st, 2), lanes([0x1111_1111, 7, 0x2222_2222, 7, 7, 7, 7, 7]));
    assert_eq!(zmm(&st, 3), lanes([0, 0, 0, !0, !0, 0, 0, 0]));
    assert_eq!(st.rip, 0x1000);
    st.cr0 |= cr0::TS;
    assert_eq!(run(&mut st, &mut env, &gather), Some(Err(Exception::DeviceNotAvailable)));
    st.cr0 &= !cr0::TS;
    st.xcr0 = 3;
    assert_eq!(run(&mut st, &mut env, &gather), Some(Err(Exception::InvalidOpcode)));
    if has_avx512() {
        st.xcr0 = crate::host_fpu::offered_xcr0();
        set_opmask(&mut st, 5, 0b11111);
        // vpscatterdd [rsi + zmm1 * 4] {k5}, zmm2
        let seen = run(&mut st, &mut env, &[0x62, 0xf2, 0x7d, 0x4d, 0xa0, 0x14, 0x8e]);
        assert_eq!(seen, Some(Err(Exception::PageFault { addr: 0x9000, code: 6 })));
        assert_eq!((opmask(&st, 5), env.mem[AT as usize]), (0b11110, 0x11));
    }
}
