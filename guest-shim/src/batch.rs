//! Page-table updates in batches.
//!
//! A [`Batch`] collects updates in an array that the caller provides and has the hypervisor apply them with one call: when it is flushed, when the
//! array is full, and when it is dropped. Nothing is certain to have been done before. Without the ABI each update is made at once.
//!
//! The hypervisor may stop early (to let an interrupt in, or because it refuses an update). It is called again for the rest; an update
//! that it refuses is made natively, which is always possible, for the ABI changes no meaning of page tables.

#![allow(unsafe_code)] // Page tables decide what memory is.

use crate::cpu;
use crate::hypercall::{Hypercalls, Partial};
use crate::shim::Shim;
use pv_abi::feature::Feature;
use pv_abi::memory::{Operation, Update};

/// Room for one update. Arrays of updates begin at multiples of 16 (`specs/memory.md`), which this type sees to.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub struct Slot(Update);

impl Slot {
    /// Room without an update.
    pub const EMPTY: Self = Self(Update { target: 0, value: 0 });
}

const _: () = assert!(size_of::<Slot>() == size_of::<Update>());

/// Updates that are under way. See the module's text.
#[derive(Debug)]
#[must_use = "updates are made when it is flushed or dropped"]
pub struct Batch<'a> {
    calls: Option<Hypercalls>,
    slots: &'a mut [Slot],
    /// Guest-physical address of the array.
    gpa: u64,
    len: usize,
    to_linear: fn(u64) -> u64,
    refused: u64,
}

impl<'a> Batch<'a> {
    /// A batch that collects in `buffer`, which must be contiguous in guest-physical memory. More than [`crate::Limits::elements`] of it are not used;
    /// with an empty one, updates are made natively.
    pub fn new(shim: &Shim, buffer: &'a mut [Slot]) -> Self {
        let fits = buffer.len().min(shim.limits.elements as usize);
        let calls = shim.calls_for(Feature::PageTables).filter(|_| fits > 0);
        let gpa = if calls.is_some() { (shim.platform.to_gpa)(buffer.as_ptr() as u64) } else { 0 };
        Self { calls, slots: &mut buffer[..fits], gpa, len: 0, to_linear: shim.platform.to_linear, refused: 0 }
    }

    /// Stores `value` into the page-table entry at guest-physical address `entry`, a multiple of 8.
    ///
    /// # Safety
    /// The entry is one, and memory stays as everybody believes it to be.
    #[inline]
    pub unsafe fn set_entry(&mut self, entry: u64, value: u64) {
        // SAFETY: handed on to the caller.
        unsafe { self.push(Update::set_entry(entry, value)) };
    }

    /// Invalidates the page of `address` and `more` pages behind it.
    ///
    /// # Safety
    /// CPL 0, which the shim has anyway; nothing else.
    #[inline]
    pub unsafe fn invalidate(&mut self, address: u64, more: u64) {
        // SAFETY: it drops cached translations.
        unsafe { self.push(Update::invalidate(address, more)) };
    }

    /// Invalidates the current address space but for global pages.
    ///
    /// # Safety
    /// As for [`Self::invalidate`].
    pub unsafe fn invalidate_space(&mut self) {
        // SAFETY: it drops cached translations.
        unsafe { self.push(Update::invalidate_space()) };
    }

    /// Invalidates everything, global pages too.
    ///
    /// # Safety
    /// As for [`Self::invalidate`].
    pub unsafe fn invalidate_all(&mut self) {
        // SAFETY: it drops cached translations.
        unsafe { self.push(Update::invalidate_all()) };
    }

    /// Loads CR3.
    ///
    /// # Safety
    /// As for [`cpu::write_cr3`], whenever the batch is flushed.
    pub unsafe fn set_root(&mut self, cr3: u64) {
        // SAFETY: handed on to the caller.
        unsafe { self.push(Update::set_root(cr3)) };
    }

    /// Updates that wait.
    pub fn waiting(&self) -> usize {
        self.len
    }

    /// Updates that the hypervisor refused so far, and that were made natively.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// # Safety
    /// The update is right whenever it is made.
    #[inline]
    unsafe fn push(&mut self, update: Update) {
        if self.calls.is_none() {
            // SAFETY: handed on to the caller.
            return unsafe { apply(&update, self.to_linear) };
        }
        if self.len == self.slots.len() {
            self.flush();
        }
        self.slots[self.len] = Slot(update);
        self.len += 1;
    }

