//! Refusals as text, types by shape, frequencies by hand.

use super::*;

#[test]
fn refusals_name_layers_and_reasons() {
    let mut refused = Refused::default();
    assert!(refused.check("awq", "x").is_ok());
    refused.add("a.b", "module \"a.b\": AutoAWQ holds 4 bits, not 3; use 4 bits");
    let text = refused.check("awq", "--lossy rounds").unwrap_err().to_string();
    assert_eq!(
        text,
        "1 layer(s) cannot go into awq without losing information: AutoAWQ holds 4 bits, not 3; \
         use 4 bits: a.b; --lossy rounds"
    );
    for layer in ["c", "d", "e"] {
        refused.add(layer, "other");
    }
    let text = refused.check("awq", "--lossy rounds").unwrap_err().to_string();
    assert!(text.contains("a.b (AutoAWQ") && text.contains("d (other), and 1 more"), "{text}");
}

#[test]
fn options_are_read_as_in_recipes() {
    let text = r#"{"to": "sparse-24-bitmask", "type": "q4_k_m", "bits": 3, "lossy": true}"#;
    let options: ConvertOptions = serde_json::from_str(text).unwrap();
    assert_eq!(options.to, ContainerFormat::Sparse24Bitmask);
    assert_eq!(options.number, Some(NumberType::Q4KM));
    assert!(options.lossy && options.grid.bits == 3 && options.grid.group_size == 128);
    let alias: ConvertOptions = serde_json::from_str(r#"{"to": "dequantized"}"#).unwrap();
    assert_eq!(alias.to, ContainerFormat::Safetensors);
}
