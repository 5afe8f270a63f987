//! A character model small enough to train in seconds: six characters in, the next one out, three
//! residual blocks of two matrices. Its block matrices are what is pruned.
//!
//! `h = concat(E[c₁], ..., E[c₆])`, three times `h += B relu(A h + a) + b`, logits `H h + c`.
//! Forward and backward pass are written out: nothing here needs more than matrix products.

use crate::Result;
use tensor::Rng;
use tensor::kernels::{AdamwStep, Matrix, Output, adamw, matmul};

/// Characters that the model sees.
pub const CONTEXT: usize = 6;
const EMBED: usize = 16;
/// Width of the residual stream.
pub const WIDTH: usize = CONTEXT * EMBED;
const HIDDEN: usize = 2 * WIDTH;
const BLOCKS: usize = 3;

/// Characters as indices; bytes that the training text rarely has share one.
#[derive(Debug, Clone)]
pub struct Alphabet {
    index: [u8; 256],
    size: usize,
}

impl Alphabet {
    /// The 95 most frequent bytes of `text`, and one for all others.
    pub fn new(text: &[u8]) -> Self {
        let mut counts = [0usize; 256];
        text.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
        let mut order: Vec<usize> = (0..256).collect();
        order.sort_by_key(|&byte| (std::cmp::Reverse(counts[byte]), byte));
        let mut index = [0u8; 256];
        let known = order.iter().take(95).filter(|&&byte| counts[byte] > 0);
        let mut size = 1;
        for (place, &byte) in known.enumerate() {
            index[byte] = place as u8 + 1;
            size = place + 2;
        }
        Self { index, size }
    }

    /// `text` as indices.
    pub fn encode(&self, text: &[u8]) -> Vec<u8> {
        text.iter().map(|&byte| self.index[usize::from(byte)]).collect()
    }
}

/// Positions of a text: contexts `[n, 6]` and the characters that follow.
#[derive(Debug, Clone, Default)]
pub struct Positions {
    contexts: Vec<u8>,
    targets: Vec<u8>,
}

impl Positions {
    /// `count` random positions of `text`.
    pub fn draw(text: &[u8], count: usize, rng: &mut Rng) -> Self {
        let mut positions = Self::default();
        for _ in 0..count {
            let at = rng.below(text.len().saturating_sub(CONTEXT));
            if let Some((target, context)) =
                text.get(at..=at + CONTEXT).and_then(|window| window.split_last())
            {
                positions.contexts.extend_from_slice(context);
                positions.targets.push(*target);
            }
        }
        positions
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// Runs of `size` positions, in order.
    pub fn batches(&self, size: usize) -> Vec<Positions> {
        self.contexts
            .chunks(size * CONTEXT)
            .zip(self.targets.chunks(size))
            .map(|(contexts, targets)| Self {
                contexts: contexts.to_vec(),
                targets: targets.to_vec(),
            })
            .collect()
    }
}

/// A dense layer: weights `[out, in]` and bias.
#[derive(Debug, Clone)]
pub struct Dense {
    /// Weights, row-major.
    pub weight: Vec<f32>,
    bias: Vec<f32>,
    out: usize,
    width: usize,
}

impl Dense {
    fn new(out: usize, width: usize, scale: f32, rng: &mut Rng) -> Self {
        let mut weight = vec![0f32; out * width];
        rng.fill_normal(&mut weight, scale / (width as f32).sqrt());
        Self { weight, bias: vec![0.0; out], out, width }
    }

    fn zeros(&self) -> Self {
        let (weight, bias) = (vec![0.0; self.weight.len()], vec![0.0; self.bias.len()]);
        Self { weight, bias, out: self.out, width: self.width }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.width]
    }

    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let n = x.len() / self.width;
        let mut y: Vec<f32> = self.bias.iter().copied().cycle().take(n * self.out).collect();
        matmul(
            [n, self.out, self.width],
            Matrix::rows(x, self.width),
            Matrix::columns(&self.weight, self.width),
            1.0,
            Output { data: &mut y, row: self.out, accumulate: true },
        );
        y
    }

    /// Gradients of the layer into `grads`; returns that of the input.
    fn backward(&self, x: &[f32], dy: &[f32], grads: &mut Dense) -> Vec<f32> {
        let n = x.len() / self.width;
        matmul(
            [self.out, self.width, n],
            Matrix::columns(dy, self.out),
            Matrix::rows(x, self.width),
            1.0,
            Output { data: &mut grads.weight, row: self.width, accumulate: true },
        );
        for row in dy.chunks_exact(self.out) {
            grads.bias.iter_mut().zip(row).for_each(|(b, d)| *b += d);
        }
        let mut dx = vec![0f32; x.len()];
        matmul(
            [n, self.width, self.out],
            Matrix::rows(dy, self.out),
            Matrix::rows(&self.weight, self.width),
            1.0,
            Output { data: &mut dx, row: self.width, accumulate: false },
        );
        dx
    }
}

