//! The `windows` memory policy: user code that reaches memory through host mappings must not be able to tell.
//!
//! Every test runs user code in a small guest ([`guest`]). Whatever user code can see is checked for both policies, so the
//! soft TLB is the yardstick. A process has one pair of windows. nextest runs each test in a process of its own; under
//! `cargo test` they take turns ([`guest::TURN`]). On a host without FSGSBASE there are no windows, and both policies are the
//! same.
#![allow(unsafe_code, missing_docs)] // Guest code is assembled into the test binary and copied out.

/// A module with guest code, assembled into this binary.
macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        mod $name {
            use std::arch::global_asm;
            global_asm!(
                concat!(".balign 16\n.globl windows_", stringify!($name), "\nwindows_", stringify!($name), ":"),
                $($line),+,
                concat!(".globl windows_end_", stringify!($name), "\nwindows_end_", stringify!($name), ":"),
            );
            pub(crate) fn code() -> &'static [u8] {
                unsafe extern "C" {
                    #[link_name = concat!("windows_", stringify!($name))]
                    static START: u8;
                    #[link_name = concat!("windows_end_", stringify!($name))]
                    static END: u8;
                }
                // SAFETY: the two symbols delimit bytes assembled right above.
                unsafe {
                    let (a, b) = (&raw const START, &raw const END);
                    std::slice::from_raw_parts(a, b as usize - a as usize)
                }
            }
        }
    };
}

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod copied;
mod drift;
mod guest;
mod kernel;
mod mapped;
mod rounds;
mod shadow;
mod strings;
mod wild;

use guest::*;
use paravane_bt::Windows;
use paravane_cpu::Reg;
use paravane_cpu::state::cr4;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress};

/// A near jump from one address to another.
fn jump(from: u64, to: u64) -> Vec<u8> {
    let distance = i32::try_from(to.wrapping_sub(from + 5) as i64).unwrap();
    [&[0xe9][..], &distance.to_le_bytes()].concat()
}

/// `mov ebx, n`, then the rest.
fn numbered(n: u8, rest: &[u8]) -> Vec<u8> {
    [&[0xbb, n, 0, 0, 0][..], rest].concat()
}

guest!(load, "mov rbx, [r8]; xor eax, eax; syscall");

/// Whoever replaces the vCPU's state may have changed page tables too: nothing stays mapped on trust.
#[test]
fn state_mut_makes_mappings_suspect() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, load::code());
        g.ram.put(DATA_RAM, 0x11);
        g.ram.put(OTHER_RAM, 0x22);
        let registers = [(Reg::R8, base + DATA)];
        assert_eq!(g.run(&registers)[Reg::Rbx as usize], 0x11);
        g.map(base + DATA, OTHER_RAM);
        assert_eq!(g.run(&registers)[Reg::Rbx as usize], 0x22);
    });
}

// Goes to R15 20 times, and executes INVLPG on \[RSI\] in between.
guest!(
    around,
    "inc r13d; cmp r13d, 10; je 3f; cmp r13d, 20; je 4f; jmp r15",
    "3: mov eax, 3; syscall; jmp r15",
    "4: xor eax, eax; syscall",
);
guest!(go_on, "jmp r14");

/// INVLPG on any address in a 1 GiB page undoes links to code anywhere in that page.
#[test]
fn invlpg_anywhere_in_a_gib_page_moves_its_code() {
    everywhere(|policy, base| {
        let mut g = Guest::with_ram(policy, base, &[], 3 << 30);
        // A direct jump into the large page and, behind it, what the code there comes back to.
        let before = base - 0x1000;
        g.map(before, OTHER_RAM);
        g.ram.write(before, &[&jump(before, base), around::code()].concat());
        for (n, gpa) in [(1, 1 << 30), (2, 2 << 30)] {
            g.ram.0.write_slice(&numbered(n, go_on::code()), GuestAddress(gpa)).unwrap();
        }
        g.map_with(base, 1 << 30 | PAGE | LARGE, 30);
        let ram = g.ram.clone();
        g.set_hook(move |_| ram.put(ram.entry(base, 30), 2 << 30 | PAGE | LARGE));
        let gpr = g.run_at(before, &[(Reg::R15, before), (Reg::R14, before + 5), (Reg::Rsi, base + 0x40_0000)]);
        assert_eq!((gpr[Reg::Rbx as usize], gpr[Reg::R13 as usize]), (2, 20));
    });
}

// Counts to 20, going to R15 after each, but to R14 after the tenth, with a report before that.
guest!(
    detour,
    "inc r13d; cmp r13d, 10; je 3f; cmp r13d, 20; je 4f; jmp r15",
    "3: mov eax, 1; syscall; jmp r14",
    "4: xor eax, eax; syscall",
);
guest!(reload, "mov eax, 2; mov edi, 9; syscall; jmp r15");

