//! Which layers can trade a scale: the mappings that AWQ searches, and the norms whose gain can be
//! folded into the linear layers that follow.
//!
//! A mapping says: dividing the output channels of `prev` by `s` and multiplying the input columns
//! of `layers` by `s` leaves the network's function unchanged. What to do with that is a method's
//! business.

use tensor::ops::Activation;

use crate::config::{Placement, Qkv};
use crate::{Decoder, Name, Role};

/// What produces the input of a mapping's layers.
#[derive(Clone, Debug, PartialEq)]
pub enum Prev {
    /// A norm: its gain (`1 + weight` when [`Name::plus_one`]) and bias absorb `1/s`.
    Norm(Name),
    /// A linear layer whose output reaches the layers linearly (or through ReLU).
    Linear {
        /// The layer.
        name: Name,
        /// `rows[c]` is the output row of `name` that becomes input column `c` of the layers (for
        /// the average of values under attention: of the value's row). Row `r` of its weight and
        /// entry `r` of its bias absorb `1/s`.
        rows: Vec<usize>,
        /// Some row feeds several columns (grouped-query attention), so those columns must share
        /// one scale.
        grouped: bool,
    },
    /// An activation that does not commute with scaling (GELU): needs a stored scale, `act(x) / s`.
    Activation,
}

/// What a search compares before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inspect {
    /// [`Decoder::attention`] on the input of q, k, v.
    Attention,
    /// [`Decoder::mlp`] on the input of gate/up or fc1.
    Mlp,
    /// The single linear layer itself.
    Linear,
    /// The whole block.
    Block,
}

/// Layers that share an input and with it a scale, and what can absorb its inverse.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    /// Producer of the input.
    pub prev: Prev,
    /// The layers that read it; all of them.
    pub layers: Vec<Name>,
    /// What the search compares.
    pub inspect: Inspect,
    /// Index of the layers in [`Decoder::linear_sets`].
    pub set: usize,
}

/// A norm and all layers that read its output; nothing else does.
#[derive(Clone, Debug, PartialEq)]
pub struct NormFold {
    /// The norm.
    pub norm: Name,
    /// The linear layers that read it.
    pub layers: Vec<Name>,
}

impl Decoder {
    /// The mappings of block `i`, in the order of computation; empty when there is no such block.
    pub fn mappings(&self, i: usize) -> Vec<Mapping> {
        let Some(b) = self.blocks.get(i) else { return Vec::new() };
        let c = &self.config;
        let mut mappings = Vec::new();
        // In post-norm blocks the norm's output is also the residual stream: nothing to fold into.
        let pre = c.placement != Placement::Post;
        if pre {
            mappings.push(Mapping {
                prev: Prev::Norm(b.norm1.clone()),
                layers: b.qkv.clone(),
                inspect: Inspect::Attention,
                set: 0,
            });
        }
        if let Some(value) = b.qkv.last() {
            let (rows, grouped) = self.value_rows();
            mappings.push(Mapping {
                prev: Prev::Linear { name: value.clone(), rows, grouped },
                layers: vec![b.output.clone()],
                inspect: Inspect::Linear,
                set: 1,
            });
        }
        if pre {
            mappings.push(Mapping {
                prev: Prev::Norm(b.norm2.clone()),
                layers: b.gate.iter().chain([&b.up]).cloned().collect(),
                inspect: Inspect::Mlp,
                set: 2,
            });
        }
        let scales = c.gated || c.activation == Activation::Relu;
        mappings.push(Mapping {
            prev: if scales {
                let rows = (0..c.intermediate_size).collect();
                Prev::Linear { name: b.up.clone(), rows, grouped: false }
            } else {
                Prev::Activation
            },
            layers: vec![b.down.clone()],
            inspect: Inspect::Linear,
            set: 3,
        });
        mappings
    }

    /// For every input column of the output projection, the row of the value projection (or of the
    /// fused one) that it averages; and whether rows repeat.
    fn value_rows(&self) -> (Vec<usize>, bool) {
        let c = &self.config;
        let repeat = c.num_attention_heads / c.num_key_value_heads;
        let rows = (0..c.query_width())
            .map(|column| {
                let (head, d) = (column / c.head_dim, column % c.head_dim);
                let kv = head / repeat;
                match c.qkv {
                    Qkv::Separate => kv * c.head_dim + d,
                    Qkv::Fused => c.query_width() + c.key_width() + kv * c.head_dim + d,
                    Qkv::FusedPerHead => (3 * head + 2) * c.head_dim + d,
                }
            })
            .collect();
        (rows, repeat > 1)
    }

    /// The norms of block `i` whose output only linear layers read, so that their gain can move
    /// into those layers' columns. Norms on branches and on heads are not among them.
    pub fn norm_fold(&self, i: usize) -> Vec<NormFold> {
        let Some(b) = self.blocks.get(i) else { return Vec::new() };
        if self.config.placement == Placement::Post {
            return Vec::new();
        }
        vec![
            NormFold { norm: b.norm1.clone(), layers: b.qkv.clone() },
            NormFold {
                norm: b.norm2.clone(),
                layers: b.gate.iter().chain([&b.up]).cloned().collect(),
            },
        ]
    }

    /// The final norm with the layer that reads it; with a tied head ([`Decoder::head`] is the
    /// embedding) a fold needs the head untied first.
    pub fn final_norm_fold(&self) -> Option<NormFold> {
        let norm = self.final_norm.clone()?;
        let layer = self.project_out.clone().unwrap_or_else(|| self.head.clone());
        Some(NormFold { norm, layers: vec![layer] })
    }

    /// Role of the module a tensor of this network belongs to; `None` for unknown tensors.
    pub fn role_of(&self, tensor: &str) -> Option<Role> {
        self.name_of(tensor).map(|name| name.role)
    }

    /// The module a tensor of this network belongs to; `None` for unknown tensors. Packed tensors
    /// (`qweight`, `weight_scale`, ...) belong to their module.
    pub fn name_of(&self, tensor: &str) -> Option<&Name> {
        let module = tensor.rsplit_once('.').map_or(tensor, |(module, _)| module);
        let mut names = self.other_names();
        let inside =
            module.strip_prefix(&format!("{}{}.", self.prefix, self.config.family.table().blocks));
        if let Some((index, _)) = inside.and_then(|rest| rest.split_once('.')) {
            names = index.parse().ok().and_then(|i: usize| self.blocks.get(i))?.all();
        } else if module == self.head.module {
            // A tied head is the embedding.
            names.push(&self.head);
        }
        names.into_iter().find(|name| name.module == module)
    }
}
