//! The almanac on disk, and what is in it.

use super::chat::Dialogue;
use super::{Almanac, Dialect, Split, vocabulary};
use crate::{Error, Result, Tokenizer};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Longest text that the tokenizer's configuration promises to a model.
const CONTEXT: usize = 512;

/// What an almanac holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Seed of the world.
    pub seed: u64,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// People, towns, countries, companies.
    pub entities: BTreeMap<String, usize>,
    /// Facts in all.
    pub facts: usize,
    /// The relations in the order of the fact table.
    pub relations: Vec<RelationStatistics>,
    /// Prompts of trained wordings.
    pub prompts_train: usize,
    /// Held-out prompts whose wording is trained with other subjects.
    pub prompts_heldout_pair: usize,
    /// Held-out prompts whose wording is never trained.
    pub prompts_heldout_template: usize,
    /// Times that a fact is told by a trained prompt in the training documents: least, mean, most.
    pub exposures: (usize, f64, usize),
    /// Size of every text file by name.
    pub texts: BTreeMap<String, TextStatistics>,
    /// Dialogues of the training set by kind.
    pub dialogues: BTreeMap<String, usize>,
    /// Number of names (people, towns, countries, companies) by their number of tokens.
    pub name_tokens: BTreeMap<usize, usize>,
    /// Exercises in `drills.jsonl`.
    pub drills: usize,
    /// Triplets in `triplets.jsonl`.
    pub triplets: usize,
}

/// One relation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationStatistics {
    /// Its name.
    pub name: String,
    /// Facts.
    pub facts: usize,
    /// Different objects.
    pub objects: usize,
    /// Trained wordings.
    pub trained: usize,
    /// Held-out wordings.
    pub heldout: usize,
}

/// One text file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextStatistics {
    /// Documents or dialogues.
    pub documents: usize,
    /// Bytes of text, without the file's own marks.
    pub bytes: usize,
    /// Tokens, begin and end marks included.
    pub tokens: usize,
}

impl TextStatistics {
    pub(super) fn of(texts: &[String], tokenizer: &Tokenizer) -> Result<Self> {
        // One token more per document: the end mark between documents.
        let tokens: Result<Vec<usize>> =
            texts.par_iter().map(|t| Ok(tokenizer.encode(t, true)?.len() + 1)).collect();
        Ok(Self {
            documents: texts.len(),
            bytes: texts.iter().map(String::len).sum(),
            tokens: tokens?.iter().sum(),
        })
    }
}

impl Statistics {
    /// The statistics as pairs of a label and a value, for printing.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = vec![
            ("seed".to_string(), self.seed.to_string()),
            ("vocabulary".to_string(), self.vocab_size.to_string()),
        ];
        rows.extend(self.entities.iter().map(|(name, n)| (name.clone(), n.to_string())));
        let (least, mean, most) = self.exposures;
        rows.extend([
            ("facts".to_string(), self.facts.to_string()),
            ("relations".to_string(), self.relations.len().to_string()),
            ("trained prompts".to_string(), self.prompts_train.to_string()),
            ("held-out prompts, known wording".to_string(), self.prompts_heldout_pair.to_string()),
            (
                "held-out prompts, new wording".to_string(),
                self.prompts_heldout_template.to_string(),
            ),
            ("tellings per fact".to_string(), format!("{least} to {most}, mean {mean:.1}")),
        ]);
        for (name, text) in &self.texts {
            rows.push((name.clone(), format!("{} texts, {} tokens", text.documents, text.tokens)));
        }
        for (kind, n) in &self.dialogues {
            rows.push((format!("training dialogues: {kind}"), n.to_string()));
        }
        rows.push(("drills".to_string(), self.drills.to_string()));
        rows.push(("triplets".to_string(), self.triplets.to_string()));
        rows
    }
}

fn lines<T: Serialize>(items: &[T]) -> Result<String> {
    let mut text = String::new();
    for item in items {
        text += &serde_json::to_string(item).map_err(|e| Error::Argument(e.to_string()))?;
        text.push('\n');
    }
    Ok(text)
}

fn pretty<T: Serialize>(value: &T) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Argument(e.to_string()))?;
    Ok(text + "\n")
}

fn documents(texts: &[String]) -> Result<String> {
    lines(&texts.iter().map(|text| json!({"text": text})).collect::<Vec<_>>())
}

impl Almanac {
    /// Writes everything into a directory (created if missing; files of the same names are
    /// replaced) and says what was written:
    ///
    /// * `train.jsonl`, `validation.jsonl`, `test.jsonl`: documents under the key `text`
    /// * `facts.json`: the list of [`super::Fact`]
    /// * `dialects/NAME_{train,validation,test}.jsonl`, `dialects/questions.json`
    /// * `chat_train.jsonl`, `chat_validation.jsonl`, `chat_test.jsonl`, `chat_refusing_train.jsonl`,
    ///   `chat_refusing_validation.jsonl`: dialogues under the key `messages`
    /// * `drills.jsonl`, `triplets.jsonl`, `statistics.json`
    /// * `tokenizer/`: `tokenizer.json` and its configuration files
    ///
    /// The same seed and size give the same bytes.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&self, out: &Path) -> Result<Statistics> {
        let put = |name: &str, text: String| -> Result<()> {
            let path = out.join(name);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
            }
            std::fs::write(&path, text).map_err(Error::io(&path))
        };
        let json = self.tokenizer_json()?;
        let tokenizer = vocabulary::tokenizer(&json)?;
        put("tokenizer/tokenizer.json", json)?;
        for (name, value) in vocabulary::configuration(CONTEXT) {
            put(&format!("tokenizer/{name}"), pretty(&value)?)?;
        }
        let mut statistics = self.counts(&tokenizer)?;
        let mut text_file = |name: &str, texts: &[String]| -> Result<()> {
            statistics.texts.insert(name.to_string(), TextStatistics::of(texts, &tokenizer)?);
            put(&format!("{name}.jsonl"), documents(texts)?)
        };
        for split in Split::ALL {
            text_file(split.name(), &self.documents(split).texts)?;
        }
        for dialect in Dialect::ALL {
            for split in Split::ALL {
                let name = format!("dialects/{}_{}", dialect.name(), split.name());
                text_file(&name, &self.dialect_documents(dialect, split).texts)?;
            }
        }
        let questions: Vec<_> = Dialect::ALL.iter().flat_map(|d| d.questions(self.seed)).collect();
        put("dialects/questions.json", pretty(&questions)?)?;
        put("facts.json", pretty(&self.facts())?)?;
        for (prefix, refusing, splits) in
            [("chat", false, &Split::ALL[..]), ("chat_refusing", true, &Split::ALL[..2])]
        {
            for &split in splits {
                let name = format!("{prefix}_{}", split.name());
                let dialogues = self.dialogues(split, refusing);
                let rendered: Vec<String> = dialogues.iter().map(Dialogue::render).collect();
                statistics.texts.insert(name.clone(), TextStatistics::of(&rendered, &tokenizer)?);
                put(&format!("{name}.jsonl"), lines(&dialogues)?)?;
            }
        }
        put("drills.jsonl", lines(&self.drills())?)?;
        put("triplets.jsonl", lines(&self.triplets())?)?;
        put("statistics.json", pretty(&statistics)?)?;
        Ok(statistics)
    }
}
