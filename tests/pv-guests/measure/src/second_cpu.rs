//! A second CPU: what it costs to interrupt it, while it works and while it halts.
//!
//! It is started with INIT and SIPI (SDM vol. 3, section 11.4.4), takes the boot CPU's page tables, and has tables of its own for the
//! rest. Its interrupt handler counts and ends the interrupt. Once started it works, or halts, until the machine ends.

use crate::harness::{Outcome, Run, repeated};
use crate::machine::VECTOR;
use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use guest_rt::apic::{Apic, register};
use guest_rt::cpu;
use guest_shim::Vcpus;

/// Where the CPU starts, below 1 MiB: no loader puts anything there that is still needed.
const START: u64 = 0x7_0000;

global_asm!(
    ".global second_start, second_start_end, second_counting_msr, second_counting_memory",
    ".code16",
    "second_start:",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    // lgdt [second_gdt_pointer]
    ".byte 0x0f, 0x01, 0x16",
    ".short second_gdt_pointer - second_start",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    // A far jump to the 32-bit code segment.
    ".byte 0x66, 0xea",
    ".long 0x70000 + second_32 - second_start",
    ".short 0x18",
    ".code32",
    "second_32:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    // As in the boot CPU's boot.s.
    "mov eax, cr4",
    "or eax, 0x620",
    "mov cr4, eax",
    "mov eax, offset rt_pml4",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x901",
    "wrmsr",
    "mov eax, cr0",
    "and eax, 0xfffffffb",
    "or eax, 0x80010022",
    "mov cr0, eax",
    ".byte 0xea",
    ".long 0x70000 + second_64 - second_start",
    ".short 8",
    ".code64",
    "second_64:",
    "mov rax, offset second_main",
    "jmp rax",
    ".balign 8",
    "second_gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff",
    "second_gdt_pointer: .short 31",
    ".long 0x70000 + second_gdt - second_start",
    "second_start_end:",
    "second_main:",
    "mov rsp, offset {stack}",
    "add rsp, {stack_bytes}",
    "lidt [rip + {idt_pointer}]",
    // The local APIC, in the mode that the boot CPU's has.
    "cmp qword ptr [rip + {x2}], 0",
    "je 2f",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x800",
    "wrmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "jmp 3f",
    "2:",
    "mov eax, 0xfee000f0",
    "mov dword ptr [rax], 0x1ff",
    "3:",
    "lock inc qword ptr [rip + {arrived}]",
    "sti",
    "cmp qword ptr [rip + {halts}], 0",
    "jne 5f",
    "4: pause",
    "jmp 4b",
    "5: hlt",
    "jmp 5b",
    "second_counting_msr:",
    "lock inc qword ptr [rip + {arrived}]",
    "push rax",
    "push rcx",
    "push rdx",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    "second_counting_memory:",
    "lock inc qword ptr [rip + {arrived}]",
    "push rax",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    stack = sym STACK,
    stack_bytes = const size_of::<Stack>(),
    idt_pointer = sym IDT_POINTER,
    x2 = sym X2,
    arrived = sym ARRIVED,
    halts = sym HALTS,
);

unsafe extern "C" {
    static second_start: u8;
    static second_start_end: u8;
    fn second_counting_msr();
    fn second_counting_memory();
}

#[repr(C, align(16))]
struct Stack([u8; 4096]);
static mut STACK: Stack = Stack([0; 4096]);
static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];
static mut IDT_POINTER: [u16; 5] = [0; 5];
/// Interrupts that the second CPU took, and one for its start.
static ARRIVED: AtomicU64 = AtomicU64::new(0);
/// Whether its local APIC is to be an x2APIC, 0 or 1.
static X2: AtomicU64 = AtomicU64::new(0);
/// Whether it halts, 0 or 1.
static HALTS: AtomicU64 = AtomicU64::new(0);

/// Interrupts of the local APIC's command register: INIT and start-up at [`START`].
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600 | (START >> 12) as u32;

/// Sends a command to APIC ID 1.
fn command(apic: Apic, value: u32) {
    match apic {
        // SAFETY: it resets and starts the other CPU, which does nothing yet.
        Apic::X2 => unsafe { cpu::write_msr(0x830, 1 << 32 | u64::from(value)) },
        Apic::Mmio => {
            apic.write(register::ICR_HIGH, 1 << 24);
            apic.write(register::ICR, value);
        }
    }
}

/// Waits; false: `ns` passed before `there` held.
fn within(run: &Run<'_>, ns: u64, mut there: impl FnMut() -> bool) -> bool {
    let end = run.machine.vcpu.ns() + ns;
    while !there() {
        if run.machine.vcpu.ns() > end {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Starts the second CPU.
fn start(run: &Run<'_>, halts: bool) -> Result<(), &'static str> {
    let apic = crate::cases::apic();
    let handler = if apic == Apic::X2 { second_counting_msr } else { second_counting_memory } as *const () as u64;
    let idt = &raw mut IDT;
    // SAFETY: the other CPU does not run yet; the start page is RAM that nobody uses.
    unsafe {
        // An interrupt gate for code segment 8, on the stack in use.
        (*idt)[usize::from(VECTOR)] =
            [handler & 0xffff | 8 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48, handler >> 32];
        let at = idt as u64;
        IDT_POINTER = [4095, at as u16, (at >> 16) as u16, (at >> 32) as u16, (at >> 48) as u16];
        let bytes = &raw const second_start_end as usize - &raw const second_start as usize;
        core::ptr::copy_nonoverlapping(&raw const second_start, START as *mut u8, bytes);
    }
    X2.store(u64::from(apic == Apic::X2), SeqCst);
    HALTS.store(u64::from(halts), SeqCst);
    let before = ARRIVED.load(SeqCst);
    command(apic, INIT);
    within(run, 10_000_000, || false);
    for patience in [1_000_000, 500_000_000] {
        command(apic, START_UP);
        if within(run, patience, || ARRIVED.load(SeqCst) != before) {
            return Ok(());
        }
    }
    Err("no second CPU starts")
}

/// Sends interrupts to the second CPU, each when the one before has arrived.
fn interrupts(run: &Run<'_>, halts: bool) -> Outcome {
    start(run, halts)?;
    repeated(run.count, || {
        let before = ARRIVED.load(SeqCst);
        run.machine.vcpu.send_ipi(Vcpus::one(1), VECTOR);
        while ARRIVED.load(SeqCst) == before {
            core::hint::spin_loop();
        }
    })
}

pub(crate) fn to_busy(run: &Run<'_>) -> Outcome {
    interrupts(run, false)
}

pub(crate) fn to_halted(run: &Run<'_>) -> Outcome {
    interrupts(run, true)
}
