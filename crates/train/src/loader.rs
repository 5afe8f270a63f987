//! Documents to batches of token windows, in an order that is a pure function of the seed.
//!
//! Plain text: documents in a new order every epoch, joined and cut into windows of `length + 1`
//! tokens that overlap by one, so that every token but the first is a target exactly once per
//! epoch. Dialogues: whole documents packed into windows, none cut, the rest padded and not
//! counted. Several sources are interleaved by weight. The only position is the number of windows
//! drawn; `skip` reaches it again after a restart.

use tensor::rng::Rng;

/// Target of tokens that do not count.
pub const IGNORE: u32 = tensor::ops::IGNORE;

/// Windows that packing keeps open at a time: more waste less and mix less.
const OPEN_WINDOWS: usize = 16;

/// Tokenised documents of one source.
#[derive(Clone, Debug, Default)]
pub struct Corpus {
    /// All tokens, document after document.
    pub tokens: Vec<u32>,
    /// Whether each token is a target; empty when all are.
    pub counted: Vec<bool>,
    /// Start of every document in `tokens`, and the end of the last.
    pub bounds: Vec<usize>,
    /// Documents are packed whole instead of joined and cut.
    pub whole: bool,
}

impl Corpus {
    /// An empty corpus of joined (`whole` false) or packed documents.
    pub fn new(whole: bool) -> Self {
        Self { bounds: vec![0], whole, ..Self::default() }
    }

    /// Appends a document; `counted` marks the targets, `None` counts all.
    pub fn push(&mut self, tokens: &[u32], counted: Option<&[bool]>) {
        if counted.is_some() && self.counted.is_empty() {
            self.counted.resize(self.tokens.len(), true);
        }
        self.tokens.extend_from_slice(tokens);
        match counted {
            Some(counted) => self.counted.extend_from_slice(counted),
            None if !self.counted.is_empty() => self.counted.resize(self.tokens.len(), true),
            None => {}
        }
        self.bounds.push(self.tokens.len());
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.bounds.len().saturating_sub(1)
    }

    fn document(&self, i: usize) -> std::ops::Range<usize> {
        self.bounds[i]..self.bounds[i + 1]
    }

    fn counts(&self, at: usize) -> bool {
        self.counted.is_empty() || self.counted[at]
    }

    /// The windows of one epoch: `(inputs, targets)` of `length` tokens each, flattened.
    fn epoch(&self, length: usize, rng: &mut Rng, pad: u32) -> Epoch {
        let mut order: Vec<usize> = (0..self.documents()).collect();
        rng.shuffle(&mut order);
        if self.whole {
            self.pack(&order, length, rng, pad)
        } else {
            self.join(&order, length, rng)
        }
    }

    fn join(&self, order: &[usize], length: usize, rng: &mut Rng) -> Epoch {
        let mut stream = Vec::with_capacity(self.tokens.len());
        let mut counted = Vec::with_capacity(self.counted.len());
        for &document in order {
            let range = self.document(document);
            stream.extend_from_slice(&self.tokens[range.clone()]);
            if !self.counted.is_empty() {
                counted.extend_from_slice(&self.counted[range]);
            }
        }
        let windows = stream.len().saturating_sub(1) / length;
        let mut starts: Vec<usize> = (0..windows).map(|w| w * length).collect();
        rng.shuffle(&mut starts);
        Epoch { stream, counted, starts }
    }

    fn pack(&self, order: &[usize], length: usize, rng: &mut Rng, pad: u32) -> Epoch {
        let size = length + 1;
        let mut closed: Vec<Vec<usize>> = Vec::new();
        let mut open: Vec<(usize, Vec<usize>)> = Vec::new();
        for &document in order {
            let need = self.document(document).len().min(size);
            match open.iter_mut().find(|(used, _)| used + need <= size) {
                Some((used, documents)) => {
                    *used += need;
                    documents.push(document);
                }
                None => {
                    if open.len() == OPEN_WINDOWS {
                        // The fullest goes; ties go to the oldest.
                        let mut fullest = 0;
                        for (i, (used, _)) in open.iter().enumerate() {
                            if *used > open[fullest].0 {
                                fullest = i;
                            }
                        }
                        closed.push(open.remove(fullest).1);
                    }
                    open.push((need, vec![document]));
                }
            }
        }
        closed.extend(open.into_iter().map(|(_, documents)| documents));
        let mut stream = vec![pad; closed.len() * size];
        let mut counted = vec![false; closed.len() * size];
        for (w, documents) in closed.iter().enumerate() {
            let mut at = w * size;
            for &document in documents {
                for from in self.document(document).take(size) {
                    stream[at] = self.tokens[from];
                    counted[at] = self.counts(from);
                    at += 1;
                }
            }
        }
        let mut starts: Vec<usize> = (0..closed.len()).map(|w| w * size).collect();
        rng.shuffle(&mut starts);
        Epoch { stream, counted, starts }
    }
}

