//! Locked operations that take more than one host instruction: one vCPU alone with memory.
//!
//! A locked instruction within a page is itself on the host. One whose operand lies across two pages, which need not be neighbours in
//! guest RAM, works on a copy; and some are carried out by Rust. So that they are atomic against all that other vCPUs do, those are
//! brought out of translated code first and stay out until the operation is done, as a CPU with a split lock keeps others from the
//! bus. Devices are not stopped.
//!
//! A vCPU that wants to be alone says so in the shared watch ([`paravane_ram::WriteWatch::try_alone`]), kicks the others, and waits until each is out
//! or *parked*: in a place where it waits for something and touches no guest memory. Whoever comes to such a place, or is about to
//! enter translated code, looks whether somebody is alone. A parked vCPU says that it is not parked any more before it looks for the last time, and who
//! wants to be alone says so before it looks who is parked, so at least one of two sees the other.

use std::sync::atomic::Ordering::SeqCst;

use paravane_ram::{Slot, WriteWatch};

use crate::engine::Engine;

/// How often a vCPU that waits looks before it offers its host CPU to others.
const SPINS: u32 = 200;

fn pause(looked: &mut u32) {
    *looked += 1;
    if *looked < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

impl Engine {
    /// The watch in which all vCPUs look who is alone.
    fn common_watch(&self) -> Option<(WriteWatch, Slot)> {
        self.ram.first_watch().map(|(watch, slot)| (watch.clone(), slot))
    }

    /// Comes back when no other vCPU touches memory, until [`Engine::end_alone`].
    pub(crate) fn be_alone(&mut self) {
        if self.alone || !self.ram.several() {
            return;
        }
        let Some((watch, slot)) = self.common_watch() else { return };
        let mut looked = 0;
        self.mailbox.parked.store(true, SeqCst);
        while !watch.try_alone(slot) {
            self.give_pages_up();
            pause(&mut looked);
        }
        self.mailbox.parked.store(false, SeqCst);
        self.alone = true;
        self.stats.alone += 1;
        let others = watch.others(slot);
        others.iter().for_each(|o| o.come_out());
        for other in others {
            while !other.is_out() {
                self.give_pages_up();
                pause(&mut looked);
            }
        }
    }

    /// Lets the others go on.
    pub(crate) fn end_alone(&mut self) {
        if std::mem::take(&mut self.alone)
            && let Some((watch, slot)) = self.ram.first_watch()
        {
            watch.not_alone(slot);
        }
    }

    /// Waits while another vCPU is alone with memory. To be called where this one touches none.
    #[inline]
    pub(crate) fn let_another_be_alone(&mut self) {
        if self.ram.first_watch().is_some_and(|(watch, slot)| watch.another_is_alone(slot)) {
            self.park();
        }
    }

    #[cold]
    fn park(&mut self) {
        let Some((watch, slot)) = self.common_watch() else { return };
        let mut looked = 0;
        while watch.another_is_alone(slot) {
            self.mailbox.parked.store(true, SeqCst);
            while watch.another_is_alone(slot) {
                self.give_pages_up();
                pause(&mut looked);
            }
            self.mailbox.parked.store(false, SeqCst);
        }
    }
}
