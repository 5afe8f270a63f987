//! The weights of all calibration tokens in one block, computed from the block as it stands before
//! any of its layers changes: one batch at a time, its attention block of queries by block.

use super::RsqOptions;
use super::importance::{self, Importance};
use crate::block::BlockJob;
use crate::{Error, Result};
use nn::{Batch, BlockState, Context, Stage, Taps};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tensor::{host, ops};

/// The weights of the calibration tokens in one block.
#[derive(Debug, Default)]
pub(super) struct TokenWeights {
    /// `w^(power / 2)` per token: the factor of the token's row.
    pub roots: Arc<[f32]>,
    smallest: f64,
    largest: f64,
    /// `(Σ w)² / Σ w²`.
    effective: f64,
}

impl TokenWeights {
    /// What the report says about them.
    pub fn notes(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("token_weight_min".into(), self.smallest.into()),
            ("token_weight_max".into(), self.largest.into()),
            ("effective_tokens".into(), self.effective.into()),
            ("tokens".into(), self.roots.len().into()),
        ])
    }
}

/// Weighs all tokens. The job stands after [`Stage::Norm1`]: the residual stream enters the block,
/// the branch holds the input of q, k, v.
pub(super) fn weigh(job: &BlockJob<'_>, options: &RsqOptions) -> Result<TokenWeights> {
    let counts = match options.importance {
        Importance::TokenFreq => importance::counts(job.calibration.ids()),
        _ => HashMap::new(),
    };
    let mut roots = Vec::with_capacity(job.calibration.tokens());
    let mut found =
        TokenWeights { smallest: f64::INFINITY, largest: 0.0, ..TokenWeights::default() };
    let (mut sum, mut squares) = (0f64, 0f64);
    for batch in 0..job.calibration.batches() {
        let (_, geometry) = job.calibration.batch(batch);
        let scores = scores(job, batch, geometry, options, &counts)?;
        for window in scores.chunks(geometry.length) {
            let weights = importance::weights(window, options.r_min, options.r_max)
                .map_err(|error| Error::layer(format!("block {}", job.index), error.to_string()))?;
            for w in weights {
                found.smallest = found.smallest.min(w);
                found.largest = found.largest.max(w);
                sum += w;
                squares += w * w;
                roots.push(if options.weight_power == 2 { w as f32 } else { w.sqrt() as f32 });
            }
        }
    }
    found.effective = if squares > 0.0 { sum * sum / squares } else { 0.0 };
    found.roots = roots.into();
    Ok(found)
}

/// The scores of the tokens of one batch, window after window.
fn scores(
    job: &BlockJob<'_>,
    batch: usize,
    geometry: Batch,
    options: &RsqOptions,
    counts: &HashMap<u32, usize>,
) -> Result<Vec<f64>> {
    let (ids, _) = job.calibration.batch(batch);
    let width = job.decoder.config.hidden_size;
    let length = geometry.length;
    match options.importance {
        Importance::Uniform => Ok(vec![0.0; ids.len()]),
        Importance::Attention => attention(job, batch, geometry, options),
        Importance::ActNorm => Ok(importance::norms(&job.resid.get(batch)?, width)),
        Importance::ActDiff => {
            let before = job.resid.get(batch)?;
            let after = output(job, batch, geometry, before.clone())?;
            Ok(importance::closeness(&before, &after, width))
        }
        Importance::TokenSim => {
            let resid = job.resid.get(batch)?;
            let windows = resid.chunks_exact(length * width);
            Ok(windows.flat_map(|window| importance::dissimilarity(window, width)).collect())
        }
        Importance::TokenFreq => Ok(importance::rarity(ids, counts)),
        Importance::FirstN | Importance::FirstLastN => {
            let chunks = options.importance.chunks(options.importance_chunks);
            let last = options.importance == Importance::FirstLastN;
            let window = importance::ends(length, chunks, last);
            Ok((0..geometry.sequences).flat_map(|_| window.clone()).collect())
        }
    }
}

/// Attention that every token receives, under the block's own mask, window and soft cap.
fn attention(
    job: &BlockJob<'_>,
    batch: usize,
    geometry: Batch,
    options: &RsqOptions,
) -> Result<Vec<f64>> {
    let x = job.tensor(job.branch.get(batch)?, geometry.rows());
    let context = Context::new(geometry);
    let [q, k] = job.decoder.queries_and_keys(job.index, &job.weights, x, &context)?;
    let spec = job.decoder.attention_spec(job.index, &geometry, 0);
    let mut received = ops::attention_received(&q, &k, &spec);
    for window in received.chunks_mut(geometry.length) {
        options.position_debias.apply(window, &spec);
    }
    Ok(received)
}

/// The residual stream leaving the block, computed with its weights as they are.
fn output(job: &BlockJob<'_>, batch: usize, geometry: Batch, resid: Vec<f32>) -> Result<Vec<f32>> {
    let rows = geometry.rows();
    let mut state =
        BlockState { resid: job.tensor(resid, rows), x: job.tensor(job.branch.get(batch)?, rows) };
    let mut context = Context::new(geometry);
    for stage in Stage::ALL.into_iter().skip(1) {
        let mut taps = Taps::none();
        let weights = &job.weights;
        state = job.decoder.stage(job.index, stage, weights, state, &mut context, &mut taps)?;
    }
    Ok(host::into_vec(state.resid))
}
