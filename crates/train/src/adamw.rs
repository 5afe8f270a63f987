//! AdamW as the last link of a chain: moments per parameter, updates in place.
//!
//! Loshchilov and Hutter (2019), algorithm 2: with `m` and `v` the decayed means of `g` and `g²`,
//! corrected for their start at zero, `p <- p (1 - rate decay) - rate m / (sqrt(v) + epsilon)`.

use crate::{
    config::{OptimizerConfig, parse_pattern},
    error::Result,
    gradients::Grads,
    params::Params,
    state::{Saved, StateTensor, Values},
    transform::{Step, Transform},
};
use method::Pattern;
use std::collections::BTreeMap;
use tensor::kernels::{AdamwStep, adamw};

struct Group {
    pattern: Pattern,
    learning_rate_scale: f64,
    weight_decay: Option<f64>,
}

struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
    /// Updates of this parameter so far; a parameter that is frozen for a while does not age.
    time: u64,
}

/// The AdamW link.
pub struct AdamW {
    betas: [f64; 2],
    epsilon: f64,
    weight_decay: f64,
    groups: Vec<Group>,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// The optimiser that a configuration describes, with no moments yet.
    pub fn from_config(config: &OptimizerConfig) -> Result<Self> {
        let mut groups = Vec::new();
        for group in &config.groups {
            groups.push(Group {
                pattern: parse_pattern("optimizer.groups.pattern", &group.pattern)?,
                learning_rate_scale: group.learning_rate_scale,
                weight_decay: Some(group.weight_decay.unwrap_or(config.weight_decay)),
            });
        }
        Ok(Self {
            betas: config.betas,
            epsilon: config.epsilon,
            weight_decay: config.weight_decay,
            groups,
            moments: BTreeMap::new(),
        })
    }

    /// Factor on the learning rate and weight decay of a parameter.
    fn options(&self, name: &str, dimensions: usize) -> (f64, f64) {
        let group = self.groups.iter().find(|g| g.pattern.matches(name));
        let scale = group.map_or(1.0, |g| g.learning_rate_scale);
        let own = if dimensions < 2 { 0.0 } else { self.weight_decay };
        (scale, group.and_then(|g| g.weight_decay).unwrap_or(own))
    }
}

impl Transform for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn update(&mut self, step: &Step, params: &mut Params, grads: &mut Grads) -> Result<()> {
        for (name, gradient) in grads.iter() {
            let (scale, decay) = self.options(name, params.shape(name)?.len());
            let moments = self.moments.entry(name.to_string()).or_insert_with(|| Moments {
                first: vec![0.0; gradient.len()],
                second: vec![0.0; gradient.len()],
                time: 0,
            });
            moments.time += 1;
            let numbers = AdamwStep {
                beta1: self.betas[0] as f32,
                beta2: self.betas[1] as f32,
                eps: self.epsilon as f32,
                lr: (step.learning_rate * scale) as f32,
                weight_decay: decay as f32,
                step: moments.time,
            };
            params.write(name, |values| {
                adamw(values, gradient, &mut moments.first, &mut moments.second, &numbers);
            })?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<StateTensor<'_>> {
        let mut all = Vec::new();
        for (name, moments) in &self.moments {
            for (kind, values) in [("first", &moments.first), ("second", &moments.second)] {
                let values = Values::Slice(values);
                all.push(StateTensor { name: format!("{kind}.{name}"), values });
            }
        }
        all
    }

    fn notes(&self) -> serde_json::Value {
        let times = self.moments.iter().map(|(name, m)| (name.clone(), m.time.into()));
        serde_json::Value::Object(times.collect())
    }

