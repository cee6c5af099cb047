//! Several vCPUs on one memory: what each may see of the others' stores, locked instructions on pages that hold code, and code that one vCPU
//! changes while another runs it.
#![allow(unsafe_code, missing_docs)] // Guest code is assembled into the test binary and copied out.

#[macro_use]
mod common;

use paravane_bt::{BtConfig, BtVcpu, GuestRam};
use paravane_cpu::state::{cr0, cr4, efer};
use paravane_cpu::{Bus, BusOutcome, Reg, Seg, Segment, VcpuExit};
use std::arch::global_asm;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A bus with nothing on it.
#[derive(Default)]
struct Nothing(AtomicBool);

impl Bus for Nothing {
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) -> BusOutcome {
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
        self.0.load(SeqCst)
    }
}

const MEMORY: u64 = 64 << 20;
const CODE: u64 = 0x10_0000;
const STACKS: u64 = 0x20_0000;

/// Memory whose first 64 MiB are mapped one to one by 2 MiB pages.
fn memory() -> GuestRam {
    let mem: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
    let put = |gpa: u64, v: u64| mem.write_obj(v, GuestAddress(gpa)).unwrap();
    put(0x1000, 0x2000 | 7);
    put(0x2000, 0x3000 | 7);
    for n in 0..32 {
        put(0x3000 + n * 8, (n << 21) | 0x87);
    }
    mem
}

/// vCPU `id` of `cpus` in 64-bit mode at `rip`, with registers.
fn vcpu(mem: &GuestRam, id: u32, cpus: u32, rip: u64, regs: &[(Reg, u64)]) -> BtVcpu {
    vcpu_on(Arc::default(), mem, id, cpus, rip, regs)
}

fn vcpu_on(bus: Arc<Nothing>, mem: &GuestRam, id: u32, cpus: u32, rip: u64, regs: &[(Reg, u64)]) -> BtVcpu {
    let cfg = BtConfig { cpus, ..BtConfig::default() };
    let mut vcpu = BtVcpu::new(id, mem.clone(), bus, cfg).unwrap();
    let st = vcpu.state_mut();
    st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    st.cr3 = 0x1000;
    st.efer = efer::LME | efer::LMA | efer::SCE;
    st.seg = [Segment::flat_data(0x10, 0); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(8, 0, true);
    st.gpr[Reg::Rsp as usize] = STACKS + 0x1000 * (u64::from(id) + 1);
    set(&mut vcpu, rip, regs);
    vcpu
}

fn set(vcpu: &mut BtVcpu, rip: u64, regs: &[(Reg, u64)]) {
    let st = vcpu.state_mut();
    (st.rip, st.halted) = (rip, 0);
    for &(r, v) in regs {
        st.gpr[r as usize] = v;
    }
}

/// Runs all vCPUs to their HLT, beginning at the same time.
fn run(vcpus: &mut [BtVcpu]) {
    let start = Barrier::new(vcpus.len());
    std::thread::scope(|s| {
        for v in vcpus {
            let start = &start;
            s.spawn(move || {
                start.wait();
                assert_eq!(v.run().unwrap(), VcpuExit::Halt);
            });
        }
    });
}

macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        mod $name {
            use super::*;
            global_asm!(
                concat!(".globl smp_", stringify!($name), "\nsmp_", stringify!($name), ":"),
                $($line),+,
                concat!(".globl smp_end_", stringify!($name), "\nsmp_end_", stringify!($name), ":"),
            );
            /// Puts the code at `gpa`.
            pub(super) fn put(mem: &GuestRam, gpa: u64) {
                unsafe extern "C" {
                    #[link_name = concat!("smp_", stringify!($name))]
                    static START: u8;
                    #[link_name = concat!("smp_end_", stringify!($name))]
                    static END: u8;
                }
                // SAFETY: the two symbols delimit bytes assembled right above.
                let code = unsafe {
                    let (a, b) = (&raw const START, &raw const END);
                    std::slice::from_raw_parts(a, b as usize - a as usize)
                };
                mem.write_slice(code, GuestAddress(gpa)).unwrap();
            }
        }
    };
}

