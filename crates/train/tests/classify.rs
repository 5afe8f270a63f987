//! Training on labels: gradients of image networks against finite differences, masks, fine-tuning.
#![allow(clippy::unwrap_used)]

use data::Images;
use nn::{Batch, Input, Mlp, Mode, Network, ResNet};
use strata_train::classify::{Finetune, Labelled, Mask, finetune, gradients, loss};
use strata_train::schedule::Decay;
use strata_train::{Grads, Params, Schedule};
use tensor::{Rng, host};

fn options(steps: u64, mode: Mode) -> Finetune {
    Finetune {
        steps,
        batch: 16,
        learning_rate: 3e-3,
        weight_decay: 0.01,
        schedule: Schedule {
            decay: Decay::Constant,
            warmup_steps: 0,
            total_steps: steps,
            floor: 0.0,
        },
        clip_norm: 1.0,
        mode,
        seed: 1,
    }
}

/// Two classes: bright images and dark ones, with noise.
fn images(shape: [usize; 3], count: usize) -> Images {
    let mut rng = Rng::new(5);
    let values = shape.iter().product::<usize>();
    let labels: Vec<u32> = (0..count).map(|_| rng.below(2) as u32).collect();
    let pixels = labels
        .iter()
        .flat_map(|&label| (0..values).map(move |_| label))
        .map(|label| (60 * label as usize + 60 + rng.below(80)) as u8)
        .collect();
    Images { shape, pixels, labels }
}

