//! The parameters of a network in training: named f32 leaves that are also an `nn::Weights`.
//!
//! The forward pass asks for weights by name and gets the leaves themselves, so the backward pass
//! ends at them. Frozen parameters record nothing. Updates happen in place.

use crate::{
    config::Precision,
    error::{Error, Result},
    gradients::Grads,
    init,
    state::{Saved, StateTensor, Values},
};
use method::Pattern;
use nn::{Decoder, Leaf as Part, Name, Network, Observed, Weights};
use std::collections::HashMap;
use tensor::{Device, Tensor, host, ops};

/// A parameter: a vector (norms, biases) or a matrix as the checkpoint stores it; kernels of
/// convolutions and positions of images are matrices of the same values.
#[derive(Clone, Debug)]
enum Leaf {
    Vector(Tensor<1>),
    Matrix(Tensor<2>),
}

impl Leaf {
    /// The same values as a leaf that records a gradient or does not.
    fn tracked(&self, on: bool) -> Self {
        match self {
            Leaf::Vector(t) => Leaf::Vector(t.clone().detach().set_require_grad(on)),
            Leaf::Matrix(t) => Leaf::Matrix(t.clone().detach().set_require_grad(on)),
        }
    }
}

struct Entry {
    name: String,
    shape: Vec<usize>,
    leaf: Leaf,
    trainable: bool,
    /// Running statistics: never trained.
    buffer: bool,
}

/// Named parameters in the order of the network.
pub struct Params {
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    device: Option<Device>,
}

impl Params {
    /// No parameters.
    pub fn empty() -> Self {
        Self { entries: Vec::new(), index: HashMap::new(), device: None }
    }

    /// The parameters that `network` names, from a checkpoint in any floating-point format, all
    /// trainable but for running statistics.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape than the config says.
    pub fn from_checkpoint(network: &dyn Network, checkpoint: &store::Checkpoint) -> Result<Self> {
        let mut params = Self::on_cpu()?;
        for (name, shape) in init::tensors(network) {
            let info = checkpoint.info(&name)?;
            if info.shape != shape {
                return Err(Error::Shape {
                    name,
                    expected: format!("shape {shape:?} (from config.json)"),
                    found: format!("shape {:?} (in the checkpoint)", info.shape),
                });
            }
            params.insert(&name, &shape, checkpoint.f32(&name)?)?;
        }
        Ok(params)
    }

    /// Fresh parameters, all trainable: matrices normal with standard deviation 0.02 (the
    /// projections that write to the residual stream divided by the root of twice the number of
    /// layers), gains 1, biases 0.
    pub fn random(decoder: &Decoder, seed: u64) -> Result<Self> {
        let mut params = Self::on_cpu()?;
        for (name, shape, values) in init::random(decoder, seed) {
            params.insert(&name, &shape, values)?;
        }
        Ok(params)
    }

    /// Fresh parameters of any network, all trainable but for running statistics: matrices, kernels
    /// and their biases uniform within one over the root of the inputs (PyTorch's default), class
    /// tokens and positions normal with standard deviation 0.02, gains 1, the rest 0.
    pub fn fresh(network: &dyn Network, seed: u64) -> Result<Self> {
        let mut params = Self::on_cpu()?;
        for (name, shape, values) in init::fresh(network, seed) {
            params.insert(&name, &shape, values)?;
        }
        Ok(params)
    }

    fn on_cpu() -> Result<Self> {
        Ok(Self { device: Some(tensor::device("cpu")?.autodiff()), ..Self::empty() })
    }

    /// Adds a parameter of up to four dimensions; trainable, unless its name is that of running
    /// statistics.
    pub fn insert(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        let refuse = |expected: String| Error::Shape {
            name: name.to_string(),
            expected,
            found: format!("{} values of shape {shape:?}", values.len()),
        };
        if self.index.contains_key(name) {
            return Err(refuse("a name that is not there yet".into()));
        }
        if shape.iter().product::<usize>() != values.len() {
            return Err(refuse("as many values as the shape holds".into()));
        }
        let device = match &self.device {
            Some(device) => device.clone(),
            None => tensor::device("cpu")?.autodiff(),
        };
        let leaf = match *shape {
            [n] => Leaf::Vector(host::from_vec(values, [n], &device).require_grad()),
            [m, n] => Leaf::Matrix(host::from_vec(values, [m, n], &device).require_grad()),
            [1, m, n] => Leaf::Matrix(host::from_vec(values, [m, n], &device).require_grad()),
            [m, n, h, w] => {
                Leaf::Matrix(host::from_vec(values, [m, n * h * w], &device).require_grad())
            }
            _ => return Err(refuse("one, two or four dimensions, or three with one row".into())),
        };
        let buffer = name.ends_with(".running_mean") || name.ends_with(".running_var");
        self.device = Some(device);
        self.index.insert(name.to_string(), self.entries.len());
        self.entries.push(Entry {
            name: name.to_string(),
            shape: shape.to_vec(),
            leaf: if buffer { leaf.tracked(false) } else { leaf },
            trainable: !buffer,
            buffer,
        });
        Ok(())
    }

