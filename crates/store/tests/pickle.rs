//! PyTorch files as users have them: archives, legacy files, and files that mean harm. The fixtures
//! are made by fixtures/make.py; tensors there count in steps of 0.5.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests, too

use std::path::{Path, PathBuf};

use strata_store::pickle;
use strata_store::{Dtype, Entry};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct File(Vec<Entry>);

impl File {
    fn open(name: &str) -> Self {
        Self(pickle::open(&fixture(name)).unwrap_or_else(|e| panic!("{e}")))
    }

    fn names(&self) -> Vec<&str> {
        self.0.iter().map(|e| e.info.name.as_str()).collect()
    }

    fn get(&self, name: &str) -> &Entry {
        self.0.iter().find(|e| e.info.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self.get(name).info.shape
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.get(name).bytes().unwrap().into_owned()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        assert_eq!(self.get(name).info.dtype, Dtype::F32);
        self.bytes(name).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn mapped(&self, name: &str) -> bool {
        matches!(self.get(name).source, strata_store::Source::Map { .. })
    }
}

fn check_types(file: &File) {
    assert_eq!(file.f32("f32"), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
    assert_eq!(file.shape("f32"), [2, 3]);
    assert_eq!(file.get("f16").info.dtype, Dtype::F16);
    assert_eq!(file.bytes("f16"), [0, 0, 0, 0x38, 0, 0x3c, 0, 0x3e]);
    assert_eq!(file.get("bf16").info.dtype, Dtype::BF16);
    assert_eq!(file.bytes("bf16"), [0x40, 0xc0, 0x20, 0xc0]); // -3, -2.5
    assert_eq!(file.get("f64").info.dtype, Dtype::F64);
    assert_eq!(file.shape("f64"), [0usize; 0]);
    assert_eq!(file.bytes("f64"), 2.25f64.to_le_bytes());
    assert_eq!(file.get("i64").info.dtype, Dtype::I64);
    assert_eq!(file.bytes("i64")[8..], (1i64 << 40).to_le_bytes());
    assert_eq!(file.get("u8").info.dtype, Dtype::U8);
    assert_eq!(file.bytes("u8"), [0, 255]);
    assert_eq!(file.get("i8").info.dtype, Dtype::I8);
    assert_eq!(file.bytes("i8"), [0x80, 0x7f]);
    assert_eq!(file.get("bool").info.dtype, Dtype::Bool);
    assert_eq!(file.bytes("bool"), [1, 0, 1]);
    assert!(file.mapped("f32") && file.mapped("i64"));
}

#[test]
fn element_types() {
    let file = File::open("types.pt");
    check_types(&file);
    assert_eq!(file.get("u16").info.dtype, Dtype::U16);
    assert_eq!(file.bytes("u16"), [255, 255, 1, 0]);
    assert_eq!(file.names(), ["f32", "f16", "bf16", "f64", "i64", "u8", "i8", "bool", "u16"]);
}

#[test]
fn element_types_legacy() {
    check_types(&File::open("legacy_types.pt"));
}

fn check_views(file: &File) {
    // base is 0, 0.5, ... 5.5 as [4, 3]; the others are windows on it.
    assert_eq!(file.f32("base").len(), 12);
    assert_eq!(file.shape("transposed"), [3, 4]);
    let transposed = [0.0, 1.5, 3.0, 4.5, 0.5, 2.0, 3.5, 5.0, 1.0, 2.5, 4.0, 5.5];
    assert_eq!(file.f32("transposed"), transposed);
    assert_eq!(file.f32("columns"), [0.5, 1.0, 2.0, 2.5, 3.5, 4.0, 5.0, 5.5]);
    assert_eq!(file.f32("row"), [3.0, 3.5, 4.0]);
    assert_eq!(file.f32("expanded"), [7.0; 6]);
    assert_eq!(file.shape("empty"), [0, 5]);
    assert!(file.f32("empty").is_empty());
    assert_eq!(file.f32("parameter"), [10.0, 10.5]);
    assert_eq!(file.f32("nested.list.0"), [0.0]);
    assert_eq!(file.f32("nested.list.1.deep"), [4.0]);
    assert_eq!(file.f32("nested.3"), [5.0]);
    assert!(file.mapped("base") && file.mapped("row"));
    assert!(!file.mapped("transposed") && !file.mapped("columns"));
}

#[test]
fn views_and_nesting() {
    check_views(&File::open("views.pt"));
}

#[test]
fn views_and_nesting_legacy() {
    check_views(&File::open("legacy_views.pt"));
}

fn check_plain(file: &File) {
    assert_eq!(file.f32("a"), [0.0, 0.5, 1.0, 1.5]);
    assert_eq!(file.f32("b"), [-1.0, -0.5, 0.0]);
}

#[test]
fn containers_of_every_kind() {
    for name in ["plain.pt", "big_endian.pt", "protocol4.pt", "legacy_protocol1.pt"] {
        check_plain(&File::open(name));
    }
}

#[test]
fn bare_tensors_and_lists() {
    assert_eq!(File::open("bare.pt").f32("tensor"), [0.0, 0.5, 1.0, 1.5]);
    let list = File::open("list.pt");
    assert_eq!(list.names(), ["0", "1"]);
    assert_eq!(list.f32("1"), [9.0]);
}

#[test]
fn deflated_storages_are_shared() {
    let file = File::open("deflated.pt");
    assert_eq!(file.f32("low"), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]);
    assert_eq!(file.f32("high"), [28.0, 28.5, 29.0, 29.5, 30.0, 30.5, 31.0, 31.5]);
}

#[test]
fn training_checkpoints_give_their_weights() {
    let file = File::open("training.pt");
    assert_eq!(file.names(), ["fc.weight"]);
    assert_eq!(file.f32("fc.weight"), [0.0, 0.5, 1.0, 1.5]);
}

#[test]
fn old_th_files_keep_their_names() {
    let file = File::open("legacy_cifar.th");
    assert_eq!(
        file.names(),
        ["module.conv1.weight", "module.bn1.running_mean", "module.bn1.num_batches_tracked"]
    );
    assert_eq!(file.shape("module.conv1.weight"), [2, 1, 2, 2]);
    assert_eq!(file.f32("module.bn1.running_mean"), [1.0, 1.5]);
    assert_eq!(file.bytes("module.bn1.num_batches_tracked"), 78000i64.to_le_bytes());
}

// Harm. A file that is no zip archive is read as a row of pickles, so one pickle suffices.

fn refusal(pickle: &[u8]) -> String {
    let message = match pickle::parse_bytes(pickle, Path::new("evil.pt")) {
        Ok(tensors) => panic!("accepted: {tensors:?}"),
        Err(error) => error.to_string(),
    };
    assert!(message.starts_with("evil.pt: "), "{message}");
    message
}

fn expect(pickle: &[u8], words: &[&str]) {
    let message = refusal(pickle);
    for word in words {
        assert!(message.contains(word), "\"{word}\" is not in: {message}");
    }
}

#[test]
fn calls_are_refused_by_name() {
    expect(b"cos\nsystem\n(S'echo'\ntR.", &["os.system", "nothing was executed"]);
    expect(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", &["os.system"]);
    expect(b"(S'echo'\nios\nsystem\n.", &["os.system"]);
    expect(b"(cos\nsystem\nS'echo'\no.", &["os.system"]);
    expect(b"\x80\x02cos\nsystem\n)\x81.", &["os.system"]);
    expect(b"\x80\x04cos\nsystem\n)}\x92.", &["os.system"]);
    expect(b"c__builtin__\neval\n(S'1'\ntR.", &["__builtin__.eval"]);
    expect(b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.", &["builtins.getattr", "os.system"]);
    expect(b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", &["torch.storage._load_from_bytes"]);
    // The class inside a generic constructor is named too.
    expect(
        b"ccopy_reg\n_reconstructor\n(c__main__\nNet\nc__builtin__\nobject\nNtR.",
        &["copy_reg._reconstructor", "__main__.Net"],
    );
    // __setstate__ by BUILD on a class, and on an object that was never made.
    expect(b"c__main__\nEvil\n}S'x'\nS'y'\nsb.", &["__main__.Evil"]);
    expect(b"\x80\x02c__main__\nEvil\n)\x81}b.", &["__main__.Evil"]);
    // Hidden behind the one constructor that calls another.
    expect(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(S'x'\ntNtR.",
        &["os.system"],
    );
}

#[test]
fn names_that_are_only_mentioned_are_data() {
    // {'f': os.system}: nothing calls it, and there is no tensor either.
    let pickle = b"\x80\x02}U\x01fcos\nsystem\ns.";
    expect(pickle, &["plain pickle"]);
}

#[test]
fn bombs_are_refused() {
    expect(&[b'('; 100_000], &["deeper"]);
    // Lists within lists, built bottom-up: parses, but is no checkpoint.
    let mut deep = vec![b']'; 50_000];
    deep.extend(vec![b'a'; 49_999]);
    deep.push(b'.');
    expect(&deep, &["plain pickle"]);
    // A dict copied over and over by a constructor.
    let mut copies = b"\x80\x02}(".to_vec();
    for i in 0..2000u16 {
        copies.push(b'M');
        copies.extend(i.to_le_bytes());
        copies.push(b'N');
    }
    copies.extend(b"u\x85q\x00ccollections\nOrderedDict\nq\x010");
    copies.extend(b"h\x01h\x00R0".repeat(20_000));
    expect(&copies, &["multiplies"]);
    // More values than a checkpoint can need.
    expect(&vec![b']'; 5_000_000], &["values"]);
    expect(&[b"N".as_slice(), &b"2".repeat(5_000_000)].concat(), &["stack"]);
}

#[test]
fn giant_and_cut_lengths_are_refused() {
    expect(b"\x8b\xff\xff\xff\x7f1.", &["cut short"]);
    expect(b"\x8b\xff\xff\xff\xff1.", &["negative length"]);
    expect(b"X\xff\xff\xff\xffabc.", &["cut short"]);
    expect(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.", &["cut short"]);
    expect(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", &["cut short"]);
    expect(b"L123", &["cut short"]);
    expect(&[b"I".as_slice(), &[b'9'; 100_000]].concat(), &["line"]);
    expect(b"", &["cut short"]);
    expect(b"q\x00.", &["empty"]);
    expect(b"h\x07.", &["memo 7"]);
    expect(b"(N.", &["plain pickle"]);
    expect(b"t.", &["no mark"]);
    expect(b"\x80\x09.", &["protocol 9"]);
    expect(b"\x97.", &["buffers"]);
}

/// A legacy file around one object pickle.
fn legacy(object: &[u8], keys: &[u8], storages: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    [magic.as_slice(), b"\x80\x02M\xe9\x03.", b"\x80\x02}.", object, keys, storages].concat()
}

/// A float storage "0" of 4 elements seen through offset, shape and strides in pickle spelling.
fn tensor(offset: &str, shape: &str, strides: &str) -> Vec<u8> {
    format!(
        "}}S'w'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\n\
         S'cpu'\nI4\ntQ{offset}({shape}t({strides}tI00\nNtRs."
    )
    .into_bytes()
}

const KEYS: &[u8] = b"(lS'0'\na.";

fn storage() -> Vec<u8> {
    let mut bytes = 4i64.to_le_bytes().to_vec();
    bytes.extend([1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

#[test]
fn views_are_checked_against_their_storage() {
    let file = |offset, shape, strides| legacy(&tensor(offset, shape, strides), KEYS, &storage());
    let good = file("I1\n", "I3\n", "I1\n");
    let parsed = pickle::parse_bytes(&good, Path::new("good.pt")).unwrap();
    assert_eq!(parsed[0].read(&good).unwrap()[..4], 2.0f32.to_le_bytes());

    expect(&file("I2\n", "I3\n", "I1\n"), &["leaves its storage"]);
    expect(&file("I0\n", "I2\nI2\n", "I3\nI1\n"), &["leaves its storage"]);
    expect(&file("I0\n", "I4\n", "L9223372036854775807L\n"), &["leaves its storage"]);
    expect(&file("I0\n", "I-1\n", "I1\n"), &["malformed"]);
    expect(&file("I0\n", "I2\nI2\n", "I1\n"), &["malformed"]);
    expect(&file("I0\n", "L4611686018427387904L\nI4\n", "I0\nI0\n"), &["impossible shape"]);
    expect(&file("I0\n", "I999999999\n", "I0\n"), &["repeats"]);
}

#[test]
fn storages_are_checked_against_the_file() {
    let object = tensor("I0\n", "I4\n", "I1\n");
    expect(&legacy(&object, KEYS, &storage()[..20]), &["storage 0", "cut short"]);
    let mut lying = storage();
    lying[0] = 5;
    expect(&legacy(&object, KEYS, &lying), &["5 elements", "4"]);
    expect(&legacy(&object, b"(l.", b""), &["tensor \"w\"", "storage 0 is missing"]);
    expect(&legacy(&object, b"(lS'1'\na.", &storage()), &["storage 1", "no tensor"]);
    let twice = [storage(), storage()].concat();
    expect(&legacy(&object, b"(lS'0'\naS'0'\na.", &twice), &["twice"]);
}

#[test]
fn shared_containers_do_not_unfold() {
    // Twenty levels of [x, x]: 2^20 tensors out of a few hundred bytes.
    let mut object = tensor("I0\n", "I4\n", "I1\n");
    object.pop();
    for _ in 0..20 {
        object.extend(b"q\x010(h\x01h\x01l");
    }
    object.push(b'.');
    expect(&legacy(&object, KEYS, &storage()), &["over and over"]);
    // A list that holds itself.
    expect(&legacy(b"]q\x00h\x00a.", b"(l.", b""), &["over and over"]);
    // Two hundred levels around one tensor.
    let mut object = tensor("I0\n", "I4\n", "I1\n");
    object.splice(0..0, [b'('; 200]);
    object.pop();
    object.extend([b'l'; 200]);
    object.push(b'.');
    expect(&legacy(&object, KEYS, &storage()), &["deeper than 64"]);
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    // {'w': t, 'a': {...}} is fine; {'a.w': t, 'a': {'w': t}} is not.
    let one = tensor("I0\n", "I4\n", "I1\n");
    let inner = &one[..one.len() - 1];
    let object =
        [b"}S'a.w'\n".as_slice(), &inner[6..inner.len() - 1], b"sS'a'\n", inner, b"s."].concat();
    expect(&legacy(&object, KEYS, &storage()), &["a.w"]);
}

/// Small deterministic generator, so that a failure can be repeated.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n.max(1)
    }
}

#[test]
fn damaged_files_never_panic() {
    let mut rng = Lcg(7);
    let mut refused = 0;
    for entry in std::fs::read_dir(fixture("")).unwrap() {
        let path = entry.unwrap().path();
        if !path.extension().is_some_and(|e| e == "pt" || e == "th") {
            continue;
        }
        let original = std::fs::read(&path).unwrap();
        for round in 0..600 {
            let mut bytes = original.clone();
            for _ in 0..=rng.below(4) {
                let at = rng.below(bytes.len());
                bytes[at] = match round % 3 {
                    0 => bytes[at] ^ (1 << rng.below(8)),
                    1 => rng.next() as u8,
                    _ => [0, 0xff, b'.', b'(', b'R', b'\n'][rng.below(6)],
                };
            }
            if round % 4 == 0 {
                bytes.truncate(rng.below(bytes.len()));
            }
            match pickle::parse_bytes(&bytes, &path) {
                Err(_) => refused += 1,
                Ok(tensors) => tensors.iter().for_each(|t| {
                    if let Ok(data) = t.read(&bytes) {
                        let count: usize = t.shape.iter().product();
                        assert_eq!(data.len() as u64, t.dtype.bytes_for(count as u64).unwrap());
                    }
                }),
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}
