//! Layer-wise quantisation: Gives important layers more bits, for any average, on top of any quantiser.

use crate::{Findings, Reproduction, Result, Settings};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "layerwise-quant",
    room: "compress",
    claim: "Gives important layers more bits, for any average, on top of any quantiser.",
    run,
};

fn run(_settings: &Settings) -> Result<Findings> {
    Ok(Findings::default())
}
