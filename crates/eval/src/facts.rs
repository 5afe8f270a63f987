//! Whether a model knows facts: greedy completion of a prompt must give the object.
//!
//! A greedy completion gives the object's tokens exactly when, with the object appended, the
//! likeliest token at each of its places is the object's own; so one pass per batch of prompts
//! decides all of them. The object must also end there: the likeliest token after it must not
//! continue the word.

use crate::{
    error::Result,
    scan::{BATCH_TOKENS, argmax, logits_of},
};
use data::{Tokenizer, almanac::Fact};
use nn::Model;
use report::{Cell, Column, Progress, Table};
use serde::Serialize;
use std::{collections::BTreeMap, time::Instant};
use tensor::host;

/// Right answers among questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Score {
    /// Right answers.
    pub correct: usize,
    /// Questions.
    pub total: usize,
}

impl Score {
    /// `correct / total`; 0 without questions.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.total.max(1) as f64
    }

    fn add(&mut self, right: bool) {
        self.correct += usize::from(right);
        self.total += 1;
    }
}

/// Fact recall by kind of prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FactScores {
    /// Prompts whose sentences are in the training text.
    pub train: Score,
    /// All held-out prompts.
    pub heldout: Score,
    /// Held-out prompts of wordings that training uses for other subjects.
    pub heldout_pair: Score,
    /// Held-out prompts of wordings that training never uses.
    pub heldout_template: Score,
    /// Per relation: trained prompts and held-out prompts.
    pub relations: BTreeMap<String, (Score, Score)>,
    /// Facts asked for.
    pub facts: usize,
    /// Wall time.
    pub seconds: f64,
}

impl FactScores {
    /// The scores as a table, one row per kind of prompt.
    pub fn table(&self) -> Table {
        let columns = vec![
            Column::left("prompts"),
            Column::right("accuracy"),
            Column::right("correct"),
            Column::right("asked"),
        ];
        let mut table = Table::new("Facts", columns);
        for (kind, score) in [
            ("trained paraphrases", self.train),
            ("held-out paraphrases", self.heldout),
            ("held-out: known wording, new subject", self.heldout_pair),
            ("held-out: new wording", self.heldout_template),
        ] {
            table.push(vec![
                Cell::text(kind),
                Cell::Percent(score.accuracy()),
                Cell::Int(score.correct as i64),
                Cell::Int(score.total as i64),
            ]);
        }
        table
    }