// ---- litmus tests ----
//
// Each vCPU goes through arrays of variables, a cache line each; RDI and RSI point at the two variables of a round, RBP at two bytes
// for what was read, RCX counts down. R8 points at a counter of those who are ready, R9 says how many there are to be. R10 and R11 point at
// what this and another vCPU have before them, so that two stay together.

macro_rules! litmus {
    ($name:ident, $($line:literal),+) => {
        guest!(
            $name,
            "lock inc qword ptr [r8]",
            "2: pause",
            "cmp qword ptr [r8], r9",
            "jb 2b",
            // Wait for the other, but not for ever: it may be off its host CPU. Then a moment more or less.
            "3: mov [r10], rcx",
            "mov eax, 2000",
            "4: cmp [r11], rcx",
            "jbe 5f",
            "dec eax",
            "jnz 4b",
            "5: rdtsc",
            "and eax, 63",
            "6: dec eax",
            "jns 6b",
            $($line),+,
            "mov [rbp], al",
            "mov [rbp + 1], bl",
            "add rdi, 64",
            "add rsi, 64",
            "add rbp, 2",
            "dec rcx",
            "jnz 3b",
            "hlt",
        );
    };
}

litmus!(store, "mov dword ptr [rdi], 1", "xor eax, eax", "xor ebx, ebx");
litmus!(store_locked, "mov eax, 1", "xchg [rdi], eax", "xor ebx, ebx");
litmus!(store_load, "mov dword ptr [rdi], 1", "mov eax, [rsi]", "xor ebx, ebx");
litmus!(store_load_locked, "lock inc dword ptr [rdi]", "mov eax, [rsi]", "xor ebx, ebx");
litmus!(store_load_fenced, "mov dword ptr [rdi], 1", "mfence", "mov eax, [rsi]", "xor ebx, ebx");
litmus!(load_store, "mov eax, [rsi]", "mov dword ptr [rdi], 1", "xor ebx, ebx");
litmus!(load_store_locked, "mov eax, [rsi]", "lock inc dword ptr [rdi]", "xor ebx, ebx");
litmus!(store_store, "mov dword ptr [rdi], 1", "mov dword ptr [rsi], 1", "xor eax, eax", "xor ebx, ebx");
litmus!(store_store_locked, "lock inc dword ptr [rdi]", "lock inc dword ptr [rsi]", "xor eax, eax", "xor ebx, ebx");
litmus!(load_load, "mov eax, [rdi]", "mov ebx, [rsi]");

const READY: u64 = 0x30_0000;
const X: u64 = 16 << 20;
/// Elsewhere in a direct-mapped TLB.
const Y: u64 = 34 << 20;
const RESULTS: u64 = 8 << 20;
/// Variables in a batch.
const ROUNDS: u64 = 1 << 14;

/// What a vCPU does: its code, and whether the two variables change places.
type Part = (fn(&GuestRam, u64), bool);

