//! A decoder: its description and the names of its weights, block by block.
//!
//! What the names are used for is in `forward`; which of them can trade scales is in `mapping`.

use std::sync::{Arc, Mutex};

use serde_json::Value;
use store::Checkpoint;
use tensor::ops::RopeTable;

use crate::config::{NormKind, Placement, Positions, Qkv};
use crate::{DecoderConfig, Error, Name, Result, Role, Spelling};

/// Names of the modules of one block.
#[derive(Clone, Debug)]
pub struct BlockNames {
    /// First norm.
    pub norm1: Name,
    /// Norm on attention's output, if any.
    pub norm1_post: Option<Name>,
    /// Second norm.
    pub norm2: Name,
    /// Norm on the MLP's output, if any.
    pub norm2_post: Option<Name>,
    /// Query, key and value projections, or the one fused projection.
    pub qkv: Vec<Name>,
    /// Norms of query and key heads, if any.
    pub qk_norm: Option<[Name; 2]>,
    /// Attention's output projection.
    pub output: Name,
    /// Gate of a gated MLP.
    pub gate: Option<Name>,
    /// Up projection, or fc1.
    pub up: Name,
    /// Down projection, or fc2.
    pub down: Name,
}

impl BlockNames {
    /// All modules of the block.
    pub fn all(&self) -> Vec<&Name> {
        let mut all = vec![&self.norm1];
        all.extend(&self.qkv);
        all.extend(self.qk_norm.iter().flatten());
        all.push(&self.output);
        all.extend(&self.norm1_post);
        all.push(&self.norm2);
        all.extend(&self.gate);
        all.push(&self.up);
        all.push(&self.down);
        all.extend(&self.norm2_post);
        all
    }
}

/// A decoder-only transformer as a description; computing with it needs a [`crate::Weights`].
#[derive(Clone, Debug)]
pub struct Decoder {
    /// The description.
    pub config: DecoderConfig,
    /// What the checkpoint puts before its module names (`model.`, `transformer.`, nothing, ...).
    pub prefix: String,
    /// Names of the blocks' modules.
    pub blocks: Vec<BlockNames>,
    /// Token embedding, `[vocab, embed_size]`.
    pub embed: Name,
    /// Learned positions, `[positions + offset, hidden]`.
    pub position: Option<Name>,
    /// From the embedding width to the hidden width.
    pub project_in: Option<Name>,
    /// From the hidden width to the embedding width.
    pub project_out: Option<Name>,
    /// Norm before the head.
    pub final_norm: Option<Name>,
    /// The head, `[vocab, embed_size]`; the embedding's module when tied.
    pub head: Name,
    pub(crate) rope: Arc<Mutex<Option<Arc<RopeTable>>>>,
}

impl Decoder {
    /// Reads the description from a `config.json` and gives the weights their standard names.
    ///
    /// # Errors
    /// An unknown `model_type` or an impossible value, by name.
    pub fn from_config(config: &Value) -> Result<Self> {
        let config = DecoderConfig::from_json(config)?;
        let table = config.family.table();
        let prefix = table.prefixes.first().copied().unwrap_or("");
        Ok(Self::named(config, prefix, table.head))
    }

