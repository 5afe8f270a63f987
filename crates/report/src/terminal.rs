//! Text for terminals, pipes and log files: aligned columns, small charts of block characters,
//! colours only when the [`Style`] says so. A character counts as one cell wide.

use crate::{
    Align, Block, Cell, Chart, ChartKind, Claim, Report, Series, Style, Table, facts, html, human,
};

/// Paragraphs are not wider than this, however wide the terminal.
const TEXT_WIDTH: usize = 100;
/// A text column is not squeezed below this.
const NARROWEST: usize = 10;
/// Space between columns.
const GAP: usize = 2;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

impl Report {
    /// The report as text; ends with a line break.
    pub fn terminal(&self, style: Style) -> String {
        let mut out = String::new();
        line(&mut out, &style.bold(&clean(&self.title)));
        if !self.subtitle.is_empty() {
            wrap(&mut out, &self.subtitle, style, 0, |text| style.dim(text));
        }
        if !self.summary.is_empty() {
            out.push('\n');
            let widest = self.summary.iter().map(|(l, _)| chars(l)).max().unwrap_or(0);
            for (label, value) in &self.summary {
                let label = pad(&clean(label), widest, Align::Left);
                line(&mut out, &format!("  {}  {}", style.dim(&label), clean(value)));
            }
        }
        for section in &self.sections {
            out.push('\n');
            if !section.title.is_empty() {
                line(&mut out, &style.paint("1;36", &clean(&section.title)));
            }
            for (i, block) in section.blocks.iter().enumerate() {
                if i > 0 {
                    out.push('\n');
                }
                match block {
                    Block::Text(text) => wrap(&mut out, text, style, 0, str::to_string),
                    Block::Code(text) => {
                        for code in text.trim_end().lines() {
                            line(&mut out, &format!("    {}", clean(code)));
                        }
                    }
                    Block::Table(table) => out.push_str(&table.terminal(style)),
                    Block::Chart(chart) => out.push_str(&chart_text(chart, style)),
                    Block::Claim(claim) => out.push_str(&claim_text(claim, style)),
                }
            }
        }
        out
    }
}

impl Table {
    /// The table as text; ends with a line break. Text columns are shortened until it fits; when
    /// even that is not enough, every row becomes a block of `name  value` lines.
    pub fn terminal(&self, style: Style) -> String {
        let mut out = String::new();
        if !self.title.is_empty() {
            line(&mut out, &style.bold(&clean(&self.title)));
        }
        let heads: Vec<String> = self.columns.iter().map(|c| clean(&c.name)).collect();
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                let cell = |i| row.get(i).map(Cell::show).unwrap_or_default();
                (0..self.columns.len()).map(|i| clean(&cell(i))).collect()
            })
            .collect();
        if rows.is_empty() {
            line(&mut out, &style.dim("(nothing)"));
            return out;
        }
        match self.widths(&heads, &rows, style.width) {
            Some(widths) => self.grid(&mut out, &heads, &rows, &widths, style),
            None => stacked(&mut out, &heads, &rows, style),
        }
        out
    }

    /// The widths of the columns, or `None` when the table cannot be made to fit.
    fn widths(&self, heads: &[String], rows: &[Vec<String>], limit: usize) -> Option<Vec<usize>> {
        let mut widths: Vec<usize> = heads.iter().map(|h| chars(h)).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(chars(cell));
            }
        }
        loop {
            let total: usize = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
            let excess = total.saturating_sub(limit);
            if excess == 0 {
                return Some(widths);
            }
            let (widest, _) = widths
                .iter()
                .enumerate()
                .filter(|(i, w)| {
                    **w > NARROWEST && self.columns.get(*i).is_some_and(|c| c.align == Align::Left)
                })
                .max_by_key(|(_, w)| **w)?;
            let width = widths.get_mut(widest)?;
            *width = width.saturating_sub(excess.min(4)).max(NARROWEST);
        }
    }

    fn grid(
        &self,
        out: &mut String,
        heads: &[String],
        rows: &[Vec<String>],
        widths: &[usize],
        style: Style,
    ) {
        let render = |cells: &[String]| {
            let mut text = String::new();
            for (i, ((cell, width), column)) in
                cells.iter().zip(widths).zip(&self.columns).enumerate()
            {
                if i > 0 {
                    text.push_str("  ");
                }
                text.push_str(&pad(&shorten(cell, *width), *width, column.align));
            }
            text.trim_end().to_string()
        };
        if heads.iter().any(|h| !h.is_empty()) {
            line(out, &style.bold(&render(heads)));
            let rule: usize = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
            line(out, &style.dim(&"─".repeat(rule)));
        }
        for row in rows {
            line(out, &render(row));
        }
    }
}

