//! The pickle virtual machine, protocols 0 to 5, for data only.
//!
//! Names are never imported. Where a pickle would call one, [`super::calls`] either builds the
//! plain value that the constructor is known to give, or refuses. Every opcode makes at most one
//! value, so memory is bounded by the length of the pickle and by the limits below.

use std::borrow::Cow;
use std::collections::HashMap;

use super::calls;
use super::value::{Global, Heap, Id, Value};

/// Values, stack entries and memo entries that one pickle may have. A checkpoint of ten thousand
/// tensors needs about 200 000.
const MAX_VALUES: usize = 4_000_000;
/// Marks open at the same time; Python's own recursion limit keeps writers below it.
const MAX_MARKS: usize = 2_000;
/// Bytes that values may own in a pickle of any length, and further bytes per byte of pickle.
const FREE_PAYLOAD: usize = 1 << 20;
const MAX_EXPANSION: usize = 64;
/// Longest line of the text opcodes.
const MAX_LINE: usize = 1 << 16;

/// Runs one pickle that starts at `*at`, and moves `*at` behind its STOP.
pub(super) fn load<'a>(bytes: &'a [u8], at: &mut usize) -> Result<Heap<'a>, String> {
    let mut machine = Machine {
        bytes,
        start: *at,
        at: *at,
        payload: 0,
        // Shared, so that one-byte opcodes do not each cost a value.
        heap: vec![
            Value::None,
            Value::Bool(false),
            Value::Bool(true),
            Value::Tuple(Box::default()),
        ],
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let root = loop {
        let position = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => break root,
            Err(reason) => return Err(format!("{reason} (byte {position} of the pickle)")),
        }
    };
    *at = machine.at;
    Ok(Heap { values: machine.heap, root })
}

const NONE: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;
const EMPTY_TUPLE: Id = 3;

struct Machine<'a> {
    bytes: &'a [u8],
    start: usize,
    at: usize,
    /// Bytes that values own beyond their place in the heap.
    payload: usize,
    heap: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Stack heights.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

type Step<T = ()> = Result<T, String>;

