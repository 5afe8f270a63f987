//! AdaDim as a user runs it: both directions in one container, the choice in the report, and what
//! other formats refuse.
// Helpers of tests are tests too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{BLOCKS, arg, ok, ok_json, run, tiny_model};
use serde_json::{Value, json};
use std::path::Path;

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn both_directions_in_one_container_and_in_the_report() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    let calibration = root.path().join("ids.json");
    let mut rng = tensor::Rng::new(3);
    let windows: Vec<Vec<usize>> =
        (0..4).map(|_| (0..24).map(|_| 3 + rng.below(200)).collect()).collect();
    std::fs::write(&calibration, json!(windows).to_string()).unwrap();
    let text = root.path().join("text.txt");
    std::fs::write(&text, "The town has a market. The market is old. ".repeat(10)).unwrap();
    let command = |out: &Path, more: &[&str]| -> Vec<String> {
        let base = [
            "-q",
            "quantize",
            arg(&model),
            "--method",
            "adadim",
            "--calibration",
            arg(&calibration),
            "--samples",
            "4",
            "--sequence-length",
            "24",
            "--group-size",
            "16",
            "--bits",
            "3",
            "--no-evaluate",
            "--out",
            arg(out),
        ];
        base.iter().chain(more).map(|s| s.to_string()).collect()
    };
    let evaluate = |model: &Path| {
        let base = ["-q", "eval", arg(model), "--task", "perplexity", "--text", arg(&text)];
        let answer = ok_json(&[&base[..], &["--window", "32", "--json"]].concat());
        answer["perplexity"].as_f64().unwrap()
    };
    let mut perplexities = Vec::new();
    for (name, more) in [
        ("own", &["--format", "strata", "--base", "gptq"][..]),
        ("plain", &["--format", "dequantized", "--base", "gptq"]),
    ] {
        let out = root.path().join(name);
        let job = command(&out, more);
        ok(&job.iter().map(String::as_str).collect::<Vec<_>>());
        let record = json_of(&out.join("strata.json"));
        let layers = record["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 7 * BLOCKS);
        let mut directions = [0; 2];
        for layer in layers {
            let details = &layer["details"];
            let (oc, ic) =
                (details["error_oc"].as_f64().unwrap(), details["error_ic"].as_f64().unwrap());
            assert_eq!(details["dim"], if ic < oc { "ic" } else { "oc" }, "{layer}");
            directions[usize::from(ic < oc)] += 1;
        }
        assert!(directions.iter().all(|count| *count > 0), "{directions:?}");
        let html = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(html.contains("Direction of groups") && html.contains("error along output"));
        let says = format!("{} of {} layers", directions[1], layers.len());
        assert!(html.contains(&says), "{says}");
        perplexities.push(evaluate(&out));
        if name == "own" {
            let config = json_of(&out.join("config.json"));
            let modules = config["quantization_config"]["modules"].as_object().unwrap();
            let columns = modules.values().filter(|m| m["kind"] == "columns").count();
            assert_eq!((modules.len(), columns), (layers.len(), directions[1]));
            // A compressed model is no input of another compression.
            let again = root.path().join("again");
            let mut job = command(&again, &["--format", "strata"]);
            *job.iter_mut().find(|a| *a == arg(&model)).unwrap() = arg(&out).to_string();
            let (code, _, stderr) = run(&job.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(code == 2 && stderr.contains("already quantised"), "{stderr}");
        }
    }
    let ratio = perplexities[0] / perplexities[1];
    assert!((ratio - 1.0).abs() < 1e-4, "{perplexities:?}");

    let out = root.path().join("refused");
    for (more, phrases) in [
        (&[][..], &["--dim ada", "compressed-tensors", "--format strata", "--dim oc"][..]),
        (
            &["--dim", "heuristic", "--format", "compressed-tensors"],
            &["model.layers.0.self_attn.q_proj", "compressed-tensors", "--dim oc"],
        ),
        (&["--format", "strata", "--select-by", "gptq"], &["--base gptq"]),
        (&["--format", "strata", "--granularity", "tensor"], &["no direction"]),
        (&["--format", "strata", "--act-order"], &["--dim-columns"]),
    ] {
        let job = command(&out, more);
        let (code, stdout, stderr) = run(&job.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(code, 2, "{more:?}\n{stdout}{stderr}");
        for phrase in phrases {
            assert!(stderr.contains(phrase), "{phrase:?} is not in\n{stderr}");
        }
        assert!(!out.exists() && !root.path().join("refused.partial").exists());
    }
    // All layers along the input fit every format.
    let oc = root.path().join("oc");
    let job = command(&oc, &["--dim", "oc", "--base", "gptq", "--format", "compressed-tensors"]);
    ok(&job.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(evaluate(&oc).is_finite());
}
