//! Regular expressions over module names, as `quantization_config` holds them: written so that they
//! name exactly some of a network's modules, and read as far as names need (literals, `\.`,
//! alternatives, `.*`, anchors). Anything else is left to whoever can tell by the shapes.

use std::collections::BTreeMap;

/// Expressions that match all of `members` and none of the other `modules`: whole blocks as
/// `^model\.layers\.(?:3|7)\..*$`, equal parts of several blocks as one, the rest by name.
pub(super) fn compact(members: &[String], modules: &[String]) -> Vec<String> {
    let count = |names: &[String]| {
        let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
        for (head, index, _) in names.iter().filter_map(|name| split(name)) {
            *counts.entry((head.into(), index.into())).or_default() += 1;
        }
        counts
    };
    let (mine, everybody) = (count(members), count(modules));
    // Parts by (head, rest of the name or "" for whole blocks), in order of first appearance.
    let mut parts: Vec<((&str, &str), Vec<&str>)> = Vec::new();
    let mut single = Vec::new();
    for name in members {
        let Some((head, index, tail)) = split(name) else {
            single.push(format!("^{}$", escape(name)));
            continue;
        };
        let key = (head.to_string(), index.to_string());
        let whole = mine.get(&key) == everybody.get(&key) && mine.get(&key) > Some(&1);
        let part = (head, if whole { "" } else { tail });
        match parts.iter_mut().find(|(known, _)| *known == part) {
            Some((_, indices)) if indices.contains(&index) => {}
            Some((_, indices)) => indices.push(index),
            None => parts.push((part, vec![index])),
        }
    }
    let pattern = |((head, tail), indices): ((&str, &str), Vec<&str>)| {
        let index = match indices[..] {
            [one] => one.to_string(),
            _ => format!("(?:{})", indices.join("|")),
        };
        let tail = if tail.is_empty() { ".*".into() } else { escape(tail) };
        format!("^{}\\.{index}\\.{tail}$", escape(head))
    };
    parts.into_iter().map(pattern).chain(single).collect()
}

/// `model.layers.3.mlp.up_proj` as `model.layers`, `3`, `mlp.up_proj`.
fn split(name: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    for part in name.split('.') {
        let end = from + part.len();
        if from > 0 && !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return Some((name.get(..from - 1)?, part, name.get(end + 1..)?));
        }
        from = end + 1;
    }
    None
}

fn escape(name: &str) -> String {
    name.replace('.', "\\.")
}

/// Whether `regex` matches `name` from its start on (Python's `re.match`); `None` when it uses what
/// is not read here.
pub(super) fn matches(regex: &str, name: &str) -> Option<bool> {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    Some(run(&parse(regex)?, name))
}

enum Part {
    Literal(String),
    OneOf(Vec<String>),
    Anything,
    End,
}

fn parse(regex: &str) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = regex;
    let flush = |literal: &mut String, parts: &mut Vec<Part>| {
        if !literal.is_empty() {
            parts.push(Part::Literal(std::mem::take(literal)));
        }
    };
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix(".*") {
            flush(&mut literal, &mut parts);
            parts.push(Part::Anything);
            rest = after;
        } else if let Some(after) = rest.strip_prefix('\\') {
            let escaped = after.chars().next().filter(|c| c.is_ascii_punctuation())?;
            literal.push(escaped);
            rest = after.get(escaped.len_utf8()..)?;
        } else if let Some(after) = rest.strip_prefix('(') {
            let inner = after.strip_prefix("?:").unwrap_or(after);
            let (alternatives, after) = inner.split_once(')')?;
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '|';
            if !alternatives.chars().all(plain) || after.starts_with(['*', '+', '?', '{']) {
                return None;
            }
            flush(&mut literal, &mut parts);
            parts.push(Part::OneOf(alternatives.split('|').map(String::from).collect()));
            rest = after;
        } else if rest == "$" {
            flush(&mut literal, &mut parts);
            parts.push(Part::End);
            rest = "";
        } else if c.is_ascii_alphanumeric() || c == '_' || c == '-' {
            literal.push(c);
            rest = rest.get(1..)?;
            if rest.starts_with(['*', '+', '?', '{']) {
                return None;
            }
        } else {
            return None;
        }
    }
    flush(&mut literal, &mut parts);
    Some(parts)
}

fn run(parts: &[Part], name: &str) -> bool {
    let Some((first, rest)) = parts.split_first() else { return true };
    match first {
        Part::End => name.is_empty() && rest.is_empty(),
        Part::Literal(text) => name.strip_prefix(text.as_str()).is_some_and(|n| run(rest, n)),
        Part::OneOf(texts) => {
            texts.iter().any(|t| name.strip_prefix(t.as_str()).is_some_and(|n| run(rest, n)))
        }
        Part::Anything => {
            let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
            ends.rev().any(|at| name.get(at..).is_some_and(|n| run(rest, n)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(blocks: std::ops::Range<usize>) -> Vec<String> {
        let parts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"];
        let name = |i: usize| parts.map(|p| format!("model.layers.{i}.{p}"));
        blocks.flat_map(name).collect()
    }

    #[test]
    fn whole_blocks_with_anchors() {
        let all = names(0..24);
        let members: Vec<String> =
            all.iter().filter(|n| n.contains(".1.") || n.contains(".7.")).cloned().collect();
        let patterns = compact(&members, &all);
        assert_eq!(patterns, [r"^model\.layers\.(?:1|7)\..*$"]);
        for name in &all {
            assert_eq!(matches(&patterns[0], name), Some(members.contains(name)), "{name}");
        }
        // Block 1, not 11 or 21, nor what only contains the name.
        let one = compact(&names(1..2), &all);
        assert_eq!(one, [r"^model\.layers\.1\..*$"]);
        assert_eq!(matches(&one[0], "model.layers.11.mlp.down_proj"), Some(false));
        assert_eq!(matches(&one[0], "model.layers.21.mlp.down_proj"), Some(false));
        assert_eq!(matches(&one[0], "the.model.layers.1.mlp.down_proj"), Some(false));
        assert_eq!(matches(&one[0], "modelXlayers.1.mlp.down_proj"), Some(false));
    }

    #[test]
    fn parts_of_blocks_and_odd_names() {
        let mut all = names(0..12);
        all.push("lm_head".into());
        let members: Vec<String> = ["0.mlp.down_proj", "11.mlp.down_proj", "2.self_attn.q_proj"]
            .map(|n| format!("model.layers.{n}"))
            .into_iter()
            .chain(["lm_head".to_string()])
            .collect();
        let patterns = compact(&members, &all);
        assert_eq!(
            patterns,
            [
                r"^model\.layers\.(?:0|11)\.mlp\.down_proj$",
                r"^model\.layers\.2\.self_attn\.q_proj$",
                r"^lm_head$"
            ]
        );
        for name in &all {
            let hit = patterns.iter().any(|p| matches(p, name) == Some(true));
            assert_eq!(hit, members.contains(name), "{name}");
        }
    }

    #[test]
    fn reads_what_others_write_or_says_that_it_cannot() {
        let name = "model.layers.3.self_attn.q_proj";
        for (regex, wanted) in [
            (".*q_proj", Some(true)),
            (r".*\.(q_proj|k_proj)$", Some(true)),
            (".*mlp.*", Some(false)),
            ("model", Some(true)),
            ("layers", Some(false)),
            (r"model\.layers\.\d+", None),
            ("[qk]_proj", None),
            ("a+", None),
            ("(q|k", None),
        ] {
            assert_eq!(matches(regex, name), wanted, "{regex}");
        }
    }
}