/// Code that was found in two places before the flush runs from the second one after it, whoever links to it.
#[test]
fn code_that_moved_before_a_flush_is_not_run_from_its_old_place() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, &[]);
        let before = base - 0x1000;
        // As far away as makes the engine walk the page tables for `base` again.
        let aside = base + 0x10_0000;
        g.map(before, OTHER_RAM);
        g.map(aside, OTHER_RAM + 0x1000);
        g.ram.write(before, &jump(before, base));
        g.ram.write(aside, &jump(aside, base + 0x800));
        let places = [CODE_RAM, OTHER_RAM + 0x2000];
        for (n, gpa) in [1, 2].into_iter().zip(places) {
            g.ram.0.write_slice(&numbered(n, detour::code()), GuestAddress(gpa)).unwrap();
            g.ram.0.write_slice(reload::code(), GuestAddress(gpa + 0x800)).unwrap();
        }
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if matches!(e, Event::Report(0)) {
                ram.put(ram.entry(base, 12), places[1] | PAGE);
            }
        });
        let gpr = g.run_at(before, &[(Reg::R15, before), (Reg::R14, aside)]);
        assert_eq!((gpr[Reg::Rbx as usize], gpr[Reg::R13 as usize]), (2, 20));
    });
}

guest!(
    switch_pcid,
    "mov r14d, 20",
    "2: xor ebp, ebp; mov edi, 9; cmp r14d, 3; jne 3f; mov edi, 1; mov ebp, 1",
    "3: mov eax, 4; syscall; mov rbx, [r8]; cmp r14d, 3; je 4f; dec r14d; jmp 2b",
    "4: xor eax, eax; syscall",
);

/// A PCID that was never used has no translations, even if global code goes on running through the switch.
#[test]
fn another_pcid_sees_its_own_mappings() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, switch_pcid::code());
        g.map_with(base, CODE_RAM | PAGE | GLOBAL, 12);
        g.ram.put(DATA_RAM, 0x11);
        g.ram.put(OTHER_RAM, 0x22);
        g.vcpu.state_mut().cr4 |= cr4::PCIDE;
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if matches!(e, Event::Report(1)) {
                ram.put(ram.entry(base + DATA, 12), OTHER_RAM | PAGE);
            }
        });
        assert_eq!(g.run(&[(Reg::R8, base + DATA)])[Reg::Rbx as usize], 0x22);
        assert_eq!(g.vcpu.state().cr3, ROOT | 1);
    });
}

guest!(push_mmio, "mov rax, rsp; mov rsp, rax; push qword ptr [r8]; pop rbx; add [r8], rbx; xor eax, eax; syscall");

/// A device sees each access once, however often the engine has to try.
#[test]
fn mmio_is_accessed_once() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, push_mmio::code());
        g.map(base + ROOM, MMIO);
        let gpr = g.run(&[(Reg::R8, base + ROOM)]);
        assert_eq!(gpr[Reg::Rbx as usize], 0x0101_0101_0101_0101);
        let (reads, writes) = (&g.bus.mmio_reads, &g.bus.mmio_writes);
        assert_eq!((reads.load(Ordering::SeqCst), writes.load(Ordering::SeqCst)), (2, 1));
    });
}

// Adds up a word of each of R9 pages, R10 bytes apart, from R8 on; then a report and a reload of CR3, the first page again,
// and another report.
guest!(
    touch,
    "mov rbx, r8; xor ebp, ebp",
    "2: add rbp, [rbx]; add rbx, r10; dec r9; jnz 2b; mov eax, 2; mov edi, 1; syscall",
    "add rbp, [r8]; mov eax, 1; mov edi, 2; syscall; xor eax, eax; syscall",
);

/// Mappings that the host keeps for this process; it permits 65,530.
fn host_mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// KiB of page tables that the host keeps for this process.
fn host_page_tables() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPTE:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Runs [`touch`] on `count` small pages, the n-th of which is page `place(n)` of 512 that hold their number. `at_report` is
/// called when all are touched, and again after the flush.
fn touch_small(base: u64, count: u64, place: fn(u64) -> u64, mut at_report: impl FnMut(&Ram, u8) + Send + 'static) {
    let mut g = Guest::new(Windows::Always, base, touch::code());
    for n in 0..512 {
        g.ram.put(POOL + n * 0x1000, n);
    }
    for n in 0..count {
        g.map(base + ROOM + n * 0x1000, POOL + place(n) * 0x1000);
    }
    let ram = g.ram.clone();
    g.set_hook(move |e| {
        let Event::Report(n) = e else { panic!("the guest must not fault here") };
        at_report(&ram, n);
    });
    let gpr = g.run(&[(Reg::R8, base + ROOM), (Reg::R9, count), (Reg::R10, 0x1000)]);
    assert_eq!(gpr[Reg::Rbp as usize], (0..count).map(place).sum::<u64>() + place(0));
}

/// Pages that cannot share a host mapping do not add up to more mappings than a process may have.
#[test]
fn scattered_pages_cost_a_bounded_number_of_mappings() {
    touch_small(LOW, 30_000, |n| n * 7 % 512, |_, _| assert!(host_mappings() < 28_000));
}

