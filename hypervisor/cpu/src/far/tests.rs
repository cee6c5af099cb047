//! Far transfers, IRET in all its forms, and the fast system calls.

use super::*;
use crate::TlbFlush;
use crate::testkit::*;

const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];
const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSRETD: &[u8] = &[0x0f, 0x07];
const FLAGS: u64 = rflags::FIXED | rflags::IF | rflags::ZF;

fn amd(m: &Machine) -> bool {
    m.env.cpuid().vendor() == Vendor::Amd
}

fn selectors(m: &Machine) -> (u16, u16, u8) {
    (m.st.segment(Seg::Cs).selector, m.st.segment(Seg::Ss).selector, m.st.cpl)
}

#[test]
fn iretq_to_user() {
    let mut m = Machine::long(0);
    m.st.nmi_blocked = 1;
    m.frame(8, &[0x7f_0000_1234, UCODE64.into(), FLAGS | rflags::RF | rflags::VM, 0x7fff_0000, UDATA.into()]);
    assert_eq!(m.run(IRETQ), Ok(Step::Resync));
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (0x7f_0000_1234, 0x7fff_0000));
    assert_eq!(selectors(&m), (UCODE64, UDATA, 3));
    assert_eq!(m.st.rflags, FLAGS | rflags::RF, "RF is restored, VM is not");
    assert_eq!((m.st.nmi_blocked, m.st.code64()), (0, true));
    assert_eq!(m.st.segment(Seg::Ds).selector, 0, "ring-0 data does not leak to ring 3");
}

#[test]
fn iretq_same_level_takes_rsp_and_a_null_ss() {
    let mut m = Machine::long(0);
    m.frame(8, &[0x2000, KCODE64.into(), FLAGS, 0x1238, 0]);
    m.run(IRETQ).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (0x2000, 0x1238));
    assert_eq!(selectors(&m), (KCODE64, 0, 0));
    assert_eq!(m.st.segment(Seg::Ds).selector, KDATA);
}

#[test]
fn iretd_to_compatibility_mode_and_back_by_interrupt() {
    let mut m = Machine::long(0);
    m.frame(4, &[0x2000, UCODE32.into(), FLAGS, 0xb000, UDATA.into()]);
    m.run(IRETD).unwrap();
    assert_eq!((m.st.code_bits(), m.st.rip), (32, 0x2000));
    m.set(Reg::Rsp, 0xb000);
    interrupt::deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!((m.st.code_bits(), m.gpr(Reg::Rsp)), (64, STACK0 - 40));
    assert_eq!(m.get64(STACK0 - 32), u64::from(UCODE32));
}

#[test]
fn iret_refuses_bad_frames() {
    let gp = Exception::GeneralProtection;
    let good = [0x2000, UCODE64.into(), FLAGS, 0x8000, UDATA.into()];
    for (at, value, want) in [
        (0, 0x8000_0000_0000, gp(0)),
        (1, 0, gp(0)),
        (1, 3, gp(0)),
        (1, u64::from(KCODE64) | 3, gp(KCODE64)),
        (1, UDATA.into(), gp(UDATA & !3)),
        (1, 0xfff8, gp(0xfff8)),
        (4, 0, gp(0)),
        (4, KDATA.into(), gp(KDATA)),
        (4, u64::from(KDATA) | 3, gp(KDATA)),
        (4, u64::from(ABSENT) | 3, Exception::StackFault(ABSENT)),
        (4, UCODE64.into(), gp(UCODE64 & !3)),
    ] {
        let mut m = Machine::long(0);
        let mut frame = good;
        frame[at] = value;
        m.frame(8, &frame);
        assert_eq!(m.fault(IRETQ), want, "slot {at} = {value:#x}");
    }
    let mut m = Machine::long(3);
    m.frame(8, &[0x2000, KCODE64.into(), FLAGS, 0x8000, KDATA.into()]);
    assert_eq!(m.fault(IRETQ), gp(KCODE64), "no return to an inner level");
    let mut m = Machine::long(0);
    m.st.rflags |= rflags::NT;
    m.frame(8, &good);
    assert_eq!(m.fault(IRETQ), gp(0));
    let mut m = Machine::long(3);
    m.env.unmap(STACK);
    assert_eq!(m.fault(IRETQ), Exception::PageFault { addr: STACK, code: 4 });
}

#[test]
fn iret_in_user_mode_keeps_if_and_iopl() {
    let mut m = Machine::long(3);
    m.st.rflags = FLAGS;
    m.frame(8, &[0x2000, UCODE64.into(), rflags::IOPL | rflags::AC, 0x8000, UDATA.into()]);
    m.run(IRETQ).unwrap();
    assert_eq!(m.st.rflags, rflags::FIXED | rflags::IF | rflags::AC);
}

