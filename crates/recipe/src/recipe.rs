//! A recipe: a job as YAML, a list of stages, each fed by the output of the one before.
//!
//! ```yaml
//! model: samples/almanac-3m
//! stages:
//!   - quantize: { method: awq, bits: 4, group_size: 128, out: out/almanac-awq }
//! ```
//!
//! Keys are those of the command line. A key that does not exist is refused with the nearest one.

use crate::convert::{ConvertJob, ConvertOptions, Converted};
use crate::measure::MeasureOptions;
use crate::prune::{PruneJob, Pruned};
use crate::quantize::{Finished, QuantizeJob};
use crate::{Error, Result};
use compress::{PruneOptions, QuantizeOptions};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A list of stages over a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Model directory or file that the first stage reads; not needed when it trains
    #[serde(default)]
    pub model: Option<PathBuf>,
    /// What to do, in order
    pub stages: Vec<Stage>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Train a model; the next stage reads it
    Train(TrainStage),
    /// Quantise; the next stage reads the result
    Quantize(Box<QuantizeStage>),
    /// Set weights to zero; the next stage reads the result
    Prune(Box<PruneStage>),
    /// Write another container; the next stage reads it
    Convert(Box<ConvertStage>),
    /// Measure and print
    Evaluate(MeasureOptions),
}

/// A training stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainStage {
    /// Training configuration file
    pub config: PathBuf,
    /// Output directory
    pub out: PathBuf,
}

/// A quantisation stage: the options of `strata quantize`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct QuantizeStage {
    /// Output directory
    pub out: PathBuf,
    /// Replace an existing output
    pub overwrite: bool,
    /// Options
    #[serde(flatten)]
    pub options: QuantizeOptions,
    /// What to measure before and after
    pub measure: MeasureOptions,
}

/// A pruning stage: the options of `strata prune`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct PruneStage {
    /// Output directory
    pub out: PathBuf,
    /// Replace an existing output
    pub overwrite: bool,
    /// Options
    #[serde(flatten)]
    pub options: PruneOptions,
    /// What to measure before and after
    pub measure: MeasureOptions,
}

/// A conversion: the options of `strata convert`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct ConvertStage {
    /// Output: a directory, or for GGUF a file
    pub out: PathBuf,
    /// Replace an existing output
    pub overwrite: bool,
    /// Options
    #[serde(flatten)]
    pub options: ConvertOptions,
}

/// What a stage left behind.
pub enum StageResult {
    /// A trained model.
    Trained(train::TrainOutcome),
    /// A quantised model.
    Quantized(Box<Finished>),
    /// A pruned model.
    Pruned(Box<Pruned>),
    /// A converted model.
    Converted(Converted),
    /// A measurement.
    Measured(Box<crate::measure::Measures>),
}

