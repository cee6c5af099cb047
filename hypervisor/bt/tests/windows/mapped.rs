//! Kernel mappings: kernel code that reaches memory by them must not be able to tell.
//!
//! Every test runs under both policies, and the soft TLB is the yardstick. What it does is checked, too.

use super::kernel::{CODE, KERNEL_PAGE, guest_with, run};
use super::*;

/// Two pages for kernel data, and a TiB elsewhere.
const DATA_AT: u64 = KERNEL + 0x41_0000_0000;
const FAR_AT: u64 = KERNEL + 0x4000_0000_0000;

/// The vector, error code, address and stack pointer of each fault, the registers at the end, and the guest.
type Outcome = (Vec<(u64, u64, u64, u64)>, [u64; 16]);

/// Runs code under both policies: the outcome must be the same, and mappings must have been made.
fn both(code: &[u8], registers: &[(Reg, u64)], prepare: impl Fn(&mut Guest), check: impl Fn(&mut Guest, Outcome)) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut outcomes = [Windows::Off, Windows::Always].map(|policy| {
        let mut g = guest_with(policy, code);
        for n in 0..2 {
            g.map_with(DATA_AT + n * 0x1000, (DATA_RAM + n * 0x1000) | KERNEL_PAGE, 12);
            g.map_with(FAR_AT + n * 0x1000, (OTHER_RAM + n * 0x1000) | KERNEL_PAGE, 12);
        }
        for n in 0..1024 {
            g.ram.put(DATA_RAM + n * 8, 0x1000 + n);
            g.ram.put(OTHER_RAM + n * 8, 0x2000 + n);
        }
        prepare(&mut g);
        // A fault goes on at the HLT that ends the code.
        let (halt, ram) = (CODE + code.len() as u64 - 1, g.ram.clone());
        g.set_hook(move |event| {
            if let Event::Fault(_) = event {
                ram.put(Fault::RIP, halt);
            }
        });
        let gpr = run(&mut g, registers);
        let faults = g.faults().iter().map(|f| (f.vector, f.error, f.cr2, f.rsp)).collect();
        let made = g.counter("kernel mappings made");
        assert_eq!(made > 0, g.expects_windows(), "{policy:?}: {made} mappings");
        (g, (faults, gpr))
    });
    assert_eq!(outcomes[0].1, outcomes[1].1);
    for data in [DATA_RAM, OTHER_RAM, CODE_RAM] {
        for n in 0..1024 {
            let [a, b] = [0, 1].map(|k: usize| outcomes[k].0.ram.get(data + n * 8));
            assert_eq!(a, b, "at {:#x}", data + n * 8);
        }
    }
    for (g, outcome) in &mut outcomes {
        check(g, outcome.clone());
    }
}

/// Where kernel code finds the entry that maps an address: [`DATA_AT`], or one that has an entry already. The same in every guest.
fn entry_of(la: u64, shift: u32) -> u64 {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut g = guest_with(Windows::Off, &[0xf4]);
    g.map_with(DATA_AT, KERNEL_PAGE, 12);
    KERNEL + g.ram.entry(la, shift)
}

// Forms of operands: base, index, displacement, spilled registers, high bytes, RCX as CL, read-modify-write, x87, SSE, pushes and pops.
guest!(
    forms,
    "mov r9, r8; mov r10, 8; mov rax, [r8]; add rax, [r8+r10*2+0x10]; mov r11, [r9+r10]; add rax, r11",
    "lock xadd [r8+0x40], rax; mov ah, [rbx+0x48]; mov [rbx+0x50], ch; mov dh, [rsi+rbp]; mov ecx, 3; shl qword ptr [r8+0x58], cl",
    "movups xmm0, [r8+0x60]; movups [rbx+0x61], xmm0; fild word ptr [r8]; fistp qword ptr [rbx+8]; movzx edx, byte ptr [rbx]",
    "cmpxchg [rbx+0x20], rdx; bts qword ptr [rbx+0x100], r10; bts [rbx+0x200], r12; mov rsp, rsi; push rax; push r9; push r10; push rdx; push r8",
    "pop rbp; pop r11; pop r12; push [r8+8]; pop [rbx+0x28]; pushfq; pop r13; xchg [rbx], r14; sete [rbx+0x31]; call 2f; 2: ret; hlt",
);

