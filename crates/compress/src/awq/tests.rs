//! Tests of the mathematics of `awq`.
use super::*;
use crate::grid::GridOptions;
use crate::statistics::{AbsoluteMean, Gram};

const W: [f32; 8] = [0.9, 0.02, -0.4, 0.3, -0.7, 0.05, 0.8, -0.1];
const X: [f32; 8] = [1.0, 10.0, 0.5, 2.0, -1.0, 8.0, 0.7, -2.0];

fn grid(bits: u8) -> Grid {
    Grid::new(&GridOptions { bits, ..Default::default() }).unwrap()
}

fn hand() -> (Matrix, Gram, Vec<f32>) {
    let mut gram = Gram::new(4);
    gram.add(&X);
    let mut mean = AbsoluteMean::new(4);
    mean.add(&X);
    (Matrix::new(2, 4, W.to_vec()).unwrap(), gram, mean.mean())
}

#[test]
fn search_by_hand() {
    let (matrix, gram, x_mean) = hand();
    assert_eq!(x_mean, [1.0, 9.0, 0.6, 2.0]);
    let quarter = scales(&x_mean, None, Search::Plain, 0.25);
    for (a, b) in quarter.iter().zip([0.809936, 1.402851, 0.712834, 0.963182]) {
        assert!((a - b).abs() < 1e-5, "{quarter:?}");
    }
    let all = candidates(&x_mean, None, &AwqOptions::default(), |_| {});
    let losses = linear_losses(&[&matrix], &all, &gram.covariance(), &grid(3), 4);
    // The stored scale is half precision, hence the tolerance.
    for (k, expected) in [(0, 0.130994), (5, 0.095557), (10, 0.042563), (15, 0.014727)] {
        let loss = losses[k + 1];
        assert!((loss / expected - 1.0).abs() < 2e-2, "a = {}: {loss}", k as f64 / 20.0);
    }
    let chosen = best("t", &losses).unwrap();
    assert_eq!(all[chosen].ratio, Some(0.95));
    assert!((losses[chosen] / 0.004804 - 1.0).abs() < 5e-2, "{}", losses[chosen]);
}

#[test]
fn exponent_zero_is_the_identity() {
    let (matrix, _, x_mean) = hand();
    let zero = scales(&x_mean, None, Search::Plain, 0.0);
    assert_eq!(zero, [1.0; 4]);
    let mut rounded = matrix.values.clone();
    rounded.chunks_mut(4).for_each(|group| {
        grid(3).fake_quantize(group);
    });
    assert_eq!(scaled_fake_quantize(&matrix, &zero, &grid(3), 4), rounded);
}

#[test]
fn scales_are_normalised_and_blind_to_the_unit() {
    let x_mean = [0.3f32, 2.0, 0.0, 7.0];
    let scaled: Vec<f32> = x_mean.iter().map(|x| x * 7.0).collect();
    let w_mean = [0.4f32, 0.1, 0.2, 0.3];
    for (search, w) in [(Search::Plain, None), (Search::Duo, Some(&w_mean[..]))] {
        let a = scales(&x_mean, w, search, 0.4);
        let b = scales(&scaled, w, search, 0.4);
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 1e-4 * a.abs(), "{a} {b}");
        }
        assert_eq!(a[2], 1.0, "a dead channel keeps the factor 1");
        let live = [a[0], a[1], a[3]];
        let product = live.iter().fold(0f32, |m, &s| m.max(s))
            * live.iter().fold(f32::INFINITY, |m, &s| m.min(s));
        assert!((product - 1.0).abs() < 1e-5);
    }
}

#[test]
fn gram_path_equals_token_path() {
    let (matrix, gram, x_mean) = hand();
    let all = candidates(&x_mean, None, &AwqOptions::default(), |_| {});
    let by_gram = linear_losses(&[&matrix], &all, &gram.covariance(), &grid(3), 4);
    for (candidate, by_gram) in all.iter().zip(&by_gram) {
        let q = scaled_fake_quantize(&matrix, &candidate.scales, &grid(3), 4);
        let mut loss = 0f64;
        for x in X.chunks(4) {
            for row in 0..2 {
                let d: f32 =
                    (0..4).map(|i| x[i] * (matrix.values[row * 4 + i] - q[row * 4 + i])).sum();
                loss += f64::from(d * d) / 4.0;
            }
        }
        assert!((loss - by_gram).abs() <= 1e-4 * loss, "{loss} {by_gram}");
    }
}

#[test]
fn duo_never_loses_to_rounding() {
    let (matrix, gram, x_mean) = hand();
    let w_mean = weight_mean(&[&matrix], 4);
    let options = AwqOptions { search: Search::Duo, ..Default::default() };
    let all = candidates(&x_mean, Some(&w_mean), &options, |_| {});
    let losses = linear_losses(&[&matrix], &all, &gram.covariance(), &grid(3), 4);
    assert!(losses[best("t", &losses).unwrap()] <= losses[0]);
    assert!((weight_mean(&[&matrix], 4)[0] - (1.0 + 0.7 / 0.8) / 2.0).abs() < 1e-4);
}

