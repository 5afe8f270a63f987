//! Counts, numbering, searches and whole rows against tables, brute force and each other.

use super::search::search_one;
use super::*;
use crate::rng::Rng;
use crate::skinny::simd::Isa;

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut v = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut v, 1.0);
    v
}

fn code(inputs: usize, dimension: usize, pulses: usize, amp_bits: u8) -> Code {
    let amplitude = AmplitudeMode::BetaLloyd;
    Code { inputs, dimension, pulses, tail: None, amplitude, amp_bits, amp_zero: false }
}

fn norms(rows: &[f32], width: usize) -> Vec<f32> {
    rows.chunks(width).map(|r| r.iter().map(|w| w * w).sum::<f32>().sqrt()).collect()
}

fn cosine(v: &[f32], y: &[i16]) -> f64 {
    let dot: f64 = v.iter().zip(y).map(|(v, y)| f64::from(*v) * f64::from(*y)).sum();
    let square = |x: f64| x * x;
    let a: f64 = v.iter().map(|v| square(f64::from(*v))).sum();
    let b: f64 = y.iter().map(|y| square(f64::from(*y))).sum();
    dot / (a * b).sqrt()
}

/// All points of a pyramid, by counting through a cube.
fn all_points(d: usize, k: usize) -> Vec<Vec<i16>> {
    let side = 2 * k + 1;
    (0..side.pow(d as u32))
        .map(|mut n| {
            (0..d)
                .map(|_| {
                    let digit = n % side;
                    n /= side;
                    digit as i16 - k as i16
                })
                .collect::<Vec<i16>>()
        })
        .filter(|y| y.iter().map(|v| v.unsigned_abs() as usize).sum::<usize>() == k)
        .collect()
}

#[test]
fn counts() {
    for (d, wanted) in [
        (2, [1u128, 4, 8, 12, 16, 20, 24, 28, 32]),
        (3, [1, 6, 18, 38, 66, 102, 146, 198, 258]),
        (4, [1, 8, 32, 88, 192, 360, 608, 952, 1408]),
        (8, [1, 16, 128, 688, 2816, 9424, 27008, 68464, 157_184]),
    ] {
        let found: Vec<u128> = (0..=8).map(|k| count(d, k).unwrap()).collect();
        assert_eq!(found, wanted);
    }
    assert_eq!(count(16, 8), Some(30_316_544));
    assert_eq!((count(0, 0), count(0, 3), count(1, 7)), (Some(1), Some(0), Some(2)));
    for k in 1..50u128 {
        assert_eq!(count(2, k as usize), Some(4 * k));
        assert_eq!(count(3, k as usize), Some(4 * k * k + 2));
    }
}

#[test]
fn pulses_by_rate() {
    for (d, bits, pulses, log2) in [
        (8, 2.0, 6, 14.72),
        (8, 3.0, 16, 23.85),
        (8, 4.0, 36, 31.92),
        (16, 1.0, 4, 15.43),
        (16, 1.5, 7, 22.80),
        (16, 2.0, 12, 31.74),
        (16, 2.5, 18, 39.40),
        (16, 3.0, 27, 47.60),
        (16, 3.5, 40, 55.82),
        (16, 4.0, 58, 63.74),
        (32, 2.0, 22, 63.07),
        (32, 3.0, 50, 95.62),
        (32, 4.0, 105, 127.8),
        (4, 2.0, 4, 7.58),
        (4, 3.0, 11, 11.82),
    ] {
        assert_eq!(pulses_for_rate(d, bits), pulses, "D = {d}, {bits} bits");
        let lattice = Lattice::new(d, pulses).unwrap();
        assert!((lattice.entropy_bits() - log2).abs() < 0.051, "{}", lattice.entropy_bits());
        assert_eq!(f64::from(lattice.index_bits()), lattice.entropy_bits().ceil());
    }
    assert_eq!(pulses_for_rate(16, 0.1), 0);
}

