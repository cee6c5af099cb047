//! The charts: per group a section, per row a figure, per side a line.

use super::escape;
use super::scale::{self, Axis};
use crate::model::{Cell, Group, Measured, Report, Row, Side, Unit};
use crate::table;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Where an axis that shows figures begins at the latest, as a part of the least of them.
const SHORTEST: f64 = 0.5;

/// A group's section.
pub(super) fn group(out: &mut String, group: Group, report: &Report) {
    let rows: Vec<_> = report.rows.iter().filter(|row| row.group == group).collect();
    let name = group.name();
    let _ = write!(
        out,
        "<section id=\"{name}\" class=\"group\" aria-labelledby=\"{name}-title\">\n<h2 id=\"{name}-title\">{}</h2>\n<p>{}</p>\n",
        escape(group.title()),
        escape(group.about())
    );
    let everywhere = missing_everywhere(&rows, &report.plan.sides);
    absent(out, &everywhere);
    let sides: Vec<_> = report.plan.sides.iter().copied().filter(|side| !everywhere.contains_key(side)).collect();
    let (relative, absolute): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.measured(Side::Host).is_some());
    let both = !relative.is_empty() && !absolute.is_empty();
    charts(out, group, &relative, &sides, both.then_some("Relative to native"), None);
    // Figures of another unit need an axis of their own.
    for unit in [Unit::Nanoseconds, Unit::Seconds, Unit::MegabytesPerSecond] {
        let of_unit: Vec<_> = absolute.iter().copied().filter(|row| row.unit == unit).collect();
        let title = match unit {
            Unit::MegabytesPerSecond => "Throughput, where the host has no form of it",
            _ => "Time, where the host has no form of it",
        };
        charts(out, group, &of_unit, &sides, Some(title), Some(unit));
    }
    out.push_str("</section>\n");
}

/// Says which sides are left out of what stands here.
pub(super) fn absent(out: &mut String, sides: &BTreeMap<Side, &str>) {
    if !sides.is_empty() {
        out.push_str("<ul class=\"missing\">\n");
        for (side, reason) in sides {
            let _ = writeln!(out, "<li>{} is not among them: {}.</li>", escape(side.title()), escape(reason));
        }
        out.push_str("</ul>\n");
    }
}

/// Sides that no row of a group has, with the reason if it is the same for all.
pub(super) fn missing_everywhere<'a>(rows: &[&'a Row], sides: &[Side]) -> BTreeMap<Side, &'a str> {
    let reason = |side: &Side| {
        let mut reasons = rows.iter().map(|row| match row.cells.get(side) {
            Some(Cell::Missing { reason }) => Some(reason.as_str()),
            _ => None,
        });
        let first = reasons.next()??;
        reasons.all(|reason| reason == Some(first)).then_some(first)
    };
    sides.iter().filter_map(|side| Some((*side, reason(side)?))).collect()
}

/// Charts with one axis: factors of native, or figures of a unit.
fn charts(out: &mut String, group: Group, rows: &[&Row], sides: &[Side], title: Option<&str>, unit: Option<Unit>) {
    if rows.is_empty() {
        return;
    }
    let axis = Axis::around(rows.iter().flat_map(|row| {
        let values = sides.iter().filter_map(move |side| position(row, *side, unit, |m| m.median));
        // The line of native is on its axis; where bars start at the left edge, the shortest is to be seen, too.
        let room = values.clone().reduce(f64::min).map_or(1.0, |least| least * SHORTEST);
        values.chain([if unit.is_none() { 1.0 } else { room }])
    }));
    if let Some(title) = title {
        let _ = writeln!(out, "<h3>{}</h3>", escape(title));
    }
    out.push_str("<div class=\"charts\">\n");
    for row in rows {
        let id = format!("{}-{}", group.name(), escape(&row.id));
        let _ = write!(
            out,
            "<figure aria-labelledby=\"{id}\">\n<figcaption id=\"{id}\">{}</figcaption>\n<ul>\n",
            escape(&row.title)
        );
        for side in sides {
            line(out, row, *side, axis, unit);
        }
        out.push_str("</ul>\n");
        ticks(out, axis, unit);
        out.push_str("</figure>\n");
    }
    out.push_str("</div>\n");
}

