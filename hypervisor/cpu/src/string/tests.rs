//! The reference is the host CPU: the same instruction, run natively on a copy of the same memory.
#![allow(unsafe_code)] // The native reference is inline assembly.

use crate::flat_env::{FlatEnv, Random, run};
use crate::state::{Segment, rflags};
use crate::{Exception, Reg, Seg, Step};

/// RAX, RCX, RSI, RDI and RFLAGS.
type Regs = [u64; 5];
type Native = unsafe fn(&mut Regs, bool);

macro_rules! native {
    ($($bytes:expr, $text:literal;)*) => {
        &[$(($bytes, $text, {
            unsafe fn run(r: &mut Regs, backward: bool) {
                let flags = (r[4] & rflags::STATUS) | 2 | if backward { rflags::DF } else { 0 };
                // SAFETY: the caller's registers stay within its buffer for this instruction; flags are put back to DF clear.
                unsafe {
                    std::arch::asm!(
                        "push {f}", "popfq", $text, "pushfq", "pop {f}", "cld",
                        f = inout(reg) flags => r[4],
                        inout("rax") r[0], inout("rcx") r[1], inout("rsi") r[2], inout("rdi") r[3],
                    );
                }
            }
            run as Native
        })),*]
    };
}

/// Encoding, text, native form of every 64-bit string instruction without port access.
fn table() -> &'static [(&'static [u8], &'static str, Native)] {
    native! {
        &[0xa4], "movsb"; &[0x66, 0xa5], "movsw"; &[0xa5], "movsd"; &[0x48, 0xa5], "movsq";
        &[0xf3, 0xa4], "rep movsb"; &[0xf3, 0x66, 0xa5], "rep movsw"; &[0xf3, 0xa5], "rep movsd"; &[0xf3, 0x48, 0xa5], "rep movsq";
        &[0xaa], "stosb"; &[0x66, 0xab], "stosw"; &[0xab], "stosd"; &[0x48, 0xab], "stosq";
        &[0xf3, 0xaa], "rep stosb"; &[0xf3, 0x66, 0xab], "rep stosw"; &[0xf3, 0xab], "rep stosd"; &[0xf3, 0x48, 0xab], "rep stosq";
        &[0xac], "lodsb"; &[0x66, 0xad], "lodsw"; &[0xad], "lodsd"; &[0x48, 0xad], "lodsq";
        &[0xf3, 0xac], "rep lodsb"; &[0xf3, 0x66, 0xad], "rep lodsw"; &[0xf3, 0xad], "rep lodsd"; &[0xf3, 0x48, 0xad], "rep lodsq";
        &[0xae], "scasb"; &[0x66, 0xaf], "scasw"; &[0xaf], "scasd"; &[0x48, 0xaf], "scasq";
        &[0xf3, 0xae], "repe scasb"; &[0xf3, 0x66, 0xaf], "repe scasw"; &[0xf3, 0xaf], "repe scasd"; &[0xf3, 0x48, 0xaf], "repe scasq";
        &[0xf2, 0xae], "repne scasb"; &[0xf2, 0x66, 0xaf], "repne scasw"; &[0xf2, 0xaf], "repne scasd"; &[0xf2, 0x48, 0xaf], "repne scasq";
        &[0xa6], "cmpsb"; &[0x66, 0xa7], "cmpsw"; &[0xa7], "cmpsd"; &[0x48, 0xa7], "cmpsq";
        &[0xf3, 0xa6], "repe cmpsb"; &[0xf3, 0x66, 0xa7], "repe cmpsw"; &[0xf3, 0xa7], "repe cmpsd"; &[0xf3, 0x48, 0xa7], "repe cmpsq";
        &[0xf2, 0xa6], "repne cmpsb"; &[0xf2, 0x66, 0xa7], "repne cmpsw"; &[0xf2, 0xa7], "repne cmpsd"; &[0xf2, 0x48, 0xa7], "repne cmpsq";
    }
}

const BASE: u64 = 0x1_0000;
const LEN: usize = 5 * 4096;

