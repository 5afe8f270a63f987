//! What a report says about a schedule of widths: which layer got how many bits and why, and the
//! trade-off between bits and perplexity.

use crate::Result;
use crate::measure::Measurement;
use crate::quantize::QuantizeJob;
use compress::layerwise_quant::{BudgetWeight, Point, Resolved, Schedule, without_blocks};
use compress::{Calibration, Method, Plan, Target};
use nn::Model;
use report::{Cell, Chart, ChartKind, Column, Report, Section, Table};
use std::path::{Path, PathBuf};

/// One measured point of the trade-off.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CurvePoint {
    /// Mean bits of the codes.
    pub average_bits: f64,
    /// Mean bits including scales and zero points.
    pub effective: f64,
    /// Blocks below the highest width, for a schedule by importance.
    pub lowered: Option<usize>,
    /// Perplexity of this schedule.
    pub perplexity: f64,
    /// Perplexity when the same blocks are left out instead of lowered.
    pub skipped: Option<f64>,
}

/// A directory that goes when it is no longer needed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // What is left of it holds nothing but copies.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Measures perplexity along the trade-off of `resolved`.
pub fn curve(
    job: &QuantizeJob,
    model: &Model,
    resolved: &Resolved,
    calibration: &Calibration,
) -> Result<Vec<CurvePoint>> {
    let measurement = Measurement::new(model, &job.measure)?;
    let points = resolved.points(job.options.layerwise.curve)?;
    let progress = report::Progress::new("trade-off", points.len() as u64, "points");
    let place = |name: &str| {
        let mut path = job.out.clone().into_os_string();
        path.push(name);
        Temporary(PathBuf::from(path))
    };
    let (first, later) = (place(".curve-first"), place(".curve-point"));
    let mut all = Vec::new();
    for (index, point) in points.iter().enumerate() {
        let scratch = if index == 0 { &first.0 } else { &later.0 };
        let changed = at(job, model, resolved, point, calibration, scratch)?;
        let perplexity = measurement.perplexity(&changed)?;
        drop(changed);
        let by_importance = resolved.schedule.by == "importance";
        let skipped = match &points[..] {
            [whole, ..] if by_importance => {
                let mut pruned = match job.options.method {
                    Method::Rtn => resolved.rounded(model, whole)?,
                    _ => Model::open(&first.0)?,
                };
                pruned.decoder = without_blocks(&pruned.decoder, &point.lowered);
                Some(measurement.perplexity(&pruned)?)
            }
            _ => None,
        };
        all.push(CurvePoint {
            average_bits: point.average_bits,
            effective: point.effective,
            lowered: by_importance.then_some(point.lowered.len()),
            perplexity,
            skipped,
        });
        progress.inc(1);
    }
    progress.finish();
    Ok(all)
}

/// The model at one point. Rounding to nearest happens as it computes, other methods write.
fn at(
    job: &QuantizeJob,
    model: &Model,
    resolved: &Resolved,
    point: &Point,
    calibration: &Calibration,
    scratch: &Path,
) -> Result<Model> {
    if job.options.method == Method::Rtn {
        return Ok(resolved.rounded(model, point)?);
    }
    let plan = Plan::new(&model.decoder, &model.checkpoint, &point.options)?;
    let target = Target {
        out: scratch,
        resume: false,
        overwrite: true,
        provenance: serde_json::Value::Null,
    };
    let hidden = report::Progress::hidden();
    let outcome = compress::run(model, &plan, &point.options, calibration, &target, &hidden)?;
    Ok(Model::open(&outcome.path)?)
}

/// How far the finished model's predictions are from full precision on the windows that a budget was
/// weighed on; absent where errors are not divergences.
pub fn divergence(
    job: &QuantizeJob,
    schedule: &Schedule,
    before: &Model,
    after: &Model,
    calibration: &Calibration,
) -> Result<Option<f64>> {
    let own = &job.options.layerwise;
    let weighed = matches!(own.budget_weight, BudgetWeight::Loss | BudgetWeight::Measured);
    if schedule.by != "budget" || !weighed || job.measure.skip {
        return Ok(None);
    }
    let windows = calibration.first(own.probe_samples)?;
    let found = eval::compare(before, after, windows.ids(), windows.length())?;
    Ok(Some(found.kl_divergence))
}

/// Adds what the schedule is to a report, behind its first section.
pub fn describe(
    report: &mut Report,
    job: &QuantizeJob,
    schedule: &Schedule,
    measured: Option<f64>,
    curve: &[CurvePoint],
) {
    let name = job.model.file_name().map(|n| n.to_string_lossy().into_owned());
    report.title = format!(
        "{} at {:.3} bits on average: {}",
        job.options.method.slug().to_uppercase(),
        schedule.average_bits,
        name.unwrap_or_else(|| job.model.display().to_string())
    );
    report.fact("average bits", format!("{:.3}", schedule.average_bits));
    let mut section = Section { title: "Bits by layer".into(), blocks: Vec::new() };
    let how = match schedule.by {
        "importance" => format!("Blocks ordered by {}", word(&schedule.score)),
        _ => "Bits distributed by measured error".to_string(),
    };
    section.text(format!(
        "{how}; asked for {}. Codes take {:.4} bits per weight on average, with scales and zero \
         points {:.4}.",
        schedule.target, schedule.average_bits, schedule.effective_bits_per_weight
    ));
    section.push(picture(schedule));
    if schedule.by == "importance" {
        section.push(importance(schedule));
        let of = |block: &usize| schedule.scores.get(block).copied().unwrap_or(f64::NAN);
        let blocks: Vec<usize> = schedule.scores.keys().copied().collect();
        section.push(
            Chart::new(ChartKind::Bar, format!("Score of every block ({})", word(&schedule.score)))
                .axes("block", "score")
                .over(blocks.iter().map(|b| b.to_string()))
                .values("score", &blocks.iter().map(of).collect::<Vec<_>>()),
        );
    } else {
        units(&mut section, schedule, measured);
    }
    for note in &schedule.notes {
        section.text(note.clone());
    }
    if !curve.is_empty() {
        trade_off(&mut section, curve);
    }
    let at = report.sections.len().min(1);
    report.sections.insert(at, section);
}

