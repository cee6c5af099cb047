//! Paravane: a paravirtualization-aware hypervisor for x86-64.
//!
//! Read [`vm`] first: it puts a machine together from memory, the [`chipset`] and vCPUs of an [`engine`].

pub mod chipset;
pub mod devices;
pub mod memory;
pub mod timer;
pub mod tsc;
