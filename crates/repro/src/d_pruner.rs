//! D-Pruner: Prunes for one domain without losing the general language: two importances in one score.

use crate::{Findings, Reproduction, Result, Settings};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "d-pruner",
    room: "compress",
    claim: "Prunes for one domain without losing the general language: two importances in one score.",
    run,
};

fn run(_settings: &Settings) -> Result<Findings> {
    Ok(Findings::default())
}
