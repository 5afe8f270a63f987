//! The seam between tensors and slices: CPU operands in, results with a backward step out.
//!
//! An operation takes its operands apart with [`Operand::of`]; `None` means that a tensor is not an
//! f32 tensor in CPU memory, and the composed version must do. [`Call::finish`] wraps the result: if
//! no operand is tracked, without touching a gradient graph; else with one step, whose closure gets
//! the result's gradient and which operands want theirs.
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Autodiff, Flex, tensor::FloatTensor};
use burn::tensor::{DType, TensorData};

use crate::{Tensor, host};

pub(crate) type Plain = FloatTensor<Flex>;
type Tape = Autodiff<Flex, NoCheckpointing>;
type Taped = FloatTensor<Tape>;

/// A tensor in CPU memory, contiguous, with its node if it lives on an autodiff device.
pub(crate) struct Operand {
    pub data: Buffer,
    taped: Option<Taped>,
    /// Its gradient, or one behind it, is wanted.
    pub tracked: bool,
}

impl Operand {
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        if tensor.dtype() != DType::F32 {
            return None;
        }
        let tracked = tensor.is_tracked();
        if tensor.is_autodiff() {
            let taped = tensor.clone().try_into_primitive::<Tape>().ok()?;
            let data = Buffer(taped.primitive().to_contiguous());
            Some(Self { data, taped: Some(taped), tracked })
        } else {
            let data = Buffer(tensor.clone().try_into_primitive::<Flex>().ok()?.to_contiguous());
            Some(Self { data, taped: None, tracked })
        }
    }

    /// Stands for an optional operand that is absent.
    pub fn nothing() -> Self {
        Self { data: Buffer::new(Vec::new(), &[0]), taped: None, tracked: false }
    }

    fn guard(&self) -> NodeGuard {
        match &self.taped {
            Some(taped) => taped.node(),
            None => Taped::new(self.data.0.clone()).node(),
        }
    }
}

/// Contiguous CPU memory that a backward step keeps (shared, not copied).
#[derive(Clone, Debug)]
pub(crate) struct Buffer(Plain);

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        host::slice(&self.0)
    }
}

impl Buffer {
    pub fn new(values: Vec<f32>, shape: &[usize]) -> Self {
        Self(Flex::float_from_data(TensorData::new(values, shape.to_vec()), &Default::default()))
    }

    /// The memory itself if nobody else holds it, else a copy. For gradients that become others.
    pub fn into_vec(self) -> Vec<f32> {
        let values = self.0.into_data().try_into_vec::<f32>();
        values.unwrap_or_default()
    }
}

/// The operands of one call of an operation.
pub(crate) struct Call<const N: usize> {
    guards: Option<[NodeGuard; N]>,
    autodiff: bool,
}

impl<const N: usize> Call<N> {
    pub fn new(operands: [&Operand; N]) -> Self {
        let tracked = operands.iter().any(|operand| operand.tracked);
        Self {
            guards: tracked.then(|| operands.map(Operand::guard)),
            autodiff: operands.iter().any(|operand| operand.taped.is_some()),
        }
    }

    /// Whether some operand's gradient is wanted.
    pub fn is_tracked(&self) -> bool {
        self.guards.is_some()
    }

    /// The result as a tensor. `backward` (for tracked operands) gets the gradient of the result
    /// and which operands want theirs, and returns those.
    pub fn finish<const D: usize, F>(
        self,
        name: &'static str,
        result: Buffer,
        backward: F,
    ) -> Tensor<D>
    where
        F: FnOnce(Buffer, [bool; N]) -> [Option<Buffer>; N] + Send + 'static,
    {
        let Some(guards) = self.guards else {
            let plain = Tensor::from_primitive::<Flex>(result.0);
            return if self.autodiff { plain.autodiff() } else { plain };
        };
        let step = Step { name, backward };
        let taped = match step.prepare::<NoCheckpointing>(guards).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((), result.0),
            OpsKind::UnTracked(prepared) => prepared.finish(result.0),
        };
        Tensor::from_primitive::<Tape>(taped)
    }
}

struct Step<F> {
    name: &'static str,
    backward: F,
}

impl<F> std::fmt::Debug for Step<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl<F, const N: usize> Backward<Flex, N> for Step<F>
where
    F: FnOnce(Buffer, [bool; N]) -> [Option<Buffer>; N] + Send + 'static,
{
    type State = ();

    fn backward(self, ops: Ops<(), N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = Buffer(host::contiguous(grads.consume::<Flex>(&ops.node)));
        let nodes: [Option<NodeId>; N] =
            ops.parents.each_ref().map(|parent| parent.as_ref().map(|node| node.id));
        let results = (self.backward)(upstream, nodes.map(|node| node.is_some()));
        for (node, gradient) in nodes.into_iter().zip(results) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<Flex>(node, gradient.0);
            }
        }
    }
}