    /// Makes all updates that wait.
    pub fn flush(&mut self) {
        let (Some(calls), waiting) = (self.calls, core::mem::take(&mut self.len)) else { return };
        let (gpa, to_linear) = (self.gpa, self.to_linear);
        self.refused += drain(
            &self.slots[..waiting],
            // SAFETY: each update was promised to be right; the array is in memory at `gpa`.
            |from, count| unsafe { calls.update_pages(gpa + (from * size_of::<Slot>()) as u64, count as u64) },
            // SAFETY: as above.
            |update| unsafe { apply(update, to_linear) },
        );
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Has `updates` made by `call`, which is given the first and the number of those that remain, and by `native` where that fails. Gives how often it did.
fn drain(
    updates: &[Slot],
    mut call: impl FnMut(usize, usize) -> Result<u64, Partial>,
    mut native: impl FnMut(&Update),
) -> u64 {
    let (mut next, mut refused) = (0, 0);
    while next < updates.len() {
        let (done, failed) = match call(next, updates.len() - next) {
            Ok(done) => (done, false),
            Err(partial) => (partial.done, true),
        };
        next = updates.len().min(next.saturating_add(usize::try_from(done).unwrap_or(usize::MAX)));
        // A hypervisor that does nothing and reports success would be called for ever.
        if (failed || done == 0) && next < updates.len() {
            native(&updates[next].0);
            next += 1;
            refused += 1;
        }
    }
    refused
}

/// Makes one update natively.
///
/// # Safety
/// CPL 0; the update is right now.
unsafe fn apply(update: &Update, to_linear: fn(u64) -> u64) {
    let Some((operation, address)) = update.parts() else { return };
    // SAFETY: handed on to the caller.
    unsafe {
        match operation {
            Operation::SetEntry => (to_linear(address) as *mut u64).write_volatile(update.value),
            Operation::InvalidatePage => invalidate_pages(address, update.value),
            Operation::InvalidateSpace => cpu::write_cr3(cpu::read_cr3()),
            Operation::InvalidateAll => invalidate_all(),
            Operation::SetRoot => cpu::write_cr3(update.value),
        }
    }
}

/// Pages from which on it is cheaper to drop everything.
const MANY: u64 = 256;

/// Invalidates the page of `address` and `more` behind it.
///
/// # Safety
/// CPL 0.
pub(crate) unsafe fn invalidate_pages(address: u64, more: u64) {
    // SAFETY: handed on to the caller.
    unsafe {
        if more >= MANY {
            return invalidate_all();
        }
        for n in 0..=more {
            cpu::invlpg(address.wrapping_add(n << 12));
        }
    }
}

/// Invalidates everything: changing CR4.PGE drops global translations too (SDM vol. 3, section 4.10.4.1).
///
/// # Safety
/// CPL 0.
pub(crate) unsafe fn invalidate_all() {
    // SAFETY: handed on to the caller; the other bits stay as they are.
    unsafe {
        let cr4 = cpu::read_cr4();
        cpu::write_cr4(cr4 ^ 1 << 7);
        cpu::write_cr4(cr4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use pv_abi::call::Error;

    const N: usize = 10;

    fn updates() -> [Slot; N] {
        core::array::from_fn(|n| Slot(Update::set_entry(8 * n as u64, n as u64)))
    }

    /// Runs `drain` with a hypervisor that answers as told; gives who made each update, in order (true: natively), and the count.
    fn run(mut answer: impl FnMut(usize, usize) -> Result<u64, Partial>) -> ([Option<bool>; N], u64) {
        let made = RefCell::new([None; N]);
        let updates = updates();
        let refused = drain(
            &updates,
            |from, count| {
                assert_eq!(from + count, N, "all that remain are offered");
                let answer = answer(from, count);
                let done = answer.unwrap_or_else(|p| p.done) as usize;
                for slot in made.borrow_mut().iter_mut().skip(from).take(done.min(count)) {
                    assert_eq!(slot.replace(false), None, "made twice");
                }
                answer
            },
            |update| {
                let slot = &mut made.borrow_mut()[update.value as usize];
                assert_eq!(slot.replace(true), None, "made twice");
            },
        );
        (made.into_inner(), refused)
    }

    #[test]
    fn everything_is_made_once_whatever_the_hypervisor_does() {
        let all = [Some(false); N];
        assert_eq!(run(|_, count| Ok(count as u64)), (all, 0));
        assert_eq!(run(|_, count| Ok(count.min(3) as u64)), (all, 0), "it stops early");
        let fails_at_4 = |from: usize, count: usize| {
            if from <= 4 { Err(Partial { done: 4 - from as u64, error: Error::BadAddress }) } else { Ok(count as u64) }
        };
        let mut expected = all;
        expected[4] = Some(true);
        assert_eq!(run(fails_at_4), (expected, 1), "one update is refused");
        assert_eq!(run(|_, _| Err(Partial { done: 0, error: Error::NotNegotiated })), ([Some(true); N], N as u64));
        assert_eq!(run(|_, _| Ok(0)), ([Some(true); N], N as u64), "it does nothing");
        assert_eq!(run(|_, _| Ok(u64::MAX)), (all, 0), "it claims too much");
    }

    #[test]
    fn native_entries_are_stored_at_once() {
        let mut table = [0_u64; 4];
        let at = table.as_mut_ptr() as u64;
        // SAFETY: the entry is a number of this test's own.
        unsafe { apply(&Update::set_entry(at + 16, 77), |gpa| gpa) };
        assert_eq!(table, [0, 0, 77, 0]);
    }
}