#[test]
fn operands_of_all_forms() {
    let registers = [
        (Reg::R8, DATA_AT),
        (Reg::Rbx, FAR_AT),
        (Reg::Rsi, DATA_AT + 0xff8),
        (Reg::R12, 0x403),
        (Reg::Rcx, 0x1234),
        (Reg::R14, 77),
    ];
    // The second RET finds what the stack holds, which leads nowhere.
    both(forms::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.len(), 1, "{faults:x?}"));
}

// Reads, changes the entry at R9 to R10, forgets the translation, and reads again.
guest!(remaps, "mov rax, [r8]; mov [r8], rax; mov [r9], r10; invlpg [r8]; mov rbx, [r8]; mov [r8+8], rbx; hlt");
// The same with a flush of global pages.
guest!(
    flushes,
    "mov rax, [r8]; mov [r8], rax; mov [r9], r10; mov rdx, cr4; btr rdx, 7; mov cr4, rdx; bts rdx, 7; mov cr4, rdx",
    "mov rbx, [r8]; mov [r8+8], rbx; hlt",
);

fn change(code: &[u8], entry: u64, check: impl Fn(&mut Guest, Outcome)) {
    let entry_at = entry_of(DATA_AT, 12);
    let registers = [(Reg::R8, DATA_AT), (Reg::R9, entry_at), (Reg::R10, entry)];
    both(code, &registers, |g| assert_eq!(KERNEL + g.ram.entry(DATA_AT, 12), entry_at), check);
}

#[test]
fn a_page_that_is_mapped_elsewhere_is_found_there() {
    for code in [remaps::code(), flushes::code()] {
        change(code, OTHER_RAM | KERNEL_PAGE, |g, (faults, gpr)| {
            assert_eq!((faults.len(), gpr[Reg::Rax as usize], gpr[Reg::Rbx as usize]), (0, 0x1000, 0x2000));
            assert_eq!((g.ram.get(DATA_RAM + 8), g.ram.get(OTHER_RAM + 8)), (0x1001, 0x2000));
        });
    }
}

#[test]
fn a_page_that_is_gone_or_read_only_faults() {
    for code in [remaps::code(), flushes::code()] {
        change(code, 0, |_, (faults, _)| assert_eq!(faults, [(PAGE_FAULT, 0, DATA_AT, TOP_OF_STACK)]));
        // Not writable any more: the load works, the store does not.
        change(code, DATA_RAM | KERNEL_PAGE & !2, |_, (faults, gpr)| {
            assert_eq!(faults, [(PAGE_FAULT, 3, DATA_AT + 8, TOP_OF_STACK)]);
            assert_eq!(gpr[Reg::Rbx as usize], 0x1000);
        });
        // A user page is not for the kernel, for SMAP is on. The tables permit user access, so that the entry decides.
        change(code, DATA_RAM | KERNEL_PAGE | 4, |_, (faults, _)| {
            assert_eq!(faults, [(PAGE_FAULT, 1, DATA_AT, TOP_OF_STACK)]);
        });
        // Not global: it may be used, and is found.
        change(code, OTHER_RAM | KERNEL_PAGE & !GLOBAL, |_, (faults, gpr)| {
            assert_eq!((faults.len(), gpr[Reg::Rbx as usize]), (0, 0x2000));
        });
    }
}

const TOP_OF_STACK: u64 = KERNEL + KERNEL_STACK;

// Changes a non-global page's entry and reloads CR3.
guest!(reloads, "mov rax, [r8]; mov [r9], r10; mov rdx, cr3; mov cr3, rdx; mov rbx, [r8]; mov rdx, [rsi]; hlt");

#[test]
fn a_page_that_is_not_global_does_not_outlive_cr3() {
    let code = reloads::code();
    let entry_at = entry_of(DATA_AT, 12);
    let registers =
        [(Reg::R8, DATA_AT), (Reg::R9, entry_at), (Reg::R10, OTHER_RAM | KERNEL_PAGE & !GLOBAL), (Reg::Rsi, FAR_AT)];
    both(
        code,
        &registers,
        |g| g.map_with(DATA_AT, DATA_RAM | KERNEL_PAGE & !GLOBAL, 12),
        |_, (faults, gpr)| assert_eq!((faults.len(), gpr[Reg::Rbx as usize]), (0, 0x2000)),
    );
}

