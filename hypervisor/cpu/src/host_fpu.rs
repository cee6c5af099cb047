//! What the host says about extended processor state: its XCR0, and where each component lives in an XSAVE image.
//!
//! The guest's x87, SSE, AVX and AVX-512 registers are the host's own registers while translated code runs, and an
//! XSAVE image in standard format whenever Rust looks at them. Only the host's CPUID leaf 0xD knows that image's
//! layout, so it is read once and kept. This is also the crate's only door to CPUID and XGETBV.
#![allow(unsafe_code)] // CPUID and XGETBV have no safe form on every compiler this crate supports.

use std::sync::OnceLock;

/// State components that a guest may ever see (SDM vol. 1, section 13.1): x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM.
pub const OFFERED: u64 = 0xe7;
/// Component numbers of the above that lie in the extended region.
pub const EXTENDED: [u32; 4] = [2, 5, 6, 7];
/// Bytes of the legacy region and the XSAVE header together.
pub const LEGACY_AND_HEADER: usize = 576;

/// Where a state component lies in a standard-format image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Component {
    /// Offset in bytes from the start of the image.
    pub offset: usize,
    /// Size in bytes; 0 means the host does not have it.
    pub size: usize,
    /// In the compacted format it starts at a multiple of 64 (CPUID leaf 0xD, subleaf i, ECX bit 1).
    pub align64: bool,
}

struct Layout {
    xcr0: u64,
    components: [Component; 8],
}

/// CPUID on the host: EAX, EBX, ECX, EDX of a leaf and subleaf.
pub fn host_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 CPU has CPUID. (Newer compilers make the intrinsic safe, hence the second allowance.)
    #[allow(unused_unsafe)]
    let r = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

fn read_xcr0() -> u64 {
    if host_cpuid(1, 0)[2] & (1 << 27) == 0 {
        return 3; // no OSXSAVE: FXSAVE state only
    }
    let (lo, hi): (u32, u32);
    // SAFETY: OSXSAVE is set, so XGETBV of XCR0 is defined at every privilege level; it reads ECX, writes EDX:EAX.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0_u32, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags));
    }
    u64::from(hi) << 32 | u64::from(lo)
}

fn layout() -> &'static Layout {
    static LAYOUT: OnceLock<Layout> = OnceLock::new();
    LAYOUT.get_or_init(|| {
        let xcr0 = read_xcr0();
        let mut components = [Component::default(); 8];
        components[0] = Component { offset: 0, size: 160, align64: false };
        components[1] = Component { offset: 160, size: 256, align64: false };
        for i in EXTENDED.into_iter().filter(|i| xcr0 & (1 << i) != 0) {
            let [size, offset, flags, _] = host_cpuid(0xd, i);
            let c = Component { offset: offset as usize, size: size as usize, align64: flags & 2 != 0 };
            // A component that would not fit the image kept per vCPU is not offered at all.
            if c.offset >= LEGACY_AND_HEADER && c.offset + c.size <= crate::state::XSAVE_BYTES {
                components[i as usize] = c;
            }
        }
        Layout { xcr0, components }
    })
}

/// The host's XCR0.
pub fn host_xcr0() -> u64 {
    layout().xcr0
}

/// The XCR0 bits a guest may set: what the host has enabled, out of [`OFFERED`].
pub fn offered_xcr0() -> u64 {
    let mut mask = layout().xcr0 & 3;
    for i in EXTENDED {
        if layout().components[i as usize].size != 0 {
            mask |= 1 << i;
        }
    }
    // AVX-512's three components come together, and on top of AVX (SDM vol. 1, section 13.3).
    if mask & 0xe4 != 0xe4 {
        mask &= !0xe0;
    }
    mask & OFFERED
}

/// Place of component `i` in the standard format; size 0 if there is none.
pub fn component(i: u32) -> Component {
    layout().components.get(i as usize).copied().unwrap_or_default()
}

/// Size in bytes of a standard-format image that holds the components in `mask`.
pub fn standard_size(mask: u64) -> usize {
    EXTENDED.into_iter().filter(|i| mask & (1 << i) != 0).fold(LEGACY_AND_HEADER, |end, i| {
        let c = component(i);
        end.max(c.offset + c.size)
    })
}

/// Offset of component `i` in a compacted image whose XCOMP_BV is `mask` (SDM vol. 1, section 13.4.3).
pub fn compacted_offset(mask: u64, i: u32) -> usize {
    let mut at = LEGACY_AND_HEADER;
    for j in EXTENDED {
        let c = component(j);
        if mask & (1 << j) != 0 || j == i {
            if c.align64 {
                at = at.next_multiple_of(64);
            }
            if j == i {
                return at;
            }
            at += c.size;
        }
    }
    at
}

/// Size in bytes of a compacted image whose XCOMP_BV is `mask`.
pub fn compacted_size(mask: u64) -> usize {
    EXTENDED
        .into_iter()
        .filter(|i| mask & (1 << i) != 0)
        .fold(LEGACY_AND_HEADER, |_, i| compacted_offset(mask, i) + component(i).size)
}

/// Bits of MXCSR that may be set (MXCSR_MASK, SDM vol. 1, section 11.6.6).
pub fn mxcsr_mask() -> u32 {
    // Every x86-64 CPU with SSE2 has DAZ; MM (bit 17, AMD) is masked out of the guest's CPUID.
    0xffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_agrees_with_the_host() {
        let x = offered_xcr0();
        assert_eq!(x & !host_xcr0(), 0);
        if host_xcr0() & !OFFERED == 0 {
            assert_eq!(standard_size(x), host_cpuid(0xd, 0)[1] as usize);
        }
        assert_eq!(compacted_offset(x, 2), 576);
        assert!(compacted_size(x) <= standard_size(x) + 64);
    }
}
