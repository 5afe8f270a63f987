//! Sentencepiece models (`tokenizer.model`): a small protobuf reader and the conversion to the JSON
//! of a `tokenizer.json`.
//!
//! A BPE model lists pieces with scores and no merges. A merge of two pieces is possible when their
//! concatenation is a piece; the better its score, the earlier it is applied. That gives the merge
//! list back, the way the usual converters do it.

use super::convert::{added_token, marks};
use super::ids::Configs;
use serde_json::{Value, json};
use std::collections::HashMap;

type Parsed<T> = std::result::Result<T, String>;

/// What a piece of the vocabulary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    pub(super) fn from_number(number: u64) -> Option<Kind> {
        Some(match number {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => return None,
        })
    }
}

/// A piece of the vocabulary; its id is its place in the list.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Unigram,
    Bpe,
}

/// A sentencepiece model.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub pieces: Vec<Piece>,
    pub algorithm: Algorithm,
    pub byte_fallback: bool,
    pub unknown: i64,
    pub begin: i64,
    pub end: i64,
    pub charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub escape_whitespaces: bool,
}

impl Default for Model {
    /// The format's defaults for fields that are absent.
    fn default() -> Self {
        Self {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            unknown: 0,
            begin: 1,
            end: 2,
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

/// One field of a protobuf message.
enum Field<'a> {
    Number(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

/// Walks the fields of a protobuf message.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Parsed<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or("the file ends within a number")?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number of more than 64 bits".into())
    }

    fn bytes(&mut self, length: u64) -> Parsed<&'a [u8]> {
        let (bytes, rest) = usize::try_from(length)
            .ok()
            .and_then(|n| self.rest.split_at_checked(n))
            .ok_or_else(|| format!("a field of {length} bytes goes past the end"))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn next(&mut self) -> Parsed<Option<(u64, Field<'a>)>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => {
                self.bytes(8)?;
                Field::Other
            }
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.bytes(length)?)
            }
            5 => {
                let bytes = self.bytes(4)?;
                Field::Fixed32(bytes.try_into().map_err(|_| "a short number")?)
            }
            wire => return Err(format!("wire type {wire} is not protobuf of this format")),
        };
        Ok(Some((tag >> 3, field)))
    }
}

impl Model {
    /// Reads a `ModelProto`.
    pub(super) fn parse(bytes: &[u8]) -> Parsed<Self> {
        let wrong = |what: String| format!("not a sentencepiece model: {what}");
        let model = Self::parse_fields(bytes).map_err(wrong)?;
        model.validate().map_err(wrong)?;
        Ok(model)
    }

    fn parse_fields(bytes: &[u8]) -> Parsed<Self> {
        let mut model = Self::default();
        let mut fields = Fields { rest: bytes };
        while let Some((number, field)) = fields.next()? {
            match (number, field) {
                (1, Field::Bytes(piece)) => {
                    let id = model.pieces.len();
                    model.pieces.push(parse_piece(piece).map_err(|m| format!("piece {id}: {m}"))?);
                }
                (2, Field::Bytes(spec)) => model.trainer(spec)?,
                (3, Field::Bytes(spec)) => model.normalizer(spec)?,
                _ => {}
            }
        }
        Ok(model)
    }

