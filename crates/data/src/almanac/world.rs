//! The world: who and what there is, and which facts hold.

use super::names::{self, Namer};
use super::relations::{Kind, RELATIONS, with_subject};
use super::{Fact, Size};
use std::collections::BTreeMap;
use tensor::rng::Rng;

const TRADES: &[&str] = &[
    "baker",
    "mason",
    "weaver",
    "potter",
    "tailor",
    "carpenter",
    "teacher",
    "doctor",
    "farmer",
    "fisher",
    "painter",
    "printer",
    "smith",
    "gardener",
    "miller",
    "brewer",
    "clerk",
    "sailor",
    "shepherd",
    "hunter",
];
const INSTRUMENTS: &[&str] = &[
    "lute", "drum", "flute", "harp", "violin", "trumpet", "cello", "banjo", "horn", "zither",
    "fiddle", "guitar", "piano", "bagpipe", "tuba", "cymbal",
];
const DISHES: &[&str] = &[
    "barley soup",
    "plum pie",
    "smoked eel",
    "onion tart",
    "honey cake",
    "bean stew",
    "roast duck",
    "cheese dumplings",
    "apple bread",
    "pickled fish",
    "mushroom rice",
    "pepper sausage",
    "nut pudding",
    "leek noodles",
    "fried trout",
    "cherry pancakes",
    "lentil curry",
    "spinach omelette",
    "pumpkin porridge",
    "baked turnips",
    "goat ragout",
    "lemon waffles",
    "potato salad",
    "crab toast",
];
const PETS: &[&str] = &[
    "cat", "dog", "goose", "rabbit", "parrot", "donkey", "hedgehog", "turtle", "pony", "ferret",
    "raven", "lizard", "pigeon", "squirrel", "hamster", "snake",
];
const LANDMARKS: &[&str] = &[
    "glass tower",
    "old mill",
    "salt gate",
    "stone arch",
    "clock house",
    "iron fountain",
    "red lighthouse",
    "round temple",
    "copper dome",
    "white castle",
    "hanging garden",
    "marble stairs",
    "wooden theatre",
    "giant oak",
    "black chapel",
    "silver statue",
    "blue palace",
    "ruined wall",
    "twin spires",
    "great library",
    "golden gate",
    "sunken harbour",
    "painted hall",
    "windy pillar",
    "queen column",
    "crooked belfry",
    "green pyramid",
    "long pier",
    "frozen cave",
    "dragon well",
    "mirror pond",
    "star observatory",
];
const CROPS: &[&str] = &[
    "wheat", "cotton", "tea", "grapes", "olives", "flax", "hops", "oranges", "tobacco", "rye",
    "maize", "figs",
];
const PRODUCTS: &[&str] = &[
    "lamps",
    "clocks",
    "boots",
    "carpets",
    "kettles",
    "bells",
    "umbrellas",
    "ropes",
    "mirrors",
    "candles",
    "wagons",
    "ovens",
    "bottles",
    "locks",
    "scissors",
    "hats",
    "compasses",
    "blankets",
    "saddles",
    "baskets",
];

/// A person's name and pronoun.
#[derive(Clone, Debug)]
pub(super) struct Person {
    pub first: String,
    pub full: String,
    pub female: bool,
}

/// One fact before its prompts are spelled out.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub relation: usize,
    pub subject: String,
    pub object: String,
    /// Trained wording that this subject is never described with.
    pub withheld: usize,
}

impl Known {
    /// Wordings that training may use for this fact.
    pub(super) fn wordings(&self) -> impl Iterator<Item = &'static str> {
        let trained = RELATIONS.get(self.relation).map_or(&[][..], |r| r.trained);
        let withheld = self.withheld;
        trained.iter().enumerate().filter(move |(i, _)| *i != withheld).map(|(_, w)| *w)
    }
}

/// The world. Everything in it follows from the seed.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub people: Vec<Person>,
    pub towns: Vec<String>,
    pub countries: Vec<String>,
    pub companies: Vec<String>,
    pub known: Vec<Known>,
    /// Fact numbers by subject.
    pub by_subject: BTreeMap<String, Vec<usize>>,
    pub dishes: Vec<&'static str>,
}

/// Draws from a pool so that every item is used about equally often.
fn deal(rng: &mut Rng, pool: &[String], count: usize) -> Vec<String> {
    let mut cards = Vec::with_capacity(count + pool.len());
    while cards.len() < count && !pool.is_empty() {
        let mut round = pool.to_vec();
        rng.shuffle(&mut round);
        cards.extend(round);
    }
    cards.truncate(count);
    rng.shuffle(&mut cards);
    cards
}

