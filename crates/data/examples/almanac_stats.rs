//! Writes an almanac and prints samples and statistics:
//! `cargo run --release -p strata-data --example almanac_stats -- OUT [SEED]`.

use strata_data::almanac::{Almanac, Dialect, Size, Split};

fn main() -> strata_data::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let out = arguments.next().unwrap_or_else(|| "almanac".to_string());
    let seed = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(0);
    let almanac = Almanac::generate(seed, Size::Standard);
    let statistics = almanac.write(out.as_ref())?;
    for (label, value) in statistics.rows() {
        println!("{label:40} {value}");
    }
    println!("\nname tokens: {:?}", statistics.name_tokens);
    for relation in &statistics.relations {
        println!("{:16} {:4} facts, {:3} objects", relation.name, relation.facts, relation.objects);
    }
    println!();
    for text in almanac.documents(Split::Train).texts.iter().take(25) {
        println!("- {text}");
    }
    for dialect in Dialect::ALL {
        for text in almanac.dialect_documents(dialect, Split::Test).texts.iter().take(2) {
            println!("- {}: {text}", dialect.name());
        }
    }
    for dialogue in almanac.dialogues(Split::Validation, false).iter().take(20) {
        println!("- {}: {}", dialogue.kind, dialogue.render());
    }
    if let Some(fact) = almanac.facts().first() {
        println!("{fact:#?}");
    }
    Ok(())
}
