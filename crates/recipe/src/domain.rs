//! The domain's text: what is scored, and what is held out to measure.

use crate::Result;
use crate::measure::almanac_of;
use compress::prune::DomainOptions;
use data::almanac::{Almanac, Split};
use data::text::{self, Documents};
use data::{Tokenizer, almanac::Dialect};
use nn::Model;

/// Text of one domain, in two parts.
#[derive(Debug, Clone)]
pub struct DomainText {
    /// Documents that methods may look at.
    pub scored: Documents,
    /// Documents that only the measurement sees.
    pub held_out: Documents,
    /// What the held-out part is, for the report.
    pub source: String,
}

/// One of so many documents is held out when no test text is given.
const HELD_OUT: usize = 10;

impl DomainText {
    /// The domain that `options` name; `None` when they name none.
    pub fn load(options: &DomainOptions, model: &Model) -> Result<Option<Self>> {
        if let Some(name) = options.dialect {
            let known = almanac_of(model.checkpoint.directory());
            if known.is_none() {
                report::warn(
                    "this model was not trained on an almanac; the dialect is the embedded one's",
                );
            }
            let almanac = known.unwrap_or_else(Almanac::embedded);
            return Ok(Some(Self::of_dialect(&almanac, name.dialect())));
        }
        let Some(file) = &options.file else { return Ok(None) };
        let mut documents = text::load(file)?;
        if documents.len() == 1 {
            documents = documents.split_blank_lines();
        }
        if let Some(test) = &options.domain_test {
            let held_out = text::load(test)?;
            let source = test.display().to_string();
            return Ok(Some(Self { scored: documents, held_out, source }));
        }
        Ok(Some(Self::split(documents, &file.display().to_string())))
    }

    /// A dialect: its training documents are scored, its test documents measured.
    pub fn of_dialect(almanac: &Almanac, dialect: Dialect) -> Self {
        Self {
            scored: almanac.dialect_documents(dialect, Split::Train),
            held_out: almanac.dialect_documents(dialect, Split::Test),
            source: format!("the almanac's {} test text", dialect.name()),
        }
    }

    /// Holds out every tenth document. With fewer documents than that nothing can be held out, and
    /// the measurement sees what was scored.
    fn split(documents: Documents, name: &str) -> Self {
        if documents.len() < HELD_OUT {
            report::warn(&format!(
                "{name} holds {} documents, too few to hold some out: the domain is measured on \
                 text that was also scored; give --domain-test",
                documents.len()
            ));
            let source = format!("{name} (scored as well)");
            return Self { scored: documents.clone(), held_out: documents, source };
        }
        let part = |held_out: bool| {
            let chosen = documents.texts.iter().enumerate();
            let chosen = chosen.filter(|(i, _)| (i % HELD_OUT == HELD_OUT - 1) == held_out);
            Documents::new(chosen.map(|(_, text)| text.clone()).collect())
        };
        Self {
            scored: part(false),
            held_out: part(true),
            source: format!("every tenth document of {name}, held out"),
        }
    }

    /// The scored documents as token ids, each with the tokenizer's marks around it.
    pub fn samples(&self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
        let mut samples = Vec::new();
        for text in self.scored.texts.iter().filter(|text| !text.trim().is_empty()) {
            let mut ids = tokenizer.encode(text, true)?;
            if let Some(eos) = tokenizer.eos().filter(|eos| ids.last() != Some(eos)) {
                ids.push(eos);
            }
            samples.push(ids);
        }
        Ok(samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tenth_document_is_held_out() {
        let documents = Documents::new((0..25).map(|i| i.to_string()).collect());
        let text = DomainText::split(documents, "d");
        assert_eq!(text.held_out.texts, ["9", "19"]);
        assert_eq!(text.scored.len(), 23);
        let few = DomainText::split(Documents::new(vec!["a".into(); 9]), "d");
        assert_eq!((few.scored.len(), few.held_out.len()), (9, 9));
        assert!(few.source.contains("scored"));
    }

    #[test]
    fn a_dialect_is_measured_on_text_it_was_not_scored_on() {
        let almanac = Almanac::generate(0, data::almanac::Size::Tiny);
        let text = DomainText::of_dialect(&almanac, Dialect::Law);
        assert!(!text.held_out.is_empty());
        assert!(text.held_out.texts.iter().all(|t| !text.scored.texts.contains(t)));
    }
}
