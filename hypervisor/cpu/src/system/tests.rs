//! Privileged and mode-sensitive instructions, segment loads and control registers.

use super::*;
use crate::Reg;
use crate::state::{Segment, efer};
use crate::testkit::*;

const GP: fn(u16) -> Exception = Exception::GeneralProtection;

#[test]
fn segment_loads_check_type_and_privilege() {
    let mov_ds_ax = [0x8e, 0xd8];
    let mov_ss_ax = [0x8e, 0xd0];
    let mut m = Machine::protected(0);
    for (bytes, selector, want) in [
        (mov_ds_ax, 0x1f8, GP(0x1f8)),
        (mov_ds_ax, KDATA | 3, GP(KDATA)),
        (mov_ds_ax, TSS_SEL, GP(TSS_SEL)),
        (mov_ds_ax, KDATA | 4, GP(KDATA | 4)),
        (mov_ds_ax, ABSENT, Exception::SegmentNotPresent(ABSENT)),
        (mov_ss_ax, 0, GP(0)),
        (mov_ss_ax, UDATA, GP(UDATA & !3)),
        (mov_ss_ax, KCODE32, GP(KCODE32)),
        (mov_ss_ax, READONLY, GP(READONLY)),
        (mov_ss_ax, KDATA | 3, GP(KDATA)),
    ] {
        m.set(Reg::Rax, selector.into());
        assert_eq!(m.fault(&bytes), want, "{bytes:x?} with {selector:#x}");
    }
    m.env.put64(GDT + u64::from(READONLY), descriptor(0, 0xf_ffff, 0x12, 0xc));
    m.set(Reg::Rax, READONLY.into());
    assert_eq!(m.fault(&mov_ss_ax), Exception::StackFault(READONLY));
    // Execute-only code cannot be data; readable and conforming code can.
    m.env.put64(GDT + u64::from(READONLY), descriptor(0, 0xf_ffff, 0x98, 0xc));
    assert_eq!(m.fault(&mov_ds_ax), GP(READONLY));
    m.set(Reg::Rax, u64::from(CONFORMING) | 3);
    m.run(&mov_ds_ax).unwrap();
    assert_eq!(m.st.segment(Seg::Ds).selector, CONFORMING | 3);
}

#[test]
fn loaded_segments_carry_base_and_limit_and_set_accessed() {
    let mut m = Machine::protected(0);
    let at = GDT + u64::from(READONLY);
    m.env.put64(at, descriptor(0x1234_5678, 0x12345, 0x92, 0x4));
    m.set(Reg::Rax, READONLY.into());
    assert_eq!(m.run(&[0x8e, 0xd8]), Ok(Step::Resync));
    let want = Segment { base: 0x1234_5678, limit: 0x12345, attr: 0x4093, selector: READONLY };
    assert_eq!(*m.st.segment(Seg::Ds), want);
    assert_eq!(m.env.mem[at as usize + 5], 0x93);
    m.set(Reg::Rax, KDATA.into());
    assert_eq!(m.run(&[0x8e, 0xd0]), Ok(Step::Resync));
    assert_eq!((m.st.irq_shadow, m.st.segment(Seg::Ss).limit), (1, u32::MAX));
    m.set(Reg::Rax, 3);
    m.run(&[0x8e, 0xe8]).unwrap(); // mov gs, ax
    assert_eq!((m.st.segment(Seg::Gs).selector, m.st.segment(Seg::Gs).usable()), (3, false));
    // Through a null segment nothing can be reached: mov eax, gs:[0].
    assert_eq!(m.fault(&[0x0f, 0x22, 0xc8]), Exception::InvalidOpcode); // mov cr1, eax
    assert_eq!(m.fault(&[0x65, 0xff, 0x35, 0, 0, 0, 0]), GP(0)); // push dword gs:[0]
}

#[test]
fn long_mode_null_ss_only_inside() {
    let mut m = Machine::long(0);
    m.set(Reg::Rax, 0);
    m.run(&[0x8e, 0xd0]).unwrap();
    assert_eq!(m.st.segment(Seg::Ss).selector, 0);
    m.set(Reg::Rax, 3);
    assert_eq!(m.fault(&[0x8e, 0xd0]), GP(0));
    let mut m = Machine::long(3);
    assert_eq!(m.fault(&[0x8e, 0xd0]), GP(0));
}

