//! What a pickle can hold here: plain data, storages and tensor views. Values live in one list and
//! refer to each other by index, so that neither depth nor cycles can overflow the call stack.

use std::borrow::Cow;

use crate::dtype::Dtype;

/// Index of a value in its [`Heap`].
pub(super) type Id = u32;

/// A value of the pickle.
#[derive(Debug, Clone)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer that needs up to 128 bits (the magic number of the legacy format does).
    Wide(Box<i128>),
    Text(Cow<'a, str>),
    Bytes(Cow<'a, [u8]>),
    Tuple(Box<[Id]>),
    List(Vec<Id>),
    Set,
    Dict(Vec<(Id, Id)>),
    /// A name that the pickle mentions; never looked up, let alone called.
    Global(Box<Global<'a>>),
    Storage(Box<Storage>),
    Tensor(Box<View>),
    /// A number or the result of a harmless constructor whose content does not matter here.
    Opaque,
}

impl Value<'_> {
    /// Bytes on the heap behind the value, roughly.
    pub(super) fn payload(&self) -> usize {
        let owned_text = |text: &Cow<'_, str>| match text {
            Cow::Owned(text) => text.len(),
            Cow::Borrowed(_) => 0,
        };
        match self {
            Self::Text(text) => owned_text(text),
            Self::Bytes(Cow::Owned(bytes)) => bytes.len(),
            Self::Tuple(items) => 4 * items.len(),
            Self::List(items) => 4 * items.len(),
            Self::Dict(pairs) => 8 * pairs.len(),
            Self::Global(global) => 48 + owned_text(&global.module) + owned_text(&global.name),
            Self::Storage(storage) => 80 + storage.key.len(),
            Self::Tensor(view) => 160 + view.storage.key.len() + 16 * view.shape.len(),
            _ => 0,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Global<'a> {
    pub module: Cow<'a, str>,
    pub name: Cow<'a, str>,
}

impl std::fmt::Display for Global<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", crate::error::shorten(&self.module), crate::error::shorten(&self.name))
    }
}

/// A run of elements that tensors share, known by key until its bytes are located.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    pub key: String,
    /// `None` for untyped storages, which count in bytes.
    pub dtype: Option<Dtype>,
    /// Elements of the whole storage.
    pub count: usize,
    /// First element and number of elements of a storage that is a window of another (legacy).
    pub window: Option<(usize, usize)>,
}

impl Storage {
    /// Bytes of one element.
    pub(super) fn width(&self) -> usize {
        self.dtype.map_or(1, width)
    }
}

/// Bytes of one element of the plain types that PyTorch has.
pub(super) fn width(dtype: Dtype) -> usize {
    dtype.bytes_for(1).map_or(1, |bytes| bytes as usize)
}

/// A tensor: a strided view of a storage.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub storage: Storage,
    pub dtype: Dtype,
    /// First element, in elements of `dtype` from the start of the storage (window included).
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
}

/// All values of one pickle and the one it stands for.
#[derive(Debug)]
pub(super) struct Heap<'a> {
    pub values: Vec<Value<'a>>,
    pub root: Id,
}

impl<'a> Heap<'a> {
    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        // Ids are only made by the interpreter; the fallback keeps this total.
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            Value::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }
}
