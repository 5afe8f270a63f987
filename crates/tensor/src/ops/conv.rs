//! Convolution, batch normalisation and shortcuts of image networks.
//!
//! Images are rows of pixels: `[images * height * width, channels]`, so that a convolution of one
//! pixel is a linear layer, a norm over channels one over columns, and everything else stays what it
//! is for tokens.
use super::composed;
use super::record::{Buffer, Call, Operand};
use crate::kernels::batch_norm as norm;
use crate::kernels::conv::{self as kernel, Epilogue};
use crate::{Tensor, host};

/// The geometry of a convolution (or, with its own kernel and stride, of any window).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// Images in the batch.
    pub images: usize,
    /// Rows of pixels of the input.
    pub height: usize,
    /// Columns of pixels of the input.
    pub width: usize,
    /// Channels of the input.
    pub channels: usize,
    /// Channels of the output.
    pub filters: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Pixels from one window to the next, in both directions.
    pub stride: usize,
    /// Zeros around the input, on every side; less than the kernel.
    pub padding: usize,
}

impl Conv2d {
    /// Rows and columns of the output (0 where the kernel does not fit).
    pub fn out(&self) -> [usize; 2] {
        let along = |length: usize, kernel: usize| {
            let padded = length + 2 * self.padding;
            if kernel == 0 || self.stride == 0 || padded < kernel {
                0
            } else {
                (padded - kernel) / self.stride + 1
            }
        };
        [along(self.height, self.kernel[0]), along(self.width, self.kernel[1])]
    }

    /// Rows of the output tensor.
    pub fn out_rows(&self) -> usize {
        let [height, width] = self.out();
        self.images * height * width
    }

    /// Checks the geometry against itself and the tensors' shapes.
    fn check(&self, x: [usize; 2], w: [usize; 2], bias: Option<[usize; 1]>) {
        let [kh, kw] = self.kernel;
        assert!(
            kh > self.padding && kw > self.padding && self.stride > 0,
            "conv2d: kernel and stride must not be 0, and the padding less than the kernel: {self:?}"
        );
        assert!(self.out().iter().all(|&n| n > 0), "conv2d: the kernel does not fit: {self:?}");
        let rows = self.images * self.height * self.width;
        assert_eq!(x, [rows, self.channels], "conv2d: shape of the input against {self:?}");
        let weights = [self.filters, self.channels * kh * kw];
        assert_eq!(w, weights, "conv2d: shape of the weights against {self:?}");
        assert!(bias.is_none_or(|b| b == [self.filters]), "conv2d: bias against {self:?}");
    }
}

/// Convolution of `x [images * height * width, channels]` with `w [filters, channels * kh * kw]`
/// (PyTorch's `[filters, channels, kh, kw]`, flattened), plus `bias [filters]`. Returns
/// `[images * out height * out width, filters]`.
///
/// # Panics
/// If the spec does not fit the shapes.
pub fn conv2d(x: Tensor<2>, w: Tensor<2>, bias: Option<Tensor<1>>, spec: &Conv2d) -> Tensor<2> {
    spec.check(x.dims(), w.dims(), bias.as_ref().map(Tensor::dims));
    let bias_in = match &bias {
        Some(bias) => Operand::of(bias),
        None => Some(Operand::nothing()),
    };
    let (Some(x_in), Some(w_in), Some(bias_in)) = (Operand::of(&x), Operand::of(&w), bias_in)
    else {
        return composed::conv2d(x, w, bias, spec);
    };
    let biased = bias.is_some();
    drop((x, w, bias));
    let epilogue = Epilogue { shift: biased.then_some(&*bias_in.data), ..Epilogue::default() };
    let y = kernel::forward(&x_in.data, &w_in.data, None, spec, epilogue);
    let call = Call::new([&x_in, &w_in, &bias_in]);
    let (x, w) = (w_in.tracked.then_some(x_in.data), x_in.tracked.then_some(w_in.data));
    let spec = *spec;
    let shape = [spec.out_rows(), spec.filters];
    call.finish("conv2d", Buffer::new(y, &shape), move |dy, wanted| {
        let dx = w.filter(|_| wanted[0]).map(|w| {
            let rows = spec.images * spec.height * spec.width;
            Buffer::new(kernel::backward_input(&dy, &w, &spec), &[rows, spec.channels])
        });
        let dw = x.filter(|_| wanted[1]).map(|x| {
            let [kh, kw] = spec.kernel;
            let dw = kernel::backward_weights(&x, &dy, &spec);
            Buffer::new(dw, &[spec.filters, spec.channels * kh * kw])
        });
        let db = wanted[2]
            .then(|| Buffer::new(super::linear::column_sums(&dy, spec.filters), &[spec.filters]));
        [dx, dw, db]
    })
}

/// The statistics that a batch normalisation divides by.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // One value per call: a box would only cost.
pub enum Moments {
    /// Given mean and variance of every channel (running statistics): constants.
    Given {
        /// Means, `[channels]`.
        mean: Tensor<1>,
        /// Variances, `[channels]`.
        variance: Tensor<1>,
    },
    /// Mean and (biased) variance of the batch itself: gradients flow through them.
    Batch,
}

