//! Every allocator on one network: the distortion of its output and what a user sees of it.

use crate::Result;
use compress::layer_adaptive_pruning::layers::{rank, select};
use compress::layer_adaptive_pruning::round::{self, Settings, Subject};
use compress::layer_adaptive_pruning::{
    Allocator, CurveCache, Distortion, LayerAdaptivePruningOptions, Samples,
};
use nn::{Network, Overlay, Weights};
use std::collections::BTreeMap;
use std::path::Path;
use tensor::host;

/// An allocator as it is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// Curves, mean over samples.
    RdMean,
    /// Curves, worst sample.
    RdWorst,
    /// LAMP.
    Lamp,
    /// Erdős–Rényi kernel.
    Erk,
    /// Global magnitude.
    Global,
    /// Uniform.
    Uniform,
    /// Uniform with both ends spared.
    UniformPlus,
}

/// All of them.
pub const ARMS: [Arm; 7] =
    [Arm::RdMean, Arm::RdWorst, Arm::Lamp, Arm::Erk, Arm::Global, Arm::Uniform, Arm::UniformPlus];

impl Arm {
    /// Name for tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::RdMean => "rd",
            Self::RdWorst => "rd worst",
            other => other.allocator().label(),
        }
    }

    fn allocator(self) -> Allocator {
        match self {
            Self::RdMean | Self::RdWorst => Allocator::Rd,
            Self::Lamp => Allocator::Lamp,
            Self::Erk => Allocator::Erk,
            Self::Global => Allocator::Global,
            Self::Uniform => Allocator::Uniform,
            Self::UniformPlus => Allocator::UniformPlus,
        }
    }

    /// Whether the arm looks at the calibration inputs.
    fn calibrates(self) -> bool {
        self.allocator() == Allocator::Rd
    }
}

/// The options of an arm.
pub fn options(arm: Arm, points: usize) -> LayerAdaptivePruningOptions {
    LayerAdaptivePruningOptions {
        allocator: arm.allocator(),
        distortion: Some(match arm {
            Arm::RdWorst => Distortion::Worst,
            _ => Distortion::Mean,
        }),
        curve_points: points,
        // High sparsities in chains: what comes out is compared, not refused.
        allow_dead_layers: true,
        ..Default::default()
    }
}

/// What an arm did at one sparsity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Mean squared change of the logits on the calibration inputs.
    pub distortion: f64,
    /// Measured over predicted distortion, where something was predicted.
    pub additivity: Option<f64>,
    /// Accuracy or perplexity afterwards.
    pub score: f64,
}

/// Outcomes by sparsity (its place in the list) and arm, one per seed.
pub type Outcomes = BTreeMap<(usize, Arm), Vec<Outcome>>;

/// A network to prune.
pub struct Patient<'a> {
    /// The network.
    pub network: &'a dyn Network,
    /// Its weights.
    pub weights: &'a (dyn Weights + Sync),
    /// Steps of the curves.
    pub points: usize,
    /// Where curves are kept between sparsities.
    pub cache: &'a Path,
    /// Accuracy or perplexity of the network with these weights.
    pub judge: &'a dyn Fn(&dyn Weights) -> Result<f64>,
}

/// Prunes the patient with every arm at every sparsity and adds what happened to `outcomes`. Arms
/// that do not look at the inputs are judged once: their masks are the same for every seed.
pub fn measure(
    patient: &Patient<'_>,
    samples: &Samples,
    sparsities: &[f64],
    arms: &[Arm],
    fresh: bool,
    outcomes: &mut Outcomes,
) -> Result<()> {
    let places = select(patient.network, &[], &[], false)?;
    let layers = rank(&places, patient.weights, &BTreeMap::new())?;
    let subject =
        Subject { network: patient.network, weights: patient.weights, samples: Some(samples) };
    let cache = CurveCache::new(patient.cache);
    let progress = report::Progress::hidden();
    for (s, &sparsity) in sparsities.iter().enumerate() {
        for &arm in arms {
            let settings = Settings::new(&options(arm, patient.points))?;
            let round = round::run(subject, &layers, sparsity, &settings, Some(&cache), &progress)?;
            let known = outcomes.get(&(s, arm)).and_then(|o| o.first()).map(|o| o.score);
            let score = match known.filter(|_| !fresh && !arm.calibrates()) {
                Some(score) => score,
                None => {
                    let mut pruned = Overlay::new(patient.weights);
                    for (_, name) in &places {
                        let mut matrix = patient.weights.matrix(name)?;
                        if let Some(mask) = round.masks.get(&name.module) {
                            host::write(&mut matrix, |values| mask.apply(values));
                        }
                        pruned.matrices.insert(name.weight(), matrix);
                    }
                    (patient.judge)(&pruned)?
                }
            };
            // The worst-sample arm is compared by the mean as well.
            let distortion = match arm {
                Arm::RdWorst => round::distortion(subject, &layers, &round, Distortion::Mean)?,
                _ => round.measured.unwrap_or(f64::NAN),
            };
            let outcome = Outcome { distortion, additivity: round.additivity(), score };
            outcomes.entry((s, arm)).or_default().push(outcome);
        }
    }
    Ok(())
}

/// The mean over seeds of a number.
pub fn mean(outcomes: &Outcomes, key: (usize, Arm), of: impl Fn(&Outcome) -> f64) -> f64 {
    let all = outcomes.get(&key).map(Vec::as_slice).unwrap_or_default();
    all.iter().map(of).sum::<f64>() / all.len().max(1) as f64
}