/// What a side's value is on the axis: the factor of native, or the figure. `None` where it was not measured.
fn position(row: &Row, side: Side, unit: Option<Unit>, value: fn(&Measured) -> f64) -> Option<f64> {
    let value = value(row.measured(side)?);
    if unit.is_some() {
        return Some(value);
    }
    let host = row.measured(Side::Host)?.median;
    Some(if row.unit.lower_is_better() { value / host } else { host / value })
}

/// A side's line.
fn line(out: &mut String, row: &Row, side: Side, axis: Axis, unit: Option<Unit>) {
    let name = side.name();
    let _ = write!(out, "<li class=\"{name}\"><span class=\"side\">{}</span>", escape(short(side)));
    let measured = match row.cells.get(&side) {
        Some(Cell::Measured(measured)) => measured,
        Some(Cell::SameAs { side }) if row.measured(*side).is_some() => {
            let _ = writeln!(out, "<span class=\"none\">the same code as {}</span></li>", escape(side.title()));
            return;
        }
        Some(Cell::SameAs { side }) => {
            let _ =
                writeln!(out, "<span class=\"none\">as {}, which was not measured</span></li>", escape(side.title()));
            return;
        }
        Some(Cell::Missing { reason }) => {
            let _ = writeln!(out, "<span class=\"none\">{}</span></li>", escape(reason));
            return;
        }
        None => {
            out.push_str("<span class=\"none\">not measured</span></li>\n");
            return;
        }
    };
    let _ = write!(out, "<span class=\"value\">{}</span> ", escape(&table::figure(measured.median, row.unit)));
    let cost = table::cost(row, side).map(table::factor).unwrap_or_default();
    let _ = write!(out, "<span class=\"factor\">{}</span> ", escape(&cost));
    let _ = write!(out, "<span class=\"exits\">{}</span>", escape(&exits(measured)));
    let from = if unit.is_some() { 0.0 } else { axis.place(1.0) };
    let at = |value: fn(&Measured) -> f64| position(row, side, unit, value).map_or(from, |value| axis.place(value));
    let (end, least, greatest) = (at(|m| m.median), at(|m| m.min), at(|m| m.max));
    let (left, width) = (from.min(end), (from - end).abs());
    let (low, high) = (least.min(greatest), least.max(greatest));
    out.push_str("<span class=\"track\" aria-hidden=\"true\">");
    for place in axis.decades() {
        let _ = write!(out, "<i style=\"left:{place:.2}%\"></i>");
    }
    if unit.is_none() {
        let _ = write!(out, "<i class=\"native\" style=\"left:{from:.2}%\"></i>");
    }
    let _ = write!(out, "<b style=\"left:{left:.2}%;width:{width:.2}%\"></b>");
    let _ = writeln!(out, "<u style=\"left:{low:.2}%;width:{:.2}%\"></u></span></li>", high - low);
}

/// The names of the axis's ticks, below a chart.
fn ticks(out: &mut String, axis: Axis, unit: Option<Unit>) {
    out.push_str("<div class=\"axis\" aria-hidden=\"true\">");
    for exponent in axis.ticks() {
        let place = axis.place_of(exponent);
        // Names at the ends stay within the chart.
        let class = match place {
            p if p < 0.01 => " class=\"first\"",
            p if p > 99.99 => " class=\"last\"",
            _ => "",
        };
        let name = unit.map_or_else(|| scale::factor(exponent), |unit| scale::figure(exponent, unit));
        let _ = write!(out, "<span{class} style=\"left:{place:.2}%\">{name}</span>");
    }
    out.push_str("</div>\n");
}

/// A side's name on a chart's line.
pub(super) fn short(side: Side) -> &'static str {
    match side {
        Side::Host => "host",
        Side::BtStock => "BT stock",
        Side::BtPv => "BT pv",
        Side::KvmStock => "KVM stock",
        Side::KvmPv => "KVM pv",
        Side::TcgStock => "QEMU TCG",
    }
}

/// Exits in words; nothing where they are not counted.
pub(super) fn exits(measured: &Measured) -> String {
    measured.exits.map_or_else(String::new, |exits| {
        let count = table::count(exits);
        format!("{}{count} {}", if measured.exact { "" } else { "~" }, if count == "1" { "exit" } else { "exits" })
    })
}