/// The model, or a gradient of it.
#[derive(Debug, Clone)]
pub struct Character {
    embed: Vec<f32>,
    /// The block matrices `A₁, B₁, A₂, B₂, A₃, B₃`.
    pub layers: Vec<Dense>,
    head: Dense,
    size: usize,
}

/// What a forward pass keeps.
struct Trace {
    /// Input of every block matrix.
    inputs: Vec<Vec<f32>>,
    last: Vec<f32>,
    logits: Vec<f32>,
}

impl Character {
    /// A fresh model over `alphabet`.
    pub fn new(alphabet: &Alphabet, rng: &mut Rng) -> Self {
        let size = alphabet.size;
        let mut embed = vec![0f32; size * EMBED];
        rng.fill_normal(&mut embed, 1.0);
        let mut layers = Vec::new();
        for _ in 0..BLOCKS {
            layers.push(Dense::new(HIDDEN, WIDTH, std::f32::consts::SQRT_2, rng));
            layers.push(Dense::new(WIDTH, HIDDEN, 0.5, rng));
        }
        let head = Dense::new(size, WIDTH, 0.5, rng);
        Self { embed, layers, head, size }
    }

    fn zeros(&self) -> Self {
        Self {
            embed: vec![0.0; self.embed.len()],
            layers: self.layers.iter().map(Dense::zeros).collect(),
            head: self.head.zeros(),
            size: self.size,
        }
    }

    fn trace(&self, positions: &Positions) -> Trace {
        let mut h: Vec<f32> = positions
            .contexts
            .iter()
            .flat_map(|&c| self.embed.iter().skip(usize::from(c) * EMBED).take(EMBED).copied())
            .collect();
        let mut inputs = Vec::new();
        for block in self.layers.chunks_exact(2) {
            let mut inner = block[0].forward(&h);
            inner.iter_mut().for_each(|v| *v = v.max(0.0));
            let out = block[1].forward(&inner);
            inputs.push(h.clone());
            inputs.push(inner);
            h.iter_mut().zip(&out).for_each(|(h, o)| *h += o);
        }
        let logits = self.head.forward(&h);
        Trace { inputs, last: h, logits }
    }

    /// The input `[n, in]` of block matrix `layer`.
    pub fn input(&self, layer: usize, positions: &Positions) -> Vec<f32> {
        self.trace(positions).inputs.into_iter().nth(layer).unwrap_or_default()
    }

    /// Mean loss in nats per character.
    pub fn loss(&self, positions: &Positions) -> f64 {
        let mut sum = 0.0;
        for batch in positions.batches(512) {
            let mut logits = self.trace(&batch).logits;
            sum += self.softmax(&mut logits, &batch.targets);
        }
        sum / positions.len().max(1) as f64
    }

    /// Turns logits into `p - 1[target]`; returns the summed loss.
    fn softmax(&self, logits: &mut [f32], targets: &[u8]) -> f64 {
        let mut loss = 0.0;
        for (row, &target) in logits.chunks_exact_mut(self.size).zip(targets) {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = row.iter().map(|l| (l - largest).exp()).sum();
            let log_sum = largest + sum.ln();
            loss += f64::from(log_sum - row[usize::from(target)]);
            row.iter_mut().for_each(|l| *l = (*l - log_sum).exp());
            row[usize::from(target)] -= 1.0;
        }
        loss
    }

    /// Mean loss of a batch and its gradient.
    pub fn gradient(&self, positions: &Positions) -> (f64, Character) {
        let Trace { inputs, last, mut logits } = self.trace(positions);
        let n = positions.len().max(1) as f32;
        let loss = self.softmax(&mut logits, &positions.targets) / f64::from(n);
        logits.iter_mut().for_each(|d| *d /= n);
        let mut grads = self.zeros();
        let mut dh = self.head.backward(&last, &logits, &mut grads.head);
        for block in (0..BLOCKS).rev() {
            let (a, b) = (2 * block, 2 * block + 1);
            let mut inner = self.layers[b].backward(&inputs[b], &dh, &mut grads.layers[b]);
            for (d, v) in inner.iter_mut().zip(&inputs[b]) {
                if *v <= 0.0 {
                    *d = 0.0;
                }
            }
            let dx = self.layers[a].backward(&inputs[a], &inner, &mut grads.layers[a]);
            dh.iter_mut().zip(&dx).for_each(|(d, x)| *d += x);
        }
        for (&c, d) in positions.contexts.iter().zip(dh.chunks_exact(EMBED)) {
            let place = grads.embed.iter_mut().skip(usize::from(c) * EMBED);
            place.zip(d).for_each(|(e, d)| *e += d);
        }
        (loss, grads)
    }

