//! What a model can do, as numbers: perplexity, next-token accuracy, facts, multiple choice,
//! top-1 accuracy on images, and how far two models' predictions lie apart.
//!
//! Every task takes an open [`nn::Model`] (plain or quantised), computes in batches, and returns a
//! serde struct that also prints itself as a [`report::Table`]. Reading text and choosing models is
//! left to the callers.

pub mod accuracy;
pub mod choice;
pub mod compare;
pub mod error;
pub mod facts;
pub mod images;
pub mod perplexity;
mod scan;

pub use accuracy::{NextTokenAccuracy, next_token_accuracy};
pub use choice::{ChoiceScores, Question, multiple_choice, read_questions};
pub use compare::{Comparison, compare, divergence};
pub use error::{Error, Result};
pub use facts::{FactScores, Score, facts};
pub use images::{ClassScore, ImageScores, check_images, classify, classify_with};
pub use perplexity::{Perplexity, perplexity, perplexity_with};
