use super::*;

fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("STRATA_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    if path.join("data").is_dir() {
        return Some(path.join("data"));
    }
    println!("skipped: no shared data at {}", path.display());
    None
}

fn stories(data: &Path) -> Vec<String> {
    crate::text::load(&data.join("tinystories-sample/tinystories_1000.json")).unwrap().texts
}

#[test]
fn sentencepiece_tokenises_as_the_json_beside_it() {
    let Some(data) = shared() else { return };
    let json = Tokenizer::from_dir(&data.join("stories260k")).unwrap();
    let model = Tokenizer::from_file(&data.join("stories260k/tokenizer.model")).unwrap();
    assert_eq!((json.vocab_size(), model.vocab_size()), (512, 512));
    assert_eq!((model.bos(), model.eos()), (Some(1), Some(2)));
    let odd = ["", " ", "  two  spaces ", "été 🦀 naïve", "a\nb\tc", "0123"].map(String::from);
    for text in stories(&data).iter().chain(&odd) {
        let ids = model.encode(text, true).unwrap();
        assert_eq!(ids, json.encode(text, true).unwrap(), "{text:?}");
        assert_eq!(model.decode(&ids, true).unwrap(), json.decode(&ids, true).unwrap());
    }
}

#[test]
fn streaming_gives_the_text_and_whole_characters() {
    let Some(data) = shared() else { return };
    for dir in ["stories260k", "tokenizers/gpt2"] {
        let tokenizer = Tokenizer::from_dir(&data.join(dir)).unwrap();
        let text = "Once upon a time 🦀🇩🇪 naïve été 漢字, she said.";
        let ids = tokenizer.encode(text, false).unwrap();
        let mut stream = tokenizer.stream(true);
        let mut streamed = String::new();
        for &id in &ids {
            let piece = stream.push(id).unwrap().unwrap_or_default();
            assert!(!piece.contains('\u{FFFD}'), "{dir}: {piece:?}");
            streamed.push_str(&piece);
        }
        streamed.push_str(&stream.finish().unwrap().unwrap_or_default());
        assert_eq!(streamed, tokenizer.decode(&ids, true).unwrap(), "{dir}");
        assert_eq!(streamed, text, "{dir}");
    }
}

#[test]
fn streaming_after_a_prompt_keeps_the_space() {
    let Some(data) = shared() else { return };
    let tokenizer = Tokenizer::from_dir(&data.join("stories260k")).unwrap();
    let prompt = tokenizer.encode("Once upon a", true).unwrap();
    let all = tokenizer.encode("Once upon a time", true).unwrap();
    let mut stream = tokenizer.stream(true).after(&prompt);
    let mut text = String::new();
    for &id in &all[prompt.len()..] {
        text.push_str(&stream.push(id).unwrap().unwrap_or_default());
    }
    assert_eq!(text, " time");
}

#[test]
fn gpt2_files_tokenise_as_documented() {
    let Some(data) = shared() else { return };
    let dir = data.join("tokenizers/gpt2");
    let files = Tokenizer::from_file(&dir.join("vocab.json")).unwrap();
    let json = Tokenizer::from_file(&dir.join("tokenizer.json")).unwrap();
    assert_eq!(files.encode("Hello world", true).unwrap(), [15496, 995]);
    assert_eq!(files.token("<|endoftext|>"), Some(50256));
    assert_eq!(files.vocab_size(), 50257);
    for text in stories(&data).iter().take(100) {
        assert_eq!(files.encode(text, true).unwrap(), json.encode(text, true).unwrap());
    }
}

#[test]
fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("no tokenizer here") && error.contains(&dir.path().display().to_string())
    );
    std::fs::write(dir.path().join("vocab.json"), "{\"a\": 0, \"b\": 1, \"ab\": 2}").unwrap();
    std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b\nab\n").unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("merges.txt:3"), "{error}");
    std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b\n").unwrap();
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().encode("ab", true).unwrap(), [2]);
    std::fs::write(dir.path().join("tokenizer.model"), [0xff, 0xff]).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model") && error.contains("not a sentencepiece model"));
}

fn built(json: &serde_json::Value) -> Tokenizer {
    Tokenizer::from_json(json.to_string().as_bytes(), None, None).unwrap()
}

