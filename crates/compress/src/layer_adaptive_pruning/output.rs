//! What a pruning job leaves on disk: the checkpoint with exact zeros, the masks, the allocation and
//! the curves.
//!
//! The checkpoint keeps every tensor's name, type and bits, save the pruned elements, which become
//! zero bytes (and, after training, the trained tensors). It loads wherever the original does, so
//! any family can be written, whether Strata computes with it block by block or not.

use super::curves::{Curve, Distortion};
use super::iterate::RoundNote;
use super::layers::Place;
use super::masks::Mask;
use super::options::MaskExport;
use super::round::{LayerShare, Round};
use crate::{Error, Result};
use nn::{Name, Role};
use std::collections::{BTreeMap, BTreeSet};
use store::packed::sparse::{self, SparseLayout};
use store::{Checkpoint, Dtype, TensorInfo, Writer};

/// The file that says what every layer keeps.
pub const ALLOCATION_FILE: &str = "allocation.json";

/// The file with the measured curves.
pub const CURVES_FILE: &str = "curves.json";

/// The file with a boolean `<module>.weight_mask` for every layer. Loaders take every safetensors
/// file beside a model for weights, so it lies in a directory of its own.
pub const MASKS_FILE: &str = "masks/masks.safetensors";

/// The file with `<module>.weight_orig` and `<module>.weight_mask`, as PyTorch's prune keeps them.
pub const PYTORCH_FILE: &str = "masks/pytorch.safetensors";

/// Values that training changed, by tensor name, in the order of the checkpoint.
pub type Trained<'a> = &'a dyn Fn(&str) -> Option<Vec<f32>>;

/// The masks of a job and the tensors they belong to.
pub struct Masked<'a> {
    tensors: BTreeMap<String, (&'a Name, &'a Mask)>,
}

impl<'a> Masked<'a> {
    /// `masks` (by module) of the layers in `places`.
    pub fn new(places: &'a [Place], masks: &'a BTreeMap<String, Mask>) -> Self {
        let with = |(_, name): &'a Place| Some((name.weight(), (name, masks.get(&name.module)?)));
        Self { tensors: places.iter().filter_map(with).collect() }
    }

    /// The mask of a stored tensor. A head that is tied to the embedding but stored beside it sees
    /// the same mask.
    fn of(&self, info: &TensorInfo) -> Option<(&'a Name, &'a Mask)> {
        let own = self.tensors.get(&info.name).copied();
        own.or_else(|| {
            let tied = |(name, _): &&(&Name, &Mask)| {
                name.role == Role::Head
                    && info.name.ends_with("lm_head.weight")
                    && info.shape == name.stored_shape()
            };
            self.tensors.values().find(tied).copied()
        })
    }
}

/// The flags of a mask in the order in which the checkpoint stores the weight.
pub(super) fn stored_flags(name: &Name, mask: &Mask) -> Vec<bool> {
    let [out, width] = name.shape;
    if !name.transposed {
        return mask.flags().to_vec();
    }
    (0..width).flat_map(|c| (0..out).map(move |r| mask.keeps(r * width + c))).collect()
}

/// Writes every tensor of `checkpoint`, masked where it has a mask; with a `layout` the masked
/// linear layers are stored sparse. Returns the modules that are.
///
/// # Errors
/// A mask that does not fit its tensor, trained values that do not fit the stored type, a layout
/// that cannot hold a layer, and from the files.
pub fn write_checkpoint(
    writer: &mut Writer,
    checkpoint: &Checkpoint,
    masked: &Masked<'_>,
    trained: Trained<'_>,
    layout: Option<SparseLayout>,
) -> Result<BTreeSet<String>> {
    let mut stored_sparse = BTreeSet::new();
    for info in checkpoint.infos() {
        let tensor = &info.name;
        let (dtype, mut bytes) = encoded(checkpoint, info, trained)?;
        let found = masked.of(info);
        if let Some((name, mask)) = found {
            zero(tensor, &mut bytes, &stored_flags(name, mask))?;
        }
        match (found, layout) {
            // Convolutions, embeddings and transposed layers stay dense: the layout holds `Linear`.
            (Some((name, _)), Some(layout))
                if name.kernel.is_none() && !name.transposed && *tensor == name.weight() =>
            {
                for (part, dtype, shape, bytes) in
                    sparse::pack(layout, &name.module, dtype, name.shape, &bytes)?
                {
                    writer.add(&part, dtype, &shape, &bytes)?;
                }
                stored_sparse.insert(name.module.clone());
            }
            _ => writer.add(tensor, dtype, &info.shape, &bytes)?,
        }
        checkpoint.release(tensor);
    }
    Ok(stored_sparse)
}

/// The bytes of a tensor: as they are, or trained values in the stored type. Types that no
/// safetensors file holds become half precision.
fn encoded(
    checkpoint: &Checkpoint,
    info: &TensorInfo,
    trained: Trained<'_>,
) -> Result<(Dtype, Vec<u8>)> {
    let name = &info.name;
    let plain = match info.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => info.dtype,
        other if other.is_float() => Dtype::F16,
        Dtype::Ggml(_) => Dtype::F16,
        other => other,
    };
    let values = match trained(name) {
        Some(values) => values,
        None if plain == info.dtype => return Ok((plain, checkpoint.bytes(name)?.into_owned())),
        None => checkpoint.f32(name)?,
    };
    if let Some(at) = store::convert::overflows(&values, plain) {
        return Err(Error::layer(
            name,
            format!(
                "value {} does not fit {}, the checkpoint's type",
                values.get(at).copied().unwrap_or_default(),
                plain.name()
            ),
        ));
    }
    let bytes = store::convert::from_f32(&values, plain)
        .ok_or_else(|| Error::layer(name, format!("cannot be written as {}", plain.name())))?;
    Ok((plain, bytes))
}

