//! Loops of one block, whose rounds behind the first make no checks and have R9 to R11 in host registers: what interrupts a round, and
//! addresses that leave their window.

use super::*;

// RBP bytes from R9 to R10, both by R11, which begins at 0, with R11 in RSI where a fault shows it. R13 and R15 lend their registers.
guest!(
    copy,
    "mov r13d, 77; mov r15d, 78; xor r11d, r11d",
    ".balign 16; 2: mov rsi, r11; mov rax, [r9+r11]; add rax, r11; mov [r10+r11], rax; add r11, 8; cmp r11, rbp; jne 2b",
    "mov r14, r11; mov rbx, r9; mov rdi, r10; xor eax, eax; syscall",
);

#[test]
fn rounds_come_to_new_pages() {
    everywhere(|policy, base| {
        // Aligned, and with operands across pages.
        for skew in [0, 4] {
            let mut g = Guest::new(policy, base, copy::code());
            let (from, to) = (base + ROOM, base + ROOM + 0x10_0000);
            // Neighbours in the guest's addresses are none in its memory.
            let place = |n: u64| POOL + (n * 5 % 8) * 0x2000;
            for n in 0..5 {
                // Not used yet, or they would be mapped with their neighbours.
                g.map_with(from + n * 0x1000, place(n) | 7, 12);
                g.map_with(to + n * 0x1000, (place(n) + 0x1000) | 7, 12);
            }
            let bytes: Vec<u8> = (0..0x4008u64).map(|n| (n * 7 + (n >> 8)) as u8).collect();
            g.ram.write(from + skew, &bytes);
            // One page of the target is missing, and one may not be written.
            let missing = g.ram.entry(to + 0x2000, 12);
            let locked = g.ram.entry(to + 0x3000, 12);
            let (was, shut) = (g.ram.get(missing), g.ram.get(locked));
            g.ram.put(missing, 0);
            g.ram.put(locked, shut & !2);
            let ram = g.ram.clone();
            g.set_hook(move |e| {
                if let Event::Fault(f) = e {
                    ram.put(if f.error & 1 == 0 { missing } else { locked }, if f.error & 1 == 0 { was } else { shut });
                }
            });
            let (r9, r10) = (from + skew, to + skew);
            let gpr = g.run(&[(Reg::R9, r9), (Reg::R10, r10), (Reg::Rbp, 0x4000)]);
            let want = [(Reg::R14, 0x4000), (Reg::Rbx, r9), (Reg::Rdi, r10), (Reg::R13, 77), (Reg::R15, 78)];
            for (r, v) in want {
                assert_eq!(gpr[r as usize], v, "{r:?}");
            }
            let faults = g.faults();
            // The page that is missing keeps the index where an operand first reaches it.
            let first = |page: u64| (page - skew) & !7;
            let seen: Vec<_> = faults.iter().map(|f| (f.vector, f.error & 7, f.rsi)).collect();
            assert_eq!(seen, [(PAGE_FAULT, 6, first(0x2000)), (PAGE_FAULT, 7, first(0x3000))]);
            let rip = faults[0].rip;
            assert!(faults.iter().all(|f| f.rip == rip), "{faults:x?}");
            let copied = g.ram.read(to + skew, 0x4000);
            for n in (0..0x4000usize).step_by(8) {
                let word = |b: &[u8]| u64::from_le_bytes(b[n..n + 8].try_into().unwrap());
                assert_eq!(word(&copied), word(&bytes).wrapping_add(n as u64), "{n:#x}");
            }
        }
    });
}

// Adds up bytes from R9 on, 64 apart, and stores the sum's low byte at R10.
guest!(
    walk,
    "xor ebx, ebx",
    ".balign 16; 2: movzx eax, byte ptr [r9]; add rbx, rax; mov [r10], bl; add r9, 64; dec ebp; jne 2b",
    "mov r14, r9; xor eax, eax; syscall",
);

#[test]
fn a_device_sees_each_access_of_a_round_once() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, walk::code());
        let at = base + ROOM;
        g.map(at, POOL);
        g.map(at + 0x1000, MMIO);
        g.map(at + 0x2000, POOL + 0x1000);
        g.ram.write(at, &[1; 0x1000]);
        g.ram.write(at + 0x2000, &[2; 0x1000]);
        let gpr = g.run(&[(Reg::R9, at), (Reg::R10, base + DATA), (Reg::Rbp, 3 * 64)]);
        assert_eq!(g.bus.mmio_reads.load(Ordering::SeqCst), 64);
        // The device gives 1, 2, 3 and so on.
        assert_eq!(gpr[Reg::Rbx as usize], 64 + (1..=64).sum::<u64>() + 128);
        assert_eq!(gpr[Reg::R14 as usize], at + 0x3000);

        // And what it is told, 192 times.
        g.map(base + 2 * ROOM, MMIO);
        g.run(&[(Reg::R9, at), (Reg::R10, base + 2 * ROOM), (Reg::Rbp, 3 * 64)]);
        assert_eq!(g.bus.mmio_writes.load(Ordering::SeqCst), 192);
    });
}

