//! How a gradient becomes an update: a chain of small links after optax.
//!
//! Gradients go in, each link changes them or the parameters, its state lies in the open so that it
//! can be saved and restored exactly. A new training method is a new link; the loop stays as it is.

use crate::{
    adamw::AdamW,
    config::{TrainConfig, parse_pattern},
    error::{Error, Result},
    gradients::Grads,
    params::Params,
    state::{Saved, StateTensor},
};
use method::Pattern;

/// Where the run stands when a link is asked for its update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Zero-based optimiser step.
    pub index: u64,
    /// Optimiser steps of the whole run.
    pub total: u64,
    /// The learning rate of this step.
    pub learning_rate: f64,
}

/// A link of the update chain.
pub trait Transform {
    /// A short name, unique in the chain; it prefixes the link's saved tensors.
    fn name(&self) -> &'static str;

    /// Changes gradients or parameters. Names without a gradient must be left alone.
    fn update(&mut self, step: &Step, params: &mut Params, grads: &mut Grads) -> Result<()>;

    /// The tensors that the next update depends on.
    fn state(&self) -> Vec<StateTensor<'_>> {
        Vec::new()
    }

    /// The numbers that the next update depends on.
    fn notes(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Takes back what `state` and `notes` gave.
    fn restore(&mut self, _saved: &mut Saved, _notes: &serde_json::Value) -> Result<()> {
        Ok(())
    }

    /// Numbers of the last update for the loss log.
    fn measures(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

/// Links that run one after the other.
#[derive(Default)]
pub struct Chain {
    links: Vec<Box<dyn Transform>>,
}

impl Chain {
    /// A chain of the links given.
    pub fn new(links: Vec<Box<dyn Transform>>) -> Self {
        Self { links }
    }

    /// The chain that a configuration describes: freeze, clip by value, clip by norm, AdamW.
    pub fn from_config(config: &TrainConfig) -> Result<Self> {
        let mut links: Vec<Box<dyn Transform>> = Vec::new();
        if let Some(limit) = config.clip_value {
            links.push(Box::new(ClipByValue::new(limit as f32)));
        }
        links.push(Box::new(ClipByNorm::new(config.clip_norm)));
        links.push(Box::new(AdamW::from_config(&config.optimizer)?));
        Ok(Self { links })
    }

    /// Appends a link.
    pub fn push(&mut self, link: Box<dyn Transform>) {
        self.links.push(link);
    }

    /// One update.
    pub fn update(&mut self, step: &Step, params: &mut Params, grads: &mut Grads) -> Result<()> {
        for link in &mut self.links {
            link.update(step, params, grads)?;
        }
        Ok(())
    }

    /// The saved tensors of all links, each named `<link>.<tensor>`.
    pub fn state(&self) -> Vec<StateTensor<'_>> {
        let mut all = Vec::new();
        for link in &self.links {
            for mut tensor in link.state() {
                tensor.name = format!("{}.{}", link.name(), tensor.name);
                all.push(tensor);
            }
        }
        all
    }

    /// The saved numbers of all links by link name.
    pub fn notes(&self) -> serde_json::Value {
        self.links
            .iter()
            .map(|l| (l.name().to_string(), l.notes()))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// Restores every link.
    pub fn restore(&mut self, saved: &mut Saved, notes: &serde_json::Value) -> Result<()> {
        for link in &mut self.links {
            let mut own = saved.take_prefix(&format!("{}.", link.name()));
            link.restore(&mut own, &notes[link.name()])?;
        }
        Ok(())
    }

    /// Numbers of the last update of all links.
    pub fn measures(&self) -> Vec<(&'static str, f64)> {
        self.links.iter().flat_map(|l| l.measures()).collect()
    }
}

/// Scales all gradients so that their global L2 norm is at most `limit`. A limit of 0 only
/// measures.
pub struct ClipByNorm {
    limit: f64,
    norm: f64,
}

impl ClipByNorm {
    /// Clips to `limit`.
    pub fn new(limit: f64) -> Self {
        Self { limit, norm: 0.0 }
    }
}

impl Transform for ClipByNorm {
    fn name(&self) -> &'static str {
        "clip_by_norm"
    }

    fn update(&mut self, step: &Step, _params: &mut Params, grads: &mut Grads) -> Result<()> {
        self.norm = grads.global_norm();
        if !self.norm.is_finite() {
            let what = format!("the gradient's norm is {}", self.norm);
            return Err(Error::Diverged { step: step.index + 1, what });
        }
        if self.limit > 0.0 && self.norm > self.limit {
            grads.scale((self.limit / self.norm) as f32);
        }
        Ok(())
    }

    fn measures(&self) -> Vec<(&'static str, f64)> {
        vec![("gradient_norm", self.norm)]
    }
}

/// Limits every element of every gradient to `-limit..=limit`.
pub struct ClipByValue {
    limit: f32,
}

impl ClipByValue {
    /// Clips to `limit`, which must be positive.
    pub fn new(limit: f32) -> Self {
        Self { limit: limit.abs() }
    }
}

impl Transform for ClipByValue {
    fn name(&self) -> &'static str {
        "clip_by_value"
    }

    fn update(&mut self, _step: &Step, _params: &mut Params, grads: &mut Grads) -> Result<()> {
        let limit = self.limit;
        for (_, gradient) in grads.iter_mut() {
            // NaN passes: divergence must be seen, not hidden.
            gradient.iter_mut().for_each(|g| *g = g.clamp(-limit, limit));
        }
        Ok(())
    }
}

