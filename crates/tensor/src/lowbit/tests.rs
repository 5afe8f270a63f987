//! Every width, path and odd shape against f64 loops over the definition.

use super::*;
use crate::rng::Rng;

struct Case {
    weights: LowBit,
    /// (q - z) * s by definition, in f32.
    exact: Vec<f32>,
    /// (q + |z|) * s: what the rounding errors of the integer path are multiplied by.
    size: Vec<f32>,
}

/// Random weights; `half`: parameters that f16 holds; `shuffled`: an act-order map.
fn case(bits: u8, out: usize, inputs: usize, group: usize, half: bool, shuffled: bool) -> Case {
    let mut rng = Rng::stream(u64::from(bits), &format!("{out} {inputs} {group}"));
    let groups = inputs.div_ceil(group);
    let codes: Vec<u8> = (0..out * inputs).map(|_| rng.below(1 << bits) as u8).collect();
    let round = |x: f32| if half { f16::from_f32(x).to_f32() } else { x };
    let scales: Vec<f32> =
        (0..out * groups).map(|_| round(rng.uniform_in(0.01, 0.2) as f32)).collect();
    let zeros: Vec<f32> = (0..out * groups)
        .map(|_| if half { rng.below(1 << bits) as f32 } else { rng.uniform_in(0.0, 9.0) as f32 })
        .collect();
    let mut map: Vec<u32> = (0..inputs).map(|k| (k / group) as u32).collect();
    if shuffled {
        rng.shuffle(&mut map);
    }
    let (mut exact, mut size) = (vec![0.0; out * inputs], vec![0.0; out * inputs]);
    for o in 0..out {
        for k in 0..inputs {
            let g = o * groups + map[k] as usize;
            exact[o * inputs + k] = (f32::from(codes[o * inputs + k]) - zeros[g]) * scales[g];
            size[o * inputs + k] = (f32::from(codes[o * inputs + k]) + zeros[g]) * scales[g];
        }
    }
    let index = shuffled.then_some(map.as_slice());
    let weights = LowBit::new(bits, out, inputs, group, &codes, &scales, &zeros, index).unwrap();
    assert_eq!(matches!(weights.params, Params::Half(_)), half || out * inputs == 0);
    Case { weights, exact, size }
}

/// Compares with f64 sums within the bound that the module promises.
fn verify(case: &Case, rows: usize, isa: Isa) {
    for integer in [false, true] {
        verify_path(case, rows, isa, integer);
    }
}

fn verify_path(case: &Case, rows: usize, isa: Isa, integer: bool) {
    let [out, inputs] = case.weights.shape();
    let mut rng = Rng::new(rows as u64);
    let mut x = vec![0.0; rows * inputs];
    rng.fill_normal(&mut x, 1.0);
    let mut bias = vec![0.0; out];
    rng.fill_normal(&mut bias, 1.0);
    let mut y = vec![f32::NAN; rows * out];
    case.weights.linear_with(isa, integer, &x, rows, Some(&bias), &mut y);
    for r in 0..rows {
        let most = x[r * inputs..(r + 1) * inputs].iter().fold(0f32, |a, x| a.max(x.abs()));
        for o in 0..out {
            let (mut sum, mut size) = (f64::from(bias[o]), f64::from(bias[o].abs()));
            let mut rounding = 0.0;
            for k in 0..inputs {
                let x = f64::from(x[r * inputs + k]);
                let term = x * f64::from(case.exact[o * inputs + k]);
                let whole = f64::from(case.size[o * inputs + k]);
                sum += term;
                size += if integer { x.abs() * whole } else { term.abs() };
                rounding += if integer { f64::from(most) / 65278.0 * whole } else { 0.0 };
            }
            let bound = (inputs as f64 / 8.0 + 16.0) * 2f64.powi(-23) * size + rounding;
            let got = f64::from(y[r * out + o]);
            let bits = case.weights.bits();
            assert!((got - sum).abs() <= bound, "{bits} bits {isa:?} ({r},{o}): {got} for {sum}");
        }
    }
    let with_bias = y.clone();
    case.weights.linear_with(isa, integer, &x, rows, None, &mut y);
    let apart = |(i, (a, b)): (usize, (&f32, &f32))| (a - b - bias[i % out]).abs() < 1e-2;
    assert!(with_bias.iter().zip(&y).enumerate().all(apart));
}

#[test]
fn every_width_path_and_shape() {
    for bits in layout::BITS {
        for (out, inputs, group) in [
            (1, 1, 1),
            (1, 128, 128),
            (3, 17, 128),
            (5, 100, 32),
            (7, 256, 64),
            (4, 300, 128),
            (13, 192, 48),
            (2, 130, 20),
            (6, 520, 1000),
        ] {
            for (half, shuffled) in [(true, false), (false, false), (true, true)] {
                let case = case(bits, out, inputs, group, half, shuffled);
                assert_eq!(case.weights.dequantize(), case.exact, "{bits} {out} {inputs} {group}");
                for isa in Isa::available() {
                    for rows in [1, 2, 3, 4, 5, 16, 19] {
                        verify(&case, rows, isa);
                    }
                }
            }
        }
    }
}

#[test]
fn parallel_path_agrees_and_threads_change_nothing() {
    let case = case(4, 1030, 512, 128, true, false);
    verify(&case, 1, Isa::detect());
    verify(&case, 20, Isa::detect());
    let x = vec![0.5; 6 * 512];
    let run = |threads: usize, rows: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut y = vec![0.0; rows * 1030];
        pool.install(|| case.weights.linear(&x[..rows * 512], rows, None, &mut y));
        y
    };
    assert_eq!(run(1, 1), run(3, 1));
    assert_eq!(run(1, 6), run(3, 6));
}

