//! The engine on its own: small pieces of code in long mode, without a machine around it.
#![allow(unsafe_code, missing_docs)] // Guest code is assembled into the test binary and copied out.

#[macro_use]
mod common;

use paravane_bt::{BtConfig, BtVcpu, GuestRam};
use paravane_cpu::state::{cr0, cr4, efer};
use paravane_cpu::{Bus, BusOutcome, Seg, Segment, VcpuExit};
use std::arch::global_asm;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A bus with one output port.
#[derive(Default)]
struct Console(Mutex<Vec<u8>>);

impl Bus for Console {
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) -> BusOutcome {
        if port == 0xe9 {
            self.0.lock().unwrap().extend_from_slice(data);
        }
        BusOutcome::Done
    }
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) -> BusOutcome {
        BusOutcome::Done
    }
    no_interrupts!();
    fn stopping(&self) -> bool {
        false
    }
}

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;

/// A vCPU in 64-bit mode, ring 0, with the first GiB mapped one to one by 2 MiB pages and `code` at 1 MiB.
fn long_mode(code: &[u8]) -> (BtVcpu, GuestRam, Arc<Console>) {
    let mem: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap());
    let put = |gpa: u64, v: u64| mem.write_obj(v, GuestAddress(gpa)).unwrap();
    put(0x1000, 0x2000 | 7);
    put(0x2000, 0x3000 | 7);
    for n in 0..32 {
        put(0x3000 + n * 8, (n << 21) | 0x87);
    }
    mem.write_slice(code, GuestAddress(CODE)).unwrap();
    let bus = Arc::new(Console::default());
    let mut vcpu = BtVcpu::new(0, mem.clone(), bus.clone(), BtConfig::default()).unwrap();
    let st = vcpu.state_mut();
    st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    st.cr3 = 0x1000;
    st.efer = efer::LME | efer::LMA | efer::SCE;
    st.seg = [Segment::flat_data(0x10, 0); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(8, 0, true);
    st.rip = CODE;
    st.gpr[4] = STACK;
    (vcpu, mem, bus)
}

macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        mod $name {
            use super::*;
            global_asm!(
                concat!(".globl smoke_", stringify!($name), "\nsmoke_", stringify!($name), ":"),
                $($line),+,
                concat!(".globl smoke_end_", stringify!($name), "\nsmoke_end_", stringify!($name), ":"),
            );
            pub(super) fn code() -> &'static [u8] {
                unsafe extern "C" {
                    #[link_name = concat!("smoke_", stringify!($name))]
                    static START: u8;
                    #[link_name = concat!("smoke_end_", stringify!($name))]
                    static END: u8;
                }
                // SAFETY: the two symbols delimit bytes assembled right above.
                unsafe {
                    let (a, b) = (&raw const START, &raw const END);
                    std::slice::from_raw_parts(a, b as usize - a as usize)
                }
            }
        }
    };
}

guest!(
    sum,
    "xor eax, eax",
    "mov ecx, 1000",
    "2: add rax, rcx",
    "dec rcx",
    "jnz 2b",
    "mov r13, rax",
    "mov r14, 5",
    "lea r15, [r13 + r14*4 + 3]",
    "push r13",
    "push 7",
    "pop rbx",
    "pop rdx",
    "hlt",
);

#[test]
fn a_loop_and_the_stack() {
    let (mut v, _, _) = long_mode(sum::code());
    assert_eq!(v.run().unwrap(), VcpuExit::Halt);
    let g = v.state().gpr;
    assert_eq!((g[0], g[1], g[13], g[14], g[15]), (500_500, 0, 500_500, 5, 500_523));
    assert_eq!((g[3], g[2], g[4]), (7, 500_500, STACK));
}

guest!(
    calls,
    "mov rdi, 20",
    "call 5f",
    "mov rbx, rax",
    "mov edx, 0xe9",
    "mov al, 'o'",
    "out dx, al",
    "mov al, 'k'",
    "out dx, al",
    "hlt",
    "5: cmp rdi, 2",
    "jae 6f",
    "mov rax, rdi",
    "ret",
    "6: push rdi",
    "dec rdi",
    "call 5b",
    "mov rdi, [rsp]",
    "mov [rsp], rax",
    "sub rdi, 2",
    "call 5b",
    "pop rcx",
    "add rax, rcx",
    "ret",
);

