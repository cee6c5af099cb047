//! Logarithmic axes: which powers of ten they span, where a value lies, which ticks are named.

use crate::model::Unit;
use crate::table;

/// An axis from one power of ten to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    /// The exponent of its left end.
    low: i32,
    /// The exponent of its right end, greater than `low`.
    high: i32,
}

/// No axis goes beyond these, whatever a report that somebody edited says.
const EXPONENTS: std::ops::RangeInclusive<i32> = -15..=18;

/// So many ticks have room for their names on a phone.
const TICKS: i32 = 5;

impl Axis {
    /// The shortest that holds all values, which are above zero; at least a decade.
    pub(super) fn around(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite() && *value > 0.0) {
            low = low.min(value.log10());
            high = high.max(value.log10());
        }
        if low > high {
            return Self { low: 0, high: 1 };
        }
        let clamp = |exponent: f64| (exponent as i32).clamp(*EXPONENTS.start(), *EXPONENTS.end());
        let (low, high) = (clamp(low.floor()), clamp(high.ceil()));
        if low < high { Self { low, high } } else { Self { low, high: low + 1 } }
    }

    /// Where a value lies, in per cent of the axis.
    pub(super) fn place(self, value: f64) -> f64 {
        let part = (value.log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        (part * 100.0).clamp(0.0, 100.0)
    }

    /// All decades within, without the ends.
    pub(super) fn decades(self) -> impl Iterator<Item = f64> {
        (self.low + 1..self.high).map(move |exponent| self.place(10_f64.powi(exponent)))
    }

    /// The named ticks: their exponents, of which 0 is one if it lies on the axis.
    pub(super) fn ticks(self) -> Vec<i32> {
        let step = (self.high - self.low + TICKS - 2) / (TICKS - 1);
        (self.low..=self.high).filter(|exponent| exponent.rem_euclid(step) == 0).collect()
    }

    /// The position of an exponent.
    pub(super) fn place_of(self, exponent: i32) -> f64 {
        self.place(10_f64.powi(exponent))
    }
}

/// A tick's name as a factor of native.
pub(super) fn factor(exponent: i32) -> String {
    match exponent {
        e if e < 0 => format!("1/{}", short(-e)),
        e => format!("{}x", short(e)),
    }
}

/// A tick's name as a figure.
pub(super) fn figure(exponent: i32, unit: Unit) -> String {
    // A round number needs no decimals.
    let text = table::figure(10_f64.powi(exponent), unit);
    text.replace(".00", "").replace(".0", "")
}

/// A power of ten in few characters.
fn short(exponent: i32) -> String {
    match exponent {
        0..=3 => 10_i32.pow(exponent as u32).to_string(),
        4..=5 => format!("{}k", 10_i32.pow(exponent as u32 - 3)),
        6..=8 => format!("{}M", 10_i32.pow(exponent as u32 - 6)),
        e => format!("10^{e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_their_values() {
        let axis = Axis::around([0.5, 1.0, 340.0].into_iter());
        assert_eq!(axis, Axis { low: -1, high: 3 });
        assert_eq!((axis.place(0.1), axis.place(10.0), axis.place(1000.0)), (0.0, 50.0, 100.0));
        assert_eq!(axis.ticks(), [-1, 0, 1, 2, 3]);
        assert_eq!(axis.decades().count(), 3);
        assert_eq!(Axis::around([1.0].into_iter()), Axis { low: 0, high: 1 });
        assert_eq!(Axis::around([f64::NAN, 0.0].into_iter()), Axis { low: 0, high: 1 });
        assert_eq!(Axis::around([1e300].into_iter()), Axis { low: 18, high: 19 });
    }

    #[test]
    fn ticks_are_few_and_one_is_native() {
        for (low, high) in [(-3, 5), (0, 9), (-1, 7), (-2, 2)] {
            let ticks = Axis { low, high }.ticks();
            assert!(ticks.contains(&0) && ticks.len() >= 2 && ticks.len() <= 5, "{low}..{high}: {ticks:?}");
        }
        assert_eq!([-2, 0, 3, 5, 7].map(factor), ["1/100", "1x", "1000x", "100kx", "10Mx"]);
        assert_eq!([0, 1, 3].map(|e| figure(e, Unit::Nanoseconds)), ["1 ns", "10 ns", "1 µs"]);
    }
}
