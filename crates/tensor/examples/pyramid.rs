//! Encode and decode throughput of pyramid codes by dimension and pulses, on one thread:
//! `cargo run --release -p strata-tensor --example pyramid [THREADS]`. Million weights per second; the
//! decoded matrix is 2048 x 4096, larger than the caches. The last lines are the grid kernels on the
//! same shape.

use std::hint::black_box;
use std::time::Instant;
use strata_tensor::Rng;
use strata_tensor::lowbit::LowBit;
use strata_tensor::pyramid::{AmplitudeMode, Code, Codec, PyramidWeights, Search};

const ROWS: usize = 2048;
const WIDTH: usize = 4096;

/// Best of a few repetitions, in million weights per second.
fn rate(weights: usize, mut work: impl FnMut()) -> f64 {
    let best = (0..4)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    weights as f64 / best / 1e6
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads: usize = std::env::args().nth(1).map_or(Ok(1), |a| a.parse())?;
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let mut rows = vec![0f32; ROWS * WIDTH];
    Rng::new(0).fill_normal(&mut rows, 0.02);
    let norms: Vec<f32> =
        rows.chunks(WIDTH).map(|r| r.iter().map(|w| w * w).sum::<f32>().sqrt()).collect();
    let x = vec![1f32; WIDTH];
    let mut decoded = vec![0f32; ROWS * WIDTH];
    println!("{threads} thread(s), million weights per second; product: one row of x");
    println!(
        "   D    K  bits/w   project    greedy  decode to f32   product   GB/s of packed bytes"
    );
    for (dimension, pulses) in [
        (4, 4),
        (4, 11),
        (8, 6),
        (8, 16),
        (8, 36),
        (16, 4),
        (16, 12),
        (16, 27),
        (16, 58),
        (32, 22),
        (32, 50),
        (32, 105),
    ] {
        let code = Code {
            inputs: WIDTH,
            dimension,
            pulses,
            tail: None,
            amplitude: AmplitudeMode::BetaLloyd,
            amp_bits: 4,
            amp_zero: false,
        };
        let codec = Codec::new(code)?;
        let some = &rows[..ROWS / 8 * WIDTH];
        let encode = |search| {
            rate(some.len(), || {
                black_box(codec.encode(some, &norms[..ROWS / 8], search, false, true).is_ok());
            })
        };
        let (project, greedy) = (encode(Search::Project), encode(Search::Greedy));
        let encoded = codec.encode(&rows, &norms, Search::Project, false, true)?;
        let bits = (codec.index_bits() + codec.amplitude_bits() + 16) as f64 / WIDTH as f64;
        let weights = PyramidWeights::new(codec, encoded.index, encoded.amplitude, norms.clone())?;
        let decode = rate(rows.len(), || weights.dequantize_into(black_box(&mut decoded)));
        let mut y = vec![0f32; ROWS];
        let product = rate(rows.len(), || weights.linear(&x, 1, None, black_box(&mut y)));
        let bytes = product * bits / 8.0 / 1e3;
        println!(
            "{dimension:4} {pulses:4} {bits:7.3} {project:9.0} {greedy:9.0} {decode:14.0} \
             {product:9.0} {bytes:9.2}"
        );
    }
    for bits in [2, 3, 4] {
        let groups = ROWS * WIDTH / 64;
        let codes: Vec<u8> = (0..ROWS * WIDTH).map(|i| (i * 7 % (1 << bits)) as u8).collect();
        let (scales, zeros) = (vec![0.5; groups], vec![1.0; groups]);
        let grid = LowBit::new(bits, ROWS, WIDTH, 64, &codes, &scales, &zeros, None)?;
        let decode = rate(rows.len(), || {
            black_box(grid.dequantize());
        });
        let mut y = vec![0f32; ROWS];
        let product = rate(rows.len(), || grid.linear(&x, 1, None, black_box(&mut y)));
        println!(
            "grid, {bits} bits in groups of 64: {decode:.0} to f32, {product:.0} in a product \
             ({:.2} GB/s)",
            product * grid.bytes() as f64 / rows.len() as f64 / 1e3
        );
    }
    println!("copying memory: {:.1} GB/s", strata_tensor::copy_bandwidth());
    Ok(())
}
