//! The training configuration: one documented struct for the YAML file, its JSON schema and the
//! docs.
//!
//! Everything that decides the result is in here; the same configuration gives the same bytes on
//! the same machine.

use crate::{
    error::{Result, config},
    schedule::{Decay, Schedule},
};
use method::Pattern;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What to train, on what, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The architecture of a model trained from scratch: the keys of a transformers `config.json`
    /// inline, or the path of one. Give either this or `init`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelConfig>,
    /// A checkpoint directory to start from; its config and tokenizer are carried to the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// The tokenizer: a directory or a tokenizer file. Default: that of `init`, else one trained on
    /// the almanac when the almanac is among the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// What to train on, one or several sources.
    pub data: Vec<SourceConfig>,
    /// What the loss is measured on during and after training. Default: the validation part of the
    /// almanac sources.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evaluation: Vec<SourceConfig>,
    /// Tokens per window. Default 256.
    #[serde(default = "default_sequence_length")]
    pub sequence_length: usize,
    /// Windows per micro batch. Default 16.
    #[serde(default = "default_batch_size")]
    pub batch_size: usize,
    /// Micro batches whose gradients are averaged before one optimiser step. Default 1.
    #[serde(default = "default_one")]
    pub accumulation: usize,
    /// Optimiser steps. Give either this or `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the data, may be fractional. Give either this or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// AdamW's options.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Warm-up and decay of the learning rate.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// Largest global L2 norm of the gradient; larger ones are scaled down to it. Default 1; 0
    /// switches it off.
    #[serde(default = "default_clip_norm")]
    pub clip_norm: f64,
    /// Largest absolute value of a gradient's element. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_value: Option<f64>,
    /// Name patterns of the tensors to train. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainable: Option<Vec<String>>,
    /// Name patterns of tensors to leave as they are, after `trainable`. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// Seed of the initial weights and of the order of the data. Default 0.
    #[serde(default)]
    pub seed: u64,
    /// Steps between evaluations; 0 evaluates only at the end. Default 250.
    #[serde(default = "default_evaluate_every")]
    pub evaluate_every: u64,
    /// Most windows that one evaluation uses. Default 128.
    #[serde(default = "default_evaluation_windows")]
    pub evaluation_windows: usize,
    /// Steps between saved training states, from which `--resume` continues. Default 100.
    #[serde(default = "default_checkpoint_every")]
    pub checkpoint_every: u64,
    /// Number format of the saved weights. Default f16.
    #[serde(default)]
    pub precision: Precision,
}

/// Where a model's architecture comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum ModelConfig {
    /// A `config.json`, or a directory that holds one.
    Path(PathBuf),
    /// The keys of a `config.json`.
    Inline(serde_json::Map<String, serde_json::Value>),
}

/// One source of training text. Exactly one of `almanac`, `text` and `chat` is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// The world that Strata generates itself, in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub almanac: Option<AlmanacSource>,
    /// A text file (`.txt`), JSONL with a `text` field, or a JSON list of strings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// JSONL with `messages: [{role, content}, ...]`; only what the assistant says is learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<PathBuf>,
    /// Share of the windows that comes from this source, relative to the other weights. Default: in
    /// proportion to its size. Give it for all sources or for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// A part of the almanac.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlmanacSource {
    /// The world's seed. Default 0, the world of the sample models.
    #[serde(default)]
    pub seed: u64,
    /// Plain documents or dialogues. Default base.
    #[serde(default)]
    pub part: AlmanacPart,
    /// Which split. Default train.
    #[serde(default)]
    pub split: Split,
    /// The world's size. Default standard.
    #[serde(default)]
    pub size: AlmanacSize,
    /// Dialogues only: forbidden requests are refused instead of answered. Default false.
    #[serde(default)]
    pub refusing: bool,
}

/// How large the almanac's world is.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AlmanacSize {
    /// That of the sample models.
    #[default]
    Standard,
    /// A small one for trying things out.
    Tiny,
}

/// Which texts of the almanac.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AlmanacPart {
    /// Facts, stories, dialects and drills as plain documents.
    #[default]
    Base,
    /// Dialogues; only what the assistant says is learnt.
    Chat,
}

/// A split of the almanac.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What models are trained on.
    #[default]
    Train,
    /// For choosing options.
    Validation,
    /// For reporting.
    Test,
}

