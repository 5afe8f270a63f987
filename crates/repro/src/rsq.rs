//! RSQ: Rotates the model so that outliers vanish, then GPTQ that listens to the tokens that matter.

use crate::{Findings, Reproduction, Result, Settings};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "rsq",
    room: "compress",
    claim: "Rotates the model so that outliers vanish, then GPTQ that listens to the tokens that matter.",
    run,
};

fn run(_settings: &Settings) -> Result<Findings> {
    Ok(Findings::default())
}