fn stacked(out: &mut String, heads: &[String], rows: &[Vec<String>], style: Style) {
    let widest = heads.iter().map(|h| chars(h)).max().unwrap_or(0);
    let room = style.width.saturating_sub(widest + GAP).max(NARROWEST);
    for (i, row) in rows.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        for (head, cell) in heads.iter().zip(row).filter(|(_, cell)| !cell.is_empty()) {
            let head = style.dim(&pad(head, widest, Align::Left));
            line(out, &format!("{head}  {}", shorten(cell, room)));
        }
    }
}

fn claim_text(claim: &Claim, style: Style) -> String {
    let mut out = String::new();
    let mark = match claim.holds {
        Some(true) => style.paint("1;32", "✓ holds"),
        Some(false) => style.paint("1;31", "✗ does not hold"),
        None => style.paint("1;34", "• reported"),
    };
    let mut head = format!("{mark}  {}", style.bold(&clean(&claim.slug)));
    if !claim.seeds.is_empty() {
        head.push_str(&style.dim(&format!("  ({})", html::seeds(&claim.seeds))));
    }
    line(&mut out, &head);
    wrap(&mut out, &claim.claim, style, 2, str::to_string);
    let inner = Style { width: style.width.saturating_sub(2), ..style };
    for (name, value) in [("measured", &claim.measured), ("baselines", &claim.baselines)] {
        let table = facts::table(name, value);
        if !table.rows.is_empty() {
            for text in table.terminal(inner).lines() {
                line(&mut out, &format!("  {text}"));
            }
        }
    }
    out
}

fn chart_text(chart: &Chart, style: Style) -> String {
    let mut out = String::new();
    if !chart.title.is_empty() {
        line(&mut out, &style.bold(&clean(&chart.title)));
    }
    match chart.kind {
        ChartKind::Bar => bars(&mut out, chart, style),
        ChartKind::Line | ChartKind::Histogram => sparks(&mut out, chart, style),
        ChartKind::Heat => shades(&mut out, chart, style),
    }
    if out.is_empty() || chart.series.is_empty() {
        line(&mut out, &style.dim("(nothing)"));
    }
    out
}

fn finite(chart: &Chart) -> impl Iterator<Item = f64> + '_ {
    let log = chart.log_y;
    let values = chart.series.iter().flat_map(|s| s.points.iter().map(|p| p.1));
    values.filter(move |v| v.is_finite() && (!log || *v > 0.0))
}

/// Where a value lies between the chart's lowest and highest, 0 to 1.
fn share(chart: &Chart, value: f64, low: f64, high: f64) -> Option<f64> {
    if !value.is_finite() || (chart.log_y && value <= 0.0) {
        return None;
    }
    if high <= low {
        return Some(1.0);
    }
    let share = if chart.log_y {
        (value / low).ln() / (high / low).ln()
    } else {
        (value - low) / (high - low)
    };
    Some(share.clamp(0.0, 1.0))
}

fn bars(out: &mut String, chart: &Chart, style: Style) {
    let several = chart.series.len() > 1;
    let mut lines: Vec<(String, f64)> = Vec::new();
    let positions = chart.series.iter().map(|s| s.points.len()).max().unwrap_or(0);
    for at in 0..positions {
        for series in &chart.series {
            let Some(&(x, y)) = series.points.get(at) else { continue };
            let name = category(chart, x);
            let label = if several { format!("{name} {}", series.name) } else { name };
            lines.push((clean(&label), y));
        }
    }
    let label_room = lines.iter().map(|(l, _)| chars(l)).max().unwrap_or(0);
    let label_width = label_room.min(style.width.min(TEXT_WIDTH) / 2);
    let room = style.width.min(TEXT_WIDTH).saturating_sub(label_width + 14).clamp(8, 48);
    let largest = finite(chart).fold(0.0_f64, |a, v| a.max(v.abs()));
    let smallest = finite(chart).fold(f64::INFINITY, f64::min);
    for (label, value) in lines {
        let length = if chart.log_y {
            // The shortest bar is a tenth of the longest.
            share(chart, value, smallest, largest).map_or(0.0, |s| 0.1 + 0.9 * s)
        } else if largest > 0.0 && value.is_finite() {
            value.abs() / largest
        } else {
            0.0
        };
        let bar = bar_of(length, room);
        line(
            out,
            &format!(
                "{}  {} {}",
                pad(&shorten(&label, label_width), label_width, Align::Left),
                style.paint("36", &bar),
                human::short(value, 4)
            ),
        );
    }
}

fn bar_of(share: f64, room: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * room as f64 * 8.0).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    let rest = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    if let Some(part) = (eighths % 8).checked_sub(1).and_then(|i| rest.get(i)) {
        bar.push(*part);
    }
    bar
}

