//! General importance G: a SparseGPT pass over open-domain text that records what every weight
//! costs, and leaves the base weights alone.
//!
//! Blocks are walked as in pruning, so that later layers see the inputs that compensated layers
//! produce; what is kept of a layer is `w² / U[j,j]²`, taken when its block of columns has its turn.

use super::files::{Files, Kind};
use crate::block::{BlockJob, Calibration};
use crate::mask::{Count, Structure};
use crate::plan::Plan;
use crate::prune::sets::{self, Needs, Order};
use crate::runner::{Source, walk};
use crate::sparsegpt::{self, SparseGptOptions, Target};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// How the general pass prunes.
#[derive(Debug, Clone)]
pub struct Pass<'a> {
    /// Damping and blocks of the SparseGPT pass.
    pub sparsegpt: &'a SparseGptOptions,
    /// Its sparsity.
    pub sparsity: f64,
    /// Whether sets of layers see inputs that pruned sets of the same block produce.
    pub order: Order,
    /// Bytes of calibration activations in memory.
    pub memory: u64,
}

/// Records G of the layers that `plan` prunes into `root`, or takes what is there already.
///
/// `identity` says which model this is. A pass that was stopped goes on at the block where it was.
pub fn importance(
    source: Source<'_>,
    plan: &Plan,
    calibration: &Calibration,
    pass: &Pass<'_>,
    root: &Path,
    identity: &Value,
    progress: &report::Progress,
) -> Result<Files> {
    let ids: Vec<u8> = calibration.ids().iter().flat_map(|id| id.to_le_bytes()).collect();
    let modules: Vec<&str> = planned(plan).map(|name| name.module.as_str()).collect();
    let record = json!({
        "kind": "general importance",
        "strata": env!("CARGO_PKG_VERSION"),
        "model": identity,
        "calibration": {
            "tokens": store::sha256_bytes(&ids),
            "windows": calibration.windows(),
            "length": calibration.length(),
        },
        "sparsity": pass.sparsity,
        "sparsegpt": pass.sparsegpt,
        "order": pass.order,
        "modules": modules,
    });
    let files = Files::at(root, Kind::General, &record, plan.blocks.len())?;
    let done = files.done();
    progress.set(done as u64);
    if files.complete() {
        report::note(&format!("general importance taken from {}", files.directory().display()));
        return Ok(files);
    }
    if calibration.tokens() == 0 {
        return Err(Error::Options(
            "the general importance needs calibration text, and there is none: give --calibration, \
             or --importance-mode gradient"
                .into(),
        ));
    }
    walk(source, plan, calibration, pass.memory, done, files.directory(), |job| {
        block(job, pass, &files)?;
        progress.inc(1);
        Ok(())
    })?;
    Ok(files)
}

/// The layers that are pruned.
pub(super) fn planned(plan: &Plan) -> impl Iterator<Item = &nn::Name> {
    plan.layers().filter(|layer| layer.sparsity.is_some()).map(|layer| &layer.name)
}

fn block(job: &mut BlockJob<'_>, pass: &Pass<'_>, files: &Files) -> Result<()> {
    let target = Target {
        sparsity: pass.sparsity,
        structure: Structure::Unstructured,
        count: Count::Threshold,
        block_size: pass.sparsegpt.block_size,
    };
    let needs = Needs { gram: true, ..Needs::default() };
    // The Hessian is a mean over sequences, as in the authors' code; ours is a mean over tokens.
    let per_sequence = job.calibration.length() as f32;
    let mut recorded: Vec<(String, [usize; 2], Vec<f32>)> = Vec::new();
    sets::visit(job, needs, pass.order, &mut |job, layers, mut inputs| {
        let factor = sets::factor(layers, &mut inputs, pass.sparsegpt.damping)?;
        for layer in layers {
            let matrix = job.matrix(&layer.name)?;
            let mut importance = vec![0f32; matrix.values.len()];
            let module = &layer.name.module;
            let pruned =
                sparsegpt::prune(module, &matrix, &factor, &target, Some(&mut importance))?;
            importance.iter_mut().for_each(|g| *g *= per_sequence);
            crate::mask::check_scores(module, &importance)?;
            job.set_matrix(&layer.name, pruned.values);
            recorded.push((module.clone(), layer.name.shape, importance));
        }
        Ok(())
    })?;
    let tensors: Vec<(&str, [usize; 2], &[f32])> =
        recorded.iter().map(|(m, shape, g)| (m.as_str(), *shape, g.as_slice())).collect();
    files.write(job.index, &tensors)
}
