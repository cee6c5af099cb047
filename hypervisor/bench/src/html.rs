//! A report as one page for a browser: no script, nothing fetched, light and dark, phone and paper.
//!
//! Each row is a small chart: a line per side with its name, its time, its cost relative to native, its exits, and a bar on
//! a logarithmic scale. Everything that a bar says stands beside it as text, so bars are hidden from screen readers, and
//! colour is never the only difference. Rows with a host side are drawn relative to it: a bar starts at the line
//! "native = 1" and goes right for what is dearer and left for what is cheaper. Rows without one are drawn as
//! absolute figures from the left edge. The axis is the same for all charts of a group. `scale` has the axes;
//! the tables with all figures follow the charts, in the same order.

mod chart;
mod figures;
mod scale;

use crate::model::{Group, Host, Report, Side, Suite};
use crate::table;
use std::fmt::Write as _;

const STYLE: &str = include_str!("html/style.css");

/// Text for use between tags and in quoted attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // No XML and no HTML may hold these.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The page. It is well-formed XML after its first line, so that any parser can check it.
pub fn page(report: &Report) -> String {
    let groups: Vec<_> =
        Group::ALL.into_iter().filter(|group| report.rows.iter().any(|row| row.group == *group)).collect();
    let mut out = String::with_capacity(256 << 10);
    out.push_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n");
    out.push_str("<meta name=\"color-scheme\" content=\"light dark\"/>\n");
    let _ = write!(
        out,
        "<title>Paravane benchmark, {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n",
        escape(&report.host.date)
    );
    header(&mut out, report);
    out.push_str("<main>\n");
    how_to_read(&mut out, report);
    figures::summary(&mut out, report, &groups);
    for group in &groups {
        chart::group(&mut out, *group, report);
    }
    out.push_str("<section id=\"figures\" class=\"figures\" aria-labelledby=\"figures-title\">\n");
    out.push_str("<h2 id=\"figures-title\">All figures</h2>\n<p>Median, with the least and the greatest of the rounds below it.</p>\n");
    for group in &groups {
        figures::table(&mut out, *group, report);
    }
    out.push_str("</section>\n</main>\n</body>\n</html>\n");
    out
}

/// Title, contents, and what was measured on.
fn header(out: &mut String, report: &Report) {
    let host = &report.host;
    out.push_str("<header>\n<h1>What virtualization costs here</h1>\n");
    let _ = writeln!(
        out,
        "<p class=\"lead\">Paravane {}{} on {}, {}.</p>",
        escape(&host.paravane),
        host.commit.as_deref().map(|c| format!(" ({})", escape(c.get(..12).unwrap_or(c)))).unwrap_or_default(),
        escape(&host.cpu),
        escape(host.date.get(..10).unwrap_or(&host.date))
    );
    out.push_str("<nav aria-label=\"Contents\"><ul>\n");
    let mut link = |id: &str, title: &str| {
        let _ = writeln!(out, "<li><a href=\"#{id}\">{}</a></li>", escape(title));
    };
    link("summary", "Summary");
    for group in Group::ALL.into_iter().filter(|group| report.rows.iter().any(|row| row.group == *group)) {
        link(group.name(), group.title());
    }
    link("figures", "All figures");
    out.push_str("</ul></nav>\n<section aria-labelledby=\"host-title\"><h2 id=\"host-title\">Measured on</h2>\n<dl class=\"machine\">\n");
    for (name, value) in described(host, report) {
        let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(&value));
    }
    out.push_str("</dl></section>\n</header>\n");
}

