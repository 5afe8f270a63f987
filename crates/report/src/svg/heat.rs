//! The heat chart: a grid of shades with its key.

use std::fmt::Write;

use super::{
    CHARACTER, Canvas, Plot, category_count, category_labels, hover, n, position, shorten,
    text_width, x_name, y_values,
};
use crate::html::escape;
use crate::{Chart, human};

pub(super) fn heat(chart: &Chart, canvas: &mut Canvas) {
    let columns = category_count(chart);
    let rows = chart.series.len();
    let limit = canvas.width * 0.34;
    let widest = chart.series.iter().map(|s| text_width(&s.name)).fold(20.0, f64::max) + 6.0;
    let room = widest.min(limit);
    let plot_left = room + 10.0;
    let cell_width = ((canvas.width - plot_left - 2.0) / columns.max(1) as f64).min(150.0);
    let cell_height = if rows > 40 { 12.0 } else { 24.0 };
    let top = 30.0;
    let plot = Plot {
        left: plot_left,
        right: plot_left + cell_width * columns as f64,
        top,
        bottom: top + cell_height * rows as f64,
    };
    canvas.height = plot.bottom + if chart.x_label.is_empty() { 24.0 } else { 44.0 };
    let shade = Shade::new(&y_values(chart), chart.log_y);
    shade_legend(chart, canvas, &shade);
    for (r, series) in chart.series.iter().enumerate() {
        let y = plot.top + r as f64 * cell_height;
        let _ = write!(
            canvas.body,
            "<text x=\"{}\" y=\"{}\" class=\"e\"><title>{}</title>{}</text>",
            n(room + 2.0),
            n(y + cell_height / 2.0 + 4.0),
            escape(&series.name),
            escape(&shorten(&series.name, (room / CHARACTER).floor() as usize))
        );
        for &(vx, vy) in &series.points {
            let Some(index) = position(vx, columns) else { continue };
            let x = plot.left + index as f64 * cell_width;
            let title = hover(chart, series, &x_name(chart, vx), vy);
            let gap = if cell_width > 6.0 { 1.0 } else { 0.0 };
            let place = (x + gap / 2.0, y + gap / 2.0, cell_width - gap, cell_height - gap);
            let Some((color, opacity)) = shade.of(vy) else {
                canvas.rect(place, "class=\"n\"", &title);
                continue;
            };
            let attributes = format!("class=\"f{color}\" fill-opacity=\"{opacity:.2}\"");
            canvas.rect(place, &attributes, &title);
            let text = human::short(vy, 2);
            if cell_width > text_width(&text) + 6.0 && cell_height > 16.0 {
                let class = if opacity > 0.72 { "m i" } else { "m v" };
                canvas.text(x + cell_width / 2.0, y + cell_height / 2.0 + 4.0, class, &text);
            }
        }
    }
    category_labels(chart, canvas, plot, |i| Some(plot.left + (i as f64 + 0.5) * cell_width));
    canvas.x_label(plot, &chart.x_label);
}

/// The key of a heat chart: its name, the lowest shade, the highest shade.
fn shade_legend(chart: &Chart, canvas: &mut Canvas, shade: &Shade) {
    canvas.text(0.0, 12.0, "t", &chart.y_label);
    let (low, high) = (human::short(shade.low, 3), human::short(shade.high, 3));
    let steps = 24;
    let step = if canvas.width < 500.0 { 3.0 } else { 5.0 };
    let right = canvas.width - 4.0 - text_width(&high) - 6.0;
    let left = right - step * steps as f64;
    canvas.text(left - 6.0, 13.0, "e", &low);
    canvas.text(right + 6.0, 13.0, "v", &high);
    for i in 0..steps {
        let share = (i as f64 + 0.5) / steps as f64;
        if let Some((color, opacity)) = shade.of(shade.value(share)) {
            let _ = write!(
                canvas.body,
                "<rect x=\"{}\" y=\"4\" width=\"{}\" height=\"10\" class=\"f{color}\" fill-opacity=\"{opacity:.2}\"/>",
                n(left + i as f64 * step),
                n(step + 0.3)
            );
        }
    }
}

/// From values to shades: one colour for values of one sign, two for both.
struct Shade {
    low: f64,
    high: f64,
    log: bool,
}

impl Shade {
    fn new(values: &[f64], log: bool) -> Self {
        let fit = |v: &&f64| v.is_finite() && (!log || **v > 0.0);
        let low = values.iter().filter(fit).copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().filter(fit).copied().fold(f64::NEG_INFINITY, f64::max);
        if low > high { Self { low: 0.0, high: 1.0, log: false } } else { Self { low, high, log } }
    }

    fn of(&self, value: f64) -> Option<(usize, f64)> {
        if !value.is_finite() || (self.log && value <= 0.0) {
            return None;
        }
        if !self.log && self.low < 0.0 && self.high > 0.0 {
            let largest = self.high.max(-self.low);
            return Some((usize::from(value < 0.0), 0.06 + 0.94 * (value.abs() / largest)));
        }
        let share = if self.high <= self.low {
            1.0
        } else if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        Some((0, 0.08 + 0.92 * share.clamp(0.0, 1.0)))
    }

    fn value(&self, share: f64) -> f64 {
        if self.log && self.low > 0.0 {
            self.low * (self.high / self.low).powf(share)
        } else {
            self.low + share * (self.high - self.low)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Shade;

    #[test]
    fn shades_of_both_signs_have_two_colours() {
        let shade = Shade::new(&[-1.0, 0.0, 2.0], false);
        assert_eq!(shade.of(2.0), Some((0, 1.0)));
        assert_eq!(shade.of(-1.0).unwrap().0, 1);
        assert_eq!(Shade::new(&[1.0, 3.0], false).of(1.0), Some((0, 0.08)));
    }
}
