//! Quantising as a job of the runner: which method does a block, what the output's config says.

use crate::block::{BlockJob, LayerResult};
use crate::grid::Granularity;
use crate::options::{Method, QuantizeOptions};
use crate::plan::Plan;
use crate::pvq::Coherence;
use crate::rsq::{RotationChoice, RsqOptions};
use crate::runner::{Container, Job, Limits, Outcome, Source, Target, run_job};
use crate::{Calibration, Error, Result};
use nn::{Decoder, Model};
use serde_json::Value;
use store::packed::{QuantConfig, Scheme, config_json, own};

/// Quantises `model` as planned. `progress` counts blocks.
pub fn run(
    model: &Model,
    plan: &Plan,
    options: &QuantizeOptions,
    calibration: &Calibration,
    target: &Target<'_>,
    progress: &report::Progress,
) -> Result<Outcome> {
    let mut job = Quantize::new(options, &model.decoder)?;
    if options.method == Method::Rsq {
        let rsq = (&options.rsq, &mut job as &mut dyn Job);
        return crate::rsq::run(model, plan, rsq, calibration, target, progress);
    }
    if options.method == Method::Pvq && options.pvq.rotation == Coherence::Fused {
        // The rotation alone, with pyramid codes where RSQ would round.
        let fused = RsqOptions {
            rotation: RotationChoice::Hadamard,
            rotation_seed: options.pvq.rotation_seed,
            expand: 1,
            ..RsqOptions::default()
        };
        let rotation = (&fused, &mut job as &mut dyn Job);
        return crate::rsq::run(model, plan, rotation, calibration, target, progress);
    }
    let source = Source::of(model)?;
    run_job(source, plan, &mut job, calibration, target, progress)
}

/// How the job writes what it quantises.
pub(crate) fn container(options: &QuantizeOptions) -> Container {
    match options.format.layout() {
        Some(layout) if options.quantises() => Container::Packed(layout),
        _ => Container::Dense,
    }
}

struct Quantize<'a> {
    options: &'a QuantizeOptions,
    awq: crate::awq::Prepared,
}

impl<'a> Quantize<'a> {
    fn new(options: &'a QuantizeOptions, decoder: &Decoder) -> Result<Self> {
        Ok(Self { options, awq: crate::awq::Prepared::new(decoder, options)? })
    }
}

impl Job for Quantize<'_> {
    fn verb(&self) -> &'static str {
        "quantize"
    }

    fn slug(&self) -> &'static str {
        self.options.method.slug()
    }

    fn calibrates(&self) -> bool {
        self.options.calibrates()
    }

    fn container(&self) -> Container {
        container(self.options)
    }

    fn limits(&self) -> Limits {
        Limits { memory: self.options.memory.0, max_shard_size: self.options.max_shard_size.0 }
    }

    fn options(&self) -> Result<Value> {
        serde_json::to_value(self.options)
            .map_err(|e| Error::Options(format!("the options cannot be written: {e}")))
    }

    fn inputs(&self) -> Value {
        self.awq.inputs.clone()
    }

    fn block(&mut self, job: &mut BlockJob<'_>) -> Result<()> {
        let options = self.options;
        match options.method {
            Method::Rtn => crate::rtn::quantize_block(job),
            Method::Gptq => crate::gptq::quantize_block(job, &options.gptq),
            Method::Awq => crate::awq::run_block(job, options, &self.awq),
            Method::Adadim => crate::adadim::quantize_block(job, options),
            Method::Rsq => crate::rsq::quantize_block(job, options),
            Method::Pvq => crate::pvq::quantize_block(job, options),
        }
    }

    fn quantization_config(
        &self,
        plan: &Plan,
        layers: &[LayerResult],
        modules: own::Modules,
    ) -> Result<Option<Value>> {
        let Container::Packed(layout) = self.container() else { return Ok(None) };
        let quantised: Vec<String> = layers.iter().map(|l| l.module.clone()).collect();
        let mut ignored: Vec<String> = plan
            .layers()
            .filter(|layer| layer.grid.is_none())
            .map(|layer| layer.name.module.clone())
            .collect();
        ignored.push("lm_head".into());
        let grid = &self.options.grid;
        let group = match grid.granularity {
            Granularity::Group if grid.group_size > 0 => Some(grid.group_size),
            _ => None,
        };
        let gptq = self.options.used_gptq();
        let by_gptq = self.options.rounds_by_gptq();
        let mut config = QuantConfig::new(layout, grid.bits, group, grid.symmetric);
        config.desc_act = by_gptq && gptq.act_order;
        config.static_groups = by_gptq && gptq.static_groups;
        config.damping = gptq.damping;
        config.ignore.clone_from(&ignored);
        config.modules = modules;
        for layer in plan.layers() {
            let Some(own) = layer.grid.as_ref().filter(|own| *own != grid) else { continue };
            let group_size = (own.group_size > 0).then_some(own.group_size);
            let (bits, symmetric) = (own.bits, own.symmetric);
            let scheme = Scheme { bits, group_size, symmetric };
            config.overrides.push((layer.name.module.clone(), scheme));
        }
        Ok(Some(config_json(&config, &quantised, &ignored)))
    }

    fn finish(&mut self, records: Vec<Value>) -> Result<Vec<(String, Value)>> {
        if records.is_empty() {
            return Ok(Vec::new());
        }
        match self.options.method {
            Method::Awq => crate::awq::finish(&self.options.grid, records),
            _ => Ok(Vec::new()),
        }
    }
}