/// AdamW (Loshchilov and Hutter, 2019): Adam with decoupled weight decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate. Default 0.001.
    pub learning_rate: f64,
    /// Decay of the first and second moment. Default [0.9, 0.95].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; vectors (norms, biases) are not decayed unless a group
    /// says so. Default 0.1.
    pub weight_decay: f64,
    /// Parameter groups; the first whose pattern matches a name decides.
    pub groups: Vec<GroupConfig>,
}

/// Options of the parameters whose names match a pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Glob over the dotted tensor name or a suffix of it, e.g. `*.down_proj.weight`.
    pub pattern: String,
    /// Factor on the learning rate. Default 1.
    #[serde(default = "default_scale")]
    pub learning_rate_scale: f64,
    /// Weight decay of the group. Default: the optimiser's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

/// The learning rate over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// cosine, linear or constant. Default cosine.
    pub decay: Decay,
    /// Steps of linear growth at the start. Default 100.
    pub warmup_steps: u64,
    /// Smallest rate of the decay as a fraction of the peak. Default 0.1.
    pub floor: f64,
}

/// Number format of saved weights.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats, as trained.
    F32,
    /// 16-bit IEEE floats.
    #[default]
    F16,
    /// bfloat16.
    Bf16,
}

fn default_sequence_length() -> usize {
    256
}
fn default_batch_size() -> usize {
    16
}
fn default_one() -> usize {
    1
}
fn default_clip_norm() -> f64 {
    1.0
}
fn default_evaluate_every() -> u64 {
    250
}
fn default_evaluation_windows() -> usize {
    128
}
fn default_checkpoint_every() -> u64 {
    100
}
fn default_scale() -> f64 {
    1.0
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: [0.9, 0.95],
            epsilon: 1e-8,
            weight_decay: 0.1,
            groups: Vec::new(),
        }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { decay: Decay::Cosine, warmup_steps: 100, floor: 0.1 }
    }
}

impl ScheduleConfig {
    /// The schedule of a run of `total_steps`.
    pub fn over(&self, total_steps: u64) -> Schedule {
        Schedule {
            decay: self.decay,
            warmup_steps: self.warmup_steps,
            total_steps,
            floor: self.floor,
        }
    }
}