impl<'a> Machine<'a> {
    /// One opcode; the final value at STOP.
    fn step(&mut self) -> Step<Option<Id>> {
        let [opcode] = self.array::<1>()?;
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => {
                let [protocol] = self.array::<1>()?;
                if protocol > 5 {
                    return Err(format!("pickle protocol {protocol} is not supported"));
                }
            }
            0x95 => drop(self.array::<8>()?), // FRAME: a hint for readers of streams

            b'(' => {
                if self.marks.len() >= MAX_MARKS {
                    return Err(format!("the pickle nests deeper than {MAX_MARKS}"));
                }
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.pop()?;
                self.push(top)?;
                self.push(top)?;
            }

            b'N' => self.push(NONE)?,
            0x88 => self.push(TRUE)?,
            0x89 => self.push(FALSE)?,
            b'I' | b'L' | b'F' | b'J' | b'K' | b'M' | 0x8a | 0x8b | b'G' => self.number(opcode)?,
            b'S' | b'T' | b'U' | b'V' | b'X' | 0x8c | 0x8d | b'B' | b'C' | 0x8e | 0x96 => {
                self.string(opcode)?
            }

            b')' => self.push(EMPTY_TUPLE)?,
            b't'
            | 0x85..=0x87
            | b']'
            | b'l'
            | b'a'
            | b'e'
            | b'}'
            | b'd'
            | b's'
            | b'u'
            | 0x8f
            | 0x90
            | 0x91 => self.container(opcode)?,

            b'p' | b'q' | b'r' | 0x94 | b'g' | b'h' | b'j' => self.memory(opcode)?,

            b'c' | 0x93 => self.global(opcode)?,
            b'P' => return Err("a textual persistent id refers to no storage".into()),
            b'Q' => {
                let id = self.pop()?;
                let value = calls::persistent(&self.heap, id)?;
                self.add(value)?;
            }
            b'R' | b'i' | b'o' | 0x81 | 0x92 | b'b' => self.object(opcode)?,

            0x82..=0x84 => return Err("refers to Python's extension registry".into()),
            0x97 | 0x98 => return Err("refers to buffers outside the file".into()),
            other => return Err(format!("unknown pickle opcode 0x{other:02x}")),
        }
        Ok(None)
    }

    fn number(&mut self, opcode: u8) -> Step {
        let value = match opcode {
            b'I' => match self.line()? {
                b"00" => return self.push(FALSE),
                b"01" => return self.push(TRUE),
                digits => decimal(digits)?,
            },
            b'L' => {
                let digits = self.line()?;
                decimal(digits.strip_suffix(b"L").unwrap_or(digits))?
            }
            b'F' => {
                self.line()?;
                Value::Opaque // floats are bookkeeping
            }
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Value::Int(u8::from_le_bytes(self.array()?).into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'G' => {
                self.take(8)?;
                Value::Opaque
            }
            0x8a => {
                let n = self.length(1)?;
                wide(self.take(n)?)
            }
            _ => {
                let n = i32::from_le_bytes(self.array()?);
                let n = usize::try_from(n).map_err(|_| "an integer of negative length")?;
                wide(self.take(n)?)
            }
        };
        self.add(value)
    }

    fn string(&mut self, opcode: u8) -> Step {
        let value = match opcode {
            b'S' => quoted(self.line()?)?,
            b'V' => Value::Text(raw_unicode(self.line()?)?),
            b'T' => {
                let n = i32::from_le_bytes(self.array()?);
                let n = usize::try_from(n).map_err(|_| "a string of negative length")?;
                old_text(self.take(n)?)
            }
            b'U' => {
                let n = self.length(1)?;
                old_text(self.take(n)?)
            }
            b'X' | 0x8c | 0x8d => {
                let n =
                    self.length(if opcode == b'X' { 4 } else { 1 + 7 * usize::from(opcode & 1) })?;
                let raw = self.take(n)?;
                match std::str::from_utf8(raw) {
                    Ok(text) => Value::Text(text.into()),
                    // Lone surrogates ("surrogatepass"); kept as bytes, they are no name.
                    Err(_) => Value::Bytes(raw.into()),
                }
            }
            _ => {
                let n = self.length(match opcode {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                Value::Bytes(self.take(n)?.into())
            }
        };
        self.add(value)
    }

    fn container(&mut self, opcode: u8) -> Step {
        match opcode {
            b't' => {
                let items = self.pop_mark()?;
                self.add(Value::Tuple(items.into()))
            }
            0x85..=0x87 => {
                let n = usize::from(opcode - 0x84);
                let floor = self.floor();
                let from = self.stack.len().checked_sub(n).filter(|&from| from >= floor);
                let from = from.ok_or("a tuple takes more than the stack holds")?;
                let items: Box<[Id]> = self.stack.drain(from..).collect();
                self.add(Value::Tuple(items))
            }
            b']' => self.add(Value::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.add(Value::List(items))
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.extend(items)
            }
            b'}' => self.add(Value::Dict(Vec::new())),
            b'd' => {
                let pairs = pairs(self.pop_mark()?)?;
                self.add(Value::Dict(pairs))
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(vec![(key, value)])
            }
            b'u' => {
                let pairs = pairs(self.pop_mark()?)?;
                self.insert(pairs)
            }
            0x8f => self.add(Value::Set),
            0x90 => {
                self.pop_mark()?;
                match self.top()? {
                    Value::Set => Ok(()),
                    _ => Err("adds set items to something else".into()),
                }
            }
            _ => {
                self.pop_mark()?;
                self.add(Value::Set)
            }
        }
    }

    fn memory(&mut self, opcode: u8) -> Step {
        let key = match opcode {
            b'p' | b'g' => match decimal(self.line()?)? {
                Value::Int(n) => u32::try_from(n).map_err(|_| "a memo key out of range")?,
                _ => return Err("a memo key out of range".into()),
            },
            b'q' | b'h' => u8::from_le_bytes(self.array()?).into(),
            b'r' | b'j' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        match opcode {
            b'g' | b'h' | b'j' => {
                let id = *self.memo.get(&key).ok_or_else(|| format!("memo {key} is empty"))?;
                self.push(id)
            }
            _ => {
                if self.memo.len() >= MAX_VALUES {
                    return Err(format!("the memo holds more than {MAX_VALUES} entries"));
                }
                let id = self.top_id()?;
                self.memo.insert(key, id);
                Ok(())
            }
        }
    }

    fn global(&mut self, opcode: u8) -> Step {
        let global = if opcode == b'c' {
            self.global_lines()?
        } else {
            let name = self.pop()?;
            let module = self.pop()?;
            match (&self.heap[module as usize], &self.heap[name as usize]) {
                (Value::Text(module), Value::Text(name)) => {
                    // Owned text comes from text opcodes and is short; borrowed text costs nothing.
                    Global { module: module.clone(), name: name.clone() }
                }
                _ => return Err("a global whose name is no text".into()),
            }
        };
        self.add(Value::Global(Box::new(global)))
    }

    fn global_lines(&mut self) -> Step<Global<'a>> {
        let mut line = || -> Step<Cow<'a, str>> {
            let raw = self.line()?;
            Ok(std::str::from_utf8(raw).map_err(|_| "a global whose name is no text")?.into())
        };
        Ok(Global { module: line()?, name: line()? })
    }

    /// REDUCE, INST, OBJ, NEWOBJ, NEWOBJ_EX and BUILD.
    fn object(&mut self, opcode: u8) -> Step {
        let value = match opcode {
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                let callee = self.pop()?;
                self.call(callee, arguments)?
            }
            0x92 => {
                let keywords = self.pop()?;
                let arguments = self.pop()?;
                let callee = self.pop()?;
                let value = self.call(callee, arguments)?;
                match &self.heap[keywords as usize] {
                    Value::Dict(pairs) if pairs.is_empty() => value,
                    _ => return Err("a constructor is called with keyword arguments".into()),
                }
            }
            b'i' => {
                let global = self.global_lines()?;
                let arguments = self.pop_mark()?;
                calls::call(&self.heap, &global, &arguments)?
            }
            b'o' => {
                let items = self.pop_mark()?;
                match items.split_first() {
                    Some((&callee, arguments)) => calls::call_id(&self.heap, callee, arguments)?,
                    None => return Err("OBJ without a class".into()),
                }
            }
            _ => {
                self.pop()?; // the state: attributes, of which none matters here
                return calls::build(self.top()?);
            }
        };
        self.add(value)
    }

    fn call(&self, callee: Id, arguments: Id) -> Step<Value<'a>> {
        match &self.heap[arguments as usize] {
            Value::Tuple(items) => calls::call_id(&self.heap, callee, items),
            _ => calls::refuse_shape(&self.heap, callee),
        }
    }

    fn extend(&mut self, items: Vec<Id>) -> Step {
        let top = self.top_id()?;
        match &mut self.heap[top as usize] {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            Value::Opaque => Ok(()),
            _ => Err("appends to something that is no list".into()),
        }
    }

    fn insert(&mut self, pairs: Vec<(Id, Id)>) -> Step {
        let top = self.top_id()?;
        match &mut self.heap[top as usize] {
            Value::Dict(dict) => {
                dict.extend(pairs);
                Ok(())
            }
            Value::Opaque => Ok(()),
            _ => Err("sets items of something that is no dict".into()),
        }
    }

    // The stack.

    fn add(&mut self, value: Value<'a>) -> Step {
        if self.heap.len() >= MAX_VALUES {
            return Err(format!("the pickle holds more than {MAX_VALUES} values"));
        }
        // Constructors may copy what they are given (a dict, a name, a shape), and a memo hands the
        // same thing out again and again; copies must stay in proportion to the pickle.
        self.payload = self.payload.saturating_add(value.payload());
        if self.payload > FREE_PAYLOAD + MAX_EXPANSION * (self.at - self.start) {
            return Err("the pickle multiplies its own content".into());
        }
        self.heap.push(value);
        self.push((self.heap.len() - 1) as Id)
    }

    fn push(&mut self, id: Id) -> Step {
        if self.stack.len() >= MAX_VALUES {
            return Err(format!("the stack grows beyond {MAX_VALUES} values"));
        }
        self.stack.push(id);
        Ok(())
    }

    /// Height below which the innermost mark protects the stack.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top_id(&self) -> Step<Id> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.floor() => Ok(id),
            _ => Err("the stack is empty".into()),
        }
    }

    fn top(&self) -> Step<&Value<'a>> {
        Ok(&self.heap[self.top_id()? as usize])
    }

    fn pop(&mut self) -> Step<Id> {
        let id = self.top_id()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let height = self.marks.pop().ok_or("there is no mark on the stack")?;
        Ok(self.stack.split_off(height.min(self.stack.len())))
    }

    // The input.

    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            let left = self.bytes.len() - self.at;
            return Err(format!("the pickle is cut short: {n} bytes wanted, {left} left"));
        };
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    /// A little-endian length of `n` bytes.
    fn length(&mut self, n: usize) -> Step<usize> {
        let mut wide = [0u8; 8];
        let raw = self.take(n)?;
        for (to, from) in wide.iter_mut().zip(raw) {
            *to = *from;
        }
        usize::try_from(u64::from_le_bytes(wide)).map_err(|_| "a length out of range".into())
    }

    /// The bytes up to the next line feed.
    fn line(&mut self) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let window = &rest[..rest.len().min(MAX_LINE)];
        match window.iter().position(|&byte| byte == b'\n') {
            Some(end) => {
                self.at += end + 1;
                Ok(&window[..end])
            }
            None if rest.len() > MAX_LINE => Err(format!("a line longer than {MAX_LINE} bytes")),
            None => Err("the pickle is cut short inside a line".into()),
        }
    }
}

