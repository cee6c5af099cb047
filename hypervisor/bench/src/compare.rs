//! Two reports side by side: what is faster, what slower, what counts differently.
//!
//! Times are noisy, so medians that differ say nothing by themselves. Two figures are called the same when their medians are
//! closer than [`FLOOR`], or closer than the two spreads added up ([`Compared::noise`]): what one report already shows as scatter
//! between its own rounds is no difference between the two. A report with so few rounds that it has no spread to speak of gets
//! [`UNKNOWN`]. Counters are different: an exact one comes out the same in every run, so any difference is one, and is named.

use crate::exact;
use crate::model::{Measured, Report, Row, Side};
use crate::table;
use std::fmt::Write as _;

/// Medians closer than this are the same, whatever the spread: cache colours and the layout of memory alone make so much.
pub const FLOOR: f64 = 0.05;

/// The spread that a figure of fewer than three rounds is taken to have.
pub const UNKNOWN: f64 = 0.15;

/// So much may an exact counter differ, for it is stored as a quotient.
const ROUNDING: f64 = 1e-6;

/// What became of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No difference beyond the noise.
    Same,
    /// The second report's is better.
    Faster,
    /// The second report's is worse.
    Slower,
}

/// A figure that both reports have.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared<'a> {
    /// The row in the first report.
    pub row: &'a Row,
    /// The side.
    pub side: Side,
    /// The first report's median, in the row's unit.
    pub before: f64,
    /// The second report's.
    pub after: f64,
    /// By how much the second costs more: 1 is no difference, 2 is twice the time or half the throughput.
    pub cost: f64,
    /// The factor up to which, and whose inverse down to which, costs are the same.
    pub noise: f64,
    /// What follows.
    pub verdict: Verdict,
    /// Exact counters that differ: name, before, after.
    pub counters: Vec<(String, f64, f64)>,
    /// Whether both reports count exactly here.
    pub counted: bool,
}

/// What two reports say about each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison<'a> {
    /// Figures that both have, in the first report's order.
    pub figures: Vec<Compared<'a>>,
    /// Figures that only the first has: row and side.
    pub gone: Vec<(String, Side)>,
    /// Figures that only the second has.
    pub new: Vec<(String, Side)>,
}

/// Compares `b` with `a`.
pub fn compare<'a>(a: &'a Report, b: &Report) -> Comparison<'a> {
    let find = |report: &Report, id: &str| report.rows.iter().position(|row| row.id == id);
    let (mut figures, mut gone) = (Vec::new(), Vec::new());
    for row in &a.rows {
        let other = find(b, &row.id).map(|place| &b.rows[place]).filter(|other| other.unit == row.unit);
        for side in Side::ALL {
            match (own(row, side), other.and_then(|other| own(other, side))) {
                (Some(before), Some(after)) => figures.push(figure(row, side, before, after)),
                (Some(_), None) => gone.push((row.id.clone(), side)),
                _ => {}
            }
        }
    }
    let mut new = Vec::new();
    for row in &b.rows {
        let other = find(a, &row.id).map(|place| &a.rows[place]).filter(|other| other.unit == row.unit);
        let added = |side: &Side| own(row, *side).is_some() && other.and_then(|other| own(other, *side)).is_none();
        new.extend(Side::ALL.into_iter().filter(added).map(|side| (row.id.clone(), side)));
    }
    Comparison { figures, gone, new }
}

/// A side's own measurement, not one that it shares.
fn own(row: &Row, side: Side) -> Option<&Measured> {
    match row.cells.get(&side)? {
        crate::model::Cell::Measured(measured) => Some(measured),
        _ => None,
    }
}

fn figure<'a>(row: &'a Row, side: Side, before: &Measured, after: &Measured) -> Compared<'a> {
    let ratio = after.median / before.median;
    let cost = if row.unit.lower_is_better() { ratio } else { 1.0 / ratio };
    let noise = 1.0 + (spread(before) + spread(after)).max(FLOOR);
    let verdict = match cost {
        c if c > noise => Verdict::Slower,
        c if c < 1.0 / noise => Verdict::Faster,
        _ => Verdict::Same,
    };
    let counted = before.exact && after.exact;
    let counters = if counted { different(before, after) } else { Vec::new() };
    let (before, after) = (before.median, after.median);
    Compared { row, side, before, after, cost, noise, verdict, counters, counted }
}