// Reads device memory and writes it 20 times.
guest!(device, "mov rax, [rbx]; mov ebp, 20; 2: mov al, [r8]; mov [r8], al; dec ebp; jnz 2b; hlt");

#[test]
fn device_memory_is_reached_each_time_but_costs_few_signals() {
    let registers = [(Reg::R8, FAR_AT + 0x10_0000), (Reg::Rbx, DATA_AT)];
    both(
        device::code(),
        &registers,
        |g| g.map_with(FAR_AT + 0x10_0000, MMIO | KERNEL_PAGE, 12),
        |g, (faults, _)| {
            assert_eq!(faults.len(), 0);
            let [reads, writes] = [&g.bus.mmio_reads, &g.bus.mmio_writes].map(|n| n.load(Ordering::SeqCst));
            assert_eq!((reads, writes), (20, 20));
            assert!(g.counter("kernel mapping misses") < 12, "{}", g.counter("kernel mapping misses"));
        },
    );
}

guest!(wild, "mov rax, [rbx]; mov rdx, [r8+0x10]; hlt");
guest!(wild_stack, "mov rax, [rbx]; mov rdx, [rbp+0x10]; hlt");
guest!(wild_index, "mov rax, [rbx]; mov rdx, [r8+rbp*8]; hlt");
guest!(wild_store, "mov rax, [rbx]; mov [r8-0x10], rax; hlt");

/// Addresses that are not canonical, or of user code, or beside what is mapped.
#[test]
fn addresses_of_nothing_fault_as_they_do() {
    let mut addresses =
        vec![0, 0x10, 0x7fff_ffff_f000, 1 << 47, 0xffff_7fff_ffff_f000, u64::MAX - 0x1000, 1 << 62, LOW];
    for bit in 40..64 {
        addresses.extend([DATA_AT ^ 1 << bit, FAR_AT ^ 1 << bit]);
    }
    // The last of these is RAM.
    for la in addresses.into_iter().filter(|&la| la != KERNEL) {
        let registers = [(Reg::R8, la), (Reg::Rbp, la), (Reg::Rbx, DATA_AT)];
        both(wild::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.len(), 1, "{la:#x}"));
        both(wild_store::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.len(), 1, "{la:#x}"));
        both(
            wild_stack::code(),
            &registers,
            |_| {},
            |_, (faults, _)| {
                let canonical = (la + 0x10) as i64 >> 47 == 0 || (la + 0x10) as i64 >> 47 == -1;
                assert_eq!(faults[0].0, if canonical { PAGE_FAULT } else { STACK_FAULT }, "{la:#x}");
            },
        );
        let registers = [(Reg::R8, la), (Reg::Rbp, 3), (Reg::Rbx, DATA_AT)];
        both(wild_index::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.len(), 1, "{la:#x}"));
    }
}

// Calls code behind itself that returns a constant, and changes the constant by way of the direct mapping.
guest!(
    patches,
    "mov ebp, 50; 2: call 3f; add ebx, eax; inc dword ptr [r8]; dec ebp; jnz 2b; jmp 4f; .balign 64; 3: mov eax, 1; ret; 4: hlt",
);

#[test]
fn code_that_is_written_by_another_address_is_what_runs() {
    let code = patches::code();
    let at = code.windows(5).position(|w| w == [0xb8, 1, 0, 0, 0]).unwrap() as u64 + 1;
    let place = super::kernel::CODE_AT + at;
    let registers = [(Reg::R8, KERNEL + place)];
    both(
        code,
        &registers,
        |_| {},
        |_, (faults, gpr)| {
            assert_eq!((faults.len(), gpr[Reg::Rbx as usize]), (0, (1..=50).sum()));
        },
    );
}

// Pops and pushes that run from a page into one that is not there.
guest!(pops, "mov rsp, r8; pop rax; pop rdx; pop rbp; pop rdi; pop r9; pop r10; hlt");
guest!(pushes, "mov rsp, r8; push rax; push rdx; push rbp; push rdi; push r9; push r10; hlt");

#[test]
fn runs_fault_where_they_would() {
    for n in 0..7 {
        let registers = [(Reg::R8, DATA_AT + 0x2000 - n * 8)];
        both(pops::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.len(), usize::from(n < 6)));
        let registers = [(Reg::R8, DATA_AT + n * 8), (Reg::Rax, 1), (Reg::Rdx, 2), (Reg::R9, 3), (Reg::R10, 4)];
        both(pushes::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.len(), usize::from(n < 6)));
    }
}

