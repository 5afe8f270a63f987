//! The constructors that pickles of tensors use, each replaced by the plain value it makes. This is
//! the whole allow-list; calling any other name is an error that says the name.

use super::value::{Global, Id, Storage, Value, View, width};
use crate::dtype::Dtype;
use crate::error::shorten;

type Made<'a> = Result<Value<'a>, String>;

/// More dimensions than any layer has.
const MAX_DIMENSIONS: usize = 16;
/// A tensor may repeat its storage (`expand`), but not blow it up beyond this many bytes.
const MAX_EXPANSION: usize = 16 << 20;

fn at<'h, 'a>(heap: &'h [Value<'a>], id: Id) -> &'h Value<'a> {
    heap.get(id as usize).unwrap_or(&Value::None)
}

/// Calls whatever value `callee` is.
pub(super) fn call_id<'a>(heap: &[Value<'a>], callee: Id, arguments: &[Id]) -> Made<'a> {
    match at(heap, callee) {
        Value::Global(global) => call(heap, global, arguments),
        _ => Err("calls a value that is no constructor".into()),
    }
}

/// The refusal of a call whose arguments are no tuple.
pub(super) fn refuse_shape<'a>(heap: &[Value<'a>], callee: Id) -> Made<'a> {
    match at(heap, callee) {
        Value::Global(global) => Err(format!("calls {global} with malformed arguments")),
        _ => Err("calls a value that is no constructor".into()),
    }
}

/// Calls a name of the allow-list.
pub(super) fn call<'a>(heap: &[Value<'a>], global: &Global<'_>, arguments: &[Id]) -> Made<'a> {
    let malformed = || format!("calls {global} with malformed arguments");
    let argument = |n: usize| arguments.get(n).map(|&id| at(heap, id));
    match (&*global.module, &*global.name) {
        ("collections", "OrderedDict" | "defaultdict" | "Counter") => {
            Ok(Value::Dict(dict(heap, arguments)))
        }
        ("builtins" | "__builtin__", "set" | "frozenset") => Ok(Value::Set),
        ("builtins" | "__builtin__", "bytearray" | "bytes") => match argument(0) {
            Some(Value::Bytes(bytes)) => Ok(Value::Bytes(bytes.clone())),
            // bytearray(text, encoding) of old protocols, or empty.
            _ => Ok(Value::Opaque),
        },
        ("builtins" | "__builtin__", "complex") => Ok(Value::Opaque),
        ("_codecs" | "codecs", "encode") => match (argument(0), argument(1)) {
            (Some(Value::Text(text)), Some(Value::Text(encoding)))
                if matches!(&**encoding, "latin1" | "latin-1") =>
            {
                let bytes: Option<Vec<u8>> =
                    text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
                Ok(Value::Bytes(bytes.ok_or_else(malformed)?.into()))
            }
            _ => Err(malformed()),
        },
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => {
            tensor(heap, global, arguments)
        }
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")
        | ("torch.nn.parameter", "Parameter" | "Buffer") => match argument(0) {
            Some(Value::Tensor(view)) => Ok(Value::Tensor(view.clone())),
            _ => Err(malformed()),
        },
        // (function, type, arguments, state): a tensor with extra attributes.
        ("torch._tensor", "_rebuild_from_type_v2") => match (argument(0), argument(2)) {
            (Some(Value::Global(inner)), Some(Value::Tuple(items))) if **inner != *global => {
                call(heap, inner, items)
            }
            _ => Err(malformed()),
        },
        ("torch", "Size") => match argument(0) {
            Some(Value::Tuple(items)) => Ok(Value::Tuple(items.clone())),
            Some(Value::List(items)) => Ok(Value::Tuple(items.clone().into())),
            None => Ok(Value::Tuple(Box::default())),
            _ => Err(malformed()),
        },
        ("torch", "device") | ("torch.serialization", "_get_layout") => Ok(Value::Opaque),
        // Scalars and arrays that training scripts leave among their bookkeeping.
        ("numpy", "dtype")
        | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar" | "_reconstruct")
        | ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Ok(Value::Opaque),
        ("numpy.dtypes", name) if name.ends_with("DType") => Ok(Value::Opaque),
        _ => {
            // copyreg._reconstructor(cls, ...) and the like: the class says more.
            let class = match argument(0) {
                Some(Value::Global(class)) => format!(" for {class}"),
                _ => String::new(),
            };
            Err(format!(
                "calls {global}{class}, which is not among the few constructors that tensors need; \
                 nothing was executed. Load the file where you trust it and save only the state_dict"
            ))
        }
    }
}

