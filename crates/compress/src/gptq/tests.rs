//! Tests of the mathematics of `gptq`.
use super::*;
use crate::grid::Granularity;
use crate::statistics::Gram;

fn random(out: usize, width: usize, seed: u64) -> Matrix {
    let mut rng = tensor::Rng::new(seed);
    Matrix::new(out, width, (0..out * width).map(|_| rng.normal() as f32).collect()).unwrap()
}

/// Correlated activations, so that compensation has something to do.
fn activations(tokens: usize, width: usize, seed: u64) -> Vec<f32> {
    let mut rng = tensor::Rng::new(seed);
    let mut x = vec![0f32; tokens * width];
    for row in x.chunks_mut(width) {
        let shared = rng.normal() as f32;
        for (i, x) in row.iter_mut().enumerate() {
            *x = shared + (0.2 + (i % 5) as f32 * 0.3) * rng.normal() as f32;
        }
    }
    x
}

fn gram(x: &[f32], width: usize) -> Gram {
    let mut gram = Gram::new(width);
    gram.add(x);
    gram
}

fn options(bits: u8, group_size: usize) -> GridOptions {
    GridOptions { bits, group_size, ..Default::default() }
}

fn run(matrix: &Matrix, gram: &Gram, grid: &GridOptions, options: &GptqOptions) -> GptqResult {
    let factor = Factor::new("t", gram, options).unwrap();
    quantize("t", matrix, &factor, &Grid::new(grid).unwrap(), grid, options).unwrap()
}

/// `tr((W - Q) H_damped (W - Q)ᵀ)` by plain loops in double precision.
pub(super) fn damped_error(matrix: &Matrix, q: &[f32], gram: &Gram, damping: f64) -> f64 {
    let n = matrix.in_features;
    let hessian = gram.hessian();
    let mut total = 0.0;
    for (w, q) in matrix.values.chunks(n).zip(q.chunks(n)) {
        let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
        for i in 0..n {
            for j in 0..n {
                let h = hessian[i * n + j] + if i == j { damping } else { 0.0 };
                total += d[i] * h * d[j];
            }
        }
    }
    total
}

#[test]
fn diagonal_hessian_is_rtn_bit_for_bit() {
    let matrix = random(9, 32, 1);
    let mut x = vec![0f32; 32 * 32];
    for i in 0..32 {
        x[i * 32 + i] = 1.0 + i as f32;
    }
    let gram = gram(&x, 32);
    for group_size in [16, 32] {
        for symmetric in [false, true] {
            let grid = GridOptions { symmetric, ..options(3, group_size) };
            let rounded = rtn::quantize(&matrix, &Grid::new(&grid).unwrap(), &grid);
            let result = run(&matrix, &gram, &grid, &GptqOptions::default());
            assert_eq!(result.matrix.codes, rounded.codes);
            assert_eq!(result.matrix.scales, rounded.scales);
        }
    }
}

#[test]
fn hand_computed_two_columns() {
    // X rows [1,1],[1,0],[0,1]; step 1: GPTQ gives [1,0] where rounding gives [1,1].
    let factor = Factor {
        order: None,
        dead: vec![],
        upper: vec![0.577_350_3, -0.288_675_13, 0.0, 0.5],
        damping: 0.0,
        width: 2,
    };
    let grid = Grid::new(&options(2, 0)).unwrap();
    let quantizer = InputGroups {
        factor: &factor,
        grid: &grid,
        group_size: 2,
        groups: 1,
        stale: false,
        fixed: true,
    };
    let mut codes = [9u8; 2];
    let mut grids = [GroupGrid { scale: 1.0, zero: 0.0 }];
    let matrix = Matrix::new(1, 2, vec![0.6, 0.6]).unwrap();
    let mut states = [InputGroupState::new(&mut codes, &mut grids)];
    let sweeping = sweep::SweepOptions::from(&GptqOptions::default());
    let loss = sweep::sweep(&matrix, &factor, &quantizer, &mut states, 64, &sweeping);
    assert_eq!(codes, [1, 0]);
    assert!((loss - 1.12).abs() < 1e-5, "{loss}");
}

