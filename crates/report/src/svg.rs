//! Charts as inline SVG. Colours come from the page's style sheet (`page.css`): class `f3` fills,
//! `l3` strokes with the colour of series 3, so that light, dark and print share one drawing.
//!
//! Every chart is drawn twice, for a wide page and for a phone, at text sizes that can be read in
//! both; the style sheet shows one of them. Coordinates are user units of the drawing's own width.

mod heat;

use std::fmt::Write;

use crate::html::escape;
use crate::human;
use crate::scale::Scale;
use crate::{Chart, ChartKind, Series};

/// Number of series colours in the style sheet.
pub(crate) const COLORS: usize = 8;
/// Widths of the two drawings.
pub(crate) const WIDE: f64 = 880.0;
/// The width for phones.
pub(crate) const NARROW: f64 = 344.0;
/// Average width of a character at the drawing's text size of 12 units.
const CHARACTER: f64 = 7.2;
/// Longer lines are thinned: no screen shows more.
const LINE_POINTS: usize = 1200;
/// Points with a hover text per line.
const HOVER_POINTS: usize = 160;

/// The drawing of a chart at a width.
pub(crate) fn draw(chart: &Chart, width: f64) -> String {
    let mut canvas = Canvas { width, height: 0.0, body: String::new() };
    match chart.kind {
        ChartKind::Line => line(chart, &mut canvas),
        ChartKind::Bar if bars_stand(chart, width) => standing_bars(chart, &mut canvas),
        ChartKind::Bar => lying_bars(chart, &mut canvas),
        ChartKind::Histogram => histogram(chart, &mut canvas),
        ChartKind::Heat => heat::heat(chart, &mut canvas),
    }
    format!(
        "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">{}</svg>",
        n(width),
        n(canvas.height),
        escape(&chart.title),
        canvas.body
    )
}

struct Canvas {
    width: f64,
    height: f64,
    body: String,
}

/// The rectangle inside the axes.
#[derive(Clone, Copy)]
struct Plot {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Canvas {
    fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let _ = write!(
            self.body,
            "<text x=\"{}\" y=\"{}\" class=\"{class}\">{}</text>",
            n(x),
            n(y),
            escape(text)
        );
    }

    fn rule(&mut self, x1: f64, y1: f64, x2: f64, y2: f64, class: &str) {
        let _ = write!(
            self.body,
            "<path d=\"M{} {}L{} {}\" class=\"{class}\"/>",
            n(x1),
            n(y1),
            n(x2),
            n(y2)
        );
    }

    fn rect(&mut self, (x, y, w, h): (f64, f64, f64, f64), attributes: &str, title: &str) {
        let _ = write!(
            self.body,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" {attributes}><title>{}</title></rect>",
            n(x),
            n(y),
            n(w.max(0.0)),
            n(h.max(0.0)),
            escape(title)
        );
    }

    /// The horizontal grid, the labels of the y axis, and above them what the axis shows.
    fn y_axis(&mut self, plot: Plot, scale: &Scale, label: &str) {
        for (value, text) in scale.ticks(5) {
            if let Some(y) = scale.at(value) {
                self.rule(plot.left, y, plot.right, y, "g");
                self.text(plot.left - 7.0, y + 4.0, "e", &text);
            }
        }
        self.text(0.0, 12.0, "t", label);
    }

    fn x_label(&mut self, plot: Plot, label: &str) {
        if !label.is_empty() {
            self.text((plot.left + plot.right) / 2.0, self.height - 5.0, "m t", label);
        }
    }
}

/// A plot area for a chart whose y labels are known, with room for the axis labels.
fn frame(
    canvas: &mut Canvas,
    height: f64,
    chart: &Chart,
    y_values: &[f64],
    zero: bool,
) -> (Plot, Scale) {
    canvas.height = height;
    let top = if chart.y_label.is_empty() { 10.0 } else { 26.0 };
    let bottom = height - if chart.x_label.is_empty() { 24.0 } else { 44.0 };
    let scale = Scale::new(y_values.iter().copied(), chart.log_y, zero, true, (bottom, top));
    let widest = scale.ticks(5).iter().map(|(_, t)| text_width(t)).fold(0.0, f64::max);
    let plot = Plot { left: widest + 12.0, right: canvas.width - 8.0, top, bottom };
    (plot, scale)
}

