//! GPTQ against RTN, with AWQ beside it (Frantar et al. 2022, tables 2 and 3: the gap to RTN opens
//! at 3 bits).

use crate::arms::{self, Arm, Measured, SEEDS};
use crate::{Findings, Reproduction, Result, Settings, subjects};
use report::Claim;

pub(crate) const REPRODUCTION: Reproduction = Reproduction {
    slug: "gptq",
    room: "compress",
    claim: "Error compensation loses less than rounding, and the more so the fewer bits there are.",
    run,
};

const ARMS: [Arm; 3] = [Arm::Rtn, Arm::ScaleClip, Arm::Gptq];

fn run(settings: &Settings) -> Result<Findings> {
    let mut findings = Findings::default();
    let subjects = subjects::subjects(settings, &mut findings.notes)?;
    let bits: &[u8] = if settings.fast { &[3] } else { &[2, 3, 4] };
    let arms: &[Arm] = if settings.fast { &[Arm::Rtn, Arm::Gptq] } else { &ARMS };
    let measured = arms::measure(settings, &subjects, bits, arms)?;
    findings.tables.push(arms::table("Perplexity, mean of 3 calibration seeds", &measured, arms));
    for &width in bits {
        let here: Vec<&Measured> = measured.iter().filter(|m| m.condition.bits == width).collect();
        let beats = here
            .iter()
            .all(|m| m.of(Arm::Gptq).iter().zip(m.of(Arm::Rtn)).all(|(gptq, rtn)| gptq < rtn));
        let gated = width < 4;
        findings.claims.push(Claim {
            slug: "gptq".into(),
            claim: format!(
                "{width} bits: GPTQ < RTN in perplexity, every seed, model and group size{}",
                if gated { "" } else { " (reported only)" }
            ),
            measured: arms::json(&here, Arm::Gptq),
            baselines: serde_json::json!({
                "rtn": arms::json(&here, Arm::Rtn),
                "awq scale+clip": arms::json(&here, Arm::ScaleClip),
            }),
            seeds: SEEDS.to_vec(),
            holds: if gated { Some(beats) } else { None },
        });
    }
    Ok(findings)
}
