//! The method as a whole on networks small enough to check: curves, allocation, monitor, refusals.

use super::curves::{Curve, Distortion, Probe, Prunable};
use super::layers::{rank, select};
use super::masks::Mask;
use super::nets::{Chain, Held, Kind, name};
use super::options::{Allocator, LayerAdaptivePruningOptions, PruneTarget};
use super::round::{self, Round, Settings, Subject};
use super::{CurveCache, Samples};
use nn::Mode;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use tensor::Rng;

fn samples(net: &Chain, count: usize) -> Samples {
    let mut pixels = vec![0.0; count * net.width()];
    Rng::stream(3, "samples").fill_normal(&mut pixels, 1.0);
    Samples::images(pixels, [count, 1, 1, net.width()]).unwrap()
}

fn layers(net: &Chain, weights: &Held) -> Vec<Prunable> {
    let places = select(net, &[], &[], false).unwrap();
    rank(&places, weights, &BTreeMap::new()).unwrap()
}

fn probe<'a>(net: &'a Chain, weights: &'a Held, samples: &'a Samples) -> Probe<'a> {
    Probe { network: net, weights, samples, workers: 2 }
}

fn curves(net: &Chain, weights: &Held, samples: &Samples, points: usize) -> Vec<Curve> {
    let layers = layers(net, weights);
    let progress = report::Progress::hidden();
    probe(net, weights, samples).curves(&layers, points, Distortion::Mean, None, &progress).unwrap()
}

fn settings(allocator: Allocator) -> Settings {
    let options = LayerAdaptivePruningOptions { allocator, ..Default::default() };
    Settings { workers: 2, ..Settings::new(&options).unwrap() }
}

fn round(
    net: &Chain,
    weights: &Held,
    samples: Option<&Samples>,
    sparsity: f64,
    settings: &Settings,
) -> crate::Result<Round> {
    let layers = layers(net, weights);
    let subject = Subject { network: net, weights, samples };
    round::run(subject, &layers, sparsity, settings, None, &report::Progress::hidden())
}

#[test]
fn a_linear_layer_is_measured_exactly() {
    let net = Chain::new(&[6, 4]);
    let weights = Held::random(&net, 1);
    let inputs = samples(&net, 5);
    let curve = &curves(&net, &weights, &inputs, 8)[0];
    let w = weights.values(&net.names[0]);
    let mut order: Vec<usize> = (0..24).collect();
    order.sort_by(|a, b| w[*a].abs().total_cmp(&w[*b].abs()));
    let Samples::Images { pixels, .. } = &inputs else { panic!() };
    assert_eq!(curve.pruned, [0, 3, 6, 9, 12, 15, 18, 21, 24]);
    for (k, &n) in curve.pruned.iter().enumerate() {
        // ‖(W - W~) x‖² / out, mean over the samples.
        let mut sum = 0.0;
        for x in pixels.chunks(6) {
            let mut change = [0.0f64; 4];
            for &i in &order[..n] {
                change[i / 6] += f64::from(w[i]) * f64::from(x[i % 6]);
            }
            sum += change.iter().map(|c| c * c).sum::<f64>() / 4.0;
        }
        let expected = sum / 5.0;
        assert!((curve.distortion[k] - expected).abs() <= 1e-5 * expected, "{k}: {curve:?}");
    }
    assert_eq!(curve.distortion[0], 0.0);
}

#[test]
fn the_worst_sample_bounds_the_mean_and_equals_it_for_one() {
    let net = Chain::new(&[6, 5, 4]);
    let weights = Held::random(&net, 2);
    let layers = layers(&net, &weights);
    let progress = report::Progress::hidden();
    for count in [1, 40] {
        let inputs = samples(&net, count);
        let measure = |kind| {
            probe(&net, &weights, &inputs).curves(&layers, 10, kind, None, &progress).unwrap()
        };
        let (mean, worst) = (measure(Distortion::Mean), measure(Distortion::Worst));
        for (mean, worst) in mean.iter().zip(&worst) {
            for (m, w) in mean.distortion.iter().zip(&worst.distortion) {
                assert!(if count == 1 { m == w } else { m < w || *w == 0.0 }, "{m} {w}");
            }
        }
    }
}