#[test]
fn iret_in_protected_mode() {
    let mut m = Machine::protected(0);
    m.frame(4, &[0x2000, KCODE32.into(), FLAGS]);
    m.run(IRETD).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp), m.st.cpl), (0x2000, STACK + 12, 0));
    let mut m = Machine::protected(0);
    m.frame(4, &[0x2000, UCODE32.into(), FLAGS, 0x8765_4321, UDATA.into()]);
    m.run(IRETD).unwrap();
    assert_eq!((m.gpr(Reg::Rsp), selectors(&m)), (0x8765_4321, (UCODE32, UDATA, 3)));
    // To virtual-8086 mode.
    let mut m = Machine::protected(0);
    m.frame(4, &[0x100, 0x2000, FLAGS | rflags::VM, 0xfffe, 0x3000, 1, 2, 3, 4]);
    m.run(IRETD).unwrap();
    assert!(m.st.v8086());
    assert_eq!((m.st.rip, m.st.cpl, m.gpr(Reg::Rsp)), (0x100, 3, 0xfffe));
    assert_eq!((m.st.segment(Seg::Cs).base, m.st.segment(Seg::Ss).base), (0x2_0000, 0x3_0000));
    assert_eq!((m.st.segment(Seg::Gs).selector, m.st.segment(Seg::Gs).limit), (4, 0xffff));
}

#[test]
fn iret_in_real_mode() {
    let mut m = Machine::real();
    m.frame(2, &[0x100, 0x2000, FLAGS | rflags::IOPL]);
    m.run(&[0xcf]).unwrap();
    assert_eq!((m.st.rip, m.st.segment(Seg::Cs).base, m.gpr(Reg::Rsp)), (0x100, 0x2_0000, STACK + 6));
    assert_eq!(m.st.rflags, FLAGS | rflags::IOPL);
    let mut m = Machine::v8086(2);
    m.frame(2, &[0x100, 0x2000, FLAGS]);
    assert_eq!(m.fault(&[0xcf]), GP0);
}

#[test]
fn syscall_and_sysret() {
    let mut m = Machine::long(3);
    m.st.star = u64::from(UCODE32) << 48 | u64::from(KCODE64) << 32;
    m.st.lstar = 0xffff_8000_1234_5678;
    m.st.sfmask = rflags::IF | rflags::TF;
    m.st.rflags = FLAGS | rflags::RF;
    m.run(SYSCALL).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rcx), m.gpr(Reg::R11)), (0xffff_8000_1234_5678, CODE + 2, FLAGS));
    assert_eq!(m.st.rflags, rflags::FIXED | rflags::ZF);
    assert_eq!(selectors(&m), (KCODE64, KDATA, 0));
    assert!(m.st.code64());
    m.set(Reg::R11, FLAGS | rflags::RF | rflags::VM);
    m.run(SYSRETQ).unwrap();
    assert_eq!((m.st.rip, m.st.rflags), (CODE + 2, FLAGS));
    assert_eq!(selectors(&m), (UCODE64, UDATA, 3));
    assert_eq!(m.st.segment(Seg::Ss).dpl(), 3);
    assert_eq!(m.fault(SYSRETQ), GP0);
}

#[test]
fn sysret_to_compatibility_mode_and_its_faults() {
    let mut m = Machine::long(0);
    m.st.star = u64::from(UCODE32) << 48;
    m.set(Reg::Rcx, 0xffff_ffff_0000_2000);
    m.set(Reg::R11, FLAGS);
    m.run(SYSRETD).unwrap();
    assert_eq!((m.st.rip, m.st.code_bits()), (0x2000, 32));
    assert_eq!(selectors(&m), (UCODE32, UDATA, 3));
    let mut m = Machine::long(0);
    m.set(Reg::Rcx, 0x8000_0000_0000);
    assert_eq!(m.fault(SYSRETQ), GP0, "checked at CPL 0");
    m.st.efer &= !efer::SCE;
    assert_eq!(m.fault(SYSRETQ), Exception::InvalidOpcode);
    assert_eq!(m.fault(SYSCALL), Exception::InvalidOpcode);
}

