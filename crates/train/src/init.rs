//! The tensors of a network and their values before training.

use nn::{Decoder, Leaf, Name, Network, Role};
use tensor::rng::Rng;

/// Standard deviation of fresh matrices (GPT-2, Llama: `initializer_range`).
pub const INITIALIZER_RANGE: f32 = 0.02;

/// Names and stored shapes of all tensors of a network, in the order of computation.
pub fn tensors(network: &dyn Network) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    for name in network.modules() {
        all.extend(
            name.leaves().into_iter().map(|leaf| (name.tensor(leaf), name.leaf_shape(leaf))),
        );
    }
    all
}

/// Fresh values of all tensors, each from its own random stream, so that a tensor's values depend
/// on the seed and its name only.
pub fn random(
    decoder: &Decoder,
    seed: u64,
) -> impl Iterator<Item = (String, Vec<usize>, Vec<f32>)> + '_ {
    // Every block adds twice to the residual stream; its variance must not grow with depth (GPT-2,
    // section 2.3).
    let residual = INITIALIZER_RANGE / (2.0 * decoder.num_blocks().max(1) as f32).sqrt();
    decoder.all_names().into_iter().flat_map(move |name| {
        let bias = name.bias_name().map(|b| (b, vec![name.shape[0]], vec![0.0; name.shape[0]]));
        std::iter::once((name.weight(), name.stored_shape(), weight(name, residual, seed)))
            .chain(bias)
    })
}

/// Fresh values of all tensors of any network, as [`crate::Params::fresh`] describes them.
pub fn fresh(
    network: &dyn Network,
    seed: u64,
) -> impl Iterator<Item = (String, Vec<usize>, Vec<f32>)> + '_ {
    network.modules().into_iter().flat_map(move |name| {
        let values = move |leaf| {
            let shape = name.leaf_shape(leaf);
            let mut values = vec![0.0; shape.iter().product()];
            let mut rng = Rng::stream(seed, &format!("init/{}", name.tensor(leaf)));
            match (leaf, name.role) {
                (Leaf::RunningVar, _) => values.fill(1.0),
                (Leaf::Weight, role) if role.is_norm() => {
                    values.fill(if name.plus_one { 0.0 } else { 1.0 });
                }
                (Leaf::RunningMean, _) => {}
                (Leaf::Bias, role) if role.is_norm() => {}
                (_, Role::Embed | Role::Position | Role::ClassToken) => {
                    rng.fill_normal(&mut values, INITIALIZER_RANGE);
                }
                _ => {
                    let bound = 1.0 / (name.in_features().max(1) as f32).sqrt();
                    rng.fill_uniform(&mut values, -bound, bound);
                }
            }
            (name.tensor(leaf), shape, values)
        };
        name.leaves().into_iter().map(values)
    })
}

fn weight(name: &Name, residual: f32, seed: u64) -> Vec<f32> {
    let count = name.stored_shape().iter().product();
    if name.role.is_norm() {
        return vec![if name.plus_one { 0.0 } else { 1.0 }; count];
    }
    let std = match name.role {
        Role::Output | Role::Down => residual,
        _ => INITIALIZER_RANGE,
    };
    let mut values = vec![0.0; count];
    Rng::stream(seed, &format!("init/{}", name.weight())).fill_normal(&mut values, std);
    values
}