    /// All parameters, in one order for models and gradients.
    fn tensors(&mut self) -> Vec<&mut Vec<f32>> {
        let mut all = vec![&mut self.embed];
        for layer in self.layers.iter_mut().chain([&mut self.head]) {
            all.push(&mut layer.weight);
            all.push(&mut layer.bias);
        }
        all
    }

    /// A gradient step of length `rate`, the gradient's norm limited to `limit`.
    pub fn descend(&mut self, mut grads: Character, rate: f32, limit: f64) {
        let square =
            |v: &mut Vec<f32>| v.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
        let norm = grads.tensors().into_iter().map(square).sum::<f64>().sqrt();
        let rate = if norm > limit { rate * (limit / norm) as f32 } else { rate };
        for (w, g) in self.tensors().into_iter().zip(grads.tensors()) {
            w.iter_mut().zip(g.iter()).for_each(|(w, g)| *w -= rate * g);
        }
    }

    /// Trains a fresh model on texts in equal parts, by Adam with a rate that falls to zero.
    pub fn train(texts: &[&[u8]], alphabet: &Alphabet, steps: usize, seed: u64) -> Result<Self> {
        let mut rng = Rng::stream(seed, "character model");
        let mut model = Self::new(alphabet, &mut rng);
        let mut first = model.zeros();
        let mut second = model.zeros();
        const BATCH: usize = 256;
        for step in 0..steps {
            let mut batch = Positions::default();
            for text in texts {
                let part = Positions::draw(text, BATCH / texts.len().max(1), &mut rng);
                batch.contexts.extend(part.contexts);
                batch.targets.extend(part.targets);
            }
            let (_, mut grads) = model.gradient(&batch);
            let left = 1.0 - step as f32 / steps as f32;
            let adam = AdamwStep {
                beta1: 0.9,
                beta2: 0.98,
                eps: 1e-8,
                lr: 3e-3 * left,
                weight_decay: 0.0,
                step: step as u64 + 1,
            };
            let moments = first.tensors().into_iter().zip(second.tensors());
            for ((w, g), (m, v)) in model.tensors().into_iter().zip(grads.tensors()).zip(moments) {
                adamw(w, g, m, v, &adam);
            }
        }
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_differences_of_the_loss() {
        let text: Vec<u8> = b"the cat sat on the mat and the dog sat on the log".repeat(3);
        let alphabet = Alphabet::new(&text);
        let mut rng = Rng::new(1);
        let mut model = Character::new(&alphabet, &mut rng);
        let positions = Positions::draw(&alphabet.encode(&text), 20, &mut rng);
        let (loss, mut grads) = model.gradient(&positions);
        assert!((loss - model.loss(&positions)).abs() < 1e-5);
        let count = model.tensors().len();
        for tensor in 0..count {
            let at = model.tensors()[tensor].len() / 3;
            let mut shifted = |by: f32| {
                model.tensors()[tensor][at] += by;
                let loss = model.loss(&positions);
                model.tensors()[tensor][at] -= by;
                loss
            };
            let slope = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
            let found = f64::from(grads.tensors()[tensor][at]);
            assert!((slope - found).abs() < 2e-3, "tensor {tensor}: {slope} {found}");
        }
    }

    #[test]
    fn training_learns_the_text() {
        let text: Vec<u8> = b"abcabcabdabcabcabd".repeat(30);
        let alphabet = Alphabet::new(&text);
        let text = alphabet.encode(&text);
        let model = Character::train(&[&text], &alphabet, 60, 0).unwrap();
        let mut rng = Rng::new(2);
        let fresh = Character::new(&alphabet, &mut rng);
        let positions = Positions::draw(&text, 200, &mut rng);
        let (before, after) = (fresh.loss(&positions), model.loss(&positions));
        assert!(after < 0.3 && before > 1.0, "{before} {after}");
    }
}
