//! Products with integer-quantised weights: y = x Wᵀ + b with W[o, k] = (q[o, k] - zero) * scale,
//! one scale and zero for every output and group of columns, at 2, 3, 4, 5, 6 or 8 bits.
//!
//! [`LowBit`] keeps the codes in a layout made for wide registers (see `layout.rs`) and exactly `bits`
//! bits per weight, plus one scale and zero per group (two bytes each when f16 holds them exactly,
//! else four). For few rows of x the codes are multiplied in registers: with AVX-512 VNNI as integers
//! by 16-bit activations (up to 16 rows), else decoded to f32 (up to 4 rows). More rows share decoded
//! panels of weights and the products of [`crate::skinny`]. The layouts that other tools write to
//! disk are not here but in the store.
//!
//! Exactness: the f32 paths multiply with the very values that [`LowBit::dequantize`] returns; only
//! the order of the sums differs. Against exact arithmetic on those values,
//! |y - exact| <= (in / 8 + 16) * 2⁻²³ * (Σ |x W| + |b|). The integer path rounds every block of 128
//! activations to steps of its largest magnitude / 32639, which adds at most
//! Σ_blocks max|x| / 65278 * (Σ |q s| + |Σ z s|), and its zero points come off as a sum of their own,
//! so that the first bound holds with Σ |x| (|q| + |z|) s in place of Σ |x W|.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod columns;
mod layout;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub use columns::LowBitColumns;

use crate::skinny::simd::{self, Isa};
use crate::skinny::{Aligned, Output, Panels, for_outputs, many_rows, with_scratch};
use crate::{Error, Result};
use half::f16;
use layout::{BLOCK, VECTOR};
use rayon::prelude::*;

/// Up to this many rows the codes are decoded once for every one, two or four rows of x.
const DIRECT_ROWS: usize = 4;
/// Up to this many rows the integer kernels are faster than decoded panels.
#[cfg(target_arch = "x86_64")]
const INTEGER_ROWS: usize = 16;
/// Rough weights that one thread decodes and multiplies in a nanosecond.
const WEIGHTS_PER_NS: usize = 20;
/// Marks a slot that holds no column.
const NO_COLUMN: u32 = u32::MAX;

/// Scales and zeros `[out, groups]` as pairs (scale, zero).
#[derive(Debug)]
enum Params {
    /// All of them are exact in f16.
    Half(Vec<f16>),
    Single(Vec<f32>),
}

/// What a kernel needs to know about one output's row of weights.
#[derive(Clone, Copy)]
struct RowView<'a> {
    /// `slots / BLOCK * layout::block_bytes(bits)` bytes of codes, followed by at least
    /// [`layout::SLACK`] readable bytes.
    codes: &'a [u8],
    /// Pairs (scale, zero) of every group.
    params: &'a [f32],
    /// Group of every vector of 16 slots.
    groups: &'a [u32],
    /// Every block lies in one group.
    whole_blocks: bool,
}

/// Quantised weights `[out, in]` in the run-time layout.
#[derive(Debug)]
pub struct LowBit {
    bits: u8,
    out: usize,
    inputs: usize,
    groups: usize,
    /// Columns of the packed matrix: every group is filled up to whole vectors, the row to blocks.
    slots: usize,
    codes: Vec<u8>,
    /// Where the first row starts in `codes`: at a multiple of 64 in memory.
    offset: usize,
    params: Params,
    vector_group: Vec<u32>,
    whole_blocks: bool,
    /// How many groups share a block, when they cut it into 1, 2 or 4 equal parts.
    parts: Option<usize>,
    /// Column of every slot, when slot and column are not the same thing.
    columns: Option<Vec<u32>>,
}

fn refuse<T>(reason: String) -> Result<T> {
    Err(Error::Shape { what: "low-bit weights".into(), reason })
}

