//! The reference is the host's own instruction: the guest's image is loaded into the registers with XRSTOR64, saved or
//! restored natively, and taken back with XSAVE64.
#![allow(unsafe_code)] // The native reference is inline assembly.

use crate::flat_env::{FlatEnv, Random, run};
use crate::host_fpu::{self, component};
use crate::simd::{self, get64};
use crate::state::{XSAVE_BYTES, XsaveArea, cr0, cr4};
use crate::{CpuState, Exception, Reg, Step};

macro_rules! native {
    ($name:ident, $text:literal) => {
        /// Loads `area`, runs the instruction on `memory` with mask `rfbm`, takes the registers back into `area`.
        fn $name(area: &mut XsaveArea, memory: &mut XsaveArea, rfbm: u64) {
            let mut host = XsaveArea([0; XSAVE_BYTES]);
            let all = host_fpu::host_xcr0();
            // SAFETY: the areas are aligned and large enough for what the host enables below AMX, which stays untouched by
            // the mask; the host's registers are saved first and put back last.
            unsafe {
                std::arch::asm!(
                    "mov eax, {all:e}", "mov edx, 0", "xsave64 [{h}]",
                    "mov eax, {all:e}", "mov edx, 0", "xrstor64 [{a}]",
                    "mov eax, {rfbm:e}", "mov edx, 0", $text,
                    "mov eax, {all:e}", "mov edx, 0", "xsave64 [{a}]",
                    "mov eax, {all:e}", "mov edx, 0", "xrstor64 [{h}]",
                    all = in(reg) all & host_fpu::OFFERED, rfbm = in(reg) rfbm,
                    h = in(reg) host.0.as_mut_ptr(), a = in(reg) area.0.as_mut_ptr(), m = in(reg) memory.0.as_mut_ptr(),
                    out("eax") _, out("edx") _,
                );
            }
        }
    };
}
native!(xsave64, "xsave64 [{m}]");
native!(xsave32, "xsave [{m}]");
native!(xsaveopt64, "xsaveopt64 [{m}]");
native!(xsavec64, "xsavec64 [{m}]");
native!(fxsave64, "fxsave64 [{m}]");
native!(xrstor64, "xrstor64 [{m}]");
native!(fxrstor64, "fxrstor64 [{m}]");

const AT: usize = 0x2000;

/// Random registers with the components of `used` in use and not zero.
fn image(random: &mut Random, st: &mut CpuState, used: u64) {
    for i in 0..8 {
        simd::initialise(st, i);
        if used & (1 << i) != 0 {
            for r in simd::ranges(i) {
                random.fill(&mut st.xsave.0[r]);
            }
            simd::set_in_use(st, i, true);
        }
    }
    if used & 1 != 0 {
        let b = &mut st.xsave.0;
        b[0..2].copy_from_slice(&[0x7f, 0x03]);
        b[2] &= 0x7f;
        b[3] &= 0x7f;
        b[5] = 0;
        b[7] &= 7;
        // Canonical instruction and data pointers; ten bytes in each register.
        b[14..16].fill(0);
        b[22..24].fill(0);
        b[13] &= 0x7f;
        b[21] &= 0x7f;
        for n in 0..8 {
            b[42 + 16 * n..48 + 16 * n].fill(0);
        }
    }
    let mxcsr = if random.below(2) == 0 { 0x1f80 } else { 0x1f80 | random.next() as u32 & 0xe03f };
    simd::set_mxcsr(st, mxcsr);
}

/// The registers as bytes, components in their initial state made explicit.
fn registers(st: &CpuState) -> Vec<u8> {
    let copy = super::exact(st, host_fpu::offered_xcr0());
    let mut r = copy.xsave.0[..host_fpu::standard_size(host_fpu::offered_xcr0())].to_vec();
    r[28..32].fill(0); // MXCSR_MASK is not a register
    r[416..576].fill(0);
    r
}

fn guest(random: &mut Random) -> (CpuState, FlatEnv, u64) {
    let (mut st, env) = FlatEnv::long_mode();
    let offered = host_fpu::offered_xcr0();
    let used = random.next() & offered;
    image(random, &mut st, used);
    let rfbm = if random.below(3) == 0 { offered } else { random.next() & offered };
    st.gpr[Reg::Rax as usize] = rfbm;
    st.gpr[Reg::Rdx as usize] = 0xdead_0000_0000_0000;
    st.gpr[Reg::Rsi as usize] = AT as u64;
    (st, env, rfbm)
}

