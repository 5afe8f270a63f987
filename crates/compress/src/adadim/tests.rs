//! Tests of the mathematics of `adadim`.
use super::*;
use crate::grid::transpose;
use crate::statistics::Gram;

fn random(out: usize, width: usize, seed: u64) -> Matrix {
    let mut rng = tensor::Rng::new(seed);
    Matrix::new(out, width, (0..out * width).map(|_| rng.normal() as f32).collect()).unwrap()
}

/// Correlated activations, so that compensation has something to do.
fn gram(width: usize, seed: u64) -> Gram {
    let mut rng = tensor::Rng::new(seed);
    let mut x = vec![0f32; 4 * width * width];
    for row in x.chunks_mut(width) {
        let shared = rng.normal() as f32;
        for (i, x) in row.iter_mut().enumerate() {
            *x = shared + (0.2 + (i % 5) as f32 * 0.3) * rng.normal() as f32;
        }
    }
    let mut gram = Gram::new(width);
    gram.add(&x);
    gram
}

fn options(bits: u8, group_size: usize) -> GridOptions {
    GridOptions { bits, group_size, ..Default::default() }
}

fn rounded(matrix: &Matrix, grid: &GridOptions, direction: Direction) -> Vec<f32> {
    nn::dequantize(&round(matrix, &Grid::new(grid).unwrap(), grid, direction)).unwrap()
}

fn compensated(
    matrix: &Matrix,
    gram: &Gram,
    grid: &GridOptions,
    gptq: &GptqOptions,
) -> (QuantizedMatrix, f64) {
    let factor = Factor::new("t", gram, gptq).unwrap();
    columns::quantize("t", matrix, &factor, &Grid::new(grid).unwrap(), grid, gptq).unwrap()
}

fn values(matrix: &QuantizedMatrix) -> Vec<f32> {
    nn::dequantize(&Stored::Columns(matrix.clone())).unwrap()
}

use store::packed::QuantizedMatrix;

#[test]
fn along_the_output_is_along_the_input_of_the_transpose() {
    for (out, width, group) in [(24, 16, 8), (20, 12, 8), (6, 10, 0), (4, 8, 32)] {
        let matrix = random(out, width, 1);
        for (bits, symmetric) in [(2, false), (3, true), (4, false)] {
            let grid = GridOptions { symmetric, ..options(bits, group) };
            let ic = rounded(&matrix, &grid, Direction::Ic);
            let oc = rounded(&matrix.transposed(), &grid, Direction::Oc);
            assert_eq!(ic, transpose(&oc, width, out));
            let rtn = rtn::quantize(&matrix, &Grid::new(&grid).unwrap(), &grid);
            assert_eq!(rounded(&matrix, &grid, Direction::Oc), rtn.dequantize());
        }
    }
}

/// Multiplies column `k` (or row, if `rows`) by a power of two that differs from place to place.
fn scaled(matrix: &Matrix, rows: bool, inverse: bool) -> Matrix {
    let width = matrix.in_features;
    let mut scaled = matrix.clone();
    for (i, w) in scaled.values.iter_mut().enumerate() {
        let place = if rows { i / width } else { i % width };
        let power = (place % 5) as i32 - 2;
        *w *= 2f32.powi(if inverse { -power } else { power });
    }
    scaled
}

#[test]
fn scaling_a_channel_changes_nothing_where_it_has_its_own_groups() {
    let matrix = random(32, 24, 2);
    let grid = options(3, 8);
    for (direction, rows) in [(Direction::Ic, false), (Direction::Oc, true)] {
        let through = |direction| {
            let q = rounded(&scaled(&matrix, rows, false), &grid, direction);
            scaled(&Matrix::new(32, 24, q).unwrap(), rows, true).values
        };
        assert_eq!(through(direction), rounded(&matrix, &grid, direction));
        let other = Direction::BOTH.into_iter().find(|d| *d != direction).unwrap();
        assert_ne!(through(other), rounded(&matrix, &grid, other));
    }
}

#[test]
fn a_column_is_isolated() {
    let matrix = random(16, 16, 3);
    let mut changed = matrix.clone();
    changed.values.chunks_mut(16).for_each(|row| row[5] *= 30.0);
    let grid = options(4, 8);
    let touched = |direction| -> Vec<usize> {
        let (a, b) = (rounded(&matrix, &grid, direction), rounded(&changed, &grid, direction));
        (0..16).filter(|&c| (0..16).any(|r| a[r * 16 + c] != b[r * 16 + c])).collect()
    };
    assert_eq!(touched(Direction::Ic), [5]);
    assert_eq!(touched(Direction::Oc), [0, 1, 2, 3, 4, 5, 6, 7]);
}

