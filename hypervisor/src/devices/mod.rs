//! The devices of the machine: what a PC of the ACPI era has and stock kernels expect.
//!
//! | module | device | where |
//! |---|---|---|
//! | [`pic`] | two 8259A interrupt controllers | ports 0x20, 0xa0, 0x4d0 |
//! | [`ioapic`] | I/O APIC, 24 pins | 0xfec00000 |
//! | [`lapic`] | local APIC, one per vCPU | 0xfee00000, MSRs 0x800.. |
//! | [`pit`] | 8254 timer | ports 0x40-0x43, 0x61 |
//! | [`rtc`] | MC146818 clock and CMOS RAM | ports 0x70, 0x71 |
//! | [`acpi_pm`] | PM timer, power-off | ports 0x600-0x60b |
//! | [`pci`] | configuration space, host bridge | ports 0xcf8-0xcff |
//! | [`mmio`] | windows of other devices | 0xc0000000.. |
//! | [`serial`] | 16550 | ports 0x3f8-0x3ff |
//!
//! A device is plain state with methods for its registers; it knows neither the bus nor threads. [`crate::chipset`] wires
//! them up: addresses, interrupt lines, deadlines, locking. [`control`] says who is told when something happens.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod acpi_pm;
pub mod control;
pub mod ioapic;
pub mod lapic;
pub mod local_apics;
pub mod mmio;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod serial;

/// Locks, whatever happened to a thread that held the lock before: device state is plain data and stays usable.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
