//! The options of a method as a table, read from the JSON Schema of its options struct.

use schemars::Schema;
use serde_json::{Map, Value};

/// One option of a method: what the help, the documentation and the recipe checker say about it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct OptionRow {
    /// The key in a recipe; nested structs give dotted names (`scale.grid`).
    pub name: String,
    /// The type in words: `integer`, `number`, `boolean`, `text`, `rtn | gptq | awq`, `list of ..`.
    pub kind: String,
    /// The default as it would be written in a recipe; `None` when the option must be given.
    pub default: Option<String>,
    /// The doc comment, as one paragraph.
    pub description: String,
}

/// How deep nested structs are followed; a schema that refers to itself ends here.
const MAX_DEPTH: usize = 6;

/// The rows of an options struct's schema, in the order of its fields.
///
/// References to `$defs` are resolved, flattened structs are merged, nested structs become dotted
/// names, and enums list their values.
pub fn options(schema: &Schema) -> Vec<OptionRow> {
    let root = schema.as_value();
    let mut rows = Vec::new();
    collect(root, root, "", None, 0, &mut rows);
    rows
}

/// The same rows as a Markdown table, for the generated part of `docs/methods/<slug>.md`.
pub fn options_markdown(schema: &Schema) -> String {
    let mut text = String::from("| option | type | default | meaning |\n|---|---|---|---|\n");
    for row in options(schema) {
        let default = match &row.default {
            Some(value) => format!("`{}`", escape(value)),
            None => "(required)".to_string(),
        };
        text.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            row.name,
            escape(&row.kind),
            default,
            escape(&row.description)
        ));
    }
    text
}

fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn collect(
    root: &Value,
    schema: &Value,
    prefix: &str,
    defaults: Option<&Value>,
    depth: usize,
    rows: &mut Vec<OptionRow>,
) {
    if depth > MAX_DEPTH {
        return;
    }
    let schema = resolve(root, schema);
    for part in list(schema, "allOf") {
        collect(root, part, prefix, defaults, depth + 1, rows);
    }
    let required: Vec<&str> = list(schema, "required").iter().filter_map(Value::as_str).collect();
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    for (key, property) in properties {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        let target = resolve(root, property);
        // The default of the enclosing struct's field says more than the nested field's own.
        let default = defaults.and_then(|d| d.get(key)).or_else(|| property.get("default"));
        if is_struct(target) {
            collect(root, target, &name, default, depth + 1, rows);
            continue;
        }
        let default = match default {
            Some(value) => Some(spell(value)),
            None if required.contains(&key.as_str()) => None,
            // Neither a default nor required: an `Option`.
            None => Some("none".to_string()),
        };
        rows.push(OptionRow {
            name,
            kind: kind(root, property, depth),
            default,
            description: describe(property, target),
        });
    }
}

/// Follows `$ref: "#/$defs/Name"` (also when it is the only member of `allOf`).
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let mut current = schema;
    for _ in 0..MAX_DEPTH {
        let Some(reference) = current.get("$ref").and_then(Value::as_str) else { break };
        let Some(target) = reference.strip_prefix('#').and_then(|at| root.pointer(at)) else {
            break;
        };
        current = target;
    }
    current
}

fn list<'a>(schema: &'a Value, key: &str) -> &'a [Value] {
    schema.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn is_struct(schema: &Value) -> bool {
    schema.get("properties").and_then(Value::as_object).is_some_and(|p: &Map<_, _>| !p.is_empty())
}

