//! Layer-adaptive pruning: Finds the sparsity of every layer that hurts the output least in total.

use crate::{Findings, Reproduction, Result, Settings};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "layer-adaptive-pruning",
    room: "compress",
    claim: "Finds the sparsity of every layer that hurts the output least in total.",
    run,
};

fn run(_settings: &Settings) -> Result<Findings> {
    Ok(Findings::default())
}
