//! Where things lie, in the native process and in the guest alike.
//!
//! Both sides see the same linear addresses: a window of code slots, a data region and a stack, within 2 GiB of
//! [`base`]. Guard pages around them are unmapped on both sides, so that a stray access faults on both with the same address
//! and error code.

use std::sync::OnceLock;

static BASE: OnceLock<u64> = OnceLock::new();

/// Moves everything up to where position-independent programs are. To be called before anything else, or not at all.
pub fn move_high() {
    BASE.get_or_init(|| 0x6000_0000_0000);
}

/// What all addresses start from: 0, or a high place (a multiple of 512 GiB).
pub fn base() -> u64 {
    *BASE.get_or_init(|| 0)
}

/// Page size in bytes.
pub const PAGE: u64 = 4096;

/// Code slots. A sequence runs in one; slots are reused in turn, so code changes under the engine's cache.
pub const SLOTS: u64 = 512;
/// Mapped bytes of a slot (two pages, readable and executable).
pub const SLOT_BYTES: u64 = 2 * PAGE;
/// Distance between slots in bytes; what lies between them is not mapped.
pub const SLOT_STRIDE: u64 = 4 * PAGE;

/// First byte of the data region.
pub fn data() -> u64 {
    base() + 0x2000_0000
}
/// First byte of the read-only data page.
pub fn data_ro() -> u64 {
    data() + 2 * PAGE
}
/// First byte of the lone writable page between two unmapped ones.
pub fn data_island() -> u64 {
    data() + 4 * PAGE
}
/// First byte of the stack.
pub fn stack() -> u64 {
    base() + 0x3000_0000
}
/// Bytes of the stack.
pub const STACK_BYTES: u64 = 2 * PAGE;

/// Writable ranges: linear address and offset in a memory image. Each is whole pages.
pub fn writable() -> [(u64, u64, u64); 3] {
    [(data(), 0, 2 * PAGE), (data_island(), 2 * PAGE, PAGE), (stack(), 3 * PAGE, STACK_BYTES)]
}
/// Bytes of a memory image: all writable ranges one after another.
pub const IMAGE_BYTES: usize = 5 * PAGE as usize;
/// Different initial memory images.
pub const IMAGES: usize = 8;

/// Linear address of a code slot.
pub fn slot_address(slot: u64) -> u64 {
    base() + 0x1000_0000 + (slot % SLOTS) * SLOT_STRIDE
}

/// The linear address that offset `at` of a memory image stands for.
pub fn image_address(at: usize) -> u64 {
    let at = at as u64;
    writable().iter().find(|(_, off, len)| (*off..off + len).contains(&at)).map_or(0, |(la, off, _)| la + at - off)
}

/// The content of the read-only page: a fixed pattern of pointers, small numbers and floats.
pub fn read_only_page() -> Vec<u8> {
    let mut rng = crate::rng::Rng::for_sequence(0x5eed_0000, 1);
    fill(&mut rng, PAGE as usize)
}

/// Initial memory image number `n`.
pub fn image(n: usize) -> Vec<u8> {
    let mut rng = crate::rng::Rng::for_sequence(0x5eed_1000, n as u64);
    fill(&mut rng, IMAGE_BYTES)
}

fn fill(rng: &mut crate::rng::Rng, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let v = match rng.below(6) {
            0 => data() + rng.below(2 * PAGE),
            1 => u64::from((rng.below(2000) as f32 / 7.0 - 100.0).to_bits()) * 0x1_0000_0001,
            2 => (rng.below(1 << 30) as f64 / 3.0 - 1e8).to_bits(),
            _ => rng.interesting(),
        };
        out.extend_from_slice(&v.to_le_bytes());
    }
    out
}
