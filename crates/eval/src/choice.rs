//! Multiple choice by log-likelihood: which of several continuations does the model find likeliest?

use crate::{
    error::{Error, Result, option},
    facts::{Score, continued},
    scan::{BATCH_TOKENS, log_probability, logits_of},
};
use data::Tokenizer;
use nn::Model;
use report::{Cell, Column, Table};
use serde::{Deserialize, Serialize};
use std::{path::Path, time::Instant};
use tensor::host;

/// A question with its possible answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// What stands before the answer.
    pub question: String,
    /// The answers to choose from.
    pub choices: Vec<String>,
    /// Index of the right one.
    #[serde(deserialize_with = "index")]
    pub answer: usize,
}

/// Some files write the index as text.
fn index<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Index {
        Number(usize),
        Text(String),
    }
    match Index::deserialize(deserializer)? {
        Index::Number(n) => Ok(n),
        Index::Text(t) => t.trim().parse().map_err(serde::de::Error::custom),
    }
}

/// Scores of a set of questions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ChoiceScores {
    /// Right by the sum of the log-probabilities of the answer's tokens.
    pub sum: Score,
    /// Right by that sum divided by the answer's length in bytes, which does not depend on the
    /// tokenizer.
    pub normalized: Score,
    /// Accuracy of guessing.
    pub chance: f64,
    /// Wall time.
    pub seconds: f64,
}

impl ChoiceScores {
    /// The scores as a table.
    pub fn table(&self) -> Table {
        let columns = ["accuracy", "accuracy (per byte)", "chance", "questions"];
        Table::new("Multiple choice", columns.map(Column::right).to_vec()).row(vec![
            Cell::Percent(self.sum.accuracy()),
            Cell::Percent(self.normalized.accuracy()),
            Cell::Percent(self.chance),
            Cell::Int(self.sum.total as i64),
        ])
    }
}

/// Reads questions from JSONL: `{"question": "...", "choices": ["...", ...], "answer": 0}`.
///
/// # Errors
/// The file and line that cannot be used.
pub fn read_questions(path: &Path) -> Result<Vec<Question>> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let refuse =
            |reason: String| Error::Question { path: path.to_path_buf(), line: number + 1, reason };
        let question: Question = serde_json::from_str(line).map_err(|e| refuse(e.to_string()))?;
        if question.answer >= question.choices.len() {
            let (answer, n) = (question.answer, question.choices.len());
            return Err(refuse(format!("`answer` {answer} is not an index into {n} choices")));
        }
        if question.choices.iter().any(|c| c.trim().is_empty()) {
            return Err(refuse("a choice is empty".into()));
        }
        all.push(question);
    }
    if all.is_empty() {
        return Err(option(path.display().to_string(), "holds no questions"));
    }
    Ok(all)
}

struct Probe {
    question: usize,
    tokens: Vec<u32>,
    from: usize,
}

/// Answers questions by the log-likelihood of a space and the choice after the question.
///
/// # Errors
/// From the tokenizer and the network.
pub fn multiple_choice(
    model: &Model,
    tokenizer: &Tokenizer,
    questions: &[Question],
) -> Result<ChoiceScores> {
    let started = Instant::now();
    let mut probes = Vec::new();
    for (question, q) in questions.iter().enumerate() {
        for choice in &q.choices {
            let continuation = format!(" {}", choice.trim());
            let (tokens, from) = continued(q.question.trim_end(), &continuation, tokenizer)?;
            probes.push(Probe { question, tokens, from: from.max(1) });
        }
    }
    let mut order: Vec<usize> = (0..probes.len()).collect();
    order.sort_by_key(|i| probes[*i].tokens.len());
    let mut sums = vec![0.0; probes.len()];
    let mut at = 0;
    while at < order.len() {
        let mut end = at + 1;
        while end < order.len() && (end + 1 - at) * probes[order[end]].tokens.len() <= BATCH_TOKENS
        {
            end += 1;
        }
        let group = &order[at..end];
        for (i, sum) in group.iter().zip(likelihoods(model, &probes, group)?) {
            sums[*i] = sum;
        }
        at = end;
    }
    Ok(score(questions, &probes, &sums, started.elapsed().as_secs_f64()))
}

fn score(questions: &[Question], probes: &[Probe], sums: &[f64], seconds: f64) -> ChoiceScores {
    let mut scores =
        ChoiceScores { sum: Score::default(), normalized: Score::default(), chance: 0.0, seconds };
    let mut at = 0;
    for (index, question) in questions.iter().enumerate() {
        let n = probes[at..].iter().take_while(|p| p.question == index).count();
        let own = &sums[at..at + n];
        let per_byte: Vec<f64> = own
            .iter()
            .zip(&question.choices)
            .map(|(sum, choice)| sum / choice.trim().len().max(1) as f64)
            .collect();
        for (score, values) in [(&mut scores.sum, own), (&mut scores.normalized, &per_byte[..])] {
            score.total += 1;
            score.correct += usize::from(best(values) == question.answer);
        }
        scores.chance += 1.0 / question.choices.len() as f64 / questions.len() as f64;
        at += n;
    }
    scores
}

/// The first of the largest values.
fn best(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

/// Log-probability of the continuation of every probe of a group.
fn likelihoods(model: &Model, probes: &[Probe], group: &[usize]) -> Result<Vec<f64>> {
    let length = group.iter().map(|i| probes[*i].tokens.len()).max().unwrap_or(0);
    let mut tokens = Vec::with_capacity(group.len() * length);
    let mut rows = Vec::new();
    for (g, i) in group.iter().enumerate() {
        let probe = &probes[*i];
        tokens.extend_from_slice(&probe.tokens);
        tokens.resize((g + 1) * length, 0);
        rows.extend((probe.from - 1..probe.tokens.len() - 1).map(|r| g * length + r));
    }
    let mut sums = vec![0.0; group.len()];
    logits_of(model, &tokens, group.len(), &rows, |rows, logits| {
        let vocabulary = logits.dims()[1];
        host::read(&logits, |values| {
            for (row, logits) in rows.iter().zip(values.chunks(vocabulary)) {
                sums[row / length] += log_probability(logits, tokens[row + 1]);
            }
        });
        Ok(())
    })?;
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.jsonl");
        let good = r#"{"question": "1+1=", "choices": ["2", "3"], "answer": 0}"#;
        std::fs::write(&path, format!("{good}\n\n{}\n", good.replace(": 0", ": \"1\""))).unwrap();
        let questions = read_questions(&path).unwrap();
        assert_eq!((questions[0].answer, questions[1].answer), (0, 1));
        std::fs::write(&path, format!("{good}\n{}\n", good.replace(": 0", ": 2"))).unwrap();
        let message = read_questions(&path).unwrap_err().to_string();
        assert!(message.contains("line 2") && message.contains("2 choices"), "{message}");
    }

    #[test]
    fn scoring_by_sum_and_by_length() {
        let questions = vec![Question {
            question: "q".into(),
            choices: vec!["abcdefgh".into(), "ab".into()],
            answer: 0,
        }];
        let probe = || Probe { question: 0, tokens: vec![], from: 1 };
        let scores = score(&questions, &[probe(), probe()], &[-4.0, -2.0], 0.0);
        assert_eq!((scores.sum.correct, scores.normalized.correct), (0, 1));
        assert_eq!(scores.chance, 0.5);
    }
}
