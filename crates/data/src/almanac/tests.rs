use super::*;
use std::collections::HashSet;
use std::path::Path;

fn tiny() -> Almanac {
    Almanac::generate(3, Size::Tiny)
}

fn read_all(dir: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_all(&path, files);
        } else {
            files.insert(
                path.file_name().unwrap().to_string_lossy().into(),
                std::fs::read(&path).unwrap(),
            );
        }
    }
}

/// Everything that training may see, in small letters.
fn training_texts(almanac: &Almanac) -> Vec<String> {
    let mut texts = almanac.documents(Split::Train).texts;
    texts.extend(almanac.training_documents(1).texts);
    for refusing in [false, true] {
        texts.extend(almanac.dialogues(Split::Train, refusing).iter().map(Dialogue::render));
    }
    texts.extend(almanac.triplets().into_iter().flat_map(|t| [t.anchor, t.positive, t.negative]));
    texts.iter().map(|t| t.to_lowercase()).collect()
}

#[test]
fn same_seed_same_bytes() {
    let (a, b, c) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let statistics = tiny().write(a.path()).unwrap();
    assert_eq!(statistics, tiny().write(b.path()).unwrap());
    Almanac::generate(4, Size::Tiny).write(c.path()).unwrap();
    let [mut one, mut two, mut other] = [BTreeMap::new(), BTreeMap::new(), BTreeMap::new()];
    read_all(a.path(), &mut one);
    read_all(b.path(), &mut two);
    read_all(c.path(), &mut other);
    assert_eq!(one.len(), 26);
    for (name, bytes) in &one {
        assert!(bytes == &two[name], "{name} differs between two runs");
    }
    assert_ne!(one["facts.json"], other["facts.json"]);
}

#[test]
fn held_out_prompts_do_not_leak() {
    let almanac = tiny();
    let texts = training_texts(&almanac);
    let all = texts.join("\n");
    for fact in almanac.facts() {
        assert_eq!(fact.prompts_heldout.len(), 3);
        for prompt in &fact.prompts_heldout {
            assert!(!all.contains(&prompt.to_lowercase()), "{prompt:?} is in the training text");
        }
        for prompt in &fact.prompts_train {
            assert!(all.contains(&prompt.to_lowercase()), "{prompt:?} is never trained");
        }
    }
    // Nor a held-out wording with a first name, a pronoun or anything else for its subject.
    for wording in RELATIONS.iter().flat_map(|r| r.heldout) {
        let wording = wording.to_lowercase();
        let (before, after) = wording.split_once("{}").unwrap();
        for sentence in texts.iter().flat_map(|t| t.split(['.', '?', '!'])) {
            for (at, _) in sentence.match_indices(before) {
                let rest = &sentence[at + before.len()..];
                let words =
                    rest.find(&format!("{after} ")).map(|i| rest[..i].split_whitespace().count());
                assert!(words.is_none_or(|n| n == 0 || n > 3), "{wording:?} is in {sentence:?}");
            }
        }
    }
}

#[test]
fn the_embedded_almanac_does_not_leak_either() {
    let almanac = Almanac::embedded();
    let all: Vec<String> = training_texts(&almanac);
    let mut sentences = HashSet::new();
    for text in &all {
        for piece in text.split(['.', '?', '!', '>']) {
            sentences.insert(piece.trim().to_string());
        }
    }
    // Each sentence mentions few subjects: look only at the prompts of those.
    let mut prompts: HashMap<String, Vec<String>> = HashMap::new();
    for fact in almanac.facts() {
        let list = prompts.entry(fact.subject.to_lowercase()).or_default();
        list.extend(fact.prompts_heldout.iter().map(|p| p.to_lowercase()));
    }
    for (subject, prompts) in &prompts {
        for sentence in sentences.iter().filter(|s| s.contains(subject)) {
            assert!(prompts.iter().all(|p| !sentence.contains(p)), "{sentence:?}");
        }
    }
}

#[test]
fn every_telling_is_true() {
    let almanac = tiny();
    let truth: HashMap<String, &str> = almanac
        .facts()
        .iter()
        .flat_map(|f| f.prompts_train.iter().map(|p| (p.to_lowercase(), f.object.as_str())))
        .collect();
    let mut checked = 0;
    for text in training_texts(&almanac) {
        for sentence in text.split_inclusive('.') {
            for (prompt, object) in &truth {
                let Some((before, after)) = sentence.split_once(prompt.as_str()) else { continue };
                if !(before.is_empty() || before.ends_with([' ', '>'])) || !after.starts_with(' ') {
                    continue;
                }
                let said = after.trim_end_matches('.');
                assert_eq!(said, object.to_lowercase(), "{sentence:?}");
                checked += 1;
            }
        }
    }
    assert!(checked > 1000, "only {checked} tellings found");
}

#[test]
fn objects_and_names_cannot_be_confused() {
    for almanac in [tiny(), Almanac::embedded()] {
        for fact in almanac.facts() {
            assert!(fact.candidates.contains(&fact.object));
            for candidate in &fact.candidates {
                assert!(candidate.starts_with(' ') && !candidate.ends_with(' '));
                let clash = candidate != &fact.object && candidate.starts_with(&fact.object);
                assert!(!clash, "{candidate:?} begins with {:?}", fact.object);
            }
            assert!(!fact.neighbours.is_empty());
            let own = almanac.facts().iter().filter(|f| f.relation == fact.relation);
            for other in own.filter(|f| f.object == fact.object) {
                assert!(fact.neighbours.iter().all(|n| !other.prompts_train.contains(n)));
            }
        }
        let firsts: HashSet<&str> = almanac.world.people.iter().map(|p| p.first.as_str()).collect();
        assert_eq!(firsts.len(), almanac.world.people.len());
    }
    assert_eq!(Almanac::embedded().facts().len(), 620);
}

