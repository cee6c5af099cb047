//! A vCPU changes its engine, or only its process's idea of it, while the guest runs: paused between two instructions, saved, through
//! JSON, loaded into a fresh vCPU. The guest must not notice.
#![allow(unsafe_code, missing_docs, unreachable_pub)] // Guest code is assembled into the test binary and copied out.

mod guest;
mod hostile;
mod linux;

use guest::{BT, END, KVM, Kind, Machine, SPLIT};
use paravane::engine::Windows;
use paravane::running::{Driven, RunningVcpu};
use paravane_cpu::snapshot::{Activity, VcpuSnapshot};
use std::time::{Duration, Instant};

const ROUNDS: u64 = 12_000_000;

/// Whether an engine can be tried here; says so if not.
fn present(kind: Kind) -> bool {
    match Machine::compute(1, Windows::Off, false).vcpu(kind) {
        Ok(_) => true,
        Err(e) => {
            eprintln!("SKIPPED: {kind:?} is not available here: {e}");
            false
        }
    }
}

/// Whether all these engines hold a guest that uses AVX; says so if not, and the guest then does without.
fn hold_avx(engines: &[Kind]) -> bool {
    let m = Machine::compute(1, Windows::Off, true);
    engines.iter().all(|&kind| match m.vcpu(kind).unwrap().load(&m.start) {
        Ok(()) => true,
        Err(e) => {
            eprintln!("WITHOUT AVX: {kind:?} does not take a guest that uses it: {e}");
            false
        }
    })
}

/// Two states without what time does to them.
fn timeless(s: &VcpuSnapshot) -> VcpuSnapshot {
    let mut s = s.clone();
    s.tsc.value = 0;
    if let Some(l) = &mut s.lapic {
        l.timer_current = 0;
        l.irr[usize::from(guest::TIMER / 32)] &= !(1 << (guest::TIMER % 32));
    }
    s
}

/// Runs a machine to its end, handing the vCPU on from engine to engine every `every`, at most `most` times; gives the states on the way.
fn play(m: &Machine, engines: &[Kind], every: Duration, most: usize) -> Vec<VcpuSnapshot> {
    let began = Instant::now();
    let mut states: Vec<VcpuSnapshot> = Vec::new();
    let mut vcpu = m.vcpu(engines[0]).unwrap();
    vcpu.load(&m.start).unwrap();
    m.attach_apic();
    loop {
        assert!(began.elapsed() < Duration::from_secs(60), "the guest does not end");
        let running = RunningVcpu::start(0, vcpu, m.chipset.clone()).unwrap();
        if states.len() == most {
            let (_, how) = running.wait().unwrap();
            assert_eq!((how, m.chipset.stop_cause()), (Driven::Stopped, Some(END)));
            return states;
        }
        std::thread::sleep(every);
        let (mut old, how) = running.pause().unwrap();
        if how == Driven::Stopped {
            assert_eq!(m.chipset.stop_cause(), Some(END));
            return states;
        }
        m.detach_apic();
        let saved = old.save().unwrap();
        drop(old);
        let read = VcpuSnapshot::from_json(saved.to_json().as_bytes()).unwrap();
        assert_eq!(read, saved);
        states.push(saved);
        vcpu = m.vcpu(engines[states.len() % engines.len()]).unwrap();
        vcpu.load(&read).unwrap();
        // What was loaded is what is there, whatever engine it is.
        assert_eq!(timeless(&vcpu.save().unwrap()), timeless(&read));
        m.attach_apic();
    }
}

fn compute_across(engines: &[Kind], windows: Windows) {
    if !engines.iter().all(|&k| present(k)) {
        return;
    }
    let avx = hold_avx(engines);
    let reference = Machine::compute(ROUNDS, windows, avx);
    play(&reference, &[BT], Duration::ZERO, 0);
    let expected = reference.answer();
    assert_eq!(expected[48..56], ROUNDS.to_le_bytes(), "the x87 sum");

    let m = Machine::compute(ROUNDS, windows, avx);
    // KVM is done within some 40 ms.
    let every = if engines.iter().all(|&k| k == BT) { 10 } else { 2 };
    let states = play(&m, engines, Duration::from_millis(every), usize::MAX);
    assert!(states.len() >= 4, "only {} hand-overs, the guest is too quick", states.len());
    let moved = states.windows(2).filter(|w| w[0].gpr[15] != w[1].gpr[15]).count();
    assert!(moved >= 3, "the guest stood still");
    assert!(m.answer() == expected, "an answer changed on the way");
}

