//! The reference is the host: every AVX-512 instruction that can take a mask and memory is run on an operand that straddles the
//! edge of a page nobody may touch, with many masks. It faults exactly when [`active_bytes`] says that a byte beyond
//! the edge is accessed.
#![allow(unsafe_code)] // Runs made-up code and takes its faults.

use std::sync::atomic::{AtomicUsize, Ordering};

use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind, Register};

use super::active_bytes;
use crate::CpuState;
use crate::flat_env::{FlatEnv, Random};
use crate::host_fpu;
use crate::simd::set_opmask;

const PAGE: usize = 4096;

static CODE: AtomicUsize = AtomicUsize::new(0);
/// Where in the code page execution goes on after a fault.
const LANDING: usize = 2048;

/// Fault in the code page: go on at the landing with the signal number. Anywhere else: the default action.
extern "C" fn on_fault(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext_t to an SA_SIGINFO handler.
    unsafe {
        let regs = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = regs[libc::REG_RIP as usize] as usize;
        let code = CODE.load(Ordering::Relaxed);
        if code != 0 && (code..code + PAGE).contains(&rip) {
            regs[libc::REG_RIP as usize] = (code + LANDING) as i64;
            regs[libc::REG_RAX as usize] = signal.into();
        } else {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// A page of code, and three pages of data of which only the middle one may be touched.
struct Host {
    code: *mut u8,
    data: *mut u8,
}

impl Host {
    fn new() -> Self {
        // SAFETY: fresh anonymous mappings of our own; the handler only acts on faults inside the code page.
        unsafe {
            let map = |len, prot| {
                let p = libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
                assert_ne!(p, libc::MAP_FAILED);
                p.cast::<u8>()
            };
            let code = map(PAGE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
            let data = map(3 * PAGE, libc::PROT_NONE);
            assert_eq!(libc::mprotect(data.add(PAGE).cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE), 0);
            code.add(LANDING).write(0xc3);
            CODE.store(code as usize, Ordering::Relaxed);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
            Self { code, data }
        }
    }

    /// Puts `bytes` in place: set the opmask, run, return 0.
    fn load(&self, bytes: &[u8]) {
        let mut code = vec![0xc4, 0xe1, 0xfb, 0x92, 0xcf]; // kmovq k1, rdi
        code.extend([0x31, 0xc0]); // xor eax, eax
        code.extend(bytes);
        code.push(0xc3);
        // SAFETY: the page is ours, writable, and larger than the code.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.code, code.len()) };
    }

    /// Runs it with the operand at `offset` of the data: the signal it raised, or 0.
    fn run(&self, offset: usize, k: u64) -> i32 {
        let signal: u64;
        // SAFETY: the code changes only vector, opmask and the named registers, the accessible data page, and flags.
        unsafe {
            std::arch::asm!(
                "call {c}", c = in(reg) self.code, in("rdi") k, in("rsi") self.data.add(offset), out("rax") signal,
                clobber_abi("sysv64"),
            );
        }
        signal as i32
    }
}

/// The instruction `code` with memory at RSI and mask K1, if it takes both.
fn build(code: Code) -> Option<Instruction> {
    let op = code.op_code();
    if op.encoding() != EncodingKind::EVEX || !op.can_use_op_mask_register() {
        return None;
    }
    let mut i = Instruction::new();
    i.set_code(code);
    let mut memory = false;
    for n in 0..op.op_count() {
        let name = format!("{:?}", op.op_kind(n));
        if name.contains("vsib") {
            return None;
        }
        if name.contains("mem") {
            i.set_memory_base(Register::RSI);
            i.set_op_kind(n, iced_x86::OpKind::Memory);
            memory = true;
        } else if op.op_kind(n) == OpCodeOperandKind::imm8 {
            i.set_op_kind(n, iced_x86::OpKind::Immediate8);
            i.set_immediate8(1);
        } else {
            let r = match name.split('_').next()? {
                "xmm" => Register::XMM16,
                "ymm" => Register::YMM16,
                "zmm" => Register::ZMM16,
                "k" => Register::K2,
                _ => return None,
            };
            // Distinct registers: some forms do not allow sources and destination to be the same.
            let r = if r == Register::K2 { r } else { r + n };
            i.set_op_kind(n, iced_x86::OpKind::Register);
            i.set_op_register(n, r);
        }
    }
    i.set_op_mask(Register::K1);
    memory.then_some(i)
}

fn encode(i: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = iced_x86::Encoder::new(64);
    encoder.encode(i, 0).ok()?;
    Some(encoder.take_buffer())
}

#[test]
fn fault_suppression_agrees_with_the_host() {
    if host_fpu::offered_xcr0() & 0xe0 != 0xe0 || host_fpu::host_cpuid(7, 0)[1] & (1 << 30) == 0 {
        return; // no AVX-512BW, so no 64-bit opmasks to load
    }
    let host = Host::new();
    let mut random = Random(31);
    let (mut tried, mut differ) = (0, Vec::new());
    let (mut st, _): (CpuState, _) = FlatEnv::long_mode();
    for code in Code::values() {
        let Some(plain) = build(code) else { continue };
        for broadcast in [false, true] {
            let mut i = plain;
            if broadcast {
                if !code.op_code().can_broadcast() {
                    continue;
                }
                i.set_is_broadcast(true);
            }
            let Some(bytes) = encode(&i) else { continue };
            let i = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
            if i.is_invalid() {
                continue;
            }
            host.load(&bytes);
            if host.run(PAGE + 64, 0) == libc::SIGILL {
                continue; // not on this host
            }
            tried += 1;
            let size = i.memory_size().info().size();
            for round in 0..24 {
                let k = match round {
                    0 => 0,
                    1 => u64::MAX,
                    _ if round % 2 == 0 => 1 << random.below(64),
                    _ => random.next() & random.next(),
                };
                // `edge` bytes lie in the touchable page: the first ones, or the last ones.
                let edge = match i.mnemonic() {
                    // These want their operand aligned, whatever the mask.
                    Mnemonic::Vmovaps | Mnemonic::Vmovapd | Mnemonic::Vmovdqa32 | Mnemonic::Vmovdqa64 => {
                        size * random.below(2) as usize
                    }
                    _ => random.below(size as u64 + 1) as usize,
                };
                let first = random.below(2) == 0;
                let (offset, outside) =
                    if first { (2 * PAGE - edge, !below(edge)) } else { (PAGE - (size - edge), below(size - edge)) };
                set_opmask(&mut st, 1, k);
                let all = below(size);
                let active = active_bytes(&st, &i).map_or(all, |m| m.bytes);
                let expected = active & outside & all != 0;
                let seen = host.run(offset, k) == libc::SIGSEGV;
                if seen != expected {
                    differ.push(format!("{i} {code:?} k {k:#x} edge {edge} first {first}: host faults: {seen}"));
                    break;
                }
            }
        }
    }
    assert!(tried > 300, "only {tried} instructions tried");
    assert!(differ.is_empty(), "{} of {tried}:\n{}", differ.len(), differ.join("\n"));
}

fn below(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}