#[test]
fn recursion_and_port_output() {
    let (mut v, _, bus) = long_mode(calls::code());
    assert_eq!(v.run().unwrap(), VcpuExit::Halt);
    assert_eq!(v.state().gpr[3], 6765);
    assert_eq!(bus.0.lock().unwrap().as_slice(), b"ok");
}

guest!(
    smc,
    "lea rdi, [rip + 4f + 1]",
    "mov dword ptr [rdi], 0x1234",
    "4: mov eax, 0x5678",
    "mov rbx, rax",
    "mov ecx, 3",
    "xor r12d, r12d",
    "3: mov edx, 1",
    "add r12d, edx",
    "inc dword ptr [rip + 3b + 1]",
    "loop 3b",
    "hlt",
);

#[test]
fn code_that_writes_its_own_block() {
    let (mut v, _, _) = long_mode(smc::code());
    assert_eq!(v.run().unwrap(), VcpuExit::Halt);
    assert_eq!(v.state().gpr[3], 0x1234);
    assert_eq!(v.state().gpr[12], 1 + 2 + 3);
}

guest!(
    simd,
    "movabs rax, 0x123456789abcdef0",
    "movq xmm0, rax",
    "mov edx, 0xe9",
    "out dx, al", // Leaves translated code with SIMD state live.
    "movq xmm1, xmm0",
    "paddq xmm1, xmm0",
    "mov [rsp - 5 - 4096], rax",
    "movq r14, xmm1",
    "cvtsi2sd xmm2, rax",
    "sqrtsd xmm2, xmm2",
    "cvttsd2si r8, xmm2",
    "hlt",
);

#[test]
fn simd_state_survives_callouts() {
    let (mut v, _, _) = long_mode(simd::code());
    assert_eq!(v.run().unwrap(), VcpuExit::Halt);
    assert_eq!(v.state().gpr[14], 0x123456789abcdef0_u64.wrapping_mul(2));
    assert_eq!(v.state().gpr[8], (0x123456789abcdef0_u64 as f64).sqrt() as u64);
}

guest!(
    segments,
    "stc",
    "mov rax, -1",
    ".byte 0x66, 0x8c, 0xc0", // mov ax, es: the upper bits stay. The assembler would leave the prefix out.
    "mov r9, -1",
    ".byte 0x66, 0x41, 0x8c, 0xd9", // mov r9w, ds
    "mov r10d, es",
    "mov qword ptr [rsp - 16], -1",
    "mov word ptr [rsp - 16], es",
    "mov rbx, [rsp - 16]",
    "movabs rdx, 0xffff800000001000",
    "wrgsbase rdx",
    "rdgsbase rsi",
    "movabs r11, 0x7ffffffff000",
    "wrfsbase r11",
    "rdfsbase rdi",
    "mov r8, -1",
    "wrfsbase r8d",
    "rdfsbase r8",
    "setc r13b",
    "movabs rdx, 0x800000000000",
    "wrgsbase rdx", // Not canonical: #GP, for which nobody is prepared.
    "mov r14, 1",
    "hlt",
);

#[test]
fn segment_registers_are_read_and_bases_written() {
    let (mut v, _, _) = long_mode(segments::code());
    v.state_mut().cr4 |= cr4::FSGSBASE;
    v.state_mut().seg[Seg::Es as usize].selector = 0x1234;
    assert_eq!(v.run().unwrap(), VcpuExit::TripleFault);
    let st = v.state();
    let g = st.gpr;
    assert_eq!((g[0], g[9], g[10]), (0xffff_ffff_ffff_1234, 0xffff_ffff_ffff_0010, 0x1234));
    assert_eq!(g[3], 0xffff_ffff_ffff_1234, "two bytes are stored");
    assert_eq!((g[6], g[7], g[8]), (0xffff_8000_0000_1000, 0x7fff_ffff_f000, 0xffff_ffff));
    assert_eq!((g[13] & 0xff, g[14]), (1, 0), "flags live on, and nothing runs behind the fault");
    assert_eq!(st.seg[Seg::Gs as usize].base, 0xffff_8000_0000_1000, "a base that is not canonical is not taken");
}