#[test]
fn small_pyramids_are_numbered_without_gaps() {
    for (d, k) in [(2, 2), (3, 2), (4, 3), (5, 4), (1, 1), (1, 9), (4, 7), (6, 3)] {
        let lattice = Lattice::new(d, k).unwrap();
        let points = all_points(d, k);
        assert_eq!(points.len() as u128, lattice.count());
        let mut seen = vec![false; points.len()];
        for y in points {
            let index = lattice.encode(&y);
            assert!(!std::mem::replace(&mut seen[index as usize], true), "{y:?} shares an index");
            let mut back = vec![0i16; d];
            lattice.decode(index, &mut back).unwrap();
            assert_eq!(back, y);
        }
        assert!(seen.into_iter().all(|s| s));
        let mut y = vec![0i16; d];
        let error = lattice.decode(lattice.count(), &mut y).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
    }
}

#[test]
fn order_is_the_documented_one() {
    let lattice = Lattice::new(3, 2).unwrap();
    let list: [[i16; 3]; 18] = [
        [0, 0, 2],
        [0, 0, -2],
        [0, 1, 1],
        [0, 1, -1],
        [0, -1, 1],
        [0, -1, -1],
        [0, 2, 0],
        [0, -2, 0],
        [1, 0, 1],
        [1, 0, -1],
        [1, 1, 0],
        [1, -1, 0],
        [-1, 0, 1],
        [-1, 0, -1],
        [-1, 1, 0],
        [-1, -1, 0],
        [2, 0, 0],
        [-2, 0, 0],
    ];
    for (index, y) in list.iter().enumerate() {
        assert_eq!(lattice.encode(y), index as u128);
    }
    assert_eq!(Lattice::new(4, 4).unwrap().encode(&[1i16, -2, 0, 1]), 98);
}

/// The numbering as written down coordinate by coordinate, with no prefix sums.
fn encode_by_definition(y: &[i16], k: usize) -> u128 {
    let n = |l: usize, k: i64| if k < 0 { 0 } else { count(l, k as usize).unwrap() };
    let (mut index, mut left) = (0u128, k as i64);
    for (i, &v) in y.iter().enumerate() {
        let l = y.len() - 1 - i;
        let a = i64::from(v.unsigned_abs());
        if a > 0 {
            index += n(l, left) + (1..a).map(|j| 2 * n(l, left - j)).sum::<u128>();
            index += if v < 0 { n(l, left - a) } else { 0 };
            left -= a;
        }
    }
    index
}

fn random_point(rng: &mut Rng, d: usize, k: usize) -> Vec<i16> {
    let mut y = vec![0i16; d];
    // Some are spread out, some are concentrated.
    let places = 1 + rng.below(d);
    for _ in 0..k {
        y[rng.below(places)] += 1;
    }
    rng.shuffle(&mut y);
    y.iter().map(|&v| if rng.below(2) == 0 { v } else { -v }).collect()
}

const PYRAMIDS: [(usize, usize); 16] = [
    (1, 5),
    (2, 100),
    (3, 40),
    (4, 11),
    (5, 127),
    (8, 36),
    (12, 20),
    (16, 1),
    (16, 12),
    (16, 27),
    (16, 58),
    (16, 150),
    (32, 22),
    (32, 50),
    (32, 105),
    (64, 30),
];

#[test]
fn large_pyramids_round_trip() {
    let mut rng = Rng::new(4);
    for (d, k) in PYRAMIDS {
        let lattice = Lattice::new(d, k).unwrap();
        for _ in 0..200 {
            let y = random_point(&mut rng, d, k);
            let index = lattice.encode(&y);
            assert!(index < lattice.count());
            let mut back = vec![0i16; d];
            lattice.decode(index, &mut back).unwrap();
            assert_eq!(back, y, "D = {d}, K = {k}");
        }
        let y = random_point(&mut rng, d, k);
        assert_eq!(lattice.encode(&y), encode_by_definition(&y, k));
        for index in [0, 1, lattice.count() / 2, lattice.count() - 1] {
            let mut y = vec![0i16; d];
            lattice.decode(index, &mut y).unwrap();
            assert_eq!(lattice.encode(&y), index);
        }
    }
}