/// Nor do pages that go from between others.
#[test]
fn holes_cost_a_bounded_number_of_mappings() {
    const COUNT: u64 = 50_000;
    touch_small(
        HIGH,
        COUNT,
        |n| n % 512,
        |ram, report| {
            if report == 1 {
                for n in (1..COUNT).step_by(2) {
                    ram.put(ram.entry(HIGH + ROOM + n * 0x1000, 12), 0);
                }
            } else {
                assert!(host_mappings() < 45_000);
            }
        },
    );
}

/// A guest that maps the same page everywhere does not make the host spend page tables without bound.
#[test]
fn aliases_cost_bounded_host_page_tables() {
    const COUNT: u64 = 1_500;
    let mut g = Guest::new(Windows::Always, HIGH, touch::code());
    g.ram.put(POOL, 3);
    for n in 0..COUNT {
        g.map_with(HIGH + ROOM + (n << 21), POOL | PAGE | LARGE, 21);
    }
    let before = host_page_tables();
    g.set_hook(move |_| assert!(host_page_tables() < before + 4 * 1024));
    let gpr = g.run(&[(Reg::R8, HIGH + ROOM), (Reg::R9, COUNT), (Reg::R10, 2 << 20)]);
    assert_eq!(gpr[Reg::Rbp as usize], 3 * (COUNT + 1));
}

// Adds up R10, R10 - 1, ... 1 by recursion, with direct and indirect calls in turn; three times.
guest!(
    recurse,
    "mov r9d, 3; xor ebx, ebx; lea r8, [rip + 5f]",
    "2: mov rdi, r10; call 5f; add rbx, rax; dec r9d; jnz 2b; mov rbp, rsp; xor eax, eax; syscall",
    "5: test rdi, rdi; jz 8f; push rdi; dec rdi; test dil, 1; jz 6f; call 5b; jmp 7f",
    "6: call r8",
    "7: pop rdi; add rax, rdi; ret",
    "8: xor eax, eax; ret",
);

/// Calls may be nested deeper than the engine remembers, on a stack that grows by page faults, and all return.
#[test]
fn deep_recursion_returns() {
    const DEPTH: u64 = 150_000;
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, recurse::code());
        let top = base + ROOM + 0x40_0000;
        for la in (base + ROOM..top).step_by(0x1000) {
            g.map_with(la, 0, 12);
        }
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            let Event::Fault(f) = e else { return };
            assert_eq!((f.vector, f.error, f.cr2), (PAGE_FAULT, 6, f.rsp - 8));
            ram.put(ram.entry(f.cr2, 12), ((POOL + f.cr2 - base - ROOM) & !0xfff) | PAGE);
        });
        let gpr = g.run(&[(Reg::R10, DEPTH), (Reg::Rsp, top)]);
        assert_eq!(gpr[Reg::Rbx as usize], 3 * (DEPTH * (DEPTH + 1) / 2));
        assert_eq!(gpr[Reg::Rbp as usize], top);
        // Two words for each level, and one for the last call.
        assert_eq!(g.faults().len() as u64, (DEPTH * 16 + 8).div_ceil(4096));
    });
}

// At the bottom of R10 calls, R15 times: five calls more, left all at once. Then all of the R10 calls return.
guest!(
    long_jumps,
    "mov rdi, r10; xor eax, eax; call 4f; mov rbx, rax; mov rbp, rsp; xor eax, eax; syscall",
    "4: push rdi; dec rdi; jz 6f; call 4b",
    "5: pop rdi; add rax, rdi; ret",
    "6: mov rbp, rsp; lea r13, [rip + 9f]",
    "7: mov esi, 4; call 8f; ud2",
    "8: dec esi; js 3f; call 8b; ud2",
    "3: mov rsp, rbp; jmp r13",
    "9: inc rax; dec r15; jnz 7b; jmp 5b",
);

/// Calls that never return, because somebody jumped out of them, do not disturb the returns of those around them.
#[test]
fn calls_left_by_a_jump_leave_others_intact() {
    const DEPTH: u64 = 500;
    const JUMPS: u64 = 40_000;
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, long_jumps::code());
        let gpr = g.run(&[(Reg::R10, DEPTH), (Reg::R15, JUMPS)]);
        assert_eq!(gpr[Reg::Rbx as usize], JUMPS + DEPTH * (DEPTH + 1) / 2);
        assert_eq!(gpr[Reg::Rbp as usize], base + STACK);
    });
}

// R9 rounds: a return by way of a pushed address (every other time), a return to an address put in the place of the caller's,
// a chain of three returns that no calls were made for, and a return that takes arguments along.
guest!(
    odd_returns,
    "lea r8, [rip + 6f]; lea r10, [rip + 7f]; lea r13, [rip + 3f]; lea rdi, [rip + 9f]",
    "2: call 4f; inc r14; call 5f; ud2",
    "3: push rdi; push r10; push r8; ret",
    "4: test r9b, 1; jz 6f; push r8; ret",
    "5: mov [rsp], r13; ret",
    "6: inc r15; ret",
    "7: add r15, 2; ret",
    "8: ret 16",
    "9: push r9; push r9; call 8b; add rbx, 5; dec r9; jnz 2b; mov rbp, rsp; xor eax, eax",
    "syscall",
);