/// Drops the gradients of the names that match: those parameters keep their values in this step.
///
/// Parameters that are frozen for a whole run are better switched off with
/// [`Params::set_trainable`], which also saves the backward pass; this link is for methods that
/// change their mind from step to step.
pub struct Freeze {
    patterns: Vec<Pattern>,
}

impl Freeze {
    /// Freezes every name that matches one of the patterns.
    pub fn new(patterns: &[String]) -> Result<Self> {
        let patterns =
            patterns.iter().map(|p| parse_pattern("freeze", p)).collect::<Result<Vec<_>>>()?;
        Ok(Self { patterns })
    }
}

impl Transform for Freeze {
    fn name(&self) -> &'static str {
        "freeze"
    }

    fn update(&mut self, _step: &Step, _params: &mut Params, grads: &mut Grads) -> Result<()> {
        grads.retain(|name| !self.patterns.iter().any(|p| p.matches(name)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step { index: 0, total: 1, learning_rate: 0.1 };

    fn grads() -> Grads {
        let mut grads = Grads::new();
        grads.accumulate("model.a.weight", vec![3.0, -4.0]);
        grads.accumulate("model.b.weight", vec![12.0]);
        grads
    }

    #[test]
    fn norm_clipping_is_global() {
        let mut g = grads();
        let mut link = ClipByNorm::new(6.5);
        link.update(&STEP, &mut Params::empty(), &mut g).unwrap();
        assert_eq!(g.get("model.a.weight"), Some(&[1.5, -2.0][..]));
        assert_eq!(g.get("model.b.weight"), Some(&[6.0][..]));
        assert_eq!(link.measures(), [("gradient_norm", 13.0)]);
    }

    #[test]
    fn norm_clipping_leaves_small_gradients_alone() {
        for limit in [0.0, 13.0, 20.0] {
            let mut g = grads();
            ClipByNorm::new(limit).update(&STEP, &mut Params::empty(), &mut g).unwrap();
            assert_eq!(g.get("model.b.weight"), Some(&[12.0][..]), "limit {limit}");
        }
    }

    #[test]
    fn value_clipping() {
        let mut g = grads();
        ClipByValue::new(3.5).update(&STEP, &mut Params::empty(), &mut g).unwrap();
        assert_eq!(g.get("model.a.weight"), Some(&[3.0, -3.5][..]));
        assert_eq!(g.get("model.b.weight"), Some(&[3.5][..]));
    }

    #[test]
    fn freezing_drops_by_pattern() {
        let mut g = grads();
        Freeze::new(&["*.a.*".into()])
            .unwrap()
            .update(&STEP, &mut Params::empty(), &mut g)
            .unwrap();
        assert_eq!(g.names().collect::<Vec<_>>(), ["model.b.weight"]);
    }
}