#[test]
fn a_gguf_vocabulary_with_scores_tokenises_as_sentencepiece() {
    let Some(data) = shared() else { return };
    let dir = data.join("stories260k");
    let bytes = std::fs::read(dir.join("tokenizer.model")).unwrap();
    let model = sentencepiece::Model::parse(&bytes).unwrap();
    let vocabulary = gguf::Vocabulary {
        pieces: model.pieces.clone(),
        merges: Vec::new(),
        split: None,
        begin: Some(1),
        end: Some(2),
        add_begin: true,
        add_end: false,
        add_space_prefix: true,
        remove_extra_whitespaces: false,
    };
    let gguf = built(&vocabulary.to_json().unwrap());
    let file = Tokenizer::from_dir(&dir).unwrap();
    for text in stories(&data).iter().take(200).map(|t| t.trim()).filter(|t| !t.contains("  ")) {
        assert_eq!(gguf.encode(text, true).unwrap(), file.encode(text, true).unwrap());
    }
    let mut broken = vocabulary;
    broken.pieces[7].score = f32::INFINITY;
    assert!(broken.to_json().unwrap_err().contains("piece 7"));
}

#[test]
fn a_gguf_vocabulary_with_merges_tokenises_as_byte_level_bpe() {
    let Some(data) = shared() else { return };
    let dir = data.join("tokenizers/gpt2");
    let file = Tokenizer::from_file(&dir.join("tokenizer.json")).unwrap();
    let merges = std::fs::read_to_string(dir.join("merges.txt")).unwrap();
    let pieces = (0..file.vocab_size() as u32).map(|id| sentencepiece::Piece {
        text: file.token_text(id).unwrap(),
        score: 0.0,
        kind: if id == 50256 { sentencepiece::Kind::Control } else { sentencepiece::Kind::Normal },
    });
    let vocabulary = gguf::Vocabulary {
        pieces: pieces.collect(),
        merges: merges.lines().skip(1).filter_map(convert::merge_pair).collect(),
        split: Some(convert::Split::Gpt2),
        begin: Some(50256),
        end: Some(50256),
        add_begin: false,
        add_end: false,
        add_space_prefix: false,
        remove_extra_whitespaces: false,
    };
    let gguf = built(&vocabulary.to_json().unwrap());
    for text in stories(&data).iter().take(50) {
        assert_eq!(gguf.encode(text, true).unwrap(), file.encode(text, true).unwrap());
    }
    assert_eq!(gguf.encode("a<|endoftext|>", false).unwrap(), [64, 50256]);
}

#[test]
fn the_ids_at_the_ends_come_from_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("vocab.json", r#"{"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<turn>": 4}"#);
    write("merges.txt", "");
    write("config.json", r#"{"bos_token_id": 2, "eos_token_id": 3}"#);
    let ids = |dir: &Path| {
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        (tokenizer.bos(), tokenizer.eos_ids().to_vec())
    };
    assert_eq!(ids(dir.path()), (Some(2), vec![3]));
    write("generation_config.json", r#"{"eos_token_id": [4, 3, 99]}"#);
    assert_eq!(ids(dir.path()), (Some(2), vec![4, 3]));
    write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}, "add_bos_token": true}"#);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [2, 0, 1]);
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [0, 1]);
    write("config.json", "{");
    assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains("config.json:1"));
}

