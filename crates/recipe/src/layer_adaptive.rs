//! Layer-adaptive pruning as a job: any family that Strata opens, calibrated on images or text.
//!
//! Open, select, measure, prune (with training in between where asked for), measure again, report.
//! The mathematics is in `compress::layer_adaptive_pruning`.

use crate::measure::{MeasureOptions, almanac_of};
use crate::prune::{PruneJob, Pruned};
use crate::quantize::{Comparison, general_text, provenance_of};
use crate::{Error, Result, present};
use compress::Target;
use compress::layer_adaptive_pruning::finetune::{Material, Recipe, Trainer};
use compress::layer_adaptive_pruning::iterate::{self, Finetune, Job, Pruned as Done};
use compress::layer_adaptive_pruning::{Allocator, Samples, layers};
use compress::prune::ShareOf;
use data::almanac::{Almanac, Split};
use data::images::Images;
use data::{Tokenizer, text};
use eval::ImageScores;
use nn::{Model, OpenNetwork};
use std::path::Path;
use std::time::Instant;
use train::loader::Corpus;

/// Calibration images when nobody says how many (the paper's number for ImageNet).
const IMAGES: usize = 256;

/// Calibration tokens when nobody says how many windows.
const TOKENS: usize = 2048;

/// What was measured before and after.
#[derive(Debug)]
pub enum Judged {
    /// Perplexity and what belongs to it.
    Text(Box<Comparison>),
    /// Top-1 accuracy, before and after.
    Images(Box<[ImageScores; 2]>),
    /// Nothing: skipped, or no test images were given.
    Nothing,
}

/// Runs the job.
pub fn run(job: &PruneJob) -> Result<Pruned> {
    job.options.check()?;
    let own = &job.options.layer_adaptive;
    let open = nn::open_network(&job.model)?;
    let network = open.network.as_ref();
    let only = patterns(&job.options.only)?;
    let exclude = patterns(&job.options.exclude)?;
    let places = layers::select(network, &only, &exclude, own.tied_head)?;
    let prunable: usize = places.iter().map(|(_, n)| n.shape[0] * n.shape[1]).sum();
    let sparsity = share(job, &open, prunable)?;
    own.check(sparsity)?;
    report::note(&format!(
        "plan: layer-adaptive-pruning ({}) on {} layers of {}, {prunable} weights, sparsity \
         {sparsity:.4}",
        own.allocator.label(),
        places.len(),
        network.family(),
    ));
    // Text networks are opened as models too: text and perplexity come with them.
    let model = match network.images() {
        Some(_) => None,
        None => Some(Model::open(&job.model)?),
    };
    let samples = samples(job, &open, model.as_ref())?;
    let mut trainer = match own.finetune_steps {
        0 => None,
        _ => Some(trainer(job, &open, model.as_ref(), &places)?),
    };
    let started = Instant::now();
    let target = Target {
        out: &job.out,
        resume: job.resume,
        overwrite: job.overwrite,
        provenance: provenance_of(&open.checkpoint)?,
    };
    let record = serde_json::to_value(&job.options)
        .map_err(|e| Error::Recipe(format!("the options cannot be written: {e}")))?;
    let work = Job {
        network,
        weights: open.weights.as_ref(),
        checkpoint: &open.checkpoint,
        places,
        samples: samples.as_ref(),
        finetune: trainer.as_mut().map(|t| t as &mut dyn Finetune),
        sparsity,
        options: own,
        record,
        max_shard_size: job.options.max_shard_size.0,
        layout: job.options.format.layout(),
    };
    let done = match iterate::run(work, &target) {
        Ok(done) => done,
        // A resumed job whose output stands already only lacks its report.
        Err(compress::Error::Store(store::Error::Complete { path })) => {
            report::note(&format!("{} is already complete", path.display()));
            let (round, history) = iterate::read(&path)?;
            Done { path, round, history, resumed: 0 }
        }
        Err(error) => return Err(error.into()),
    };
    let seconds = started.elapsed().as_secs_f64();
    let judged = judge(job, &open, model.as_ref(), &done.path)?;
    let after = store::Checkpoint::open(&done.path)?;
    let bytes = (open.checkpoint.total_bytes(), after.total_bytes());
    let report = present::layer_adaptive::report(job, &done, &judged, bytes, seconds);
    store::write_atomic(&done.path.join("report.html"), report.html().as_bytes())?;
    let json = serde_json::to_vec_pretty(&report.json()).unwrap_or_default();
    store::write_atomic(&done.path.join("report.json"), &json)?;
    let measures = match judged {
        Judged::Text(comparison) => Some(*comparison),
        _ => None,
    };
    Ok(Pruned {
        path: done.path,
        layers: Vec::new(),
        measures,
        domain: None,
        bytes,
        seconds,
        report,
    })
}

fn patterns(texts: &[String]) -> Result<Vec<method::Pattern>> {
    texts.iter().map(|text| method::Pattern::new(text).map_err(Error::Recipe)).collect()
}

