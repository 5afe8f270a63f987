//! Drills: sums, comparisons, copying.

use serde::{Deserialize, Serialize};
use tensor::rng::Rng;

/// One exercise: `prompt` followed by `answer` (which starts with a space) and a full stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drill {
    /// `sum`, `comparison`, `copy` or `count`.
    pub kind: String,
    /// The text up to the answer.
    pub prompt: String,
    /// The answer with its leading space.
    pub answer: String,
    /// Whether the exercise is kept out of all training text.
    pub held_out: bool,
}

impl Drill {
    /// The exercise with its answer as a sentence.
    pub fn sentence(&self) -> String {
        format!("{}{}.", self.prompt, self.answer)
    }
}

/// Words for copying.
pub(super) const WORDS: &[&str] = &[
    "red", "blue", "green", "stone", "river", "lamp", "tree", "house", "road", "bread", "salt",
    "fish", "bird", "moon", "sun", "star", "king", "queen", "door", "book", "ship", "horse",
    "rain", "wind", "gold", "iron", "milk", "apple", "chair", "glass",
];

/// Numbers below 100 whose sums are never trained on: one pair in ten.
fn held_out_pair(a: usize, b: usize) -> bool {
    (a.min(b) * 7 + a.max(b) * 3).is_multiple_of(10)
}

/// One exercise of the training text, or a held-out one.
pub(super) fn drill(rng: &mut Rng, held_out: bool) -> Drill {
    loop {
        let drill = draw(rng);
        if drill.held_out == held_out {
            return drill;
        }
    }
}

fn draw(rng: &mut Rng) -> Drill {
    let one = |kind: &str, prompt: String, answer: String, held_out: bool| Drill {
        kind: kind.to_string(),
        prompt,
        answer: format!(" {answer}"),
        held_out,
    };
    match rng.below(10) {
        0..=3 => {
            let top = if rng.below(2) == 0 { 10 } else { 100 };
            let (a, b) = (rng.below(top), rng.below(top));
            one("sum", format!("{a} + {b} ="), (a + b).to_string(), held_out_pair(a, b))
        }
        4..=5 => {
            let (a, b) = (rng.below(100), rng.below(100));
            let b = if a == b { (b + 1) % 100 } else { b };
            let held_out = held_out_pair(a, b);
            if rng.below(2) == 0 {
                one(
                    "comparison",
                    format!("The larger of {a} and {b} is"),
                    a.max(b).to_string(),
                    held_out,
                )
            } else {
                one(
                    "comparison",
                    format!("The smaller of {a} and {b} is"),
                    a.min(b).to_string(),
                    held_out,
                )
            }
        }
        6..=8 => {
            let words = words(rng, 2);
            // A sum over the letters decides, so that the same words are always on the same side.
            let held_out = words.bytes().map(usize::from).sum::<usize>().is_multiple_of(10);
            one("copy", format!("Copy {words}:"), words, held_out)
        }
        _ => {
            let a = rng.below(90);
            one("count", format!("{a} {} {}", a + 1, a + 2), (a + 3).to_string(), a % 10 == 4)
        }
    }
}

/// Different words: `least` to `least + 2` of them.
pub(super) fn words(rng: &mut Rng, least: usize) -> String {
    let mut pool = WORDS.to_vec();
    rng.shuffle(&mut pool);
    let count = least + rng.below(3);
    pool.truncate(count);
    pool.join(" ")
}