/// The host and the run as names and values.
fn described(host: &Host, report: &Report) -> Vec<(&'static str, String)> {
    let unknown = || "unknown".to_owned();
    let suites: Vec<_> = report
        .plan
        .suites
        .iter()
        .map(|suite| match suite {
            Suite::Micro => "micro",
            Suite::Macro => "macro",
        })
        .collect();
    let rounds =
        report.plan.rounds.map_or_else(|| "each suite's own number of rounds".into(), |n| format!("{n} rounds"));
    let guest = if host.virtualized { ", itself a guest" } else { "" };
    let mut list = vec![
        ("CPU", format!("{}{guest}; online: {}", host.cpu, host.cpus_online.clone().unwrap_or_else(unknown))),
        ("Kernel", format!("Linux {}", host.kernel.clone().unwrap_or_else(unknown))),
        ("Memory", host.memory.map_or_else(unknown, |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)))),
        ("/dev/kvm", host.kvm.text.clone()),
    ];
    if let (Some(ring0), Some(exit), Some(native)) = (host.kvm.ring0_ns, host.kvm.exit_ns, host.kvm.host_ns) {
        let ns = |value| table::figure(value, crate::model::Unit::Nanoseconds);
        list.push((
            "KVM's speed",
            format!(
                "{} per simple instruction of the guest's ring 0 (host: {}), {} per exit",
                ns(ring0),
                ns(native),
                ns(exit)
            ),
        ));
    }
    list.push(("QEMU", host.qemu.clone().unwrap_or_else(|| "not installed".into())));
    list.push(("Paravane", format!("{}, commit {}", host.paravane, host.commit.clone().unwrap_or_else(unknown))));
    list.push(("Begun", format!("{}; load before: {}", host.date, host.load.clone().unwrap_or_else(unknown))));
    let quick = if report.plan.quick { ", quick: rough figures" } else { "" };
    list.push(("Run", format!("{}, {rounds}{quick}; {:.0} s", suites.join(" and "), report.seconds)));
    for (side, reason) in &report.plan.absent {
        list.push(("Left out", format!("{}: {reason}", side.title())));
    }
    list
}

/// The legend, and what lines and marks mean.
fn how_to_read(out: &mut String, report: &Report) {
    out.push_str("<section class=\"legend\" aria-labelledby=\"legend-title\">\n<h2 id=\"legend-title\">How to read the charts</h2>\n<ul class=\"sides\">\n");
    for side in &report.plan.sides {
        let _ = writeln!(
            out,
            "<li><span class=\"swatch {}\" aria-hidden=\"true\"></span><b>{}</b> {}</li>",
            side.name(),
            escape(side.title()),
            escape(about(*side))
        );
    }
    out.push_str(
        "</ul>\n<p>Bars are on a logarithmic scale. Where the host can do the work itself, the strong line is native = 1: \
         a bar to the right of it costs more than native, one to the left less. Where it cannot, bars start at the left \
         edge and show the figure itself. A thin line across the end of a bar goes from the least to the greatest round. \
         Beside the time stands its factor of native, and how many exits from guest code into the hypervisor one \
         operation takes; ~ marks counts in which a timer or another thread takes part.</p>\n</section>\n",
    );
}