#[test]
fn streams_decode_alike_on_every_instruction_set() {
    let mut rng = Rng::new(8);
    for (d, k) in PYRAMIDS {
        for groups in [1, 7, 8, 21] {
            let codec = Codec::new(code(d * groups, d, k, 3)).unwrap();
            let y: Vec<i16> = (0..groups).flat_map(|_| random_point(&mut rng, d, k)).collect();
            let codes: Vec<u16> =
                (0..groups).map(|_| if groups == 1 { 0 } else { rng.below(8) as u16 }).collect();
            let mut index = vec![0u8; codec.index_row_bytes()];
            let mut amp = vec![0u8; codec.amplitude_row_bytes()];
            codec.pack_row(&y, &codes, &mut index, &mut amp);
            let mut back_codes = vec![9; groups];
            codec.unpack_amplitudes(&amp, &mut back_codes);
            assert_eq!(back_codes, codes);
            assert_eq!(codec.first_bad(&index, &amp), None);
            for isa in Isa::available() {
                let mut back = vec![0i16; y.len()];
                codec.unpack_points_with(isa, &index, &mut back);
                assert_eq!(back, y, "{isa:?} D = {d}, K = {k}, {groups} groups");
                if k <= 127 {
                    let mut back = vec![0i8; y.len()];
                    codec.unpack_points_with(isa, &index, &mut back);
                    assert!(back.iter().zip(&y).all(|(b, y)| i16::from(*b) == *y));
                }
            }
        }
    }
}