fn height(canvas: &Canvas) -> f64 {
    if canvas.width < 500.0 { 240.0 } else { 320.0 }
}

fn y_values(chart: &Chart) -> Vec<f64> {
    chart.series.iter().flat_map(|s| s.points.iter().map(|p| p.1)).collect()
}

fn line(chart: &Chart, canvas: &mut Canvas) {
    let (plot, y) = frame(canvas, height(canvas), chart, &y_values(chart), false);
    let xs = || chart.series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
    let inset = if chart.categories.is_empty() { 4.0 } else { 16.0 };
    let x = Scale::new(xs(), false, false, false, (plot.left + inset, plot.right - inset));
    canvas.y_axis(plot, &y, &chart.y_label);
    if chart.categories.is_empty() {
        let whole = xs().all(|v| v.fract() == 0.0 || !v.is_finite());
        let count = if canvas.width < 500.0 { 4 } else { 8 };
        for (value, text) in x.ticks(count) {
            if let (Some(at), true) = (x.at(value), !whole || value.fract() == 0.0) {
                canvas.text(at, plot.bottom + 17.0, "m", &text);
            }
        }
    } else {
        category_labels(chart, canvas, plot, |i| x.at(i as f64));
    }
    canvas.rule(plot.left, plot.bottom, plot.right, plot.bottom, "a");
    canvas.x_label(plot, &chart.x_label);
    for (s, series) in chart.series.iter().enumerate() {
        let color = s % COLORS;
        let mut path = String::new();
        let mut pen_down = false;
        for (px, py) in thin(&series.points, LINE_POINTS) {
            match (x.at(px), y.at(py)) {
                (Some(px), Some(py)) => {
                    let _ = write!(path, "{}{} {}", if pen_down { 'L' } else { 'M' }, n(px), n(py));
                    pen_down = true;
                }
                // A gap in the line says that a value is missing.
                _ => pen_down = false,
            }
        }
        let dash = if s >= COLORS { " d" } else { "" };
        let _ = write!(canvas.body, "<path d=\"{path}\" class=\"c l{color}{dash}\"/>");
        let visible = series.points.len() <= 40;
        let step = series.points.len().div_ceil(HOVER_POINTS).max(1);
        for &(vx, vy) in series.points.iter().step_by(step) {
            let (Some(px), Some(py)) = (x.at(vx), y.at(vy)) else { continue };
            let (radius, class) =
                if visible { (3.5, format!("p f{color}")) } else { (7.0, "h".into()) };
            let at = x_name(chart, vx);
            let _ = write!(
                canvas.body,
                "<circle cx=\"{}\" cy=\"{}\" r=\"{radius}\" class=\"{class}\"><title>{}</title></circle>",
                n(px),
                n(py),
                escape(&hover(chart, series, &at, vy))
            );
        }
    }
}

fn standing_bars(chart: &Chart, canvas: &mut Canvas) {
    let (plot, y) = frame(canvas, height(canvas), chart, &y_values(chart), true);
    canvas.y_axis(plot, &y, &chart.y_label);
    let categories = category_count(chart);
    let band = (plot.right - plot.left) / categories.max(1) as f64;
    let groups = chart.series.len().max(1) as f64;
    let bar = (band * 0.78 / groups).min(56.0);
    let base = y.base();
    for (s, series) in chart.series.iter().enumerate() {
        for &(vx, vy) in &series.points {
            let (Some(index), Some(top)) = (position(vx, categories), y.at(vy)) else { continue };
            let centre = plot.left + (index as f64 + 0.5) * band;
            let left = centre + (s as f64 - groups / 2.0) * bar;
            let gap = (bar * 0.08).min(2.0);
            canvas.rect(
                (left + gap / 2.0, top.min(base), bar - gap, (base - top).abs().max(0.6)),
                &format!("rx=\"1.5\" class=\"f{}\"", s % COLORS),
                &hover(chart, series, &x_name(chart, vx), vy),
            );
            let text = human::short(vy, 3);
            if bar >= text_width(&text) {
                let above = if vy < 0.0 { top + 14.0 } else { top - 5.0 };
                canvas.text(left + bar / 2.0, above, "m v", &text);
            }
        }
    }
    canvas.rule(plot.left, base, plot.right, base, "a");
    category_labels(chart, canvas, plot, |i| Some(plot.left + (i as f64 + 0.5) * band));
    canvas.x_label(plot, &chart.x_label);
}

