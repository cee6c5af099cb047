//! Page-table updates and free-page hints: arrays in guest RAM that one call works off.

use core::mem::offset_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Elements that every hypervisor takes in one call; [`crate::cpuid::LIMITS`] may allow more.
pub const LEAST_LIMIT: u32 = 512;

/// What an [`Update`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Operation {
    /// Store `value` into the page-table entry of 8 bytes at guest-physical address `target`, atomically.
    SetEntry = 1,
    /// Invalidate linear address `target` (a page boundary), and as many pages behind it as `value` says, in the current address space, global
    /// or not.
    InvalidatePage = 2,
    /// Invalidate the current address space but for global pages. `target` and `value` are 0.
    InvalidateSpace = 3,
    /// Invalidate everything, global pages too. `target` and `value` are 0.
    InvalidateAll = 4,
    /// Load `value` into CR3. `target` is 0.
    SetRoot = 5,
}

impl Operation {
    /// All operations, by number.
    pub const ALL: [Self; 5] =
        [Self::SetEntry, Self::InvalidatePage, Self::InvalidateSpace, Self::InvalidateAll, Self::SetRoot];

    /// The operation with this number.
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::SetEntry),
            2 => Some(Self::InvalidatePage),
            3 => Some(Self::InvalidateSpace),
            4 => Some(Self::InvalidateAll),
            5 => Some(Self::SetRoot),
            _ => None,
        }
    }

    /// Its name in the header and the specification.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SetEntry => "SET_ENTRY",
            Self::InvalidatePage => "INVALIDATE_PAGE",
            Self::InvalidateSpace => "INVALIDATE_SPACE",
            Self::InvalidateAll => "INVALIDATE_ALL",
            Self::SetRoot => "SET_ROOT",
        }
    }
}

/// Bits of [`Update::target`] that hold the operation.
pub const OPERATION_MASK: u64 = 7;

/// One page-table update, 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Update {
    /// Bits 0-2: [`Operation`]. The rest: an address, whose bits 0-2 are 0.
    pub target: u64,
    /// See [`Operation`].
    pub value: u64,
}

impl Update {
    /// Store a page-table entry.
    pub const fn set_entry(gpa: u64, value: u64) -> Self {
        Self { target: gpa & !OPERATION_MASK | Operation::SetEntry as u64, value }
    }

    /// Invalidate a page and `more` pages behind it.
    pub const fn invalidate(address: u64, more: u64) -> Self {
        Self { target: address & !0xfff | Operation::InvalidatePage as u64, value: more }
    }

    /// Invalidate the address space.
    pub const fn invalidate_space() -> Self {
        Self { target: Operation::InvalidateSpace as u64, value: 0 }
    }

    /// Invalidate everything.
    pub const fn invalidate_all() -> Self {
        Self { target: Operation::InvalidateAll as u64, value: 0 }
    }

    /// Load CR3.
    pub const fn set_root(cr3: u64) -> Self {
        Self { target: Operation::SetRoot as u64, value: cr3 }
    }

    /// Operation and address; `None` when there is no such operation.
    pub const fn parts(&self) -> Option<(Operation, u64)> {
        match Operation::from_number(self.target & OPERATION_MASK) {
            Some(op) => Some((op, self.target & !OPERATION_MASK)),
            None => None,
        }
    }
}

/// Pages whose contents the guest does not need: they may read as anything until they are written again. 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FreeRange {
    /// Guest-physical address of the first page, a page boundary.
    pub gpa: u64,
    /// Number of pages of 4 KiB, at least 1.
    pub pages: u64,
}

const _: () = {
    assert!(size_of::<Update>() == 16 && offset_of!(Update, value) == 8);
    assert!(size_of::<FreeRange>() == 16 && offset_of!(FreeRange, pages) == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_keep_address_and_operation_apart() {
        assert_eq!(Update::set_entry(0x1238, 7).parts(), Some((Operation::SetEntry, 0x1238)));
        assert_eq!(
            Update::invalidate(0xffff_8000_0000_1fff, 3).parts(),
            Some((Operation::InvalidatePage, 0xffff_8000_0000_1000))
        );
        assert_eq!(Update::default().parts(), None, "zeroed memory asks for nothing");
        for op in Operation::ALL {
            assert_eq!(Operation::from_number(op as u64), Some(op));
        }
        assert_eq!(Operation::from_number(6), None);
    }
}
