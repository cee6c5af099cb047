//! Indirect branches to addresses that are not canonical.
//!
//! Intel's CPUs raise #GP at the branch, before it has any effect, AMD's at its target. Translated code finds out late: the target's low bits lead to the door
//! of a block that has them in common, or to none, and then somebody must know which branch that was.

use super::guest::*;
use paravane_bt::Windows;
use paravane_cpu::Reg;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const GENERAL_PROTECTION: u64 = 13;

// Indirect branches that go where they should come first, so that they are what was noted last. Then RSI is where the branch is, RDI the
// stack pointer before it; the kernel goes on at RDX.
macro_rules! wild {
    ($($name:ident: $before:literal, $branch:literal;)+) => {
        $(guest!(
            $name,
            "lea rax, [rip + 9f]; call rax; lea rax, [rip + 4f]; jmp rax",
            "4: mov [r9], r8; mov r11, r8; lea rdx, [rip + 3f]; lea rsi, [rip + 2f]",
            $before,
            "mov rdi, rsp",
            $branch,
            "ud2",
            "3: lea rbx, [rip + 9f]; xor eax, eax; syscall",
            "9: ret",
        );)+
        /// All of them: name and code.
        fn branches() -> Vec<(&'static str, &'static [u8])> {
            vec![$((stringify!($name), $name::code())),+]
        }
    };
}
wild! {
    jump: "nop", "2: jmp r8";
    jump_spilled: "nop", "2: jmp r11";
    jump_memory: "nop", "2: jmp [r9]";
    call: "nop", "2: call r8";
    call_memory: "nop", "2: call [r9]";
    return_plain: "push r8", "2: ret";
    return_dropping: "push r8", "2: ret 16";
}

/// A guest whose kernel goes on at RDX when there was a fault.
fn guest(policy: Windows, base: u64, code: &[u8]) -> Guest {
    let g = Guest::new(policy, base, code);
    let ram = g.ram.clone();
    g.set_hook(move |e| {
        if let Event::Fault(f) = e {
            ram.put(Fault::RIP, f.rdx);
        }
    });
    g
}

/// The fault is raised where the host's vendor raises it, and the stack pointer is what it was.
#[test]
fn branches_to_addresses_that_are_not_canonical_fault_where_the_cpu_does() {
    let at_branch = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("GenuineIntel");
    for (policy, base) in [(Windows::Off, LOW), (Windows::Always, LOW), (Windows::Always, HIGH)] {
        for (name, code) in branches() {
            let mut g = guest(policy, base, code);
            let run = |g: &mut Guest, target: u64| {
                let gpr = g.run(&[(Reg::R8, target), (Reg::R9, base + DATA)]);
                let faults = g.faults();
                assert_eq!(faults.len(), 1, "{name} to {target:#x}: {faults:x?}");
                let f = &faults[0];
                assert_eq!((f.vector, f.error), (GENERAL_PROTECTION, 0), "{name} to {target:#x}");
                if at_branch {
                    assert_eq!((f.rip, f.rsp), (f.rsi, f.rdi), "{name} to {target:#x}");
                } else {
                    assert_eq!(f.rip, target, "{name} to {target:#x}");
                }
                gpr[Reg::Rbx as usize]
            };
            let good = run(&mut g, 0x1234_5678_9abc_def0);
            // With the low bits of a place that code goes to, and of others.
            for target in
                [good | 1 << 47, good | 1 << 63, good | 0xff << 47, 1 << 47, !(1 << 47), 0xffff_7fff_ffff_ffff]
            {
                run(&mut g, target);
            }
        }
    }
}

/// The same while somebody wants the vCPU all the time: the poll that a branch makes on its way must not take it to where it cannot go.
#[test]
fn kicks_do_not_move_the_fault() {
    if !std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("GenuineIntel") {
        eprintln!("skipped: this host's CPU raises the fault at the target");
        return;
    }
    let mut polls = 0;
    for (policy, base) in [(Windows::Off, LOW), (Windows::Always, HIGH)] {
        for (name, code) in branches() {
            let mut g = guest(policy, base, code);
            let (kick, done) = (g.vcpu.kick_handle(), AtomicBool::new(false));
            let done = &done;
            std::thread::scope(|s| {
                s.spawn(|| {
                    let mut pause = 0;
                    while !done.load(Ordering::Relaxed) {
                        kick.kick();
                        pause = (pause + 37) % 500;
                        (0..pause).for_each(|_| std::hint::spin_loop());
                    }
                });
                let _end = Ending(done);
                let began = Instant::now();
                while began.elapsed() < Duration::from_millis(30) {
                    g.run(&[(Reg::R8, 0x1234_5678_9abc_def0), (Reg::R9, base + DATA)]);
                    let faults = g.faults();
                    let seen: Vec<_> = faults.iter().map(|f| (f.vector, f.error, f.rip, f.rsp)).collect();
                    assert_eq!(seen, [(GENERAL_PROTECTION, 0, faults[0].rsi, faults[0].rdi)], "{name}");
                }
            });
            polls += g.counter("poll exits");
        }
    }
    assert!(polls > 0, "no kick came in between");
}

// Twenty-four functions, each of which calls the next one twice: tens of millions of calls and returns, and no way back.
guest!(
    tree,
    "mov rbx, [r9]; call 3f; xor eax, eax; syscall",
    "3: .rept 24; call 2f; call 2f; ret; 2:; .endr; inc rbx; ret",
);

#[test]
fn calls_forward_alone_keep_nobody_waiting() {
    for (policy, base) in [(Windows::Off, LOW), (Windows::Always, HIGH)] {
        let mut g = guest(policy, base, tree::code());
        let (kick, done) = (g.vcpu.kick_handle(), AtomicBool::new(false));
        let (done, mut kicks) = (&done, 0);
        std::thread::scope(|s| {
            let kicker = s.spawn(|| {
                let mut kicks = 0;
                while !done.load(Ordering::Relaxed) {
                    kick.kick();
                    kicks += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                kicks
            });
            let end = Ending(done);
            let before = g.ram.get(g.ram.gpa(base + DATA));
            let gpr = g.run(&[(Reg::R9, base + DATA)]);
            assert_eq!(gpr[Reg::Rbx as usize].wrapping_sub(before), 1 << 24);
            drop(end);
            kicks = kicker.join().unwrap();
        });
        // The first and the last may come while no code runs, and two may be seen by one poll.
        let polls = g.counter("poll exits");
        assert!(kicks > 8 && polls > kicks / 4, "{polls} of {kicks} kicks were seen");
    }
}

/// Ends the kicks, however the test ends.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