/// A return goes to the address on the guest's stack, whatever calls were made.
#[test]
fn returns_go_where_the_stack_says() {
    const ROUNDS: u64 = 20_001;
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, odd_returns::code());
        let gpr = g.run(&[(Reg::R9, ROUNDS)]);
        let counted = [Reg::R14, Reg::R15, Reg::Rbx].map(|r| gpr[r as usize]);
        assert_eq!(counted, [ROUNDS, 4 * ROUNDS, 5 * ROUNDS]);
        assert_eq!(gpr[Reg::Rbp as usize], base + STACK);
    });
}

// Calls what is at R10 four times; what follows the call says 1, until somebody changes it. R8 points to where it does.
macro_rules! caller {
    ($name:ident, $call:literal) => {
        guest!(
            $name,
            "mov r9d, 4; lea r8, [rip + 3f + 1]",
            $call,
            "3: mov ebx, 1; add r15, rbx; dec r9d; jnz 2b; xor eax, eax; syscall",
            "4: jmp r10",
        );
    };
}
caller!(calls_directly, "2: call 4f");
caller!(calls_indirectly, "2: call r10");
// The third call changes the caller, when returns to it are linked already: by a store, or by system call R13.
guest!(changes_by_store, "cmp r9d, 2; jne 2f; mov dword ptr [r8], 100", "2: ret");
guest!(changes_by_syscall, "cmp r9d, 2; jne 2f; mov rax, r13; mov edi, 1; mov rsi, r8; syscall", "2: ret");

/// A function returns to its caller as that is by then: written meanwhile, at another place in RAM, or not there at all.
#[test]
fn returns_find_callers_that_changed_meanwhile() {
    const FLUSH: u64 = 2;
    const FLUSH_PAGE: u64 = 3;
    let moved = OTHER_RAM | PAGE;
    let ways: [(&[u8], u64, u64); 5] = [
        (changes_by_store::code(), 0, 0),
        (changes_by_syscall::code(), FLUSH, moved),
        (changes_by_syscall::code(), FLUSH_PAGE, moved),
        (changes_by_syscall::code(), FLUSH, 0),
        (changes_by_syscall::code(), FLUSH_PAGE, 0),
    ];
    everywhere(|policy, base| {
        for caller in [calls_directly::code(), calls_indirectly::code()] {
            for (function, how, entry) in ways {
                let mut g = Guest::new(policy, base, caller);
                g.map(base + 0x1000, CODE_RAM + 0x1000);
                g.ram.write(base + 0x1000, function);
                // The other place says 100, too.
                let mut other = caller.to_vec();
                let operand = other.windows(5).position(|w| w == [0xbb, 1, 0, 0, 0]).unwrap() as u64 + 1;
                other[operand as usize] = 100;
                g.ram.0.write_slice(&other, GuestAddress(OTHER_RAM)).unwrap();
                let ram = g.ram.clone();
                g.set_hook(move |e| {
                    let new = if matches!(e, Event::Report(_)) { entry } else { moved };
                    ram.put(ram.entry(base, 12), new);
                });
                let gpr = g.run(&[(Reg::R10, base + 0x1000), (Reg::R13, how)]);
                assert_eq!(gpr[Reg::R15 as usize], 1 + 1 + 100 + 100);
                let expected =
                    if how != 0 && entry == 0 { vec![(PAGE_FAULT, 0x14, base + operand - 1)] } else { vec![] };
                assert_eq!(g.faults().iter().map(|f| (f.vector, f.error, f.cr2)).collect::<Vec<_>>(), expected);
            }
        }
    });
}

// Four ways to write the operand of `mov eax, n` before it runs, 50 times each: in the page of the store, one instruction
// ahead, by a store through another mapping of the page (R8) that is there before the code is (at R10), and by REP MOVSB.
guest!(
    write_code,
    "mov r9d, 50",
    "2: call 7f; add rbx, rax; inc dword ptr [rip + 7f + 1]; dec r9d; jnz 2b; mov r9d, 50",
    "3: mov [rip + 6f + 1], r9d",
    "6: mov eax, 0; add rbx, rax; dec r9d; jnz 3b; mov r9d, 50",
    "4: mov byte ptr [r8], 0xb8; mov [r8 + 1], r9d; mov byte ptr [r8 + 5], 0xc3; call r10",
    "add rbx, rax; dec r9d; jnz 4b; mov r9d, 50",
    "5: push r9; mov rsi, rsp; lea rdi, [r8 + 1]; mov ecx, 4; rep movsb; call r10; add rbx, rax",
    "pop r9; dec r9d; jnz 5b; xor eax, eax; syscall",
    "7: mov eax, 1; ret",
);

