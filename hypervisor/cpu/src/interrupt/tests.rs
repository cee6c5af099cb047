//! Delivery in every mode, stack switches, and exceptions inside exceptions.

use super::*;
use crate::state::TableReg;
use crate::testkit::*;

const FLAGS: u64 = rflags::FIXED | rflags::IF | rflags::CF;

#[test]
fn long_mode_from_user_switches_to_rsp0() {
    let mut m = Machine::long(3);
    m.st.rflags = FLAGS | rflags::TF | rflags::NT;
    m.st.halted = 1;
    deliver(&mut m.st, &mut m.env, Exception::PageFault { addr: 0x1234, code: 6 }).unwrap();
    let sp = STACK0 - 48;
    assert_eq!(m.gpr(Reg::Rsp), sp);
    assert_eq!(m.get64(sp), 6);
    assert_eq!(m.get64(sp + 8), CODE);
    assert_eq!(m.get64(sp + 16), u64::from(UCODE64));
    assert_eq!(m.get64(sp + 24), FLAGS | rflags::TF | rflags::NT | rflags::RF);
    assert_eq!(m.get64(sp + 32), STACK);
    assert_eq!(m.get64(sp + 40), u64::from(UDATA));
    assert_eq!((m.st.rip, m.st.cpl, m.st.cr2, m.st.halted), (HANDLERS + 14, 0, 0x1234, 0));
    assert_eq!(m.st.rflags, rflags::FIXED | rflags::CF);
    assert_eq!((m.st.segment(Seg::Cs).selector, m.st.segment(Seg::Ss).selector), (KCODE64, 0));
    assert!(!m.st.segment(Seg::Ss).usable());
}

#[test]
fn long_mode_same_level_aligns_and_keeps_ss() {
    let mut m = Machine::long(0);
    m.set(Reg::Rsp, STACK - 8);
    m.st.rflags = FLAGS;
    m.gate64(32, KCODE64, HANDLERS, 0x8f, 0); // trap gate
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    let sp = STACK - 16 - 40;
    assert_eq!(m.gpr(Reg::Rsp), sp);
    assert_eq!(m.get64(sp + 16), FLAGS, "no RF for an interrupt");
    assert_eq!(m.get64(sp + 24), STACK - 8);
    assert_eq!(m.st.segment(Seg::Ss).selector, KDATA);
    assert_eq!(m.st.rflags, FLAGS, "a trap gate keeps IF");
}

#[test]
fn ist_is_used_whatever_the_level() {
    for cpl in [0, 3] {
        let mut m = Machine::long(cpl);
        m.gate64(2, KCODE64, HANDLERS, 0x8e, 1);
        deliver_nmi(&mut m.st, &mut m.env).unwrap();
        assert_eq!(m.gpr(Reg::Rsp), IST1 - 40);
        assert_eq!(m.st.nmi_blocked, 1);
        assert_eq!(m.get64(IST1 - 16), STACK);
    }
}

#[test]
fn debug_exception_sets_dr6_and_no_rf() {
    let mut m = Machine::long(0);
    m.st.rflags = FLAGS;
    m.st.dr[6] = 0xffff_0ff5;
    m.st.dr[7] = 0x2400;
    deliver(&mut m.st, &mut m.env, Exception::Debug(1 << 14)).unwrap();
    assert_eq!(m.st.dr[6], 0xffff_4ff0);
    assert_eq!(m.st.dr[7], 0x400);
    assert_eq!(m.get64(m.gpr(Reg::Rsp) + 16), FLAGS);
}

#[test]
fn missing_gates_become_gp_or_np_with_ext() {
    let mut m = Machine::long(0);
    m.gate64(32, KCODE64, HANDLERS, 0x0e, 0); // not present
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!((m.st.rip, m.get64(m.gpr(Reg::Rsp))), (HANDLERS + 11, 32 * 8 + 3));
    let mut m = Machine::long(0);
    m.gate64(32, KCODE64, HANDLERS, 0x85, 0); // a task gate
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!((m.st.rip, m.get64(m.gpr(Reg::Rsp))), (HANDLERS + 13, 32 * 8 + 3));
    let mut m = Machine::long(0);
    m.gate64(32, KCODE32, HANDLERS, 0x8e, 0); // not 64-bit code
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!((m.st.rip, m.get64(m.gpr(Reg::Rsp))), (HANDLERS + 13, u64::from(KCODE32) + 1));
}

#[test]
fn soft_interrupts_check_the_gate_level_without_ext() {
    let mut m = Machine::long(3);
    assert_eq!(m.fault(&[0xcd, 0x80]), Exception::GeneralProtection(0x80 * 8 + 2));
    assert_eq!(m.fault(&[0xcc]), Exception::GeneralProtection(3 * 8 + 2));
    m.gate64(0x80, KCODE64, HANDLERS, 0xee, 0);
    m.run(&[0xcd, 0x80]).unwrap();
    assert_eq!(m.get64(m.gpr(Reg::Rsp)), CODE + 2);
    let mut m = Machine::long(3);
    m.run(&[0xf1]).unwrap(); // INT1 is not checked
    assert_eq!(m.st.rip, HANDLERS + 1);
    let mut m = Machine::long(3);
    software_int(&mut m.st, &mut m.env, 0x80, CODE + 2, SoftKind::IntN).unwrap();
    assert_eq!(m.st.rip, HANDLERS + 13);
    assert_eq!(m.get64(m.gpr(Reg::Rsp) + 8), CODE, "the fault is at the instruction itself");
}

