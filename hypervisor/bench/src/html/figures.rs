//! The tables: a summary of means, and every figure.

use super::{chart, escape};
use crate::model::{Cell, Group, Report, Row, Side};
use crate::table;
use std::fmt::Write as _;

/// Means per group: cost relative to native, and what the paravirtual form saves on each engine.
pub(super) fn summary(out: &mut String, report: &Report, groups: &[Group]) {
    out.push_str("<section id=\"summary\" aria-labelledby=\"summary-title\">\n<h2 id=\"summary-title\">Summary</h2>\n");
    out.push_str("<p>Geometric means of the costs relative to native over the rows of a group that both sides have; in brackets, how many.</p>\n");
    let sides: Vec<_> = report.plan.sides.iter().copied().filter(|side| *side != Side::Host).collect();
    let heads: Vec<_> = sides.iter().map(|side| chart::short(*side)).collect();
    let lines = groups.iter().map(|group| {
        let of_group = || report.rows.iter().filter(|row| row.group == *group);
        let cells = sides.iter().map(|side| mean(of_group().filter_map(|row| table::cost(row, *side))));
        (group.title().to_owned(), cells.collect())
    });
    plain(out, "Mean cost relative to native, by group", "Group", &heads, lines.collect());
    out.push_str("<p>What the paravirtual form saves, as stock over paravirtual: 2x is half the cost. Only rows that have a form of their own count.</p>\n");
    let engines = [("BT", Side::BtStock, Side::BtPv), ("KVM", Side::KvmStock, Side::KvmPv)];
    let heads: Vec<_> = engines.iter().map(|engine| engine.0).collect();
    let lines = groups.iter().map(|group| {
        let of_group = || report.rows.iter().filter(|row| row.group == *group);
        let cells = engines.iter().map(|(_, stock, pv)| mean(of_group().filter_map(|row| saving(row, *stock, *pv))));
        (group.title().to_owned(), cells.collect())
    });
    plain(out, "What the paravirtual form saves, by group", "Group", &heads, lines.collect());
    out.push_str("</section>\n");
}

/// How many times dearer the stock form is.
fn saving(row: &Row, stock: Side, pv: Side) -> Option<f64> {
    let Some(Cell::Measured(pv)) = row.cells.get(&pv) else { return None };
    let stock = row.measured(stock)?;
    Some(if row.unit.lower_is_better() { stock.median / pv.median } else { pv.median / stock.median })
}

/// The geometric mean, in which a factor and its inverse weigh the same, and how many values it is of.
fn mean(values: impl Iterator<Item = f64>) -> String {
    let logarithms: Vec<_> = values.map(f64::ln).collect();
    if logarithms.is_empty() {
        return "–".into();
    }
    let count = logarithms.len();
    format!("{} ({count})", table::factor((logarithms.iter().sum::<f64>() / count as f64).exp()))
}

/// A table of texts.
fn plain(out: &mut String, caption: &str, corner: &str, heads: &[&str], lines: Vec<(String, Vec<String>)>) {
    head(out, caption, corner, heads);
    for (title, cells) in lines {
        let _ = write!(out, "<tr role=\"row\"><th scope=\"row\" role=\"rowheader\">{}</th>", escape(&title));
        for (cell, head) in cells.iter().zip(heads) {
            let _ = write!(out, "<td role=\"cell\" data-head=\"{}\"><span>{}</span></td>", escape(head), escape(cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table>\n");
}

/// The roles say again what the elements say, because a browser forgets that when the style sheet stacks the cells on a
/// narrow screen.
fn head(out: &mut String, caption: &str, corner: &str, heads: &[&str]) {
    let _ = write!(
        out,
        "<table role=\"table\">\n<caption>{}</caption>\n<thead role=\"rowgroup\"><tr role=\"row\">",
        escape(caption)
    );
    for head in std::iter::once(&corner).chain(heads) {
        let _ = write!(out, "<th scope=\"col\" role=\"columnheader\">{}</th>", escape(head));
    }
    out.push_str("</tr></thead>\n<tbody role=\"rowgroup\">\n");
}

/// All figures of a group.
pub(super) fn table(out: &mut String, group: Group, report: &Report) {
    let rows: Vec<_> = report.rows.iter().filter(|row| row.group == group).collect();
    // What no row has needs no column, only a word.
    let absent = chart::missing_everywhere(&rows, &report.plan.sides);
    let sides: Vec<_> = report.plan.sides.iter().copied().filter(|side| !absent.contains_key(side)).collect();
    let heads: Vec<_> = sides.iter().map(|side| chart::short(*side)).collect();
    head(out, group.title(), "Operation", &heads);
    for row in rows {
        let _ = write!(
            out,
            "<tr role=\"row\" id=\"figures-{}\"><th scope=\"row\" role=\"rowheader\">{}</th>",
            escape(&row.id),
            escape(&row.title)
        );
        for (side, head) in sides.iter().zip(&heads) {
            let _ = write!(out, "<td role=\"cell\" data-head=\"{}\">", escape(head));
            cell(out, row, *side);
            out.push_str("</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table>\n");
    chart::absent(out, &absent);
}

fn cell(out: &mut String, row: &Row, side: Side) {
    match row.cells.get(&side) {
        Some(Cell::Measured(measured)) => {
            let figure = |value| escape(&table::figure(value, row.unit));
            let _ = write!(out, "<span>{}</span>", figure(measured.median));
            if measured.samples.len() > 1 {
                let _ = write!(out, "<small>{} to {}</small>", figure(measured.min), figure(measured.max));
            }
            if measured.exits.is_some() {
                let _ = write!(out, "<small>{}</small>", escape(&chart::exits(measured)));
            }
            let mut parts = Vec::new();
            for (name, value) in measured.counters.iter().filter(|(_, value)| value.abs() >= 0.005) {
                parts.push(format!("{name} {}", table::count(*value)));
            }
            if !parts.is_empty() {
                let _ = write!(out, "<small class=\"counters\">{}</small>", escape(&parts.join(", ")));
            }
        }
        Some(Cell::SameAs { side }) => {
            let _ = write!(out, "<small>as {}</small>", escape(chart::short(*side)));
        }
        Some(Cell::Missing { reason }) => {
            let _ = write!(out, "<small>{}</small>", escape(reason));
        }
        None => out.push_str("<small>not measured</small>"),
    }
}
