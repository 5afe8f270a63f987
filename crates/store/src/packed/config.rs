//! The `quantization_config` object of `config.json`: written so that the tool that owns a layout
//! accepts it, read leniently where tools differ in what they write.

use serde_json::{Map, Value, json};

use super::{Layout, own, regex};
use crate::error::{Error, Result};

/// The grid of a linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// Bits per code.
    pub bits: u8,
    /// Columns per group; `None` for one group per row.
    pub group_size: Option<usize>,
    /// Whether the zero point is the middle of the grid.
    pub symmetric: bool,
}

/// How a checkpoint is quantised.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantConfig {
    /// Layout of the packed tensors.
    pub layout: Layout,
    /// Bits per code.
    pub bits: u8,
    /// Columns per group; `None` for one group per row.
    pub group_size: Option<usize>,
    /// Whether the zero point is the middle of the grid.
    pub symmetric: bool,
    /// Whether columns were quantised in the order of their activations (GPTQ).
    pub desc_act: bool,
    /// Whether groups were fixed before reordering (GPTQ).
    pub static_groups: bool,
    /// Damping as a fraction of the mean diagonal (GPTQ); only recorded.
    pub damping: f64,
    /// Modules that stay as they are.
    pub ignore: Vec<String>,
    /// Modules with a grid of their own, by full name.
    pub overrides: Vec<(String, Scheme)>,
    /// Strata's own container: what every packed module is.
    pub modules: own::Modules,
}

impl QuantConfig {
    /// A configuration without exceptions, act-order off.
    pub fn new(layout: Layout, bits: u8, group_size: Option<usize>, symmetric: bool) -> Self {
        Self {
            layout,
            bits,
            group_size,
            symmetric,
            desc_act: false,
            static_groups: false,
            damping: 0.01,
            ignore: Vec::new(),
            overrides: Vec::new(),
            modules: own::Modules::new(),
        }
    }

    /// The common grid.
    pub fn scheme(&self) -> Scheme {
        Scheme { bits: self.bits, group_size: self.group_size, symmetric: self.symmetric }
    }

    /// The grid that an override gives to this module, by name or by a regular expression (`re:`)
    /// that is simple enough to be read.
    pub fn scheme_of(&self, module: &str) -> Option<&Scheme> {
        let names = |target: &str| match target.strip_prefix("re:") {
            Some(pattern) => regex::matches(pattern, module) == Some(true),
            None => target == module,
        };
        self.overrides.iter().find(|(target, _)| names(target)).map(|(_, scheme)| scheme)
    }

    /// Grids that the overrides give, to modules or to patterns of them.
    pub(super) fn schemes(&self) -> impl Iterator<Item = &Scheme> {
        self.overrides.iter().map(|(_, scheme)| scheme)
    }
}

/// The `quantization_config` object for a checkpoint whose `quantised` modules are packed and whose
/// `ignored` linear modules (full names, as `lm_head`) are not.
pub fn config_json(config: &QuantConfig, quantised: &[String], ignored: &[String]) -> Value {
    let mut ignore: Vec<String> = ignored.to_vec();
    for name in &config.ignore {
        if !ignore.contains(name) {
            ignore.push(name.clone());
        }
    }
    match config.layout {
        Layout::CompressedTensors => compressed_json(config, quantised, &ignore),
        Layout::AutoAwq => awq_json(config, &ignore),
        Layout::Gptq { v2 } => gptq_json(config, quantised, &ignore, v2),
        Layout::Strata => own::config_json(&config.modules),
    }
}

/// -1 is everybody's sign for a whole row.
fn group_number(size: Option<usize>) -> Value {
    size.map_or(json!(-1), |size| json!(size))
}

fn compressed_json(config: &QuantConfig, quantised: &[String], ignore: &[String]) -> Value {
    // One group of modules per grid. With a single grid the class name is the usual target.
    let mut groups: Vec<(Scheme, Vec<String>)> = vec![(config.scheme(), Vec::new())];
    for module in quantised {
        let scheme = config.scheme_of(module).cloned().unwrap_or_else(|| config.scheme());
        match groups.iter_mut().find(|(known, _)| *known == scheme) {
            Some((_, members)) => members.push(module.clone()),
            None => groups.push((scheme, vec![module.clone()])),
        }
    }
    groups.retain(|(_, members)| !members.is_empty());
    if let [(_, members)] = &mut groups[..] {
        *members = vec!["Linear".into()];
    } else {
        for (_, members) in groups.iter_mut().filter(|(_, members)| members.len() > 1) {
            let patterns = regex::compact(members, quantised);
            *members = patterns.into_iter().map(|pattern| format!("re:{pattern}")).collect();
        }
    }
    let actorder = if config.desc_act { json!("weight") } else { Value::Null };
    let mut config_groups = Map::new();
    for (scheme, targets) in groups {
        let strategy = if scheme.group_size.is_some() { "group" } else { "channel" };
        let value = json!({
            "targets": targets,
            "input_activations": null,
            "output_activations": null,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": strategy,
                "group_size": scheme.group_size,
                "dynamic": false,
                "actorder": actorder,
                "block_structure": null,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        });
        config_groups.insert(format!("group_{}", config_groups.len()), value);
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignore,
        "config_groups": config_groups,
    })
}