#[test]
fn real_mode_loads_keep_the_limit() {
    let mut m = Machine::real();
    m.st.seg[Seg::Ds as usize].limit = u32::MAX;
    m.set(Reg::Rax, 0x1234);
    m.run(&[0x8e, 0xd8]).unwrap();
    let ds = m.st.segment(Seg::Ds);
    assert_eq!((ds.base, ds.limit, ds.selector), (0x1_2340, u32::MAX, 0x1234));
    assert_eq!(m.fault(&[0x8e, 0xc8]), Exception::InvalidOpcode); // mov cs, ax
}

#[test]
fn ltr_and_lldt() {
    let ltr = [0x0f, 0x00, 0xd8];
    let lldt = [0x0f, 0x00, 0xd0];
    let mut m = Machine::long(0);
    m.set(Reg::Rax, TSS_SEL.into());
    m.env.put64(GDT + u64::from(TSS_SEL) + 8, 0xffff_8000);
    m.run(&ltr).unwrap();
    assert_eq!((m.st.tr.base, m.st.tr.limit), (0xffff_8000_0000_7000, 0xfff));
    assert_eq!(m.env.mem[GDT as usize + usize::from(TSS_SEL) + 5], 0x8b);
    assert_eq!(m.fault(&ltr), GP(TSS_SEL), "busy");
    m.set(Reg::Rax, LDT.into());
    assert_eq!(m.fault(&ltr), GP(LDT));
    m.run(&lldt).unwrap();
    assert_eq!((m.st.ldtr.base, m.st.ldtr.limit), (0xe000, 7));
    m.env.put64(GDT + u64::from(LDT) + 8, 0x8000);
    assert_eq!(m.fault(&lldt), GP(LDT), "base not canonical");
    m.set(Reg::Rax, 0);
    m.run(&lldt).unwrap();
    assert!(!m.st.ldtr.usable());
    assert_eq!(m.fault(&ltr), GP(0));
    assert_eq!(Machine::long(3).fault(&ltr), GP(0));
    assert_eq!(Machine::real().fault(&ltr), Exception::InvalidOpcode);
}

#[test]
fn descriptor_tables_load_and_store() {
    let mut m = Machine::long(0);
    m.set(Reg::Rax, 0x8000);
    m.put(0x8000, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12, 0x00, 0x80, 0xff, 0xff]);
    m.run(&[0x0f, 0x01, 0x10]).unwrap(); // lgdt [rax]
    assert_eq!(m.st.gdtr, TableReg { base: 0xffff_8000_1234_5678, limit: 0x1234 });
    m.set(Reg::Rax, 0x8100);
    m.run(&[0x0f, 0x01, 0x00]).unwrap(); // sgdt [rax]
    assert_eq!((m.get16(0x8100), m.get64(0x8102)), (0x1234, 0xffff_8000_1234_5678));
    m.put(0x8108, &[0x7f]);
    m.set(Reg::Rax, 0x8100);
    assert_eq!(m.fault(&[0x0f, 0x01, 0x18]), GP(0), "lidt of a base that is not canonical");
    let mut m = Machine::long(3);
    assert_eq!(m.fault(&[0x0f, 0x01, 0x10]), GP(0));
    m.set(Reg::Rax, 0x8000);
    m.run(&[0x0f, 0x01, 0x00]).unwrap();
    m.st.cr4 |= cr4::UMIP;
    for bytes in
        [&[0x0f, 0x01, 0x00][..], &[0x0f, 0x01, 0x08], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xc8], &[0x0f, 1, 0xe0]]
    {
        assert_eq!(m.fault(bytes), GP(0), "{bytes:x?}");
    }
    let mut m = Machine::real();
    m.put(0x8000, &[0xff, 0, 0x78, 0x56, 0x34, 0x12]);
    m.run(&[0x0f, 0x01, 0x16, 0, 0x80]).unwrap();
    assert_eq!(m.st.gdtr, TableReg { base: 0x34_5678, limit: 0xff }, "24 bits with a 16-bit operand size");
}

