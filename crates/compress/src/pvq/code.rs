//! One matrix to pyramid codes: without calibration row by row, with a Hessian in a sweep over groups
//! of columns.

use super::measure::index_entropy;
use super::{Length, Norms, PvqOptions, Refine};
use crate::gptq::Factor;
use crate::gptq::sweep::{ColumnQuantizer, Columns, SweepOptions, chunk_rows, sweep};
use crate::grid::Matrix;
use crate::{Error, Result};
use nn::pyramid::pyramid_code;
use rayon::prelude::*;
use store::packed::pyramid::{PyramidCode, PyramidMatrix, PyramidTail};
use tensor::pyramid::{
    Codec, LANES, Lattice, MAX_PULSES, Metric, amplitude_under, pulses_for_rate, refine,
    refine_under, search_lanes,
};

/// A coded layer and what it cost.
#[derive(Debug)]
pub struct Quantized {
    /// The streams.
    pub matrix: PyramidMatrix,
    /// `Σ E² = tr((W - Ŵ) H_damped (W - Ŵ)ᵀ)`, with a Hessian.
    pub loss: Option<f64>,
    /// Groups of zeros in rows that are not zero.
    pub zero_groups: usize,
    /// `Σ log2 N` of a row: what its indices carry at most, in bits.
    pub entropy_bound: f64,
    /// Bits per weight of an ideal coder of the directions, see [`index_entropy`].
    pub index_entropy: f64,
    /// Groups whose stored index does not give back their point: 0.
    pub round_trip_failures: usize,
}

/// How a layer of `shape` `[out, in]` is coded at `rate` bits per weight for directions, or with a
/// number of `pulses`.
///
/// # Errors
/// When groups do not fill the rows, when the rate is too low for a single pulse, and when an index
/// would take more than 128 bits; the message says what would work.
pub fn layer_code(
    layer: &str,
    shape: [usize; 2],
    options: &PvqOptions,
    rate: f64,
    pulses: Option<usize>,
) -> Result<PyramidCode> {
    let width = shape[1];
    let dimension = options.group;
    if dimension == 0 || dimension > width {
        return Err(Error::layer(
            layer,
            format!("{width} inputs cannot be cut into groups of {dimension}: change --pvq-group"),
        ));
    }
    let rest = width % dimension;
    if rest != 0 && !options.ragged {
        let fitting = [64usize, 32, 16, 8, 4, 2].into_iter().filter(|d| width.is_multiple_of(*d));
        let fitting: Vec<String> = fitting.map(|d| d.to_string()).collect();
        return Err(Error::layer(
            layer,
            format!(
                "{width} inputs are no multiple of groups of {dimension}: use --pvq-group {}, or \
                 --pvq-ragged for a smaller last group",
                if fitting.is_empty() { "1".into() } else { fitting.join(" or ") }
            ),
        ));
    }
    let too_low = |dimension: usize| {
        // Rounded up to what is printed.
        let least = (((2 * dimension) as f64).log2() / dimension as f64 * 1e3).ceil() / 1e3;
        Error::layer(
            layer,
            format!(
                "{rate} bits per weight do not suffice for one pulse in groups of {dimension}: give \
                 at least {least:.3}, or larger groups"
            ),
        )
    };
    let pulses = match pulses {
        Some(pulses) => pulses,
        None => match pulses_for_rate(dimension, rate) {
            0 => return Err(too_low(dimension)),
            pulses if pulses < MAX_PULSES && beyond(dimension, pulses, rate) => {
                let fits = Lattice::shared(dimension, pulses)?.entropy_bits() / dimension as f64;
                return Err(Error::layer(
                    layer,
                    format!(
                        "{rate} bits per weight in groups of {dimension} need indices of more than \
                         128 bits: at most {pulses} pulses fit ({fits:.2} bits), or use a smaller \
                         --pvq-group"
                    ),
                ));
            }
            pulses => pulses,
        },
    };
    let named = |e: tensor::Error| Error::layer(layer, e.to_string());
    let lattice = Lattice::shared(dimension, pulses).map_err(named)?;
    let tail = (rest != 0)
        .then(|| -> Result<PyramidTail> {
            // The same rate as the whole groups, but never nothing.
            let rate = lattice.entropy_bits() / dimension as f64;
            let pulses = pulses_for_rate(rest, rate).max(1);
            let index_bits = Lattice::shared(rest, pulses).map_err(named)?.index_bits();
            Ok(PyramidTail { dimension: rest, pulses, index_bits })
        })
        .transpose()?;
    Ok(PyramidCode {
        shape,
        dimension,
        pulses,
        index_bits: lattice.index_bits(),
        tail,
        amp_bits: options.length_bits,
        amp_mode: options.levels.stored(),
        amp_zero: options.zero_length,
        norm: options.norms.stored(),
        rotation: options.rotation(width),
    })
}

