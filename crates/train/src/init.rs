//! The tensors of a network and their values before training.

use nn::{Decoder, Name, Network, Role};
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
