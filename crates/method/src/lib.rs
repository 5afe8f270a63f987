//! What a method is to the rest of Strata: its card, its options schema, name patterns and
//! spelling suggestions.
//!
//! A method (RTN, GPTQ, AWQ, ...) is defined once, by a struct of options with doc comments; the
//! JSON Schema derived from that struct feeds `strata methods SLUG`, the recipe's validation and
//! the documentation ([`options`]). This crate knows no method by name: every room hands its
//! [`MethodCard`]s to the command line.

mod nearest;
mod options;
mod pattern;

pub use nearest::{did_you_mean, nearest};
pub use options::{OptionRow, options, options_markdown};
pub use pattern::Pattern;

/// A method as the rest of the house sees it: names, source, and the schema of its options.
#[derive(Clone, Copy)]
pub struct MethodCard {
    /// The name on the command line and in recipes, for example `"gptq"`.
    pub slug: &'static str,
    /// The name for people, for example `"GPTQ: second-order rounding"`.
    pub title: &'static str,
    /// The room (crate) the method lives in, for example `"compress"`.
    pub room: &'static str,
    /// The paper the method comes from: authors, title, year, identifier.
    pub paper: &'static str,
    /// One or two sentences: what it does and when to take it.
    pub summary: &'static str,
    /// Builds the JSON Schema of the method's options struct.
    pub schema: fn() -> schemars::Schema,
}

impl MethodCard {
    /// The options of the method, one row per option, in the order of the struct's fields.
    pub fn options(&self) -> Vec<OptionRow> {
        options(&(self.schema)())
    }

    /// The card of the method called `slug`, or a message with the nearest known name.
    ///
    /// # Errors
    /// When no card has this slug.
    pub fn find<'a>(
        slug: &str,
        cards: impl IntoIterator<Item = &'a MethodCard>,
    ) -> Result<&'a MethodCard, String> {
        let cards: Vec<&MethodCard> = cards.into_iter().collect();
        if let Some(card) = cards.iter().find(|card| card.slug == slug) {
            return Ok(card);
        }
        let known: Vec<&str> = cards.iter().map(|card| card.slug).collect();
        Err(did_you_mean("method", slug, &known))
    }
}

impl std::fmt::Debug for MethodCard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MethodCard").field("slug", &self.slug).field("room", &self.room).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(slug: &'static str) -> MethodCard {
        MethodCard {
            slug,
            title: "",
            room: "compress",
            paper: "",
            summary: "",
            schema: || schemars::json_schema!({"type": "object"}),
        }
    }

    #[test]
    fn an_unknown_method_names_the_nearest_one() {
        let cards = [card("rtn"), card("gptq"), card("awq")];
        assert_eq!(MethodCard::find("awq", &cards).unwrap().slug, "awq");
        let message = MethodCard::find("gtpq", &cards).unwrap_err();
        assert!(message.contains("did you mean `gptq`?"), "{message}");
        let message = MethodCard::find("zzzzzzzz", &cards).unwrap_err();
        assert!(message.contains("known: rtn, gptq, awq"), "{message}");
    }
}
