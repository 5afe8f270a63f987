//! The mathematics of [`crate::ops`] on slices: SIMD picked at run time, parallel with rayon.
//!
//! Nothing here knows tensors or gradients graphs. Sums run in a fixed order, so the same thread
//! count gives the same bytes.
pub(crate) mod activation;
mod adamw;
pub(crate) mod attention;
pub(crate) mod attention_backward;
pub(crate) mod batch_norm;
pub(crate) mod conv;
pub(crate) mod loss;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod simd;
pub(crate) mod vector;

pub use crate::gram::gram_add;
pub use crate::skinny::{linear_bf16, linear_f16, linear_f32};
pub use adamw::{AdamwStep, adamw};
pub use matmul::{Matrix, Output, matmul, matmul_serial};