impl Recipe {
    /// Reads a recipe file; unknown keys are refused with the nearest known one.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::Recipe(format!("{}: {e}", path.display())))?;
        Self::parse(&text).map_err(|e| Error::Recipe(format!("{}: {e}", path.display())))
    }

    /// Parses a recipe.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let value: serde_json::Value = serde_norway::from_str(text).map_err(|e| e.to_string())?;
        check_keys(&value, &schema()?)?;
        // Read from the tree, not from the text: YAML enums would ask for tags (`!quantize`).
        serde_json::from_value(value).map_err(|e| e.to_string())
    }

    /// Runs the stages in order; with `resume`, finished stages are skipped and an interrupted one
    /// is taken up. `done` sees every result as it stands.
    pub fn run(&self, resume: bool, mut done: impl FnMut(&StageResult)) -> Result<()> {
        let mut current = self.model.clone();
        for (index, stage) in self.stages.iter().enumerate() {
            let input = || {
                current.clone().ok_or_else(|| {
                    Error::Recipe(format!(
                        "stage {} needs a model: give `model:` at the top of the recipe",
                        index + 1
                    ))
                })
            };
            let result = match stage {
                Stage::Train(stage) => {
                    let config = train_config(&stage.config)?;
                    let progress = report::Progress::new("train", 0, "steps");
                    let outcome = train::Trainer::run(&config, &stage.out, resume, &progress)?;
                    current = Some(outcome.path.clone());
                    StageResult::Trained(outcome)
                }
                Stage::Quantize(stage) => {
                    if stage.out.as_os_str().is_empty() {
                        return Err(Error::Recipe(format!(
                            "stage {}: quantize needs `out`, the directory to write",
                            index + 1
                        )));
                    }
                    let job = QuantizeJob {
                        model: input()?,
                        out: stage.out.clone(),
                        options: stage.options.clone(),
                        measure: stage.measure.clone(),
                        resume,
                        overwrite: stage.overwrite,
                    };
                    let finished = job.run()?;
                    current = Some(finished.path.clone());
                    StageResult::Quantized(Box::new(finished))
                }
                Stage::Prune(stage) => {
                    if stage.out.as_os_str().is_empty() {
                        return Err(Error::Recipe(format!(
                            "stage {}: prune needs `out`, the directory to write",
                            index + 1
                        )));
                    }
                    let job = PruneJob {
                        model: input()?,
                        out: stage.out.clone(),
                        options: stage.options.clone(),
                        measure: stage.measure.clone(),
                        resume,
                        overwrite: stage.overwrite,
                    };
                    let finished = job.run()?;
                    current = Some(finished.path.clone());
                    StageResult::Pruned(Box::new(finished))
                }
                Stage::Convert(stage) => {
                    let job = ConvertJob {
                        model: input()?,
                        out: stage.out.clone(),
                        options: stage.options.clone(),
                        overwrite: stage.overwrite || resume,
                    };
                    let converted = job.run()?;
                    current = Some(converted.path.clone());
                    StageResult::Converted(converted)
                }
                Stage::Evaluate(options) => {
                    let model = nn::Model::open(&input()?)?;
                    let measurement = crate::measure::Measurement::new(&model, options)?;
                    StageResult::Measured(Box::new(measurement.run(&model, "model")?))
                }
            };
            done(&result);
        }
        Ok(())
    }
}

/// Reads a training configuration (YAML or JSON).
pub fn train_config(path: &Path) -> Result<train::TrainConfig> {
    let refuse = |e: String| Error::Recipe(format!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| refuse(e.to_string()))?;
    serde_norway::from_str(&text).map_err(|e| refuse(e.to_string()))
}

fn schema() -> std::result::Result<serde_json::Value, String> {
    serde_json::to_value(schemars::schema_for!(Recipe)).map_err(|e| e.to_string())
}

/// Refuses keys that the schema does not know. Flattened structs make serde blind to them.
fn check_keys(
    value: &serde_json::Value,
    schema: &serde_json::Value,
) -> std::result::Result<(), String> {
    walk(value, schema, schema, "")
}