impl LowBit {
    /// Packs quantised weights.
    ///
    /// `codes`: `[out, in]`, each below 2^bits; `scales` and `zeros`: `[out, groups]` with
    /// groups = in / group_size rounded up; column k belongs to group k / group_size, or to
    /// `group_index[k]` when a map `[in]` is given (GPTQ's act-order). A `group_size` of `in` or more
    /// means one group for the whole row.
    ///
    /// # Errors
    /// [`Error::Shape`] for other bit widths, lengths that do not fit, codes or group numbers out of
    /// range; [`Error::Numeric`] for scales or zeros that are not finite.
    pub fn new(
        bits: u8,
        out: usize,
        inputs: usize,
        group_size: usize,
        codes: &[u8],
        scales: &[f32],
        zeros: &[f32],
        group_index: Option<&[u32]>,
    ) -> Result<Self> {
        if !layout::BITS.contains(&bits) {
            return refuse(format!("{bits} bits are not supported; use 2, 3, 4, 5, 6 or 8"));
        }
        if group_size == 0 {
            return refuse("the group size is 0; use 128, or `in` for whole rows".into());
        }
        if inputs >= NO_COLUMN as usize - BLOCK || Some(codes.len()) != out.checked_mul(inputs) {
            return refuse(format!("{} codes given for [{out}, {inputs}]", codes.len()));
        }
        let groups = inputs.div_ceil(group_size);
        for (name, values) in [("scales", scales), ("zeros", zeros)] {
            if Some(values.len()) != out.checked_mul(groups) {
                let n = values.len();
                return refuse(format!("{n} {name} given for [{out}, {groups} groups]"));
            }
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let (o, g) = (at / groups, at % groups);
                let reason = format!("{name} of output {o}, group {g} is {}", values[at]);
                return Err(Error::Numeric { what: "low-bit weights".into(), reason });
            }
        }
        if bits < 8
            && let Some(at) = codes.par_iter().position_any(|&c| c >> bits != 0)
        {
            let (o, k, code) = (at / inputs, at % inputs, codes[at]);
            return refuse(format!("code {code} at ({o}, {k}) does not fit into {bits} bits"));
        }
        let natural = |k: usize| (k / group_size) as u32;
        if let Some(map) = group_index {
            if map.len() != inputs {
                return refuse(format!("{} group numbers given for {inputs} columns", map.len()));
            }
            if let Some(k) = map.iter().position(|&g| g as usize >= groups) {
                return refuse(format!("column {k} names group {} of {groups}", map[k]));
            }
        }
        let group_of = |k: usize| group_index.map_or_else(|| natural(k), |map| map[k]);

