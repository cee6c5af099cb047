//! The compute benchmark's results as a table for people and as JSON for programs.
//!
//! Both hold the medians over the rounds, their ratios, and per group the geometric means of the ratios. A geometric
//! mean, because a ratio and its inverse must weigh the same. Only rows that all compared sides have enter a mean.

use crate::compute_set::{Group, Results, Row, Side, geometric_mean, median};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

/// The compared pairs: numerator and denominator.
const RATIOS: [(Side, Side); 3] = [(Side::Bt, Side::Host), (Side::Tcg, Side::Host), (Side::Tcg, Side::Bt)];

/// One of [`RATIOS`] for a row, if it has both sides.
fn ratio(row: &Row, (above, below): (Side, Side)) -> Option<f64> {
    Some(row.median(above)? / row.median(below)?)
}

/// The geometric mean of one of [`RATIOS`] over a group, and how many rows are in it.
fn mean(results: &Results, group: Group, pair: (Side, Side)) -> (Option<f64>, usize) {
    let values: Vec<_> =
        results.rows.iter().filter(|row| row.group == group).filter_map(|row| ratio(row, pair)).collect();
    (geometric_mean(&values), values.len())
}

/// Groups that have rows.
fn groups(results: &Results) -> impl Iterator<Item = Group> {
    Group::COMPUTE.into_iter().filter(|group| results.rows.iter().any(|row| row.group == *group))
}

/// A time with three significant digits or more and a unit.
fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 1e3 => format!("{ns:.1} ns"),
        ns if ns < 1e6 => format!("{:.2} us", ns / 1e3),
        ns if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}

/// The table.
pub(crate) fn text(results: &Results) -> String {
    let mut text = String::new();
    let cell = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let factor = |value: Option<f64>| cell(value.map(|value| format!("{value:.2}")));
    for group in groups(results) {
        let _ = writeln!(
            text,
            "{:20}{:>12}{:>12}{:>12}{:>10}{:>10}{:>10}",
            group.name(),
            "host",
            "bt",
            "tcg",
            "bt/host",
            "tcg/host",
            "tcg/bt"
        );
        for row in results.rows.iter().filter(|row| row.group == group) {
            let _ = write!(text, "{:20}", row.name);
            for side in Side::ALL {
                let _ = write!(text, "{:>12}", cell(row.median(side).map(time)));
            }
            for pair in RATIOS {
                let _ = write!(text, "{:>10}", factor(ratio(row, pair)));
            }
            text.push('\n');
        }
        let _ = write!(text, "{:56}", "geometric mean");
        for pair in RATIOS {
            let _ = write!(text, "{:>10}", factor(mean(results, group, pair).0));
        }
        text.push_str("\n\n");
        text.push_str(&counted(results, group));
    }
    text
}

/// Counters that tell of calls from translated code into Rust.
const CALLOUTS: [&str; 4] = ["chain callouts", "indirect jump misses", "instructions emulated", "accesses bounced"];

