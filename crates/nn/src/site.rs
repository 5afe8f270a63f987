//! The places in a network where an activation can be seen or replaced, and their TransformerLens
//! names. This file is the whole mapping; who sees them is `tap`, when they fire is `forward`.
//!
//! | point | TransformerLens name | shape | what flows there |
//! |---|---|---|---|
//! | `Embed` | `hook_embed` | `[T, hidden]` | token embeddings, after the family's scaling, before learned positions |
//! | `ResidPre` | `blocks.i.hook_resid_pre` | `[T, hidden]` | residual stream entering the block |
//! | `AttnIn` | `blocks.i.ln1.hook_normalized` | `[T, hidden]` | input of q, k, v (gain applied) |
//! | `Q` `K` `V` | `blocks.i.attn.hook_q` ... | `[T, heads·head_dim]` | projections, before q/k norms and rotation |
//! | `RotQ` `RotK` | `blocks.i.attn.hook_rot_q` ... | as `Q`, `K` | after q/k norms and rotation (rotary families only) |
//! | `AttnScores` | `blocks.i.attn.hook_attn_scores` | `[B·heads·Tq, Tk]` | scaled, capped, masked (`-inf`) scores |
//! | `Pattern` | `blocks.i.attn.hook_pattern` | `[B·heads·Tq, Tk]` | softmax of the scores |
//! | `Z` | `blocks.i.attn.hook_z` | `[T, heads·head_dim]` | input of the output projection |
//! | `AttnOut` | `blocks.i.hook_attn_out` | `[T, hidden]` | what attention adds to the residual stream |
//! | `ResidMid` | `blocks.i.hook_resid_mid` | `[T, hidden]` | residual stream between attention and MLP (absent in parallel blocks) |
//! | `MlpIn` | `blocks.i.ln2.hook_normalized` | `[T, hidden]` | input of gate/up or fc1 (gain applied) |
//! | `MlpPre` | `blocks.i.mlp.hook_pre` | `[T, intermediate]` | input of the activation (gate or fc1 output) |
//! | `MlpPreLinear` | `blocks.i.mlp.hook_pre_linear` | `[T, intermediate]` | the other branch of a gated MLP (up output) |
//! | `MlpPost` | `blocks.i.mlp.hook_post` | `[T, intermediate]` | input of down or fc2 |
//! | `MlpOut` | `blocks.i.hook_mlp_out` | `[T, hidden]` | what the MLP adds to the residual stream |
//! | `ResidPost` | `blocks.i.hook_resid_post` | `[T, hidden]` | residual stream leaving the block |
//! | `FinalNorm` | `ln_final.hook_normalized` | `[T, hidden]` | output of the final norm (gain applied) |
//! | `Logits` | `logits` | `[T, vocab]` | after the final soft cap |
//!
//! `T` counts rows of all sequences. TransformerLens itself shows `hook_normalized` of an RMSNorm
//! before the gain unless the gain is folded; here it always is what the linear layers read.

use crate::{Error, Result};

/// A kind of place; see the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Point {
    /// Token embeddings.
    Embed,
    /// Residual stream entering a block.
    ResidPre,
    /// Input of the query, key and value projections.
    AttnIn,
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Query after rotation.
    RotQ,
    /// Key after rotation.
    RotK,
    /// Attention scores before softmax.
    AttnScores,
    /// Attention probabilities.
    Pattern,
    /// Input of the attention's output projection.
    Z,
    /// Output of attention.
    AttnOut,
    /// Residual stream after attention.
    ResidMid,
    /// Input of the MLP's first linear layers.
    MlpIn,
    /// Input of the MLP's activation.
    MlpPre,
    /// Linear branch of a gated MLP.
    MlpPreLinear,
    /// Input of the MLP's last linear layer.
    MlpPost,
    /// Output of the MLP.
    MlpOut,
    /// Residual stream leaving a block.
    ResidPost,
    /// Output of the final norm.
    FinalNorm,
    /// Logits.
    Logits,
}