    fn trainer(&mut self, bytes: &[u8]) -> Parsed<()> {
        let mut fields = Fields { rest: bytes };
        while let Some((number, field)) = fields.next()? {
            let Field::Number(value) = field else { continue };
            match number {
                3 => {
                    self.algorithm = match value {
                        1 => Algorithm::Unigram,
                        2 => Algorithm::Bpe,
                        3 => return Err("word models are not read (only unigram and BPE)".into()),
                        4 => {
                            return Err(
                                "character models are not read (only unigram and BPE)".into()
                            );
                        }
                        other => return Err(format!("unknown model type {other}")),
                    }
                }
                24 if value != 0 => {
                    return Err("white space as a suffix is not read (only as a prefix)".into());
                }
                35 => self.byte_fallback = value != 0,
                // Ids are signed 32-bit numbers, written as 64-bit two's complement; -1 is "none".
                40 => self.unknown = value as i64,
                41 => self.begin = value as i64,
                42 => self.end = value as i64,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, bytes: &[u8]) -> Parsed<()> {
        let mut fields = Fields { rest: bytes };
        while let Some((number, field)) = fields.next()? {
            match (number, field) {
                (2, Field::Bytes(map)) => self.charsmap = map.to_vec(),
                (3, Field::Number(v)) => self.add_dummy_prefix = v != 0,
                (4, Field::Number(v)) => self.remove_extra_whitespaces = v != 0,
                (5, Field::Number(v)) => self.escape_whitespaces = v != 0,
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn validate(&self) -> Parsed<()> {
        if self.pieces.is_empty() {
            return Err("it has no pieces".into());
        }
        if u32::try_from(self.pieces.len()).is_err() {
            return Err("more pieces than 32-bit ids".into());
        }
        let mut seen = HashMap::with_capacity(self.pieces.len());
        for (id, piece) in self.pieces.iter().enumerate() {
            if piece.text.is_empty() {
                return Err(format!("piece {id} is empty"));
            }
            if !piece.score.is_finite() {
                return Err(format!("piece {id} ({:?}) has the score {}", piece.text, piece.score));
            }
            if let Some(first) = seen.insert(piece.text.as_str(), id) {
                return Err(format!("pieces {first} and {id} are both {:?}", piece.text));
            }
        }
        if self.pieces.iter().all(|p| p.kind != Kind::Unknown) {
            return Err("it has no piece for unknown text".into());
        }
        for (what, id) in [("begin", self.begin), ("end", self.end)] {
            if id >= 0 && self.piece(id).is_none() {
                return Err(format!(
                    "the {what} mark has the id {id}, past the {} pieces",
                    self.pieces.len()
                ));
            }
        }
        if !self.escape_whitespaces {
            return Err("models that do not escape white space are not read".into());
        }
        Ok(())
    }

    fn piece(&self, id: i64) -> Option<&Piece> {
        usize::try_from(id).ok().and_then(|id| self.pieces.get(id))
    }

    /// The id of the begin mark, if the model has one.
    pub(super) fn begin(&self) -> Option<u32> {
        self.piece(self.begin).and_then(|_| u32::try_from(self.begin).ok())
    }

    /// The id of the end mark, if the model has one.
    pub(super) fn end(&self) -> Option<u32> {
        self.piece(self.end).and_then(|_| u32::try_from(self.end).ok())
    }

    /// The JSON of a `tokenizer.json` that tokenises the same. The flags `add_bos_token` (default
    /// true for BPE models) and `add_eos_token` (default false; true for unigram models, as T5 does)
    /// of `tokenizer_config.json` decide about the marks.
    pub(super) fn to_json(&self, config: &Configs) -> Parsed<Value> {
        let bpe = self.algorithm == Algorithm::Bpe;
        let begin = config.flag("add_bos_token").unwrap_or(bpe).then_some(self.begin());
        let end = config.flag("add_eos_token").unwrap_or(!bpe).then_some(self.end());
        self.to_json_with(begin.flatten(), end.flatten())
    }

    /// As [`Model::to_json`] with the marks given.
    pub(super) fn to_json_with(&self, begin: Option<u32>, end: Option<u32>) -> Parsed<Value> {
        let unknown = self
            .pieces
            .iter()
            .position(|p| p.kind == Kind::Unknown)
            .ok_or("it has no piece for unknown text")?;
        let added: Vec<Value> = (0u32..)
            .zip(&self.pieces)
            .filter(|(_, p)| matches!(p.kind, Kind::Control | Kind::Unknown | Kind::UserDefined))
            .map(|(id, p)| added_token(id, &p.text, p.kind != Kind::UserDefined))
            .collect();
        let mut normalizers = Vec::new();
        if !self.charsmap.is_empty() {
            normalizers.push(
                json!({"type": "Precompiled", "precompiled_charsmap": base64(&self.charsmap)}),
            );
        }
        if self.remove_extra_whitespaces {
            normalizers
                .push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
            normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        }
        let (model, pre_tokenizer) = match self.algorithm {
            Algorithm::Bpe => {
                if self.add_dummy_prefix {
                    normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
                }
                normalizers
                    .push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
                (self.bpe(unknown), Value::Null)
            }
            Algorithm::Unigram => {
                let scheme = if self.add_dummy_prefix { "always" } else { "never" };
                let split = json!({"type": "Metaspace", "replacement": "▁",
                    "prepend_scheme": scheme, "split": true});
                (self.unigram(unknown), split)
            }
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_dummy_prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let mark = |id: Option<u32>| {
            id.and_then(|id| Some((id, self.piece(i64::from(id))?.text.as_str())))
        };
        let normalizer = if normalizers.is_empty() {
            Value::Null
        } else {
            json!({"type": "Sequence", "normalizers": normalizers})
        };
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": marks(mark(begin), mark(end)),
            "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
        }))
    }

    fn bpe(&self, unknown: usize) -> Value {
        let vocabulary: serde_json::Map<String, Value> =
            (0u32..).zip(&self.pieces).map(|(id, p)| (p.text.clone(), json!(id))).collect();
        let merges: Vec<Value> = self.merges().into_iter().map(|(a, b)| json!([a, b])).collect();
        let unknown = self.pieces.get(unknown).map(|p| p.text.as_str());
        json!({"type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": self.byte_fallback, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges})
    }

    /// Every pair of pieces whose concatenation is a piece, by falling score of the result; equal
    /// results keep the order of their left parts' ids.
    fn merges(&self) -> Vec<(&str, &str)> {
        let usable = |p: &&Piece| matches!(p.kind, Kind::Normal | Kind::UserDefined | Kind::Unused);
        let ids: HashMap<&str, usize> = self
            .pieces
            .iter()
            .enumerate()
            .filter(|(_, p)| usable(p))
            .map(|(id, p)| (p.text.as_str(), id))
            .collect();
        let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
        for (id, piece) in self.pieces.iter().enumerate().filter(|(_, p)| usable(p)) {
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if let (Some(&l), true) = (ids.get(left), ids.contains_key(right)) {
                    merges.push((piece.score, id, l, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        merges.into_iter().map(|(.., left, right)| (left, right)).collect()
    }

    fn unigram(&self, unknown: usize) -> Value {
        let vocabulary: Vec<Value> = self.pieces.iter().map(|p| json!([p.text, p.score])).collect();
        json!({"type": "Unigram", "unk_id": unknown, "vocab": vocabulary,
            "byte_fallback": self.byte_fallback})
    }
}

fn parse_piece(bytes: &[u8]) -> Parsed<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) => {
                piece.text = std::str::from_utf8(text).map_err(|e| e.to_string())?.to_string();
            }
            (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Field::Number(kind)) => {
                piece.kind =
                    Kind::from_number(kind).ok_or_else(|| format!("unknown type {kind}"))?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

/// Base64 with padding (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = (word >> (18 - 6 * i)) as usize & 63;
            text.push(if i > chunk.len() { '=' } else { char::from(DIGITS[digit]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_rfc_4648() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (text, encoded) in cases {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let mut body = vec![0x0a, text.len() as u8];
        body.extend(text.as_bytes());
        body.push(0x15);
        body.extend(score.to_le_bytes());
        body.extend([0x18, kind]);
        let mut field = vec![0x0a, body.len() as u8];
        field.extend(body);
        field
    }

    fn small() -> Vec<u8> {
        let mut bytes = piece("<unk>", 0.0, 2);
        for (text, score, kind) in
            [("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁a", -1.0, 1), ("ab", 0.0, 1), ("▁ab", -2.0, 1)]
        {
            bytes.extend(piece(text, score, kind));
        }
        for (i, text) in ["▁", "a", "b"].iter().enumerate() {
            bytes.extend(piece(text, -3.0 - i as f32, 1));
        }
        bytes.extend([0x12, 2, 0x18, 2]);
        bytes
    }

    #[test]
    fn merges_come_back_from_scores() {
        let model = Model::parse(&small()).unwrap();
        assert_eq!(model.merges(), [("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab")]);
    }

    #[test]
    fn broken_models_are_refused_with_a_reason() {
        let good = small();
        for end in 1..good.len() {
            // Any cut either fails or leaves a model whose pieces are whole.
            if let Ok(model) = Model::parse(&good[..end]) {
                assert!(!model.pieces.is_empty());
            }
        }
        let message = |bytes: &[u8]| Model::parse(bytes).unwrap_err();
        assert!(message(&[]).contains("no pieces"));
        assert!(message(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]).contains("past the end"));
        let twice = [good.clone(), piece("ab", 0.0, 1)].concat();
        assert!(message(&twice).contains("are both \"ab\""));
        let nan = [good.clone(), piece("nan", f32::NAN, 1)].concat();
        assert!(message(&nan).contains("NaN"));
        let kind = [good.clone(), piece("kind", 0.0, 9)].concat();
        assert!(message(&kind).contains("unknown type 9"));
        let word = [good, vec![0x12, 2, 0x18, 3]].concat();
        assert!(message(&word).contains("word models"));
    }
}
