//! Local APICs that the engine keeps, in the place of the chipset's own.

use super::ioapic::{Message, PINS};

/// What the chipset needs of them.
pub trait LocalApics: Send + Sync {
    /// Delivers a message to whom it is addressed.
    fn send(&self, m: &Message);
    /// Says what each I/O APIC pin sends while it is not masked, before any such message is sent: the ends of level-triggered ones are to be
    /// reported ([`paravane_cpu::Bus::end_of_interrupt`]).
    fn set_routes(&self, pins: &[Option<Message>; PINS]);
}
