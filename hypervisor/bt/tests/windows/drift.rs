//! The stack pointer of window blocks is checked where it changes: here are loops that move it without using it, as far as they can.

use crate::guest::*;
use crate::{POISON, fault_at};
use paravane_bt::Windows;
use paravane_cpu::Reg;

// Moves RSP R9 times, then uses it.
macro_rules! drifts {
    ($($name:ident: $step:literal, [$($line:literal),+];)+) => {
        $(guest!(
            $name,
            "mov r14, rsp; mov rbx, r15; lea rdx, [rip + 3f]; push rax; pop rax",
            "2:",
            $($line),+,
            "dec r9; jnz 2b; pop rbx",
            "3: mov rsp, r14; xor eax, eax; syscall",
        );)+
        /// All of them: name, code, and what each turn adds.
        fn drifts() -> Vec<(&'static str, &'static [u8], i64)> {
            vec![$((stringify!($name), $name::code(), $step)),+]
        }
    };
}
drifts! {
    drift_down: -0x10_0000, ["sub rsp, 0x100000"];
    drift_up: 0x10_0000, ["lea rsp, [rsp + 0x100000]"];
    drift_far: 0x7fff_fff8, ["add rsp, 0x7ffffff8"];
    drift_copied: -0x7fff_fff8, ["mov rbp, rsp; sub rbp, 0x7ffffff8; mov rsp, rbp"];
    drift_frame: 0x7fff_fff8, ["lea rbp, [rsp + 0x7ffffff8]; lea rsp, [rbp]"];
    drift_between: -0x10_0000, ["sub rsp, 0x80000; mov rax, [r13]; sub rsp, 0x80000; nop dword ptr [rsp]; prefetcht0 [rsp]"];
    drift_other_window: 0x10_0000, ["add rsp, 0x100000; mov rax, [r13]; xchg r13, r12; jmp 4f; nop; 4:"];
    drift_left: 0x7fff_fff8, ["mov rbp, rsp; push rax; mov rcx, [rsp]; pop rcx; mov rsp, rbp; add rsp, 0x7ffffff8"];
    drift_low_half: 0x10_0000, ["mov rax, rsp; add eax, 0x100000; mov rcx, rsp; shr rcx, 32; shl rcx, 32; add rax, rcx; mov rsp, rax"];
}

/// The stack pointer is checked where it changes: a loop that moves it ever further without using it must not carry it beyond what is
/// reserved around the window.
#[test]
fn a_stack_pointer_that_drifts_reaches_nothing_of_the_host() {
    let everywhere = [(Windows::Off, LOW), (Windows::Always, LOW), (Windows::Off, HIGH), (Windows::Always, HIGH)];
    for ((policy, base), (name, code, step)) in
        everywhere.into_iter().flat_map(|w| drifts().into_iter().map(move |d| (w, d)))
    {
        let mut g = Guest::new(policy, base, code);
        for (n, la) in [LOW + DATA, HIGH + DATA].into_iter().enumerate() {
            g.map(la, OTHER_RAM + n as u64 * 0x1000);
        }
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if let Event::Fault(f) = e {
                ram.put(Fault::RIP, f.rdx);
            }
        });
        // Where nothing is; next to the stack; beyond the windows on both sides, and all the way round.
        let span = (1 << 46) / step.unsigned_abs();
        let mut counts = vec![3, 40, 1000];
        if step.unsigned_abs() > 1 << 30 {
            counts.extend((1..24).map(|n| span * n / 8 + 5));
        } else if policy == Windows::Always || base == HIGH {
            // A hundred million turns: once there is enough.
            counts.push(span / 2 + 2000);
        }
        if matches!(name, "drift_left" | "drift_low_half") {
            // Faults on its way, or never gets far.
            counts.truncate(1);
        }
        for count in counts {
            // The first turn of one uses the stack where it is not.
            let turns = if name == "drift_left" { 1 } else { count };
            let registers = [(Reg::R9, turns), (Reg::R13, LOW + DATA), (Reg::R12, HIGH + DATA), (Reg::R15, POISON)];
            let la = (base + STACK).wrapping_add((step as u64).wrapping_mul(turns));
            let gpr = g.run(&registers);
            let faults = g.faults();
            assert_eq!(faults.len(), 1, "{name} {count}: {faults:x?}");
            let f = &faults[0];
            assert_eq!((f.vector, f.error), fault_at(la, false, true), "{name} {count} {la:#x}: {f:x?}");
            assert!(f.vector != PAGE_FAULT || f.cr2 == la, "{name} {count} {la:#x}: {f:x?}");
            assert_eq!(gpr[Reg::Rbx as usize], POISON, "{name} {count} found something");
        }
    }
}

