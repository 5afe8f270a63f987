//! A PyTorch file of either container, or (after a zero byte) the object pickle of a legacy file.
//! Accepted tensors must be readable to exactly their size.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

/// Magic number, protocol version 1001 and an empty system description.
const PROLOGUE: &[u8] =
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.";

fn check(file: &[u8]) {
    let Ok(tensors) = store::pickle::parse_bytes(file, Path::new("fuzz.pt")) else { return };
    for tensor in tensors {
        let elements: usize = tensor.shape.iter().product();
        let want = tensor.dtype.bytes_for(elements as u64).expect("a size that was checked");
        if let Ok(bytes) = tensor.read(file) {
            assert_eq!(bytes.len() as u64, want);
        }
    }
}

fuzz_target!(|data: &[u8]| match data.split_first() {
    Some((0, object)) => check(&[PROLOGUE, object].concat()),
    _ => check(data),
});
