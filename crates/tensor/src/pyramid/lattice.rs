//! How many points a pyramid has, and the tables by which they are numbered.
//!
//! `N(D, K) = N(D-1, K) + N(D, K-1) + N(D-1, K-1)` with `N(D, 0) = 1` and `N(0, K > 0) = 0`. With the
//! prefix sums `C(l, m) = Σ_{j <= m} N(l, j)` the recursion reads `N(l+1, k) = N(l, k) + 2 C(l, k-1)`,
//! and the place of every coordinate in the numbering is found in one sorted row `2 C(l, ·)`, whatever
//! the number of pulses left: see `index`.

use crate::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// Largest dimension of a group.
pub const MAX_DIMENSION: usize = 4096;
/// Most pulses of a group: squared norms stay exact in f32.
pub const MAX_PULSES: usize = 4095;

/// Entries that are 0 in front of every row of doubled sums, so that two windows of eight entries may
/// begin before the row.
pub(super) const PAD: usize = 16;
/// Coordinates at the end of a vector that are read from a table at once.
pub(super) const LAST: usize = 4;
/// Largest number of entries of that table.
const LAST_ENTRIES: usize = 1 << 17;

pub(super) fn refuse<T>(reason: String) -> Result<T> {
    Err(Error::Shape { what: "pyramid code".into(), reason })
}

/// `N(0..=dimension, k)` for k = 0, 1, 2, ... until one of them exceeds 128 bits.
struct Columns {
    current: Vec<u128>,
    started: bool,
}

impl Columns {
    fn new(dimension: usize) -> Self {
        Self { current: vec![1; dimension + 1], started: false }
    }

    /// The next column, or `None` beyond 128 bits.
    fn advance(&mut self) -> Option<&[u128]> {
        if !self.started {
            self.started = true;
            return Some(&self.current);
        }
        // next[d] = next[d-1] + current[d] + current[d-1], next[0] = 0.
        let mut diagonal = 0;
        let mut before = 0u128;
        for (d, value) in self.current.iter_mut().enumerate() {
            let old = *value;
            let next = if d == 0 { 0 } else { before.checked_add(old)?.checked_add(diagonal)? };
            (diagonal, before, *value) = (old, next, next);
        }
        Some(&self.current)
    }
}

/// The number of points `N(D, K)`; `None` beyond 128 bits.
pub fn count(dimension: usize, pulses: usize) -> Option<u128> {
    let mut columns = Columns::new(dimension);
    let mut last = None;
    for _ in 0..=pulses {
        last = columns.advance()?.last().copied();
    }
    last
}

/// The largest number of pulses (up to `MAX_PULSES`) for which `fits(N(D, K))`, which must hold for
/// fewer pulses if it holds for more.
fn largest(dimension: usize, fits: impl Fn(u128) -> bool) -> usize {
    let mut columns = Columns::new(dimension);
    let mut best = 0;
    for pulses in 0..=MAX_PULSES {
        match columns.advance().and_then(|column| column.last().copied()) {
            Some(points) if fits(points) => best = pulses,
            _ => break,
        }
    }
    best
}

/// The largest number of pulses whose index has at most 128 bits.
pub fn largest_pulses(dimension: usize) -> usize {
    largest(dimension, |_| true)
}

/// The largest number of pulses with `log2 N(D, K) <= bits * D`; 0 when even one pulse needs more.
pub fn pulses_for_rate(dimension: usize, bits: f64) -> usize {
    // A rate that is meant to be exact may miss a power of two by rounding.
    let limit = bits * dimension as f64 + 1e-9;
    largest(dimension, |points| (points as f64).log2() <= limit)
}

/// The points of one pyramid `P(D, K)` and the tables that number them.
#[derive(Debug)]
pub struct Lattice {
    pub(super) dimension: usize,
    pub(super) pulses: usize,
    pub(super) count: u128,
    /// Rows `l < narrow` of the tables fit u64 as a whole.
    pub(super) narrow: usize,
    /// `[narrow, PAD + K]`: zeros, then `2 C(l, 0..K)`.
    pub(super) sums: Vec<u64>,
    /// `[narrow, K + 1]`: `N(l, 0..=K)`.
    pub(super) counts: Vec<u64>,
    /// `[D - narrow, PAD + K]` and `[D - narrow, K + 1]` for the other rows.
    pub(super) wide_sums: Vec<u128>,
    pub(super) wide_counts: Vec<u128>,
    /// Coordinates that the table of endings holds: `min(LAST, D)`; 0 when pulses exceed i8.
    pub(super) last: usize,
    /// Where the endings with m pulses begin, one entry more than there are m.
    pub(super) last_start: Vec<u32>,
    /// Endings by pulses and rank.
    pub(super) last_points: Vec<[i8; LAST]>,
    /// `1 / sqrt(e)` for e = 0 ..= K², when pulses fit i8.
    pub(super) inverse_norm: Vec<f32>,
}