#[test]
fn parallel_layers_add_up_exactly() {
    let names = vec![name("a", [3, 6]), name("b", [5, 6])];
    let net = Chain::of(names, Kind::Parallel);
    let weights = Held::random(&net, 3);
    let inputs = samples(&net, 20);
    for sparsity in [0.3, 0.6, 0.9] {
        let round =
            round(&net, &weights, Some(&inputs), sparsity, &settings(Allocator::Rd)).unwrap();
        let ratio = round.additivity().unwrap();
        assert!((ratio - 1.0).abs() < 1e-5, "{sparsity}: {ratio}");
        assert!(round.reached >= sparsity && round.warnings.is_empty(), "{:?}", round.warnings);
    }
}

#[test]
fn permuted_hidden_units_have_the_same_curves() {
    let net = Chain::new(&[6, 8, 5]);
    let weights = Held::random(&net, 4);
    let inputs = samples(&net, 33);
    let order = Rng::new(9).permutation(8);
    let (first, second) = (weights.values(&net.names[0]), weights.values(&net.names[1]));
    let mut permuted = Held::default();
    permuted
        .set(&net.names[0], order.iter().flat_map(|&r| first[r * 6..r * 6 + 6].to_vec()).collect());
    permuted.set(
        &net.names[1],
        second
            .chunks(8)
            .flat_map(|row| order.iter().map(|&c| row[c]).collect::<Vec<_>>())
            .collect(),
    );
    let plain = curves(&net, &weights, &inputs, 20);
    let other = curves(&net, &permuted, &inputs, 20);
    for (a, b) in plain.iter().zip(&other) {
        assert_eq!(a.pruned, b.pruned);
        for (a, b) in a.distortion.iter().zip(&b.distortion) {
            assert!((a - b).abs() <= 1e-4 * a.max(1e-6), "{a} {b}");
        }
    }
}

#[test]
fn scaling_the_last_layer_scales_every_distortion_by_its_square() {
    let net = Chain::new(&[6, 8, 5]);
    let weights = Held::random(&net, 5);
    let inputs = samples(&net, 33);
    let mut scaled = weights.clone();
    let last = &net.names[1];
    scaled.set(last, weights.values(last).iter().map(|w| 4.0 * w).collect());
    let plain = curves(&net, &weights, &inputs, 20);
    for (a, b) in plain.iter().zip(&curves(&net, &scaled, &inputs, 20)) {
        for (a, b) in a.distortion.iter().zip(&b.distortion) {
            assert!((16.0 * a - b).abs() <= 1e-5 * b, "{a} {b}");
        }
    }
}

#[test]
fn small_layers_share_grid_points() {
    let net = Chain::new(&[3, 2, 4]);
    let weights = Held::random(&net, 6);
    let inputs = samples(&net, 4);
    let layers = layers(&net, &weights);
    let measured = probe(&net, &weights, &inputs);
    // 6 and 8 weights: 6 + 8 variants on one batch, not 200.
    assert_eq!(measured.measurements(&layers, 100), 14);
    let before = net.exits.load(Ordering::SeqCst);
    let curves = curves(&net, &weights, &inputs, 100);
    assert_eq!(net.exits.load(Ordering::SeqCst) - before, 15, "and the reference");
    assert_eq!(curves[0].distortion.len(), 101);
    assert_eq!(curves[0].distortion[16], 0.0, "16 % of 6 weights is none");
    assert_eq!(curves[0].distortion[17], curves[0].distortion[33]);
    assert!(curves[0].distortion[34] != curves[0].distortion[33]);
}

#[test]
fn one_worker_or_many_measure_the_same() {
    let net = Chain::new(&[6, 8, 8, 5]);
    let weights = Held::random(&net, 7);
    let inputs = samples(&net, 70);
    let layers = layers(&net, &weights);
    let progress = report::Progress::hidden();
    let measure = |workers| {
        let probe = Probe { network: &net, weights: &weights, samples: &inputs, workers };
        probe.curves(&layers, 25, Distortion::Mean, None, &progress).unwrap()
    };
    assert_eq!(measure(1), measure(3));
}

