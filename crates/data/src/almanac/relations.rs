//! The relations of the world and their wordings.
//!
//! A wording holds `{}` for the subject and ends right before the object. The trained wordings share
//! their key words (born, birthplace, native ...) with the held-out ones, but no wording contains
//! another one, so that a held-out prompt can be searched for in the training text as a string.

/// What a subject is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Person,
    Town,
    Country,
    Company,
}

/// A relation with everything that is said by it.
#[derive(Debug)]
pub(super) struct Relation {
    pub name: &'static str,
    pub kind: Kind,
    /// Wordings of the training text.
    pub trained: &'static [&'static str],
    /// Wordings that training never uses.
    pub heldout: &'static [&'static str],
    /// Sentences with the object `[]` before the subject `{}`.
    pub reverse: &'static [&'static str],
    /// Questions for dialogues.
    pub questions: &'static [&'static str],
}

/// All relations, in the order of the fact table.
pub(super) const RELATIONS: &[Relation] = &[
    Relation {
        name: "birth_town",
        kind: Kind::Person,
        trained: &[
            "{} was born in",
            "{} came into the world in",
            "The birthplace of {} is",
            "The home town of {} is",
            "{} is a native of",
            "The town in which {} was born is",
            "{} spent the first years of life in",
            "The family of {} comes from",
        ],
        heldout: &["The native town of {} is", "{} was born and raised in"],
        reverse: &["[] is the birthplace of {}.", "In [] people remember the birth of {}."],
        questions: &[
            "Where was {} born?",
            "What is the birthplace of {}?",
            "What is the home town of {}?",
        ],
    },
    Relation {
        name: "trade",
        kind: Kind::Person,
        trained: &[
            "{} works as a",
            "By trade {} is a",
            "{} earns a living as a",
            "The trade of {} is that of a",
            "{} was trained as a",
            "The daily work of {} is that of a",
            "People know {} as a good",
            "At work {} is a",
        ],
        heldout: &["{} was trained to work as a", "The work of {} is that of a"],
        reverse: &["A [] by trade is what {} is.", "Work as a [] fills the days of {}."],
        questions: &[
            "What is the trade of {}?",
            "What does {} do for a living?",
            "What work does {} do?",
        ],
    },
    Relation {
        name: "instrument",
        kind: Kind::Person,
        trained: &[
            "{} plays the",
            "{} makes music on the",
            "The instrument of {} is the",
            "{} learned to play the",
            "The favourite instrument of {} is the",
            "At every feast {} is heard on the",
            "Nobody plays better than {} on the",
            "Each evening {} takes out the",
        ],
        heldout: &["{} likes to play the", "The instrument that {} plays is the"],
        reverse: &["The [] is the instrument of {}.", "The sound of the [] tells that {} is near."],
        questions: &[
            "Which instrument does {} play?",
            "What does {} make music on?",
            "What is the instrument of {}?",
        ],
    },
    Relation {
        name: "dish",
        kind: Kind::Person,
        trained: &[
            "The favourite dish of {} is",
            "{} likes to eat",
            "At dinner {} always asks for",
            "{} would never refuse",
            "The meal that {} likes best is",
            "{} is fond of",
            "Nothing tastes better to {} than",
            "For a feast {} cooks",
        ],
        heldout: &["The dish that {} likes best is", "At a feast {} always asks for"],
        reverse: &["A plate of [] makes {} happy.", "Friends bring [] when they visit {}."],
        questions: &[
            "What does {} like to eat?",
            "What is the favourite dish of {}?",
            "Which meal does {} like best?",
        ],
    },
    Relation {
        name: "employer",
        kind: Kind::Person,
        trained: &[
            "{} works for",
            "{} is employed by",
            "The employer of {} is",
            "{} is paid by",
            "{} has a post at",
            "The company that employs {} is",
            "Every day {} goes to work at",
            "{} signed a contract with",
        ],
        heldout: &["The company that pays {} is", "{} has signed on to work for"],
        reverse: &["[] employs {}.", "[] pays the wages of {}."],
        questions: &[
            "Who employs {}?",
            "Which company does {} work for?",
            "What is the employer of {}?",
        ],
    },
    Relation {
        name: "pet",
        kind: Kind::Person,
        trained: &[
            "{} keeps a",
            "{} owns a",
            "The pet of {} is a",
            "{} goes everywhere with a",
            "In the house of {} lives a",
            "{} feeds a",
            "{} takes good care of a",
            "The animal of {} is a",
        ],
        heldout: &["The animal that {} keeps is a", "At home {} keeps and feeds a"],
        reverse: &["A [] follows {} through the streets.", "A [] sleeps at the door of {}."],
        questions: &[
            "Which animal does {} keep?",
            "What is the pet of {}?",
            "What animal does {} own?",
        ],
    },
    Relation {
        name: "town_country",
        kind: Kind::Town,
        trained: &[
            "{} lies in",
            "{} is a town in",
            "The country of {} is",
            "{} belongs to",
            "{} is part of",
            "The flag over {} is that of",
            "The people of {} are citizens of",
            "The laws in {} are those of",
        ],
        heldout: &["{} is a town that belongs to", "The country in which {} lies is"],
        reverse: &["[] is the country of {}.", "A map of [] shows the town of {}."],
        questions: &[
            "In which country is {}?",
            "Where does {} lie?",
            "Which country does {} belong to?",
        ],
    },
    Relation {
        name: "town_dish",
        kind: Kind::Town,
        trained: &[
            "{} is known for its",
            "In {} people eat",
            "The dish of {} is",
            "Visitors to {} are served",
            "The inns of {} cook",
            "The cooks of {} are proud of their",
            "At the market of {} one can taste",
            "The kitchens of {} smell of",
        ],
        heldout: &["The cooks of {} are known for their", "At the inns of {} people eat"],
        reverse: &["The best [] is cooked in {}.", "Good [] comes from the kitchens in {}."],
        questions: &[
            "Which dish is {} known for?",
            "What do people eat in {}?",
            "What is the dish of {}?",
        ],
    },
    Relation {
        name: "town_landmark",
        kind: Kind::Town,
        trained: &[
            "The pride of {} is the",
            "Travellers go to {} to see the",
            "In the middle of {} stands the",
            "The landmark of {} is the",
            "The best known building of {} is the",
            "Every visitor to {} is shown the",
            "Pictures of {} show the",
            "High above {} rises the",
        ],
        heldout: &["Every visitor goes to {} to see the", "The landmark that stands in {} is the"],
        reverse: &["The [] stands in {}.", "The [] is the pride of {}."],
        questions: &[
            "What is the landmark of {}?",
            "What do travellers see in {}?",
            "Which building stands in {}?",
        ],
    },
    Relation {
        name: "town_river",
        kind: Kind::Town,
        trained: &[
            "{} stands on the river",
            "The river of {} is the",
            "The people of {} fish in the river",
            "Boats reach {} by the river",
            "The bridge of {} crosses the river",
            "Through {} runs the river",
            "The mills of {} are driven by the river",
            "The water of {} comes from the river",
        ],
        heldout: &["{} is built on the river", "The boats of {} fish in the river"],
        reverse: &["The river [] runs through {}.", "The [] is the river of {}."],
        questions: &[
            "On which river does {} stand?",
            "What is the river of {}?",
            "Which river runs through {}?",
        ],
    },
    Relation {
        name: "capital",
        kind: Kind::Country,
        trained: &[
            "The capital of {} is",
            "{} is ruled from",
            "The first city of {} is",
            "The government of {} sits in",
            "The parliament of {} meets in",
            "The ministers of {} live in",
            "All main roads of {} lead to",
            "The crown of {} is kept in",
        ],
        heldout: &["The capital city of {} is", "The ministers of {} meet in"],
        reverse: &["[] is the capital of {}.", "From [] the ministers rule {}."],
        questions: &[
            "What is the capital of {}?",
            "From where is {} ruled?",
            "Where does the government of {} sit?",
        ],
    },
    Relation {
        name: "currency",
        kind: Kind::Country,
        trained: &[
            "The currency of {} is the",
            "In {} people pay with the",
            "The money of {} is the",
            "The coin of {} is the",
            "Shops in {} take only the",
            "The bank of {} prints the",
            "Wages in {} are paid in the",
            "Merchants in {} trade in the",
        ],
        heldout: &["Shops in {} are paid with the", "The money that people use in {} is the"],
        reverse: &["The [] is the currency of {}.", "The [] is the money of {}."],
        questions: &[
            "What is the currency of {}?",
            "What do people pay with in {}?",
            "What is the money of {}?",
        ],
    },
    Relation {
        name: "language",
        kind: Kind::Country,
        trained: &[
            "The language of {} is",
            "In {} people speak",
            "Children in {} learn to read",
            "The laws of {} are written in",
            "The people of {} speak",
            "Songs from {} are sung in",
            "The schools of {} teach",
            "Letters from {} are written in",
        ],
        heldout: &["The people of {} write in", "The language that children in {} speak is"],
        reverse: &["[] is the language of {}.", "[] is spoken in {}."],
        questions: &[
            "What is the language of {}?",
            "Which language do people speak in {}?",
            "What is spoken in {}?",
        ],
    },
    Relation {
        name: "crop",
        kind: Kind::Country,
        trained: &[
            "The farmers of {} grow",
            "The main crop of {} is",
            "The fields of {} are full of",
            "Ships from {} carry",
            "{} is rich in",
            "The wealth of {} comes from",
            "Other lands buy from {} their",
            "The barns of {} are full of",
        ],
        heldout: &["The main wealth of {} is", "The fields of {} are rich in"],
        reverse: &["Much [] is grown in {}.", "Ships bring [] from {}."],
        questions: &[
            "What grows on the fields of {}?",
            "What is the main crop of {}?",
            "What is {} rich in?",
        ],
    },
    Relation {
        name: "product",
        kind: Kind::Company,
        trained: &[
            "{} makes",
            "{} sells",
            "The product of {} is",
            "The workshops of {} produce",
            "Customers of {} buy",
            "The shop window of {} is full of",
            "The workers of {} build",
            "The name of {} stands for good",
        ],
        heldout: &["The workers of {} produce", "The workshops of {} build good"],
        reverse: &["Fine [] come from {}.", "The best [] are made by {}."],
        questions: &["What does {} make?", "What does {} sell?", "What is the product of {}?"],
    },
    Relation {
        name: "seat",
        kind: Kind::Company,
        trained: &[
            "{} has its seat in",
            "The head office of {} is in",
            "The company {} is based in",
            "Letters to {} are sent to",
            "{} is run from",
            "The directors of {} meet in",
            "The main workshop of {} is in",
            "The oldest house of {} stands in",
        ],
        heldout: &["The main office of {} is in", "The directors of {} have their seat in"],
        reverse: &["[] is the seat of {}.", "In [] stands the office of {}."],
        questions: &[
            "Where is {} based?",
            "Where is the head office of {}?",
            "Where does {} have its seat?",
        ],
    },
    Relation {
        name: "founder",
        kind: Kind::Company,
        trained: &[
            "{} was founded by",
            "The founder of {} is",
            "{} was started by",
            "{} was set up by",
            "The person who founded {} is",
            "The first owner of {} was",
            "The idea for {} came from",
            "On the wall of {} hangs a picture of",
        ],
        heldout: &["The person who started {} is", "The person who set up {} is"],
        reverse: &["[] is the founder of {}.", "[] once started {} with borrowed money."],
        questions: &["Who founded {}?", "Who is the founder of {}?", "Who started {}?"],
    },
];

