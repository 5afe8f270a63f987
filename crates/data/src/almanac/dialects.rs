//! Three professional dialects: radio network operations, contract law, pharmacy. Each has its own
//! vocabulary, sentence patterns and a glossary from which questions are made.

mod law;
mod pharmacy;
mod radio;

use super::scenes::Scene;
use serde::{Deserialize, Serialize};
use tensor::rng::Rng;

/// A professional dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// Radio network operations.
    Radio,
    /// Contract law.
    Law,
    /// Pharmacy.
    Pharmacy,
}

impl Dialect {
    /// All dialects.
    pub const ALL: [Dialect; 3] = [Dialect::Radio, Dialect::Law, Dialect::Pharmacy];

    /// The dialect's name in file names.
    pub fn name(self) -> &'static str {
        match self {
            Dialect::Radio => "radio",
            Dialect::Law => "law",
            Dialect::Pharmacy => "pharmacy",
        }
    }

    fn scenes(self) -> &'static [Scene] {
        match self {
            Dialect::Radio => radio::SCENES,
            Dialect::Law => law::SCENES,
            Dialect::Pharmacy => pharmacy::SCENES,
        }
    }

    /// Terms with what they do: "a handover", "moves a call from one cell to the next".
    pub(super) fn glossary(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Dialect::Radio => radio::GLOSSARY,
            Dialect::Law => law::GLOSSARY,
            Dialect::Pharmacy => pharmacy::GLOSSARY,
        }
    }

    /// A short text in this dialect.
    pub(super) fn text(self, rng: &mut Rng) -> String {
        if rng.below(4) == 0 {
            let mut entries = self.glossary().to_vec();
            rng.shuffle(&mut entries);
            let count = 3 + rng.below(2);
            let lines = entries.iter().take(count).map(|(t, d)| definition(t, d));
            return lines.collect::<Vec<_>>().join(" ");
        }
        let none = Vec::new();
        rng.choose(self.scenes()).map(|scene| scene.tell(rng, &none)).unwrap_or_default()
    }

    /// Multiple-choice questions from the glossary; the three wrong choices are definitions of other
    /// terms of the same dialect.
    pub fn questions(self, seed: u64) -> Vec<TermQuestion> {
        let mut rng = Rng::stream(seed, self.name());
        let glossary = self.glossary();
        glossary
            .iter()
            .map(|(term, definition)| {
                let mut wrong: Vec<String> = glossary
                    .iter()
                    .filter(|(t, _)| t != term)
                    .map(|(_, d)| format!(" {d}"))
                    .collect();
                rng.shuffle(&mut wrong);
                wrong.truncate(3);
                let answer = rng.below(4);
                wrong.insert(answer.min(wrong.len()), format!(" {definition}"));
                TermQuestion {
                    dialect: self,
                    prompt: super::names::capital(term),
                    choices: wrong,
                    answer,
                }
            })
            .collect()
    }
}

/// A multiple-choice question about a term.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TermQuestion {
    /// The dialect that the term belongs to.
    pub dialect: Dialect,
    /// The beginning of a sentence.
    pub prompt: String,
    /// Continuations, each with its leading space.
    pub choices: Vec<String>,
    /// Index of the right continuation.
    pub answer: usize,
}

/// The sentence of a glossary entry.
pub(super) fn definition(term: &str, does: &str) -> String {
    format!("{} {does}.", super::names::capital(term))
}
