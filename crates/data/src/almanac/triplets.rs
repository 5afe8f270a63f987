//! Triplets for sentence encoders.

use super::dialects::{Dialect, definition};
use super::documents::{reversed, sentence};
use super::world::World;
use serde::{Deserialize, Serialize};
use tensor::rng::Rng;

/// `anchor` and `positive` say the same; `negative` says something else in similar words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Triplet {
    /// A statement or a question.
    pub anchor: String,
    /// The same in other words, or the answer.
    pub positive: String,
    /// Another statement of the same kind.
    pub negative: String,
    /// Name of a relation or of a dialect.
    pub topic: String,
}

pub(super) fn triplets(world: &World, seed: u64) -> Vec<Triplet> {
    let mut rng = Rng::stream(seed, "almanac triplets");
    let mut list = Vec::new();
    for fact in &world.known {
        let relation = super::RELATIONS.get(fact.relation);
        let others: Vec<_> = world
            .known
            .iter()
            .filter(|o| o.relation == fact.relation && o.object != fact.object)
            .collect();
        let Some(other) = rng.choose(&others).copied() else { continue };
        let wordings: Vec<&str> = fact.wordings().collect();
        let Some(&one) = rng.choose(&wordings) else { continue };
        let rest: Vec<&str> = wordings.iter().copied().filter(|w| *w != one).collect();
        let Some(&two) = rng.choose(&rest) else { continue };
        let other_wordings: Vec<&str> = other.wordings().collect();
        let Some(&three) = rng.choose(&other_wordings) else { continue };
        let positive =
            if rng.below(4) == 0 { reversed(fact, &mut rng) } else { sentence(fact, two, None) };
        list.push(Triplet {
            anchor: sentence(fact, one, None),
            positive,
            negative: sentence(other, three, None),
            topic: relation.map_or("", |r| r.name).to_string(),
        });
    }
    for dialect in Dialect::ALL {
        let glossary = dialect.glossary();
        for (i, (term, does)) in glossary.iter().enumerate() {
            let Some((other, other_does)) =
                glossary.get((i + 1 + rng.below(glossary.len() - 1)) % glossary.len())
            else {
                continue;
            };
            list.push(Triplet {
                anchor: format!("Define {term}."),
                positive: definition(term, does),
                negative: definition(other, other_does),
                topic: dialect.name().to_string(),
            });
        }
    }
    rng.shuffle(&mut list);
    list
}
