//! Taps: who sees, and may replace, the activations at the sites of `site`.

use std::collections::BTreeMap;

use tensor::Tensor;

use crate::{Error, Point, Result, Site};

/// Geometry of the rows of an activation: `sequences` sequences of `length` rows each, row
/// `s * length + t` belonging to sequence `s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of sequences.
    pub sequences: usize,
    /// Rows (tokens) per sequence.
    pub length: usize,
}

impl Batch {
    /// A batch of `sequences` sequences of `length` tokens.
    pub fn new(sequences: usize, length: usize) -> Self {
        Batch { sequences, length }
    }

    /// The geometry of `tokens` tokens that form `sequences` sequences of equal length.
    ///
    /// # Errors
    /// When the tokens do not divide into that many sequences.
    pub fn of(tokens: usize, sequences: usize) -> Result<Self> {
        if sequences == 0 || tokens == 0 || !tokens.is_multiple_of(sequences) {
            return Err(Error::Input(format!(
                "{tokens} tokens do not form {sequences} sequences of equal, nonzero length"
            )));
        }
        Ok(Batch { sequences, length: tokens / sequences })
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.sequences.saturating_mul(self.length)
    }
}

/// Sees, and may replace, every activation at the sites it asks for.
pub trait Tap {
    /// Whether this tap wants to see `site`.
    fn wants(&self, site: Site) -> bool;
    /// Called with the activation (`[rows, features]`) at a wanted site; what it returns flows on
    /// and must have the same shape.
    ///
    /// # Errors
    /// Whatever stops the forward pass; see [`Error::external`].
    fn at(&mut self, site: Site, batch: &Batch, x: Tensor<2>) -> Result<Tensor<2>>;
}

/// The taps of one forward pass, called in order. An empty list costs nothing.
pub struct Taps<'a>(pub Vec<&'a mut dyn Tap>);

impl<'a> Taps<'a> {
    /// No taps.
    pub fn none() -> Self {
        Taps(Vec::new())
    }

    /// A single tap.
    pub fn one(tap: &'a mut dyn Tap) -> Self {
        Taps(vec![tap])
    }

    /// Whether some tap wants `site`.
    pub fn wants(&self, site: Site) -> bool {
        self.0.iter().any(|tap| tap.wants(site))
    }

    /// Passes `x` through every tap that wants `site`.
    ///
    /// # Errors
    /// A tap's own error, or a replacement of another shape.
    pub fn at(&mut self, site: Site, batch: &Batch, mut x: Tensor<2>) -> Result<Tensor<2>> {
        for tap in &mut self.0 {
            if tap.wants(site) {
                let expected = x.dims();
                x = tap.at(site, batch, x)?;
                if x.dims() != expected {
                    return Err(Error::Shape {
                        name: site.to_string(),
                        found: x.dims().to_vec(),
                        expected: expected.to_vec(),
                    });
                }
            }
        }
        Ok(x)
    }
}

/// Keeps the last activation of every site it was asked for.
#[derive(Default)]
pub struct Record {
    sites: Vec<Site>,
    /// What was seen, by site.
    pub seen: BTreeMap<Site, Tensor<2>>,
}

impl Record {
    /// Records `sites`.
    pub fn new(sites: impl IntoIterator<Item = Site>) -> Self {
        Record { sites: sites.into_iter().collect(), seen: BTreeMap::new() }
    }

    /// Records `point` of every one of `blocks` blocks.
    pub fn every(point: Point, blocks: usize) -> Self {
        Record::new((0..blocks).map(|i| Site::block(i, point)))
    }
}

impl Tap for Record {
    fn wants(&self, site: Site) -> bool {
        self.sites.contains(&site)
    }

    fn at(&mut self, site: Site, _batch: &Batch, x: Tensor<2>) -> Result<Tensor<2>> {
        self.seen.insert(site, x.clone());
        Ok(x)
    }
}

/// Replaces the activation of one site by what a function makes of it.
pub struct Replace<F> {
    site: Site,
    replace: F,
}

impl<F: FnMut(&Batch, Tensor<2>) -> Result<Tensor<2>>> Replace<F> {
    /// Calls `replace` at `site`.
    pub fn new(site: Site, replace: F) -> Self {
        Replace { site, replace }
    }
}

impl<F: FnMut(&Batch, Tensor<2>) -> Result<Tensor<2>>> Tap for Replace<F> {
    fn wants(&self, site: Site) -> bool {
        site == self.site
    }

    fn at(&mut self, _site: Site, batch: &Batch, x: Tensor<2>) -> Result<Tensor<2>> {
        (self.replace)(batch, x)
    }
}