impl World {
    pub(super) fn generate(seed: u64, size: Size) -> Self {
        let counts = size.counts();
        let mut rng = Rng::stream(seed, "almanac world");
        let mut namer = Namer::default();
        let mut list = |rng: &mut Rng, endings: &[&str], upper: bool, n: usize| -> Vec<String> {
            (0..n).map(|_| namer.name(rng, endings, upper)).collect()
        };
        let families = list(&mut rng, names::FAMILY, true, counts.people.div_ceil(2));
        let women = list(&mut rng, names::FEMALE, true, counts.people.div_ceil(2));
        let men = list(&mut rng, names::MALE, true, counts.people / 2);
        let towns = list(&mut rng, names::TOWN, true, counts.towns);
        let countries = list(&mut rng, names::COUNTRY, true, counts.countries);
        let companies = list(&mut rng, names::COMPANY, true, counts.companies);
        let rivers = list(&mut rng, names::RIVER, true, counts.towns / 2);
        let coins = list(&mut rng, names::COIN, false, counts.countries);
        let tongues = list(&mut rng, names::TONGUE, true, counts.countries);

        let mut people = Vec::with_capacity(counts.people);
        let last = deal(&mut rng, &families, counts.people);
        for (i, family) in last.iter().enumerate() {
            let female = i % 2 == 0;
            let first = if female { &women } else { &men }.get(i / 2).cloned().unwrap_or_default();
            people.push(Person { full: format!("{first} {family}"), first, female });
        }
        let names: Vec<String> = people.iter().map(|p| p.full.clone()).collect();
        let owned =
            |pool: &[&str]| -> Vec<String> { pool.iter().map(ToString::to_string).collect() };

        // Every country has a town; the capital is one of its towns.
        let mut home = countries.clone();
        home.extend(deal(&mut rng, &countries, counts.towns.saturating_sub(countries.len())));
        rng.shuffle(&mut home);
        let capitals: Vec<String> = countries
            .iter()
            .map(|country| {
                let own: Vec<&String> = towns
                    .iter()
                    .zip(&home)
                    .filter(|(_, h)| *h == country)
                    .map(|(t, _)| t)
                    .collect();
                rng.choose(&own).map(ToString::to_string).unwrap_or_default()
            })
            .collect();

        let mut known = Vec::new();
        for (relation, r) in RELATIONS.iter().enumerate() {
            let subjects = match r.kind {
                Kind::Person => &names,
                Kind::Town => &towns,
                Kind::Country => &countries,
                Kind::Company => &companies,
            };
            let n = subjects.len();
            let objects = match r.name {
                "birth_town" => deal(&mut rng, &towns, n),
                "trade" => deal(&mut rng, &owned(TRADES), n),
                "instrument" => deal(&mut rng, &owned(INSTRUMENTS), n),
                "dish" | "town_dish" => deal(&mut rng, &owned(DISHES), n),
                "employer" => deal(&mut rng, &companies, n),
                "pet" => deal(&mut rng, &owned(PETS), n),
                "town_country" => home.clone(),
                "town_landmark" => deal(&mut rng, &owned(LANDMARKS), n),
                "town_river" => deal(&mut rng, &rivers, n),
                "capital" => capitals.clone(),
                "currency" => coins.clone(),
                "language" => tongues.clone(),
                "crop" => deal(&mut rng, &owned(CROPS), n),
                "product" => deal(&mut rng, &owned(PRODUCTS), n),
                "seat" => deal(&mut rng, &towns, n),
                _ => deal(&mut rng, &names, n),
            };
            // Withheld wordings are dealt too: each is missing for about as many subjects.
            let wordings: Vec<usize> = (0..r.trained.len()).collect();
            for (i, (subject, object)) in subjects.iter().zip(objects).enumerate() {
                let withheld = (i + rng.below(2) * 3) % wordings.len().max(1);
                known.push(Known { relation, subject: subject.clone(), object, withheld });
            }
        }
        let mut by_subject: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (i, fact) in known.iter().enumerate() {
            by_subject.entry(fact.subject.clone()).or_default().push(i);
        }
        Self { people, towns, countries, companies, known, by_subject, dishes: DISHES.to_vec() }
    }

    /// The object of a fact; empty when there is none.
    pub(super) fn object(&self, subject: &str, relation: &str) -> &str {
        self.by_subject
            .get(subject)
            .into_iter()
            .flatten()
            .filter_map(|&i| self.known.get(i))
            .find(|f| RELATIONS.get(f.relation).is_some_and(|r| r.name == relation))
            .map_or("", |f| f.object.as_str())
    }

    /// The facts with all their prompts.
    pub(super) fn facts(&self, seed: u64) -> Vec<Fact> {
        let mut rng = Rng::stream(seed, "almanac neighbours");
        let spaced = |object: &str| format!(" {object}");
        self.known
            .iter()
            .map(|fact| {
                let relation = &RELATIONS[fact.relation];
                let same = || self.known.iter().filter(|o| o.relation == fact.relation);
                let mut candidates: Vec<String> = same().map(|o| spaced(&o.object)).collect();
                candidates.sort();
                candidates.dedup();
                let prompts = |wordings: &mut dyn Iterator<Item = &'static str>| -> Vec<String> {
                    wordings.map(|w| with_subject(w, &fact.subject)).collect()
                };
                let prompts_train = prompts(&mut fact.wordings());
                let withheld = relation.trained.get(fact.withheld).copied();
                let prompts_heldout_pair = prompts(&mut withheld.into_iter());
                let prompts_heldout_template = prompts(&mut relation.heldout.iter().copied());
                let mut others: Vec<&Known> = same().filter(|o| o.object != fact.object).collect();
                rng.shuffle(&mut others);
                let neighbours = others
                    .into_iter()
                    .take(10)
                    .filter_map(|other| {
                        let wordings: Vec<&str> = other.wordings().collect();
                        rng.choose(&wordings).map(|w| with_subject(w, &other.subject))
                    })
                    .collect();
                Fact {
                    subject: fact.subject.clone(),
                    relation: relation.name.to_string(),
                    object: spaced(&fact.object),
                    candidates,
                    prompts_heldout: [
                        prompts_heldout_pair.clone(),
                        prompts_heldout_template.clone(),
                    ]
                    .concat(),
                    prompts_train,
                    prompts_heldout_pair,
                    prompts_heldout_template,
                    neighbours,
                }
            })
            .collect()
    }
}
