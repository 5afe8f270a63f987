//! Rows of weights to packed pyramid codes and back.
//!
//! A row `[in]` is cut into whole groups of `D` and perhaps one smaller group at its end. It is stored
//! as a norm `ν`, a stream of indices (whole groups first, fields of equal width) and a stream of
//! codes of lengths; both streams are filled up to multiples of 8 bytes. A group decodes to
//! `ν · level · y / ‖y‖`.

use super::amplitude::{AmplitudeMode, Amplitudes};
use super::bits::{self, row_bytes};
use super::index::Pulse;
use super::lattice::{Lattice, refuse};
use super::search::{LANES, Search, refine, search_lanes};
use crate::kernels::simd::simd;
use crate::skinny::simd::Isa;
use crate::{Error, Result};
use rayon::prelude::*;
use std::sync::Arc;

/// The last group of a row whose length is no multiple of `D`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Coordinates.
    pub dimension: usize,
    /// Pulses.
    pub pulses: usize,
}

/// How rows are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// Weights of a row.
    pub inputs: usize,
    /// Weights of a group, `D`.
    pub dimension: usize,
    /// Pulses of a group, `K`.
    pub pulses: usize,
    /// The smaller group at the end, if any.
    pub tail: Option<Tail>,
    /// Rule of the levels of lengths.
    pub amplitude: AmplitudeMode,
    /// Bits of a length; `fp16` takes 16 whatever stands here.
    pub amp_bits: u8,
    /// Code 0 is the length 0.
    pub amp_zero: bool,
}

/// Tables of one group shape.
#[derive(Clone, Debug)]
pub struct GroupPart {
    /// Directions.
    pub lattice: Arc<Lattice>,
    /// Lengths.
    pub amplitudes: Arc<Amplitudes>,
}

/// The tables of a [`Code`].
#[derive(Clone, Debug)]
pub struct Codec {
    code: Code,
    whole: GroupPart,
    tail: Option<GroupPart>,
}

/// What [`Codec::encode`] made of a matrix.
#[derive(Debug)]
pub struct Encoded {
    /// Index streams, `[out, index_row_bytes]`.
    pub index: Vec<u8>,
    /// Streams of length codes, `[out, amplitude_row_bytes]`.
    pub amplitude: Vec<u8>,
    /// Groups of zeros in rows that are not zero: their length is coded as the smallest level.
    pub zero_groups: usize,
}

impl Codec {
    /// The tables of `code`.
    ///
    /// # Errors
    /// [`Error::Shape`] when groups do not fill the rows (the message names group sizes that do), and
    /// as [`Lattice::new`] and [`Amplitudes::new`].
    pub fn new(code: Code) -> Result<Self> {
        let Code { inputs, dimension, .. } = code;
        if inputs == 0 || dimension == 0 || dimension > inputs {
            return refuse(format!("groups of {dimension} in rows of {inputs} are not possible"));
        }
        if inputs >= 1 << 31 {
            return refuse(format!("rows of {inputs} are too long"));
        }
        let rest = inputs % dimension;
        if rest != code.tail.map_or(0, |tail| tail.dimension) {
            let fitting = [64, 32, 16, 8, 4, 2].into_iter().filter(|d| inputs % d == 0);
            let fitting: Vec<String> = fitting.map(|d| d.to_string()).collect();
            return refuse(format!(
                "rows of {inputs} are no multiple of groups of {dimension}: use groups of {}, or \
                 allow a smaller last group",
                if fitting.is_empty() { "1".into() } else { fitting.join(", ") }
            ));
        }
        let part = |dimension: usize, pulses: usize| -> Result<GroupPart> {
            let (mode, bits, zero) = (code.amplitude, code.amp_bits, code.amp_zero);
            Ok(GroupPart {
                lattice: Lattice::shared(dimension, pulses)?,
                amplitudes: Amplitudes::shared(mode, dimension, inputs, bits, zero)?,
            })
        };
        let whole = part(dimension, code.pulses)?;
        let tail = code.tail.map(|t| part(t.dimension, t.pulses)).transpose()?;
        Ok(Self { code, whole, tail })
    }

