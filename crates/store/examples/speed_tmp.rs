//! temporary
use std::time::Instant;
use strata_store::packed::*;
use strata_store::*;
fn main() {
    let (out, inp, g) = (4096usize, 4096usize, 128usize);
    let d = std::env::temp_dir().join("strata_speed");
    let _ = std::fs::remove_dir_all(&d);
    for bits in [3u8, 4, 8] {
        let m = QuantizedMatrix {
            bits,
            group_size: g,
            out_features: out,
            in_features: inp,
            codes: (0..out * inp).map(|i| ((i * 7 + i / 13) % (1usize << bits)) as u8).collect(),
            scales: vec![0.5; out * inp / g],
            zeros: vec![1 << (bits - 1); out * inp / g],
            symmetric: true,
            group_index: None,
        };
        let t = Instant::now();
        let w = m.dequantize();
        println!("{bits} dequantize {:.1} ms {}", t.elapsed().as_secs_f64() * 1e3, w[5]);
        let t = Instant::now();
        m.check("x").unwrap();
        println!("{bits} check {:.1} ms", t.elapsed().as_secs_f64() * 1e3);
        for layout in [Layout::CompressedTensors, Layout::AutoAwq, Layout::Gptq { v2: true }] {
            let t = Instant::now();
            let Ok(p) = pack(layout, "p", &m) else { continue };
            let a = t.elapsed().as_secs_f64() * 1e3;
            let o = d.join(format!("{layout}{bits}"));
            let mut wr = Writer::create(&o, WriteOptions::default()).unwrap();
            for (n, dt, s, b) in &p {
                wr.add(n, *dt, s, b).unwrap();
            }
            let t = Instant::now();
            wr.finish().unwrap();
            let f = t.elapsed().as_secs_f64() * 1e3;
            let ck = Checkpoint::open(&o).unwrap();
            let c = QuantConfig::new(layout, bits, Some(g), true);
            let t = Instant::now();
            let back = unpack(layout, &ck, "p", &c).unwrap();
            println!(
                "{layout} {bits} pack {a:.1} ms unpack {:.1} ms finish {f:.1} ms ok {}",
                t.elapsed().as_secs_f64() * 1e3,
                back == m
            );
        }
    }
    let o = d.join("big");
    let mut wr = Writer::create(&o, WriteOptions::default()).unwrap();
    let data = vec![1u8; 256 << 20];
    let t = Instant::now();
    wr.add("a", Dtype::F16, &[128 << 20], &data).unwrap();
    println!("add 256M {:.0} ms", t.elapsed().as_secs_f64() * 1e3);
    wr.seal("a", serde_json::Value::Null).unwrap();
    println!("seal {:.0} ms", t.elapsed().as_secs_f64() * 1e3);
    wr.finish().unwrap();
    println!("finish {:.0} ms", t.elapsed().as_secs_f64() * 1e3);
    let ck = Checkpoint::open(&o).unwrap();
    let t = Instant::now();
    let v = ck.f32("a").unwrap();
    println!("f32 {:.0} ms {}", t.elapsed().as_secs_f64() * 1e3, v[7]);
    let _ = std::fs::remove_dir_all(&d);
}
