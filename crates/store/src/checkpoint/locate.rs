//! From a path to validated tensor entries: which files make up a checkpoint, and whether an index
//! tells the truth about them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use super::Container;
use crate::atomic::parent;
use crate::error::{Error, Result};
use crate::source::Entry;
use crate::{gguf, pickle, safetensors};

/// What was found at a path.
pub(super) struct Found {
    pub(super) directory: PathBuf,
    pub(super) container: Container,
    pub(super) entries: Vec<Entry>,
    pub(super) gguf: Option<gguf::Gguf>,
}

const INDEX_SUFFIX: &str = ".index.json";
/// PyTorch files that stand in model directories but hold no weights.
const NOT_WEIGHTS: [&str; 5] = ["training_args", "optimizer", "scheduler", "rng_state", "scaler"];

/// Finds and opens the files behind `path`.
pub(super) fn find(path: &Path) -> Result<Found> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing(path)),
        Err(e) => return Err(Error::io(path, "inspect", e)),
    };
    if meta.is_dir() { find_in_directory(path) } else { find_file(path) }
}

fn missing(path: &Path) -> Error {
    let error = Error::not_found(path, "no such file or directory");
    let directory = parent(path);
    let wanted = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if !directory.is_dir() {
        return error.with_remedy(format!("{} does not exist either", directory.display()));
    }
    let names = list(&directory).unwrap_or_default();
    match nearest(&wanted, names.iter().map(String::as_str)) {
        Some(near) => {
            error.with_remedy(format!("did you mean {}?", directory.join(near).display()))
        }
        None => error.with_remedy("check the path"),
    }
}

/// The known name nearest to `wanted`, if it is near at all.
pub(super) fn nearest<'a>(
    wanted: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let best = known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .min_by_key(|(distance, _)| *distance)?;
    let limit = (wanted.chars().count() / 3).max(2);
    (best.0 <= limit).then_some(best.1)
}

