//! What the buses of several tests have in common.

/// The part of a [`paravane_cpu::Bus`] that is about interrupts, for a machine without any: no local APIC, nothing pending, CR8 reads as zero.
macro_rules! no_interrupts {
    () => {
        fn apic_msr_read(&self, _: u32, _: u32) -> Option<u64> {
            None
        }
        fn apic_msr_write(&self, _: u32, _: u32, _: u64) -> Option<paravane_cpu::BusOutcome> {
            None
        }
        fn cr8_read(&self, _: u32) -> u8 {
            0
        }
        fn cr8_write(&self, _: u32, _: u8) {}
        fn interrupt_pending(&self, _: u32) -> bool {
            false
        }
        fn interrupt_ack(&self, _: u32) -> Option<u8> {
            None
        }
        fn take_nmi(&self, _: u32) -> bool {
            false
        }
    };
}