    /// Accuracy by relation.
    pub fn relation_table(&self) -> Table {
        let columns = vec![
            Column::left("relation"),
            Column::right("trained"),
            Column::right("held out"),
            Column::right("asked"),
        ];
        let mut table = Table::new("Facts by relation", columns);
        for (relation, (train, heldout)) in &self.relations {
            table.push(vec![
                Cell::text(relation.as_str()),
                Cell::Percent(train.accuracy()),
                Cell::Percent(heldout.accuracy()),
                Cell::Int((train.total + heldout.total) as i64),
            ]);
        }
        table
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Train,
    Pair,
    Template,
}

/// One prompt with its object: `tokens[object..]` are the object's.
struct Probe {
    fact: usize,
    kind: Kind,
    tokens: Vec<u32>,
    object: usize,
}

/// Asks for every fact with every prompt.
///
/// # Errors
/// From the tokenizer and the network.
pub fn facts(model: &Model, tokenizer: &Tokenizer, facts: &[Fact]) -> Result<FactScores> {
    facts_with(model, tokenizer, facts, &Progress::hidden())
}

/// As [`facts`], with a progress display that counts prompts.
///
/// # Errors
/// As [`facts`].
pub fn facts_with(
    model: &Model,
    tokenizer: &Tokenizer,
    facts: &[Fact],
    progress: &Progress,
) -> Result<FactScores> {
    let started = Instant::now();
    let mut probes = Vec::new();
    for (index, fact) in facts.iter().enumerate() {
        let kinds = [
            (Kind::Train, &fact.prompts_train),
            (Kind::Pair, &fact.prompts_heldout_pair),
            (Kind::Template, &fact.prompts_heldout_template),
        ];
        for (kind, prompts) in kinds {
            for prompt in prompts {
                probes.push(probe(index, kind, prompt, &fact.object, tokenizer)?);
            }
        }
    }
    // Equal lengths together waste least padding.
    probes.sort_by_key(|p| p.tokens.len());
    let mut scores = FactScores { facts: facts.len(), ..FactScores::default() };
    let mut at = 0;
    while at < probes.len() {
        let mut end = at + 1;
        while end < probes.len() && (end + 1 - at) * probes[end].tokens.len() <= BATCH_TOKENS {
            end += 1;
        }
        let group = &probes[at..end];
        for (probe, right) in group.iter().zip(answers(model, tokenizer, group)?) {
            let relation = scores.relations.entry(facts[probe.fact].relation.clone()).or_default();
            match probe.kind {
                Kind::Train => {
                    scores.train.add(right);
                    relation.0.add(right);
                }
                Kind::Pair => scores.heldout_pair.add(right),
                Kind::Template => scores.heldout_template.add(right),
            }
            if probe.kind != Kind::Train {
                scores.heldout.add(right);
                relation.1.add(right);
            }
        }
        at = end;
        progress.inc(group.len() as u64);
    }
    scores.seconds = started.elapsed().as_secs_f64();
    Ok(scores)
}

fn probe(
    fact: usize,
    kind: Kind,
    prompt: &str,
    object: &str,
    tokenizer: &Tokenizer,
) -> Result<Probe> {
    let (tokens, object) = continued(prompt, object, tokenizer)?;
    Ok(Probe { fact, kind, tokens, object })
}

/// Tokens of `prompt` followed by `continuation`, and where the continuation's begin.
pub(crate) fn continued(
    prompt: &str,
    continuation: &str,
    tokenizer: &Tokenizer,
) -> Result<(Vec<u32>, usize)> {
    let start = tokenizer.encode(prompt, true)?;
    let whole = tokenizer.encode(&format!("{prompt}{continuation}"), true)?;
    // A merge across the border belongs to the continuation.
    let common = start.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    let at = common.min(whole.len().saturating_sub(1));
    Ok((whole, at))
}

/// Whether each probe's object is the greedy completion.
fn answers(model: &Model, tokenizer: &Tokenizer, group: &[Probe]) -> Result<Vec<bool>> {
    let length = group.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
    let mut tokens = Vec::with_capacity(group.len() * length);
    for probe in group {
        tokens.extend_from_slice(&probe.tokens);
        // Causal attention never looks at what follows.
        tokens.resize(tokens.len() + length - probe.tokens.len(), 0);
    }
    let mut rows = Vec::new();
    for (i, probe) in group.iter().enumerate() {
        let first = probe.object.max(1) - 1;
        rows.extend((first..probe.tokens.len()).map(|r| i * length + r));
    }
    let mut right = vec![true; group.len()];
    logits_of(model, &tokens, group.len(), &rows, |rows, logits| {
        let vocabulary = logits.dims()[1];
        let best = host::read(&logits, |v| argmax(v, vocabulary));
        for (row, best) in rows.iter().zip(best) {
            let (i, at) = (row / length, row % length);
            let tokens = &group[i].tokens;
            right[i] = right[i]
                && match tokens.get(at + 1) {
                    Some(expected) => *expected == best,
                    None => !continues_word(tokenizer, &tokens[group[i].object..], best)?,
                };
        }
        Ok(())
    })?;
    Ok(right)
}

/// Whether `next` continues the word that `tokens` end with.
fn continues_word(tokenizer: &Tokenizer, tokens: &[u32], next: u32) -> Result<bool> {
    // Decoded together, because a token alone may lose its leading space.
    let before = tokenizer.decode(tokens, true)?;
    let after = tokenizer.decode(&[tokens, &[next]].concat(), true)?;
    let rest = after.strip_prefix(before.as_str()).unwrap_or_default();
    Ok(rest.starts_with(char::is_alphanumeric))
}