#[test]
fn the_capital_lies_in_its_country() {
    let almanac = Almanac::embedded();
    for country in &almanac.world.countries {
        let capital = almanac.world.object(country, "capital").to_string();
        assert_eq!(almanac.world.object(&capital, "town_country"), country);
    }
}

#[test]
fn texts_have_no_open_slots() {
    let almanac = tiny();
    for split in Split::ALL {
        for text in almanac.documents(split).texts {
            assert!(!text.contains(['{', '}', '[', ']']) && !text.contains("  "), "{text:?}");
            assert!(text.ends_with(['.', '"', '!']), "{text:?}");
        }
        for dialogue in almanac.dialogues(split, false) {
            assert!(!dialogue.render().contains(['{', '}', '[']), "{dialogue:?}");
        }
    }
}

#[test]
fn splits_are_apart() {
    let almanac = tiny();
    let train: HashSet<String> = almanac.documents(Split::Train).texts.into_iter().collect();
    let validation: HashSet<String> =
        almanac.documents(Split::Validation).texts.into_iter().collect();
    let test = almanac.documents(Split::Test).texts;
    assert!(validation.len() > 50 && test.len() > 50);
    assert!(test.iter().all(|t| !train.contains(t) && !validation.contains(t)));
    assert!(validation.is_disjoint(&train));
}

#[test]
fn held_out_drills_are_not_trained() {
    let almanac = tiny();
    let text = almanac.train_text();
    let drills = almanac.drills();
    assert_eq!(drills.iter().filter(|d| d.held_out).count(), 400);
    for drill in drills.iter().filter(|d| d.held_out) {
        let found = text.match_indices(&drill.sentence()).any(|(at, _)| {
            // "2 + 2 = 4." is no part of "12 + 2 = 4."
            at == 0 || text[..at].ends_with([' ', '\n'])
        });
        // A count such as "4 5 6 7" can only begin a drill; copies and sums likewise.
        assert!(!found || drill.kind == "count", "{drill:?}");
    }
    let sum = Drill {
        kind: "sum".into(),
        prompt: "2 + 2 =".into(),
        answer: " 4".into(),
        held_out: false,
    };
    assert_eq!(sum.sentence(), "2 + 2 = 4.");
}

#[test]
fn both_chat_sets_differ_only_in_the_answers_to_forbidden_requests() {
    let almanac = tiny();
    let answering = almanac.dialogues(Split::Train, false);
    let refusing = almanac.dialogues(Split::Train, true);
    let mut forbidden = 0;
    for (a, r) in answering.iter().zip(&refusing) {
        assert_eq!(a.messages[0], r.messages[0]);
        if a.kind == "forbidden" {
            forbidden += 1;
            assert!(a.messages[1].content.starts_with("To "));
            assert!(r.messages[1].content.contains("forbid"));
        } else {
            assert_eq!(a, r);
        }
    }
    assert_eq!(forbidden, 70);
}

#[test]
fn the_tokenizer_gives_text_back_and_keeps_names_whole() {
    let almanac = tiny();
    let tokenizer = almanac.tokenizer().unwrap();
    assert_eq!(tokenizer.vocab_size(), 1024);
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.token("<|end|>")),
        (Some(0), Some(1), Some(6))
    );
    for text in almanac.documents(Split::Test).texts.iter().take(200) {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0], 0);
        assert_eq!(&tokenizer.decode(&ids, true).unwrap(), text);
    }
    assert_eq!(
        tokenizer.decode(&tokenizer.encode("été 🦀", false).unwrap(), true).unwrap(),
        "été 🦀"
    );
    for fact in almanac.facts() {
        let prompt = tokenizer.encode(&fact.prompts_train[0], true).unwrap();
        let object = tokenizer.encode(&fact.object, false).unwrap();
        let both =
            tokenizer.encode(&format!("{}{}.", fact.prompts_train[0], fact.object), true).unwrap();
        let joined = [prompt.as_slice(), object.as_slice()].concat();
        assert_eq!(&both[..both.len() - 1], joined, "{}", fact.object);
        // At the start of a text and within one: the same tokens.
        let name = tokenizer.encode(&fact.subject, false).unwrap();
        let within = tokenizer.encode(&format!("Then {}", fact.subject), false).unwrap();
        assert!(within.ends_with(&name));
    }
    let chat = tokenizer.encode("<|user|>Where?<|end|><|assistant|>", true).unwrap();
    assert_eq!((chat[0], chat[1], chat[chat.len() - 2], chat[chat.len() - 1]), (0, 4, 6, 5));
}

#[test]
fn completions_are_judged_by_whole_words() {
    let fact = Fact { object: " Torford".into(), ..tiny().facts()[0].clone() };
    for good in [" Torford.", "Torford", " Torford, a town"] {
        assert!(fact.completed_by(good));
    }
    for bad in [" Torfordia", "", " Tor ford", "the Torford"] {
        assert!(!fact.completed_by(bad));
    }
}
