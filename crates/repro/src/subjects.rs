//! The models that claims are tested on.
//!
//! *Natural* weights are the checkpoint as it is. *Planted* weights compute the same function, but
//! three input channels of every normed linear carry 16 times the activation (norm gain up, weight
//! columns down): the outliers that large models grow and small ones lack.

use crate::{Error, Result, Settings};
use data::almanac::{Almanac, Split};
use data::{Tokenizer, text};
use nn::{Leaf, Model, Overlay, Weights};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use store::{Dtype, WriteOptions, Writer};
use tensor::host;

/// Channels that are planted per norm, and how much stronger they become.
const PLANTED: (usize, f32) = (3, 16.0);

/// A model with its calibration and evaluation text.
pub struct Subject {
    /// Name for tables, e.g. `almanac-3m`.
    pub name: String,
    /// `natural` or `planted`.
    pub weights: &'static str,
    /// The checkpoint.
    pub path: PathBuf,
    /// Text that calibration draws from.
    pub calibration: text::Documents,
    /// Held-out tokens.
    pub evaluation: Vec<u32>,
    /// Tokens per evaluation and calibration window.
    pub window: usize,
    /// Group sizes that divide every width; 0 is whole rows.
    pub groups: Vec<usize>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
}

/// The subjects at hand, each natural and planted; what is missing is said in `notes`.
pub fn subjects(settings: &Settings, notes: &mut Vec<String>) -> Result<Vec<Subject>> {
    evaluated_on(settings, if settings.fast { 8192 } else { 16384 }, notes)
}

/// As [`subjects`], with `tokens` held-out tokens.
pub fn evaluated_on(
    settings: &Settings,
    tokens: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<Subject>> {
    let mut all = Vec::new();
    let almanac = settings.samples.join("almanac-3m");
    if !almanac.is_dir() {
        return Err(Error::Setup(format!(
            "{} is missing; run this in the project's directory, or train it with `strata train`",
            almanac.display()
        )));
    }
    let world = Almanac::embedded();
    let groups: &[usize] = if settings.fast { &[128] } else { &[32, 128] };
    all.extend(both(
        settings,
        "almanac-3m",
        &almanac,
        (&world.documents(Split::Validation), &world.documents(Split::Test)),
        groups,
        tokens,
    )?);
    match settings.shared.as_ref().filter(|_| !settings.fast) {
        Some(shared) if shared.join("data/stories260k").is_dir() => {
            let shared = shared.join("data");
            let stories = stories(&shared.join("tinystories-sample/tinystories_1000.json"))?;
            // 172 inputs of the down projection: only whole rows divide all widths.
            let path = shared.join("stories260k");
            let texts = (&stories.0, &stories.1);
            all.extend(both(settings, "stories260k", &path, texts, &[0], tokens)?);
        }
        _ if settings.fast => notes.push("fast: only the almanac model, one group size".into()),
        _ => notes.push("skipped: stories260k is not there (set STRATA_SHARED)".into()),
    }
    Ok(all)
}

/// Stories that begin a story: the first half calibrates, the second evaluates.
fn stories(path: &Path) -> Result<(text::Documents, text::Documents)> {
    let all = text::load(path)?;
    let begin = |t: &&String| t.starts_with("Once upon") || t.starts_with("One day");
    let texts: Vec<String> = all.texts.iter().filter(begin).cloned().collect();
    let (calibration, evaluation) = texts.split_at(texts.len() / 2);
    Ok((text::Documents::new(calibration.to_vec()), text::Documents::new(evaluation.to_vec())))
}

fn both(
    settings: &Settings,
    name: &str,
    path: &Path,
    (calibration, evaluation): (&text::Documents, &text::Documents),
    groups: &[usize],
    tokens: usize,
) -> Result<Vec<Subject>> {
    let model = Model::open(path)?;
    let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
    let mut held_out = text::document_tokens(evaluation, &tokenizer)?;
    held_out.truncate(tokens);
    let planted = settings.scratch.join(format!("{name}-planted"));
    plant(&model, &planted)?;
    let places = [("natural", path.to_path_buf()), ("planted", planted)];
    Ok(places
        .into_iter()
        .map(|(weights, path)| Subject {
            name: name.to_string(),
            weights,
            path,
            calibration: calibration.clone(),
            evaluation: held_out.clone(),
            window: 128,
            groups: groups.to_vec(),
            tokenizer: tokenizer.clone(),
        })
        .collect())
}

/// Writes the planted twin of `model` to `out`, in f32 so that the function is exactly kept.
fn plant(model: &Model, out: &Path) -> Result<()> {
    let decoder = &model.decoder;
    let mut weights = Overlay::new(model.weights.as_ref());
    let mut names = Vec::new();
    for name in decoder.all_names() {
        names.push(name.clone());
    }
    weights.load(&names)?;
    let (count, factor) = PLANTED;
    for block in 0..decoder.num_blocks() {
        for (n, fold) in decoder.norm_fold(block).into_iter().enumerate() {
            let mut rng = tensor::Rng::stream((2 * block + n) as u64, "planted channels");
            let width = fold.norm.shape[0];
            let mut channels: Vec<usize> = rng.permutation(width);
            channels.truncate(count);
            let device = weights.device();
            let offset = if fold.norm.plus_one { 1.0 } else { 0.0 };
            for leaf in [Leaf::Weight, Leaf::Bias] {
                if leaf == Leaf::Bias && !fold.norm.bias {
                    continue;
                }
                let shift = if leaf == Leaf::Weight { offset } else { 0.0 };
                let mut values = host::into_vec(weights.vector(&fold.norm, leaf)?);
                for &c in &channels {
                    values[c] = (values[c] + shift) * factor - shift;
                }
                let shape = [values.len()];
                let tensor = host::from_vec(values, shape, &device);
                weights.vectors.insert(fold.norm.tensor(leaf), tensor);
            }
            for layer in &fold.layers {
                let mut values = host::into_vec(weights.matrix(layer)?);
                for row in values.chunks_mut(layer.in_features()) {
                    channels.iter().for_each(|&c| row[c] /= factor);
                }
                let tensor = host::from_vec(values, layer.shape, &device);
                weights.matrices.insert(layer.weight(), tensor);
            }
        }
    }
    let mut writer =
        Writer::create(out, WriteOptions { overwrite: true, ..WriteOptions::default() })?;
    let mut written = HashSet::new();
    for name in &names {
        if !written.insert(name.weight()) {
            continue;
        }
        let (values, shape) = if name.role.is_norm() {
            (host::into_vec(weights.vector(name, Leaf::Weight)?), vec![name.shape[0]])
        } else {
            (host::into_vec(weights.matrix(name)?), name.shape.to_vec())
        };
        writer.add(&name.weight(), Dtype::F32, &shape, bytes(&values))?;
        if let Some(bias) = name.bias_name() {
            let values = host::into_vec(weights.vector(name, Leaf::Bias)?);
            writer.add(&bias, Dtype::F32, &[values.len()], bytes(&values))?;
        }
    }
    writer.carry(model.checkpoint.directory(), &[])?;
    writer.finish()?;
    Ok(())
}

fn bytes(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}
