//! Perplexity of a text under a model: `perplexity MODEL TEXT WINDOW STRIDE`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, window, stride] = &arguments[..] else {
        return Err("usage: perplexity MODEL TEXT WINDOW STRIDE".into());
    };
    let model = nn::Model::open(Path::new(model))?;
    let tokenizer = data::Tokenizer::from_checkpoint(&model.checkpoint)?;
    let documents = data::text::load(Path::new(text))?;
    let tokens = data::text::joined_tokens(&documents, &tokenizer)?;
    let result = strata_eval::perplexity(&model, &tokens, window.parse()?, stride.parse()?)?;
    println!("{}", serde_json::to_string(&result)?);
    Ok(())
}
