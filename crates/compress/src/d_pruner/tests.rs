//! The formulas of the importance by hand, and what must follow from them.

use super::*;
use tensor::Rng;

const W: [f32; 4] = [1.0, -2.0, 0.5, 0.0];
const G: [f32; 4] = [0.5, 0.25, 0.0, 3.0];
const GENERAL: [f32; 4] = [1.0, 3.0, 2.0, 2.0];

fn step(formula: Formula, general: &[f32], fisher: &[f32]) -> Vec<f32> {
    let mut scores = vec![0f32; W.len()];
    accumulate(formula, &W, &G, general, fisher, &mut scores);
    scores
}

fn close(found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len());
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1e-3), "{found:?} is not {wanted:?}");
    }
}

#[test]
fn normalised_by_hand() {
    // mean(G) = 2; mean(g²) = (0.25 + 0.0625 + 9) / 4 = 2.328125.
    let h = 2.328125;
    let wanted = [0.5 * (1.0 + 0.5 * 0.25 / h), 0.5 * (1.0 + 1.5 * 0.0625 / h), 0.0, 0.0];
    close(&step(Formula::Normalised { lambda: 1.0 }, &GENERAL, &[]), &wanted);
    // Free of the scale of G.
    let scaled: Vec<f32> = GENERAL.iter().map(|g| g * 1e6).collect();
    close(&step(Formula::Normalised { lambda: 1.0 }, &scaled, &[]), &wanted);
}

#[test]
fn paper_by_hand() {
    let fisher = [0.25, 0.0625, 0.0, 9.0];
    // g' = g + f G g H with f = 2: 0.5 + 2·1·0.5·0.25 = 0.75; 0.25 + 2·3·0.25·0.0625 = 0.34375.
    let plus = [0.75 + 0.125, (0.34375f32 * -2.0 + 0.5 * 4.0 * 0.0625).abs(), 0.0, 0.0];
    close(&step(Formula::Paper { factor: 2.0, sign: 1.0 }, &GENERAL, &fisher), &plus);
    let minus = [0.75 - 0.125, 0.6875 + 0.125, 0.0, 0.0];
    close(&step(Formula::Paper { factor: 2.0, sign: -1.0 }, &GENERAL, &fisher), &minus);
}

#[test]
fn reference_by_hand() {
    // t = g · 65536 = 32768, 16384, 0, 196608; the factor is chosen so that it matters.
    let f = 1e-5f64;
    let p = |t: f64, g: f64, w: f64| (t + f * g * t * t) * w;
    let score = |p: f64, w: f64| (p + p * p / 2000.0 + w * w * w).abs() as f32;
    let wanted = [score(p(32768.0, 1.0, 1.0), 1.0), score(p(16384.0, 3.0, -2.0), -2.0), 0.125, 0.0];
    close(&step(Formula::Reference { factor: f as f32 }, &GENERAL, &[]), &wanted);
}

#[test]
fn no_lambda_is_the_gradient_alone_in_every_mode() {
    let fisher = [0.25, 0.0625, 0.0, 9.0];
    for mode in [Mode::Normalised, Mode::Paper, Mode::Reference] {
        let options = DPrunerOptions {
            importance_mode: mode,
            lambda: Some(0.0),
            alpha: Some(0.03),
            ..DPrunerOptions::default()
        };
        let formula = options.formula(0.03);
        let fisher: &[f32] = if mode == Mode::Paper { &fisher } else { &[] };
        close(&step(formula, &GENERAL, fisher), &step(formula, &[], fisher));
    }
    let gradient = DPrunerOptions { importance_mode: Mode::Gradient, ..DPrunerOptions::default() };
    close(&step(gradient.formula(0.0), &[], &[]), &[0.5, 0.5, 0.0, 0.0]);
}

#[test]
fn a_weight_without_gradient_has_no_score_but_in_the_reference() {
    let zero = |formula, fisher: &[f32]| {
        let mut scores = [0f32; 2];
        accumulate(formula, &[0.5, -0.5], &[0.0, 0.0], &[1.0, 2.0], fisher, &mut scores);
        scores
    };
    assert_eq!(zero(Formula::Normalised { lambda: 1.0 }, &[]), [0.0; 2]);
    assert_eq!(zero(Formula::Paper { factor: 1.0, sign: 1.0 }, &[0.0; 2]), [0.0; 2]);
    assert_eq!(zero(Formula::Reference { factor: 1.0 }, &[]), [0.125; 2], "|w|³");
}

