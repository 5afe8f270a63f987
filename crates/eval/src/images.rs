//! Classification of labelled images: top-1 accuracy and mean cross-entropy.

use std::time::Instant;

use data::images::Images;
use nn::{ImageSpec, Input, Network, Weights};
use report::{Cell, Column, Progress, Table};
use serde::Serialize;
use tensor::host;

use crate::error::{Result, option};
use crate::scan::{argmax, log_probability};

/// Images computed at once.
const BATCH: usize = 128;

/// How well a network names images.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageScores {
    /// `correct / images`.
    pub accuracy: f64,
    /// Images whose largest logit is the label's.
    pub correct: usize,
    /// Images.
    pub images: usize,
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// Wall time.
    pub seconds: f64,
    /// Per class: images and how many of them are right.
    pub classes: Vec<ClassScore>,
}

/// The images of one class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScore {
    /// The class's name, or its number.
    pub label: String,
    /// Images of the class.
    pub images: usize,
    /// Named right.
    pub correct: usize,
}

impl ImageScores {
    /// The result as a table of one row.
    pub fn table(&self) -> Table {
        let columns = ["top-1 accuracy", "correct", "images", "loss (nats)", "time"];
        Table::new("Classification", columns.map(Column::right).to_vec()).row(vec![
            Cell::Percent(self.accuracy),
            Cell::Int(self.correct as i64),
            Cell::Int(self.images as i64),
            Cell::Float(self.loss, 4),
            Cell::Seconds(self.seconds),
        ])
    }

    /// One row per class.
    pub fn class_table(&self) -> Table {
        let mut columns = vec![Column::left("class")];
        columns.extend(["accuracy", "correct", "images"].map(Column::right));
        let mut table = Table::new("Classes", columns);
        for class in self.classes.iter().filter(|c| c.images > 0) {
            table.push(vec![
                Cell::text(&class.label),
                Cell::Percent(class.correct as f64 / class.images as f64),
                Cell::Int(class.correct as i64),
                Cell::Int(class.images as i64),
            ]);
        }
        table
    }
}

/// The images that a network takes, or why these are none.
///
/// # Errors
/// A network of tokens, images of another size, labels that the network does not have.
pub fn check_images<'n>(network: &'n dyn Network, images: &Images) -> Result<&'n ImageSpec> {
    let Some(spec) = network.images() else {
        let reason = format!("a {} network takes token ids, not images", network.family());
        return Err(option("images", reason));
    };
    let wanted = [spec.channels, spec.height, spec.width];
    if images.is_empty() || images.shape != wanted {
        let [c, h, w] = wanted;
        let [fc, fh, fw] = images.shape;
        return Err(option(
            "images",
            format!(
                "the file has {} images of {fc} x {fh} x {fw}; the network takes {c} x {h} x {w}",
                images.len()
            ),
        ));
    }
    let classes = network.classes();
    match images.labels.iter().position(|&label| label as usize >= classes) {
        Some(at) => Err(option(
            "images",
            format!(
                "image {at} has label {}, but the network knows {classes} classes",
                images.labels.get(at).copied().unwrap_or_default()
            ),
        )),
        None => Ok(spec),
    }
}

/// Classifies all images.
///
/// # Errors
/// As [`check_images`]; from the network.
pub fn classify(network: &dyn Network, w: &dyn Weights, images: &Images) -> Result<ImageScores> {
    classify_with(network, w, images, &Progress::hidden())
}

/// As [`classify`], with progress in images.
///
/// # Errors
/// As [`classify`].
pub fn classify_with(
    network: &dyn Network,
    w: &dyn Weights,
    images: &Images,
    progress: &Progress,
) -> Result<ImageScores> {
    let started = Instant::now();
    let spec = check_images(network, images)?;
    let classes = network.classes();
    let name = |class: usize| spec.labels.get(class).cloned().unwrap_or_else(|| class.to_string());
    let mut scores: Vec<ClassScore> = (0..classes)
        .map(|class| ClassScore { label: name(class), images: 0, correct: 0 })
        .collect();
    let (mut correct, mut loss) = (0, 0.0);
    let indices: Vec<usize> = (0..images.len()).collect();
    for batch in indices.chunks(BATCH) {
        let pixels = images.normalised(batch, &spec.mean, &spec.deviation)?;
        let shape = [batch.len(), spec.channels, spec.height, spec.width];
        let logits = network.predict(w, &Input::Images { pixels: &pixels, shape })?;
        host::read(&logits, |logits| {
            let best = argmax(logits, classes);
            for ((&index, best), row) in batch.iter().zip(best).zip(logits.chunks_exact(classes)) {
                let label = images.labels.get(index).copied().unwrap_or_default();
                loss -= log_probability(row, label);
                if let Some(class) = scores.get_mut(label as usize) {
                    class.images += 1;
                    class.correct += usize::from(best == label);
                }
                correct += usize::from(best == label);
            }
        });
        progress.inc(batch.len() as u64);
    }
    Ok(ImageScores {
        accuracy: correct as f64 / images.len() as f64,
        correct,
        images: images.len(),
        loss: loss / images.len() as f64,
        seconds: started.elapsed().as_secs_f64(),
        classes: scores,
    })
}
