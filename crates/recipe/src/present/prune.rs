//! What a finished pruning job looks like.

use super::{before_after, layer_charts};
use crate::prune::{DomainComparison, PruneJob};
use crate::quantize::Comparison;
use compress::mask::Structure;
use compress::{LayerResult, Outcome, Plan, PruneMethod, PruneOptions};
use report::{Cell, Chart, ChartKind, Column, Report, Section, Table, human};

/// Layers whose zeros are drawn.
const PICTURES: usize = 3;

/// One line that says what will be done.
pub fn plan_line(plan: &Plan, options: &PruneOptions) -> String {
    let planned: Vec<f64> = plan.layers().filter_map(|layer| layer.sparsity).collect();
    let kept = plan.layers().count() - planned.len();
    format!(
        "plan: {} on {} layers in {} blocks, {} of their weights{}; {} → about {}",
        options.method.slug(),
        planned.len(),
        plan.blocks.len(),
        human::percent(planned.first().copied().unwrap_or(0.0)),
        if kept > 0 { format!(", {kept} layers left as they are") } else { String::new() },
        human::bytes(plan.bytes_before),
        human::bytes(plan.bytes_after),
    )
}

/// Everything that a report is made of.
pub struct Finished<'a> {
    /// The job.
    pub job: &'a PruneJob,
    /// What it left.
    pub outcome: &'a Outcome,
    /// Measured on general text.
    pub measures: Option<&'a Comparison>,
    /// Measured on the domain's text.
    pub domain: Option<&'a DomainComparison>,
    /// Bytes before and after.
    pub bytes: (u64, u64),
    /// Seconds.
    pub seconds: f64,
    /// Blocks of the model.
    pub blocks: usize,
}

/// The report of a pruning job.
pub fn report(finished: &Finished<'_>) -> Report {
    let Finished { job, outcome, measures, domain, bytes, seconds, blocks } = *finished;
    let options = &job.options;
    let layers = &outcome.layers;
    let sparsity = compress::prune::total_sparsity(layers);
    let name = job.model.file_name().map(|n| n.to_string_lossy().into_owned());
    let title = format!(
        "{} at {}: {}",
        title(options.method),
        human::percent(sparsity),
        name.unwrap_or_else(|| job.model.display().to_string())
    );
    let mut report = Report::new(title, subtitle(options));
    report.fact("zeros", format!("{} in {} layers", human::percent(sparsity), layers.len()));
    report.fact("size", format!("{} → {}", human::bytes(bytes.0), human::bytes(bytes.1)));
    let change = |a: f64, b: f64| format!("{a:.4} → {b:.4}");
    if let Some(m) = measures {
        let (a, b) = (m.before.perplexity.perplexity, m.after.perplexity.perplexity);
        report.fact("perplexity", change(a, b));
        report.fact("same next token", human::percent(m.distance.agreement));
    }
    if let Some(d) = domain {
        report.fact("perplexity, domain", change(d.before.perplexity, d.after.perplexity));
    }
    report.fact("time", human::seconds(seconds));

    let section = report.section("Before and after");
    let mut table = before_after(measures, bytes);
    if let Some(d) = domain {
        for (label, a, b, digits) in [
            ("perplexity, domain", d.before.perplexity, d.after.perplexity, 4),
            ("nats per token, domain", d.before.nll, d.after.nll, 5),
        ] {
            let change = Cell::text(format!("{:+.2} %", (b / a - 1.0) * 100.0));
            table.push(vec![
                Cell::text(label),
                Cell::Float(a, digits),
                Cell::Float(b, digits),
                change,
            ]);
        }
    }
    section.push(table);
    if let Some(m) = measures {
        section.text(format!(
            "Perplexity on {} ({} tokens, windows of {}).",
            m.text, m.before.perplexity.tokens, m.before.perplexity.window
        ));
        section.push(m.distance.table());
    }
    if let Some(d) = domain {
        section.text(format!(
            "Domain: {} ({} tokens, windows of {}).",
            d.text, d.before.tokens, d.before.window
        ));
    }
    for warning in &outcome.warnings {
        section.text(format!("Warning: {warning}"));
    }
    sparsity_chart(report.section("Zeros by layer"), layers, blocks);
    pictures(report.section("Where the zeros are"), layers);
    layer_charts(report.section("Error by layer"), layers, blocks);
    report.section("Layers").push(layer_table(layers));
    let section = report.section("How it was made");
    section.code(serde_json::to_string_pretty(options).unwrap_or_default());
    section.text(
        "strata.json beside this page holds version, options, seeds, input hashes and per-layer \
         results; masks/ holds one bit per weight, set where it is kept.",
    );
    report
}

