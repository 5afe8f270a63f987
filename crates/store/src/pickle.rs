//! PyTorch files (`.pt`, `.pth`, `.bin`, `.th`): zip archives and the legacy format of `torch.save`,
//! read by an unpickler that knows a handful of harmless constructors and executes nothing.
//!
//! [`open`] gives the tensors of a file under flattened names. Contiguous tensors of stored entries
//! are mapped without a copy; strided views and deflated storages are made contiguous when read.
//! A pickle that calls anything else (`os.system`, a model class) is refused by that name.

mod archive;
mod calls;
mod flatten;
mod legacy;
mod machine;
mod value;
mod view;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use self::archive::Place;
use self::value::{Heap, Storage, width};
use self::view::Located;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::source::{Entry, Source, TensorInfo};

/// Longest `data.pkl` that is looked at; it holds names and shapes, not weights.
const MAX_PICKLE: usize = 256 << 20;

/// A tensor of a PyTorch file: description and place of its bytes.
#[derive(Debug, Clone)]
pub struct Parsed {
    /// Flattened name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    located: Located,
}

impl Parsed {
    /// The tensor's contiguous little-endian bytes, out of the whole file that it was parsed from.
    ///
    /// # Errors
    /// When a deflated storage is damaged.
    pub fn read(&self, file: &[u8]) -> std::result::Result<Vec<u8>, String> {
        if self.located.place.deflated {
            return self.located.gather(&self.located.place.read(file)?);
        }
        self.located.gather(self.located.slice(file))
    }
}

/// Opens a PyTorch file and describes its tensors; values are read when asked for.
///
/// # Errors
/// When the file is malformed, holds no tensors, or its pickle calls anything but the constructors
/// that tensors need; the message names what it calls.
pub fn open(file: &Path) -> Result<Vec<Entry>> {
    let handle = File::open(file).map_err(|e| Error::io(file, "open the file", e))?;
    // SAFETY: the map is only read; a file that another process truncates meanwhile can fault, as
    // with every memory-mapped checkpoint.
    let map = unsafe { Mmap::map(&handle) }.map_err(|e| Error::io(file, "map the file", e))?;
    let tensors = parse_bytes(&map, file)?;
    let map = Arc::new(map);
    // Views of one deflated storage share its bytes, once one of them is read.
    let mut views: HashMap<usize, usize> = HashMap::new();
    for tensor in &tensors {
        *views.entry(tensor.located.place.start).or_default() += 1;
    }
    let mut caches: HashMap<usize, Cache> = HashMap::new();
    let entries = tensors.into_iter().map(|tensor| {
        let nbytes = (tensor.located.elements() * tensor.located.width) as u64;
        let info = TensorInfo {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            file: file.to_path_buf(),
            nbytes,
        };
        let source = match tensor.located.as_stored() {
            Some((start, len)) => Source::Map { map: Arc::clone(&map), start, len },
            None => {
                let place = tensor.located.place;
                let shared = place.deflated && views.get(&place.start).is_some_and(|&n| n > 1);
                let cache = shared.then(|| Arc::clone(caches.entry(place.start).or_default()));
                lazy(tensor, Arc::clone(&map), cache, file)
            }
        };
        Entry { info, source }
    });
    Ok(entries.collect())
}

type Cache = Arc<OnceLock<Vec<u8>>>;

fn lazy(tensor: Parsed, map: Arc<Mmap>, cache: Option<Cache>, file: &Path) -> Source {
    let file = file.to_path_buf();
    Source::Lazy(Arc::new(move || {
        let fault = |reason: String| Error::tensor(&file, &tensor.name, reason);
        let Some(cache) = &cache else { return tensor.read(&map).map_err(fault) };
        let storage = match cache.get() {
            Some(storage) => storage,
            None => {
                let storage = tensor.located.place.read(&map).map_err(fault)?;
                cache.get_or_init(|| storage)
            }
        };
        tensor.located.gather(storage).map_err(fault)
    }))
}

/// Describes the tensors in `bytes`, the whole contents of `file` (a name for messages only).
///
/// # Errors
/// As [`open`].
pub fn parse_bytes(bytes: &[u8], file: &Path) -> Result<Vec<Parsed>> {
    parse(bytes).map_err(|fault| match fault {
        Fault::File(reason) => Error::file(file, reason),
        Fault::Tensor(name, reason) => Error::tensor(file, &name, reason),
    })
}

