//! Measures what the memory of this machine gives, so that benchmarks can say how near to it they are.
//!
//! Buffers are far larger than the last-level cache and every rayon thread works on its own share.
//! The best of several passes counts: a busy machine shows lower numbers, never higher ones.

use rayon::prelude::*;
use std::time::Instant;

/// Bytes of one buffer over all threads.
const BYTES: usize = 256 << 20;
/// Measured passes; one more warms up.
const PASSES: usize = 6;

/// What the memory gave, in GB/s (10⁹ bytes per second).
#[derive(Clone, Copy, Debug)]
pub struct Bandwidth {
    /// Copying from one buffer to another; bytes read plus bytes written count.
    pub copy: f64,
    /// Reading only.
    pub read: f64,
    /// Rayon threads that took part.
    pub threads: usize,
}

/// Measures copying and reading with all rayon threads; takes about a second and 512 MiB.
pub fn measure() -> Bandwidth {
    let threads = rayon::current_num_threads().max(1);
    let words = (BYTES / 8 / threads).max(1);
    let source: Vec<u64> = (0..words * threads).map(|i| i as u64).collect();
    let mut target = vec![1u64; words * threads];
    let mut copy = f64::INFINITY;
    let mut read = f64::INFINITY;
    for pass in 0..=PASSES {
        let start = Instant::now();
        target
            .par_chunks_mut(words)
            .zip(source.par_chunks(words))
            .for_each(|(to, from)| to.copy_from_slice(from));
        let copied = start.elapsed().as_secs_f64();
        std::hint::black_box(&target);
        let start = Instant::now();
        let sum: u64 = source.par_chunks(words).map(sum_words).reduce(|| 0, u64::wrapping_add);
        let summed = start.elapsed().as_secs_f64();
        std::hint::black_box(sum);
        if pass > 0 {
            copy = copy.min(copied);
            read = read.min(summed);
        }
    }
    let gigabytes = (words * threads * 8) as f64 / 1e9;
    Bandwidth { copy: 2.0 * gigabytes / copy, read: gigabytes / read, threads }
}

/// GB/s of copying with all threads, bytes read plus bytes written: see [`measure`].
pub fn copy_bandwidth() -> f64 {
    measure().copy
}

/// Wrapping sum with 32 independent lanes, so that memory and not the adder is the limit.
fn sum_words(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let chunks = words.chunks_exact(32);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(word);
        }
    }
    lanes.iter().chain(rest).fold(0u64, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_takes_every_word() {
        let words: Vec<u64> = (1..=101).collect();
        assert_eq!(sum_words(&words), 5151);
    }

    #[test]
    fn measures_something_sane() {
        let found = measure();
        assert!(found.copy > 0.1 && found.copy < 1e5, "{found:?}");
        assert!(found.read > 0.1 && found.read < 1e5, "{found:?}");
    }
}