impl Lattice {
    /// The pyramid of `dimension` coordinates and `pulses` pulses.
    ///
    /// # Errors
    /// [`Error::Shape`] for a dimension or pulses of 0 or out of range, and when an index would need
    /// more than 128 bits; the message names the largest number of pulses that fits.
    pub fn new(dimension: usize, pulses: usize) -> Result<Self> {
        if !(1..=MAX_DIMENSION).contains(&dimension) {
            return refuse(format!(
                "groups of {dimension} are not possible; use 1 to {MAX_DIMENSION}, usually 16"
            ));
        }
        if !(1..=MAX_PULSES).contains(&pulses) {
            return refuse(format!("{pulses} pulses are not possible; use 1 to {MAX_PULSES}"));
        }
        let mut columns = Columns::new(dimension);
        let mut table = vec![0u128; (dimension + 1) * (pulses + 1)];
        for k in 0..=pulses {
            let Some(column) = columns.advance() else {
                return refuse(format!(
                    "an index of {pulses} pulses in groups of {dimension} needs more than 128 \
                     bits; the largest number of pulses that fits is {}",
                    largest_pulses(dimension)
                ));
            };
            for (l, &n) in column.iter().enumerate() {
                table[l * (pulses + 1) + k] = n;
            }
        }
        let at = |l: usize, k: usize| table[l * (pulses + 1) + k];
        let fits = |l: &usize| at(l + 1, pulses) <= u128::from(u64::MAX);
        let narrow = (0..dimension).take_while(fits).count();
        let mut lattice = Self {
            dimension,
            pulses,
            count: at(dimension, pulses),
            narrow,
            sums: Vec::with_capacity(narrow * (PAD + pulses)),
            counts: Vec::with_capacity(narrow * (pulses + 1)),
            wide_sums: Vec::new(),
            wide_counts: Vec::new(),
            last: 0,
            last_start: Vec::new(),
            last_points: Vec::new(),
            inverse_norm: Vec::new(),
        };
        for l in 0..dimension {
            let counts = &table[l * (pulses + 1)..(l + 1) * (pulses + 1)];
            // 2 C(l, k-1) = N(l+1, k) - N(l, k).
            let sums = (1..=pulses).map(|k| at(l + 1, k) - at(l, k));
            if l < narrow {
                lattice.sums.extend([0; PAD]);
                lattice.sums.extend(sums.map(|s| s as u64));
                lattice.counts.extend(counts.iter().map(|&n| n as u64));
            } else {
                lattice.wide_sums.extend([0; PAD]);
                lattice.wide_sums.extend(sums);
                lattice.wide_counts.extend(counts);
            }
        }
        if pulses <= i8::MAX as usize {
            lattice.inverse_norm = (0..=pulses * pulses).map(|e| inverse_norm(e as u32)).collect();
            lattice.tabulate_endings();
        }
        Ok(lattice)
    }

    /// As [`Lattice::new`], made once for every pyramid and kept.
    ///
    /// # Errors
    /// As [`Lattice::new`].
    pub fn shared(dimension: usize, pulses: usize) -> Result<Arc<Self>> {
        static KNOWN: Mutex<Vec<Arc<Lattice>>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |l: &&Arc<Self>| (l.dimension, l.pulses) == (dimension, pulses);
        if let Some(lattice) = known.iter().find(same) {
            return Ok(lattice.clone());
        }
        let lattice = Arc::new(Self::new(dimension, pulses)?);
        // A process meets few pyramids; a hostile file may name many.
        if known.len() >= 64 {
            known.clear();
        }
        known.push(lattice.clone());
        Ok(lattice)
    }

    /// Lists the last coordinates of all points with few pulses left.
    fn tabulate_endings(&mut self) {
        let last = LAST.min(self.dimension);
        if last > self.narrow {
            return;
        }
        let mut start = 0usize;
        self.last_start.push(0);
        for m in 0..=self.pulses {
            let points = count(last, m).unwrap_or(u128::MAX);
            if points > (LAST_ENTRIES - start) as u128 {
                break;
            }
            for rank in 1..=points as u64 {
                let mut ending = [0i8; LAST];
                let (mut rest, mut left) = (rank, m);
                for (i, place) in ending.iter_mut().take(last).enumerate() {
                    *place = self.step(last - 1 - i, &mut rest, &mut left) as i8;
                }
                self.last_points.push(ending);
            }
            start += points as usize;
            self.last_start.push(start as u32);
        }
        self.last = last;
    }

    /// Coordinates of a vector.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Sum of the magnitudes.
    pub fn pulses(&self) -> usize {
        self.pulses
    }

    /// Number of points `N(D, K)`.
    pub fn count(&self) -> u128 {
        self.count
    }

    /// Bits of an index, `ceil(log2 N)`.
    pub fn index_bits(&self) -> u32 {
        128 - (self.count - 1).leading_zeros()
    }

    /// `log2 N(D, K)`: what an index carries at most.
    pub fn entropy_bits(&self) -> f64 {
        (self.count as f64).log2()
    }

    /// `1 / ‖y‖` for `‖y‖² = squared`.
    #[inline]
    pub fn inverse_norm(&self, squared: u32) -> f32 {
        match self.inverse_norm.get(squared as usize) {
            Some(&inverse) => inverse,
            None => inverse_norm(squared),
        }
    }
}

fn inverse_norm(squared: u32) -> f32 {
    if squared == 0 { 0.0 } else { (1.0 / f64::from(squared).sqrt()) as f32 }
}
