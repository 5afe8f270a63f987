//! Fact recall of a model trained on the almanac of seed 0: `facts MODEL`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("usage: facts MODEL")?;
    let model = nn::Model::open(Path::new(&model))?;
    let tokenizer = data::Tokenizer::from_checkpoint(&model.checkpoint)?;
    let scores =
        strata_eval::facts(&model, &tokenizer, data::almanac::Almanac::embedded().facts())?;
    println!("{}", scores.table().terminal(report::Style::plain()));
    println!("{}", scores.relation_table().terminal(report::Style::plain()));
    println!("{:.1} s", scores.seconds);
    Ok(())
}
