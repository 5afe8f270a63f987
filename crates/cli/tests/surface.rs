//! What a user meets first: help, suggestions, exit codes, pipes, colours.

mod common;

use common::{arg, ok, ok_json, run, strata, tiny_model};
use std::process::Stdio;

const VERBS: [&str; 12] = [
    "inspect",
    "quantize",
    "prune",
    "convert",
    "eval",
    "generate",
    "train",
    "data",
    "run",
    "methods",
    "repro",
    "completions",
];

#[test]
fn help_lists_every_verb_and_every_verb_has_help() {
    let help = ok(&["--help"]);
    for verb in VERBS {
        assert!(help.contains(&format!("  {verb}")), "{verb}\n{help}");
        let own = ok(&[verb, "--help"]);
        assert!(own.contains("Usage: strata"), "{own}");
    }
    assert!(ok(&["--version"]).starts_with("strata "));
}

#[test]
fn help_states_defaults() {
    // The help is wrapped at the terminal's width.
    let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let help = words(ok(&["generate", "--help"]));
    for flag in
        ["--max-tokens <N>", "--temperature <T>", "--top-k <K>", "--top-p <P>", "--seed <S>"]
    {
        assert!(help.contains(flag), "{flag}\n{help}");
    }
    assert!(help.contains("[default: 128]") && help.contains("[default: 0.8]"), "{help}");
    let help = ok(&["quantize", "--help"]);
    for flag in [
        "--method",
        "--bits",
        "--group-size",
        "--symmetric",
        "--calibration",
        "--samples",
        "--sequence-length",
        "--format",
        "--seed",
        "--memory",
        "--exclude",
        "--resume",
        "--out",
    ] {
        assert!(help.contains(flag), "{flag}\n{help}");
    }
}

#[test]
fn wrong_words_get_the_nearest_right_one() {
    for (arguments, right) in [
        (vec!["quantise"], "quantize"),
        (vec!["inspect", "m", "--tensor"], "--tensors"),
        (vec!["eval", "m", "--task", "perplexty"], "perplexity"),
        (vec!["methods", "gtpq"], "gptq"),
        (vec!["repro", "aqw"], "awq"),
        (vec!["repro", "--room", "compres"], "compress"),
        (vec!["quantize", "m", "--metod", "rtn", "--out", "o"], "--method"),
    ] {
        let (code, stdout, stderr) = run(&arguments);
        assert_eq!(code, 2, "{arguments:?}");
        assert!(stdout.is_empty() && stderr.contains(right), "{arguments:?}\n{stderr}");
    }
}

#[test]
fn a_missing_path_is_answered_with_the_nearest() {
    let root = tempfile::tempdir().unwrap();
    tiny_model(root.path());
    let (code, _, stderr) = run(&["inspect", arg(&root.path().join("tinny"))]);
    assert_eq!(code, 2);
    assert!(stderr.contains("does not exist") && stderr.contains("tiny?"), "{stderr}");
}

#[test]
fn a_hostile_file_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("evil.safetensors");
    std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    let (code, _, stderr) = run(&["inspect", arg(&path)]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains("evil.safetensors"), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn methods_are_listed_and_explained() {
    let list = ok_json(&["methods", "--json"]);
    let slugs: Vec<&str> =
        list.as_array().unwrap().iter().map(|m| m["slug"].as_str().unwrap()).collect();
    for slug in ["rtn", "gptq", "awq"] {
        assert!(slugs.contains(&slug), "{slugs:?}");
        assert!(ok(&["methods"]).contains(slug));
        let card = ok_json(&["methods", slug, "--json"]);
        assert!(!card["options"].as_array().unwrap().is_empty());
        assert!(ok(&["methods", slug]).contains("default"));
    }
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = ok(&["completions", shell]);
        assert!(script.contains("quantize"), "{shell}");
    }
}

#[test]
fn no_colours_and_no_escapes_in_a_pipe() {
    for arguments in [&["methods"][..], &["--help"], &["--no-color", "methods", "rtn"]] {
        assert!(!ok(arguments).contains('\u{1b}'), "{arguments:?}");
    }
    let output = strata(&["methods", "zzz"]).env("NO_COLOR", "1").output().unwrap();
    assert!(!String::from_utf8(output.stderr).unwrap().contains('\u{1b}'));
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    for arguments in
        [&["-q", "inspect", arg(&model), "--tensors"][..], &["methods"], &["completions", "bash"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = strata(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}\n{stderr}");
        assert!(stderr.is_empty(), "{arguments:?}\n{stderr}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny_model(root.path());
    // Waits for a prompt that never comes.
    let child = strata(&["generate", arg(&model), "--prompt", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The handler is set first thing; a second is ample.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let killed =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
}

#[test]
fn threads_must_be_at_least_one() {
    let (code, _, stderr) = run(&["--threads", "0", "methods"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--threads 0"), "{stderr}");
    ok(&["--threads", "1", "methods"]);
}
