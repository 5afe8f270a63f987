//! Small file-system duties that must not be half done: writing a file atomically, syncing a
//! directory, hashing a file.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Writes `bytes` to `path` so that a reader (or a crash) sees the old content or the new, never a
/// mixture: temporary file in the same directory, fsync, rename, fsync of the directory.
///
/// # Errors
/// When the directory does not exist or cannot be written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| file.write_all(bytes).map_err(|e| Error::io(path, "write", e)))
}

/// Copies the content of `from` to `path` the same way, without holding it in memory.
pub(crate) fn copy_atomic(from: &Path, path: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(|e| Error::io(from, "open", e))?;
    replace(path, |file| {
        std::io::copy(&mut source, file)
            .map(|_| ())
            .map_err(|e| Error::io(from, format!("copy to {}", path.display()), e))
    })
}

/// Puts what `fill` writes into a temporary file in the place of `path`.
pub(crate) fn replace<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&mut File) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let directory = parent(path);
    let mut temporary = tempfile::Builder::new()
        .prefix(".strata-")
        .suffix(".tmp")
        .tempfile_in(&directory)
        .map_err(|e| Error::io(&directory, "create a temporary file in", e))?;
    fill(temporary.as_file_mut())?;
    temporary.as_file().sync_all().map_err(|e| Error::io(path, "sync", e))?;
    set_ordinary_mode(temporary.as_file()).map_err(|e| Error::io(path, "set the mode of", e))?;
    temporary.persist(path).map_err(|e| Error::io(path, "rename into place", e.error))?;
    Ok(sync_directory(&directory)?)
}

/// Temporary files are private (0600); a result should be readable as any new file is.
#[cfg(unix)]
fn set_ordinary_mode(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_ordinary_mode(_: &File) -> std::io::Result<()> {
    Ok(())
}

/// Directory of a path; the current directory for a bare file name.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Makes renames and new names in a directory durable (a no-op where directories cannot be opened).
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    if cfg!(unix) {
        let directory = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        directory.sync_all().map_err(|e| Error::io(path, "sync", e))?;
    }
    Ok(())
}

/// SHA-256 of a file's content, as 64 lower-case hexadecimal digits.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(|e| Error::io(path, "read", e))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of bytes in memory, in hexadecimal.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_and_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"abc").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_file(&path).unwrap(), expected);
        assert_eq!(sha256_bytes(b"abc"), expected);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file left");
    }

    #[test]
    fn missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_atomic(&dir.path().join("no/such/a.txt"), b"x").unwrap_err();
        assert!(error.to_string().contains("no/such"), "{error}");
    }
}
