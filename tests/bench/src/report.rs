//! One line per row on standard output: name, nanoseconds, checksum, separated by tabs.
//!
//! The checksum is what the work computed. Whoever compares two sides compares it first: a fast wrong answer
//! is no result.

use std::io::{self, Write};
use std::time::Duration;

/// How to choose and size rows.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Only rows whose name holds one of these, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// An eighth of the work
    #[arg(long)]
    quick: bool,
}

impl Choice {
    /// True if the row is wanted.
    pub(crate) fn takes(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// The amount of work for a row whose full amount is `full`.
    pub(crate) fn amount(&self, full: u64) -> u64 {
        if self.quick { (full / 8).max(1) } else { full }
    }
}

/// Prints a row and flushes it, so that what is done is seen even if the next row never ends.
pub(crate) fn row(name: &str, nanoseconds: f64, checksum: u64) -> io::Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{name}\t{nanoseconds:.1}\t{checksum:016x}")?;
    output.flush()
}

/// Nanoseconds of a duration.
pub(crate) fn nanoseconds(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// Folds a value into a checksum (the step of FNV-1a on 64-bit words, then a rotation so that high bits matter).
pub(crate) fn fold(checksum: u64, value: u64) -> u64 {
    (checksum ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
}

/// Where [`fold`] starts.
pub(crate) const SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// The checksum of a file's contents.
pub(crate) fn of_bytes(bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(8);
    let mut sum = SEED;
    for chunk in &mut chunks {
        sum = fold(sum, u64::from_le_bytes(chunk.try_into().expect("eight bytes")));
    }
    for &byte in chunks.remainder() {
        sum = fold(sum, u64::from(byte));
    }
    fold(sum, bytes.len() as u64)
}

/// The pseudo-random numbers of every input (xorshift64*): the same on all sides.
pub(crate) struct Numbers(u64);

impl Numbers {
    /// A sequence of its own for each `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_any_of_the_parts() {
        let all = Choice::default();
        assert!(all.takes("memcpy-64"));
        let some = Choice { only: vec!["memcpy".into(), "fork".into()], quick: true };
        assert!(some.takes("memcpy-64") && some.takes("fork-exit") && !some.takes("memset-64"));
        assert_eq!((some.amount(80), some.amount(3), all.amount(3)), (10, 1, 3));
    }

    #[test]
    fn checksums_see_order_length_and_every_byte() {
        let sums = [&b"12345678a"[..], b"12345678b", b"a12345678", b"12345678", b"12345678\0", b""].map(of_bytes);
        for (index, sum) in sums.iter().enumerate() {
            assert!(!sums[..index].contains(sum), "{index}");
        }
    }

    #[test]
    fn numbers_stay_below_their_limit_and_reach_all_of_it() {
        let mut numbers = Numbers::new(7);
        let mut seen = [0u32; 10];
        for _ in 0..10_000 {
            seen[numbers.below(10) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| (800..1200).contains(&count)), "{seen:?}");
    }
}
