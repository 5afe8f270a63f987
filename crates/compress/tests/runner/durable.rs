//! The same bytes whatever the memory and however often the job was interrupted.

use crate::common::*;
use nn::Family;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use strata_compress::options::MemoryLimit;
use strata_compress::{Calibration, Format, Method, QuantizeOptions};

/// Several batches, the last one shorter.
fn windows() -> Calibration {
    let calibration = calibration(150, 32, 21);
    assert_eq!(calibration.batches(), 3);
    calibration
}

fn job(method: Method, format: Format, memory: u64) -> QuantizeOptions {
    QuantizeOptions {
        memory: MemoryLimit(memory),
        // Small enough for several shards.
        max_shard_size: MemoryLimit(20_000),
        ..options(method, format, 4)
    }
}

/// Content of every file; the memory limit is taken out of the record of the options.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if name == "strata.json" {
            let mut value: Value = serde_json::from_slice(&bytes).unwrap();
            value["options"]["memory"].take();
            bytes = serde_json::to_vec(&value).unwrap();
        }
        files.insert(name, bytes);
    }
    files
}

fn assert_same_files(a: &Path, b: &Path, case: &str) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{case}");
    for (name, bytes) in &a {
        assert!(*bytes == b[name], "{case}: {name} differs");
    }
}

#[test]
fn memory_changes_no_byte() {
    let calibration = windows();
    let scratch = Scratch::new();
    let input = scratch.path("in");
    planted(&input, &config(Family::Llama, json!({"num_hidden_layers": 3})), 22);
    for method in [Method::Gptq, Method::Awq, Method::Rsq] {
        let (roomy, tight) = (scratch.path("roomy"), scratch.path("tight"));
        let format = Format::CompressedTensors;
        let outcome = quantize(&input, &roomy, &job(method, format, 4 << 30), &calibration);
        assert_eq!(outcome.spilled_bytes, 0);
        let outcome = quantize(&input, &tight, &job(method, format, 1), &calibration);
        let stream = 4 * 32 * calibration.tokens() as u64;
        assert!(outcome.spilled_bytes >= stream, "{} of {stream}", outcome.spilled_bytes);
        assert!(files(&roomy).len() > 4, "the test wants shards");
        assert_same_files(&roomy, &tight, method.slug());
        std::fs::remove_dir_all(roomy).unwrap();
        std::fs::remove_dir_all(tight).unwrap();
    }
}

/// A weight that turns out to be damaged stops the job in the middle of a block; with the weight
/// repaired it goes on from the last whole block.
#[test]
fn interrupted_job_ends_in_the_same_bytes() {
    let calibration = windows();
    for (method, family, format) in [
        (Method::Rtn, Family::Gpt2, Format::Dequantized),
        (Method::Gptq, Family::Llama, Format::GptqV2),
        (Method::Awq, Family::Qwen3, Format::CompressedTensors),
        (Method::Awq, Family::Opt, Format::Dequantized),
        (Method::Rsq, Family::Gpt2, Format::CompressedTensors),
    ] {
        let case = format!("{}, {family:?}", method.slug());
        let mut layers = json!({"num_hidden_layers": 3});
        if family == Family::Gpt2 {
            layers = json!({"n_layer": 3});
        }
        let scratch = Scratch::new();
        let config = config(family, layers);
        let (input, whole, out) = (scratch.path("in"), scratch.path("whole"), scratch.path("out"));
        let partial = scratch.path("out.partial");
        planted(&input, &config, 23);
        quantize(&input, &whole, &job(method, format, 4 << 30), &calibration);

        let decoder = nn::Decoder::from_config(&config).unwrap();
        let last = |block: usize| decoder.names(block).unwrap().down.weight();
        let mut kept = 0.0;
        let swap = |name: &str, value: f32| {
            let mut old = 0.0;
            edit(&input, |tensor, _, values| {
                if tensor == name {
                    old = std::mem::replace(&mut values[100], value);
                }
            });
            old
        };
        for (block, memory) in [(1, 4 << 30), (2, 1)] {
            if block == 2 {
                swap(&last(1), kept);
            }
            kept = swap(&last(block), f32::NAN);
            let options = job(method, format, memory);
            let error = try_quantize(&input, &out, true, &options, &calibration).unwrap_err();
            assert!(
                error.to_string().contains(&decoder.names(block).unwrap().down.module),
                "{error}"
            );
            assert!(partial.exists() && !out.exists(), "{case}");
        }
        swap(&last(2), kept);

        // Another job may not take over what is there.
        let mut other = job(method, format, 1);
        other.calibration.seed = 1;
        let error = try_quantize(&input, &out, true, &other, &calibration).unwrap_err();
        assert!(error.to_string().contains("other options"), "{case}: {error}");
        let error = try_quantize(&input, &out, false, &job(method, format, 1), &calibration);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("resume"), "{error}");

        let options = job(method, format, 5000);
        let outcome = try_quantize(&input, &out, true, &options, &calibration).unwrap();
        assert_eq!(outcome.resumed_blocks, 2, "{case}");
        assert_eq!(outcome.layers.len(), linears(&decoder).len(), "{case}");
        assert!(!partial.exists(), "{case}");
        assert_same_files(&whole, &out, &case);
    }
}

/// A failure before the first block is done leaves nothing that a corrected command must get past.
#[test]
fn early_failure_leaves_the_name_free() {
    let calibration = calibration(4, 16, 24);
    let scratch = Scratch::new();
    let (input, out) = (scratch.path("in"), scratch.path("out"));
    nn::testing::tiny_checkpoint(&input, Family::Llama, 25).unwrap();
    let wrong = Calibration::new(vec![500; 16], 16).unwrap();
    let options = options(Method::Gptq, Format::CompressedTensors, 4);
    assert!(try_quantize(&input, &out, false, &options, &wrong).is_err());
    try_quantize(&input, &out, false, &options, &calibration).unwrap();
    let again = try_quantize(&input, &out, false, &options, &calibration).unwrap_err();
    assert!(again.to_string().contains("already exists"), "{again}");
}
