//! Working copies: some tensors of a network replaced in memory, the rest from another `Weights`.

use std::collections::HashMap;

use tensor::{Device, Tensor, ops};

use crate::weights::check_input;
use crate::{Leaf, Name, Result, Weights};

/// `base` with some of its tensors replaced. Matrices are `[out, in]` in every family and keyed by
/// tensor name (`<module>.weight`), vectors by tensor name too.
pub struct Overlay<'a> {
    /// Where everything that is not replaced comes from.
    pub base: &'a dyn Weights,
    /// Replaced matrices.
    pub matrices: HashMap<String, Tensor<2>>,
    /// Replaced vectors (norm gains, biases).
    pub vectors: HashMap<String, Tensor<1>>,
}

impl<'a> Overlay<'a> {
    /// `base`, nothing replaced yet.
    pub fn new(base: &'a dyn Weights) -> Self {
        Overlay { base, matrices: HashMap::new(), vectors: HashMap::new() }
    }

    /// Copies every tensor of `names` from the base, as f32.
    ///
    /// # Errors
    /// From the base.
    pub fn load<'n>(&mut self, names: impl IntoIterator<Item = &'n Name>) -> Result<()> {
        for name in names {
            if name.role.is_norm() {
                self.vectors.insert(name.weight(), self.base.vector(name, Leaf::Weight)?);
            } else {
                self.matrices.insert(name.weight(), self.base.matrix(name)?);
            }
            if let Some(bias) = name.bias_name() {
                self.vectors.insert(bias, self.base.vector(name, Leaf::Bias)?);
            }
        }
        Ok(())
    }
}

impl Weights for Overlay<'_> {
    fn linear(&self, name: &Name, x: Tensor<2>) -> Result<Tensor<2>> {
        let replaced = self.matrices.get(&name.weight());
        let bias_replaced = name.bias_name().is_some_and(|b| self.vectors.contains_key(&b));
        if replaced.is_none() && !bias_replaced {
            return self.base.linear(name, x);
        }
        check_input(name, &x)?;
        let matrix = match replaced {
            Some(matrix) => matrix.clone(),
            None => self.base.matrix(name)?,
        };
        let bias = if name.bias { Some(self.vector(name, Leaf::Bias)?) } else { None };
        Ok(ops::linear(x, matrix, bias))
    }

    fn matrix(&self, name: &Name) -> Result<Tensor<2>> {
        match self.matrices.get(&name.weight()) {
            Some(matrix) => Ok(matrix.clone()),
            None => self.base.matrix(name),
        }
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> Result<Tensor<1>> {
        match self.vectors.get(&name.tensor(leaf)) {
            Some(vector) => Ok(vector.clone()),
            None => self.base.vector(name, leaf),
        }
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> Result<Tensor<2>> {
        match self.matrices.get(&name.weight()) {
            Some(matrix) => Ok(ops::embedding(matrix.clone(), ids)),
            None => self.base.embed(name, ids),
        }
    }

    fn device(&self) -> Device {
        self.base.device()
    }
}