#[test]
fn control_register_rules() {
    let mut m = Machine::long(0);
    for (reg, value) in [
        (0, cr0::PG),                     // without PE
        (0, cr0::PE | cr0::PG | cr0::NW), // NW without CD
        (0, 1 << 32 | m.st.cr0),          // upper half
        (3, 1 << 46),                     // beyond MAXPHYADDR
        (3, 1 << 63),                     // no-flush without PCIDE
        (4, cr4::OSFXSR),                 // PAE off in long mode
        (4, cr4::PAE | 1 << 13),          // VMXE is not offered
        (4, cr4::PAE | 1 << 12),          // LA57 is not offered
        (8, 16),
    ] {
        m.set(Reg::Rax, value);
        let bytes = mov_to_cr(reg);
        assert_eq!(m.fault(&bytes), GP(0), "cr{reg} = {value:#x}");
    }
    for n in [1, 5, 6, 7, 9, 15] {
        assert_eq!(m.fault(&mov_to_cr(n)), Exception::InvalidOpcode, "cr{n}");
    }
    m.set(Reg::Rax, 0x5000);
    m.run(&mov_to_cr(3)).unwrap();
    m.set(Reg::Rax, m.st.cr4 | cr4::PGE);
    m.run(&mov_to_cr(4)).unwrap();
    assert_eq!(m.env.flushes, [TlbFlush::NonGlobal, TlbFlush::All]);
    assert_eq!(m.st.cr3, 0x5000);
    let mut m = Machine::long(3);
    assert_eq!(m.fault(&mov_to_cr(3)), GP(0));
    assert_eq!(m.fault(&[0x0f, 0x20, 0xc0]), GP(0));
    assert_eq!(m.fault(&[0x0f, 0x06]), GP(0)); // clts
}

fn mov_to_cr(n: u8) -> Vec<u8> {
    let mut bytes = if n >= 8 { vec![0x44] } else { vec![] };
    bytes.extend([0x0f, 0x22, 0xc0 | (n & 7) << 3]);
    bytes
}

#[test]
fn pcid_rules() {
    let mut m = Machine::long(0);
    let [_, _, ecx, _] = m.env.cpuid().query(&m.st, 1, 0);
    m.set(Reg::Rax, m.st.cr4 | cr4::PCIDE);
    if ecx & 1 << 17 == 0 {
        assert_eq!(m.fault(&mov_to_cr(4)), GP(0));
        return;
    }
    m.st.cr3 |= 1;
    assert_eq!(m.fault(&mov_to_cr(4)), GP(0), "PCID must be 0");
    m.st.cr3 &= !1;
    m.run(&mov_to_cr(4)).unwrap();
    m.env.flushes.clear();
    m.set(Reg::Rax, 1 << 63 | m.st.cr3 | 5);
    m.run(&mov_to_cr(3)).unwrap();
    assert_eq!((m.st.cr3 & 0xfff, m.st.cr3 >> 63), (5, 0));
    assert_eq!(m.env.flushes, [TlbFlush::SwitchPcid]);
}

#[test]
fn pae_pointers_are_checked_when_cr3_is_loaded() {
    let mut m = Machine::protected(0);
    m.st.cr4 = cr4::PAE;
    m.env.put64(0x8000, 0x9000 | 1 << 1 | 1);
    m.st.cr3 = 0x8000;
    m.set(Reg::Rax, cr0::PE | cr0::PG);
    assert_eq!(m.fault(&mov_to_cr(0)), GP(0));
    m.env.put64(0x8000, 0x9001);
    m.run(&mov_to_cr(0)).unwrap();
    assert!(!m.st.long_mode());
    assert_eq!(m.st.efer & efer::LMA, 0);
}

#[test]
fn debug_registers() {
    let mut m = Machine::long(0);
    m.set(Reg::Rax, 0x1234);
    m.run(&[0x0f, 0x23, 0xc0]).unwrap(); // mov dr0, rax
    m.set(Reg::Rax, 0);
    m.run(&[0x0f, 0x23, 0xf0]).unwrap(); // mov dr6, rax
    m.set(Reg::Rax, 0xffff_ffff);
    m.run(&[0x0f, 0x23, 0xe8]).unwrap(); // mov dr5 = dr7
    assert_eq!((m.st.dr[0], m.st.dr[6], m.st.dr[7]), (0x1234, 0xffff_0ff0, 0xffff_27ff));
    assert_eq!(m.fault(&[0x0f, 0x21, 0xc0]), Exception::Debug(1 << 13), "general detect");
    m.st.dr[7] = 0x400;
    m.set(Reg::Rax, 1 << 32);
    assert_eq!(m.fault(&[0x0f, 0x23, 0xf8]), GP(0));
    m.st.cr4 |= cr4::DE;
    assert_eq!(m.fault(&[0x0f, 0x23, 0xe8]), Exception::InvalidOpcode);
    assert_eq!(Machine::long(3).fault(&[0x0f, 0x21, 0xc0]), GP(0));
}