enum Fault {
    File(String),
    Tensor(String, String),
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self::File(reason)
    }
}

/// What either container holds: the unpickled object and where storages lie.
struct Object<'a> {
    heap: Heap<'a>,
    places: HashMap<String, Place>,
    /// Whether storages are big-endian.
    swap: bool,
}

fn parse(bytes: &[u8]) -> std::result::Result<Vec<Parsed>, Fault> {
    if !archive::is_zip(bytes) {
        return locate(&legacy::parse(bytes)?);
    }
    let entries = archive::directory(bytes)?;
    let folder = folder(&entries)?;
    let entry = |name: &str| entries.get(format!("{folder}{name}").as_str());
    let Some(place) = entry("data.pkl").filter(|place| place.len <= MAX_PICKLE) else {
        return Err(format!("data.pkl is larger than {MAX_PICKLE} bytes").into());
    };
    let unpacked;
    let pickle = if place.deflated {
        unpacked = place.read(bytes).map_err(|reason| format!("data.pkl {reason}"))?;
        unpacked.as_slice()
    } else {
        &bytes[place.start..place.start + place.len]
    };
    let heap = machine::load(pickle, &mut 0).map_err(|reason| match entry("constants.pkl") {
        Some(_) => "is a TorchScript archive; save model.state_dict() with torch.save".to_owned(),
        None => reason,
    })?;
    let swap = match entry("byteorder") {
        None => false,
        Some(place) if place.len <= 16 => match place.read(bytes)?.trim_ascii() {
            b"little" => false,
            b"big" => true,
            _ => return Err("names an unknown byte order".to_owned().into()),
        },
        Some(_) => return Err("names an unknown byte order".to_owned().into()),
    };
    let data = format!("{folder}data/");
    let places = entries
        .iter()
        .filter_map(|(name, place)| Some((name.strip_prefix(&data)?.to_owned(), *place)))
        .collect();
    locate(&Object { heap, places, swap })
}

/// The folder of the archive that holds `data.pkl`, with its slash.
fn folder<'a>(entries: &HashMap<&'a str, Place>) -> std::result::Result<&'a str, String> {
    let mut folders: Vec<&str> = entries
        .keys()
        .filter_map(|name| name.strip_suffix("data.pkl"))
        .filter(|folder| folder.is_empty() || folder.ends_with('/'))
        .collect();
    folders.sort_by_key(|folder| folder.len());
    match folders[..] {
        [folder] => Ok(folder),
        [] => Err("is a zip archive without data.pkl, so no file of torch.save".into()),
        _ => Err("is a zip archive with more than one data.pkl".into()),
    }
}

fn locate(object: &Object<'_>) -> std::result::Result<Vec<Parsed>, Fault> {
    let tensors = flatten::tensors(&object.heap)?;
    let mut parsed = Vec::with_capacity(tensors.len());
    for (name, view) in tensors {
        let place = match find(object, &view.storage) {
            Ok(place) => place,
            Err(reason) => return Err(Fault::Tensor(name, reason)),
        };
        let located = Located {
            place,
            width: width(view.dtype),
            offset: view.offset,
            shape: view.shape.clone(),
            strides: view.strides.clone(),
            swap: object.swap,
        };
        parsed.push(Parsed { name, dtype: view.dtype, shape: view.shape.clone(), located });
    }
    Ok(parsed)
}

/// The bytes of a storage, which must be exactly as many as the pickle says.
fn find(object: &Object<'_>, storage: &Storage) -> std::result::Result<Place, String> {
    let key = crate::error::shorten(&storage.key);
    let want = storage.count.checked_mul(storage.width()).ok_or("has an impossible size")?;
    match object.places.get(&storage.key) {
        Some(place) if place.len == want => Ok(*place),
        Some(place) => {
            Err(format!("its storage {key} has {} bytes; the pickle says {want}", place.len))
        }
        // Nothing is stored for a storage of no elements by some writers.
        None if want == 0 => Ok(Place::stored(0, 0)),
        None => Err(format!("its storage {key} is missing from the file")),
    }
}