        let (columns, vector_group) = arrange(inputs, groups, group_of);
        let slots = columns.len();
        let identity = columns
            .iter()
            .enumerate()
            .all(|(slot, &c)| if slot < inputs { c as usize == slot } else { c == NO_COLUMN });
        let row_bytes = slots / BLOCK * layout::block_bytes(bits);
        let Some(bytes) =
            row_bytes.checked_mul(out).and_then(|b| b.checked_add(64 + layout::SLACK))
        else {
            return refuse(format!("[{out}, {inputs}] does not fit in memory"));
        };
        let mut packed = vec![0u8; bytes];
        let offset = packed.as_ptr().align_offset(64).min(63);
        if row_bytes > 0 && inputs > 0 {
            packed[offset..offset + row_bytes * out]
                .par_chunks_mut(row_bytes)
                .zip(codes.par_chunks(inputs))
                .for_each(|(target, row)| layout::pack_row(bits, row, &columns, target));
        }
        let pairs = || scales.iter().zip(zeros).flat_map(|(&s, &z)| [s, z]);
        let params = if pairs().all(|v| f16::from_f32(v).to_f32().to_bits() == v.to_bits()) {
            Params::Half(pairs().map(f16::from_f32).collect())
        } else {
            Params::Single(pairs().collect())
        };
        let columns = (!identity).then_some(columns);
        let whole_blocks =
            vector_group.chunks_exact(BLOCK / VECTOR).all(|g| g.iter().all(|&v| v == g[0]));
        let parts = [1, 2, 4].into_iter().find(|parts| {
            vector_group.chunks_exact(BLOCK / VECTOR / parts).all(|g| g.iter().all(|&v| v == g[0]))
        });
        Ok(Self {
            bits,
            out,
            inputs,
            groups,
            slots,
            codes: packed,
            offset,
            params,
            vector_group,
            whole_blocks,
            parts,
            columns,
        })
    }

    /// Bits of a code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.inputs]
    }

    /// Bytes of memory that the weights take: codes, scales and zeros, and maps.
    pub fn bytes(&self) -> usize {
        let params = match &self.params {
            Params::Half(p) => p.len() * 2,
            Params::Single(p) => p.len() * 4,
        };
        let maps = self.vector_group.len() + self.columns.as_ref().map_or(0, Vec::len);
        self.codes.len() + params + maps * 4
    }

    /// y = x Wᵀ + b.
    ///
    /// `x`: `[rows, in]`, `bias`: `[out]`, `y`: `[rows, out]`; row-major. See the top of this module
    /// for the exactness.
    ///
    /// # Panics
    /// When a length does not fit.
    pub fn linear(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        self.linear_with(Isa::detect(), true, x, rows, bias, y);
    }

    /// The weights `[out, in]` in f32: (code - zero) * scale.
    pub fn dequantize(&self) -> Vec<f32> {
        let isa = Isa::detect();
        let mut w = vec![0.0; self.out * self.inputs];
        if self.inputs == 0 {
            return w;
        }
        w.par_chunks_mut(self.inputs).enumerate().for_each(|(o, row)| {
            with_scratch(self.slots + 2 * self.groups, |scratch| {
                let (slots, params) = scratch.split_at_mut(self.slots);
                self.expand_row(isa, o, params, slots);
                match &self.columns {
                    None => row.copy_from_slice(&slots[..self.inputs]),
                    Some(columns) => {
                        for (&column, &value) in columns.iter().zip(&*slots) {
                            if let Some(place) = row.get_mut(column as usize) {
                                *place = value;
                            }
                        }
                    }
                }
            });
        });
        w
    }

    /// `integer` allows the integer kernels where the processor has them.
    fn linear_with(
        &self,
        isa: Isa,
        integer: bool,
        x: &[f32],
        rows: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (out, slots) = (self.out, self.slots);
        assert_eq!(
            Some(x.len()),
            rows.checked_mul(self.inputs),
            "x must hold [rows, in] = [{rows}, {}]",
            self.inputs
        );
        assert!(bias.is_none_or(|b| b.len() == out), "the bias must hold {out} numbers");
        assert_eq!(Some(y.len()), rows.checked_mul(out), "y must hold [{rows}, {out}]");
        if rows == 0 || out == 0 {
            return;
        }
        let x = self.arrange_x(x, rows);
        let x = x.as_slice();
        #[cfg(target_arch = "x86_64")]
        if integer
            && isa == Isa::Avx512
            && rows <= INTEGER_ROWS
            && let Some(parts) = self.parts
            && vnni::available()
        {
            return self.linear_integer(isa, x, rows, parts, bias, y);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = integer;
        if rows > DIRECT_ROWS {
            let fill = |first: usize, panel: &mut [f32]| {
                let mut params = vec![0.0; 2 * self.groups];
                for (i, row) in panel.chunks_exact_mut(slots.max(1)).enumerate() {
                    self.expand_row(isa, first + i, &mut params, row);
                }
            };
            return many_rows(isa, x, rows, [out, slots], bias, y, Panels::Made(fill));
        }
        let output = Output::new(y, rows, out);
        for_outputs(out, slots / WEIGHTS_PER_NS * rows, |range| {
            with_scratch(2 * self.groups, |params| {
                for o in range {
                    let row = self.row(isa, o, params);
                    self.dots(isa, row, x, rows, |r, sum| {
                        let sum = sum + bias.map_or(0.0, |b| b[o]);
                        // SAFETY: r < rows and o lies in this task's own range.
                        unsafe { output.set(r, o, sum) }
                    });
                }
            });
        });
    }

    /// The product with activations rounded to 16 bits; x by slots.
    #[cfg(target_arch = "x86_64")]
    fn linear_integer(
        &self,
        isa: Isa,
        x: &[f32],
        rows: usize,
        parts: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let x = vnni::Quantized::new(self.bits, x, rows, parts);
        let output = Output::new(y, rows, self.out);
        for_outputs(self.out, self.slots / (4 * WEIGHTS_PER_NS) * rows, |range| {
            with_scratch(2 * self.groups, |params| {
                let mut sums = [0.0; 4];
                for o in range {
                    let row = self.row(isa, o, params);
                    for first in (0..rows).step_by(4) {
                        let sums = &mut sums[..(rows - first).min(4)];
                        // SAFETY: detected; `x` was made for this width and as many slots.
                        unsafe { vnni::dots(self.bits, row, &x, first, sums) };
                        for (r, &sum) in sums.iter().enumerate() {
                            let sum = sum + bias.map_or(0.0, |b| b[o]);
                            // SAFETY: the row exists and o lies in this task's own range.
                            unsafe { output.set(first + r, o, sum) }
                        }
                    }
                }
            });
        });
    }

    /// x `[rows, in]` in the order of the slots, with zeros where a slot has no column.
    fn arrange_x(&self, x: &[f32], rows: usize) -> Aligned {
        let mut arranged = Aligned::zeroed(rows * self.slots);
        let fill = |(to, from): (&mut [f32], &[f32])| match &self.columns {
            None => to[..self.inputs].copy_from_slice(from),
            Some(columns) => {
                for (place, &column) in to.iter_mut().zip(columns) {
                    *place = from.get(column as usize).copied().unwrap_or(0.0);
                }
            }
        };
        if self.inputs > 0 {
            let to = arranged.as_mut_slice().par_chunks_exact_mut(self.slots);
            to.zip(x.par_chunks_exact(self.inputs)).with_min_len(16).for_each(fill);
        }
        arranged
    }

    /// The packed row of output `o`; its scales and zeros are written to `params`, `[groups, 2]`.
    fn row<'a>(&'a self, isa: Isa, o: usize, params: &'a mut [f32]) -> RowView<'a> {
        let n = 2 * self.groups;
        let params: &[f32] = match &self.params {
            Params::Half(p) => {
                simd::widen(isa, &p[o * n..(o + 1) * n], params);
                &params[..n]
            }
            Params::Single(p) => &p[o * n..(o + 1) * n],
        };
        let bytes = self.slots / BLOCK * layout::block_bytes(self.bits);
        let start = self.offset + o * bytes;
        RowView {
            codes: &self.codes[start..start + bytes],
            params,
            groups: &self.vector_group,
            whole_blocks: self.whole_blocks,
        }
    }

    /// Gives `sink(row, sum)` for the products of all (at most four) rows of `x` with one output.
    fn dots(
        &self,
        isa: Isa,
        row: RowView<'_>,
        x: &[f32],
        rows: usize,
        mut sink: impl FnMut(usize, f32),
    ) {
        let slots = self.slots;
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                let mut sums = [0.0; DIRECT_ROWS];
                // SAFETY: detected; the row view and x `[rows, slots]` are as the kernel asks.
                unsafe { avx512::dots(self.bits, row, x, rows, &mut sums) };
                sums[..rows].iter().enumerate().for_each(|(r, &sum)| sink(r, sum));
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                for r in 0..rows {
                    let x = &x[r * slots..(r + 1) * slots];
                    // SAFETY: as above.
                    sink(r, unsafe { avx2::dot(self.bits, row, x) });
                }
            }
            Isa::Portable => {
                for r in 0..rows {
                    sink(r, layout::dot(self.bits, row, &x[r * slots..(r + 1) * slots]));
                }
            }
        }
    }

    /// Writes the weights of output `o` in f32, one for every slot.
    fn expand_row(&self, isa: Isa, o: usize, params: &mut [f32], to: &mut [f32]) {
        let row = self.row(isa, o, params);
        match isa {
            // SAFETY: detected; `to` holds one place for every slot.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::expand(self.bits, row, to) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::expand(self.bits, row, to) },
            Isa::Portable => layout::expand(self.bits, row, to),
        }
    }
}

/// Gives the column of every slot and the group of every vector of slots: the groups one after the
/// other, each filled up to whole vectors, the row filled up to whole blocks.
fn arrange(inputs: usize, groups: usize, group_of: impl Fn(usize) -> u32) -> (Vec<u32>, Vec<u32>) {
    let mut members: Vec<Vec<u32>> = vec![Vec::new(); groups];
    for k in 0..inputs {
        members[group_of(k) as usize].push(k as u32);
    }
    let mut columns = Vec::with_capacity(inputs.next_multiple_of(BLOCK));
    let mut vector_group = Vec::with_capacity(inputs.div_ceil(VECTOR));
    for (group, members) in members.iter().enumerate() {
        columns.extend_from_slice(members);
        columns.resize(columns.len().next_multiple_of(VECTOR), NO_COLUMN);
        vector_group.resize(columns.len() / VECTOR, group as u32);
    }
    columns.resize(columns.len().next_multiple_of(BLOCK), NO_COLUMN);
    // The filling belongs to the last group, so that no new scale is looked up for it.
    let last = vector_group.last().copied().unwrap_or(0);
    vector_group.resize(columns.len() / VECTOR, last);
    (columns, vector_group)
}

#[cfg(test)]
mod tests;