#[test]
fn clip_finds_the_smallest_error_of_every_group() {
    let mut rng = tensor::Rng::new(5);
    let matrix =
        Matrix::new(3, 16, (0..48).map(|_| (rng.normal() as f32).powi(3)).collect()).unwrap();
    let mut sample = TokenSample::new(16, 20, 512);
    let x: Vec<f32> = (0..320).map(|_| rng.normal() as f32).collect();
    sample.add(&x);
    let grid = grid(2);
    let clip = search_clip(&matrix, &sample, &grid, 8);
    assert_eq!(clip.histogram.iter().sum::<u64>(), 6);
    assert!(clip.histogram[0] < 6, "2-bit groups with heavy tails want clipping");
    for row in 0..3 {
        for g in 0..2 {
            let group = &matrix.values[row * 16 + g * 8..][..8];
            let largest = group.iter().fold(0f32, |m, w| m.max(w.abs()));
            let error = |limit: f32| -> f64 {
                let mut q: Vec<f32> = group.iter().map(|w| w.clamp(-limit, limit)).collect();
                grid.fake_quantize(&mut q);
                x.chunks(16)
                    .map(|x| {
                        let d: f64 = (0..8)
                            .map(|i| f64::from(x[g * 8 + i]) * f64::from(q[i] - group[i]))
                            .sum();
                        d * d
                    })
                    .sum()
            };
            let smallest = (0..CLIP_STEPS)
                .map(|step| error(clip_limit(largest, step)))
                .fold(f64::INFINITY, f64::min);
            let chosen = error(clip.limits[row * 2 + g]);
            assert!(chosen <= smallest * (1.0 + 1e-4), "{chosen} {smallest}");
        }
    }
    let mut clipped = matrix.clone();
    apply_clip(&mut clipped, &clip.limits, 8);
    for (i, w) in clipped.values.iter().enumerate() {
        assert!(w.abs() <= clip.limits[i / 16 * 2 + i % 16 / 8]);
    }
}

#[test]
fn repeats_share_a_scale() {
    // 2 value heads of width 2, 2 repeats.
    let mut scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 8.0];
    tie_repeats(&mut scales, 2, 2, GqaFold::Mean);
    assert_eq!(scales, [2.0, 3.0, 2.0, 3.0, 7.0, 7.0, 7.0, 7.0]);
    let mut scales = [1.0, 2.0, 3.0, 4.0];
    tie_repeats(&mut scales, 1, 2, GqaFold::Max);
    assert_eq!(scales, [3.0, 4.0, 3.0, 4.0]);
}

#[test]
fn overflowing_scales_are_rejected() {
    let matrix = Matrix::new(1, 2, vec![60000.0, 1.0]).unwrap();
    assert!(fits_half(&matrix, &[1.0, 1.0]));
    assert!(!fits_half(&matrix, &[2.0, 1.0]));
    assert!(best("blk.o_proj", &[f64::NAN, f64::INFINITY]).is_err());
}

#[test]
fn fixed_scale_marks_the_largest_activations() {
    let options = AwqOptions { fixed_scale: Some(2.0), ..Default::default() };
    let all = candidates(&[1.0, 9.0, 0.6, 2.0], None, &options, |_| {});
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].scales, [1.0; 4]);
    assert_eq!(all[1].scales, [1.0, 2.0, 1.0, 1.0]);
    // 1 % of 200 channels are two; of equal ones the first count.
    let mut x_mean = vec![1.0; 200];
    x_mean[150] = 3.0;
    let all = candidates(&x_mean, None, &options, |_| {});
    let scaled: Vec<usize> = (0..200).filter(|&c| all[1].scales[c] == 2.0).collect();
    assert_eq!(scaled, [0, 150]);
}

#[test]
fn scores_of_channels_by_hand() {
    let matrix = Matrix::new(2, 3, vec![3.0, 0.0, -1.0, 4.0, 2.0, 1.0]).unwrap();
    assert_eq!(column_norms(&matrix), [5.0, 2.0, 2f32.sqrt()]);
    assert_eq!(largest_channels(&[0.5, 2.0, 2.0, 1.0], 0.5), [1, 2]);
    assert_eq!(largest_channels(&[0.5, 2.0, 2.0, 1.0], 0.01), [1]);
    assert_eq!(largest_channels(&[0.5, 2.0, 2.0, 1.0], 1.0), [0, 1, 2, 3]);
}

#[test]
fn contradictions_are_refused() {
    let bad = |change: fn(&mut AwqOptions)| {
        let mut options = AwqOptions::default();
        change(&mut options);
        options.check().unwrap_err().to_string()
    };
    assert!(bad(|o| o.fixed_scale = Some(0.0)).contains("positive"));
    assert!(bad(|o| (o.fixed_scale, o.no_scale) = (Some(2.0), true)).contains("--no-scale"));
    assert!(bad(|o| o.keep_channels = Some(101.0)).contains("(0, 100]"));
    assert!(bad(|o| (o.keep_channels, o.rounding) = (Some(1.0), Rounding::Gptq)).contains("rtn"));
    let applied = |o: &mut AwqOptions| {
        (o.apply_search, o.keep_channels) = (Some("x".into()), Some(1.0));
    };
    assert!(bad(applied).contains("--keep-by"));
}