#[test]
fn every_form_agrees_with_the_host() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for &(bytes, text, native) in table() {
        for round in 0..150 {
            let (mut st, mut env) = FlatEnv::long_mode();
            env.fast = round % 2 == 0;
            let backward = round % 4 >= 2;
            // Few distinct values, so that comparisons run for a while.
            let spread = [1, 2, 3, 256][random.below(4) as usize];
            let mut memory = vec![0_u8; LEN];
            memory.fill_with(|| random.below(spread) as u8);
            env.mem[BASE as usize..BASE as usize + LEN].copy_from_slice(&memory);
            // Up to 500 elements of up to 8 bytes, kept 4000 bytes from the ends; often overlapping by a few bytes.
            let count = random.below(if round % 8 == 0 { 6 } else { 500 });
            let rsi = 4100 + random.below(LEN as u64 - 8300);
            let rdi = if random.below(2) == 0 {
                (rsi + random.below(41)).saturating_sub(20).clamp(4064, LEN as u64 - 4100)
            } else {
                4100 + random.below(LEN as u64 - 8300)
            };
            let rax = if random.below(2) == 0 { random.below(spread) * 0x0101_0101_0101_0101 } else { random.next() };
            st.gpr[Reg::Rax as usize] = rax;
            st.gpr[Reg::Rcx as usize] = count;
            st.gpr[Reg::Rsi as usize] = BASE + rsi;
            st.gpr[Reg::Rdi as usize] = BASE + rdi;
            st.rflags = 2 | (random.next() & rflags::STATUS) | if backward { rflags::DF } else { 0 };
            let host = memory.as_mut_ptr() as u64;
            let mut regs = [rax, count, host + rsi, host + rdi, st.rflags];
            // SAFETY: 500 elements of 8 bytes either way from the chosen offsets lie within `memory`.
            unsafe { native(&mut regs, backward) };
            let seen = run(&mut st, &mut env, bytes);
            let case = format!("{text} round {round} count {count} rsi {rsi:#x} rdi {rdi:#x}");
            assert_eq!(seen, Some(Ok(Step::Next)), "{case}");
            assert_eq!(st.gpr[Reg::Rax as usize], regs[0], "{case}: rax");
            assert_eq!(st.gpr[Reg::Rcx as usize], regs[1], "{case}: rcx");
            assert_eq!(st.gpr[Reg::Rsi as usize] - BASE, regs[2] - host, "{case}: rsi");
            assert_eq!(st.gpr[Reg::Rdi as usize] - BASE, regs[3] - host, "{case}: rdi");
            assert_eq!(st.rflags & rflags::STATUS, regs[4] & rflags::STATUS, "{case}: flags");
            assert!(env.mem[BASE as usize..BASE as usize + LEN] == memory[..], "{case}: memory");
            assert_eq!(st.rip, 0x1000 + bytes.len() as u64);
        }
    }
}

#[test]
fn faults_leave_the_registers_at_the_element() {
    for fast in [false, true] {
        for backward in [false, true] {
            let (mut st, mut env) = FlatEnv::long_mode();
            env.fast = fast;
            env.protect(if backward { 0x2_0000 } else { 0x2_2000 });
            env.unmap(0x3_0000);
            st.gpr[Reg::Rcx as usize] = 1000;
            st.gpr[Reg::Rsi as usize] = 0x1_1800;
            st.gpr[Reg::Rdi as usize] = 0x2_1800;
            st.gpr[Reg::Rax as usize] = 0x5a5a_5a5a;
            st.rflags = 2 | if backward { rflags::DF } else { 0 };
            let seen = run(&mut st, &mut env, &[0xf3, 0xab]);
            let (addr, done) = if backward { (0x2_0ffc, 0x201) } else { (0x2_2000, 0x200) };
            assert_eq!(seen, Some(Err(Exception::PageFault { addr, code: 7 })), "fast {fast} backward {backward}");
            assert_eq!(st.gpr[Reg::Rcx as usize], 1000 - done);
            assert_eq!(st.gpr[Reg::Rdi as usize], addr);
            assert_eq!(st.rip, 0x1000);
            assert_eq!(env.mem[0x2_1800], 0x5a);
            // A source fault is found before the destination's.
            st.gpr[Reg::Rsi as usize] = 0x3_0000;
            let seen = run(&mut st, &mut env, &[0xf3, 0xa4]);
            assert_eq!(seen, Some(Err(Exception::PageFault { addr: 0x3_0000, code: 4 })));
        }
    }
}

#[test]
fn long_repeats_let_interrupts_in() {
    for fast in [false, true] {
        let (mut st, mut env) = FlatEnv::long_mode();
        env.fast = fast;
        st.gpr[Reg::Rcx as usize] = 200_000;
        st.gpr[Reg::Rdi as usize] = 0x2_0003;
        st.gpr[Reg::Rax as usize] = 0x77;
        let mut rounds = 0;
        while run(&mut st, &mut env, &[0xf3, 0xaa]) == Some(Ok(Step::Resync)) {
            assert_eq!(st.rip, 0x1000);
            rounds += 1;
            assert_eq!(st.gpr[Reg::Rcx as usize], 200_000 - rounds * 65_536);
        }
        assert_eq!((rounds, st.rip), (3, 0x1002));
        assert!(env.mem[0x2_0003..0x2_0003 + 200_000].iter().all(|&b| b == 0x77));
        assert_eq!((env.mem[0x2_0002], env.mem[0x2_0003 + 200_000]), (0, 0));
    }
    let (mut st, mut env) = FlatEnv::long_mode();
    st.rflags |= rflags::TF;
    st.gpr[Reg::Rcx as usize] = 3;
    st.gpr[Reg::Rdi as usize] = 0x2_0000;
    assert_eq!(run(&mut st, &mut env, &[0xf3, 0xaa]), Some(Ok(Step::Resync)));
    assert_eq!(st.gpr[Reg::Rcx as usize], 2);
}