/// Example of the method's description: one input channel carries 50 times the activation.
const HAND: [f32; 16] = [
    0.05, 1.0, -0.9, 0.4, //
    -0.03, -0.8, 0.7, 1.0, //
    0.02, 0.9, 0.6, -1.0, //
    -0.06, 0.3, -1.0, 0.8,
];

fn hand_errors(bits: u8, first: f32) -> [f64; 2] {
    let matrix = Matrix::new(4, 4, HAND.to_vec()).unwrap();
    let mut x = vec![0f32; 16];
    (0..4).for_each(|i| x[i * 5] = if i == 0 { first } else { 1.0 });
    let mut gram = Gram::new(4);
    gram.add(&x);
    let covariance = gram.covariance();
    Direction::BOTH.map(|direction| {
        linear_error(&matrix, &rounded(&matrix, &options(bits, 4), direction), &covariance)
    })
}

/// Scales are half-precision numbers, hence a relative 2^-11 beside the exact values.
fn near(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 4e-3, "{found} is not {expected}");
}

#[test]
fn hand_computed_choice() {
    for (bits, oc, ic) in [(3, 1.159962, 0.011798), (2, 1.193750, 0.147292)] {
        let errors = hand_errors(bits, 50.0);
        near(errors[0], oc);
        near(errors[1], ic);
        assert_eq!(choose("t", errors).unwrap(), Direction::Ic);
    }
    // Without regard to the inputs the choice is the other way round.
    let plain = hand_errors(3, 1.0);
    near(plain[0] * 4.0, 0.004174 * 4.0);
    near(plain[1] * 4.0, 0.006061 * 4.0);
    let matrix = Matrix::new(4, 4, HAND.to_vec()).unwrap();
    let column = |direction| -> Vec<f32> {
        rounded(&matrix, &options(3, 4), direction).chunks(4).map(|row| row[0]).collect()
    };
    for (found, expected) in column(Direction::Ic).iter().zip([0.0471, -0.0314, 0.0157, -0.0629]) {
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
    assert_eq!(column(Direction::Oc), [0.0; 4]);
}

#[test]
fn plain_inputs_choose_the_input_direction() {
    for bits in [2, 3] {
        let errors = hand_errors(bits, 1.0);
        assert_eq!(choose("t", errors).unwrap(), Direction::Oc, "{errors:?}");
    }
    // Mean over four tokens and four outputs.
    let [oc, ic] = hand_errors(2, 1.0);
    near(oc, 0.037963);
    near(ic, 0.041431);
}

#[test]
fn equal_errors_go_along_the_input_and_overflow_is_refused() {
    assert_eq!(choose("t", [0.5, 0.5]).unwrap(), Direction::Oc);
    assert_eq!(choose("t", [0.5, 0.25]).unwrap(), Direction::Ic);
    for errors in [[f64::NAN, 1.0], [1.0, f64::INFINITY]] {
        let message = choose("blk.q", errors).unwrap_err().to_string();
        assert!(message.contains("blk.q") && message.contains("overflow"), "{message}");
    }
}

#[test]
fn diagonal_hessian_is_rounding() {
    let matrix = random(40, 16, 4);
    let mut x = vec![0f32; 256];
    (0..16).for_each(|i| x[i * 17] = 1.0 + i as f32);
    let mut gram = Gram::new(16);
    gram.add(&x);
    for group in [0, 8, 16, 48] {
        for act_order in [false, true] {
            let grid = options(3, group);
            let gptq = GptqOptions { act_order, ..Default::default() };
            let (found, _) = compensated(&matrix, &gram, &grid, &gptq);
            let expected = round(&matrix, &Grid::new(&grid).unwrap(), &grid, Direction::Ic);
            assert_eq!(Stored::Columns(found), expected);
        }
    }
}

/// `tr((W - Q) H_damped (W - Q)ᵀ)` by plain loops in double precision.
fn damped_error(matrix: &Matrix, q: &[f32], gram: &Gram, damping: f64) -> f64 {
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
fn loss_is_the_damped_output_error_and_less_than_that_of_rounding() {
    for (out, group) in [(64, 16), (200, 48), (50, 0), (70, 64)] {
        let matrix = random(out, 24, 5);
        let gram = gram(24, 6);
        for act_order in [false, true] {
            let gptq = GptqOptions { act_order, ..Default::default() };
            let grid = options(3, group);
            let (found, loss) = compensated(&matrix, &gram, &grid, &gptq);
            found.check("t").unwrap();
            let damping = Factor::new("t", &gram, &gptq).unwrap().damping();
            let direct = damped_error(&matrix, &values(&found), &gram, damping);
            assert!((loss / direct - 1.0).abs() < 1e-4, "{loss} {direct}");
            let plain = damped_error(&matrix, &rounded(&matrix, &grid, Direction::Ic), &gram, 0.0);
            let ours = damped_error(&matrix, &values(&found), &gram, 0.0);
            assert!(ours < 0.8 * plain, "{ours} {plain}");
        }
    }
}

/// The step as it is told: all rows at once, one column after the other, no blocks, no chunks.
fn by_hand(matrix: &Matrix, gram: &Gram, grid: &GridOptions, damping: f64) -> Vec<f32> {
    let (out, n) = (matrix.out_features, matrix.in_features);
    let factored = tensor::linalg::inverse_cholesky_upper(
        &gram.hessian(),
        n,
        damping,
        tensor::linalg::Precision::F64,
    );
    let upper = factored.unwrap().upper.into_f64();
    let rules = Grid::new(grid).unwrap();
    let mut w: Vec<f64> = matrix.values.iter().map(|w| f64::from(*w)).collect();
    for i in 0..n {
        let column: Vec<f32> = (0..out).map(|r| w[r * n + i] as f32).collect();
        let mut q = column.clone();
        for group in q.chunks_mut(effective_group(grid, out)) {
            rules.fake_quantize(group);
        }
        for r in 0..out {
            let error = f64::from(column[r] - q[r]) / upper[i * n + i];
            for j in i + 1..n {
                w[r * n + j] -= error * upper[i * n + j];
            }
            w[r * n + i] = f64::from(q[r]);
        }
    }
    w.iter().map(|w| *w as f32).collect()
}

#[test]
fn chunks_and_blocks_follow_the_plain_loop() {
    let matrix = random(150, 40, 7);
    let gram = gram(40, 8);
    for group in [16, 48, 0] {
        let expected = by_hand(&matrix, &gram, &options(4, group), 0.01);
        for block_size in [7, 128] {
            let gptq = GptqOptions { block_size, ..Default::default() };
            let found = values(&compensated(&matrix, &gram, &options(4, group), &gptq).0);
            // Sums in single precision may move a value across a rounding boundary.
            let apart = |(a, b): &(&f32, &f32)| (*a - *b).abs() > 1e-3;
            let moved = found.iter().zip(&expected).filter(apart).count();
            assert!(moved <= 12, "group {group}, block {block_size}: {moved} of 6000");
        }
    }
}

#[test]
fn column_order_leaves_parameters_in_place() {
    let matrix = random(32, 16, 9);
    let gram_here = gram(16, 10);
    let gptq = GptqOptions { act_order: true, ..Default::default() };
    let grid = options(3, 8);
    let (found, _) = compensated(&matrix, &gram_here, &grid, &gptq);
    assert!(found.group_index.is_none());
    // The problem with its columns in processing order, solved as stored, is the same problem.
    let factor = Factor::new("t", &gram_here, &gptq).unwrap();
    let order: Vec<usize> = (0..16).map(|p| factor.column(p)).collect();
    let columns = |v: &[f32]| -> Vec<f32> {
        v.chunks(16).flat_map(|row| order.iter().map(|&c| row[c]).collect::<Vec<_>>()).collect()
    };
    let permuted = Matrix::new(32, 16, columns(&matrix.values)).unwrap();
    let full = gram_here.full();
    let plain = Factor::of_hessian(
        "t",
        order
            .iter()
            .flat_map(|&i| order.iter().map(|&j| full[i * 16 + j]).collect::<Vec<_>>())
            .map(|h| h * 2.0 / gram_here.tokens() as f64)
            .collect(),
        16,
        gram_here.tokens(),
        &GptqOptions::default(),
    )
    .unwrap();
    let rules = Grid::new(&grid).unwrap();
    let (there, _) =
        columns::quantize("t", &permuted, &plain, &rules, &grid, &GptqOptions::default()).unwrap();
    assert_eq!(columns(&values(&found)), values(&there));
}

#[test]
fn along_the_input_it_is_gptq() {
    let matrix = random(20, 32, 11);
    let gram = gram(32, 12);
    let grid = options(3, 8);
    for columns in [ColumnOrder::EnergyStatic, ColumnOrder::Energy, ColumnOrder::Stored] {
        let ada = AdadimOptions { columns, ..Default::default() };
        let ours = ada.gptq(&GptqOptions::default(), &grid);
        let theirs = GptqOptions {
            act_order: columns != ColumnOrder::Stored,
            static_groups: columns == ColumnOrder::EnergyStatic,
            ..Default::default()
        };
        let rules = Grid::new(&grid).unwrap();
        let factor = Factor::new("t", &gram, &theirs).unwrap();
        let expected =
            gptq::quantize("t", &matrix, &factor, &rules, &grid, &theirs).unwrap().matrix;
        let (found, _) =
            compensate("t", &matrix, &factor, &rules, &grid, &ours, Direction::Oc).unwrap();
        assert_eq!(found, Stored::Grid(expected));
    }
}

#[test]
fn zero_columns_and_kept_zeros() {
    let mut matrix = random(24, 8, 13);
    matrix.values.chunks_mut(8).for_each(|row| row[3] = 0.0);
    let grid = options(3, 8);
    let Stored::Columns(found) = round(&matrix, &Grid::new(&grid).unwrap(), &grid, Direction::Ic)
    else {
        panic!("not along the output")
    };
    assert!(found.codes[3 * 24..4 * 24].iter().all(|&code| code == 0));
    // 1e-5 / 7 as a half-precision number, which is subnormal there.
    let scale = half::f16::from_f32(1e-5 / 7.0).to_f32();
    assert!(found.scales[9..12].iter().all(|&s| s == scale), "{:?}", &found.scales[9..12]);
    assert!(values(&found).chunks(8).all(|row| row[3] == 0.0));
    // Pruned weights stay pruned while the others make up for the error.
    matrix.values.iter_mut().step_by(2).for_each(|w| *w = 0.0);
    let gram = gram(8, 14);
    let zeros = |v: &[f32]| v.iter().zip(&matrix.values).all(|(q, w)| *w != 0.0 || *q == 0.0);
    let keep = GptqOptions { keep_zeros: true, ..Default::default() };
    assert!(zeros(&values(&compensated(&matrix, &gram, &grid, &keep).0)));
    assert!(!zeros(&values(&compensated(&matrix, &gram, &grid, &GptqOptions::default()).0)));
}

#[test]
fn bits_per_weight_are_the_same_in_both_directions() {
    let matrix = random(64, 96, 15);
    let grid = options(3, 32);
    let bits = Direction::BOTH
        .map(|d| round(&matrix, &Grid::new(&grid).unwrap(), &grid, d).bits_per_weight());
    assert_eq!(bits, [3.0 + 19.0 / 32.0; 2]);
}

fn job(adadim: AdadimOptions) -> QuantizeOptions {
    QuantizeOptions {
        method: crate::Method::Adadim,
        format: Format::Strata,
        adadim,
        ..Default::default()
    }
}

#[test]
fn contradictory_options_are_refused_with_what_would_work() {
    job(AdadimOptions::default()).check().unwrap();
    let refused = |job: QuantizeOptions, phrases: &[&str]| {
        let message = job.check().unwrap_err().to_string();
        assert!(phrases.iter().all(|p| message.contains(p)), "{message}");
    };
    for format in [Format::CompressedTensors, Format::GptqV2] {
        refused(
            QuantizeOptions { format, ..job(AdadimOptions::default()) },
            &["--dim oc", "--format strata", "dequantized"],
        );
    }
    let tensor = GridOptions { granularity: Granularity::Tensor, ..Default::default() };
    refused(
        QuantizeOptions { grid: tensor, ..job(AdadimOptions::default()) },
        &["no direction", "--granularity group"],
    );
    let select_by = AdadimOptions { select_by: Base::Gptq, ..Default::default() };
    refused(job(select_by), &["--base gptq"]);
    let act_order = GptqOptions { act_order: true, ..Default::default() };
    refused(
        QuantizeOptions { gptq: act_order, ..job(AdadimOptions::default()) },
        &["--dim-columns"],
    );
    let oc = AdadimOptions { dim: Dim::Oc, ..Default::default() };
    let packed = |adadim| QuantizeOptions { format: Format::CompressedTensors, ..job(adadim) };
    packed(oc.clone()).check().unwrap();
    // Groups along the input whose columns are no neighbours fit the formats with a group index.
    let energy = AdadimOptions { base: Base::Gptq, columns: ColumnOrder::Energy, ..oc };
    refused(packed(energy), &["neighbours"]);
}

#[test]
fn short_groups_are_said() {
    let name = Name {
        module: "k".into(),
        role: Role::Key,
        block: Some(0),
        transposed: false,
        shape: [48, 128],
        bias: false,
        plus_one: false,
        kernel: None,
        spelling: nn::Spelling::Dotted,
    };
    assert_eq!(short_group(&name, &options(4, 64), Direction::Oc), None);
    let note = short_group(&name, &options(4, 64), Direction::Ic).unwrap();
    assert_eq!(note, "48 outputs in groups of 64: the only one holds 48");
    let note = short_group(&name, &options(4, 32), Direction::Ic).unwrap();
    assert_eq!(note, "48 outputs in groups of 32: the last one holds 16");
    assert_eq!(short_group(&name, &options(4, 0), Direction::Ic), None);
}
