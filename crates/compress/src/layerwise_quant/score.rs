//! How important a block is: the scores, and the order that follows from them.

use super::{Cosine, LayerScore, LayerwiseQuantOptions};
use crate::block::Calibration;
use crate::stream::{Probe, Stream};
use crate::{Error, Result};
use nn::{Batch, Model, Overlay, Point, Site, Tap, Taps};
use rayon::prelude::*;
use std::path::Path;
use tensor::{Tensor, host};

/// One score per block and what was noticed on the way.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The score as its authors define it.
    pub values: Vec<f64>,
    /// Whether a larger score means a more important block.
    pub larger_first: bool,
    /// Things the user should know.
    pub notes: Vec<String>,
}

impl Scores {
    /// Blocks, most important first; of equal ones the lower index first.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.values.len()).collect();
        let sign = if self.larger_first { 1.0 } else { -1.0 };
        order.sort_by(|&a, &b| {
            (sign * self.values[b]).total_cmp(&(sign * self.values[a])).then(a.cmp(&b))
        });
        order
    }

    /// Blocks by the mean of their ranks in both orders.
    pub fn combined(&self, other: &Self) -> Self {
        let mut ranks = vec![0.0; self.values.len()];
        for order in [self.order(), other.order()] {
            for (rank, block) in order.into_iter().enumerate() {
                ranks[block] += rank as f64 / 2.0;
            }
        }
        let notes = self.notes.iter().chain(&other.notes).cloned().collect();
        Self { values: ranks, larger_first: false, notes }
    }
}

/// The cosine of two vectors; `None` when one of them is zero.
///
/// # Errors
/// Vectors of different length: a block without a residual form has no such score.
pub fn cosine(input: &[f32], output: &[f32]) -> Result<Option<f64>> {
    if input.len() != output.len() {
        return Err(Error::Options(format!(
            "input and output have {} and {} values: layer input modification is defined for \
             residual blocks only; use --layer-score zd",
            input.len(),
            output.len()
        )));
    }
    let (mut dot, mut left, mut right) = (0f64, 0f64, 0f64);
    for (&a, &b) in input.iter().zip(output) {
        let (a, b) = (f64::from(a), f64::from(b));
        dot += a * b;
        left += a * a;
        right += b * b;
    }
    // One root of the product: equal sides give exactly 1.
    let norm = (left * right).sqrt();
    Ok((norm > 0.0).then(|| (dot / norm).clamp(-1.0, 1.0)))
}

/// Layer input modification of one block: minus the mean cosine between the residual stream
/// entering and leaving it. Also keeps the mean norm of what enters.
#[derive(Debug)]
pub struct InputModification {
    kind: Cosine,
    skip_first: bool,
    input: Vec<f32>,
    sum: f64,
    count: usize,
    zeros: usize,
    norms: f64,
    tokens: usize,
    failed: Option<&'static str>,
}

impl InputModification {
    /// A tap that scores the block it is run with; `skip_first` leaves out the first token of every
    /// sequence.
    pub fn new(kind: Cosine, skip_first: bool) -> Self {
        Self {
            kind,
            skip_first,
            input: Vec::new(),
            sum: 0.0,
            count: 0,
            zeros: 0,
            norms: 0.0,
            tokens: 0,
            failed: None,
        }
    }

    /// The score: between -1 (leaves its input as it is) and 1.
    pub fn score(&self) -> f64 {
        -self.sum / self.count.max(1) as f64
    }

    /// Mean norm of a token entering the block.
    pub fn input_norm(&self) -> f64 {
        self.norms / self.tokens.max(1) as f64
    }

    /// Cosines that were set to 0 because a side was zero.
    pub fn zeros(&self) -> usize {
        self.zeros
    }

    /// Adds sequences: `input` and `output` are `[sequences * length, width]`.
    ///
    /// # Errors
    /// As [`cosine`].
    pub fn add(&mut self, batch: &Batch, input: &[f32], output: &[f32]) -> Result<()> {
        let width = input.len() / batch.rows().max(1);
        if width == 0 {
            return Ok(());
        }
        let first = usize::from(self.skip_first && batch.length > 1);
        let sequence = batch.length * width;
        for (input, output) in input.chunks_exact(sequence).zip(output.chunks_exact(sequence)) {
            let (input, output) = (&input[first * width..], &output[first * width..]);
            let cosines: Vec<Option<f64>> = match self.kind {
                Cosine::Flat => vec![cosine(input, output)?],
                Cosine::Last => {
                    let at = input.len() - width;
                    vec![cosine(&input[at..], &output[at..])?]
                }
                Cosine::Token => input
                    .par_chunks_exact(width)
                    .zip(output.par_chunks_exact(width))
                    .map(|(a, b)| cosine(a, b))
                    .collect::<Result<_>>()?,
            };
            for value in cosines {
                self.zeros += usize::from(value.is_none());
                self.sum += value.unwrap_or(0.0);
                self.count += 1;
            }
            for token in input.chunks_exact(width) {
                let square: f64 = token.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                self.norms += square.sqrt();
                self.tokens += 1;
            }
        }
        Ok(())
    }
}

