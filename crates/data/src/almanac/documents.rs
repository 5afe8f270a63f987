//! The almanac's running text: fact sentences in many orders and wordings, stories, dialects,
//! drills, and the rules of the world.

use super::chat;
use super::dialects::Dialect;
use super::drills::drill;
use super::names::small;
use super::relations::{RELATIONS, with_subject};
use super::stories::story;
use super::world::{Known, World};
use super::{Size, Split};
use std::collections::HashSet;
use tensor::rng::Rng;

/// Put before some fact sentences, so that a prompt is known in the middle of a sentence too.
const OPENERS: &[&str] =
    &["Everyone knows that", "The almanac says that", "People say that", "It is known that"];

/// How many texts of each kind a split has.
#[derive(Clone, Copy, Debug)]
struct Amounts {
    /// Times that every fact is told by a fact sentence.
    rounds: usize,
    /// Times that every fact is told object first.
    reverse: usize,
    stories: usize,
    /// Texts per dialect.
    dialect: usize,
    /// Texts of several exercises.
    drills: usize,
    rules: usize,
}

impl Amounts {
    fn of(size: Size, split: Split) -> Self {
        match (size, split) {
            (Size::Standard, Split::Train) => Self {
                rounds: 150,
                reverse: 18,
                stories: 4500,
                dialect: 2000,
                drills: 2500,
                rules: 600,
            },
            (Size::Standard, _) => {
                Self { rounds: 3, reverse: 1, stories: 200, dialect: 80, drills: 100, rules: 20 }
            }
            (Size::Tiny, Split::Train) => {
                Self { rounds: 12, reverse: 2, stories: 120, dialect: 60, drills: 60, rules: 20 }
            }
            (Size::Tiny, _) => {
                Self { rounds: 2, reverse: 1, stories: 20, dialect: 10, drills: 10, rules: 4 }
            }
        }
    }
}

/// The sentence of a fact in one wording.
pub(super) fn sentence(fact: &Known, wording: &str, opener: Option<&str>) -> String {
    let text = format!("{} {}.", with_subject(wording, &fact.subject), fact.object);
    match opener {
        // A name keeps its capital, a wording's first word does not.
        Some(opener) if wording.starts_with("{}") => format!("{opener} {text}"),
        Some(opener) => format!("{opener} {}", small(&text)),
        None => text,
    }
}

/// A sentence with the object first.
pub(super) fn reversed(fact: &Known, rng: &mut Rng) -> String {
    let wordings = RELATIONS.get(fact.relation).map_or(&[][..], |r| r.reverse);
    let wording = rng.choose(wordings).copied().unwrap_or_default();
    let text = wording.replacen("[]", &fact.object, 1).replacen("{}", &fact.subject, 1);
    super::names::capital(&text)
}

/// The documents of a split. `edition` orders and words them anew (the facts stay).
pub(super) fn documents(
    world: &World,
    seed: u64,
    size: Size,
    split: Split,
    edition: u64,
) -> Vec<String> {
    let label = |part: &str| format!("almanac {part} {} {edition}", split.name());
    let stream = |part: &str| Rng::stream(seed, &label(part));
    let amounts = Amounts::of(size, split);
    let least = if split == Split::Train { 1 } else { 4 };
    let mut texts = fact_documents(world, &mut stream("facts"), amounts.rounds, least);
    texts.extend(reverse_documents(world, &mut stream("reverse"), amounts.reverse, least));
    let mut rng = stream("stories");
    texts.extend((0..amounts.stories).map(|_| story(world, &mut rng)));
    for dialect in Dialect::ALL {
        texts.extend(dialect_documents(seed, size, dialect, split, edition));
    }
    let mut rng = stream("drills");
    for _ in 0..amounts.drills {
        let lines: Vec<String> = (0..6).map(|_| drill(&mut rng, false).sentence()).collect();
        texts.push(lines.join(" "));
    }
    let mut rng = stream("rules");
    texts.extend((0..amounts.rules).map(|_| chat::rule_document(world, &mut rng)));
    stream("order").shuffle(&mut texts);
    texts
}