fn title(method: PruneMethod) -> &'static str {
    match method {
        PruneMethod::Magnitude => "Magnitude pruning",
        PruneMethod::Random => "Random pruning",
        PruneMethod::Wanda => "Wanda",
        PruneMethod::SparseGpt => "SparseGPT",
        PruneMethod::DPruner => "D-Pruner",
        PruneMethod::LayerAdaptivePruning => "Layer-adaptive pruning",
    }
}

fn subtitle(options: &PruneOptions) -> String {
    let rule = match options.pattern {
        Structure::Unstructured if options.method == PruneMethod::SparseGpt => {
            format!("blocks of {} columns", options.sparsegpt.block_size)
        }
        Structure::Unstructured => format!("scope {}", options.scope()),
        pattern => format!("pattern {pattern}"),
    };
    match options.method {
        PruneMethod::DPruner => format!(
            "mode {}, lambda {}, {rule}",
            options.d_pruner.importance_mode.label(),
            options.d_pruner.lambda()
        ),
        _ => rule,
    }
}

fn sparsity(layer: &LayerResult) -> f64 {
    layer.sparsity.unwrap_or(0.0)
}

/// Share of zeros by role and block.
fn sparsity_chart(section: &mut Section, layers: &[LayerResult], blocks: usize) {
    section.text("Share of weights that are zero.");
    let mut roles: Vec<&str> = Vec::new();
    for layer in layers {
        if !roles.contains(&layer.role.as_str()) {
            roles.push(&layer.role);
        }
    }
    let mut chart = Chart::new(ChartKind::Heat, "Zeros by role and block")
        .axes("block", "share of zeros")
        .over((0..blocks).map(|block| block.to_string()));
    for role in roles {
        let of = layers.iter().filter(|layer| layer.role == role);
        chart = chart.points(role, of.map(|layer| (layer.block as f64, sparsity(layer))).collect());
    }
    section.push(chart);
}

/// The local share of zeros in the layers where it varies most.
fn pictures(section: &mut Section, layers: &[LayerResult]) {
    let mut uneven: Vec<(f64, &LayerResult, Vec<Vec<f64>>)> = layers
        .iter()
        .filter_map(|layer| {
            let map: Vec<Vec<f64>> =
                serde_json::from_value(layer.details.get("map")?.clone()).ok()?;
            let cells: Vec<f64> = map.iter().flatten().copied().collect();
            let mean = cells.iter().sum::<f64>() / cells.len().max(1) as f64;
            let variance = cells.iter().map(|c| (c - mean).powi(2)).sum::<f64>();
            Some((variance / cells.len().max(1) as f64, layer, map))
        })
        .collect();
    uneven.sort_by(|a, b| b.0.total_cmp(&a.0));
    section.text(
        "Local share of zeros (rows: outputs, columns: inputs) in the layers where it varies most.",
    );
    for (_, layer, map) in uneven.into_iter().take(PICTURES) {
        let [out, width] = layer.shape;
        let columns = map.first().map_or(0, Vec::len);
        let mut chart = Chart::new(ChartKind::Heat, layer.module.clone())
            .axes("input", "share of zeros")
            .over((0..columns).map(|c| (c * width / columns.max(1)).to_string()));
        let rows = map.len().max(1);
        for (row, cells) in map.iter().enumerate() {
            chart = chart.values(format!("output {}", row * out / rows), cells);
        }
        section.push(chart);
    }
}

fn layer_table(layers: &[LayerResult]) -> Table {
    let mut columns = vec![
        Column::left("layer"),
        Column::left("role"),
        Column::right("shape"),
        Column::right("zeros"),
        Column::right("weight error"),
    ];
    let output = layers.iter().any(|l| l.output_error.is_some());
    if output {
        columns.push(Column::right("output error"));
    }
    let damping = layers.iter().any(|l| l.details.contains_key("damping"));
    if damping {
        columns.push(Column::right("damping"));
    }
    let mut table = Table::new("", columns);
    for layer in layers {
        let mut row = vec![
            Cell::text(&layer.module),
            Cell::text(&layer.role),
            Cell::text(format!("{} x {}", layer.shape[0], layer.shape[1])),
            Cell::Percent(sparsity(layer)),
            Cell::Float(layer.weight_error, 6),
        ];
        if output {
            row.push(layer.output_error.map_or(Cell::Empty, |e| Cell::Float(e, 6)));
        }
        if damping {
            let value = layer.details.get("damping").and_then(|v| v.as_f64());
            row.push(value.map_or(Cell::Empty, |d| Cell::Float(d, 5)));
        }
        table.push(row);
    }
    table
}
