//! Extended state by register.
//!
//! An XSAVE image puts the same registers at other offsets on other CPUs (CPUID leaf 0xD), so a snapshot names registers. A
//! component that is not in use is in its initial configuration whatever the image's bytes say, and is written down that way: two
//! snapshots of the same state are equal.

use crate::host_fpu;
use crate::simd::{self, MXCSR_INIT};
use crate::state::{XSAVE_BYTES, XsaveArea};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// `N` bytes, lowest first, written as a string of hexadecimal digits without trailing zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hex<const N: usize>(pub [u8; N]);

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.0.iter().rposition(|&b| b != 0).map_or(0, |n| n + 1);
        self.0[..used].iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl<const N: usize> fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor<const N: usize>;
        impl<const N: usize> de::Visitor<'_> for Visitor<N> {
            type Value = Hex<N>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "up to {} hexadecimal digits, an even number", 2 * N)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Hex<N>, E> {
                let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
                let mut out = [0; N];
                if !text.len().is_multiple_of(2) || text.len() > 2 * N {
                    return Err(wrong());
                }
                for (to, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
                    *to = digit(pair[0]).zip(digit(pair[1])).map(|(h, l)| h << 4 | l).ok_or_else(wrong)?;
                }
                Ok(Hex(out))
            }
        }
        d.deserialize_str(Visitor)
    }
}

/// x87, SSE, AVX and AVX-512 registers. What the CPU does not have is zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FpuState {
    /// Components not in their initial configuration (XINUSE, SDM vol. 1, section 13.6): x87 0, SSE 1, AVX 2, opmask 5, upper
    /// halves of ZMM0-15 6, ZMM16-31 7.
    pub in_use: u64,
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// x87 tag word, abridged: a bit per register that is not empty.
    pub ftw: u8,
    /// Opcode of the last x87 instruction, 11 bits.
    pub fop: u16,
    /// Its address.
    pub fip: u64,
    /// Its operand's address.
    pub fdp: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// ST(0) to ST(7).
    pub st: [Hex<10>; 8],
    /// ZMM0 to ZMM31; XMM and YMM are their lower parts.
    pub zmm: [Hex<64>; 32],
    /// Opmask registers.
    pub opmask: [u64; 8],
}

fn word<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    let mut w = [0; N];
    w.copy_from_slice(&image[at..at + N]);
    w
}

impl FpuState {
    /// The state after reset and FNINIT.
    pub fn initial() -> Self {
        Self {
            in_use: 0,
            fcw: 0x037f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: MXCSR_INIT,
            st: [Hex([0; 10]); 8],
            zmm: [Hex([0; 64]); 32],
            opmask: [0; 8],
        }
    }

    /// Reads an image in standard format, laid out as on this host.
    pub fn from_xsave(area: &XsaveArea) -> Self {
        let image = &area.0;
        let in_use = u64::from_le_bytes(word(image, simd::XSTATE_BV)) & host_fpu::offered_xcr0();
        let mut s = Self { in_use, mxcsr: u32::from_le_bytes(word(image, simd::MXCSR)), ..Self::initial() };
        if in_use & 1 != 0 {
            s.fcw = u16::from_le_bytes(word(image, 0));
            s.fsw = u16::from_le_bytes(word(image, 2));
            s.ftw = image[4];
            s.fop = u16::from_le_bytes(word(image, 6)) & 0x7ff;
            s.fip = u64::from_le_bytes(word(image, 8));
            s.fdp = u64::from_le_bytes(word(image, 16));
            for (n, r) in s.st.iter_mut().enumerate() {
                *r = Hex(word(image, 32 + 16 * n));
            }
        }
        for (n, r) in s.zmm.iter_mut().enumerate() {
            for (component, at, part) in simd::pieces(n) {
                if in_use & 1 << component != 0 && simd::has(component) {
                    let len = part.len();
                    r.0[part].copy_from_slice(&image[at..at + len]);
                }
            }
        }
        if in_use & 1 << 5 != 0 {
            let at = host_fpu::component(5).offset;
            s.opmask = std::array::from_fn(|k| u64::from_le_bytes(word(image, at + 8 * k)));
        }
        s
    }

    /// The image in standard format, laid out as on this host. What the host does not have is left out.
    pub fn to_xsave(&self) -> XsaveArea {
        let mut area = XsaveArea([0; XSAVE_BYTES]);
        let image = &mut area.0;
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.fcw.to_le_bytes());
        put(2, &self.fsw.to_le_bytes());
        put(4, &[self.ftw]);
        put(6, &self.fop.to_le_bytes());
        put(8, &self.fip.to_le_bytes());
        put(16, &self.fdp.to_le_bytes());
        put(simd::MXCSR, &self.mxcsr.to_le_bytes());
        for (n, r) in self.st.iter().enumerate() {
            put(32 + 16 * n, &r.0);
        }
        for (n, r) in self.zmm.iter().enumerate() {
            for (_, at, part) in simd::pieces(n).into_iter().filter(|&(c, ..)| simd::has(c)) {
                put(at, &r.0[part]);
            }
        }
        if simd::has(5) {
            let at = host_fpu::component(5).offset;
            for (k, v) in self.opmask.iter().enumerate() {
                put(at + 8 * k, &v.to_le_bytes());
            }
        }
        put(simd::XSTATE_BV, &(self.in_use & host_fpu::offered_xcr0()).to_le_bytes());
        area
    }

    /// The same with every component that is not in use in its initial configuration.
    pub fn canonical(&self) -> Self {
        let mut s = self.clone();
        let unused = |c: u32| self.in_use & 1 << c == 0;
        if unused(0) {
            let mxcsr = s.mxcsr;
            s = Self { in_use: s.in_use, mxcsr, zmm: s.zmm, opmask: s.opmask, ..Self::initial() };
        }
        for (n, r) in s.zmm.iter_mut().enumerate() {
            for (_, _, part) in simd::pieces(n).into_iter().filter(|&(c, ..)| unused(c)) {
                r.0[part].fill(0);
            }
        }
        if unused(5) {
            s.opmask = [0; 8];
        }
        s
    }
}
