//! Pyramid vector quantisation: Stores groups of weights as a direction on a pyramid lattice and a length; any rate, no codebook.

use crate::{Findings, Reproduction, Result, Settings};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "pvq",
    room: "compress",
    claim: "Stores groups of weights as a direction on a pyramid lattice and a length; any rate, no codebook.",
    run,
};

fn run(_settings: &Settings) -> Result<Findings> {
    Ok(Findings::default())
}
