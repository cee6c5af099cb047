//! Paravane: a paravirtualization-aware hypervisor for x86-64.
//!
//! Read [`vm`] first: it puts a machine together from [`memory`], the [`chipset`] and the vCPUs of an [`engine`], has the
//! [`loader`] place a kernel, and runs it.

pub mod acpi;
pub mod census;
pub mod chipset;
pub mod config;
pub mod control_socket;
pub mod devices;
pub mod engine;

pub mod host;
pub mod loader;
pub mod memory;
pub mod output;
pub mod peripherals;
pub mod profile;
pub mod pv;
pub mod running;
pub mod smbios;
pub mod terminal;
pub mod timer;
pub mod tsc;
pub mod vm;
