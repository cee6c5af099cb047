//! Exceptions from ring 0 and ring 3: vector, error code, saved RIP, CS and the trap/fault distinction.
use crate::fault;
use crate::rt::{check, enter_user, trap, wanted};

core::arch::global_asm!(
    ".balign 4096",
    "user_code:",
    "user_cli: cli",
    "user_int80: int 0x80",
    "user_int81: int 0x81",
    "user_int3: int3",
    "user_hlt: hlt",
    "user_code_end:",
    ".balign 4096",
);
unsafe extern "C" {
    static user_code: u8;
    static user_cli: u8;
    static user_int80: u8;
    static user_int81: u8;
    static user_int3: u8;
    static user_hlt: u8;
}

pub fn run() {
    // SAFETY: each block faults at its own line and resumes after it.
    unsafe {
        let (t, at, n) = fault!("div ecx", in("rcx") 0u64, inout("rax") 1u64 => _, inout("rdx") 0u64 => _);
        check("exceptions/divide-by-zero", (n, t.vector, t.error, t.rip, t.cs), (1, 0, 0, at, 8));
        let (t, at, n) =
            fault!("idiv ecx", in("rcx") -1i64, inout("rax") 0x8000_0000u64 => _, inout("rdx") 0xffff_ffffu64 => _);
        check("exceptions/divide-overflow", (n, t.vector, t.rip), (1, 0, at));
        let (t, at, n) = fault!("ud2");
        check("exceptions/ud2", (n, t.vector, t.error, t.rip), (1, 6, 0, at));
        if wanted("exceptions/int3-is-a-trap") {
            let (t, at, n) = fault!("int3");
            check("exceptions/int3-is-a-trap", (n, t.vector, t.rip), (1, 3, at + 1));
        }
        let (t, at, n) = fault!("mov ds, {0:e}", in(reg) 0x123cu64);
        check("exceptions/selector-beyond-gdt", (n, t.vector, t.error, t.rip), (1, 13, 0x123c, at));
        let (t, at, n) = fault!("mov al, [{}]", in(reg) 1u64 << 47, out("al") _);
        check("exceptions/noncanonical-gp", (n, t.vector, t.error, t.rip), (1, 13, 0, at));
        let (t, at, n) = fault!("rdmsr", in("rcx") 0x1234_5678u64, out("rax") _, out("rdx") _);
        check("exceptions/unknown-msr", (n, t.vector, t.error, t.rip), (1, 13, 0, at));
        crate::paging::open_to_user(&raw const user_code as u64);
        for (name, code, vector, error, step) in [
            ("user/cli", &raw const user_cli, 13, 0, 0),
            ("user/int80", &raw const user_int80, 0x80, 0, 2),
            ("user/int81-closed-gate", &raw const user_int81, 13, 0x81 << 3 | 2, 0),
            ("user/int3", &raw const user_int3, 3, 0, 1),
            ("user/hlt", &raw const user_hlt, 13, 0, 0),
        ] {
            enter_user(code as u64, 0x7000, 0x2, 0x2b);
            let t = trap();
            check(
                name,
                (t.vector, t.error, t.rip, t.cs, t.ss, t.rsp),
                (vector, error, code as u64 + step, 0x2b, 0x23, 0x7000),
            );
        }
    }
}
