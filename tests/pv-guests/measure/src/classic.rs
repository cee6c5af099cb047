//! The seven nanobenchmarks of Adams and Agesen ("A Comparison of Software and Hardware Techniques for x86 Virtualization", ASPLOS
//! 2006), and other single instructions.
//!
//! System calls and faults come from user mode: a loop in a page of its own that reads the TSC before and after, and ends with UD2. The
//! kernel's side is as short as it can be, so that the figure is the processor's way in and out: SYSRET at once, or IRETQ behind
//! the faulting instruction.

use crate::harness::{Outcome, Run, in_pieces, repeated, self_timed};
use core::arch::{asm, global_asm, naked_asm};
use guest_rt::paging::{PRESENT_WRITABLE, USER};
use guest_rt::{Page, cpu, trap};

/// One loop of user code, which is copied to a page: RDI holds the count, RAX afterwards the cycles. R14 is an address that maps nothing.
macro_rules! user_loop {
    ($name:literal, $($body:literal),*) => {
        global_asm!(
            concat!(".global ", $name, ", ", $name, "_end"),
            concat!($name, ":"),
            concat!("lea r14, [rip + ", $name, " + 0x3000]"),
            "mov rbx, rdi", "xor ecx, ecx",
            "lfence", "rdtsc", "shl rdx, 32", "lea r15, [rax + rdx]",
            "2:", $($body,)* "dec rbx", "jnz 2b",
            "lfence", "rdtsc", "shl rdx, 32", "add rax, rdx", "sub rax, r15", "ud2",
            "4: ret",
            concat!($name, "_end:"),
        );
    };
}

user_loop!("user_syscall", "syscall");
// Three bytes that load from nowhere.
user_loop!("user_pgfault", "mov rax, [r14]");
// Two bytes that divide by ECX, which is 0.
user_loop!("user_divzero", "div ecx");
user_loop!("user_call", "call 4f");

unsafe extern "C" {
    static user_syscall: u8;
    static user_syscall_end: u8;
    static user_pgfault: u8;
    static user_pgfault_end: u8;
    static user_divzero: u8;
    static user_divzero_end: u8;
    static user_call: u8;
    static user_call_end: u8;
}

/// SYSCALL's entry: back at once. RCX and R11 hold what SYSRET wants.
#[unsafe(naked)]
extern "C" fn syscall_entry() {
    naked_asm!("sysretq")
}

/// The page-fault handler: drops the error code and goes on behind the load.
#[unsafe(naked)]
extern "C" fn skip_load() {
    naked_asm!("add rsp, 8", "add qword ptr [rsp], 3", "iretq")
}

/// The divide-error handler: goes on behind the division.
#[unsafe(naked)]
extern "C" fn skip_division() {
    naked_asm!("add qword ptr [rsp], 2", "iretq")
}

static mut CODE: Page = Page::ZERO;
static mut STACK: Page = Page::ZERO;

/// Runs a loop in user mode, from page 0 of the window, with its stack in page 1. Page 3 maps nothing. `failure` is why it does not end as it should.
fn in_user_mode(run: &Run<'_>, code: &'static u8, end: &'static u8, failure: &'static str) -> Outcome {
    let bytes = core::ptr::from_ref(end) as usize - core::ptr::from_ref(code) as usize;
    assert!(bytes <= 4096);
    let allow = PRESENT_WRITABLE | USER;
    // SAFETY: the code's bytes lie between two symbols of one section; the page is this module's.
    unsafe { core::ptr::copy_nonoverlapping(code, (&raw mut CODE).cast(), bytes) };
    run.window.map(0, &raw const CODE as u64 | allow);
    run.window.map(1, &raw const STACK as u64 | allow);
    run.window.map(3, 0);
    let run_user = |count| {
        // SAFETY: the code writes nothing but its stack, and ends with UD2.
        unsafe { trap::enter_user(run.window.address(0), run.window.address(2), 2, trap::USER_CODE, count) };
        let end = trap::last().frame;
        (end.vector == 6 && end.cs == trap::USER_CODE).then_some(end.rax)
    };
    // What ends otherwise does so at once.
    run_user(1).ok_or(failure)?;
    self_timed(run.count, |count| run_user(count).expect("user code ends with UD2"))
}

