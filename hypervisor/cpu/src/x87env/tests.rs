//! The reference is the host's x87: state loaded with FXRSTOR64, the instruction run natively, state taken back with FXSAVE64.
#![allow(unsafe_code)] // The native reference is inline assembly.

use crate::flat_env::{FlatEnv, Random, run};
use crate::simd;
use crate::state::XsaveArea;
use crate::{CpuState, Exception, Reg, Step};

macro_rules! native {
    ($name:ident, $text:literal) => {
        fn $name(area: &mut XsaveArea, memory: &mut [u8; 128]) {
            let mut host = XsaveArea([0; 4096]);
            // SAFETY: the areas are aligned and large enough; the host's x87 and SSE state is saved first and put back last.
            unsafe {
                std::arch::asm!(
                    "fxsave64 [{h}]", "fxrstor64 [{a}]", $text, "fxsave64 [{a}]", "fxrstor64 [{h}]",
                    h = in(reg) host.0.as_mut_ptr(), a = in(reg) area.0.as_mut_ptr(), m = in(reg) memory.as_mut_ptr(),
                );
            }
        }
    };
}
native!(fnstenv, "fnstenv [{m}]");
native!(fnstenv16, ".byte 0x66\nfnstenv [{m}]");
native!(fldenv, "fldenv [{m}]");
native!(fnsave, "fnsave [{m}]");
native!(frstor, "frstor [{m}]");
native!(fninit, "fninit\n/* {m} */");