fn awq_json(config: &QuantConfig, ignore: &[String]) -> Value {
    // The head is always left out by the loaders themselves.
    let kept: Vec<&String> = ignore.iter().filter(|name| *name != "lm_head").collect();
    json!({
        "quant_method": "awq",
        "zero_point": true,
        "group_size": group_number(config.group_size),
        "bits": config.bits,
        "version": "gemm",
        "modules_to_not_convert": if kept.is_empty() { Value::Null } else { json!(kept) },
    })
}

fn gptq_json(config: &QuantConfig, quantised: &[String], ignore: &[String], v2: bool) -> Value {
    let mut value = json!({
        "bits": config.bits,
        "group_size": group_number(config.group_size),
        "desc_act": config.desc_act,
        "sym": config.symmetric,
        "static_groups": config.static_groups,
        "true_sequential": true,
        "damp_percent": config.damping,
        "lm_head": false,
        "quant_method": "gptq",
        "checkpoint_format": if v2 { "gptq_v2" } else { "gptq" },
    });
    let exact = |sign: char, name: &str| format!("{sign}:^{}$", name.replace('.', "\\."));
    let mut dynamic = Map::new();
    for name in ignore.iter().filter(|name| *name != "lm_head") {
        dynamic.insert(exact('-', name), json!({}));
    }
    // Expressions are tried in order and the first match decides: what is left out comes first.
    let mut schemes: Vec<(&Scheme, Vec<String>)> = Vec::new();
    for (name, scheme) in &config.overrides {
        match schemes.iter_mut().find(|(known, _)| *known == scheme) {
            Some((_, members)) => members.push(name.clone()),
            None => schemes.push((scheme, vec![name.clone()])),
        }
    }
    for (scheme, members) in schemes {
        for pattern in regex::compact(&members, quantised) {
            let group_size = group_number(scheme.group_size);
            let value =
                json!({ "bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric });
            dynamic.insert(format!("+:{pattern}"), value);
        }
    }
    if !dynamic.is_empty()
        && let Some(object) = value.as_object_mut()
    {
        object.insert("dynamic".into(), dynamic.into());
    }
    value
}

/// Reads the `quantization_config` of a `config.json` (given whole). `None` when there is none.
///
/// # Errors
/// When the method or format is not one that Strata reads, or numbers are missing or impossible.
pub fn parse_config(config: &Value) -> Result<Option<QuantConfig>> {
    let found = ["quantization_config", "compression_config"]
        .iter()
        .find_map(|key| config.get(key))
        .filter(|value| !value.is_null());
    let Some(value) = found else { return Ok(None) };
    let method = value.get("quant_method").and_then(Value::as_str).unwrap_or_default();
    match method {
        "awq" => parse_awq(value).map(Some),
        "gptq" => parse_gptq(value).map(Some),
        // Sparse matrices are read as dense ones.
        "compressed-tensors"
            if value.get("config_groups").is_none() && value.get("sparsity_config").is_some() =>
        {
            Ok(None)
        }
        "compressed-tensors" => parse_compressed(value).map(Some),
        "strata" => {
            // Bits and groups are each module's own.
            let mut config = QuantConfig::new(Layout::Strata, 8, None, false);
            config.modules = own::parse(value)?;
            Ok(Some(config))
        }
        "" if value.get("config_groups").is_some() => parse_compressed(value).map(Some),
        other => {
            Err(Error::config(format!("quant_method \"{other}\" is not one that Strata reads"))
                .with_remedy("known are awq, gptq, compressed-tensors and strata"))
        }
    }
}

/// The first of `keys` that is present.
fn field<'a>(value: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().find_map(|key| value.get(key)).filter(|v| !v.is_null())
}

fn parse_bits(value: &Value, keys: &[&str]) -> Result<u8> {
    let bits = field(value, keys).and_then(Value::as_u64);
    bits.and_then(|b| u8::try_from(b).ok()).filter(|b| (1..=8).contains(b)).ok_or_else(|| {
        Error::config(format!("\"{}\" must be a number from 1 to 8", keys.join("\" or \"")))
    })
}

/// A positive group size; absent, null and -1 mean whole rows.
fn parse_group(value: &Value, keys: &[&str]) -> Result<Option<usize>> {
    let Some(number) = field(value, keys) else { return Ok(None) };
    match number.as_i64() {
        Some(-1) => Ok(None),
        Some(size) if size > 0 => Ok(usize::try_from(size).ok()),
        _ => Err(Error::config(format!("the group size {number} is neither positive nor -1"))),
    }
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(String::from).collect()
}

fn parse_awq(value: &Value) -> Result<QuantConfig> {
    let version = field(value, &["version"]).and_then(Value::as_str).unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(Error::config(format!("AWQ version \"{version}\" has another layout"))
            .with_remedy("only \"gemm\" is read"));
    }
    let bits = parse_bits(value, &["bits", "w_bit"])?;
    let group_size = parse_group(value, &["group_size", "q_group_size"])?;
    let mut config = QuantConfig::new(Layout::AutoAwq, bits, group_size, false);
    config.ignore = strings(value.get("modules_to_not_convert"));
    Ok(config)
}

