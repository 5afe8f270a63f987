//! The one random number generator: ChaCha with 8 rounds, seeded, splittable by label, restorable.
//!
//! Nothing in the workspace draws from a global generator: a seeded [`Rng`] is passed in. Its whole
//! state is seven words ([`Rng::state`]), so a run that was killed continues with the same draws.
//!
//! Stability: for a given seed, label and sequence of calls the integers and the uniform numbers are
//! the same on every machine and in every later version. Normal numbers go through the logarithm
//! and the cosine of the platform, whose last bit may differ between operating systems; on one
//! machine they are the same too.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use std::ops::Range;

/// Number of 64-bit words in a saved state.
pub const STATE_WORDS: usize = 7;

/// A seeded random number generator over ChaCha8.
///
/// ```
/// use strata_tensor::rng::Rng;
/// let mut a = Rng::stream(7, "shuffle");
/// let mut b = Rng::stream(7, "shuffle");
/// assert_eq!(a.next_u64(), b.next_u64());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng {
    inner: ChaCha8Rng,
}

impl Rng {
    /// The generator of `seed`; seeds that differ in one bit give unrelated sequences.
    pub fn new(seed: u64) -> Self {
        // splitmix64 spreads the seed over the 256 bits of the key.
        let mut x = seed;
        let mut key = [0u8; 32];
        for word in key.chunks_exact_mut(8) {
            x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = x;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
        Self { inner: ChaCha8Rng::from_seed(key) }
    }

    /// The generator of `seed` for one purpose: streams of different labels are independent, so that
    /// drawing more numbers for one purpose does not change those of another. The empty label is
    /// not [`Rng::new`].
    pub fn stream(seed: u64, label: &str) -> Self {
        let mut rng = Self::new(seed);
        // 64-bit FNV-1a of the label picks the ChaCha stream; stream 0 belongs to `new`.
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        for byte in label.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
        rng.inner.set_stream(hash.max(1));
        rng
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.inner.next_u64()
    }

    /// A whole number in `0..n`, every one equally likely (multiply and reject). 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        if n == 0 {
            return 0;
        }
        // Values of the low half below 2^64 mod n would make some results more likely.
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as usize;
            }
        }
    }

    /// A whole number in `range`; its start when the range is empty.
    pub fn range(&mut self, range: Range<usize>) -> usize {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A number in `[low, high)`.
    pub fn uniform_in(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// A standard normal number (Box-Muller, two draws each, nothing kept between calls).
    pub fn normal(&mut self) -> f64 {
        self.normal_pair().0
    }

    /// Two independent standard normal numbers from two draws.
    fn normal_pair(&mut self) -> (f64, f64) {
        // 1 - u lies in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        (radius * cos, radius * sin)
    }

    /// Fills `out` with normal numbers of mean 0 and standard deviation `std` (both halves of every
    /// Box-Muller pair are used, so these are not the numbers that [`Rng::normal`] would give).
    pub fn fill_normal(&mut self, out: &mut [f32], std: f32) {
        let std = f64::from(std);
        for pair in out.chunks_mut(2) {
            let (a, b) = self.normal_pair();
            pair[0] = (a * std) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (b * std) as f32;
            }
        }
    }

    /// Fills `out` with numbers of `[low, high)`.
    pub fn fill_uniform(&mut self, out: &mut [f32], low: f32, high: f32) {
        for value in out {
            // 24 random bits are exact in f32, so that 1 is never reached by rounding.
            let unit = (self.next_u64() >> 40) as f32 * (1.0 / (1u32 << 24) as f32);
            *value = low + (high - low) * unit;
        }
    }

    /// Puts `items` into a random order, every one equally likely (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// The numbers `0..n` in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }

    /// One item, every one equally likely; `None` when there are none.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        if items.is_empty() { None } else { items.get(self.below(items.len())) }
    }

    /// An index with a probability proportional to its weight; `None` when no weight is positive.
    /// Weights that are negative or not finite count as 0.
    pub fn weighted(&mut self, weights: &[f64]) -> Option<usize> {
        let usable = |w: f64| if w.is_finite() && w > 0.0 { w } else { 0.0 };
        let total: f64 = weights.iter().map(|&w| usable(w)).sum();
        let mut left = self.uniform() * total;
        let mut last = None;
        for (i, &weight) in weights.iter().enumerate() {
            let weight = usable(weight);
            if weight > 0.0 {
                last = Some(i);
                if left < weight {
                    return last;
                }
                left -= weight;
            }
        }
        last
    }

    /// The whole state: four words of key, the stream, and the position (low word, high word).
    pub fn state(&self) -> [u64; STATE_WORDS] {
        let mut words = [0u64; STATE_WORDS];
        for (word, bytes) in words.iter_mut().zip(self.inner.get_seed().chunks_exact(8)) {
            let mut eight = [0u8; 8];
            eight.copy_from_slice(bytes);
            *word = u64::from_le_bytes(eight);
        }
        let position = self.inner.get_word_pos();
        words[4] = self.inner.get_stream();
        words[5] = position as u64;
        words[6] = (position >> 64) as u64;
        words
    }

    /// The generator that continues where [`Rng::state`] was taken.
    pub fn from_state(state: &[u64; STATE_WORDS]) -> Self {
        let mut key = [0u8; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip(state) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut inner = ChaCha8Rng::from_seed(key);
        inner.set_stream(state[4]);
        inner.set_word_pos(u128::from(state[5]) | (u128::from(state[6]) << 64));
        Self { inner }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first words of seed 0 and of one stream, so that a change of the sequence is noticed.
    #[test]
    fn sequence_is_pinned() {
        let mut rng = Rng::new(0);
        let first: Vec<u64> = (0..2).map(|_| rng.next_u64()).collect();
        let mut stream = Rng::stream(0, "weights");
        let labelled = stream.next_u64();
        assert_eq!((first[0], first[1], labelled), PINNED);
        assert_ne!(Rng::new(1).next_u64(), first[0]);
        assert_ne!(Rng::stream(0, "weight").next_u64(), labelled);
        assert_ne!(Rng::stream(0, "").next_u64(), first[0]);
    }
    const PINNED: (u64, u64, u64) =
        (13804888775535289832, 4211859015901796865, 12091599978548591526);

    #[test]
    fn state_restores_every_position() {
        let mut rng = Rng::stream(3, "x");
        for _ in 0..70 {
            let mut copy = Rng::from_state(&rng.state());
            assert_eq!(copy, rng);
            let expected: Vec<u64> = (0..40).map(|_| rng.clone().next_u64()).collect();
            let got: Vec<u64> = (0..40).map(|_| copy.clone().next_u64()).collect();
            assert_eq!(expected, got);
            assert_eq!(copy.normal().to_bits(), rng.normal().to_bits());
        }
    }

    #[test]
    fn below_is_in_range_and_even() {
        let mut rng = Rng::new(5);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        // Six standard deviations of a binomial with n = 70000, p = 1/7.
        assert!(counts.iter().all(|&c| (f64::from(c) - 10_000.0).abs() < 556.0), "{counts:?}");
        assert_eq!((rng.below(0), rng.below(1)), (0, 0));
        assert!((0..100).all(|_| (5..8).contains(&rng.range(5..8))));
        assert_eq!(rng.range(4..4), 4);
    }

    #[test]
    fn moments_of_uniform_and_normal() {
        let mut rng = Rng::new(11);
        let n = 200_000;
        let mut normal = vec![0f32; n];
        rng.fill_normal(&mut normal, 2.0);
        let mean = normal.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        let var = normal.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        let fourth = normal.iter().map(|&x| f64::from(x).powi(4)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.03 && (var - 4.0).abs() < 0.08, "{mean} {var}");
        assert!((fourth / (var * var) - 3.0).abs() < 0.1, "kurtosis {}", fourth / (var * var));
        let single = (0..n).map(|_| rng.normal()).map(|x| x * x).sum::<f64>() / n as f64;
        assert!((single - 1.0).abs() < 0.02, "{single}");
        let uniform = (0..n).map(|_| rng.uniform()).sum::<f64>() / n as f64;
        assert!((uniform - 0.5).abs() < 0.004, "{uniform}");
        let mut filled = vec![0f32; 1000];
        rng.fill_uniform(&mut filled, -1.0, 1.0);
        assert!(filled.iter().all(|x| (-1.0..1.0).contains(x)));
        assert!(filled.iter().any(|&x| x < -0.9) && filled.iter().any(|&x| x > 0.9));
    }

    #[test]
    fn shuffle_and_choice() {
        let mut rng = Rng::new(2);
        let mut order = rng.permutation(50);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
        assert_eq!(rng.choose::<u8>(&[]), None);
        assert!((0..20).all(|_| rng.choose(&[3, 4]).is_some_and(|x| [3, 4].contains(x))));
        let mut counts = [0u32; 4];
        for _ in 0..40_000 {
            counts[rng.weighted(&[1.0, 0.0, 3.0, f64::NAN]).unwrap()] += 1;
        }
        assert_eq!((counts[1], counts[3]), (0, 0));
        assert!((f64::from(counts[2]) / 40_000.0 - 0.75).abs() < 0.02, "{counts:?}");
        assert_eq!(rng.weighted(&[0.0, -1.0]), None);
    }
}