#[test]
fn sixteen_bit_offsets_wrap_and_words_at_the_end_fault() {
    for fast in [false, true] {
        let (mut st, mut env) = FlatEnv::legacy(16);
        env.fast = fast;
        st.gpr[Reg::Rcx as usize] = 0xabcd_0020;
        st.gpr[Reg::Rdi as usize] = 0x1234_fff0;
        st.gpr[Reg::Rax as usize] = 0x11;
        st.seg[Seg::Es as usize] = Segment::real(0x2000);
        assert_eq!(run(&mut st, &mut env, &[0xf3, 0xaa]), Some(Ok(Step::Next)));
        assert_eq!((st.gpr[Reg::Rcx as usize], st.gpr[Reg::Rdi as usize]), (0xabcd_0000, 0x1234_0010));
        assert_eq!(
            (env.mem[0x2_fff0], env.mem[0x2_ffff], env.mem[0x2_0000], env.mem[0x2_000f]),
            (0x11, 0x11, 0x11, 0x11)
        );
        assert_eq!((env.mem[0x3_0000], env.mem[0x2_0010]), (0, 0));
        st.gpr[Reg::Rcx as usize] = 2;
        st.gpr[Reg::Rdi as usize] = 0xfffd;
        let rip = st.rip;
        assert_eq!(run(&mut st, &mut env, &[0xf3, 0xab]), Some(Err(Exception::GeneralProtection(0))));
        assert_eq!((st.rip, st.gpr[Reg::Rcx as usize], st.gpr[Reg::Rdi as usize]), (rip, 1, 0xffff));
    }
}

#[test]
fn segment_overrides_and_limits() {
    for fast in [false, true] {
        let (mut st, mut env) = FlatEnv::legacy(32);
        env.fast = fast;
        st.seg[Seg::Fs as usize].base = 0x4_0000;
        st.seg[Seg::Es as usize].base = 0x5_0000;
        st.seg[Seg::Es as usize].limit = 0x1fff;
        env.mem[0x4_0100..0x4_0200].fill(9);
        st.gpr[Reg::Rsi as usize] = 0x100;
        st.gpr[Reg::Rdi as usize] = 0x1ff0;
        st.gpr[Reg::Rcx as usize] = 8;
        assert_eq!(run(&mut st, &mut env, &[0x64, 0xf3, 0xa5]), Some(Err(Exception::GeneralProtection(0))));
        assert_eq!(st.gpr[Reg::Rcx as usize], 4);
        assert_eq!(env.mem[0x5_1fef..0x5_2001], [&[0][..], &[9; 16], &[0]].concat());
        st.seg[Seg::Ss as usize].limit = 0x10;
        assert_eq!(run(&mut st, &mut env, &[0x36, 0xac]), Some(Err(Exception::StackFault(0))));
    }
}

#[test]
fn ports() {
    let (mut st, mut env) = FlatEnv::legacy(32);
    st.gpr[Reg::Rdx as usize] = 0x3f8;
    st.gpr[Reg::Rsi as usize] = 0x2000;
    st.gpr[Reg::Rdi as usize] = 0x3000;
    st.gpr[Reg::Rcx as usize] = 3;
    env.mem[0x2000..0x2003].copy_from_slice(b"abc");
    assert_eq!(run(&mut st, &mut env, &[0xf3, 0x6e]), Some(Ok(Step::Next)));
    let outs: Vec<_> = env.bus.outs.lock().unwrap().clone();
    assert_eq!(outs, [(0x3f8, b"a".to_vec()), (0x3f8, b"b".to_vec()), (0x3f8, b"c".to_vec())]);
    st.gpr[Reg::Rcx as usize] = 2;
    assert_eq!(run(&mut st, &mut env, &[0xf3, 0x66, 0x6d]), Some(Ok(Step::Next)));
    assert_eq!(env.mem[0x3000..0x3005], [1, 2, 3, 4, 0]);
    // Ring 3 without I/O privilege: no port is touched.
    let (mut st, mut env) = FlatEnv::long_mode();
    st.gpr[Reg::Rsi as usize] = 0x2000;
    st.tr.limit = 0; // no I/O permission map
    assert_eq!(run(&mut st, &mut env, &[0x6e]), Some(Err(Exception::GeneralProtection(0))));
    assert!(env.bus.outs.lock().unwrap().is_empty());
}
