//! Kernel code: its calls and returns are the host's too, and must go where the guest's memory says.
//!
//! The code under test runs in ring 0 from a small global page at [`CODE`], with page tables and all of RAM at [`KERNEL`].

use super::*;
use paravane_cpu::{Seg, Segment};

/// Where kernel code is, and a second page behind it.
pub(crate) const CODE: u64 = KERNEL + 0x40_0000_0000;
pub(crate) const CODE_AT: u64 = 0x42_0000;
const OTHER_AT: u64 = 0x43_0000;
/// The stack pointer, also of faults: they leave their frames where faults of user code do.
const TOP: u64 = KERNEL + KERNEL_STACK;
/// Present, writable, accessed, dirty, global; not for user code.
pub(crate) const KERNEL_PAGE: u64 = 0x163;

fn guest(code: &[u8], other: &[u8]) -> Guest {
    prepare(Guest::new(Windows::Auto, LOW, &[0xf4]), code, other)
}

/// A guest with kernel code, beside others: whoever makes it has the turn.
pub(crate) fn guest_with(policy: Windows, code: &[u8]) -> Guest {
    prepare(Guest::beside(policy, LOW, &[0xf4], RAM), code, &[])
}

/// Puts kernel code in two pages, and gives faults a stack of their own.
fn prepare(mut g: Guest, code: &[u8], other: &[u8]) -> Guest {
    g.ram.put(TSS + 36, TOP);
    for vector in [STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT] {
        g.ram.put(IDT + vector * 16, g.ram.get(IDT + vector * 16) | 1 << 32);
    }
    g.map_with(CODE, CODE_AT | KERNEL_PAGE, 12);
    g.map_with(CODE + 0x1000, OTHER_AT | KERNEL_PAGE, 12);
    for (at, code) in [(CODE_AT, code), (OTHER_AT, other)] {
        g.ram.0.write_slice(code, GuestAddress(at)).unwrap();
    }
    g
}

/// Runs kernel code from its beginning until it halts.
pub(crate) fn run(g: &mut Guest, registers: &[(Reg, u64)]) -> [u64; 16] {
    let st = g.prepare(CODE);
    st.seg = [Segment::flat_data(0x10, 0); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(8, 0, true);
    st.cr4 |= cr4::SMAP;
    st.cpl = 0;
    st.gpr[Reg::Rsp as usize] = TOP;
    for &(r, value) in registers {
        st.gpr[r as usize] = value;
    }
    assert_eq!(g.vcpu.run().unwrap(), paravane_cpu::VcpuExit::Halt);
    g.vcpu.state().gpr
}

// Calls R15, which is elsewhere, RBP times; EBX counts the returns by the code that they find.
guest!(caller, "2: call r15; add ebx, 1; dec ebp; jnz 2b; hlt");
guest!(other_caller, "2: call r15; add ebx, 16; dec ebp; jnz 2b; hlt");
// At the third call, makes [R8] R9 and forgets the translation of RSI.
guest!(callee, "cmp ebp, 3; jne 2f; mov [r8], r9; invlpg [rsi]; 2: ret");

/// A page of kernel code is mapped elsewhere while it waits for a call to return: it goes on in what is there now.
#[test]
fn a_kernel_call_returns_to_what_is_mapped_now() {
    let mut g = guest(caller::code(), callee::code());
    const NEW_AT: u64 = 0x44_0000;
    g.ram.0.write_slice(other_caller::code(), GuestAddress(NEW_AT)).unwrap();
    let entry = KERNEL + g.ram.entry(CODE, 12);
    let registers =
        [(Reg::R15, CODE + 0x1000), (Reg::Rbp, 6), (Reg::R8, entry), (Reg::R9, NEW_AT | KERNEL_PAGE), (Reg::Rsi, CODE)];
    // Calls at 6, 5 and 4 return to the old page, those at 3, 2 and 1 to the new one.
    assert_eq!(run(&mut g, &registers)[Reg::Rbx as usize], 3 + 3 * 16);
}

// Calls itself RBP deep, and counts on the way back.
guest!(deep, "call 2f; hlt; 2: sub rbp, 1; jz 3f; call 2b; 3: add ebx, 1; ret");

/// More calls than the host's stack of them holds.
#[test]
fn kernel_calls_may_go_deep() {
    let mut g = guest(deep::code(), &[]);
    let depth = 100_000;
    let registers = [(Reg::Rbp, depth), (Reg::Rsp, KERNEL + 0x380_0000)];
    assert_eq!(run(&mut g, &registers)[Reg::Rbx as usize], depth);
}

// In a call, goes to user code at RBX, without ever returning.
guest!(to_user, "mov [r8], rbx; call r15; hlt", "2: jmp 2b");
guest!(leaves, "mov r11d, 2; mov rcx, [r8]; mov r9, [rsp]; mov rsp, r14; sysretq");
// Returns to R9, which is where the kernel waits.
guest!(returns, "push r9; ret");

/// User code that returns to where kernel code has called from faults there, as it does without such a call.
#[test]
fn user_code_does_not_return_into_the_kernel() {
    let mut g = guest(to_user::code(), leaves::code());
    g.ram.0.write_slice(returns::code(), GuestAddress(CODE_RAM)).unwrap();
    let halt = CODE + to_user::code().len() as u64 - 3;
    let base = g.base;
    g.ram.put(0x7000, 0);
    let ram = g.ram.clone();
    // The fault ends the run: on to the HLT in ring 0, by way of the frame.
    g.set_hook(move |event| {
        if let Event::Fault(_) = event {
            for (n, word) in [halt, 8, 2, TOP, 0x10].into_iter().enumerate() {
                ram.put(Fault::RIP + 8 * n as u64, word);
            }
        }
    });
    let registers = [(Reg::R8, KERNEL + 0x7000), (Reg::Rbx, base), (Reg::R15, CODE + 0x1000), (Reg::R14, base + STACK)];
    run(&mut g, &registers);
    let faults = g.faults();
    assert_eq!(faults.len(), 1, "{faults:x?}");
    let f = faults[0];
    assert_eq!((f.vector, f.error, f.rip, f.cr2), (PAGE_FAULT, 5 | 16, halt, halt), "{f:x?}");
}

// A callee that sets the direction flag, and a caller that stores to [RDI] and steps as the flag says.
guest!(direction, "call r15; mov al, 0x5a; stosb; cld; hlt");
guest!(sets_direction, "std; ret");

/// A call is returned to with what the callee has changed.
#[test]
fn a_kernel_call_may_change_the_direction() {
    let mut g = guest(direction::code(), sets_direction::code());
    for _ in 0..3 {
        let to = KERNEL + DATA_RAM + 8;
        let gpr = run(&mut g, &[(Reg::R15, CODE + 0x1000), (Reg::Rdi, to)]);
        assert_eq!(gpr[Reg::Rdi as usize], to - 1);
    }
}
