//! Shortens a sequence that differs by leaving instructions out.

use crate::Tester;
use crate::generate::Case;
use crate::sequence::is_end;
use std::io;

/// The shortest sequence found that still differs in the same item. Removal goes on until no single instruction can be spared.
///
/// # Errors
/// When a runner fails.
pub fn minimise(tester: &mut Tester<'_>, case: &Case, what: &str) -> io::Result<Case> {
    let mut best = case.clone();
    loop {
        let before = best.sequence.len();
        for n in 0..best.sequence.items.len() {
            let Some(item) = &best.sequence.items[n] else { continue };
            if is_end(item.instruction.code()) {
                continue;
            }
            let mut sequence = best.sequence.clone();
            sequence.items[n] = None;
            let Some(smaller) = best.with_sequence(sequence) else { continue };
            if tester.compare(&smaller)?.is_some_and(|w| kind(&w) == kind(what)) {
                best = smaller;
            }
        }
        if best.sequence.len() == before {
            return Ok(best);
        }
    }
}

/// The name of the item in which two runs differ.
fn kind(what: &str) -> &str {
    what.split(':').next().unwrap_or(what)
}
