//! Guest registers that live in memory and that R11 holds as well: what interrupts an instruction must not lose them.

use super::*;

// Every access is the first one to its page, so that it goes to Rust and starts over: with R9 written before it and read behind it, with R10
// as its base, with R11 as what it stores, and with R9 as what it loads; then a report in between.
guest!(
    held,
    "mov r9d, 5; mov rax, [r8]; add r9d, 1; mov [r8+8], r9",
    "lea r10, [r8+0x1010]; mov rdx, [r10]; add rdx, r10; mov [r10+8], rdx",
    "lea r11, [rdx+7]; mov [r8+0x2000], r11; add r11, r11; mov [r8+0x2008], r11",
    "movzx r9d, byte ptr [r8+0x3001]; shl r9w, 4; sub r9, r10; mov rbx, r9; xor r9, r11; mov rbp, r9",
    "lea r9, [rbx+rbp*2+1]; mov [r8+0x4000], r10; lock xadd [r8+0x5000], r9; mov r12, r9; mov r13, [r8+0x5000]",
    "lea r11, [r8+0x6000]; mov eax, 1; mov edi, 1; mov [r11], r9; mov r14, r11; add r11, [r8+0x7000]; mov r15, r11; xor eax, eax; syscall",
);

#[test]
fn registers_in_memory_survive_accesses_that_start_over() {
    everywhere(|policy, base| {
        let mut g = Guest::new(policy, base, held::code());
        let at = base + ROOM;
        for n in 0..8 {
            g.map(at + n * 0x1000, POOL + n * 0x1000);
            for k in 0..8 {
                g.ram.put(POOL + n * 0x1000 + k * 8, 0x0101_0101 * (n + 1) + k);
            }
        }
        let word = |n: u64, k: u64| 0x0101_0101 * (n + 1) + k;
        let gpr = g.run(&[(Reg::R8, at)]);
        let r10 = at + 0x1010;
        let rdx = word(1, 2).wrapping_add(r10);
        let r11 = rdx.wrapping_add(7).wrapping_mul(2);
        let rbx = (word(3, 0) >> 8 & 0xff) << 4;
        let rbx = rbx.wrapping_sub(r10);
        let rbp = rbx ^ r11;
        let added = rbx.wrapping_add(rbp.wrapping_mul(2)).wrapping_add(1);
        let r15 = (at + 0x6000).wrapping_add(word(7, 0));
        let want = [
            (Reg::Rbx, rbx),
            (Reg::Rbp, rbp),
            (Reg::R12, word(5, 0)),
            (Reg::R13, word(5, 0).wrapping_add(added)),
            (Reg::R14, at + 0x6000),
            (Reg::R15, r15),
        ];
        for (r, v) in want {
            assert_eq!(gpr[r as usize], v, "{r:?}");
        }
        let stored =
            [(0x0008, 6), (0x1018, rdx), (0x2000, rdx + 7), (0x2008, r11), (0x4000, r10), (0x6000, word(5, 0))];
        for (offset, v) in stored {
            assert_eq!(g.ram.get(POOL + offset), v, "{offset:#x}");
        }
    });
}
