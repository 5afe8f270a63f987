//! The tasks on tiny random networks, against the same numbers computed the long way.
#![allow(clippy::unwrap_used)]

use data::{Tokenizer, almanac::Fact};
use nn::{Family, Model, Sampling, testing};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use strata_eval::{Question, compare, facts, multiple_choice, next_token_accuracy, perplexity};
use tensor::{host, rng::Rng};

const VOCABULARY: usize = 97;

fn model(seed: u64) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    testing::tiny_checkpoint(dir.path(), Family::Llama, seed).unwrap();
    let model = Model::open(dir.path()).unwrap();
    (dir, model)
}

fn tokenizer() -> Tokenizer {
    let vocabulary: serde_json::Map<String, Value> =
        (0..VOCABULARY).map(|i| (format!("w{i}"), i.into())).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    Tokenizer::from_json(json.to_string().as_bytes(), None, None).unwrap()
}

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.below(VOCABULARY) as u32).collect()
}

fn words(tokens: &[u32]) -> String {
    tokens.iter().map(|t| format!("w{t}")).collect::<Vec<_>>().join(" ")
}

/// Log-probabilities of the next token after every position of one sequence.
fn log_probabilities(model: &Model, tokens: &[u32]) -> Vec<Vec<f64>> {
    let logits = host::into_vec(model.logits(tokens, 1).unwrap());
    logits
        .chunks(VOCABULARY)
        .map(|row| {
            let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
            row.iter().map(|v| f64::from(*v) - sum.ln()).collect()
        })
        .collect()
}

#[test]
fn perplexity_is_the_documented_loop() {
    let (_dir, model) = model(1);
    let tokens = tokens(157, 2);
    for (window, stride) in [(32, 32), (32, 10), (20, 7), (200, 200), (13, 1)] {
        let (mut sum, mut counted, mut previous) = (0.0, 0usize, 0);
        for begin in (0..tokens.len()).step_by(stride) {
            let end = (begin + window).min(tokens.len());
            let new = end - previous;
            let p = log_probabilities(&model, &tokens[begin..end]);
            let first = (end - begin - new).max(1);
            let losses: Vec<f64> =
                (first..end - begin).map(|i| -p[i - 1][tokens[begin + i] as usize]).collect();
            if new > 1 {
                sum += losses.iter().sum::<f64>() / losses.len() as f64 * (new - 1) as f64;
                counted += new - 1;
            }
            previous = end;
            if end == tokens.len() {
                break;
            }
        }
        // A stride of one token leaves only the first window's tokens by that rule.
        let found = perplexity(&model, &tokens, window, stride).unwrap();
        assert_eq!(found.tokens, counted, "window {window}, stride {stride}");
        let expected = sum / counted as f64;
        assert!((found.nll - expected).abs() < 1e-5, "{} {expected}", found.nll);
        assert!((found.perplexity.ln() - found.nll).abs() < 1e-9);
    }
    for (window, stride) in [(1, 1), (8, 0), (8, 9)] {
        assert!(perplexity(&model, &tokens, window, stride).is_err());
    }
    assert!(perplexity(&model, &tokens[..1], 8, 8).is_err());
    assert!(perplexity(&model, &[1, 97], 8, 8).is_err(), "a token outside the vocabulary");
}

#[test]
fn accuracy_counts_the_likeliest_token() {
    let (_dir, model) = model(1);
    // Half of the tokens follow the model's own choice.
    let mut sequence = tokens(1, 3);
    let mut rng = Rng::new(4);
    let mut right = 0;
    while sequence.len() < 24 {
        let p = log_probabilities(&model, &sequence);
        let last = p.last().unwrap();
        let best = (0..VOCABULARY).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap() as u32;
        let chosen = if rng.below(2) == 0 { best } else { rng.below(VOCABULARY) as u32 };
        right += usize::from(chosen == best);
        sequence.push(chosen);
    }
    let found = next_token_accuracy(&model, &sequence, 64).unwrap();
    assert_eq!((found.correct, found.tokens), (right, 23));
    assert!(right > 5);
    let windows = next_token_accuracy(&model, &sequence, 10).unwrap();
    assert_eq!(windows.tokens, 9 + 9 + 3);
}

