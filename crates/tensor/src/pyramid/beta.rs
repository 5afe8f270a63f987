//! The Beta law: logarithm of the gamma function, regularised incomplete beta function and its
//! inverse, in double precision.
//!
//! ```
//! use strata_tensor::pyramid::beta::{incomplete, inverse};
//! assert!((incomplete(0.25, 2.0, 6.0) - 0.5550537109375).abs() < 1e-14);
//! assert!((inverse(0.5, 2.0, 6.0) - 0.2284900).abs() < 1e-7);
//! ```

/// `ln Γ(x)` for `x > 0`: Stirling's series, after the recursion has lifted x above 12.
pub fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut product) = (x, 1f64);
    while x < 12.0 {
        product *= x;
        x += 1.0;
    }
    // B_2k / (2k (2k-1) x^(2k-1)), the first seven; the eighth is below 1e-16 at 12.
    const TERMS: [f64; 7] = [
        1.0 / 12.0,
        -1.0 / 360.0,
        1.0 / 1260.0,
        -1.0 / 1680.0,
        1.0 / 1188.0,
        -691.0 / 360_360.0,
        1.0 / 156.0,
    ];
    let square = 1.0 / (x * x);
    let series = TERMS.iter().rev().fold(0.0, |sum, term| sum * square + term) / x;
    (x - 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln() + series - product.ln()
}

/// `ln B(a, b)`.
pub fn ln_beta(a: f64, b: f64) -> f64 {
    ln_gamma(a) + ln_gamma(b) - ln_gamma(a + b)
}

/// The regularised incomplete beta function `I_x(a, b)` for `a, b > 0`: the distribution function of
/// the Beta law. Values of x outside [0, 1] count as 0 or 1.
pub fn incomplete(x: f64, a: f64, b: f64) -> f64 {
    if x.is_nan() || x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    // The continued fraction converges fast on the near side of the mean.
    if x < (a + 1.0) / (a + b + 2.0) { near_zero(x, a, b) } else { 1.0 - near_zero(1.0 - x, b, a) }
}

/// `x^a (1-x)^b / (a B(a, b))` times the continued fraction, by Lentz's method.
fn near_zero(x: f64, a: f64, b: f64) -> f64 {
    let front = (a * x.ln() + b * (-x).ln_1p() - ln_beta(a, b)).exp() / a;
    // Keeps denominators off 0.
    let guard = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / guard(1.0 - (a + b) * x / (a + 1.0));
    let mut fraction = d;
    for m in 1..2000 {
        let m = f64::from(m);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / guard(1.0 + even * d);
        c = guard(1.0 + even / c);
        fraction *= c * d;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / guard(1.0 + odd * d);
        c = guard(1.0 + odd / c);
        let change = c * d;
        fraction *= change;
        if (change - 1.0).abs() < 1e-16 {
            break;
        }
    }
    front * fraction
}

/// Density of the Beta law.
pub fn density(x: f64, a: f64, b: f64) -> f64 {
    if x > 0.0 && x < 1.0 {
        ((a - 1.0) * x.ln() + (b - 1.0) * (-x).ln_1p() - ln_beta(a, b)).exp()
    } else {
        0.0
    }
}

