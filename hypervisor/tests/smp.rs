//! Several vCPUs, on each engine that is here: start-up, interrupts between them, what they see of each other's stores, pauses.
#![allow(unsafe_code, missing_docs)] // Guest code is assembled into the test binary and copied out.

mod machine;

use machine::{ANSWER, CODE, Machine};
use paravane::devices::control::StopCause;
use paravane::engine::{EngineKind, IrqChip};
use paravane::pv::Offer;
use paravane::running::{Driven, RunningVcpu};
use paravane_cpu::{Reg, Seg, Segment};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// An engine, and where its local APICs are.
type Kind = (EngineKind, IrqChip);

/// A machine on each engine; says which is missing.
fn on_each(cpus: u32, code: &[u8], others: &[u8], handler: &[u8], mut f: impl FnMut(Kind, Machine)) {
    for kind in [(EngineKind::Bt, IrqChip::User), (EngineKind::Kvm, IrqChip::User), (EngineKind::Kvm, IrqChip::Split)] {
        match Machine::with_irqchip(kind.0, kind.1, cpus, code, others, handler, Offer::Off) {
            Ok(m) => f(kind, m),
            Err(e) => eprintln!("SKIPPED on {kind:?}: {e}"),
        }
    }
}

/// Lets all vCPUs go; gives them back when all have stopped, with a limit on the time.
fn go(m: Machine) -> Vec<RunningVcpu> {
    let all = std::iter::once(m.vcpu).chain(m.others).enumerate();
    all.map(|(n, v)| RunningVcpu::start(n as u32, v, m.chipset.clone()).unwrap()).collect()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Interrupts that each vCPU gets.
const ROUNDS: u64 = 25;

guest!(
    starter,
    // The local APIC on; INIT and twice a start-up message to all others.
    "mov dword ptr [r14 + 0xf0], 0x1ff",
    "mov dword ptr [r14 + 0x310], 0",
    "mov dword ptr [r14 + 0x300], 0xc4500",
    "mov dword ptr [r14 + 0x300], 0xc4608",
    "mov dword ptr [r14 + 0x300], 0xc4608",
    "2: pause",
    "cmp dword ptr [rsi], 2",
    "jb 2b",
    // An interrupt for vCPU 1, which passes it on, and so on round the circle: the handler does it.
    "mov dword ptr [r14 + 0x310], 0x1000000",
    "mov dword ptr [r14 + 0x300], 0x4040",
    "3: sti",
    "hlt",
    "cli",
    "cmp qword ptr [rsi + 0x40], 25",
    "jb 3b",
    // The others add up, too.
    "4: pause",
    "cmp dword ptr [rsi + 16], 2",
    "jb 4b",
    "mov eax, 3",
    "out 0xf4, al",
    "hlt",
);
guest!(
    started,
    "mov dword ptr [r14 + 0xf0], 0x1ff",
    "lock inc dword ptr [rsi]",
    "2: sti",
    "hlt",
    "cli",
    "cmp qword ptr [rsi + rbx * 8 + 0x40], 25",
    "jb 2b",
    // A sum that only locked instructions get right.
    "mov ecx, 2000",
    "3: lock inc qword ptr [rsi + 24]",
    "dec ecx",
    "jnz 3b",
    "lock inc dword ptr [rsi + 16]",
    "4: hlt",
    "jmp 4b",
);
guest!(
    pass_on,
    "push rax",
    "push rdx",
    "mov eax, [r14 + 0x20]",
    "shr eax, 24",
    "inc qword ptr [rsi + rax * 8 + 0x40]",
    "cmp qword ptr [rsi + rax * 8 + 0x40], 25",
    "ja 2f",
    // To the next of three.
    "inc eax",
    "xor edx, edx",
    "cmp eax, 3",
    "cmove eax, edx",
    "shl eax, 24",
    "mov [r14 + 0x310], eax",
    "mov dword ptr [r14 + 0x300], 0x4040",
    "2: mov dword ptr [r14 + 0xb0], 0",
    "pop rdx",
    "pop rax",
    "iretq",
);

/// Three vCPUs: two are started, an interrupt goes round, all halt in between.
#[test]
fn vcpus_start_and_interrupt_each_other() {
    on_each(3, starter(), started(), pass_on(), |kind, m| {
        let (mem, chipset) = (m.mem.clone(), m.chipset.clone());
        let running = go(m);
        wait_for("the end", || chipset.stop_cause().is_some());
        let all: Vec<_> = running.into_iter().map(|r| r.wait().unwrap()).collect();
        assert_eq!(chipset.stop_cause(), Some(StopCause::DebugExit(7)), "{kind:?}");
        let answer = |n: u64| mem.read_obj::<u64>(GuestAddress(ANSWER + n * 8)).unwrap();
        assert_eq!((answer(0), answer(2), answer(3)), (2, 2, 4000), "{kind:?}");
        for n in 0..3 {
            assert!((ROUNDS..=ROUNDS + 1).contains(&answer(8 + n)), "{kind:?}, vCPU {n}: {}", answer(8 + n));
            let halts = all[n as usize].0.counters().into_iter().find(|c| c.0 == "halts").unwrap().1;
            // The kernel's local APIC keeps halts to itself.
            assert!((halts > 0) == (kind.1 == IrqChip::User), "{kind:?}, vCPU {n}: {halts} halts");
        }
    });
}

guest!(
    restarter,
    "mov dword ptr [r14 + 0xf0], 0x1ff",
    "mov r15d, 1",
    // Again and again: INIT, a start-up message, until the other has counted this round.
    "2: mov dword ptr [r14 + 0x310], 0x1000000",
    "mov dword ptr [r14 + 0x300], 0x4500",
    "mov dword ptr [r14 + 0x300], 0x4608",
    "3: pause",
    "cmp [rsi], r15d",
    "jb 3b",
    "inc r15d",
    "cmp r15d, 10",
    "jbe 2b",
    "mov eax, 4",
    "out 0xf4, al",
    "hlt",
);
guest!(spins, "lock inc dword ptr [rsi]", "2: jmp 2b");

/// INIT stops a vCPU that makes no exits, and it starts anew.
#[test]
fn init_takes_a_running_vcpu_back() {
    on_each(2, restarter(), spins(), &[], |kind, m| {
        let (mem, chipset) = (m.mem.clone(), m.chipset.clone());
        let running = go(m);
        wait_for("the end", || chipset.stop_cause().is_some());
        running.into_iter().for_each(|r| drop(r.wait().unwrap()));
        assert_eq!(chipset.stop_cause(), Some(StopCause::DebugExit(9)), "{kind:?}");
        assert_eq!(mem.read_obj::<u32>(GuestAddress(ANSWER)).unwrap(), 10, "{kind:?}");
    });
}

// ---- litmus tests, in ring 3: there every KVM runs natively ----
//
// RDI and RSI point at a round's two variables, RBP at a word for what was read, RCX counts down; R10 and R11 point at this vCPU's round
// and at the other's.

macro_rules! litmus {
    ($name:ident, $($line:literal),+) => {
        guest!(
            $name,
            "3: mov [r10], rcx",
            "mov eax, 2000",
            "4: cmp [r11], rcx",
            "jbe 5f",
            "dec eax",
            "jnz 4b",
            "5:",
            $($line),+,
            "mov [rbp], al",
            "add rdi, 64",
            "add rsi, 64",
            "inc rbp",
            "dec rcx",
            "jnz 3b",
            "mov qword ptr [r10], 0",
            "6: jmp 6b",
        );
    };
}

litmus!(store_load, "mov dword ptr [rdi], 1", "mov eax, [rsi]");
litmus!(store_load_locked, "lock inc dword ptr [rdi]", "mov eax, [rsi]");
litmus!(send, "mov dword ptr [rdi], 1", "mov dword ptr [rsi], 1");
litmus!(receive, "mov eax, [rdi]", "shl eax, 1", "or eax, [rsi]");

const VARIABLES: [u64; 2] = [0x40_8000, 0x50_8000];
const SEEN: u64 = 0x60_0000;
const ROUNDS_OF_LITMUS: u64 = 8192;

/// Runs a round of litmus tests; gives what each vCPU saw. The second vCPU has the variables in the other order.
fn litmus(mut m: Machine) -> [Vec<u8>; 2] {
    let round = |n: u64| ANSWER + 64 * n;
    for entry in [0x1000, 0x2000, 0x40_0000, 0x40_0008, 0x40_0010, 0x40_0018] {
        let v: u64 = m.mem.read_obj(GuestAddress(entry)).unwrap();
        m.mem.write_obj(v | 4, GuestAddress(entry)).unwrap();
    }
    for n in 0..2 {
        m.mem.write_obj(u64::MAX, GuestAddress(round(n))).unwrap();
        let boot = m.vcpu.state_mut().clone();
        let vcpu = if n == 0 { &mut m.vcpu } else { &mut m.others[0] };
        let st = vcpu.state_mut();
        *st = paravane_cpu::CpuState { id: n as u32, ..boot };
        st.cpl = 3;
        st.seg = [Segment::flat_data(0x1b, 3); 6];
        st.seg[Seg::Cs as usize] = Segment::flat_code(0x23, 3, true);
        let mut set = |r: Reg, v: u64| st.gpr[r as usize] = v;
        let mine = n as usize;
        set(Reg::Rdi, VARIABLES[mine]);
        set(Reg::Rsi, VARIABLES[1 - mine]);
        set(Reg::Rbp, SEEN + n * ROUNDS_OF_LITMUS);
        set(Reg::Rcx, ROUNDS_OF_LITMUS);
        set(Reg::R10, round(n));
        set(Reg::R11, round(1 - n));
        if n == 1 {
            st.rip = machine::OTHERS + machine::enter().len() as u64;
        }
    }
    let (mem, chipset) = (m.mem.clone(), m.chipset.clone());
    let running = go(m);
    let at = |n| mem.read_obj::<u64>(GuestAddress(round(n))).unwrap();
    wait_for("the last round", || at(0) == 0 && at(1) == 0);
    chipset.stop(StopCause::Host);
    running.into_iter().for_each(|r| drop(r.wait().unwrap()));
    [0, 1].map(|n| {
        let mut seen = vec![0; ROUNDS_OF_LITMUS as usize];
        mem.read_slice(&mut seen, GuestAddress(SEEN + n * ROUNDS_OF_LITMUS)).unwrap();
        seen
    })
}

#[test]
fn locked_stores_are_seen_before_later_loads() {
    on_each(2, store_load_locked(), store_load_locked(), &[], |kind, m| {
        let [a, b] = litmus(m);
        assert!(a.iter().zip(&b).all(|r| r != (&0, &0)), "{kind:?}: both loads passed locked stores");
    });
    // Rounds do overlap, or the test above could not fail: x86-TSO lets plain stores wait.
    if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
        on_each(2, store_load(), store_load(), &[], |kind, m| {
            let [a, b] = litmus(m);
            let both = a.iter().zip(&b).filter(|&r| r == (&0, &0)).count();
            eprintln!("{kind:?}: {both} of {ROUNDS_OF_LITMUS} rounds with both stores waiting");
            assert!(a.contains(&0) && b.contains(&0), "{kind:?}: the rounds of the two never met");
        });
    }
}