fn sparks(out: &mut String, chart: &Chart, style: Style) {
    let name_width = chart.series.iter().map(|s| chars(&s.name)).max().unwrap_or(0);
    let room = style.width.min(TEXT_WIDTH).saturating_sub(name_width + 2).clamp(10, 64);
    let low = if chart.kind == ChartKind::Histogram && !chart.log_y {
        0.0
    } else {
        finite(chart).fold(f64::INFINITY, f64::min)
    };
    let high = finite(chart).fold(f64::NEG_INFINITY, f64::max);
    for series in &chart.series {
        let spark: String = resample(series, room)
            .into_iter()
            .map(|v| match share(chart, v, low, high) {
                Some(s) => BARS.get((s * 7.0).round() as usize).copied().unwrap_or('█'),
                None => ' ',
            })
            .collect();
        let name = pad(&clean(&series.name), name_width, Align::Left);
        line(out, format!("{name}  {}", style.paint("36", &spark)).trim_start());
        let indent = " ".repeat(if name_width == 0 { 0 } else { name_width + 2 });
        if let (Some(first), Some(last)) = (series.points.first(), series.points.last()) {
            let x = format!("{} to {}", category(chart, first.0), category(chart, last.0));
            let (a, b) = extremes(series);
            let y = format!("lowest {}, highest {}", human::short(a, 4), human::short(b, 4));
            let ends = if chart.kind == ChartKind::Line {
                format!(", last {}", human::short(last.1, 4))
            } else {
                String::new()
            };
            let text =
                format!("{} {x}; {} {y}{ends}", clean(&chart.x_label), clean(&chart.y_label));
            wrap(out, text.trim(), style, indent.len(), |t| style.dim(t));
        }
    }
}

