//! Logits of an image network as a safetensors file, for comparison with other libraries.
//!
//! `image_logits MODEL IMAGES.safetensors OUT.safetensors`
//!
//! IMAGES holds `pixels` `[n, channels, height, width]`, normalised; the output holds `logits`
//! `[n, classes]`.

use std::path::Path;
use std::process::ExitCode;

use strata_nn as nn;

use nn::testing::write_safetensors;
use nn::{Error, Input, Result, open_network};
use tensor::host;

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

fn run(args: &[String]) -> Result<()> {
    let [model, images, out] = args else {
        let usage = "usage: image_logits MODEL IMAGES.safetensors OUT.safetensors";
        return Err(Error::Input(usage.into()));
    };
    let images = store::Checkpoint::open(Path::new(images))?;
    let pixels = images.f32("pixels")?;
    let shape = images.info("pixels")?.shape.clone();
    let shape: [usize; 4] = shape
        .try_into()
        .map_err(|shape| Error::Input(format!("`pixels` has shape {shape:?}, not four sizes")))?;
    let model = open_network(Path::new(model))?;
    let input = Input::Images { pixels: &pixels, shape };
    let logits = model.network.predict(model.weights.as_ref(), &input)?;
    let tensor = ("logits".to_string(), logits.dims().to_vec(), host::into_vec(logits));
    write_safetensors(Path::new(out), &[tensor])
}
