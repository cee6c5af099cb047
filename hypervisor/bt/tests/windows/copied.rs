//! Blocks copied to where the same code is mapped a second time: it must not be able to tell, and what was copied goes with its page.

use super::*;

/// A second place for the page of code at [`HIGH`]. Both are in every high window.
const SECOND: u64 = 0x7f12_3456_7000;

// Makes what it can from RIP: calls and returns, direct and indirect, a loop, a jump through a table of distances, loads and stores, a string
// instruction, runs of pushes and pops, and a load by R8. R13 is a sum of all.
guest!(
    wander,
    "lea r12, [rip]; xor r13d, r13d; mov r14d, 100",
    "2: call 5f; lea rax, [rip + 5f]; call rax; add r13, [rip + 8f]",
    "lea rbx, [rip + 7f]; mov eax, r14d; and eax, 1; movsxd rax, dword ptr [rbx + rax*4]; add rax, rbx; jmp rax",
    "3: add r13, 3; jmp 4f",
    "6: add r13, 1000",
    "4: push rbx; push rbp; push r12; push r15; pop r15; pop r12; pop rbp; pop rbx",
    "lea rsi, [rip + 8f]; mov rdi, r9; mov ecx, 16; rep movsb; add r13, [r9 + 8]; add r13, [r8]",
    "dec r14d; jnz 2b",
    "mov rbx, [rsp - 8]; xor eax, eax; syscall",
    "5: add r13, [rsp]; sub r13, r12; ret",
    ".balign 4; 7: .long 3b - 7b, 6b - 7b",
    ".balign 8; 8: .quad 0x1111, 0x2222",
);

fn registers() -> [(Reg, u64); 2] {
    [(Reg::R8, HIGH + DATA), (Reg::R9, HIGH + DATA + 0x100)]
}

fn guest(policy: Windows) -> Guest {
    let mut g = Guest::new(policy, HIGH, wander::code());
    g.map(SECOND, CODE_RAM);
    g
}

/// What user code and the kernel saw: registers, faults.
fn seen(g: &mut Guest, base: u64, more: &[(Reg, u64)]) -> ([u64; 16], Vec<Fault>) {
    let gpr = g.run_at(base, &[&registers()[..], more].concat());
    (gpr, g.faults())
}

#[test]
fn a_copy_does_what_a_translation_does() {
    for policy in [Windows::Off, Windows::Always] {
        let mut fresh = guest(policy);
        let want = seen(&mut fresh, SECOND, &[]);
        assert_eq!(fresh.counter("blocks copied from other addresses"), 0);
        drop(fresh);
        let mut g = guest(policy);
        let first = seen(&mut g, HIGH, &[]);
        let translated = g.counter("blocks translated");
        assert_eq!(seen(&mut g, SECOND, &[]), want);
        let copied = g.counter("blocks copied from other addresses");
        assert!(copied >= 5 && g.counter("blocks translated") < translated + copied / 2, "{copied} copied");
        // What links exits of the first one's blocks is its own.
        assert_eq!(seen(&mut g, HIGH, &[]), first);
        assert_eq!(seen(&mut g, SECOND, &[]), want);
        // 100 rounds: two calls, each of which adds how far it returns to from the beginning; and so on.
        let sum = |gpr: &[u64; 16]| gpr[Reg::R13 as usize];
        assert_eq!(sum(&want.0), sum(&first.0));
        assert!(sum(&want.0) > 100 * (0x1111 + 0x2222) + 50 * 1003, "{:#x}", sum(&want.0));
        assert_eq!(want.0[Reg::Rbx as usize] - SECOND, first.0[Reg::Rbx as usize] - HIGH, "what a call has left");
    }
}

/// A fault in a copy is at the copy's RIP.
#[test]
fn faults_in_copies_are_where_they_happen() {
    for policy in [Windows::Off, Windows::Always] {
        let faults = [HIGH, SECOND].map(|twice| {
            let mut g = guest(policy);
            let (ram, at) = (g.ram.clone(), HIGH + DATA);
            // The page is missing at first, each time.
            g.set_hook(move |e| {
                if matches!(e, Event::Fault(_)) {
                    ram.put(ram.entry(at, 12), DATA_RAM | PAGE);
                }
            });
            let mut all = Vec::new();
            for base in [HIGH, twice] {
                g.ram.put(g.ram.entry(at, 12), 0);
                g.vcpu.state_mut();
                all.push((base, seen(&mut g, base, &[]).1));
            }
            all
        });
        for (base, faults) in faults.concat() {
            let found: Vec<_> = faults.iter().map(|f| (f.vector, f.cr2)).collect();
            // REP MOVSB comes first.
            assert_eq!(found, [(PAGE_FAULT, HIGH + DATA + 0x100)], "{policy:?}");
            let code = wander::code();
            let at = (faults[0].rip - base) as usize;
            assert_eq!(&code[at..at + 2], [0xf3, 0xa4], "{policy:?}: at {at:#x}");
        }
    }
}

guest!(five, "mov ebx, 5; xor eax, eax; syscall");
guest!(six, "mov ebx, 6; xor eax, eax; syscall");

/// Code that was overwritten is not copied any more.
#[test]
fn what_was_overwritten_is_not_copied() {
    for policy in [Windows::Off, Windows::Always] {
        let mut g = Guest::new(policy, HIGH, five::code());
        g.map(SECOND, CODE_RAM);
        g.map(HIGH + ROOM, OTHER_RAM);
        // mov [r8], r9b; xor eax, eax; syscall
        g.ram.write(HIGH + ROOM, &[0x45, 0x88, 0x08, 0x31, 0xc0, 0x0f, 0x05]);
        assert_eq!(g.run_at(HIGH, &[])[Reg::Rbx as usize], 5);
        g.run_at(HIGH + ROOM, &[(Reg::R8, HIGH + 1), (Reg::R9, 6)]);
        assert_eq!(g.run_at(SECOND, &[])[Reg::Rbx as usize], 6);
        assert_eq!(g.ram.read(SECOND, six::code().len() as u64), six::code());
        assert_eq!(g.run_at(HIGH, &[])[Reg::Rbx as usize], 6);
        assert_eq!(g.counter("blocks copied from other addresses"), 1, "the second one's, back to the first");
    }
}
