//! SparseGPT by hand, and against the same equations in f64 without blocks or threads.

use super::*;
use crate::gptq::GptqOptions;
use crate::mask::{Scope, build, magnitude_scores};
use crate::statistics::{Gram, quadratic_error};
use tensor::Rng;

const HAND: Target = Target {
    sparsity: 0.5,
    structure: Structure::Unstructured,
    count: Count::Threshold,
    block_size: 128,
};

fn factor(gram: &Gram) -> Factor {
    Factor::new("m", gram, &GptqOptions::default()).unwrap()
}

fn hand() -> (Matrix, Gram) {
    let mut gram = Gram::new(3);
    gram.add(&[1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 1.0]);
    (Matrix::new(2, 3, vec![1.0, -2.0, 0.5, 0.3, 0.4, -1.0]).unwrap(), gram)
}

/// Random inputs whose channels move together, and weights.
fn random(out: usize, width: usize, seed: u64) -> (Matrix, Gram) {
    let mut rng = Rng::new(seed);
    let mut values = vec![0f32; out * width];
    rng.fill_normal(&mut values, 1.0);
    let mut gram = Gram::new(width);
    let mut x = vec![0f32; 4 * width * width];
    rng.fill_normal(&mut x, 1.0);
    for row in x.chunks_mut(width) {
        let common = row[0];
        row.iter_mut().enumerate().for_each(|(j, v)| *v = *v * (0.3 + (j % 5) as f32) + common);
    }
    gram.add(&x);
    (Matrix::new(out, width, values).unwrap(), gram)
}

fn close(found: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(found.len(), wanted.len());
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{i}: {a} is not {b}");
    }
}