fn pairs(items: Vec<Id>) -> Step<Vec<(Id, Id)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("a dict key without a value".into());
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

fn integer<'a>(value: i128) -> Value<'a> {
    i64::try_from(value).map_or_else(|_| Value::Wide(Box::new(value)), Value::Int)
}

/// A decimal integer; one too long for 128 bits is data that nobody asks for.
fn decimal<'a>(digits: &[u8]) -> Step<Value<'a>> {
    let text = std::str::from_utf8(digits).map(str::trim).unwrap_or_default();
    let plain = text.strip_prefix(['-', '+']).unwrap_or(text);
    if plain.is_empty() || !plain.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a malformed integer".into());
    }
    Ok(text.parse().map_or(Value::Opaque, integer))
}

/// A little-endian two's-complement integer.
fn wide<'a>(raw: &[u8]) -> Value<'a> {
    if raw.len() > 16 {
        return Value::Opaque;
    }
    let negative = raw.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut bytes = [if negative { 0xff } else { 0 }; 16];
    for (to, from) in bytes.iter_mut().zip(raw) {
        *to = *from;
    }
    integer(i128::from_le_bytes(bytes))
}

/// A Python 2 string: text where it is UTF-8.
fn old_text(raw: &[u8]) -> Value<'_> {
    match std::str::from_utf8(raw) {
        Ok(text) => Value::Text(text.into()),
        Err(_) => Value::Bytes(raw.into()),
    }
}