/// All instruction sets decode to the same bits.
#[test]
fn decoding_is_the_same_everywhere() {
    for bits in layout::BITS {
        let case = case(bits, 3, 300, 32, false, true);
        let decode = |isa| {
            let mut params = vec![0.0; 2 * case.weights.groups];
            let mut row = vec![f32::NAN; case.weights.slots];
            case.weights.expand_row(isa, 2, &mut params, &mut row);
            row
        };
        let expected = decode(Isa::Portable);
        for isa in Isa::available() {
            assert_eq!(decode(isa), expected, "{bits} {isa:?}");
        }
    }
}

#[test]
fn memory_is_bits_and_parameters() {
    for bits in layout::BITS {
        let case = case(bits, 64, 1024, 128, true, false);
        let per_weight = case.weights.bytes() as f64 * 8.0 / (64.0 * 1024.0);
        // 4 bytes of parameters for 128 weights are 0.25 bits; alignment and maps are small.
        assert!(per_weight < f64::from(bits) + 0.32, "{bits}: {per_weight}");
    }
}

#[test]
fn a_hand_computed_product() {
    // W = [[(3 - 1) * 0.5, (0 - 1) * 0.5], [(2 - 2) * 2, (1 - 2) * 2]] = [[1, -0.5], [0, -2]].
    let w = LowBit::new(2, 2, 2, 2, &[3, 0, 2, 1], &[0.5, 2.0], &[1.0, 2.0], None).unwrap();
    assert_eq!(w.dequantize(), [1.0, -0.5, 0.0, -2.0]);
    let mut y = [0.0; 2];
    w.linear(&[10.0, 4.0], 1, Some(&[0.25, 0.0]), &mut y);
    // The largest activation is exact on the integer path too, 4 is 13055.6 of its 32639 steps.
    assert!((y[0] - 8.25).abs() < 1e-3 && (y[1] + 8.0).abs() < 1e-3, "{y:?}");
    w.linear_with(Isa::detect(), false, &[10.0, 4.0], 1, Some(&[0.25, 0.0]), &mut y);
    assert_eq!(y, [8.25, -8.0]);
}

/// Whole numbers up to 32639 are activations that the integer path does not round: all of its sums
/// are then exact, whatever the width and the number of groups in a block.
#[test]
fn integer_path_is_exact_on_whole_numbers() {
    let mut rng = Rng::new(5);
    for bits in layout::BITS {
        for group in [32, 64, 128] {
            let (out, inputs, rows) = (3, 256, 5);
            let groups = inputs / group;
            let codes: Vec<u8> = (0..out * inputs).map(|_| rng.below(1 << bits) as u8).collect();
            let zeros: Vec<f32> = (0..out * groups).map(|_| rng.below(1 << bits) as f32).collect();
            let w = LowBit::new(
                bits,
                out,
                inputs,
                group,
                &codes,
                &vec![1.0; out * groups],
                &zeros,
                None,
            );
            let w = w.unwrap();
            let mut x: Vec<f32> =
                (0..rows * inputs).map(|_| rng.below(127) as f32 - 63.0).collect();
            // The scale of every block becomes 1.
            x.chunks_mut(128).for_each(|block| block[7] = 32639.0);
            let mut y = vec![0.0; rows * out];
            w.linear(&x, rows, None, &mut y);
            let dense = w.dequantize();
            for r in 0..rows {
                for o in 0..out {
                    let pairs = x[r * inputs..].iter().zip(&dense[o * inputs..(o + 1) * inputs]);
                    let exact: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let apart = (f64::from(y[r * out + o]) - exact).abs();
                    assert!(
                        apart <= exact.abs().max(8e6) * 4e-7,
                        "{bits} {group}: {apart} {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn bad_activations_stay_visible() {
    let w = LowBit::new(4, 1, 128, 128, &[3; 128], &[1.0], &[8.0], None).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 128];
        x[100] = bad;
        let mut y = [0.0];
        w.linear(&x, 1, None, &mut y);
        assert!(!y[0].is_finite(), "{}", y[0]);
    }
    let mut y = [1.0];
    w.linear(&[1e-40; 128], 1, None, &mut y);
    assert!(y[0].abs() < 1e-30);
}

#[test]
fn refuses_what_does_not_fit() {
    let new = |bits, group, codes: &[u8], scales: &[f32], zeros: &[f32], map: Option<&[u32]>| {
        LowBit::new(bits, 1, 2, group, codes, scales, zeros, map).unwrap_err().to_string()
    };
    assert!(new(7, 2, &[0, 0], &[1.0], &[0.0], None).contains("7 bits"));
    assert!(new(4, 0, &[0, 0], &[1.0], &[0.0], None).contains("group size"));
    assert!(new(4, 2, &[0], &[1.0], &[0.0], None).contains("1 codes"));
    assert!(new(4, 2, &[0, 16], &[1.0], &[0.0], None).contains("code 16 at (0, 1)"));
    assert!(new(4, 1, &[0, 0], &[1.0], &[0.0, 0.0], None).contains("scales"));
    assert!(new(4, 1, &[0, 0], &[1.0, 1.0], &[0.0], None).contains("zeros"));
    assert!(new(4, 2, &[0, 0], &[f32::NAN], &[0.0], None).contains("NaN"));
    assert!(new(4, 2, &[0, 0], &[1.0], &[0.0], Some(&[0])).contains("group numbers"));
    assert!(new(4, 2, &[0, 0], &[1.0], &[0.0], Some(&[0, 1])).contains("column 1"));
    assert!(LowBit::new(4, 0, 0, 128, &[], &[], &[], None).unwrap().dequantize().is_empty());
}