#[test]
fn bt_to_bt() {
    compute_across(&[BT], Windows::Off);
}

#[test]
fn bt_to_bt_with_windows() {
    compute_across(&[BT], Windows::Always);
}

#[test]
fn bt_to_kvm_and_back() {
    compute_across(&[BT, KVM], Windows::Off);
}

#[test]
fn kvm_to_bt_and_back() {
    compute_across(&[KVM, BT], Windows::Always);
}

#[test]
fn kvm_to_kvm() {
    compute_across(&[KVM], Windows::Off);
}

/// The same vCPU goes on from states that were saved in it before: what it derived from later ones must not show.
#[test]
fn back_to_an_earlier_state() {
    let m = Machine::compute(ROUNDS, Windows::Always, true);
    let memory = |m: &Machine| m.answer();
    let mut vcpu = m.vcpu(BT).unwrap();
    vcpu.load(&m.start).unwrap();
    let fresh = memory(&m);
    let running = RunningVcpu::start(0, vcpu, m.chipset.clone()).unwrap();
    // A busy machine may let it wait.
    let began = Instant::now();
    let changed = |m: &Machine| memory(m).iter().zip(&fresh).filter(|(a, b)| a != b).count();
    while changed(&m) < 10_000 && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (mut vcpu, how) = running.pause().unwrap();
    assert_eq!(how, Driven::Paused);
    assert!(vcpu.save().unwrap().gpr[15] < ROUNDS, "it has run");
    assert!(memory(&m) != fresh);
    // Back to the start, memory too.
    for at in (96..fresh.len()).step_by(8) {
        use vm_memory::{Bytes, GuestAddress};
        m.mem.write_slice(&fresh[at..at + 8], GuestAddress(0x40_0000 + at as u64 - 96)).unwrap();
    }
    vcpu.load(&m.start).unwrap();
    let (_, how) = RunningVcpu::start(0, vcpu, m.chipset.clone()).unwrap().wait().unwrap();
    assert_eq!((how, m.chipset.stop_cause()), (Driven::Stopped, Some(END)));

    let reference = Machine::compute(ROUNDS, Windows::Off, true);
    play(&reference, &[BT], Duration::ZERO, 0);
    assert!(m.answer() == reference.answer(), "an answer changed on the way");
}

/// Timer interrupts and HLT: no tick that was due gets lost, and the vCPU does not sleep on.
fn ticks_across(engines: &[Kind]) {
    if !engines.iter().all(|&k| present(k)) {
        return;
    }
    const COUNT: u64 = 300;
    let m = Machine::ticks(COUNT, 200_000);
    let states = play(&m, engines, Duration::from_micros(1500), usize::MAX);
    // Two ticks may come before the guest looks.
    assert!((COUNT..COUNT + 5).contains(&m.count()), "{} ticks", m.count());
    assert!(states.len() >= 10, "only {} hand-overs", states.len());
    assert!(states.iter().any(|s| s.activity == Activity::Halted), "it was never caught halted");
}

#[test]
fn ticks_on_bt() {
    ticks_across(&[BT]);
}

#[test]
fn ticks_across_engines() {
    ticks_across(&[BT, KVM]);
}

/// The local APIC changes between the chipset and the kernel, with its timer running and interrupts pending.
#[test]
fn ticks_across_local_apics() {
    ticks_across(&[SPLIT]);
    ticks_across(&[BT, SPLIT]);
    ticks_across(&[SPLIT, KVM]);
}

#[test]
fn compute_with_the_local_apic_in_the_kernel() {
    compute_across(&[SPLIT, BT], Windows::Off);
}

#[test]
fn a_state_of_another_vcpu_is_refused() {
    let m = Machine::compute(1000, Windows::Off, true);
    let mut vcpu = m.vcpu(BT).unwrap();
    vcpu.load(&m.start).unwrap();
    let before = vcpu.save().unwrap();
    let mut other = m.start.clone();
    other.id = 1;
    let mut broken = m.start.clone();
    broken.control.cr4 |= 1 << 12;
    for s in [other, broken] {
        let e = vcpu.load(&s).unwrap_err().to_string();
        assert!(e.starts_with("the vCPU state is not valid: "), "{e}");
        assert_eq!(timeless(&vcpu.save().unwrap()), timeless(&before), "the vCPU is as it was");
    }
}
