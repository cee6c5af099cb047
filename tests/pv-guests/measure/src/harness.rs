//! What every case needs: operations done in pieces, each timed, and a result whose text is always as long.
//!
//! A result has one width whatever its digits are, because each character of it costs exits: so two runs of a case that differ in
//! their number of operations differ in nothing else, and the hypervisor's counters per operation are exact.

use crate::machine::Machine;
use core::fmt;
use guest_rt::console::Digits;
use guest_rt::cpu;
use guest_rt::paging::Window;

/// What a case runs with.
pub(crate) struct Run<'a> {
    pub(crate) machine: Machine,
    pub(crate) window: &'a Window,
    pub(crate) count: u64,
}

/// What a case came to, or why the machine cannot do it.
pub(crate) type Outcome = Result<Timed, &'static str>;

/// Pieces that are kept, one by one.
const KEPT: usize = 20;

/// Pieces that [`repeated`] makes.
pub(crate) const PIECES: u64 = KEPT as u64;

/// Operations done, in pieces. A hypervisor is a process that others interrupt, so that the quick pieces tell most.
#[derive(Default)]
pub(crate) struct Timed {
    pub(crate) done: u64,
    pieces: u64,
    /// TSC cycles of one operation times 100, in each of the first pieces.
    kept: [u64; KEPT],
    best: Option<u64>,
}

impl Timed {
    /// Adds a piece.
    pub(crate) fn add(&mut self, operations: u64, work: impl FnOnce()) {
        let start = cpu::tsc_ordered();
        work();
        self.record(operations, cpu::tsc_ordered() - start);
    }

    /// Adds a piece that took so many cycles.
    pub(crate) fn record(&mut self, operations: u64, cycles: u64) {
        let each = cycles * 100 / operations.max(1);
        self.done += operations;
        if let Some(slot) = self.kept.get_mut(self.pieces as usize) {
            *slot = each;
        }
        self.pieces += 1;
        self.best = Some(self.best.map_or(each, |b| b.min(each)));
    }

    /// Cycles of one operation in the quickest piece, times 100.
    pub(crate) fn best(&self) -> u64 {
        self.best.unwrap_or(0)
    }
}

/// The cycles of the pieces, each with two decimals, each after a blank; 0 for pieces that there were not. The width is always
/// the same.
impl fmt::Display for Timed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for each in &self.kept {
            write!(f, " {}", Hundredths(*each))?;
        }
        Ok(())
    }
}

/// A number that is written with two decimals and 14 digits.
pub(crate) struct Hundredths(pub(crate) u64);

impl fmt::Display for Hundredths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", Digits(self.0 / 100, 12), Digits(self.0 % 100, 2))
    }
}

/// Does `work` `count` times, or a few times less so that all pieces are equal.
pub(crate) fn repeated(count: u64, mut work: impl FnMut()) -> Outcome {
    in_pieces(count, |piece| {
        for _ in 0..piece {
            work();
        }
    })
}

/// Has `work` do `count` operations in equal pieces; it is told how many each time. One more piece comes first and is not timed.
pub(crate) fn in_pieces(count: u64, mut work: impl FnMut(u64)) -> Outcome {
    let mut timed = Timed::default();
    let piece = (count / PIECES).max(1);
    work(WARM_UP);
    for _ in 0..PIECES.min(count) {
        timed.add(piece, || work(piece));
    }
    Ok(timed)
}

/// Operations of the piece that comes first.
const WARM_UP: u64 = 1;

/// Does timed work itself: `work` gives the cycles of as many operations as it is told.
pub(crate) fn self_timed(count: u64, mut work: impl FnMut(u64) -> u64) -> Outcome {
    let mut timed = Timed::default();
    let piece = (count / PIECES).max(1);
    work(WARM_UP);
    for _ in 0..PIECES.min(count) {
        timed.record(piece, work(piece));
    }
    Ok(timed)
}