/// Any bits decode to something without a panic, and are found to be out of range if they are.
#[test]
fn damaged_streams_are_found() {
    let mut rng = Rng::new(5);
    for (d, k) in PYRAMIDS {
        let codec = Codec::new(code(d * 16, d, k, 4)).unwrap();
        let lattice = &codec.part(0).lattice;
        let mut index = vec![0u8; codec.index_row_bytes()];
        let amp = vec![0u8; codec.amplitude_row_bytes()];
        assert_eq!(codec.first_bad(&index, &amp), None);
        if !lattice.count().is_power_of_two() {
            // The largest field is out of range; put it into group 5.
            let width = lattice.index_bits() as usize;
            for bit in 5 * width..6 * width {
                index[bit / 8] |= 1 << (bit % 8);
            }
            assert_eq!(codec.first_bad(&index, &amp), Some(5));
            let matrix = PyramidWeights::new(codec.clone(), index.clone(), amp, vec![1.0]);
            assert!(matrix.unwrap_err().to_string().contains("group 5 of row 0"));
        }
        for _ in 0..20 {
            index.iter_mut().for_each(|b| *b = rng.next_u64() as u8);
            for isa in Isa::available() {
                codec.unpack_points_with(isa, &index, &mut vec![0i16; d * 16]);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let error = Lattice::new(16, 3000).unwrap_err().to_string();
    let largest = largest_pulses(16);
    assert!(error.contains("128 bits") && error.contains(&largest.to_string()), "{error}");
    assert!(Lattice::new(16, largest).is_ok() && count(16, largest + 1).is_none());
    assert!(Lattice::new(32, 106).is_err() && largest_pulses(32) == 105);
    for (d, k) in [(0, 1), (1, 0), (MAX_DIMENSION + 1, 1), (4, MAX_PULSES + 1)] {
        assert!(Lattice::new(d, k).is_err());
    }
    assert_eq!(largest_pulses(2), MAX_PULSES);
    let error = Codec::new(code(172, 16, 27, 4)).unwrap_err().to_string();
    assert!(error.contains("groups of 4, 2"), "{error}");
    let mut other = code(172, 16, 27, 4);
    other.tail = Some(Tail { dimension: 12, pulses: 20 });
    assert_eq!(Codec::new(other).unwrap().groups(), 11);
    other.tail = Some(Tail { dimension: 11, pulses: 20 });
    assert!(Codec::new(other).is_err());
    for (inputs, d) in [(0, 4), (8, 16), (8, 0)] {
        assert!(Codec::new(code(inputs, d, 3, 4)).is_err());
    }
    let codec = Codec::new(code(32, 16, 12, 4)).unwrap();
    let mut rows = normal(64, 1);
    let by = |rows: &[f32]| codec.encode(rows, &[1.0, 1.0], Search::Auto, false, true);
    assert!(by(&rows).is_ok() && by(&rows[1..]).is_err());
    for bad in [f32::NAN, f32::INFINITY] {
        rows[37] = bad;
        let error = by(&rows).unwrap_err().to_string();
        assert!(error.contains("weight (1, 5)"), "{error}");
    }
    let encoded = by(&normal(64, 1)).unwrap();
    let wrong = PyramidWeights::new(
        codec.clone(),
        encoded.index[1..].to_vec(),
        encoded.amplitude.clone(),
        vec![1.0; 2],
    );
    assert!(wrong.is_err());
    let wrong = PyramidWeights::new(codec, encoded.index, encoded.amplitude, vec![1.0, f32::NAN]);
    assert!(wrong.unwrap_err().to_string().contains("norm of row 1"));
}

/// Mean of `1 - cos²` over Gaussian vectors.
fn angular_error(search: Search, d: usize, k: usize, vectors: usize, refined: bool) -> f64 {
    let mut total = 0f64;
    let mut y = vec![0i16; d];
    for v in normal(d * vectors, (d * 1000 + k) as u64).chunks(d) {
        search_one(search, v, k, &mut y);
        if refined {
            refine(v, &mut y);
        }
        assert_eq!(y.iter().map(|y| y.unsigned_abs() as usize).sum::<usize>(), k);
        total += 1.0 - cosine(v, &y).powi(2);
    }
    total / vectors as f64
}

#[test]
fn searches_on_gaussian_vectors() {
    for (d, k, greedy, project) in [
        (4, 4, 0.0574, 0.0603),
        (16, 12, 0.0831, 0.0884),
        (16, 27, 0.0193, 0.0194),
        (16, 58, 0.0044, 0.0043),
    ] {
        let g = angular_error(Search::Greedy, d, k, 20_000, false);
        let p = angular_error(Search::Project, d, k, 20_000, false);
        let both = angular_error(Search::Both, d, k, 20_000, false);
        assert!((g / greedy - 1.0).abs() < 0.03, "D = {d}, K = {k}: greedy {g}");
        assert!((p / project - 1.0).abs() < 0.04, "D = {d}, K = {k}: project {p}");
        let refined = angular_error(Search::Auto, d, k, 2000, true);
        assert!(both <= g.min(p) && refined <= 1.02 * both, "{both} {refined}");
        let auto = angular_error(Search::Auto, d, k, 20_000, false);
        assert_eq!(auto, if k < 2 * d { g } else { p });
    }
}

#[test]
fn searches_against_brute_force() {
    let points = all_points(4, 4);
    let vectors = 4000;
    let (mut best_sum, mut refined_sum) = (0f64, 0f64);
    for v in normal(4 * vectors, 4004).chunks(4) {
        let best = points.iter().map(|y| cosine(v, y)).fold(-1.0, f64::max);
        for search in [Search::Greedy, Search::Project, Search::Both] {
            let mut y = vec![0i16; 4];
            search_one(search, v, 4, &mut y);
            let found = cosine(v, &y);
            assert!(found <= best + 1e-9);
            refine(v, &mut y);
            assert!(cosine(v, &y) >= found - 1e-12);
            if search == Search::Both {
                refined_sum += 1.0 - cosine(v, &y).powi(2);
            }
        }
        best_sum += 1.0 - best * best;
    }
    let (best, refined) = (best_sum / vectors as f64, refined_sum / vectors as f64);
    assert!((best - 0.0570).abs() < 0.002 && refined < best * 1.005, "{best} {refined}");
}

#[test]
fn points_are_their_own_nearest() {
    let mut rng = Rng::new(12);
    for (d, k) in [(2, 2), (4, 4), (5, 4), (8, 16), (16, 12), (16, 27), (16, 58), (32, 50)] {
        for _ in 0..300 {
            let y = random_point(&mut rng, d, k);
            let scale = rng.uniform_in(0.001, 20.0) as f32;
            let v: Vec<f32> = y.iter().map(|&y| f32::from(y) * scale).collect();
            for search in [Search::Auto, Search::Greedy, Search::Project, Search::Both] {
                let mut found = vec![0i16; d];
                search_one(search, &v, k, &mut found);
                assert_eq!(found, y, "{search:?} D = {d}, K = {k}");
                refine(&v, &mut found);
                assert_eq!(found, y);
            }
        }
    }
}

#[test]
fn symmetries() {
    let mut rng = Rng::new(3);
    for search in [Search::Greedy, Search::Project] {
        for (d, k) in [(8, 6), (16, 12), (16, 27), (16, 58)] {
            for seed in 0..50 {
                let v = normal(d, seed);
                let mut y = vec![0i16; d];
                search_one(search, &v, k, &mut y);
                // Signs and order go through (there are no ties), lengths do not matter.
                let order = rng.permutation(d);
                let flips: Vec<bool> = (0..d).map(|_| rng.below(2) == 0).collect();
                let flip = |x: f32, i: usize| if flips[i] { -x } else { x };
                let other: Vec<f32> =
                    order.iter().enumerate().map(|(i, &from)| flip(v[from], i) * 3.7).collect();
                let mut found = vec![0i16; d];
                search_one(search, &other, k, &mut found);
                let wanted: Vec<i16> = order
                    .iter()
                    .enumerate()
                    .map(|(i, &from)| if flips[i] { -y[from] } else { y[from] })
                    .collect();
                assert_eq!(found, wanted, "{search:?} D = {d}, K = {k}");
            }
        }
    }
}

#[test]
fn extreme_vectors() {
    let mut y = [0i16; 5];
    for search in [Search::Greedy, Search::Project, Search::Both] {
        // Of two equal coordinates the lower one is served first: it gets the odd pulse from
        // `greedy`, and gives back the one that rounding placed too many.
        let equal = if search == Search::Project { [0, 3, 0, -4, 0] } else { [0, 4, 0, -3, 0] };
        for (v, wanted) in [
            ([0.0; 5], [7, 0, 0, 0, 0]),
            ([0.0, 0.0, -1e-42, 0.0, 0.0], [0, 0, -7, 0, 0]),
            ([0.0, 3e38, 0.0, -3e38, 0.0], equal),
        ] {
            search_one(search, &v, 7, &mut y);
            assert_eq!(y, wanted, "{search:?}");
        }
    }
}

#[test]
fn error_falls_with_the_square_of_the_pulses() {
    let errors: Vec<f64> = [64, 128, 256, 512]
        .iter()
        .map(|&k| angular_error(Search::Project, 8, k, 2000, false))
        .collect();
    for pair in errors.windows(2) {
        assert!((pair[0] / pair[1] / 4.0 - 1.0).abs() < 0.1, "{errors:?}");
    }
    assert!(errors[3] < 1e-4);
}

#[test]
fn projected_length_is_never_worse() {
    let (d, k) = (16, 12);
    for v in normal(d * 1000, 21).chunks(d) {
        let mut y = vec![0i16; d];
        search_one(Search::Auto, v, k, &mut y);
        let length = v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let norm = y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt();
        let error = |alpha: f64| -> f64 {
            v.iter()
                .zip(&y)
                .map(|(v, y)| (f64::from(*v) - alpha * f64::from(*y) / norm).powi(2))
                .sum()
        };
        let cos = cosine(v, &y);
        let (projected, plain) = (error(length * cos), error(length));
        assert!(projected <= plain);
        assert!((projected - length * length * (1.0 - cos * cos)).abs() < 1e-9);
        assert!((plain - 2.0 * length * length * (1.0 - cos)).abs() < 1e-9);
    }
}

/// Whole pipeline: relative squared error of decoded Gaussian rows.
fn pipeline_error(code: Code, out: usize, projection: bool) -> f64 {
    let rows = normal(out * code.inputs, 77);
    let norms = norms(&rows, code.inputs);
    let codec = Codec::new(code).unwrap();
    let encoded = codec.encode(&rows, &norms, Search::Auto, false, projection).unwrap();
    let weights = PyramidWeights::new(codec, encoded.index, encoded.amplitude, norms).unwrap();
    let back = weights.dequantize();
    let error: f64 = rows.iter().zip(&back).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    error / rows.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>()
}

#[test]
fn gaussian_rows_through_the_pipeline() {
    let at = |k: usize, mode: AmplitudeMode| {
        pipeline_error(Code { amplitude: mode, ..code(128, 16, k, 4) }, 600, true)
    };
    let (cdf, lloyd) = (at(27, AmplitudeMode::BetaCdf), at(27, AmplitudeMode::BetaLloyd));
    assert!((cdf - 0.0199).abs() < 3e-4 && (lloyd - 0.0196).abs() < 3e-4, "{cdf} {lloyd}");
    let low = at(12, AmplitudeMode::BetaLloyd);
    assert!((low - 0.083).abs() < 1.5e-3, "{low}");
    assert!(lloyd < pipeline_error(code(128, 16, 27, 4), 600, false));
    assert!(at(27, AmplitudeMode::F16) < lloyd && lloyd < cdf);
    // No bits for lengths, and a single group per row.
    let (none, single) = (
        pipeline_error(code(128, 16, 27, 0), 300, true),
        pipeline_error(code(16, 16, 27, 0), 300, true),
    );
    assert!(none > lloyd && none < 0.08 && single < 0.021, "{none} {single}");
}

#[test]
fn refinement_and_both_searches_help_the_pipeline() {
    let rows = normal(128 * 64, 3);
    let norms = norms(&rows, 128);
    let codec = Codec::new(code(128, 16, 12, 4)).unwrap();
    let error = |search, refined| {
        let e = codec.encode(&rows, &norms, search, refined, true).unwrap();
        let w = PyramidWeights::new(codec.clone(), e.index, e.amplitude, norms.clone()).unwrap();
        rows.iter().zip(w.dequantize()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    let (project, greedy) = (error(Search::Project, false), error(Search::Greedy, false));
    let (both, refined) = (error(Search::Both, false), error(Search::Project, true));
    assert!(greedy < project && both <= greedy && refined < project, "{project} {greedy} {both}");
}

#[test]
fn zero_rows_and_groups() {
    let mut rows = normal(64, 2);
    rows[..32].fill(0.0);
    rows[32..48].fill(0.0);
    let norms = norms(&rows, 32);
    let with = |amp_zero: bool| {
        let codec = Codec::new(Code { amp_zero, ..code(32, 16, 12, 4) }).unwrap();
        let e = codec.encode(&rows, &norms, Search::Auto, false, true).unwrap();
        assert_eq!(e.zero_groups, 1, "a row of zeros does not count");
        PyramidWeights::new(codec, e.index, e.amplitude, norms.clone()).unwrap().dequantize()
    };
    let (without, with) = (with(false), with(true));
    assert!(without[..32].iter().chain(&with[..48]).all(|w| *w == 0.0));
    assert!(without[32..48].iter().any(|w| *w != 0.0));
    assert!(with[48..].iter().any(|w| *w != 0.0));
}

/// |y - exact| <= (in / 8 + 16) eps (Σ |x w| + |b|) on the dequantised weights, on every path.
#[test]
fn products_agree_with_dequantised_weights() {
    let tail = Some(Tail { dimension: 12, pulses: 20 });
    for (seed, code) in [
        code(128, 16, 27, 4),
        Code { tail, ..code(172, 16, 27, 4) },
        code(96, 32, 50, 3),
        code(60, 4, 11, 4),
        code(64, 8, 300, 5),
        code(16, 16, 58, 4),
        code(40, 5, 6, 2),
        Code { amplitude: AmplitudeMode::F16, ..code(64, 8, 16, 0) },
    ]
    .into_iter()
    .enumerate()
    {
        let width = code.inputs;
        for out in [1, 6, 67] {
            let rows = normal(out * width, seed as u64);
            let norms = norms(&rows, width);
            let codec = Codec::new(code).unwrap();
            let e = codec.encode(&rows, &norms, Search::Auto, false, true).unwrap();
            let weights = PyramidWeights::new(codec, e.index, e.amplitude, norms).unwrap();
            assert_eq!(weights.shape(), [out, width]);
            let w = weights.dequantize();
            let bias = normal(out, 9);
            for tokens in [1, 3, 16, 17, 40] {
                let x = normal(tokens * width, 50 + seed as u64);
                for isa in Isa::available() {
                    let mut y = vec![f32::NAN; tokens * out];
                    weights.linear_with(isa, &x, tokens, Some(&bias), &mut y);
                    for (t, o) in (0..tokens).flat_map(|t| (0..out).map(move |o| (t, o))) {
                        let terms = || {
                            x[t * width..(t + 1) * width]
                                .iter()
                                .zip(&w[o * width..(o + 1) * width])
                                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        };
                        let exact = terms().sum::<f64>() + f64::from(bias[o]);
                        let size = terms().map(f64::abs).sum::<f64>() + f64::from(bias[o].abs());
                        let bound = (width as f64 / 8.0 + 16.0) * f64::from(f32::EPSILON) * size;
                        let got = f64::from(y[t * out + o]);
                        assert!(
                            (got - exact).abs() <= bound,
                            "{isa:?} {code:?} {tokens} ({t}, {o})"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let rows = normal(256 * 90, 6);
    let norms = norms(&rows, 256);
    let codec = Codec::new(code(256, 16, 27, 4)).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| codec.encode(&rows, &norms, Search::Both, false, true).unwrap())
    };
    let (one, three) = (run(1), run(3));
    assert_eq!((one.index, one.amplitude), (three.index, three.amplitude));
}

/// The error `(x - α y/‖y‖) M (...)ᵀ` by its definition.
fn cost(m: &[f64], x: &[f32], y: &[i16], alpha: f64) -> f64 {
    let norm = y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt();
    let d: Vec<f64> =
        x.iter().zip(y).map(|(x, y)| f64::from(*x) - alpha * f64::from(*y) / norm).collect();
    let n = d.len();
    (0..n).map(|i| (0..n).map(|j| d[i] * m[i * n + j] * d[j]).sum::<f64>()).sum()
}

#[test]
fn lengths_and_moves_under_a_metric() {
    // U upper triangular; M = (UᵀU)⁻¹ from the explicit inverse of a 2 x 2 case.
    let metric = Metric::of_upper(&[2.0, 1.0, 0.0, 0.5], 2);
    // UᵀU = [[4, 2], [2, 1.25]], determinant 1, inverse [[1.25, -2], [-2, 4]].
    let m = [1.25, -2.0, -2.0, 4.0];
    let x = [0.9f32, -0.4];
    for y in all_points(2, 3) {
        let alpha = f64::from(amplitude_under(&metric, &x, &y));
        let best = cost(&m, &x, &y, alpha);
        assert!(best <= cost(&m, &x, &y, alpha + 1e-3) && best <= cost(&m, &x, &y, alpha - 1e-3));
    }
    // With M = c I both are the Euclidean ones.
    let d = 6;
    let identity: Vec<f32> = (0..d * d).map(|i| if i % (d + 1) == 0 { 0.3 } else { 0.0 }).collect();
    let metric = Metric::of_upper(&identity, d);
    for x in normal(d * 200, 4).chunks(d) {
        let mut y = vec![0i16; d];
        search_one(Search::Project, x, 5, &mut y);
        let norm = y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt();
        let dot: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        assert!((f64::from(amplitude_under(&metric, x, &y)) - dot / norm).abs() < 1e-5);
        let mut plain = y.clone();
        refine(x, &mut plain);
        refine_under(&metric, x, &mut y);
        assert_eq!(y, plain);
    }
    // Refined points are no worse, and mostly the best of a small pyramid.
    let upper: Vec<f32> = (0..9)
        .map(|i| match (i / 3, i % 3) {
            (r, c) if r == c => 1.0 + r as f32,
            (r, c) if r < c => 0.7,
            _ => 0.0,
        })
        .collect();
    let metric = Metric::of_upper(&upper, 3);
    let points = all_points(3, 4);
    let u = |r: usize, c: usize| f64::from(upper[3 * r + c]);
    // M by solving UᵀU M = I column by column.
    let gram: Vec<f64> = (0..9).map(|i| (0..3).map(|k| u(k, i / 3) * u(k, i % 3)).sum()).collect();
    let mut m = vec![0f64; 9];
    for c in 0..3 {
        let mut e = vec![0f64; 3];
        e[c] = 1.0;
        crate::linalg::solve_spd(&gram, 3, &mut e, 1).unwrap();
        (0..3).for_each(|r| m[3 * r + c] = e[r]);
    }
    let mut hits = 0;
    for x in normal(3 * 200, 8).chunks(3) {
        let cheapest = |y: &[i16]| cost(&m, x, y, f64::from(amplitude_under(&metric, x, y)));
        let best = points
            .iter()
            .filter(|y| amplitude_under(&metric, x, y) > 0.0)
            .map(|y| cheapest(y))
            .fold(f64::INFINITY, f64::min);
        let mut y = vec![0i16; 3];
        search_one(Search::Greedy, x, 4, &mut y);
        let before = cheapest(&y);
        refine_under(&metric, x, &mut y);
        assert_eq!(y.iter().map(|y| y.abs()).sum::<i16>(), 4);
        assert!(cheapest(&y) <= before * (1.0 + 1e-6));
        hits += usize::from(cheapest(&y) <= best * (1.0 + 1e-6));
    }
    assert!(hits > 150, "{hits} of 200");
}