/// A page of the host's with a secret in every word, where nothing was.
struct Decoy(u64);

impl Decoy {
    const SECRET: u64 = 0xdec0_1dec_01de_c01d;

    /// On the page of `at`, unless something is there.
    fn at(at: u64) -> Option<Self> {
        let page = at & !0xfff;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces nothing.
        let got = unsafe { libc::mmap(page as *mut libc::c_void, 0x1000, access, flags, -1, 0) };
        if got as u64 != page {
            return None;
        }
        for word in 0..512 {
            // SAFETY: within the page that was just mapped.
            unsafe { (page as *mut u64).add(word).write(Self::SECRET) };
        }
        Some(Self(page))
    }
}

impl Drop for Decoy {
    fn drop(&mut self) {
        // SAFETY: what `at` mapped, which nobody else knows of.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, 0x1000) };
    }
}

/// What lies right behind the addresses reserved around the high window is out of reach, though the stack pointer points there: were it
/// not checked on its way, this is where it would find something.
#[test]
fn a_stack_pointer_that_drifts_finds_no_page_beside_the_window() {
    const DISTANCE: u64 = 0x2b00_0000_0000;
    let mut tried = Vec::new();
    for (name, code, step) in drifts() {
        if matches!(name, "drift_left" | "drift_low_half") {
            // Faults on its way, or never gets that far.
            continue;
        }
        let mut g = Guest::new(Windows::Always, HIGH, code);
        for (n, la) in [LOW + DATA, HIGH + DATA].into_iter().enumerate() {
            g.map(la, OTHER_RAM + n as u64 * 0x1000);
        }
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if let Event::Fault(f) = e {
                ram.put(Fault::RIP, f.rdx);
            }
        });
        let start = HIGH + STACK - DISTANCE;
        let (far, first) = if step > 0 {
            (0x5540_0000_0000, (0x5540_0000_0000 - start) / step as u64 + 1)
        } else {
            (0x1400_0000_0000, (start - 0x1400_0000_0000) / step.unsigned_abs() + 1)
        };
        let decoy = (first..first + 8).find_map(|turns| {
            let host = start.wrapping_add((step as u64).wrapping_mul(turns));
            assert!(host.abs_diff(far) <= 9 * step.unsigned_abs());
            Some((turns, host, Decoy::at(host)?))
        });
        // Where programs are loaded differs from run to run.
        let Some((turns, host, decoy)) = decoy else { continue };
        let mut run = |turns: u64| {
            let registers = [(Reg::R9, turns), (Reg::R13, LOW + DATA), (Reg::R12, HIGH + DATA), (Reg::R15, POISON)];
            (g.run(&registers), g.faults())
        };
        // Code is made, and linked, while the stack pointer is where it should be.
        for turns in [3, 40] {
            run(turns);
        }
        let (gpr, faults) = run(turns);
        assert_eq!(gpr[Reg::Rbx as usize], POISON, "{name} found the page at {:#x}", decoy.0);
        assert_eq!(faults.len(), 1, "{name}: {faults:x?}");
        let la = host.wrapping_add(DISTANCE);
        assert_eq!((faults[0].vector, faults[0].error), fault_at(la, false, true), "{name} {la:#x}: {:x?}", faults[0]);
        tried.push(name);
    }
    assert!(tried.len() >= 3, "there was room for a page beside the window only for {tried:?}");
}