/// The same with an exception's gate pointed at a handler.
fn with_gate(run: &Run<'_>, vector: u8, handler: extern "C" fn(), code: &'static u8, end: &'static u8) -> Outcome {
    // SAFETY: the handlers change no register, and nothing else causes this exception meanwhile.
    unsafe { trap::set_gate(vector, Some(handler as *const () as u64)) };
    let outcome = in_user_mode(run, code, end, "the exception does not arrive");
    // SAFETY: the stub keeps all registers.
    unsafe { trap::set_gate(vector, None) };
    outcome
}

pub(crate) fn syscall(run: &Run<'_>) -> Outcome {
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const FMASK: u32 = 0xc000_0084;
    // SAFETY: user code of this module alone uses SYSCALL. SYSRET takes CS from 0x28 and SS from 0x20, SYSCALL from 8 and 0x10.
    unsafe {
        cpu::write_msr(STAR, 0x18 << 48 | 8 << 32);
        cpu::write_msr(LSTAR, syscall_entry as *const () as u64);
        cpu::write_msr(FMASK, 0x700);
        in_user_mode(
            run,
            &user_syscall,
            &user_syscall_end,
            "SYSCALL does not arrive in ring 0 here, so that SYSRET faults",
        )
    }
}

pub(crate) fn page_fault(run: &Run<'_>) -> Outcome {
    // SAFETY: the symbols are defined above.
    let (code, end) = unsafe { (&user_pgfault, &user_pgfault_end) };
    with_gate(run, 14, skip_load, code, end)
}

pub(crate) fn divide_by_zero(run: &Run<'_>) -> Outcome {
    // SAFETY: the symbols are defined above.
    let (code, end) = unsafe { (&user_divzero, &user_divzero_end) };
    with_gate(run, 0, skip_division, code, end)
}

pub(crate) fn user_calls(run: &Run<'_>) -> Outcome {
    // SAFETY: the symbols are defined above.
    unsafe { in_user_mode(run, &user_call, &user_call_end, "user mode does not work") }
}

/// Reads the mask of the first interrupt controller, which every PC has.
pub(crate) fn port_in(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        // SAFETY: the register has no side effect.
        core::hint::black_box(unsafe { cpu::in8(0x21) });
    })
}

/// Writes CR8, 1 and 0 in turn: no interrupt waits at these priorities.
pub(crate) fn write_cr8(run: &Run<'_>) -> Outcome {
    let outcome = in_pieces(run.count, |count| {
        // SAFETY: CPL 0; priorities of exceptions only are held back.
        unsafe {
            asm!("2:", "xor {v:e}, 1", "mov cr8, {v}", "dec {n}", "jnz 2b",
                v = inout(reg) 0_u64 => _, n = inout(reg) count => _, options(nomem, nostack));
        }
    });
    // SAFETY: as above.
    unsafe { asm!("mov cr8, {}", in(reg) 0_u64, options(nomem, nostack)) };
    outcome
}

pub(crate) fn calls(run: &Run<'_>) -> Outcome {
    in_pieces(run.count, |count| {
        // SAFETY: the stack has room for a return address.
        unsafe {
            asm!("2:", "call 4f", "dec {n}", "jnz 2b", "jmp 5f", "4: ret", "5:", n = inout(reg) count => _);
        }
    })
}

pub(crate) fn cpuid(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        core::hint::black_box(cpu::cpuid(0, 0));
    })
}

pub(crate) fn rdtsc(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        core::hint::black_box(cpu::tsc());
    })
}

/// IA32_KERNEL_GS_BASE, which a kernel writes with each switch of a process.
const GS_BASE: u32 = 0xc000_0102;

pub(crate) fn read_msr(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        // SAFETY: every x86-64 CPU has it.
        core::hint::black_box(unsafe { cpu::read_msr(GS_BASE) });
    })
}

pub(crate) fn write_msr(run: &Run<'_>) -> Outcome {
    repeated(run.count, || {
        // SAFETY: nobody uses SWAPGS here.
        unsafe { cpu::write_msr(GS_BASE, 0x1000) };
    })
}
