//! A report as text for a terminal: one table per group.

use crate::model::{Cell, Group, Measured, Report, Row, Side, Unit};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A figure with three significant digits and a unit that suits its size.
pub fn figure(value: f64, unit: Unit) -> String {
    let digits = |value: f64, unit: &str| match value {
        v if v < 10.0 => format!("{v:.2} {unit}"),
        v if v < 100.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    };
    let ns = match unit {
        Unit::MegabytesPerSecond => return digits(value, "MB/s"),
        Unit::Nanoseconds => value,
        Unit::Seconds => value * 1e9,
    };
    // The bounds lie where the digits would round up to four.
    match ns {
        ns if ns < 999.5 => digits(ns, "ns"),
        ns if ns < 999.5e3 => digits(ns / 1e3, "µs"),
        ns if ns < 999.5e6 => digits(ns / 1e6, "ms"),
        ns => digits(ns / 1e9, "s"),
    }
}

/// A number of events per operation, short: whole where it is whole.
pub fn count(value: f64) -> String {
    match value {
        v if v.abs() < 0.005 => "0".into(),
        v if (v - v.round()).abs() < 0.005 => format!("{v:.0}"),
        v if v < 10.0 => format!("{v:.2}"),
        v => format!("{v:.1}"),
    }
}

/// A factor, such as `12.3x`.
pub fn factor(value: f64) -> String {
    match value {
        v if v < 0.0995 => format!("{v:.3}x"),
        v if v < 9.95 => format!("{v:.2}x"),
        v if v < 99.5 => format!("{v:.1}x"),
        v => format!("{v:.0}x"),
    }
}

/// By how much more a side costs than the host: time over time, or for a throughput the host's over the side's. `None`
/// where one of them was not measured.
pub fn cost(row: &Row, side: Side) -> Option<f64> {
    let (host, value) = (row.measured(Side::Host)?.median, row.measured(side)?.median);
    Some(if row.unit.lower_is_better() { value / host } else { host / value })
}

/// How far the samples spread around the median: half the distance between the ends, as a part of the median.
pub fn spread(measured: &Measured) -> f64 {
    (measured.max - measured.min) / (2.0 * measured.median)
}

/// All groups, each a table of medians and costs relative to the host; below it, why cells are empty.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    for group in Group::ALL {
        let rows: Vec<_> = report.rows.iter().filter(|row| row.group == group).collect();
        if !rows.is_empty() {
            of_group(&mut out, group, &rows, &report.plan.sides);
        }
    }
    out
}

fn of_group(out: &mut String, group: Group, rows: &[&Row], sides: &[Side]) {
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut cells = vec![std::iter::once(group.title().to_owned()).chain(sides.iter().map(Side::to_string)).collect()];
    for row in rows {
        let mut line = vec![row.title.clone()];
        for side in sides {
            line.push(match row.cells.get(side) {
                Some(Cell::Measured(measured)) => of_cell(row, *side, measured),
                Some(Cell::SameAs { side }) => format!("= {side}"),
                Some(Cell::Missing { reason }) => {
                    reasons.entry(reason).or_default().push(format!("{} on {side}", row.id));
                    "-".into()
                }
                None => "-".into(),
            });
        }
        cells.push(line);
    }
    out.push_str(&aligned(&cells, &[0]));
    for (reason, whose) in reasons {
        let whose = if whose.len() > 3 {
            format!("{} and {} more", whose[..2].join(", "), whose.len() - 2)
        } else {
            whose.join(", ")
        };
        let _ = writeln!(out, "  - {whose}: {reason}");
    }
    out.push('\n');
}

/// The median, its cost relative to the host, and the exits.
fn of_cell(row: &Row, side: Side, measured: &Measured) -> String {
    let mut text = figure(measured.median, row.unit);
    if let Some(cost) = cost(row, side).filter(|_| side != Side::Host) {
        let _ = write!(text, " {:>6}", factor(cost));
    }
    if let Some(exits) = measured.exits {
        let _ = write!(text, " {}{}e", if measured.exact { "" } else { "~" }, count(exits));
    }
    text
}

/// Columns as wide as their widest cell, those in `left` flush left, and a line below the first line, which is the head.
pub(crate) fn aligned(lines: &[Vec<String>], left: &[usize]) -> String {
    let mut out = String::new();
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for (number, line) in lines.iter().enumerate() {
        let mut text = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let _ = match left.contains(&column) {
                true => write!(text, "{gap}{cell:<width$}"),
                false => write!(text, "{gap}{cell:>width$}"),
            };
        }
        let _ = writeln!(out, "{}", text.trim_end());
        if number == 0 {
            let _ = writeln!(out, "{}", "-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn figures_have_three_digits_and_a_unit_that_suits() {
        let ns = |value| figure(value, Unit::Nanoseconds);
        assert_eq!(
            [0.871, 24.25, 999.4, 999.6, 51_600.0].map(ns),
            ["0.87 ns", "24.2 ns", "999 ns", "1.00 µs", "51.6 µs"]
        );
        assert_eq!([0.0612, 1.9, 612.0].map(|s| figure(s, Unit::Seconds)), ["61.2 ms", "1.90 s", "612 s"]);
        assert_eq!(figure(1350.4, Unit::MegabytesPerSecond), "1350 MB/s");
        assert_eq!([0.0001, 1.0, 1.02, 4096.0, 12.34].map(count), ["0", "1", "1.02", "4096", "12.3"]);
        assert_eq!([0.0312, 0.3, 3.139, 12.34, 512.3].map(factor), ["0.031x", "0.30x", "3.14x", "12.3x", "512x"]);
    }

    #[test]
    fn costs_are_more_than_one_where_a_side_is_worse() {
        let report = testing::report();
        let row = |id: &str| report.rows.iter().find(|row| row.id == id).expect(id);
        assert!((cost(row("disk-read"), Side::BtPv).expect("both") - 4100.0 / 1350.0).abs() < 1e-9, "throughput");
        assert!((cost(row("call-ret"), Side::TcgStock).expect("both") - 9.1 / 0.87).abs() < 1e-9, "time");
        assert_eq!(cost(row("in"), Side::BtStock), None, "no host");
    }

    #[test]
    fn the_table_has_every_row_once_and_every_reason() {
        let report = testing::report();
        let text = text(&report);
        for row in &report.rows {
            assert_eq!(text.lines().filter(|line| line.starts_with(&row.title)).count(), 1, "{}: {text}", row.id);
        }
        let line = text.lines().find(|line| line.starts_with("IN from")).expect("the row");
        assert!(line.contains("702 ns") && line.contains("1e") && line.contains("~1.02e"), "{line}");
        assert!(text.contains("in on host: a process may not execute IN"), "{text}");
        assert!(text.contains("= bt-stock"), "{text}");
    }
}
