//! The ABI as data: what the C header, the tables in `specs/` and the tests that compare them are made from.
//!
//! Values and offsets are taken from the definitions themselves, so they cannot differ from them; what can be forgotten is an entry, and
//! tests here count.

use crate::call::{ALL_ONES, FIRST, Shutdown};
use crate::memory::{FreeRange, LEAST_LIMIT, OPERATION_MASK, Update};
use crate::shared::{Clock, EOI_SKIP, SharedPage, Stolen};
use crate::{Version, cpuid, virtio};
use core::mem::offset_of;

/// A named number that is in no list of its own.
#[derive(Clone, Copy, Debug)]
pub struct Constant {
    /// Name without the header's prefix.
    pub name: &'static str,
    /// Value.
    pub value: u64,
    /// What it is, in one line.
    pub text: &'static str,
}

/// C type of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// `uint8_t`, or an array of them.
    U8(usize),
    /// `int8_t`.
    I8,
    /// `uint32_t`.
    U32,
    /// `uint64_t`.
    U64,
    /// Another structure of this ABI.
    Struct(&'static str, usize),
}

impl FieldType {
    /// Bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::U8(n) => n,
            Self::I8 => 1,
            Self::U32 => 4,
            Self::U64 => 8,
            Self::Struct(_, size) => size,
        }
    }
}

/// A field of a structure.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Name, in C and in Rust.
    pub name: &'static str,
    /// Bytes from the structure's start.
    pub offset: usize,
    /// Type.
    pub kind: FieldType,
    /// What it is, in one line.
    pub text: &'static str,
}

/// A structure in memory that guest and hypervisor share.
#[derive(Clone, Copy, Debug)]
pub struct Structure {
    /// Name without the header's prefix, in snake case.
    pub name: &'static str,
    /// Bytes.
    pub size: usize,
    /// What it is, in one line.
    pub text: &'static str,
    /// Fields without gaps between them.
    pub fields: &'static [Field],
}

const fn constant(name: &'static str, value: u64, text: &'static str) -> Constant {
    Constant { name, value, text }
}

const fn field(name: &'static str, offset: usize, kind: FieldType, text: &'static str) -> Field {
    Field { name, offset, kind, text }
}

/// Numbers that are in no list of their own. Lists are hypercalls ([`crate::call::Call::ALL`]), errors ([`crate::call::Error::ALL`]), features
/// ([`crate::feature::Feature::ALL`]) and operations ([`crate::memory::Operation::ALL`]).
pub const CONSTANTS: &[Constant] = &[
    constant(
        "VERSION",
        Version::CURRENT.to_bits() as u64,
        "version of the ABI, major in bits 16-31, minor in bits 0-15",
    ),
    constant("CPUID_FIRST", cpuid::FIRST as u64, "first leaf to be searched for the signature"),
    constant("CPUID_STEP", cpuid::STEP as u64, "distance between leaves to be searched"),
    constant("CPUID_END", cpuid::END as u64, "first leaf not to be searched"),
    constant("SIGNATURE_EBX", cpuid::signature_words()[0] as u64, "signature, bytes 0-3"),
    constant("SIGNATURE_ECX", cpuid::signature_words()[1] as u64, "signature, bytes 4-7"),
    constant("SIGNATURE_EDX", cpuid::signature_words()[2] as u64, "signature, bytes 8-11"),
    constant("CPUID_FEATURES", cpuid::FEATURES as u64, "offset of the leaf with version and features"),
    constant("CPUID_ENTRY", cpuid::ENTRY as u64, "offset of the leaf with the entry sequence"),
    constant("CPUID_LIMITS", cpuid::LIMITS as u64, "offset of the leaf with limits"),
    constant("CPUID_TIMING", cpuid::TIMING as u64, "offset of the leaf with frequencies"),
    constant("ENTRY_BYTES", cpuid::ENTRY_BYTES as u64, "most bytes of an entry sequence"),
    constant("CALL_FIRST", FIRST, "number of the first hypercall"),
    constant("ALL_ONES", ALL_ONES, "anyone, all of the address space, or all doorbell bits"),
    constant("SHUTDOWN_POWER_OFF", Shutdown::PowerOff as u64, "argument of SHUTDOWN: power off"),
    constant("SHUTDOWN_RESET", Shutdown::Reset as u64, "argument of SHUTDOWN: start anew"),
    constant("OPERATION_MASK", OPERATION_MASK, "bits of an update's target that hold its operation"),
    constant("LEAST_LIMIT", LEAST_LIMIT as u64, "array elements that every hypervisor takes in one call"),
    constant("EOI_SKIP", EOI_SKIP as u64, "bit of the shared page's eoi"),
    constant("SHARED_PAGE_BYTES", crate::shared::BYTES as u64, "bytes of the shared page, and its alignment"),
    constant("VIRTIO_MAX_DEVICES", virtio::MAX_DEVICES as u64, "most virtio devices"),
    constant("VIRTIO_CONFIG", virtio::CONFIG, "offset of a virtio device's configuration space"),
    constant("VIRTIO_REGISTERS_END", virtio::REGISTERS_END, "first offset behind a virtio device's registers"),
];

