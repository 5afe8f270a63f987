//! AWQ against RTN and GPTQ, natural and planted weights, its two searches apart and together
//! (Lin et al. 2023, tables 4 and 5; the planted weights stand for the outliers of large models).

use crate::arms::{self, Arm, Measured, SEEDS};
use crate::{Findings, Reproduction, Result, Settings, subjects};
use report::Claim;

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "awq",
    room: "compress",
    claim: "Scaling the channels with large activations before rounding recovers most of what \
            rounding loses.",
    run,
};

const ARMS: [Arm; 6] = [Arm::Rtn, Arm::Scale, Arm::Clip, Arm::ScaleClip, Arm::DuoClip, Arm::Gptq];

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let subjects = subjects::subjects(settings, &mut findings.notes)?;
    let bits: &[u8] = if settings.fast { &[3] } else { &[2, 3, 4] };
    let arms: &[Arm] =
        if settings.fast { &[Arm::Rtn, Arm::ScaleClip, Arm::DuoClip] } else { &ARMS };
    let measured = arms::measure(settings, &subjects, bits, arms)?;
    findings.tables.push(arms::table("Perplexity, mean of 3 calibration seeds", &measured, arms));
    findings.claims.push(beats_rounding(&measured));
    for width in [3, 4] {
        if bits.contains(&width) {
            findings.claims.push(recovers(&measured, width));
        }
    }
    if bits.contains(&4) {
        findings.claims.push(natural_four_bits(&measured));
    }
    let searched: usize = measured.iter().map(|m| m.searched).sum();
    let worse: usize = measured.iter().map(|m| m.worse_than_rounding).sum();
    findings.claims.push(Claim {
        slug: "awq".into(),
        claim: "the searched loss never exceeds that of rounding (the identity is in the grid)"
            .into(),
        measured: serde_json::json!({ "layers searched": searched, "worse than rounding": worse }),
        baselines: serde_json::Value::Null,
        seeds: SEEDS.to_vec(),
        holds: Some(searched > 0 && worse == 0),
    });
    Ok(findings)
}

fn select<'a>(measured: &'a [Measured], bits: u8, weights: Option<&str>) -> Vec<&'a Measured> {
    let fits = |m: &&Measured| {
        m.condition.bits == bits && weights.is_none_or(|w| m.condition.weights == w)
    };
    measured.iter().filter(fits).collect()
}

/// Claim 1: at 3 bits, scale + clip (plain or duo) < RTN, natural and planted, every seed.
fn beats_rounding(measured: &[Measured]) -> Claim {
    let here = select(measured, 3, None);
    let beats =
        |m: &&Measured, arm: Arm| m.of(arm).iter().zip(m.of(Arm::Rtn)).all(|(awq, rtn)| awq < rtn);
    Claim {
        slug: "awq".into(),
        claim: "3 bits: scale+clip (plain or duo) < RTN in perplexity, natural and planted, every \
                seed"
            .into(),
        measured: serde_json::json!({
            "plain": arms::json(&here, Arm::ScaleClip),
            "duo": arms::json(&here, Arm::DuoClip),
        }),
        baselines: serde_json::json!({
            "rtn": arms::json(&here, Arm::Rtn),
            "gptq": arms::json(&here, Arm::Gptq),
        }),
        seeds: SEEDS.to_vec(),
        holds: Some(here.iter().all(|m| beats(m, Arm::ScaleClip) || beats(m, Arm::DuoClip))),
    }
}

/// Claim 2: on planted weights AWQ recovers at least 60 % of what RTN loses.
fn recovers(measured: &[Measured], bits: u8) -> Claim {
    let here = select(measured, bits, Some("planted"));
    let share = |m: &&Measured| {
        let best = m.mean(Arm::ScaleClip).min(m.mean(Arm::DuoClip));
        (m.mean(Arm::Rtn) - best) / (m.mean(Arm::Rtn) - m.full)
    };
    let shares: Vec<f64> = here.iter().map(share).collect();
    let smallest = shares.iter().copied().fold(f64::INFINITY, f64::min);
    Claim {
        slug: "awq".into(),
        claim: format!("{bits} bits, planted: AWQ recovers at least 60 % of what RTN loses"),
        measured: serde_json::json!({ "recovered": shares, "smallest": smallest }),
        baselines: serde_json::json!({
            "rtn": arms::json(&here, Arm::Rtn),
            "full precision": here.iter().map(|m| m.full).collect::<Vec<_>>(),
        }),
        seeds: SEEDS.to_vec(),
        holds: Some(smallest >= 0.6),
    }
}

/// Claim 3, reported only: on natural 4-bit weights of a tiny model plain AWQ may tie with RTN.
fn natural_four_bits(measured: &[Measured]) -> Claim {
    let here = select(measured, 4, Some("natural"));
    let gaps: Vec<f64> = here.iter().map(|m| m.mean(Arm::ScaleClip) - m.mean(Arm::Rtn)).collect();
    Claim {
        slug: "awq".into(),
        claim: "4 bits, natural: plain AWQ against RTN (reported only)".into(),
        measured: serde_json::json!({ "awq minus rtn": gaps }),
        baselines: arms::json(&here, Arm::Rtn),
        seeds: SEEDS.to_vec(),
        holds: None,
    }
}