fn walk(
    value: &serde_json::Value,
    schema: &serde_json::Value,
    root: &serde_json::Value,
    path: &str,
) -> std::result::Result<(), String> {
    let options = alternatives(schema, root);
    match value {
        serde_json::Value::Object(map) => {
            let properties: Vec<(&String, &serde_json::Value)> = options
                .iter()
                .filter_map(|s| s.get("properties")?.as_object())
                .flat_map(|p| p.iter())
                .collect();
            if properties.is_empty() {
                return Ok(());
            }
            for (key, inner) in map {
                let Some((_, schema)) = properties.iter().find(|(name, _)| *name == key) else {
                    let known: Vec<&str> = properties.iter().map(|(n, _)| n.as_str()).collect();
                    let place = if path.is_empty() { "the recipe" } else { path };
                    return Err(format!("{place}: {}", method::did_you_mean("key", key, &known)));
                };
                walk(inner, schema, root, &format!("{path}{}{key}", dot(path)))?;
            }
            Ok(())
        }
        serde_json::Value::Array(items) => {
            let Some(inner) = options.iter().find_map(|s| s.get("items")) else { return Ok(()) };
            for (index, item) in items.iter().enumerate() {
                walk(item, inner, root, &format!("{path}[{index}]"))?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn dot(path: &str) -> &'static str {
    if path.is_empty() { "" } else { "." }
}

/// The schema itself and everything that its references and alternatives lead to.
fn alternatives<'a>(
    schema: &'a serde_json::Value,
    root: &'a serde_json::Value,
) -> Vec<&'a serde_json::Value> {
    let mut found = Vec::new();
    let mut open = vec![schema];
    while let Some(schema) = open.pop() {
        if found.len() > 64 {
            break;
        }
        found.push(schema);
        if let Some(reference) = schema.get("$ref").and_then(|r| r.as_str())
            && let Some(target) = root.pointer(reference.trim_start_matches('#'))
        {
            open.push(target);
        }
        for key in ["oneOf", "anyOf", "allOf"] {
            open.extend(schema.get(key).and_then(|v| v.as_array()).into_iter().flatten());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
model: m
stages:
  - quantize: { method: awq, bits: 3, group_size: 64, out: o, awq: { search: duo }, measure: { window: 128 } }
  - evaluate: {}
";

    #[test]
    fn reads_the_same_keys_as_the_command_line() {
        let recipe = Recipe::parse(GOOD).unwrap();
        let Stage::Quantize(stage) = &recipe.stages[0] else { panic!("{recipe:?}") };
        assert_eq!((stage.options.grid.bits, stage.options.grid.group_size), (3, 64));
        assert_eq!(stage.options.method, compress::Method::Awq);
        assert_eq!(stage.options.awq.search, compress::awq::Search::Duo);
        assert_eq!(stage.measure.window, 128);
        assert_eq!(stage.options.calibration.samples, 128, "defaults stay");
        let again = Recipe::parse(&serde_json::to_string(&recipe).unwrap()).unwrap();
        assert_eq!(again, recipe);
    }

    #[test]
    fn prune_then_quantise() {
        let recipe = Recipe::parse(
            "
model: m
stages:
  - prune: { method: sparsegpt, pattern: '2:4', sparsegpt: { damping: 0.1 }, out: o, domain: { dialect: law } }
  - quantize: { method: gptq, gptq: { keep_zeros: true }, out: p }
",
        )
        .unwrap();
        let Stage::Prune(stage) = &recipe.stages[0] else { panic!("{recipe:?}") };
        assert_eq!(stage.options.method, compress::PruneMethod::SparseGpt);
        assert_eq!(stage.options.pattern, compress::mask::Structure::TWO_OF_FOUR);
        assert_eq!(stage.options.sparsegpt.damping, 0.1);
        let again = Recipe::parse(&serde_json::to_string(&recipe).unwrap()).unwrap();
        assert_eq!(again, recipe);
        let message = Recipe::parse("stages: [{ prune: { sparsty: 0.5 } }]").unwrap_err();
        assert!(message.contains("sparsty") && message.contains("sparsity"), "{message}");
    }

    #[test]
    fn a_wrong_key_is_named_with_the_nearest() {
        let message = Recipe::parse(&GOOD.replace("group_size", "groupsize")).unwrap_err();
        assert!(message.contains("groupsize") && message.contains("group_size"), "{message}");
        let message = Recipe::parse(&GOOD.replace("search: duo", "serach: duo")).unwrap_err();
        assert!(message.contains("serach") && message.contains("search"), "{message}");
        let message = Recipe::parse(&GOOD.replace("- quantize", "- quantise")).unwrap_err();
        assert!(message.contains("quantize"), "{message}");
        assert!(Recipe::parse(&GOOD.replace("awq,", "awg,")).is_err());
    }
}