#[test]
fn a_breakpoint_whose_gate_refuses_points_at_the_int3() {
    let mut m = Machine::long(3);
    m.st.rip = CODE + 1;
    deliver(&mut m.st, &mut m.env, Exception::Breakpoint).unwrap();
    assert_eq!((m.st.rip, m.get64(m.gpr(Reg::Rsp) + 8)), (HANDLERS + 13, CODE));
    m.gate64(3, KCODE64, HANDLERS, 0xee, 0);
    let mut m2 = Machine::long(3);
    m2.gate64(3, KCODE64, HANDLERS, 0xee, 0);
    m2.st.rip = CODE + 1;
    m2.st.rflags = FLAGS;
    deliver(&mut m2.st, &mut m2.env, Exception::Breakpoint).unwrap();
    assert_eq!(m2.get64(m2.gpr(Reg::Rsp)), CODE + 1);
    assert_eq!(m2.get64(m2.gpr(Reg::Rsp) + 16), FLAGS);
}

#[test]
fn two_contributory_exceptions_make_a_double_fault() {
    let mut m = Machine::long(3);
    m.gate64(13, KCODE64, HANDLERS, 0x0e, 0);
    m.gate64(8, KCODE64, HANDLERS + 8, 0x8e, 1);
    deliver(&mut m.st, &mut m.env, Exception::GeneralProtection(0)).unwrap();
    assert_eq!((m.st.rip, m.gpr(Reg::Rsp)), (HANDLERS + 8, IST1 - 48));
    assert_eq!((m.get64(IST1 - 48), m.get64(IST1 - 40)), (0, CODE));
}

#[test]
fn page_fault_classes() {
    // Contributory, then page fault: the page fault is delivered.
    let mut m = Machine::long(3);
    m.gate64(14, KCODE64, HANDLERS + 14, 0x8e, 1);
    m.env.unmap(STACK0 - 1);
    deliver(&mut m.st, &mut m.env, Exception::GeneralProtection(0)).unwrap();
    assert_eq!((m.st.rip, m.st.cr2), (HANDLERS + 14, STACK0 - 48));
    assert_eq!(m.get64(m.gpr(Reg::Rsp)), 2, "a supervisor write to an absent page");
    // Page fault, then page fault: a double fault, and CR2 is the second one's.
    let mut m = Machine::long(3);
    m.gate64(8, KCODE64, HANDLERS + 8, 0x8e, 1);
    m.env.unmap(STACK0 - 1);
    deliver(&mut m.st, &mut m.env, Exception::PageFault { addr: 0x123, code: 4 }).unwrap();
    assert_eq!((m.st.rip, m.st.cr2), (HANDLERS + 8, STACK0 - 48));
    // Benign, then page fault: the page fault.
    let mut m = Machine::long(3);
    m.gate64(14, KCODE64, HANDLERS + 14, 0x8e, 1);
    m.env.unmap(STACK0 - 1);
    deliver(&mut m.st, &mut m.env, Exception::InvalidOpcode).unwrap();
    assert_eq!(m.st.rip, HANDLERS + 14);
    // Page fault, then contributory: a double fault.
    let mut m = Machine::long(3);
    m.gate64(14, KCODE64, HANDLERS, 0x0e, 0);
    deliver(&mut m.st, &mut m.env, Exception::PageFault { addr: 0x123, code: 4 }).unwrap();
    assert_eq!(m.st.rip, HANDLERS + 8);
}

#[test]
fn a_fault_in_a_double_fault_shuts_down() {
    let mut m = Machine::long(3);
    m.st.idtr = TableReg { base: IDT, limit: 0 };
    let r = deliver(&mut m.st, &mut m.env, Exception::InvalidOpcode);
    assert_eq!(r, Err(StopReason::TripleFault));
    let mut m = Machine::long(3);
    m.env.unmap(STACK0 - 1);
    let r = deliver_external(&mut m.st, &mut m.env, 32);
    assert_eq!(r, Err(StopReason::TripleFault));
}

#[test]
fn bad_inner_stacks() {
    let mut m = Machine::long(3);
    m.env.put64(TSS + 4, 0x8000_0000_0000_0000);
    m.gate64(12, KCODE64, HANDLERS + 12, 0x8e, 1);
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!((m.st.rip, m.get64(m.gpr(Reg::Rsp))), (HANDLERS + 12, 1));
    let mut m = Machine::long(3);
    m.st.tr.limit = 10;
    m.gate64(10, CONFORMING, HANDLERS + 10, 0x8e, 0); // stays at ring 3, needs no TSS
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!((m.st.rip, m.get64(m.gpr(Reg::Rsp))), (HANDLERS + 10, u64::from(TSS_SEL) + 1));
    assert_eq!(m.st.cpl, 3);
}