#[test]
fn fast_calls_from_compatibility_mode_depend_on_the_vendor() {
    let mut m = Machine::long(3);
    m.st.seg[Seg::Cs as usize] = Segment::flat_code(UCODE32, 3, false);
    m.st.star = u64::from(KCODE64) << 32;
    m.st.cstar = 0x4_0000_0000;
    m.st.sysenter_cs = KCODE64.into();
    m.st.sysenter_eip = 0x5_0000_0000;
    m.st.sysenter_esp = 0x6_0000_0000;
    if amd(&m) {
        assert_eq!(m.fault(&[0x0f, 0x34]), Exception::InvalidOpcode);
        m.run(SYSCALL).unwrap();
        assert_eq!((m.st.rip, m.st.code_bits()), (0x4_0000_0000, 64));
    } else {
        assert_eq!(m.fault(SYSCALL), Exception::InvalidOpcode);
        m.run(&[0x0f, 0x34]).unwrap();
        assert_eq!((m.st.rip, m.gpr(Reg::Rsp), m.st.code_bits()), (0x5_0000_0000, 0x6_0000_0000, 64));
    }
}

#[test]
fn sysenter_and_sysexit_in_protected_mode() {
    let mut m = Machine::protected(3);
    assert_eq!(m.fault(&[0x0f, 0x34]), GP0, "no IA32_SYSENTER_CS");
    m.st.sysenter_cs = KCODE32.into();
    m.st.sysenter_eip = 0x2000;
    m.st.sysenter_esp = 0x8000;
    m.st.rflags = FLAGS;
    m.run(&[0x0f, 0x34]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp), m.st.rflags), (0x2000, 0x8000, rflags::FIXED | rflags::ZF));
    assert_eq!(selectors(&m), (KCODE32, KCODE32 + 8, 0));
    m.set(Reg::Rdx, 0x3000);
    m.set(Reg::Rcx, 0xb000);
    m.run(&[0x0f, 0x35]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (0x3000, 0xb000));
    assert_eq!(selectors(&m), ((KCODE32 + 16) | 3, (KCODE32 + 24) | 3, 3));
    assert_eq!(m.fault(&[0x0f, 0x35]), GP0);
}

#[test]
fn far_jump_from_real_to_protected_to_long_mode() {
    let mut m = Machine::real();
    m.st.gdtr = crate::TableReg { base: GDT, limit: 0xff };
    let tables = Machine::long(0);
    m.put(GDT, &tables.env.mem[GDT as usize..GDT as usize + 0x100]);
    m.put(crate::flat_env::TABLES, &tables.env.mem[crate::flat_env::TABLES as usize..]);
    m.set(Reg::Rax, cr0::PE | cr0::ET);
    m.run(&[0x0f, 0x22, 0xc0]).unwrap(); // mov cr0, eax
    assert!(m.st.protected());
    m.run(&[0x66, 0xea, 0, 0x20, 0, 0, KCODE32 as u8, 0]).unwrap();
    assert_eq!((m.st.rip, m.st.code_bits()), (0x2000, 32));
    for seg in [3, 0] {
        m.set(Reg::Rcx, KDATA.into());
        m.run(&[0x8e, 0xc1 | seg << 3]).unwrap();
    }
    m.st.efer = efer::LME | efer::NXE;
    m.st.cr3 = crate::flat_env::TABLES;
    m.set(Reg::Rax, cr0::PE | cr0::PG);
    assert_eq!(m.fault(&[0x0f, 0x22, 0xc0]), GP0, "long mode needs PAE");
    m.set(Reg::Rcx, 1 << 5);
    m.run(&[0x0f, 0x22, 0xe1]).unwrap(); // mov cr4, ecx
    m.env.flushes.clear();
    assert_eq!(m.run(&[0x0f, 0x22, 0xc0]), Ok(Step::Resync));
    assert!(m.st.long_mode() && !m.st.code64());
    assert_eq!(m.env.flushes, [TlbFlush::All]);
    m.run(&[0xea, 0, 0x30, 0, 0, KCODE64 as u8, 0]).unwrap();
    assert!(m.st.code64());
    m.set(Reg::Rax, cr0::PE);
    assert_eq!(m.fault(&[0x0f, 0x22, 0xc0]), GP0, "paging cannot end in 64-bit code");
}

#[test]
fn far_jump_checks() {
    let jump = |selector: u16| [0xea, 0, 0x20, 0, 0, selector as u8, (selector >> 8) as u8];
    let gp = Exception::GeneralProtection;
    let mut m = Machine::protected(0);
    for (selector, want) in [
        (0, gp(0)),
        (2, gp(0)),
        (KDATA, gp(KDATA)),
        (UCODE32, gp(UCODE32 & !3)),
        (KCODE32 | 3, gp(KCODE32)),
        (TSS_SEL, gp(TSS_SEL)),
        (0x1f8, gp(0x1f8)),
        (KCODE32 | 4, gp(KCODE32 | 4)),
        (KCODE16, gp(0)), // 0x2000 is beyond its limit
    ] {
        assert_eq!(m.fault(&jump(selector)), want, "{selector:#x}");
    }
    m.env.put64(GDT + u64::from(KCODE32), descriptor(0, 0xf_ffff, 0x1b, 0xc));
    assert_eq!(m.fault(&jump(KCODE32)), Exception::SegmentNotPresent(KCODE32));
    m.env.put64(GDT + u64::from(KCODE32), descriptor(0, 0xf_ffff, 0x9a, 0xc));
    m.run(&jump(KCODE32)).unwrap();
    assert_eq!(m.env.mem[GDT as usize + usize::from(KCODE32) + 5], 0x9b, "the accessed bit is set in the table");
}

