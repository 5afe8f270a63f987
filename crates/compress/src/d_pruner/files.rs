//! The importance of every weight on disk: one safetensors file per block, in a directory whose
//! name is made from what it was computed from.
//!
//! `general-<digest>` holds `<module>.general_importance`, `scores-<digest>` `<module>.importance`,
//! both `[out, in]` in single precision. Directories of other inputs stand beside each other, so
//! nothing is ever taken for what it is not; `record.json` in each says what it is.

use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use store::{Checkpoint, Dtype};

/// Which importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// G, from open-domain text.
    General,
    /// S, the final score.
    Scores,
}

impl Kind {
    /// What a tensor of this kind is called after its module.
    pub fn leaf(self) -> &'static str {
        match self {
            Self::General => "general_importance",
            Self::Scores => "importance",
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::General => "general",
            Self::Scores => "scores",
        }
    }
}

/// A directory of importance files.
#[derive(Debug, Clone)]
pub struct Files {
    kind: Kind,
    directory: PathBuf,
    blocks: usize,
}

impl Files {
    /// The directory for `identity` inside `root`; created, with its record, if it is not there.
    pub fn at(root: &Path, kind: Kind, identity: &Value, blocks: usize) -> Result<Self> {
        let digest = store::sha256_bytes(identity.to_string().as_bytes());
        let name = format!("{}-{}", kind.prefix(), digest.get(..12).unwrap_or_default());
        let files = Self { kind, directory: root.join(name), blocks };
        std::fs::create_dir_all(&files.directory)
            .map_err(|source| Error::Io { path: files.directory.display().to_string(), source })?;
        let record = serde_json::to_vec_pretty(identity).unwrap_or_default();
        store::write_atomic(&files.directory.join("record.json"), &record)?;
        Ok(files)
    }

    /// The directory itself.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file of a block.
    pub fn path(&self, block: usize) -> PathBuf {
        self.directory.join(format!("block-{block:05}.safetensors"))
    }

    /// Blocks that are there, from the first on without a gap.
    pub fn done(&self) -> usize {
        (0..self.blocks).take_while(|&block| self.path(block).is_file()).count()
    }

    /// Whether all blocks are there.
    pub fn complete(&self) -> bool {
        self.done() == self.blocks
    }

    /// Writes the file of a block: module, `[out, in]`, values.
    pub fn write(&self, block: usize, tensors: &[(&str, [usize; 2], &[f32])]) -> Result<()> {
        let path = self.path(block);
        let named: Vec<(String, Dtype, Vec<usize>, &[u8])> = tensors
            .iter()
            .map(|(module, shape, values)| {
                let name = format!("{module}.{}", self.kind.leaf());
                (name, Dtype::F32, shape.to_vec(), bytemuck::cast_slice(values))
            })
            .collect();
        let bytes = store::safetensors::file_bytes(&path, &named)?;
        Ok(store::write_atomic(&path, &bytes)?)
    }

    /// Opens the file of a block; its values are read from disk when they are asked for.
    pub fn open(&self, block: usize) -> Result<BlockImportance> {
        Ok(BlockImportance { kind: self.kind, file: Checkpoint::open(&self.path(block))? })
    }
}

/// The importance of one block's layers, mapped from disk.
#[derive(Debug)]
pub struct BlockImportance {
    kind: Kind,
    file: Checkpoint,
}

impl BlockImportance {
    /// Shows the importance of `module` (`[out, in]`) and lets its pages go.
    pub fn read<R>(&self, module: &str, count: usize, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let name = format!("{module}.{}", self.kind.leaf());
        let found = match self.file.half_view(&name)? {
            store::WeightView::F32(values) if values.len() == count => f(values),
            store::WeightView::Owned(values) if values.len() == count => f(&values),
            _ => {
                return Err(Error::layer(
                    module,
                    format!(
                        "{} does not hold {count} values of its importance; remove the directory \
                         and score again",
                        self.file.path().display()
                    ),
                ));
            }
        };
        self.file.release(&name);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_values_come_back_and_other_inputs_lie_elsewhere() {
        let root = std::env::temp_dir().join(format!("strata-importance-{}", std::process::id()));
        let at = |seed: i64| {
            Files::at(&root, Kind::General, &serde_json::json!({ "seed": seed }), 2).unwrap()
        };
        let (files, other) = (at(1), at(2));
        assert_ne!(files.directory(), other.directory());
        files.write(0, &[("a.q", [1, 2], &[1.0, 2.0]), ("a.k", [2, 1], &[3.0, 4.0])]).unwrap();
        assert_eq!((files.done(), other.done(), files.complete()), (1, 0, false));
        files.write(1, &[]).unwrap();
        assert!(files.complete() && at(1).complete());
        let block = files.open(0).unwrap();
        assert_eq!(block.read("a.k", 2, <[f32]>::to_vec).unwrap(), [3.0, 4.0]);
        let error = block.read("a.q", 3, |_| ()).unwrap_err().to_string();
        assert!(error.contains("a.q"), "{error}");
        let header = Checkpoint::open(&files.path(0)).unwrap();
        assert_eq!(header.info("a.q.general_importance").unwrap().shape, [1, 2]);
        std::fs::remove_dir_all(root).unwrap();
    }
}
