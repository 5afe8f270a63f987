//! Writing, and being killed while writing.

use serde_json::json;

use super::*;
use crate::checkpoint::Checkpoint;

type Files = BTreeMap<String, Vec<u8>>;

fn snapshot(directory: &Path) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        assert!(path.is_file(), "{} left over", path.display());
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        files.insert(name, fs::read(&path).unwrap());
    }
    files
}

fn options(max_shard_size: u64) -> WriteOptions {
    WriteOptions {
        max_shard_size,
        resume: true,
        fingerprint: "job 1".into(),
        ..WriteOptions::default()
    }
}

/// What a job does, step by step.
enum Op {
    Add(&'static str, Dtype, Vec<usize>),
    File(&'static str),
    Seal(&'static str),
}

/// Blocks with tensors of all alignments, in an order that is not the final one.
fn script() -> Vec<Op> {
    let mut ops = Vec::new();
    for (block, key) in ["b0", "b1", "b2", "b3"].into_iter().enumerate() {
        let names: [&'static str; 4] = [
            ["0.w", "1.w", "2.w", "3.w"][block],
            ["0.odd", "1.odd", "2.odd", "3.odd"][block],
            ["0.half", "1.half", "2.half", "3.half"][block],
            ["0.q", "1.q", "2.q", "3.q"][block],
        ];
        ops.push(Op::Add(names[1], Dtype::U8, vec![3]));
        ops.push(Op::Add(names[0], Dtype::F32, vec![4, 4 + block]));
        ops.push(Op::Add(names[2], Dtype::F16, vec![3, 1]));
        ops.push(Op::Add(names[3], Dtype::I32, vec![5]));
        if block == 1 {
            ops.push(Op::File("note.txt"));
        }
        ops.push(Op::Seal(key));
    }
    ops.push(Op::Add("empty", Dtype::F32, vec![0, 2]));
    ops.push(Op::Add("long", Dtype::I64, vec![1]));
    ops.push(Op::File("config.json"));
    ops
}

fn content(name: &str, dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let n = dtype.bytes_for(shape.iter().product::<usize>() as u64).unwrap();
    let seed = name.bytes().fold(7u8, |s, b| s.wrapping_mul(31).wrapping_add(b));
    (0..n).map(|i| seed.wrapping_add(i as u8)).collect()
}

/// Runs the script up to `stop` operations that were not sealed before. `None` when stopped.
fn run(out: &Path, options: WriteOptions, stop: usize) -> Result<Option<PathBuf>> {
    let mut writer = Writer::create(out, options)?;
    let ops = script();
    // Everything up to the last sealed key is done.
    let done = writer.sealed().last().map(|e| e.key.clone());
    let start = done.map_or(0, |key| {
        1 + ops.iter().position(|op| matches!(op, Op::Seal(k) if **k == key)).unwrap()
    });
    for (i, op) in ops[start..].iter().enumerate() {
        if i == stop {
            return Ok(None);
        }
        match op {
            Op::Add(name, dtype, shape) => {
                writer.add(name, *dtype, shape, &content(name, *dtype, shape))?;
            }
            Op::File(name) => writer.put_file(name, name.as_bytes())?,
            Op::Seal(key) => writer.seal(key, json!({ "loss": 0.5 }))?,
        }
    }
    writer.finish().map(Some)
}

fn reference(max: u64) -> Files {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    run(&out, options(max), usize::MAX).unwrap().unwrap();
    let names: Vec<_> = fs::read_dir(d.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["out"], "nothing is left beside the output");
    snapshot(&out)
}

#[test]
fn result_is_a_valid_checkpoint() {
    for max in [50, 150, 1 << 30] {
        let d = tempfile::tempdir().unwrap();
        let out = d.path().join("deep/er/out");
        run(&out, options(max), usize::MAX).unwrap().unwrap();
        let ck = Checkpoint::open(&out).unwrap();
        for op in script() {
            if let Op::Add(name, dtype, shape) = op {
                let info = ck.info(name).unwrap();
                assert_eq!((info.dtype, &info.shape), (dtype, &shape));
                assert_eq!(*ck.bytes(name).unwrap(), content(name, dtype, &shape)[..]);
            }
        }
        let files = snapshot(&out);
        assert_eq!(files["note.txt"], b"note.txt");
        let shards = ck.files();
        assert_eq!(shards.len() > 1, files.contains_key(shard::INDEX));
        for file in &shards {
            assert_eq!(safetensors::metadata(file).unwrap()["format"], "pt");
            let data: u64 = ck.infos().filter(|i| i.file == **file).map(|i| i.nbytes).sum();
            assert!(data <= max || ck.infos().filter(|i| i.file == **file).count() == 1);
        }
        if shards.len() > 1 {
            let count = format!("-of-{:05}.safetensors", shards.len());
            assert!(shards.iter().all(|s| s.to_string_lossy().ends_with(&count)));
            let index: Value = serde_json::from_slice(&files[shard::INDEX]).unwrap();
            assert_eq!(index["metadata"]["total_size"], ck.total_bytes());
        }
    }
}

#[test]
fn killed_anywhere_ends_with_the_same_bytes() {
    for max in [60, 200, 1 << 30] {
        let expected = reference(max);
        for stop in 0..script().len() {
            let d = tempfile::tempdir().unwrap();
            let out = d.path().join("out");
            assert!(run(&out, options(max), stop).unwrap().is_none());
            assert!(!out.exists(), "the output appears whole or not at all");
            // A second kill during the resumed run, then to the end.
            assert!(run(&out, options(max), 2).is_ok());
            if !out.exists() {
                run(&out, options(max), usize::MAX).unwrap().unwrap();
            }
            assert_eq!(snapshot(&out), expected, "killed after {stop}, shards of {max}");
        }
    }
}

/// Runs everything but the end.
fn almost(out: &Path, max: u64) -> Writer {
    assert!(run(out, options(max), script().len() - 3).unwrap().is_none());
    let mut writer = Writer::create(out, options(max)).unwrap();
    for op in script().iter().rev().take(3).rev() {
        match op {
            Op::Add(name, dtype, shape) => {
                writer.add(name, *dtype, shape, &content(name, *dtype, shape)).unwrap();
            }
            Op::File(name) => writer.put_file(name, name.as_bytes()).unwrap(),
            Op::Seal(_) => unreachable!(),
        }
    }
    writer
}

#[test]
fn killed_while_finishing() {
    for max in [60, 200, 1 << 30] {
        let expected = reference(max);
        let metadata = BTreeMap::from([
            ("format".to_string(), "pt".to_string()),
            (FINGERPRINT_KEY.to_string(), sha256_bytes(b"job 1")),
        ]);
        let count = {
            let d = tempfile::tempdir().unwrap();
            almost(&d.path().join("out"), max).shards.len()
        };
        for finished in 0..=count {
            let d = tempfile::tempdir().unwrap();
            let out = d.path().join("out");
            let mut writer = almost(&out, max);
            for index in 0..finished {
                let target = writer.partial.join(shard::final_name(index, count));
                writer.shards[index].finish(&target, &metadata).unwrap();
            }
            drop(writer);
            run(&out, options(max), usize::MAX).unwrap().unwrap();
            assert_eq!(snapshot(&out), expected, "killed after {finished} of {count} shards");
        }
    }
}

#[test]
fn killed_between_the_last_renames() {
    let expected = reference(60);
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    let (partial, done) = (sibling(&out, ".partial"), sibling(&out, ".done"));
    run(&out, options(60), usize::MAX).unwrap();
    let complete = |outcome: Result<Option<PathBuf>>| {
        assert!(matches!(outcome, Err(Error::Complete { .. })), "{outcome:?}");
        assert_eq!(snapshot(&out), expected);
        assert!(!partial.exists() && !done.exists());
    };
    complete(run(&out, options(60), usize::MAX));
    // Everything written, working files out of the way, not yet renamed.
    fs::rename(&out, &partial).unwrap();
    fs::create_dir(&done).unwrap();
    complete(run(&out, options(60), usize::MAX));
    // Renamed, but not yet swept up.
    fs::create_dir(&done).unwrap();
    complete(run(&out, options(60), usize::MAX));
    // Journal says finished, working directory still inside.
    fs::rename(&out, &partial).unwrap();
    let work = partial.join(WORK);
    fs::create_dir(&work).unwrap();
    let mut journal = Journal::new(&work);
    let begin =
        Line::Begin { format: journal::FORMAT, fingerprint: "job 1".into(), max_shard_size: 60 };
    journal.begin(&begin).unwrap();
    journal.end().unwrap();
    complete(run(&out, options(60), usize::MAX));
}

#[test]
fn torn_and_damaged_journals() {
    let expected = reference(60);
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    run(&out, options(60), 12).unwrap();
    let path = sibling(&out, ".partial").join(WORK).join(journal::FILE);
    let whole = fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(7) {
        // The end of the journal never reached the disk.
        let d = tempfile::tempdir().unwrap();
        let out = d.path().join("out");
        run(&out, options(60), 12).unwrap();
        let path = sibling(&out, ".partial").join(WORK).join(journal::FILE);
        fs::write(&path, &whole[..length]).unwrap();
        run(&out, options(60), usize::MAX).unwrap();
        assert_eq!(snapshot(&out), expected, "journal cut at {length}");
    }
    let mut damaged = whole.clone();
    damaged[3] = b'#';
    fs::write(&path, damaged).unwrap();
    let message = run(&out, options(60), usize::MAX).unwrap_err().to_string();
    assert!(message.contains("journal") && message.contains("line 1"), "{message}");
}

#[test]
fn shards_shorter_than_the_journal_are_refused() {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    run(&out, options(1 << 30), 8).unwrap();
    let lane = sibling(&out, ".partial").join(WORK).join("shard-00001.0");
    File::options().write(true).open(&lane).unwrap().set_len(10).unwrap();
    let message = run(&out, options(1 << 30), usize::MAX).unwrap_err().to_string();
    assert!(message.contains("holds 10 bytes"), "{message}");
}

#[test]
fn another_job_is_not_resumed() {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    run(&out, options(60), 8).unwrap();
    let other = WriteOptions { fingerprint: "job 2".into(), ..options(60) };
    let message = run(&out, other, usize::MAX).unwrap_err().to_string();
    assert!(message.contains("other options") && message.contains(".partial"), "{message}");
    let fresh = WriteOptions { resume: false, ..options(60) };
    let message = run(&out, fresh.clone(), usize::MAX).unwrap_err().to_string();
    assert!(message.contains("interrupted job"), "{message}");
    let forced = WriteOptions { overwrite: true, ..fresh };
    run(&out, forced, usize::MAX).unwrap().unwrap();
    assert_eq!(snapshot(&out), reference(60));
}

#[test]
fn existing_outputs_are_kept_unless_overwritten() {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), b"x").unwrap();
    let message = run(&out, options(60), usize::MAX).unwrap_err().to_string();
    assert!(message.contains("already exists"), "{message}");
    let overwrite = WriteOptions { overwrite: true, ..options(60) };
    assert!(run(&out, overwrite.clone(), 9).unwrap().is_none());
    assert_eq!(fs::read(out.join("precious")).unwrap(), b"x", "replaced only at the end");
    run(&out, overwrite, usize::MAX).unwrap().unwrap();
    assert_eq!(snapshot(&out), reference(60));
    assert_eq!(fs::read_dir(d.path()).unwrap().count(), 1);
}

#[test]
fn inputs_are_never_written() {
    let d = tempfile::tempdir().unwrap();
    let input = d.path().join("model");
    fs::create_dir(&input).unwrap();
    for out in [input.clone(), input.join("out"), d.path().to_path_buf()] {
        let options = WriteOptions { inputs: vec![input.clone()], overwrite: true, ..options(60) };
        let message = run(&out, options, usize::MAX).unwrap_err().to_string();
        assert!(message.contains("input"), "{message}");
    }
    assert_eq!(fs::read_dir(&input).unwrap().count(), 0);
}

#[test]
fn one_writer_at_a_time() {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    let first = Writer::create(&out, options(60)).unwrap();
    let message = Writer::create(&out, options(60)).unwrap_err().to_string();
    assert!(message.contains("another process"), "{message}");
    drop(first);
    Writer::create(&out, options(60)).unwrap();
}

#[test]
fn bad_tensors_and_names() {
    let d = tempfile::tempdir().unwrap();
    let mut w = Writer::create(&d.path().join("out"), options(60)).unwrap();
    w.add("a", Dtype::F16, &[2], &[0; 4]).unwrap();
    for (outcome, reason) in [
        (w.add("a", Dtype::F16, &[2], &[0; 4]), "already written"),
        (w.add("b", Dtype::F16, &[2], &[0; 5]), "5 bytes given"),
        (w.add("b", Dtype::F16, &[usize::MAX, 9], &[]), "bytes given"),
        (w.add("__metadata__", Dtype::U8, &[1], &[0]), "reserved"),
        (w.add("g", Dtype::Ggml(crate::GgmlType::Q4_0), &[32], &[0; 18]), "no place"),
        (w.put_file("../x", b""), "companion"),
        (w.put_file("/x", b""), "companion"),
        (w.put_file("model.safetensors", b""), "companion"),
        (w.put_file(".strata/journal.jsonl", b""), "companion"),
    ] {
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
    w.seal("k", Value::Null).unwrap();
    assert!(w.seal("k", Value::Null).unwrap_err().to_string().contains("already done"));
    assert_eq!(w.sealed_step("k").unwrap().tensor_names().collect::<Vec<_>>(), ["a"]);
    assert!(w.contains("a") && !w.contains("b"));
}

#[test]
fn companions_are_carried_and_scratch_survives_a_kill() {
    let d = tempfile::tempdir().unwrap();
    let from = d.path().join("from");
    fs::create_dir_all(from.join("sub")).unwrap();
    for name in ["config.json", "tokenizer.model", "model.safetensors", "x.bin", ".git", "skip.me"]
    {
        fs::write(from.join(name), name).unwrap();
    }
    fs::write(from.join(shard::INDEX), "{}").unwrap();
    let out = d.path().join("out");
    let mut w = Writer::create(&out, options(60)).unwrap();
    let scratch = w.scratch_dir().unwrap();
    fs::write(scratch.join("spill"), b"1").unwrap();
    w.seal("first", Value::Null).unwrap();
    drop(w);
    let mut w = Writer::create(&out, options(60)).unwrap();
    assert_eq!(fs::read(w.scratch_dir().unwrap().join("spill")).unwrap(), b"1");
    w.carry(&from, &["skip.me"]).unwrap();
    w.put_json("strata.json", &json!({ "seed": 0 })).unwrap();
    w.finish().unwrap();
    let names: Vec<String> = snapshot(&out).into_keys().collect();
    assert_eq!(names, ["config.json", "model.safetensors", "strata.json", "tokenizer.model"]);
}

#[test]
fn many_tensors_outgrow_the_room_for_the_header() {
    let d = tempfile::tempdir().unwrap();
    let out = d.path().join("out");
    let mut w = Writer::create(&out, options(1 << 30)).unwrap();
    for i in 0..300 {
        w.add(&format!("tensor.{i}"), Dtype::I64, &[1], &(i as i64).to_le_bytes()).unwrap();
    }
    w.finish().unwrap();
    let ck = Checkpoint::open(&out).unwrap();
    assert!((0..300).all(|i| ck.i32(&format!("tensor.{i}")).unwrap() == [i]));
}
