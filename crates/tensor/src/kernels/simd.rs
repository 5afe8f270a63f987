//! The instruction-set dispatch and the few vectorised scalar functions that the kernels share.
//!
//! A function inside [`simd!`] is compiled three times (AVX-512, AVX2 with FMA, baseline) and picked
//! at run time, so users need no target flags. The loops are plain; fixed-width accumulators make
//! the reductions vectorise and keep their order, hence their bytes, the same on every run.

/// Elements of one parallel piece of elementwise work.
pub(crate) const BLOCK: usize = 16 * 1024;

/// Compiles a function for AVX-512, AVX2 and the baseline, and picks at run time.
#[macro_export]
macro_rules! simd {
    ($(#[$meta:meta])* $v:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $v fn $name($($arg: $ty),*) $(-> $ret)? {
            #[allow(clippy::too_many_arguments)]
            #[inline(always)]
            fn generic($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn v4($($arg: $ty),*) $(-> $ret)? {
                    generic($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn v3($($arg: $ty),*) $(-> $ret)? {
                    generic($($arg),*)
                }
                let wide = std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512vl")
                    && std::is_x86_feature_detected!("avx512dq");
                let fma = std::is_x86_feature_detected!("avx2")
                    && std::is_x86_feature_detected!("fma");
                if wide && fma {
                    // SAFETY: the features were detected on this processor.
                    return unsafe { v4($($arg),*) };
                }
                if fma {
                    // SAFETY: the features were detected on this processor.
                    return unsafe { v3($($arg),*) };
                }
            }
            generic($($arg),*)
        }
    };
}
pub(crate) use simd;

const LANES: usize = 16;
/// Accumulators in flight: two vectors hide the latency of the addition.
const WIDE: usize = 2 * LANES;

/// `Σ f(x)` in a fixed order that vectorises.
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; WIDE];
    let blocks = x.chunks_exact(WIDE);
    let rest = blocks.remainder();
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += f(x);
        }
    }
    fold(lanes) + short_sum(rest.len(), |i| f(rest[i]))
}

/// `Σ f(x, y)`, over the shorter length.
#[inline(always)]
pub(crate) fn sum2(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    let mut lanes = [0f32; WIDE];
    let blocks = x.chunks_exact(WIDE).zip(y.chunks_exact(WIDE));
    for (x, y) in blocks {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += f(x, y);
        }
    }
    let whole = n / WIDE * WIDE;
    let (x, y) = (&x[whole..], &y[whole..]);
    fold(lanes) + short_sum(x.len().min(y.len()), |i| f(x[i], y[i]))
}

/// `Σ f(x, y, z)`, over the shortest length.
#[inline(always)]
pub(crate) fn sum3(x: &[f32], y: &[f32], z: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let n = x.len().min(y.len()).min(z.len());
    let (x, y, z) = (&x[..n], &y[..n], &z[..n]);
    let mut lanes = [0f32; WIDE];
    let blocks = x.chunks_exact(WIDE).zip(y.chunks_exact(WIDE)).zip(z.chunks_exact(WIDE));
    for ((x, y), z) in blocks {
        for (((lane, &x), &y), &z) in lanes.iter_mut().zip(x).zip(y).zip(z) {
            *lane += f(x, y, z);
        }
    }
    let whole = n / WIDE * WIDE;
    let (x, y, z) = (&x[whole..], &y[whole..], &z[whole..]);
    fold(lanes) + short_sum(x.len(), |i| f(x[i], y[i], z[i]))
}

/// The rest of a sum, shorter than [`WIDE`]: one more vector, then value by value.
#[inline(always)]
fn short_sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut total = 0.0;
    let mut from = 0;
    if n >= LANES {
        let mut lanes = [0f32; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = f(i);
        }
        total = halve(lanes);
        from = LANES;
    }
    for i in from..n {
        total += f(i);
    }
    total
}

#[inline(always)]
fn fold(lanes: [f32; WIDE]) -> f32 {
    let mut half = [0f32; LANES];
    for lane in 0..LANES {
        half[lane] = lanes[lane] + lanes[lane + LANES];
    }
    halve(half)
}

#[inline(always)]
fn halve(mut lanes: [f32; LANES]) -> f32 {
    let mut step = LANES / 2;
    while step > 0 {
        for lane in 0..step {
            lanes[lane] += lanes[lane + step];
        }
        step /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum2(a, b, |a, b| a * b)
}

/// The largest value (`-inf` for none; NaN is passed over).
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; WIDE];
    let blocks = x.chunks_exact(WIDE);
    let rest = blocks.remainder();
    for block in blocks {
        for (lane, &value) in lanes.iter_mut().zip(block) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    let mut largest = f32::NEG_INFINITY;
    for &value in lanes.iter().chain(rest) {
        largest = if value > largest { value } else { largest };
    }
    largest
}