/// Runs a test `batches` times; gives how often `outcome` holds for what the vCPUs read in a round.
fn litmus(parts: &[Part], batches: u32, outcome: fn(&[[u8; 2]]) -> bool) -> u64 {
    let mem = memory();
    let cpus = parts.len() as u32;
    let code = |n: usize| CODE + 0x1000 * n as u64;
    let mut vcpus: Vec<BtVcpu> = (0..parts.len()).map(|n| vcpu(&mem, n as u32, cpus, code(n), &[])).collect();
    for (n, part) in parts.iter().enumerate() {
        (part.0)(&mem, code(n));
    }
    let zeros = vec![0; (ROUNDS * 64) as usize];
    let progress = |n: usize| READY + 64 * (n as u64 + 1);
    let results = |n: usize| RESULTS + (n as u64) * ROUNDS * 2;
    let mut read = vec![[[0; 2]; ROUNDS as usize]; parts.len()];
    let mut seen = 0;
    for _ in 0..batches {
        mem.write_slice(&zeros, GuestAddress(X)).unwrap();
        mem.write_slice(&zeros, GuestAddress(Y)).unwrap();
        mem.write_obj(0_u64, GuestAddress(READY)).unwrap();
        (0..parts.len()).for_each(|n| mem.write_obj(u64::MAX, GuestAddress(progress(n))).unwrap());
        for (n, (v, part)) in vcpus.iter_mut().zip(parts).enumerate() {
            let (a, b) = if part.1 { (Y, X) } else { (X, Y) };
            let regs = [
                (Reg::Rdi, a),
                (Reg::Rsi, b),
                (Reg::Rbp, results(n)),
                (Reg::Rcx, ROUNDS),
                (Reg::R8, READY),
                (Reg::R9, u64::from(cpus)),
                (Reg::R10, progress(n)),
                (Reg::R11, progress(if cpus == 2 { 1 - n } else { n })),
            ];
            set(v, code(n), &regs);
        }
        run(&mut vcpus);
        for (n, r) in read.iter_mut().enumerate() {
            mem.read_slice(r.as_flattened_mut(), GuestAddress(results(n))).unwrap();
        }
        for round in 0..ROUNDS as usize {
            let all: Vec<[u8; 2]> = read.iter().map(|r| r[round]).collect();
            seen += u64::from(outcome(&all));
        }
    }
    seen
}

/// 16,384 rounds each; `PARAVANE_LITMUS` sets another number, such as 611 for ten million rounds.
fn batches() -> u32 {
    std::env::var("PARAVANE_LITMUS").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

#[test]
fn stores_wait_in_buffers_unless_locked_or_fenced() {
    let neither = |r: &[[u8; 2]]| r[0][0] == 0 && r[1][0] == 0;
    assert_eq!(litmus(&[(store_load_locked::put, false), (store_load_locked::put, true)], batches(), neither), 0);
    assert_eq!(litmus(&[(store_load_fenced::put, false), (store_load_fenced::put, true)], batches(), neither), 0);
    // x86-TSO allows it without. Seeing it shows that rounds overlap and that the test could fail; it takes two host CPUs at once.
    if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
        let plain = (0..20)
            .map(|_| litmus(&[(store_load::put, false), (store_load::put, true)], batches(), neither))
            .find(|&n| n > 0);
        assert!(plain.is_some(), "stores were never seen to wait: the vCPUs do not run at the same time");
        println!("store buffering: {} in {} rounds", plain.unwrap_or(0), ROUNDS * u64::from(batches()));
    }
}

#[test]
fn loads_are_not_passed_by_later_stores() {
    let both = |r: &[[u8; 2]]| r[0][0] == 1 && r[1][0] == 1;
    assert_eq!(litmus(&[(load_store::put, false), (load_store::put, true)], batches(), both), 0);
    assert_eq!(litmus(&[(load_store_locked::put, false), (load_store_locked::put, true)], batches(), both), 0);
}

#[test]
fn messages_pass_in_order() {
    // The reader looks at the second variable first.
    let stale = |r: &[[u8; 2]]| r[1] == [1, 0];
    assert_eq!(litmus(&[(store_store::put, false), (load_load::put, true)], batches(), stale), 0);
    assert_eq!(litmus(&[(store_store_locked::put, false), (load_load::put, true)], batches(), stale), 0);
}

#[test]
fn all_agree_on_the_order_of_independent_writes() {
    let split = |r: &[[u8; 2]]| r[2] == [1, 0] && r[3] == [1, 0];
    for write in [store::put as fn(&GuestRam, u64), store_locked::put] {
        let parts = [(write, false), (write, true), (load_load::put as _, false), (load_load::put as _, true)];
        assert_eq!(litmus(&parts, batches() / 2 + 1, split), 0);
    }
}

// ---- locked instructions on pages with code ----

guest!(
    count,
    "2: lock inc qword ptr [rdi]",
    "mov eax, 1",
    "lock xadd [rdi + 8], rax",
    "3: mov rax, [rdi + 16]",
    "lea rbx, [rax + 1]",
    "lock cmpxchg [rdi + 16], rbx",
    "jne 3b",
    // As a page-crossing access would: in two steps, but nobody else uses it.
    "dec rcx",
    "jnz 2b",
    "hlt",
);

