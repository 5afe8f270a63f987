//! Which layers of a network take part, their magnitude order, and how often a weight is used.

use super::curves::Prunable;
use super::masks::{Mask, Ranking};
use crate::{Error, Result};
use method::Pattern;
use nn::{Input, Leaf, Name, Network, Role, Weights};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use tensor::{Device, Tensor, host};

/// A layer of a network that takes part, and the segment that computes it (`None`: the entrance).
pub type Place = (Option<usize>, Name);

/// The layers of `network` that take part: all linear layers and convolutions that match one of
/// `only` (all, when there is none) and none of `exclude`, each weight once. `tied_head` adds an
/// output head that shares the embedding's weights, under the embedding's name.
///
/// # Errors
/// A pattern that matches nothing, by its text with the nearest name; nothing left; a tied head
/// that is not there.
pub fn select(
    network: &dyn Network,
    only: &[Pattern],
    exclude: &[Pattern],
    tied_head: bool,
) -> Result<Vec<Place>> {
    let mut all: Vec<Place> = Vec::new();
    if tied_head {
        let layers = network.layers();
        let embedding = network.modules().into_iter().find(|n| n.role == Role::Embed);
        let separate = layers.iter().any(|(_, name)| name.role == Role::Head);
        match embedding.filter(|_| !separate) {
            Some(name) => all.push((None, Name { role: Role::Head, ..name.clone() })),
            None => {
                return Err(Error::Options(
                    "--tied-head: this network's head is not tied to its embedding; it is pruned \
                     as every other layer"
                        .into(),
                ));
            }
        }
    }
    for (segment, name) in network.layers() {
        if !all.iter().any(|(_, other)| other.weight() == name.weight()) {
            all.push((Some(segment), name));
        }
    }
    for pattern in only.iter().chain(exclude) {
        let known = all.iter().any(|(_, name)| pattern.matches(&name.module))
            || network.modules().iter().any(|name| pattern.matches(&name.module));
        if !known {
            let bare = pattern.as_str().trim_matches(['*', '.']);
            let near = method::nearest(bare, all.iter().map(|(_, name)| name.module.as_str()));
            let hint = near.map(|n| format!("; the nearest name is `{n}`")).unwrap_or_default();
            return Err(Error::Options(format!("pattern `{pattern}` matches no layer{hint}")));
        }
    }
    let wanted = |name: &Name| {
        (only.is_empty() || only.iter().any(|p| p.matches(&name.module)))
            && !exclude.iter().any(|p| p.matches(&name.module))
    };
    all.retain(|(_, name)| wanted(name));
    if all.is_empty() {
        return Err(Error::Options("no layer is left to prune; loosen --only or --exclude".into()));
    }
    Ok(all)
}

/// Ranks the weights of every layer. What `masks` (by module) drop counts as pruned, and so does
/// every zero.
///
/// # Errors
/// Weights that are not finite, masks that do not fit, and two layers that hold the same weights
/// (tied, but stored twice): pruned apart they would no longer be tied.
pub fn rank(
    places: &[Place],
    weights: &dyn Weights,
    masks: &BTreeMap<String, Mask>,
) -> Result<Vec<Prunable>> {
    let mut seen: HashMap<([usize; 2], u64), &Name> = HashMap::new();
    let mut layers = Vec::with_capacity(places.len());
    for (segment, name) in places {
        let matrix = weights.matrix(name)?;
        let ranking = host::read(&matrix, |values| match masks.get(&name.module) {
            Some(mask) => Ranking::masked(&name.module, values, mask),
            None => Ranking::new(&name.module, values),
        })?;
        let key = (name.shape, host::read(&matrix, fingerprint));
        if ranking.zeros() < ranking.len()
            && let Some(other) = seen.insert(key, name)
            && same(&matrix, &weights.matrix(other)?)
        {
            return Err(Error::layer(
                &name.module,
                format!(
                    "holds the same weights as {}: if they are tied, name one of them in \
                     --exclude and tie them in the checkpoint, so that both see one mask",
                    other.module
                ),
            ));
        }
        layers.push(Prunable { name: name.clone(), segment: *segment, ranking });
    }
    Ok(layers)
}

/// A number that equal values share.
fn fingerprint(values: &[f32]) -> u64 {
    values.iter().fold(0xcbf2_9ce4_8422_2325, |hash, v| {
        (hash ^ u64::from(v.to_bits())).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Whether two matrices hold the same values, and not one value everywhere.
fn same(a: &Tensor<2>, b: &Tensor<2>) -> bool {
    host::read(a, |a| host::read(b, |b| a == b && a.iter().any(|v| Some(v) != a.first())))
}

/// Sum of the dimensions of a weight as it is stored: what the Erdős–Rényi kernel counts.
pub fn dimensions(name: &Name) -> usize {
    let [out, width] = name.shape;
    match name.kernel {
        Some([height, breadth]) => out + width / (height * breadth).max(1) + height + breadth,
        None => out + width,
    }
}

/// How often one sample uses each weight of every layer (by module): output positions of a
/// convolution, tokens of a linear layer. Linear layers are counted on a pass over `input`;
/// convolutions by the geometry in which their segment leaves the state.
///
/// # Errors
/// From the network.
pub fn positions(
    network: &dyn Network,
    weights: &dyn Weights,
    input: &Input<'_>,
) -> Result<HashMap<String, u64>> {
    let counter = Counter { base: weights, rows: Mutex::default() };
    let samples = input.samples().max(1) as u64;
    let layers = network.layers();
    let mut state = network.enter(&counter, input)?;
    let mut found: HashMap<String, u64> = HashMap::new();
    for segment in 0..network.segments() {
        state = network.segment(segment, &counter, state)?;
        let places: usize = state.shape.iter().skip(1).product();
        for (_, name) in layers.iter().filter(|(s, n)| *s == segment && n.kernel.is_some()) {
            found.insert(name.module.clone(), places as u64);
        }
    }
    network.exit(&counter, state)?;
    let rows = counter.rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.extend(rows.into_iter().map(|(module, rows)| (module, rows.div_ceil(samples))));
    Ok(found)
}

/// Weights that count the rows every layer multiplies.
struct Counter<'a> {
    base: &'a dyn Weights,
    rows: Mutex<HashMap<String, u64>>,
}

impl Weights for Counter<'_> {
    fn linear(&self, name: &Name, x: Tensor<2>) -> nn::Result<Tensor<2>> {
        let rows = x.dims()[0] as u64;
        let mut counts = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(name.module.clone()).or_default() += rows;
        drop(counts);
        self.base.linear(name, x)
    }

    fn matrix(&self, name: &Name) -> nn::Result<Tensor<2>> {
        self.base.matrix(name)
    }

    fn vector(&self, name: &Name, leaf: Leaf) -> nn::Result<Tensor<1>> {
        self.base.vector(name, leaf)
    }

    fn embed(&self, name: &Name, ids: &[u32]) -> nn::Result<Tensor<2>> {
        self.base.embed(name, ids)
    }

    fn device(&self) -> Device {
        self.base.device()
    }
}