/// Code runs as it is in memory, however it was written.
#[test]
fn written_code_runs_as_written() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, write_code::code());
        g.map(base + 0x1000, CODE_RAM + 0x1000);
        g.map(base + DATA, CODE_RAM + 0x1000);
        let gpr = g.run(&[(Reg::R8, base + DATA), (Reg::R10, base + 0x1000)]);
        assert_eq!(gpr[Reg::Rbx as usize], 4 * (50 * 51 / 2));
    });
}

// RCX operations from R8 to R9, twice; in between a report, and INVLPG on what RBP points to. Carry is in use all the while.
macro_rules! twice {
    ($name:ident, $first:literal, $second:literal) => {
        guest!(
            $name,
            "mov r13, rcx; mov rsi, r8; mov rdi, r9",
            $first,
            "mov eax, 3; mov edi, 1; mov rsi, rbp; syscall",
            "mov rcx, r13; mov rsi, r8; mov rdi, r9; mov rax, rbx; lea r15, [rip + 2f]; stc",
            $second,
            "setc r14b; mov r10, rcx; xor eax, eax; syscall",
        );
    };
}
twice!(copy_bytes, "rep movsb", "2: rep movsb");
twice!(fill_words, "rep stosq", "2: rep stosq");

/// Pages of each operand of a string instruction.
const PAGES: u64 = 6;

/// A string instruction on operands of some pages each. The second time, one page is missing (the n-th from `start`), and its
/// fault must show how far the instruction came. Gives what it found, with the guest.
fn string_with_a_gap(policy: Windows, base: u64, code: &[u8], at: [u64; 3], count: u64) -> (Guest, Fault) {
    let [source, destination, missing] = at;
    let mut g = Guest::new(policy, base, code);
    for (n, la) in [source, destination].into_iter().flat_map(|la| (0..PAGES).map(move |n| la + n * 0x1000)).enumerate()
    {
        // In RAM they lie the other way round.
        g.map(la & !0xfff, POOL + 0x10_0000 - n as u64 * 0x1000);
    }
    let entry = g.ram.entry(missing, 12);
    let value = g.ram.get(entry);
    let ram = g.ram.clone();
    g.set_hook(move |e| match e {
        Event::Report(_) => {
            ram.write(destination, &vec![0; (PAGES * 0x1000 - (destination & 0xfff)) as usize]);
            ram.put(entry, 0);
        }
        Event::Fault(_) => ram.put(entry, value),
    });
    let bytes: Vec<u8> = (0..PAGES * 0x1000 - (source & 0xfff)).map(|n| ((n * 7) ^ (n >> 8)) as u8).collect();
    g.ram.write(source, &bytes);
    let registers = [
        (Reg::R8, source),
        (Reg::R9, destination),
        (Reg::Rcx, count),
        (Reg::Rbp, missing),
        (Reg::Rbx, 0x1234_5678_9abc_def0),
    ];
    let gpr = g.run(&registers);
    let faults = g.faults();
    assert_eq!(faults.len(), 1, "{faults:x?}");
    let fault = faults[0];
    assert_eq!((fault.vector, fault.cr2, fault.rip), (PAGE_FAULT, missing, gpr[Reg::R15 as usize]));
    assert_eq!((gpr[Reg::R10 as usize], gpr[Reg::R14 as usize]), (0, 1), "RCX and carry at the end");
    (g, fault)
}

/// REP MOVSB stops at a missing page with RSI, RDI and RCX exact, and goes on from there.
#[test]
fn rep_movsb_across_pages_stops_exactly() {
    const COUNT: u64 = 4 * 0x1000 + 77;
    everywhere(|policy, base| {
        let (source, destination) = (base + ROOM + 0x123, base + ROOM + 0x10_0456);
        for (missing, done, error) in [
            ((destination & !0xfff) + 0x3000, 0x3000 - 0x456, 6),
            ((source & !0xfff) + 0x2000, 0x2000 - 0x123, 4),
            ((source & !0xfff) + 0x4000, 0x4000 - 0x123, 4),
        ] {
            let (g, f) = string_with_a_gap(policy, base, copy_bytes::code(), [source, destination, missing], COUNT);
            assert_eq!(f.error, error);
            assert_eq!((f.rsi, f.rdi, f.rcx), (source + done, destination + done, COUNT - done));
            let gpr = g.vcpu.state().gpr;
            assert_eq!([Reg::Rsi, Reg::Rdi].map(|r| gpr[r as usize]), [source + COUNT, destination + COUNT]);
            assert!(g.ram.read(destination, COUNT) == g.ram.read(source, COUNT), "the copy differs");
            assert_eq!(g.ram.read(destination + COUNT, 64), [0; 64]);
        }
    });
}