/// Encoding, native form, bytes in memory, whether it loads.
type Case = (&'static [u8], fn(&mut XsaveArea, &mut [u8; 128]), usize, bool);

/// A random but valid FXSAVE image of the x87.
fn image(random: &mut Random, st: &mut CpuState) {
    let b = &mut st.xsave.0;
    b[0..2].copy_from_slice(&((random.next() as u16 & 0x0f3f) | 0x340).to_le_bytes());
    let fcw = u16::from_le_bytes([b[0], b[1]]);
    let mut fsw = random.next() as u16 & 0x7f7f;
    fsw |= if fsw & !fcw & 0x3f != 0 { 0x8080 } else { 0 };
    b[2..4].copy_from_slice(&fsw.to_le_bytes());
    b[4] = random.next() as u8;
    b[6..8].copy_from_slice(&(random.next() as u16 & 0x7ff).to_le_bytes());
    b[8..12].copy_from_slice(&(random.next() as u32).to_le_bytes());
    b[16..20].copy_from_slice(&(random.next() as u32).to_le_bytes());
    for n in 0..8 {
        let mantissa = [0, 1 << 63, random.next() | 1 << 63, random.next() >> 1][random.below(4) as usize];
        let exponent = [0_u16, 0x7fff, 0x3fff, random.next() as u16][random.below(4) as usize];
        b[32 + 16 * n..40 + 16 * n].copy_from_slice(&mantissa.to_le_bytes());
        b[40 + 16 * n..42 + 16 * n].copy_from_slice(&exponent.to_le_bytes());
    }
    simd::set_in_use(st, 0, true);
}

fn clear_exceptions(st: &mut CpuState) {
    st.xsave.0[2] &= 0x40;
    st.xsave.0[3] &= 0x7f;
}

#[test]
fn agrees_with_the_host() {
    let cases: &[Case] = &[
        (&[0xd9, 0x36], fnstenv, 28, false),
        (&[0x66, 0xd9, 0x36], fnstenv16, 14, false),
        (&[0xd9, 0x26], fldenv, 28, true),
        (&[0xdd, 0x36], fnsave, 108, false),
        (&[0xdd, 0x26], frstor, 108, true),
        (&[0xdb, 0xe3], fninit, 28, false),
    ];
    let mut random = Random(77);
    for round in 0..2000 {
        for &(bytes, native, len, loads) in cases {
            let (mut st, mut env) = FlatEnv::long_mode();
            image(&mut random, &mut st);
            let mut memory = [0_u8; 128];
            // What is loaded is what some state would have stored, with noise in the reserved fields.
            if loads {
                clear_exceptions(&mut st); // a pending one would be raised first
                let mut other = CpuState::reset(0);
                image(&mut random, &mut other);
                fnsave(&mut other.xsave, &mut memory);
                memory[16..18].copy_from_slice(&[0, 0]);
                memory[24..28].copy_from_slice(&[0, 0, 0xff, 0xff]);
            }
            env.mem[0x2000..0x2080].copy_from_slice(&memory);
            st.gpr[Reg::Rsi as usize] = 0x2000;
            let mut reference = st.xsave.clone();
            native(&mut reference, &mut memory);
            assert_eq!(run(&mut st, &mut env, bytes), Some(Ok(Step::Next)));
            let case = format!("{bytes:02x?} round {round}");
            // Selectors (fields 4 and 6 of the environment) depend on the host; the guest's are zero.
            let mut seen = env.mem[0x2000..0x2000 + len].to_vec();
            for b in [&mut seen[..], &mut memory[..]] {
                if len == 14 {
                    b[8..10].fill(0);
                    b[12..14].fill(0);
                } else {
                    b[16..18].fill(0);
                    b[24..26].fill(0);
                }
            }
            assert_eq!(seen, memory[..len], "{case}: memory");
            let regs = |a: &XsaveArea| {
                let mut r = a.0[..160].to_vec();
                r[12..16].fill(0);
                r[20..32].fill(0);
                r
            };
            assert_eq!(regs(&st.xsave), regs(&reference), "{case}: registers");
        }
    }
}

#[test]
fn real_mode_layouts_round_trip() {
    let mut random = Random(5);
    for bytes in [[0xd9_u8, 0x36, 0x00, 0x20], [0xdd, 0x36, 0x00, 0x20]] {
        let (mut st, mut env) = FlatEnv::legacy(16);
        image(&mut random, &mut st);
        st.xsave.0[8..16].copy_from_slice(&0xa_bcde_u64.to_le_bytes());
        st.xsave.0[16..24].copy_from_slice(&0x1_2345_u64.to_le_bytes());
        clear_exceptions(&mut st);
        let before = st.xsave.0;
        assert_eq!(run(&mut st, &mut env, &bytes), Some(Ok(Step::Next)));
        assert_eq!(env.mem[0x2006..0x2008], [0xde, 0xbc]);
        assert_eq!(env.mem[0x2009] >> 4, 0xa);
        assert_eq!((env.mem[0x200a], env.mem[0x200b], env.mem[0x200d] >> 4), (0x45, 0x23, 1));
        let mut back = bytes;
        back[1] = 0x26;
        assert_eq!(run(&mut st, &mut env, &back), Some(Ok(Step::Next)));
        assert_eq!(st.xsave.0[..24], before[..24]);
        assert_eq!(st.xsave.0[32..160], before[32..160]);
    }
}

#[test]
fn not_available_and_faults_change_nothing() {
    let (mut st, mut env) = FlatEnv::long_mode();
    image(&mut Random(9), &mut st);
    clear_exceptions(&mut st);
    let before = st.xsave.0;
    st.gpr[Reg::Rsi as usize] = 0x2ff0;
    env.unmap(0x3000);
    for bytes in [[0xd9_u8, 0x36], [0xdd, 0x36], [0xd9, 0x26], [0xdd, 0x26]] {
        let seen = run(&mut st, &mut env, &bytes);
        assert!(matches!(seen, Some(Err(Exception::PageFault { addr: 0x3000, .. }))), "{seen:?}");
    }
    st.xsave.0[2] |= 0x80;
    assert_eq!(run(&mut st, &mut env, &[0xd9, 0x26]), Some(Err(Exception::FpuError)));
    st.xsave.0[2] &= 0x7f;
    st.cr0 |= crate::state::cr0::TS;
    assert_eq!(run(&mut st, &mut env, &[0xd9, 0x36]), Some(Err(Exception::DeviceNotAvailable)));
    assert!(st.xsave.0 == before);
    assert!(env.mem[0x2ff0..0x3000].iter().all(|&b| b == 0));
}