#[test]
fn a_killed_measurement_goes_on_and_ends_the_same() {
    let net = Chain::new(&[6, 8, 8, 5]);
    let weights = Held::random(&net, 8);
    let inputs = samples(&net, 70);
    let layers = layers(&net, &weights);
    let progress = report::Progress::hidden();
    let dir = tempfile::tempdir().unwrap();
    let cache = CurveCache::new(dir.path()).eager();
    let measure = |cache: Option<&CurveCache>| {
        probe(&net, &weights, &inputs).curves(&layers, 25, Distortion::Mean, cache, &progress)
    };
    let whole = measure(None).unwrap();
    let all = net.exits.swap(0, Ordering::SeqCst);
    net.fails_at.store((all as i64) * 2 / 3, Ordering::SeqCst);
    let error = measure(Some(&cache)).unwrap_err().to_string();
    assert!(error.contains("killed"), "{error}");
    net.fails_at.store(-1, Ordering::SeqCst);
    net.exits.store(0, Ordering::SeqCst);
    assert_eq!(measure(Some(&cache)).unwrap(), whole);
    let again = net.exits.swap(0, Ordering::SeqCst);
    assert!(again < all * 2 / 3, "{again} of {all} passes: what was done was done again");
    // All of it is there now: one pass for the key.
    assert_eq!(measure(Some(&cache)).unwrap(), whole);
    assert_eq!(net.exits.swap(0, Ordering::SeqCst), 1);
    // Other weights, other samples, another grid: other curves.
    let other = Held::random(&net, 9);
    let fresh = probe(&net, &other, &inputs)
        .curves(&layers, 25, Distortion::Mean, Some(&cache), &progress)
        .unwrap();
    assert_ne!(fresh, whole);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let net = Chain::new(&[6, 5, 4]);
    let weights = Held::random(&net, 10);
    let inputs = samples(&net, 4);
    let layers = layers(&net, &weights);
    let progress = report::Progress::hidden();
    let measure = |net: &Chain, layers: &[Prunable], points| {
        probe(net, &weights, &inputs)
            .curves(layers, points, Distortion::Mean, None, &progress)
            .unwrap_err()
            .to_string()
    };
    assert!(measure(&net, &layers, 1).contains("at least 2"));
    assert!(measure(&net, &[], 10).contains("no layers"));
    let mut training = Chain::new(&[6, 5, 4]);
    training.mode = Mode::Train;
    assert!(measure(&training, &layers, 10).contains("training mode"));
    // 1 / 0 where the last layer is gone.
    let inverse = Chain::of(vec![name("fc0", [5, 6]), name("fc1", [4, 5])], Kind::Inverse);
    let message = measure(&inverse, &layers[1..], 10);
    assert!(message.contains("fc1") && message.contains("of its 20 weights pruned"), "{message}");
    let mut broken = weights.clone();
    broken.set(&net.names[0], vec![f32::NAN; 30]);
    let places = select(&net, &[], &[], false).unwrap();
    let message = rank(&places, &broken, &BTreeMap::new()).unwrap_err().to_string();
    assert!(message.contains("fc0"), "{message}");
    let message = probe(&net, &broken, &inputs)
        .curves(&layers, 10, Distortion::Mean, None, &progress)
        .unwrap_err()
        .to_string();
    assert!(message.contains("nothing to compare"), "{message}");
}

#[test]
fn nothing_is_pruned_at_sparsity_zero() {
    let net = Chain::new(&[6, 8, 5]);
    let weights = Held::random(&net, 11);
    let inputs = samples(&net, 8);
    for allocator in [
        Allocator::Rd,
        Allocator::Lamp,
        Allocator::Erk,
        Allocator::Uniform,
        Allocator::UniformPlus,
        Allocator::Global,
        Allocator::Table,
    ] {
        let round = round(&net, &weights, Some(&inputs), 0.0, &settings(allocator)).unwrap();
        assert!(round.masks.values().all(|m| m.kept() == m.len()), "{allocator:?}");
        assert!(round.layers.iter().all(|l| l.sparsity == 0.0 && l.empty_outputs == 0));
        assert_eq!((round.measured, round.reached), (Some(0.0), 0.0));
    }
}

#[test]
fn every_allocator_reaches_its_target_with_the_smallest_weights() {
    let net = Chain::new(&[20, 30, 30, 10]);
    let weights = Held::random(&net, 12);
    let inputs = samples(&net, 16);
    let total: usize = net.names.iter().map(|n| n.shape[0] * n.shape[1]).sum();
    for allocator in [
        Allocator::Rd,
        Allocator::Lamp,
        Allocator::Erk,
        Allocator::Uniform,
        Allocator::UniformPlus,
        Allocator::Global,
    ] {
        let round = round(&net, &weights, Some(&inputs), 0.6, &settings(allocator)).unwrap();
        let kept: usize = round.layers.iter().map(|l| l.kept).sum();
        let off = (kept as f64 - 0.4 * total as f64).abs();
        // Grid points of 1 % leave a little; rounding moves baselines by a weight per layer.
        assert!(off <= if allocator == Allocator::Rd { 20.0 } else { 2.0 }, "{allocator:?} {kept}");
        for name in &net.names {
            let (w, mask) = (weights.values(name), &round.masks[&name.module]);
            let largest_gone = (0..w.len()).filter(|&i| !mask.keeps(i)).map(|i| w[i].abs());
            let smallest_kept = (0..w.len()).filter(|&i| mask.keeps(i)).map(|i| w[i].abs());
            let gone = largest_gone.fold(0.0, f32::max);
            assert!(gone <= smallest_kept.fold(f32::INFINITY, f32::min));
        }
        assert!(round.measured.unwrap() > 0.0);
    }
}