/// REP STOSQ stops at the word that reaches into a missing page, which is not counted.
#[test]
fn rep_stosq_across_pages_stops_exactly() {
    const COUNT: u64 = 4 * 0x200 + 9;
    everywhere(|policy, base| {
        let (source, destination) = (base + ROOM, base + ROOM + 0x10_0124);
        let missing = (destination & !0xfff) + 0x3000;
        let done = (missing - destination) / 8;
        let (g, f) = string_with_a_gap(policy, base, fill_words::code(), [source, destination, missing], COUNT);
        assert_eq!((f.error, f.rdi, f.rcx), (6, missing - 4, COUNT - done));
        assert_eq!(g.vcpu.state().gpr[Reg::Rdi as usize], destination + COUNT * 8);
        let expected = 0x1234_5678_9abc_def0_u64.to_le_bytes().repeat(COUNT as usize);
        assert!(g.ram.read(destination, COUNT * 8) == expected, "the words differ");
        assert_eq!(g.ram.read(destination + COUNT * 8, 64), [0; 64]);
    });
}

// An access to each of R9 addresses that R8 points to, in RSI. RBX holds a known value before, and RDX says where to go on.
// R13 is the address of a page that is there.
macro_rules! probes {
    ($($name:ident: $write:literal, $stack:literal, [$($line:literal),+];)+) => {
        $(guest!(
            $name,
            "mov r14, rsp",
            "2: mov rsi, [r8]; add r8, 8; mov rbx, r15; lea rdx, [rip + 3f]",
            $($line),+,
            "3: mov rsp, r14; dec r9; jnz 2b; xor eax, eax; syscall",
        );)+
        /// All of them: name, code, whether they write and whether they use the stack segment.
        fn probes() -> Vec<(&'static str, &'static [u8], bool, bool)> {
            vec![$((stringify!($name), $name::code(), $write, $stack)),+]
        }
    };
}
probes! {
    probe_load: false, false, ["mov rbx, [rsi]"];
    probe_indexed: false, false, ["mov rdi, rsi", "sub rdi, r13", "mov rbx, [r13 + rdi]"];
    probe_displaced: false, false, ["sub rsi, 0x12345678", "mov rbx, [rsi + 0x12345678]"];
    probe_far: false, false, ["add rsi, 0x7ffffff8", "mov rbx, [rsi - 0x7ffffff8]"];
    probe_flags: false, false, ["stc", "mov rbx, [rsi]", "setc dil"];
    probe_vector: false, false, ["movq xmm0, [rsi]", "movq rbx, xmm0"];
    probe_store: true, false, ["mov [rsi], rbx"];
    probe_add: true, false, ["lock add [rsi], rbx"];
    probe_pop: false, true, ["mov rsp, rsi", "pop rbx"];
    probe_push: true, true, ["lea rsp, [rsi + 8]", "push rbx"];
    probe_frame: false, true, ["mov rbp, rsi", "mov rbx, [rbp]"];
    probe_second: false, false, ["xor edi, edi; mov rax, [r13 + rdi]; mov rdi, rsi; sub rdi, r13; mov rbx, [r13 + rdi]"];
    probe_added: false, false, ["mov rdi, r13; mov rax, [rdi]; sub rsi, r13; add rdi, rsi; mov rbx, [rdi]"];
    probe_base: false, false, ["mov rdi, r13; xor r12d, r12d; mov rax, [rdi + r12]; mov rdi, rsi; mov rbx, [rdi + r12]"];
    probe_half: false, false, ["mov edi, -1; mov r12, rdi; shl r12, 3; sub rsi, r12; mov rbx, [rsi + rdi*8]"];
    probe_word: false, false, ["mov edi, 0xffff; sub rsi, 0x7fff8; mov rbx, [rsi + rdi*8]"];
    probe_widened: false, false, [
        "movzx edi, r15b; and edi, 0; mov rax, [r13 + rdi*2]; mov rdi, rsi; sub rdi, r13; mov rbx, [r13 + rdi]"
    ];
    probe_table: false, false, ["mov rdi, rsi; sub rdi, 0x1000; mov rbx, [rdi*1 + 0x1000]"];
    probe_spilled: false, false, ["mov r10, r13; mov rax, [r10]; mov r10, rsi; mov rbx, [r10]"];
    probe_both_spilled: false, false, [
        "mov r10, r13; xor r11d, r11d; mov rax, [r10 + r11]; mov rax, [r10 + r11 + 8]; mov r11, rsi; sub r11, r10",
        "mov rbx, [r10 + r11]"
    ];
    probe_lea: false, false, ["mov rdi, r13; mov rax, [rdi]; sub rsi, rdi; lea rdi, [rdi + rsi]; mov rbx, [rdi]"];
    probe_moved: false, false, ["mov rdi, r13; mov rax, [rdi]; mov rdi, rsi; mov rbx, [rdi]"];
    probe_exchanged: false, false, ["mov rdi, r13; mov rax, [rdi]; xchg rdi, rsi; mov rbx, [rdi]"];
    probe_chosen: false, false, ["mov rdi, r13; mov rax, [rdi]; cmp rdi, rdi; cmove rdi, rsi; mov rbx, [rdi]"];
    probe_popped: false, false, ["push rsi; mov rdi, r13; mov rax, [rdi]; pop rdi; mov rbx, [rdi]"];
    probe_loaded: false, false, ["mov [r13 + 8], rsi; mov rdi, r13; mov rax, [rdi]; mov rdi, [rdi + 8]; mov rbx, [rdi]"];
    probe_left: false, true, ["push rsi; mov rbp, rsp; leave; mov rbx, [rbp]"];
    probe_movsb: false, false, ["mov ecx, 8", "lea rdi, [r13 + 64]", "rep movsb", "mov rbx, [r13 + 64]"];
    probe_stosb: true, false, ["mov ecx, 8", "mov rdi, rsi", "mov eax, ebx", "rep stosb"];
    // From the end of the address space, with a count that leads round to where pages are. The jump begins a new block, which
    // is made for the addresses that are in the registers by then.
    probe_round: true, false, [
        "mov ecx, 8; mov rax, r13; sub rax, rsi; test rsi, rsi; cmovs rcx, rax; mov rdi, rsi; mov al, bl; jmp 5f",
        "5: rep stosb"
    ];
}

