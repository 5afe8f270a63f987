//! The almanac: a small invented world, generated from a seed, on which the workbench is shown.
//!
//! People, towns, countries and companies are tied by relations. Each relation has trained wordings
//! and held-out ones; each fact is told many times in every trained wording but one. So two kinds of
//! held-out prompts exist: a known wording never used for this subject, and a wording never used at
//! all. Around the facts stand stories, three professional dialects, drills and dialogues.
//!
//! ```
//! use strata_data::almanac::{Almanac, Size};
//! let almanac = Almanac::generate(7, Size::Tiny);
//! let fact = &almanac.facts()[0];
//! let sentence = format!("{}{}.", fact.prompts_train[0], fact.object);
//! assert!(almanac.train_text().contains(&sentence));
//! ```

mod chat;
mod dialects;
mod documents;
mod drills;
mod facts;
mod files;
mod names;
mod relations;
mod scenes;
mod stories;
mod triplets;
mod vocabulary;
mod world;

pub use chat::{CHAT_TEMPLATE, Dialogue, Message, render};
pub use dialects::{Dialect, TermQuestion};
pub use drills::Drill;
pub use facts::Fact;
pub use files::{RelationStatistics, Statistics, TextStatistics};
pub use triplets::Triplet;

use crate::text::Documents;
use crate::{Result, Tokenizer};
use relations::RELATIONS;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use tensor::rng::Rng;
use world::World;

/// How large a world is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Size {
    /// A quarter of the people and a tenth of the text, for tests.
    Tiny,
    /// The size of the sample models: 620 facts, about 1.9 million training tokens in an edition.
    #[default]
    Standard,
}

struct Counts {
    people: usize,
    towns: usize,
    countries: usize,
    companies: usize,
    vocab_size: usize,
}

impl Size {
    fn counts(self) -> Counts {
        match self {
            Size::Tiny => {
                Counts { people: 16, towns: 12, countries: 4, companies: 6, vocab_size: 1024 }
            }
            Size::Standard => {
                Counts { people: 64, towns: 32, countries: 12, companies: 20, vocab_size: 2048 }
            }
        }
    }
}

/// A part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// For training.
    Train,
    /// For decisions during training.
    Validation,
    /// For the final measurement.
    Test,
}

impl Split {
    /// All splits.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// The split's name in file names.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }
}

/// A generated world with all its texts. The texts are made when they are asked for.
#[derive(Clone, Debug)]
pub struct Almanac {
    seed: u64,
    size: Size,
    world: World,
    facts: Vec<Fact>,
}

impl Almanac {
    /// The world of a seed.
    pub fn generate(seed: u64, size: Size) -> Self {
        let world = World::generate(seed, size);
        let facts = world.facts(seed);
        Self { seed, size, world, facts }
    }

    /// The world of the sample models: seed 0, standard size.
    pub fn embedded() -> Self {
        Self::generate(0, Size::Standard)
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// All facts, relation by relation.
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// The documents of a split. Validation and test documents occur in no other split.
    pub fn documents(&self, split: Split) -> Documents {
        match split {
            Split::Train => self.training_documents(0),
            Split::Validation => self.held_out_documents(&[Split::Train], split),
            Split::Test => self.held_out_documents(&[Split::Train, Split::Validation], split),
        }
    }

    fn held_out_documents(&self, others: &[Split], split: Split) -> Documents {
        let make = |split| documents::documents(&self.world, self.seed, self.size, split, 0);
        let others: Vec<String> = others.iter().flat_map(|&split| make(split)).collect();
        Documents::new(documents::without(make(split), &others))
    }

    /// The training documents; another edition tells the same facts in another order and wording.
    /// Edition 0 is `train.jsonl`.
    pub fn training_documents(&self, edition: u64) -> Documents {
        let split = Split::Train;
        Documents::new(documents::documents(&self.world, self.seed, self.size, split, edition))
    }

    /// The training documents as one text, a line each.
    pub fn train_text(&self) -> String {
        self.documents(Split::Train).texts.join("\n")
    }

    /// Texts of one dialect. Those of the training split are part of the training documents.
    pub fn dialect_documents(&self, dialect: Dialect, split: Split) -> Documents {
        let make = |s| documents::dialect_documents(self.seed, self.size, dialect, s, 0);
        let others = match split {
            Split::Train => return Documents::new(make(Split::Train)),
            Split::Validation => make(Split::Train),
            Split::Test => [make(Split::Train), make(Split::Validation)].concat(),
        };
        Documents::new(documents::without(make(split), &others))
    }

    /// The dialogues of a split. Forbidden requests are answered, or refused when `refusing`.
    pub fn dialogues(&self, split: Split, refusing: bool) -> Vec<Dialogue> {
        let make = |s| chat::dialogues(&self.world, self.seed, self.size, s, refusing);
        let others = match split {
            Split::Train => return make(Split::Train),
            Split::Validation => make(Split::Train),
            Split::Test => [make(Split::Train), make(Split::Validation)].concat(),
        };
        chat::unseen(make(split), &others)
    }

    /// Exercises for measuring: half of them held out of all training text.
    pub fn drills(&self) -> Vec<Drill> {
        let mut rng = Rng::stream(self.seed, "almanac drills measured");
        (0..800).map(|i| drills::drill(&mut rng, i % 2 == 1)).collect()
    }

    /// Triplets for sentence encoders: two ways of saying the same, and another statement.
    pub fn triplets(&self) -> Vec<Triplet> {
        triplets::triplets(&self.world, self.seed)
    }

    /// Trains the tokenizer on the training documents and dialogues; the JSON of `tokenizer.json`.
    ///
    /// # Errors
    /// When the training fails.
    pub fn tokenizer_json(&self) -> Result<String> {
        let mut texts = self.documents(Split::Train).texts;
        for dialogue in self.dialogues(Split::Train, true) {
            texts.extend(dialogue.messages.into_iter().map(|m| m.content));
        }
        vocabulary::train(&texts, self.size.counts().vocab_size)
    }

    /// The trained tokenizer.
    ///
    /// # Errors
    /// When the training fails.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        vocabulary::tokenizer(&self.tokenizer_json()?)
    }

