//! A whole safetensors file: whatever its header says, parsing returns, and an accepted header
//! describes bytes inside the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = store::safetensors::parse(Path::new("fuzz.safetensors"), data);
});