#[test]
fn stores_arrive_in_order() {
    // The sender stores first to RDI and then to RSI; the receiver, whose registers are the other way round, reads the second one first.
    on_each(2, send(), receive(), &[], |kind, m| {
        let [_, seen] = litmus(m);
        assert!(seen.iter().all(|&v| v != 2), "{kind:?}: the second store was seen without the first");
        assert!(seen.contains(&3) || seen.contains(&0), "{kind:?}");
    });
}

guest!(spin, "2: jmp 2b");

/// A pause reaches all vCPUs, spinning, halted and waiting for their start, and they go on afterwards.
#[test]
fn a_pause_stops_all_vcpus() {
    on_each(3, spin(), &[], &[], |kind, mut m| {
        m.others[0].state_mut().halted = 1;
        let chipset = m.chipset.clone();
        let mut all: Vec<_> = std::iter::once(m.vcpu).chain(m.others).collect();
        for _ in 0..10 {
            let running: Vec<_> = all
                .drain(..)
                .enumerate()
                .map(|(n, v)| RunningVcpu::start(n as u32, v, chipset.clone()).unwrap())
                .collect();
            std::thread::sleep(Duration::from_millis(2));
            chipset.pause();
            for r in running {
                let (vcpu, how) = r.wait().unwrap();
                assert_eq!(how, Driven::Paused, "{kind:?}");
                all.push(vcpu);
            }
            chipset.resume();
        }
        let st = all[0].state_mut();
        assert!((CODE..CODE + 4).contains(&st.rip), "{kind:?}: {:#x}", st.rip);
        assert_eq!([all[1].state_mut().halted, all[2].state_mut().halted], [1, 2], "{kind:?}");
    });
}
