//! Small networks for the tests of this method, where every number can be checked by hand.

use nn::{Input, Leaf, Mode, Name, Network, Role, State, Weights};
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use tensor::{Device, Rng, Tensor, host, ops};

/// Matrices in memory.
#[derive(Clone, Default)]
pub struct Held(pub HashMap<String, Tensor<2>>);

impl Held {
    /// Normal weights for every layer of `net`.
    pub fn random(net: &Chain, seed: u64) -> Self {
        let mut held = Held::default();
        for (_, name) in net.layers() {
            let mut values = vec![0.0; name.shape[0] * name.shape[1]];
            Rng::stream(seed, &name.module).fill_normal(&mut values, 0.5);
            held.set(&name, values);
        }
        held
    }

    pub fn set(&mut self, name: &Name, values: Vec<f32>) {
        let tensor = host::from_vec(values, name.shape, &tensor::device("cpu").unwrap());
        self.0.insert(name.weight(), tensor);
    }

    pub fn values(&self, name: &Name) -> Vec<f32> {
        host::into_vec(self.0[&name.weight()].clone())
    }
}

impl Weights for Held {
    fn linear(&self, name: &Name, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        Ok(ops::linear(x, self.matrix(name)?, None))
    }

    fn matrix(&self, name: &Name) -> nn::Result<Tensor<2>> {
        Ok(self.0[&name.weight()].clone())
    }

    fn vector(&self, name: &Name, _leaf: Leaf) -> nn::Result<Tensor<1>> {
        Err(nn::Error::Input(format!("{name} has no vector")))
    }

    fn embed(&self, name: &Name, _ids: &[u32]) -> nn::Result<Tensor<2>> {
        Err(nn::Error::Input(format!("{name} is no embedding")))
    }

    fn device(&self) -> Device {
        tensor::device("cpu").unwrap()
    }
}

/// How a test network computes.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// Layer after layer with ReLU between.
    Chain,
    /// Layers side by side on the same input, outputs joined: no path leads through two of them.
    Parallel,
    /// As `Chain`, but every layer's output is added to its input.
    Residual,
    /// As `Chain`; the logits are 1 / output.
    Inverse,
}

/// A network of linear layers over images of one row.
pub struct Chain {
    pub names: Vec<Name>,
    pub kind: Kind,
    pub mode: Mode,
    /// Passes through the exit so far.
    pub exits: AtomicU64,
    /// The pass that fails; negative for none.
    pub fails_at: AtomicI64,
}

pub fn name(module: &str, shape: [usize; 2]) -> Name {
    Name {
        module: module.into(),
        role: Role::Hidden,
        block: None,
        transposed: false,
        shape,
        kernel: None,
        bias: false,
        plus_one: false,
        spelling: nn::name::Spelling::default(),
    }
}

impl Chain {
    /// Layers from width to width.
    pub fn new(widths: &[usize]) -> Self {
        let names = widths.windows(2).enumerate();
        Self::of(names.map(|(i, w)| name(&format!("fc{i}"), [w[1], w[0]])).collect(), Kind::Chain)
    }

    pub fn of(names: Vec<Name>, kind: Kind) -> Self {
        let (exits, fails_at) = (AtomicU64::new(0), AtomicI64::new(-1));
        Self { names, kind, mode: Mode::Evaluate, exits, fails_at }
    }

    pub fn width(&self) -> usize {
        self.names[0].shape[1]
    }
}

impl Network for Chain {
    fn family(&self) -> &str {
        "test"
    }

    fn modules(&self) -> Vec<&Name> {
        self.names.iter().collect()
    }

    fn layers(&self) -> Vec<(usize, Name)> {
        match self.kind {
            Kind::Parallel => self.names.iter().map(|n| (0, n.clone())).collect(),
            _ => self.names.iter().cloned().enumerate().collect(),
        }
    }

    fn segments(&self) -> usize {
        if self.kind == Kind::Parallel { 1 } else { self.names.len() }
    }

    fn classes(&self) -> usize {
        match self.kind {
            Kind::Parallel => self.names.iter().map(|n| n.shape[0]).sum(),
            _ => self.names.last().unwrap().shape[0],
        }
    }

    fn enter(&self, w: &dyn Weights, input: &Input<'_>) -> nn::Result<State> {
        let Input::Images { pixels, shape } = input else { panic!("images only") };
        let x = host::from_vec(pixels.to_vec(), [shape[0], shape[3]], &w.device());
        Ok(State::new(x, vec![shape[0]]).mode(self.mode))
    }

    fn segment(&self, i: usize, w: &dyn Weights, state: State) -> nn::Result<State> {
        let x = state.x.clone();
        let y = match self.kind {
            Kind::Parallel => {
                let parts: nn::Result<Vec<_>> =
                    self.names.iter().map(|n| w.linear(n, x.clone())).collect();
                let rows = x.dims()[0];
                let parts: Vec<(usize, Vec<f32>)> =
                    parts?.into_iter().map(|p| (p.dims()[1], host::into_vec(p))).collect();
                let joined: Vec<f32> = (0..rows)
                    .flat_map(|r| {
                        parts.iter().flat_map(move |(c, p)| p[r * c..(r + 1) * c].to_vec())
                    })
                    .collect();
                host::from_vec(joined, [rows, self.classes()], &w.device())
            }
            Kind::Residual => w.linear(&self.names[i], x.clone())? + x,
            _ => w.linear(&self.names[i], x)?,
        };
        let last = i + 1 == self.segments();
        let y = if last || self.kind == Kind::Residual { y } else { y.clamp_min(0.0) };
        let shape = state.shape.clone();
        Ok(state.with(y, shape))
    }

    fn exit(&self, _w: &dyn Weights, state: State) -> nn::Result<Tensor<2>> {
        let pass = self.exits.fetch_add(1, Ordering::SeqCst) as i64;
        if pass == self.fails_at.load(Ordering::SeqCst) {
            return Err(nn::Error::Input("killed".into()));
        }
        Ok(if self.kind == Kind::Inverse { state.x.recip() } else { state.x })
    }
}