#[test]
fn the_choice_by_curves_predicts_no_more_than_uniform_on_the_same_curves() {
    let net = Chain::new(&[20, 30, 30, 10]);
    let weights = Held::random(&net, 13);
    let inputs = samples(&net, 16);
    let round = round(&net, &weights, Some(&inputs), 0.5, &settings(Allocator::Rd)).unwrap();
    let uniform: f64 = round.curves.iter().map(|c| c.distortion[50]).sum();
    assert!(round.predicted.unwrap() <= uniform, "{:?} {uniform}", round.predicted);
    assert_eq!(round.exact, Some(true), "a small network is solved exactly");
}

#[test]
fn masks_only_grow_from_round_to_round() {
    let net = Chain::new(&[20, 30, 10]);
    let mut weights = Held::random(&net, 14);
    let inputs = samples(&net, 16);
    let mut masks: BTreeMap<String, Mask> = BTreeMap::new();
    let mut settings = settings(Allocator::Rd);
    settings.points = 20;
    for t in 1..=4 {
        let places = select(&net, &[], &[], false).unwrap();
        let layers = rank(&places, &weights, &masks).unwrap();
        let subject = Subject { network: &net, weights: &weights, samples: Some(&inputs) };
        let target = super::masks::schedule(0.3, t);
        let progress = report::Progress::hidden();
        let round = round::run(subject, &layers, target, &settings, None, &progress).unwrap();
        assert!(round.reached >= target - 1e-9, "{} {target}", round.reached);
        for name in &net.names {
            let mask = &round.masks[&name.module];
            if let Some(before) = masks.get(&name.module) {
                assert!(mask.grows_from(before), "round {t}");
            }
            // Training moves what is kept, and an optimiser may leave dust under the mask.
            let mut rng = Rng::stream(u64::from(t), &name.module);
            let values = weights.values(name);
            let moved = values.iter().enumerate();
            let moved = moved.map(|(i, w)| match mask.keeps(i) {
                true => w + 0.1 * rng.normal() as f32,
                false => 0.0,
            });
            weights.set(name, moved.collect());
        }
        masks = round.masks;
    }
}

#[test]
fn dead_layers_are_refused_where_they_silence_the_network() {
    let net = Chain::new(&[6, 5, 4]);
    let weights = Held::random(&net, 15);
    let inputs = samples(&net, 6);
    let table = |net: &Chain, samples: Option<&Samples>, dead: &str, allow: bool| {
        let mut settings = settings(Allocator::Table);
        settings.table = vec![(method::Pattern::new(dead).unwrap(), 1.0)];
        settings.allow_dead_layers = allow;
        round(net, &weights, samples, 0.5, &settings)
    };
    let message = table(&net, Some(&inputs), "fc0", false).unwrap_err().to_string();
    assert!(message.contains("fc0") && message.contains("--allow-dead-layers"), "{message}");
    let allowed = table(&net, Some(&inputs), "fc0", true).unwrap();
    assert!(allowed.warnings.iter().any(|w| w.contains("fc0 is fully pruned")));
    assert!(table(&net, None, "fc1", false).is_err(), "without inputs nothing can be seen");
    // A residual path goes round the dead layer.
    let residual = Chain::of(vec![name("fc0", [6, 6]), name("fc1", [6, 6])], Kind::Residual);
    let weights = Held::random(&residual, 16);
    let mut settings = settings(Allocator::Table);
    settings.table = vec![(method::Pattern::new("fc0").unwrap(), 1.0)];
    let inputs = samples(&residual, 6);
    let round = round(&residual, &weights, Some(&inputs), 0.5, &settings).unwrap();
    assert_eq!(round.layers[0].kept, 0);
    assert!(round.warnings.iter().any(|w| w.contains("fc0 is fully pruned")));
}

