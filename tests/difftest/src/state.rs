//! What goes into a sequence and what comes out: plain data that two processes share, and its comparison.

use crate::layout;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::fmt::Write as _;
use std::sync::OnceLock;

/// Bytes of the XSAVE image that are kept: legacy region, header, AVX, opmask, both AVX-512 parts.
pub const FPU_BYTES: usize = 2688;
/// XSTATE components that are set and compared: x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM.
pub const FPU_MASK: u64 = 0xe7;

/// User-visible registers.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Regs {
    /// General-purpose registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// XSAVE image, standard format.
    pub fpu: [u8; FPU_BYTES],
}

/// A sequence's starting point.
#[derive(Clone)]
#[repr(C)]
pub struct Input {
    /// Registers; RIP is the first instruction.
    pub regs: Regs,
    /// Number of the initial memory image.
    pub image: u64,
}

/// How a run of a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum End {
    /// Not run.
    None = 0,
    /// An exception (every sequence ends with one).
    Exception = 1,
    /// It did not end in time.
    Hang = 2,
    /// The run broke down: a triple fault, an unexpected exit or the loss of the native process.
    Broken = 3,
}

/// What a sequence came to.
#[derive(Clone)]
#[repr(C)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// Exception vector.
    pub vector: u32,
    /// Error code; 0 for vectors without one.
    pub error: u64,
    /// Faulting address of a page fault; 0 for other vectors.
    pub cr2: u64,
    /// Registers at the exception, as the exception handler sees them.
    pub regs: Regs,
    /// The writable memory.
    pub memory: [u8; layout::IMAGE_BYTES],
}

