//! Rotated weights: the same network in another basis of its residual stream and value heads, so
//! that no channel carries outliers (Ashkboos et al. 2024, arXiv 2404.00456, the part that needs no
//! support at run time).
//!
//! [`Rotated`] wraps the weights of a model and gives every matrix folded and rotated, one at a time
//! and in f64, when it is asked for. What it describes stays an ordinary checkpoint:
//!
//! - norm gains (and LayerNorm biases) move into the linear layers that read the norm;
//! - what writes the residual stream is multiplied by `Q`, what reads it too, so that `Q Qᵀ`
//!   cancels; a tied head is untied first, for only the head absorbs the final norm's gain;
//! - with LayerNorm every writer of the stream is centred, and `Q` keeps the all-ones vector: the
//!   stream then has mean 0 in both bases, and LayerNorm without gain subtracts nothing;
//! - a LayerNorm bias that a reader without bias would lose travels in the mean direction, which a
//!   centred stream leaves free: the norm's bias becomes 1 everywhere and the reader's rows get the
//!   constant as their mean;
//! - value heads are rotated by a Hadamard matrix, the output projection by its inverse.
//!
//! The arithmetic on rows is in `rotate::fold`.

mod fold;

use std::collections::HashMap;
use std::ops::Range;

use serde_json::Value;
use tensor::rotation::Rotation;
use tensor::{Device, Rng, Tensor, host, ops};

use crate::config::{NormKind, Placement, Qkv};
use crate::weights::check_input;
use crate::{Decoder, Error, Leaf, Name, Result, Role, Weights};
use fold::NormValues;

/// Which orthogonal matrix turns the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotationKind {
    /// A Hadamard matrix with random signs; a random orthogonal one where the width has none.
    Hadamard,
    /// A random orthogonal matrix.
    Random,
}

/// Rows of an embedding or head that are rotated together: 64 MiB of f64 at most.
const TABLE_VALUES: usize = 1 << 23;

/// Weights in a rotated basis, over other weights.
pub struct Rotated<'a> {
    base: Box<dyn Weights + Send + Sync + 'a>,
    /// The network as the base names it.
    source: Decoder,
    /// The network as it is described from now on: head untied.
    decoder: Decoder,
    /// Source names by rotated module.
    names: HashMap<String, Name>,
    /// The norm that a module reads, by rotated module.
    reads: HashMap<String, Reader>,
    rotation: Rotation,
    values: bool,
    warnings: Vec<String>,
}

/// What a reader of a norm has to absorb.
#[derive(Clone)]
struct Reader {
    /// The norm, as the source names it.
    norm: Name,
    /// The norm's bias travels in the mean direction.
    carried: bool,
}

impl<'a> Rotated<'a> {
    /// Rotates `base`, the weights of `source`. The random draws come from `seed`.
    ///
    /// # Errors
    /// [`Error::Input`] for networks in which something nonlinear sits between a writer of the
    /// residual stream and the stream (norms on branches, post-norm blocks), with what would work.
    pub fn new(
        base: Box<dyn Weights + Send + Sync + 'a>,
        source: &Decoder,
        kind: RotationKind,
        seed: u64,
    ) -> Result<Self> {
        refuse(source)?;
        let decoder = untied(source);
        let mut warnings = Vec::new();
        let width = source.config.hidden_size;
        let keep_ones = source.config.norm == NormKind::Layer;
        let rng = |label| Rng::stream(seed, label);
        let found = match kind {
            RotationKind::Hadamard => {
                Rotation::hadamard(width, &mut rng("rotation signs"), keep_ones)
            }
            RotationKind::Random => None,
        };
        let rotation = match found {
            Some(rotation) => rotation,
            None => {
                if kind == RotationKind::Hadamard {
                    warnings.push(format!(
                        "no Hadamard matrix of order {width} can be constructed: the residual \
                         stream is rotated by a random orthogonal matrix"
                    ));
                }
                Rotation::random(width, &mut rng("rotation matrix"), keep_ones)?
            }
        };
        let head = source.config.head_dim;
        let values = head.is_power_of_two();
        if !values {
            warnings.push(format!(
                "heads of {head} features are no power of two: the values are not rotated"
            ));
        }
        let names = pairs(&decoder, source);
        let reads = readers(&decoder, source);
        let source = source.clone();
        Ok(Rotated { base, source, decoder, names, reads, rotation, values, warnings })
    }

