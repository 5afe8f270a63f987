//! Facts and how they are asked for.

use serde::{Deserialize, Serialize};

/// One fact of the world, with the ways of saying it. A prompt is the text up to the object; prompt
/// followed by [`Fact::object`] (which starts with a space) followed by a full stop is a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// Who or what the fact is about, by full name.
    pub subject: String,
    /// Name of the relation, for example `birth_town`.
    pub relation: String,
    /// The object with its leading space.
    pub object: String,
    /// Every object that the relation has for some subject, each with its leading space, sorted.
    pub candidates: Vec<String>,
    /// Prompts whose sentence occurs in the training text.
    pub prompts_train: Vec<String>,
    /// All held-out prompts: `prompts_heldout_pair`, then `prompts_heldout_template`.
    pub prompts_heldout: Vec<String>,
    /// Held-out prompts of wordings that training uses for other subjects, never for this one.
    pub prompts_heldout_pair: Vec<String>,
    /// Held-out prompts of wordings that training never uses for any subject.
    pub prompts_heldout_template: Vec<String>,
    /// Trained prompts of the same relation for other subjects whose object is another one.
    pub neighbours: Vec<String>,
}

impl Fact {
    /// Whether generated text after a prompt begins with the object. Leading white space does not
    /// count (tokenizers differ in whether they keep it); the object must end where a word ends.
    pub fn completed_by(&self, completion: &str) -> bool {
        completion
            .trim_start()
            .strip_prefix(self.object.trim_start())
            .is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
    }
}
