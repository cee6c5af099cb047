//! Control flow that the CPU changes by itself: single steps, interrupts and their shadow, SYSCALL and SYSRET, IRET with bad
//! selectors, faults while a fault is delivered, code that changes or vanishes under the instruction pointer.
use crate::rt::{check, enter_user, set_gate, trap, wanted};
use crate::{fault, paging};
use core::arch::asm;
use core::ptr::{read_volatile as read, write_volatile as write};

core::arch::global_asm!(
    // Logs the RIP of every single-step trap.
    "flow_step:",
    "push rax",
    "push rcx",
    "push rdx",
    "mov rcx, [rip + FLOW_COUNT]",
    "cmp rcx, 15",
    "ja 2f",
    "lea rax, [rip + FLOW_LOG]",
    "mov rdx, [rsp + 24]",
    "mov [rax + rcx * 8], rdx",
    "inc qword ptr [rip + FLOW_COUNT]",
    "2: mov rdx, dr6",
    "mov [rip + FLOW_DR6], rdx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    // Ends an interrupt, remembers where it hit, and goes on at FLOW_EXIT if that is set.
    "flow_interrupt:",
    "push rax",
    "mov rax, [rsp + 8]",
    "mov [rip + FLOW_LOG], rax",
    "inc qword ptr [rip + FLOW_COUNT]",
    "mov rax, [rip + FLOW_EXIT]",
    "test rax, rax",
    "jz 2f",
    "mov [rsp + 8], rax",
    "2: mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    // Target of SYSCALL.
    "flow_syscall:",
    "mov [rip + FLOW_LOG], rcx",
    "mov [rip + FLOW_LOG + 8], r11",
    "mov [rip + FLOW_LOG + 16], rsp",
    "lea rsp, [rip + FLOW_LOG + 64]",
    "pushfq",
    "pop rax",
    "mov [rip + FLOW_LOG + 24], rax",
    "mov rsp, [rip + FLOW_LOG + 16]",
    "sysretq",
    ".balign 4096",
    "flow_user: mov eax, 0",
    "cmp eax, 1",
    "flow_user_syscall: syscall",
    "flow_user_after: int3",
    ".balign 4096",
);
unsafe extern "C" {
    static flow_step: u8;
    static flow_interrupt: u8;
    static flow_syscall: u8;
    static flow_user: u8;
    static flow_user_after: u8;
}
#[unsafe(no_mangle)]
static mut FLOW_LOG: [u64; 16] = [0; 16];
#[unsafe(no_mangle)]
static mut FLOW_COUNT: u64 = 0;
#[unsafe(no_mangle)]
static mut FLOW_DR6: u64 = 0;
#[unsafe(no_mangle)]
static mut FLOW_EXIT: u64 = 0;

const APIC: u64 = 0xfee0_0000;
const TIMER: u64 = 0x40;

fn apic(register: u64, value: u32) {
    // SAFETY: the local APIC's page is mapped one to one.
    unsafe { write((APIC + register) as *mut u32, value) }
}

fn wrmsr(msr: u32, value: u64) {
    // SAFETY: only MSRs of SYSCALL are written, and no SYSCALL happens in between.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) }
}

fn reset() {
    // SAFETY: one CPU, no step or interrupt is under way.
    unsafe {
        write(&raw mut FLOW_LOG, [0; 16]);
        write(&raw mut FLOW_COUNT, 0);
        write(&raw mut FLOW_EXIT, 0);
    }
}

pub fn run() {
    // SAFETY: handlers and tables are static; every asm block leaves registers and stack as the compiler expects them.
    unsafe {
        single_step();
        interrupts();
        system_call();
        bad_returns();
        changing_code();
        translations();
    }
}

unsafe fn single_step() {
    // SAFETY: see `run`.
    unsafe {
        set_gate(1, &raw const flow_step as u64);
        reset();
        let (mut from, mut to) = ([1u8, 2], [0u8; 2]);
        let (start, rep, after, end): (u64, u64, u64, u64);
        asm!(
            "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "2: nop",
            "3: rep movsb",
            "4: pushfq", "and qword ptr [rsp], -0x101", "popfq",
            "5: lea {a}, [rip + 2b]", "lea {b}, [rip + 3b]", "lea {c}, [rip + 4b]", "lea {d}, [rip + 5b]",
            a = out(reg) start, b = out(reg) rep, c = out(reg) after, d = out(reg) end,
            inout("rcx") 2u64 => _, inout("rsi") from.as_mut_ptr() => _, inout("rdi") to.as_mut_ptr() => _,
        );
        let log = read(&raw const FLOW_LOG);
        let _ = start;
        // A repeated instruction traps after every iteration (SDM vol. 3, section 17.3.1.4).
        check("step/every-instruction", (log[0], log[1], log[2], to), (rep, rep, after, [1, 2]));
        check("step/ends-with-popf", (read(&raw const FLOW_COUNT), log[5]), (6, end));
        check("step/dr6-bs", read(&raw const FLOW_DR6) & 0x4000, 0x4000);
    }
}