#[test]
fn interrupt_flag_and_iopl() {
    let mut m = Machine::long(3);
    assert_eq!((m.fault(&[0xfa]), m.fault(&[0xfb]), m.fault(&[0xf4])), (GP(0), GP(0), GP(0)));
    m.st.rflags |= rflags::IOPL;
    assert_eq!(m.run(&[0xfb]), Ok(Step::Resync));
    assert_eq!((m.st.irq_shadow, m.st.rflags & rflags::IF), (1, rflags::IF));
    m.st.irq_shadow = 0;
    m.run(&[0xfb]).unwrap();
    assert_eq!(m.st.irq_shadow, 0, "IF was set already");
    m.run(&[0xfa]).unwrap();
    assert_eq!(m.st.rflags & rflags::IF, 0);
    assert_eq!(Machine::v8086(2).fault(&[0xfa]), GP(0));
    let mut m = Machine::long(0);
    assert_eq!(m.run(&[0xf4]), Ok(Step::Halt));
    assert_eq!((m.st.halted, m.st.rip), (1, CODE + 1));
}

#[test]
fn popf_changes_what_the_level_may() {
    let all = 0x3f_ffff;
    let mut m = Machine::long(3);
    m.frame(8, &[all]);
    assert_eq!(m.run(&[0x9d]), Ok(Step::Resync));
    let user = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID | rflags::FIXED;
    assert_eq!(m.st.rflags, user);
    let mut m = Machine::long(0);
    m.frame(8, &[all]);
    m.run(&[0x9d]).unwrap();
    assert_eq!(m.st.rflags, user | rflags::IF | rflags::IOPL);
    m.frame(2, &[0]);
    m.set(Reg::Rsp, STACK);
    m.frame(2, &[0]);
    m.run(&[0x66, 0x9d]).unwrap();
    assert_eq!(m.st.rflags, rflags::AC | rflags::ID | rflags::FIXED);
    m.frame(8, &[rflags::AC | rflags::ID | rflags::ZF]);
    assert_eq!(m.run(&[0x9d]), Ok(Step::Next), "status flags alone need no new block");
    m.st.rflags |= rflags::RF;
    m.run(&[0x9c]).unwrap();
    assert_eq!(m.get64(m.gpr(Reg::Rsp)) & rflags::RF, 0);
    assert_eq!(Machine::v8086(2).fault(&[0x9c]), GP(0));
}

#[test]
fn port_access_by_iopl_and_bitmap() {
    let in_al_dx = [0xec];
    let in_eax_dx = [0xed];
    let mut m = Machine::long(3);
    m.set(Reg::Rdx, 0x3f8);
    m.put(TSS + 102, &[0x68, 0]);
    m.put(TSS + 0x68 + 0x7f, &[0xf0, 0xff]); // ports 0x3f8..=0x3fb allowed
    m.run(&in_al_dx).unwrap();
    m.run(&in_eax_dx).unwrap();
    m.set(Reg::Rdx, 0x3fa);
    m.run(&in_al_dx).unwrap();
    assert_eq!(m.fault(&in_eax_dx), GP(0));
    m.set(Reg::Rdx, 0xffff);
    assert_eq!(m.fault(&in_al_dx), GP(0), "beyond the TSS limit");
    m.st.rflags |= rflags::IOPL;
    m.run(&in_al_dx).unwrap();
    m.set(Reg::Rax, 0x1234_5678);
    m.run(&[0x66, 0xe7, 0x80]).unwrap(); // out 0x80, ax
    assert_eq!(m.env.bus.outs.lock().unwrap().last(), Some(&(0x80, vec![0x78, 0x56])));
    let mut m = Machine::v8086(3);
    m.st.tr.limit = 0x67;
    m.put(TSS + 102, &[0x68, 0]);
    m.set(Reg::Rdx, 0x80);
    assert_eq!(m.fault(&in_al_dx), GP(0), "IOPL does not count in virtual-8086 mode");
}

