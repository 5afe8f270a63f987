//! What the operations are told besides tensors: activation, attention geometry, rotation table.
use std::ops::Range;
use std::sync::Arc;

/// The target id that a loss leaves out of its mean.
pub const IGNORE: u32 = u32::MAX;

/// An elementwise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x * sigmoid(x)`, also called swish.
    Silu,
    /// `x * Φ(x)` with the Gaussian distribution function (through erf).
    Gelu,
    /// `x/2 * (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))` (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
}

/// The geometry of an attention: queries `[batch * queries, heads * head_dim]`, keys and values
/// `[batch * keys, kv_heads * head_dim]`. Head `h` reads key head `h / (heads / kv_heads)`.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Sequences.
    pub batch: usize,
    /// Query tokens of each sequence.
    pub queries: usize,
    /// Key tokens of each sequence (with a cache: more than `queries`).
    pub keys: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on the dot products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A query sees no key behind its own position.
    pub causal: bool,
    /// Position of query 0 in the key sequence (0 without a cache).
    pub offset: usize,
    /// A query at position `p` sees only keys at positions greater than `p - window`.
    pub window: Option<usize>,
    /// `softcap * tanh(score / softcap)` after scaling, before masking.
    pub softcap: Option<f32>,
}

impl AttentionSpec {
    /// The keys that query `query` (counted from 0) sees.
    pub fn visible(&self, query: usize) -> Range<usize> {
        let position = self.offset + query;
        let end = if self.causal { self.keys.min(position + 1) } else { self.keys };
        let start = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        start.min(end)..end
    }

    /// Checks the geometry against itself and the tensors' shapes.
    ///
    /// # Panics
    /// If the numbers do not fit together: that is a mistake in the calling code.
    pub(crate) fn check(&self, q: [usize; 2], k: [usize; 2], v: [usize; 2]) {
        assert!(
            self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention: {} heads are not a multiple of {} key heads",
            self.heads,
            self.kv_heads
        );
        assert!(self.head_dim > 0, "attention: head_dim is 0");
        assert!(self.window != Some(0), "attention: a window of 0 sees nothing");
        assert!(
            !self.causal || self.offset + self.queries <= self.keys,
            "attention: queries end at position {} but there are {} keys",
            self.offset + self.queries,
            self.keys
        );
        let queries = [self.batch * self.queries, self.heads * self.head_dim];
        let keys = [self.batch * self.keys, self.kv_heads * self.head_dim];
        assert_eq!(q, queries, "attention: shape of the queries against {self:?}");
        assert_eq!(k, keys, "attention: shape of the keys against {self:?}");
        assert_eq!(v, keys, "attention: shape of the values against {self:?}");
    }
}

/// Cosines and sines of rotary position embedding (Su et al. 2021), half-split as in Hugging Face
/// models: dimension `i` of a head is paired with dimension `i + rotary_dim / 2`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    rotary_dim: usize,
    length: usize,
}

/// The same table under the method's own name.
pub type Rope = RopeTable;

impl RopeTable {
    /// A table for positions `0..length` from `rotary_dim / 2` inverse frequencies (radians per
    /// position). `attention_scaling` multiplies cosines and sines (YaRN; otherwise 1).
    pub fn new(inverse_frequencies: &[f32], length: usize, attention_scaling: f32) -> Self {
        let count = length * inverse_frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for position in 0..length {
            for &frequency in inverse_frequencies {
                // The angle is rounded to f32 as the reference implementations do.
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32 * attention_scaling);
                sin.push(angle.sin() as f32 * attention_scaling);
            }
        }
        let rotary_dim = 2 * inverse_frequencies.len();
        Self { cos: cos.into(), sin: sin.into(), rotary_dim, length }
    }

    /// The plain table with `inverse_frequency[i] = base^(-2i / rotary_dim)`.
    pub fn from_base(base: f64, rotary_dim: usize, length: usize) -> Self {
        let frequencies: Vec<f32> = (0..rotary_dim / 2)
            .map(|i| base.powf(-2.0 * i as f64 / rotary_dim as f64) as f32)
            .collect();
        Self::new(&frequencies, length, 1.0)
    }

    /// Cosines `[length, rotary_dim / 2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines `[length, rotary_dim / 2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// How many leading dimensions of every head are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Positions covered.
    pub fn length(&self) -> usize {
        self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_keys() {
        let spec = AttentionSpec {
            batch: 1,
            queries: 3,
            keys: 8,
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            scale: 1.0,
            causal: true,
            offset: 5,
            window: None,
            softcap: None,
        };
        assert_eq!((spec.visible(0), spec.visible(2)), (0..6, 0..8));
        // A window of 3 is the query's own position and the two before it.
        let window = AttentionSpec { window: Some(3), ..spec.clone() };
        assert_eq!((window.visible(0), window.visible(2)), (3..6, 5..8));
        let both_sides = AttentionSpec { causal: false, window: Some(3), ..spec };
        assert_eq!(both_sides.visible(0), 3..8);
    }

    #[test]
    fn table_of_two_frequencies() {
        // base 100, rotary_dim 4: inverse frequencies 1 and 1/10.
        let table = RopeTable::from_base(100.0, 4, 3);
        assert_eq!((table.rotary_dim(), table.length()), (4, 3));
        for (got, wanted) in table.cos()[4..].iter().zip([2f32.cos(), 0.2f32.cos()]) {
            assert!((got - wanted).abs() < 1e-6);
        }
        for (got, wanted) in table.sin()[2..4].iter().zip([1f32.sin(), 0.1f32.sin()]) {
            assert!((got - wanted).abs() < 1e-6);
        }
    }
}
