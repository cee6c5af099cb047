use super::*;
use paravane_cpu::state::{cr4, efer};

/// A state with something else in every register.
fn busy() -> CpuState {
    let mut st = CpuState::reset(0);
    for n in 0..16 {
        st.gpr[n] = 0x0101_0101_0101_0101 * (n as u64 + 1);
    }
    (st.rip, st.rflags) = (0xffff_8000_1234_5678, rflags::FIXED | rflags::IF | rflags::CF);
    (st.cr0, st.cr2, st.cr3, st.cr4) = (0x8005_0033, 0x7fff_0000_1000, 0x1000, cr4::PAE | cr4::PGE);
    st.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    st.cpl = 3;
    st.seg = [Segment::flat_data(0x2b, 3); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(0x33, 3, true);
    // Null in 64-bit mode, with a base all the same.
    st.seg[Seg::Fs as usize] = Segment { base: 0x7f00_dead_b000, limit: 0, attr: 0, selector: 0 };
    st.ldtr = Segment::default();
    st.tr = Segment { base: 0xffff_fe00_0000_3000, limit: 0x206f, attr: 0x8b, selector: 0x40 };
    st.gdtr = TableReg { base: 0xffff_fe00_0000_1000, limit: 0x7f };
    st.idtr = TableReg { base: 0xffff_fe00_0000_0000, limit: 0xfff };
    st
}

type System<'a> = (&'a [Segment; 6], Segment, Segment, TableReg, TableReg, [u64; 5], u8);

fn system(st: &CpuState) -> System<'_> {
    (&st.seg, st.ldtr, st.tr, st.gdtr, st.idtr, [st.cr0, st.cr2, st.cr3, st.cr4, st.efer], st.cpl)
}

fn through_kvm(st: &CpuState) -> CpuState {
    let mut back = CpuState::reset(st.id);
    take_regs(&mut back, regs_of(st));
    take_sregs(&mut back, &sregs_of(st, APIC_BASE));
    back
}

#[test]
fn registers_survive_the_way_there_and_back() {
    let st = busy();
    let back = through_kvm(&st);
    assert_eq!((back.gpr, back.rip, back.rflags), (st.gpr, st.rip, st.rflags));
    assert_eq!(system(&back), system(&st));
    let r = regs_of(&st);
    assert_eq!((r.rax, r.rcx, r.rsp, r.r15), (st.gpr[0], st.gpr[1], st.gpr[4], st.gpr[15]));
}

#[test]
fn privilege_is_that_of_the_stack_segment() {
    // Ring 0 of 64-bit mode may run with a null SS, which has no level of its own.
    let mut st = busy();
    st.cpl = 0;
    st.seg[Seg::Cs as usize] = Segment::flat_code(8, 0, true);
    st.seg[Seg::Ss as usize] = Segment::default();
    assert_eq!(system(&through_kvm(&st)), system(&st));
    st.cpl = 2;
    assert_eq!(through_kvm(&st).cpl, 2);
    // Real mode is ring 0 whatever is in the descriptors, virtual-8086 mode ring 3.
    let real = CpuState::reset(0);
    assert_eq!(system(&through_kvm(&real)), system(&real));
    let mut v86 = CpuState::reset(0);
    v86.cr0 |= cr0::PE;
    v86.rflags |= rflags::VM;
    v86.cpl = 3;
    v86.seg = [Segment { base: 0x12340, limit: 0xffff, attr: 0xf3, selector: 0x1234 }; 6];
    assert_eq!(system(&through_kvm(&v86)), system(&v86));
    v86.seg = [Segment::real(0x1234); 6];
    assert!([Seg::Cs, Seg::Ss, Seg::Gs].map(|s| through_kvm(&v86).segment(s).dpl()) == [3; 3], "as VT-x wants it");
}

#[test]
fn what_the_hardware_insists_on() {
    let mut st = busy();
    st.seg[Seg::Ds as usize].attr &= !1; // a descriptor that nobody marked accessed
    st.tr = Segment::default();
    let k = sregs_of(&st, APIC_BASE);
    assert_eq!((k.ds.type_ & 1, k.tr.type_, k.tr.unusable, k.tr.limit), (1, 11, 0, 0xffff));
    assert_eq!((k.fs.unusable, k.fs.base), (1, 0x7f00_dead_b000));
}

#[test]
fn events_have_one_meaning_in_both_forms() {
    for injection in [
        None,
        Some(Injection::Nmi {}),
        Some(Injection::Interrupt { vector: 0xef }),
        Some(Injection::Exception { vector: 14, error_code: Some(7) }),
        Some(Injection::Exception { vector: 0, error_code: None }),
    ] {
        assert_eq!(super::injection(&pending(injection)), injection);
    }
    // INT n is executed again.
    let mut soft = pending(Some(Injection::Interrupt { vector: 0x80 }));
    soft.interrupt.soft = 1;
    assert_eq!(super::injection(&soft), None);

    let mut st = busy();
    let nothing = pending(None);
    (st.irq_shadow, st.nmi_blocked) = (1, 1);
    let sti = events_of(&st, &nothing);
    st.rflags &= !rflags::IF;
    let mov_ss = events_of(&st, &nothing);
    assert_eq!((sti.interrupt.shadow, mov_ss.interrupt.shadow, sti.nmi.masked), (2, 1, 1));
    let mut back = CpuState::reset(0);
    take_events(&mut back, &mov_ss);
    assert_eq!((back.irq_shadow, back.nmi_blocked), (1, 1));
}

#[test]
fn extended_state_is_copied_byte_for_byte() {
    let mut st = busy();
    for (n, b) in st.xsave.0.iter_mut().enumerate() {
        *b = (n % 251) as u8;
    }
    let mut back = CpuState::reset(0);
    take_xsave(&mut back, &xsave_of(&st));
    assert!(back.xsave.0[..464] == st.xsave.0[..464] && back.xsave.0[512..] == st.xsave.0[512..]);
    assert!(back.xsave.0[464..512].iter().all(|&b| b == 0), "software's own bytes are no state");
}

#[test]
fn each_msr_has_a_place_of_its_own() {
    let mut st = busy();
    let all = MsrMap::all();
    for (n, (_, slot)) in all.iter().enumerate() {
        *slot(&mut st) = n as u64 + 1000;
    }
    for (n, (msr, slot)) in all.iter().enumerate() {
        assert_eq!(*slot(&mut st), n as u64 + 1000, "{msr:#x} shares its place");
        assert!(all[..n].iter().all(|(m, _)| m != msr), "{msr:#x} is there twice");
    }
    assert_eq!((st.mtrr_fixed[10], st.mtrr_var[7].1), (1000 + 24, 1000 + all.len() as u64 - 1));
}