#[test]
fn locked_instructions_are_atomic_on_pages_that_hold_code() {
    const EACH: u64 = 20_000;
    let mem = memory();
    let data = CODE + 0x800;
    count::put(&mem, CODE);
    count::put(&mem, CODE + 0x1000);
    let regs = [(Reg::Rdi, data), (Reg::Rcx, EACH)];
    // The counters are in the page of the first two's code; the third one's is another.
    let mut vcpus =
        vec![vcpu(&mem, 0, 3, CODE, &regs), vcpu(&mem, 1, 3, CODE, &regs), vcpu(&mem, 2, 3, CODE + 0x1000, &regs)];
    run(&mut vcpus);
    for n in 0..3 {
        assert_eq!(mem.read_obj::<u64>(GuestAddress(data + 8 * n)).unwrap(), 3 * EACH, "counter {n}");
    }
}

guest!(
    count_across,
    // RDI: 4 bytes before the end of a page. The upper half is counted by itself, too, and nothing is lost.
    "2: lock inc qword ptr [rdi]",
    "lock inc dword ptr [rdi + 4]",
    "mov eax, 1",
    "lock xadd [rdi + 0x1000], rax",
    "3: mov rax, [rdi + 0x2000]",
    "lea rbx, [rax + 1]",
    "lock cmpxchg [rdi + 0x2000], rbx",
    "jne 3b",
    "4: mov eax, [rdi + 0x3000]",
    "mov edx, [rdi + 0x3004]",
    "lea ebx, [rax + 1]",
    "mov r8d, ecx",
    "lea ecx, [rdx + 1]",
    "lock cmpxchg8b [rdi + 0x3000]",
    "mov ecx, r8d",
    "jne 4b",
    "dec rcx",
    "jnz 2b",
    "hlt",
);

#[test]
fn locked_instructions_are_atomic_across_pages() {
    const EACH: u64 = 500;
    let mem = memory();
    let data = 0x40_0ffc;
    count_across::put(&mem, CODE);
    let regs = [(Reg::Rdi, data), (Reg::Rcx, EACH)];
    let mut vcpus: Vec<BtVcpu> = (0..3).map(|n| vcpu(&mem, n, 3, CODE, &regs)).collect();
    run(&mut vcpus);
    let all = 3 * EACH;
    let expected = [all << 32 | all, all, all, all << 32 | all];
    for (n, expected) in expected.into_iter().enumerate() {
        assert_eq!(mem.read_obj::<u64>(GuestAddress(data + 0x1000 * n as u64)).unwrap(), expected, "counter {n}");
    }
}

// ---- code that is changed while another vCPU runs it ----
//
// RDI: the functions' pages, RSI: what the two tell each other, RCX: rounds, RBX: pages in use minus one. In round n the writer lets the function of page
// n & RBX return n, says so in [RSI], and waits until [RSI + 64] says that it was called.

guest!(
    writer,
    "xor r12d, r12d",
    "2: inc r12",
    "mov rax, r12",
    "and rax, rbx",
    "shl rax, 12",
    "add rax, rdi",
    "mov dword ptr [rax + 0x100], 0xb8909090", // three NOPs and MOV EAX, imm32
    "mov [rax + 0x104], r12d",
    "mov byte ptr [rax + 0x108], 0xc3", // RET
    "mov [rsi], r12",
    "3: pause",
    "cmp [rsi + 64], r12",
    "jne 3b",
    "cmp r12, rcx",
    "jne 2b",
    "hlt",
);

