//! What image networks share: the description of their images, and pixels as rows.

use serde_json::Value;
use store::Checkpoint;
use tensor::{Device, Tensor, host};

use crate::keys::Keys;
use crate::network::{ImageSpec, Input, wrong_input};
use crate::{Error, Result};

/// Classes beyond which a config's labels are not believed.
const MAX_LABELS: usize = 1 << 20;

impl ImageSpec {
    /// Images of `channels`, `height` and `width`, not normalised, without labels.
    pub fn new(channels: usize, height: usize, width: usize) -> Self {
        let (mean, deviation) = (vec![0.0; channels], vec![1.0; channels]);
        ImageSpec { channels, height, width, mean, deviation, labels: Vec::new() }
    }

    /// The same with the normalisation and the labels that the checkpoint states: `mean`, `std` and
    /// `label_names` or `id2label` of config.json, else `image_mean` and `image_std` of
    /// preprocessor_config.json.
    pub(crate) fn described(mut self, config: &Value, checkpoint: &Checkpoint) -> Result<Self> {
        let preprocessor = preprocessor(checkpoint)?;
        for (key, other, values) in
            [("mean", "image_mean", &mut self.mean), ("std", "image_std", &mut self.deviation)]
        {
            let stated = config.get(key).map(|v| (key, v));
            let found = stated.or_else(|| Some((other, preprocessor.as_ref()?.get(other)?)));
            if let Some((key, value)) = found {
                *values = per_channel(key, value, self.channels)?;
            }
        }
        if self.deviation.iter().any(|&d| d <= 0.0) {
            return Err(Error::config("std", "is not positive in every channel"));
        }
        self.labels = labels(config)?;
        Ok(self)
    }

    /// Values in one image.
    pub fn values(&self) -> usize {
        self.channels * self.height * self.width
    }
}

fn preprocessor(checkpoint: &Checkpoint) -> Result<Option<Value>> {
    const MAX: u64 = 1 << 20;
    let path = checkpoint.directory().join("preprocessor_config.json");
    let Ok(meta) = std::fs::metadata(&path) else { return Ok(None) };
    let bad = |reason: String| Error::config("preprocessor_config.json", reason);
    if !meta.is_file() || meta.len() > MAX {
        return Err(bad(format!("is not a file of at most {MAX} bytes")));
    }
    let bytes = std::fs::read(&path).map_err(|e| bad(format!("cannot be read: {e}")))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| bad(format!("is not JSON: {e}")))
}

fn per_channel(key: &str, value: &Value, channels: usize) -> Result<Vec<f32>> {
    let numbers: Option<Vec<f32>> = match value {
        Value::Number(n) => n.as_f64().map(|v| vec![v as f32; channels]),
        Value::Array(all) => all.iter().map(|v| v.as_f64().map(|v| v as f32)).collect(),
        _ => None,
    };
    numbers.filter(|n| n.len() == channels && n.iter().all(|v| v.is_finite())).ok_or_else(|| {
        Error::config(key, format!("{value} is not one number per channel ({channels})"))
    })
}

fn labels(config: &Value) -> Result<Vec<String>> {
    if let Some(Value::Array(names)) = config.get("label_names") {
        return Ok(names.iter().filter_map(Value::as_str).map(str::to_string).collect());
    }
    let Some(Value::Object(map)) = config.get("id2label") else { return Ok(Vec::new()) };
    if map.len() > MAX_LABELS {
        return Err(Error::config("id2label", "has more entries than are believed"));
    }
    let mut labels = vec![String::new(); map.len()];
    for (id, label) in map {
        let place = id.parse::<usize>().ok().and_then(|id| labels.get_mut(id));
        match (place, label.as_str()) {
            (Some(place), Some(label)) => *place = label.to_string(),
            _ => {
                return Err(Error::config(
                    "id2label",
                    format!("`{id}` is not a class with a name"),
                ));
            }
        }
    }
    Ok(labels)
}