/// The x with `I_x(a, b) = p`: Newton's method inside a bracket that bisection keeps.
pub fn inverse(p: f64, a: f64, b: f64) -> f64 {
    if p.is_nan() || p <= 0.0 {
        return 0.0;
    }
    if p >= 1.0 {
        return 1.0;
    }
    let (mut low, mut high) = (0f64, 1f64);
    let mut x = a / (a + b);
    for _ in 0..200 {
        let excess = incomplete(x, a, b) - p;
        if excess > 0.0 {
            high = x;
        } else {
            low = x;
        }
        let slope = density(x, a, b);
        let newton = x - excess / slope;
        let next =
            if slope > 0.0 && newton > low && newton < high { newton } else { 0.5 * (low + high) };
        if (next - x).abs() <= 1e-16 * x || high - low <= 1e-16 * high {
            return next;
        }
        x = next;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gamma_at_known_places() {
        let mut factorial = 0f64;
        for n in 1..60 {
            assert!((ln_gamma(f64::from(n)) - factorial).abs() < 1e-13 * factorial.max(1.0));
            factorial += f64::from(n).ln();
        }
        assert!((ln_gamma(0.5) - std::f64::consts::PI.sqrt().ln()).abs() < 1e-14);
        // Γ(x) Γ(1-x) = π / sin πx
        for x in [0.1, 0.25, 0.37] {
            let product = ln_gamma(x) + ln_gamma(1.0 - x);
            let exact = (std::f64::consts::PI / (std::f64::consts::PI * x).sin()).ln();
            assert!((product - exact).abs() < 1e-13);
        }
    }

    /// For whole a and b the function is a binomial tail.
    #[test]
    fn incomplete_is_a_binomial_tail() {
        for (a, b) in [(1u32, 1u32), (2, 6), (3, 5), (8, 24), (1, 9)] {
            let n = a + b - 1;
            for i in 1..40 {
                let x = f64::from(i) / 40.0;
                let mut tail = 0f64;
                let mut term = (1.0 - x).powi(n as i32);
                for j in 0..=n {
                    if j >= a {
                        tail += term;
                    }
                    term *= f64::from(n - j) / f64::from(j + 1) * x / (1.0 - x);
                }
                let got = incomplete(x, f64::from(a), f64::from(b));
                assert!((got - tail).abs() < 1e-13, "I_{x}({a}, {b}) = {got}, tail {tail}");
            }
        }
        assert!((incomplete(0.25, 2.0, 6.0) - 0.555_053_7).abs() < 1e-7);
        assert_eq!((incomplete(-1.0, 2.0, 3.0), incomplete(1.0, 2.0, 3.0)), (0.0, 1.0));
        assert_eq!(incomplete(f64::NAN, 2.0, 3.0), 0.0);
        // I_x(a, b) + I_{1-x}(b, a) = 1, far apart parameters.
        for x in [1e-6, 1e-3, 0.004, 0.01, 0.5] {
            let sum = incomplete(x, 8.0, 2040.0) + incomplete(1.0 - x, 2040.0, 8.0);
            assert!((sum - 1.0).abs() < 1e-13);
        }
    }

    #[test]
    fn inverse_undoes_it() {
        assert!((inverse(0.5, 2.0, 6.0) - 0.228_490_0).abs() < 5e-8);
        for (a, b) in [(0.5, 0.5), (2.0, 6.0), (8.0, 56.0), (8.0, 2040.0), (0.5, 63.5)] {
            for p in [1e-6, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0 - 1e-6] {
                let x = inverse(p, a, b);
                // Near 1 neighbouring x are far apart in probability.
                let spacing = density(x, a, b) * 4.0 * f64::EPSILON;
                assert!((incomplete(x, a, b) - p).abs() < 1e-12 + spacing, "{a} {b} {p}: {x}");
            }
        }
        assert_eq!((inverse(0.0, 2.0, 3.0), inverse(1.0, 2.0, 3.0)), (0.0, 1.0));
    }

    /// E r = D/n and Var r = ab / ((a+b)² (a+b+1)), by integration of the density.
    #[test]
    fn moments_of_group_energies() {
        let (a, b) = (8.0, 56.0);
        let steps = 200_000;
        let (mut mean, mut square) = (0f64, 0f64);
        for i in 0..steps {
            let x = (f64::from(i) + 0.5) / f64::from(steps);
            let weight = density(x, a, b) / f64::from(steps);
            mean += x * weight;
            square += x * x * weight;
        }
        assert!((mean - 0.125).abs() < 1e-9);
        assert!((square - mean * mean - 0.001_682_69).abs() < 1e-8);
    }
}