#[test]
fn facts_agree_with_greedy_generation() {
    let (_dir, model) = model(5);
    let tokenizer = tokenizer();
    let sampling = Sampling { temperature: 0.0, max_tokens: 2, ..Sampling::default() };
    let mut all = Vec::new();
    let mut expected = 0;
    for i in 0..40u64 {
        let prompt = tokens(3 + i as usize % 7, 100 + i);
        let mut ignore = |_: u32| ControlFlow::Continue(());
        let greedy = nn::generate(&model, &prompt, &sampling, &[], &mut ignore).unwrap();
        let object = match i % 3 {
            0 => greedy.clone(),
            1 => greedy[..1].to_vec(),
            _ => vec![greedy[0], (greedy[1] + 1) % VOCABULARY as u32],
        };
        expected += usize::from(i % 3 != 2);
        all.push(Fact {
            subject: "s".into(),
            relation: format!("r{}", i % 2),
            object: format!(" {}", words(&object)),
            candidates: Vec::new(),
            prompts_train: vec![words(&prompt)],
            prompts_heldout: Vec::new(),
            prompts_heldout_pair: vec![words(&prompt), words(&prompt)],
            prompts_heldout_template: Vec::new(),
            neighbours: Vec::new(),
        });
    }
    let scores = facts(&model, &tokenizer, &all).unwrap();
    assert_eq!((scores.train.correct, scores.train.total), (expected, 40));
    assert_eq!((scores.heldout_pair.correct, scores.heldout_pair.total), (2 * expected, 80));
    assert_eq!(scores.heldout, scores.heldout_pair);
    assert_eq!(scores.heldout_template.total, 0);
    assert_eq!(scores.relations.values().map(|(t, _)| t.total).sum::<usize>(), 40);
}

#[test]
fn choices_by_log_likelihood() {
    let (_dir, model) = model(6);
    let tokenizer = tokenizer();
    let mut questions = Vec::new();
    let (mut sums, mut normalized) = (0, 0);
    for i in 0..20u64 {
        let question = tokens(4, 200 + i);
        let choices: Vec<Vec<u32>> =
            (0..3).map(|c| tokens(1 + c as usize, 300 + 10 * i + c)).collect();
        let likelihood = |choice: &[u32]| -> f64 {
            let whole = [&question[..], choice].concat();
            let p = log_probabilities(&model, &whole);
            (question.len()..whole.len()).map(|at| p[at - 1][whole[at] as usize]).sum()
        };
        let scores: Vec<f64> = choices.iter().map(|c| likelihood(c)).collect();
        let per_byte: Vec<f64> =
            scores.iter().zip(&choices).map(|(s, c)| s / words(c).len() as f64).collect();
        let best = |v: &[f64]| (0..v.len()).max_by(|a, b| v[*a].total_cmp(&v[*b])).unwrap();
        let answer = i as usize % 3;
        sums += usize::from(best(&scores) == answer);
        normalized += usize::from(best(&per_byte) == answer);
        questions.push(Question {
            question: words(&question),
            choices: choices.iter().map(|c| words(c)).collect(),
            answer,
        });
    }
    let found = multiple_choice(&model, &tokenizer, &questions).unwrap();
    assert_eq!((found.sum.correct, found.normalized.correct), (sums, normalized));
    assert_eq!(found.sum.total, 20);
    assert!((found.chance - 1.0 / 3.0).abs() < 1e-12);
}

#[test]
fn a_model_equals_itself_and_not_another() {
    let (_a, one) = model(1);
    let (_b, two) = model(2);
    let tokens = tokens(100, 7);
    let same = compare(&one, &one, &tokens, 16).unwrap();
    assert_eq!((same.agreement, same.max_logit_difference, same.tokens), (1.0, 0.0, 96));
    assert!(same.kl_divergence.abs() < 1e-6);
    let found = compare(&one, &two, &tokens, 25).unwrap();
    let mut expected = 0.0;
    for window in tokens.chunks(25) {
        let (p, q) = (log_probabilities(&one, window), log_probabilities(&two, window));
        for (p, q) in p.iter().zip(&q) {
            expected += p.iter().zip(q).map(|(a, b)| a.exp() * (a - b)).sum::<f64>() / 100.0;
        }
    }
    assert!((found.kl_divergence - expected).abs() < 1e-4 * expected, "{expected}");
    assert!(found.agreement < 0.5 && found.tokens == 100);
}
