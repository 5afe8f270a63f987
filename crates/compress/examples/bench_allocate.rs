//! How long the allocator takes: layers x choices at several resolutions, and how far the answer is
//! from the bound that no allocation beats.
//!
//! `cargo run --release -p strata-compress --example bench_allocate`

use std::time::Instant;
use strata_compress::allocate::{Choice, allocate};
use tensor::Rng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("layers choices   units  seconds   error / bound");
    for (layers, choices) in [(60, 101), (200, 6), (1000, 16)] {
        let mut rng = Rng::stream(0, "bench allocate");
        // Errors that fall with the bits, as quantisation errors do, at sizes of real layers.
        let table: Vec<Vec<Choice>> = (0..layers)
            .map(|_| {
                let weights = (1 + rng.below(64) as u64) * 65_537;
                let scale = rng.uniform() + 0.01;
                (0..choices)
                    .map(|k| {
                        let share = (k + 1) as f64 / choices as f64;
                        let noise = 1.0 + 0.1 * rng.uniform();
                        Choice {
                            cost: (weights as f64 * share) as u64,
                            error: scale * noise * (-8.0 * share).exp(),
                        }
                    })
                    .collect()
            })
            .collect();
        let most: u64 = table.iter().filter_map(|l| l.last()).map(|c| c.cost).sum();
        for units in [4_000, 20_000, 100_000] {
            let start = Instant::now();
            let found = allocate(&table, most / 2, units)?;
            let seconds = start.elapsed().as_secs_f64();
            println!(
                "{layers:>6} {choices:>7} {units:>7} {seconds:>8.3} {:>15.6}",
                found.error / found.bound
            );
        }
    }
    Ok(())
}