impl Tap for InputModification {
    fn wants(&self, site: Site) -> bool {
        site.block.is_some() && matches!(site.point, Point::ResidPre | Point::ResidPost)
    }

    fn at(&mut self, site: Site, batch: &Batch, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        if site.point == Point::ResidPre {
            self.input = host::read(&x, <[f32]>::to_vec);
            return Ok(x);
        }
        let input = std::mem::take(&mut self.input);
        let added = host::read(&x, |output| {
            if !input.iter().chain(output).all(|v| v.is_finite()) {
                self.failed = Some("hidden states are NaN or infinite on the calibration text");
                return Ok(());
            }
            self.add(batch, &input, output)
        });
        added.map_err(nn::Error::external)?;
        Ok(x)
    }
}

/// Share of weights more than `threshold` standard deviations above the mean (`two_sided`: from the
/// mean), over all `linears` of a block taken together; `per_linear`: the mean of their own shares.
/// Heavy tails make it smaller. Constant weights have none.
///
/// # Errors
/// NaN or infinite weights.
pub fn z_score_share(
    linears: &[Vec<f32>],
    threshold: f64,
    two_sided: bool,
    per_linear: bool,
) -> Result<f64> {
    if per_linear {
        let shares: Vec<f64> = linears
            .iter()
            .map(|linear| z_score_share(std::slice::from_ref(linear), threshold, two_sided, false))
            .collect::<Result<_>>()?;
        return Ok(shares.iter().sum::<f64>() / shares.len().max(1) as f64);
    }
    let count = linears.iter().map(Vec::len).sum::<usize>() as f64;
    if count == 0.0 {
        return Ok(0.0);
    }
    let total = |f: &(dyn Fn(f64) -> f64 + Sync)| -> f64 {
        let piece = |part: &[f32]| part.iter().map(|&w| f(f64::from(w))).sum::<f64>();
        // Pieces are added in order: the same on any number of threads.
        let pieces: Vec<f64> = linears
            .iter()
            .flat_map(|l| l.par_chunks(1 << 14).map(piece).collect::<Vec<_>>())
            .collect();
        pieces.iter().sum()
    };
    let mean = total(&|w| w) / count;
    let deviation = (total(&|w| (w - mean) * (w - mean)) / count).sqrt();
    if !deviation.is_finite() {
        return Err(Error::Options("weights are NaN or infinite".into()));
    }
    if deviation == 0.0 {
        return Ok(0.0);
    }
    let beyond = total(&|w| {
        let z = (w - mean) / deviation;
        f64::from(u8::from(if two_sided { z.abs() > threshold } else { z > threshold }))
    });
    Ok(beyond / count)
}

