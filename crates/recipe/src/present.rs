//! What a finished job looks like: the report of a quantisation.

pub mod layer_adaptive;
pub mod prune;

use crate::quantize::{Comparison, QuantizeJob};
use compress::block::HISTOGRAM_BINS;
use compress::{LayerResult, Outcome, Plan, QuantizeOptions};
use report::{Block, Cell, Chart, ChartKind, Column, Report, Section, Table, human};

/// One line that says what will be done.
pub fn plan_line(plan: &Plan, options: &QuantizeOptions) -> String {
    let layers = plan.layers().filter(|l| l.grid.is_some()).count();
    let kept = plan.layers().count() - layers;
    if !options.quantises() {
        let (method, blocks) = (options.method.slug(), plan.blocks.len());
        return format!("plan: {method} on {blocks} blocks, nothing is quantised");
    }
    format!(
        "plan: {} on {layers} layers in {} blocks, {}{}; {} → about {}",
        options.method.slug(),
        plan.blocks.len(),
        options.precision(),
        if kept > 0 { format!(", {kept} layers left as they are") } else { String::new() },
        human::bytes(plan.bytes_before),
        human::bytes(plan.bytes_after),
    )
}

/// The report of a quantisation.
pub fn quantize(
    job: &QuantizeJob,
    outcome: &Outcome,
    measures: Option<&Comparison>,
    bytes: (u64, u64),
    seconds: f64,
    decoder: &nn::Decoder,
) -> Report {
    let options = &job.options;
    let name = job.model.file_name().map(|n| n.to_string_lossy().into_owned());
    let name = name.unwrap_or_else(|| job.model.display().to_string());
    let method = options.method.slug().to_uppercase();
    let title = match options.quantises() {
        true => format!("{method} at {}: {name}", options.precision()),
        false => format!("{method}, nothing quantised: {name}"),
    };
    let group = match options.grid.group_size {
        0 => "whole rows".to_string(),
        g => format!("groups of {g}"),
    };
    let format = serde_json::to_value(options.format).unwrap_or_default();
    let format = format.as_str().unwrap_or_default().to_string();
    let kind = if options.grid.symmetric { "symmetric" } else { "asymmetric" };
    let subtitle = match options.quantises() {
        true if options.method == compress::Method::Pvq => {
            format!("directions and lengths of groups of {}, {format} format", options.pvq.group)
        }
        true => format!("{kind} grid, {group}, {format} format"),
        false => "ordinary weights in f32".to_string(),
    };
    let mut report = Report::new(title, subtitle);
    report.fact("size", format!("{} → {}", human::bytes(bytes.0), human::bytes(bytes.1)));
    report.fact("smaller by", format!("{:.2} x", bytes.0 as f64 / bytes.1.max(1) as f64));
    if let Some(m) = measures {
        report.fact(
            "perplexity",
            format!("{:.4} → {:.4}", m.before.perplexity.perplexity, m.after.perplexity.perplexity),
        );
        report.fact("same next token", human::percent(m.distance.agreement));
    }
    if !outcome.layers.is_empty() {
        let bits = mean_bits(&outcome.layers);
        report.fact("bits per weight", format!("{bits:.3} in {} layers", outcome.layers.len()));
    }
    report.fact("time", human::seconds(seconds));

    let section = report.section("Before and after");
    section.push(before_after(measures, bytes));
    if let Some(m) = measures {
        section.text(format!(
            "Perplexity on {} ({} tokens, windows of {}).",
            m.text, m.before.perplexity.tokens, m.before.perplexity.window
        ));
        section.push(m.distance.table());
    }
    for note in &outcome.notes {
        section.text(note);
    }
    for warning in &outcome.warnings {
        section.text(format!("Warning: {warning}"));
    }
    if !outcome.layers.is_empty() {
        layer_charts(report.section("Error by layer"), &outcome.layers, decoder.num_blocks());
    }
    if let Some(worst) = worst(&outcome.layers) {
        worst_layer(report.section("The worst layer"), worst);
    }
    if outcome.layers.iter().any(|l| l.details.contains_key("dim")) {
        directions(report.section("Direction of groups"), &outcome.layers);
    }
    if !outcome.layers.is_empty() {
        report.section("Layers").push(layer_table(&outcome.layers));
    }
    let section = report.section("How it was made");
    section.code(serde_json::to_string_pretty(options).unwrap_or_default());
    section.text(
        "strata.json beside this page holds version, options, seeds, input hashes and per-layer \
         results.",
    );
    report
}

fn mean_bits(layers: &[LayerResult]) -> f64 {
    let weights = |l: &LayerResult| (l.shape[0] * l.shape[1]) as f64;
    let total: f64 = layers.iter().map(weights).sum();
    layers.iter().map(|l| l.bits_per_weight * weights(l)).sum::<f64>() / total.max(1.0)
}

