//! The point of a pyramid nearest in angle to a vector.
//!
//! Vectors are searched sixteen at a time, one per lane, so that every step is a loop over lanes. All
//! arithmetic is single precision without fused operations and in a fixed order; ties go to the lower
//! coordinate. So the points are the same on every machine.

use super::index::Pulse;
use crate::kernels::simd::simd;

/// Vectors searched together.
pub const LANES: usize = 16;

/// How the nearest point is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Search {
    /// `Greedy` for fewer than two pulses per coordinate, else `Project`.
    #[default]
    Auto,
    /// Scale to the pyramid, round, and mend the sum (Fischer 1986).
    Project,
    /// Scale, round down, and place the missing pulses one by one where the cosine gains most.
    Greedy,
    /// Both, and the better of the two.
    Both,
}

impl Search {
    /// What `Auto` stands for.
    fn resolve(self, dimension: usize, pulses: usize) -> Self {
        match self {
            Self::Auto if pulses < 2 * dimension => Self::Greedy,
            Self::Auto => Self::Project,
            other => other,
        }
    }
}

/// Nearest points of [`LANES`] vectors `v` `[D][LANES]`; writes whole numbers to `y` `[D][LANES]`. A
/// vector of zeros gives `(K, 0, ...)`. `scratch` is for reuse and may hold anything.
pub fn search_lanes(
    search: Search,
    v: &[[f32; LANES]],
    pulses: usize,
    y: &mut [[f32; LANES]],
    scratch: &mut Vec<[f32; LANES]>,
) {
    let d = v.len().min(y.len());
    if d == 0 {
        return;
    }
    let (v, y) = (&v[..d], &mut y[..d]);
    scratch.resize(2 * d, [0.0; LANES]);
    let (a, other) = scratch.split_at_mut(d);
    magnitudes(v, a);
    let k = pulses as f32;
    match search.resolve(d, pulses) {
        Search::Greedy => greedy(a, k, y),
        Search::Both => {
            greedy(a, k, y);
            project(a, k, other);
            keep_better(a, y, other);
        }
        _ => project(a, k, y),
    }
    signs(v, y);
}

/// The nearest point of one vector.
pub fn search_one<P: Pulse>(search: Search, v: &[f32], pulses: usize, y: &mut [P]) {
    let mut lanes = vec![[0f32; LANES]; v.len()];
    for (lane, &v) in lanes.iter_mut().zip(v) {
        lane[0] = v;
    }
    let mut found = lanes.clone();
    search_lanes(search, &lanes, pulses, &mut found, &mut Vec::new());
    for (y, found) in y.iter_mut().zip(&found) {
        *y = P::of(found[0] as i32);
    }
}

simd! {
    /// Magnitudes relative to the largest; a vector of zeros becomes `(1, 0, ...)`.
    fn magnitudes(v: &[[f32; LANES]], a: &mut [[f32; LANES]]) {
        let mut largest = [0f32; LANES];
        for v in v {
            for (m, &v) in largest.iter_mut().zip(v) {
                let v = v.abs();
                *m = if v > *m { v } else { *m };
            }
        }
        for (a, v) in a.iter_mut().zip(v) {
            for ((a, &v), &m) in a.iter_mut().zip(v).zip(&largest) {
                *a = if m > 0.0 { v.abs() / m } else { 0.0 };
            }
        }
        if let Some(first) = a.first_mut() {
            for (a, &m) in first.iter_mut().zip(&largest) {
                *a = if m > 0.0 { *a } else { 1.0 };
            }
        }
    }
}

simd! {
    /// Gives the magnitudes their signs back.
    fn signs(v: &[[f32; LANES]], y: &mut [[f32; LANES]]) {
        for (y, v) in y.iter_mut().zip(v) {
            for (y, &v) in y.iter_mut().zip(v) {
                *y = if v < 0.0 { -*y } else { *y };
            }
        }
    }
}

/// `K / Σ a` per lane.
#[inline(always)]
fn scales(a: &[[f32; LANES]], pulses: f32) -> [f32; LANES] {
    let mut sum = [0f32; LANES];
    for a in a {
        for (s, &a) in sum.iter_mut().zip(a) {
            *s += a;
        }
    }
    sum.map(|s| pulses / s)
}

/// Adds or takes single pulses where that changes the rounding least, until `K` are placed.
#[inline(always)]
fn mend(a: &[[f32; LANES]], scale: &[f32; LANES], pulses: f32, y: &mut [[f32; LANES]]) {
    let mut missing = [pulses; LANES];
    for y in y.iter() {
        for (m, &y) in missing.iter_mut().zip(y) {
            *m -= y;
        }
    }
    while missing.iter().any(|&m| m != 0.0) {
        let mut sign = [0f32; LANES];
        for (s, &m) in sign.iter_mut().zip(&missing) {
            *s = if m > 0.0 {
                1.0
            } else if m < 0.0 {
                -1.0
            } else {
                0.0
            };
        }
        let mut best = [f32::NEG_INFINITY; LANES];
        let mut place = [0u32; LANES];
        for (j, (a, y)) in (0u32..).zip(a.iter().zip(y.iter())) {
            for i in 0..LANES {
                let gap = (a[i] * scale[i] - y[i]) * sign[i];
                let allowed = sign[i] >= 0.0 || y[i] > 0.0;
                let better = allowed && gap > best[i];
                best[i] = if better { gap } else { best[i] };
                place[i] = if better { j } else { place[i] };
            }
        }
        for (j, y) in (0u32..).zip(y.iter_mut()) {
            for i in 0..LANES {
                y[i] += if place[i] == j { sign[i] } else { 0.0 };
            }
        }
        for (m, s) in missing.iter_mut().zip(sign) {
            *m -= s;
        }
    }
}

