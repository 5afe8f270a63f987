//! Options of pruning: what fits together and what does not.

use super::*;

fn base(method: PruneMethod) -> PruneOptions {
    PruneOptions { method, ..PruneOptions::default() }
}

#[test]
fn defaults_of_the_methods() {
    use PruneMethod::*;
    for (method, scope, count) in [
        (Magnitude, Scope::Matrix, Count::Threshold),
        (Random, Scope::Matrix, Count::Exact),
        (Wanda, Scope::Row, Count::Floor),
        (SparseGpt, Scope::Matrix, Count::Threshold),
        (DPruner, Scope::Matrix, Count::Percentile),
    ] {
        let options = base(method);
        assert_eq!((options.scope(), options.count()), (scope, count), "{}", method.slug());
        assert_eq!(PruneOptions { exact: true, ..options }.count(), Count::Exact);
    }
    assert!(base(Wanda).calibrates() && base(SparseGpt).calibrates());
    assert!(!base(Magnitude).calibrates() && !base(DPruner).calibrates());
    assert!(base(DPruner).needs_general() && base(DPruner).needs_domain());
}

#[test]
fn contradictions_are_refused() {
    let dialect = DomainOptions { dialect: Some(DialectName::Law), ..Default::default() };
    let two_of_four = Structure::TWO_OF_FOUR;
    let refused = |options: PruneOptions, phrases: &[&str]| {
        let error = options.check().unwrap_err().to_string();
        for phrase in phrases {
            assert!(error.contains(phrase), "{phrase:?} is not in {error}");
        }
    };
    use PruneMethod::*;
    let with = |method, change: &dyn Fn(&mut PruneOptions)| {
        let mut options = base(method);
        change(&mut options);
        options
    };
    refused(with(Magnitude, &|o| o.sparsity = 1.0), &["--sparsity 1"]);
    refused(with(Magnitude, &|o| o.sparsity = -0.1), &["--sparsity -0.1"]);
    refused(with(Magnitude, &|o| o.sparsity = f64::NAN), &["--sparsity"]);
    refused(with(Magnitude, &|o| (o.pattern, o.sparsity) = (two_of_four, 0.7)), &["2:4", "0.7"]);
    refused(
        with(Wanda, &|o| (o.pattern, o.scope) = (two_of_four, Some(Scope::Row))),
        &["2:4", "--scope"],
    );
    refused(with(SparseGpt, &|o| o.scope = Some(Scope::Row)), &["--block-size", "--scope"]);
    refused(
        with(SparseGpt, &|o| (o.pattern, o.sparsegpt.block_size) = (two_of_four, 10)),
        &["--block-size 10", "2:4"],
    );
    refused(with(Magnitude, &|o| o.format = PruneFormat::Sparse24Bitmask), &["--pattern 2:4"]);
    refused(base(DPruner), &["--domain FILE", "--dialect", "normalised"]);
    refused(with(Wanda, &|o| o.calibrate_on = CalibrateOn::Domain), &["--domain FILE"]);
    refused(with(Wanda, &|o| o.calibration.samples = 0), &["--samples"]);
    refused(
        with(DPruner, &|o| (o.domain, o.d_pruner.epochs) = (dialect.clone(), Some(0))),
        &["--epochs"],
    );
    refused(
        with(LayerAdaptivePruning, &|o| o.pattern = two_of_four),
        &["layer-adaptive-pruning", "pattern"],
    );
    assert!(with(DPruner, &|o| o.domain = dialect.clone()).check().is_ok());
    assert!(with(DPruner, &|o| o.d_pruner.importance_mode = Mode::General).check().is_ok());
    assert!(with(Magnitude, &|o| o.sparsity = 0.0).check().is_ok());
    let quarter: Structure = "1:4".parse().unwrap();
    assert!(with(Wanda, &|o| (o.pattern, o.sparsity) = (quarter, 0.75)).check().is_ok());
}

#[test]
fn texts_round_trip() {
    let mut options = base(PruneMethod::SparseGpt);
    options.pattern = "4:8".parse().unwrap();
    options.scope = Some(Scope::Columns(344));
    options.format = PruneFormat::Sparse24Bitmask;
    let text = serde_json::to_string(&options).unwrap();
    assert!(text.contains("\"4:8\"") && text.contains("columns:344"), "{text}");
    assert!(text.contains("\"sparsegpt\"") && text.contains("sparse-24-bitmask"), "{text}");
    assert_eq!(serde_json::from_str::<PruneOptions>(&text).unwrap(), options);
}
