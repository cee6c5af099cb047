//! CALL: the entry sequence, registers, and the checks that all calls have in common.

use crate::abi::{Abi, Answer, NOT_RAM, Outcome, check, fill, get, get8, holds, page, put, put8, store, sum};
use crate::discovery::plausible;
use crate::irq;
use crate::{Kind, Test};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use guest_rt::apic::register::{LVT_TIMER, TIMER_DIVIDE, TIMER_INITIAL};
use guest_rt::{cpu, paging, trap};
use pv_abi::call::{Call, Error, FIRST};
use pv_abi::cpuid;
use pv_abi::feature::Features;
use pv_abi::memory::Update;

pub(crate) const TESTS: &[Test] = &[
    ("CALL-1", "the sequence works anywhere and keeps the stack", Kind::Ready(call_1)),
    ("CALL-2", "registers, vector registers and flags are kept", Kind::Ready(call_2)),
    ("CALL-3", "RAX and RDX", Kind::Ready(call_3)),
    ("CALL-4", "the order of common checks", Kind::Ready(call_4)),
    ("CALL-5", "callers in user mode, 64 and 32 bits", Kind::Ready(call_5)),
    ("CALL-6", "numbers that no call has", Kind::Ready(call_6)),
    ("CALL-7", "unused arguments", Kind::Ready(call_7)),
    ("CALL-8", "failed calls have no effect", Kind::Ready(call_8)),
    ("CALL-9", "page tables and segments do not matter", Kind::Ready(call_9)),
    ("CALL-10", "no exception whatever the registers hold", Kind::Ready(call_10)),
    ("CALL-11", "calls in interrupts between calls", Kind::Ready(call_11)),
];

fn call_1(abi: Abi) -> Outcome {
    let (code, len) = cpuid::entry_code(crate::abi::leaf(abi.base + cpuid::ENTRY)).unwrap_or_default();
    for offset in [0, 1, 7, 64, 4096 - len as u64, 4096 - 3, 5000] {
        let entry = page(2) + offset;
        for (at, byte) in (entry..).zip(&code[..len]) {
            put8(at, *byte);
        }
        let (before, after, below, rax): (u64, u64, u64, u64);
        // SAFETY: a call that fails, by a copy of the sequence, with markers below the return address; interrupts are disabled.
        unsafe {
            asm!(
                "mov {b}, rsp", "mov qword ptr [rsp - 16], 0x5a5a", "mov qword ptr [rsp - 256], 0x5a5a",
                "call {e}",
                "mov {a}, rsp", "mov {m}, [rsp - 16]", "and {m}, [rsp - 256]",
                e = in(reg) entry, b = out(reg) before, a = out(reg) after, m = out(reg) below,
                inlateout("rax") 1_u64 => rax, inlateout("rdx") 0_u64 => _, in("rdi") 0, in("rsi") 0, in("rcx") 0,
            );
        }
        check("RAX", rax, Error::NotSupported.to_rax())?;
        check("RSP", after, before)?;
        check("memory below the return address", below, 0x5a5a)?;
    }
    Ok(())
}

// conform_registers(rdi = entry, rsi = &[u64; 16] in and out, rdx = &[u8; 512 + 16] of FXSAVE, 16-aligned): loads all registers, calls, stores them.
global_asm!(
    ".global conform_registers",
    "conform_registers:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdx",
    "push rsi",
    "push rdi",
    "fxrstor64 [rdx]",
    "mov rax, rsi",
    "mov rbx, [rax + 8]",
    "mov rcx, [rax + 16]",
    "mov rdx, [rax + 24]",
    "mov rsi, [rax + 32]",
    "mov rdi, [rax + 40]",
    "mov rbp, [rax + 48]",
    "mov r8, [rax + 64]",
    "mov r9, [rax + 72]",
    "mov r10, [rax + 80]",
    "mov r11, [rax + 88]",
    "mov r12, [rax + 96]",
    "mov r13, [rax + 104]",
    "mov r14, [rax + 112]",
    "mov r15, [rax + 120]",
    "mov rax, [rax]",
    "std",
    "call [rsp]",
    "pushfq",
    "cld",
    "push rax",
    "mov rax, [rsp + 24]", // stack: rax, flags, entry, registers, fxsave
    "mov [rax + 8], rbx",
    "mov [rax + 16], rcx",
    "mov [rax + 24], rdx",
    "mov [rax + 32], rsi",
    "mov [rax + 40], rdi",
    "mov [rax + 48], rbp",
    "mov [rax + 64], r8",
    "mov [rax + 72], r9",
    "mov [rax + 80], r10",
    "mov [rax + 88], r11",
    "mov [rax + 96], r12",
    "mov [rax + 104], r13",
    "mov [rax + 112], r14",
    "mov [rax + 120], r15",
    "pop rcx",
    "mov [rax], rcx",
    "pop rcx",
    "mov [rax + 56], rcx",
    "pop rcx",
    "pop rcx",
    "pop rdx",
    "fxsave64 [rdx]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn conform_registers(entry: u64, registers: *mut u64, fpu: *mut u8);
}

