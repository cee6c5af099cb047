use crate::flat_env::{FlatEnv, run};
use crate::state::rflags::{AF, CF, PF, SF, STATUS, ZF};
use crate::{Exception, Reg, Seg, Step};

/// (opcode, AX before, flags before, AX after, flags after); OF is undefined and not looked at. The DAA, DAS, AAA and AAS rows are
/// worked by hand from the manual's pseudocode and include its own examples.
const DECIMAL: &[(&[u8], u16, u64, u16, u64)] = &[
    (&[0x27], 0x00ae, 0, 0x0014, AF | CF | PF),
    (&[0x27], 0x002e, 0, 0x0034, AF),
    (&[0x27], 0x0079, AF, 0x007f, AF),
    (&[0x27], 0x009a, 0, 0x0000, AF | CF | ZF | PF),
    (&[0x27], 0x0045, CF, 0x00a5, CF | SF | PF),
    (&[0x27], 0x0012, 0, 0x0012, PF),
    (&[0x2f], 0x00ee, AF, 0x0088, AF | CF | SF | PF),
    (&[0x2f], 0x0003, AF, 0x00fd, AF | CF | SF),
    (&[0x2f], 0x0047, 0, 0x0047, PF),
    (&[0x2f], 0x009a, 0, 0x0034, AF | CF),
    (&[0x37], 0x000a, 0, 0x0100, AF | CF | ZF | PF),
    (&[0x37], 0x00fb, 0, 0x0201, AF | CF),
    (&[0x37], 0x0035, 0, 0x0005, PF),
    (&[0x3f], 0x0105, AF, 0xff0f, AF | CF | PF),
    (&[0x3f], 0x0203, AF, 0x000d, AF | CF),
    (&[0x3f], 0x0039, 0, 0x0009, PF),
    (&[0xd4, 0x0a], 0x0053, 0, 0x0803, PF),
    (&[0xd4, 0x10], 0x00a0, 0, 0x0a00, ZF | PF),
    (&[0xd5, 0x0a], 0x0803, 0, 0x0053, PF),
    (&[0xd5, 0x10], 0x0f0f, 0, 0x00ff, SF | PF),
];

#[test]
fn decimal_instructions() {
    for &(bytes, before, flags, after, flags_after) in DECIMAL {
        let (mut st, mut env) = FlatEnv::legacy(32);
        st.gpr[Reg::Rax as usize] = 0x7777_0000 | u64::from(before);
        st.rflags = 2 | flags;
        assert_eq!(run(&mut st, &mut env, bytes), Some(Ok(Step::Next)));
        let case = format!("{bytes:02x?} ax {before:#x} flags {flags:#x}");
        assert_eq!(st.gpr[Reg::Rax as usize], 0x7777_0000 | u64::from(after), "{case}");
        let defined = STATUS & !crate::state::rflags::OF;
        let defined = match bytes[0] {
            0x37 | 0x3f => AF | CF,
            0xd4 | 0xd5 => SF | ZF | PF,
            _ => defined,
        };
        assert_eq!(st.rflags & defined, flags_after & defined, "{case}");
    }
    let (mut st, mut env) = FlatEnv::legacy(32);
    assert_eq!(run(&mut st, &mut env, &[0xd4, 0]), Some(Err(Exception::DivideError)));
}

#[test]
fn all_registers_to_the_stack_and_back() {
    for (bits, push, pop) in
        [(32, &[0x60][..], &[0x61][..]), (16, &[0x60], &[0x61]), (16, &[0x66, 0x60], &[0x66, 0x61])]
    {
        let (mut st, mut env) = FlatEnv::legacy(bits);
        for n in 0..8 {
            st.gpr[n] = 0x1111_1111 * (n as u64 + 1);
        }
        st.gpr[Reg::Rsp as usize] = 0x8000;
        let before = st.gpr;
        assert_eq!(run(&mut st, &mut env, push), Some(Ok(Step::Next)));
        let wide = bits == 32 || push.len() == 2;
        let size = if wide { 4 } else { 2 };
        assert_eq!(st.gpr[Reg::Rsp as usize], 0x8000 - 8 * size);
        assert_eq!(env.mem[0x8000 - size as usize * 5], 0x00, "the old SP is pushed");
        assert_eq!(env.mem[0x8000 - size as usize], 0x11);
        for n in (0..8).filter(|&n| n != 4) {
            st.gpr[n] = if wide { 0 } else { before[n] & !0xffff };
        }
        assert_eq!(run(&mut st, &mut env, pop), Some(Ok(Step::Next)));
        assert_eq!(st.gpr, before);
    }
}

#[test]
fn bound_checks_signed() {
    let (mut st, mut env) = FlatEnv::legacy(32);
    env.mem[0x2000..0x2008].copy_from_slice(&[0xfe, 0xff, 0xff, 0xff, 5, 0, 0, 0]); // -2..=5
    for (index, ok) in [(0xffff_fffe_u64, true), (5, true), (6, false), (0xffff_fffd, false), (0, true)] {
        st.gpr[Reg::Rax as usize] = index;
        let seen = run(&mut st, &mut env, &[0x62, 0x05, 0, 0x20, 0, 0]);
        assert_eq!(seen, Some(if ok { Ok(Step::Next) } else { Err(Exception::BoundRange) }), "{index:#x}");
    }
}

