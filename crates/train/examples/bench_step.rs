//! Times the forward pass and the training step of two Llama shapes on random tokens.
//!
//! `cargo run --release -p strata-train --example bench_step -- [almanac|llama15m] [--json]`

use serde_json::{Value, json};
use std::time::Instant;
use strata_train::{Chain, Grads, Params, Step, TrainConfig, loader::TokenBatch, loss};

struct Shape {
    name: &'static str,
    model: Value,
    rows: usize,
    length: usize,
}

fn llama(
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv: usize,
    vocab: usize,
) -> Value {
    json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": hidden / heads, "vocab_size": vocab, "max_position_embeddings": 512,
        "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    })
}

/// Peak resident memory of this process.
fn peak_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measure(shape: &Shape, json: bool) -> Result<(), Box<dyn std::error::Error>> {
    let decoder = nn::Decoder::from_config(&shape.model)?;
    let mut params = Params::random(&decoder, 0)?;
    let config: TrainConfig = serde_json::from_value(json!({
        "model": shape.model, "steps": 1, "data": [{"text": "unused"}],
    }))?;
    let mut chain = Chain::from_config(&config)?;
    let mut rng = tensor::rng::Rng::new(0);
    let vocabulary = decoder.config.vocab_size;
    let tokens: Vec<u32> =
        (0..shape.rows * shape.length + 1).map(|_| rng.below(vocabulary) as u32).collect();
    let batch = TokenBatch {
        rows: shape.rows,
        length: shape.length,
        tokens: tokens[..tokens.len() - 1].to_vec(),
        targets: tokens[1..].to_vec(),
    };
    let batches = [batch];
    let count = (shape.rows * shape.length) as f64;
    let mut forward = Vec::new();
    for _ in 0..8 {
        let start = Instant::now();
        // The same work as the peer: all logits, no loss.
        let mut context = nn::Context::new(nn::Batch::new(shape.rows, shape.length));
        let weights = params.constants();
        decoder.logits(&weights, &batches[0].tokens, &mut context, &mut nn::Taps::none())?;
        forward.push(start.elapsed().as_secs_f64());
    }
    let (mut step_times, mut gradient) = (Vec::new(), Vec::new());
    let steps = 8;
    for index in 0..steps {
        let start = Instant::now();
        let mut grads = Grads::new();
        loss::gradients(&decoder, &params, &batches, &mut grads)?;
        gradient.push(start.elapsed().as_secs_f64());
        let step = Step { index, total: steps, learning_rate: 1e-3 };
        chain.update(&step, &mut params, &mut grads)?;
        step_times.push(start.elapsed().as_secs_f64());
    }
    let (forward, gradient, step) = (median(forward), median(gradient), median(step_times));
    if json {
        let megabytes = peak_kilobytes() as f64 / 1024.0;
        println!(
            "{}",
            json!({"forward_ms": 1e3 * forward, "step_ms": 1e3 * step, "peak_mb": megabytes})
        );
        return Ok(());
    }
    println!(
        "{}: {} parameters, batch {} x {}: forward {:.0} ms, forward+backward {:.0} ms, \
         step {:.0} ms, {:.0} tokens/s, peak {} MB (medians)",
        shape.name,
        params.count(),
        shape.rows,
        shape.length,
        forward * 1e3,
        gradient * 1e3,
        step * 1e3,
        count / step,
        peak_kilobytes() / 1024,
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::var_os("STRATA_PLAIN_MALLOC").is_none() {
        tensor::memory::tune_allocator();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|a| a == "--json");
    let wanted = arguments.iter().find(|a| !a.starts_with('-')).cloned();
    let shapes = [
        Shape { name: "almanac", model: llama(256, 640, 4, 4, 2, 2048), rows: 16, length: 256 },
        Shape { name: "llama15m", model: llama(288, 768, 6, 6, 2, 32000), rows: 4, length: 256 },
    ];
    for shape in &shapes {
        if wanted.as_deref().is_none_or(|w| w == shape.name) {
            measure(shape, json)?;
        }
    }
    Ok(())
}