/// BUILD: attributes set on an object. They carry no tensors worth keeping on the types below.
pub(super) fn build(object: &Value<'_>) -> Result<(), String> {
    match object {
        Value::Dict(_) | Value::Tensor(_) | Value::Opaque | Value::Set => Ok(()),
        Value::Global(global) => Err(format!("sets the state of {global}; nothing was executed")),
        _ => Err("sets the state of a plain value".into()),
    }
}

/// Items given to a dict constructor: another dict, or a sequence of pairs.
fn dict(heap: &[Value<'_>], arguments: &[Id]) -> Vec<(Id, Id)> {
    let Some(&first) = arguments.first() else { return Vec::new() };
    let items: &[Id] = match at(heap, first) {
        Value::Dict(pairs) => return pairs.clone(),
        Value::List(items) => items,
        Value::Tuple(items) => items,
        _ => return Vec::new(),
    };
    let pair = |&id: &Id| match at(heap, id) {
        Value::Tuple(pair) => <[Id; 2]>::try_from(&pair[..]).ok(),
        Value::List(pair) => <[Id; 2]>::try_from(&pair[..]).ok(),
        _ => None,
    };
    items.iter().filter_map(pair).map(|[key, value]| (key, value)).collect()
}

/// The storage that a persistent id stands for.
pub(super) fn persistent<'a>(heap: &[Value<'a>], id: Id) -> Made<'a> {
    const WHAT: &str = "a persistent id that is no storage";
    let Value::Tuple(items) = at(heap, id) else { return Err(WHAT.into()) };
    let item = |n: usize| items.get(n).map(|&id| at(heap, id));
    let text = |n: usize| match item(n) {
        Some(Value::Text(text)) => Some(text.to_string()),
        Some(Value::Bytes(bytes)) => String::from_utf8(bytes.to_vec()).ok(),
        Some(Value::Int(n)) => Some(n.to_string()),
        _ => None,
    };
    match text(0).as_deref() {
        Some("storage") => {}
        // Old files keep the source text of the classes they mention beside them.
        Some("module") => return Ok(item(1).cloned().unwrap_or(Value::None)),
        _ => return Err(WHAT.into()),
    }
    let Some(Value::Global(class)) = item(1) else { return Err(WHAT.into()) };
    let dtype = storage_type(class)?;
    let key = text(2).filter(|key| key.len() <= 256).ok_or("a storage without a usable key")?;
    let count = item(4).and_then(size).ok_or("a storage of impossible size")?;
    let window = match item(5) {
        None | Some(Value::None) => None,
        Some(Value::Tuple(view)) => {
            let number = |n: usize| view.get(n).and_then(|&id| size(at(heap, id)));
            let (offset, len) = number(1).zip(number(2)).ok_or("a malformed storage view")?;
            if offset.checked_add(len).is_none_or(|end| end > count) {
                return Err(format!("a view of storage {} leaves it", shorten(&key)));
            }
            Some((offset, len))
        }
        Some(_) => return Err("a malformed storage view".into()),
    };
    Ok(Value::Storage(Box::new(Storage { key, dtype, count, window })))
}

