//! GGUF files as converters write them, seen in Hugging Face layout, and files that lie. The
//! fixtures are made by fixtures/make.py with ggml's Python package.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests, too

use std::path::{Path, PathBuf};

use serde_json::json;
use strata_store::gguf::{self, Gguf};
use strata_store::{Dtype, Entry, GgmlType};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn open(name: &str) -> Gguf {
    gguf::open(&fixture(name)).unwrap_or_else(|e| panic!("{e}"))
}

fn get<'a>(file: &'a Gguf, name: &str) -> &'a Entry {
    file.entries.iter().find(|e| e.info.name == name).unwrap_or_else(|| panic!("no {name}"))
}

fn f32s(entry: &Entry) -> Vec<f32> {
    let bytes = entry.bytes().unwrap();
    let n = entry.info.elements();
    match entry.info.dtype {
        Dtype::Ggml(ty) => gguf::dequantize(ty, &bytes, n).unwrap(),
        Dtype::F32 => gguf::dequantize(GgmlType::F32, &bytes, n).unwrap(),
        Dtype::F16 => gguf::dequantize(GgmlType::F16, &bytes, n).unwrap(),
        other => panic!("{other}"),
    }
}

/// First element of every row.
fn heads_of_rows(entry: &Entry) -> Vec<f32> {
    let width = entry.info.shape[1];
    f32s(entry).chunks(width).map(|row| row[0]).collect()
}