#[test]
fn nested_frames() {
    let (mut st, mut env) = FlatEnv::long_mode();
    st.gpr[Reg::Rsp as usize] = 0x8000;
    st.gpr[Reg::Rbp as usize] = 0x9000;
    env.put64(0x8ff8, 0xaaaa);
    env.put64(0x8ff0, 0xbbbb);
    assert_eq!(run(&mut st, &mut env, &[0xc8, 0x20, 0, 3]), Some(Ok(Step::Next)));
    assert_eq!((st.gpr[Reg::Rbp as usize], st.gpr[Reg::Rsp as usize]), (0x7ff8, 0x7fe0 - 0x20));
    let word = |env: &FlatEnv, at: usize| u64::from_le_bytes(env.mem[at..at + 8].try_into().unwrap());
    assert_eq!([0x7ff8, 0x7ff0, 0x7fe8, 0x7fe0].map(|at| word(&env, at)), [0x9000, 0xaaaa, 0xbbbb, 0x7ff8]);
    assert_eq!(run(&mut st, &mut env, &[0xc9]), Some(Ok(Step::Next)));
    assert_eq!((st.gpr[Reg::Rbp as usize], st.gpr[Reg::Rsp as usize]), (0x9000, 0x8000));
    env.unmap(0x7000);
    let before = st.gpr;
    let seen = run(&mut st, &mut env, &[0xc8, 0, 1, 0]);
    assert!(matches!(seen, Some(Err(Exception::PageFault { addr: 0x7ff8, .. }))), "{seen:?}");
    assert_eq!(st.gpr, before);
}

#[test]
fn table_lookup_and_privilege_adjust() {
    let (mut st, mut env) = FlatEnv::legacy(32);
    st.gpr[Reg::Rbx as usize] = 0x2000;
    st.gpr[Reg::Rax as usize] = 0x1234_56fe;
    env.mem[0x20fe] = 0x99;
    assert_eq!(run(&mut st, &mut env, &[0xd7]), Some(Ok(Step::Next)));
    assert_eq!(st.gpr[Reg::Rax as usize], 0x1234_5699);
    st.gpr[Reg::Rcx as usize] = 0xffff_0008;
    st.gpr[Reg::Rdx as usize] = 3;
    assert_eq!(run(&mut st, &mut env, &[0x63, 0xd1]), Some(Ok(Step::Next))); // arpl cx, dx
    assert_eq!((st.gpr[Reg::Rcx as usize], st.rflags & ZF), (0xffff_000b, ZF));
    assert_eq!(run(&mut st, &mut env, &[0x63, 0xd1]), Some(Ok(Step::Next)));
    assert_eq!((st.gpr[Reg::Rcx as usize], st.rflags & ZF), (0xffff_000b, 0));
    st.cr0 = 0;
    st.seg[Seg::Cs as usize].attr |= 1 << 14;
    assert_eq!(run(&mut st, &mut env, &[0x63, 0xd1]), Some(Err(Exception::InvalidOpcode)));
}

#[test]
fn wide_compare_exchange() {
    let (mut st, mut env) = FlatEnv::long_mode();
    env.put64(0x2ffc, 0x2222_2222_1111_1111); // crosses a page
    st.gpr[Reg::Rax as usize] = 0xdead_0000_1111_1111;
    st.gpr[Reg::Rdx as usize] = 0x2222_2222;
    st.gpr[Reg::Rbx as usize] = 0x33;
    st.gpr[Reg::Rcx as usize] = 0x44;
    st.gpr[Reg::Rsi as usize] = 0x2ffc;
    assert_eq!(run(&mut st, &mut env, &[0x0f, 0xc7, 0x0e]), Some(Ok(Step::Next)));
    assert_eq!(st.rflags & ZF, ZF);
    assert_eq!(env.mem[0x2ffc..0x3004], [0x33, 0, 0, 0, 0x44, 0, 0, 0]);
    assert_eq!(run(&mut st, &mut env, &[0x0f, 0xc7, 0x0e]), Some(Ok(Step::Next)));
    assert_eq!((st.rflags & ZF, st.gpr[Reg::Rax as usize], st.gpr[Reg::Rdx as usize]), (0, 0x33, 0x44));
    let seen = run(&mut st, &mut env, &[0x48, 0x0f, 0xc7, 0x0e]);
    assert_eq!(seen, Some(Err(Exception::GeneralProtection(0))), "16-byte form wants alignment");
    st.gpr[Reg::Rsi as usize] = 0x4000;
    env.put64(0x4000, 0x33);
    env.put64(0x4008, 0x44);
    assert_eq!(run(&mut st, &mut env, &[0x48, 0x0f, 0xc7, 0x0e]), Some(Ok(Step::Next)));
    assert_eq!((st.rflags & ZF, env.mem[0x4008]), (ZF, 0x44));
    env.protect(0x4000);
    let seen = run(&mut st, &mut env, &[0x48, 0x0f, 0xc7, 0x0e]);
    assert_eq!(seen, Some(Err(Exception::PageFault { addr: 0x4000, code: 7 })));
}