#[test]
fn a_budget_below_the_number_of_layers_is_possible_but_said() {
    let residual =
        Chain::of((0..5).map(|i| name(&format!("fc{i}"), [4, 4])).collect(), Kind::Residual);
    let weights = Held::random(&residual, 17);
    let inputs = samples(&residual, 6);
    // 80 weights, 3 stay.
    let mut settings = settings(Allocator::Rd);
    settings.points = 16;
    let round = round(&residual, &weights, Some(&inputs), 0.9625, &settings).unwrap();
    let kept: usize = round.layers.iter().map(|l| l.kept).sum();
    assert!(kept <= 3);
    assert!(round.warnings.iter().any(|w| w.contains("fully pruned")), "{:?}", round.warnings);
}

#[test]
fn operations_are_counted_and_can_be_the_target() {
    let net = Chain::new(&[20, 30, 10]);
    let weights = Held::random(&net, 18);
    let inputs = samples(&net, 16);
    let mut settings = settings(Allocator::Rd);
    settings.target = PruneTarget::Operations;
    let round = round(&net, &weights, Some(&inputs), 0.5, &settings).unwrap();
    // One use per weight: operations and weights are the same here.
    assert!(round.layers.iter().all(|l| l.positions == Some(1)));
    assert!((round.operations.unwrap() - (1.0 - round.reached)).abs() < 1e-12);
    assert!(round.operations.unwrap() <= 0.5);
}

#[test]
fn bounds_hold() {
    let net = Chain::new(&[20, 30, 10]);
    let weights = Held::random(&net, 19);
    let inputs = samples(&net, 16);
    let options = LayerAdaptivePruningOptions {
        layer_max: vec!["fc1=0.2".into()],
        layer_min: vec!["fc0=0.3".into()],
        ..Default::default()
    };
    let mut settings = Settings::new(&options).unwrap();
    let round = round(&net, &weights, Some(&inputs), 0.5, &settings).unwrap();
    assert!(round.layers[1].sparsity <= 0.2 && round.layers[0].sparsity >= 0.3);
    settings.bounds = vec![(method::Pattern::new("fc7").unwrap(), [0.0, 0.5])];
    let message = super::tests::round(&net, &weights, Some(&inputs), 0.5, &settings).unwrap_err();
    assert!(message.to_string().contains("fc7"));
}

#[test]
fn zeros_of_the_checkpoint_count_as_pruned() {
    let net = Chain::new(&[20, 30, 10]);
    let mut weights = Held::random(&net, 20);
    let half: Vec<f32> = weights
        .values(&net.names[0])
        .iter()
        .enumerate()
        .map(|(i, w)| if i % 2 == 0 { 0.0 } else { *w })
        .collect();
    weights.set(&net.names[0], half);
    let inputs = samples(&net, 8);
    let round = round(&net, &weights, Some(&inputs), 0.4, &settings(Allocator::Rd)).unwrap();
    assert!(round.warnings.iter().any(|w| w.contains("300 weights are zero already")));
    assert!(round.layers[0].sparsity >= 0.5);
    assert_eq!(round.curves[0].distortion[50], 0.0);
    assert!(round.curves[0].distortion[51] > 0.0);
    let round = super::tests::round(&net, &weights, None, 0.1, &settings(Allocator::Lamp)).unwrap();
    assert!(round.warnings.iter().any(|w| w.contains("already sparser")), "{:?}", round.warnings);
}

#[test]
fn selections_are_checked() {
    let net = Chain::new(&[6, 5, 4]);
    let pattern = |text: &str| method::Pattern::new(text).unwrap();
    let found = select(&net, &[], &[pattern("fc1")], false).unwrap();
    assert_eq!(found.len(), 1);
    let message = select(&net, &[pattern("fc9")], &[], false).unwrap_err().to_string();
    assert!(message.contains("`fc9`") && message.contains("nearest"), "{message}");
    assert!(select(&net, &[], &[pattern("*")], false).is_err());
    assert!(select(&net, &[], &[], true).is_err(), "no head is tied here");
    // Two layers that hold one matrix would no longer be tied.
    let twins = Chain::of(vec![name("a", [6, 6]), name("b", [6, 6])], Kind::Chain);
    let mut weights = Held::random(&twins, 21);
    let values = weights.values(&twins.names[0]);
    weights.set(&twins.names[1], values);
    let places = select(&twins, &[], &[], false).unwrap();
    let message = rank(&places, &weights, &BTreeMap::new()).unwrap_err().to_string();
    assert!(message.contains("tied") && message.contains('a'), "{message}");
}