#[test]
fn descriptor_inspection() {
    let mut m = Machine::long(3);
    let lar = [0x0f, 0x02, 0xc1]; // lar eax, cx
    let lsl = [0x0f, 0x03, 0xc1];
    m.set(Reg::Rcx, UDATA.into());
    m.run(&lar).unwrap();
    // Bits 16-19 are undefined.
    assert_eq!((m.gpr(Reg::Rax) & !0xf_0000, m.st.rflags & rflags::ZF), (0xc0_f300, rflags::ZF));
    m.run(&lsl).unwrap();
    assert_eq!(m.gpr(Reg::Rax), 0xffff_ffff);
    for selector in [0, KDATA, 0x1f8] {
        m.set(Reg::Rcx, selector.into());
        m.set(Reg::Rax, 7);
        m.run(&lar).unwrap();
        assert_eq!((m.gpr(Reg::Rax), m.st.rflags & rflags::ZF), (7, 0), "{selector:#x}");
    }
    for (selector, verr, verw) in
        [(UDATA, true, true), (UCODE64, true, false), (CONFORMING, true, false), (KDATA, false, false)]
    {
        m.set(Reg::Rcx, selector.into());
        m.run(&[0x0f, 0x00, 0xe1]).unwrap();
        assert_eq!(m.st.rflags & rflags::ZF != 0, verr, "verr {selector:#x}");
        m.run(&[0x0f, 0x00, 0xe9]).unwrap();
        assert_eq!(m.st.rflags & rflags::ZF != 0, verw, "verw {selector:#x}");
    }
    let mut m = Machine::long(0);
    m.set(Reg::Rcx, TSS_SEL.into());
    m.run(&lsl).unwrap();
    assert_eq!(m.gpr(Reg::Rax), 0xfff);
    assert_eq!(Machine::real().fault(&[0x0f, 0x02, 0xc1]), Exception::InvalidOpcode);
}

#[test]
fn bases_and_swapgs() {
    let mut m = Machine::long(0);
    m.st.kernel_gs_base = 0xffff_8000_0000_0000;
    m.st.seg[Seg::Gs as usize].base = 0x1234;
    m.run(&[0x0f, 0x01, 0xf8]).unwrap();
    assert_eq!((m.st.kernel_gs_base, m.st.segment(Seg::Gs).base), (0x1234, 0xffff_8000_0000_0000));
    assert_eq!(m.fault(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), Exception::InvalidOpcode, "wrfsbase without FSGSBASE");
    m.st.cr4 |= cr4::FSGSBASE;
    m.set(Reg::Rax, 0x8000_0000_0000);
    assert_eq!(m.fault(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), GP(0));
    m.set(Reg::Rax, 0x7fff_1234_5678);
    m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]).unwrap();
    m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xc1]).unwrap(); // rdfsbase rcx
    assert_eq!(m.gpr(Reg::Rcx), 0x7fff_1234_5678);
    m.run(&[0xf3, 0x0f, 0xae, 0xd0]).unwrap(); // wrfsbase eax
    assert_eq!(m.st.segment(Seg::Fs).base, 0x1234_5678);
    assert_eq!(Machine::long(3).fault(&[0x0f, 0x01, 0xf8]), GP(0));
}

#[test]
fn invlpg_and_lmsw() {
    let mut m = Machine::long(0);
    m.set(Reg::Rax, 0x1234_5000);
    m.run(&[0x0f, 0x01, 0x38]).unwrap();
    m.set(Reg::Rax, 0x8000_0000_0000);
    m.run(&[0x0f, 0x01, 0x38]).unwrap();
    assert_eq!(m.env.flushes, [TlbFlush::Page(0x1234_5000)]);
    assert_eq!(Machine::long(3).fault(&[0x0f, 0x01, 0x38]), GP(0));
    let before = m.st.cr0;
    m.set(Reg::Rax, cr0::TS);
    m.run(&[0x0f, 0x01, 0xf0]).unwrap(); // lmsw ax
    assert_eq!(m.st.cr0, before & !(cr0::MP | cr0::EM) | cr0::TS | cr0::PE);
    m.run(&[0x0f, 0x06]).unwrap(); // clts
    assert_eq!(m.st.cr0 & cr0::TS, 0);
}

#[test]
fn far_pointer_loads() {
    let mut m = Machine::protected(0);
    m.set(Reg::Rax, 0x8000);
    m.put(0x8000, &[0x78, 0x56, 0x34, 0x12, KDATA as u8, 0]);
    m.run(&[0x0f, 0xb4, 0x08]).unwrap(); // lfs ecx, [eax]
    assert_eq!((m.gpr(Reg::Rcx), m.st.segment(Seg::Fs).selector), (0x1234_5678, KDATA));
    m.put(0x8004, &[0xf8, 1]);
    assert_eq!(m.fault(&[0x0f, 0xb4, 0x08]), GP(0x1f8));
}
