//! One self-contained HTML file: no script, no network (a content policy in the page says so),
//! inline style sheet (`page.css`) and inline SVG. Everything that comes from outside is escaped.

use std::fmt::Write;

use crate::{Align, Block, Cell, Chart, ChartKind, Claim, Report, Table, facts, svg};

const STYLE: &str = include_str!("page.css");

impl Report {
    /// The report as one HTML file that needs nothing else.
    pub fn html(&self) -> String {
        let mut page = String::with_capacity(32 * 1024);
        let title = escape(&self.title);
        let _ = write!(
            page,
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
             style-src 'unsafe-inline'\">\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n\
             <p class=\"brand\"><i><b></b><b></b><b></b></i>Strata report</p>\n<h1>{title}</h1>\n"
        );
        if !self.subtitle.is_empty() {
            let _ = writeln!(page, "<p class=\"sub\">{}</p>", prose(&self.subtitle));
        }
        self.key_figures(&mut page);
        if self.sections.iter().filter(|s| !s.title.is_empty()).count() > 2 {
            page.push_str("<nav>");
            for (i, section) in self.sections.iter().enumerate() {
                if !section.title.is_empty() {
                    let _ = write!(page, "<a href=\"#s{i}\">{}</a>", escape(&section.title));
                }
            }
            page.push_str("</nav>\n");
        }
        page.push_str("</header>\n<main>\n");
        for (i, section) in self.sections.iter().enumerate() {
            let _ = writeln!(page, "<section id=\"s{i}\">");
            if !section.title.is_empty() {
                let _ = writeln!(page, "<h2>{}</h2>", escape(&section.title));
            }
            for block in &section.blocks {
                self::block(&mut page, block);
            }
            page.push_str("</section>\n");
        }
        let _ = write!(
            page,
            "</main>\n<footer>Strata {}</footer>\n</body>\n</html>\n",
            env!("CARGO_PKG_VERSION")
        );
        page
    }

    fn key_figures(&self, page: &mut String) {
        if self.summary.is_empty() {
            return;
        }
        page.push_str("<dl class=\"facts\">\n");
        for (label, value) in &self.summary {
            let _ =
                writeln!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(label), escape(value));
        }
        page.push_str("</dl>\n");
    }
}

fn block(page: &mut String, block: &Block) {
    match block {
        Block::Text(text) => {
            for paragraph in text.split("\n\n").filter(|p| !p.trim().is_empty()) {
                let _ = writeln!(page, "<p>{}</p>", prose(paragraph.trim()));
            }
        }
        Block::Code(text) => {
            let _ = writeln!(page, "<pre><code>{}</code></pre>", escape(text.trim_end()));
        }
        Block::Table(table) => figure_table(page, table),
        Block::Chart(chart) => figure_chart(page, chart),
        Block::Claim(claim) => figure_claim(page, claim),
    }
}

fn figure_table(page: &mut String, table: &Table) {
    page.push_str("<figure class=\"data\">\n");
    caption(page, &table.title);
    page.push_str("<div class=\"scroll\">");
    bare_table(page, table);
    page.push_str("</div>\n</figure>\n");
}

