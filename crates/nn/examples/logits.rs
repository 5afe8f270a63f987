//! Logits and activations of a model as one safetensors file, for comparison with other libraries.
//!
//! `logits MODEL TOKENS.json OUT.safetensors [--sites a,b,...] [--replace site=value]...
//!  [--scale site=value]...`
//!
//! TOKENS.json holds token ids, one list per sequence, all of one length: `[[1, 2], [3, 4]]`. The
//! output holds `logits` `[B, T, V]` and every recorded site under its TransformerLens name, as
//! `[rows, features]`. `--replace` sets an activation to a constant, `--scale` multiplies it by one.

use std::path::Path;
use std::process::ExitCode;

use strata_nn as nn;

use nn::testing::write_safetensors;
use nn::{Batch, Error, Model, Record, Replace, Result, Site, Tap, Taps};
use tensor::{Tensor, host};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// A constant to put at a site, or a factor on it.
struct Change {
    site: Site,
    value: f32,
    scale: bool,
}

fn run(args: &[String]) -> Result<()> {
    let [model, tokens, out, options @ ..] = args else {
        return Err(Error::Input(
            "usage: logits MODEL TOKENS.json OUT.safetensors [options]".into(),
        ));
    };
    let (mut sites, mut changes) = (Vec::new(), Vec::new());
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let value =
            options.next().ok_or_else(|| Error::Input(format!("option {option} needs a value")))?;
        match option.as_str() {
            "--sites" => sites = value.split(',').map(Site::parse).collect::<Result<_>>()?,
            "--replace" => changes.push(change(value, false)?),
            "--scale" => changes.push(change(value, true)?),
            other => return Err(Error::Input(format!("unknown option {other}"))),
        }
    }
    let (tokens, batch) = read_tokens(Path::new(tokens))?;
    let model = Model::open(Path::new(model))?;
    let mut record = Record::new(sites);
    let mut replaces: Vec<_> = changes
        .iter()
        .map(|c| {
            let (value, scale) = (c.value, c.scale);
            Replace::new(c.site, move |_: &Batch, x: Tensor<2>| {
                Ok(if scale { x * value } else { Tensor::full(x.dims(), value, &x.device()) })
            })
        })
        .collect();
    let mut taps = Taps(replaces.iter_mut().map(|r| r as &mut dyn Tap).collect());
    taps.0.push(&mut record);
    let logits = model.tapped_logits(&tokens, batch.sequences, &mut taps)?;
    drop(taps);
    let vocab = logits.dims()[1];
    let shape = vec![batch.sequences, batch.length, vocab];
    let mut tensors = vec![("logits".to_string(), shape, host::into_vec(logits))];
    for (site, x) in record.seen {
        // The logits as a site would clash with the logits themselves.
        let name = if site.block.is_none() { format!("site.{site}") } else { site.to_string() };
        tensors.push((name, x.dims().to_vec(), host::into_vec(x)));
    }
    write_safetensors(Path::new(out), &tensors)
}

fn change(text: &str, scale: bool) -> Result<Change> {
    let bad = || Error::Input(format!("`{text}` is not site=value"));
    let (site, value) = text.split_once('=').ok_or_else(bad)?;
    Ok(Change { site: Site::parse(site)?, value: value.parse().map_err(|_| bad())?, scale })
}

fn read_tokens(path: &Path) -> Result<(Vec<u32>, Batch)> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::Input(format!("{}: {error}", path.display())))?;
    let rows: Vec<Vec<u32>> = serde_json::from_str(&text)
        .map_err(|error| Error::Input(format!("{}: {error}", path.display())))?;
    let length = rows.first().map_or(0, Vec::len);
    if rows.iter().any(|row| row.len() != length) {
        return Err(Error::Input(format!("{}: sequences differ in length", path.display())));
    }
    Ok((rows.concat(), Batch::new(rows.len(), length)))
}
