//! Products with integer weights whose groups lie along the output, inside one input channel:
//! W[o, k] = (q[o, k] - zero[k, g(o)]) * scale[k, g(o)].
//!
//! The codes are kept in panels of 128 outputs, input after input, so that a product streams them
//! once: one activation meets 128 weights that lie side by side, and the sums of a panel stay in
//! registers. Everything is f32; see the top of [`super`] for the exactness.

use super::layout::{self, BLOCK, VECTOR, block_bytes};
use super::{Isa, refuse};
use crate::kernels::{Matrix, Output as Product, matmul_serial};
use crate::skinny::{Output, with_scratch};
use crate::{Error, Result};
use rayon::prelude::*;

/// Up to this many rows the codes are decoded in registers, two rows at a time.
const DIRECT_ROWS: usize = 4;

/// Quantised weights `[out, in]` with groups along the output, in the run-time layout.
#[derive(Debug)]
pub struct LowBitColumns {
    bits: u8,
    out: usize,
    inputs: usize,
    /// Groups that share a block of 128 outputs: 1, 2, 4 or 8.
    parts: usize,
    /// `[panels, in]` blocks of 128 codes.
    codes: Vec<u8>,
    /// `[panels, in, parts]` pairs (scale, zero).
    params: Vec<f32>,
}

