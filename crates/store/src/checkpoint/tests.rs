//! Opening directories and files, honest and hostile.

use super::*;
use crate::safetensors::tests::{Lcg, file, pair_file};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn put(directory: &Path, name: &str, bytes: &[u8]) {
    fs::write(directory.join(name), bytes).unwrap();
}

fn index(pairs: &[(&str, &str)]) -> Vec<u8> {
    let pairs: Vec<String> = pairs.iter().map(|(n, s)| format!("{n:?}:{s:?}")).collect();
    format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{}}}}}"#, pairs.join(",")).into()
}

const INDEX: &str = "model.safetensors.index.json";
const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

/// Asserts that opening fails with a message that has all of these parts.
fn refused(path: &Path, parts: &[&str]) {
    let message = Checkpoint::open(path).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "\"{part}\" expected in: {message}");
    }
}

#[test]
fn single_file_and_directory() {
    let d = directory();
    put(d.path(), "model.safetensors", &pair_file(&["b", "a"]));
    put(d.path(), "config.json", br#"{"model_type":"llama"}"#);
    for path in [d.path().to_path_buf(), d.path().join("model.safetensors")] {
        let ck = Checkpoint::open(&path).unwrap();
        assert_eq!(ck.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(ck.f32("b").unwrap(), [0.0, 1.0]);
        assert_eq!(ck.f32("a").unwrap(), [2.0, 3.0]);
        assert_eq!(ck.f32_rows("a", 1..2).unwrap(), [3.0]);
        assert_eq!(ck.config().unwrap()["model_type"], "llama");
        assert_eq!(ck.directory(), d.path());
        assert_eq!((ck.total_bytes(), ck.len()), (16, 2));
        assert_eq!(ck.container(), Container::Safetensors);
        assert_eq!(ck.files().len(), 1);
        ck.release("a");
        assert_eq!(ck.f32("a").unwrap(), [2.0, 3.0]);
    }
}

#[test]
fn sharded_with_and_without_index() {
    let d = directory();
    put(d.path(), ONE, &pair_file(&["a", "b"]));
    put(d.path(), TWO, &pair_file(&["c"]));
    assert_eq!(Checkpoint::open(d.path()).unwrap().len(), 3);
    put(d.path(), INDEX, &index(&[("a", ONE), ("b", ONE), ("c", TWO)]));
    assert_eq!(Checkpoint::open(d.path()).unwrap().len(), 3);
    assert_eq!(Checkpoint::open(&d.path().join(INDEX)).unwrap().len(), 3);
    fs::remove_file(d.path().join(INDEX)).unwrap();
    fs::remove_file(d.path().join(ONE)).unwrap();
    put(d.path(), "model-00003-of-00002.safetensors", &pair_file(&["d"]));
    refused(d.path(), &[ONE, "missing"]);
}

#[test]
fn views_are_borrowed_when_aligned() {
    let d = directory();
    // A header of 8k bytes aligns the data, one byte more does not.
    for (pad, aligned) in [(0, true), (1, false)] {
        let mut text = r#"{"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"x":{"dtype":"BF16","shape":[1],"data_offsets":[4,6]},"i":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},"z":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}}"#.to_string();
        while text.len() % 8 != pad {
            text.push(' ');
        }
        let mut data = vec![0x00, 0x3c, 0x00, 0x40, 0x80, 0x3f, 7, 8];
        data.extend(5i64.to_le_bytes());
        put(d.path(), "m.safetensors", &file(&text, &data));
        let ck = Checkpoint::open(&d.path().join("m.safetensors")).unwrap();
        match ck.half_view("h").unwrap() {
            WeightView::F16(v) => assert!(aligned && v[1].to_f32() == 2.0),
            WeightView::Owned(v) => assert!(!aligned && v == [1.0, 2.0]),
            other => panic!("{other:?}"),
        }
        assert_eq!(ck.half_view("x").unwrap().len(), 1);
        assert_eq!(ck.i32("i").unwrap(), [5]);
        assert_eq!(ck.i32("z").unwrap(), [7, 8]);
        assert_eq!(ck.f32("i").unwrap(), [5.0]);
        let message = ck.i32("h").unwrap_err().to_string();
        assert!(message.contains("\"h\"") && message.contains("F16"), "{message}");
        assert!(ck.f32_rows("h", 1..3).unwrap_err().to_string().contains("has 2 rows"));
    }
}

#[test]
fn large_values_do_not_fit_i32() {
    let d = directory();
    let text = r#"{"i":{"dtype":"U32","shape":[1],"data_offsets":[0,4]}}"#;
    put(d.path(), "m.safetensors", &file(text, &[255; 4]));
    let ck = Checkpoint::open(d.path()).unwrap();
    assert!(ck.i32("i").unwrap_err().to_string().contains("4294967295 does not fit"));
}

#[test]
fn nan_payloads_come_through_unchanged() {
    let d = directory();
    let text = r#"{"n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    put(d.path(), "m.safetensors", &file(text, &0x7fa1_2345u32.to_le_bytes()));
    let ck = Checkpoint::open(d.path()).unwrap();
    assert_eq!(ck.bytes("n").unwrap().as_ref(), 0x7fa1_2345u32.to_le_bytes());
    assert!(ck.f32("n").unwrap()[0].is_nan());
}

#[test]
fn unknown_tensor_names_the_nearest() {
    let d = directory();
    put(d.path(), "model.safetensors", &pair_file(&["model.layers.0.weight"]));
    let ck = Checkpoint::open(d.path()).unwrap();
    let message = ck.f32("model.layer.0.weight").unwrap_err().to_string();
    assert!(message.contains("\"model.layers.0.weight\""), "{message}");
}

#[test]
fn missing_paths_suggest_a_neighbour() {
    let d = directory();
    fs::create_dir(d.path().join("llama-7b")).unwrap();
    refused(&d.path().join("lama-7b"), &["no such file", "did you mean", "llama-7b"]);
    refused(&d.path().join("a/b"), &["does not exist either"]);
}

#[test]
fn directories_without_weights() {
    let d = directory();
    refused(d.path(), &["empty directory"]);
    put(d.path(), "config.json", b"{}");
    refused(d.path(), &["has a config.json but no weights", "*.safetensors"]);
    refused(&d.path().join("config.json"), &["not the weights", "give the directory"]);
    put(d.path(), "tf_model.h5", b"x");
    refused(d.path(), &["tf_model.h5"]);
    put(d.path(), "notes.xyz", b"nothing known");
    refused(&d.path().join("notes.xyz"), &["not a weight file"]);
}

#[test]
fn several_weight_files_are_not_guessed() {
    let d = directory();
    put(d.path(), "x.safetensors", &pair_file(&["a"]));
    put(d.path(), "y.safetensors", &pair_file(&["b"]));
    refused(d.path(), &["several weight files", "x.safetensors, y.safetensors"]);
}

#[test]
fn empty_and_pointer_files() {
    let d = directory();
    put(d.path(), "model.safetensors", b"");
    refused(d.path(), &["model.safetensors", "empty"]);
    put(d.path(), "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1");
    refused(d.path(), &["model.safetensors", "Git LFS"]);
}

#[test]
fn broken_configs_only_matter_when_asked_for() {
    let d = directory();
    put(d.path(), "model.safetensors", &pair_file(&["a"]));
    let config = || Checkpoint::open(d.path()).unwrap().config().unwrap_err().to_string();
    assert!(config().contains("no config.json"));
    put(d.path(), "config.json", "[".repeat(100_000).as_bytes());
    assert!(config().contains("not valid JSON"));
    put(d.path(), "config.json", b"[1]");
    assert!(config().contains("not a JSON object"));
}

#[test]
fn index_that_leaves_the_directory() {
    let d = directory();
    let inside = d.path().join("model");
    fs::create_dir(&inside).unwrap();
    put(d.path(), "evil.safetensors", &pair_file(&["a"]));
    let absolute = d.path().join("evil.safetensors");
    for shard in [
        "../evil.safetensors",
        absolute.to_str().unwrap(),
        "",
        ".",
        "x/../../evil.safetensors",
        "..\\evil.safetensors",
        "C:evil",
    ] {
        put(&inside, INDEX, &index(&[("a", shard)]));
        refused(&inside, &[INDEX, "tensor \"a\"", "outside the directory"]);
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&absolute, inside.join("link.safetensors")).unwrap();
        put(&inside, INDEX, &index(&[("a", "link.safetensors")]));
        refused(&inside, &[INDEX, "tensor \"a\"", "link", "outside the directory"]);
    }
}

#[cfg(unix)]
#[test]
fn hub_cache_links_are_followed() {
    let d = directory();
    let snapshot = d.path().join("models--x/snapshots/abc");
    let blobs = d.path().join("models--x/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    put(&blobs, "sha", &pair_file(&["a"]));
    std::os::unix::fs::symlink("../../blobs/sha", snapshot.join(ONE)).unwrap();
    put(&snapshot, INDEX, &index(&[("a", ONE)]));
    assert_eq!(Checkpoint::open(&snapshot).unwrap().len(), 1);
}

#[test]
fn index_and_shards_disagree() {
    let d = directory();
    put(d.path(), ONE, &pair_file(&["a", "b"]));
    put(d.path(), INDEX, &index(&[("a", ONE), ("b", ONE), ("c", TWO)]));
    refused(d.path(), &[INDEX, "tensor \"c\"", TWO, "missing"]);
    put(d.path(), TWO, &pair_file(&["x"]));
    refused(d.path(), &[TWO, "tensor \"x\"", "does not list it"]);
    put(d.path(), INDEX, &index(&[("a", ONE), ("b", ONE), ("c", TWO), ("x", TWO)]));
    refused(d.path(), &[TWO, "tensor \"c\"", "the shard does not hold it"]);
    put(d.path(), TWO, &pair_file(&["b"]));
    put(d.path(), INDEX, &index(&[("a", ONE), ("b", TWO)]));
    refused(d.path(), &["tensor \"b\"", "does not list it"]);
    fs::create_dir(d.path().join("dir.safetensors")).unwrap();
    put(d.path(), INDEX, &index(&[("a", "dir.safetensors")]));
    refused(d.path(), &["tensor \"a\"", "not a file"]);
}

#[test]
fn malformed_index() {
    let d = directory();
    for (text, reason) in [
        (r#"{"weight_map":{"a":"x","a":"y"}}"#, "twice"),
        (r#"{"metadata":{}}"#, "lacks the field"),
        (r#"{"weight_map":{"a":1}}"#, "malformed index"),
        ("[[[[", "malformed index"),
        ("", "malformed index"),
    ] {
        put(d.path(), INDEX, text.as_bytes());
        refused(d.path(), &[INDEX, reason]);
    }
    let deep = format!("{{\"metadata\":{}", "[".repeat(1_000_000));
    put(d.path(), INDEX, deep.as_bytes());
    refused(d.path(), &[INDEX, "malformed index"]);
}

#[test]
fn truncated_shard() {
    let d = directory();
    let whole = pair_file(&["a", "b"]);
    put(d.path(), ONE, &whole[..whole.len() - 3]);
    put(d.path(), INDEX, &index(&[("a", ONE), ("b", ONE)]));
    refused(d.path(), &[ONE, "tensor \"b\"", "outside", "truncated"]);
}

#[test]
fn random_damage_never_panics() {
    let d = directory();
    let mut random = Lcg(11);
    let shard = pair_file(&["a", "b"]);
    let listing = index(&[("a", ONE), ("b", ONE)]);
    put(d.path(), ONE, &shard);
    for round in 0..1500 {
        let mut text = listing.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(text.len());
            match random.below(3) {
                0 => text[at] ^= 1 << random.below(7),
                1 => text.truncate(at.max(1)),
                _ => text.insert(at, b"/.\\{}[]\",:"[random.below(10)]),
            }
        }
        put(d.path(), INDEX, &text);
        if let Ok(ck) = Checkpoint::open(d.path()) {
            for name in ck.names().map(String::from).collect::<Vec<_>>() {
                ck.f32(&name).unwrap();
            }
        }
        if round % 3 == 0 {
            let mut bytes = shard.clone();
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            bytes.truncate(bytes.len() - random.below(3));
            put(d.path(), "alone.safetensors", &bytes);
            if let Ok(ck) = Checkpoint::open(&d.path().join("alone.safetensors")) {
                for name in ck.names().map(String::from).collect::<Vec<_>>() {
                    let _ = ck.f32(&name);
                    let _ = ck.i32(&name);
                    let _ = ck.half_view(&name);
                    let _ = ck.f32_rows(&name, 0..1);
                }
            }
        }
    }
}