fn lying_bars(chart: &Chart, canvas: &mut Canvas) {
    let categories = category_count(chart);
    let groups = chart.series.len().max(1);
    let bar = if categories * groups > 160 { 6.0 } else { 13.0 };
    let band = bar * groups as f64 + if groups > 1 { 9.0 } else { 5.0 };
    let limit = canvas.width * if canvas.width < 500.0 { 0.44 } else { 0.4 };
    let names = without_common_prefix(&chart.categories);
    let widest = names.iter().map(|c| text_width(c)).fold(30.0, f64::max) + 6.0;
    let room = widest.min(limit);
    let values_shown = bar > 10.0;
    let top = 6.0;
    let plot = Plot {
        left: room + 10.0,
        right: canvas.width - if values_shown { 52.0 } else { 12.0 },
        top,
        bottom: top + band * categories as f64 + 4.0,
    };
    // The value axis lies at the bottom, and its name is the chart's y label.
    let name_room = if chart.y_label.is_empty() { 0.0 } else { 20.0 };
    canvas.height = plot.bottom + 24.0 + name_room;
    let x =
        Scale::new(y_values(chart).into_iter(), chart.log_y, true, true, (plot.left, plot.right));
    for (value, text) in x.ticks(if canvas.width < 500.0 { 3 } else { 6 }) {
        if let Some(at) = x.at(value) {
            canvas.rule(at, plot.top, at, plot.bottom, "g");
            canvas.text(at, plot.bottom + 16.0, "m", &text);
        }
    }
    let base = x.base();
    for (i, (name, whole)) in names.iter().zip(&chart.categories).enumerate() {
        let middle = plot.top + (i as f64 + 0.5) * band + 4.0;
        let _ = write!(
            canvas.body,
            "<text x=\"{}\" y=\"{}\" class=\"e\"><title>{}</title>{}</text>",
            n(room + 2.0),
            n(middle),
            escape(whole),
            escape(&shorten(name, (room / CHARACTER).floor() as usize))
        );
    }
    for (s, series) in chart.series.iter().enumerate() {
        for &(vx, vy) in &series.points {
            let (Some(index), Some(end)) = (position(vx, categories), x.at(vy)) else { continue };
            let start = plot.top + index as f64 * band + (band - bar * groups as f64) / 2.0;
            let y = start + s as f64 * bar;
            canvas.rect(
                (end.min(base), y + 0.5, (end - base).abs().max(0.6), bar - 1.0),
                &format!("rx=\"1.5\" class=\"f{}\"", s % COLORS),
                &hover(chart, series, &x_name(chart, vx), vy),
            );
            if values_shown {
                canvas.text(end.max(base) + 5.0, y + bar / 2.0 + 3.6, "v", &human::short(vy, 3));
            }
        }
    }
    canvas.rule(base, plot.top, base, plot.bottom, "a");
    if !chart.y_label.is_empty() {
        canvas.text((plot.left + plot.right) / 2.0, canvas.height - 5.0, "m t", &chart.y_label);
    }
}

fn histogram(chart: &Chart, canvas: &mut Canvas) {
    let (plot, y) = frame(canvas, height(canvas), chart, &y_values(chart), true);
    canvas.y_axis(plot, &y, &chart.y_label);
    let widths: Vec<f64> = chart.series.iter().map(bin_width).collect();
    let edges = chart.series.iter().zip(&widths).flat_map(|(series, w)| {
        series.points.iter().flat_map(move |p| [p.0 - w / 2.0, p.0 + w / 2.0])
    });
    let x = Scale::new(edges, false, false, false, (plot.left, plot.right));
    let base = y.base();
    let several = if chart.series.len() > 1 { " o" } else { "" };
    for (s, (series, bin)) in chart.series.iter().zip(&widths).enumerate() {
        for &(vx, vy) in &series.points {
            let left = x.at(vx - bin / 2.0);
            let (Some(left), Some(right), Some(top)) = (left, x.at(vx + bin / 2.0), y.at(vy))
            else {
                continue;
            };
            let gap = if right - left > 4.0 { 1.0 } else { 0.0 };
            let range = format!(
                "{} to {}",
                human::short(vx - bin / 2.0, 4),
                human::short(vx + bin / 2.0, 4)
            );
            canvas.rect(
                (left + gap / 2.0, top.min(base), right - left - gap, (base - top).abs()),
                &format!("class=\"f{}{several}\"", s % COLORS),
                &hover(chart, series, &range, vy),
            );
        }
    }
    for (value, text) in x.ticks(if canvas.width < 500.0 { 4 } else { 8 }) {
        if let Some(at) = x.at(value) {
            canvas.text(at, plot.bottom + 17.0, "m", &text);
        }
    }
    canvas.rule(plot.left, plot.bottom, plot.right, plot.bottom, "a");
    canvas.x_label(plot, &chart.x_label);
}

