//! Generation with a KV cache: greedy or sampled, deterministic by seed.
//!
//! Stop strings and printing belong to the caller: the callback sees every token as it comes and
//! may break.

use std::ops::ControlFlow;

use tensor::host;
use tensor::rng::Rng;

use crate::{Context, Error, KvCache, Model, Result, Taps};

/// How the next token is picked.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Logits are divided by it; 0 picks the largest logit (greedy).
    pub temperature: f32,
    /// Only the `top_k` largest logits are kept; 0 keeps all.
    pub top_k: usize,
    /// Only the smallest set of tokens whose probabilities reach `top_p` is kept; 1 keeps all.
    pub top_p: f32,
    /// Logits of tokens already seen are divided by it when positive and multiplied when negative;
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// Most tokens to generate.
    pub max_tokens: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
            max_tokens: 128,
        }
    }
}

impl Sampling {
    /// Greedy decoding of up to `max_tokens` tokens.
    pub fn greedy(max_tokens: usize) -> Self {
        Sampling { temperature: 0.0, max_tokens, ..Self::default() }
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Input(what));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse(format!("temperature {} is not in 0..", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse(format!("top_p {} is not in (0, 1]", self.top_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return refuse(format!(
                "repetition_penalty {} is not positive",
                self.repetition_penalty
            ));
        }
        Ok(())
    }
}

/// Continues `prompt`. Every new token goes to `on_token`, which may end the generation; a token of
/// `stop_ids` ends it too and is not reported. Generation also ends at the last position that
/// learned positions allow. Returns the new tokens.
///
/// # Errors
/// An empty prompt, impossible options, token ids outside the vocabulary, or failing weights.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    sampling: &Sampling,
    stop_ids: &[u32],
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    sampling.check()?;
    if prompt.is_empty() {
        return Err(Error::Input("the prompt has no tokens; start with the model's BOS".into()));
    }
    let limit = model.decoder.max_positions();
    let capacity = prompt.len().saturating_add(sampling.max_tokens).min(limit);
    let mut cache = KvCache::new(&model.decoder, capacity)?;
    let mut picker = Picker::new(sampling, prompt);
    let mut output = Vec::new();
    let mut logits = advance(model, prompt, &mut cache)?;
    while output.len() < sampling.max_tokens {
        let token = picker.pick(&mut logits)?;
        if stop_ids.contains(&token) {
            break;
        }
        output.push(token);
        if on_token(token).is_break()
            || output.len() == sampling.max_tokens
            || cache.len() >= capacity
        {
            break;
        }
        logits = advance(model, &[token], &mut cache)?;
    }
    Ok(output)
}

/// Runs `tokens` after what `cache` holds; logits of the last one.
///
/// # Errors
/// As [`crate::Decoder::hidden`].
pub fn advance(model: &Model, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
    // A token is hundreds of short parallel steps. Entered from outside the thread pool, each of them
    // would put the calling thread to sleep and wake it again.
    rayon::scope(|_| run(model, tokens, cache))
}

fn run(model: &Model, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
    let (decoder, weights) = (&model.decoder, model.weights.as_ref());
    let mut taps = Taps::none();
    let mut ctx = Context::cached(cache, tokens.len());
    let mut x = decoder.embed(weights, tokens, &ctx, &mut taps)?;
    for i in 0..decoder.num_blocks() {
        x = decoder.block(i, weights, x, &mut ctx, &mut taps)?;
    }
    // Only the last row's logits are needed, and the head is the largest matrix of small models.
    let last = crate::Batch::new(1, 1);
    let x = x.narrow(0, tokens.len() - 1, 1);
    let x = decoder.finish(weights, x, &last, &mut taps)?;
    Ok(host::into_vec(decoder.head_logits(weights, x, &last, &mut taps)?))
}

/// Picks tokens from logits by the rules of a [`Sampling`].
pub struct Picker<'a> {
    sampling: &'a Sampling,
    rng: Rng,
    seen: Vec<u32>,
}

impl<'a> Picker<'a> {
    /// A picker that has seen `prompt`.
    pub fn new(sampling: &'a Sampling, prompt: &[u32]) -> Self {
        let mut seen = prompt.to_vec();
        seen.sort_unstable();
        seen.dedup();
        Picker { sampling, rng: Rng::stream(sampling.seed, "generate"), seen }
    }

    /// The next token; `logits` are changed on the way.
    ///
    /// # Errors
    /// When no logit is finite.
    pub fn pick(&mut self, logits: &mut [f32]) -> Result<u32> {
        let s = self.sampling;
        if logits.iter().any(|l| l.is_nan()) {
            return Err(Error::Input("the network's logits are not numbers (NaN)".into()));
        }
        if s.repetition_penalty != 1.0 {
            for &id in &self.seen {
                let Some(logit) = logits.get_mut(id as usize) else { continue };
                *logit *=
                    if *logit < 0.0 { s.repetition_penalty } else { 1.0 / s.repetition_penalty };
            }
        }
        let token = if s.temperature == 0.0 { argmax(logits) } else { self.sample(logits) };
        if let Err(at) = self.seen.binary_search(&token) {
            self.seen.insert(at, token);
        }
        Ok(token)
    }

    fn sample(&mut self, logits: &[f32]) -> u32 {
        let s = self.sampling;
        let mut kept: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        // Ties go to the smaller id, so that the order, and with it the draw, is fully determined.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if s.top_k > 0 && s.top_k < kept.len() {
            kept.select_nth_unstable_by(s.top_k - 1, order);
            kept.truncate(s.top_k);
        }
        kept.sort_unstable_by(order);
        let max = kept.first().map_or(0.0, |(_, logit)| *logit);
        let weight = |logit: f32| f64::from((logit - max) / s.temperature).exp();
        let mut weights: Vec<f64> = kept.iter().map(|(_, logit)| weight(*logit)).collect();
        if s.top_p < 1.0 {
            let target = f64::from(s.top_p) * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let enough = weights.iter().position(|w| {
                sum += w;
                sum >= target
            });
            weights.truncate(enough.map_or(weights.len(), |n| n + 1));
        }
        let mut rest = self.rng.uniform() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|w| {
            rest -= w;
            rest < 0.0
        });
        let drawn = drawn.unwrap_or(weights.len().saturating_sub(1));
        kept.get(drawn).map_or(0, |(id, _)| *id)
    }
}

/// Index of the largest value, the first of equals.
pub fn argmax(values: &[f32]) -> u32 {
    let mut best = (0u32, f32::NEG_INFINITY);
    for (id, &value) in (0u32..).zip(values) {
        if value > best.1 {
            best = (id, value);
        }
    }
    best.0
}