fn size(value: &Value<'_>) -> Option<usize> {
    match value {
        Value::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

fn storage_type(class: &Global<'_>) -> Result<Option<Dtype>, String> {
    let known = matches!(&*class.module, "torch" | "torch.cuda" | "torch.storage");
    Ok(Some(match &*class.name {
        _ if !known => return Err(format!("{class} is no storage type of PyTorch")),
        "UntypedStorage" | "_UntypedStorage" => return Ok(None),
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        "ComplexFloatStorage" => Dtype::C64,
        _ => return Err(format!("tensors of {class} cannot be read; convert them to float")),
    }))
}

fn scalar_type(name: &Global<'_>) -> Result<Dtype, String> {
    Ok(match (&*name.module, &*name.name) {
        ("torch", "float64" | "double") => Dtype::F64,
        ("torch", "float32" | "float") => Dtype::F32,
        ("torch", "float16" | "half") => Dtype::F16,
        ("torch", "bfloat16") => Dtype::BF16,
        ("torch", "float8_e4m3fn") => Dtype::F8E4M3,
        ("torch", "float8_e5m2") => Dtype::F8E5M2,
        ("torch", "float8_e4m3fnuz") => Dtype::F8E4M3Fnuz,
        ("torch", "float8_e5m2fnuz") => Dtype::F8E5M2Fnuz,
        ("torch", "float8_e8m0fnu") => Dtype::F8E8M0,
        ("torch", "int64" | "long") => Dtype::I64,
        ("torch", "int32" | "int") => Dtype::I32,
        ("torch", "int16" | "short") => Dtype::I16,
        ("torch", "int8") => Dtype::I8,
        ("torch", "uint64") => Dtype::U64,
        ("torch", "uint32") => Dtype::U32,
        ("torch", "uint16") => Dtype::U16,
        ("torch", "uint8") => Dtype::U8,
        ("torch", "bool") => Dtype::Bool,
        ("torch", "complex64" | "cfloat") => Dtype::C64,
        _ => return Err(format!("tensors of {name} cannot be read; convert them to float")),
    })
}

/// (storage, offset, size, stride, ...) with the element type at place 6 in version 3.
fn tensor<'a>(heap: &[Value<'a>], global: &Global<'_>, arguments: &[Id]) -> Made<'a> {
    let malformed = || format!("calls {global} with malformed arguments");
    let argument = |n: usize| arguments.get(n).map(|&id| at(heap, id));
    let Some(Value::Storage(storage)) = argument(0) else { return Err(malformed()) };
    let sizes = |n: usize| -> Option<Vec<usize>> {
        let items: &[Id] = match argument(n)? {
            Value::Tuple(items) => items,
            Value::List(items) => items,
            _ => return None,
        };
        (items.len() <= MAX_DIMENSIONS)
            .then(|| items.iter().map(|&id| size(at(heap, id))).collect())?
    };
    let offset = argument(1).and_then(size).ok_or_else(malformed)?;
    let (shape, strides) = sizes(2).zip(sizes(3)).ok_or_else(malformed)?;
    if shape.len() != strides.len() {
        return Err(malformed());
    }
    let dtype = if &*global.name == "_rebuild_tensor_v3" {
        match argument(6) {
            Some(Value::Global(name)) => scalar_type(name)?,
            _ => return Err(malformed()),
        }
    } else {
        storage.dtype.ok_or_else(malformed)?
    };
    let view = View { storage: (**storage).clone(), dtype, offset, shape, strides };
    Ok(Value::Tensor(Box::new(checked(view)?)))
}

/// The view with its offset counted from the start of the whole storage, after every bound.
fn checked(mut view: View) -> Result<View, String> {
    let storage = &view.storage;
    let (start, count) = storage.window.unwrap_or((0, storage.count));
    let width = width(view.dtype);
    // Both in elements of the view's type.
    let bytes = count.checked_mul(storage.width()).ok_or("a storage of impossible size")?;
    let (available, first) = match storage.dtype {
        Some(_) if storage.width() != width => return Err("a storage of another type".into()),
        Some(_) => (count, start),
        None => (bytes / width, start / width),
    };
    if storage.dtype.is_none() && !start.is_multiple_of(width) {
        return Err("a misaligned storage view".into());
    }
    let elements = view.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    let nbytes = elements.and_then(|n| n.checked_mul(width));
    let (Some(elements), Some(nbytes)) = (elements, nbytes) else {
        return Err(format!("a tensor of impossible shape {:?}", view.shape));
    };
    let last =
        view.shape.iter().zip(&view.strides).try_fold(view.offset, |last, (&size, &stride)| {
            last.checked_add(size.saturating_sub(1).checked_mul(stride)?)
        });
    let inside = elements == 0 || last.is_some_and(|last| last < available);
    if !inside {
        return Err(format!(
            "a tensor of shape {:?}, strides {:?} at element {} leaves its storage {} of {available} \
             elements",
            view.shape,
            view.strides,
            view.offset,
            shorten(&storage.key)
        ));
    }
    if nbytes > bytes.max(MAX_EXPANSION) {
        return Err(format!(
            "a tensor of shape {:?} repeats a storage of {bytes} bytes up to {nbytes}; save a \
             contiguous copy",
            view.shape
        ));
    }
    view.offset = if elements == 0 { 0 } else { first + view.offset };
    Ok(view)
}
