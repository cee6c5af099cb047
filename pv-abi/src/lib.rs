//! Paravane's paravirtual ABI: the numbers, layouts and bits that a guest and a hypervisor agree on.
//!
//! The ABI lets a guest that knows it skip operations that are costly on a virtual machine. It belongs to no hypervisor: a guest
//! discovers it ([`cpuid`]), negotiates features ([`feature`]) and falls back to native code for each one that is absent, so that one
//! binary runs on Paravane, on other hypervisors and on bare metal.
//!
//! This crate is the only source. The hypervisor and guests use its types; the C header (`pv-abi/include/paravane.h`) and the tables in
//! `specs/` are generated from [`describe`], and tests prove that they agree. What each call does is said in `specs/`.
//!
//! | module | what it defines |
//! |---|---|
//! | [`cpuid`] | CPUID leaves: discovery, version, features, entry sequence, limits |
//! | [`feature`] | feature bits |
//! | [`call`] | hypercall numbers, registers, errors |
//! | [`shared`] | the page that each vCPU shares with the hypervisor |
//! | [`memory`] | page-table updates and free-page hints |
//! | [`virtio`] | the virtio transport |
//! | [`describe`] | all of it as data, for the header, the tables and the tests |
#![no_std]
#![forbid(unsafe_code)]

pub mod call;
pub mod cpuid;
pub mod describe;
pub mod feature;
pub mod memory;
pub mod shared;
pub mod virtio;

/// A version of the ABI. A guest and a hypervisor of the same major version understand each other; a higher minor version only adds
/// features, calls and fields in places that were reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Incompatible changes.
    pub major: u16,
    /// Additions.
    pub minor: u16,
}

impl Version {
    /// The version that this crate describes.
    pub const CURRENT: Self = Self { major: 1, minor: 0 };

    /// As it stands in registers: major version in bits 16 to 31, minor version in bits 0 to 15.
    pub const fn to_bits(self) -> u32 {
        (self.major as u32) << 16 | self.minor as u32
    }

    /// From the bits in a register.
    pub const fn from_bits(bits: u32) -> Self {
        Self { major: (bits >> 16) as u16, minor: bits as u16 }
    }

    /// Whether a guest made for `self` can talk to a hypervisor that offers `offered`.
    pub const fn works_with(self, offered: Self) -> bool {
        self.major == offered.major && self.minor <= offered.minor
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_are_ordered_and_a_guest_needs_no_more_than_it_knows() {
        let v = |major, minor| Version { major, minor };
        assert_eq!(Version::from_bits(v(3, 7).to_bits()), v(3, 7));
        assert!(v(1, 0).works_with(v(1, 4)));
        assert!(!v(1, 5).works_with(v(1, 4)));
        assert!(!v(1, 0).works_with(v(2, 0)) && !v(2, 0).works_with(v(1, 9)));
    }
}