/// Calls with patterns in all registers and compares them behind it.
fn registers_kept(abi: Abi, number: u64, arguments: [u64; 4]) -> Outcome {
    let mut regs = [0_u64; 16];
    for (n, r) in regs.iter_mut().enumerate() {
        *r = 0x0101_0101_0101_0101 * (n as u64 + 1);
    }
    regs[0] = number;
    (regs[5], regs[4], regs[3], regs[2]) = (arguments[0], arguments[1], arguments[2], arguments[3]);
    let given = regs;
    let fpu = page(4);
    fill(fpu, 0);
    // An FXSAVE image (SDM vol. 1, table 10-2): FCW, all tags empty but ST0, MXCSR with another rounding mode, ST0 to ST7, XMM0 to XMM15.
    put(fpu, 0x037f | 0x01 << 32);
    put(fpu + 24, 0x7f80);
    for n in 0..8 {
        put(fpu + 32 + 16 * n, 0x8000_0000_0000_0000 + n);
        put(fpu + 40 + 16 * n, 0x3fff);
    }
    for n in 0..32 {
        put(fpu + 160 + 8 * n, 0x1111_2222_3333_4444_u64.wrapping_mul(n + 1));
    }
    let image: [u64; 64] = core::array::from_fn(|n| get(fpu + 8 * n as u64));
    // SAFETY: the function keeps what the calling convention asks for; memory is the array and the scratch page.
    unsafe { conform_registers(abi.entry(), regs.as_mut_ptr(), fpu as *mut u8) };
    for n in [1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15] {
        check("a general-purpose register", regs[n], given[n])?;
    }
    // IF is clear in the tests, DF was set; IOPL, NT, AC and ID are 0.
    check("RFLAGS without status flags", regs[7] & !0x8d5, 0x402)?;
    for n in (0..52).filter(|n| !(1..=2).contains(n)) {
        // The tail of MXCSR's word is its mask.
        let mask = if n == 3 { 0xffff_ffff } else { u64::MAX };
        check("x87 or SSE state", get(fpu + 8 * n) & mask, image[n as usize] & mask)?;
    }
    // SAFETY: back to the state in which Rust runs.
    unsafe {
        asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1f80_u32);
    }
    Ok(())
}

fn call_2(abi: Abi) -> Outcome {
    registers_kept(abi, 1, [1, 2, 3, 4])?;
    registers_kept(abi, Call::SharePage.number(), [page(0), 0, 0, 0])?;
    registers_kept(abi, Call::SharePage.number(), [1, 0, 0, 0])?;
    for call in Call::ALL.into_iter().filter(|c| !matches!(c, Call::Halt | Call::Negotiate)) {
        registers_kept(abi, call.number(), plausible(call))?;
    }
    registers_kept(abi, Call::Negotiate.number(), [0x1_0000, abi.offered.0, 0, 0])
}

fn call_3(abi: Abi) -> Outcome {
    for call in Call::ALL.into_iter().filter(|c| *c != Call::Halt) {
        let Answer { rax, rdx } = abi.raw(call.number(), plausible(call));
        holds("RAX is 0 or from -4095 to -1", rax == 0 || rax > 0xffff_ffff_ffff_f000)?;
        holds("RDX is 0 with an error", rax == 0 || rdx == 0)?;
    }
    Ok(())
}

fn call_4(abi: Abi) -> Outcome {
    abi.raw(7, [1, 2, 3, 4]).fails("an unknown number before unused arguments", Error::NotSupported)?;
    for call in Call::ALL.into_iter().filter(|c| c.feature().is_some_and(|f| !abi.offered.has(f))) {
        abi.raw(call.number(), [u64::MAX; 4]).fails("a feature not on offer before arguments", Error::NotSupported)?;
    }
    abi.raw(Call::SharePage.number(), [1, 1, 0, 0])
        .fails("an unused argument before the others", Error::InvalidArgument)?;
    abi.negotiate(Features::NONE).gives("NEGOTIATE", 0)?;
    for call in Call::ALL.into_iter().filter(|c| c.feature().is_some_and(|f| abi.offered.has(f))) {
        abi.raw(call.number(), [u64::MAX; 4]).fails("agreement before arguments", Error::NotNegotiated)?;
    }
    Ok(())
}

