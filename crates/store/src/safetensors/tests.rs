//! Every way a file can be broken, and that none of them panics.

use super::*;

const NAME: &str = "model.safetensors";

/// A file from the text of its header and its data.
pub(crate) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A header of one F32 tensor per name, two elements each.
pub(crate) fn pair_file(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let (start, end) = (8 * i, 8 * i + 8);
            format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let values: Vec<u8> = (0..2 * names.len()).flat_map(|i| (i as f32).to_le_bytes()).collect();
    file(&format!("{{{}}}", entries.join(",")), &values)
}

/// Asserts that the file is refused with a message that names the file, the tensor and the reason.
fn refused(bytes: &[u8], tensor: Option<&str>, reason: &str) {
    let message = parse(Path::new(NAME), bytes).unwrap_err().to_string();
    assert!(message.contains(NAME), "{message}");
    assert!(message.contains(reason), "\"{reason}\" expected in: {message}");
    if let Some(tensor) = tensor {
        assert!(message.contains(&format!("tensor \"{tensor}\"")), "{message}");
    }
}

#[test]
fn reads_a_valid_file() {
    let header = parse(Path::new(NAME), &pair_file(&["a", "b"])).unwrap();
    let names: Vec<_> = header.tensors.iter().map(|t| (t.name.as_str(), t.start, t.end)).collect();
    assert_eq!(names, [("a", 0, 8), ("b", 8, 16)]);
    // Empty tensors, scalars and padding are all valid.
    let text = r#"{"e":{"dtype":"F16","shape":[0,7],"data_offsets":[0,0]},"s":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}      "#;
    assert_eq!(parse(Path::new(NAME), &file(text, &[1])).unwrap().tensors.len(), 2);
    assert!(parse(Path::new(NAME), &file("{}", &[])).unwrap().tensors.is_empty());
}

#[test]
fn too_short_for_a_length() {
    refused(&[1, 2, 3], None, "too few");
}

#[test]
fn header_larger_than_the_file() {
    let mut bytes = file("{}", &[]);
    bytes[0] = 200;
    refused(&bytes, None, "claims 200 bytes, but only 2 bytes follow");
}

#[test]
fn header_larger_than_the_format_allows() {
    let mut bytes = file("{}", &[]);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(&bytes, None, "the format allows");
}

#[test]
fn header_is_not_json() {
    refused(&file("hello", &[]), None, "does not start with '{'");
    refused(&file("{\"a\":", &[]), None, "malformed header");
    refused(&file("{} x", &[]), None, "malformed header");
    refused(&file("{\"\u{0}\":1}", &[]), None, "malformed header");
    let mut bytes = file("{\"aa\":1}", &[]);
    bytes[10] = 0xff;
    refused(&bytes, None, "malformed header");
}

#[test]
fn deep_json() {
    let text = format!("{{\"w\":{}", "[".repeat(1_000_000));
    refused(&file(&text, &[]), Some("w"), "malformed header");
    let text = format!("{{\"__metadata__\":{{\"k\":{}", "{\"k\":".repeat(1_000_000));
    refused(&file(&text, &[]), None, "malformed header");
}

#[test]
fn duplicate_tensor() {
    let mut bytes = pair_file(&["w", "w"]);
    refused(&bytes, Some("w"), "appears twice");
    // Also when spelled differently in the JSON text.
    bytes = pair_file(&["w", r"\u0077"]);
    refused(&bytes, Some("w"), "appears twice");
}

fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    let text = format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
    file(&text, &vec![0; data])
}

#[test]
fn unknown_dtype() {
    refused(&one("F13", "[1]", "[0,4]", 4), Some("w"), "unknown dtype \"F13\"");
}

#[test]
fn shape_overflows() {
    let shape = "[4294967296,4294967296,4]";
    refused(&one("U8", shape, "[0,4]", 4), Some("w"), "overflows");
    let shape = "[4611686018427387904]";
    refused(&one("F64", shape, "[0,4]", 4), Some("w"), "overflows");
    refused(&one("F64", "[99999999999999999999999]", "[0,4]", 4), Some("w"), "malformed");
    refused(&one("F64", "[-2]", "[0,4]", 4), Some("w"), "malformed");
    refused(&one("F64", "[1.5]", "[0,4]", 4), Some("w"), "malformed");
}

#[test]
fn size_does_not_match_dtype_and_shape() {
    refused(&one("F32", "[3]", "[0,8]", 8), Some("w"), "takes 12");
}