    /// The network that these weights belong to: as the source, the head untied.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// What was done, for a report.
    pub fn description(&self) -> String {
        let values = match self.values {
            true => "; value heads by a Hadamard matrix",
            false => "",
        };
        format!("residual stream: {}{values}", self.rotation.description())
    }

    /// What could not be done as asked.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The `config.json` of the rotated network.
    pub fn config(&self, original: &Value) -> Value {
        let mut config = original.clone();
        let untied =
            self.source.config.tie_word_embeddings && !self.decoder.config.tie_word_embeddings;
        if let Some(object) = config.as_object_mut().filter(|_| untied) {
            object.insert("tie_word_embeddings".into(), false.into());
        }
        config
    }

    /// The module of the source that a module of the rotated network is made of.
    ///
    /// # Errors
    /// [`Error::Weights`] when there is none.
    pub fn source_name(&self, name: &Name) -> Result<&Name> {
        self.names.get(&name.module).ok_or_else(|| Error::Weights {
            name: name.module.clone(),
            reason: "is not a module of the rotated network".into(),
        })
    }

    /// The matrix of `name` in double precision, `[out, in]`.
    ///
    /// # Errors
    /// From the base.
    pub fn matrix_f64(&self, name: &Name) -> Result<Vec<f64>> {
        if is_table(name.role) {
            return self.table_f64(name, 0..name.shape[0]);
        }
        let source = self.source_name(name)?;
        let mut w = wide(host::into_vec(self.base.matrix(source)?));
        let [out, input] = name.shape;
        if let Some(reader) = self.reads.get(&name.module) {
            self.norm_values(reader)?.fold(&mut w, input, reader.carried && !name.bias);
            self.rotation.rotate_rows(&mut w);
        }
        if self.values {
            match name.role {
                Role::Value | Role::QueryKeyValue => {
                    for start in self.value_rows(name) {
                        let end = start + self.source.config.head_dim;
                        if let Some(head) = w.get_mut(start * input..end * input) {
                            fold::mix_rows(head, input);
                        }
                    }
                }
                Role::Output => fold::mix_columns(&mut w, self.source.config.head_dim),
                _ => {}
            }
        }
        if writes(name.role) {
            if self.centred() {
                fold::centre_columns(&mut w, input);
            }
            debug_assert_eq!(out, self.rotation.order());
            self.rotation.rotate_columns(&mut w, input);
        }
        Ok(w)
    }

    /// A vector of `name` in double precision.
    ///
    /// # Errors
    /// From the base.
    pub fn vector_f64(&self, name: &Name, leaf: Leaf) -> Result<Vec<f64>> {
        let source = self.source_name(name)?;
        let stored = || Ok::<_, Error>(wide(host::into_vec(self.base.vector(source, leaf)?)));
        if let Some(carried) = self.folded_norm(name) {
            let value = match leaf {
                Leaf::Weight => f64::from(u8::from(!name.plus_one)),
                Leaf::Bias => f64::from(u8::from(carried)),
                // Statistics of a batch normalisation are not folded.
                Leaf::RunningMean | Leaf::RunningVar => return stored(),
            };
            return Ok(vec![value; name.shape[0]]);
        }
        let mut b = stored()?;
        if leaf != Leaf::Bias {
            return Ok(b);
        }
        if let Some(reader) = self.reads.get(&name.module)
            && reader.norm.bias
        {
            let norm = self.norm_values(reader)?;
            let w = wide(host::into_vec(self.base.matrix(source)?));
            for (b, row) in b.iter_mut().zip(w.chunks_exact(name.in_features())) {
                *b += norm.constant(row);
            }
        }
        if self.values && matches!(name.role, Role::Value | Role::QueryKeyValue) {
            for start in self.value_rows(name) {
                if let Some(head) = b.get_mut(start..start + self.source.config.head_dim) {
                    fold::mix_rows(head, 1);
                }
            }
        }
        if writes(name.role) {
            if self.centred() {
                fold::centre_columns(&mut b, 1);
            }
            self.rotation.rotate_rows(&mut b);
        }
        Ok(b)
    }