#[test]
fn gradients_of_a_residual_network_are_slopes() {
    let network = ResNet::cifar(8, 3).unwrap();
    let mut params = Params::fresh(&network, 1).unwrap();
    let mut rng = Rng::new(3);
    let mut pixels = vec![0.0; 4 * 3072];
    rng.fill_normal(&mut pixels, 1.0);
    let input = Input::Images { pixels: &pixels, shape: [4, 3, 32, 32] };
    let batch = Labelled { input, labels: &[0, 1, 2, 1] };
    for mode in [Mode::Evaluate, Mode::Train] {
        let mut grads = Grads::new();
        let (mean, seen) = gradients(&network, &params, &[batch], mode, &mut grads).unwrap();
        assert_eq!(seen.len(), if mode == Mode::Train { 7 } else { 0 });
        assert!(grads.names().all(|name| !name.contains("running")));
        assert!((mean - 3f64.ln()).abs() < 1.0);
        for name in [
            "conv1.weight",
            "layer2.0.conv1.weight",
            "layer3.0.bn2.weight",
            "bn1.bias",
            "linear.bias",
        ] {
            // Along the gradient itself the slope is its norm.
            let gradient = grads.get(name).unwrap().to_vec();
            let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            let step = 2e-3 / norm.max(1e-12);
            let mut at = |sign: f64| {
                let before = params.read(name, <[f32]>::to_vec).unwrap();
                let move_by = |v: &mut [f32]| {
                    for (v, g) in v.iter_mut().zip(&gradient) {
                        *v += (sign * step) as f32 * g;
                    }
                };
                params.write(name, move_by).unwrap();
                let (loss, _) = loss(&network, &params, &batch, mode).unwrap();
                params.write(name, |v| v.copy_from_slice(&before)).unwrap();
                f64::from(host::read(&loss, |v| v[0]))
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
            let expected = norm * norm;
            assert!(
                (slope - expected).abs() < 0.03 * expected + 1e-6,
                "{mode:?} {name}: slope {slope}, gradient {expected}"
            );
        }
    }
}

#[test]
fn fine_tuning_learns_and_masked_weights_stay_zero() {
    let network = Mlp::of_widths(&[36, 24, 2]).unwrap();
    let data = images([1, 6, 6], 200);
    let mut params = Params::fresh(&network, 2).unwrap();
    let layers: Vec<String> = network.layers().iter().map(|(_, n)| n.weight()).collect();
    for name in &layers {
        params.write(name, |v| v.iter_mut().step_by(2).for_each(|v| *v = 0.0)).unwrap();
    }
    let mask = Mask::of_zeros(&params, layers.iter().map(String::as_str)).unwrap();
    let before = params.read(&layers[0], <[f32]>::to_vec).unwrap();
    let faster = Finetune { learning_rate: 1e-2, ..options(300, Mode::Evaluate) };
    let losses = finetune(&network, &mut params, &data, Some(&mask), &faster).unwrap();
    assert_eq!(losses.len(), 300);
    assert!(losses[299] < 0.3 * losses[0], "{} to {}", losses[0], losses[299]);
    let after = params.read(&layers[0], <[f32]>::to_vec).unwrap();
    assert!(after.iter().step_by(2).all(|v| v.to_bits() == 0));
    assert!(
        after.iter().skip(1).step_by(2).zip(before.iter().skip(1).step_by(2)).all(|(a, b)| a != b)
    );
    let again = |seed| {
        let mut params = Params::fresh(&network, 2).unwrap();
        let options = Finetune { seed, ..options(9, Mode::Evaluate) };
        finetune(&network, &mut params, &data, None, &options).unwrap()
    };
    assert_eq!(again(1), again(1));
    assert_ne!(again(1), again(2));
}

#[test]
fn running_statistics_follow_in_training_mode_only() {
    let network = ResNet::cifar(8, 2).unwrap();
    let data = images([3, 32, 32], 32);
    let running = |params: &Params| params.read("bn1.running_mean", <[f32]>::to_vec).unwrap();
    for (mode, moved) in [(Mode::Evaluate, false), (Mode::Train, true)] {
        let mut params = Params::fresh(&network, 2).unwrap();
        assert!(!params.is_trainable("bn1.running_mean").unwrap());
        let losses = finetune(&network, &mut params, &data, None, &options(3, mode)).unwrap();
        assert!(losses.iter().all(|l| l.is_finite()));
        assert_eq!(running(&params).iter().any(|v| *v != 0.0), moved, "{mode:?}");
    }
}

#[test]
fn a_decoder_is_a_network_too() {
    let config = nn::testing::tiny_config(nn::Family::Llama);
    let decoder = nn::Decoder::from_config(&config).unwrap();
    let params = Params::random(&decoder, 1).unwrap();
    let ids: Vec<u32> = (0..10).map(|i| i * 3).collect();
    let input = Input::Tokens { ids: &ids, batch: Batch::new(2, 5) };
    let labels: Vec<u32> = (0..10).map(|i| if i % 5 == 4 { u32::MAX } else { i * 3 + 3 }).collect();
    let batch = Labelled { input, labels: &labels };
    let mut grads = Grads::new();
    let (mean, _) = gradients(&decoder, &params, &[batch], Mode::Evaluate, &mut grads).unwrap();
    let tokens = strata_train::loader::TokenBatch {
        rows: 2,
        length: 5,
        tokens: ids.clone(),
        targets: labels.clone(),
    };
    let mut other = Grads::new();
    let same = strata_train::loss::gradients(&decoder, &params, &[tokens], &mut other).unwrap();
    assert!((mean - same).abs() < 1e-5);
    for (name, gradient) in grads.iter() {
        let other = other.get(name).unwrap();
        assert!(gradient.iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-5), "{name}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let network = Mlp::of_widths(&[4, 3]).unwrap();
    let mut params = Params::fresh(&network, 2).unwrap();
    let input = Input::Images { pixels: &[0.0; 8], shape: [2, 1, 2, 2] };
    let message = |labels: &[u32]| {
        let batch = Labelled { input, labels };
        loss(&network, &params, &batch, Mode::Evaluate).err().unwrap().to_string()
    };
    assert!(message(&[0, 3]).contains("3 is none of the 3 classes"));
    assert!(message(&[0]).contains("1 labels for 2 rows"));
    let mut mask = Mask::default();
    mask.insert("layers.0.weight", vec![true; 5]);
    assert!(mask.apply(&mut params).unwrap_err().to_string().contains("12 weights"));
    let wrong = images([1, 3, 3], 4);
    let error = finetune(&network, &mut params, &wrong, None, &options(1, Mode::Evaluate));
    assert!(error.unwrap_err().to_string().contains("[1, 3, 3]"));
    let right = images([1, 2, 2], 4);
    let none = Finetune { batch: 0, ..options(1, Mode::Evaluate) };
    assert!(finetune(&network, &mut params, &right, None, &none).is_err());
}
