//! Metadata of a GGUF file: typed values by key, and the tokenizer's part of them by name.

use std::collections::BTreeMap;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned 8-bit integer.
    U8(u8),
    /// Signed 8-bit integer.
    I8(i8),
    /// Unsigned 16-bit integer.
    U16(u16),
    /// Signed 16-bit integer.
    I16(i16),
    /// Unsigned 32-bit integer.
    U32(u32),
    /// Signed 32-bit integer.
    I32(i32),
    /// IEEE single.
    F32(f32),
    /// Truth value.
    Bool(bool),
    /// Text; bytes that are not UTF-8 have become U+FFFD.
    String(String),
    /// Values of one type.
    Array(Array),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Signed 64-bit integer.
    I64(i64),
    /// IEEE double.
    F64(f64),
}

/// An array of metadata values, all of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Unsigned 8-bit integers.
    U8(Vec<u8>),
    /// Signed 8-bit integers.
    I8(Vec<i8>),
    /// Unsigned 16-bit integers.
    U16(Vec<u16>),
    /// Signed 16-bit integers.
    I16(Vec<i16>),
    /// Unsigned 32-bit integers.
    U32(Vec<u32>),
    /// Signed 32-bit integers.
    I32(Vec<i32>),
    /// IEEE singles.
    F32(Vec<f32>),
    /// Truth values.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays of arrays.
    Array(Vec<Array>),
    /// Unsigned 64-bit integers.
    U64(Vec<u64>),
    /// Signed 64-bit integers.
    I64(Vec<i64>),
    /// IEEE doubles.
    F64(Vec<f64>),
}

impl Array {
    /// Number of elements of the outermost level.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::Array(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F64(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as unsigned integers, when they all are.
    pub fn integers(&self) -> Option<Vec<u64>> {
        fn all<T: Copy + TryInto<u64>>(values: &[T]) -> Option<Vec<u64>> {
            values.iter().map(|&v| v.try_into().ok()).collect()
        }
        match self {
            Self::U8(v) => all(v),
            Self::I8(v) => all(v),
            Self::U16(v) => all(v),
            Self::I16(v) => all(v),
            Self::U32(v) => all(v),
            Self::I32(v) => all(v),
            Self::U64(v) => all(v),
            Self::I64(v) => all(v),
            _ => None,
        }
    }
}

/// All metadata of a file, sorted by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Adds a value; false when the key was there already.
    pub(super) fn insert(&mut self, key: String, value: Value) -> bool {
        match self.values.entry(key) {
            std::collections::btree_map::Entry::Occupied(_) => false,
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(value);
                true
            }
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// Keys and values in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A text; `None` when the key is absent or holds something else (so for all getters).
    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A non-negative integer of any stored width.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A non-negative integer of any stored width that fits 32 bits.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.get_u64(key)?.try_into().ok()
    }

    /// A floating-point number of either width, rounded to single.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        match *self.get(key)? {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match *self.get(key)? {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array of any type.
    pub fn get_array(&self, key: &str) -> Option<&Array> {
        match self.get(key)? {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }

    /// An array of texts.
    pub fn get_strings(&self, key: &str) -> Option<&[String]> {
        match self.get_array(key)? {
            Array::String(texts) => Some(texts),
            _ => None,
        }
    }

    /// An array of singles.
    pub fn get_f32s(&self, key: &str) -> Option<&[f32]> {
        match self.get_array(key)? {
            Array::F32(values) => Some(values),
            _ => None,
        }
    }

    /// An array of signed 32-bit integers.
    pub fn get_i32s(&self, key: &str) -> Option<&[i32]> {
        match self.get_array(key)? {
            Array::I32(values) => Some(values),
            _ => None,
        }
    }

    /// `general.architecture` ("llama", "qwen2", ...).
    pub fn architecture(&self) -> Option<&str> {
        self.get_str("general.architecture")
    }

    /// The vocabulary, when the file carries one.
    pub fn tokenizer(&self) -> Option<Tokenizer<'_>> {
        let id = |name: &str| self.get_u32(&format!("tokenizer.ggml.{name}_token_id"));
        let flag = |name: &str| self.get_bool(&format!("tokenizer.ggml.{name}"));
        Some(Tokenizer {
            model: self.get_str("tokenizer.ggml.model")?,
            pre: self.get_str("tokenizer.ggml.pre"),
            tokens: self.get_strings("tokenizer.ggml.tokens")?,
            scores: self.get_f32s("tokenizer.ggml.scores"),
            types: self.get_i32s("tokenizer.ggml.token_type"),
            merges: self.get_strings("tokenizer.ggml.merges"),
            bos: id("bos"),
            eos: id("eos"),
            unknown: id("unknown"),
            padding: id("padding"),
            add_bos: flag("add_bos_token"),
            add_eos: flag("add_eos_token"),
            add_space_prefix: flag("add_space_prefix"),
            chat_template: self.get_str("tokenizer.chat_template"),
        })
    }
}

/// What a file says about its tokenizer, as stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tokenizer<'a> {
    /// "llama" (sentencepiece with scores), "gpt2" (byte-level BPE with merges), ...
    pub model: &'a str,
    /// Name of the pre-tokenisation rule of byte-level BPE ("llama-bpe", "qwen2", ...).
    pub pre: Option<&'a str>,
    /// Token texts by id.
    pub tokens: &'a [String],
    /// Scores by id (sentencepiece).
    pub scores: Option<&'a [f32]>,
    /// Kinds by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub types: Option<&'a [i32]>,
    /// BPE merges, "left right", best first.
    pub merges: Option<&'a [String]>,
    /// Beginning-of-sequence id.
    pub bos: Option<u32>,
    /// End-of-sequence id.
    pub eos: Option<u32>,
    /// Unknown-token id.
    pub unknown: Option<u32>,
    /// Padding id.
    pub padding: Option<u32>,
    /// Whether encoding starts with the beginning-of-sequence token.
    pub add_bos: Option<bool>,
    /// Whether encoding ends with the end-of-sequence token.
    pub add_eos: Option<bool>,
    /// Whether a space goes before the text (sentencepiece).
    pub add_space_prefix: Option<bool>,
    /// Jinja template of a chat.
    pub chat_template: Option<&'a str>,
}