/// The middle half of the rounds (the interquartile range) as a part of the median; of three rounds, all of them.
fn spread(measured: &Measured) -> f64 {
    let mut sorted = measured.samples.clone();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0..=2 => UNKNOWN,
        n => {
            // Of n rounds, a quarter is left out at each end.
            let cut = n / 4;
            (sorted[n - 1 - cut] - sorted[cut]) / measured.median
        }
    }
}

/// Exits and counters that are not equal.
fn different(before: &Measured, after: &Measured) -> Vec<(String, f64, f64)> {
    let mut list = Vec::new();
    let mut add = |name: &str, before: f64, after: f64| {
        if (before - after).abs() > ROUNDING * before.abs().max(after.abs()).max(1.0) {
            list.push((name.to_owned(), before, after));
        }
    };
    if let (Some(before), Some(after)) = (before.exits, after.exits) {
        add("exits", before, after);
    }
    let mut names: Vec<_> = before.counters.keys().chain(after.counters.keys()).collect();
    names.sort();
    names.dedup();
    for name in names.into_iter().filter(|name| exact::counted(name) && !exact::interruptible(name)) {
        let of = |measured: &Measured| measured.counters.get(name).copied().unwrap_or(0.0);
        add(name, of(before), of(after));
    }
    list
}

impl Comparison<'_> {
    /// Whether nothing became slower and all exact counters are equal.
    pub fn good(&self) -> bool {
        self.figures.iter().all(|figure| figure.verdict != Verdict::Slower && figure.counters.is_empty())
    }

    /// How many figures have medians within `part` of each other, such as 0.1 for 10 %.
    pub fn within(&self, part: f64) -> usize {
        self.figures.iter().filter(|figure| (figure.after / figure.before - 1.0).abs() <= part).count()
    }

    /// The sentence at the end.
    pub fn summary(&self) -> String {
        let total = self.figures.len();
        if total == 0 {
            return "The reports have no figure in common.".into();
        }
        let count = |verdict| self.figures.iter().filter(|figure| figure.verdict == verdict).count();
        let differing = self.figures.iter().filter(|figure| !figure.counters.is_empty()).count();
        let counted = self.figures.iter().filter(|figure| figure.counted).count();
        let counters = match (counted, differing) {
            (0, _) => "no exact counters are common to both".to_owned(),
            (_, 0) => format!("all exact counters are equal ({counted} figures have some)"),
            (_, n) => format!("exact counters differ in {n} of {counted} figures"),
        };
        let within = self.within(0.1);
        format!(
            "Of {total} figures {} are the same, {} faster and {} slower; {within} ({:.0} %) have medians within 10 %; {counters}.",
            count(Verdict::Same),
            count(Verdict::Faster),
            count(Verdict::Slower),
            100.0 * within as f64 / total as f64,
        )
    }

    /// A line per figure, what has no counterpart, and the summary.
    pub fn text(&self) -> String {
        let words = |figure: &Compared| match figure.verdict {
            Verdict::Same => "same".to_owned(),
            Verdict::Slower => format!("slower by {:.0} %", 100.0 * (figure.cost - 1.0)),
            Verdict::Faster => format!("faster by {:.0} %", 100.0 * (1.0 / figure.cost - 1.0)),
        };
        let mut lines =
            vec![["row", "side", "first", "second", "cost", "noise", "verdict"].map(str::to_owned).to_vec()];
        for figure in &self.figures {
            let unit = figure.row.unit;
            let mut verdict = words(figure);
            for (name, before, after) in &figure.counters {
                let _ = write!(verdict, "; {name} {} -> {}", counter(*before), counter(*after));
            }
            lines.push(vec![
                figure.row.id.clone(),
                figure.side.to_string(),
                table::figure(figure.before, unit),
                table::figure(figure.after, unit),
                format!("{:.3}", figure.cost),
                format!("{:.0} %", 100.0 * (figure.noise - 1.0)),
                verdict,
            ]);
        }
        let mut out = table::aligned(&lines, &[0, 1, 6]);
        for (list, which) in [(&self.gone, "first"), (&self.new, "second")] {
            if !list.is_empty() {
                let names: Vec<_> = list.iter().map(|(id, side)| format!("{id} on {side}")).collect();
                let _ = writeln!(out, "\nOnly in the {which} report: {}.", names.join(", "));
            }
        }
        let _ = writeln!(out, "\n{}", self.summary());
        out
    }
}

