//! A `model.safetensors.index.json` beside two good shards. Opening goes through real files,
//! because shard names that leave the directory are part of what must be refused.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

/// One f32 tensor of one element.
fn shard(tensor: &str) -> Vec<u8> {
    let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(1.0f32.to_le_bytes());
    bytes
}

static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let base = PathBuf::from("/dev/shm");
    let base = if base.is_dir() { base } else { std::env::temp_dir() };
    let directory = base.join(format!("strata-fuzz-index-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("the scratch directory can be made");
    fs::write(directory.join("a.safetensors"), shard("w")).expect("a shard can be written");
    fs::write(directory.join("b.safetensors"), shard("v")).expect("a shard can be written");
    directory
});

fuzz_target!(|data: &[u8]| {
    fs::write(DIRECTORY.join("model.safetensors.index.json"), data)
        .expect("the index can be written");
    if let Ok(checkpoint) = store::Checkpoint::open(&DIRECTORY) {
        for name in checkpoint.names() {
            assert!(matches!(name, "w" | "v"), "{name} is in no shard");
            checkpoint.bytes(name).expect("a listed tensor can be read");
        }
    }
});
