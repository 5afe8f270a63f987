//! A paper's claim, one file per slug: the method beside its baselines, what was measured, and
//! whether the claim holds.
//!
//! A reproduction states its claims before it measures; thresholds and seeds are fixed here and
//! are the same for everybody. What does not hold is reported as it is.
//!
//! - `subjects`: the models that claims are tested on, natural and with planted outliers;
//! - `arms`: one quantisation job, and the perplexity that comes out.

mod adadim;
mod arms;
mod awq;
mod d_pruner;
pub mod error;
mod gptq;
mod layer_adaptive_pruning;
mod layerwise_quant;
mod pvq;
mod rsq;
mod rtn;
mod subjects;

pub use error::{Error, Result};

use report::{Report, Table};
use std::path::PathBuf;

/// How reproductions run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A subset that ends in about a minute: one group size, few calibration tokens.
    pub fast: bool,
    /// The directory with Strata's own sample models.
    pub samples: PathBuf,
    /// The directory with real models and texts, if there is one.
    pub shared: Option<PathBuf>,
    /// Where intermediate models go; removed afterwards.
    pub scratch: PathBuf,
    /// What was measured already: several claims rest on the same runs.
    memo: arms::Memo,
}

impl Settings {
    /// The usual places: `samples` below the current directory, shared data where
    /// `STRATA_SHARED` (default `../shared`) points, scratch in the system's temporary directory.
    pub fn usual(fast: bool) -> Self {
        let shared = std::env::var_os("STRATA_SHARED").map_or("../shared".into(), PathBuf::from);
        Self {
            fast,
            samples: PathBuf::from("samples"),
            shared: shared.is_dir().then_some(shared),
            scratch: std::env::temp_dir().join(format!("strata-repro-{}", std::process::id())),
            memo: arms::Memo::default(),
        }
    }
}

/// What a reproduction found.
#[derive(Debug, Default)]
pub struct Findings {
    /// The claims with their measured numbers.
    pub claims: Vec<report::Claim>,
    /// The numbers in full.
    pub tables: Vec<Table>,
    /// What was left out and why.
    pub notes: Vec<String>,
}

/// A reproduction.
pub struct Reproduction {
    /// The method's slug.
    pub slug: &'static str,
    /// The room it belongs to.
    pub room: &'static str,
    /// What is claimed, in a sentence.
    pub claim: &'static str,
    /// Runs it.
    pub run: fn(&Settings) -> Result<Findings>,
}

/// All reproductions.
pub const ALL: &[Reproduction] = &[
    rtn::REPRODUCTION,
    gptq::REPRODUCTION,
    awq::REPRODUCTION,
    adadim::REPRODUCTION,
    rsq::REPRODUCTION,
    pvq::REPRODUCTION,
    layerwise_quant::REPRODUCTION,
    layer_adaptive_pruning::REPRODUCTION,
    d_pruner::REPRODUCTION,
];

/// Runs reproductions one after the other and puts what they found on one page.
pub fn run(
    selected: &[&Reproduction],
    settings: &Settings,
) -> Result<(Report, Vec<report::Claim>)> {
    let names: Vec<&str> = selected.iter().map(|r| r.slug).collect();
    let mut page = Report::new("Reproductions", names.join(", "));
    let mut claims = Vec::new();
    let outcome = selected.iter().try_for_each(|reproduction| {
        report::note(&format!("reproducing {}", reproduction.slug));
        let findings = (reproduction.run)(settings)?;
        let section = page.section(reproduction.slug);
        section.text(reproduction.claim);
        for claim in &findings.claims {
            section.push(report::Block::Claim(claim.clone()));
        }
        for table in findings.tables {
            section.push(table);
        }
        for note in findings.notes {
            section.text(note);
        }
        claims.extend(findings.claims);
        Ok(())
    });
    // The scratch directory holds nothing but copies.
    let _ = std::fs::remove_dir_all(&settings.scratch);
    outcome.map(|()| (page, claims))
}