/// A counter with as many digits as tell two apart.
fn counter(value: f64) -> String {
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Cell, Unit};
    use crate::testing;

    fn with(samples: [&[f64]; 2], unit: Unit) -> (Report, Report) {
        let mut reports = samples.map(|samples| {
            let mut report = testing::report();
            report.rows.truncate(1);
            report.rows[0].unit = unit;
            let measured = Measured::new(samples.to_vec()).expect("numbers");
            report.rows[0].cells = [(Side::BtStock, Cell::Measured(measured))].into();
            report
        });
        let second = std::mem::replace(&mut reports[1], testing::report());
        let [first, _] = reports;
        (first, second)
    }

    fn verdict(before: &[f64], after: &[f64], unit: Unit) -> Verdict {
        let (a, b) = with([before, after], unit);
        compare(&a, &b).figures[0].verdict
    }

    #[test]
    fn a_report_is_the_same_as_itself() {
        let report = testing::report();
        let comparison = compare(&report, &report);
        assert!(comparison.good() && comparison.gone.is_empty() && comparison.new.is_empty());
        assert!(comparison.figures.len() > 5);
        assert_eq!(comparison.within(0.0), comparison.figures.len());
        assert!(comparison.summary().contains("0 faster and 0 slower"), "{}", comparison.summary());
    }

    #[test]
    fn differences_count_beyond_the_noise_only() {
        let quiet: &[f64] = &[100.0, 101.0, 99.0, 100.0, 100.0];
        let ns = Unit::Nanoseconds;
        assert_eq!(verdict(quiet, &[103.0, 104.0, 104.0, 104.0, 105.0], ns), Verdict::Same, "within the floor");
        assert_eq!(verdict(quiet, &[119.0, 120.0, 120.0, 120.0, 121.0], ns), Verdict::Slower);
        assert_eq!(verdict(quiet, &[79.0, 80.0, 80.0, 80.0, 81.0], ns), Verdict::Faster);
        assert_eq!(verdict(quiet, &[100.0, 150.0, 120.0, 90.0, 140.0], ns), Verdict::Same, "as noisy as different");
        assert_eq!(verdict(&[100.0], &[120.0], ns), Verdict::Same, "one round has no spread");
        assert_eq!(verdict(&[100.0], &[150.0], ns), Verdict::Slower);
        assert_eq!(verdict(quiet, &[119.0, 120.0, 120.0, 120.0, 121.0], Unit::MegabytesPerSecond), Verdict::Faster);
        // One round that was disturbed does not hide a difference.
        assert_eq!(verdict(quiet, &[120.0, 120.0, 121.0, 120.0, 900.0], ns), Verdict::Slower);
    }

    #[test]
    fn unequal_exact_counters_are_named_and_inexact_ones_are_not() {
        let (a, mut b) = with([&[1.0], &[1.0]], Unit::Nanoseconds);
        let mut a = a;
        let set = |report: &mut Report, exits: f64, reads: f64, exact: bool| {
            let Some(Cell::Measured(measured)) = report.rows[0].cells.get_mut(&Side::BtStock) else {
                panic!("a measurement")
            };
            measured.exits = Some(exits);
            measured.counters = [("port reads".to_owned(), reads)].into();
            measured.exact = exact;
        };
        set(&mut a, 2.0, 1.0, true);
        set(&mut b, 2.0, 1.25, true);
        let comparison = compare(&a, &b);
        assert_eq!(comparison.figures[0].counters, [("port reads".to_owned(), 1.0, 1.25)]);
        assert!(!comparison.good());
        assert!(comparison.text().contains("port reads 1 -> 1.25"), "{}", comparison.text());
        set(&mut b, 2.0, 1.25, false);
        assert!(compare(&a, &b).good());
        // One block more in thousands of operations.
        set(&mut b, 2.0, 1.0, true);
        let Some(Cell::Measured(measured)) = b.rows[0].cells.get_mut(&Side::BtStock) else { panic!("a measurement") };
        measured.counters.insert("blocks translated".to_owned(), 0.001);
        assert!(compare(&a, &b).good());
    }

    #[test]
    fn figures_without_a_counterpart_are_listed() {
        let (a, _) = with([&[1.0], &[1.0]], Unit::Nanoseconds);
        let mut b = a.clone();
        let cell = b.rows[0].cells.remove(&Side::BtStock).expect("the cell");
        b.rows[0].cells.insert(Side::Host, cell);
        let comparison = compare(&a, &b);
        assert_eq!(comparison.gone, [(a.rows[0].id.clone(), Side::BtStock)]);
        assert_eq!(comparison.new, [(a.rows[0].id.clone(), Side::Host)]);
        assert_eq!(comparison.summary(), "The reports have no figure in common.");
    }
}
