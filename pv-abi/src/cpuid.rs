//! Discovery by CPUID.
//!
//! Hypervisors answer leaves from 0x4000_0000 on (SDM vol. 2A, CPUID: "invalid" for hardware; CPUID.1:ECX bit 31 says that a
//! hypervisor is present). Several interfaces may be offered side by side, each at a multiple of 0x100. A guest looks for
//! [`SIGNATURE`] at [`FIRST`], `FIRST + STEP` and so on below [`END`], and adds the offsets here to the leaf where it found it.

/// First leaf of the range that x86 hypervisors answer.
pub const FIRST: u32 = 0x4000_0000;
/// Distance between two interfaces.
pub const STEP: u32 = 0x100;
/// First leaf behind the range to be searched.
pub const END: u32 = 0x4001_0000;

/// EBX, ECX and EDX of the base leaf, as bytes. EAX is the highest leaf of the interface.
pub const SIGNATURE: [u8; 12] = *b"ParavaneVMM ";

/// Offset of the leaf with version and features: EAX = [`crate::Version`], EBX = [`crate::feature::Features`] bits 0-31 on offer, ECX =
/// bits 32-63, EDX = index of the vCPU that asks.
pub const FEATURES: u32 = 1;
/// Offset of the leaf with the entry sequence: EAX = its length in bytes (1 to 12), EBX, ECX, EDX = its bytes, the first in EBX bits 0-7.
/// It is a function without a stack frame: a guest copies it to executable memory and calls it with a near call.
pub const ENTRY: u32 = 2;
/// Offset of the leaf with limits: EAX = [`crate::memory::Update`] or [`crate::memory::FreeRange`] elements in one call, EBX = number of vCPUs,
/// ECX = bytes in one console write or panic report, EDX = number of virtio devices on the ABI transport.
pub const LIMITS: u32 = 3;
/// Offset of the leaf with frequencies: EAX = TSC in kHz, EBX = local APIC timer at divide-by-1 in kHz.
pub const TIMING: u32 = 0x10;

/// Most bytes that an entry sequence has.
pub const ENTRY_BYTES: usize = 12;

/// EBX, ECX and EDX of the base leaf.
pub const fn signature_words() -> [u32; 3] {
    let s = SIGNATURE;
    [
        u32::from_le_bytes([s[0], s[1], s[2], s[3]]),
        u32::from_le_bytes([s[4], s[5], s[6], s[7]]),
        u32::from_le_bytes([s[8], s[9], s[10], s[11]]),
    ]
}

/// Looks for the interface's base leaf; `cpuid` answers a leaf with EAX, EBX, ECX, EDX. `None` where there is no hypervisor or none that
/// speaks the ABI.
pub fn find(cpuid: impl Fn(u32) -> [u32; 4]) -> Option<u32> {
    if cpuid(0)[0] < 1 || cpuid(1)[2] >> 31 == 0 {
        return None;
    }
    let [b, c, d] = signature_words();
    (FIRST..END).step_by(STEP as usize).find(|&leaf| {
        let got = cpuid(leaf);
        got[1..] == [b, c, d] && got[0] >= leaf + LIMITS && got[0] < leaf + STEP
    })
}

/// Puts an entry sequence into the registers of its leaf.
///
/// # Panics
/// When it is empty or longer than [`ENTRY_BYTES`].
pub const fn entry_leaf(code: &[u8]) -> [u32; 4] {
    assert!(!code.is_empty() && code.len() <= ENTRY_BYTES);
    let mut regs = [code.len() as u32, 0, 0, 0];
    let mut n = 0;
    while n < code.len() {
        regs[1 + n / 4] |= (code[n] as u32) << (n % 4 * 8);
        n += 1;
    }
    regs
}

/// The entry sequence in the registers of its leaf, and its length; `None` when the leaf makes no sense.
pub fn entry_code(regs: [u32; 4]) -> Option<([u8; ENTRY_BYTES], usize)> {
    let len = regs[0] as usize;
    if !(1..=ENTRY_BYTES).contains(&len) {
        return None;
    }
    let mut code = [0; ENTRY_BYTES];
    for (bytes, word) in code.chunks_exact_mut(4).zip(&regs[1..]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Some((code, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(base: u32, highest: u32) -> impl Fn(u32) -> [u32; 4] {
        move |leaf| {
            let [b, c, d] = signature_words();
            match leaf {
                0 => [0xd, 0, 0, 0],
                1 => [0, 0, 1 << 31, 0],
                l if l == base => [highest, b, c, d],
                FIRST => [FIRST + 1, 0x4b4d_564b, 0x564b_4d56, 0x4d],
                _ => [0; 4],
            }
        }
    }

    #[test]
    fn the_interface_is_found_beside_others() {
        assert_eq!(find(host(FIRST, FIRST + TIMING)), Some(FIRST));
        assert_eq!(find(host(FIRST + 0x300, FIRST + 0x310)), Some(FIRST + 0x300));
        assert_eq!(find(host(END, END + TIMING)), None, "it is out of range");
        assert_eq!(find(host(FIRST + 0x80, FIRST + 0x90)), None, "it is at no multiple of 0x100");
        assert_eq!(find(host(FIRST, FIRST + 1)), None, "leaves are missing");
        assert_eq!(find(|_| [0; 4]), None, "there is no hypervisor");
    }

    #[test]
    fn entry_sequences_survive_their_leaf() {
        for code in [&[0x0f, 0x01, 0xc1, 0xc3][..], &[0xc3], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]] {
            let (bytes, len) = entry_code(entry_leaf(code)).unwrap();
            assert_eq!(&bytes[..len], code);
        }
        assert_eq!(entry_code([0, 1, 2, 3]), None);
        assert_eq!(entry_code([13, 1, 2, 3]), None);
    }
}