fn about(side: Side) -> &'static str {
    match side {
        Side::Host => "a process of this machine; where its form of the work differs, the title says how",
        Side::BtStock => "binary translation; the guest is an ordinary kernel",
        Side::BtPv => "binary translation; the guest uses Paravane's interfaces, stock Linux those of KVM",
        Side::KvmStock => "/dev/kvm; the guest is an ordinary kernel",
        Side::KvmPv => "/dev/kvm; the guest uses the paravirtual interfaces",
        Side::TcgStock => "QEMU's emulator, which also needs no privileges",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use roxmltree::{Document, Node};
    use std::collections::BTreeSet;

    fn text(node: Node) -> String {
        node.descendants().filter_map(|n| n.text().filter(|_| n.is_text())).collect()
    }

    #[test]
    fn the_page_is_well_formed_and_complete() {
        let report = testing::report();
        let page = page(&report);
        let xml = page.strip_prefix("<!doctype html>\n").expect("HTML's first line");
        let document = Document::parse(xml).unwrap_or_else(|e| panic!("{e}"));
        let all = |name: &'static str| document.descendants().filter(move |n| n.has_tag_name(name));
        // Every row has one chart and one line of a table, with a cell for every side that some row of the group has.
        let captions: Vec<_> = all("figcaption").map(text).collect();
        let titles: Vec<_> = report.rows.iter().map(|row| row.title.clone()).collect();
        assert_eq!(BTreeSet::from_iter(&captions), BTreeSet::from_iter(&titles));
        assert_eq!(captions.len(), titles.len());
        for row in &report.rows {
            let id = format!("figures-{}", row.id);
            let line = document.descendants().find(|n| n.attribute("id") == Some(&id)).expect(&id);
            let cells = line.children().filter(|n| n.has_tag_name("td")).count();
            // No row of stock Linux has figures for KVM, and none of a boot has some for the host.
            let absent = match row.group {
                Group::MacroBoot => 3,
                Group::MacroPrograms | Group::MacroIo => 2,
                Group::Memory => 1,
                _ => 0,
            };
            assert_eq!(cells, report.plan.sides.len() - absent, "{id}");
            assert_eq!(text(line.first_element_child().expect("a head")), row.title);
        }
        // Every measured side of a chart has a bar within the chart.
        let bars = document.descendants().filter(|n| n.has_tag_name("b") && n.attribute("style").is_some());
        let number = |text: &str, name: &str| -> f64 {
            let (_, rest) = text.split_once(name).expect(name);
            rest.split_once('%').expect("a per cent sign").0.parse().expect("a number")
        };
        let mut seen = 0;
        for bar in bars {
            let style = bar.attribute("style").expect("a style");
            let (left, width) = (number(style, "left:"), number(style, "width:"));
            assert!(left >= 0.0 && width >= 0.0 && left + width <= 100.02, "{style}");
            seen += 1;
        }
        let own = |cell: &&crate::model::Cell| matches!(cell, crate::model::Cell::Measured(_));
        assert_eq!(seen, report.rows.iter().flat_map(|row| row.cells.values()).filter(own).count());
    }

    #[test]
    fn references_within_the_page_hold_and_there_are_no_others() {
        let page = page(&testing::report());
        let document = Document::parse(page.strip_prefix("<!doctype html>\n").expect("its first line")).expect("XML");
        let mut ids = BTreeSet::new();
        for node in document.descendants() {
            if let Some(id) = node.attribute("id") {
                assert!(ids.insert(id), "{id} twice");
            }
            let name = node.tag_name().name();
            assert!(!["script", "link", "img", "iframe", "object"].contains(&name), "{name}");
            assert!(node.attributes().all(|a| !a.name().starts_with("on") && a.name() != "src"), "{node:?}");
        }
        for node in document.descendants() {
            if let Some(id) = node.attribute("aria-labelledby") {
                assert!(ids.contains(id), "{id}");
            }
            if let Some(target) = node.attribute("href") {
                assert!(target.strip_prefix('#').is_some_and(|id| ids.contains(id)), "{target}");
            }
        }
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("), "something is fetched");
    }

    #[test]
    fn what_a_report_says_cannot_become_markup() {
        let mut report = testing::report();
        let evil = "</style></title><script>alert(1)</script>\"'&";
        report.host.date = evil.into();
        report.host.cpu = evil.into();
        report.host.kvm.text = evil.into();
        report.host.commit = Some("äöü".repeat(9));
        for row in &mut report.rows {
            row.id = format!("{}{evil}", row.id);
            row.title = format!("{}{evil}", row.title);
            for cell in row.cells.values_mut() {
                match cell {
                    crate::model::Cell::Missing { reason } => *reason = evil.into(),
                    crate::model::Cell::Measured(measured) => {
                        measured.counters.insert(evil.into(), 1.0);
                        measured.median = f64::MAX;
                    }
                    crate::model::Cell::SameAs { .. } => {}
                }
            }
        }
        let page = page(&report);
        let document = Document::parse(page.strip_prefix("<!doctype html>\n").expect("its first line")).expect("XML");
        assert!(document.descendants().all(|n| !n.has_tag_name("script")));
        assert!(page.matches("&lt;script&gt;").count() > 20);
    }

    #[test]
    fn marks_are_escaped_and_control_characters_replaced() {
        assert_eq!(escape("a<b> & \"c\" 'd'\n"), "a&lt;b&gt; &amp; &quot;c&quot; &#39;d&#39;\n");
        assert_eq!(escape("x\u{1b}[0m\0y"), "x\u{fffd}[0m\u{fffd}y");
    }
}
