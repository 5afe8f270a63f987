//! Training under masks: pruned weights stay exactly zero.
//!
//! Two links of the update chain. [`MaskGradients`] stands first, so that pruned weights neither
//! count in the gradient's norm nor gather moments; [`KeepMasks`] stands last, so that no optimiser
//! moves them.

use crate::{
    error::{Error, Result},
    gradients::Grads,
    params::Params,
    transform::{Step, Transform},
};
use std::{collections::BTreeMap, sync::Arc};

/// Which values of each parameter stay, by tensor name, in the order in which it is stored.
/// Parameters without an entry are not masked.
pub type Masks = Arc<BTreeMap<String, Vec<bool>>>;

/// Zeroes the gradients of pruned weights.
pub struct MaskGradients(pub Masks);

/// Zeroes pruned weights after the update.
pub struct KeepMasks(pub Masks);

impl Transform for MaskGradients {
    fn name(&self) -> &'static str {
        "mask_gradients"
    }

    fn update(&mut self, _step: &Step, _params: &mut Params, grads: &mut Grads) -> Result<()> {
        for (name, gradient) in grads.iter_mut() {
            if let Some(mask) = self.0.get(name) {
                zero(name, gradient, mask)?;
            }
        }
        Ok(())
    }
}

impl Transform for KeepMasks {
    fn name(&self) -> &'static str {
        "keep_masks"
    }

    fn update(&mut self, _step: &Step, params: &mut Params, _grads: &mut Grads) -> Result<()> {
        apply(&self.0, params)
    }
}

/// Zeroes what the masks drop.
///
/// # Errors
/// A mask of a parameter that is not there, or of another length.
pub fn apply(masks: &BTreeMap<String, Vec<bool>>, params: &mut Params) -> Result<()> {
    for (name, mask) in masks {
        params.write(name, |values| zero(name, values, mask))??;
    }
    Ok(())
}

fn zero(name: &str, values: &mut [f32], mask: &[bool]) -> Result<()> {
    if values.len() != mask.len() {
        return Err(Error::Shape {
            name: name.to_string(),
            expected: format!("a mask of {} values", values.len()),
            found: format!("one of {}", mask.len()),
        });
    }
    for (value, keep) in values.iter_mut().zip(mask) {
        if !keep {
            *value = 0.0;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdamW, Chain, config::OptimizerConfig};

    #[test]
    fn pruned_weights_stay_zero_under_adamw() {
        let mut params = Params::empty();
        params.insert("a.weight", &[1, 3], vec![1.0, 2.0, 3.0]).unwrap();
        params.insert("b.weight", &[2], vec![1.0, 1.0]).unwrap();
        let masks: Masks = Arc::new(BTreeMap::from([("a.weight".into(), vec![true, false, true])]));
        apply(&masks, &mut params).unwrap();
        let mut chain = Chain::new(vec![
            Box::new(MaskGradients(masks.clone())),
            Box::new(AdamW::from_config(&OptimizerConfig::default()).unwrap()),
            Box::new(KeepMasks(masks)),
        ]);
        for index in 0..5 {
            let mut grads = Grads::new();
            grads.accumulate("a.weight", vec![1.0, 1.0, -1.0]);
            grads.accumulate("b.weight", vec![1.0, -1.0]);
            let step = Step { index, total: 5, learning_rate: 0.1 };
            chain.update(&step, &mut params, &mut grads).unwrap();
            params.read("a.weight", |w| assert_eq!(w[1].to_bits(), 0)).unwrap();
        }
        params.read("a.weight", |w| assert!(w[0] < 1.0 && w[2] > 2.8)).unwrap();
        params.read("b.weight", |w| assert!(w[0] < 1.0 && w[1] > 1.0)).unwrap();
    }

    #[test]
    fn masks_that_do_not_fit_are_refused() {
        let mut params = Params::empty();
        params.insert("a.weight", &[2], vec![1.0, 2.0]).unwrap();
        let wrong = BTreeMap::from([("a.weight".to_string(), vec![true])]);
        assert!(apply(&wrong, &mut params).unwrap_err().to_string().contains("a.weight"));
        let unknown = BTreeMap::from([("c.weight".to_string(), vec![true])]);
        assert!(apply(&unknown, &mut params).is_err());
    }
}
