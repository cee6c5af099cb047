//! The only doors between Rust code and translated code, both ways.
//!
//! Register convention inside translated code (see [`crate::regs`]): the stack pointer is the host's, in
//! [`BtState::frames`]; RCX and R11 are scratch; R9 holds the guest's RCX, R10 the guest's RSP; the guest's R9-R11 live in memory. Flags in
//! [`paravane_cpu::state::rflags::NATIVE`] are the guest's, and the same bits of `cpu.rflags` are zero meanwhile.
//!
//! While a window is in use, FS points at it in translated code; thunks that enter Rust put Rust's own FS base back.
//!
//! Every thunk that enters Rust stores the whole guest state first, the x87/SIMD registers only when they are live, so
//! that Rust code always sees an exact [`paravane_cpu::CpuState`].
#![allow(unsafe_code)] // Naked functions: the boundary itself cannot be written in safe Rust.

use crate::callouts;
use crate::state::{BtState, JumpCache, JumpEntry};
use std::arch::naked_asm;
use std::mem::offset_of;

const GPR: usize = offset_of!(BtState, cpu.gpr);
const RFLAGS: usize = offset_of!(BtState, cpu.rflags);
const XSAVE: usize = offset_of!(BtState, cpu.xsave);
const FPU_LIVE: usize = offset_of!(BtState, fpu_live);
const XLO: usize = offset_of!(BtState, xmask_lo);
const XHI: usize = offset_of!(BtState, xmask_hi);
const MXCSR: usize = offset_of!(BtState, host_mxcsr);
const HOST_RSP: usize = offset_of!(BtState, host_rsp);
const ENGINE: usize = offset_of!(BtState, engine);
const CODE_RSP: usize = offset_of!(BtState, code_rsp);
const TMP: usize = offset_of!(BtState, tmp);
const WINDOW_FS: usize = offset_of!(BtState, window_fs);
const HOST_FS: usize = offset_of!(BtState, host_fs);
const R11: usize = offset_of!(BtState, r11);

/// Guest registers and flags to memory, then SIMD state when live; Rust's stack. The stack pointer of translated code is
/// kept, after `called` bytes of return address. Clobbers RAX, RDX; leaves RCX and R11.
macro_rules! save {
    ($called:literal) => {
        concat!(
            "mov gs:[{gpr}+0*8], rax\n",
            "mov gs:[{gpr}+1*8], r9\n",
            "mov gs:[{gpr}+2*8], rdx\n",
            "mov gs:[{gpr}+3*8], rbx\n",
            "mov gs:[{gpr}+4*8], r10\n",
            "mov gs:[{gpr}+5*8], rbp\n",
            "mov gs:[{gpr}+6*8], rsi\n",
            "mov gs:[{gpr}+7*8], rdi\n",
            "mov gs:[{gpr}+8*8], r8\n",
            "mov gs:[{gpr}+12*8], r12\n",
            "mov gs:[{gpr}+13*8], r13\n",
            "mov gs:[{gpr}+14*8], r14\n",
            "mov gs:[{gpr}+15*8], r15\n",
            "lea rax, [rsp+",
            $called,
            "]\n",
            "mov gs:[{code_rsp}], rax\n",
            "mov rsp, gs:[{host_rsp}]\n",
            "pushfq\n",
            "pop rax\n",
            "cld\n",
            "and eax, 0xcd5\n",
            "or gs:[{rflags}], rax\n",
            "cmp dword ptr gs:[{fpu}], 0\n",
            "je 9f\n",
            "mov eax, gs:[{xlo}]\n",
            "mov edx, gs:[{xhi}]\n",
            "xsave64 gs:[{xsave}]\n",
            "mov dword ptr gs:[{fpu}], 0\n",
            "ldmxcsr gs:[{mxcsr}]\n",
            "9:\n",
            "cmp qword ptr gs:[{window_fs}], 0\n",
            "je 9f\n",
            "mov rax, gs:[{host_fs}]\n",
            "wrfsbase rax\n",
            "9:\n",
        )
    };
}

/// Guest registers and flags from memory, and the stack of translated code. Leaves RCX and R11.
macro_rules! restore {
    () => {
        concat!(
            "mov rax, gs:[{window_fs}]\n",
            "test rax, rax\n",
            "jz 9f\n",
            "wrfsbase rax\n",
            "9:\n",
            "mov rax, gs:[{rflags}]\n",
            "mov edx, eax\n",
            "and edx, 0xcd5\n",
            "xor rax, rdx\n",
            "mov gs:[{rflags}], rax\n",
            "or edx, 0x202\n",
            "push rdx\n",
            "popfq\n",
            "mov rax, gs:[{gpr}+0*8]\n",
            "mov r9, gs:[{gpr}+1*8]\n",
            "mov rdx, gs:[{gpr}+2*8]\n",
            "mov rbx, gs:[{gpr}+3*8]\n",
            "mov r10, gs:[{gpr}+4*8]\n",
            "mov rbp, gs:[{gpr}+5*8]\n",
            "mov rsi, gs:[{gpr}+6*8]\n",
            "mov rdi, gs:[{gpr}+7*8]\n",
            "mov r8, gs:[{gpr}+8*8]\n",
            "mov r12, gs:[{gpr}+12*8]\n",
            "mov r13, gs:[{gpr}+13*8]\n",
            "mov r14, gs:[{gpr}+14*8]\n",
            "mov r15, gs:[{gpr}+15*8]\n",
            "mov rsp, gs:[{code_rsp}]\n",
        )
    };
}