/// What the translator did in each row of a group, medians over the rounds; nothing if nothing is known.
fn counted(results: &Results, group: Group) -> String {
    let rows = results.rows.iter().filter(|row| row.group == group && !row.counters.is_empty());
    let mut text = String::new();
    for row in rows {
        let sum = |names: &[&str]| {
            let rounds = row.counters.iter();
            let values: Vec<f64> = rounds
                .map(|c| names.iter().map(|name| c.get(*name).copied().unwrap_or(0)).sum::<u64>() as f64)
                .collect();
            median(&values).unwrap_or(0.0)
        };
        if text.is_empty() {
            let _ = writeln!(
                text,
                "{:20}{:>12}{:>12}{:>12}{:>12}{:>12}{:>10}",
                "bt, whole rows", "callouts", "emulated", "TLB misses", "interrupts", "translated", "chained"
            );
        }
        // Of the ways out of blocks that came to Rust, those that never will again.
        let (links, misses) = (sum(&["exits chained"]), sum(&["indirect jump misses"]));
        let chained =
            if links + misses > 0.0 { format!("{:.0} %", 100.0 * links / (links + misses)) } else { "-".into() };
        let _ = writeln!(
            text,
            "{:20}{:>12}{:>12}{:>12}{:>12}{:>12}{:>10}",
            row.name,
            sum(&CALLOUTS),
            sum(&["instructions emulated"]),
            sum(&["TLB misses"]),
            sum(&["interrupts delivered"]),
            sum(&["blocks translated"]),
            chained
        );
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

/// The JSON document; `host` describes the machine and `run` the options.
pub(crate) fn json(results: &Results, host: Value, run: Value) -> Value {
    let pair_name = |(above, below): (Side, Side)| format!("{}/{}", above.name(), below.name());
    let rows: Vec<_> = results
        .rows
        .iter()
        .map(|row| {
            let mut sides = Map::new();
            for (side, times) in &row.times {
                sides.insert(side.name().into(), json!({ "median_ns": row.median(*side), "rounds_ns": times }));
            }
            let ratios: Map<_, _> = RATIOS.into_iter().map(|pair| (pair_name(pair), json!(ratio(row, pair)))).collect();
            json!({
                "group": row.group.name(),
                "name": row.name,
                "checksum": row.checksum.as_ref().map(|(_, sum)| sum),
                "sides": sides,
                "ratios": ratios,
                "counters": row.counters,
            })
        })
        .collect();
    let means: Map<_, _> = groups(results)
        .map(|group| {
            let of_group: Map<_, _> = RATIOS
                .into_iter()
                .map(|pair| {
                    let (value, rows) = mean(results, group, pair);
                    (pair_name(pair), json!({ "geometric_mean": value, "rows": rows }))
                })
                .collect();
            (group.name().to_owned(), Value::Object(of_group))
        })
        .collect();
    json!({ "host": host, "run": run, "rows": rows, "means": means, "complaints": results.complaints })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute_set::Measurement;

    fn results() -> Results {
        let mut results = Results::new("os\ta\nos\tb\n", |_, _| true);
        let row = |name: &str, nanoseconds| {
            (Group::Os, Measurement { name: name.into(), nanoseconds, checksum: "0123456789abcdef".into() })
        };
        results.add(Side::Host, vec![row("a", 100.0), row("b", 1500.0)]);
        results.add(Side::Bt, vec![row("a", 200.0), row("b", 12000.0)]);
        results
    }

    #[test]
    fn the_table_has_rows_means_and_gaps() {
        let text = text(&results());
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["os", "host", "bt", "tcg", "bt/host", "tcg/host", "tcg/bt"]);
        assert_eq!(lines[1], ["a", "100.0", "ns", "200.0", "ns", "-", "2.00", "-", "-"]);
        assert_eq!(lines[2], ["b", "1.50", "us", "12.00", "us", "-", "8.00", "-", "-"]);
        assert_eq!(lines[3], ["geometric", "mean", "4.00", "-", "-"]);
        let widths: Vec<_> = text.lines().filter(|line| !line.is_empty()).map(str::len).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{widths:?}");
    }

    #[test]
    fn what_the_translator_did_is_beneath_each_group() {
        let mut results = results();
        assert!(!text(&results).contains("chained"), "nothing was counted");
        let counters = |links, misses| {
            let named = [("exits chained", links), ("indirect jump misses", misses), ("instructions emulated", 5)];
            named.into_iter().map(|(name, n)| (name.to_owned(), n)).collect()
        };
        results.count(vec![(Group::Os, "b".into(), counters(90, 10)), (Group::Os, "nobody".into(), counters(1, 1))]);
        results.count(vec![(Group::Os, "b".into(), counters(70, 30))]);
        let text = text(&results);
        let line = text.trim_end().lines().last().expect("a line");
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["b", "25", "5", "0", "0", "0", "80", "%"]);
        let json = json(&results, json!({}), json!({}));
        assert_eq!(json["rows"][1]["counters"][1]["exits chained"], 70);
        assert_eq!(json["rows"][0]["counters"], json!([]));
    }

    #[test]
    fn json_holds_rounds_medians_and_means() {
        let value = json(&results(), json!({}), json!({ "runs": 1 }));
        assert_eq!(value["rows"][1]["sides"]["bt"]["median_ns"], 12000.0);
        assert_eq!(value["rows"][0]["sides"]["host"]["rounds_ns"], json!([100.0]));
        assert_eq!(value["rows"][0]["ratios"]["bt/host"], 2.0);
        assert_eq!(value["rows"][0]["ratios"]["tcg/bt"], Value::Null);
        assert_eq!(value["means"]["os"]["bt/host"]["rows"], 2);
        assert!((value["means"]["os"]["bt/host"]["geometric_mean"].as_f64().expect("a number") - 4.0).abs() < 1e-9);
    }
}
