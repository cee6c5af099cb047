use super::*;
use crate::cpuid::CpuidConfig;
use crate::host_fpu;
use crate::state::{cr0, cr4, efer, rflags};

/// SplitMix64: the same states in every run.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }

    fn chance(&mut self) -> bool {
        self.below(2) == 0
    }

    fn address(&mut self) -> u64 {
        ((self.word() << 16) as i64 >> 16) as u64
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.word() as u8)
    }
}

fn policy() -> CpuidPolicy {
    CpuidPolicy::host(&CpuidConfig { cpus: 1, tsc_khz: 2_000_000, apic_hz: 1_000_000_000 })
}

fn lapic(id: u32) -> LapicState {
    LapicState {
        id,
        base: 0xfee0_0800 | if id == 0 { 1 << 8 } else { 0 },
        tpr: 0,
        ldr: 0,
        dfr: u32::MAX,
        svr: 0x1ff,
        isr: [0; 8],
        tmr: [0; 8],
        irr: [0; 8],
        esr: 0,
        esr_pending: 0,
        icr: 0,
        lvt: [1 << 16; 7],
        timer_initial: 0,
        timer_divide: 0,
        timer_current: 0,
        tsc_deadline: 0,
        nmi: false,
        init: false,
        sipi: None,
    }
}