#[test]
fn loss_is_the_damped_output_error() {
    let matrix = random(4, 8, 5);
    let gram = gram(&activations(40, 8, 6), 8);
    let gptq = GptqOptions::default();
    let factor = Factor::new("t", &gram, &gptq).unwrap();
    let result = run(&matrix, &gram, &options(3, 0), &gptq);
    let direct = damped_error(&matrix, &result.matrix.dequantize(), &gram, factor.damping());
    assert!((result.loss / direct - 1.0).abs() < 1e-4, "{} {direct}", result.loss);
}

#[test]
fn beats_rounding_on_correlated_inputs() {
    let matrix = random(32, 64, 7);
    let gram = gram(&activations(256, 64, 8), 64);
    for grid in [options(3, 0), options(3, 32), options(2, 16)] {
        let rounded = rtn::quantize(&matrix, &Grid::new(&grid).unwrap(), &grid).dequantize();
        let ours = run(&matrix, &gram, &grid, &GptqOptions::default()).matrix.dequantize();
        let (a, b) =
            (damped_error(&matrix, &ours, &gram, 0.0), damped_error(&matrix, &rounded, &gram, 0.0));
        assert!(a < 0.8 * b, "{a} {b}");
    }
}

#[test]
fn scaling_the_hessian_changes_no_code() {
    let matrix = random(8, 24, 9);
    let x = activations(64, 24, 10);
    // A power of two keeps every product exact.
    let scaled: Vec<f32> = x.iter().map(|v| v * 4.0).collect();
    let grid = options(3, 8);
    let a = run(&matrix, &gram(&x, 24), &grid, &GptqOptions::default());
    let b = run(&matrix, &gram(&scaled, 24), &grid, &GptqOptions::default());
    assert_eq!(a.matrix.codes, b.matrix.codes);
}

#[test]
fn block_size_does_not_change_codes() {
    let matrix = random(70, 96, 11);
    let gram = gram(&activations(300, 96, 12), 96);
    for group_size in [0, 32, 48] {
        let grid = options(4, group_size);
        let reference = run(&matrix, &gram, &grid, &GptqOptions::default());
        for block_size in [1, 7, 64, 96] {
            let gptq = GptqOptions { block_size, ..Default::default() };
            let result = run(&matrix, &gram, &grid, &gptq);
            // Sums in another order may move a value across a rounding boundary.
            let different =
                result.matrix.codes.iter().zip(&reference.matrix.codes).filter(|(a, b)| a != b);
            assert!(different.count() <= 2, "group {group_size} block {block_size}");
        }
    }
}

#[test]
fn act_order_commutes_with_permuting_the_problem() {
    let (matrix, width) = (random(6, 16, 13), 16);
    let x = activations(64, width, 14);
    let gptq = GptqOptions { act_order: true, ..Default::default() };
    let grid = options(3, 0);
    let gram_here = gram(&x, width);
    let ordered = run(&matrix, &gram_here, &grid, &gptq);
    let factor = Factor::new("t", &gram_here, &gptq).unwrap();
    let permute = |values: &[f32]| -> Vec<f32> {
        values
            .chunks(width)
            .flat_map(|row| (0..width).map(|p| row[factor.column(p)]).collect::<Vec<_>>())
            .collect()
    };
    let permuted = Matrix::new(6, width, permute(&matrix.values)).unwrap();
    let plain = run(&permuted, &gram(&permute(&x), width), &grid, &GptqOptions::default());
    assert_eq!(permute(&ordered.matrix.dequantize()), plain.matrix.dequantize());
}

#[test]
fn act_order_groups() {
    let matrix = random(6, 32, 15);
    let gram = gram(&activations(64, 32, 16), 32);
    let grid = options(3, 8);
    let dynamic =
        run(&matrix, &gram, &grid, &GptqOptions { act_order: true, ..Default::default() });
    let index = dynamic.matrix.group_index.as_ref().unwrap();
    assert_eq!(
        (0..4).map(|g| index.iter().filter(|&&i| i == g).count()).collect::<Vec<_>>(),
        [8; 4]
    );
    let fixed = run(
        &matrix,
        &gram,
        &grid,
        &GptqOptions { act_order: true, static_groups: true, ..Default::default() },
    );
    assert!(fixed.matrix.group_index.is_none());
    let rounded = rtn::quantize(&matrix, &Grid::new(&grid).unwrap(), &grid);
    assert_eq!(fixed.matrix.scales, rounded.scales);
}

