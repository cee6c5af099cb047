//! What the compute benchmark runs and what comes back: groups, rows, and the measurements of each side.
//!
//! The programs (tests/bench) print a line per row: name, nanoseconds, checksum. A guest prints the same lines between
//! markers on its console (guest/bench.sh). Here they are read and collected; a side that computed something else, left
//! a row out or ended early is a complaint, and complaints fail the benchmark.

use std::collections::BTreeMap;

use crate::row_counters::Counters;
pub(crate) use paravane_bench::linux::console::{Console, Group, Measurement};

/// Where the set runs. The order is that of the columns and of the runs within a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    /// This machine, directly.
    Host,
    /// A guest under Paravane's binary translation.
    Bt,
    /// A guest under QEMU's emulator.
    Tcg,
}

impl Side {
    /// All sides in order.
    pub(crate) const ALL: [Self; 3] = [Self::Host, Self::Bt, Self::Tcg];

    /// The name in messages and in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Bt => "bt",
            Self::Tcg => "tcg",
        }
    }
}

/// A row with everything measured for it.
#[derive(Debug)]
pub(crate) struct Row {
    /// Its group.
    pub(crate) group: Group,
    /// Its name.
    pub(crate) name: String,
    /// Nanoseconds of each round, by side.
    pub(crate) times: BTreeMap<Side, Vec<f64>>,
    /// What Paravane's translator did in each round, where it is known.
    pub(crate) counters: Vec<Counters>,
    /// The first checksum seen and the side it came from.
    pub(crate) checksum: Option<(Side, String)>,
}

impl Row {
    /// The median of a side's rounds in nanoseconds, if it has any.
    pub(crate) fn median(&self, side: Side) -> Option<f64> {
        median(self.times.get(&side)?)
    }
}

/// All rows and all complaints.
#[derive(Debug, Default)]
pub(crate) struct Results {
    /// The rows in the programs' order.
    pub(crate) rows: Vec<Row>,
    /// Sentences about what went wrong.
    pub(crate) complaints: Vec<String>,
}

impl Results {
    /// Empty results for the rows that `list` (the output of `bench list`) names and `wanted` accepts.
    pub(crate) fn new(list: &str, wanted: impl Fn(Group, &str) -> bool) -> Self {
        let rows = list
            .lines()
            .filter_map(|line| {
                let (group, name) = line.split_once('\t')?;
                Group::from_name(group).map(|group| (group, name.to_owned()))
            })
            .filter(|(group, name)| wanted(*group, name))
            .map(|(group, name)| Row { group, name, times: BTreeMap::new(), counters: Vec::new(), checksum: None })
            .collect();
        Self { rows, complaints: Vec::new() }
    }

    /// Adds what was counted in one run.
    pub(crate) fn count(&mut self, rows: Vec<(Group, String, Counters)>) {
        for (group, name, counters) in rows {
            if let Some(row) = self.rows.iter_mut().find(|row| row.group == group && row.name == name) {
                row.counters.push(counters);
            }
        }
    }

    /// Adds one run of a side.
    pub(crate) fn add(&mut self, side: Side, rows: Vec<(Group, Measurement)>) {
        let mut missing: Vec<_> = self.rows.iter().map(|row| row.name.clone()).collect();
        for (group, measured) in rows {
            let Some(row) = self.rows.iter_mut().find(|row| row.group == group && row.name == measured.name) else {
                self.complaints.push(format!("{} printed an unknown row {}", side.name(), measured.name));
                continue;
            };
            missing.retain(|name| *name != row.name);
            row.times.entry(side).or_default().push(measured.nanoseconds);
            let (first, checksum) = row.checksum.get_or_insert_with(|| (side, measured.checksum.clone()));
            if *checksum != measured.checksum {
                self.complaints.push(format!(
                    "{} computed {} in {}, {} computed {checksum}",
                    side.name(),
                    measured.checksum,
                    row.name,
                    first.name()
                ));
            }
        }
        if !missing.is_empty() {
            self.complaints.push(format!("{} printed no result for {}", side.name(), missing.join(", ")));
        }
    }
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[middle - 1], upper) })
}

/// The geometric mean; `None` of nothing.
pub(crate) fn geometric_mean(values: &[f64]) -> Option<f64> {
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    (!values.is_empty()).then(|| (sum / values.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &str, nanoseconds: f64, checksum: &str) -> Measurement {
        Measurement { name: name.into(), nanoseconds, checksum: checksum.into() }
    }

    const SUM: &str = "00000000000000aa";

    #[test]
    fn differing_missing_and_unknown_rows_are_complaints() {
        let list = "kernels\ta\nkernels\tb\nos\tc\n";
        let mut results = Results::new(list, |group, _| group == Group::Kernels);
        results.add(
            Side::Host,
            vec![(Group::Kernels, measured("a", 1.0, SUM)), (Group::Kernels, measured("b", 2.0, SUM))],
        );
        assert!(results.complaints.is_empty());
        results.add(
            Side::Bt,
            vec![(Group::Kernels, measured("a", 3.0, "00000000000000bb")), (Group::Os, measured("c", 1.0, SUM))],
        );
        assert_eq!(
            results.complaints,
            [
                "bt computed 00000000000000bb in a, host computed 00000000000000aa",
                "bt printed an unknown row c",
                "bt printed no result for b"
            ]
        );
        assert_eq!(results.rows[0].median(Side::Bt), Some(3.0));
        assert_eq!(results.rows[1].median(Side::Bt), None);
    }

    #[test]
    fn means_and_medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(geometric_mean(&[]), None);
        assert!((geometric_mean(&[1.0, 4.0, 16.0]).expect("a mean") - 4.0).abs() < 1e-12);
    }
}