/// The argument of STRING: a quoted Python literal.
fn quoted(line: &[u8]) -> Step<Value<'_>> {
    let line = line.trim_ascii();
    let inner = match line {
        [b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"'] => inner,
        _ => return Err("a string without quotes".into()),
    };
    if !inner.contains(&b'\\') {
        return Ok(old_text(inner));
    }
    let mut out = Vec::with_capacity(inner.len());
    let mut rest = inner;
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'\\' {
            out.push(*first);
            continue;
        }
        let [escape, tail @ ..] = rest else { return Err("a string ends in a backslash".into()) };
        rest = tail;
        match escape {
            b'n' => out.push(b'\n'),
            b'r' => out.push(b'\r'),
            b't' => out.push(b'\t'),
            b'\\' | b'\'' | b'"' => out.push(*escape),
            b'x' => {
                let (code, tail) = hex(rest, 2)?;
                out.push(code as u8);
                rest = tail;
            }
            _ => return Err("an unknown escape in a string".into()),
        }
    }
    Ok(match String::from_utf8(out) {
        Ok(text) => Value::Text(text.into()),
        Err(error) => Value::Bytes(error.into_bytes().into()),
    })
}

/// The argument of UNICODE: Latin-1 with \u and \U escapes.
fn raw_unicode(line: &[u8]) -> Step<Cow<'_, str>> {
    if line.is_ascii() && !line.contains(&b'\\') {
        return Ok(String::from_utf8_lossy(line));
    }
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let digits = match (first, rest.first()) {
            (b'\\', Some(b'u')) => 4,
            (b'\\', Some(b'U')) => 8,
            _ => {
                out.push(char::from(*first));
                continue;
            }
        };
        let (code, tail) = hex(&rest[1..], digits)?;
        out.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        rest = tail;
    }
    Ok(out.into())
}

fn hex(raw: &[u8], digits: usize) -> Step<(u32, &[u8])> {
    raw.split_at_checked(digits)
        .and_then(|(code, rest)| {
            let code = std::str::from_utf8(code).ok()?;
            Some((u32::from_str_radix(code, 16).ok()?, rest))
        })
        .ok_or_else(|| "a malformed escape in a string".into())
}
