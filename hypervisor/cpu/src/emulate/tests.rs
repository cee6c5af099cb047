//! Near transfers, stack instructions, and effective addresses.

use super::*;
use crate::state::Segment;
use crate::testkit::*;

const GP0: Exception = Exception::GeneralProtection(0);
const SS0: Exception = Exception::StackFault(0);

#[test]
fn push_and_pop_in_every_width() {
    let mut m = Machine::long(3);
    m.set(Reg::Rax, 0x1122_3344_5566_7788);
    m.run(&[0x50]).unwrap();
    m.run(&[0x66, 0x50]).unwrap();
    m.run(&[0x6a, 0xff]).unwrap(); // push -1
    assert_eq!(m.gpr(Reg::Rsp), STACK - 18);
    assert_eq!((m.get64(STACK - 8), m.get16(STACK - 10)), (0x1122_3344_5566_7788, 0x7788));
    assert_eq!(m.get64(STACK - 18), u64::MAX);
    m.run(&[0x54]).unwrap(); // push rsp stores the old value
    assert_eq!(m.get64(STACK - 26), STACK - 18);
    m.run(&[0x5c]).unwrap(); // pop rsp
    assert_eq!(m.gpr(Reg::Rsp), STACK - 18);
    m.run(&[0x66, 0x59]).unwrap(); // pop cx
    assert_eq!(m.gpr(Reg::Rcx), 0xffff);
    let mut m = Machine::protected(3);
    m.set(Reg::Rsp, 0x1_0000_0000 | STACK);
    m.run(&[0x1e]).unwrap(); // push ds
    assert_eq!((m.gpr(Reg::Rsp), m.get16(STACK - 4)), (STACK - 4, UDATA));
    m.run(&[0x07]).unwrap(); // pop es
    assert_eq!((m.gpr(Reg::Rsp), m.st.segment(Seg::Es).selector), (STACK, UDATA));
}

#[test]
fn sixteen_bit_stacks_wrap_and_keep_the_upper_half() {
    let mut m = Machine::real();
    m.set(Reg::Rsp, 0xdead_0000);
    m.set(Reg::Rax, 0x1234);
    m.run(&[0x50]).unwrap();
    assert_eq!((m.gpr(Reg::Rsp), m.get16(0xfffe)), (0xdead_fffe, 0x1234));
    m.set(Reg::Rsp, 1);
    assert_eq!(m.fault(&[0x50]), SS0, "a word at 0xffff is beyond the limit");
}

#[test]
fn pop_to_memory_addresses_after_the_increment() {
    let mut m = Machine::long(3);
    m.frame(8, &[0x1234, 0]);
    m.run(&[0x8f, 0x04, 0x24]).unwrap(); // pop qword [rsp]
    assert_eq!((m.gpr(Reg::Rsp), m.get64(STACK + 8)), (STACK + 8, 0x1234));
    m.env.protect(0x8000);
    m.set(Reg::Rax, 0x8000);
    assert_eq!(m.fault(&[0x8f, 0x00]), Exception::PageFault { addr: 0x8000, code: 7 });
}

#[test]
fn stack_faults() {
    let mut m = Machine::long(3);
    m.set(Reg::Rsp, 0x8000_0000_0004);
    assert_eq!(m.fault(&[0x50]), SS0);
    let mut m = Machine::protected(3);
    m.st.seg[Seg::Ss as usize].limit = STACK as u32 - 1;
    m.run(&[0x50]).unwrap();
    assert_eq!(m.fault(&[0x61]), SS0, "popa beyond the limit");
    m.st.seg[Seg::Ss as usize].attr |= 4; // expand down: valid above the limit
    assert_eq!(m.fault(&[0x50]), SS0);
    m.set(Reg::Rsp, STACK + 16);
    m.run(&[0x50]).unwrap();
}

#[test]
fn calls_and_returns() {
    let mut m = Machine::long(3);
    m.run(&[0xe8, 0xfb, 0x0f, 0, 0]).unwrap();
    assert_eq!((m.st.rip, m.get64(STACK - 8)), (0x2000, CODE + 5));
    m.run(&[0xc2, 0x10, 0]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (CODE + 5, STACK + 16));
    m.set(Reg::Rax, 0x8000_0000_0000);
    assert_eq!(m.fault(&[0xff, 0xd0]), GP0);
    assert_eq!(m.fault(&[0xff, 0xe0]), GP0);
    m.frame(8, &[0x8000_0000_0000]);
    assert_eq!(m.fault(&[0xc3]), GP0);
    let mut m = Machine::protected(3);
    m.st.seg[Seg::Cs as usize].limit = 0x1fff;
    assert_eq!(m.fault(&[0xe9, 0xfb, 0x0f, 0, 0]), GP0);
    m.set(Reg::Rax, 0x1_1234);
    m.run(&[0x66, 0xff, 0xe0]).unwrap(); // jmp ax
    assert_eq!(m.st.rip, 0x1234);
    let mut m = Machine::real();
    m.run(&[0xe8, 0xfd, 0x0f]).unwrap();
    assert_eq!((m.st.rip, m.get16(STACK - 2)), (0x2000, CODE as u16 + 3));
    m.run(&[0xc3]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (CODE + 3, STACK));
}