#[test]
fn offsets_out_of_range_or_backwards() {
    refused(&one("F32", "[2]", "[0,8]", 7), Some("w"), "lie outside");
    refused(
        &one("U8", "[1]", "[18446744073709551614,18446744073709551615]", 8),
        Some("w"),
        "lie outside",
    );
    refused(&one("F32", "[2]", "[8,0]", 8), Some("w"), "run backwards");
}

#[test]
fn overlapping_tensors() {
    let text = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    refused(&file(text, &[0; 12]), Some("b"), "overlap tensor \"a\"");
}

#[test]
fn gaps_and_trailing_bytes() {
    let text = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}"#;
    refused(&file(text, &[0; 20]), Some("b"), "leave a gap");
    refused(&one("F32", "[2]", "[4,12]", 12), Some("w"), "leave a gap");
    refused(&one("F32", "[2]", "[0,8]", 9), None, "1 bytes follow the last tensor");
}

#[test]
fn misaligned_tensors() {
    let text = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#;
    refused(&file(text, &[0; 5]), Some("b"), "misaligned");
    // Three 4-bit numbers do not end on a byte.
    refused(&one("F4", "[3]", "[0,2]", 2), Some("w"), "misaligned");
    refused(&one("F6_E2M3", "[3]", "[0,3]", 3), Some("w"), "misaligned");
}

#[test]
fn fields_missing_repeated_or_foreign() {
    let entry = |inside: &str| file(&format!("{{\"w\":{{{inside}}}}}"), &[]);
    refused(&entry(r#""dtype":"F32","shape":[0]"#), Some("w"), "lacks the field \"data_offsets\"");
    refused(&entry(r#""dtype":"F32","dtype":"F16""#), Some("w"), "field \"dtype\" twice");
    refused(&entry(r#""dtype":"F32","evil":{"a":[1]}"#), Some("w"), "unknown field \"evil\"");
    refused(&file(r#"{"w":"F32"}"#, &[]), Some("w"), "malformed header");
    refused(&file(r#"{"__metadata__":{"a":1}}"#, &[]), None, "malformed header");
    refused(&file(r#"{"__metadata__":{"a":"1","a":"2"}}"#, &[]), None, "appears twice");
}

#[test]
fn hostile_names_stay_readable_in_messages() {
    let name = "x".repeat(100_000);
    let text = format!("{{\"{name}\\u001b[2J\":1}}");
    let message = parse(Path::new(NAME), &file(&text, &[])).unwrap_err().to_string();
    assert!(message.len() < 1000, "{}", message.len());
    let message = parse(Path::new(NAME), &file("{\"\\u001b[2J\":1}", &[])).unwrap_err().to_string();
    assert!(!message.contains('\u{1b}'), "{message:?}");
}

#[test]
fn truncated_file() {
    let bytes = pair_file(&["a", "b"]);
    for length in 0..bytes.len() {
        parse(Path::new(NAME), &bytes[..length]).unwrap_err();
    }
}

/// A small fixed generator: the same files every time.
pub(crate) struct Lcg(pub(crate) u64);

impl Lcg {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn random_damage_never_panics() {
    let mut random = Lcg(7);
    let valid = {
        let text = r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F16","shape":[3,4],"data_offsets":[0,24]},"b":{"dtype":"I64","shape":[1],"data_offsets":[24,32]},"c":{"dtype":"F4","shape":[2,3],"data_offsets":[32,35]}}"#;
        file(text, &[5; 35])
    };
    parse(Path::new(NAME), &valid).unwrap();
    let mut accepted = 0;
    for _ in 0..6000 {
        let mut bytes = valid.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.below(256) as u8,
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b"0123456789[]{},:\""[random.below(17)]),
            }
        }
        if let Ok(header) = parse(Path::new(NAME), &bytes) {
            accepted += 1;
            let data = bytes.len() - header.data_start;
            assert!(header.tensors.iter().all(|t| t.start <= t.end && t.end <= data));
        }
    }
    assert!(accepted > 0, "damage to the data alone leaves a valid file");
}

#[test]
fn written_headers_are_read_back() {
    let tensors = vec![
        Tensor { name: "a\"\n".into(), dtype: Dtype::F32, shape: vec![2, 1], start: 0, end: 8 },
        Tensor { name: "b".into(), dtype: Dtype::F8E4M3, shape: vec![], start: 8, end: 9 },
    ];
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    for at_least in [0, 1000, 1001] {
        let mut bytes = header_bytes(Path::new(NAME), &metadata, &tensors, at_least).unwrap();
        assert!(bytes.len() >= at_least && bytes.len().is_multiple_of(8));
        bytes.extend([0; 9]);
        let header = parse(Path::new(NAME), &bytes).unwrap();
        assert_eq!(header.tensors, tensors);
        assert_eq!(header.metadata, metadata);
    }
}