/// Arms the APIC timer for a one-shot interrupt soon.
fn arm(count: u32) {
    apic(0xf0, 0x1ff);
    apic(0x3e0, 0xb);
    apic(0x320, TIMER as u32);
    apic(0x380, count);
}

/// Waits, with interrupts off, until the timer's interrupt is pending.
fn wait_pending() {
    loop {
        // SAFETY: reads the APIC's IRR bits 64 to 95.
        if unsafe { read((APIC + 0x220) as *const u32) } & 1 != 0 {
            return;
        }
    }
}

unsafe fn interrupts() {
    // SAFETY: see `run`.
    unsafe {
        // Firmware may have left the PIT ticking and its interrupt unmasked: after 55 ms that one would come first.
        asm!("out 0x21, al", "out 0xa1, al", in("al") 0xffu8);
        set_gate(TIMER as usize, &raw const flow_interrupt as u64);
        reset();
        arm(10_000);
        wait_pending();
        check("irq/cli-holds-it", read(&raw const FLOW_COUNT), 0);
        let want: u64;
        asm!("sti", "nop", "2: nop", "cli", "lea {}, [rip + 2b]", out(reg) want);
        check("irq/sti-shadow", (read(&raw const FLOW_COUNT), read(&raw const FLOW_LOG)[0]), (1, want));
        reset();
        arm(100_000);
        let want: u64;
        asm!("sti", "hlt", "2: cli", "lea {}, [rip + 2b]", out(reg) want);
        check("irq/sti-hlt", (read(&raw const FLOW_COUNT), read(&raw const FLOW_LOG)[0]), (1, want));
        reset();
        let looped: u64;
        asm!(
            "lea {t}, [rip + 3f]", "mov [rip + FLOW_EXIT], {t}",
            "mov dword ptr [{apic}], 1000000",
            "sti", "2: jmp 2b", "3: cli", "lea {t}, [rip + 2b]",
            t = out(reg) looped, apic = in(reg) APIC + 0x380,
        );
        check("irq/into-a-jump-to-itself", (read(&raw const FLOW_COUNT), read(&raw const FLOW_LOG)[0]), (1, looped));
        reset();
        let spins: u64;
        asm!(
            "lea {t}, [rip + 3f]", "mov [rip + FLOW_EXIT], {t}", "xor {t:e}, {t:e}",
            "mov dword ptr [{apic}], 1000000",
            "sti", "2: inc {t}", "jmp 2b", "3: cli",
            t = out(reg) spins, apic = in(reg) APIC + 0x380,
        );
        check("irq/into-a-counting-loop", (read(&raw const FLOW_COUNT), spins > 0), (1, true));
    }
}

unsafe fn system_call() {
    // SAFETY: see `run`.
    unsafe {
        wrmsr(0xc000_0081, 0x18 << 48 | 8 << 32);
        wrmsr(0xc000_0082, &raw const flow_syscall as u64);
        wrmsr(0xc000_0084, 0x4 | 0x400);
        reset();
        paging::open_to_user(&raw const flow_user as u64);
        let after = &raw const flow_user_after as u64;
        // CMP 0, 1 leaves CF, PF, AF and SF; FMASK takes PF away.
        enter_user(&raw const flow_user as u64, 0x7000, 0x2, 0x2b);
        let (t, log) = (trap(), read(&raw const FLOW_LOG));
        check("syscall/rcx-and-r11", (log[0], log[1], log[2]), (after, 0x97, 0x7000));
        check("syscall/fmask", log[3], 0x93);
        check("sysret/state", (t.vector, t.rip, t.cs, t.ss, t.rsp, t.rflags), (3, after + 1, 0x2b, 0x23, 0x7000, 0x97));
    }
}

unsafe fn bad_returns() {
    // SAFETY: see `run`; RSP is brought back from R10, which traps preserve.
    unsafe {
        let iret = |cs: u64, ss: u64| {
            let frame = [0u64, cs, 2, 0x7000, ss];
            let (at, before): (u64, u64) = (0, trap().count);
            let mut at = at;
            asm!(
                "lea {t}, [rip + 3f]", "mov [rip + TRAP + 72], {t}", "lea {t}, [rip + 2f]",
                "mov r10, rsp", "mov rsp, {f}", "2: iretq", "3: mov rsp, r10", "mov qword ptr [rip + TRAP + 72], 0",
                t = inout(reg) at, f = in(reg) &frame, out("r10") _,
            );
            let t = trap();
            (t.count - before, t.vector, t.error, t.rip == at)
        };
        for (name, cs, ss, error) in [
            ("iret/cs-beyond-gdt", 0x1238, 0x10, 0x1238),
            ("iret/cs-is-data", 0x10, 0x10, 0x10),
            ("iret/null-cs", 0, 0x10, 0),
            ("iret/ss-of-other-ring", 0x2b, 0x10, 0x10),
        ] {
            if wanted(name) {
                check(name, iret(cs, ss), (1, 13, error, true));
            }
        }
        // A page fault whose gate is not present: the #NP on the way makes it a double fault.
        let (t, _, n) = {
            let old = set_gate(14, 0);
            let r = fault!("mov rax, [{}]", in(reg) 0x7f00_0000_0000u64, out("rax") _);
            set_gate(14, old);
            r
        };
        check("nested/page-fault-then-np", (n, t.vector, t.error), (1, 8, 0));
        let (t, at, n) = fault!("ud2");
        check("nested/life-goes-on", (n, t.vector, t.rip), (1, 6, at));
    }
}