fn parse_gptq(value: &Value) -> Result<QuantConfig> {
    let format = field(value, &["checkpoint_format"]).and_then(Value::as_str).unwrap_or("gptq");
    let v2 = match format {
        "gptq" => false,
        "gptq_v2" => true,
        other => {
            return Err(Error::config(format!("GPTQ checkpoint_format \"{other}\" is not read"))
                .with_remedy("known are gptq and gptq_v2"));
        }
    };
    let flag = |key: &str, default| value.get(key).and_then(Value::as_bool).unwrap_or(default);
    let bits = parse_bits(value, &["bits"])?;
    let group_size = parse_group(value, &["group_size"])?;
    let mut config = QuantConfig::new(Layout::Gptq { v2 }, bits, group_size, flag("sym", true));
    config.desc_act = flag("desc_act", false);
    config.static_groups = flag("static_groups", false);
    config.damping = value.get("damp_percent").and_then(Value::as_f64).unwrap_or(0.01);
    Ok(config)
}

fn parse_compressed(value: &Value) -> Result<QuantConfig> {
    let groups = value
        .get("config_groups")
        .and_then(Value::as_object)
        .filter(|groups| !groups.is_empty())
        .ok_or_else(|| Error::config("compressed-tensors without \"config_groups\""))?;
    let outer = field(value, &["format"]).and_then(Value::as_str).unwrap_or_default();
    let mut config: Option<QuantConfig> = None;
    for (name, group) in groups {
        let format = field(group, &["format"]).and_then(Value::as_str).unwrap_or(outer);
        if format != "pack-quantized" {
            return Err(Error::config(format!(
                "compressed-tensors format \"{format}\" is not read"
            ))
            .with_remedy("known is pack-quantized"));
        }
        let weights = field(group, &["weights"])
            .ok_or_else(|| Error::config(format!("\"{name}\" does not quantise weights")))?;
        if weights.get("type").and_then(Value::as_str).unwrap_or("int") != "int" {
            return Err(Error::config(format!("\"{name}\" has weights that are not integers")));
        }
        let scheme = Scheme {
            bits: parse_bits(weights, &["num_bits"])?,
            group_size: parse_group(weights, &["group_size"])?,
            symmetric: weights.get("symmetric").and_then(Value::as_bool).unwrap_or(true),
        };
        let common = config.get_or_insert_with(|| {
            QuantConfig::new(
                Layout::CompressedTensors,
                scheme.bits,
                scheme.group_size,
                scheme.symmetric,
            )
        });
        common.desc_act |= field(weights, &["actorder"]).is_some_and(|v| v != &json!(false));
        for target in strings(group.get("targets")) {
            common.overrides.push((target, scheme.clone()));
        }
    }
    let mut config = config.ok_or_else(|| Error::config("no group of modules"))?;
    config.ignore = strings(value.get("ignore"));
    // A class as target is the rule, not an exception.
    let common = config.scheme();
    config.overrides.retain(|(target, scheme)| target != "Linear" || *scheme != common);
    Ok(config)
}