#[test]
fn dead_inputs_become_zero_weights() {
    let mut x = activations(40, 8, 17);
    x.chunks_mut(8).for_each(|row| row[3] = 0.0);
    let gram = gram(&x, 8);
    let result = run(&random(4, 8, 18), &gram, &options(4, 0), &GptqOptions::default());
    assert!(result.matrix.dequantize().chunks(8).all(|row| row[3] == 0.0));
    assert_eq!(Factor::new("t", &gram, &GptqOptions::default()).unwrap().dead_columns(), 1);
}

#[test]
fn per_tensor_grid_is_one_scale() {
    let grid = GridOptions { granularity: Granularity::Tensor, ..options(4, 0) };
    let gram = gram(&activations(40, 8, 19), 8);
    let result = run(&random(4, 8, 20), &gram, &grid, &GptqOptions::default());
    assert!(result.matrix.scales.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn stale_grids_differ_only_inside_a_block() {
    let matrix = random(16, 64, 21);
    let gram = gram(&activations(200, 64, 22), 64);
    let stale = GptqOptions { stale_group_grid: true, block_size: 32, ..Default::default() };
    let fresh = GptqOptions { block_size: 32, ..Default::default() };
    let a = run(&matrix, &gram, &options(3, 16), &stale);
    let b = run(&matrix, &gram, &options(3, 16), &fresh);
    assert_ne!(a.matrix.scales, b.matrix.scales);
    let a = run(&matrix, &gram, &options(3, 32), &stale);
    let b = run(&matrix, &gram, &options(3, 32), &fresh);
    assert_eq!(a.matrix.scales, b.matrix.scales);
}

#[test]
fn kept_zeros_stay_zero_under_every_grid() {
    let mut matrix = random(70, 48, 23);
    matrix.values.iter_mut().enumerate().for_each(|(i, w)| {
        if i % 2 == 0 {
            *w = 0.0;
        }
    });
    let gram = gram(&activations(200, 48, 24), 48);
    for symmetric in [false, true] {
        for (static_groups, act_order, stale_group_grid) in
            [(false, false, false), (true, true, false), (false, true, false), (false, false, true)]
        {
            for range in [crate::grid::Range::Zero, crate::grid::Range::Strict] {
                let grid = GridOptions { symmetric, range, ..options(3, 16) };
                let gptq = GptqOptions {
                    static_groups,
                    act_order,
                    stale_group_grid,
                    keep_zeros: true,
                    ..Default::default()
                };
                let kept = run(&matrix, &gram, &grid, &gptq).matrix.dequantize();
                let free = GptqOptions { keep_zeros: false, ..gptq };
                let free = run(&matrix, &gram, &grid, &free).matrix.dequantize();
                let rounded =
                    rtn::quantize(&matrix, &Grid::new(&grid).unwrap(), &grid).dequantize();
                let zeros = |q: &[f32]| q.iter().step_by(2).all(|q| *q == 0.0);
                // Rounding keeps zeros by itself: 0 is always a value of the grid.
                assert!(zeros(&kept) && zeros(&rounded) && !zeros(&free));
            }
        }
    }
}

#[test]
fn refusals_name_the_layer_and_the_way_out() {
    let nothing = gram(&[0.0; 32], 8);
    let message = Factor::new("blk.q", &nothing, &GptqOptions::default()).unwrap_err().to_string();
    assert!(message.contains("blk.q"), "{message}");
    let infinite = gram(&[f32::INFINITY; 8], 8);
    let message = Factor::new("blk.q", &infinite, &GptqOptions::default()).unwrap_err().to_string();
    assert!(message.contains("blk.q") && message.contains("overflow"), "{message}");
    let bad = GptqOptions { static_groups: true, ..Default::default() };
    assert!(bad.check(&options(4, 0)).is_err());
    assert!(GptqOptions { damping: 0.0, ..Default::default() }.check(&options(4, 0)).is_err());
    assert!(GptqOptions { block_size: 0, ..Default::default() }.check(&options(4, 0)).is_err());
}