/// Zeroes the elements that `flags` drop.
fn zero(tensor: &str, bytes: &mut [u8], flags: &[bool]) -> Result<()> {
    let size = bytes.len() / flags.len().max(1);
    if flags.is_empty() || size * flags.len() != bytes.len() {
        return Err(Error::layer(
            tensor,
            format!("{} bytes are not {} elements of its mask", bytes.len(), flags.len()),
        ));
    }
    for (element, keep) in bytes.chunks_exact_mut(size).zip(flags) {
        if !keep {
            element.fill(0);
        }
    }
    Ok(())
}

/// Writes the mask files.
///
/// # Errors
/// From the files.
pub fn write_masks(
    writer: &mut Writer,
    checkpoint: &Checkpoint,
    places: &[Place],
    masks: &BTreeMap<String, Mask>,
    trained: Trained<'_>,
    export: MaskExport,
) -> Result<()> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (_, name) in places {
        let Some(mask) = masks.get(&name.module) else { continue };
        let flags = stored_flags(name, mask);
        let shape = name.stored_shape();
        match export {
            MaskExport::None => return Ok(()),
            MaskExport::Masks => {
                let bytes = flags.iter().map(|keep| u8::from(*keep)).collect();
                tensors.push((format!("{}.weight_mask", name.module), Dtype::Bool, shape, bytes));
            }
            MaskExport::Pytorch => {
                let info = checkpoint.info(&name.weight())?;
                let (dtype, bytes) = encoded(checkpoint, info, trained)?;
                let ones: Vec<f32> = flags.iter().map(|keep| f32::from(u8::from(*keep))).collect();
                let ones = store::convert::from_f32(&ones, dtype).unwrap_or_default();
                let module = &name.module;
                tensors.push((format!("{module}.weight_orig"), dtype, shape.clone(), bytes));
                tensors.push((format!("{module}.weight_mask"), dtype, shape, ones));
            }
        }
    }
    let file = if export == MaskExport::Pytorch { PYTORCH_FILE } else { MASKS_FILE };
    let bytes = store::safetensors::file_bytes(std::path::Path::new(file), &tensors)?;
    Ok(writer.put_file(file, &bytes)?)
}

/// What `allocation.json` says.
pub fn allocation(
    round: &Round,
    kind: Distortion,
    rounds: &[serde_json::Value],
) -> serde_json::Value {
    let layers: Vec<serde_json::Value> = round.layers.iter().map(layer_json).collect();
    let mut value = serde_json::json!({
        "sparsity": { "requested": round.requested, "reached": round.reached },
        "operations_left": round.operations,
        "distortion": kind,
        "predicted_distortion": round.predicted,
        "measured_distortion": round.measured,
        "measured_over_predicted": round.additivity(),
        "optimal_on_the_curves": round.exact,
        "unused_budget": round.unused,
        "layers": layers,
        "warnings": round.warnings,
    });
    if let Some(object) = value.as_object_mut() {
        object.insert("rounds".into(), rounds.into());
    }
    value
}

/// The round and its history from what [`allocation`] and [`curves`] wrote; masks are not in them.
pub(super) fn parse(
    allocation: &serde_json::Value,
    curves: &serde_json::Value,
) -> Option<(Round, Vec<RoundNote>)> {
    let number = |key: &str| allocation.get(key).and_then(serde_json::Value::as_f64);
    let sparsity = allocation.get("sparsity")?;
    let read = |key: &str| allocation.get(key).cloned().unwrap_or_default();
    let round = Round {
        layers: serde_json::from_value(read("layers")).ok()?,
        requested: sparsity.get("requested")?.as_f64()?,
        reached: sparsity.get("reached")?.as_f64()?,
        operations: number("operations_left"),
        predicted: number("predicted_distortion"),
        measured: number("measured_distortion"),
        unused: read("unused_budget").as_u64().unwrap_or(0),
        exact: read("optimal_on_the_curves").as_bool(),
        curves: match curves.get("layers") {
            Some(layers) => serde_json::from_value(layers.clone()).ok()?,
            None => Vec::new(),
        },
        masks: BTreeMap::new(),
        warnings: serde_json::from_value(read("warnings")).ok()?,
    };
    Some((round, serde_json::from_value(read("rounds")).ok()?))
}

fn layer_json(layer: &LayerShare) -> serde_json::Value {
    serde_json::to_value(layer).unwrap_or_default()
}

/// What `curves.json` says; `None` when nothing was measured.
pub fn curves(curves: &[Curve], kind: Distortion) -> Option<serde_json::Value> {
    let first = curves.first()?;
    Some(serde_json::json!({
        "steps": first.amount.len().saturating_sub(1),
        "distortion": kind,
        "layers": curves,
    }))
}
