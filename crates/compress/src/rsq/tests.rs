use super::*;
use crate::options::Method;

fn options(rsq: RsqOptions) -> QuantizeOptions {
    QuantizeOptions { method: Method::Rsq, rsq, ..Default::default() }
}

#[test]
fn impossible_options_are_refused_with_the_way_out() {
    let cases = [
        (RsqOptions { r_min: 0.0, ..Default::default() }, "(0, 1]"),
        (RsqOptions { r_min: -0.1, ..Default::default() }, "(0, 1]"),
        (RsqOptions { r_min: 1.5, ..Default::default() }, "(0, 1]"),
        (RsqOptions { r_min: f64::NAN, ..Default::default() }, "(0, 1]"),
        (RsqOptions { r_min: 0.5, r_max: 0.4, ..Default::default() }, "--r-max"),
        (RsqOptions { r_max: f64::INFINITY, ..Default::default() }, "--r-max"),
        (RsqOptions { weight_power: 3, ..Default::default() }, "1 or 2"),
        (RsqOptions { expand: 0, ..Default::default() }, "--expand"),
        (RsqOptions { weighting_modules: vec!["[".into()], ..Default::default() }, "["),
        (
            RsqOptions {
                importance: Importance::FirstN,
                importance_chunks: Some(1),
                ..Default::default()
            },
            "--importance-chunks",
        ),
        (
            RsqOptions { rotate_only: true, rotation: RotationChoice::None, ..Default::default() },
            "nothing",
        ),
    ];
    for (rsq, said) in cases {
        let message = options(rsq.clone()).check().unwrap_err().to_string();
        assert!(message.contains(said), "{rsq:?}: {message}");
    }
    let packed = QuantizeOptions {
        format: Format::Gptq,
        ..options(RsqOptions { rotate_only: true, ..Default::default() })
    };
    assert!(packed.check().is_err());
    options(RsqOptions::default()).check().unwrap();
}

/// What looks at text and what does not.
#[test]
fn only_error_compensation_calibrates() {
    assert!(options(RsqOptions::default()).calibrates());
    assert!(!options(RsqOptions { base: Base::Rtn, ..Default::default() }).calibrates());
    let rotate = options(RsqOptions { rotate_only: true, ..Default::default() });
    assert!(!rotate.calibrates() && !rotate.quantises());
}

#[test]
fn windows_are_rolled_on() {
    let calibration = Calibration::new((0..8).collect(), 4).unwrap();
    assert_eq!(calibration.expanded(1).unwrap().ids(), calibration.ids());
    let twice = calibration.expanded(2).unwrap();
    assert_eq!(twice.ids(), [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 0, 1, 6, 7, 4, 5]);
    assert_eq!((twice.windows(), twice.length()), (4, 4));
    let four = calibration.expanded(4).unwrap();
    assert_eq!(four.ids()[8..16], [3, 0, 1, 2, 7, 4, 5, 6]);
}