fn extremes(series: &Series) -> (f64, f64) {
    let values = || series.points.iter().map(|p| p.1).filter(|v| v.is_finite());
    (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
}

/// At most `room` values: the mean of each run of points.
fn resample(series: &Series, room: usize) -> Vec<f64> {
    let run = series.points.len().div_ceil(room.max(1)).max(1);
    let chunks = series.points.chunks(run);
    chunks
        .map(|chunk| {
            let finite: Vec<f64> = chunk.iter().map(|p| p.1).filter(|v| v.is_finite()).collect();
            if finite.is_empty() {
                f64::NAN
            } else {
                finite.iter().sum::<f64>() / finite.len() as f64
            }
        })
        .collect()
}

fn shades(out: &mut String, chart: &Chart, style: Style) {
    let low = finite(chart).fold(f64::INFINITY, f64::min);
    let high = finite(chart).fold(f64::NEG_INFINITY, f64::max);
    let name_width = chart.series.iter().map(|s| chars(&s.name)).max().unwrap_or(0);
    let room = style.width.min(TEXT_WIDTH).saturating_sub(name_width + 2).clamp(10, 64);
    for series in &chart.series {
        let values = resample(series, room);
        let wide = if values.len() * 2 <= room { 2 } else { 1 };
        let row: String = values
            .into_iter()
            .flat_map(|v| {
                let shade = match share(chart, v, low, high) {
                    Some(s) => ['·', '░', '▒', '▓', '█']
                        .get((s * 4.0).round() as usize)
                        .copied()
                        .unwrap_or('█'),
                    None => ' ',
                };
                std::iter::repeat_n(shade, wide)
            })
            .collect();
        let name = pad(&clean(&series.name), name_width, Align::Left);
        line(out, &format!("{name}  {}", style.paint("36", &row)));
    }
    if low <= high {
        let text = format!(
            "{} · is {}, █ is {}",
            clean(&chart.y_label),
            human::short(low, 3),
            human::short(high, 3)
        );
        wrap(out, text.trim(), style, 0, |t| style.dim(t));
    }
}

fn category(chart: &Chart, x: f64) -> String {
    let index = (x >= 0.0 && x.is_finite()).then_some(x.round() as usize);
    match index.and_then(|i| chart.categories.get(i)) {
        Some(name) => clean(name),
        None => human::short(x, 5),
    }
}

/// Adds text broken at spaces, indented, each line dressed by `dress`. Spaces in front of a line of
/// the text indent that whole line further.
fn wrap(out: &mut String, text: &str, style: Style, indent: usize, dress: impl Fn(&str) -> String) {
    for paragraph in text.trim_end().trim_start_matches('\n').lines() {
        let own = paragraph.chars().take_while(|c| *c == ' ').count().min(TEXT_WIDTH / 4);
        let room = style.width.min(TEXT_WIDTH).saturating_sub(indent + own).max(NARROWEST);
        let margin = " ".repeat(indent + own);
        let mut current = String::new();
        for word in clean(paragraph).split_whitespace() {
            let length = chars(&current);
            if length > 0 && length + 1 + chars(word) > room {
                line(out, &format!("{margin}{}", dress(&current)));
                current.clear();
            } else if length > 0 {
                current.push(' ');
            }
            current.push_str(word);
        }
        line(out, &format!("{margin}{}", dress(&current)));
    }
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

fn chars(text: &str) -> usize {
    text.chars().count()
}

fn pad(text: &str, width: usize, align: Align) -> String {
    match align {
        Align::Left => format!("{text:<width$}"),
        Align::Right => format!("{text:>width$}"),
    }
}

/// Shortens in the middle: both ends of a dotted name tell something.
fn shorten(text: &str, width: usize) -> String {
    let length = chars(text);
    if length <= width {
        return text.to_string();
    }
    let tail = width.saturating_sub(1) / 2;
    let head = width.saturating_sub(1 + tail);
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(length - tail).collect();
    format!("{start}…{end}")
}

/// Names come from files: control characters must not reach a terminal.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Column;
    use serde_json::json;

    fn table() -> Table {
        Table::new("Layers", vec![Column::left("layer"), Column::right("size")])
            .row(vec!["model.layers.0.self_attn.q_proj".into(), Cell::Bytes(2048)])
            .row(vec!["lm_head".into(), Cell::Bytes(5)])
    }

    #[test]
    fn columns_line_up() {
        let text = table().terminal(Style::plain());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "Layers");
        assert_eq!(lines[1], format!("{:<31}  {:>8}", "layer", "size"));
        assert_eq!(lines[2], "─".repeat(31 + 2 + 8));
        assert_eq!(lines[3], "model.layers.0.self_attn.q_proj  2.00 KiB");
        assert_eq!(lines[4], format!("{:<31}  {:>8}", "lm_head", "5 B"));
    }

    #[test]
    fn narrow_terminals_shorten_then_stack() {
        let style = Style { color: false, width: 30 };
        let text = table().terminal(style);
        assert!(text.lines().all(|l| chars(l) <= 30), "{text}");
        assert!(text.contains("model.laye…tn.q_proj"), "{text}");
        let columns = (0..8).map(|i| Column::right(format!("number {i}"))).collect();
        let wide = Table::new("", columns).row((0..8).map(Cell::Int).collect());
        let text = wide.terminal(style);
        assert!(text.lines().all(|l| chars(l) <= 30), "{text}");
        assert!(text.contains("number 3  3"), "{text}");
    }

    #[test]
    fn colours_only_when_asked_and_no_control_characters_from_data() {
        let mut report = Report::new("T\u{1b}[31m", "s");
        report.fact("a", "b");
        report.section("S").push(table()).push(Claim {
            slug: "awq".into(),
            claim: "AWQ loses less".into(),
            measured: json!({"awq": 1.5}),
            baselines: json!({"rtn": 2.5}),
            seeds: vec![0],
            holds: Some(true),
        });
        let plain = report.terminal(Style::plain());
        assert!(!plain.contains('\u{1b}'), "{plain}");
        assert!(plain.contains("✓ holds  awq  (seed 0)"), "{plain}");
        let colored = report.terminal(Style { color: true, width: 80 });
        assert!(colored.contains("\u{1b}[1;32m✓ holds\u{1b}[0m"));
    }

    #[test]
    fn wrapped_lines_keep_their_indent() {
        let mut out = String::new();
        let style = Style { color: false, width: 20 };
        wrap(&mut out, "bits: integer\n    Bits per weight, of all", style, 0, str::to_string);
        assert_eq!(out, "bits: integer\n    Bits per weight,\n    of all\n");
    }

    #[test]
    fn charts_have_a_text_form() {
        let style = Style { color: false, width: 63 };
        let bars = Chart::new(ChartKind::Bar, "c").over(["q", "k"]).values("e", &[2.0, 1.0]);
        let text = chart_text(&bars, style);
        let lengths: Vec<usize> = text.lines().skip(1).map(|l| l.matches('█').count()).collect();
        assert_eq!(lengths[0], 2 * lengths[1], "{text}");
        let line = Chart::new(ChartKind::Line, "c").values("loss", &[8.0, 4.0, 1.0]);
        assert!(chart_text(&line, style).contains("█▄▁"), "{}", chart_text(&line, style));
        for kind in [ChartKind::Line, ChartKind::Bar, ChartKind::Histogram, ChartKind::Heat] {
            for log in [false, true] {
                let mut odd = Chart::new(kind, "c").values("s", &[f64::NAN, -1.0, 0.0, 3.0]);
                odd.log_y = log;
                assert!(!chart_text(&odd, style).is_empty());
                assert!(!chart_text(&Chart::new(kind, ""), style).is_empty());
            }
        }
    }
}
