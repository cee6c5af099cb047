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
    align(out, &cells);
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

/// Columns as wide as their widest cell, the first flush left.
fn align(out: &mut String, lines: &[Vec<String>]) {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for (number, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ = if column == 0 { write!(out, "{cell:<width$}") } else { write!(out, "  {cell:>width$}") };
        }
        out.push('\n');
        if number == 0 {
            let _ = writeln!(out, "{}", "-".repeat(widths.iter().sum::<usize>() + 2 * (columns - 1)));
        }
    }
}