#[test]
fn hessian_factor_scores_and_weights_by_hand() {
    let (matrix, gram) = hand();
    // Four sequences of one token: 2/4 Σ x xᵀ.
    close(
        &gram.hessian().iter().map(|h| *h as f32).collect::<Vec<_>>(),
        &[3.0, 0.5, 1.5, 0.5, 1.0, 0.5, 1.5, 0.5, 1.5],
        1e-6,
    );
    let factor = factor(&gram);
    close(
        factor.upper(),
        &[0.8067658, -0.0057055, -0.7951455, 0.0, 1.0823125, -0.3564147, 0.0, 0.0, 0.8115522],
        1e-6,
    );
    let mut importance = vec![0f32; 6];
    let pruned = prune("m", &matrix, &factor, &HAND, Some(&mut importance)).unwrap();
    close(&importance, &[1.5364026, 3.4147164, 0.3795833, 0.1382762, 0.1365887, 1.5183333], 1e-6);
    // The reference prunes up to the value at place ⌊6 · 0.5⌋ of the sorted scores: four of six.
    assert_eq!(pruned.values, [1.0, -2.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(pruned.mask.count(), 4);
    let exact =
        prune("m", &matrix, &factor, &Target { count: Count::Exact, ..HAND }, None).unwrap();
    assert_eq!(exact.mask.count(), 3);
    assert_eq!(exact.values[..5], [1.0, -2.0, 0.0, 0.0, 0.0]);
}

#[test]
fn the_conditional_diagonal_differs_from_the_inverse_but_for_the_first_column() {
    let (_, gram) = hand();
    let upper = factor(&gram).upper().to_vec();
    let inverse = |j: usize| (0..3).map(|k| upper[k * 3 + j] * upper[k * 3 + j]).sum::<f32>();
    let found: Vec<f32> = (0..3).map(|j| 1.0 / inverse(j)).collect();
    close(&found, &[1.5364026, 0.8536554, 0.705266], 1e-6);
    assert!((1.0 / (upper[0] * upper[0]) - found[0]).abs() < 1e-6);
}

/// The equations one weight at a time, in f64.
fn slow(matrix: &Matrix, upper: &[f32], target: &Target) -> (Vec<f64>, f64) {
    let (out, width) = (matrix.out_features, matrix.in_features);
    let mut w: Vec<f64> = matrix.values.iter().map(|w| f64::from(*w)).collect();
    let u = |i: usize, j: usize| f64::from(upper[i * width + j]);
    let mut loss = 0.0;
    let score = |w: &[f64], row: usize, j: usize| (w[row * width + j] / u(j, j)).powi(2);
    for start in (0..width).step_by(target.block_size) {
        let end = (start + target.block_size).min(width);
        let mut pruned = vec![false; out * width];
        if target.structure == Structure::Unstructured {
            let mut all: Vec<(f64, usize)> = (0..out)
                .flat_map(|row| (start..end).map(move |j| (row, j)))
                .map(|(row, j)| (score(&w, row, j), row * width + j))
                .collect();
            all.sort_by(|a, b| a.partial_cmp(b).unwrap());
            let count = target.count.of(all.len(), target.sparsity);
            all[..count].iter().for_each(|(_, at)| pruned[*at] = true);
        }
        for j in start..end {
            for row in 0..out {
                if let Structure::Blocks { keep, of } = target.structure
                    && (j - start) % of == 0
                {
                    let mut group: Vec<(f64, usize)> =
                        (j..j + of).map(|k| (score(&w, row, k), row * width + k)).collect();
                    group.sort_by(|a, b| a.partial_cmp(b).unwrap());
                    group[..of - keep].iter().for_each(|(_, at)| pruned[*at] = true);
                }
                let value = w[row * width + j];
                let q = if pruned[row * width + j] { 0.0 } else { value };
                let error = (value - q) / u(j, j);
                loss += error * error / 2.0;
                w[row * width + j] = q;
                for k in j + 1..width {
                    w[row * width + k] -= error * u(j, k);
                }
            }
        }
    }
    (w, loss)
}

#[test]
fn blocks_panels_and_chunks_agree_with_the_equations() {
    for (out, width, seed) in [(3, 10, 1), (70, 150, 2), (130, 40, 3)] {
        let (matrix, gram) = random(out, width, seed);
        let factor = factor(&gram);
        for sparsity in [0.3, 0.52, 0.8] {
            for block_size in [8, 128] {
                let target = Target { sparsity, block_size, ..HAND };
                let found = prune("m", &matrix, &factor, &target, None).unwrap();
                let (wanted, loss) = slow(&matrix, factor.upper(), &target);
                let wanted: Vec<f32> = wanted.iter().map(|w| *w as f32).collect();
                close(&found.values, &wanted, 2e-4);
                assert!((found.loss - loss).abs() < 1e-3 * loss, "{} {loss}", found.loss);
                let zeros = wanted.iter().filter(|w| **w == 0.0).count();
                assert_eq!(found.mask.count(), zeros);
            }
        }
    }
}

#[test]
fn patterns_agree_with_the_equations() {
    for (text, width) in [("2:4", 152), ("4:8", 152), ("1:3", 150)] {
        let structure: Structure = text.parse().unwrap();
        let (matrix, gram) = random(70, width, 4);
        let factor = factor(&gram);
        let block_size = if text == "1:3" { 48 } else { 64 };
        let target = Target { structure, block_size, ..HAND };
        let found = prune("m", &matrix, &factor, &target, None).unwrap();
        assert!(found.mask.fits(structure), "{text}");
        assert_eq!(Some(found.mask.sparsity()), structure.sparsity());
        let wanted: Vec<f32> =
            slow(&matrix, factor.upper(), &target).0.iter().map(|w| *w as f32).collect();
        close(&found.values, &wanted, 2e-4);
        // The importance of a pattern is taken at the start of a block, like any other.
        let mut importance = vec![0f32; 70 * width];
        let again = prune("m", &matrix, &factor, &target, Some(&mut importance)).unwrap();
        assert_eq!(again.values, found.values);
        assert!(importance.iter().all(|g| *g > 0.0));
    }
    let (matrix, gram) = random(4, 10, 5);
    let target = Target { structure: Structure::TWO_OF_FOUR, ..HAND };
    let error = prune("layer.q", &matrix, &factor(&gram), &target, None).unwrap_err().to_string();
    assert!(error.contains("layer.q") && error.contains("10"), "{error}");
}

#[test]
fn nothing_pruned_is_bit_identical() {
    let (mut matrix, _) = random(70, 40, 6);
    matrix.values[7] = -0.0;
    // One input is never excited.
    let mut gram = Gram::new(40);
    let mut x = vec![0f32; 200 * 40];
    Rng::new(7).fill_normal(&mut x, 1.0);
    x.chunks_mut(40).for_each(|row| row[3] = 0.0);
    gram.add(&x);
    let factor = factor(&gram);
    assert_eq!(factor.dead(), [3]);
    let none = prune("m", &matrix, &factor, &Target { sparsity: 0.0, ..HAND }, None).unwrap();
    let bits = |values: &[f32]| values.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    assert!(bits(&none.values) == bits(&matrix.values));
    assert_eq!(none.mask.count(), 0);
    let some = prune("m", &matrix, &factor, &Target { sparsity: 0.3, ..HAND }, None).unwrap();
    assert!(some.values.chunks(40).all(|row| row[3] == 0.0), "dead inputs go first");
}

#[test]
fn white_inputs_give_magnitude_pruning_without_compensation() {
    let (matrix, _) = random(65, 32, 8);
    let mut gram = Gram::new(32);
    for i in 0..32 {
        let mut x = vec![0f32; 32];
        x[i] = 4.0;
        gram.add(&x);
    }
    let found = prune("m", &matrix, &factor(&gram), &HAND, None).unwrap();
    let scores = magnitude_scores(&matrix.values);
    let mask =
        build(&scores, [65, 32], 0.5, Structure::Unstructured, Scope::Matrix, Count::Threshold);
    assert_eq!(found.mask, mask);
    let mut wanted = matrix.values.clone();
    mask.apply(&mut wanted);
    assert_eq!(found.values, wanted);
}

#[test]
fn compensation_lowers_the_error_of_the_same_mask() {
    for seed in 10..13 {
        let (matrix, gram) = random(32, 96, seed);
        let found = prune("m", &matrix, &factor(&gram), &HAND, None).unwrap();
        let mut masked = matrix.values.clone();
        found.mask.apply(&mut masked);
        let covariance = gram.covariance();
        let error = |values: &[f32]| {
            let d: Vec<f32> = matrix.values.iter().zip(values).map(|(a, b)| a - b).collect();
            quadratic_error(&d, &covariance, 96)
        };
        assert!(error(&found.values) < 0.9 * error(&masked));
    }
}

#[test]
fn ties_over_rows_are_cut_at_the_count() {
    let matrix = Matrix::new(130, 8, vec![1.0; 130 * 8]).unwrap();
    let mut gram = Gram::new(8);
    (0..8).for_each(|i| {
        let mut x = vec![0f32; 8];
        x[i] = 1.0;
        gram.add(&x);
    });
    let found =
        prune("m", &matrix, &factor(&gram), &Target { count: Count::Exact, ..HAND }, None).unwrap();
    assert_eq!(found.mask.count(), 130 * 4);
    assert!(found.mask.pruned[..130 * 4].iter().all(|p| *p), "the first rows");
}

#[test]
fn refusals() {
    let (matrix, gram) = random(4, 8, 20);
    let other = Matrix::new(2, 4, vec![1.0; 8]).unwrap();
    let error = prune("layer.o", &other, &factor(&gram), &HAND, None).unwrap_err().to_string();
    assert!(error.contains("layer.o") && error.contains('4') && error.contains('8'), "{error}");
    let mut huge = matrix.clone();
    huge.values[0] = 1e30;
    let error = prune("layer.o", &huge, &factor(&gram), &HAND, None).unwrap_err().to_string();
    assert!(error.contains("layer.o") && error.contains("damping"), "{error}");
    let check =
        |damping, block_size, structure| SparseGptOptions { damping, block_size }.check(structure);
    assert!(check(0.01, 128, Structure::TWO_OF_FOUR).is_ok());
    for bad in [
        check(0.0, 128, Structure::Unstructured),
        check(1.5, 128, Structure::Unstructured),
        check(0.01, 0, Structure::Unstructured),
        check(0.01, 126, Structure::TWO_OF_FOUR),
    ] {
        assert!(bad.is_err());
    }
}

#[test]
fn a_hessian_that_cannot_be_factorised_gets_ten_times_the_damping() {
    // Eigenvalues 2.5 and -0.5: more than half of the mean of the diagonal must be added.
    let hessian = vec![1.0, 1.5, 1.5, 1.0];
    let options = GptqOptions::default();
    assert!(Factor::of_hessian("layer.v", hessian.clone(), 2, 4, &options).is_err());
    let factor = Factor::tenfold("layer.v", hessian, 2, 4, 0.01).unwrap();
    assert!(factor.damping() > 0.5 && factor.damping() < 1.0, "{}", factor.damping());
    // Beyond all damping.
    let error =
        Factor::tenfold("layer.v", vec![1.0, 1e4, 1e4, 1.0], 2, 4, 0.01).unwrap_err().to_string();
    for phrase in ["layer.v", "4 tokens", "--exclude"] {
        assert!(error.contains(phrase), "{error}");
    }
    let nan = Factor::tenfold("layer.v", vec![f64::NAN, 0.0, 0.0, 1.0], 2, 4, 0.01).unwrap_err();
    assert!(nan.to_string().contains("input 0 are NaN or infinite"), "{nan}");
    let zero = Factor::tenfold("layer.v", vec![0.0; 4], 2, 4, 0.01).unwrap_err().to_string();
    assert!(zero.contains("layer.v") && zero.contains("excites"), "{zero}");
}