    /// How rows are coded.
    pub fn code(&self) -> &Code {
        &self.code
    }

    /// Whole groups of a row.
    pub fn whole_groups(&self) -> usize {
        self.code.inputs / self.code.dimension
    }

    /// Groups of a row, the smaller last one included.
    pub fn groups(&self) -> usize {
        self.whole_groups() + usize::from(self.tail.is_some())
    }

    /// Tables of group `g` of a row.
    pub fn part(&self, group: usize) -> &GroupPart {
        match &self.tail {
            Some(tail) if group >= self.whole_groups() => tail,
            _ => &self.whole,
        }
    }

    /// Bits of all indices of a row.
    pub fn index_bits(&self) -> usize {
        let tail = self.tail.as_ref().map_or(0, |t| t.lattice.index_bits());
        self.whole_groups() * self.whole.lattice.index_bits() as usize + tail as usize
    }

    /// Bits of all lengths of a row.
    pub fn amplitude_bits(&self) -> usize {
        let tail = self.tail.as_ref().map_or(0, |t| t.amplitudes.bits());
        self.whole_groups() * usize::from(self.whole.amplitudes.bits()) + usize::from(tail)
    }

    /// `Σ log2 N` of a row: what its indices carry at most.
    pub fn entropy_bits(&self) -> f64 {
        let tail = self.tail.as_ref().map_or(0.0, |t| t.lattice.entropy_bits());
        self.whole_groups() as f64 * self.whole.lattice.entropy_bits() + tail
    }

    /// Bytes of a row of indices.
    pub fn index_row_bytes(&self) -> usize {
        row_bytes(self.index_bits())
    }

    /// Bytes of a row of lengths.
    pub fn amplitude_row_bytes(&self) -> usize {
        row_bytes(self.amplitude_bits())
    }

    /// The factor of the integers of a group: `ν · level / ‖y‖`.
    #[inline]
    pub fn scale(part: &GroupPart, norm: f32, code: u16, squared: u32) -> f32 {
        norm * part.amplitudes.level(code) * part.lattice.inverse_norm(squared)
    }

    /// Packs a row of points `y` `[in]` and codes of lengths `[groups]`; both streams must be 0.
    pub fn pack_row<P: Pulse>(&self, y: &[P], codes: &[u16], index: &mut [u8], amp: &mut [u8]) {
        let (mut at, mut amp_at) = (0, 0);
        let mut y = y;
        for (group, &code) in codes.iter().enumerate().take(self.groups()) {
            let part = self.part(group);
            let (point, rest) = y.split_at(part.lattice.dimension().min(y.len()));
            y = rest;
            let width = part.lattice.index_bits();
            bits::write(index, at, width, part.lattice.encode(point));
            at += width as usize;
            let width = u32::from(part.amplitudes.bits());
            bits::write(amp, amp_at, width, u128::from(code));
            amp_at += width as usize;
        }
    }

    /// Points `y` `[in]` of a row. Indices are not checked, see [`Codec::first_bad`].
    pub fn unpack_points<P: Pulse>(&self, index: &[u8], y: &mut [P]) {
        self.unpack_points_with(Isa::detect(), index, y);
    }

    pub(super) fn unpack_points_with<P: Pulse>(&self, isa: Isa, index: &[u8], y: &mut [P]) {
        let whole = self.whole_groups();
        let split = whole * self.code.dimension;
        let lattice = &self.whole.lattice;
        lattice.decode_stream(isa, index, 0, whole, &mut y[..split]);
        if let Some(tail) = &self.tail {
            let bit = whole * lattice.index_bits() as usize;
            tail.lattice.decode_stream(isa, index, bit, 1, &mut y[split..]);
        }
    }