impl Point {
    /// Every point, in the order of the forward pass.
    pub const ALL: [Point; 21] = [
        Point::Embed,
        Point::ResidPre,
        Point::AttnIn,
        Point::Q,
        Point::K,
        Point::V,
        Point::RotQ,
        Point::RotK,
        Point::AttnScores,
        Point::Pattern,
        Point::Z,
        Point::AttnOut,
        Point::ResidMid,
        Point::MlpIn,
        Point::MlpPre,
        Point::MlpPreLinear,
        Point::MlpPost,
        Point::MlpOut,
        Point::ResidPost,
        Point::FinalNorm,
        Point::Logits,
    ];

    /// The name inside a block (or of the whole network for `Embed`, `FinalNorm`, `Logits`).
    pub fn suffix(self) -> &'static str {
        match self {
            Point::Embed => "hook_embed",
            Point::ResidPre => "hook_resid_pre",
            Point::AttnIn => "ln1.hook_normalized",
            Point::Q => "attn.hook_q",
            Point::K => "attn.hook_k",
            Point::V => "attn.hook_v",
            Point::RotQ => "attn.hook_rot_q",
            Point::RotK => "attn.hook_rot_k",
            Point::AttnScores => "attn.hook_attn_scores",
            Point::Pattern => "attn.hook_pattern",
            Point::Z => "attn.hook_z",
            Point::AttnOut => "hook_attn_out",
            Point::ResidMid => "hook_resid_mid",
            Point::MlpIn => "ln2.hook_normalized",
            Point::MlpPre => "mlp.hook_pre",
            Point::MlpPreLinear => "mlp.hook_pre_linear",
            Point::MlpPost => "mlp.hook_post",
            Point::MlpOut => "hook_mlp_out",
            Point::ResidPost => "hook_resid_post",
            Point::FinalNorm => "ln_final.hook_normalized",
            Point::Logits => "logits",
        }
    }

    /// Whether the point exists once per block.
    pub fn in_block(self) -> bool {
        !matches!(self, Point::Embed | Point::FinalNorm | Point::Logits)
    }
}

/// One place in one network: a point, and the block it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// Block index; `None` for the points outside the blocks.
    pub block: Option<usize>,
    /// The kind of place.
    pub point: Point,
}

impl Site {
    /// A place inside block `block`.
    pub fn block(block: usize, point: Point) -> Self {
        Site { block: Some(block), point }
    }

    /// A place outside the blocks.
    pub fn outer(point: Point) -> Self {
        Site { block: None, point }
    }

    /// The TransformerLens name, e.g. `blocks.3.hook_resid_post`.
    pub fn transformer_lens_name(&self) -> String {
        match self.block {
            Some(block) => format!("blocks.{block}.{}", self.point.suffix()),
            None => self.point.suffix().to_string(),
        }
    }

    /// Reads a TransformerLens name.
    ///
    /// # Errors
    /// When no point has that name.
    pub fn parse(name: &str) -> Result<Self> {
        let unknown = || {
            let known: Vec<_> = Point::ALL.iter().map(|p| p.suffix()).collect();
            Error::Input(format!(
                "no site is called `{name}`; sites are `blocks.<i>.` followed by one of {}",
                known.join(", ")
            ))
        };
        let (block, suffix) = match name.strip_prefix("blocks.") {
            Some(rest) => {
                let (index, suffix) = rest.split_once('.').ok_or_else(unknown)?;
                (Some(index.parse().map_err(|_| unknown())?), suffix)
            }
            None => (None, name),
        };
        Point::ALL
            .into_iter()
            .find(|p| p.suffix() == suffix && p.in_block() == block.is_some())
            .map(|point| Site { block, point })
            .ok_or_else(unknown)
    }
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.transformer_lens_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for point in Point::ALL {
            let site = Site { block: point.in_block().then_some(12), point };
            assert_eq!(Site::parse(&site.transformer_lens_name()).unwrap(), site);
        }
        assert_eq!(
            Site::parse("blocks.3.hook_resid_post").unwrap(),
            Site::block(3, Point::ResidPost)
        );
        for wrong in ["hook_resid_post", "blocks.x.hook_z", "blocks.1.hook_embed", "blocks.1", ""] {
            assert!(Site::parse(wrong).is_err(), "{wrong}");
        }
    }
}