guest!(
    strings,
    "mov r10, [r8]; mov rdi, r8; mov rcx, r9; rep stosq; mov rdi, rbx; mov rsi, r12; mov rcx, r13; rep movsb; hlt"
);

#[test]
fn string_instructions_fault_where_they_would() {
    for (quads, from, bytes) in [
        (512, DATA_AT + 0x800, 0x1000),
        (1024, DATA_AT, 0x2000),
        (1025, DATA_AT, 1),
        (0, DATA_AT, 0),
        (5, FAR_AT, 3000),
    ] {
        for to in [FAR_AT, FAR_AT + 0x801, DATA_AT + 0x1001, LOW] {
            let registers = [
                (Reg::R8, DATA_AT),
                (Reg::R9, quads),
                (Reg::Rbx, to),
                (Reg::R12, from),
                (Reg::R13, bytes),
                (Reg::Rax, 0x1122_3344_5566_7788),
            ];
            let good = quads <= 1024 && (bytes == 0 || to != LOW && (to & 0xfff_ffff) + bytes <= 0x2000);
            both(strings::code(), &registers, |_| {}, |_, (faults, _)| assert_eq!(faults.is_empty(), good, "{to:#x}"));
        }
    }
}

// Writes to all pages of the direct mapping that lie in its large pages' first MiB, and reads them back.
guest!(
    large,
    "2: mov [r8], r8; add rbx, [r8]; add r8, r9; dec ebp; jnz 2b; mov [r12], r13; invlpg [rsi]; mov rax, [rsi]; hlt"
);

/// Large pages are mapped as such, and INVLPG of any part of one drops it whole.
#[test]
fn large_pages_go_as_a_whole() {
    let (page, other) = (KERNEL + 0x200_0000, 0x260_0000);
    let table = entry_of(page, 21);
    let registers = [
        (Reg::R8, page),
        (Reg::R9, 0x1000),
        (Reg::Rbp, 256),
        (Reg::R12, table),
        (Reg::R13, other | KERNEL_PAGE | LARGE),
        (Reg::Rsi, page + 0x3_0000),
    ];
    both(
        large::code(),
        &registers,
        |g| g.ram.put(other + 0x3_0000, 0x55),
        |g, (faults, gpr)| {
            assert_eq!((faults.len(), gpr[Reg::Rax as usize]), (0, 0x55));
            assert!(g.counter("kernel mapping misses") < 20);
        },
    );
}

/// Pages of user memory, of which the sixth is not there.
const USER_AT: u64 = LOW + ROOM;

// R14 times: 6,000 bytes from user memory to the kernel's and 700 words back, with flags that are asked for behind it, none and 77 doublewords behind
// them.
guest!(
    crosses,
    "stac; xor ebp, ebp",
    "2: lea rsi, [r8+0x123]; mov rdi, r9; mov ecx, 6000; rep movsb; mov r15, rdi; lea rsi, [r10+8]; lea rdi, [r8+0x2e01]; mov ecx, 700",
    "stc; rep movsq; adc rbp, rsi; mov eax, 0x1234567; mov ecx, 0; rep stosd; mov ecx, 77; rep stosd; mov r13, rdi; dec r14d; jnz 2b; clac; hlt",
);

// As many words as RCX says, from RSI to RDI.
guest!(crosses_until, "stac; mov edx, 0x55; rep movsq; clac; mov rbx, rdx; hlt");

fn user_pages(g: &mut Guest) {
    for n in 0..5 {
        g.map(USER_AT + n * 0x1000, POOL + n * 0x1000);
        for k in 0..512 {
            g.ram.put(POOL + n * 0x1000 + k * 8, n << 32 | k);
        }
    }
}