/// `e^x` to about 1e-7 relative; no branches, so that loops vectorise. Flushes to 0 below
/// x = -87.3 and saturates above 88.7; NaN gives a number, callers that care check first.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let small = x < -87.3;
    let x = if x > 88.7 { 88.7 } else { x };
    let x = if small { -87.3 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts: the first has few enough bits for n * part to be exact.
    let r = (-n).mul_add(0.693_359_4, x);
    let r = (-n).mul_add(-2.121_944_4e-4, r);
    // Minimax polynomial for e^r on |r| <= ln 2 / 2 (Cephes expf).
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5.0e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    let bits = (shifted.to_bits() << 23).wrapping_add(y.to_bits());
    if small { 0.0 } else { f32::from_bits(bits) }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent to about 2e-7 relative.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    // Near 0 the quotient below cancels; an odd polynomial (Cephes tanhf) takes over.
    let square = x * x;
    let p = -5.704_988_7e-3f32;
    let p = p.mul_add(square, 2.063_909e-2);
    let p = p.mul_add(square, -5.373_971_5e-2);
    let p = p.mul_add(square, 1.333_144_2e-1);
    let p = p.mul_add(square, -3.333_328e-1);
    let near = (p * square).mul_add(x, x);
    let magnitude = x.abs();
    let far = (1.0 - 2.0 / (exp(2.0 * magnitude) + 1.0)).copysign(x);
    if magnitude < 0.625 { near } else { far }
}

/// Error function to about 3e-7 relative: the rational approximation `x P(x²) / Q(x²)` on [-4, 4]
/// that several numerical libraries share; beyond, erf is ±1 in f32.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let square = x * x;
    let p = -2.726_142_3e-10f32;
    let p = p.mul_add(square, 2.770_681_4e-8);
    let p = p.mul_add(square, -2.101_024e-6);
    let p = p.mul_add(square, -5.692_506_4e-5);
    let p = p.mul_add(square, -7.349_906_3e-4);
    let p = p.mul_add(square, -2.954_6e-3);
    let p = p.mul_add(square, -1.609_603_3e-2);
    let q = -1.456_607_2e-5f32;
    let q = q.mul_add(square, -2.133_740_6e-4);
    let q = q.mul_add(square, -1.682_827e-3);
    let q = q.mul_add(square, -7.373_329e-3);
    let q = q.mul_add(square, -1.426_473_9e-2);
    x * p / q
}

/// A vector whose values are about to be written, every one of them.
///
/// Zeroing a large buffer costs a pass over memory. Only for `f32`, for which every bit pattern is
/// a value; callers write all elements before they read any.
#[allow(clippy::uninit_vec)]
pub(crate) fn scratch(length: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(length);
    // SAFETY: the capacity is there, f32 has no invalid bit patterns and no destructor, and the
    // contract above has every element written before it is read.
    unsafe { values.set_len(length) };
    values
}

/// Adds `b` to `a`.
pub(crate) fn add_into(a: &mut [f32], b: &[f32]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, range: f32) -> f64 {
        let mut worst = 0.0f64;
        for i in -40_000..=40_000 {
            let x = i as f32 / 40_000.0 * range;
            let (got, wanted) = (f64::from(f(x)), exact(f64::from(x)));
            worst = worst.max((got - wanted).abs() / wanted.abs().max(1e-30));
        }
        worst
    }

    /// erf by its series in f64 (and by 1 - erfc's continued fraction far out).
    fn erf_exact(x: f64) -> f64 {
        if x.abs() > 3.0 {
            let (a, mut fraction) = (x.abs(), 0.0);
            for k in (1..60).rev() {
                fraction = f64::from(k) / 2.0 / (a + fraction);
            }
            let erfc = (-a * a).exp() / (std::f64::consts::PI.sqrt() * (a + fraction));
            return (1.0 - erfc).copysign(x);
        }
        let (mut term, mut total) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            total += term / f64::from(2 * n + 1);
        }
        total * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn scalar_functions_are_accurate() {
        assert!((erf_exact(1.0) - 0.842_700_792_949_714_9).abs() < 1e-14);
        assert!((erf_exact(3.5) - 0.999_999_256_901_627_7).abs() < 1e-14);
        for (name, error) in [
            ("exp", worst(exp, f64::exp, 87.0)),
            ("tanh", worst(tanh, f64::tanh, 12.0)),
            ("tanh near 0", worst(tanh, f64::tanh, 0.01)),
            ("erf", worst(erf, erf_exact, 6.0)),
            ("erf near 0", worst(erf, erf_exact, 0.01)),
            ("sigmoid", worst(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 80.0)),
        ] {
            println!("{name}: {error:.2e}");
            assert!(error < 6e-7, "{name}: relative error {error:e}");
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(-1000.0), exp(0.0)), (0.0, 0.0, 1.0));
        assert!(exp(1000.0) > 3e38);
    }

    #[test]
    fn reductions_match_plain_loops() {
        for n in [0, 1, 15, 16, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
            assert_eq!(sum(&x, |x| x), x.iter().sum::<f32>());
            assert_eq!(sum3(&x, &x, &x, |a, b, c| a * b + c), dot(&x, &x) + sum(&x, |x| x));
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(dot(&x, &x), x.iter().map(|v| v * v).sum::<f32>());
        }
    }
}