#[test]
fn far_call_and_return() {
    let mut m = Machine::protected(0);
    m.run(&[0x9a, 0, 0x20, 0, 0, KCODE32 as u8, 0]).unwrap();
    assert_eq!((m.st.rip, m.get32(STACK - 4), m.get32(STACK - 8)), (0x2000, KCODE32.into(), CODE as u32 + 7));
    m.run(&[0xca, 4, 0]).unwrap(); // retf 4
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (CODE + 7, STACK + 4));
    // 64-bit: call far [rax], retfq to ring 3.
    let mut m = Machine::long(0);
    m.set(Reg::Rax, 0x8000);
    m.put(0x8000, &[0, 0x20, 0, 0, KCODE64 as u8, 0]);
    m.run(&[0xff, 0x18]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (0x2000, STACK - 8));
    m.frame(8, &[0x1234, UCODE64.into(), 0x6000, UDATA.into()]);
    m.run(&[0x48, 0xcb]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp), selectors(&m)), (0x1234, 0x6000, (UCODE64, UDATA, 3)));
    let mut m = Machine::real();
    m.run(&[0x9a, 0, 0x20, 0x34, 0x12]).unwrap();
    assert_eq!((m.st.rip, m.st.segment(Seg::Cs).base, m.get16(STACK - 4)), (0x2000, 0x1_2340, CODE as u16 + 5));
    m.run(&[0xcb]).unwrap();
    assert_eq!((m.st.rip, m.st.segment(Seg::Cs).base), (CODE + 5, 0));
}

#[test]
fn call_gates_switch_stacks() {
    let mut m = Machine::protected(3);
    m.env.put64(GDT + u64::from(GATE), gate(KCODE32, 0x2000, 0xec) | 2 << 32); // two parameters
    m.frame(4, &[0x1111, 0x2222]);
    let call = [0x9a, 0, 0, 0, 0, (GATE | 3) as u8, 0];
    m.run(&call).unwrap();
    let sp = STACK0 - 24;
    let frame: Vec<u32> = (0..6).map(|n| m.get32(sp + n * 4)).collect();
    assert_eq!(frame, [CODE as u32 + 7, UCODE32.into(), 0x1111, 0x2222, STACK as u32, UDATA.into()]);
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp), selectors(&m)), (0x2000, sp, (KCODE32, KDATA, 0)));
    m.run(&[0xca, 8, 0]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp), selectors(&m)), (CODE + 7, STACK + 8, (UCODE32, UDATA, 3)));
    // The gate itself is out of reach.
    m.env.put64(GDT + u64::from(GATE), gate(KCODE32, 0x2000, 0x8c));
    assert_eq!(m.fault(&call), Exception::GeneralProtection(GATE));
    m.env.put64(GDT + u64::from(GATE), gate(KCODE32, 0x2000, 0x6c));
    assert_eq!(m.fault(&call), Exception::SegmentNotPresent(GATE));
    // Long mode.
    let mut m = Machine::long(3);
    m.env.put64(GDT + u64::from(GATE), gate(KCODE64, 0x2000, 0xec));
    m.env.put64(GDT + u64::from(GATE) + 8, 0xffff_8000);
    m.set(Reg::Rax, 0x8000);
    m.put(0x8000, &[0, 0, 0, 0, (GATE | 3) as u8, 0]);
    m.run(&[0xff, 0x18]).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (0xffff_8000_0000_2000, STACK0 - 32));
    assert_eq!(selectors(&m), (KCODE64, 0, 0));
    assert_eq!((m.get64(STACK0 - 16), m.get64(STACK0 - 32)), (STACK, CODE + 2));
}

#[test]
fn into_only_with_overflow() {
    let mut m = Machine::protected(0);
    m.run(&[0xce]).unwrap();
    assert_eq!(m.st.rip, CODE + 1);
    m.st.rflags |= rflags::OF;
    m.run(&[0xce]).unwrap();
    assert_eq!((m.st.rip, m.get32(m.gpr(Reg::Rsp))), (HANDLERS + 4, CODE as u32 + 2));
}
