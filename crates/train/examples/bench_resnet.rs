//! Times the forward pass and the training step of a CIFAR ResNet on random images.
//!
//! `cargo run --release -p strata-train --example bench_resnet -- [depth] [batch] [--json]`

use serde_json::json;
use std::time::Instant;

use nn::{Input, Mode, Network, ResNet};
use strata_train::classify::{Labelled, gradients};
use strata_train::config::OptimizerConfig;
use strata_train::{AdamW, Chain, Grads, Params, Step};

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Peak resident memory of this process.
fn peak_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::var_os("STRATA_PLAIN_MALLOC").is_none() {
        tensor::memory::tune_allocator();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let depth = numbers.first().copied().unwrap_or(20);
    let batch = numbers.get(1).copied().unwrap_or(128);
    let network = ResNet::cifar(depth, 10)?;
    let mut params = Params::fresh(&network, 0)?;
    let mut chain = Chain::new(vec![Box::new(AdamW::from_config(&OptimizerConfig::default())?)]);
    let mut rng = tensor::Rng::new(0);
    let mut pixels = vec![0.0; batch * 3 * 32 * 32];
    rng.fill_normal(&mut pixels, 1.0);
    let labels: Vec<u32> = (0..batch).map(|_| rng.below(10) as u32).collect();
    let input = Input::Images { pixels: &pixels, shape: [batch, 3, 32, 32] };
    let (mut forward, mut steps) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let start = Instant::now();
        network.predict(&params.constants(), &input)?;
        forward.push(start.elapsed().as_secs_f64());
    }
    for index in 0..10 {
        let start = Instant::now();
        let mut grads = Grads::new();
        let labelled = Labelled { input, labels: &labels };
        let (_, seen) = gradients(&network, &params, &[labelled], Mode::Train, &mut grads)?;
        let step = Step { index, total: 10, learning_rate: 1e-3 };
        chain.update(&step, &mut params, &mut grads)?;
        params.observe(&seen)?;
        steps.push(start.elapsed().as_secs_f64());
    }
    let (forward, step) = (1e3 * median(forward), 1e3 * median(steps));
    let peak = peak_kilobytes() as f64 / 1024.0;
    if arguments.iter().any(|a| a == "--json") {
        println!("{}", json!({"forward_ms": forward, "step_ms": step, "peak_mb": peak}));
    } else {
        println!(
            "ResNet-{depth}, batch {batch}: forward {forward:.0} ms, step {step:.0} ms, peak \
             {peak:.0} MB (medians)"
        );
    }
    Ok(())
}
