//! RTN is the baseline; what it claims is only what rounding promises.

use crate::arms::{self, Arm};
use crate::{Findings, Reproduction, Result, Settings, subjects};
use report::Claim;

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "rtn",
    room: "compress",
    claim: "Rounding to nearest costs nearly nothing at 8 bits and more with every bit less.",
    run,
};

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let subjects = subjects::subjects(settings, &mut findings.notes)?;
    let bits: &[u8] = if settings.fast { &[8, 4, 3] } else { &[8, 6, 5, 4, 3, 2] };
    let measured = arms::measure(settings, &subjects, bits, &[Arm::Rtn])?;
    findings.tables.push(arms::table("Perplexity of RTN", &measured, &[Arm::Rtn]));
    let eight: Vec<_> = measured.iter().filter(|m| m.condition.bits == 8).collect();
    let worst = eight.iter().map(|m| m.mean(Arm::Rtn) / m.full - 1.0).fold(f64::MIN, f64::max);
    findings.claims.push(Claim {
        slug: "rtn".into(),
        claim: "8 bits: perplexity rises by less than 0.5 %".into(),
        measured: serde_json::json!({ "largest rise": worst }),
        baselines: serde_json::json!({ "full precision": eight.first().map(|m| m.full) }),
        seeds: vec![0],
        holds: Some(worst < 0.005),
    });
    let mut ordered = true;
    for m in &measured {
        for other in &measured {
            let same = (&m.condition.model, m.condition.weights, m.condition.group)
                == (&other.condition.model, other.condition.weights, other.condition.group);
            // Above 4 bits the differences are smaller than what rounding luck gives and takes.
            if same && m.condition.bits < other.condition.bits && m.condition.bits <= 4 {
                ordered &= m.mean(Arm::Rtn) > other.mean(Arm::Rtn);
            }
        }
    }
    findings.claims.push(Claim {
        slug: "rtn".into(),
        claim: "from 4 bits down every bit less costs more".into(),
        measured: arms::json(&measured.iter().collect::<Vec<_>>(), Arm::Rtn),
        baselines: serde_json::Value::Null,
        seeds: vec![0],
        holds: Some(ordered),
    });
    Ok(findings)
}
