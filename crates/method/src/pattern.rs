//! Patterns over the dotted names of modules and tensors, as `--only` and `--exclude` take them.

use std::fmt;
use std::str::FromStr;

/// A pattern over dotted names: `*` stands for any run of characters (dots included), `?` for one.
///
/// It matches a name when it matches the whole name or any suffix that starts at a dot component:
/// `lm_head` matches `lm_head` and `model.lm_head`; `*.down_proj` matches every `down_proj`;
/// `layers.0.*` matches everything in `model.layers.0`, and nothing in `model.layers.10`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    glob: Vec<char>,
}

impl Pattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// An empty pattern, white space, a `re:` regular expression, or the bracket forms of other
    /// globs (`[..]`, `{..}`): these are not supported, and the message says what would work.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty name pattern matches nothing; use `*` for every name".into());
        }
        if text.starts_with("re:") {
            return Err(format!(
                "name pattern `{text}`: regular expressions are not supported; use `*` and `?`, \
                 for example `*.down_proj` or `model.layers.0.*`"
            ));
        }
        if let Some(bad) = text.chars().find(|c| c.is_whitespace() || "[]{}^$|\\".contains(*c)) {
            return Err(format!(
                "name pattern `{text}`: {bad:?} is not part of a pattern; only `*` and `?` are \
                 special, and the option may be given several times"
            ));
        }
        Ok(Self { text: text.to_string(), glob: text.chars().collect() })
    }

    /// Whether the pattern matches `name` or one of its suffixes of whole dot components.
    pub fn matches(&self, name: &str) -> bool {
        let mut rest = Some(name);
        while let Some(suffix) = rest {
            if glob(&self.glob, suffix) {
                return true;
            }
            rest = suffix.split_once('.').map(|(_, tail)| tail);
        }
        false
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::new(text)
    }
}

impl serde::Serialize for Pattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for Pattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::new(&text).map_err(serde::de::Error::custom)
    }
}

impl schemars::JsonSchema for Pattern {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Pattern".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "format": "name pattern"})
    }
}

/// Matches with one remembered `*`: on a mismatch only the last star takes one character more, so
/// the time is at most the product of the lengths, never exponential.
fn glob(pattern: &[char], text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || text.get(t) == Some(&c) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::new(pattern).unwrap().matches(name)
    }

    #[test]
    fn whole_names_suffixes_and_wildcards() {
        let down = "model.layers.0.mlp.down_proj";
        assert!(matches(down, down));
        assert!(matches("down_proj", down));
        assert!(matches("mlp.down_proj", down));
        assert!(matches("*.down_proj", down));
        assert!(matches("*", down));
        assert!(matches("model.layers.?.mlp.*", down));
        assert!(matches("layers.0.*", down));
        assert!(!matches("layers.0.*", "model.layers.10.mlp.down_proj"));
        assert!(!matches("own_proj", down));
        assert!(!matches("mlp", down));
        assert!(!matches("model.layers.?.mlp.*", "model.layers.12.mlp.down_proj"));
        assert!(matches("lm_head", "lm_head"));
        assert!(!matches("*.lm_head", "lm_head"));
    }

    #[test]
    fn stars_backtrack_and_stay_fast() {
        assert!(matches("*a*b*c", "xxaxxbxxbxxc"));
        assert!(!matches("*a*b*c", "xxaxxbxxbxx"));
        let long = "a".repeat(3000);
        assert!(!matches("*a*a*a*a*a*a*a*a*b", &long));
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        for wrong in ["", "re:.*q_proj", "a b", "[qk]_proj", "{q,k}_proj", "q_proj$"] {
            assert!(Pattern::new(wrong).is_err(), "{wrong}");
        }
        assert!(Pattern::new("re:.*").unwrap_err().contains("*.down_proj"));
    }

    #[test]
    fn serde_round_trip_validates() {
        let pattern: Pattern = serde_json::from_str("\"*.q_proj\"").unwrap();
        assert_eq!(serde_json::to_string(&pattern).unwrap(), "\"*.q_proj\"");
        assert!(serde_json::from_str::<Pattern>("\"re:x\"").is_err());
    }
}