    /// Moves running statistics towards those of a batch.
    ///
    /// # Errors
    /// A normalisation that is not among the parameters, or has another width.
    pub fn observe(&mut self, observed: &[Observed]) -> Result<()> {
        for seen in observed {
            let [mean, variance] =
                ["running_mean", "running_var"].map(|leaf| format!("{}.{leaf}", seen.module));
            let (mut means, mut variances) =
                (self.read(&mean, <[f32]>::to_vec)?, self.read(&variance, <[f32]>::to_vec)?);
            seen.update(&mut means, &mut variances);
            self.write(&mean, |v| v.copy_from_slice(&means))?;
            self.write(&variance, |v| v.copy_from_slice(&variances))?;
        }
        Ok(())
    }

    /// Trains exactly the parameters that match one of `trainable` (all when `None`) and none of
    /// `frozen`.
    ///
    /// # Errors
    /// When a pattern matches nothing or nothing is left to train.
    pub fn set_trainable(
        &mut self,
        trainable: Option<&[Pattern]>,
        frozen: &[Pattern],
    ) -> Result<()> {
        for pattern in trainable.unwrap_or_default().iter().chain(frozen) {
            if !self.entries.iter().any(|e| pattern.matches(&e.name)) {
                return Err(self.unknown(pattern.as_str()));
            }
        }
        for entry in &mut self.entries {
            let wanted = trainable.is_none_or(|t| t.iter().any(|p| p.matches(&entry.name)));
            entry.trainable =
                wanted && !entry.buffer && !frozen.iter().any(|p| p.matches(&entry.name));
            entry.leaf = entry.leaf.tracked(entry.trainable);
        }
        if !self.entries.iter().any(|e| e.trainable) {
            return Err(crate::error::config("trainable", "leaves no parameter to train"));
        }
        Ok(())
    }

    /// Names in the order of the network.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// The shape of a parameter.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// Whether a parameter is trained.
    pub fn is_trainable(&self, name: &str) -> Result<bool> {
        Ok(self.entry(name)?.trainable)
    }

    /// Number of values in all parameters.
    pub fn count(&self) -> usize {
        self.entries.iter().map(|e| e.shape.iter().product::<usize>()).sum()
    }

    /// Number of values that are trained.
    pub fn trainable_count(&self) -> usize {
        let trained = self.entries.iter().filter(|e| e.trainable);
        trained.map(|e| e.shape.iter().product::<usize>()).sum()
    }

    /// Reads a parameter's values in row-major order without copying them.
    pub fn read<R>(&self, name: &str, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        Ok(match &self.entry(name)?.leaf {
            Leaf::Vector(t) => host::read(t, f),
            Leaf::Matrix(t) => host::read(t, f),
        })
    }

    /// Changes a parameter's values in place. Gradients taken from an earlier backward pass must be
    /// out already.
    pub fn write<R>(&mut self, name: &str, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        let Some(&at) = self.index.get(name) else { return Err(self.unknown(name)) };
        Ok(match &mut self.entries[at].leaf {
            Leaf::Vector(t) => host::write(t, f),
            Leaf::Matrix(t) => host::write(t, f),
        })
    }

    /// Backpropagates a scalar loss and adds the gradients of all trainable parameters to `grads`.
    pub fn backward(&self, loss: &Tensor<1>, grads: &mut Grads) {
        let mut found = loss.backward();
        for entry in self.entries.iter().filter(|e| e.trainable) {
            let values = match &entry.leaf {
                Leaf::Vector(t) => t.grad_remove(&mut found).map(host::into_vec),
                Leaf::Matrix(t) => t.grad_remove(&mut found).map(host::into_vec),
            };
            if let Some(values) = values {
                grads.accumulate(&entry.name, values);
            }
        }
    }

