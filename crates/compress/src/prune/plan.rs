//! Which layers are pruned, and by how much.

use super::{PruneOptions, ShareOf};
use crate::plan::{LayerPlan, Plan, check_patterns, patterns};
use crate::{Error, Result};
use nn::Decoder;
use store::{Checkpoint, Dtype};

impl Plan {
    /// Plans a pruning job; refuses what cannot work. Every planned layer has the same sparsity:
    /// that of the options, or more where it is a share of the whole model.
    pub fn prune(
        decoder: &Decoder,
        checkpoint: &Checkpoint,
        options: &PruneOptions,
    ) -> Result<Self> {
        options.check()?;
        crate::runner::refuse_quantized(checkpoint)?;
        let (exclude, only) = (patterns(&options.exclude)?, patterns(&options.only)?);
        let named = options.exclude.iter().zip(&exclude).chain(options.only.iter().zip(&only));
        check_patterns(decoder, named.collect())?;
        let mut plan = Self {
            blocks: Vec::new(),
            bytes_before: checkpoint.total_bytes(),
            bytes_after: checkpoint.total_bytes(),
        };
        for block in 0..decoder.num_blocks() {
            let mut sets = Vec::new();
            for set in decoder.linear_sets(block) {
                let mut layers = Vec::new();
                for name in set {
                    let kept = exclude.iter().any(|p| p.matches(&name.module))
                        || (!only.is_empty() && !only.iter().any(|p| p.matches(&name.module)));
                    let sparsity = if kept { None } else { Some(options.sparsity) };
                    layers.push(LayerPlan { name, grid: None, sparsity });
                }
                sets.push(layers);
            }
            plan.blocks.push(sets);
        }
        let prunable: usize = plan
            .layers()
            .filter(|layer| layer.sparsity.is_some())
            .map(|layer| layer.name.out_features() * layer.name.in_features())
            .sum();
        if prunable == 0 {
            return Err(Error::Options(
                "nothing is left to prune; loosen --only or --exclude (embeddings, norms and the \
                 head are never pruned)"
                    .into(),
            ));
        }
        let share = plan.share(checkpoint, options, prunable)?;
        for layer in plan.blocks.iter_mut().flatten().flatten() {
            let Some(sparsity) = &mut layer.sparsity else { continue };
            *sparsity = share;
            let name = &layer.name;
            options.pattern.check(&name.module, name.in_features())?;
            let info = checkpoint.info(&name.weight())?;
            if !matches!(info.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return Err(Error::layer(
                    &name.module,
                    format!(
                        "is stored as {}; only floating-point weights can be pruned: start from \
                         the original checkpoint",
                        info.dtype.name()
                    ),
                ));
            }
            if let Some(layout) = options.format.layout() {
                if name.transposed || info.dtype == Dtype::F64 {
                    return Err(Error::layer(
                        &name.module,
                        format!(
                            "is stored {}, which the {layout} format cannot hold; use --format dense",
                            if name.transposed { "transposed" } else { "as F64" }
                        ),
                    ));
                }
                let dense = info.nbytes;
                let kept = (dense as f64 * (1.0 - share)) as u64;
                let mask = (info.shape.iter().product::<usize>() / 8) as u64;
                plan.bytes_after =
                    plan.bytes_after.saturating_sub(dense.saturating_sub(kept + mask));
            }
        }
        Ok(plan)
    }

    /// The share of their weights that the planned layers lose.
    fn share(
        &self,
        checkpoint: &Checkpoint,
        options: &PruneOptions,
        prunable: usize,
    ) -> Result<f64> {
        if let Some(share) = options.pattern.sparsity() {
            return Ok(share);
        }
        if options.sparsity_of == ShareOf::Layers {
            return Ok(options.sparsity);
        }
        let total: usize = checkpoint
            .infos()
            .filter(|info| info.dtype.is_float())
            .map(|info| info.shape.iter().product::<usize>())
            .sum();
        let share = options.sparsity * total as f64 / prunable as f64;
        if share >= 1.0 {
            return Err(Error::Options(format!(
                "--sparsity {} of the model's {total} parameters is more than the {prunable} that \
                 can be pruned; at most {:.3} is possible",
                options.sparsity,
                prunable as f64 / total as f64
            )));
        }
        Ok(share)
    }
}