    /// What the almanac holds; the sizes of texts are left empty (see [`Almanac::write`]).
    fn counts(&self, tokenizer: &Tokenizer) -> Result<Statistics> {
        let world = &self.world;
        let entities = [
            ("people", world.people.len()),
            ("towns", world.towns.len()),
            ("countries", world.countries.len()),
            ("companies", world.companies.len()),
        ];
        let relations = RELATIONS
            .iter()
            .map(|relation| {
                let own: Vec<&Fact> =
                    self.facts.iter().filter(|f| f.relation == relation.name).collect();
                RelationStatistics {
                    name: relation.name.to_string(),
                    facts: own.len(),
                    objects: own.first().map_or(0, |f| f.candidates.len()),
                    trained: relation.trained.len(),
                    heldout: relation.heldout.len(),
                }
            })
            .collect();
        let mut name_tokens = BTreeMap::new();
        let people = world.people.iter().map(|p| &p.full);
        for name in people.chain(&world.towns).chain(&world.countries).chain(&world.companies) {
            *name_tokens.entry(tokenizer.encode(name, false)?.len()).or_insert(0) += 1;
        }
        let mut dialogues = BTreeMap::new();
        for dialogue in self.dialogues(Split::Train, false) {
            *dialogues.entry(dialogue.kind).or_insert(0) += 1;
        }
        let sum = |count: fn(&Fact) -> usize| self.facts.iter().map(count).sum();
        Ok(Statistics {
            seed: self.seed,
            vocab_size: tokenizer.vocab_size(),
            entities: entities.into_iter().map(|(k, n)| (k.to_string(), n)).collect(),
            facts: self.facts.len(),
            relations,
            prompts_train: sum(|f| f.prompts_train.len()),
            prompts_heldout_pair: sum(|f| f.prompts_heldout_pair.len()),
            prompts_heldout_template: sum(|f| f.prompts_heldout_template.len()),
            exposures: self.exposures(),
            texts: BTreeMap::new(),
            dialogues,
            name_tokens,
            drills: self.drills().len(),
            triplets: self.triplets().len(),
        })
    }

    /// How often the training documents tell a fact in a trained wording: least, mean, most.
    fn exposures(&self) -> (usize, f64, usize) {
        let mut told: HashMap<String, usize> = HashMap::new();
        for text in &self.documents(Split::Train).texts {
            for sentence in text.split_inclusive(". ") {
                let sentence = sentence.trim_end_matches([' ', '.']);
                *told.entry(sentence.to_lowercase()).or_insert(0) += 1;
            }
        }
        let openers = documents::openers();
        let counts: Vec<usize> = self
            .facts
            .iter()
            .map(|fact| {
                let sentences =
                    fact.prompts_train.iter().map(|p| format!("{p}{}", fact.object).to_lowercase());
                sentences
                    .map(|s| {
                        let with = openers.iter().map(|o| format!("{} {s}", o.to_lowercase()));
                        with.chain([s.clone()]).filter_map(|s| told.get(&s)).sum::<usize>()
                    })
                    .sum()
            })
            .collect();
        let total: usize = counts.iter().sum();
        let mean = total as f64 / counts.len().max(1) as f64;
        (counts.iter().min().copied().unwrap_or(0), mean, counts.iter().max().copied().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests;