static mut TABLES: paging::Tables = paging::Tables::EMPTY;

/// A window of pages in the address space, made once.
pub(crate) fn window() -> paging::Window {
    static MADE: core::sync::atomic::AtomicBool = core::sync::atomic::AtomicBool::new(false);
    static mut WINDOW: Option<paging::Window> = None;
    // SAFETY: one CPU, and no interrupt handler comes here.
    unsafe {
        if !MADE.swap(true, Relaxed) {
            let tables = &raw mut TABLES;
            core::ptr::write(&raw mut WINDOW, Some(paging::Window::install(3, &mut *tables)));
        }
        core::ptr::read(&raw const WINDOW).expect("it was made")
    }
}

fn call_5(abi: Abi) -> Outcome {
    let (code, len) = cpuid::entry_code(crate::abi::leaf(abi.base + cpuid::ENTRY)).unwrap_or_default();
    let w = window();
    for (cs, name) in [(trap::USER_CODE, "64-bit user mode"), (trap::USER_CODE_32, "32-bit user mode")] {
        // Compatibility mode needs low addresses: the boot tables' own page, opened to user mode.
        let low = page(6);
        paging::open_to_user(low);
        w.map(0, page(6) | paging::PRESENT_WRITABLE | paging::USER);
        let at = if cs == trap::USER_CODE { w.address(0) } else { low };
        // mov eax, NEGOTIATE; mov edi, version; xor esi, esi; xor edx, edx; xor ecx, ecx; call entry; int 0x80
        let mut text = [0x90_u8; 40];
        text[0] = 0xb8;
        text[1..5].copy_from_slice(&(FIRST as u32).to_le_bytes());
        text[5] = 0xbf;
        text[6..10].copy_from_slice(&0x1_0000_u32.to_le_bytes());
        text[10..16].copy_from_slice(&[0x31, 0xf6, 0x31, 0xd2, 0x31, 0xc9]);
        text[16] = 0xe8;
        text[17..21].copy_from_slice(&((28 - 21) as u32).to_le_bytes());
        text[21..23].copy_from_slice(&[0xcd, 0x80]);
        text[28..28 + len].copy_from_slice(&code[..len]);
        for (n, b) in (0..).zip(text) {
            put8(low + n, b);
        }
        let handler = trap::handle(0x80, None);
        // SAFETY: the code is the scratch page's, its stack the end of the same page.
        unsafe { trap::enter_user(at, at + 4096, 2, cs, 0) };
        trap::handle(0x80, handler);
        let end = trap::last().frame;
        match end.vector {
            0x80 => {
                let mask = if cs == trap::USER_CODE { u64::MAX } else { 0xffff_ffff };
                check(name, end.rax & mask, Error::NotPermitted.to_rax() & mask)?;
                check(name, end.rdx & mask, 0)?;
            }
            vector => holds(name, vector == 6 || vector == 13)?,
        }
    }
    abi.call(Call::SharePage, &[page(0)]).gives("nothing was renegotiated", 0)?;
    holds("features are still in force", crate::discovery::page_is_live(abi).unwrap_or(true))
}

fn call_6(abi: Abi) -> Outcome {
    for number in [0, 1, 5, FIRST - 1, FIRST + 19, FIRST + 0xffff, FIRST | 1 << 32, FIRST | 1 << 63, u64::MAX] {
        abi.raw(number, [0; 4]).fails("number", Error::NotSupported)?;
    }
    Ok(())
}

fn call_7(abi: Abi) -> Outcome {
    for call in Call::ALL.into_iter().filter(|c| c.feature().is_none_or(|f| abi.offered.has(f))) {
        for unused in call.arguments()..4 {
            for value in [1, 1 << 31, 1 << 32, 1 << 63, u64::MAX] {
                let mut arguments = plausible(call);
                arguments[unused] = value;
                abi.raw(call.number(), arguments).fails(call.name(), Error::InvalidArgument)?;
            }
        }
    }
    Ok(())
}

fn call_8(abi: Abi) -> Outcome {
    fill(page(3), 0x77);
    let (shared, other) = (sum(page(0)), sum(page(3)));
    for call in Call::ALL.into_iter().filter(|c| !matches!(c, Call::Halt | Call::Unmask)) {
        for bad in [u64::MAX, 1 << 63, page(3) + 1] {
            let arguments = [bad, u64::MAX, u64::MAX, u64::MAX];
            let rax = abi.raw(call.number(), arguments).rax;
            holds("the call fails", rax != 0)?;
        }
    }
    check("the shared page", sum(page(0)), shared)?;
    check("another page", sum(page(3)), other)?;
    holds("no interrupt came of it", !irq::wait(irq::SHORT))
}