simd! {
    /// `y = round(a K / Σ a)`, mended.
    fn project(a: &[[f32; LANES]], pulses: f32, y: &mut [[f32; LANES]]) {
        let scale = scales(a, pulses);
        for (y, a) in y.iter_mut().zip(a) {
            for i in 0..LANES {
                y[i] = (a[i] * scale[i]).round_ties_even();
            }
        }
        mend(a, &scale, pulses, y);
    }
}

simd! {
    /// `y = floor(a K / Σ a)`; then every missing pulse goes to the coordinate with the largest
    /// `(c + a_j)² / (e + 2 y_j + 1)`, where `c = <a, y>` and `e = ‖y‖²`. Quotients are compared by
    /// their cross products.
    fn greedy(a: &[[f32; LANES]], pulses: f32, y: &mut [[f32; LANES]]) {
        let scale = scales(a, pulses);
        let mut missing = [pulses; LANES];
        let (mut dot, mut square) = ([0f32; LANES], [0f32; LANES]);
        for (y, a) in y.iter_mut().zip(a) {
            for i in 0..LANES {
                // A whole number that rounding left just short counts as reached.
                y[i] = (a[i] * scale[i] * (1.0 + 1e-6) + 1e-6).floor();
                missing[i] -= y[i];
                dot[i] += a[i] * y[i];
                square[i] += y[i] * y[i];
            }
        }
        if missing.iter().any(|&m| m < 0.0) {
            // Only after unusual rounding in very long vectors.
            return mend(a, &scale, pulses, y);
        }
        while missing.iter().any(|&m| m > 0.0) {
            let (mut best_num, mut best_den) = ([-1f32; LANES], [1f32; LANES]);
            let (mut best_a, mut place) = ([0f32; LANES], [0u32; LANES]);
            for (j, (a, y)) in (0u32..).zip(a.iter().zip(y.iter())) {
                for i in 0..LANES {
                    let sum = dot[i] + a[i];
                    let num = sum * sum;
                    let den = square[i] + 2.0 * y[i] + 1.0;
                    let better = num * best_den[i] > best_num[i] * den;
                    best_num[i] = if better { num } else { best_num[i] };
                    best_den[i] = if better { den } else { best_den[i] };
                    best_a[i] = if better { a[i] } else { best_a[i] };
                    place[i] = if better { j } else { place[i] };
                }
            }
            let mut step = [0f32; LANES];
            for i in 0..LANES {
                step[i] = if missing[i] > 0.0 { 1.0 } else { 0.0 };
                missing[i] -= step[i];
                dot[i] += step[i] * best_a[i];
                square[i] = if step[i] > 0.0 { best_den[i] } else { square[i] };
            }
            for (j, y) in (0u32..).zip(y.iter_mut()) {
                for i in 0..LANES {
                    y[i] += if place[i] == j { step[i] } else { 0.0 };
                }
            }
        }
    }
}

simd! {
    /// Replaces the lanes of `y` whose cosine with `a` the other point exceeds.
    fn keep_better(a: &[[f32; LANES]], y: &mut [[f32; LANES]], other: &[[f32; LANES]]) {
        let mut sums = [[0f32; LANES]; 4];
        for ((a, y), o) in a.iter().zip(y.iter()).zip(other) {
            for i in 0..LANES {
                sums[0][i] += a[i] * y[i];
                sums[1][i] += y[i] * y[i];
                sums[2][i] += a[i] * o[i];
                sums[3][i] += o[i] * o[i];
            }
        }
        for (y, o) in y.iter_mut().zip(other) {
            for i in 0..LANES {
                let better =
                    sums[2][i] * sums[2][i] * sums[1][i] > sums[0][i] * sums[0][i] * sums[3][i];
                y[i] = if better { o[i] } else { y[i] };
            }
        }
    }
}

/// Moves single pulses while the cosine of `y` with `v` grows; always the best move, ties to the
/// lower coordinates.
pub fn refine<P: Pulse>(v: &[f32], y: &mut [P]) {
    let a: Vec<f64> = v.iter().map(|&v| f64::from(v).abs()).collect();
    let mut m: Vec<f64> = y.iter().map(|y| f64::from(y.get().abs())).collect();
    let mut dot: f64 = a.iter().zip(&m).map(|(a, m)| a * m).sum();
    let mut square: f64 = m.iter().map(|m| m * m).sum();
    if dot == 0.0 {
        return;
    }
    loop {
        // A move must gain more than rounding could.
        let (mut best_num, mut best_den) = (dot * dot * (1.0 + 1e-12), square);
        let mut best = None;
        for from in 0..a.len() {
            if m[from] < 1.0 {
                continue;
            }
            for to in 0..a.len() {
                let sum = dot - a[from] + a[to];
                let (num, den) = (sum * sum, square - 2.0 * m[from] + 2.0 * m[to] + 2.0);
                if to != from && num * best_den > best_num * den {
                    (best_num, best_den, best) = (num, den, Some((from, to, sum)));
                }
            }
        }
        let Some((from, to, sum)) = best else { break };
        (dot, square) = (sum, best_den);
        m[from] -= 1.0;
        m[to] += 1.0;
    }
    for ((y, m), v) in y.iter_mut().zip(&m).zip(v) {
        let m = *m as i32;
        *y = P::of(if *v < 0.0 { -m } else { m });
    }
}