/// The texts of one dialect in a split.
pub(super) fn dialect_documents(
    seed: u64,
    size: Size,
    dialect: Dialect,
    split: Split,
    edition: u64,
) -> Vec<String> {
    let label = format!("almanac {} {} {edition}", dialect.name(), split.name());
    let mut rng = Rng::stream(seed, &label);
    (0..Amounts::of(size, split).dialect).map(|_| dialect.text(&mut rng)).collect()
}

/// Every fact once per round: in random company, or with the other facts of its subject, or with
/// facts of the same relation.
fn fact_documents(world: &World, rng: &mut Rng, rounds: usize, least: usize) -> Vec<String> {
    let offsets: Vec<usize> = world.known.iter().map(|_| rng.below(64)).collect();
    let mut texts = Vec::new();
    for round in 0..rounds {
        let told: Vec<String> = world
            .known
            .iter()
            .zip(&offsets)
            .map(|(fact, offset)| {
                let wordings: Vec<&str> = fact.wordings().collect();
                let at = (offset + round) % wordings.len().max(1);
                let opener = if rng.below(6) == 0 { rng.choose(OPENERS).copied() } else { None };
                sentence(fact, wordings.get(at).copied().unwrap_or("{}"), opener)
            })
            .collect();
        let groups: Vec<Vec<usize>> = match round % 4 {
            1 => {
                let mut groups: Vec<Vec<usize>> = world.by_subject.values().cloned().collect();
                groups.iter_mut().for_each(|g| rng.shuffle(g));
                groups
            }
            3 => {
                let mut groups = Vec::new();
                for relation in 0..RELATIONS.len() {
                    let mut same: Vec<usize> =
                        (0..told.len()).filter(|&i| world.known[i].relation == relation).collect();
                    rng.shuffle(&mut same);
                    groups.extend(chop(rng, &same, least));
                }
                groups
            }
            _ => {
                let order = rng.permutation(told.len());
                chop(rng, &order, least)
            }
        };
        texts.extend(groups.iter().map(|group| join(&told, group)));
    }
    texts
}

fn reverse_documents(world: &World, rng: &mut Rng, rounds: usize, least: usize) -> Vec<String> {
    let mut texts = Vec::new();
    for _ in 0..rounds {
        let told: Vec<String> = world.known.iter().map(|fact| reversed(fact, rng)).collect();
        let order = rng.permutation(told.len());
        texts.extend(chop(rng, &order, least).iter().map(|group| join(&told, group)));
    }
    texts
}

fn join(told: &[String], group: &[usize]) -> String {
    let sentences: Vec<&str> =
        group.iter().filter_map(|&i| told.get(i)).map(String::as_str).collect();
    sentences.join(" ")
}

/// Cuts a list into runs of `least` to 8.
fn chop(rng: &mut Rng, order: &[usize], least: usize) -> Vec<Vec<usize>> {
    let mut groups = Vec::new();
    let mut rest = order;
    while !rest.is_empty() {
        let length = (least + rng.below(9 - least)).min(rest.len());
        let (group, tail) = rest.split_at(length);
        groups.push(group.to_vec());
        rest = tail;
    }
    groups
}

/// Drops texts that occur among `others`, and repetitions.
pub(super) fn without(texts: Vec<String>, others: &[String]) -> Vec<String> {
    let mut seen: HashSet<&str> = others.iter().map(String::as_str).collect();
    let keep: Vec<bool> = texts.iter().map(|t| !t.is_empty() && seen.insert(t)).collect();
    texts.iter().zip(keep).filter(|(_, keep)| *keep).map(|(t, _)| t.clone()).collect()
}

/// The openers, for counting.
pub(super) fn openers() -> &'static [&'static str] {
    OPENERS
}