fn bare_table(page: &mut String, table: &Table) {
    page.push_str("<table>\n");
    if table.columns.iter().any(|c| !c.name.is_empty()) {
        page.push_str("<thead><tr>");
        for column in &table.columns {
            let class = if column.align == Align::Right { " class=\"r\"" } else { "" };
            let _ = write!(page, "<th scope=\"col\"{class}>{}</th>", escape(&column.name));
        }
        page.push_str("</tr></thead>\n");
    }
    page.push_str("<tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for (i, column) in table.columns.iter().enumerate() {
            let text = row.get(i).map(Cell::show).unwrap_or_default();
            let class = match column.align {
                Align::Right => " class=\"r\"",
                // A sentence may wrap, a name may not.
                Align::Left if text.chars().count() > 60 => " class=\"wrap\"",
                Align::Left => "",
            };
            let _ = write!(page, "<td{class}>{}</td>", escape(&text));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table>");
}

fn figure_chart(page: &mut String, chart: &Chart) {
    page.push_str("<figure>\n");
    caption(page, &chart.title);
    if chart.series.len() > 1 && chart.kind != ChartKind::Heat {
        page.push_str("<ul class=\"legend\">");
        for (i, series) in chart.series.iter().enumerate() {
            let _ = write!(
                page,
                "<li><i class=\"b{}\"></i>{}</li>",
                i % svg::COLORS,
                escape(&series.name)
            );
        }
        page.push_str("</ul>\n");
    }
    let _ = write!(
        page,
        "<div class=\"wide\">{}</div>\n<div class=\"narrow\">{}</div>\n</figure>\n",
        svg::draw(chart, svg::WIDE),
        svg::draw(chart, svg::NARROW)
    );
}

fn figure_claim(page: &mut String, claim: &Claim) {
    let (class, mark) = match claim.holds {
        Some(true) => ("claim yes", "✓ holds"),
        Some(false) => ("claim no", "✗ does not hold"),
        None => ("claim", "• reported"),
    };
    let _ = write!(
        page,
        "<figure class=\"{class}\">\n<span class=\"mark\">{mark}</span>\n<h3>{}</h3>\n\
         <p class=\"meta\">{}",
        prose(&claim.claim),
        escape(&claim.slug)
    );
    if !claim.seeds.is_empty() {
        let _ = write!(page, " · {}", seeds(&claim.seeds));
    }
    page.push_str("</p>\n<div class=\"pair\">\n");
    for (name, value) in [("measured", &claim.measured), ("baselines", &claim.baselines)] {
        let table = facts::table("", value);
        if !table.rows.is_empty() {
            let _ = write!(page, "<div><h4>{name}</h4>");
            bare_table(page, &table);
            page.push_str("</div>\n");
        }
    }
    page.push_str("</div>\n</figure>\n");
}

/// `seed 0`, `seeds 0, 1, 2`.
pub(crate) fn seeds(seeds: &[u64]) -> String {
    let list = seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    format!("seed{} {list}", if seeds.len() == 1 { "" } else { "s" })
}

fn caption(page: &mut String, title: &str) {
    if !title.is_empty() {
        let _ = writeln!(page, "<figcaption>{}</figcaption>", prose(title));
    }
}

/// Escapes for element content and quoted attributes; control characters become U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Escaped text with `code` between backticks.
fn prose(text: &str) -> String {
    let parts: Vec<&str> = text.split('`').collect();
    if parts.len().is_multiple_of(2) {
        // An unpaired backtick is only a character.
        return escape(text);
    }
    let mut out = String::new();
    for (i, part) in parts.iter().enumerate() {
        if i % 2 == 0 {
            out.push_str(&escape(part));
        } else {
            let _ = write!(out, "<code>{}</code>", escape(part));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Column;
    use serde_json::json;

    #[test]
    fn everything_from_outside_is_escaped() {
        let evil = "<script>alert(\"x\")</script>'&\u{1b}[31m";
        let mut report = Report::new(evil, evil);
        report.fact(evil, evil);
        let table = Table::new(evil, vec![Column::left(evil)]).row(vec![Cell::text(evil)]);
        let claim = Claim {
            slug: evil.into(),
            claim: evil.into(),
            measured: json!({evil: evil}),
            baselines: json!({evil: {evil: 1}}),
            seeds: vec![],
            holds: None,
        };
        let section = report.section(evil);
        section.text(evil).code(evil).push(table).push(claim);
        for kind in [ChartKind::Line, ChartKind::Bar, ChartKind::Histogram, ChartKind::Heat] {
            let chart = Chart::new(kind, evil).axes(evil, evil).over([evil, evil]);
            section.push(chart.values(evil, &[1.0, 2.0]).values(evil, &[1.0, 2.0]));
        }
        let page = report.html();
        assert!(!page.contains("<script"), "unescaped");
        assert!(!page.contains('\u{1b}'));
        assert!(page.contains("&lt;script&gt;"));
    }

    #[test]
    fn nothing_points_to_the_network() {
        let mut report = Report::new("t", "");
        report.section("s").text("see https://example.org");
        let page = report.html();
        for forbidden in ["src=", "href=\"http", "@import", "url(", "<link", "<script"] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        assert!(page.contains("name=\"viewport\""));
        assert!(page.contains("prefers-color-scheme:dark") && page.contains("@media print"));
    }

    #[test]
    fn claims_carry_a_clear_mark() {
        for (holds, mark) in
            [(Some(true), "✓ holds"), (Some(false), "✗ does not hold"), (None, "• reported")]
        {
            let mut report = Report::new("t", "");
            report.section("s").push(Claim {
                slug: "gptq".into(),
                claim: "c".into(),
                measured: json!({"gptq": 8.25}),
                baselines: json!({"rtn": 9.5}),
                seeds: vec![0, 1, 2],
                holds,
            });
            let page = report.html();
            assert!(page.contains(mark) && page.contains("seeds 0, 1, 2") && page.contains("8.25"));
        }
    }

    #[test]
    fn backticks_make_code_only_in_pairs() {
        assert_eq!(prose("run `a<b` now"), "run <code>a&lt;b</code> now");
        assert_eq!(prose("a ` b"), "a ` b");
    }
}
