//! Paths that users type: a missing one is answered with the nearest that exists.

use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};

/// Checks that `path` exists; `what` names it in the message (`model`, `recipe`, ...).
pub fn existing(what: &str, path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut message = format!("{what} {} does not exist", path.display());
    if let Some(near) = nearest(path) {
        message.push_str(&format!("; did you mean {}?", near.display()));
    } else if what == "model" {
        message.push_str("; give a model directory, or a .safetensors, .bin, .pt or .gguf file");
    }
    Err(Failure::error(message))
}

/// The path with its first missing component replaced by the nearest existing name, if that whole
/// path exists then.
fn nearest(path: &Path) -> Option<PathBuf> {
    let mut base = PathBuf::new();
    let mut components = path.components();
    for component in components.by_ref() {
        let next = base.join(component);
        if next.exists() {
            base = next;
            continue;
        }
        let wrong = component.as_os_str().to_str()?;
        let directory = if base.as_os_str().is_empty() { Path::new(".") } else { base.as_path() };
        let names: Vec<String> = std::fs::read_dir(directory)
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .take(10_000)
            .collect();
        let found = base.join(method::nearest(wrong, names.iter().map(String::as_str))?);
        let whole = found.join(components.as_path());
        return Some(if components.as_path().as_os_str().is_empty() || !whole.exists() {
            found
        } else {
            whole
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_path_is_offered() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("samples/almanac-3m")).unwrap();
        let right = root.path().join("samples/almanac-3m");
        assert_eq!(nearest(&root.path().join("samples/almanc-3m")), Some(right.clone()));
        assert_eq!(nearest(&root.path().join("sample/almanac-3m")), Some(right.clone()));
        assert_eq!(nearest(&root.path().join("zzz")), None);
        assert!(existing("model", &right).is_ok());
    }
}