/// Gain, bias and statistics of a batch normalisation.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// Factor on the normalised channel, `[channels]`.
    pub gain: Tensor<1>,
    /// Added to it, `[channels]`.
    pub bias: Tensor<1>,
    /// What is normalised with.
    pub moments: Moments,
    /// Added to the variance.
    pub eps: f32,
}

/// What a batch normalisation saw: mean and biased variance of every channel.
pub type Seen = Option<(Vec<f32>, Vec<f32>)>;

/// `(x - mean) / sqrt(variance + eps) * gain + bias` over the columns of `x [rows, channels]`
/// (Ioffe & Szegedy 2015), plus `residual` (shape of `x`), and 0 for what is negative if `relu`.
/// With [`Moments::Batch`] also returns the statistics of the batch.
///
/// # Panics
/// If a vector's length is not the number of channels, or the residual has another shape.
pub fn batch_norm(
    x: Tensor<2>,
    n: BatchNorm,
    residual: Option<Tensor<2>>,
    relu: bool,
) -> (Tensor<2>, Seen) {
    let shape = x.dims();
    check_norm(&n, shape[1], residual.as_ref().map(Tensor::dims), shape);
    let residual_in = match &residual {
        Some(residual) => Operand::of(residual),
        None => Some(Operand::nothing()),
    };
    let operands = (Operand::of(&x), Operand::of(&n.gain), Operand::of(&n.bias), residual_in);
    let (Some(x_in), Some(gain_in), Some(bias_in), Some(residual_in)) = operands else {
        return composed::batch_norm(x, n, residual, relu);
    };
    let (seen, mean, variance) = match &n.moments {
        Moments::Given { mean, variance } => {
            (None, host::into_vec(mean.clone()), host::into_vec(variance.clone()))
        }
        Moments::Batch => {
            let (mean, variance) = norm::moments(&x_in.data, shape[1]);
            (Some((mean.clone(), variance.clone())), mean, variance)
        }
    };
    let residual = residual.map(|_| &*residual_in.data);
    let deviation: Vec<f32> = variance.iter().map(|v| 1.0 / (v + n.eps).sqrt()).collect();
    let (scale, shift) = affine(&gain_in.data, &bias_in.data, &mean, &deviation);
    let y = norm::forward(&x_in.data, &scale, &shift, residual, relu);
    drop((x, n));
    let y = Buffer::new(y, &shape);
    let call = Call::new([&x_in, &gain_in, &bias_in, &residual_in]);
    // Where the result is 0, relu has cut: no other memory of it is needed.
    let kept = (relu && call.is_tracked()).then(|| y.clone());
    let (x, gain, batch) = (x_in.data, gain_in.data, seen.is_some());
    let result = call.finish("batch_norm", y, move |dy, wanted| {
        let mut dz = dy.into_vec();
        if let Some(y) = kept {
            norm::cut(&mut dz, &y);
        }
        let dz = Buffer::new(dz, &shape);
        let statistics = norm::Backward { x: &x, gain: &gain, mean: &mean, deviation: &deviation };
        let (dgain, dbias) = statistics.sums(&dz);
        let dx = wanted[0].then(|| {
            let sums = batch.then_some((&dgain[..], &dbias[..]));
            Buffer::new(statistics.input(&dz, sums), &shape)
        });
        let vector = |values| Buffer::new(values, &[shape[1]]);
        [
            dx,
            wanted[1].then(|| vector(dgain)),
            wanted[2].then(|| vector(dbias)),
            wanted[3].then_some(dz),
        ]
    });
    (result, seen)
}

fn check_norm(n: &BatchNorm, channels: usize, residual: Option<[usize; 2]>, shape: [usize; 2]) {
    let mut lengths = vec![n.gain.dims(), n.bias.dims()];
    if let Moments::Given { mean, variance } = &n.moments {
        lengths.extend([mean.dims(), variance.dims()]);
    }
    assert!(
        channels > 0 && lengths.iter().all(|&[length]| length == channels),
        "batch_norm: vectors of {lengths:?} against {channels} channels"
    );
    assert!(
        residual.is_none_or(|r| r == shape),
        "batch_norm: the residual's shape is {residual:?}"
    );
}

/// `y = x scale + shift`.
fn affine(gain: &[f32], bias: &[f32], mean: &[f32], deviation: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let scale: Vec<f32> = gain.iter().zip(deviation).map(|(g, d)| g * d).collect();
    let shift = bias.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
    (scale, shift)
}

