//! What a finished layer-adaptive pruning looks like.

use super::before_after;
use crate::layer_adaptive::Judged;
use crate::prune::PruneJob;
use compress::layer_adaptive_pruning::iterate::{Pruned, RoundNote};
use compress::layer_adaptive_pruning::{LayerShare, Round};
use report::{Block, Cell, Chart, ChartKind, Column, Report, Section, Table, human};

/// Curves that are drawn; of more layers every n-th.
const CURVES: usize = 24;

/// The report.
pub fn report(
    job: &PruneJob,
    done: &Pruned,
    judged: &Judged,
    bytes: (u64, u64),
    seconds: f64,
) -> Report {
    let options = &job.options.layer_adaptive;
    let round = &done.round;
    let name = job.model.file_name().map(|n| n.to_string_lossy().into_owned());
    let title = format!(
        "Layer-adaptive pruning at {}: {}",
        human::percent(round.reached),
        name.unwrap_or_else(|| job.model.display().to_string())
    );
    let rounds = match options.rounds {
        1 => "one round".to_string(),
        n => format!("{n} rounds"),
    };
    let subtitle = format!("allocator {}, {rounds}", options.allocator.label());
    let mut report = Report::new(title, subtitle);
    report.fact(
        "zeros",
        format!("{} in {} layers", human::percent(round.reached), round.layers.len()),
    );
    report.fact("size", format!("{} → {}", human::bytes(bytes.0), human::bytes(bytes.1)));
    match judged {
        Judged::Text(m) => {
            let (a, b) = (m.before.perplexity.perplexity, m.after.perplexity.perplexity);
            report.fact("perplexity", format!("{a:.4} → {b:.4}"));
            report.fact("same next token", human::percent(m.distance.agreement));
        }
        Judged::Images(both) => {
            let [a, b] = both.as_ref();
            report.fact(
                "top-1 accuracy",
                format!("{} → {}", human::percent(a.accuracy), human::percent(b.accuracy)),
            );
        }
        Judged::Nothing => {}
    }
    if let Some(measured) = round.measured {
        report.fact("output distortion", format!("{measured:.4e}"));
    }
    if let Some(ratio) = round.additivity() {
        report.fact("measured / predicted", format!("{ratio:.2}"));
    }
    report.fact("time", human::seconds(seconds));

    let section = report.section("Before and after");
    section.push(comparison(judged, bytes));
    describe(section, round, judged);
    for warning in &round.warnings {
        section.text(format!("Warning: {warning}"));
    }
    sparsity_chart(report.section("Sparsity by layer"), &round.layers);
    if !round.curves.is_empty() {
        curve_chart(report.section("Rate-distortion curves"), round);
    }
    if done.history.len() > 1 {
        report.section("Rounds").push(round_table(&done.history));
    }
    report.section("Layers").push(layer_table(&round.layers));
    let section = report.section("How it was made");
    section.code(serde_json::to_string_pretty(&job.options).unwrap_or_default());
    section.text(
        "strata.json beside this page holds version, options, seeds and input hashes; \
         allocation.json what every layer keeps; curves.json the curves; masks/ a flag per weight.",
    );
    report
}

fn comparison(judged: &Judged, bytes: (u64, u64)) -> Table {
    let measures = match judged {
        Judged::Text(m) => Some(m.as_ref()),
        _ => None,
    };
    let mut table = before_after(measures, bytes);
    if let Judged::Images(both) = judged {
        let [a, b] = both.as_ref();
        table.push(vec![
            Cell::text("top-1 accuracy"),
            Cell::Percent(a.accuracy),
            Cell::Percent(b.accuracy),
            Cell::text(format!("{:+.2} points", (b.accuracy - a.accuracy) * 100.0)),
        ]);
        table.push(vec![
            Cell::text("loss (nats)"),
            Cell::Float(a.loss, 4),
            Cell::Float(b.loss, 4),
            Cell::text(format!("{:+.2} %", (b.loss / a.loss - 1.0) * 100.0)),
        ]);
    }
    table
}

fn describe(section: &mut Section, round: &Round, judged: &Judged) {
    if let Judged::Text(m) = judged {
        section.text(format!(
            "Perplexity on {} ({} tokens, windows of {}).",
            m.text, m.before.perplexity.tokens, m.before.perplexity.window
        ));
        section.push(m.distance.table());
    }
    if let (Some(predicted), Some(measured)) = (round.predicted, round.measured) {
        let exact = match round.exact {
            Some(true) => "No choice of grid points has a smaller predicted sum.",
            _ => {
                "The table's units were coarser than single weights; a slightly smaller sum may \
                  exist (--allocation-units)."
            }
        };
        section.text(format!(
            "Squared change of the output on the calibration inputs: the layers' curves predict \
             {predicted:.4e}, together they make {measured:.4e}. {exact}"
        ));
    }
    if let Some(left) = round.operations {
        section.text(format!(
            "{} of the multiplications of one input are left in these layers.",
            human::percent(left)
        ));
    }
}

fn sparsity_chart(section: &mut Section, layers: &[LayerShare]) {
    let values: Vec<f64> = layers.iter().map(|l| 100.0 * l.sparsity).collect();
    section.push(
        Chart::new(ChartKind::Bar, "Share of zeros")
            .axes("layer", "% of the weights")
            .over(layers.iter().map(|l| l.module.as_str()))
            .values("zeros", &values),
    );
}

fn curve_chart(section: &mut Section, round: &Round) {
    let step = round.curves.len().div_ceil(CURVES).max(1);
    if step > 1 {
        section.text(format!(
            "One of every {step} layers is drawn; curves.json holds all {}.",
            round.curves.len()
        ));
    }
    let mut chart = Chart::new(ChartKind::Line, "Change of the output when one layer is thinned")
        .axes("% of the layer's weights pruned", "mean squared change of the logits")
        .logarithmic();
    for curve in round.curves.iter().step_by(step) {
        let points = curve.amount.iter().zip(&curve.distortion);
        let points = points.map(|(a, d)| (100.0 * a, *d)).collect();
        chart = chart.points(curve.module.clone(), points);
    }
    section.push(chart);
}

fn round_table(history: &[RoundNote]) -> Table {
    let columns = ["round", "sparsity", "predicted", "measured", "training loss"];
    let mut table = Table::new("", columns.map(Column::right).to_vec());
    let float = |value: Option<f64>| value.map_or(Cell::Empty, |v| Cell::Float(v, 4));
    for note in history {
        table.push(vec![
            Cell::Int(i64::from(note.round)),
            Cell::Percent(note.reached),
            float(note.predicted),
            float(note.measured),
            float(note.loss),
        ]);
    }
    table
}

fn layer_table(layers: &[LayerShare]) -> Block {
    let columns = vec![
        Column::left("layer"),
        Column::left("role"),
        Column::right("weights"),
        Column::right("kept"),
        Column::right("zeros"),
        Column::right("predicted distortion"),
        Column::right("empty outputs"),
    ];
    let mut table = Table::new("", columns);
    for layer in layers {
        table.push(vec![
            Cell::text(&layer.module),
            Cell::text(&layer.role),
            Cell::Count(layer.total as u64),
            Cell::Count(layer.kept as u64),
            Cell::Percent(layer.sparsity),
            layer.predicted.map_or(Cell::Empty, |d| Cell::Float(d, 6)),
            Cell::Int(layer.empty_outputs as i64),
        ]);
    }
    table.into()
}
