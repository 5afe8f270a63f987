//! Options: what they read, what they refuse, and when text is needed.

use super::*;
use crate::grid::GridOptions;

fn job(change: impl FnOnce(&mut QuantizeOptions)) -> QuantizeOptions {
    let mut options = QuantizeOptions::default();
    change(&mut options);
    options
}

fn low(bits: u8, low: u8, average: f64) -> QuantizeOptions {
    job(|o| {
        o.grid = GridOptions { bits, ..GridOptions::default() };
        o.layerwise.low_bits = Some(low);
        o.layerwise.average_bits = Some(average);
    })
}

#[test]
fn budgets_and_shares_read_their_units() {
    assert_eq!("3.25bpw".parse(), Ok(Budget::BitsPerWeight(3.25)));
    assert_eq!("3MiB".parse(), Ok(Budget::Bytes(3 << 20)));
    assert_eq!("10".parse(), Ok(Share::Count(10)));
    assert_eq!("25%".parse(), Ok(Share::Fraction(0.25)));
    assert_eq!((Share::Fraction(0.25).of(6), Share::Count(3).of(6)), (2, 3));
    for wrong in ["3.5", "0bpw", "-1bpw", "xbpw", "", "many"] {
        assert!(wrong.parse::<Budget>().is_err(), "{wrong}");
    }
    assert!("3.5".parse::<Budget>().unwrap_err().contains("3.5bpw"));
    for wrong in ["120%", "-1", "half"] {
        assert!(wrong.parse::<Share>().is_err(), "{wrong}");
    }
    for (text, budget) in [
        (r#""3.25bpw""#, Budget::BitsPerWeight(3.25)),
        (r#""3MiB""#, Budget::Bytes(3 << 20)),
        ("3145728", Budget::Bytes(3 << 20)),
    ] {
        let read: Budget = serde_json::from_str(text).unwrap();
        assert_eq!(read, budget);
        let again: Budget = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
        assert_eq!(again, budget);
    }
    assert_eq!(serde_json::from_str::<Share>("10").unwrap(), Share::Count(10));
}

#[test]
fn what_cannot_work_is_refused_with_what_would() {
    let own = |f: fn(&mut LayerwiseQuantOptions)| job(|o| f(&mut o.layerwise));
    let cases = [
        (low(4, 2, 4.5), "from 2 to 4"),
        (low(4, 2, 1.5), "from 2 to 4"),
        (low(4, 4, 4.0), "must fall"),
        (low(3, 4, 3.5), "must fall"),
        (low(4, 1, 3.0), "it holds"),
        (own(|o| o.low_bits = Some(2)), "--average-bits"),
        (own(|o| o.average_bits = Some(3.0)), "--low-bits"),
        (own(|o| o.refine_swaps = 3), "--low-bits"),
        (own(|o| o.curve = 3), "--budget"),
        (
            own(|o| {
                o.low_bits = Some(2);
                o.average_bits = Some(3.0);
                o.low_blocks = Some(Share::Count(1));
            }),
            "give one",
        ),
        (
            own(|o| {
                o.budget = Some(Budget::BitsPerWeight(3.0));
                o.average_bits = Some(3.0);
            }),
            "--low-bits",
        ),
        (
            own(|o| {
                o.budget = Some(Budget::BitsPerWeight(3.0));
                o.budget_bits = vec![7];
            }),
            "[2, 3, 4, 5, 6, 8]",
        ),
        (
            job(|o| {
                o.format = Format::GptqV2;
                o.layerwise.budget = Some(Budget::BitsPerWeight(5.5));
                o.layerwise.budget_bits = vec![5, 6];
            }),
            "[2, 3, 4, 8]",
        ),
        (
            job(|o| {
                o.format = Format::Dequantized;
                o.layerwise.budget = Some(Budget::Bytes(1 << 20));
            }),
            "bpw",
        ),
        (
            job(|o| {
                o.format = Format::Awq;
                o.layerwise.low_bits = Some(2);
                o.layerwise.average_bits = Some(3.0);
            }),
            "--exclude",
        ),
        (
            job(|o| {
                o.format = Format::GptqV2;
                o.grid.bits = 6;
                o.layerwise.low_bits = Some(4);
                o.layerwise.average_bits = Some(5.0);
            }),
            "it holds [2, 3, 4, 8]",
        ),
        (
            job(|o| {
                o.method = Method::Pvq;
                o.pvq.rate = Some(3.0);
                o.layerwise.budget = Some(Budget::BitsPerWeight(3.0));
            }),
            "--pvq-rate",
        ),
        (
            job(|o| {
                o.method = Method::Rsq;
                o.layerwise.budget = Some(Budget::Bytes(1 << 20));
            }),
            "bpw",
        ),
        (
            own(|o| {
                o.low_bits = Some(2);
                o.average_bits = Some(3.0);
                o.zd_threshold = 0.0;
            }),
            "--zd-threshold",
        ),
    ];
    for (options, word) in cases {
        let message = options.layerwise.check(&options).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    for fine in [low(4, 2, 3.5), low(4, 2, 4.0), low(8, 4, 4.0), QuantizeOptions::default()] {
        fine.layerwise.check(&fine).unwrap();
    }
}

#[test]
fn text_is_needed_by_what_looks_at_activations() {
    let score = |layer_score| LayerwiseQuantOptions {
        low_bits: Some(2),
        layer_score,
        ..LayerwiseQuantOptions::default()
    };
    for (layer_score, needed) in [
        (LayerScore::Lim, true),
        (LayerScore::LimZd, true),
        (LayerScore::Sensitivity, true),
        (LayerScore::ActivationNorm, true),
        (LayerScore::Zd, false),
        (LayerScore::Random, false),
        (LayerScore::First, false),
        (LayerScore::Last, false),
    ] {
        assert_eq!(score(layer_score).calibrates(), needed, "{layer_score:?}");
    }
    assert!(!LayerwiseQuantOptions::default().calibrates());
    let budget = LayerwiseQuantOptions {
        budget: Some(Budget::BitsPerWeight(3.0)),
        ..LayerwiseQuantOptions::default()
    };
    assert!(budget.calibrates());
}
