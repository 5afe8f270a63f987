//! Pronounceable names that cannot be taken for one another.

use std::collections::HashSet;
use tensor::rng::Rng;

const ONSETS: &[&str] = &[
    "b", "br", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pr", "r",
    "s", "st", "t", "tr", "v", "w", "z",
];
const VOWELS: &[&str] = &["a", "e", "i", "o", "u"];
const CODAS: &[&str] =
    &["l", "m", "n", "r", "s", "v", "d", "k", "t", "b", "g", "nd", "rk", "lm", "st"];

/// Endings by kind of name.
pub(super) const FEMALE: &[&str] = &["a", "ine", "eth", "ia"];
pub(super) const MALE: &[&str] = &["o", "an", "or", "ik"];
pub(super) const FAMILY: &[&str] = &["gren", "holt", "wald", "sen", "mark", "by"];
pub(super) const TOWN: &[&str] = &["ford", "mere", "wick", "dale", "port", "holm"];
pub(super) const COUNTRY: &[&str] = &["onia", "land", "aria", "istan"];
pub(super) const COMPANY: &[&str] = &["co", "tex", "works", "ex"];
pub(super) const RIVER: &[&str] = &["e", "ow", "ay", "u"];
pub(super) const COIN: &[&str] = &["el", "in", "ar", "ot"];
pub(super) const TONGUE: &[&str] = &["ish", "ese", "ic", "ali"];

/// Gives out names; keeps all of them apart: no two share their first three letters, whatever their
/// kind, and none is a common word of the texts.
#[derive(Debug, Default)]
pub(super) struct Namer {
    starts: HashSet<String>,
}

/// Starts of words that the texts use, kept free so that no name begins like a word.
const TAKEN: &[&str] = &[
    "the", "fam", "far", "fir", "for", "fro", "lan", "lar", "las", "mak", "man", "mar", "mer",
    "mon", "mor", "nam", "nat", "pet", "pos", "riv", "sal", "sel", "ser", "sev", "sha", "sho",
    "sta", "sto", "tab", "tak", "tal", "tas", "tow", "tra", "wal", "wat", "wel", "win", "wor",
    "bar", "ban", "bas", "bel", "bes", "bor", "bui", "dis", "dir", "dat", "det", "gar", "gat",
    "gov", "gra", "gre", "gro", "her", "his", "hol", "hom", "hon", "hor", "jus", "kin", "kno",
    "kit", "lak", "lem", "let", "liv", "lon", "los", "loo", "low", "mel", "min", "mis", "mus",
    "nev", "nor", "not", "num", "pla", "pre", "pro", "pri", "ran", "rat", "rec", "red", "rem",
    "rep", "res", "rul", "see", "set", "sid", "sig", "sil", "sin", "ste", "sti", "str", "ten",
    "ter", "tes", "tim", "tin", "tre", "vis", "vol", "was", "wit", "wil", "dra", "dri", "fla",
    "flo", "fre", "bra", "bre", "bri", "bro", "sad", "sed", "sex", "god", "hel", "dev", "dum",
    "die", "dea", "nud", "nig", "fag", "tit", "pis", "vag", "rap", "sod", "jew", "kil", "hat",
    "gun", "gas", "naz", "jap", "wog", "tur", "ind", "ira", "pol", "rom", "bul",
];

impl Namer {
    /// A new name with one of the endings; `upper` gives it a capital.
    pub(super) fn name(&mut self, rng: &mut Rng, endings: &[&str], upper: bool) -> String {
        let mut pick = |list: &[&str]| -> String {
            rng.choose(list).map(ToString::to_string).unwrap_or_default()
        };
        loop {
            let name = pick(ONSETS) + &pick(VOWELS) + &pick(CODAS) + &pick(endings);
            let start: String = name.chars().take(3).collect();
            let doubled = name.as_bytes().windows(2).any(|w| w.first() == w.last());
            if doubled || TAKEN.contains(&start.as_str()) || !self.starts.insert(start) {
                continue;
            }
            return if upper { capital(&name) } else { name };
        }
    }
}

/// The text with a capital first letter.
pub(super) fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// The text with a small first letter.
pub(super) fn small(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|c| c.to_lowercase().chain(chars).collect()).unwrap_or_default()
}