/// One epoch of a source: a stream and where its windows start, in the order of use.
struct Epoch {
    stream: Vec<u32>,
    counted: Vec<bool>,
    starts: Vec<usize>,
}

/// Windows of equal length.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenBatch {
    /// Number of windows.
    pub rows: usize,
    /// Tokens per window.
    pub length: usize,
    /// Inputs, `[rows * length]`.
    pub tokens: Vec<u32>,
    /// The token after each input, or [`IGNORE`].
    pub targets: Vec<u32>,
}

impl TokenBatch {
    /// Number of targets that count.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE).count()
    }
}

struct Cursor {
    corpus: Corpus,
    share: f64,
    drawn: u64,
    epoch: u64,
    at: usize,
    windows: Epoch,
}

/// Draws windows from weighted sources.
pub struct Loader {
    cursors: Vec<Cursor>,
    length: usize,
    pad: u32,
    seed: u64,
    epoch_windows: usize,
}

impl Loader {
    /// Windows of `length` tokens from corpora with weights (`None`: in proportion to their
    /// windows). Sources that are too small for one window are refused by index.
    pub fn new(
        sources: Vec<(Corpus, Option<f64>)>,
        length: usize,
        pad: u32,
        seed: u64,
    ) -> Result<Self, usize> {
        let mut cursors = Vec::new();
        let mut epoch_windows = 0;
        for (i, (corpus, weight)) in sources.into_iter().enumerate() {
            let windows = corpus.epoch(length, &mut order(seed, i, 0), pad);
            if windows.starts.is_empty() {
                return Err(i);
            }
            epoch_windows += windows.starts.len();
            let share = weight.unwrap_or(windows.starts.len() as f64);
            cursors.push(Cursor { corpus, share, drawn: 0, epoch: 0, at: 0, windows });
        }
        let sum: f64 = cursors.iter().map(|c| c.share).sum();
        cursors.iter_mut().for_each(|c| c.share /= sum);
        Ok(Self { cursors, length, pad, seed, epoch_windows })
    }

    /// Windows in one pass over all sources.
    pub fn epoch_windows(&self) -> usize {
        self.epoch_windows
    }

    /// Tokens in all sources.
    pub fn tokens(&self) -> usize {
        self.cursors.iter().map(|c| c.corpus.tokens.len()).sum()
    }

    /// The next `rows` windows.
    pub fn batch(&mut self, rows: usize) -> TokenBatch {
        let length = self.length;
        let mut tokens = Vec::with_capacity(rows * length);
        let mut targets = Vec::with_capacity(rows * length);
        for _ in 0..rows {
            let Some(source) = self.advance() else { break };
            let cursor = &self.cursors[source];
            let epoch = &cursor.windows;
            let start = epoch.starts[cursor.at - 1];
            tokens.extend_from_slice(&epoch.stream[start..start + length]);
            for at in start + 1..=start + length {
                let counts = epoch.counted.is_empty() || epoch.counted[at];
                targets.push(if counts { epoch.stream[at] } else { IGNORE });
            }
        }
        TokenBatch { rows: tokens.len() / length.max(1), length, tokens, targets }
    }

    /// Passes over `rows` windows.
    pub fn skip(&mut self, rows: u64) {
        for _ in 0..rows {
            self.advance();
        }
    }

    /// Moves the source that is furthest behind its share by one window and names it.
    fn advance(&mut self) -> Option<usize> {
        let drawn: u64 = self.cursors.iter().map(|c| c.drawn).sum();
        let mut best: Option<(usize, f64)> = None;
        for (i, cursor) in self.cursors.iter().enumerate() {
            let behind = cursor.share * (drawn + 1) as f64 - cursor.drawn as f64;
            if best.is_none_or(|(_, b)| behind > b) {
                best = Some((i, behind));
            }
        }
        let (source, _) = best?;
        let cursor = &mut self.cursors[source];
        if cursor.at == cursor.windows.starts.len() {
            cursor.epoch += 1;
            cursor.at = 0;
            let mut rng = order(self.seed, source, cursor.epoch);
            cursor.windows = cursor.corpus.epoch(self.length, &mut rng, self.pad);
        }
        cursor.at += 1;
        cursor.drawn += 1;
        Some(source)
    }
}