#[test]
fn protected_mode_from_user_and_same_level() {
    let mut m = Machine::protected(3);
    m.st.rflags = FLAGS;
    deliver(&mut m.st, &mut m.env, Exception::GeneralProtection(0x50)).unwrap();
    let sp = STACK0 - 24;
    assert_eq!(m.gpr(Reg::Rsp), sp);
    let frame: Vec<u32> = (0..6).map(|n| m.get32(sp + n * 4)).collect();
    let flags = (FLAGS | rflags::RF) as u32;
    assert_eq!(frame, [0x50, CODE as u32, UCODE32.into(), flags, STACK as u32, UDATA.into()]);
    assert_eq!((m.st.cpl, m.st.rip), (0, HANDLERS + 13));
    assert_eq!((m.st.segment(Seg::Cs).selector, m.st.segment(Seg::Ss).selector), (KCODE32, KDATA));
    m.st.rip = 0x2000;
    deliver_external(&mut m.st, &mut m.env, 33).unwrap();
    assert_eq!(m.gpr(Reg::Rsp), sp - 12);
    assert_eq!(m.get32(sp - 12), 0x2000);
}

#[test]
fn sixteen_bit_gates_push_words() {
    let mut m = Machine::protected(0);
    m.gate32(32, KCODE32, 0x1_2345, 0x86);
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    assert_eq!(m.gpr(Reg::Rsp), STACK - 6);
    assert_eq!((m.get16(STACK - 6), m.get16(STACK - 4)), (CODE as u16, KCODE32));
    assert_eq!(m.st.rip, 0x2345);
}

#[test]
fn protected_mode_bad_stack_segment_is_an_invalid_tss() {
    let mut m = Machine::protected(3);
    m.env.put64(TSS + 4, STACK0 | u64::from(READONLY) << 32);
    m.gate32(10, KCODE32, HANDLERS + 10, 0x8e);
    // #TS needs the same stack: double fault, then shutdown.
    assert_eq!(deliver_external(&mut m.st, &mut m.env, 32), Err(StopReason::TripleFault));
    let event = Event { vector: 32, error_code: None, rip: CODE, set_rf: false, soft: false };
    assert_eq!(enter(&mut m.st, &mut m.env, &event), Err(Exception::InvalidTss(READONLY | 1)));
}

#[test]
fn virtual_8086_frame_has_the_data_segments() {
    let mut m = Machine::v8086(3);
    deliver_external(&mut m.st, &mut m.env, 32).unwrap();
    let sp = STACK0 - 36;
    assert_eq!(m.gpr(Reg::Rsp), sp);
    let frame: Vec<u32> = (0..9).map(|n| m.get32(sp + n * 4)).collect();
    assert_eq!(frame[..2], [CODE as u32, 0]);
    assert_eq!(u64::from(frame[2]) & rflags::VM, rflags::VM);
    assert_eq!(frame[3..], [STACK as u32, 0, 0, 3, 4, 5]);
    assert_eq!(m.st.rflags & rflags::VM, 0);
    assert_eq!((m.st.cpl, m.st.segment(Seg::Ds).selector, m.st.segment(Seg::Ds).attr), (0, 0, 0));
}

#[test]
fn virtual_8086_int_needs_iopl_3() {
    let mut m = Machine::v8086(0);
    m.gate32(0x21, KCODE32, HANDLERS, 0xee);
    assert_eq!(m.fault(&[0xcd, 0x21]), Exception::GeneralProtection(0));
    let mut m = Machine::v8086(3);
    m.gate32(0x21, KCODE32, HANDLERS, 0xee);
    m.run(&[0xcd, 0x21]).unwrap();
    assert_eq!((m.st.rip, m.st.cpl), (HANDLERS, 0));
}

#[test]
fn real_mode_pushes_words_and_no_error_code() {
    let mut m = Machine::real();
    m.st.rflags = FLAGS | rflags::TF;
    m.put32(13 * 4, 0x1234_5678);
    deliver(&mut m.st, &mut m.env, Exception::GeneralProtection(0)).unwrap();
    let sp = STACK - 6;
    assert_eq!(m.gpr(Reg::Rsp), sp);
    assert_eq!((m.get16(sp), m.get16(sp + 2), m.get16(sp + 4)), (CODE as u16, 0, (FLAGS | rflags::TF) as u16));
    assert_eq!((m.st.rip, m.st.segment(Seg::Cs).base), (0x5678, 0x1_2340));
    assert_eq!(m.st.rflags, rflags::FIXED | rflags::CF);
    m.st.idtr.limit = 10;
    assert_eq!(deliver_external(&mut m.st, &mut m.env, 8), Err(StopReason::TripleFault));
}

#[test]
fn smap_guards_the_exception_frame_even_with_ac() {
    // The test machine's pages are user pages, so a supervisor frame on them must fault under SMAP.
    let mut m = Machine::long(0);
    m.st.cr4 |= crate::state::cr4::SMAP;
    m.st.rflags |= rflags::AC;
    assert_eq!(deliver_external(&mut m.st, &mut m.env, 32), Err(StopReason::TripleFault));
}
