//! Operations of language and image models on tensors, with backward.
//!
//! On the CPU each is one fused kernel with one backward step that computes gradients of tracked
//! operands only; operands may live on a plain or an `.autodiff()` device, mixed too. Elsewhere
//! [`composed`] does. Rows are tokens: `[tokens, features]`, heads side by side in a row;
//! of images they are pixels, `[images * height * width, channels]`.
//!
//! Shapes that do not fit are mistakes of the calling code and panic with both shapes; data read
//! from files must be checked before.
mod activation;
mod attention;
pub mod composed;
mod conv;
mod embedding;
mod linear;
mod loss;
mod norm;
mod record;
mod rope;
mod spec;

pub use activation::{activate, gelu_glu, swiglu};
pub use attention::{
    AttentionParts, attention, attention_mix, attention_parts, attention_pattern,
    attention_received, attention_scores,
};
pub use conv::{
    BatchNorm, Conv2d, Moments, Seen, batch_norm, conv2d, conv2d_norm, mean_pool, subsample,
};
pub use embedding::embedding;
pub use linear::linear;
pub use loss::{cross_entropy, linear_cross_entropy};
pub use norm::{layer_norm, rms_norm};
pub use rope::rope;
pub use spec::{Activation, AttentionSpec, IGNORE, Rope, RopeTable};