/// The random order of one source in one epoch.
fn order(seed: u64, source: usize, epoch: u64) -> Rng {
    Rng::stream(seed, &format!("train/order/{source}/{epoch}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(documents: &[&[u32]]) -> Corpus {
        let mut corpus = Corpus::new(false);
        documents.iter().for_each(|d| corpus.push(d, None));
        corpus
    }

    #[test]
    fn targets_are_the_next_tokens_and_every_token_is_one() {
        let tokens: Vec<u32> = (0..21).collect();
        let mut loader = Loader::new(vec![(plain(&[&tokens]), None)], 5, 0, 7).unwrap();
        assert_eq!(loader.epoch_windows(), 4);
        for _ in 0..3 {
            let batch = loader.batch(4);
            assert!(batch.tokens.iter().zip(&batch.targets).all(|(a, b)| a + 1 == *b));
            let mut targets = batch.targets.clone();
            targets.sort();
            assert_eq!(targets, (1..21).collect::<Vec<u32>>());
        }
    }

    #[test]
    fn epochs_differ_and_seeds_differ_but_repeat() {
        let tokens: Vec<u32> = (0..1001).collect();
        let make = |seed| Loader::new(vec![(plain(&[&tokens]), None)], 10, 0, seed).unwrap();
        let (mut a, mut b, mut c) = (make(1), make(1), make(2));
        let first = a.batch(100);
        assert_eq!(first, b.batch(100));
        assert_ne!(first, c.batch(100));
        assert_ne!(first, a.batch(100));
    }

    #[test]
    fn skipping_is_drawing() {
        let tokens: Vec<u32> = (0..301).collect();
        let make = || {
            let sources =
                vec![(plain(&[&tokens]), Some(2.0)), (plain(&[&tokens[..150]]), Some(1.0))];
            Loader::new(sources, 10, 0, 3).unwrap()
        };
        let (mut a, mut b) = (make(), make());
        a.batch(77);
        b.skip(77);
        assert_eq!(a.batch(50), b.batch(50));
    }

    #[test]
    fn weights_are_shares() {
        let sources = vec![(plain(&[&[1; 100]]), Some(3.0)), (plain(&[&[2; 1000]]), Some(1.0))];
        let mut loader = Loader::new(sources, 9, 0, 0).unwrap();
        let batch = loader.batch(40);
        assert_eq!(batch.tokens.iter().filter(|t| **t == 1).count(), 30 * 9);
    }

    #[test]
    fn packing_keeps_dialogues_whole_and_masks() {
        let mut corpus = Corpus::new(true);
        for i in 0..20u32 {
            let id = 100 + i;
            corpus.push(&[id, id, id], Some(&[false, true, true]));
        }
        let mut loader = Loader::new(vec![(corpus, None)], 7, 9, 0).unwrap();
        // Windows of 8 tokens hold two dialogues and two paddings.
        assert_eq!(loader.epoch_windows(), 10);
        let batch = loader.batch(10);
        assert_eq!(batch.counted(), 40);
        for row in 0..10 {
            let tokens = &batch.tokens[row * 7..][..7];
            let targets = &batch.targets[row * 7..][..7];
            assert_eq!(tokens[6], 9);
            assert_eq!(targets[0], tokens[0]);
            assert_eq!(targets[2], IGNORE, "the question of the second dialogue");
            assert_eq!(targets[3], tokens[3]);
            assert_eq!(&targets[5..], [IGNORE; 2]);
        }
    }

    #[test]
    fn long_dialogues_are_cut_and_small_sources_refused() {
        let mut corpus = Corpus::new(true);
        corpus.push(&[1; 50], Some(&[true; 50]));
        let mut loader = Loader::new(vec![(corpus, None)], 7, 0, 0).unwrap();
        assert_eq!(loader.batch(1).targets, [1; 7]);
        let bad = Loader::new(vec![(plain(&[&[1; 8]]), None), (plain(&[&[1; 7]]), None)], 7, 0, 0);
        assert_eq!(bad.err(), Some(1));
    }
}
