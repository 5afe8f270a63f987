//! Strict reading of the two JSON documents of the safetensors world: the header of a file and the
//! index of a sharded checkpoint. Unlike plain `serde_json`, a repeated key is an error (a reader
//! that takes the last one and a reader that takes the first one would see different models), and
//! an error knows which tensor it happened at.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// A tensor as a safetensors header describes it, not yet checked against anything.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RawTensor {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) offsets: [u64; 2],
}

/// Header of a safetensors file.
#[derive(Debug, Default)]
pub(crate) struct RawHeader {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: Vec<RawTensor>,
}

/// What went wrong and at which key of the outermost interesting object.
#[derive(Debug)]
pub(crate) struct JsonError {
    pub(crate) key: Option<String>,
    pub(crate) reason: String,
}

/// The key being read, kept outside the parser so that it survives an error.
type At = RefCell<Option<String>>;

/// Parses a safetensors header (surrounding whitespace allowed).
pub(crate) fn header(bytes: &[u8]) -> Result<RawHeader, JsonError> {
    run(bytes, |at, deserializer| deserializer.deserialize_map(HeaderVisitor { at }))
}

/// Parses an index: the pairs of `weight_map` in file order.
pub(crate) fn weight_map(bytes: &[u8]) -> Result<Vec<(String, String)>, JsonError> {
    run(bytes, |at, deserializer| deserializer.deserialize_map(IndexVisitor { at }))
}

type Parser<'a> = serde_json::Deserializer<serde_json::de::SliceRead<'a>>;

fn run<'a, T>(
    bytes: &'a [u8],
    parse: impl FnOnce(&At, &mut Parser<'a>) -> serde_json::Result<T>,
) -> Result<T, JsonError> {
    let at = RefCell::new(None);
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let outcome = parse(&at, &mut deserializer).and_then(|value| {
        deserializer.end()?;
        Ok(value)
    });
    outcome.map_err(|error| JsonError { key: at.take(), reason: error.to_string() })
}

struct HeaderVisitor<'a> {
    at: &'a At,
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            *self.at.borrow_mut() = Some(name.clone());
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom("appears twice in the header"));
            }
            if name == "__metadata__" {
                header.metadata = map
                    .next_value_seed(StringMap { at: None, what: "metadata" })?
                    .into_iter()
                    .collect();
            } else {
                header.tensors.push(map.next_value_seed(TensorSeed { name })?);
            }
            *self.at.borrow_mut() = None;
        }
        Ok(header)
    }
}

struct TensorSeed {
    name: String,
}

impl<'de> DeserializeSeed<'de> for TensorSeed {
    type Value = RawTensor;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawTensor, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed {
    type Value = RawTensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let repeated = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => shape.replace(map.next_value::<Vec<u64>>()?).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<[u64; 2]>()?).is_some(),
                other => {
                    let other = crate::error::shorten(other);
                    return Err(A::Error::custom(format!("has the unknown field \"{other}\"")));
                }
            };
            if repeated {
                return Err(A::Error::custom(format!("has the field \"{key}\" twice")));
            }
        }
        let missing = |field| A::Error::custom(format!("lacks the field \"{field}\""));
        Ok(RawTensor {
            name: self.name,
            dtype: dtype.ok_or_else(|| missing("dtype"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
            offsets: offsets.ok_or_else(|| missing("data_offsets"))?,
        })
    }
}

/// An object of strings without repeated keys, in file order.
struct StringMap<'a> {
    at: Option<&'a At>,
    what: &'static str,
}

impl<'de> DeserializeSeed<'de> for StringMap<'_> {
    type Value = Vec<(String, String)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for StringMap<'_> {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of strings ({})", self.what)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if let Some(at) = self.at {
                *at.borrow_mut() = Some(key.clone());
            }
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!(
                    "the key \"{}\" appears twice in the {}",
                    crate::error::shorten(&key),
                    self.what
                )));
            }
            pairs.push((key, map.next_value::<String>()?));
        }
        if let Some(at) = self.at {
            *at.borrow_mut() = None;
        }
        Ok(pairs)
    }
}

struct IndexVisitor<'a> {
    at: &'a At,
}

impl<'de> Visitor<'de> for IndexVisitor<'_> {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == "weight_map" {
                let seed = StringMap { at: Some(self.at), what: "weight_map" };
                if pairs.replace(map.next_value_seed(seed)?).is_some() {
                    return Err(A::Error::custom("has the field \"weight_map\" twice"));
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        pairs.ok_or_else(|| A::Error::custom("lacks the field \"weight_map\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_in_file_order() {
        let text = br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"shape":[],"dtype":"U8","data_offsets":[8,9]}}   "#;
        let header = header(text).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors[0].name, "b");
        assert_eq!(header.tensors[1].shape, [] as [u64; 0]);
        assert_eq!(header.tensors[1].offsets, [8, 9]);
    }

    #[test]
    fn errors_know_the_tensor() {
        for (text, reason) in [
            (r#"{"t":{"dtype":"F32","shape":[2]}}"#, "lacks the field"),
            (r#"{"t":{"dtype":"F32","dtype":"F32"}}"#, "twice"),
            (r#"{"t":{"dtype":"F32","extra":1}}"#, "unknown field"),
            (r#"{"t":["F32",[1],[0,4]]}"#, "invalid type"),
            (r#"{"t":{"dtype":"F32","shape":[-1]}}"#, "invalid value"),
            (r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,1,2]}}"#, "trailing"),
            (r#"{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":{}}"#, "appears twice"),
        ] {
            let error = header(text.as_bytes()).unwrap_err();
            assert_eq!(error.key.as_deref(), Some("t"), "{text}");
            assert!(error.reason.contains(reason), "{text}: {}", error.reason);
        }
    }

    #[test]
    fn deep_nesting_is_an_error() {
        for text in ["[".repeat(200_000), format!("{{\"t\":{}", "[".repeat(200_000))] {
            header(text.as_bytes()).unwrap_err();
            weight_map(text.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn index_pairs() {
        let text = br#"{"metadata":{"total_size":1},"weight_map":{"b":"x","a":"y"}}"#;
        let pairs = weight_map(text).unwrap();
        assert_eq!(pairs, [("b".into(), "x".into()), ("a".into(), "y".into())]);
        let error = weight_map(br#"{"weight_map":{"b":"x","b":"y"}}"#).unwrap_err();
        assert!(error.reason.contains("twice"));
        assert!(weight_map(b"{}").unwrap_err().reason.contains("lacks"));
    }
}