    fn restore(&mut self, saved: &mut Saved, notes: &serde_json::Value) -> Result<()> {
        self.moments.clear();
        for (name, time) in notes.as_object().into_iter().flatten() {
            let first = saved.take_any(&format!("first.{name}"))?;
            let second = saved.take(&format!("second.{name}"), first.len())?;
            let time = time.as_u64().unwrap_or(0);
            self.moments.insert(name.clone(), Moments { first, second, time });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimizer(weight_decay: f64) -> OptimizerConfig {
        OptimizerConfig { learning_rate: 0.1, weight_decay, ..OptimizerConfig::default() }
    }

    fn params() -> Params {
        let mut params = Params::empty();
        params.insert("w.weight", &[1, 3], vec![1.0, -2.0, 0.5]).unwrap();
        params.insert("n.weight", &[3], vec![1.0, -2.0, 0.5]).unwrap();
        params
    }

    fn run(link: &mut AdamW, params: &mut Params, gradient: [f32; 3], names: &[&str]) {
        let mut grads = Grads::new();
        names.iter().for_each(|n| grads.accumulate(n, gradient.to_vec()));
        let step = Step { index: 0, total: 9, learning_rate: 0.1 };
        link.update(&step, params, &mut grads).unwrap();
    }

    fn close(params: &Params, name: &str, expected: [f32; 3]) {
        params
            .read(name, |v| {
                for (a, b) in v.iter().zip(expected) {
                    assert!((a - b).abs() < 2e-6, "{name}: {v:?} and {expected:?}");
                }
            })
            .unwrap();
    }

    const GRADIENTS: [[f32; 3]; 3] = [[0.1, -0.2, 0.3], [-0.4, 0.5, 1e-3], [2.0, 0.0, -0.6]];

    /// torch.optim.AdamW(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), PyTorch 2.
    const PYTORCH: [[f32; 3]; 3] = [
        [0.89, -1.88, 0.395],
        [0.936_440_17, -1.905_024_5, 0.322_934_27],
        [0.874_495_4, -1.920_288_8, 0.353_115_6],
    ];

    #[test]
    fn agrees_with_pytorch() {
        let (mut params, mut link) = (params(), AdamW::from_config(&optimizer(0.1)).unwrap());
        for (gradient, expected) in GRADIENTS.into_iter().zip(PYTORCH) {
            run(&mut link, &mut params, gradient, &["w.weight"]);
            close(&params, "w.weight", expected);
        }
    }

    #[test]
    fn groups_and_the_vector_rule() {
        let mut config = optimizer(0.1);
        config.groups.push(crate::config::GroupConfig {
            pattern: "w.weight".into(),
            learning_rate_scale: 0.0,
            weight_decay: None,
        });
        let (mut params, mut link) = (params(), AdamW::from_config(&config).unwrap());
        run(&mut link, &mut params, GRADIENTS[0], &["w.weight", "n.weight"]);
        close(&params, "w.weight", [1.0, -2.0, 0.5]);
        // A vector is not decayed: the first step moves by the learning rate against the sign.
        close(&params, "n.weight", [0.9, -1.9, 0.4]);
    }

    #[test]
    fn parameters_without_gradient_do_not_age() {
        let (mut params, mut link) = (params(), AdamW::from_config(&optimizer(0.1)).unwrap());
        run(&mut link, &mut params, GRADIENTS[0], &["n.weight"]);
        for (gradient, expected) in GRADIENTS.into_iter().zip(PYTORCH) {
            run(&mut link, &mut params, gradient, &["w.weight"]);
            close(&params, "w.weight", expected);
        }
    }

    #[test]
    fn state_round_trip_continues_exactly() {
        let (mut a, mut link) = (params(), AdamW::from_config(&optimizer(0.1)).unwrap());
        run(&mut link, &mut a, GRADIENTS[0], &["w.weight"]);
        let dir = tempfile::tempdir().unwrap();
        let state = crate::state::StateDir::new(dir.path());
        let header = crate::state::Header {
            step: 1,
            config: 0.into(),
            data: String::new(),
            notes: link.notes(),
        };
        let mut tensors = a.state();
        tensors.extend(link.state());
        state.write(&header, &tensors).unwrap();
        drop(tensors);

        let (mut b, mut other) = (params(), AdamW::from_config(&optimizer(0.1)).unwrap());
        let (header, mut saved) = state.read().unwrap().unwrap();
        b.restore(&mut saved).unwrap();
        other.restore(&mut saved, &header.notes).unwrap();
        for gradient in &GRADIENTS[1..] {
            run(&mut link, &mut a, *gradient, &["w.weight"]);
            run(&mut other, &mut b, *gradient, &["w.weight"]);
        }
        let bits = |p: &Params| {
            p.read("w.weight", |v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).unwrap()
        };
        assert_eq!(bits(&a), bits(&b));
    }
}