guest!(
    flags,
    "stc",
    "mov rax, [rsp + 8]", // Flags are live across this lookup.
    "mov rbx, [rsp + 16]",
    "setc r13b",
    "mov ecx, 3",
    "mov eax, 1",
    "shl eax, cl",
    "mov r15d, eax",
    "pushfq",
    "pop r8",
    "bts qword ptr [rsp - 64], rcx",
    "mov r9, [rsp - 64]",
    "mov r10, -70",
    "bts qword ptr [rsp - 64], r10",
    "mov r11, [rsp - 80]",
    "hlt",
);

#[test]
fn flags_survive_lookups() {
    let (mut v, _, _) = long_mode(flags::code());
    assert_eq!(v.run().unwrap(), VcpuExit::Halt);
    let g = v.state().gpr;
    assert_eq!(g[13] & 0xff, 1);
    assert_eq!(g[15], 8);
    assert_eq!(g[9], 8);
    assert_eq!(g[11], 1 << 58);
}

// Waits for a number at 0x8000, serializes, calls two functions that must give it, and reports it at 0x8008.
guest!(
    device_written,
    "xor ebx, ebx",
    "2: mov ecx, dword ptr [0x8000]",
    "cmp ecx, ebx",
    "je 2b",
    "mov ebx, ecx",
    "test ebx, 1",
    "jz 3f",
    "lea rax, [rip + 4f]",
    "jmp rax",
    "3: push rbx",
    "xor eax, eax",
    "cpuid",
    "pop rbx",
    "4: call 5f",
    "cmp eax, ebx",
    "jne 9f",
    "call 6f",
    "cmp eax, ebx",
    "jne 9f",
    "mov dword ptr [0x8008], ebx",
    "jmp 2b",
    "9: mov dword ptr [0x8008], -1",
    "8: hlt",
    "jmp 8b",
    "6: mov eax, 0",
    "ret",
    ".skip 8192, 0x90",
    "5: mov eax, 0",
    "ret",
);

/// A device rewrites code on the page of the running loop and on another one, then says so: the guest must never run
/// what was there before.
#[test]
fn code_written_by_a_device_is_new_when_the_guest_can_know() {
    const ROUNDS: u32 = 5_000;
    let code = device_written::code();
    let (mut v, mem, _) = long_mode(code);
    let far = CODE + code.len() as u64 - 5;
    let near = far - 8192 - 6;
    let kick = v.kick_handle();
    let device = std::thread::spawn(move || {
        let began = std::time::Instant::now();
        for n in 1..=ROUNDS {
            mem.write_obj(n, GuestAddress(near)).unwrap();
            mem.write_obj(n, GuestAddress(far)).unwrap();
            mem.store(n, GuestAddress(0x8000), std::sync::atomic::Ordering::Release).unwrap();
            loop {
                let seen: u32 = mem.load(GuestAddress(0x8008), std::sync::atomic::Ordering::Acquire).unwrap();
                if seen == n {
                    break;
                }
                assert!(seen == n - 1, "the guest ran old code in round {n}");
                assert!(began.elapsed().as_secs() < 60, "the guest hangs in round {n}");
                std::thread::yield_now();
            }
        }
        // Send the guest to its HLT: old code on purpose, by a number that the functions do not give.
        mem.store(0u32, GuestAddress(0x8000), std::sync::atomic::Ordering::Release).unwrap();
        kick.kick();
    });
    assert_eq!(v.run().unwrap(), VcpuExit::Halt);
    device.join().unwrap();
    let writes = v.stats().into_iter().find(|(n, _)| n == "writes by others to pages with code").unwrap().1;
    assert!(writes >= u64::from(ROUNDS), "{writes} writes were noticed");
}