/// The metadata of a GGUF file without tensors, from keys and encoded values (type, bytes).
fn gguf_metadata(pairs: &[(&str, u32, Vec<u8>)]) -> store::gguf::Metadata {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend((pairs.len() as u64).to_le_bytes());
    for (key, kind, value) in pairs {
        let key = format!("tokenizer.ggml.{key}");
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    store::gguf::parse_bytes(&bytes, Path::new("test.gguf")).unwrap().metadata
}

fn gguf_string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn gguf_array(kind: u32, items: Vec<Vec<u8>>) -> Vec<u8> {
    let head = [kind.to_le_bytes().to_vec(), (items.len() as u64).to_le_bytes().to_vec()].concat();
    [head, items.concat()].concat()
}

#[test]
fn the_keys_of_a_gguf_file_are_read() {
    let pieces =
        [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("▁a", -1.0, 1), ("▁", -2.0, 1), ("a", -3.0, 1)];
    let texts = gguf_array(8, pieces.iter().map(|p| gguf_string(p.0)).collect());
    let scores = gguf_array(6, pieces.iter().map(|p| f32::to_le_bytes(p.1).to_vec()).collect());
    let kinds = gguf_array(5, pieces.iter().map(|p| i32::to_le_bytes(p.2).to_vec()).collect());
    let llama = gguf_metadata(&[
        ("model", 8, gguf_string("llama")),
        ("tokens", 9, texts.clone()),
        ("scores", 9, scores),
        ("token_type", 9, kinds),
        ("bos_token_id", 4, 1u32.to_le_bytes().to_vec()),
    ]);
    let vocabulary = gguf::Vocabulary::read(&llama).unwrap();
    assert_eq!((vocabulary.begin, vocabulary.end), (Some(1), None));
    let tokenizer = built(&vocabulary.to_json().unwrap());
    assert_eq!(tokenizer.encode("a aa", true).unwrap(), [1, 2, 2, 4]);
    let refused =
        |pairs: &[(&str, u32, Vec<u8>)]| gguf::Vocabulary::read(&gguf_metadata(pairs)).unwrap_err();
    assert!(refused(&[]).contains("carries no tokenizer"));
    let bert = [("model", 8, gguf_string("bert")), ("tokens", 9, texts.clone())];
    assert!(refused(&bert).contains("\"llama\" and \"gpt2\""));
    let bare = [("model", 8, gguf_string("llama")), ("tokens", 9, texts.clone())];
    assert!(refused(&bare).contains("tokenizer.ggml.scores"));
    let other =
        [("model", 8, gguf_string("gpt2")), ("pre", 8, gguf_string("odd")), ("tokens", 9, texts)];
    assert!(refused(&other).contains("\"odd\""));
}

/// What reading the metadata gives, with and without the whole tokenizer among them.
fn through_gguf(tokenizer: &Tokenizer, vocab_size: usize, whole: bool) -> Tokenizer {
    let mut metadata = tokenizer.to_gguf(vocab_size).unwrap().metadata;
    if !whole {
        metadata.retain(|(key, _)| key != "tokenizer.huggingface.json");
    }
    metadata.push(("general.architecture".into(), store::gguf::Value::String("llama".into())));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vocabulary.gguf");
    let none = |_: &store::gguf::TensorPlan| Ok::<_, store::Error>(Vec::new());
    store::gguf::write(&path, false, &metadata, &[], none).unwrap();
    Tokenizer::from_checkpoint(&store::Checkpoint::open(&path).unwrap()).unwrap()
}

#[test]
fn gguf_metadata_carry_a_tokenizer() {
    let Some(data) = shared() else { return };
    for (path, rows) in [("stories260k", 512), ("tokenizers/gpt2", 50304)] {
        let original = Tokenizer::from_dir(&data.join(path)).unwrap();
        for whole in [true, false] {
            let read = through_gguf(&original, rows, whole);
            assert_eq!((read.bos(), read.eos()), (original.bos(), original.eos()), "{path}");
            let odd =
                ["", " ", "  two  spaces ", "été 🦀", "a\nb\tc", "0123 it's"].map(String::from);
            for text in stories(&data).iter().take(60).chain(&odd) {
                let ids = read.encode(text, true).unwrap();
                assert_eq!(ids, original.encode(text, true).unwrap(), "{path} {text:?}");
                assert_eq!(read.decode(&ids, true).unwrap(), original.decode(&ids, true).unwrap());
            }
        }
        let error = original.to_gguf(rows / 2).unwrap_err().to_string();
        assert!(error.contains("embedding has"), "{error}");
    }
}

#[test]
fn the_almanac_tokenizer_through_gguf() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../samples");
    let original = Tokenizer::from_dir(&samples.join("almanac-3m-chat")).unwrap();
    let export = original.to_gguf(2048).unwrap();
    assert_eq!(export.notes.len(), 2, "{:?}", export.notes);
    let value = |key: &str| export.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v);
    use store::gguf::Value;
    assert_eq!(value("tokenizer.ggml.pre"), Some(&Value::String("smollm".into())));
    assert_eq!(value("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    assert_eq!(value("tokenizer.ggml.add_eos_token"), Some(&Value::Bool(false)));
    let documents = crate::almanac::Almanac::embedded().documents(crate::almanac::Split::Test);
    for whole in [true, false] {
        let read = through_gguf(&original, 2048, whole);
        assert_eq!(read.eos_ids(), original.eos_ids());
        assert_eq!(read.chat_template(), original.chat_template());
        for text in documents.texts.iter().take(300) {
            assert_eq!(read.encode(text, true).unwrap(), original.encode(text, true).unwrap());
        }
    }
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    let refused = |json: serde_json::Value, what: &str| {
        let error = built(&json).to_gguf(10).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let model = serde_json::json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
    refused(serde_json::json!({"version": "1.0", "model": model}), "WordLevel");
    let bpe = serde_json::json!({"type": "BPE", "vocab": {"a": 0}, "merges": []});
    let whitespace = serde_json::json!({"type": "Whitespace"});
    refused(
        serde_json::json!({"version": "1.0", "pre_tokenizer": whitespace, "model": bpe}),
        "(Whitespace)",
    );
}
