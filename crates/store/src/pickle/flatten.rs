//! From the object in a checkpoint to named tensors.
//!
//! Dicts and lists flatten into dotted names. A wrapper around the weights (`state_dict`, `model`,
//! ...) is taken off when nothing but training state (optimizer, scheduler, random state) or plain
//! numbers stand beside it, so that names come out as they are stored inside.

use std::collections::HashSet;

use super::value::{Heap, Id, Value, View};
use crate::error::shorten;

/// Containers inside containers.
const MAX_DEPTH: usize = 64;
/// Bytes of one tensor name.
const MAX_NAME: usize = 4096;

const WRAPPERS: [&str; 5] = ["state_dict", "model_state_dict", "model", "net", "module"];
/// Parts of the keys under which trainers keep what is no weight.
const TRAINING_STATE: [&str; 5] = ["optim", "sched", "scaler", "rng", "random"];

/// All tensors under `heap.root`, in the order of the file.
pub(super) fn tensors<'h>(heap: &'h Heap<'_>) -> Result<Vec<(String, &'h View)>, String> {
    let root = unwrap(heap, heap.root);
    let mut walk = Walk {
        heap,
        // A value may be reached twice (tied weights, a dict saved under two keys), but a few
        // bytes of pickle must not unfold into millions of names.
        visits_left: 4 * heap.values.len() + 16,
        bytes_left: (1 << 20) + 64 * heap.values.len(),
        found: Vec::new(),
    };
    let mut path = String::new();
    walk.visit(root, &mut path, 0)?;
    let mut seen = HashSet::with_capacity(walk.found.len());
    for (name, _) in &walk.found {
        if !seen.insert(name.as_str()) {
            return Err(format!("two tensors are named \"{}\"", shorten(name)));
        }
    }
    if walk.found.is_empty() {
        return Err("holds no tensors".into());
    }
    Ok(walk.found)
}

fn unwrap(heap: &Heap<'_>, mut root: Id) -> Id {
    for _ in 0..WRAPPERS.len() {
        let Value::Dict(pairs) = heap.get(root) else { return root };
        let inner = pairs.iter().find(|&&(key, value)| {
            heap.text(key).is_some_and(|key| WRAPPERS.contains(&key))
                && matches!(heap.get(value), Value::Dict(_))
                && holds_tensors(heap, value)
                && pairs.iter().all(|&(other, beside)| {
                    other == key || training_state(heap, other) || !holds_tensors(heap, beside)
                })
        });
        match inner {
            Some(&(_, value)) => root = value,
            None => return root,
        }
    }
    root
}

fn training_state(heap: &Heap<'_>, key: Id) -> bool {
    heap.text(key)
        .map(str::to_ascii_lowercase)
        .is_some_and(|key| TRAINING_STATE.iter().any(|part| key.contains(part)))
}

fn holds_tensors(heap: &Heap<'_>, start: Id) -> bool {
    let mut seen = HashSet::new();
    let mut open = vec![start];
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        match heap.get(id) {
            Value::Tensor(_) => return true,
            Value::Dict(pairs) => open.extend(pairs.iter().map(|pair| pair.1)),
            Value::List(items) => open.extend(items),
            Value::Tuple(items) => open.extend(items.iter()),
            _ => {}
        }
    }
    false
}

struct Walk<'h, 'a> {
    heap: &'h Heap<'a>,
    visits_left: usize,
    bytes_left: usize,
    found: Vec<(String, &'h View)>,
}

impl<'h> Walk<'h, '_> {
    fn visit(&mut self, id: Id, path: &mut String, depth: usize) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("containers nest deeper than {MAX_DEPTH}"));
        }
        self.visits_left = (self.visits_left.checked_sub(1))
            .ok_or("the same containers are referred to over and over")?;
        let heap = self.heap;
        match heap.get(id) {
            Value::Tensor(view) => {
                let name = if path.is_empty() { "tensor" } else { path.as_str() };
                if name.len() > MAX_NAME {
                    return Err(format!("tensor name \"{}\" is too long", shorten(name)));
                }
                self.bytes_left = (self.bytes_left.checked_sub(name.len()))
                    .ok_or("tensor names repeat out of proportion to the file")?;
                self.found.push((name.to_owned(), view));
                Ok(())
            }
            Value::Dict(pairs) => {
                for &(key, value) in pairs {
                    let key = match heap.get(key) {
                        Value::Int(number) => number.to_string(),
                        _ => match heap.text(key) {
                            Some(text) => text.to_owned(),
                            // Keys of other types (tuples, objects) give no name.
                            None if holds_tensors(heap, value) => {
                                let place = shorten(path);
                                return Err(format!("a dict in \"{place}\" has unnamed tensors"));
                            }
                            None => continue,
                        },
                    };
                    self.child(value, &key, path, depth)?;
                }
                Ok(())
            }
            Value::List(items) => self.items(items, path, depth),
            Value::Tuple(items) => self.items(items, path, depth),
            _ => Ok(()),
        }
    }

    fn items(&mut self, items: &[Id], path: &mut String, depth: usize) -> Result<(), String> {
        for (index, &item) in items.iter().enumerate() {
            self.child(item, &index.to_string(), path, depth)?;
        }
        Ok(())
    }

    fn child(&mut self, id: Id, key: &str, path: &mut String, depth: usize) -> Result<(), String> {
        let length = path.len();
        // Long names are refused where a tensor carries them; here only their growth is stopped.
        if length <= MAX_NAME && key.len() <= MAX_NAME {
            if length > 0 {
                path.push('.');
            }
            path.push_str(key);
        } else if matches!(self.heap.get(id), Value::Tensor(_)) {
            return Err(format!("tensor name \"{}\" is too long", shorten(key)));
        }
        let result = self.visit(id, path, depth + 1);
        path.truncate(length);
        result
    }
}
