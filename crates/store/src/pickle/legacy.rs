//! The format of `torch.save` before PyTorch 1.6: a row of pickles (magic number, protocol version,
//! system, object, storage keys), then every storage as an element count and raw bytes.

use std::collections::HashMap;

use super::archive::Place;
use super::value::{Heap, Storage, Value};
use super::{Object, machine};
use crate::error::shorten;

const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
const PROTOCOL: i64 = 1001;

/// Reads a legacy file, the whole of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Result<Object<'_>, String> {
    let mut at = 0;
    let magic =
        machine::load(bytes, &mut at).map_err(|reason| format!("{reason}; {}", guess(bytes)))?;
    match magic.get(magic.root) {
        Value::Wide(number) if **number == MAGIC => {}
        _ => return Err("is a plain pickle, not a file of torch.save".into()),
    }
    let version = machine::load(bytes, &mut at)?;
    match version.get(version.root) {
        Value::Int(PROTOCOL) => {}
        Value::Int(other) => return Err(format!("legacy format version {other} is unknown")),
        _ => return Err("the legacy format version is no number".into()),
    }
    let system = machine::load(bytes, &mut at)?;
    let swap = big_endian(&system);
    let heap = machine::load(bytes, &mut at)?;
    let keys = machine::load(bytes, &mut at)?;
    let wanted = storages(&heap)?;
    let places = place(bytes, at, &keys, &wanted)?;
    Ok(Object { heap, places, swap })
}

fn guess(bytes: &[u8]) -> &'static str {
    if bytes.starts_with(b"version https://git-lfs") {
        "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    } else if bytes.get(257..262) == Some(b"ustar") {
        "files of PyTorch before 0.2 (tar) are not supported; save it again with a newer PyTorch"
    } else {
        "zip archives and legacy pickles of torch.save can be opened"
    }
}

fn big_endian(system: &Heap<'_>) -> bool {
    let Value::Dict(pairs) = system.get(system.root) else { return false };
    pairs.iter().any(|&(key, value)| {
        system.text(key) == Some("little_endian") && matches!(system.get(value), Value::Bool(false))
    })
}

/// The storages that the object refers to, by key.
fn storages<'h>(heap: &'h Heap<'_>) -> Result<HashMap<&'h str, &'h Storage>, String> {
    let mut wanted: HashMap<&str, &Storage> = HashMap::new();
    for value in &heap.values {
        let Value::Storage(storage) = value else { continue };
        let known = wanted.entry(&storage.key).or_insert(storage);
        if known.count != storage.count || known.width() != storage.width() {
            return Err(format!("storage {} has two sizes", shorten(&storage.key)));
        }
    }
    Ok(wanted)
}

/// Finds every storage behind the pickles, in the order of `keys`.
fn place(
    bytes: &[u8],
    mut at: usize,
    keys: &Heap<'_>,
    wanted: &HashMap<&str, &Storage>,
) -> Result<HashMap<String, Place>, String> {
    let Value::List(keys_list) = keys.get(keys.root) else {
        return Err("the list of storages is missing".into());
    };
    let mut places = HashMap::with_capacity(keys_list.len().min(wanted.len()));
    for &key in keys_list {
        let key = match keys.get(key) {
            Value::Int(number) => number.to_string(),
            _ => keys.text(key).ok_or("a storage key that is no text")?.to_owned(),
        };
        let shown = shorten(&key);
        let storage = wanted.get(key.as_str()).ok_or_else(|| {
            format!("storage {shown} belongs to no tensor, so its size is unknown")
        })?;
        let cut = || format!("storage {shown} is cut short; the file may be truncated");
        let head = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(cut)?;
        let count = i64::from_le_bytes(*head);
        if i64::try_from(storage.count) != Ok(count) {
            return Err(format!(
                "storage {shown} has {count} elements where the pickle says {}",
                storage.count
            ));
        }
        let start = at + 8;
        let len = storage.count.checked_mul(storage.width()).ok_or_else(cut)?;
        at = start.checked_add(len).filter(|&end| end <= bytes.len()).ok_or_else(cut)?;
        if places.insert(key, Place::stored(start, len)).is_some() {
            return Err(format!("storage {shown} occurs twice"));
        }
    }
    Ok(places)
}