    /// Rows of an embedding, of the positions or of the head, in double precision.
    fn table_f64(&self, name: &Name, rows: Range<usize>) -> Result<Vec<f64>> {
        let ids: Vec<u32> = rows.map(|row| row as u32).collect();
        self.rows_f64(name, &ids)
    }

    fn rows_f64(&self, name: &Name, ids: &[u32]) -> Result<Vec<f64>> {
        let source = self.source_name(name)?;
        let mut rows = wide(host::into_vec(self.base.embed(source, ids)?));
        let width = name.shape[1];
        if let Some(reader) = self.reads.get(&name.module) {
            self.norm_values(reader)?.fold(&mut rows, width, reader.carried);
            self.rotation.rotate_rows(&mut rows);
        } else if self.enters(name.role) {
            if self.centred() {
                fold::centre_rows(&mut rows, width);
            }
            self.rotation.rotate_rows(&mut rows);
        } else if name.role == Role::Head && self.source.final_norm.is_none() {
            // The head reads the stream itself.
            if self.source.project_out.is_none() {
                self.rotation.rotate_rows(&mut rows);
            }
        }
        Ok(rows)
    }

    /// Whether the rows of the embedding `role` are added to the residual stream.
    fn enters(&self, role: Role) -> bool {
        role == Role::Position || (role == Role::Embed && self.source.project_in.is_none())
    }

    /// Whether the stream is centred once and for all, for LayerNorm's sake.
    fn centred(&self) -> bool {
        self.source.config.norm == NormKind::Layer
    }

    /// For a norm whose gain is folded away: whether its bias is the carrier 1 rather than 0.
    fn folded_norm(&self, name: &Name) -> Option<bool> {
        if !matches!(name.role, Role::Norm1 | Role::Norm2 | Role::FinalNorm) {
            return None;
        }
        let source = self.names.get(&name.module)?;
        let reader = self.reads.values().find(|reader| reader.norm.module == source.module)?;
        Some(reader.carried)
    }

