//! Writes a sample report (`cargo run -p strata-report --example sample_report > report.html`) to
//! look at the page with every kind of block. The numbers are made up.

use std::io::Write;

use serde_json::json;
use strata_report::{Cell, Chart, ChartKind, Claim, Column, Report, Style, Table};

fn main() -> std::io::Result<()> {
    let report = sample();
    let wants_text = std::env::args().nth(1).is_some_and(|a| a == "text");
    let text =
        if wants_text { report.terminal(Style { color: true, width: 90 }) } else { report.html() };
    std::io::stdout().write_all(text.as_bytes())
}

fn wave(i: usize, k: usize) -> f64 {
    (1.0 + ((i * 7 + k * 3) % 11) as f64 / 11.0) * (1.0 + k as f64 * 0.4) * 0.004
}

fn sample() -> Report {
    let mut report = Report::new(
        "AWQ, 4 bits, group 128: almanac-3m",
        "`strata quantize samples/almanac-3m --method awq --bits 4 --group-size 128 --out /tmp/q`",
    );
    for (label, value) in [
        ("size before", "6.31 MiB"),
        ("size after", "1.98 MiB"),
        ("bits per weight", "4.16"),
        ("perplexity before", "3.412"),
        ("perplexity after", "3.498"),
        ("facts, held out", "81.2 % → 80.4 %"),
        ("time", "12.3 s"),
        ("peak memory", "212 MiB"),
    ] {
        report.fact(label, value);
    }
    let roles = ["q", "k", "v", "o", "gate", "up", "down"];
    let layers: Vec<String> = (0..6).map(|i| i.to_string()).collect();

    let section = report.section("Before and after");
    section.text("Evaluated on held-out text of the almanac, window 256, stride 128.");
    section.push(
        Table::new(
            "Quality",
            vec![
                Column::left("measure"),
                Column::right("before"),
                Column::right("after"),
                Column::right("change"),
            ],
        )
        .row(vec![
            "perplexity".into(),
            Cell::Float(3.412, 3),
            Cell::Float(3.498, 3),
            Cell::Percent(0.0252),
        ])
        .row(vec![
            "facts, trained".into(),
            Cell::Percent(0.973),
            Cell::Percent(0.969),
            Cell::Percent(-0.004),
        ])
        .row(vec![
            "facts, held out".into(),
            Cell::Percent(0.812),
            Cell::Percent(0.804),
            Cell::Percent(-0.008),
        ]),
    );
    let mut bars = Chart::new(ChartKind::Bar, "Perplexity by method")
        .axes("", "perplexity")
        .over(["f16", "RTN", "GPTQ", "AWQ"]);
    bars = bars
        .values("4 bits", &[3.412, 3.71, 3.52, 3.498])
        .values("3 bits", &[3.412, 5.2, 4.01, 3.97]);
    section.push(bars);

    let section = report.section("Error by layer");
    let mut heat = Chart::new(ChartKind::Heat, "Relative output error by layer and role")
        .axes("layer", "relative error")
        .over(layers.clone());
    let mut grouped = Chart::new(ChartKind::Bar, "The same, grouped")
        .axes("layer", "relative error")
        .over(layers);
    for (k, role) in roles.iter().enumerate() {
        let values: Vec<f64> = (0..6).map(|i| wave(i, k)).collect();
        heat = heat.values(*role, &values);
        grouped = grouped.values(*role, &values);
    }
    section.push(heat).push(grouped);
    let names = (0..6).flat_map(|i| {
        ["self_attn.o_proj", "mlp.down_proj"].map(|r| format!("model.layers.{i}.{r}"))
    });
    let values: Vec<f64> = (0..12).map(|i| wave(i, i % 5)).collect();
    section.push(
        Chart::new(ChartKind::Bar, "Worst layers")
            .axes("", "relative error")
            .over(names)
            .values("error", &values),
    );
    let bins: Vec<(f64, f64)> = (-30..=30)
        .map(|i| {
            let x = f64::from(i) / 300.0;
            (x, 4000.0 * (-x * x * 400.0).exp())
        })
        .collect();
    section.push(
        Chart::new(ChartKind::Histogram, "Weights of `model.layers.5.mlp.down_proj`")
            .axes("weight", "count")
            .points("original", bins),
    );
    let loss: Vec<f64> =
        (1..=400).map(|i| 8.0 / f64::from(i).powf(0.35) + f64::from(i * 7 % 13) * 0.02).collect();
    let held: Vec<(f64, f64)> =
        (0..=10).map(|i| (f64::from(i) * 40.0, 8.1 / f64::from(i * 40 + 1).powf(0.33))).collect();
    section.push(
        Chart::new(ChartKind::Line, "Loss")
            .axes("step", "loss")
            .logarithmic()
            .values("training", &loss)
            .points("held out", held),
    );
    let mut table = Table::new(
        "Every layer",
        vec![
            Column::left("layer"),
            Column::left("role"),
            Column::right("weights"),
            Column::right("bytes"),
            Column::right("error"),
            Column::right("error, RTN"),
            Column::right("scale"),
            Column::right("time"),
        ],
    );
    for i in 0..3 {
        for (k, role) in roles.iter().enumerate() {
            table.push(vec![
                Cell::text(format!("model.layers.{i}.self_attn.{role}_proj")),
                (*role).into(),
                Cell::Count(65_536),
                Cell::Bytes(34_816),
                Cell::Float(wave(i, k), 5),
                Cell::Float(wave(i, k) * 1.4, 5),
                Cell::Float(1.0 + wave(i, k), 3),
                Cell::Seconds(0.12 + wave(i, k)),
            ]);
        }
    }
    section.push(table);

    let section = report.section("Claims");
    let claim = Claim {
        slug: "awq".into(),
        claim: "At 3 bits AWQ loses less perplexity than round-to-nearest, on every seed.".into(),
        measured: json!({"awq": {"2 bits": 9.31, "3 bits": 3.97, "4 bits": 3.498}}),
        baselines: json!({"rtn": {"2 bits": 41.2, "3 bits": 5.2, "4 bits": 3.71}, "gptq": {"2 bits": 8.7, "3 bits": 4.01, "4 bits": 3.52}}),
        seeds: vec![0, 1, 2],
        holds: Some(true),
    };
    let fails =
        Claim { holds: Some(false), claim: "AWQ beats GPTQ at 2 bits.".into(), ..claim.clone() };
    let only = Claim {
        holds: None,
        claim: "Decoding speed of the packed model.".into(),
        measured: json!({"tokens per second": 812.5, "bandwidth": {"GB/s": 11.2, "share of copy": 0.61}}),
        baselines: json!(null),
        seeds: vec![],
        ..claim.clone()
    };
    section.push(claim).push(fails).push(only);

    let section = report.section("How it was made");
    section.code("method: awq\nbits: 4\ngroup_size: 128\nsamples: 128\nsequence_length: 512\nseed: 0\nsha256: 5f2b0c6d8e1a4b7f9c3d2e1f0a9b8c7d6e5f4a3b2c1d0e9f8a7b6c5d4e3f2a1b");
    report
}