#[test]
fn constant_general_importance_leaves_the_order_to_the_domain() {
    let mut rng = Rng::new(3);
    let n = 2 * CHUNK + 77;
    let (mut w, mut g) = (vec![0f32; n], vec![0f32; n]);
    rng.fill_normal(&mut w, 1.0);
    rng.fill_normal(&mut g, 1e-6);
    let score = |general: &[f32]| {
        let mut scores = vec![0f32; n];
        accumulate(Formula::Normalised { lambda: 1.0 }, &w, &g, general, &[], &mut scores);
        scores
    };
    let (ones, sevens) = (score(&vec![1.0; n]), score(&vec![7.0; n]));
    let square = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>() / n as f64;
    for i in 0..n {
        assert!((ones[i] - sevens[i]).abs() <= 1e-6 * ones[i]);
        let domain = f64::from(g[i] * w[i]).abs() * (1.0 + f64::from(g[i]).powi(2) / square);
        assert!((f64::from(ones[i]) - domain).abs() <= 1e-5 * domain, "{i}");
    }
}

#[test]
fn tiny_gradients_do_not_vanish_or_overflow() {
    let mut scores = [0f32; 2];
    let (w, g) = ([1.0, 1.0], [1e-22f32, 2e-22]);
    accumulate(Formula::Normalised { lambda: 1.0 }, &w, &g, &[1e-20, 1e-20], &[], &mut scores);
    // mean(g²) = 2.5e-44: |g w| (1 + g²/mean).
    assert!((scores[0] / 1.4e-22 - 1.0).abs() < 1e-4 && (scores[1] / 5.2e-22 - 1.0).abs() < 1e-4);
}

#[test]
fn the_order_of_batches_does_not_matter_while_weights_stand_still() {
    let mut rng = Rng::new(4);
    let n = 1000;
    let (mut w, mut general) = (vec![0f32; n], vec![0f32; n]);
    rng.fill_normal(&mut w, 1.0);
    rng.fill_uniform(&mut general, 0.1, 2.0);
    let gradients: Vec<Vec<f32>> = (0..20)
        .map(|_| {
            let mut g = vec![0f32; n];
            rng.fill_normal(&mut g, 0.01);
            g
        })
        .collect();
    for formula in [Formula::Normalised { lambda: 1.0 }, Formula::Reference { factor: 1e-9 }] {
        let sum = |order: &[usize]| {
            let mut scores = vec![0f32; n];
            for &batch in order {
                accumulate(formula, &w, &gradients[batch], &general, &[], &mut scores);
            }
            scores
        };
        let (there, back) =
            (sum(&(0..20).collect::<Vec<_>>()), sum(&(0..20).rev().collect::<Vec<_>>()));
        for (a, b) in there.iter().zip(&back) {
            assert!((a - b).abs() <= 1e-5 * a, "{a} {b}");
        }
    }
}

#[test]
fn the_fisher_mean_runs() {
    let mut fisher = vec![0f32; 2];
    for (count, g) in [[1.0f32, 2.0], [3.0, 0.0], [2.0, 4.0]].iter().enumerate() {
        update_fisher(&mut fisher, g, count as u64 + 1);
    }
    close(&fisher, &[14.0 / 3.0, 20.0 / 3.0]);
}

#[test]
fn defaults_by_mode_and_refusals() {
    let of = |mode| DPrunerOptions { importance_mode: mode, ..DPrunerOptions::default() };
    let normalised = of(Mode::Normalised);
    assert_eq!((normalised.lambda(), normalised.alpha(), normalised.epochs()), (1.0, 0.0, 1));
    let paper = of(Mode::Paper);
    assert_eq!((paper.lambda(), paper.alpha(), paper.epochs()), (0.1, 0.03, 5));
    // 2 · 0.1 · 0.03² = 1.8e-4; the reference divides by 1000.
    let Formula::Paper { factor, .. } = paper.formula(0.03) else { panic!() };
    assert!((factor - 1.8e-4).abs() < 1e-9);
    let Formula::Reference { factor } = of(Mode::Reference).formula(0.03) else { panic!() };
    assert!((factor - 1.8e-7).abs() < 1e-12);
    let base = DPrunerOptions::default;
    for (bad, word) in [
        (DPrunerOptions { lambda: Some(-1.0), ..base() }, "lambda"),
        (DPrunerOptions { alpha: Some(f64::NAN), ..base() }, "alpha"),
        (DPrunerOptions { epochs: Some(0), ..base() }, "epochs"),
        (DPrunerOptions { domain_length: 1, ..base() }, "domain-length"),
        (DPrunerOptions { domain_batch: 0, ..base() }, "domain-batch"),
        (DPrunerOptions { general_sparsity: 1.0, ..base() }, "general-sparsity"),
        (DPrunerOptions { warmup: 2.0, ..base() }, "warmup"),
    ] {
        let error = bad.check().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(base().check().is_ok());
}