    /// Codes of lengths of a row, `[groups]`.
    pub fn unpack_amplitudes(&self, amp: &[u8], codes: &mut [u16]) {
        let width = u32::from(self.whole.amplitudes.bits());
        let whole = self.whole_groups();
        for (g, code) in codes.iter_mut().enumerate().take(self.groups()) {
            let bit = g.min(whole) * width as usize;
            *code = bits::read64(amp, bit, u32::from(self.part(g).amplitudes.bits())) as u16;
        }
    }

    /// The first group of a packed row whose index is not below `N` or whose length is not finite.
    pub fn first_bad(&self, index: &[u8], amp: &[u8]) -> Option<usize> {
        let whole = self.whole_groups();
        let lattice = &self.whole.lattice;
        let bad = lattice.first_bad(index, 0, whole).or_else(|| {
            let bit = whole * lattice.index_bits() as usize;
            self.tail.as_ref().and_then(|t| t.lattice.first_bad(index, bit, 1)).map(|_| whole)
        });
        if bad.is_some() || self.code.amplitude != AmplitudeMode::F16 {
            return bad;
        }
        let mut codes = vec![0; self.groups()];
        self.unpack_amplitudes(amp, &mut codes);
        codes.iter().enumerate().position(|(g, &c)| {
            let level = self.part(g).amplitudes.level(c);
            !(level.is_finite() && level >= 0.0)
        })
    }

    /// Codes `rows` `[out, in]` with the given `norms` `[out]`: the nearest point of every group by
    /// `search` (then refined, if asked for), and the length of its projection on that point, or its
    /// own length (`projection = false`).
    ///
    /// # Errors
    /// [`Error::Shape`] when lengths do not fit; [`Error::Numeric`] for values that are not finite.
    pub fn encode(
        &self,
        rows: &[f32],
        norms: &[f32],
        search: Search,
        refined: bool,
        projection: bool,
    ) -> Result<Encoded> {
        let width = self.code.inputs;
        if Some(rows.len()) != norms.len().checked_mul(width) {
            let (n, out) = (rows.len(), norms.len());
            return refuse(format!("{n} weights for {out} rows of {width}"));
        }
        // In pieces without an early exit, which vectorise.
        let finite = rows.par_chunks(1 << 14).all(|part| part.iter().all(|w| w.is_finite()));
        if !finite && let Some(at) = rows.iter().position(|w| !w.is_finite()) {
            let reason = format!("weight ({}, {}) is {}", at / width, at % width, rows[at]);
            return Err(Error::Numeric { what: "pyramid code".into(), reason });
        }
        let (index_bytes, amp_bytes) = (self.index_row_bytes(), self.amplitude_row_bytes());
        let mut index = vec![0u8; norms.len() * index_bytes];
        let mut amplitude = vec![0u8; norms.len() * amp_bytes];
        let empty = std::sync::atomic::AtomicUsize::new(0);
        // A row without amplitude bits has no bytes there, hence no chunks to zip with.
        let mut amp_rows: Vec<&mut [u8]> = if amp_bytes > 0 {
            amplitude.chunks_mut(amp_bytes).collect()
        } else {
            norms.iter().map(|_| &mut [][..]).collect()
        };
        index
            .par_chunks_mut(index_bytes)
            .zip(amp_rows.par_iter_mut())
            .zip(rows.par_chunks(width).zip(norms))
            .with_min_len((1 << 14) / width + 1)
            .for_each_init(
                || RowScratch::new(self),
                |scratch, ((index, amp), (row, &norm))| {
                    let zero = self.encode_row(row, norm, search, refined, projection, scratch);
                    if zero > 0 && norm > 0.0 {
                        empty.fetch_add(zero, std::sync::atomic::Ordering::Relaxed);
                    }
                    self.pack_row(&scratch.y, &scratch.codes, index, amp);
                },
            );
        let zero_groups = empty.into_inner();
        Ok(Encoded { index, amplitude, zero_groups })
    }