/// Scores every block of `model`.
///
/// # Errors
/// Scores that look at activations need calibration text; hidden states or weights that are NaN or
/// infinite are refused by block.
pub fn scores(
    model: &Model,
    options: &LayerwiseQuantOptions,
    calibration: &Calibration,
    memory: u64,
    scratch: &Path,
    round: &dyn Fn(&mut Overlay<'_>, usize) -> Result<()>,
) -> Result<Scores> {
    let blocks = model.decoder.num_blocks();
    let ranks = |order: Vec<usize>| {
        let mut values = vec![0.0; blocks];
        for (rank, block) in order.into_iter().enumerate() {
            values[block] = rank as f64;
        }
        Scores { values, larger_first: false, notes: Vec::new() }
    };
    Ok(match options.layer_score {
        LayerScore::First => ranks((0..blocks).collect()),
        LayerScore::Last => ranks((0..blocks).rev().collect()),
        LayerScore::Random => {
            let mut rng = tensor::Rng::stream(options.order_seed, "layer order");
            ranks(rng.permutation(blocks))
        }
        LayerScore::Zd => z_scores(model, options)?,
        LayerScore::Lim | LayerScore::ActivationNorm => {
            flow(model, options, calibration, memory, scratch)?
        }
        LayerScore::LimZd => {
            let lim = flow(model, options, calibration, memory, scratch)?;
            lim.combined(&z_scores(model, options)?)
        }
        LayerScore::Sensitivity => {
            let mut probe = Probe::new(model, calibration, options.probe_samples)?;
            let mut values = Vec::with_capacity(blocks);
            for block in 0..blocks {
                let mut changed = Overlay::new(model.weights.as_ref());
                round(&mut changed, block)?;
                values.push(probe.divergence(&changed)?);
                probe.advance()?;
            }
            Scores { values, larger_first: true, notes: Vec::new() }
        }
    })
}

fn z_scores(model: &Model, options: &LayerwiseQuantOptions) -> Result<Scores> {
    let mut values = Vec::new();
    for block in 0..model.decoder.num_blocks() {
        let linears: Vec<Vec<f32>> = model
            .decoder
            .linears(block)
            .iter()
            .map(|name| Ok(host::into_vec(model.weights.matrix(name)?)))
            .collect::<Result<_>>()?;
        let share = z_score_share(
            &linears,
            options.zd_threshold,
            options.zd_two_sided,
            options.zd_per_linear,
        );
        values.push(share.map_err(|e| Error::layer(format!("block {block}"), e.to_string()))?);
    }
    Ok(Scores { values, larger_first: false, notes: Vec::new() })
}

/// Layer input modification, or the norm of what enters: one forward pass.
fn flow(
    model: &Model,
    options: &LayerwiseQuantOptions,
    calibration: &Calibration,
    memory: u64,
    scratch: &Path,
) -> Result<Scores> {
    let calibration = calibration.first(options.score_samples)?;
    let mut stream = Stream::new(model, &calibration, memory, scratch)?;
    let (mut values, mut zeros) = (Vec::new(), 0);
    for block in 0..model.decoder.num_blocks() {
        let mut tap = InputModification::new(options.lim_cosine, options.lim_skip_first);
        stream.advance(&mut Taps::one(&mut tap))?;
        if let Some(reason) = tap.failed {
            return Err(Error::layer(format!("block {block}"), reason));
        }
        zeros += tap.zeros();
        values.push(match options.layer_score {
            LayerScore::ActivationNorm => tap.input_norm(),
            _ => tap.score(),
        });
    }
    let notes = (zeros > 0)
        .then(|| format!("{zeros} cosines were set to 0 because a hidden state was all zeros"));
    Ok(Scores { values, larger_first: true, notes: notes.into_iter().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lim(input: &[f32], output: &[f32], kind: Cosine, length: usize, skip: bool) -> f64 {
        let mut tap = InputModification::new(kind, skip);
        let rows = Batch::new(1, length);
        tap.add(&rows, input, output).unwrap();
        tap.score()
    }

    fn token(input: &[f32], output: &[f32]) -> f64 {
        lim(input, output, Cosine::Token, 1, false)
    }

    #[test]
    fn input_modification_by_hand() {
        assert!((token(&[1.0, 2.0, 2.0], &[2.0, 2.0, 1.0]) + 8.0 / 9.0).abs() < 1e-12);
        assert_eq!(token(&[1.0, -2.0, 3.0], &[3.0, -6.0, 9.0]), -1.0);
        assert_eq!(token(&[1.0, -2.0, 3.0], &[-1.0, 2.0, -3.0]), 1.0);
        assert_eq!(token(&[1.0, 0.0], &[0.0, 5.0]), 0.0);
        // Scaling either side changes nothing, nor does one rotation of both.
        let (a, b) = ([0.3f32, -1.2], [0.9f32, 0.4]);
        let plain = token(&a, &b);
        assert!((token(&a.map(|v| 7.0 * v), &b.map(|v| 0.25 * v)) - plain).abs() < 1e-7);
        let (sin, cos) = 0.7f32.sin_cos();
        let turn = |v: [f32; 2]| [cos * v[0] - sin * v[1], sin * v[0] + cos * v[1]];
        assert!((token(&turn(a), &turn(b)) - plain).abs() < 1e-6);
    }

    #[test]
    fn a_zero_side_counts_as_no_similarity() {
        let mut tap = InputModification::new(Cosine::Token, false);
        tap.add(&Batch::new(1, 2), &[0.0, 0.0, 1.0, 0.0], &[1.0, 1.0, 2.0, 0.0]).unwrap();
        assert_eq!((tap.score(), tap.zeros()), (-0.5, 1));
    }

    #[test]
    fn flat_last_and_skipping_the_first_token() {
        // A huge first token that does not change, and two that turn around.
        let input = [100.0f32, 0.0, 1.0, 0.0, 0.0, 1.0];
        let output = [100.0f32, 0.0, -1.0, 0.0, 0.0, -1.0];
        let of = |kind, skip| lim(&input, &output, kind, 3, skip);
        assert!((of(Cosine::Token, false) - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(of(Cosine::Token, true), 1.0);
        assert_eq!(of(Cosine::Last, false), 1.0);
        assert!((of(Cosine::Flat, false) + 9998.0 / 10002.0).abs() < 1e-12, "dominated");
        assert_eq!(of(Cosine::Flat, true), 1.0);
    }

    #[test]
    fn different_widths_have_no_input_modification() {
        let message = cosine(&[1.0, 2.0], &[1.0]).unwrap_err().to_string();
        assert!(message.contains("zd"), "{message}");
    }

    #[test]
    fn z_score_share_by_hand() {
        let weights = vec![0.0f32, 0.0, 0.0, 0.0, 1.0, -1.0, 3.0, -3.0];
        let share = |w: &[f32], two| z_score_share(&[w.to_vec()], 1.0, two, false).unwrap();
        assert_eq!((share(&weights, false), share(&weights, true)), (1.0 / 8.0, 2.0 / 8.0));
        let moved: Vec<f32> = weights.iter().map(|w| 5.0 * w + 2.0).collect();
        assert_eq!((share(&moved, false), share(&moved, true)), (1.0 / 8.0, 2.0 / 8.0));
        // One-sided looks at one tail: negation shows it the other.
        let lopsided = vec![0.0f32, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 4.0];
        let negated: Vec<f32> = lopsided.iter().map(|w| -w).collect();
        assert_eq!((share(&lopsided, false), share(&negated, false)), (2.0 / 8.0, 0.0));
        assert_eq!(share(&[2.5; 9], false), 0.0);
        assert!(z_score_share(&[vec![1.0, f32::NAN]], 1.0, false, false).is_err());
    }

    #[test]
    fn pooled_and_per_linear_differ_when_scales_do() {
        let narrow = vec![-0.01f32, 0.01, -0.01, 0.01];
        let wide = vec![0.0f32, 0.0, 0.0, 8.0];
        let both = [narrow, wide];
        assert_eq!(z_score_share(&both, 1.0, true, false).unwrap(), 1.0 / 8.0);
        assert_eq!(z_score_share(&both, 1.0, true, true).unwrap(), 1.0 / 8.0);
        let other = [vec![1.0f32, -1.0, 1.0, -1.0], vec![0.0, 0.0, 0.0, 8.0]];
        assert_eq!(z_score_share(&other, 0.9, true, true).unwrap(), (1.0 + 0.25) / 2.0);
        assert_eq!(z_score_share(&other, 0.9, true, false).unwrap(), 1.0 / 8.0);
    }

    #[test]
    fn gaussian_weights_have_the_gaussian_share() {
        let mut rng = tensor::Rng::new(11);
        let weights: Vec<f32> = (0..400_000).map(|_| rng.normal() as f32).collect();
        let share = |two| z_score_share(std::slice::from_ref(&weights), 1.0, two, false).unwrap();
        let sigma = (0.158_655f64 * 0.841_345 / 400_000.0).sqrt();
        assert!((share(false) - 0.158_655).abs() < 3.0 * sigma);
        assert!((share(true) - 0.317_311).abs() < 6.0 * sigma);
        // Heavier tails, smaller share.
        let heavy: Vec<f32> = weights.iter().map(|w| w * w * w).collect();
        assert!(z_score_share(&[heavy], 1.0, true, false).unwrap() < share(true));
    }

    #[test]
    fn orders_and_ties() {
        let scores = |values: &[f64], larger_first| Scores {
            values: values.to_vec(),
            larger_first,
            notes: Vec::new(),
        };
        let lim = scores(&[-0.9, -0.3, -0.9, -0.8], true);
        assert_eq!(lim.order(), [1, 3, 0, 2]);
        let zd = scores(&[0.1, 0.3, 0.2, 0.3], false);
        assert_eq!(zd.order(), [0, 2, 1, 3]);
        // Ranks (2 + 0, 0 + 2, 3 + 1, 1 + 3) / 2: ties by index.
        assert_eq!(lim.combined(&zd).values, [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(lim.combined(&zd).order(), [0, 1, 2, 3]);
    }
}