    /// The same values as constants: a forward pass over them records no graph.
    pub fn constants(&self) -> Constants<'_> {
        Constants(self)
    }

    /// All values, named `params.<name>`, borrowed.
    pub fn state(&self) -> Vec<StateTensor<'_>> {
        let tensor = |entry: &'_ Entry| -> StateTensor<'_> {
            let name = format!("params.{}", entry.name);
            let values = match &entry.leaf {
                Leaf::Vector(t) => Values::Vector(t.clone()),
                Leaf::Matrix(t) => Values::Matrix(t.clone()),
            };
            StateTensor { name, values }
        };
        self.entries.iter().map(tensor).collect()
    }

    /// Takes back what [`Params::state`] gave.
    pub fn restore(&mut self, saved: &mut Saved) -> Result<()> {
        let mut own = saved.take_prefix("params.");
        for entry in &mut self.entries {
            let values = own.take(&entry.name, entry.shape.iter().product())?;
            match &mut entry.leaf {
                Leaf::Vector(t) => host::write(t, |v| v.copy_from_slice(&values)),
                Leaf::Matrix(t) => host::write(t, |v| v.copy_from_slice(&values)),
            }
        }
        Ok(())
    }

    /// Streams all parameters to a writer, rounded to `precision`.
    ///
    /// # Errors
    /// Values that do not fit into the format, and the writer's own.
    pub fn save(&self, writer: &mut store::Writer, precision: Precision) -> Result<()> {
        for entry in &self.entries {
            let encode = |values: &[f32]| encode(values, precision);
            let bytes = match &entry.leaf {
                Leaf::Vector(t) => host::read(t, encode),
                Leaf::Matrix(t) => host::read(t, encode),
            };
            let bytes = bytes.ok_or_else(|| Error::Shape {
                name: entry.name.clone(),
                expected: format!("finite values that fit into {}", precision.torch_name()),
                found: "a larger or non-finite one; save as f32 or bf16".into(),
            })?;
            writer.add(&entry.name, precision.dtype(), &entry.shape, &bytes)?;
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        match self.index.get(name) {
            Some(&at) => Ok(&self.entries[at]),
            None => Err(self.unknown(name)),
        }
    }

    fn unknown(&self, name: &str) -> Error {
        let near = method::nearest(name, self.names());
        let hint = near.map(|n| format!(", did you mean `{n}`?")).unwrap_or_default();
        Error::UnknownParameter { name: name.to_string(), hint }
    }

    /// The entry of a module's tensor (a tied head names the embedding's).
    fn part(&self, name: &Name, part: Part) -> nn::Result<&Leaf> {
        let tensor = name.tensor(part);
        self.index.get(&tensor).map(|&at| &self.entries[at].leaf).ok_or_else(|| {
            nn::Error::Missing { name: tensor, hint: "it is not among the parameters".into() }
        })
    }

    /// The matrix of a module as the checkpoint stores it.
    fn stored(&self, name: &Name) -> nn::Result<Tensor<2>> {
        match self.part(name, Part::Weight)? {
            Leaf::Matrix(t) => Ok(t.clone()),
            Leaf::Vector(_) => Err(nn::Error::Weights {
                name: name.module.clone(),
                reason: "a vector where a matrix is needed".into(),
            }),
        }
    }
}

/// Little-endian bytes of `values` rounded to nearest even; `None` when one is not finite or
/// overflows.
fn encode(values: &[f32], precision: Precision) -> Option<Vec<u8>> {
    fn all<const N: usize>(values: &[f32], f: impl Fn(f32) -> ([u8; N], bool)) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(values.len() * N);
        for value in values {
            let (encoded, finite) = f(*value);
            if !finite {
                return None;
            }
            bytes.extend_from_slice(&encoded);
        }
        Some(bytes)
    }
    match precision {
        Precision::F32 => all(values, |v| (v.to_le_bytes(), v.is_finite())),
        Precision::F16 => all(values, |v| {
            let h = half::f16::from_f32(v);
            (h.to_le_bytes(), h.is_finite())
        }),
        Precision::Bf16 => all(values, |v| {
            let h = half::bf16::from_f32(v);
            (h.to_le_bytes(), h.is_finite())
        }),
    }
}

impl Weights for Params {
    fn linear(&self, name: &Name, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        let bias = if name.bias { Some(self.vector(name, Part::Bias)?) } else { None };
        Ok(ops::linear(x, self.matrix(name)?, bias))
    }

    fn matrix(&self, name: &Name) -> nn::Result<Tensor<2>> {
        let stored = self.stored(name)?;
        Ok(if name.transposed { stored.transpose() } else { stored })
    }

    fn vector(&self, name: &Name, part: Part) -> nn::Result<Tensor<1>> {
        match self.part(name, part)? {
            Leaf::Vector(t) => Ok(t.clone()),
            Leaf::Matrix(_) => Err(nn::Error::Weights {
                name: name.module.clone(),
                reason: "a matrix where a vector is needed".into(),
            }),
        }
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> nn::Result<Tensor<2>> {
        Ok(ops::embedding(self.stored(name)?, ids))
    }

    fn device(&self) -> Device {
        self.device.clone().unwrap_or_default()
    }
}

/// Parameters as constants, see [`Params::constants`].
pub struct Constants<'a>(&'a Params);

impl Weights for Constants<'_> {
    fn linear(&self, name: &Name, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        let bias = if name.bias { Some(self.vector(name, Part::Bias)?) } else { None };
        Ok(ops::linear(x, self.matrix(name)?, bias))
    }

    fn matrix(&self, name: &Name) -> nn::Result<Tensor<2>> {
        self.0.matrix(name).map(Tensor::inner)
    }

    fn vector(&self, name: &Name, part: Part) -> nn::Result<Tensor<1>> {
        self.0.vector(name, part).map(Tensor::inner)
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> nn::Result<Tensor<2>> {
        Ok(ops::embedding(self.0.stored(name)?.inner(), ids))
    }

    fn device(&self) -> Device {
        self.0.device().inner()
    }
}