/// The sparsity of the layers that take part.
fn share(job: &PruneJob, open: &OpenNetwork, prunable: usize) -> Result<f64> {
    let asked = job.options.sparsity;
    if job.options.sparsity_of == ShareOf::Layers {
        return Ok(asked);
    }
    let total: usize = open
        .checkpoint
        .infos()
        .filter(|info| info.dtype.is_float())
        .map(|info| info.shape.iter().product::<usize>())
        .sum();
    let share = asked * total as f64 / prunable.max(1) as f64;
    if share >= 1.0 {
        return Err(Error::Recipe(format!(
            "--sparsity {asked} of the model's {total} parameters is more than the {prunable} that \
             can be pruned; at most {:.3} is possible",
            prunable as f64 / total as f64
        )));
    }
    Ok(share)
}

/// What the curves and the final distortion are measured on.
fn samples(job: &PruneJob, open: &OpenNetwork, model: Option<&Model>) -> Result<Option<Samples>> {
    let own = &job.options.layer_adaptive;
    let calibration = &job.options.calibration;
    let network = open.network.as_ref();
    let Some(spec) = network.images() else {
        let Some(model) = model else { return Ok(None) };
        let context = model.decoder.config.max_position_embeddings;
        let length = calibration.sequence_length.min(context).max(2);
        let count = own.curve_samples.unwrap_or((TOKENS / length).max(1));
        if own.synthetic_calibration {
            return Ok(Some(Samples::synthetic(network, count, length, calibration.seed)?));
        }
        let optional = own.allocator != Allocator::Rd && calibration.file.is_none();
        if optional && Tokenizer::from_checkpoint(&model.checkpoint).is_err() {
            // These allocators look at weights only; without text nothing is measured.
            return Ok(None);
        }
        let options = compress::options::CalibrationOptions {
            samples: count,
            sequence_length: length,
            ..calibration.clone()
        };
        let windows = compress::calibration::windows(
            &options,
            compress::Method::Gptq,
            || Ok(Tokenizer::from_checkpoint(&model.checkpoint)?),
            || Ok(general_text(model)),
        )?;
        return Ok(Some(Samples::tokens(windows.ids().to_vec(), windows.length())?));
    };
    let count = own.curve_samples.unwrap_or(IMAGES);
    if own.synthetic_calibration {
        return Ok(Some(Samples::synthetic(network, count, 1, calibration.seed)?));
    }
    match &calibration.file {
        Some(file) => {
            let images = Images::load(file, None)?;
            eval::check_images(network, &images)?;
            let chosen = images.spread(count);
            let pixels = images.normalised(&chosen, &spec.mean, &spec.deviation)?;
            let shape = [chosen.len(), spec.channels, spec.height, spec.width];
            Ok(Some(Samples::images(pixels, shape)?))
        }
        None if own.allocator == Allocator::Rd => Err(Error::Recipe(
            "the rd allocator measures the network's output on images: give --calibration FILE \
             (IDX or CIFAR-10 records, also gzipped) or --synthetic-calibration"
                .into(),
        )),
        None => Ok(None),
    }
}

/// What trains the network between rounds.
fn trainer<'a>(
    job: &PruneJob,
    open: &'a OpenNetwork,
    model: Option<&'a Model>,
    places: &[layers::Place],
) -> Result<Trainer<'a>> {
    let own = &job.options.layer_adaptive;
    let calibration = &job.options.calibration;
    let recipe = Recipe::new(own, calibration.seed);
    let file = own.finetune_data.as_ref().or(calibration.file.as_ref());
    let network = open.network.as_ref();
    let material = match (network.images(), model) {
        (Some(_), _) => {
            let file = file.ok_or_else(|| {
                Error::Recipe("--finetune-steps needs --finetune-data FILE of images".into())
            })?;
            let images = Images::load(file, None)?;
            eval::check_images(network, &images)?;
            Material::Images { network, images }
        }
        (None, Some(model)) => {
            let documents = match file {
                Some(file) => text::load(file)?,
                None => almanac_of(model.checkpoint.directory())
                    .unwrap_or_else(Almanac::embedded)
                    .documents(Split::Train),
            };
            let tokenizer = Tokenizer::from_checkpoint(&model.checkpoint)?;
            let mut corpus = Corpus::new(false);
            corpus.push(&text::document_tokens(&documents, &tokenizer)?, None);
            let context = model.decoder.config.max_position_embeddings;
            let length = calibration.sequence_length.min(context).max(2);
            Material::Text { decoder: &model.decoder, corpus, length }
        }
        (None, None) => return Err(Error::Recipe("there is nothing to train".into())),
    };
    let params = train::Params::from_checkpoint(network, &open.checkpoint)?;
    Ok(Trainer::new(material, recipe, params, places)?)
}

/// The same measurement before and after.
fn judge(job: &PruneJob, open: &OpenNetwork, model: Option<&Model>, path: &Path) -> Result<Judged> {
    let MeasureOptions { skip, text, .. } = &job.measure;
    if *skip {
        return Ok(Judged::Nothing);
    }
    if let Some(model) = model {
        let after = Model::open(path)?;
        return Ok(Judged::Text(Box::new(Comparison::new(model, &after, &job.measure)?)));
    }
    let Some(file) = text else { return Ok(Judged::Nothing) };
    let images = Images::load(file, None)?;
    let after = nn::open_network(path)?;
    let one =
        |open: &OpenNetwork| eval::classify(open.network.as_ref(), open.weights.as_ref(), &images);
    Ok(Judged::Images(Box::new([one(open)?, one(&after)?])))
}
