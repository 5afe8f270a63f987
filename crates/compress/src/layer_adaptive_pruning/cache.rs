//! Curves on disk: what was measured is not measured again, and a measurement that was killed goes
//! on where it was.
//!
//! A file's name is the hash of everything the curves depend on (weights, masks, samples, grid), so
//! that a changed calibration set or a retrained model never meets stale curves. Numbers are kept as
//! their bits: sums that go on after a kill end with the same curves as those that were not.

use super::curves::Effect;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Pause between two saved states of a running measurement.
const EVERY: Duration = Duration::from_secs(3);

/// A directory of measured curves.
#[derive(Debug, Clone)]
pub struct CurveCache {
    directory: PathBuf,
    every: Duration,
}

/// What a file holds.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Saved {
    key: String,
    /// Segments measured, over all batches.
    done: usize,
    /// Per layer and measured point: bits of the sum over samples.
    sums: Vec<Vec<u64>>,
    /// The same for the largest sample.
    largest: Vec<Vec<u64>>,
}

/// One set of curves being measured.
pub(super) struct Session {
    path: PathBuf,
    key: String,
    done: usize,
    written: Instant,
    every: Duration,
}

impl CurveCache {
    /// A cache in `directory`, which is created when something is saved.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_path_buf(), every: EVERY }
    }

    /// The same cache, written after every segment.
    #[cfg(test)]
    pub(super) fn eager(self) -> Self {
        Self { every: Duration::ZERO, ..self }
    }

    /// Takes up the curves of `key`: fills `effects` with what was measured. A damaged file counts
    /// as none.
    pub(super) fn open(&self, key: &str, effects: &mut [Vec<Effect>]) -> Result<Session> {
        std::fs::create_dir_all(&self.directory)
            .map_err(|source| Error::Io { path: self.directory.display().to_string(), source })?;
        let short: String = key.chars().take(16).collect();
        let path = self.directory.join(format!("curves-{short}.json"));
        let done = read(&path).filter(|saved| saved.key == key).map_or(0, |saved| {
            let fits = |rows: &[Vec<u64>]| {
                rows.len() == effects.len()
                    && rows.iter().zip(effects.iter()).all(|(r, e)| r.len() == e.len())
            };
            if !fits(&saved.sums) || !fits(&saved.largest) {
                return 0;
            }
            let rows = saved.sums.iter().zip(&saved.largest);
            for (effects, (sums, largest)) in effects.iter_mut().zip(rows) {
                for (effect, (sum, largest)) in effects.iter_mut().zip(sums.iter().zip(largest)) {
                    *effect =
                        Effect { sum: f64::from_bits(*sum), largest: f64::from_bits(*largest) };
                }
            }
            saved.done
        });
        Ok(Session { path, key: key.to_string(), done, written: Instant::now(), every: self.every })
    }
}

fn read(path: &Path) -> Option<Saved> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

impl Session {
    /// Segments that need not be measured.
    pub(super) fn done(&self) -> usize {
        self.done
    }

    /// Saves the state after `done` segments, at most every few seconds unless it is the `last`.
    pub(super) fn save(&mut self, done: usize, effects: &[Vec<Effect>], last: bool) -> Result<()> {
        if done == self.done || (!last && self.written.elapsed() < self.every) {
            return Ok(());
        }
        let bits = |f: fn(&Effect) -> f64| -> Vec<Vec<u64>> {
            effects.iter().map(|row| row.iter().map(|e| f(e).to_bits()).collect()).collect()
        };
        let (sums, largest) = (bits(|e| e.sum), bits(|e| e.largest));
        let saved = Saved { key: self.key.clone(), done, sums, largest };
        let bytes = serde_json::to_vec(&saved)
            .map_err(|e| Error::Options(format!("curves cannot be written: {e}")))?;
        store::write_atomic(&self.path, &bytes)?;
        self.done = done;
        self.written = Instant::now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_takes_up_what_was_saved_under_its_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let cache = CurveCache::new(&dir.path().join("curves"));
        let fresh = || vec![vec![Effect::default(); 2], vec![Effect::default(); 1]];
        let mut effects = fresh();
        let mut session = cache.open("abc", &mut effects).unwrap();
        assert_eq!(session.done(), 0);
        effects[0][1] = Effect { sum: 0.1 + 0.2, largest: 1e-300 };
        session.save(3, &effects, false).unwrap();
        assert!(read(&session.path).is_none(), "too soon after the start");
        session.save(3, &effects, true).unwrap();
        let mut again = fresh();
        assert_eq!(cache.open("abc", &mut again).unwrap().done(), 3);
        assert_eq!(again, effects);
        let mut other = fresh();
        assert_eq!(cache.open("abd", &mut other).unwrap().done(), 0);
        assert_eq!(other, fresh());
        // Another shape, or a damaged file, is nothing to go on from.
        let mut short = vec![vec![Effect::default(); 2]];
        assert_eq!(cache.open("abc", &mut short).unwrap().done(), 0);
        std::fs::write(&session.path, b"{").unwrap();
        assert_eq!(cache.open("abc", &mut fresh()).unwrap().done(), 0);
    }
}