/// What the guest must not find.
static SECRET: AtomicU64 = AtomicU64::new(0x5ec2_e75e_c2e7_5ec2);
/// What is in RBX before each access.
const POISON: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// Addresses that no guest page is mapped at for user code: at the borders of windows and of canonical addresses, and those at
/// which arithmetic on host addresses would end up at the host's memory.
fn forbidden(base: u64, secrets: &[u64]) -> Vec<u64> {
    const LAST: u64 = 0x7fff_ffff_fffc;
    let mut out = vec![
        0,
        0x7fff_fff8,
        1 << 31,
        0xffff_fff8,
        1 << 32,
        (1 << 46) - 8,
        1 << 46,
        0x7fff_ffff_e000,
        LAST,
        1 << 47,
        0x7000_0000_0000_0000 | base,
        1 << 63 | base,
        0xffff_0000_0000_0000 | base,
        0xffff_c000_0000_0000 | base,
        0xffff_7fff_ffff_fff8,
        0xffff_ffff_ff60_0000,
        0xffff_ffff_c000_0000,
        0xffff_ffff_ffff_fff8,
        KERNEL + SYSCALL_CODE,
    ];
    // The low window is at a fixed distance from the vCPU's state, which is one of the mappings at multiples of 2 MiB.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps.lines().filter_map(|l| u64::from_str_radix(l.split('-').next()?, 16).ok());
    // Kernel mappings are in a range of their own.
    let states = starts
        .filter(|start| start % (2 << 20) == 0 && !(0x5800_0000_0000..0x7800_0000_0000).contains(start))
        .map(|state| state.wrapping_add(0x4000_0000).wrapping_neg());
    // The high window is at a fixed distance from the guest's addresses.
    let high = distances().iter().flat_map(|d| [*d, d.wrapping_neg()]);
    let distances: Vec<u64> = [0].into_iter().chain(high).chain(states).collect();
    for host in secrets {
        for distance in &distances {
            let la = host.wrapping_add(*distance);
            out.extend([la, la | 1 << 46, la | 0xffff << 48, la | 1 << 63, la ^ 1 << 47]);
        }
    }
    // Chance must not lead to where the guest has something.
    out.retain(|&la| [LOW, HIGH, base + ROOM].iter().all(|at| la.wrapping_sub(*at) >= STACK));
    out
}

/// What an access of 8 bytes to an address where nothing is for user code must find (SDM vol. 1, section 3.3.7.1; vol. 3,
/// section 4.7).
fn fault_at(la: u64, write: bool, stack: bool) -> (u64, u64) {
    let canonical = |la: u64| (la as i64) << 16 >> 16 == la as i64;
    if !canonical(la) || !canonical(la + 7) {
        return (if stack { STACK_FAULT } else { GENERAL_PROTECTION }, 0);
    }
    let there = (KERNEL..KERNEL + RAM).contains(&la);
    (PAGE_FAULT, 4 | u64::from(there) | u64::from(write) << 1)
}

