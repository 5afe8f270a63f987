//! Trains from a JSON configuration: `train CONFIG.json OUT [--resume]`.

use std::path::Path;
use strata_train::{TrainConfig, Trainer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, out, rest @ ..] = &arguments[..] else {
        return Err("usage: train CONFIG.json OUT [--resume]".into());
    };
    let config: TrainConfig = serde_json::from_slice(&std::fs::read(config)?)?;
    let resume = rest.iter().any(|a| a == "--resume");
    let progress = report::Progress::new("training", 0, "steps");
    let outcome = Trainer::run(&config, Path::new(out), resume, &progress)?;
    println!("{}", outcome.table().terminal(report::Style::plain()));
    Ok(())
}