/// Height and width under `key`: one number for both, or two. Sizes beyond 2^14 are not believed.
pub(crate) fn image_size(config: &Value, key: &str) -> Result<Option<[usize; 2]>> {
    const MAX: u64 = 1 << 14;
    let Some(value) = config.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
    let size = |v: &Value| v.as_u64().filter(|n| (1..=MAX).contains(n)).map(|n| n as usize);
    let both = match value {
        Value::Array(both) => match &both[..] {
            [height, width] => size(height).zip(size(width)).map(|(h, w)| [h, w]),
            _ => None,
        },
        one => size(one).map(|n| [n, n]),
    };
    let reason = || format!("{value} is not a size in 1..={MAX}, or two of them");
    both.map(Some).ok_or_else(|| Error::config(key, reason()))
}

/// Colour channels under `key`; more than 4096 are not believed.
pub(crate) fn channels(config: &Value, key: &str) -> Result<Option<usize>> {
    const MAX: usize = 4096;
    match Keys(config).optional_size(key)? {
        Some(n) if n > MAX => {
            Err(Error::config(key, format!("{n} channels; at most {MAX} are believed")))
        }
        found => Ok(found),
    }
}

/// Number of classes that a config states (`num_classes`, `num_labels` or its labels).
pub(crate) fn stated_classes(config: &Value) -> Result<Option<usize>> {
    let keys = Keys(config);
    for key in ["num_classes", "num_labels"] {
        if let Some(n) = keys.optional_size(key)? {
            return Ok(Some(n));
        }
    }
    Ok(Some(labels(config)?.len()).filter(|&n| n > 0))
}

/// Checks that the input is images of the network, and gives them.
pub(crate) fn expect<'a>(
    family: &str,
    spec: &ImageSpec,
    input: &Input<'a>,
) -> Result<(&'a [f32], usize)> {
    let wanted = [spec.channels, spec.height, spec.width];
    let Input::Images { pixels, shape } = *input else {
        let [c, h, w] = wanted;
        return Err(wrong_input(family, &format!("images of {c} x {h} x {w}")));
    };
    let [images, rest @ ..] = shape;
    if images == 0 || rest != wanted {
        return Err(Error::Shape {
            name: "images (count, channels, height, width)".into(),
            found: shape.to_vec(),
            expected: [&[images.max(1)], &wanted[..]].concat(),
        });
    }
    if images.checked_mul(spec.values()) != Some(pixels.len()) {
        return Err(Error::Input(format!(
            "{} values do not fill {images} images of {} values",
            pixels.len(),
            spec.values()
        )));
    }
    Ok((pixels, images))
}

/// Images `[n, channels, height, width]` as rows of pixels `[n * height * width, channels]`.
pub(crate) fn rows_of_pixels(
    pixels: &[f32],
    images: usize,
    spec: &ImageSpec,
    device: &Device,
) -> Tensor<2> {
    let (channels, plane) = (spec.channels, spec.height * spec.width);
    let mut rows = vec![0.0; pixels.len()];
    let both = rows.chunks_exact_mut(channels * plane).zip(pixels.chunks_exact(channels * plane));
    for (rows, pixels) in both {
        for (channel, plane) in pixels.chunks_exact(plane).enumerate() {
            for (row, value) in rows.chunks_exact_mut(channels).zip(plane) {
                row[channel] = *value;
            }
        }
    }
    host::from_vec(rows, [images * plane, channels], device)
}

/// The error of a state that another network (or another segment) made.
pub(crate) fn check_state(
    what: &str,
    x: &Tensor<2>,
    shape: &[usize],
    rank: usize,
    width: usize,
) -> Result<()> {
    let rows = shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
    let [found, columns] = x.dims();
    if shape.len() != rank || rows != Some(found) || columns != width || found == 0 {
        return Err(Error::Shape {
            name: format!("{what}: rows of geometry {shape:?}"),
            found: vec![found, columns],
            expected: vec![rows.unwrap_or(0), width],
        });
    }
    Ok(())
}