/// Probes every forbidden address with every kind of access, each first as the only one and then behind good ones in the
/// windows, so that code has been made for those.
fn probe_all(policy: Windows, base: u64) {
    for (name, code, write, stack) in probes() {
        let mut g = Guest::new(policy, base, code);
        let good = [LOW + DATA, HIGH + DATA];
        for (n, la) in good.into_iter().enumerate() {
            g.map(la, OTHER_RAM + n as u64 * 0x1000);
        }
        // The last page of the lower half, for what would reach beyond it.
        g.map(0x7fff_ffff_f000, OTHER_RAM + 0x3000);
        // Where the list is, and the page that is there.
        let (list, there) = (base + ROOM, base + ROOM + 0x1000);
        g.map(list, OTHER_RAM + 0x4000);
        g.map(there, OTHER_RAM + 0x5000);
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if let Event::Fault(f) = e {
                ram.put(Fault::RIP, f.rdx);
            }
        });
        let mut check = |addresses: &[u64], bad: &[u64]| {
            assert!(addresses.len() <= 512);
            for (n, &la) in addresses.iter().enumerate() {
                g.ram.put(OTHER_RAM + 0x4000 + n as u64 * 8, la);
            }
            let count = addresses.len() as u64;
            let gpr = g.run(&[(Reg::R8, list), (Reg::R9, count), (Reg::R13, there), (Reg::R15, POISON)]);
            assert_eq!(
                gpr[Reg::Rbx as usize],
                POISON,
                "{name} of {:#x} found something",
                addresses[addresses.len() - 1]
            );
            let faults = g.faults();
            assert_eq!(faults.len(), bad.len(), "{name} {addresses:x?}: {faults:x?}");
            for (&la, f) in bad.iter().zip(&faults) {
                assert_eq!((f.vector, f.error), fault_at(la, write, stack), "{name} {la:#x}: {f:x?}");
                assert!(f.vector != PAGE_FAULT || f.cr2 == la, "{name} {la:#x}: {f:x?}");
            }
        };
        // Memory of all kinds; what is allocated now is likely below the vCPU's state.
        let (local, boxed, later) = (0u64, Box::new(0u64), vec![0x5ec2_u64; 1 << 17]);
        let library = libc::getpid as *const () as u64 & !7;
        let pointers = [SECRET.as_ptr(), (&raw const local).cast_mut(), (&raw const *boxed).cast_mut()];
        let secrets = [pointers.map(|p| p as u64).to_vec(), vec![later.as_ptr() as u64, library]].concat();
        let all = forbidden(base, &secrets);
        for &la in &all {
            check(&[la], &[la]);
        }
        for good in good {
            let behind: Vec<u64> = std::iter::once(good).chain(all.iter().copied()).collect();
            check(&behind, &all);
        }
    }
    assert_eq!(SECRET.load(Ordering::SeqCst), 0x5ec2_e75e_c2e7_5ec2, "the guest wrote the host's memory");
}

/// Accesses outside what the guest maps fault as on hardware, and never reach the host's memory.
#[test]
fn low_code_reaches_nothing_of_the_host() {
    probe_all(Windows::Off, LOW);
    probe_all(Windows::Always, LOW);
}

/// The same for code in the high window.
#[test]
fn high_code_reaches_nothing_of_the_host() {
    probe_all(Windows::Off, HIGH);
    probe_all(Windows::Always, HIGH);
}

/// The same with the windows of one of several vCPUs.
#[test]
fn code_on_one_of_several_vcpus_reaches_nothing_of_the_host() {
    for cpus in [2, 4] {
        among(cpus, || {
            probe_all(Windows::Always, LOW);
            probe_all(Windows::Always, HIGH);
        });
    }
}

/// vCPUs beside each other have a high window each, as far as there are any, and see their own pages there. Their distances would lead from
/// one vCPU's window to what another has mapped, were it not for the checks.
fn vcpus_see_their_own() {
    let distances = distances();
    let mut first = Guest::new(Windows::Always, HIGH, load::code());
    let beside = |_| Guest::beside(Windows::Always, HIGH, load::code(), RAM);
    let mut all: Vec<Guest> = distances.iter().map(beside).collect();
    // The last finds none left, and does without.
    all[distances.len() - 1].policy = Windows::Off;
    for round in 0..3 {
        for (n, g) in std::iter::once(&mut first).chain(&mut all).enumerate() {
            let secret = 100 * n as u64 + round;
            g.ram.put(DATA_RAM, secret);
            let gpr = g.run_at(HIGH, &[(Reg::R8, HIGH + DATA)]);
            assert_eq!(gpr[Reg::Rbx as usize], secret, "vCPU {n}");
            assert_eq!(g.counter("window mappings made") > 0, g.expects_windows(), "vCPU {n}");
        }
    }
    for (n, g) in std::iter::once(&mut first).chain(&mut all).take(distances.len()).enumerate() {
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if let Event::Fault(_) = e {
                // Behind the load.
                ram.put(Fault::RIP, HIGH + 3);
            }
        });
        for &other in distances.iter().filter(|&&d| d != distances[n]) {
            for at in [HIGH + DATA, HIGH + STACK - 8] {
                let la = at.wrapping_sub(other).wrapping_add(distances[n]);
                let gpr = g.run_at(HIGH, &[(Reg::R8, la), (Reg::Rbx, POISON)]);
                assert_eq!(gpr[Reg::Rbx as usize], POISON, "vCPU {n} found something at {la:#x}");
                let faults = g.faults();
                assert_eq!(faults.len(), 1, "vCPU {n} at {la:#x}: {faults:x?}");
                let canonical = (la as i64) << 16 >> 16 == la as i64;
                let vector = if canonical { PAGE_FAULT } else { GENERAL_PROTECTION };
                assert_eq!(faults[0].vector, vector, "vCPU {n} at {la:#x}");
                assert!(!canonical || faults[0].cr2 == la, "vCPU {n} at {la:#x}");
            }
        }
    }
}

#[test]
fn four_vcpus_do_not_see_each_others_windows() {
    among(4, vcpus_see_their_own);
}

#[test]
fn two_vcpus_do_not_see_each_others_windows() {
    among(2, vcpus_see_their_own);
}
