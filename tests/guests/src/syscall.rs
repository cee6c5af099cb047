//! SYSCALL, SYSRET and SWAPGS: the registers, selectors and flags that cross the ring boundary.
use crate::fault;
use crate::rt::{check, enter_user, trap, wanted};
use core::arch::asm;

core::arch::global_asm!(
    ".balign 16",
    "user_syscall: syscall",
    "user_swapgs: swapgs",
    "user_back: int3",
    // Records RCX, R11, RSP, RFLAGS, CS and SS as SYSCALL left them, then returns from `enter_user`.
    "syscall_entry:",
    "mov [rip + SYSCALL_LOG], rcx",
    "mov [rip + SYSCALL_LOG + 8], r11",
    "mov [rip + SYSCALL_LOG + 16], rsp",
    "mov rsp, [rip + TRAP + 80]",
    "pushfq",
    "pop qword ptr [rip + SYSCALL_LOG + 24]",
    "mov eax, cs",
    "mov [rip + SYSCALL_LOG + 32], rax",
    "mov eax, ss",
    "mov [rip + SYSCALL_LOG + 40], rax",
    "cld",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // sysret_user(rdi = rip, rsi = rflags): returns when ring 3 traps.
    "sysret_user:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + TRAP + 80], rsp",
    "mov rcx, rdi",
    "mov r11, rsi",
    "sysretq",
);
unsafe extern "C" {
    static user_syscall: u8;
    static user_swapgs: u8;
    static user_back: u8;
    static syscall_entry: u8;
    fn sysret_user(rip: u64, rflags: u64);
}
#[unsafe(no_mangle)]
static mut SYSCALL_LOG: [u64; 6] = [0; 6];

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the callers pass MSRs that only these tests depend on.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) }
}

fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register that every x86-64 CPU has.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high) }
    u64::from(high) << 32 | u64::from(low)
}

pub fn run() {
    // SAFETY: ring 3 comes back through `syscall_entry` or a trap; both restore the caller's registers.
    unsafe {
        let code = &raw const user_syscall as u64;
        crate::paging::open_to_user(code);
        crate::paging::open_to_user(&raw const user_back as u64);
        wrmsr(STAR, 0x18 << 48 | 8 << 32);
        wrmsr(LSTAR, &raw const syscall_entry as u64);
        for (name, mask, inside) in [
            ("syscall/no-mask", 0, 0xcd7),
            ("syscall/mask-clears-flags", 0x8d5, 0x402),
            ("syscall/mask-clears-direction", 0x400, 0x8d7),
        ] {
            if !wanted(name) {
                continue;
            }
            wrmsr(FMASK, mask);
            SYSCALL_LOG = [0; 6];
            enter_user(code, 0x7000, 0xcd7, 0x2b);
            let [rip, flags, rsp, now, cs, ss] = core::ptr::read_volatile(&raw const SYSCALL_LOG);
            check(name, (rip, flags, rsp, now, cs, ss), (code + 2, 0xcd7, 0x7000, inside, 8, 0x10));
        }
        let back = &raw const user_back as u64;
        sysret_user(back, 0x8d5);
        let t = trap();
        check("sysret/selectors-and-flags", (t.vector, t.rip, t.cs, t.ss, t.rflags), (3, back + 1, 0x2b, 0x23, 0x8d7));
        let at = &raw const user_swapgs as u64;
        enter_user(at, 0x7000, 0x2, 0x2b);
        let t = trap();
        check("swapgs/ring-3", (t.vector, t.error, t.rip), (13, 0, at));
        wrmsr(GS_BASE, 0x1234_5678_9000);
        wrmsr(KERNEL_GS_BASE, 0xffff_8000_dead_b000);
        asm!("swapgs");
        check("swapgs/exchanges", (rdmsr(GS_BASE), rdmsr(KERNEL_GS_BASE)), (0xffff_8000_dead_b000, 0x1234_5678_9000));
        let (t, at, n) = fault!("wrmsr", in("rcx") u64::from(KERNEL_GS_BASE), in("rax") 0u64, in("rdx") 0x8000u64);
        check("swapgs/noncanonical-base", (n, t.vector, t.error, t.rip), (1, 13, 0, at));
        let (t, at, n) = fault!("rdfsbase {}", out(reg) _);
        check("fsgsbase/off-is-invalid", (n, t.vector, t.rip), (1, 6, at));
    }
}
