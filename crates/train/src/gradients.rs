//! Named gradients between the backward pass and the optimiser.

use rayon::prelude::*;
use std::collections::BTreeMap;

/// Elements per partial sum of a norm: fixed, so that the sum does not depend on the number of
/// threads.
const CHUNK: usize = 1 << 14;

/// The gradients of one step by parameter name; frozen parameters have none.
#[derive(Clone, Debug, Default)]
pub struct Grads {
    values: BTreeMap<String, Vec<f32>>,
}

impl Grads {
    /// No gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `gradient` to what is there under `name`.
    pub fn accumulate(&mut self, name: &str, gradient: Vec<f32>) {
        match self.values.get_mut(name) {
            None => {
                self.values.insert(name.to_string(), gradient);
            }
            Some(sum) => sum
                .par_chunks_mut(CHUNK)
                .zip(gradient.par_chunks(CHUNK))
                .for_each(|(s, g)| s.iter_mut().zip(g).for_each(|(s, g)| *s += g)),
        }
    }

    /// The gradient of a parameter, in the parameter's row-major order.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.values.get(name).map(Vec::as_slice)
    }

    /// The gradient of a parameter, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        self.values.get_mut(name).map(Vec::as_mut_slice)
    }

    /// Takes a gradient out: its parameter will not be updated.
    pub fn remove(&mut self, name: &str) -> Option<Vec<f32>> {
        self.values.remove(name)
    }

    /// Keeps the gradients whose names satisfy `keep`.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.values.retain(|name, _| keep(name));
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Names and gradients, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.values.iter().map(|(n, g)| (n.as_str(), g.as_slice()))
    }

    /// Names and gradients to be changed, sorted by name.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut [f32])> {
        self.values.iter_mut().map(|(n, g)| (n.as_str(), g.as_mut_slice()))
    }

    /// Number of gradients.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The L2 norm over all gradients together, summed in f64; the same for every number of
    /// threads.
    pub fn global_norm(&self) -> f64 {
        let mut sum = 0.0f64;
        for gradient in self.values.values() {
            let partial: Vec<f64> = gradient.par_chunks(CHUNK).map(square_sum).collect();
            sum += partial.iter().sum::<f64>();
        }
        sum.sqrt()
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f32) {
        for gradient in self.values.values_mut() {
            gradient
                .par_chunks_mut(CHUNK)
                .for_each(|chunk| chunk.iter_mut().for_each(|g| *g *= factor));
        }
    }
}

/// Sum of squares in eight f64 lanes, which the compiler turns into vector code.
fn square_sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let mut chunks = values.chunks_exact(8);
    for chunk in &mut chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*v) * f64::from(*v);
        }
    }
    let rest: f64 = chunks.remainder().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accumulates_and_measures() {
        let mut grads = Grads::new();
        grads.accumulate("a", vec![1.0, 2.0]);
        grads.accumulate("a", vec![2.0, 2.0]);
        grads.accumulate("b", vec![12.0]);
        assert_eq!(grads.get("a"), Some(&[3.0, 4.0][..]));
        assert_eq!(grads.global_norm(), 13.0);
        grads.scale(0.5);
        assert_eq!(grads.get("b"), Some(&[6.0][..]));
    }

    #[test]
    fn norm_of_long_vectors_with_remainders() {
        let n = 3 * CHUNK + 5;
        let mut grads = Grads::new();
        grads.accumulate("a", vec![2.0; n]);
        assert!((grads.global_norm() - (4.0 * n as f64).sqrt()).abs() < 1e-9);
    }
}