#[test]
fn rounds_go_on_where_no_window_is() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, walk::code());
        // The ends of the low window, of all high ones, and of what a bit or a few of an address tell.
        for end in [1 << 31, 0x5800_0000_0000, 0x6000_0000_0000, 0x4000_0000_0000] {
            if (end > 1 << 32) != (base == HIGH) {
                continue;
            }
            for (n, page) in (0..).zip([end - 0x2000, end - 0x1000, end, end + 0x1000]) {
                g.map(page, POOL + n * 0x1000);
                g.ram.write(page, &[n as u8 + 1; 0x1000]);
            }
            let gpr = g.run(&[(Reg::R9, end - 0x2000), (Reg::R10, base + DATA), (Reg::Rbp, 4 * 64)]);
            assert_eq!(gpr[Reg::Rbx as usize], 64 * (1 + 2 + 3 + 4), "{end:#x}");
            assert_eq!(gpr[Reg::R14 as usize], end + 0x2000);
        }
        // Out of the lower half.
        g.map(0x7fff_ffff_f000, POOL);
        let ram = g.ram.clone();
        g.set_hook(move |e| {
            if let Event::Fault(f) = e {
                // Goes on at the last line, as the loop does at its end.
                ram.put(Fault::RIP, f.rdx);
            }
        });
        let end = base + walk::code().len() as u64 - 7;
        let high = [(Reg::R9, 0x7fff_ffff_f000), (Reg::R10, base + DATA), (Reg::Rbp, 128), (Reg::Rdx, end)];
        let gpr = g.run(&high);
        assert_eq!(gpr[Reg::Rbp as usize], 64);
        let faults = g.faults();
        assert_eq!((faults.len(), faults[0].vector), (1, GENERAL_PROTECTION), "{faults:x?}");
    });
}

// Offsets from a list at R8, added to R9 in the address or for good, until one leads astray.
guest!(
    astray,
    "xor ebx, ebx",
    ".balign 16; 2: mov rsi, [r8]; mov rbx, [r9+rsi]; add r8, 8; dec ebp; jne 2b",
    "3: xor eax, eax; syscall",
);
guest!(
    astray_for_good,
    "xor ebx, ebx",
    ".balign 16; 2: mov rsi, [r8]; add r9, rsi; mov rbx, [r9]; add r8, 8; dec ebp; jne 2b",
    "3: xor eax, eax; syscall",
);
guest!(
    astray_by_half,
    "xor ebx, ebx",
    ".balign 16; 2: mov esi, [r8]; mov rbx, [r9+rsi*8]; add r8, 8; dec ebp; jne 2b",
    "3: xor eax, eax; syscall",
);

static SECRET: AtomicU64 = AtomicU64::new(0x5ec2_e75e_c2e7);

#[test]
fn rounds_reach_nothing_of_the_host() {
    let secret = SECRET.as_ptr() as u64;
    everywhere(|policy, base| {
        for (code, half) in [(astray::code(), false), (astray_for_good::code(), false), (astray_by_half::code(), true)]
        {
            let mut g = Guest::new(policy, base, code);
            let list = base + ROOM;
            g.map(list, POOL);
            let end = base + code.len() as u64 - 4;
            let ram = g.ram.clone();
            g.set_hook(move |e| {
                if let Event::Fault(_) = e {
                    ram.put(Fault::RIP, end);
                }
            });
            let data = base + DATA;
            // By each distance there is from the guest's addresses, and with bits that only a guest's address may lack.
            let hosts = distances().iter().map(|d| secret.wrapping_add(*d)).chain([secret, 1 << 63, 0xffff << 48]);
            for la in hosts {
                let wrong = if half { la >> 3 & 0xffff_ffff } else { la.wrapping_sub(data) };
                if wrong == 0 {
                    continue;
                }
                for n in 0..30 {
                    g.ram.put(POOL + n * 8, if n == 20 { wrong } else { 0 });
                }
                let registers = [(Reg::R8, list), (Reg::R9, data), (Reg::Rbp, 30)];
                let gpr = g.run(&registers);
                assert_eq!(gpr[Reg::Rbp as usize], 10, "{la:#x}");
                assert_ne!(gpr[Reg::Rbx as usize], SECRET.load(Ordering::Relaxed), "{la:#x}");
                assert_eq!(g.faults().len(), 1, "{la:#x}");
            }
        }
    });
}

// What it adds is the byte at R9, in its own code.
guest!(
    patched,
    "xor ebx, ebx; lea r9, [rip+3f]; jmp 2f",
    ".balign 16; 2: mov al, [r8]; mov [r9], al; .byte 0x83, 0xc3; 3: .byte 1; add r8, 1; dec ebp; jne 2b",
    "xor eax, eax; syscall",
);

#[test]
fn rounds_run_what_they_write() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, patched::code());
        g.map(base + ROOM, POOL);
        let list: Vec<u8> = (0..40).map(|n| 1 + n / 10).collect();
        g.ram.write(base + ROOM, &list);
        let gpr = g.run(&[(Reg::R8, base + ROOM), (Reg::Rbp, 40)]);
        assert_eq!(gpr[Reg::Rbx as usize], list.iter().map(|n| u64::from(*n)).sum::<u64>());
    });
}
