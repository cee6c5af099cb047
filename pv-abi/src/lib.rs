//! Constants of Paravane's paravirtual ABI.
//!
//! So far this is the CPUID range that hypervisors use and what Paravane answers there. The hypercalls, shared pages and queues of the
//! ABI will be defined here, as the one source for the hypervisor, for guests and for the specification; until then a guest finds no
//! feature bits and uses its native code.
#![no_std]
#![forbid(unsafe_code)]

/// First CPUID leaf of the range that x86 hypervisors answer.
pub const CPUID_BASE: u32 = 0x4000_0000;

/// Leaf with TSC and APIC timer frequencies: EAX = TSC kHz, EBX = APIC timer kHz.
pub const CPUID_TIMING: u32 = 0x4000_0010;

/// EBX, ECX, EDX of [`CPUID_BASE`], as bytes.
pub const SIGNATURE: [u8; 12] = *b"ParavaneVMM ";

/// Whether the registers that [`CPUID_BASE`] gave are Paravane's.
pub fn is_paravane(ebx: u32, ecx: u32, edx: u32) -> bool {
    let word = |n: usize| u32::from_le_bytes([SIGNATURE[n], SIGNATURE[n + 1], SIGNATURE[n + 2], SIGNATURE[n + 3]]);
    (ebx, ecx, edx) == (word(0), word(4), word(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signature_is_recognised_and_others_are_not() {
        let w = |s: &[u8; 12], n: usize| u32::from_le_bytes(s[n..n + 4].try_into().unwrap());
        assert!(is_paravane(w(&SIGNATURE, 0), w(&SIGNATURE, 4), w(&SIGNATURE, 8)));
        let other = b"KVMKVMKVM\0\0\0";
        assert!(!is_paravane(w(other, 0), w(other, 4), w(other, 8)));
    }
}
