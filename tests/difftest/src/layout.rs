//! Where things lie, in the native process and in the guest alike.
//!
//! Both sides see the same linear addresses below 2 GiB: a window of code slots, a data region and a stack. Guard pages
//! around them are unmapped on both sides, so that a stray access faults on both with the same address and error code.

/// Page size in bytes.
pub const PAGE: u64 = 4096;

/// First byte of the code window.
pub const CODE: u64 = 0x1000_0000;
/// Code slots. A sequence runs in one; slots are reused in turn, so code changes under the engine's cache.
pub const SLOTS: u64 = 512;
/// Mapped bytes of a slot (two pages, readable and executable).
pub const SLOT_BYTES: u64 = 2 * PAGE;
/// Distance between slots in bytes; what lies between them is not mapped.
pub const SLOT_STRIDE: u64 = 4 * PAGE;

/// First byte of the data region.
pub const DATA: u64 = 0x2000_0000;
/// First byte of the read-only data page.
pub const DATA_RO: u64 = DATA + 2 * PAGE;
/// First byte of the lone writable page between two unmapped ones.
pub const DATA_ISLAND: u64 = DATA + 4 * PAGE;
/// First byte of the stack.
pub const STACK: u64 = 0x3000_0000;
/// Bytes of the stack.
pub const STACK_BYTES: u64 = 2 * PAGE;

/// Writable ranges: linear address and offset in a memory image. Each is whole pages.
pub const WRITABLE: [(u64, u64, u64); 3] =
    [(DATA, 0, 2 * PAGE), (DATA_ISLAND, 2 * PAGE, PAGE), (STACK, 3 * PAGE, STACK_BYTES)];
/// Bytes of a memory image: all writable ranges one after another.
pub const IMAGE_BYTES: usize = 5 * PAGE as usize;
/// Different initial memory images.
pub const IMAGES: usize = 8;

/// Linear address of a code slot.
pub fn slot_address(slot: u64) -> u64 {
    CODE + (slot % SLOTS) * SLOT_STRIDE
}

/// The linear address that offset `at` of a memory image stands for.
pub fn image_address(at: usize) -> u64 {
    let at = at as u64;
    WRITABLE.iter().find(|(_, off, len)| (*off..off + len).contains(&at)).map_or(0, |(la, off, _)| la + at - off)
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
            0 => DATA + rng.below(2 * PAGE),
            1 => u64::from((rng.below(2000) as f32 / 7.0 - 100.0).to_bits()) * 0x1_0000_0001,
            2 => (rng.below(1 << 30) as f64 / 3.0 - 1e8).to_bits(),
            _ => rng.interesting(),
        };
        out.extend_from_slice(&v.to_le_bytes());
    }
    out
}
