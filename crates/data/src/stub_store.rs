#[path = "../../store/src/gguf/metadata.rs"]
mod metadata;
pub mod gguf { pub use super::metadata::*; }
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct Error;
pub struct Checkpoint;
impl Checkpoint {
 pub fn gguf_metadata(&self) -> Option<&gguf::Metadata> { None }
 pub fn directory(&self) -> &std::path::Path { std::path::Path::new("") }
 pub fn path(&self) -> &std::path::Path { std::path::Path::new("") }
}