/// Sorted file names of a directory.
fn list(directory: &Path) -> Result<Vec<String>> {
    let read = fs::read_dir(directory).map_err(|e| Error::io(directory, "list", e))?;
    let mut names = Vec::new();
    for entry in read {
        let entry = entry.map_err(|e| Error::io(directory, "list", e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn extension(name: &str) -> String {
    Path::new(name).extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn is_pickle_name(name: &str) -> bool {
    ["bin", "pt", "pth", "th", "ckpt"].contains(&extension(name).as_str())
        && !NOT_WEIGHTS.iter().any(|stem| name.starts_with(stem))
}

fn find_in_directory(directory: &Path) -> Result<Found> {
    let names = list(directory)?;
    let has = |name: &str| names.iter().any(|n| n == name);
    let with =
        |test: &dyn Fn(&str) -> bool| names.iter().filter(|n| test(n)).cloned().collect::<Vec<_>>();

    let safetensors = with(&|n| extension(n) == "safetensors");
    let safetensors_index = with(&|n| n.ends_with(".safetensors.index.json"));
    if let Some(found) = pick(
        directory,
        Container::Safetensors,
        has("model.safetensors").then_some("model.safetensors"),
        has("model.safetensors.index.json").then_some("model.safetensors.index.json"),
        &safetensors,
        &safetensors_index,
    )? {
        return Ok(found);
    }
    let pickles = with(&|n| is_pickle_name(n));
    let pickle_index = with(&|n| n.ends_with(".bin.index.json"));
    if let Some(found) = pick(
        directory,
        Container::Pickle,
        has("pytorch_model.bin").then_some("pytorch_model.bin"),
        has("pytorch_model.bin.index.json").then_some("pytorch_model.bin.index.json"),
        &pickles,
        &pickle_index,
    )? {
        return Ok(found);
    }
    let ggufs = with(&|n| extension(n) == "gguf");
    if let Some(found) = pick(directory, Container::Gguf, None, None, &ggufs, &[])? {
        return Ok(found);
    }
    Err(no_weights(directory, &names))
}

fn no_weights(directory: &Path, names: &[String]) -> Error {
    let foreign = names.iter().find(|n| {
        ["h5", "msgpack", "onnx", "tflite", "ot", "npz"].contains(&extension(n).as_str())
    });
    let remedy = "Strata reads *.safetensors, pytorch_model*.bin, *.pt, *.pth and *.gguf";
    let reason = match foreign {
        Some(name) => format!("holds no weights that Strata reads (only {name})"),
        None if names.iter().any(|n| n == "config.json") => {
            "has a config.json but no weights".to_string()
        }
        None if names.is_empty() => "is an empty directory".to_string(),
        None => "is a directory without weights".to_string(),
    };
    Error::not_found(directory, reason).with_remedy(remedy)
}

/// Chooses among the weight files of one kind: the standard single file, the standard index, any
/// one index, any one file, or a complete numbered set. `None` when there is no file of that kind.
fn pick(
    directory: &Path,
    container: Container,
    single: Option<&str>,
    index: Option<&str>,
    files: &[String],
    indexes: &[String],
) -> Result<Option<Found>> {
    if let Some(name) = single {
        return open_files(directory, container, &[name.to_string()]).map(Some);
    }
    if let Some(name) = index {
        return open_index(directory, container, name).map(Some);
    }
    match (indexes, files) {
        ([name], _) => return open_index(directory, container, name).map(Some),
        ([], []) => return Ok(None),
        _ => {}
    }
    match (numbered_set(files), files) {
        (Some(Ok(set)), _) => open_files(directory, container, &set).map(Some),
        (Some(Err(absent)), _) => {
            Err(Error::not_found(&directory.join(absent), "this shard is missing")
                .with_remedy("download the complete set of shards, or give one file"))
        }
        (None, [name]) => open_files(directory, container, std::slice::from_ref(name)).map(Some),
        (None, names) => {
            let reason = format!("holds several weight files and no index: {}", names.join(", "));
            Err(Error::file(directory, reason).with_remedy("give one of the files"))
        }
    }
}

/// `stem-00001-of-00003.ext`, complete (`Ok`, in order) or with a missing member (`Err`).
fn numbered_set(names: &[String]) -> Option<std::result::Result<Vec<String>, String>> {
    let mut key: Option<(String, String, String)> = None;
    for name in names {
        let (head, tail) = name.rsplit_once("-of-")?;
        let (stem, number) = head.rsplit_once('-')?;
        let (total, ext) = tail.split_once('.')?;
        number.parse::<usize>().ok()?;
        let this = (stem.to_string(), total.to_string(), ext.to_string());
        if key.get_or_insert_with(|| this.clone()) != &this {
            return None;
        }
    }
    let (stem, total, ext) = key?;
    let count: usize = total.parse().ok()?;
    // A hostile count must not make us loop: at most one name more than there are files is needed.
    for i in 1..=count.min(names.len() + 1) {
        let name = format!("{stem}-{i:0width$}-of-{total}.{ext}", width = total.len());
        if !names.contains(&name) {
            return Some(Err(name));
        }
    }
    Some(Ok(names.to_vec()))
}

fn open_files(directory: &Path, container: Container, names: &[String]) -> Result<Found> {
    let mut found =
        Found { directory: directory.to_path_buf(), container, entries: Vec::new(), gguf: None };
    for name in names {
        add_file(&mut found, &directory.join(name))?;
    }
    Ok(found)
}

fn add_file(found: &mut Found, path: &Path) -> Result<()> {
    match found.container {
        Container::Safetensors => found.entries.extend(safetensors::open(path)?),
        Container::Pickle => found.entries.extend(pickle::open(path)?),
        Container::Gguf => {
            let mut file = gguf::open(path)?;
            found.entries.append(&mut file.entries);
            found.gguf = Some(file);
        }
    }
    Ok(())
}

fn find_file(path: &Path) -> Result<Found> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let directory = parent(path);
    if let Some(stem) = name.strip_suffix(INDEX_SUFFIX) {
        let container = if extension(stem) == "safetensors" {
            Container::Safetensors
        } else {
            Container::Pickle
        };
        return open_index(&directory, container, &name);
    }
    if name == "config.json" {
        return Err(Error::file(path, "is the configuration, not the weights")
            .with_remedy(format!("give the directory {}", directory.display())));
    }
    let container = match sniff(path)? {
        Some(container) => container,
        None => match extension(&name).as_str() {
            "safetensors" => Container::Safetensors,
            "gguf" => Container::Gguf,
            _ if is_pickle_name(&name) => Container::Pickle,
            _ => {
                return Err(Error::file(path, "is not a weight file of a known kind").with_remedy(
                    "Strata reads .safetensors, .pt, .pth, .bin, .th and .gguf files",
                ));
            }
        },
    };
    let mut found = Found { directory, container, entries: Vec::new(), gguf: None };
    add_file(&mut found, path)?;
    Ok(found)
}

/// The container by its first bytes, where they are unmistakable.
fn sniff(path: &Path) -> Result<Option<Container>> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    file.take(9).read_to_end(&mut head).map_err(|e| Error::io(path, "read", e))?;
    Ok(if head.starts_with(b"GGUF") {
        Some(Container::Gguf)
    } else if head.starts_with(b"PK\x03\x04") {
        Some(Container::Pickle)
    } else if head.get(8) == Some(&b'{') && head.get(5..8) == Some(&[0, 0, 0]) {
        Some(Container::Safetensors)
    } else {
        None
    })
}

/// Largest index that is read: as large as the largest header.
const MAX_INDEX: u64 = safetensors::MAX_HEADER;

/// Opens the shards of an index and checks that both agree on who holds what.
fn open_index(directory: &Path, container: Container, index_name: &str) -> Result<Found> {
    let index = directory.join(index_name);
    let length = fs::metadata(&index).map_err(|e| Error::io(&index, "inspect", e))?.len();
    if length > MAX_INDEX {
        return Err(Error::file(&index, format!("{length} bytes are too many for an index")));
    }
    let text = fs::read(&index).map_err(|e| Error::io(&index, "read", e))?;
    let pairs = safetensors::parse_index(&index, &text)?;
    // Shard -> tensors it should hold, in the order of shard names.
    let mut shards: BTreeMap<&str, HashSet<&str>> = BTreeMap::new();
    for (name, shard) in &pairs {
        shards.entry(shard).or_default().insert(name);
    }
    let mut found = open_files(directory, container, &[])?;
    let mut holder: HashMap<String, PathBuf> = HashMap::new();
    for (shard, listed) in shards {
        // Any listed tensor serves to say where the bad name stands; take the first by name.
        let witness = listed.iter().min().copied().unwrap_or_default();
        let path = shard_path(directory, &index, shard, witness)?;
        let before = found.entries.len();
        add_file(&mut found, &path)?;
        let mut unseen = listed;
        for entry in found.entries.get(before..).unwrap_or_default() {
            let name = &entry.info.name;
            if let Some(other) = holder.insert(name.clone(), path.clone()) {
                let reason = format!("is also in {}", other.display());
                return Err(Error::tensor(&path, name, reason)
                    .with_remedy("every tensor must stand in exactly one shard"));
            }
            if !unseen.remove(name.as_str()) {
                let reason = format!("is in the shard, but {index_name} does not list it there");
                return Err(Error::tensor(&path, name, reason).with_remedy(
                    "the index does not belong to these shards; download both again",
                ));
            }
        }
        if let Some(name) = unseen.iter().min() {
            let reason = format!("{index_name} lists it here, but the shard does not hold it");
            return Err(Error::tensor(&path, name, reason)
                .with_remedy("the index does not belong to these shards; download both again"));
        }
    }
    Ok(found)
}

/// Path of a shard named by an index, refused when it leaves the directory.
fn shard_path(directory: &Path, index: &Path, shard: &str, tensor: &str) -> Result<PathBuf> {
    let shown = crate::error::shorten(shard);
    let relative = Path::new(shard);
    let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
    // Backslashes and drive letters would be separators on another system.
    if shard.is_empty() || !plain || shard.contains(['\\', '\0']) || shard.contains(':') {
        let reason = format!("the index places it in \"{shown}\", outside the directory");
        return Err(Error::tensor(index, tensor, reason)
            .with_remedy("shards must be files beside the index"));
    }
    let path = directory.join(relative);
    let real = match fs::canonicalize(&path) {
        Ok(real) => real,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let reason = format!("the shard \"{shown}\" that should hold it is missing");
            return Err(Error::tensor(index, tensor, reason)
                .with_remedy("download the complete set of shards"));
        }
        Err(e) => return Err(Error::io(&path, "resolve", e)),
    };
    let root = fs::canonicalize(directory).map_err(|e| Error::io(directory, "resolve", e))?;
    if !real.starts_with(&root) && !in_hub_cache(&root, &real) {
        let reason =
            format!("the shard \"{shown}\" is a link to {}, outside the directory", real.display());
        return Err(
            Error::tensor(index, tensor, reason).with_remedy("replace the link by the file itself")
        );
    }
    if !real.is_file() {
        let reason = format!("the shard \"{shown}\" that should hold it is not a file");
        return Err(Error::tensor(index, tensor, reason));
    }
    Ok(path)
}

/// The Hugging Face cache keeps `snapshots/<revision>/*` as links into the `blobs` beside it.
fn in_hub_cache(root: &Path, real: &Path) -> bool {
    let Some(snapshots) = root.parent().filter(|p| p.ends_with("snapshots")) else { return false };
    snapshots.parent().is_some_and(|repository| real.starts_with(repository.join("blobs")))
}