/// Host callee-saved registers back, and return to [`enter`]'s caller with RAX.
macro_rules! leave {
    () => {
        concat!(
            "mov rsp, gs:[{host_rsp}]\n",
            "add rsp, 8\n",
            "pop r15\n",
            "pop r14\n",
            "pop r13\n",
            "pop r12\n",
            "pop rbp\n",
            "pop rbx\n",
            "ret\n",
        )
    };
}

/// After a callout: RAX = value or target, RDX = [`callouts::Back`] bits. Continue in the block (RCX = RAX), jump
/// to a block, or leave. Going on in the block takes the return address that lies below the stack pointer.
macro_rules! back {
    () => {
        concat!(
            "test edx, 4\n",
            "jnz 7f\n",
            "mov rcx, rax\n",
            "mov r11d, edx\n",
            "test edx, 1\n",
            "jz 8f\n",
            "mov eax, gs:[{xlo}]\n",
            "mov edx, gs:[{xhi}]\n",
            "xrstor64 gs:[{xsave}]\n",
            "mov dword ptr gs:[{fpu}], 1\n",
            "8:\n",
            "test r11d, 2\n",
            "jnz 6f\n",
            restore!(),
            "lea rsp, [rsp-8]\n",
            "ret\n",
            "6:\n",
            restore!(),
            "mov r11, gs:[{r11}]\n",
            "jmp rcx\n",
            "7:\n",
            leave!(),
        )
    };
}

macro_rules! operands {
    ($($body:expr),+ ; $($extra:tt)*) => {
        naked_asm!(
            $($body),+,
            gpr = const GPR,
            rflags = const RFLAGS,
            xsave = const XSAVE,
            fpu = const FPU_LIVE,
            xlo = const XLO,
            xhi = const XHI,
            mxcsr = const MXCSR,
            host_rsp = const HOST_RSP,
            code_rsp = const CODE_RSP,
            window_fs = const WINDOW_FS,
            host_fs = const HOST_FS,
            $($extra)*
        )
    };
}

/// Runs translated code at `target` until it leaves; gives the exit code.
///
/// # Safety
/// The GS base must point at this thread's [`BtState`], and `target` must be the entry of a live block of its cache.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn enter(target: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov gs:[{host_rsp}], rsp",
        "mov rcx, rdi",
        restore!(),
        "jmp rcx",
        gpr = const GPR,
        rflags = const RFLAGS,
        host_rsp = const HOST_RSP,
        code_rsp = const CODE_RSP,
        window_fs = const WINDOW_FS,
    )
}

/// [`crate::state::Thunk::Exit`]: R11 = exit code.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn exit() {
    operands!(save!("0"), "mov rax, r11", leave!();)
}

/// Where a signal handler sends a vCPU thread whose translated code faulted; registers are the guest's.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn fault() {
    operands!(save!("0"), "mov eax, {code}", leave!(); code = const crate::dispatch::EXIT_FAULT,)
}

/// [`crate::state::Thunk::Mem`], called: RCX = linear address, R11D = site.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn mem() {
    operands!(
        save!("8"),
        "mov rdi, gs:[{engine}]",
        "mov rsi, rcx",
        "mov edx, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::mem,
    )
}

/// [`crate::state::Thunk::SegMem`], called: RCX = offset, R11D = site.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn seg_mem() {
    operands!(
        save!("8"),
        "mov rdi, gs:[{engine}]",
        "mov rsi, rcx",
        "mov edx, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::seg_mem,
    )
}

/// [`crate::state::Thunk::Commit`], called: R11D = site.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn commit() {
    operands!(
        save!("8"),
        "mov rdi, gs:[{engine}]",
        "mov esi, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::commit,
    )
}

/// [`crate::state::Thunk::Emulate`], called: R11D = callout.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn emulate() {
    operands!(
        save!("8"),
        "mov rdi, gs:[{engine}]",
        "mov esi, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::emulate,
    )
}

/// [`crate::state::Thunk::Lookup`], jumped to: the target is in `cpu.rip`, R11D = callout of the branch.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn lookup() {
    operands!(
        save!("0"),
        "mov rdi, gs:[{engine}]",
        "mov esi, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::lookup,
    )
}