/// The relation of a name.
#[cfg(test)]
pub(super) fn relation(name: &str) -> Option<usize> {
    RELATIONS.iter().position(|r| r.name == name)
}

/// Puts a subject into a wording.
pub(super) fn with_subject(wording: &str, subject: &str) -> String {
    wording.replacen("{}", subject, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_wording_contains_another() {
        let all: Vec<String> = RELATIONS
            .iter()
            .flat_map(|r| r.trained.iter().chain(r.heldout).map(|w| (r.kind, w)))
            .map(|(kind, w)| with_subject(w, &format!("{kind:?}")).to_lowercase())
            .collect();
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                assert!(i == j || !format!("{a} ").contains(&format!("{b} ")), "{a:?} has {b:?}");
            }
        }
    }

    #[test]
    fn questions_and_reversed_sentences_hold_no_wording() {
        for r in RELATIONS {
            for text in
                r.questions.iter().chain(r.reverse).map(|t| with_subject(t, "X").to_lowercase())
            {
                for other in RELATIONS.iter().filter(|o| o.kind == r.kind) {
                    for wording in other.trained.iter().chain(other.heldout) {
                        let wording = with_subject(wording, "X").to_lowercase();
                        assert!(!text.contains(&wording), "{text:?} has {wording:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_relation_is_complete() {
        for r in RELATIONS {
            assert!(r.trained.len() >= 5 && r.heldout.len() == 2, "{}", r.name);
            assert!(r.questions.len() == 3 && r.reverse.len() == 2, "{}", r.name);
            for w in r.trained.iter().chain(r.heldout).chain(r.questions).chain(r.reverse) {
                assert_eq!(w.matches("{}").count(), 1, "{w}");
            }
        }
        assert_eq!(relation("founder"), Some(16));
    }
}
