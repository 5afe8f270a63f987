//! A device by name: `cpu`, `cuda:0`, `vulkan:0`.
use crate::{Device, Error, Result};

/// The device called `name`: `cpu`, `cuda[:index]` (cargo feature `cuda`) or `vulkan[:index]`
/// (cargo feature `vulkan`). Tensors made on it carry no gradient graph; ask for one with
/// [`Device::autodiff`].
///
/// # Errors
/// [`Error::Device`] if the name is unknown, its index is not a number, or this build lacks the
/// feature that provides it.
pub fn device(name: &str) -> Result<Device> {
    let fail = |reason: String| Error::Device { name: name.to_owned(), reason };
    let trimmed = name.trim();
    let (kind, index) = match trimmed.split_once(':') {
        None => (trimmed, None),
        Some((kind, index)) => {
            let index = index.parse::<usize>();
            (kind, Some(index.map_err(|_| fail("the part after `:` must be an index".into()))?))
        }
    };
    match (kind, index) {
        ("cpu", None) => Ok(Device::flex()),
        ("cpu", Some(_)) => Err(fail("there is one CPU device; write `cpu`".into())),
        ("cuda", index) => cuda(index.unwrap_or(0)).ok_or_else(|| fail(missing("cuda"))),
        ("vulkan", index) => vulkan(index).ok_or_else(|| fail(missing("vulkan"))),
        _ => Err(fail("unknown device; known are cpu, cuda:<index>, vulkan:<index>".into())),
    }
}

fn missing(feature: &str) -> String {
    format!("this build lacks it; build with `--features {feature}`, or use `cpu`")
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Option<Device> {
    Some(Device::cuda(index))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Option<Device> {
    None
}

#[cfg(feature = "vulkan")]
fn vulkan(index: Option<usize>) -> Option<Device> {
    use burn::tensor::DeviceKind;
    Some(Device::vulkan(index.map_or(DeviceKind::DefaultDevice, DeviceKind::DiscreteGpu)))
}

#[cfg(not(feature = "vulkan"))]
fn vulkan(_: Option<usize>) -> Option<Device> {
    None
}

#[cfg(test)]
mod tests {
    use super::device;

    #[test]
    fn names() {
        assert!(!device("cpu").unwrap().is_autodiff());
        for (name, hint) in [("cpu:1", "write `cpu`"), ("tpu", "known are"), ("cuda:x", "index")] {
            assert!(device(name).unwrap_err().to_string().contains(hint), "{name}");
        }
        #[cfg(not(feature = "cuda"))]
        assert!(device("cuda:0").unwrap_err().to_string().contains("--features cuda"));
    }
}