/// [`crate::state::Thunk::LookupUser`] and its kin, jumped to: RCX = a RIP whose door is not where the jump cache had it. The second
/// entries are looked at, then Rust is asked. Who branched stands in the poll word.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn lookup_second<const VIEW: usize>() {
    naked_asm!(
        "mov gs:[{rip}], rcx",
        "mov gs:[{tmp}], rdx",
        "pext r11, rcx, gs:[{mask}]",
        "lea r11, [r11+r11]",
        "mov rdx, gs:[r11*8+{tags}]",
        "lea rcx, [rdx+rcx]",
        "mov rdx, gs:[{tmp}]",
        "jrcxz 2f",
        "mov r11d, gs:[{poll}]",
        "jmp {miss}",
        "2:",
        "jmp gs:[r11*8+{hosts}]",
        tmp = const TMP,
        rip = const offset_of!(BtState, cpu.rip),
        mask = const offset_of!(BtState, jc_mask),
        poll = const offset_of!(BtState, poll_word),
        tags = const second_entries(VIEW),
        hosts = const second_entries(VIEW) + offset_of!(JumpEntry, host),
        miss = sym missed,
    )
}

/// Offset of a jump cache's second entries.
const fn second_entries(view: usize) -> usize {
    offset_of!(BtState, jc) + size_of::<JumpCache>() * view + offset_of!(JumpCache, second)
}

/// As [`lookup`], for jumps by way of the jump cache.
#[unsafe(naked)]
unsafe extern "sysv64" fn missed() {
    operands!(
        save!("0"),
        "mov rdi, gs:[{engine}]",
        "mov esi, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::missed,
    )
}

/// [`crate::state::Thunk::ReturnUser`] and its kin, jumped to: RCX = where a return leads that arrived elsewhere, and stands in the poll
/// word. It goes through the jump cache, or to Rust if somebody wants the vCPU.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn returned<const VIEW: usize>() {
    naked_asm!(
        "mov gs:[{rip}], rcx",
        "mov ecx, gs:[{request}]",
        "jrcxz 2f",
        "mov r11d, gs:[{poll}]",
        "jmp {miss}",
        "2:",
        "mov rcx, gs:[{rip}]",
        "pext r11, rcx, gs:[{mask}]",
        "jmp gs:[r11*8+{doors}]",
        rip = const offset_of!(BtState, cpu.rip),
        request = const offset_of!(BtState, request),
        poll = const offset_of!(BtState, poll_word),
        mask = const offset_of!(BtState, jc_mask),
        doors = const crate::state::off::jc_doors(VIEW),
        miss = sym missed,
    )
}

/// Where a return goes that no call was made for.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn underflow<const VIEW: usize>() {
    naked_asm!("lea rsp, [rsp-8]", "jmp {f}", f = sym returned::<VIEW>)
}

/// [`crate::state::Thunk::Chain`], jumped to: R11D = exit.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn chain() {
    operands!(
        save!("0"),
        "mov rdi, gs:[{engine}]",
        "mov esi, r11d",
        "call {f}",
        back!();
        engine = const ENGINE,
        r11 = const R11,
        f = sym callouts::chain,
    )
}

/// The signal handler's way in: translated code may have left FS pointing at a window, and Rust code needs its own.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn signal_entry() {
    naked_asm!(
        "cmp byte ptr [rip + {in_use}], 0",
        "je 2f",
        "rdgsbase rax",
        "test rax, rax",
        "jz 2f",
        "cmp qword ptr gs:[{window_fs}], 0",
        "je 2f",
        "rdfsbase rax",
        "push rax",
        "mov rax, gs:[{host_fs}]",
        "wrfsbase rax",
        "call {handler}",
        "pop rax",
        "wrfsbase rax",
        "ret",
        "2:",
        "jmp {handler}",
        in_use = sym crate::window::IN_USE,
        window_fs = const WINDOW_FS,
        host_fs = const HOST_FS,
        handler = sym crate::fault::handler,
    )
}

/// [`crate::state::Thunk::LoadFpu`], called. Leaves all general-purpose registers and flags alone.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn load_fpu() {
    naked_asm!(
        "mov gs:[{tmp}+16], rax",
        "mov gs:[{tmp}+24], rdx",
        "mov eax, gs:[{xlo}]",
        "mov edx, gs:[{xhi}]",
        "xrstor64 gs:[{xsave}]",
        "mov dword ptr gs:[{fpu}], 1",
        "mov rax, gs:[{tmp}+16]",
        "mov rdx, gs:[{tmp}+24]",
        "ret",
        tmp = const TMP,
        xlo = const XLO,
        xhi = const XHI,
        xsave = const XSAVE,
        fpu = const FPU_LIVE,
    )
}
