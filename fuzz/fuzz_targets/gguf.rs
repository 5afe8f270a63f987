//! A whole GGUF file: header, configuration, tokenizer, tensors in Hugging Face layout.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use store::{Dtype, gguf};

fuzz_target!(|data: &[u8]| {
    let Ok(file) = gguf::from_bytes(data, Path::new("fuzz.gguf")) else { return };
    let _ = file.config();
    let _ = file.metadata.tokenizer();
    for entry in &file.entries {
        let Ok(bytes) = entry.bytes() else { continue };
        if let Dtype::Ggml(ty) = entry.info.dtype
            && gguf::readable(ty)
        {
            let values = gguf::dequantize(ty, &bytes, entry.info.elements());
            assert_eq!(values.expect("checked blocks").len(), entry.info.elements());
        }
    }
});