unsafe fn changing_code() {
    // SAFETY: see `run`; the code written to is the block's own.
    unsafe {
        let (a, b): (u64, u64);
        asm!(
            "mov dword ptr [rip + 2f + 1], 0x4242", "2: mov eax, 0x1111",
            out("rax") a,
        );
        check("smc/next-instruction", a, 0x4242);
        asm!(
            "xor edx, edx", "mov ecx, 3",
            "2: mov eax, 1", "add edx, eax", "inc byte ptr [rip + 2b + 1]", "dec ecx", "jnz 2b",
            out("rax") _, out("rcx") _, out("rdx") b,
        );
        check("smc/loop-body", b, 1 + 2 + 3);
        let new = [0xb8u8, 7, 0, 0, 0];
        let c: u64;
        asm!(
            "lea rdi, [rip + 2f]", "mov ecx, 5", "rep movsb", "2: mov eax, 0x2222",
            out("rax") c, out("rcx") _, out("rdi") _, inout("rsi") new.as_ptr() => _,
        );
        check("smc/rep-movsb", c, 7);
    }
}

unsafe fn translations() {
    // SAFETY: see `run`; only the test window is remapped.
    unsafe {
        let w = paging::window();
        // An instruction whose second page is absent, then present, then another page.
        let (first, second, third) = w.pages;
        write((first + 4094) as *mut [u8; 2], [0xb8, 0x11]);
        write(second as *mut [u8; 4], [0x22, 0x33, 0x44, 0xc3]);
        write(third as *mut [u8; 4], [0x55, 0x66, 0x77, 0xc3]);
        w.map(0, first | 3);
        w.map(1, 0);
        let at = w.va + 4094;
        let (t, _, n) = fault!("jmp {}", in(reg) at);
        check("paging/crossing-fetch", (n, t.vector, t.error, t.rip, t.cr2), (1, 14, 0x10, at, w.va + 4096));
        let call = || {
            let r: u64;
            asm!("call {}", in(reg) at, lateout("rax") r);
            r
        };
        w.map(1, second | 3);
        let one = call();
        w.map(1, third | 3);
        check("paging/crossing-instruction-remapped", (one, call()), (0x4433_2211, 0x7766_5511));
        // A CR3 load drops what is not global; toggling CR4.PGE drops everything.
        write(first as *mut u64, 1);
        write(second as *mut u64, 2);
        w.map(0, first | 3);
        let one = read(w.va as *const u64);
        w.set(0, second | 3);
        asm!("mov {t}, cr3", "mov cr3, {t}", t = out(reg) _);
        check("paging/cr3-load", (one, read(w.va as *const u64)), (1, 2));
        asm!("mov {t}, cr4", "or {t}, 0x80", "mov cr4, {t}", t = out(reg) _);
        w.map(0, first | 0x103);
        let one = read(w.va as *const u64);
        w.set(0, second | 0x103);
        asm!("mov {t}, cr4", "xor {t}, 0x80", "mov cr4, {t}", "xor {t}, 0x80", "mov cr4, {t}", t = out(reg) _);
        check("paging/pge-toggle", (one, read(w.va as *const u64)), (1, 2));
        if core::arch::x86_64::__cpuid(1).ecx >> 17 & 1 != 0 {
            asm!("mov {t}, cr4", "or {t}, 0x20000", "mov cr4, {t}", t = out(reg) _);
            w.map(0, first | 3);
            let one = read(w.va as *const u64);
            w.set(0, second | 3);
            let (root, low): (u64, u64);
            asm!("mov {r}, cr3", "mov {t}, {r}", "or {t}, 5", "mov cr3, {t}", r = out(reg) root, t = out(reg) _);
            let other = read(w.va as *const u64);
            asm!("mov cr3, {r}", "mov {l}, cr3", r = in(reg) root, l = out(reg) low);
            check("paging/pcid", (one, other, read(w.va as *const u64), low & 0xfff), (1, 2, 2, 0));
            asm!("mov {t}, cr4", "xor {t}, 0x20000", "mov cr4, {t}", t = out(reg) _);
        }
    }
}
