//! Interrupts and exceptions.
//!
//! Every vector has a stub in `boot.s` that saves the registers and calls [`rt_trap`] here. A handler set with [`handle`] sees to it; without
//! one, a trap that [`fault!`](crate::fault) expects goes on behind the faulting line, a trap from user mode ends [`enter_user`], and any other ends the
//! guest. Exceptions and interrupts have a stack each (IST 1 and 2; NMI, #DF and #MC: IST 3), because precompiled Rust may use the red zone.
//! So a handler must leave interrupts disabled. Where speed matters, [`set_gate`] points a vector at the guest's own code.

use crate::println;
use core::arch::asm;
use core::mem::transmute;
use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Registers of the interrupted code, as the stubs save them. Changes take effect when the handler returns.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "registers")]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    /// Error code, 0 for vectors without one.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// What the last trap without a handler left behind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trap {
    /// Registers.
    pub frame: Frame,
    /// CR2 at that time: the address of a page fault.
    pub cr2: u64,
    /// Traps without a handler so far.
    pub count: u64,
}

/// A handler. It runs with interrupts disabled and may use all registers.
pub type Handler = fn(&mut Frame);

unsafe extern "C" {
    static rt_stubs: [u64; 256];
    static mut rt_gdt: [u64; 8];
    fn rt_enter_user(rip: u64, rsp: u64, rflags: u64, cs: u64, argument: u64);
}

#[repr(C, align(16))]
struct Stack([u8; 16384]);

static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];
static mut TSS: [u32; 26] = [0; 26];
static mut STACKS: [Stack; 4] = [const { Stack([0; 16384]) }; 4];
static mut TRAP: Option<Trap> = None;
/// Where a trap without a handler goes on, once; 0: nowhere. Written by the assembly of `fault!`.
#[doc(hidden)]
#[unsafe(no_mangle)]
pub static RT_RESUME: AtomicU64 = AtomicU64::new(0);
static HANDLERS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

/// Selector of 64-bit user code.
pub const USER_CODE: u64 = 0x2b;
/// Selector of 32-bit user code.
pub const USER_CODE_32: u64 = 0x1b;

/// The last trap without a handler.
pub fn last() -> Trap {
    // SAFETY: one CPU; traps that write it happen between whole calls of this function only.
    unsafe { read_volatile(&raw const TRAP) }.unwrap_or_default()
}

/// Sets or removes the handler of a vector; gives the one before.
pub fn handle(vector: u8, handler: Option<Handler>) -> Option<Handler> {
    let old = HANDLERS[usize::from(vector)].swap(handler.map_or(0, |h| h as usize), Relaxed);
    // SAFETY: only function pointers of this type and 0 are ever stored, and 0 is `None`.
    unsafe { transmute::<usize, Option<Handler>>(old) }
}

/// Called by the stubs. True: user mode is over, and `enter_user` returns.
#[unsafe(no_mangle)]
extern "C" fn rt_trap(frame: &mut Frame) -> bool {
    let handler = HANDLERS[frame.vector as usize & 255].load(Relaxed);
    // SAFETY: as in `handle`.
    if let Some(handler) = unsafe { transmute::<usize, Option<Handler>>(handler) } {
        handler(frame);
        return false;
    }
    let cr2;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack, preserves_flags)) };
    let count = last().count + 1;
    // SAFETY: one CPU, interrupts disabled.
    unsafe { write_volatile(&raw mut TRAP, Some(Trap { frame: *frame, cr2, count })) };
    let resume = RT_RESUME.swap(0, Relaxed);
    if frame.cs & 3 != 0 {
        return true;
    }
    if resume != 0 {
        frame.rip = resume;
        return false;
    }
    println!(
        "Bail out! vector {} error {:#x} rip {:#x} cs {:#x} rsp {:#x} cr2 {cr2:#x}",
        frame.vector, frame.error, frame.rip, frame.cs, frame.rsp
    );
    crate::console::exit(2)
}

/// Runs user code until it traps and nobody handles it; [`last`] tells how. Interrupts are disabled afterwards.
///
/// # Safety
/// Code and stack are mapped for user mode, and what the code does keeps this program safe. `argument` arrives in RDI.
pub unsafe fn enter_user(rip: u64, rsp: u64, rflags: u64, cs: u64, argument: u64) {
    // SAFETY: handed on to the caller.
    unsafe { rt_enter_user(rip, rsp, rflags, cs, argument) }
}

/// Points a vector's interrupt gate at code of the guest's own, which ends with IRETQ; IST 2. `None` gives it back to the stub.
///
/// # Safety
/// The code keeps all registers it does not save.
pub unsafe fn set_gate(vector: u8, code: Option<u64>) {
    // SAFETY: `rt_stubs` is a table of 256 addresses; one CPU, and the gate is 16 bytes of a table that lives for ever.
    unsafe {
        let code = code.unwrap_or(rt_stubs[usize::from(vector)]);
        write_volatile(&raw mut IDT[usize::from(vector)], gate(vector, code));
    }
}

/// An interrupt gate; 3 (INT3) and 0x80 may be called from user mode.
fn gate(vector: u8, code: u64) -> [u64; 2] {
    let dpl = if vector == 3 || vector == 0x80 { 3 } else { 0 };
    let ist = match vector {
        2 | 8 | 18 => 3,
        0..32 => 1,
        _ => 2,
    };
    [code & 0xffff | 8 << 16 | ist << 32 | (0x8e | dpl << 5) << 40 | (code >> 16 & 0xffff) << 48, code >> 32]
}

/// Installs TSS and IDT.
pub(crate) fn init() {
    // SAFETY: runs once on the only CPU, before any trap can happen; the tables are static.
    unsafe {
        // RSP0 at offset 4, IST 1 to 3 at 36, 44, 52.
        for (stack, slot) in [(0, 1), (1, 9), (2, 11), (3, 13)] {
            let top = &raw const STACKS[stack] as u64 + size_of::<Stack>() as u64;
            TSS[slot] = top as u32;
            TSS[slot + 1] = (top >> 32) as u32;
        }
        TSS[25] = 104 << 16;
        let base = &raw const TSS as u64;
        rt_gdt[6] = 103 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        rt_gdt[7] = base >> 32;
        for vector in 0..=255 {
            IDT[usize::from(vector)] = gate(vector, rt_stubs[usize::from(vector)]);
        }
        let at = &raw const IDT as u64;
        let pointer: [u16; 5] = [4095, at as u16, (at >> 16) as u16, (at >> 32) as u16, (at >> 48) as u16];
        asm!("lidt [{}]", "ltr {:x}", in(reg) &pointer, in(reg) 0x30u64, options(nostack));
    }
}

/// Runs one line of assembly that may fault and goes on behind it. Yields the trap and whether one happened.
///
/// R11 is used; operands follow the line as in `asm!`.
#[macro_export]
macro_rules! fault {
    ($body:literal $(, $($operand:tt)*)?) => {{
        let before = $crate::trap::last().count;
        core::arch::asm!(
            "lea r11, [rip + 3f]", "mov [rip + RT_RESUME], r11",
            $body, "3:", "mov qword ptr [rip + RT_RESUME], 0",
            $($($operand)*,)? out("r11") _
        );
        let trap = $crate::trap::last();
        (trap, trap.count != before)
    }};
}