/// A vCPU in 64-bit mode in ring 3.
fn long_mode() -> VcpuSnapshot {
    let mut st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    st.cr3 = 0x1000;
    st.efer = efer::LME | efer::LMA | efer::SCE;
    st.seg = [Segment::flat_data(0x2b, 3); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(0x33, 3, true);
    st.cpl = 3;
    st.rip = 0x40_1000;
    st.rflags |= rflags::IF;
    let mut s = VcpuSnapshot::capture(&st, 1_000);
    s.lapic = Some(lapic(0));
    s
}

/// Some valid state, as far from the initial one as possible.
fn random(r: &mut Random) -> VcpuSnapshot {
    let mut s = long_mode();
    s.gpr = std::array::from_fn(|_| r.word());
    s.rip = r.address();
    s.rflags |= r.word() & (rflags::STATUS | rflags::DF | rflags::TF | rflags::AC | rflags::ID | rflags::IOPL);
    if r.chance() {
        // Compatibility mode.
        s.segments.cs = Segment::flat_code(0x23, 3, false);
        s.rip &= 0xffff_ffff;
    }
    s.segments.cs.attr &= !0xf00;
    for data in [&mut s.segments.es, &mut s.segments.ds, &mut s.segments.fs, &mut s.segments.gs] {
        if r.chance() {
            *data = Segment { attr: 0, selector: r.below(4) as u16, ..Segment::default() };
        }
    }
    (s.segments.fs.base, s.segments.gs.base) = (r.address(), r.address());
    s.segments.gdtr = TableReg { base: r.address(), limit: r.word() as u16 };
    s.segments.tr = Segment { base: r.address(), limit: 0x67, attr: 0x8b, selector: 0x40 };
    s.control.cr2 = r.word();
    s.control.cr3 = r.word() & ((1 << 46) - 1);
    s.control.xcr0 = host_fpu::offered_xcr0();
    s.debug.address = std::array::from_fn(|_| r.word());
    s.debug.dr7 = (r.word() & 0xffff_03ff) | 0x400;
    let m = &mut s.msrs;
    (m.star, m.lstar, m.cstar, m.kernel_gs_base) = (r.word(), r.address(), r.address(), r.address());
    (m.sfmask, m.tsc_aux) = (r.word() >> 32, r.word() >> 32);
    m.mtrr_fixed = [0x0606_0504_0100_0606; 11];
    s.tsc = Tsc { offset: r.word(), adjust: r.word(), value: r.word() };
    let f = &mut s.fpu;
    f.in_use = r.word() & host_fpu::offered_xcr0();
    (f.fsw, f.ftw, f.fop, f.fip, f.fdp) =
        (r.word() as u16, r.word() as u8, r.word() as u16 & 0x7ff, r.word(), r.word());
    f.mxcsr = r.word() as u32 & 0xffff;
    f.st = std::array::from_fn(|_| Hex(r.bytes()));
    f.zmm = std::array::from_fn(|_| Hex(r.bytes()));
    f.opmask = std::array::from_fn(|_| r.word());
    s.fpu = s.fpu.canonical();
    s.activity = if r.chance() { Activity::Halted } else { Activity::Running };
    s.events.nmi_blocked = r.chance();
    if s.activity == Activity::Running {
        s.events.injection = match r.below(4) {
            0 => Some(Injection::Exception { vector: 14, error_code: Some(r.below(32) as u32) }),
            1 => Some(Injection::Interrupt { vector: r.word() as u8 }),
            2 if s.events.nmi_blocked => Some(Injection::Nmi {}),
            _ => None,
        };
    }
    let mut l = lapic(0);
    l.tpr = r.below(256) as u32;
    l.irr = std::array::from_fn(|n| r.word() as u32 & if n == 0 { 0xffff_0000 } else { u32::MAX });
    l.icr = r.word();
    if r.chance() {
        l.lvt[1] = 0x4_00ef;
        l.tsc_deadline = r.word();
    } else {
        l.lvt[1] = 0x2_00ef;
        l.timer_initial = r.word() as u32;
        l.timer_current = l.timer_initial / 3;
    }
    (l.nmi, l.sipi) = (r.chance(), r.chance().then(|| r.word() as u8));
    s.lapic = Some(l);
    s
}

#[test]
fn states_survive_json_and_the_vcpu() {
    let cpuid = policy();
    let mut r = Random(1);
    for round in 0..500 {
        let s = random(&mut r);
        assert_eq!(s.validate(&cpuid), Ok(()), "round {round}");
        let read = VcpuSnapshot::from_json(s.to_json().as_bytes()).unwrap();
        assert_eq!(read, s, "round {round}");
        let st = read.restore(&cpuid).unwrap();
        let host_tsc = s.tsc.value.wrapping_sub(s.tsc.offset);
        let mut again = VcpuSnapshot::capture(&st, host_tsc);
        // These live beside CpuState.
        again.lapic = s.lapic.clone();
        again.events.injection = s.events.injection;
        assert_eq!(again, s, "round {round}");
    }
}

#[test]
fn the_reset_state_is_valid() {
    for id in [0, 3] {
        let s = VcpuSnapshot::capture(&CpuState::reset(id), 0);
        assert_eq!(s.validate(&policy()), Ok(()));
    }
}

/// What is not in use is written down as the initial configuration, whatever the image's bytes were.
#[test]
fn stale_image_bytes_do_not_show() {
    let mut st = CpuState::reset(0);
    st.xsave.0[32..512].fill(0x5a);
    st.xsave.0[512] = 0;
    let s = VcpuSnapshot::capture(&st, 0);
    assert_eq!(s.fpu, FpuState::initial());
    st.xsave.0[512] = 1;
    let s = VcpuSnapshot::capture(&st, 0);
    assert_eq!(s.fpu.st[7], Hex([0x5a; 10]));
    assert_eq!(s.fpu.zmm[0], Hex([0; 64]));
    assert_eq!(s.validate(&policy()), Ok(()));
}

/// Each of these no CPU can be in; the message names what is wrong.
#[test]
fn impossible_states_are_refused() {
    type Break = fn(&mut VcpuSnapshot);
    let cases: &[(&str, Break)] = &[
        ("RIP holds", |s| s.rip = 0x8000_0000_0000),
        ("CR0 has the reserved", |s| s.control.cr0 |= 1 << 40),
        ("CR0 has paging", |s| s.control.cr0 &= !cr0::PE),
        ("CR0 has NW", |s| s.control.cr0 |= cr0::NW),
        ("CR0 lacks ET", |s| s.control.cr0 &= !cr0::ET),
        ("CR4 has the reserved", |s| s.control.cr4 |= 1 << 13),
        ("CR4 has the reserved", |s| s.control.cr4 |= 1 << 22),
        ("without CR4.PAE", |s| s.control.cr4 &= !cr4::PAE),
        ("EFER has the reserved", |s| s.control.efer |= 1 << 12),
        ("EFER.LMA", |s| s.control.efer &= !efer::LMA),
        ("EFER.LMA", |s| s.control.cr0 &= !cr0::PG),
        ("CR3 has the reserved", |s| s.control.cr3 |= 1 << 63),
        ("XCR0", |s| s.control.xcr0 = 0),
        ("XCR0", |s| s.control.xcr0 = 5),
        ("XCR0 has the reserved", |s| s.control.xcr0 |= 1 << 17),
        ("RFLAGS has the reserved", |s| s.rflags |= 1 << 3),
        ("RFLAGS lacks", |s| s.rflags &= !2),
        ("RFLAGS.VM", |s| s.rflags |= rflags::VM),
        ("privilege level", |s| s.cpl = 0),
        ("privilege level", |s| s.cpl = 200),
        ("CS is not usable", |s| s.segments.cs.attr = 0),
        ("64-bit and a 32-bit", |s| s.segments.cs.attr |= Segment::DB),
        ("CS is of a type", |s| s.segments.cs.attr &= !Segment::S),
        ("SS is of a type", |s| s.segments.ss.attr |= 8),
        ("granularity", |s| s.segments.ds.limit = 5),
        ("above 4 GiB", |s| s.segments.es.base = 1 << 33),
        ("FS holds", |s| s.segments.fs.base = 1 << 62),
        ("GDTR holds", |s| s.segments.gdtr.base = 1 << 50),
        ("TR is of a type", |s| s.segments.tr.attr = 0x93),
        ("not in canonical form", |s| s.segments.gs.attr = 0x13),
        ("IA32_LSTAR holds", |s| s.msrs.lstar = 1 << 47),
        ("IA32_PAT", |s| s.msrs.pat = 2),
        ("fixed-range", |s| s.msrs.mtrr_fixed[3] = 7),
        ("variable-range", |s| s.msrs.mtrr_var[7].1 = 1),
        ("IA32_MISC_ENABLE", |s| s.msrs.misc_enable |= 1 << 18),
        ("DR6", |s| s.debug.dr6 = 0),
        ("DR7", |s| s.debug.dr7 |= 1 << 32),
        ("MXCSR", |s| s.fpu.mxcsr |= 1 << 16),
        ("extended state in use", |s| s.fpu.in_use |= 1 << 9),
        ("not in use has contents", |s| {
            s.fpu.in_use = 0;
            s.fpu.zmm[3].0[20] = 1;
        }),
        ("does not raise", |s| s.events.injection = Some(Injection::Exception { vector: 9, error_code: None })),
        ("error code", |s| s.events.injection = Some(Injection::Exception { vector: 13, error_code: None })),
        ("error code", |s| s.events.injection = Some(Injection::Exception { vector: 6, error_code: Some(0) })),
        ("NMIs are not blocked", |s| s.events.injection = Some(Injection::Nmi {})),
        ("does not run", |s| {
            s.activity = Activity::Halted;
            s.events.injection = Some(Injection::Interrupt { vector: 32 });
        }),
        ("bootstrap processor waits", |s| s.activity = Activity::WaitForSipi),
        ("APIC's ID", |s| s.lapic.as_mut().unwrap().id = 1),
        ("APIC's base", |s| s.lapic.as_mut().unwrap().base = 1 << 10 | 1 << 8),
        ("bootstrap processor", |s| s.lapic.as_mut().unwrap().base &= !(1 << 8)),
        ("APIC's vectors", |s| s.lapic.as_mut().unwrap().irr[0] = 1),
        ("APIC's timer", |s| s.lapic.as_mut().unwrap().timer_current = 1),
        ("APIC's timer", |s| s.lapic.as_mut().unwrap().tsc_deadline = 1),
        ("vector table", |s| s.lapic.as_mut().unwrap().lvt[3] |= 1 << 20),
        ("not masked", |s| {
            let l = s.lapic.as_mut().unwrap();
            (l.svr, l.lvt[2]) = (0xff, 0x40);
        }),
    ];
    let cpuid = policy();
    for (message, damage) in cases {
        let mut s = long_mode();
        s.segments.cs.attr &= !0xf00;
        damage(&mut s);
        let Err(e) = s.restore(&cpuid) else { panic!("accepted: {message}") };
        let text = e.to_string();
        assert!(text.contains(message), "expected \"{message}\", got \"{text}\"");
        assert!(!text.contains('\n') && !text.ends_with('.'), "{text}");
    }
}

#[test]
fn other_versions_and_other_files_are_refused() {
    let text = long_mode().to_json();
    let newer = text.replacen("\"version\":1", "\"version\":2,\"colour\":\"red\"", 1);
    assert_eq!(VcpuSnapshot::from_json(newer.as_bytes()), Err(StateError::Version(2)));
    for bad in ["", "{}", "[1]", "{\"version\":1}", "{\"version\":-1}", "\u{fffd}", "{\"version\":1,\"version\":1}"] {
        assert!(matches!(VcpuSnapshot::from_json(bad.as_bytes()), Err(StateError::Format(_))), "{bad}");
    }
    let unknown = text.replacen("\"id\"", "\"idd\"", 1);
    assert!(VcpuSnapshot::from_json(unknown.as_bytes()).is_err());
    let too_long = text.replacen("\"st\":[\"", "\"st\":[\"000000000000000000000000", 1);
    assert!(VcpuSnapshot::from_json(too_long.as_bytes()).is_err());
}

/// Random damage to valid files: an error or a state that passes every check again, never a panic.
#[test]
fn damaged_files_are_errors_or_valid_states() {
    let cpuid = policy();
    let mut r = Random(7);
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..4000 {
        let mut text = random(&mut r).to_json().into_bytes();
        for _ in 0..=r.below(3) {
            let at = r.below(text.len() as u64) as usize;
            match r.below(3) {
                0 => text[at] = b"0123456789\"{}[],:-.e"[r.below(20) as usize],
                1 => text[at] ^= 1 << r.below(8),
                _ => text.truncate(at),
            }
            if text.is_empty() {
                break;
            }
        }
        match VcpuSnapshot::from_json(&text).and_then(|s| Ok((s.restore(&cpuid)?, s))) {
            Err(e) => {
                assert!(!e.to_string().contains('\n'), "{e}");
                refused += 1;
            }
            Ok((st, s)) => {
                let again = VcpuSnapshot::capture(&st, 0);
                assert_eq!((again.fpu, again.segments, again.msrs), (s.fpu, s.segments, s.msrs));
                taken += 1;
            }
        }
    }
    assert!(refused > 1000 && taken > 100, "{refused} refused, {taken} taken");
}

#[test]
fn lapic_pages_keep_everything_that_they_have_room_for() {
    let mut r = Random(3);
    for _ in 0..200 {
        let mut l = random(&mut r).lapic.unwrap();
        (l.nmi, l.sipi) = (false, None);
        l.icr &= !(1 << 12);
        assert_eq!(LapicState::from_page(&l.to_page(), l.id, l.base, l.tsc_deadline), l);
    }
}
