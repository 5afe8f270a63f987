//! "Did you mean": the known name nearest to a misspelt one.

use std::cmp::Ordering;

/// The name in `known` nearest to `wrong`, or `None` when nothing is near enough to be a guess.
///
/// Case and the difference between `-` and `_` do not count. Near enough means: at most a third of
/// the letters differ (insertions, deletions, replacements, swapped neighbours), or one name is
/// the beginning of the other.
///
/// ```
/// # use strata_method as method;
/// assert_eq!(method::nearest("quantise", ["inspect", "quantize"]), Some("quantize".to_string()));
/// assert_eq!(method::nearest("banana", ["inspect", "quantize"]), None);
/// ```
pub fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let wrong = normal(wrong);
    if wrong.is_empty() {
        return None;
    }
    known
        .into_iter()
        .filter_map(|name| {
            let candidate = normal(name);
            let distance = strsim::damerau_levenshtein(&wrong, &candidate);
            let letters = wrong.chars().count().max(candidate.chars().count());
            let shorter = wrong.chars().count().min(candidate.chars().count());
            let starts = shorter >= 3
                && (candidate.starts_with(wrong.as_str()) || wrong.starts_with(candidate.as_str()));
            let near = distance <= (letters / 3).max(1) && distance < letters;
            (near || starts).then(|| {
                let similarity = strsim::jaro_winkler(&wrong, &candidate);
                (distance as f64 / letters as f64 - similarity, name)
            })
        })
        .min_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal))
        .map(|(_, name)| name.to_string())
}

/// The whole sentence about an unknown name: ``unknown method `gtpq`; did you mean `gptq`?``, or
/// the list of known names when none is near.
pub fn did_you_mean(what: &str, wrong: &str, known: &[&str]) -> String {
    match nearest(wrong, known.iter().copied()) {
        Some(name) => format!("unknown {what} `{wrong}`; did you mean `{name}`?"),
        None if known.is_empty() => format!("unknown {what} `{wrong}`; none is known here"),
        None => format!("unknown {what} `{wrong}`; known: {}", known.join(", ")),
    }
}

fn normal(name: &str) -> String {
    name.trim().to_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn finds_typing_errors_and_prefixes() {
        let known = ["group_size", "bits", "symmetric", "samples", "sequence_length"];
        for (wrong, right) in [
            ("groupsize", "group_size"),
            ("group-size", "group_size"),
            ("GROUP_SIZE", "group_size"),
            ("bit", "bits"),
            ("sym", "symmetric"),
            ("sampels", "samples"),
            ("sequence", "sequence_length"),
        ] {
            assert_eq!(nearest(wrong, known).as_deref(), Some(right), "{wrong}");
        }
        assert_eq!(nearest("temperature", known), None);
        assert_eq!(nearest("", known), None);
    }

    #[test]
    fn the_nearest_of_several_wins() {
        assert_eq!(nearest("awg", ["aqw", "awq", "rtn"]).as_deref(), Some("awq"));
    }
}
