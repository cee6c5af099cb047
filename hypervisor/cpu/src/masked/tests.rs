use iced_x86::{Decoder, DecoderOptions};

use super::{MaskedAccess, active_bytes};
use crate::flat_env::{FlatEnv, Random};
use crate::simd::{set_opmask, set_zmm};

/// The answer for `bytes` with opmask 1 set to `k` and vector register 3 to the sign bits `signs` (bytes).
fn answer(bytes: &[u8], k: u64, signs: u64) -> Option<MaskedAccess> {
    let (mut st, _) = FlatEnv::long_mode();
    let mut v = [0; 64];
    for (n, b) in v.iter_mut().enumerate() {
        *b = if signs >> n & 1 != 0 { 0x80 } else { 0x7f };
    }
    set_zmm(&mut st, 3, &v);
    set_opmask(&mut st, 1, k);
    let i = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
    assert_ne!(i.mnemonic(), iced_x86::Mnemonic::INVALID, "{bytes:02x?}");
    active_bytes(&st, &i)
}

#[test]
fn vector_masks() {
    // vmaskmovps ymm2, ymm3, [rsi] and its store
    let load = answer(&[0xc4, 0xe2, 0x65, 0x2c, 0x16], 0, 1 << 3 | 1 << 31 | 1 << 8).unwrap();
    assert_eq!((load.size, load.bytes, load.write), (32, 0xf000_000f, false));
    let store = answer(&[0xc4, 0xe2, 0x65, 0x2e, 0x16], 0, 1 << 7).unwrap();
    assert_eq!((store.size, store.bytes, store.write), (32, 0xf0, true));
    // vpmaskmovq xmm2, xmm3, [rsi]
    assert_eq!(answer(&[0xc4, 0xe2, 0xe1, 0x8c, 0x16], 0, 1 << 15).unwrap().bytes, 0xff00);
    // maskmovdqu xmm2, xmm3
    let m = answer(&[0x66, 0x0f, 0xf7, 0xd3], 0, 0x8421).unwrap();
    assert_eq!((m.size, m.bytes, m.write), (16, 0x8421, true));
    // A plain load has no mask.
    assert_eq!(answer(&[0xc5, 0xfe, 0x6f, 0x16], 0, 0), None);
}

#[test]
fn opmasks() {
    if crate::host_fpu::offered_xcr0() & 0xe0 != 0xe0 {
        return; // without the registers the guest is never offered the instructions
    }
    let bytes = |code: &[u8], k: u64| answer(code, k, 0).map(|m| (m.size, m.bytes, m.write));
    // vmovdqu32 zmm2 {k1}, [rsi]; vmovdqu8 [rsi] {k1}, zmm2
    assert_eq!(bytes(&[0x62, 0xf1, 0x7e, 0x49, 0x6f, 0x16], 0x8003), Some((64, 0xf000_0000_0000_00ff, false)));
    assert_eq!(bytes(&[0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x16], 0xdead_beef), Some((64, 0xdead_beef, true)));
    // vaddps zmm2 {k1}, zmm4, [rsi] and {1to16}
    assert_eq!(bytes(&[0x62, 0xf1, 0x5c, 0x49, 0x58, 0x16], 2), Some((64, 0xf0, false)));
    assert_eq!(bytes(&[0x62, 0xf1, 0x5c, 0x59, 0x58, 0x16], 1 << 15), Some((4, 0xf, false)));
    assert_eq!(bytes(&[0x62, 0xf1, 0x5c, 0x59, 0x58, 0x16], 1 << 16), Some((4, 0, false)));
    // vaddss xmm2 {k1}, xmm4, [rsi]
    assert_eq!(bytes(&[0x62, 0xf1, 0x5e, 0x09, 0x58, 0x16], 0xfe), Some((4, 0, false)));
    // vcvtps2pd zmm2 {k1}, [rsi] and {1to8}: eight elements
    assert_eq!(bytes(&[0x62, 0xf1, 0x7c, 0x49, 0x5a, 0x16], 0x181), Some((32, 0xf000_000f, false)));
    assert_eq!(bytes(&[0x62, 0xf1, 0x7c, 0x59, 0x5a, 0x16], 0x100), Some((4, 0, false)));
    // vpmuldq zmm2 {k1}, zmm4, [rsi]: quadword elements
    assert_eq!(bytes(&[0x62, 0xf2, 0xdd, 0x49, 0x28, 0x16], 0x102), Some((64, 0xff00, false)));
    // vcompressps [rsi] {k1}, zmm2; vexpandpd zmm2 {k1}, [rsi]
    assert_eq!(bytes(&[0x62, 0xf2, 0x7d, 0x49, 0x8a, 0x16], 0x8101), Some((64, 0xfff, true)));
    assert_eq!(bytes(&[0x62, 0xf2, 0xfd, 0x49, 0x88, 0x16], 0xf80), Some((64, 0xff, false)));
    // vbroadcastf32x4 zmm2 {k1}, [rsi]: element 1 of the group is wanted by lane 5
    assert_eq!(bytes(&[0x62, 0xf2, 0x7d, 0x49, 0x1a, 0x16], 0x20), Some((16, 0xf0, false)));
    // vbroadcastss zmm2 {k1}, [rsi]
    assert_eq!(bytes(&[0x62, 0xf2, 0x7d, 0x49, 0x18, 0x16], 0x1_0000), Some((4, 0, false)));
    // vpmovqb [rsi] {k1}, zmm2: eight bytes
    assert_eq!(bytes(&[0x62, 0xf2, 0x7e, 0x49, 0x32, 0x16], 0x1a5), Some((8, 0xa5, true)));
    // vpshufb and vpsrld by a memory count have no fault suppression; vpsrld by an immediate has.
    assert_eq!(bytes(&[0x62, 0xf2, 0x5d, 0x49, 0x00, 0x16], 0), None);
    assert_eq!(bytes(&[0x62, 0xf1, 0x5d, 0x49, 0xd2, 0x16], 0), None);
    assert_eq!(bytes(&[0x62, 0xf1, 0x6d, 0x49, 0x72, 0x16, 3], 1), Some((64, 0xf, false)));
    // No mask register: nothing to say.
    assert_eq!(bytes(&[0x62, 0xf1, 0x7e, 0x48, 0x6f, 0x16], 0), None);
}

#[test]
fn never_panics_and_never_exceeds_the_operand() {
    let mut random = Random(21);
    let (mut st, _) = FlatEnv::long_mode();
    set_opmask(&mut st, 1, !0);
    for _ in 0..200_000 {
        let mut code = [0; 15];
        random.fill(&mut code);
        code[0] = 0x62;
        code[1] = 0xf0 | code[1] & 7;
        code[2] |= 4;
        code[3] = code[3] & 0xf8 | 1;
        let i = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE).decode();
        if let Some(m) = active_bytes(&st, &i) {
            assert!(m.size <= 64 && (m.size == 64 || m.bytes >> m.size == 0), "{i} {m:?}");
        }
    }
}