fn word(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Bits of every layer: roles down, blocks across.
fn picture(schedule: &Schedule) -> Chart {
    let mut roles: Vec<&str> = Vec::new();
    for layer in &schedule.layers {
        if !roles.contains(&layer.role.as_str()) {
            roles.push(&layer.role);
        }
    }
    let blocks = schedule.layers.iter().map(|l| l.block).max().map_or(0, |b| b + 1);
    let mut chart = Chart::new(ChartKind::Heat, "Bits of every layer")
        .axes("block", "bits")
        .over((0..blocks).map(|b| b.to_string()));
    for role in roles {
        let here = schedule.layers.iter().filter(|l| l.role == role);
        chart = chart.points(role, here.map(|l| (l.block as f64, f64::from(l.bits))).collect());
    }
    chart
}

fn importance(schedule: &Schedule) -> Table {
    let columns = ["rank", "block", "score", "bits"].map(Column::right).to_vec();
    let mut table = Table::new("Most important first", columns);
    for (rank, block) in schedule.order.iter().enumerate() {
        table.push(vec![
            Cell::Int(rank as i64 + 1),
            Cell::Int(*block as i64),
            schedule.scores.get(block).map_or(Cell::Empty, |s| Cell::Float(*s, 5)),
            schedule.bits.get(block).map_or(Cell::Empty, |b| Cell::Int(i64::from(*b))),
        ]);
    }
    table
}

fn units(section: &mut Section, schedule: &Schedule, measured: Option<f64>) {
    let columns = vec![
        Column::right("block"),
        Column::left("layers"),
        Column::right("bits"),
        Column::right("relative output error"),
        Column::right("error counted"),
        Column::right("share"),
    ];
    let mut table = Table::new("What every unit got", columns);
    let total = schedule.predicted_error.unwrap_or(0.0);
    for unit in &schedule.units {
        let layers: Vec<_> = unit
            .layers
            .iter()
            .filter_map(|l| schedule.layers.iter().find(|s| s.module == l.module))
            .collect();
        let Some(bits) = layers.first().map(|l| l.bits) else { continue };
        let at = unit.bits.iter().position(|b| *b == bits).unwrap_or(0);
        let value = |of: &[f64]| of.get(at).copied().unwrap_or(f64::NAN);
        let roles: Vec<&str> = layers.iter().map(|l| l.role.as_str()).collect();
        table.push(vec![
            Cell::Int(unit.block as i64),
            Cell::text(roles.join(", ")),
            Cell::Int(i64::from(bits)),
            Cell::Float(value(&unit.relative), 6),
            Cell::Float(value(&unit.error), 6),
            Cell::Percent(if total > 0.0 { value(&unit.error) / total } else { 0.0 }),
        ]);
    }
    section.push(table);
    if let (Some(error), Some(bound)) = (schedule.predicted_error, schedule.error_bound) {
        section.text(format!(
            "Sum of counted errors {error:.6}; no distribution within the budget is below \
             {bound:.6}.{}",
            measured.map_or(String::new(), |kl| format!(
                " Divergence of the finished model on the same windows: {kl:.6} nats per token, \
                 {:.2} of the sum{}.",
                kl / error.max(f64::MIN_POSITIVE),
                if (0.5..=2.0).contains(&(kl / error.max(f64::MIN_POSITIVE))) {
                    ""
                } else {
                    ": errors of these layers do not simply add up"
                }
            ))
        ));
    }
}

fn trade_off(section: &mut Section, curve: &[CurvePoint]) {
    let mut columns = vec![
        Column::right("average bits"),
        Column::right("with scales"),
        Column::right("perplexity"),
    ];
    let by_blocks = curve.iter().any(|p| p.skipped.is_some());
    if by_blocks {
        columns.insert(0, Column::right("blocks lowered"));
        columns.push(Column::right("same blocks left out"));
    }
    let mut table = Table::new("Trade-off", columns);
    for point in curve {
        let mut row = vec![
            Cell::Float(point.average_bits, 3),
            Cell::Float(point.effective, 3),
            Cell::Float(point.perplexity, 4),
        ];
        if by_blocks {
            row.insert(0, point.lowered.map_or(Cell::Empty, |n| Cell::Int(n as i64)));
            row.push(point.skipped.map_or(Cell::Empty, |p| Cell::Float(p, 4)));
        }
        table.push(row);
    }
    section.push(table);
    let of = |f: &dyn Fn(&CurvePoint) -> Option<f64>| -> Vec<(f64, f64)> {
        curve.iter().filter_map(|p| Some((p.average_bits, f(p)?))).collect()
    };
    let mut chart = Chart::new(ChartKind::Line, "Perplexity by average bits")
        .axes("average bits per weight", "perplexity")
        .points("lowered", of(&|p| Some(p.perplexity)))
        .logarithmic();
    if by_blocks {
        chart = chart.points("left out", of(&|p| p.skipped));
    }
    section.push(chart);
}
