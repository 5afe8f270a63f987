//! Whether rows look like normal noise, and how many bits their directions really carry.

use crate::grid::Matrix;
use rayon::prelude::*;
use std::collections::BTreeMap;
use store::packed::PyramidCode;
use tensor::pyramid::beta;

/// How far a matrix is from rows of independent normal numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normality {
    /// Fourth moment over squared second moment of all weights of rows with norm 1; 3 for normal ones.
    pub kurtosis: f64,
    /// Kolmogorov-Smirnov distance of the energies of groups to `Beta(D/2, (n-D)/2)`.
    pub distance: f64,
}

/// Groups on which the distance is measured, at most.
const SAMPLE: usize = 1 << 14;

/// Groups from which the entropy is estimated, at most.
const ENTROPY_SAMPLE: usize = 1 << 16;

/// Measures the rows of `matrix` in groups of `dimension`; a smaller last group is left out.
pub fn normality(matrix: &Matrix, dimension: usize) -> Normality {
    let width = matrix.in_features;
    let groups = width / dimension.max(1);
    let rows = matrix.values.par_chunks(width);
    let moments: Vec<(f64, f64)> = rows
        .map(|row| {
            let energy: f64 = row.iter().map(|w| f64::from(*w).powi(2)).sum();
            if energy == 0.0 {
                return (0.0, 0.0);
            }
            // Moments of the row scaled to mean square 1.
            let factor = width as f64 / energy;
            (row.iter().map(|w| (f64::from(*w).powi(2) * factor).powi(2)).sum(), width as f64)
        })
        .collect();
    let (fourth, count) = moments.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    let kurtosis = if count > 0.0 { fourth / count } else { 3.0 };
    let stride = (matrix.out_features * groups).div_ceil(SAMPLE).max(1);
    let mut energies: Vec<f64> = matrix
        .values
        .par_chunks(width)
        .enumerate()
        .flat_map_iter(|(row, values)| {
            let total: f64 = values.iter().map(|w| f64::from(*w).powi(2)).sum();
            let wanted = (0..groups).filter(move |g| (row * groups + g).is_multiple_of(stride));
            wanted.filter(move |_| total > 0.0).map(move |g| {
                let group = &values[g * dimension..(g + 1) * dimension];
                group.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / total
            })
        })
        .collect();
    if energies.is_empty() || dimension >= width {
        return Normality { kurtosis, distance: 0.0 };
    }
    energies.sort_by(f64::total_cmp);
    let (a, b) = (dimension as f64 / 2.0, (width - dimension) as f64 / 2.0);
    let n = energies.len() as f64;
    let distance = energies
        .par_iter()
        .enumerate()
        .map(|(i, &energy)| {
            let law = beta::incomplete(energy, a, b);
            (law - i as f64 / n).abs().max((law - (i + 1) as f64 / n).abs())
        })
        .reduce(|| 0.0, f64::max);
    Normality { kurtosis, distance }
}

/// Bits per weight that an ideal coder with fixed tables would spend on the directions: the entropy of
/// every magnitude given its place and the pulses left, estimated from the counts, and a bit for every
/// sign. (An index as a whole occurs once or never, so that its own histogram says nothing.) At most
/// `log2 N / D` up to the noise of the counts; whole groups only.
pub fn index_entropy(points: &[i16], width: usize, code: &PyramidCode) -> f64 {
    let d = code.dimension;
    let whole = code.whole_groups() * d;
    let stride = (points.len() / d.max(1)).div_ceil(ENTROPY_SAMPLE).max(1);
    let empty = || (BTreeMap::<(u16, u16), BTreeMap<u16, u64>>::new(), 0u64, 0usize);
    let (counts, signs, groups) = points
        .par_chunks(width)
        .enumerate()
        .fold(empty, |(mut counts, mut signs, mut groups), (row, values)| {
            for (g, group) in values[..whole].chunks_exact(d).enumerate() {
                if !(row * code.whole_groups() + g).is_multiple_of(stride) {
                    continue;
                }
                groups += 1;
                let mut left = code.pulses as u16;
                for (place, y) in group.iter().enumerate() {
                    let magnitude = y.unsigned_abs();
                    let of_place = counts.entry((place as u16, left)).or_default();
                    *of_place.entry(magnitude).or_default() += 1;
                    signs += u64::from(magnitude > 0);
                    left = left.saturating_sub(magnitude);
                    if left == 0 {
                        break;
                    }
                }
            }
            (counts, signs, groups)
        })
        .reduce(empty, |(mut counts, signs, groups), (other, more, others)| {
            for (state, magnitudes) in other {
                let known = counts.entry(state).or_default();
                for (magnitude, count) in magnitudes {
                    *known.entry(magnitude).or_default() += count;
                }
            }
            (counts, signs + more, groups + others)
        });
    let mut bits = signs as f64;
    for magnitudes in counts.values() {
        let total: u64 = magnitudes.values().sum();
        for &count in magnitudes.values() {
            bits += count as f64 * (total as f64 / count as f64).log2();
        }
    }
    if groups == 0 { 0.0 } else { bits / (groups * d) as f64 }
}