    /// Finds points and codes of one row into the scratch; returns the number of groups of zeros.
    fn encode_row(
        &self,
        row: &[f32],
        norm: f32,
        search: Search,
        refined: bool,
        projection: bool,
        scratch: &mut RowScratch,
    ) -> usize {
        let whole = self.whole_groups();
        let d = self.code.dimension;
        let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
        let mut zero = 0;
        let mut first = 0;
        while first < self.groups() {
            let (d, part, count) = if first < whole {
                (d, &self.whole, LANES.min(whole - first))
            } else {
                let part = self.part(first);
                (part.lattice.dimension(), part, 1)
            };
            let start = first * self.code.dimension;
            let RowScratch { v, found, work, y, codes } = scratch;
            let (v, found) = (&mut v[..d], &mut found[..d]);
            spread(&row[start..start + count * d], d, v);
            search_lanes(search, v, part.lattice.pulses(), found, work);
            let y = &mut y[start..start + count * d];
            gather(found, d, y);
            if refined {
                for (y, v) in y.chunks_exact_mut(d).zip(row[start..].chunks_exact(d)) {
                    refine(v, y);
                }
                for (lane, y) in y.chunks_exact(d).enumerate() {
                    found.iter_mut().zip(y).for_each(|(f, y)| f[lane] = f32::from(*y));
                }
            }
            let mut lengths = [0f32; LANES];
            let mut energies = [0f32; LANES];
            measure(v, found, projection, &mut lengths, &mut energies);
            for lane in 0..count {
                zero += usize::from(energies[lane] == 0.0);
                codes[first + lane] = part.amplitudes.encode(lengths[lane] * inverse);
            }
            first += count;
        }
        zero
    }
}

/// Reused memory of one task.
struct RowScratch {
    v: Vec<[f32; LANES]>,
    found: Vec<[f32; LANES]>,
    work: Vec<[f32; LANES]>,
    y: Vec<i16>,
    codes: Vec<u16>,
}

impl RowScratch {
    fn new(codec: &Codec) -> Self {
        let d = codec.code.dimension;
        Self {
            v: vec![[0.0; LANES]; d],
            found: vec![[0.0; LANES]; d],
            work: Vec::new(),
            y: vec![0; codec.code.inputs],
            codes: vec![0; codec.groups()],
        }
    }
}

/// Groups one after the other to one group per lane; lanes without a group become 0.
fn spread(groups: &[f32], d: usize, v: &mut [[f32; LANES]]) {
    if groups.len() < LANES * d {
        v.fill([0.0; LANES]);
    }
    for (lane, group) in groups.chunks_exact(d).enumerate().take(LANES) {
        for (v, &w) in v.iter_mut().zip(group) {
            v[lane] = w;
        }
    }
}

/// The inverse of [`spread`], whole numbers as integers.
fn gather(found: &[[f32; LANES]], d: usize, y: &mut [i16]) {
    for (lane, y) in y.chunks_exact_mut(d).enumerate().take(LANES) {
        for (y, f) in y.iter_mut().zip(found) {
            *y = f[lane] as i16;
        }
    }
}

simd! {
    /// Lengths per lane: of the projection of `v` on `y`, or of `v` itself; and energies of `v`.
    fn measure(
        v: &[[f32; LANES]],
        y: &[[f32; LANES]],
        projection: bool,
        lengths: &mut [f32; LANES],
        energies: &mut [f32; LANES],
    ) {
        let (mut dot, mut square, mut energy) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        for (v, y) in v.iter().zip(y) {
            for i in 0..LANES {
                dot[i] += v[i] * y[i];
                square[i] += y[i] * y[i];
                energy[i] += v[i] * v[i];
            }
        }
        for i in 0..LANES {
            lengths[i] = if projection { dot[i] / square[i].sqrt() } else { energy[i].sqrt() };
            energies[i] = energy[i];
        }
    }
}
