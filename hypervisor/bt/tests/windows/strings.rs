//! REP MOVS and REP STOS whose operands are in different windows, or in none.

use super::*;

// R14 times: 100 bytes from R8 to R9, 8 words of zeros behind them, and 50 bytes back to R10.
guest!(
    carry,
    "2: mov rsi, r8; mov rdi, r9; mov ecx, 100; rep movsb; mov ecx, 8; xor eax, eax; rep stosq; mov rbx, rdi",
    "mov rsi, r9; mov rdi, r10; mov ecx, 50; rep movsb; dec r14d; jnz 2b",
    "xor eax, eax; syscall",
);

/// Between the windows as within one: the same bytes, and after the first pages are mapped the host's own instruction does it.
#[test]
fn strings_go_from_one_window_to_the_other() {
    let places = [LOW + DATA, HIGH + DATA];
    for (from, to) in
        [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(a, b): (usize, usize)| (places[a], places[b] + 0x1000 - 48))
    {
        for policy in [Windows::Off, Windows::Always] {
            let mut g = Guest::new(policy, LOW, carry::code());
            for n in 0..2 {
                g.map(LOW + DATA + n * 0x1000, DATA_RAM + n * 0x1000);
                g.map(HIGH + DATA + n * 0x1000, OTHER_RAM + n * 0x1000);
            }
            let text: Vec<u8> = (1..=200).collect();
            g.ram.write(from, &text);
            g.ram.write(to, &[0xff; 200]);
            let gpr = g.run(&[(Reg::R8, from), (Reg::R9, to), (Reg::R10, from + 1000), (Reg::R14, 100)]);
            assert_eq!((gpr[Reg::Rdi as usize], gpr[Reg::Rsi as usize]), (from + 1050, to + 50), "{policy:?}");
            assert_eq!(gpr[Reg::Rbx as usize], to + 164);
            assert_eq!(g.ram.read(to, 100), text[..100]);
            assert_eq!(g.ram.read(to + 100, 65), [&[0; 64][..], &[0xff]].concat());
            assert_eq!(g.ram.read(from + 1000, 50), text[..50]);
            if g.expects_windows() {
                let emulated = g.counter("instructions emulated");
                assert!(emulated < 20, "{emulated} emulated from {from:#x} to {to:#x}");
            }
        }
    }
}

/// An operand whose end is in no window, or in the other one, is for Rust to see to.
#[test]
fn strings_that_leave_their_window_fault_where_they_do() {
    for (to, count) in [((1 << 31) - 8, 100u64), ((1 << 32) - 8, 100), ((1 << 47) - 8, 100), (HIGH + ROOM, 1 << 41)] {
        let outcomes = [Windows::Off, Windows::Always].map(|policy| {
            let mut g = Guest::new(policy, LOW, far::code());
            let (page, ram) = (to & !0xfff, g.ram.clone());
            g.map(page, OTHER_RAM);
            g.set_hook(move |e| {
                if matches!(e, Event::Fault(_)) {
                    ram.put(Fault::RIP, LOW + far::code().len() as u64 - 4);
                }
            });
            let gpr = g.run_at(LOW, &[(Reg::Rdi, to), (Reg::Rcx, count)]);
            let faults: Vec<_> = g.faults().iter().map(|f| (f.vector, f.error, f.cr2)).collect();
            (gpr[Reg::Rdi as usize], faults, g.ram.read(page, 4096))
        });
        assert_eq!(outcomes[0], outcomes[1], "to {to:#x}");
        assert_eq!(outcomes[0].1.len(), 1, "to {to:#x}");
    }
}

guest!(far, "mov al, 7; rep stosb; xor eax, eax; syscall");