/// Structures in shared memory, those that others contain first.
pub const STRUCTURES: &[Structure] = &[
    Structure {
        name: "clock",
        size: size_of::<Clock>(),
        text: "nanoseconds as a function of the TSC",
        fields: &[
            field("sequence", offset_of!(Clock, sequence), FieldType::U32, "odd while the hypervisor writes"),
            field("mult", offset_of!(Clock, mult), FieldType::U32, "fraction of 2^32 ns per shifted tick"),
            field("tsc_base", offset_of!(Clock, tsc_base), FieldType::U64, "guest TSC at ns_base"),
            field("ns_base", offset_of!(Clock, ns_base), FieldType::U64, "ns since the machine started, at tsc_base"),
            field(
                "wall_ns",
                offset_of!(Clock, wall_ns),
                FieldType::U64,
                "ns from 1970-01-01 UTC to the machine's start",
            ),
            field(
                "shift",
                offset_of!(Clock, shift),
                FieldType::I8,
                "shift of the TSC difference, to the left if positive",
            ),
            field("reserved", offset_of!(Clock, reserved), FieldType::U8(7), "0"),
        ],
    },
    Structure {
        name: "stolen",
        size: size_of::<Stolen>(),
        text: "time that the vCPU wanted to run and did not",
        fields: &[
            field("sequence", offset_of!(Stolen, sequence), FieldType::U32, "odd while the hypervisor writes"),
            field(
                "preempted",
                offset_of!(Stolen, preempted),
                FieldType::U32,
                "1 while the vCPU could run and does not",
            ),
            field("ns", offset_of!(Stolen, ns), FieldType::U64, "ns since the page was shared"),
        ],
    },
    Structure {
        name: "shared_page",
        size: size_of::<SharedPage>(),
        text: "what a vCPU shares with the hypervisor",
        fields: &[
            field("version", offset_of!(SharedPage, version), FieldType::U32, "version in force; by the hypervisor"),
            field("eoi", offset_of!(SharedPage, eoi), FieldType::U32, "bit 0: no EOI needed; by both"),
            field("irq_enabled", offset_of!(SharedPage, irq_enabled), FieldType::U8(1), "virtual IF; by the guest"),
            field(
                "irq_pending",
                offset_of!(SharedPage, irq_pending),
                FieldType::U8(1),
                "an interrupt waits; by the hypervisor",
            ),
            field("reserved0", offset_of!(SharedPage, reserved0), FieldType::U8(6), "0"),
            field("events", offset_of!(SharedPage, events), FieldType::U64, "devices with events; by both"),
            field("doorbells", offset_of!(SharedPage, doorbells), FieldType::U64, "devices with new buffers; by both"),
            field("clock", offset_of!(SharedPage, clock), FieldType::Struct("clock", size_of::<Clock>()), "the clock"),
            field(
                "stolen",
                offset_of!(SharedPage, stolen),
                FieldType::Struct("stolen", size_of::<Stolen>()),
                "stolen time",
            ),
            field("reserved1", offset_of!(SharedPage, reserved1), FieldType::U8(4008), "0"),
        ],
    },
    Structure {
        name: "update",
        size: size_of::<Update>(),
        text: "one page-table update",
        fields: &[
            field("target", offset_of!(Update, target), FieldType::U64, "address, and the operation in bits 0-2"),
            field("value", offset_of!(Update, value), FieldType::U64, "as the operation says"),
        ],
    },
    Structure {
        name: "free_range",
        size: size_of::<FreeRange>(),
        text: "pages whose contents are not needed",
        fields: &[
            field("gpa", offset_of!(FreeRange, gpa), FieldType::U64, "first page"),
            field("pages", offset_of!(FreeRange, pages), FieldType::U64, "number of 4 KiB pages"),
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_described_without_gaps() {
        for s in STRUCTURES {
            let mut at = 0;
            for f in s.fields {
                assert_eq!(f.offset, at, "{}.{} or a field before it is missing", s.name, f.name);
                at += f.kind.size();
            }
            assert_eq!(at, s.size, "the end of {} is not described", s.name);
        }
    }

    #[test]
    fn names_differ() {
        for (n, c) in CONSTANTS.iter().enumerate() {
            assert!(CONSTANTS[..n].iter().all(|d| d.name != c.name), "{} stands there twice", c.name);
        }
    }
}
