//! The vector, mask and x87 registers inside a vCPU's XSAVE image.
//!
//! A component whose bit in XSTATE_BV is clear is in its initial configuration whatever its bytes say, so reading looks at the
//! bit first and writing makes the component whole before it sets the bit (SDM vol. 1, section 13.6).

use crate::CpuState;
use crate::host_fpu::{self, LEGACY_AND_HEADER};

/// Offset of XSTATE_BV.
pub(crate) const XSTATE_BV: usize = 512;
/// Offset of MXCSR.
pub(crate) const MXCSR: usize = 24;
/// MXCSR after reset.
pub(crate) const MXCSR_INIT: u32 = 0x1f80;

/// Which components are in use, as the image says.
pub(crate) fn in_use(st: &CpuState) -> u64 {
    get64(&st.xsave.0, XSTATE_BV)
}

/// Marks component `i` in use or in its initial configuration.
pub(crate) fn set_in_use(st: &mut CpuState, i: u32, used: bool) {
    let bv = in_use(st) & !(1 << i) | u64::from(used) << i;
    st.xsave.0[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&bv.to_le_bytes());
}

/// Byte ranges of component `i` in the image. Component 0 leaves out MXCSR; absent components have none.
pub(crate) fn ranges(i: u32) -> [std::ops::Range<usize>; 2] {
    match i {
        0 => [0..24, 32..160],
        1 => [160..416, 0..0],
        _ => {
            let c = host_fpu::component(i);
            [c.offset..c.offset + c.size, 0..0]
        }
    }
}

/// Puts component `i` into its initial configuration.
pub(crate) fn initialise(st: &mut CpuState, i: u32) {
    for r in ranges(i) {
        st.xsave.0[r].fill(0);
    }
    if i == 0 {
        st.xsave.0[..2].copy_from_slice(&0x037f_u16.to_le_bytes());
    }
    set_in_use(st, i, false);
}

/// Makes the bytes of component `i` true and marks it in use, so that they may be changed in place.
pub(crate) fn materialise(st: &mut CpuState, i: u32) {
    if in_use(st) & (1 << i) == 0 {
        initialise(st, i);
        set_in_use(st, i, true);
    }
}

/// MXCSR.
pub(crate) fn mxcsr(st: &CpuState) -> u32 {
    get64(&st.xsave.0, MXCSR) as u32
}

/// Sets MXCSR. It must have no reserved bit set.
pub(crate) fn set_mxcsr(st: &mut CpuState, value: u32) {
    st.xsave.0[MXCSR..MXCSR + 4].copy_from_slice(&value.to_le_bytes());
}

/// Whether the host has component `i`.
pub(crate) fn has(i: u32) -> bool {
    i < 2 || host_fpu::component(i).size != 0
}

/// Where a piece of a vector register lives: component, offset in the image, and the bytes of the register it holds.
pub(crate) fn pieces(n: usize) -> [(u32, usize, std::ops::Range<usize>); 3] {
    let at = |i: u32, stride: usize, k: usize| host_fpu::component(i).offset + stride * k;
    if n < 16 {
        [(1, 160 + 16 * n, 0..16), (2, at(2, 16, n), 16..32), (6, at(6, 32, n), 32..64)]
    } else {
        [(7, at(7, 64, n & 15), 0..64), (7, 0, 0..0), (7, 0, 0..0)]
    }
}

/// Vector register `n` (0..=31), all 64 bytes; what the host does not have reads as zero.
pub(crate) fn zmm(st: &CpuState, n: usize) -> [u8; 64] {
    let mut v = [0; 64];
    for (i, at, part) in pieces(n) {
        if in_use(st) & (1 << i) != 0 && (i == 1 || at >= LEGACY_AND_HEADER) {
            let len = part.len();
            v[part].copy_from_slice(&st.xsave.0[at..at + len]);
        }
    }
    v
}

/// Sets all 64 bytes of vector register `n`; what the host does not have is dropped.
pub(crate) fn set_zmm(st: &mut CpuState, n: usize, v: &[u8; 64]) {
    for (i, at, part) in pieces(n) {
        let used = in_use(st) & (1 << i) != 0;
        if (i != 1 && at < LEGACY_AND_HEADER) || (!used && v[part.clone()].iter().all(|&b| b == 0)) {
            continue;
        }
        materialise(st, i);
        st.xsave.0[at..at + part.len()].copy_from_slice(&v[part]);
    }
}

/// Opmask register `k` (0..=7).
pub(crate) fn opmask(st: &CpuState, k: usize) -> u64 {
    let c = host_fpu::component(5);
    if c.size == 0 || in_use(st) & (1 << 5) == 0 {
        return 0;
    }
    get64(&st.xsave.0, c.offset + 8 * (k & 7))
}

/// Sets opmask register `k`.
pub(crate) fn set_opmask(st: &mut CpuState, k: usize, value: u64) {
    let c = host_fpu::component(5);
    if c.size == 0 || (value == 0 && in_use(st) & (1 << 5) == 0) {
        return;
    }
    materialise(st, 5);
    let at = c.offset + 8 * (k & 7);
    st.xsave.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Eight bytes at `at`, little-endian; zero past the end.
pub(crate) fn get64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).map_or(0, |s| s.iter().rev().fold(0, |v, &x| v << 8 | u64::from(x)))
}