guest!(
    caller,
    "xor r12d, r12d",
    "mov r13, rcx",
    "mov r14, rbx",
    "2: inc r12",
    "3: pause",
    "cmp [rsi], r12",
    "jne 3b",
    "xor eax, eax",
    "cpuid",
    "mov rax, r12",
    "and rax, r14",
    "shl rax, 12",
    "lea rax, [rax + rdi + 0x100]",
    "call rax",
    "cmp eax, r12d",
    "je 4f",
    "inc qword ptr [rsi + 128]",
    "4: mov [rsi + 64], r12",
    "cmp r12, r13",
    "jne 2b",
    "hlt",
);

const FUNCTIONS: u64 = 4 << 20;
const TALK: u64 = 0x31_0000;

fn modified_code(rounds: u64, pages: u64) {
    let mem = memory();
    writer::put(&mem, CODE);
    caller::put(&mem, CODE + 0x1000);
    let regs = [(Reg::Rdi, FUNCTIONS), (Reg::Rsi, TALK), (Reg::Rcx, rounds), (Reg::Rbx, pages - 1)];
    let mut vcpus = vec![vcpu(&mem, 0, 2, CODE, &regs), vcpu(&mem, 1, 2, CODE + 0x1000, &regs)];
    run(&mut vcpus);
    assert_eq!(mem.read_obj::<u64>(GuestAddress(TALK + 64)).unwrap(), rounds);
    assert_eq!(mem.read_obj::<u64>(GuestAddress(TALK + 128)).unwrap(), 0, "old code ran");
    let given_up: u64 =
        vcpus.iter().flat_map(BtVcpu::stats).filter(|(n, _)| n == "pages given up for others' code").map(|c| c.1).sum();
    assert!(given_up >= pages, "the writer's entries were never in the way: {given_up}");
}

#[test]
fn what_another_vcpu_wrote_into_code_is_run_after_it_was_told_of() {
    modified_code(5000, 1);
    modified_code(5000, 64);
}

guest!(
    two_ways,
    // Both write into pages that the other runs code from, and make code from pages that the other writes to.
    "xor r12d, r12d",
    "mov r13, rcx",
    "2: inc r12",
    "mov rax, r12",
    "and rax, rbx",
    "shl rax, 12",
    "add rax, rdi",
    "mov dword ptr [rax + 0x100], 0xc3909090",
    "mov [rax + rsi + 8], r12",
    "add rax, 0x100",
    "call rax",
    "cmp r12, r13",
    "jne 2b",
    "hlt",
);

#[test]
fn vcpus_that_wait_for_each_other_get_on() {
    const ROUNDS: u64 = 20_000;
    let mem = memory();
    let mut vcpus: Vec<BtVcpu> = (0..4)
        .map(|n| {
            two_ways::put(&mem, CODE + 0x1000 * n);
            let regs = [(Reg::Rdi, FUNCTIONS), (Reg::Rsi, n * 64), (Reg::Rcx, ROUNDS), (Reg::Rbx, 31)];
            vcpu(&mem, n as u32, 4, CODE + 0x1000 * n, &regs)
        })
        .collect();
    run(&mut vcpus);
    for v in &vcpus {
        assert_eq!(v.state().gpr[Reg::R12 as usize], ROUNDS);
    }
}

// ---- kicks ----

guest!(spin, "2: jmp 2b");

#[test]
fn no_kick_is_lost_among_others() {
    const ROUNDS: u32 = 300;
    let mem = memory();
    spin::put(&mem, CODE);
    let bus = Arc::new(Nothing::default());
    let mut v = vcpu_on(bus.clone(), &mem, 0, 1, CODE, &[]);
    let kick = v.kick_handle();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !done.load(SeqCst) {
                    kick.kick();
                }
            });
        }
        for round in 0..ROUNDS {
            let began = Instant::now();
            s.spawn(|| {
                std::thread::sleep(Duration::from_micros(200));
                bus.0.store(true, SeqCst);
                kick.kick();
            });
            assert_eq!(v.run().unwrap(), VcpuExit::Stopped);
            bus.0.store(false, SeqCst);
            if began.elapsed() > Duration::from_secs(20) {
                done.store(true, SeqCst);
                panic!("the last kick of round {round} was seen after {:?}", began.elapsed());
            }
        }
        done.store(true, SeqCst);
    });
}