#[test]
fn one_sample_is_said() {
    let net = Chain::new(&[6, 5, 4]);
    let weights = Held::random(&net, 22);
    let round =
        round(&net, &weights, Some(&samples(&net, 1)), 0.3, &settings(Allocator::Rd)).unwrap();
    assert!(round.warnings.iter().any(|w| w.contains("one calibration sample")));
    let message = super::tests::round(&net, &weights, None, 0.3, &settings(Allocator::Rd));
    assert!(message.unwrap_err().to_string().contains("needs calibration inputs"));
}

/// Every point of every curve is what the whole network does with that layer alone thinned.
fn curves_equal_whole_passes(
    network: &dyn nn::Network,
    weights: &(dyn nn::Weights + Sync),
    samples: &Samples,
    tied_head: bool,
) {
    let places = select(network, &[], &[], tied_head).unwrap();
    let layers = rank(&places, weights, &BTreeMap::new()).unwrap();
    let probe = Probe { network, weights, samples, workers: 2 };
    let progress = report::Progress::hidden();
    for kind in [Distortion::Mean, Distortion::Worst] {
        let curves = probe.curves(&layers, 4, kind, None, &progress).unwrap();
        for (layer, curve) in layers.iter().zip(&curves) {
            for (&n, &distortion) in curve.pruned.iter().zip(&curve.distortion) {
                let mut matrix = weights.matrix(&layer.name).unwrap();
                tensor::host::write(&mut matrix, |values| layer.ranking.prune(values, n));
                let changed = std::collections::HashMap::from([(layer.name.weight(), matrix)]);
                let (whole, _) = probe.joint(&changed, kind).unwrap();
                assert!(
                    (whole - distortion).abs() <= 1e-4 * whole + 1e-9,
                    "{} {n}: {whole} {distortion}",
                    layer.name
                );
            }
            assert!(curve.distortion[4] > 0.0, "{}", layer.name);
        }
    }
}

#[test]
fn curves_of_residual_networks_start_in_the_middle() {
    let network = nn::ResNet::cifar(8, 5).unwrap();
    let params = train::Params::fresh(&network, 4).unwrap();
    let mut pixels = vec![0.0; 3 * 3072];
    Rng::new(6).fill_normal(&mut pixels, 1.0);
    let samples = Samples::images(pixels, [3, 3, 32, 32]).unwrap();
    curves_equal_whole_passes(&network, &params.constants(), &samples, false);
}

#[test]
fn curves_of_decoders_start_in_the_middle_and_tied_heads_at_the_entrance() {
    for (family, tied) in [(nn::Family::Llama, false), (nn::Family::Gpt2, true)] {
        let dir = tempfile::tempdir().unwrap();
        nn::testing::tiny_checkpoint(dir.path(), family, 7).unwrap();
        let model = nn::Model::open(dir.path()).unwrap();
        let ids = (0..3 * 12).map(|i| (i * 7 % 97) as u32).collect();
        let samples = Samples::tokens(ids, 12).unwrap();
        curves_equal_whole_passes(&model.decoder, model.weights.as_ref(), &samples, tied);
    }
}

#[test]
fn convolutions_are_used_once_per_output_position() {
    let network = nn::ResNet::cifar(8, 10).unwrap();
    let params = train::Params::fresh(&network, 4).unwrap();
    let samples = Samples::images(vec![0.1; 2 * 3072], [2, 3, 32, 32]).unwrap();
    let weights = params.constants();
    let found = super::layers::positions(&network, &weights, &samples.batch(0)).unwrap();
    let expected = [
        ("conv1", 1024),
        ("layer1.0.conv2", 1024),
        ("layer2.0.conv1", 256),
        ("layer3.0.conv1", 64),
        ("layer3.0.conv2", 64),
        ("linear", 1),
    ];
    for (module, positions) in expected {
        assert_eq!(found[module], positions, "{module}");
    }
    let dimensions = |module: &str| {
        let layers = nn::Network::layers(&network);
        super::layers::dimensions(&layers.iter().find(|(_, n)| n.module == module).unwrap().1)
    };
    assert_eq!(dimensions("layer2.0.conv1"), 16 + 32 + 3 + 3);
    assert_eq!(dimensions("linear"), 64 + 10);
}