fn before_after(measures: Option<&Comparison>, bytes: (u64, u64)) -> Table {
    let columns = vec![
        Column::left("measure"),
        Column::right("before"),
        Column::right("after"),
        Column::right("change"),
    ];
    let change = |a: f64, b: f64| Cell::text(format!("{:+.2} %", (b / a - 1.0) * 100.0));
    let mut table = Table::new("", columns);
    table.push(vec![
        Cell::text("size of all tensors"),
        Cell::Bytes(bytes.0),
        Cell::Bytes(bytes.1),
        change(bytes.0 as f64, bytes.1 as f64),
    ]);
    let Some(m) = measures else { return table };
    let (a, b) = (&m.before.perplexity, &m.after.perplexity);
    table.push(vec![
        Cell::text("perplexity"),
        Cell::Float(a.perplexity, 4),
        Cell::Float(b.perplexity, 4),
        change(a.perplexity, b.perplexity),
    ]);
    table.push(vec![
        Cell::text("nats per token"),
        Cell::Float(a.nll, 5),
        Cell::Float(b.nll, 5),
        change(a.nll, b.nll),
    ]);
    if let (Some(a), Some(b)) = (&m.before.facts, &m.after.facts) {
        for (label, a, b) in [
            ("facts, trained wordings", &a.train, &b.train),
            ("facts, held-out wordings", &a.heldout, &b.heldout),
        ] {
            let (a, b) = (a.accuracy(), b.accuracy());
            table.push(vec![
                Cell::text(label),
                Cell::Percent(a),
                Cell::Percent(b),
                Cell::text(format!("{:+.1} points", (b - a) * 100.0)),
            ]);
        }
    }
    table
}

/// What the error of a layer is measured by: its output where there was calibration.
fn error(layer: &LayerResult) -> f64 {
    layer.output_error.unwrap_or(layer.weight_error)
}

fn worst(layers: &[LayerResult]) -> Option<&LayerResult> {
    layers.iter().max_by(|a, b| error(a).total_cmp(&error(b)))
}