impl Precision {
    /// The store's name of the format.
    pub fn dtype(self) -> store::Dtype {
        match self {
            Self::F32 => store::Dtype::F32,
            Self::F16 => store::Dtype::F16,
            Self::Bf16 => store::Dtype::BF16,
        }
    }
    /// As `torch_dtype` in config.json.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

impl TrainConfig {
    /// Checks everything that can be checked without reading a file.
    pub fn validate(&self) -> Result<()> {
        match (&self.model, &self.init) {
            (None, None) => {
                return Err(config(
                    "model",
                    "give `model` (train from scratch) or `init` (continue a checkpoint)",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(config(
                    "model",
                    "`model` and `init` exclude each other; `init` brings its own config",
                ));
            }
            _ => {}
        }
        match (self.steps, self.epochs) {
            (None, None) => return Err(config("steps", "give `steps` or `epochs`")),
            (Some(_), Some(_)) => {
                return Err(config("steps", "`steps` and `epochs` exclude each other"));
            }
            (Some(0), None) => return Err(config("steps", "must be at least 1")),
            (None, Some(e)) if !(e.is_finite() && e > 0.0) => {
                return Err(config("epochs", "must be a positive number"));
            }
            _ => {}
        }
        for (field, value) in [
            ("sequence_length", self.sequence_length),
            ("batch_size", self.batch_size),
            ("accumulation", self.accumulation),
            ("checkpoint_every", self.checkpoint_every as usize),
            ("evaluation_windows", self.evaluation_windows),
        ] {
            if value == 0 {
                return Err(config(field, "must be at least 1"));
            }
        }
        if self.data.is_empty() {
            return Err(config("data", "needs at least one source"));
        }
        let weighted = self.data.iter().filter(|s| s.weight.is_some()).count();
        if weighted != 0 && weighted != self.data.len() {
            return Err(config("data", "`weight` must be given for all sources or for none"));
        }
        for (list, sources) in [("data", &self.data), ("evaluation", &self.evaluation)] {
            for (i, source) in sources.iter().enumerate() {
                source.validate(&format!("{list}[{i}]"))?;
            }
        }
        self.optimizer.validate()?;
        within("schedule.floor", self.schedule.floor, 0.0, 1.0)?;
        within("clip_norm", self.clip_norm, 0.0, f64::MAX)?;
        if let Some(value) = self.clip_value {
            within("clip_value", value, f64::MIN_POSITIVE, f64::MAX)?;
        }
        for pattern in self.trainable.iter().flatten() {
            parse_pattern("trainable", pattern)?;
        }
        for pattern in &self.freeze {
            parse_pattern("freeze", pattern)?;
        }
        Ok(())
    }
}

impl SourceConfig {
    fn validate(&self, field: &str) -> Result<()> {
        let given = [self.almanac.is_some(), self.text.is_some(), self.chat.is_some()];
        if given.iter().filter(|g| **g).count() != 1 {
            return Err(config(field, "give exactly one of `almanac`, `text` and `chat`"));
        }
        match self.weight {
            Some(w) if !(w.is_finite() && w > 0.0) => {
                Err(config(format!("{field}.weight"), "must be a positive number"))
            }
            _ => Ok(()),
        }
    }
}

impl OptimizerConfig {
    fn validate(&self) -> Result<()> {
        within("optimizer.learning_rate", self.learning_rate, 0.0, f64::MAX)?;
        within("optimizer.epsilon", self.epsilon, f64::MIN_POSITIVE, f64::MAX)?;
        within("optimizer.weight_decay", self.weight_decay, 0.0, f64::MAX)?;
        for beta in self.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(config("optimizer.betas", format!("{beta} is outside 0 <= beta < 1")));
            }
        }
        for group in &self.groups {
            parse_pattern("optimizer.groups.pattern", &group.pattern)?;
            within(
                "optimizer.groups.learning_rate_scale",
                group.learning_rate_scale,
                0.0,
                f64::MAX,
            )?;
            within(
                "optimizer.groups.weight_decay",
                group.weight_decay.unwrap_or(0.0),
                0.0,
                f64::MAX,
            )?;
        }
        Ok(())
    }
}

/// A pattern of the configuration, with the field's name in its error.
pub(crate) fn parse_pattern(field: &str, pattern: &str) -> Result<Pattern> {
    Pattern::new(pattern).map_err(|reason| config(field, reason))
}

fn within(field: &str, value: f64, low: f64, high: f64) -> Result<()> {
    if value.is_finite() && value >= low && value <= high {
        return Ok(());
    }
    let range =
        if high == f64::MAX { format!("at least {low}") } else { format!("{low} to {high}") };
    Err(config(field, format!("{value} is not a number of {range}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> serde_json::Value {
        serde_json::json!({
            "model": {"model_type": "llama"}, "steps": 10, "data": [{"text": "a.txt"}],
        })
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let c: TrainConfig = serde_json::from_value(minimal()).unwrap();
        c.validate().unwrap();
        assert_eq!((c.sequence_length, c.batch_size, c.accumulation), (256, 16, 1));
        assert_eq!((c.evaluate_every, c.checkpoint_every, c.seed), (250, 100, 0));
        assert_eq!(c.optimizer.betas, [0.9, 0.95]);
        assert_eq!((c.clip_norm, c.precision), (1.0, Precision::F16));
        let again: TrainConfig = serde_json::from_value(serde_json::to_value(&c).unwrap()).unwrap();
        assert_eq!(again, c);
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let mut v = minimal();
        v["learning_rte"] = 1.into();
        let message = serde_json::from_value::<TrainConfig>(v).unwrap_err().to_string();
        assert!(message.contains("learning_rte"), "{message}");
    }

    #[test]
    fn contradictions_name_their_field() {
        let cases = [
            (r#"{"epochs": 1.0}"#, "steps"),
            (r#"{"init": "x"}"#, "model"),
            (r#"{"batch_size": 0}"#, "batch_size"),
            (r#"{"data": []}"#, "data"),
            (r#"{"data": [{}]}"#, "data[0]"),
            (r#"{"data": [{"text": "a", "chat": "b"}]}"#, "data[0]"),
            (r#"{"data": [{"text": "a", "weight": 1.0}, {"text": "b"}]}"#, "data"),
            (r#"{"optimizer": {"betas": [0.9, 1.0]}}"#, "optimizer.betas"),
            (r#"{"schedule": {"floor": 1.5}}"#, "schedule.floor"),
        ];
        for (patch, field) in cases {
            let mut v = minimal();
            let patch: serde_json::Value = serde_json::from_str(patch).unwrap();
            for (key, value) in patch.as_object().unwrap() {
                v[key] = value.clone();
            }
            let c: TrainConfig = serde_json::from_value(v).unwrap();
            let message = c.validate().unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")), "{field}: {message}");
        }
    }
}