    /// Reads the description from a checkpoint, finds the prefix its names carry, and checks that
    /// every tensor is there with the shape the config says (see [`Decoder::validate`]).
    ///
    /// # Errors
    /// As [`Decoder::from_config`] and [`Decoder::validate`].
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let config = DecoderConfig::from_json(checkpoint.config()?)?;
        let table = config.family.table();
        let embed = format!("{}.weight", table.embed);
        let standard = table.prefixes.iter().map(|p| p.to_string());
        // Checkpoints of wrappers put more before the usual prefix; the embedding shows what.
        let wrapped = checkpoint
            .names()
            .filter_map(|name| name.strip_suffix(&embed))
            .filter(|p| p.ends_with('.'))
            .map(str::to_string);
        let prefix = standard
            .chain(wrapped)
            .find(|p| checkpoint.contains(&format!("{p}{embed}")))
            .ok_or_else(|| Error::Missing {
                name: format!("{}{embed}", table.prefixes.first().copied().unwrap_or("")),
                hint: format!(
                    "no tensor ends in `{embed}`, the token embedding of a {} model",
                    config.family.model_type()
                ),
            })?;
        let outer = prefix.strip_suffix(table.prefixes.first().copied().unwrap_or(""));
        let head = [Some(String::new()), outer.map(str::to_string), Some(prefix.clone())]
            .into_iter()
            .flatten()
            .map(|p| format!("{p}{}", table.head))
            .find(|module| checkpoint.contains(&format!("{module}.weight")))
            .unwrap_or_else(|| table.head.to_string());
        let decoder = Self::named(config, &prefix, &head);
        decoder.validate(checkpoint)?;
        Ok(decoder)
    }

    pub(crate) fn named(config: DecoderConfig, prefix: &str, head: &str) -> Self {
        let c = &config;
        let table = c.family.table();
        let outer = |module: &str, role, shape| Name {
            module: format!("{prefix}{module}"),
            role,
            block: None,
            transposed: false,
            shape,
            kernel: None,
            spelling: Spelling::Dotted,
            bias: role == Role::FinalNorm && c.norm == NormKind::Layer,
            plus_one: role == Role::FinalNorm && c.norm == NormKind::RmsPlusOne,
        };
        let embed = outer(table.embed, Role::Embed, [c.vocab_size, c.embed_size]);
        let mut head = Name { module: head.to_string(), role: Role::Head, ..embed.clone() };
        if c.tie_word_embeddings {
            head.module = embed.module.clone();
        }
        let position = match c.positions {
            Positions::Learned { offset } => Some(outer(
                table.position,
                Role::Position,
                [c.max_position_embeddings + offset, c.hidden_size],
            )),
            Positions::Rotary { .. } => None,
        };
        let projected = c.embed_size != c.hidden_size;
        Decoder {
            prefix: prefix.to_string(),
            blocks: (0..c.num_hidden_layers).map(|i| block_names(c, prefix, i)).collect(),
            position,
            project_in: projected
                .then(|| outer(table.project_in, Role::ProjectIn, [c.hidden_size, c.embed_size])),
            project_out: projected
                .then(|| outer(table.project_out, Role::ProjectOut, [c.embed_size, c.hidden_size])),
            final_norm: c
                .final_norm
                .then(|| outer(table.final_norm, Role::FinalNorm, [c.hidden_size, 1])),
            embed,
            head,
            rope: Arc::default(),
            config,
        }
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Names of block `i`.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn names(&self, i: usize) -> Result<&BlockNames> {
        self.blocks.get(i).ok_or_else(|| {
            Error::Input(format!("there is no block {i}: the network has {}", self.blocks.len()))
        })
    }

    /// The linear layers of block `i`, grouped by the input they share, in the order in which they
    /// compute: `[[q, k, v], [o], [gate, up], [down]]`, fused projections alone. Set `n` reads
    /// what stage `n` leaves in [`crate::BlockState::x`]. Empty when there is no such block.
    pub fn linear_sets(&self, i: usize) -> Vec<Vec<Name>> {
        let Some(b) = self.blocks.get(i) else { return Vec::new() };
        let first = b.gate.iter().chain([&b.up]).cloned().collect();
        vec![b.qkv.clone(), vec![b.output.clone()], first, vec![b.down.clone()]]
    }

    /// The linear layers of block `i` in the order of [`Decoder::linear_sets`].
    pub fn linears(&self, i: usize) -> Vec<Name> {
        self.linear_sets(i).into_iter().flatten().collect()
    }

    /// Every tensor name of block `i`, in the order of computation.
    pub fn block_tensors(&self, i: usize) -> Vec<String> {
        let names = self.blocks.get(i).map(|b| b.all()).unwrap_or_default();
        names.into_iter().flat_map(Name::tensors).collect()
    }

    /// Every tensor name outside the blocks; a tied head is not listed twice.
    pub fn other_tensors(&self) -> Vec<String> {
        self.other_names().into_iter().flat_map(Name::tensors).collect()
    }

    /// Every module outside the blocks; a tied head is not listed twice.
    pub fn other_names(&self) -> Vec<&Name> {
        let mut all = vec![&self.embed];
        all.extend(&self.position);
        all.extend(&self.project_in);
        all.extend(&self.final_norm);
        all.extend(&self.project_out);
        if self.head.module != self.embed.module {
            all.push(&self.head);
        }
        all
    }

    /// Every module of the network: embedding side, blocks, head side.
    pub fn all_names(&self) -> Vec<&Name> {
        let (before, after): (Vec<_>, Vec<_>) = self
            .other_names()
            .into_iter()
            .partition(|n| matches!(n.role, Role::Embed | Role::Position | Role::ProjectIn));
        let blocks = self.blocks.iter().flat_map(BlockNames::all);
        before.into_iter().chain(blocks).chain(after).collect()
    }

    /// Whether a checkpoint tensor is a buffer that no forward pass reads (causal masks and
    /// rotation frequencies that old checkpoints store).
    pub fn is_buffer(&self, tensor: &str) -> bool {
        let endings = self.config.family.table().buffers;
        endings.iter().any(|end| {
            tensor.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }
}

fn block_names(c: &DecoderConfig, prefix: &str, i: usize) -> BlockNames {
    let table = c.family.table();
    let name = |module: &str, role, shape, bias| Name {
        module: format!("{prefix}{}.{i}.{module}", table.blocks),
        role,
        block: Some(i),
        transposed: c.transposed,
        shape,
        kernel: None,
        spelling: Spelling::Dotted,
        bias,
        plus_one: false,
    };
    let norm = |module: &str, role, width| Name {
        transposed: false,
        plus_one: c.norm == NormKind::RmsPlusOne,
        ..name(module, role, [width, 1], c.norm == NormKind::Layer)
    };
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.query_width(), c.key_width());
    let [query, key, value] = table.qkv;
    let qkv = match c.qkv {
        Qkv::Separate => vec![
            name(query, Role::Query, [q, hidden], c.qkv_bias),
            name(key, Role::Key, [kv, hidden], c.qkv_bias),
            name(value, Role::Value, [kv, hidden], c.qkv_bias),
        ],
        Qkv::Fused | Qkv::FusedPerHead => {
            vec![name(query, Role::QueryKeyValue, [q + 2 * kv, hidden], c.qkv_bias)]
        }
    };
    let sandwich = c.placement == Placement::Sandwich;
    BlockNames {
        norm1: norm(table.norm1, Role::Norm1, hidden),
        norm1_post: sandwich.then(|| norm(table.norm1_post, Role::Norm1Post, hidden)),
        norm2: norm(table.norm2, Role::Norm2, hidden),
        norm2_post: sandwich.then(|| norm(table.norm2_post, Role::Norm2Post, hidden)),
        qkv,
        qk_norm: c.qk_norm.then(|| {
            let [query, key] = table.qk_norm;
            [norm(query, Role::QueryNorm, c.head_dim), norm(key, Role::KeyNorm, c.head_dim)]
        }),
        output: name(table.output, Role::Output, [hidden, q], c.output_bias),
        gate: c.gated.then(|| name(table.gate, Role::Gate, [inner, hidden], c.mlp_bias)),
        up: name(table.up, Role::Up, [inner, hidden], c.mlp_bias),
        down: name(table.down, Role::Down, [hidden, inner], c.mlp_bias),
    }
}