fn layer_charts(section: &mut Section, layers: &[LayerResult], blocks: usize) {
    let output = layers.iter().any(|l| l.output_error.is_some());
    let what = if output {
        "Relative squared error of each layer's output on calibration tokens."
    } else {
        "Relative squared error of each layer's weights (no calibration, so no outputs to compare)."
    };
    section.text(what);
    let mut roles: Vec<&str> = Vec::new();
    for layer in layers {
        if !roles.contains(&layer.role.as_str()) {
            roles.push(&layer.role);
        }
    }
    let mut chart = Chart::new(ChartKind::Line, "Relative error by block and role")
        .axes("block", "relative error")
        .over((0..blocks).map(|b| b.to_string()))
        .logarithmic();
    for role in &roles {
        let points =
            layers.iter().filter(|l| l.role == *role).map(|l| (l.block as f64, error(l))).collect();
        chart = chart.points(*role, points);
    }
    section.push(chart);
    let mean = |role: &str| {
        let of: Vec<f64> = layers.iter().filter(|l| l.role == role).map(error).collect();
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    let means: Vec<f64> = roles.iter().map(|role| mean(role)).collect();
    section.push(
        Chart::new(ChartKind::Bar, "Mean relative error by role")
            .axes("role", "relative error")
            .over(roles.iter().copied())
            .values("mean", &means),
    );
}

fn worst_layer(section: &mut Section, layer: &LayerResult) {
    if layer.histogram.is_empty() {
        section.text(format!("{}: relative error {:.3e}.", layer.module, error(layer)));
        return;
    }
    section.text(format!(
        "{}: relative error {:.3e}. How far its weights moved, in steps of their grid; plain \
         rounding stays within half a step.",
        layer.module,
        error(layer)
    ));
    let points = layer
        .histogram
        .iter()
        .enumerate()
        .map(|(bin, &count)| ((bin as f64 + 0.5) * 4.0 / HISTOGRAM_BINS as f64 - 2.0, count as f64))
        .collect();
    section.push(
        Chart::new(ChartKind::Histogram, "Weight change in grid steps")
            .axes("steps", "weights")
            .points(layer.role.clone(), points),
    );
    if let Some(clip) = layer.details.get("clip_histogram").and_then(|v| v.as_array()) {
        let counts: Vec<f64> = clip.iter().filter_map(|v| v.as_f64()).collect();
        section.push(
            Chart::new(ChartKind::Bar, "How far groups were clipped")
                .axes("range kept, % of the largest weight", "groups")
                .over((0..counts.len()).map(|i| (100 - 5 * i).to_string()))
                .values("groups", &counts),
        );
    }
}

/// Which way the groups of every layer run, and the measurements that decided it.
fn directions(section: &mut Section, layers: &[LayerResult]) {
    let along_output = |l: &&LayerResult| l.details.get("dim").is_some_and(|v| v == "ic");
    let count = layers.iter().filter(along_output).count();
    let weights = |l: &LayerResult| (l.shape[0] * l.shape[1]) as f64;
    let all: f64 = layers.iter().map(weights).sum();
    let share = layers.iter().filter(along_output).map(weights).sum::<f64>() / all.max(1.0);
    section.text(format!(
        "{count} of {} layers ({} of the weights) hold groups along the output, inside one input \
         channel; the others along the input.",
        layers.len(),
        human::percent(share)
    ));
    let measured = layers.iter().any(|l| l.details.contains_key("error_oc"));
    if !measured {
        section.text("The direction was given; nothing was measured to choose it.");
    }
    let mut columns = vec![Column::left("layer"), Column::left("groups along")];
    if measured {
        section.text(
            "Errors are mean squared changes at the named output on calibration tokens, each layer \
             with the layers before it already quantised. Outliers are the largest over \
             the median: of inputs by mean magnitude (they speak for groups along the output), of \
             rows by norm (they speak against).",
        );
        columns.extend([
            Column::left("judged by"),
            Column::right("error along input"),
            Column::right("error along output"),
            Column::right("output / input"),
            Column::right("input outlier"),
            Column::right("row outlier"),
        ]);
    }
    let mut table = Table::new("", columns);
    for layer in layers {
        let text = |key: &str| layer.details.get(key).and_then(|v| v.as_str()).unwrap_or_default();
        let number = |key: &str| layer.details.get(key).and_then(|v| v.as_f64());
        let direction = if text("dim") == "ic" { "output" } else { "input" };
        let mut row = vec![Cell::text(&layer.module), Cell::text(direction)];
        if measured {
            let (oc, ic) = (number("error_oc"), number("error_ic"));
            let error = |e: Option<f64>| e.map_or(Cell::Empty, |e| Cell::text(format!("{e:.4e}")));
            let ratio = oc.zip(ic).filter(|(oc, _)| *oc > 0.0).map(|(oc, ic)| ic / oc);
            row.extend([
                Cell::text(text("judged_by")),
                error(oc),
                error(ic),
                ratio.map_or(Cell::Empty, |r| Cell::Float(r, 3)),
                number("outlier").map_or(Cell::Empty, |o| Cell::Float(o, 1)),
                number("row_outlier").map_or(Cell::Empty, |o| Cell::Float(o, 1)),
            ]);
        }
        table.push(row);
    }
    section.push(table);
}

fn layer_table(layers: &[LayerResult]) -> Block {
    let mut columns = vec![
        Column::left("layer"),
        Column::left("role"),
        Column::right("shape"),
        Column::right("bits/weight"),
        Column::right("weight error"),
    ];
    let output = layers.iter().any(|l| l.output_error.is_some());
    if output {
        columns.push(Column::right("output error"));
    }
    let exponent = layers.iter().any(|l| l.details.contains_key("ratio"));
    if exponent {
        columns.push(Column::right("exponent"));
    }
    let damping = layers.iter().any(|l| l.details.contains_key("damping"));
    if damping {
        columns.push(Column::right("damping"));
    }
    let weighed = layers.iter().any(|l| l.details.contains_key("effective_tokens"));
    if weighed {
        columns.push(Column::right("effective tokens"));
        columns.push(Column::right("token weights"));
    }
    let mut table = Table::new("", columns);
    for layer in layers {
        let number = |key: &str, digits| match layer.details.get(key).and_then(|v| v.as_f64()) {
            Some(value) => Cell::Float(value, digits),
            None => Cell::Empty,
        };
        let mut row = vec![
            Cell::text(&layer.module),
            Cell::text(&layer.role),
            Cell::text(format!("{} x {}", layer.shape[0], layer.shape[1])),
            Cell::Float(layer.bits_per_weight, 3),
            Cell::Float(layer.weight_error, 6),
        ];
        if output {
            row.push(layer.output_error.map_or(Cell::Empty, |e| Cell::Float(e, 6)));
        }
        if exponent {
            row.push(number("ratio", 2));
        }
        if damping {
            row.push(number("damping", 5));
        }
        if weighed {
            let of = |key: &str| layer.details.get(key).and_then(|v| v.as_f64());
            row.push(number("effective_tokens", 0));
            row.push(match (of("token_weight_min"), of("token_weight_max")) {
                (Some(low), Some(high)) => Cell::text(format!("{low:.4} to {high:.2}")),
                _ => Cell::Empty,
            });
        }
        table.push(row);
    }
    table.into()
}