impl Regs {
    /// All zero, with the FPU in its initial configuration.
    pub fn new() -> Self {
        let mut fpu = [0; FPU_BYTES];
        fpu[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        fpu[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        fpu[512] = 3;
        Self { gpr: [0; 16], rip: 0, rflags: 0x202, fs_base: 0, gs_base: 0, fpu }
    }
}

impl Default for Regs {
    fn default() -> Self {
        Self::new()
    }
}

impl Outcome {
    /// An outcome that says nothing.
    pub fn new() -> Box<Self> {
        Box::new(Self {
            end: End::None,
            vector: 0,
            error: 0,
            cr2: 0,
            regs: Regs::new(),
            memory: [0; layout::IMAGE_BYTES],
        })
    }
}

/// Offset and size in bytes of XSTATE component `i` on this host in the standard format, `None` when XCR0 lacks it.
pub fn component(i: u32) -> Option<(usize, usize)> {
    static TABLE: OnceLock<[Option<(usize, usize)>; 8]> = OnceLock::new();
    *TABLE
        .get_or_init(|| {
            let mut t = [None; 8];
            // OSXSAVE.
            if __cpuid(1).ecx & 1 << 27 == 0 {
                return t;
            }
            let valid = __cpuid_count(0xd, 0).eax;
            for i in 2..8u32 {
                let r = __cpuid_count(0xd, i);
                if valid & 1 << i != 0 && (r.eax + r.ebx) as usize <= FPU_BYTES {
                    t[i as usize] = Some((r.ebx as usize, r.eax as usize));
                }
            }
            t
        })
        .get(i as usize)?
}

/// Components of [`FPU_MASK`] that this host has.
pub fn host_components() -> u64 {
    (2..8).filter(|&i| component(i).is_some()).fold(3, |m, i| m | 1 << i) & FPU_MASK
}

/// Brings an XSAVE image to the form in which equal states have equal bytes: components whose XSTATE_BV bit is clear get their
/// initial values, and bytes that are not architectural state become zero.
pub fn canonical_fpu(fpu: &mut [u8; FPU_BYTES], x87_pointers: bool) {
    let bv = u64::from_le_bytes(fpu[512..520].try_into().expect("eight bytes"));
    if bv & 1 == 0 {
        fpu[..24].fill(0);
        fpu[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        fpu[32..160].fill(0);
    }
    if bv & 2 == 0 {
        fpu[160..416].fill(0);
    }
    if !x87_pointers {
        fpu[6..24].fill(0);
    }
    // MXCSR_MASK, the unused upper parts of the ST slots and the space for software.
    fpu[28..32].fill(0);
    for st in 0..8 {
        fpu[32 + 16 * st + 10..48 + 16 * st].fill(0);
    }
    let mut used = [false; FPU_BYTES];
    used[..416].fill(true);
    for i in 2..8 {
        if FPU_MASK & 1 << i == 0 {
            continue;
        }
        if let Some((at, len)) = component(i) {
            used[at..at + len].fill(true);
            if bv & 1 << i == 0 {
                fpu[at..at + len].fill(0);
            }
        }
    }
    for (b, u) in fpu.iter_mut().zip(used) {
        if !u {
            *b = 0;
        }
    }
}

/// Names of the general-purpose registers in encoding order.
pub const GPR_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// What is left out of a comparison.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// RFLAGS bits that may differ.
    pub flags: u64,
    /// Registers written by the faulting instruction and memory may differ (partial gathers and scatters).
    pub partial_vector: bool,
    /// The x87 top of stack and tags may differ (a faulting MMX instruction).
    pub mmx_transition: bool,
    /// Memory may differ (a faulting store that is done in pieces).
    pub partial_store: bool,
    /// The address and error code of a page fault may differ (masked stores).
    pub masked_store: bool,
    /// MXCSR's exception flags may differ.
    pub mxcsr_flags: bool,
    /// The x87 instruction and data pointers and the last opcode are compared too.
    pub x87_pointers: bool,
}

/// The first item in which two outcomes differ, in words; `None` when they agree.
pub fn first_difference(native: &Outcome, engine: &Outcome, tol: Tolerance) -> Option<String> {
    if native.end != engine.end {
        return Some(format!("end: native {:?}, engine {:?} (vector {})", native.end, engine.end, engine.vector));
    }
    let pairs = [
        ("vector", u64::from(native.vector), u64::from(engine.vector)),
        ("rip", native.regs.rip, engine.regs.rip),
        ("error code", native.error, engine.error),
        ("cr2", native.cr2, engine.cr2),
        ("fs base", native.regs.fs_base, engine.regs.fs_base),
        ("gs base", native.regs.gs_base, engine.regs.gs_base),
    ];
    // A partial gather may stop at another element, whose fault may be of another kind.
    let other_element = tol.partial_vector && native.regs.rip == engine.regs.rip && matches!(engine.vector, 12..=14);
    let other_byte = tol.masked_store && native.regs.rip == engine.regs.rip && native.vector == engine.vector;
    if let Some((name, a, b)) =
        pairs.iter().find(|(n, a, b)| a != b && !((other_element || other_byte) && is_fault_detail(n)))
    {
        return Some(format!("{name}: native {a:#x}, engine {b:#x}"));
    }
    for (name, (a, b)) in GPR_NAMES.iter().zip(native.regs.gpr.iter().zip(&engine.regs.gpr)) {
        if a != b {
            return Some(format!("{name}: native {a:#x}, engine {b:#x}"));
        }
    }
    let flags = (native.regs.rflags ^ engine.regs.rflags) & !tol.flags;
    if flags != 0 {
        let (a, b) = (native.regs.rflags, engine.regs.rflags);
        return Some(format!("rflags: native {a:#x}, engine {b:#x}, different {}", flag_names(flags)));
    }
    let (mut a, mut b) = (native.regs.fpu, engine.regs.fpu);
    canonical_fpu(&mut a, tol.x87_pointers);
    canonical_fpu(&mut b, tol.x87_pointers);
    if tol.mmx_transition {
        for f in [&mut a, &mut b] {
            physical_order(f);
            f[3] &= !0x38;
            f[4] = 0;
        }
    }
    if tol.mxcsr_flags {
        a[24] &= !0x3f;
        b[24] &= !0x3f;
    }
    if !tol.partial_vector
        && let Some(at) = (0..FPU_BYTES).find(|&i| a[i] != b[i])
    {
        return Some(describe_fpu(at, &a, &b));
    }
    if !(tol.partial_vector || tol.partial_store)
        && let Some(at) = (0..layout::IMAGE_BYTES).find(|&i| native.memory[i] != engine.memory[i])
    {
        let end = (at + 8).min(layout::IMAGE_BYTES);
        return Some(format!(
            "memory at {:#x}: native {}, engine {}",
            layout::image_address(at),
            hex(&native.memory[at..end]),
            hex(&engine.memory[at..end])
        ));
    }
    None
}

/// Reorders the ST slots of an image from stack order to physical order.
fn physical_order(fpu: &mut [u8; FPU_BYTES]) {
    let top = usize::from(fpu[3] >> 3 & 7);
    fpu[32..160].rotate_right(16 * top);
}

/// Whether an item tells which access faulted.
fn is_fault_detail(name: &str) -> bool {
    matches!(name, "vector" | "error code" | "cr2")
}

/// Bytes as hexadecimal digits in memory order.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn flag_names(bits: u64) -> String {
    let names = [(0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF")];
    let mut out: Vec<&str> = names.iter().filter(|(b, _)| bits & 1 << b != 0).map(|(_, n)| *n).collect();
    for (b, n) in [(14, "NT"), (16, "RF"), (18, "AC"), (21, "ID")] {
        if bits & 1 << b != 0 {
            out.push(n);
        }
    }
    out.join(" ")
}

fn describe_fpu(at: usize, a: &[u8], b: &[u8]) -> String {
    let (name, start, len) = match at {
        0..2 => ("x87 control word".into(), 0, 2),
        2..4 => ("x87 status word".into(), 2, 2),
        4..6 => ("x87 tag byte".into(), 4, 2),
        6..8 => ("x87 last opcode".into(), 6, 2),
        8..24 => ("x87 instruction and data pointers".into(), 8, 16),
        24..28 => ("mxcsr".into(), 24, 4),
        32..160 => (format!("st{}", (at - 32) / 16), 32 + (at - 32) / 16 * 16, 10),
        160..416 => (format!("xmm{}", (at - 160) / 16), 160 + (at - 160) / 16 * 16, 16),
        _ => {
            let parts = [
                (2, "ymm", 16, " upper half", 0),
                (5, "k", 8, "", 0),
                (6, "zmm", 32, " bits 256-511", 0),
                (7, "zmm", 64, "", 16),
            ];
            let found = parts.iter().find_map(|&(i, n, unit, what, first)| {
                let (s, l) = component(i)?;
                (s..s + l).contains(&at).then(|| {
                    let r = (at - s) / unit;
                    (format!("{n}{}{what}", r + first), s + r * unit, unit)
                })
            });
            found.unwrap_or((format!("xsave byte {at}"), at, 1))
        }
    };
    format!("{name}: native {}, engine {}", hex(&a[start..start + len]), hex(&b[start..start + len]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_difference_is_named() {
        let a = Outcome::new();
        type Change = fn(&mut Outcome);
        let cases: [(&str, Change); 8] = [
            ("r9", |o| o.regs.gpr[9] = 1),
            ("CF", |o| o.regs.rflags |= 1),
            ("cr2", |o| o.cr2 = 5),
            ("mxcsr", |o| o.regs.fpu[24] ^= 1),
            ("st3", |o| o.regs.fpu[32 + 48] ^= 1),
            ("xmm15", |o| o.regs.fpu[160 + 240] ^= 1),
            ("memory at 0x30000004", |o| o.memory[3 * 4096 + 4] ^= 1),
            ("vector", |o| o.vector = 6),
        ];
        assert_eq!(first_difference(&a, &a, Tolerance::default()), None);
        for (name, change) in cases {
            let mut b = a.clone();
            change(&mut b);
            let d = first_difference(&a, &b, Tolerance::default()).expect(name);
            assert!(d.contains(name), "{d} names {name}");
        }
    }

    #[test]
    fn components_in_their_initial_state_compare_equal_whatever_their_bytes() {
        let a = Outcome::new();
        let mut b = a.clone();
        if let Some((at, _)) = component(2) {
            b.regs.fpu[at] = 7;
            assert_eq!(first_difference(&a, &b, Tolerance::default()), None);
            b.regs.fpu[512] |= 4;
            assert!(first_difference(&a, &b, Tolerance::default()).is_some_and(|d| d.contains("ymm0")));
        }
    }
}