fn kind(root: &Value, schema: &Value, depth: usize) -> String {
    if depth > MAX_DEPTH {
        return "value".into();
    }
    let schema = resolve(root, schema);
    if let Some(value) = schema.get("const") {
        return spell(value);
    }
    let values = list(schema, "enum");
    if !values.is_empty() {
        return join(values.iter().filter(|v| !v.is_null()).map(spell));
    }
    for key in ["oneOf", "anyOf"] {
        let branches = list(schema, key);
        if !branches.is_empty() {
            return join(
                branches
                    .iter()
                    .filter(|b| b.get("type").and_then(Value::as_str) != Some("null"))
                    .map(|b| kind(root, b, depth + 1)),
            );
        }
    }
    let names: Vec<&str> = match schema.get("type") {
        Some(Value::String(name)) => vec![name.as_str()],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let words = names.iter().filter(|n| **n != "null").map(|name| match *name {
        "string" => {
            schema.get("format").and_then(Value::as_str).unwrap_or("text").replace('-', " ")
        }
        "array" => match schema.get("items") {
            Some(items) => format!("list of {}", kind(root, items, depth + 1)),
            None => "list".to_string(),
        },
        "object" if is_struct(schema) => "settings".to_string(),
        "object" => match schema.get("additionalProperties").filter(|v| v.is_object()) {
            Some(values) => format!("map to {}", kind(root, values, depth + 1)),
            None => "map".to_string(),
        },
        other => other.to_string(),
    });
    let words = join(words);
    if words.is_empty() { "value".into() } else { words }
}

fn join(words: impl Iterator<Item = String>) -> String {
    let mut unique: Vec<String> = Vec::new();
    for word in words {
        if !unique.contains(&word) {
            unique.push(word);
        }
    }
    unique.join(" | ")
}

/// The field's own comment; for an enum also what its values mean, when they are documented.
fn describe(property: &Value, target: &Value) -> String {
    let own = property.get("description").or_else(|| target.get("description"));
    let mut text = paragraph(own.and_then(Value::as_str).unwrap_or_default());
    for branch in list(target, "oneOf") {
        let name = branch.get("const").map(spell);
        let meaning = branch.get("description").and_then(Value::as_str).map(paragraph);
        if let (Some(name), Some(meaning)) = (name, meaning) {
            if !text.is_empty() {
                text.push_str(if text.ends_with(['.', ':', '!', '?']) { " " } else { ". " });
            }
            text.push_str(&format!("`{name}`: {meaning}"));
        }
    }
    text
}

fn paragraph(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A JSON value as a recipe (YAML) would spell it: text without quotes, null as `none`.
fn spell(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        // An f32 default such as 0.01 arrives as 0.009999999776482582.
        Value::Number(n) if n.is_f64() => {
            let wide = n.as_f64().unwrap_or_default();
            let narrow = wide as f32;
            if f64::from(narrow) == wide { narrow.to_string() } else { wide.to_string() }
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use schemars::JsonSchema;
    use serde::Serialize;

    /// How activations choose the order of columns.
    #[derive(JsonSchema, Serialize)]
    #[serde(rename_all = "kebab-case")]
    #[allow(dead_code)]
    enum Order {
        /// As stored.
        Off,
        /// Largest first.
        DescendingDiagonal,
    }

    #[derive(JsonSchema, Serialize)]
    #[serde(default)]
    struct Grid {
        /// Points of the search.
        points: usize,
    }

    impl Default for Grid {
        fn default() -> Self {
            Self { points: 20 }
        }
    }

    #[derive(JsonSchema, Serialize)]
    #[serde(default)]
    struct Options {
        /// Bits per
        /// weight.
        bits: u8,
        /// Damping, as a fraction.
        damping: f32,
        /// Order of columns
        order: Order,
        /// Weights per scale.
        group_size: Option<usize>,
        /// What to leave out.
        exclude: Vec<String>,
        grid: Grid,
    }

    impl Default for Options {
        fn default() -> Self {
            Self {
                bits: 4,
                damping: 0.01,
                order: Order::Off,
                group_size: None,
                exclude: vec![],
                grid: Grid::default(),
            }
        }
    }

    #[test]
    fn every_kind_of_field_gets_a_row() {
        let rows = options(&schemars::schema_for!(Options));
        let brief: Vec<(&str, &str, Option<&str>)> =
            rows.iter().map(|r| (r.name.as_str(), r.kind.as_str(), r.default.as_deref())).collect();
        assert_eq!(
            brief,
            [
                ("bits", "integer", Some("4")),
                ("damping", "number", Some("0.01")),
                ("order", "off | descending-diagonal", Some("off")),
                ("group_size", "integer", Some("none")),
                ("exclude", "list of text", Some("[]")),
                ("grid.points", "integer", Some("20")),
            ]
        );
        assert_eq!(rows[0].description, "Bits per weight.");
        assert_eq!(
            rows[2].description,
            "Order of columns. `off`: As stored. `descending-diagonal`: Largest first."
        );
    }

    #[test]
    fn a_field_without_default_is_required() {
        #[derive(JsonSchema)]
        #[allow(dead_code)]
        struct Needs {
            /// Where.
            out: String,
        }
        let rows = options(&schemars::schema_for!(Needs));
        assert_eq!(rows[0].default, None);
        assert!(options_markdown(&schemars::schema_for!(Needs)).contains("(required)"));
    }

    #[test]
    fn a_schema_that_refers_to_itself_ends() {
        let schema = schemars::json_schema!({
            "type": "object",
            "properties": {"again": {"$ref": "#"}, "n": {"type": "integer"}},
        });
        let rows = options(&schema);
        assert!(!rows.is_empty() && rows.len() < 20);
    }
}