#[test]
fn conditional_branches_and_loops() {
    let mut m = Machine::long(3);
    m.st.rflags |= rflags::ZF;
    m.run(&[0x74, 0x10]).unwrap();
    assert_eq!(m.st.rip, CODE + 0x12);
    m.run(&[0x0f, 0x85, 0, 1, 0, 0]).unwrap();
    assert_eq!(m.st.rip, CODE + 0x18);
    m.set(Reg::Rcx, 0x1_0000_0002);
    m.run(&[0x67, 0xe2, 0x10]).unwrap(); // loop on ecx
    assert_eq!((m.st.rip, m.gpr(Reg::Rcx)), (CODE + 0x2b, 1));
    m.run(&[0xe0, 0x10]).unwrap(); // loopne: count runs out
    assert_eq!((m.st.rip, m.gpr(Reg::Rcx)), (CODE + 0x2d, 0));
    m.run(&[0xe3, 0x10]).unwrap(); // jrcxz
    assert_eq!(m.st.rip, CODE + 0x3f);
}

#[test]
fn every_condition_matches_its_definition() {
    let flag = [rflags::CF, rflags::PF, rflags::ZF, rflags::SF, rflags::OF];
    for n in 0..32_u32 {
        let flags: u64 = flag.iter().enumerate().filter(|(b, _)| n >> b & 1 != 0).map(|(_, f)| f).sum();
        let (c, p, z, s, o) = (n & 1 != 0, n & 2 != 0, n & 4 != 0, n & 8 != 0, n & 16 != 0);
        let want = [o, c, z, c || z, s, p, s != o, z || s != o];
        for (pair, want) in want.into_iter().enumerate() {
            for odd in [false, true] {
                let mut m = Machine::long(3);
                m.st.rflags = flags | rflags::FIXED;
                m.run(&[0x70 + pair as u8 * 2 + u8::from(odd), 0x40]).unwrap();
                assert_eq!(m.st.rip == CODE + 0x42, want != odd, "jcc {pair} {odd} with flags {n:05b}");
            }
        }
    }
}

#[test]
fn effective_addresses() {
    let mut m = Machine::long(3);
    m.st.seg[Seg::Fs as usize].base = 0x8000;
    m.st.seg[Seg::Ds as usize].base = 0x10_0000; // ignored in 64-bit mode
    m.set(Reg::Rbx, 0x10);
    m.set(Reg::Rcx, 3);
    m.env.put64(0x8000 + 0x10 + 24 + 8, 0x1111);
    m.run(&[0x64, 0xff, 0x74, 0xcb, 0x08]).unwrap(); // push qword fs:[rbx+rcx*8+8]
    assert_eq!(m.get64(m.gpr(Reg::Rsp)), 0x1111);
    m.env.put64(CODE + 5 + 6 + 0x100, 0x2222);
    m.run(&[0xff, 0x35, 0, 1, 0, 0]).unwrap(); // push qword [rip+0x100]
    assert_eq!(m.get64(m.gpr(Reg::Rsp)), 0x2222);
    m.set(Reg::Rbx, 0xffff_ffff_0000_9000);
    m.env.put64(0x9000, 0x3333);
    m.run(&[0x67, 0xff, 0x33]).unwrap(); // push qword [ebx]
    assert_eq!(m.get64(m.gpr(Reg::Rsp)), 0x3333);
    m.set(Reg::Rbp, 0x8000_0000_0000);
    assert_eq!(m.fault(&[0xff, 0x75, 0]), SS0, "through RBP");
    assert_eq!(m.fault(&[0x3e, 0xff, 0x75, 0]), SS0, "overrides do not count");
    m.set(Reg::Rbx, 0x7fff_ffff_fffd);
    assert_eq!(m.fault(&[0xff, 0x33]), GP0, "the last byte is not canonical");
    let mut m = Machine::real();
    m.st.seg[Seg::Ds as usize] = Segment::real(0x100);
    m.set(Reg::Rbx, 0xfff0);
    m.set(Reg::Rsi, 0x20);
    m.put(0x1010, &[0x44, 0x55]);
    m.run(&[0xff, 0x30]).unwrap(); // push word [bx+si] wraps at 64 KiB
    assert_eq!(m.get16(m.gpr(Reg::Rsp)), 0x5544);
}

#[test]
fn segment_rights_guard_memory_operands() {
    let mut m = Machine::protected(0);
    m.set(Reg::Rax, 0x8000);
    m.st.seg[Seg::Ds as usize].attr &= !2;
    m.run(&[0xff, 0x30]).unwrap();
    assert_eq!(m.fault(&[0x8f, 0x00]), GP0, "read-only");
    assert_eq!(m.fault(&[0x2e, 0x8f, 0x00]), GP0, "code cannot be written");
    m.run(&[0x2e, 0xff, 0x30]).unwrap();
    m.st.seg[Seg::Cs as usize].attr &= !2;
    assert_eq!(m.fault(&[0x2e, 0xff, 0x30]), GP0, "execute-only");
    m.st.seg[Seg::Ds as usize].limit = 0x8002;
    assert_eq!(m.fault(&[0xff, 0x30]), GP0);
    m.run(&[0x66, 0xff, 0x30]).unwrap();
}

#[test]
fn unknown_instructions_are_invalid() {
    let mut m = Machine::long(0);
    for bytes in [&[0x0f, 0x0b][..], &[0x0f, 0x01, 0xc1], &[0x0f, 0x01, 0xd8], &[0x0f, 0xaa]] {
        assert_eq!(m.fault(bytes), Exception::InvalidOpcode, "{bytes:x?}");
    }
}