#[test]
fn saves_agree_with_the_host() {
    let mut random = Random(0xfeed);
    type Case = (&'static [u8], fn(&mut XsaveArea, &mut XsaveArea, u64), bool);
    let mut cases: Vec<Case> = vec![
        (&[0x48, 0x0f, 0xae, 0x26], xsave64, false),
        (&[0x0f, 0xae, 0x26], xsave32, false),
        (&[0x48, 0x0f, 0xae, 0x06], fxsave64, false),
    ];
    let features = host_fpu::host_cpuid(0xd, 1)[0];
    if features & 1 != 0 {
        cases.push((&[0x48, 0x0f, 0xae, 0x36], xsaveopt64, false));
    }
    if features & 2 != 0 {
        cases.push((&[0x48, 0x0f, 0xc7, 0x26], xsavec64, true));
    }
    for round in 0..400 {
        for &(bytes, native, compacted) in &cases {
            let (mut st, mut env, rfbm) = guest(&mut random);
            let mut memory = XsaveArea([0; XSAVE_BYTES]);
            random.fill(&mut memory.0);
            memory.0[512..520].copy_from_slice(&(random.next() & 0xe7).to_le_bytes());
            env.mem[AT..AT + XSAVE_BYTES].copy_from_slice(&memory.0);
            let mut area = st.xsave.clone();
            native(&mut area, &mut memory, rfbm);
            assert_eq!(run(&mut st, &mut env, bytes), Some(Ok(Step::Next)));
            let case = format!("{bytes:02x?} round {round} rfbm {rfbm:#x} in use {:#x}", simd::in_use(&st));
            let mut seen = env.mem[AT..AT + XSAVE_BYTES].to_vec();
            if bytes[1] == 0x0f && bytes[2] == 0xae && bytes[3] == 0x06 || memory.0[416..464] != seen[416..464] {
                // Reserved bytes of the legacy region: the host may write zeros there.
                seen[416..464].copy_from_slice(&memory.0[416..464]);
            }
            for b in [&mut seen[..], &mut memory.0[..]] {
                b[28..32].fill(0); // MXCSR_MASK may have a bit more on the host
                if std::ptr::eq(native as *const (), xsave32 as *const ()) {
                    b[12..16].fill(0);
                    b[20..24].fill(0);
                }
            }
            // The host may find a component in use that is all zero, or the reverse; then both images mean the same.
            let (ours, theirs) = (get64(&seen, 512), get64(&memory.0, 512));
            let written = |b: &[u8], bv: u64, i: u32| {
                let c = component(i);
                let at = if compacted { host_fpu::compacted_offset(rfbm, i) } else { c.offset };
                bv & (1 << i) != 0 && b[at..at + c.size].iter().any(|&x| x != 0)
            };
            for i in host_fpu::EXTENDED.into_iter().filter(|i| rfbm & (1 << i) != 0) {
                assert_eq!(written(&seen, ours, i), written(&memory.0, theirs, i), "{case}: component {i}");
            }
            if ours == theirs {
                let first = seen.iter().zip(&memory.0).position(|(a, b)| a != b);
                assert_eq!(first, None, "{case}: first differing byte");
            } else {
                assert_eq!((ours ^ theirs) & !rfbm, 0, "{case}");
            }
        }
    }
}

#[test]
fn restores_agree_with_the_host() {
    let mut random = Random(0xbeef);
    let offered = host_fpu::offered_xcr0();
    let compact_too = host_fpu::host_cpuid(0xd, 1)[0] & 2 != 0;
    for round in 0..600 {
        // What is restored is what some other state saved, in either format, perhaps with bits taken out.
        let (mut source, _, _) = guest(&mut random);
        image(&mut random, &mut source, offered);
        let mut memory = XsaveArea([0; XSAVE_BYTES]);
        let layout = random.next() & offered;
        let kind = if compact_too { round % 3 } else { round % 2 };
        let bytes: &[u8] = match kind {
            0 => {
                xsave64(&mut source.xsave, &mut memory, offered);
                let keep = random.next();
                for b in 0..8 {
                    memory.0[512 + b] &= (keep >> (8 * b)) as u8;
                }
                &[0x48, 0x0f, 0xae, 0x2e]
            }
            1 => {
                fxsave64(&mut source.xsave, &mut memory, 0);
                &[0x48, 0x0f, 0xae, 0x0e]
            }
            _ => {
                xsavec64(&mut source.xsave, &mut memory, layout);
                memory.0[512] &= random.next() as u8;
                &[0x48, 0x0f, 0xae, 0x2e]
            }
        };
        let (mut st, mut env, rfbm) = guest(&mut random);
        env.mem[AT..AT + XSAVE_BYTES].copy_from_slice(&memory.0);
        let mut reference = st.clone();
        if kind == 1 {
            fxrstor64(&mut reference.xsave, &mut memory, rfbm);
        } else {
            xrstor64(&mut reference.xsave, &mut memory, rfbm);
        }
        assert_eq!(run(&mut st, &mut env, bytes), Some(Ok(Step::Next)), "round {round}");
        let (a, b) = (registers(&st), registers(&reference));
        let first = a.iter().zip(&b).position(|(x, y)| x != y);
        assert_eq!(first, None, "round {round} kind {kind} rfbm {rfbm:#x} layout {layout:#x}: first differing byte");
    }
}

#[test]
fn bad_images_and_addresses_change_nothing() {
    let mut random = Random(3);
    let (mut st, mut env, _) = guest(&mut random);
    st.gpr[Reg::Rax as usize] = 7;
    let before = st.xsave.0;
    let gp = Some(Err(Exception::GeneralProtection(0)));
    const XRSTOR: &[u8] = &[0x48, 0x0f, 0xae, 0x2e];
    const XSAVE: &[u8] = &[0x48, 0x0f, 0xae, 0x26];
    const XSAVEC: &[u8] = &[0x48, 0x0f, 0xc7, 0x26];
    // (offset, byte) that makes an all-zero standard image invalid.
    for (at, byte) in [(513, 1_u8), (520, 1), (527, 0x01), (528, 1), (535, 1), (27, 1), (26, 1)] {
        env.mem[AT + at] = byte;
        assert_eq!(run(&mut st, &mut env, XRSTOR), gp, "byte {at}");
        env.mem[AT + at] = 0;
    }
    // Compacted: XSTATE_BV not within XCOMP_BV; a component that is not enabled; reserved header bytes.
    for (at, byte) in [(512, 4_u8), (521, 1), (536, 1), (575, 1)] {
        env.mem[AT + 527] = 0x80;
        env.mem[AT + 520] = 3;
        env.mem[AT + at] = byte;
        assert_eq!(run(&mut st, &mut env, XRSTOR), gp, "compacted byte {at}");
        env.mem[AT + at] = 0;
    }
    env.mem[AT + 512..AT + 576].fill(0);
    st.gpr[Reg::Rsi as usize] = AT as u64 + 32;
    for bytes in [XRSTOR, XSAVE, XSAVEC] {
        assert_eq!(run(&mut st, &mut env, bytes), gp, "misaligned");
    }
    // The second page cannot be written: the first is untouched.
    env.protect(0x3000);
    st.gpr[Reg::Rsi as usize] = 0x3000 - 128;
    for bytes in [XSAVE, XSAVEC, &[0x48, 0x0f, 0xae, 0x06]] {
        let seen = run(&mut st, &mut env, bytes);
        assert_eq!(seen, Some(Err(Exception::PageFault { addr: 0x3000, code: 7 })));
    }
    assert!(env.mem[0x2f80..0x3000].iter().all(|&b| b == 0));
    st.cr0 |= cr0::TS;
    assert_eq!(run(&mut st, &mut env, XSAVE), Some(Err(Exception::DeviceNotAvailable)));
    st.cr4 &= !cr4::OSXSAVE;
    assert_eq!(run(&mut st, &mut env, XSAVE), Some(Err(Exception::InvalidOpcode)));
    assert!(st.xsave.0 == before);
}

#[test]
fn xcr0_rules() {
    let (mut st, mut env) = FlatEnv::long_mode();
    let gp = Some(Err(Exception::GeneralProtection(0)));
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    st.gpr[Reg::Rax as usize] = 3;
    assert_eq!(run(&mut st, &mut env, XSETBV), gp, "ring 3");
    st.cpl = 0;
    for bad in [0, 2, 5, 1 << 9 | 7, 1 << 3 | 7, 0x27, 0xe3] {
        st.gpr[Reg::Rax as usize] = bad;
        assert_eq!(run(&mut st, &mut env, XSETBV), gp, "{bad:#x}");
    }
    st.gpr[Reg::Rax as usize] = 3;
    assert_eq!(run(&mut st, &mut env, XSETBV), Some(Ok(Step::Resync)));
    assert_eq!(run(&mut st, &mut env, XGETBV), Some(Ok(Step::Next)));
    assert_eq!((st.gpr[Reg::Rax as usize], st.gpr[Reg::Rdx as usize]), (3, 0));
    st.gpr[Reg::Rcx as usize] = 1;
    simd::set_in_use(&mut st, 0, false);
    simd::set_in_use(&mut st, 1, true);
    assert_eq!(run(&mut st, &mut env, XGETBV), Some(Ok(Step::Next)));
    assert_eq!(st.gpr[Reg::Rax as usize], 2);
    st.gpr[Reg::Rcx as usize] = 2;
    assert_eq!(run(&mut st, &mut env, XGETBV), gp);
}