    fn norm_values(&self, reader: &Reader) -> Result<NormValues> {
        let norm = &reader.norm;
        let vector = |leaf| Ok::<_, Error>(wide(host::into_vec(self.base.vector(norm, leaf)?)));
        let mut gain = vector(Leaf::Weight)?;
        if norm.plus_one {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        let bias = if norm.bias { Some(vector(Leaf::Bias)?) } else { None };
        Ok(NormValues { gain, bias, centred: reader.carried })
    }

    /// First rows of the value heads in the value projection or the fused one.
    fn value_rows(&self, name: &Name) -> Vec<usize> {
        let c = &self.source.config;
        let first = |kv: usize| match (name.role, c.qkv) {
            (Role::QueryKeyValue, Qkv::FusedPerHead) => (3 * kv + 2) * c.head_dim,
            (Role::QueryKeyValue, _) => c.query_width() + c.key_width() + kv * c.head_dim,
            _ => kv * c.head_dim,
        };
        (0..c.num_key_value_heads).map(first).collect()
    }
}

/// Whether rows of the module are looked up or computed one by one.
fn is_table(role: Role) -> bool {
    matches!(role, Role::Embed | Role::Position | Role::Head)
}

/// Whether the layer's output is added to the residual stream.
fn writes(role: Role) -> bool {
    matches!(role, Role::Output | Role::Down | Role::ProjectIn)
}

fn wide(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

fn narrow(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|v| v as f32).collect()
}

/// Refuses networks whose stream cannot be rotated.
fn refuse(source: &Decoder) -> Result<()> {
    let c = &source.config;
    let family = c.family.model_type();
    let reason = match c.placement {
        Placement::Sandwich => {
            "has norms with gains on its branches, between what writes the residual stream and \
             the stream: no rotation passes through them"
        }
        Placement::Post => {
            "normalises after adding (post-norm): its residual stream is the norm's output, gain \
             and all, and no rotation passes through it"
        }
        _ if c.norm == NormKind::Layer && source.final_norm.is_none() => {
            "has no final norm, so its head reads the mean of the residual stream, which the \
             rotation would remove"
        }
        _ => return Ok(()),
    };
    Err(Error::Input(format!("this {family} model {reason}; use --rotation none")))
}

/// The description with a head of its own. Bare checkpoints (without the usual prefix) get the
/// usual names then: loaders put the prefix before all names of a bare one, the head's too.
fn untied(source: &Decoder) -> Decoder {
    let mut decoder = source.clone();
    let reads_head = source.project_out.is_none();
    if !source.config.tie_word_embeddings || !reads_head {
        return decoder;
    }
    decoder.config.tie_word_embeddings = false;
    let table = source.config.family.table();
    let standard = table.prefixes.first().copied().unwrap_or("");
    match source.prefix.strip_suffix(standard) {
        Some(outer) => {
            decoder.head.module = format!("{outer}{}", table.head);
            decoder
        }
        None => Decoder::named(decoder.config, standard, table.head),
    }
}

/// The source name of every module.
fn pairs(decoder: &Decoder, source: &Decoder) -> HashMap<String, Name> {
    let mut names = HashMap::new();
    let mut add = |a: &Name, b: &Name| drop(names.insert(a.module.clone(), b.clone()));
    for (a, b) in decoder.blocks.iter().zip(&source.blocks) {
        a.all().into_iter().zip(b.all()).for_each(|(a, b)| add(a, b));
    }
    // The head last but for the embedding: where they are one module, it is an embedding.
    add(&decoder.head, &source.head);
    add(&decoder.embed, &source.embed);
    for (a, b) in [
        (&decoder.position, &source.position),
        (&decoder.project_in, &source.project_in),
        (&decoder.project_out, &source.project_out),
        (&decoder.final_norm, &source.final_norm),
    ] {
        if let (Some(a), Some(b)) = (a, b) {
            add(a, b);
        }
    }
    names
}

/// What every reader of a norm absorbs, by rotated module.
fn readers(decoder: &Decoder, source: &Decoder) -> HashMap<String, Reader> {
    let mut reads = HashMap::new();
    let folds = |d: &Decoder| {
        let blocks = (0..d.num_blocks()).flat_map(|i| d.norm_fold(i));
        blocks.chain(d.final_norm_fold()).collect::<Vec<_>>()
    };
    for (new, old) in folds(decoder).into_iter().zip(folds(source)) {
        let carried = old.norm.bias && new.layers.iter().any(|layer| !layer.bias);
        for layer in new.layers {
            reads.insert(layer.module, Reader { norm: old.norm.clone(), carried });
        }
    }
    reads
}

impl Weights for Rotated<'_> {
    fn linear(&self, name: &Name, x: Tensor<2>) -> Result<Tensor<2>> {
        check_input(name, &x)?;
        let bias = if name.bias { Some(self.vector(name, Leaf::Bias)?) } else { None };
        Ok(ops::linear(x, self.matrix(name)?, bias))
    }

    fn matrix(&self, name: &Name) -> Result<Tensor<2>> {
        let [out, width] = name.shape;
        if !is_table(name.role) {
            return Ok(host::from_vec(narrow(self.matrix_f64(name)?), name.shape, &self.device()));
        }
        let mut values = Vec::with_capacity(out * width);
        let step = (TABLE_VALUES / width.max(1)).max(1);
        for start in (0..out).step_by(step) {
            values.extend(narrow(self.table_f64(name, start..out.min(start + step))?));
        }
        Ok(host::from_vec(values, name.shape, &self.device()))
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> Result<Tensor<1>> {
        let values = narrow(self.vector_f64(name, leaf)?);
        let shape = [values.len()];
        Ok(host::from_vec(values, shape, &self.device()))
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> Result<Tensor<2>> {
        let values = narrow(self.rows_f64(name, ids)?);
        Ok(host::from_vec(values, [ids.len(), name.shape[1]], &self.device()))
    }

    fn device(&self) -> Device {
        self.base.device()
    }
}