#[test]
fn strings_between_kernel_and_user_memory_go_across_pages() {
    let registers = [(Reg::R8, USER_AT), (Reg::R9, DATA_AT + 0x45), (Reg::R10, FAR_AT), (Reg::R14, 50)];
    both(crosses::code(), &registers, user_pages, |g, (faults, gpr)| {
        assert_eq!(faults.len(), 0);
        let to = USER_AT + 0x2e01 + 5600;
        assert_eq!((gpr[Reg::R15 as usize], gpr[Reg::R13 as usize]), (DATA_AT + 0x45 + 6000, to + 4 * 77));
        assert_eq!(gpr[Reg::Rbp as usize], (0..50).fold(0u64, |sum, _| sum.wrapping_add(FAR_AT + 8 + 5600 + 1)));
        assert_eq!(g.ram.0.read_obj::<u64>(GuestAddress(DATA_RAM + 0x45)).unwrap() & 0xff, 0);
        assert_eq!(g.ram.0.read_obj::<u32>(GuestAddress(POOL + (to - USER_AT))).unwrap(), 0x123_4567);
        for k in 0..700 {
            let word: u64 = g.ram.0.read_obj(GuestAddress(POOL + 0x2e01 + k * 8)).unwrap();
            let from =
                if k < 511 { g.ram.get(OTHER_RAM + 8 + k * 8) } else { g.ram.get(OTHER_RAM + 0x1000 + (k - 511) * 8) };
            assert_eq!(word, from, "{k}");
        }
        if g.policy == Windows::Always && g.expects_windows() {
            // In each turn a string of no elements and words that lie across two pages; and a few first ones. It would be four a turn.
            let emulated = g.counter("instructions emulated");
            assert!(emulated < 120, "{emulated} emulated");
        }
    });
}

/// A page of the user's, or of the kernel's, that is not there faults at its first byte, with what comes before it done.
#[test]
fn strings_between_kernel_and_user_memory_stop_exactly() {
    let end = USER_AT + 5 * 0x1000;
    for (from, to, fault) in [
        (DATA_AT + 3, end - 2000, (PAGE_FAULT, 2, end)),
        (end - 2000, DATA_AT + 3, (PAGE_FAULT, 0, end)),
        (DATA_AT + 0x2000 - 2400, USER_AT + 5, (PAGE_FAULT, 0, DATA_AT + 0x2000)),
        (USER_AT + 5, FAR_AT + 0x2000 - 2400, (PAGE_FAULT, 2, FAR_AT + 0x2000)),
    ] {
        let registers = [(Reg::Rsi, from), (Reg::Rdi, to), (Reg::Rcx, 600), (Reg::Rdx, 0x99), (Reg::Rbx, 1)];
        both(crosses_until::code(), &registers, user_pages, |_, (faults, gpr)| {
            let (vector, error, cr2, _) = faults[0];
            assert_eq!((faults.len(), vector, error, cr2), (1, fault.0, fault.1, fault.2), "{from:#x} {to:#x}");
            let done = 600 - gpr[Reg::Rcx as usize];
            assert_eq!((gpr[Reg::Rsi as usize], gpr[Reg::Rdi as usize]), (from + done * 8, to + done * 8));
            assert!(done > 0 && gpr[Reg::Rdx as usize] == 0x55 && gpr[Reg::Rbx as usize] == 1);
        });
    }
}

// Forms that only Rust carries out: of words, backwards, and with addresses of 32 bits.
guest!(
    other_forms,
    "mov r9, [rsi]; stac; mov ecx, 300; rep movsw; mov rbx, rdi; mov ecx, 40; std; rep movsb; cld; mov rdx, rdi; mov ecx, 20; rep stosw; mov rbp, rdi",
    "mov ecx, 9; mov edi, r8d; rep stos byte ptr es:[edi], al; clac; hlt",
);

#[test]
fn strings_of_other_forms_come_to_their_end() {
    let registers = [(Reg::Rsi, DATA_AT + 64), (Reg::Rdi, USER_AT + 64), (Reg::R8, USER_AT + 0x800), (Reg::Rax, 0x77)];
    both(other_forms::code(), &registers, user_pages, |g, (faults, gpr)| {
        assert_eq!(faults.len(), 0);
        let to = USER_AT + 64 + 600;
        let want = [(Reg::Rbx, to), (Reg::Rdx, to - 40), (Reg::Rbp, to), (Reg::Rdi, USER_AT + 0x809)];
        for (r, v) in want {
            assert_eq!(gpr[r as usize], v, "{r:?}");
        }
        assert_eq!((g.ram.get(POOL + 64), g.ram.get(POOL + 0x800)), (0x1008, 0x7777_7777_7777_7777));
    });
}
