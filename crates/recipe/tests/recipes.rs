//! The recipes that come with Strata are recipes.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use strata_recipe::Recipe;
use strata_recipe::recipe::Stage;

fn shipped() -> Vec<(PathBuf, Recipe)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml" || e == "yml"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 3, "{paths:?}");
    paths
        .into_iter()
        .map(|path| match Recipe::read(&path) {
            Ok(recipe) => (path, recipe),
            Err(error) => panic!("{error}"),
        })
        .collect()
}

#[test]
fn every_shipped_recipe_parses_and_its_options_can_work() {
    for (path, recipe) in shipped() {
        assert!(!recipe.stages.is_empty(), "{}", path.display());
        for stage in &recipe.stages {
            if let Stage::Quantize(stage) = stage {
                stage.options.check().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            }
        }
    }
}

#[test]
fn shipped_recipes_write_below_out_and_never_to_the_same_place() {
    let mut outs = std::collections::BTreeSet::new();
    for (path, recipe) in shipped() {
        for stage in &recipe.stages {
            let out = match stage {
                Stage::Quantize(stage) => &stage.out,
                Stage::Train(stage) => &stage.out,
                Stage::Convert(stage) => &stage.out,
                Stage::Evaluate(_) => continue,
            };
            assert!(out.starts_with("out"), "{}: {}", path.display(), out.display());
            assert!(outs.insert(out.clone()), "{}: {}", path.display(), out.display());
        }
    }
}

#[test]
fn a_recipe_file_with_a_wrong_key_is_named_with_the_nearest_key() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("job.yaml");
    std::fs::write(&path, "model: m\nstages:\n- quantize: {out: o, bit: 4}\n").unwrap();
    let message = Recipe::read(&path).unwrap_err().to_string();
    assert!(message.contains("job.yaml") && message.contains("did you mean `bits`?"), "{message}");
}
