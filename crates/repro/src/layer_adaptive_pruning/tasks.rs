//! Small classification tasks of 8 x 8 pixels: one that Strata generates itself, and MNIST shrunk.
//!
//! The paper's scaled-down experiment was designed on scikit-learn's digits (8 x 8, 1,797 images),
//! which are not at hand; MNIST averaged down to 8 x 8 stands for them, with as many images and the
//! digits filling the field as they do there.

use crate::{Error, Result};
use data::Images;
use std::path::Path;
use tensor::Rng;

/// Images to train on, as in the original experiment.
const TRAIN: usize = 1200;
/// Images to test on.
const TEST: usize = 597;
const SIDE: usize = 8;
const CLASSES: usize = 10;
/// Shapes per class of the generated task: with one, the network learns it as well as digits.
const VARIANTS: usize = 1;

/// A task.
pub struct Task {
    /// Name for tables.
    pub name: &'static str,
    /// What networks are trained on.
    pub train: Images,
    /// What they are judged by.
    pub test: Images,
}

/// Ten classes of one smooth shape each, drawn shifted by up to a pixel, dimmed and noisy. The
/// shapes are always the same; `seed` draws the images.
pub fn generated(seed: u64) -> Task {
    let mut rng = Rng::new(0);
    let shapes: Vec<[f32; SIDE * SIDE]> =
        (0..CLASSES * VARIANTS).map(|_| shape(&mut rng)).collect();
    let mut rng = Rng::stream(seed, "generated images");
    let mut draw = |count: usize| {
        let mut images = Images { shape: [1, SIDE, SIDE], pixels: Vec::new(), labels: Vec::new() };
        for _ in 0..count {
            let which = rng.below(shapes.len());
            let (dx, dy) = (rng.below(3) as isize - 1, rng.below(3) as isize - 1);
            let light = rng.uniform_in(0.6, 1.0) as f32;
            for y in 0..SIDE as isize {
                for x in 0..SIDE as isize {
                    let (sx, sy) = (x - dx, y - dy);
                    let inside =
                        (0..SIDE as isize).contains(&sx) && (0..SIDE as isize).contains(&sy);
                    let at = if inside { (sy * SIDE as isize + sx) as usize } else { usize::MAX };
                    let value = shapes[which].get(at).copied().unwrap_or(0.0);
                    let noisy = light * value + 0.12 * rng.normal() as f32;
                    images.pixels.push((noisy.clamp(0.0, 1.0) * 255.0) as u8);
                }
            }
            images.labels.push((which % CLASSES) as u32);
        }
        images
    };
    Task { name: "generated", train: draw(TRAIN), test: draw(TEST) }
}

/// Three soft strokes on an empty field.
fn shape(rng: &mut Rng) -> [f32; SIDE * SIDE] {
    let mut values = [0f32; SIDE * SIDE];
    for _ in 0..3 {
        let (cx, cy) = (rng.uniform_in(1.0, 6.0), rng.uniform_in(1.0, 6.0));
        let (angle, length) = (rng.uniform_in(0.0, std::f64::consts::PI), rng.uniform_in(1.5, 3.5));
        let (sin, cos) = angle.sin_cos();
        for (i, value) in values.iter_mut().enumerate() {
            let (x, y) = ((i % SIDE) as f64 - cx, (i / SIDE) as f64 - cy);
            let (along, across) = (x * cos + y * sin, y * cos - x * sin);
            let beyond = (along.abs() - length / 2.0).max(0.0);
            let distance = beyond * beyond + across * across;
            *value = value.max((-distance).exp() as f32);
        }
    }
    values
}

/// The middle 24 x 24 pixels of MNIST, where the digits are, averaged down to 8 x 8; `seed` draws the
/// images.
pub fn mnist(directory: &Path, seed: u64) -> Result<Task> {
    let load = |name: &str, count: usize| -> Result<Images> {
        let all = Images::load(&directory.join(name), None)?;
        if all.shape != [1, 28, 28] {
            let what = format!("{name} holds images of {:?}, not of 1 x 28 x 28", all.shape);
            return Err(Error::Setup(what));
        }
        let mut chosen = Rng::stream(seed, name).permutation(all.len());
        chosen.truncate(count);
        Ok(shrunk(&all, &chosen))
    };
    Ok(Task {
        name: "mnist 8x8",
        train: load("train-images-idx3-ubyte.gz", TRAIN)?,
        test: load("t10k-images-idx3-ubyte.gz", TEST)?,
    })
}

fn shrunk(all: &Images, chosen: &[usize]) -> Images {
    let [_, height, width] = all.shape;
    let mut images = Images { shape: [1, SIDE, SIDE], pixels: Vec::new(), labels: Vec::new() };
    for &index in chosen {
        let start = index * height * width;
        let image = &all.pixels[start..start + height * width];
        let (top, left) = ((height - 3 * SIDE) / 2, (width - 3 * SIDE) / 2);
        for by in 0..SIDE {
            for bx in 0..SIDE {
                let block = (0..9).map(|i| (top + 3 * by + i / 3, left + 3 * bx + i % 3));
                let sum: u32 = block.map(|(y, x)| u32::from(image[y * width + x])).sum();
                images.pixels.push((sum / 9) as u8);
            }
        }
        images.labels.push(all.labels[index]);
    }
    images
}
