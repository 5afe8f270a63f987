//! Short texts from sentence patterns with slots.
//!
//! A scene is a sequence of sentences, each with alternatives; a slot keeps its value through the
//! whole scene, so that the text is about one thing.

use tensor::rng::Rng;

/// Values for the slots of a text, looked up by name.
pub(super) type Slots = Vec<(&'static str, String)>;

/// A kind of short text.
#[derive(Debug)]
pub(super) struct Scene {
    /// Slot names with their possible values. Slots that share a list get different values.
    pub slots: &'static [(&'static str, &'static [&'static str])],
    /// Alternatives of every sentence in order; an empty alternative leaves the sentence out.
    pub sentences: &'static [&'static [&'static str]],
}

impl Scene {
    /// One text of this scene; `given` slots come before the scene's own. The slots `n`, `m` and `k`
    /// are numbers of two digits, rising in this order.
    pub(super) fn tell(&self, rng: &mut Rng, given: &Slots) -> String {
        let mut slots = given.clone();
        let mut numbers: Vec<usize> = (0..3).map(|_| 10 + rng.below(90)).collect();
        numbers.sort_unstable();
        slots.extend(["n", "m", "k"].into_iter().zip(numbers.iter().map(ToString::to_string)));
        for (name, values) in self.slots {
            let used = |v: &str| slots.iter().any(|(_, s)| s == v);
            let free: Vec<&str> = values.iter().copied().filter(|v| !used(v)).collect();
            let value = rng.choose(&free).copied().unwrap_or_default();
            slots.push((name, value.to_string()));
        }
        let chosen = self.sentences.iter().filter_map(|options| rng.choose(options));
        let sentences: Vec<String> =
            chosen.filter(|s| !s.is_empty()).map(|s| fill(s, &slots)).collect();
        sentences.join(" ")
    }
}

/// Replaces every `{name}` by its value. Unknown names stay as they are (a test looks for them).
pub(super) fn fill(pattern: &str, slots: &Slots) -> String {
    let mut text = String::with_capacity(pattern.len() + 32);
    let mut rest = pattern;
    while let Some((before, tail)) = rest.split_once('{') {
        text.push_str(before);
        let Some((name, after)) = tail.split_once('}') else {
            text.push('{');
            rest = tail;
            continue;
        };
        match slots.iter().find(|(slot, _)| *slot == name) {
            Some((_, value)) => text.push_str(value),
            None => {
                text.push('{');
                text.push_str(name);
                text.push('}');
            }
        }
        rest = after;
    }
    text.push_str(rest);
    text
}
