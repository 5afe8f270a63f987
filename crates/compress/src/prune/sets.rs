//! How calibration inputs reach the sets of layers of a block.
//!
//! The references calibrate all layers of a block on inputs that the untouched block produces, prune
//! them, and run the block again for the next one ([`Order::Block`]: two passes). A true sequential
//! order lets every set see inputs that the sets before it, pruned, produce, and needs one pass
//! ([`Order::Sets`]).

use crate::block::{BlockJob, INPUT_POINTS, INPUT_STAGES, REPORT_TOKENS};
use crate::gptq::Factor;
use crate::plan::LayerPlan;
use crate::statistics::{InputStatistics, Statistics, Wanted};
use crate::wanda::SquareSums;
use crate::{Error, Result};
use nn::{Point, Stage, Taps};
use std::collections::BTreeMap;

/// In which order the sets of a block are calibrated and pruned.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Set after set, each on what the sets before it have become (one pass through the block).
    #[default]
    Sets,
    /// All on the untouched block, as the reference codes do (two passes).
    Block,
}

/// What calibration must collect at the input of a set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs {
    /// The Gram matrix.
    pub gram: bool,
    /// Summed squares per input.
    pub squares: bool,
    /// Some tokens, to report the output error on.
    pub sample: bool,
}

/// What was collected.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Gram matrix and token sample.
    pub statistics: InputStatistics,
    /// Summed squares per input.
    pub squares: Option<Vec<f64>>,
}

/// Prunes one set from the statistics of its inputs.
pub type Visit<'v> = dyn FnMut(&mut BlockJob<'_>, &[&LayerPlan], Inputs) -> Result<()> + 'v;

/// Calls `visit` for every set of the block that has layers to prune, then runs the block with what
/// has become of it, so that the next one sees its output.
pub fn visit(
    job: &mut BlockJob<'_>,
    needs: Needs,
    order: Order,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let last = job.index + 1 == job.decoder.num_blocks();
    let sets = job.sets;
    let pruned: Vec<Vec<&LayerPlan>> = sets
        .iter()
        .map(|set| set.iter().filter(|layer| layer.sparsity.is_some()).collect())
        .collect();
    match order {
        Order::Sets => {
            for (set, layers) in pruned.iter().enumerate() {
                let (point, stage) = (INPUT_POINTS[set], INPUT_STAGES[set]);
                if layers.is_empty() {
                    job.run_stage(stage, &mut Taps::none())?;
                    continue;
                }
                let mut taps = Collectors::new(job, needs, &[point]);
                job.run_stage(stage, &mut taps.taps())?;
                let inputs = taps.take(point);
                visit(job, layers, inputs)?;
            }
            if !last {
                job.run_stage(Stage::Contract, &mut Taps::none())?;
            }
        }
        Order::Block => {
            let start = if last { None } else { Some(job.resid.duplicate()?) };
            let wanted: Vec<Point> = (0..pruned.len())
                .filter(|set| !pruned[*set].is_empty())
                .map(|set| INPUT_POINTS[set])
                .collect();
            let mut taps = Collectors::new(job, needs, &wanted);
            for stage in INPUT_STAGES.iter().take(pruned.len()) {
                job.run_stage(*stage, &mut taps.taps())?;
            }
            for (set, layers) in pruned.iter().enumerate().filter(|(_, layers)| !layers.is_empty())
            {
                let inputs = taps.take(INPUT_POINTS[set]);
                visit(job, layers, inputs)?;
            }
            if let Some(start) = start {
                *job.resid = start;
                for stage in INPUT_STAGES.into_iter().chain([Stage::Contract]) {
                    job.run_stage(stage, &mut Taps::none())?;
                }
            }
        }
    }
    Ok(())
}

/// The factor of the Hessian that the layers of a set share; ten times the damping is tried when it
/// cannot be factorised.
pub fn factor(layers: &[&LayerPlan], inputs: &mut Inputs, damping: f64) -> Result<Factor> {
    let module = layers.first().map_or("", |layer| layer.name.module.as_str());
    let Some(gram) = inputs.statistics.gram.take() else {
        return Err(unreached(module));
    };
    let (width, tokens) = (gram.width(), gram.tokens());
    Factor::tenfold(module, gram.into_hessian(), width, tokens, damping)
}

/// The error for a layer that calibration did not reach.
pub fn unreached(module: &str) -> Error {
    Error::layer(
        module,
        "no calibration token reached this layer; give other text, or --exclude it",
    )
}

/// The taps at the inputs of sets.
struct Collectors {
    statistics: Statistics,
    squares: BTreeMap<Point, SquareSums>,
    wants_squares: bool,
}

impl Collectors {
    fn new(job: &BlockJob<'_>, needs: Needs, points: &[Point]) -> Self {
        let sample = needs.sample.then(|| (job.calibration.tokens(), REPORT_TOKENS));
        let wanted = Wanted { gram: needs.gram, sample, ..Wanted::default() };
        let squares = points.iter().map(|point| (*point, SquareSums::new(*point))).collect();
        Self {
            statistics: Statistics::new(points.iter().map(|point| (*point, wanted))),
            squares,
            wants_squares: needs.squares,
        }
    }

    fn taps(&mut self) -> Taps<'_> {
        let mut taps: Vec<&mut dyn nn::Tap> = vec![&mut self.statistics];
        if self.wants_squares {
            taps.extend(self.squares.values_mut().map(|s| s as &mut dyn nn::Tap));
        }
        Taps(taps)
    }

    fn take(&mut self, point: Point) -> Inputs {
        Inputs {
            statistics: self.statistics.take(point).unwrap_or_default(),
            squares: self.squares.remove(&point).and_then(SquareSums::into_sums),
        }
    }
}
