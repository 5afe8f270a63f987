//! AdaDim: Groups weights along the input or along the output of every layer, whichever hurts its output less.

use crate::{Findings, Reproduction, Result, Settings};

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "adadim",
    room: "compress",
    claim: "Groups weights along the input or along the output of every layer, whichever hurts its output less.",
    run,
};

fn run(_settings: &Settings) -> Result<Findings> {
    Ok(Findings::default())
}