fn category_labels(
    chart: &Chart,
    canvas: &mut Canvas,
    plot: Plot,
    at: impl Fn(usize) -> Option<f64>,
) {
    // As many labels as fit, evenly spaced.
    let band = (plot.right - plot.left) / chart.categories.len().max(1) as f64;
    let widest = chart.categories.iter().map(|c| text_width(c)).fold(0.0, f64::max).min(110.0);
    let stride = ((widest + 6.0) / band.max(0.1)).ceil().max(1.0) as usize;
    let fits = ((band * stride as f64) / CHARACTER).floor() as usize;
    for (i, name) in chart.categories.iter().enumerate().step_by(stride) {
        if let Some(x) = at(i) {
            canvas.text(x, plot.bottom + 17.0, "m", &shorten(name, fits.max(3)));
        }
    }
}

/// Bars stand while every name fits under its group and every bar can be seen.
fn bars_stand(chart: &Chart, width: f64) -> bool {
    let categories = category_count(chart).max(1);
    let band = (width - 60.0) / categories as f64;
    let widest = chart.categories.iter().map(|c| text_width(c)).fold(0.0, f64::max);
    let bars = chart.series.len().max(1);
    widest <= band - 4.0 && band * 0.78 / bars as f64 >= 5.0
}

fn category_count(chart: &Chart) -> usize {
    // A stray index must not widen the chart without limit.
    let last = chart.series.iter().flat_map(|s| s.points.iter()).map(|p| p.0);
    let last = last.filter(|x| x.is_finite() && *x >= 0.0 && *x < 4096.0).fold(-1.0, f64::max);
    chart.categories.len().max((last + 1.0) as usize)
}

fn position(x: f64, categories: usize) -> Option<usize> {
    (x.is_finite() && x >= 0.0 && x.round() < categories as f64).then_some(x.round() as usize)
}

fn x_name(chart: &Chart, x: f64) -> String {
    let name = position(x, chart.categories.len()).and_then(|i| chart.categories.get(i));
    match name {
        Some(name) => name.clone(),
        None if chart.x_label.is_empty() => human::short(x, 6),
        None => format!("{} {}", chart.x_label, human::short(x, 6)),
    }
}

fn hover(chart: &Chart, series: &Series, at: &str, value: f64) -> String {
    let mut parts: Vec<&str> = vec![at];
    if chart.series.len() > 1 && !series.name.is_empty() {
        parts.insert(0, &series.name);
    }
    format!("{}: {}", parts.join(", "), human::short(value, 5))
}

fn bin_width(series: &Series) -> f64 {
    let gaps = series.points.windows(2).map(|w| (w[1].0 - w[0].0).abs());
    let smallest = gaps.filter(|g| g.is_finite() && *g > 0.0).fold(f64::INFINITY, f64::min);
    if smallest.is_finite() { smallest } else { 1.0 }
}

/// At most about `limit` points that keep the line's extremes: the lowest and the highest of each
/// run, in drawing order.
fn thin(points: &[(f64, f64)], limit: usize) -> Vec<(f64, f64)> {
    if points.len() <= limit {
        return points.to_vec();
    }
    let run = points.len().div_ceil(limit / 2);
    let mut kept = Vec::with_capacity(limit + 2);
    for chunk in points.chunks(run) {
        let finite = || chunk.iter().enumerate().filter(|(_, p)| p.1.is_finite());
        let low = finite().min_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let high = finite().max_by(|a, b| a.1.1.total_cmp(&b.1.1));
        match (low, high) {
            (Some(a), Some(b)) => {
                let (first, second) = if a.0 <= b.0 { (a, b) } else { (b, a) };
                kept.push(*first.1);
                if first.0 != second.0 {
                    kept.push(*second.1);
                }
            }
            _ => kept.extend(chunk.first()),
        }
    }
    kept
}

fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// Names without the dotted components that all of them begin with: `model.layers.` tells nothing
/// and costs a phone half of its width. The hover text keeps the whole name.
fn without_common_prefix(names: &[String]) -> Vec<&str> {
    let mut rest: Vec<&str> = names.iter().map(String::as_str).collect();
    while rest.len() > 1 {
        let mut heads = rest.iter().map(|name| name.split_once('.').map(|(head, _)| head));
        let Some(Some(first)) = heads.next() else { break };
        if !heads.all(|head| head == Some(first)) {
            break;
        }
        let cut = first.len() + 1;
        rest = rest.iter().map(|name| name.get(cut..).unwrap_or(name)).collect();
    }
    rest
}

/// Shortens from the front: the end of a dotted name tells more than its beginning.
fn shorten(text: &str, characters: usize) -> String {
    let length = text.chars().count();
    if length <= characters.max(2) {
        return text.to_string();
    }
    let tail: String = text.chars().skip(length + 1 - characters.max(2)).collect();
    format!("…{tail}")
}

/// A coordinate with one decimal and no more characters than it needs.
fn n(value: f64) -> String {
    let text = format!("{value:.1}");
    match text.strip_suffix(".0") {
        Some("-0") => "0".into(),
        Some(whole) => whole.to_string(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str, what: &str) -> usize {
        text.matches(what).count()
    }

    #[test]
    fn every_finite_value_is_drawn_with_its_hover_text() {
        let chart = Chart::new(ChartKind::Bar, "t")
            .over(["a", "b<"])
            .values("s", &[1.0, 2.0])
            .values("r", &[3.0, f64::NAN]);
        for width in [WIDE, NARROW] {
            let svg = draw(&chart, width);
            assert_eq!(count(&svg, "<rect"), 3, "{svg}");
            assert!(svg.contains("<title>s, b&lt;: 2</title>"), "{svg}");
            assert!(!svg.contains("NaN"));
        }
    }

    #[test]
    fn many_long_names_lie_down() {
        let names = (0..30).map(|i| format!("model.layers.{i}.mlp.down_proj"));
        let chart = Chart::new(ChartKind::Bar, "t").over(names).values("s", &[1.0; 30]);
        assert!(!bars_stand(&chart, WIDE));
        assert!(bars_stand(&Chart::new(ChartKind::Bar, "t").over(["q", "k"]), WIDE));
        assert_eq!(count(&draw(&chart, WIDE), "<rect"), 30);
    }

    #[test]
    fn common_beginnings_are_left_out() {
        let names = ["model.layers.0.q", "model.layers.1.q"].map(String::from);
        assert_eq!(without_common_prefix(&names), ["0.q", "1.q"]);
        let names = ["model.a", "lm_head"].map(String::from);
        assert_eq!(without_common_prefix(&names), ["model.a", "lm_head"]);
        assert_eq!(shorten("model.layers.0", 8), "…ayers.0");
    }

    #[test]
    fn empty_and_odd_charts_are_drawn() {
        for kind in [ChartKind::Line, ChartKind::Bar, ChartKind::Histogram, ChartKind::Heat] {
            for log in [false, true] {
                let mut chart = Chart::new(kind, "t");
                chart.log_y = log;
                assert!(draw(&chart, WIDE).starts_with("<svg"));
                let odd = vec![(f64::NAN, 1.0), (0.0, f64::INFINITY), (1e300, -1.0), (-3.0, 0.0)];
                let svg = draw(&chart.points("odd", odd), NARROW);
                assert!(!svg.contains("NaN") && !svg.contains("inf\""), "{kind:?} {svg}");
                assert!(svg.len() < 20_000);
            }
        }
    }

    #[test]
    fn long_lines_are_thinned_but_keep_their_extremes() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (i as f64, 1.0)).collect();
        points[31_415].1 = 99.0;
        let thinned = thin(&points, LINE_POINTS);
        assert!(thinned.len() <= LINE_POINTS + 2);
        assert!(thinned.contains(&(31_415.0, 99.0)));
    }
}