impl LowBitColumns {
    /// From codes `[in, out]` with scales and zeros `[in, groups]`, `group_size` outputs to a group.
    ///
    /// # Errors
    /// [`Error::Shape`] for other bit widths, group sizes that are neither a multiple nor a divisor
    /// from 16 up of 128 (unless one group holds all outputs), lengths that do not fit, codes out of range;
    /// [`Error::Numeric`] for scales or zeros that are not finite.
    pub fn new(
        bits: u8,
        out: usize,
        inputs: usize,
        group_size: usize,
        codes: &[u8],
        scales: &[f32],
        zeros: &[f32],
    ) -> Result<Self> {
        if !layout::BITS.contains(&bits) {
            return refuse(format!("{bits} bits are not supported; use 2, 3, 4, 5, 6 or 8"));
        }
        if out == 0 || inputs == 0 || Some(codes.len()) != out.checked_mul(inputs) {
            return refuse(format!("{} codes given for [{inputs}, {out}]", codes.len()));
        }
        let whole = group_size >= out;
        let fits = group_size.is_multiple_of(BLOCK) && group_size > 0;
        let parts = match group_size {
            _ if whole || fits => 1,
            16 | 32 | 64 => BLOCK / group_size,
            _ => {
                return refuse(format!(
                    "groups of {group_size} outputs have no kernel; 16, 32, 64 and multiples of \
                     128 have"
                ));
            }
        };
        let groups = out.div_ceil(group_size);
        for (name, values) in [("scales", scales), ("zeros", zeros)] {
            if Some(values.len()) != inputs.checked_mul(groups) {
                let n = values.len();
                return refuse(format!("{n} {name} given for [{inputs}, {groups} groups]"));
            }
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let (k, g) = (at / groups, at % groups);
                let reason = format!("{name} of input {k}, group {g} is {}", values[at]);
                return Err(Error::Numeric { what: "low-bit weights".into(), reason });
            }
        }
        if bits < 8
            && let Some(at) = codes.iter().position(|&c| c >> bits != 0)
        {
            let (k, o, code) = (at / out, at % out, codes[at]);
            return refuse(format!("code {code} at ({o}, {k}) does not fit into {bits} bits"));
        }
        let panels = out.div_ceil(BLOCK);
        let block = block_bytes(bits);
        let mut packed = vec![0u8; panels * inputs * block + layout::SLACK];
        let mut params = vec![0f32; panels * inputs * parts * 2];
        let natural: Vec<u32> = (0..BLOCK as u32).collect();
        packed[..panels * inputs * block]
            .par_chunks_mut(inputs * block)
            .zip(params.par_chunks_mut(inputs * parts * 2))
            .enumerate()
            .for_each(|(panel, (codes_of, params_of))| {
                let first = panel * BLOCK;
                let width = BLOCK.min(out - first);
                let mut row = [0u8; BLOCK];
                for k in 0..inputs {
                    row[..width].copy_from_slice(&codes[k * out + first..][..width]);
                    let target = &mut codes_of[k * block..(k + 1) * block];
                    layout::pack_row(bits, &row, &natural, target);
                    for part in 0..parts {
                        let o = first + part * BLOCK / parts;
                        // Places behind the last output keep scale 0.
                        if o < out {
                            let at = k * groups + o / group_size;
                            let to = &mut params_of[2 * (k * parts + part)..][..2];
                            to.copy_from_slice(&[scales[at], zeros[at]]);
                        }
                    }
                }
            });
        Ok(Self { bits, out, inputs, parts, codes: packed, params })
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.inputs]
    }

    /// Bytes of memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.params.len()
    }

    /// y = x Wᵀ + b; `x`: `[rows, in]`, `bias`: `[out]`, `y`: `[rows, out]`, row-major.
    ///
    /// # Panics
    /// When a length does not fit.
    pub fn linear(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        self.linear_with(Isa::detect(), x, rows, bias, y);
    }

    fn linear_with(&self, isa: Isa, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        assert_eq!(x.len(), rows * self.inputs, "x must hold [{rows}, {}]", self.inputs);
        assert!(bias.is_none_or(|b| b.len() == self.out), "the bias must hold {}", self.out);
        assert_eq!(y.len(), rows * self.out, "y must hold [{rows}, {}]", self.out);
        if rows == 0 {
            return;
        }
        let output = Output::new(y, rows, self.out);
        (0..self.out.div_ceil(BLOCK)).into_par_iter().for_each(|panel| {
            let dense = if rows > DIRECT_ROWS { self.inputs } else { 0 };
            with_scratch((dense + rows) * BLOCK, |scratch| {
                let (dense, sums) = scratch.split_at_mut(dense * BLOCK);
                if dense.is_empty() {
                    sums.fill(0.0);
                    for (x, sums) in x.chunks(2 * self.inputs).zip(sums.chunks_mut(2 * BLOCK)) {
                        self.panel_times(isa, panel, x, sums);
                    }
                } else {
                    self.expand(panel, dense);
                    matmul_serial(
                        [rows, BLOCK, self.inputs],
                        Matrix::rows(x, self.inputs),
                        Matrix::rows(dense, BLOCK),
                        1.0,
                        Product { data: sums, row: BLOCK, accumulate: false },
                    );
                }
                let first = panel * BLOCK;
                for (r, sums) in sums.chunks_exact(BLOCK).enumerate() {
                    for (i, sum) in sums.iter().enumerate().take(self.out - first) {
                        let sum = sum + bias.map_or(0.0, |b| b[first + i]);
                        // SAFETY: the row exists and the column lies in this panel alone.
                        unsafe { output.set(r, first + i, sum) }
                    }
                }
            });
        });
    }

    /// Codes and parameters of a panel.
    fn panel(&self, panel: usize) -> (&[u8], &[f32]) {
        let (bytes, pairs) = (self.inputs * block_bytes(self.bits), self.inputs * self.parts * 2);
        // The kernels may read a few bytes beyond the last block.
        let codes = &self.codes[panel * bytes..(panel + 1) * bytes + layout::SLACK];
        (codes, &self.params[panel * pairs..(panel + 1) * pairs])
    }

    /// Adds one or two rows of x times a panel to `sums`, `[rows, 128]`.
    fn panel_times(&self, isa: Isa, panel: usize, x: &[f32], sums: &mut [f32]) {
        let (codes, params) = self.panel(panel);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: detected; the panel holds a block and its pairs for every input, x and sums
            // as many rows.
            Isa::Avx512 => unsafe {
                super::avx512::panel(self.bits, self.parts, codes, params, x, self.inputs, sums);
            },
            _ => {
                let mut weights = [0f32; BLOCK];
                for k in 0..self.inputs {
                    self.decode(codes, params, k, &mut weights);
                    for (x, sums) in x.chunks(self.inputs).zip(sums.chunks_mut(BLOCK)) {
                        sums.iter_mut().zip(&weights).for_each(|(s, w)| *s += w * x[k]);
                    }
                }
            }
        }
    }

    /// The weights of input `k` in a panel.
    fn decode(&self, codes: &[u8], params: &[f32], k: usize, to: &mut [f32]) {
        let bytes = block_bytes(self.bits);
        let per_part = (BLOCK / VECTOR / self.parts) as u32;
        let groups: [u32; BLOCK / VECTOR] = std::array::from_fn(|v| v as u32 / per_part);
        let params = &params[2 * k * self.parts..][..2 * self.parts];
        layout::decode(self.bits, &codes[k * bytes..(k + 1) * bytes], params, &groups, to);
    }

    /// A panel in f32, `[in, 128]`.
    fn expand(&self, panel: usize, to: &mut [f32]) {
        let (codes, params) = self.panel(panel);
        for (k, to) in to.chunks_exact_mut(BLOCK).enumerate() {
            self.decode(codes, params, k, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn every_width_path_and_shape() {
        for bits in layout::BITS {
            for (out, inputs, group) in [
                (1usize, 1, 16usize),
                (128, 3, 32),
                (300, 17, 64),
                (256, 9, 128),
                (140, 5, 16),
                (96, 4, 96),
            ] {
                let mut rng = Rng::stream(u64::from(bits), &format!("{out} {inputs} {group}"));
                let groups = out.div_ceil(group);
                let codes: Vec<u8> =
                    (0..out * inputs).map(|_| rng.below(1 << bits) as u8).collect();
                let mut scales = vec![0f32; inputs * groups];
                rng.fill_normal(&mut scales, 0.1);
                let zeros: Vec<f32> =
                    (0..inputs * groups).map(|_| rng.below(1 << bits) as f32).collect();
                let w =
                    LowBitColumns::new(bits, out, inputs, group, &codes, &scales, &zeros).unwrap();
                for rows in [1, 2, 3, 4, 5, 9] {
                    let (mut x, mut bias) = (vec![0f32; rows * inputs], vec![0f32; out]);
                    rng.fill_normal(&mut x, 1.0);
                    rng.fill_normal(&mut bias, 1.0);
                    for isa in Isa::available() {
                        let mut y = vec![f32::NAN; rows * out];
                        w.linear_with(isa, &x, rows, Some(&bias), &mut y);
                        for r in 0..rows {
                            for o in 0..out {
                                let (mut sum, mut size) = (f64::from(bias[o]), 4.0);
                                for k in 0..inputs {
                                    let g = k * groups + o / group;
                                    let w = (f32::from(codes[k * out + o]) - zeros[g]) * scales[g];
                                    let term = f64::from(w) * f64::from(x[r * inputs + k]);
                                    sum += term;
                                    size += term.abs();
                                }
                                let apart = (f64::from(y[r * out + o]) - sum).abs();
                                let bound = (inputs as f64 + 8.0) * 2f64.powi(-23) * size;
                                assert!(
                                    apart <= bound,
                                    "{bits} {isa:?} {rows} ({r}, {o}): {apart}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn refuses_what_has_no_kernel() {
        let new = |bits, group, codes: &[u8], scales: &[f32]| {
            let zeros = vec![0.0; scales.len()];
            LowBitColumns::new(bits, 40, 1, group, codes, scales, &zeros).unwrap_err().to_string()
        };
        assert!(new(7, 16, &[0; 40], &[1.0; 3]).contains("7 bits"));
        assert!(new(4, 20, &[0; 40], &[1.0; 2]).contains("groups of 20"));
        assert!(new(4, 16, &[0; 39], &[1.0; 3]).contains("39 codes"));
        assert!(new(4, 16, &[0; 40], &[1.0; 2]).contains("2 scales"));
        assert!(new(4, 16, &[16; 40], &[1.0; 3]).contains("code 16"));
        assert!(new(4, 16, &[0; 40], &[f32::NAN; 3]).contains("NaN"));
    }
}