#[test]
fn llama_in_hugging_face_layout() {
    let file = open("llama.gguf");
    let names: Vec<&str> = file.entries.iter().map(|e| e.info.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "model.norm.weight",
        ]
    );
    let embedding = get(&file, "model.embed_tokens.weight");
    assert_eq!(embedding.info.dtype, Dtype::Ggml(GgmlType::Q8_0));
    assert_eq!(embedding.info.shape, [4, 32]);
    assert_eq!(embedding.info.nbytes, 4 * 34);
    // Row r held r before conversion; both types come back in that order.
    let q = get(&file, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!((q.info.dtype, q.info.shape.as_slice()), (Dtype::F16, [8, 32].as_slice()));
    assert_eq!(heads_of_rows(q), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    let k = get(&file, "model.layers.0.self_attn.k_proj.weight");
    assert_eq!(k.info.dtype, Dtype::Ggml(GgmlType::Q8_0));
    for (row, value) in heads_of_rows(k).into_iter().enumerate() {
        assert!((value - row as f32).abs() < 0.01, "row {row} holds {value}");
    }
}

#[test]
fn llama_configuration_and_tokenizer() {
    let file = open("llama.gguf");
    let config = file.config().unwrap();
    for (key, value) in [
        ("model_type", json!("llama")),
        ("hidden_size", json!(32)),
        ("intermediate_size", json!(64)),
        ("num_hidden_layers", json!(1)),
        ("num_attention_heads", json!(2)),
        ("num_key_value_heads", json!(1)),
        ("head_dim", json!(4)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(10000.0)),
        ("max_position_embeddings", json!(64)),
        ("vocab_size", json!(4)),
        ("tie_word_embeddings", json!(true)),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let tokenizer = file.metadata.tokenizer().unwrap();
    assert_eq!(tokenizer.model, "llama");
    assert_eq!(tokenizer.tokens, ["<unk>", "<s>", "</s>", "▁a"]);
    assert_eq!(tokenizer.scores, Some([0.0, 0.0, 0.0, -1.5].as_slice()));
    assert_eq!(tokenizer.types, Some([2, 3, 3, 1].as_slice()));
    assert_eq!((tokenizer.bos, tokenizer.eos, tokenizer.unknown), (Some(1), Some(2), None));
    assert_eq!(tokenizer.add_bos, Some(true));
    assert_eq!(tokenizer.merges, None);
}

#[test]
fn metadata_of_every_kind() {
    let file = open("qwen3.gguf");
    let metadata = &file.metadata;
    assert_eq!(metadata.get_u64("test.u64"), Some(1 << 40));
    assert_eq!(metadata.get_u32("test.u64"), None);
    assert_eq!(metadata.get("test.i8"), Some(&gguf::Value::I8(-3)));
    assert_eq!(metadata.get_u32("test.i8"), None);
    assert_eq!(metadata.get_f32("test.f64"), Some(0.1));
    assert_eq!(metadata.get_str("test.f64"), None);
    let array = metadata.get_array("test.nested").unwrap();
    assert_eq!(array.integers(), Some(vec![1, 2, 3]));
    assert_eq!(metadata.get_strings("tokenizer.ggml.merges").unwrap(), ["a b", "ab c"]);
    assert_eq!(metadata.get("absent"), None);

    let config = file.config().unwrap();
    assert_eq!(config["model_type"], json!("qwen3"));
    assert_eq!(config["tie_word_embeddings"], json!(false));
    assert_eq!(config["rope_theta"], json!(1e6));
    assert_eq!(f32s(get(&file, "model.layers.0.self_attn.q_norm.weight")), [1.0, 2.0]);
    // Qwen keeps the rotary halves as they are.
    let q = get(&file, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(heads_of_rows(q), [0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn gemma_norms_lose_their_one() {
    let file = open("gemma2.gguf");
    let norm = get(&file, "model.layers.0.input_layernorm.weight");
    assert_eq!(f32s(norm), [0.5, 0.0, -0.5, 1.0]);
    assert_eq!(f32s(get(&file, "model.norm.weight")), [0.0; 4]);
    assert_eq!(f32s(get(&file, "model.layers.0.mlp.down_proj.weight"))[31], 31.0);
    let config = file.config().unwrap();
    assert_eq!(config["query_pre_attn_scalar"], json!(2));
    assert_eq!(config["attn_logit_softcapping"], json!(50.0));
    assert_eq!(config["final_logit_softcapping"], json!(30.0));
    assert_eq!(config["sliding_window"], json!(16));
}

#[test]
fn gpt2_matrices_are_turned_back() {
    let file = open("gpt2.gguf");
    // [2, 32] with row r all r becomes [32, 2] with rows (0, 1).
    let output = get(&file, "transformer.h.0.attn.c_proj.weight");
    assert_eq!((output.info.dtype, output.info.shape.as_slice()), (Dtype::F16, [32, 2].as_slice()));
    assert_eq!(f32s(output), [0.0, 1.0].repeat(32));
    let up = get(&file, "transformer.h.0.mlp.c_fc.weight");
    assert_eq!((up.info.dtype, up.info.nbytes), (Dtype::F32, 4 * 3 * 32));
    assert_eq!(f32s(up), [0.0, 127.0, 254.0].repeat(32));
    assert_eq!(f32s(get(&file, "transformer.h.0.mlp.c_fc.bias")), [0.0, 1.0, 2.0]);
    assert_eq!(get(&file, "transformer.wpe.weight").info.shape, [2, 32]);
    assert_eq!(file.config().unwrap()["n_inner"], json!(64));
}

#[test]
fn neox_qkv_returns_to_heads() {
    let file = open("neox.gguf");
    let qkv = get(&file, "gpt_neox.layers.0.attention.query_key_value.weight");
    let expected: Vec<f32> = (0..24u8).map(f32::from).collect();
    assert_eq!(heads_of_rows(qkv), expected);
    let config = file.config().unwrap();
    assert_eq!(config["rotary_pct"], json!(0.25));
    assert_eq!(config["use_parallel_residual"], json!(true));
}

#[test]
fn unknown_architectures_and_types_are_listed_but_not_guessed() {
    let file = open("unknown.gguf");
    assert_eq!(f32s(get(&file, "some.weight")), [0.0, 1.0, 2.0, 3.0]);
    let error = file.config().unwrap_err().to_string();
    assert!(error.contains("someday") && error.contains("qwen2"), "{error}");
    let two = get(&file, "two.weight");
    assert_eq!(two.info.dtype, Dtype::Ggml(GgmlType::Q2_K));
    let error = gguf::dequantize(GgmlType::Q2_K, &two.bytes().unwrap(), 256).unwrap_err();
    assert!(error.contains("Q2_K"), "{error}");
}

// Headers made by hand.

#[derive(Clone)]
struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    fn new(tensors: u64, pairs: u64) -> Self {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        Self { bytes }
    }

    fn text(mut self, text: &str) -> Self {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// F32 unless `kind` says otherwise.
    fn tensor(self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        let described = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(described, |b, &size| b.u64(size)).u32(kind).u64(offset)
    }

    /// Pads to `alignment` and adds `data` bytes.
    fn data(mut self, alignment: usize, data: usize) -> Self {
        let start = self.bytes.len().next_multiple_of(alignment);
        self.bytes.resize(start + data, 0);
        self
    }

    fn parse(&self) -> strata_store::Result<gguf::Header> {
        gguf::parse_bytes(&self.bytes, Path::new("odd.gguf"))
    }

    fn refused(&self, words: &[&str]) {
        let message = self.parse().map(|h| format!("{h:?}")).unwrap_err().to_string();
        assert!(message.starts_with("odd.gguf: "), "{message}");
        for word in words {
            assert!(message.contains(word), "\"{word}\" is not in: {message}");
        }
    }
}

#[test]
fn a_good_header_by_hand() {
    let file = Builder::new(2, 1)
        .text("general.alignment")
        .u32(4)
        .u32(64)
        .tensor("a", &[3, 2], 0, 0)
        .tensor("b", &[1], 0, 64)
        .data(64, 68);
    let header = file.parse().unwrap();
    assert_eq!(header.tensors[0].shape, [2, 3]);
    assert_eq!(header.tensors[0].start % 64, 0);
    assert_eq!(header.tensors[1].start, header.tensors[0].start + 64);
}

#[test]
fn lying_tensors_are_refused() {
    let one = |shape: &[u64], kind, offset| {
        Builder::new(1, 0).tensor("w", shape, kind, offset).data(32, 64)
    };
    assert!(one(&[16], 0, 0).parse().is_ok());
    one(&[17], 0, 0).refused(&["tensor \"w\"", "outside the file"]);
    one(&[8], 0, 64).refused(&["outside the file"]);
    one(&[1], 0, 4).refused(&["multiple of 32"]);
    one(&[1], 0, u64::MAX - 31).refused(&["outside the file"]);
    one(&[1 << 40, 1 << 40], 0, 0).refused(&["impossible size"]);
    one(&[u64::MAX], 0, 0).refused(&["impossible size"]);
    one(&[16, 2], 2, 0).refused(&["whole number of Q4_0 blocks"]);
    one(&[1], 4, 0).refused(&["unknown GGML type 4"]);
    one(&[1, 1, 1, 1, 1], 0, 0).refused(&["5 dimensions"]);
    one(&[], 0, 0).refused(&["0 dimensions"]);
    let two = |name: &str, offset| {
        Builder::new(2, 0).tensor("w", &[16], 0, 0).tensor(name, &[8], 0, offset).data(32, 128)
    };
    assert!(two("v", 64).parse().is_ok());
    two("v", 32).refused(&["tensor \"v\"", "overlaps", "\"w\""]);
    two("w", 64).refused(&["tensor \"w\"", "twice"]);
}

#[test]
fn lying_headers_are_refused() {
    Builder::new(u64::MAX, 0).refused(&["claims", "tensors"]);
    Builder::new(0, u64::MAX / 2).refused(&["claims", "metadata pairs"]);
    Builder::new(0, 1).text("k").u32(9).u32(4).u64(1 << 60).refused(&["\"k\"", "claims"]);
    Builder::new(0, 1).text("k").u32(8).u64(u64::MAX).u64(0).refused(&["\"k\"", "claims"]);
    Builder::new(0, 1).text("k").u32(13).u64(0).refused(&["unknown type 13"]);
    let pair = |b: Builder| b.text("k").u32(4).u32(1);
    pair(pair(Builder::new(0, 2))).refused(&["\"k\"", "twice"]);
    for alignment in [0, 3] {
        Builder::new(0, 1).text("general.alignment").u32(4).u32(alignment).refused(&["power"]);
    }
    // Arrays of arrays of arrays ...
    let mut deep = Builder::new(0, 1).text("k").u32(9);
    for _ in 0..1000 {
        deep = deep.u32(9).u64(1);
    }
    deep.refused(&["deeper"]);

    let version = |bytes: [u8; 4]| {
        let mut file = Builder::new(0, 0);
        file.bytes[4..8].copy_from_slice(&bytes);
        file
    };
    assert!(version([2, 0, 0, 0]).parse().is_ok());
    version([1, 0, 0, 0]).refused(&["version 1"]);
    version([0, 0, 0, 3]).refused(&["big-endian"]);
    version([9, 0, 0, 0]).refused(&["version 9"]);
}

#[test]
fn head_counts_that_do_not_fit_are_refused() {
    // A llama whose 3 rows cannot hold two halves of 2 heads.
    let file = Builder::new(1, 2)
        .text("general.architecture")
        .u32(8)
        .text("llama")
        .text("llama.attention.head_count")
        .u32(4)
        .u32(2)
        .tensor("blk.0.attn_q.weight", &[4, 3], 0, 0)
        .data(32, 48);
    let message = gguf::from_bytes(&file.bytes, Path::new("bad.gguf")).unwrap_err().to_string();
    assert!(message.contains("q_proj") && message.contains("3 rows"), "{message}");
}

struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n.max(1)
    }
}

#[test]
fn damaged_files_never_panic() {
    let mut rng = Lcg(11);
    let mut refused = 0;
    for entry in std::fs::read_dir(fixture("")).unwrap() {
        let source = entry.unwrap().path();
        if source.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let original = std::fs::read(&source).unwrap();
        for round in 0..800 {
            let mut bytes = original.clone();
            for _ in 0..=rng.below(4) {
                let at = rng.below(bytes.len());
                bytes[at] = match round % 3 {
                    0 => bytes[at] ^ (1 << rng.below(8)),
                    1 => rng.next() as u8,
                    _ => [0, 0xff, 1, 9][rng.below(4)],
                };
            }
            if round % 4 == 0 {
                bytes.truncate(rng.below(bytes.len()));
            }
            match gguf::from_bytes(&bytes, &source) {
                Err(_) => refused += 1,
                Ok(file) => {
                    let _ = file.config();
                    let _ = file.metadata.tokenizer();
                    for entry in &file.entries {
                        let _ = entry.bytes();
                    }
                }
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}
