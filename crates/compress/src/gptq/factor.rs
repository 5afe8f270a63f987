//! The Hessian's factor: what all linears that read the same input share in GPTQ.

use super::{Factorization, GptqOptions};
use crate::statistics::Gram;
use crate::{Error, Result};
use tensor::linalg::Precision;

/// What the linears that read the same input share: column order and factor of the Hessian.
#[derive(Debug)]
pub struct Factor {
    /// Position -> original column; `None` means as stored.
    pub(super) order: Option<Vec<usize>>,
    /// Original columns that no token excites (`diag H = 0`).
    pub(super) dead: Vec<usize>,
    /// Upper factor `U` with `H⁻¹ = Uᵀ U`, `[in, in]` row-major, in the processing order.
    pub(super) upper: Vec<f32>,
    /// Value added to the diagonal.
    pub(super) damping: f64,
    pub(super) width: usize,
}

impl Factor {
    /// Factorises the Hessian of `gram` (`[in, in]`).
    pub fn new(layer: &str, gram: &Gram, options: &GptqOptions) -> Result<Self> {
        Self::of_hessian(layer, gram.hessian(), gram.width(), gram.tokens(), options)
    }

    /// As [`Factor::new`], from the Hessian itself (`[width, width]`, made from `tokens` tokens): a
    /// large layer's is held once, not twice.
    ///
    /// # Errors
    /// Activations that are not finite, no calibrated input at all, or a matrix that is not positive
    /// definite after damping; each names `layer`.
    pub fn of_hessian(
        layer: &str,
        hessian: Vec<f64>,
        width: usize,
        tokens: usize,
        options: &GptqOptions,
    ) -> Result<Self> {
        let hint = "use more or longer calibration samples, raise --damping, or pass \
                    --on-failure rtn";
        Self::damped(layer, hessian, [width, tokens], options, options.damping, hint)
    }

    /// As [`Factor::of_hessian`] in the stored order; ten times as much damping is tried when the
    /// factorisation fails, as long as it does not exceed the mean of the diagonal.
    ///
    /// # Errors
    /// As [`Factor::of_hessian`].
    pub fn tenfold(
        layer: &str,
        hessian: Vec<f64>,
        width: usize,
        tokens: usize,
        damping: f64,
    ) -> Result<Self> {
        let options = GptqOptions { damping, ..GptqOptions::default() };
        let hint = "use more or longer calibration samples, or --exclude the layer";
        Self::damped(layer, hessian, [width, tokens], &options, 1.0, hint)
    }

    fn damped(
        layer: &str,
        mut hessian: Vec<f64>,
        [width, tokens]: [usize; 2],
        options: &GptqOptions,
        largest: f64,
        hint: &str,
    ) -> Result<Self> {
        if let Some(bad) = (0..width).find(|&i| !hessian[i * width + i].is_finite()) {
            return Err(Error::layer(
                layer,
                format!(
                    "activations of input {bad} are NaN or infinite; the model overflows on the \
                     calibration text"
                ),
            ));
        }
        let dead: Vec<usize> = (0..width).filter(|&i| hessian[i * width + i] == 0.0).collect();
        if dead.len() == width {
            return Err(Error::layer(
                layer,
                "no calibration token excites any input; give calibration text".to_string(),
            ));
        }
        for &i in &dead {
            hessian[i * width + i] = 1.0;
        }
        let order = options.act_order.then(|| {
            let mut order: Vec<usize> = (0..width).collect();
            order.sort_by(|&a, &b| {
                hessian[b * width + b].total_cmp(&hessian[a * width + a]).then(a.cmp(&b))
            });
            order
        });
        if let Some(order) = &order {
            let source = hessian;
            hessian = Vec::with_capacity(width * width);
            for &row in order {
                hessian.extend(order.iter().map(|&column| source[row * width + column]));
            }
        }
        let precision = match options.factorization {
            Factorization::F64 => Precision::F64,
            Factorization::F32 => Precision::F32,
        };
        let mut fraction = options.damping;
        let factored = loop {
            match tensor::linalg::inverse_cholesky_upper(&hessian, width, fraction, precision) {
                Ok(factored) => break factored,
                // The tolerance lets 0.001 arrive at 1.
                Err(_) if fraction * 10.0 <= largest * (1.0 + 1e-9) => fraction *= 10.0,
                Err(error) => {
                    return Err(Error::layer(
                        layer,
                        format!(
                            "{error}; the Hessian of {width} inputs was made from {tokens} \
                             tokens: {hint}"
                        ),
                    ));
                }
            }
        };
        let (damping, upper) = (factored.damping, factored.upper.into_f32());
        Ok(Self { order, dead, upper, damping, width })
    }

    /// Original column at a position of the processing order.
    #[inline]
    pub fn column(&self, position: usize) -> usize {
        self.order.as_ref().map_or(position, |order| order[position])
    }

    /// Value that was added to the Hessian's diagonal.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// Number of inputs that no calibration token excites.
    pub fn dead_columns(&self) -> usize {
        self.dead.len()
    }

    /// Number of inputs.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Whether columns are processed in the order in which they are stored.
    pub fn keeps_order(&self) -> bool {
        self.order.is_none()
    }

    /// Original columns that no calibration token excites.
    pub fn dead(&self) -> &[usize] {
        &self.dead
    }

    /// The factor `U`, `[in, in]` row-major, in the processing order.
    pub fn upper(&self) -> &[f32] {
        &self.upper
    }

    /// Refuses a weight of another width than the Hessian's.
    pub fn check_width(&self, layer: &str, width: usize) -> Result<()> {
        if width == self.width {
            return Ok(());
        }
        Err(Error::layer(
            layer,
            format!("weight has {width} inputs but the Hessian has {}", self.width),
        ))
    }
}