/// [`conv2d`] without bias, then [`batch_norm`]. If nothing is tracked and the statistics are given,
/// all of it is one pass: the norm goes into the weights.
///
/// # Panics
/// As [`conv2d`] and [`batch_norm`].
pub fn conv2d_norm(
    x: Tensor<2>,
    w: Tensor<2>,
    spec: &Conv2d,
    n: BatchNorm,
    residual: Option<Tensor<2>>,
    relu: bool,
) -> (Tensor<2>, Seen) {
    let operands = (Operand::of(&x), Operand::of(&w), Operand::of(&n.gain), Operand::of(&n.bias));
    let residual_in = match &residual {
        Some(residual) => Operand::of(residual),
        None => Some(Operand::nothing()),
    };
    if let (Some(x_in), Some(w_in), Some(gain), Some(bias)) = operands
        && let Some(residual_in) = residual_in
        && let Moments::Given { mean, variance } = &n.moments
        && ![&x_in, &w_in, &gain, &bias, &residual_in].iter().any(|o| o.tracked)
    {
        spec.check(x.dims(), w.dims(), None);
        let shape = [spec.out_rows(), spec.filters];
        check_norm(&n, spec.filters, residual.as_ref().map(Tensor::dims), shape);
        let mean = host::into_vec(mean.clone());
        let deviation: Vec<f32> =
            host::read(variance, |v| v.iter().map(|v| 1.0 / (v + n.eps).sqrt()).collect());
        let (scale, shift) = affine(&gain.data, &bias.data, &mean, &deviation);
        let residual = residual.is_some().then_some(&*residual_in.data);
        let epilogue = Epilogue { shift: Some(&shift), residual, relu };
        let y = kernel::forward(&x_in.data, &w_in.data, Some(&scale), spec, epilogue);
        let call = Call::new([&x_in, &w_in, &gain, &bias, &residual_in]);
        let none = move |_, _| [const { None }; 5];
        return (call.finish("conv2d_norm", Buffer::new(y, &shape), none), None);
    }
    batch_norm(conv2d(x, w, None, spec), n, residual, relu)
}

/// Every `stride`-th pixel of `x [images * height * width, channels]` in both directions, with
/// `before` channels of zeros before its own and zeros after up to `filters`: the parameter-free
/// shortcut of a residual network (He et al. 2016, option A).
///
/// # Panics
/// If `x` does not have the rows, or `filters` is too small.
pub fn subsample(
    x: Tensor<2>,
    [images, height, width]: [usize; 3],
    stride: usize,
    before: usize,
    filters: usize,
) -> Tensor<2> {
    let [rows, channels] = x.dims();
    assert_eq!(rows, images * height * width, "subsample: {rows} rows");
    assert!(stride > 0 && before + channels <= filters, "subsample: {channels} into {filters}");
    let Some(x_in) = Operand::of(&x) else {
        return composed::subsample(x, [images, height, width], stride, before, filters);
    };
    drop(x);
    let (tall, wide) = (height.div_ceil(stride), width.div_ceil(stride));
    let from = move |row: usize| {
        let (image, y, x) = (row / (tall * wide), row / wide % tall, row % wide);
        (image * height + y * stride) * width + x * stride
    };
    let mut out = vec![0.0; images * tall * wide * filters];
    for (row, out) in out.chunks_exact_mut(filters).enumerate() {
        let start = from(row) * channels;
        out[before..before + channels].copy_from_slice(&x_in.data[start..start + channels]);
    }
    let call = Call::new([&x_in]);
    let shape = [images * tall * wide, filters];
    call.finish("subsample", Buffer::new(out, &shape), move |dy, _| {
        let mut dx = vec![0.0; rows * channels];
        for (row, dy) in dy.chunks_exact(filters).enumerate() {
            let start = from(row) * channels;
            dx[start..start + channels].copy_from_slice(&dy[before..before + channels]);
        }
        [Some(Buffer::new(dx, &[rows, channels]))]
    })
}

/// The mean of every group of `group` rows: `[rows, channels]` becomes `[rows / group, channels]`
/// (global average pooling when a group is an image).
///
/// # Panics
/// If the rows do not divide into groups.
pub fn mean_pool(x: Tensor<2>, group: usize) -> Tensor<2> {
    let [rows, channels] = x.dims();
    assert!(group > 0 && rows.is_multiple_of(group), "mean_pool: {rows} rows, groups of {group}");
    let Some(x_in) = Operand::of(&x) else {
        return composed::mean_pool(x, group);
    };
    drop(x);
    let mut y = vec![0.0; rows / group * channels];
    let factor = 1.0 / group as f32;
    if channels > 0 {
        for (y, x) in y.chunks_exact_mut(channels).zip(x_in.data.chunks_exact(group * channels)) {
            x.chunks_exact(channels).for_each(|x| crate::kernels::simd::add_into(y, x));
            y.iter_mut().for_each(|v| *v *= factor);
        }
    }
    let call = Call::new([&x_in]);
    call.finish("mean_pool", Buffer::new(y, &[rows / group, channels]), move |dy, _| {
        let mut dx = Vec::with_capacity(rows * channels);
        for dy in dy.chunks_exact(channels.max(1)) {
            for _ in 0..group {
                dx.extend(dy.iter().map(|v| v * factor));
            }
        }
        [Some(Buffer::new(dx, &[rows, channels]))]
    })
}
