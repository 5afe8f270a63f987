//! Decoding speed of a checkpoint, plain or packed: tokens per second, and the weights read per
//! second against the machine's copy bandwidth.
//!
//! `cargo run --release -p strata-nn --example bench_decode -- MODEL [TOKENS]`

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use strata_nn::{Model, Sampling, generate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: bench_decode MODEL [TOKENS]")?;
    let count: usize = arguments.next().map_or(Ok(64), |n| n.parse())?;
    let model = Model::open(Path::new(&path))?;
    // Every step reads every weight once, but only one row of the embedding (unless it is the head).
    let embed = model.decoder.embed.weight();
    let tied = model.decoder.head.module == model.decoder.embed.module;
    let bytes: u64 = model
        .checkpoint
        .infos()
        .filter(|info| info.name != embed || tied)
        .map(|info| info.nbytes)
        .sum();
    let sampling = Sampling { temperature: 0.0, max_tokens: count + 8, ..Sampling::default() };
    let mut stamps = Vec::new();
    generate(&model, &[1, 2, 3, 4], &sampling, &[], &mut |_| {
        stamps.push(Instant::now());
        ControlFlow::Continue(())
    })?;
    // The first tokens page the weights in.
    let first = stamps.get(7).ok_or("too few tokens were generated")?;
    let last = stamps.last().ok_or("no token was generated")?;
    let steps = stamps.len().saturating_sub(8) as f64;
    let seconds = (*last - *first).as_secs_f64();
    let rate = steps / seconds;
    let read = rate * bytes as f64 / 1e9;
    let copy = tensor::bandwidth::copy_bandwidth();
    println!("{path}: {:.1} MB read per token", bytes as f64 / 1e6);
    println!(
        "{rate:.1} tokens/s, {read:.1} GB/s of weights ({:.0} % of {copy:.1} GB/s copied)",
        100.0 * read / copy
    );
    Ok(())
}