fn call_9(abi: Abi) -> Outcome {
    // Other page tables, other segment bases: the same page, the same answers.
    let root = page(8);
    for n in 0..512 {
        put(root + 8 * n, get(paging::boot_root() + 8 * n));
    }
    // SAFETY: the copy maps everything as before; the bases are not used by this guest.
    unsafe {
        let old = cpu::read_cr3();
        cpu::write_cr3(root);
        cpu::write_msr(0xc000_0100, 0x1234_5000);
        cpu::write_msr(0xc000_0101, 0xffff_8000_1234_5000);
        let answer = abi.call(Call::SharePage, &[page(0)]);
        let bad = abi.call(Call::SharePage, &[page(0) + 8]);
        cpu::write_msr(0xc000_0100, 0);
        cpu::write_msr(0xc000_0101, 0);
        cpu::write_cr3(old);
        answer.gives("SHARE_PAGE", 0)?;
        bad.fails("SHARE_PAGE", Error::BadAddress)
    }
}

fn call_10(abi: Abi) -> Outcome {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    fill(page(5), 0);
    let pool = [0, 1, 3, 32, 255, 4096, 4097, u64::MAX, 1 << 63, 1 << 32, page(5), page(5) + 8, NOT_RAM[0], NOT_RAM[5]];
    for _ in 0..4000 {
        let call = Call::ALL[random() as usize % Call::ALL.len()];
        let arguments: [u64; 4] = core::array::from_fn(|_| {
            let r = random();
            if r & 3 == 0 { r } else { pool[(r >> 8) as usize % pool.len()] }
        });
        let used = call.arguments();
        let arguments = core::array::from_fn(|n| if n < used || random() & 7 == 0 { arguments[n] } else { 0 });
        // These would end the machine, wait for ever, or write noise.
        if matches!(call, Call::Halt | Call::Shutdown | Call::Panic | Call::ConsoleWrite) && arguments[0] < 1 << 40 {
            continue;
        }
        if call == Call::Panic && arguments[1] == 0 {
            continue;
        }
        if matches!(call, Call::SharePage | Call::FreePages) && arguments[0] < 1 << 32 && arguments[0] != page(5) {
            continue;
        }
        let rax = abi.raw(call.number(), arguments).rax;
        holds("RAX", rax == 0 || rax > 0xffff_ffff_ffff_f000)?;
    }
    // An exception would have ended the guest.
    abi.begin()
}

static INSIDE: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);
static ENTRY: AtomicU64 = AtomicU64::new(0);

fn call_11(abi: Abi) -> Outcome {
    ENTRY.store(abi.entry(), Relaxed);
    INSIDE.store(0, Relaxed);
    WRONG.store(0, Relaxed);
    irq::hook(Some(|_| {
        let abi = Abi::find().expect("it was there");
        let answer = abi.call(Call::SharePage, &[3]);
        WRONG.fetch_add((answer.rax != Error::BadAddress.to_rax()).into(), Relaxed);
        INSIDE.fetch_add(1, Relaxed);
        irq::apic().eoi();
    }));
    let apic = irq::apic();
    apic.write(TIMER_DIVIDE, 0b1011);
    apic.write(LVT_TIMER, 1 << 17 | 0x70);
    apic.write(TIMER_INITIAL, 50_000);
    store(page(2), &[Update::invalidate_space(); 64]);
    let start = cpu::tsc();
    let mut outcome = Ok(());
    // SAFETY: all vectors have handlers.
    unsafe { cpu::sti() };
    while INSIDE.load(Relaxed) < 100 && outcome.is_ok() && cpu::tsc().wrapping_sub(start) < irq::LONG {
        outcome = abi.call(Call::SharePage, &[page(0) + 1]).fails("a call outside", Error::BadAddress);
        if abi.offered.has(pv_abi::feature::Feature::PageTables) {
            let answer = abi.call(Call::UpdatePages, &[page(2), 64]);
            outcome = outcome.and(holds("an array call", answer.rax == 0 && (1..=64).contains(&answer.rdx)));
        }
    }
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    apic.write(TIMER_INITIAL, 0);
    apic.write(LVT_TIMER, 1 << 16);
    outcome?;
    check("calls in handlers that went wrong", WRONG.load(Relaxed), 0)?;
    check("handlers that ran between calls", INSIDE.load(Relaxed).min(10), 10)?;
    holds("bytes are there", get8(abi.entry()) != 0)
}