/// Whether the rate stops at 128 bits rather than at what was asked for.
fn beyond(dimension: usize, pulses: usize, rate: f64) -> bool {
    tensor::pyramid::count(dimension, pulses + 1).is_none() && rate * dimension as f64 > 128.0
}

/// Codes `matrix` (`[out, in]`, already turned by the rotation of `code`), with error compensation
/// when there is a `factor` of its Hessian in the same basis.
///
/// # Errors
/// Values that are not finite, norms that do not fit their type, widths that do not agree.
pub fn quantize(
    layer: &str,
    matrix: &Matrix,
    code: &PyramidCode,
    factor: Option<&Factor>,
    options: &PvqOptions,
) -> Result<Quantized> {
    matrix.check_finite(layer)?;
    let named = |e: tensor::Error| Error::layer(layer, e.to_string());
    let codec = Codec::new(pyramid_code(code)).map_err(named)?;
    let norms = norms(layer, matrix, options.norms)?;
    let (out, width, groups) = (matrix.out_features, matrix.in_features, codec.groups());
    let (mut points, mut lengths) = (vec![0i16; out * width], vec![0u16; out * groups]);
    let mut zero_groups = 0;
    let mut loss = None;
    match factor {
        Some(factor) => {
            factor.check_width(layer, width)?;
            if !factor.keeps_order() {
                return Err(Error::layer(layer, "pvq codes columns in their stored order only"));
            }
            zero_groups = count_zero_groups(matrix, &norms, &codec);
            let rows = chunk_rows(LANES);
            let mut states: Vec<Chunk<'_>> = points
                .chunks_mut(rows * width)
                .zip(lengths.chunks_mut(rows * groups))
                .zip(norms.chunks(rows))
                .map(|((points, lengths), norms)| Chunk { points, lengths, norms })
                .collect();
            let quantizer = Groups { codec: &codec, options, width };
            let sweep_options = SweepOptions { block_size: 128, keep_zeros: false };
            loss = Some(sweep(matrix, factor, &quantizer, &mut states, rows, &sweep_options));
        }
        None => {
            let projection = options.length != Length::Norm;
            let refined = options.refine != Refine::None;
            let search = options.search.engine();
            let encoded =
                codec.encode(&matrix.values, &norms, search, refined, projection).map_err(named)?;
            zero_groups += encoded.zero_groups;
            let streams = (&encoded.index[..], &encoded.amplitude[..]);
            unpack(&codec, streams, &mut points, &mut lengths);
        }
    }
    let (index, amplitude) = pack(&codec, out, &points, &lengths);
    let mut back = vec![0i16; points.len()];
    let mut back_lengths = vec![0u16; lengths.len()];
    unpack(&codec, (&index, &amplitude), &mut back, &mut back_lengths);
    let failures = |group: usize| {
        let (row, group) = (group / groups, group % groups);
        let start = group * code.dimension;
        let span = row * width + start..row * width + (start + code.dimension).min(width);
        back[span.clone()] != points[span]
            || (codec.part(group).amplitudes.bits() > 0
                && back_lengths[row * groups + group] != lengths[row * groups + group])
    };
    let round_trip_failures =
        (0..out * groups).into_par_iter().filter(|group| failures(*group)).count();
    Ok(Quantized {
        loss,
        zero_groups,
        entropy_bound: codec.entropy_bits(),
        index_entropy: index_entropy(&points, width, code),
        round_trip_failures,
        matrix: PyramidMatrix { code: code.clone(), index, amplitude, norms },
    })
}

/// Norms of the rows, rounded to their stored type before anything is coded.
fn norms(layer: &str, matrix: &Matrix, kind: Norms) -> Result<Vec<f32>> {
    let exact = |row: &[f32]| row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
    let rows = matrix.values.chunks(matrix.in_features).enumerate();
    rows.map(|(row, values)| {
        let norm = exact(values);
        let stored = match kind {
            Norms::F16 => half::f16::from_f64(norm).to_f32(),
            Norms::F32 => norm as f32,
        };
        if stored.is_finite() && (stored > 0.0 || norm == 0.0) {
            return Ok(stored);
        }
        let remedy = match kind {
            Norms::F16 => "use --pvq-norms f32",
            Norms::F32 => "exclude the layer",
        };
        let type_name = if kind == Norms::F16 { "half" } else { "single" };
        Err(Error::layer(
            layer,
            format!("the norm of row {row} is {norm:e}, which {type_name} precision cannot hold: {remedy}"),
        ))
    })
    .collect()
}

/// Groups of zeros in rows that are not zero.
fn count_zero_groups(matrix: &Matrix, norms: &[f32], codec: &Codec) -> usize {
    let d = codec.code().dimension;
    let rows = matrix.values.par_chunks(matrix.in_features).zip(norms);
    rows.filter(|(_, norm)| **norm > 0.0)
        .map(|(row, _)| row.chunks(d).filter(|group| group.iter().all(|w| *w == 0.0)).count())
        .sum()
}

