//! Pyramid vector quantisation: vectors coded as a direction, which is one integer, and a length.
//!
//! `P(D, K)` is the set of integer vectors of dimension `D` whose magnitudes sum to `K` (the pulses);
//! `y / ‖y‖` are well spread directions, and they can be counted and numbered without a codebook
//! (Fischer 1986). A row of weights is split into groups of `D`; a group is stored as the index of
//! its direction and a code for its length, whose levels follow from the law that lengths have on
//! the sphere (van der Ouderaa et al. 2024, arXiv 2410.16926).
//!
//! - `lattice`: counts, and the tables that number the points; `index`: point to number and back;
//! - `search`: the point nearest in angle to a vector; `metric`: the same under a quadratic form;
//! - `beta`, `amplitude`: the law of the lengths and the quantisers made from it;
//! - `codec`: rows to bits and back; `matrix`: products straight from the packed rows.
//!
//! What weights go in, and in which order, is left to the methods.
//!
//! ```
//! use strata_tensor::pyramid::Lattice;
//! // There are 192 vectors of four integers whose magnitudes sum to 4.
//! let lattice = Lattice::new(4, 4)?;
//! assert_eq!((lattice.count(), lattice.index_bits()), (192, 8));
//! assert_eq!(lattice.encode(&[1i16, -2, 0, 1]), 98);
//! let mut y = [0i16; 4];
//! lattice.decode(98, &mut y)?;
//! assert_eq!(y, [1, -2, 0, 1]);
//! # Ok::<(), strata_tensor::Error>(())
//! ```

mod amplitude;
pub mod beta;
mod bits;
mod codec;
mod index;
mod lattice;
mod matrix;
mod metric;
mod search;
#[cfg(test)]
mod tests;

pub use amplitude::{AmplitudeMode, Amplitudes, MAX_AMPLITUDE_BITS};
pub use codec::{Code, Codec, Encoded, GroupPart, Tail};
pub use index::Pulse;
pub use lattice::{Lattice, MAX_DIMENSION, MAX_PULSES, count, largest_pulses, pulses_for_rate};
pub use matrix::PyramidWeights;
pub use metric::{Metric, amplitude_under, refine_under};
pub use search::{LANES, Search, refine, search_lanes, search_one};
