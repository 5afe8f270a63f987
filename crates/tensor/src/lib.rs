//! The engine: devices, fused operations with backward, low-bit kernels, linear algebra, seeded
//! random numbers.
//!
//! The rest of Strata sees burn only through this crate: [`Tensor`], [`Device`] and [`Gradients`]
//! are burn's own types, re-exported. A backend is a [`Device`] value, never a type parameter.
//! [`ops`] works on tensors and records backward steps; [`kernels`] is the same mathematics on
//! slices; [`host`] moves `Vec<f32>` in and out without copies.
//!
//! ```
//! use strata_tensor::{device, host, ops};
//! let cpu = device("cpu")?;
//! let x = host::from_vec(vec![3.0, 4.0], [1, 2], &cpu);
//! let gain = host::from_vec(vec![1.0, 1.0], [2], &cpu);
//! let y = host::into_vec(ops::rms_norm(x, gain, 0.0)); // x / sqrt(mean(x²)) = x / sqrt(12.5)
//! assert!((y[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
//! # Ok::<(), strata_tensor::Error>(())
//! ```
#![warn(missing_docs)]

pub mod bandwidth;
mod device;
pub mod error;
pub mod gram;
pub mod hadamard;
pub mod host;
pub mod kernels;
pub mod linalg;
pub mod lowbit;
pub mod memory;
pub mod ops;
pub mod pyramid;
pub mod rng;
pub mod rotation;
pub mod skinny;

pub use bandwidth::copy_bandwidth;
pub use burn::tensor::{Device, Gradients, Int, Tensor};
pub use device::device;
pub use error::{Error, Result};
pub use rng::Rng;