/// Points `[out, in]` and codes of lengths `[out, groups]` to streams.
fn pack(codec: &Codec, out: usize, points: &[i16], lengths: &[u16]) -> (Vec<u8>, Vec<u8>) {
    let (index_row, amp_row) = (codec.index_row_bytes(), codec.amplitude_row_bytes());
    let (mut index, mut amplitude) = (vec![0u8; out * index_row], vec![0u8; out * amp_row]);
    let mut amp_rows: Vec<&mut [u8]> = match amp_row {
        0 => (0..out).map(|_| &mut [][..]).collect(),
        bytes => amplitude.chunks_mut(bytes).collect(),
    };
    index
        .par_chunks_mut(index_row)
        .zip(amp_rows.par_iter_mut())
        .zip(points.par_chunks(codec.code().inputs).zip(lengths.par_chunks(codec.groups())))
        .for_each(|((index, amp), (points, lengths))| codec.pack_row(points, lengths, index, amp));
    (index, amplitude)
}

/// The inverse of [`pack`].
fn unpack(
    codec: &Codec,
    (index, amplitude): (&[u8], &[u8]),
    points: &mut [i16],
    lengths: &mut [u16],
) {
    let (index_row, amp_row) = (codec.index_row_bytes(), codec.amplitude_row_bytes());
    let rows = points.par_chunks_mut(codec.code().inputs);
    rows.zip(lengths.par_chunks_mut(codec.groups())).enumerate().for_each(
        |(row, (points, lengths))| {
            codec.unpack_points(&index[row * index_row..(row + 1) * index_row], points);
            let amplitude = &amplitude[row * amp_row..(row + 1) * amp_row];
            codec.unpack_amplitudes(amplitude, lengths);
        },
    );
}

/// What a chunk of rows keeps: its points `[rows, in]`, lengths `[rows, groups]` and norms.
struct Chunk<'a> {
    points: &'a mut [i16],
    lengths: &'a mut [u16],
    norms: &'a [f32],
}

/// The rule of the sweep: a step is a group.
struct Groups<'a> {
    codec: &'a Codec,
    options: &'a PvqOptions,
    width: usize,
}

impl<'a> ColumnQuantizer for Groups<'a> {
    type State = Chunk<'a>;

    fn step(&self) -> usize {
        self.codec.code().dimension
    }

    fn replace(&self, state: &mut Chunk<'a>, columns: &mut Columns<'_>) {
        let (d, rows) = (columns.count, columns.rows);
        let group = columns.position / self.step();
        let part = self.codec.part(group);
        let options = self.options;
        let metric =
            (options.length == Length::Metric || options.refine == Refine::Metric).then(|| {
                let entry = |at: usize| {
                    let (i, j) = (at / d, at % d);
                    if i <= j { columns.upper(i, j) } else { 0.0 }
                };
                Metric::of_upper(&(0..d * d).map(entry).collect::<Vec<f32>>(), d)
            });
        let (mut v, mut found) = (vec![[0f32; LANES]; d], vec![[0f32; LANES]; d]);
        let mut scratch = Vec::new();
        let (mut x, mut y) = (vec![0f32; d], vec![0i16; d]);
        for first in (0..rows).step_by(LANES) {
            let count = LANES.min(rows - first);
            for (v, column) in v.iter_mut().zip(columns.values.chunks_exact(rows)) {
                v[..count].copy_from_slice(&column[first..first + count]);
                v[count..].fill(0.0);
            }
            let search = options.search.engine();
            search_lanes(search, &v, part.lattice.pulses(), &mut found, &mut scratch);
            for lane in 0..count {
                let row = first + lane;
                for j in 0..d {
                    (x[j], y[j]) = (v[j][lane], found[j][lane] as i16);
                }
                match (options.refine, &metric) {
                    (Refine::None, _) => {}
                    (Refine::Metric, Some(metric)) => refine_under(metric, &x, &mut y),
                    _ => refine(&x, &mut y),
                }
                let squared: i32 = y.iter().map(|y| i32::from(*y) * i32::from(*y)).sum();
                let length = match (options.length, &metric) {
                    (Length::Metric, Some(metric)) => amplitude_under(metric, &x, &y),
                    (Length::Norm, _) => x.iter().map(|x| x * x).sum::<f32>().sqrt(),
                    _ => {
                        let dot: f32 = x.iter().zip(&y).map(|(x, y)| x * f32::from(*y)).sum();
                        dot / (squared as f32).sqrt()
                    }
                };
                let norm = state.norms[row];
                let code = if norm > 0.0 { part.amplitudes.encode(length / norm) } else { 0 };
                let scale = Codec::scale(part, norm, code, squared as u32);
                for (column, y) in columns.values.chunks_exact_mut(rows).zip(&y) {
                    column[row] = f32::from(*y) * scale;
                }
                let start = row * self.width + columns.position;
                state.points[start..start + d].copy_from_slice(&y);
                state.lengths[row * self.codec.groups() + group] = code;
            }
        }
    }
}
